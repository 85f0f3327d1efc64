"""Sources far away: every kind of store, every fault of a network, and messages without secrets."""

import pickle
import random
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import obstore
import pytest

from sa1b_wds import clouds
from sa1b_wds.errors import (
    Changed,
    ConfigError,
    Denied,
    LinkExpired,
    NoCredentials,
    NotFound,
    Sa1bError,
    StorageError,
    Unreachable,
    UsageError,
    WrongRegion,
    masked,
)
from sa1b_wds.limits import Limits
from sa1b_wds.ranged import open_ranged
from sa1b_wds.storage import expand, name_of, open_raw, size_of
from sa1b_wds.traffic import COUNTS

from . import servers
from .fault_proxy import Fault, FaultProxy

DATA = random.Random(4).randbytes(3_000_001)
SECRET = "oh=HUSHHUSH&oe=5F"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small windows, so that there are many requests, and short pauses."""
    for name, value in {"WINDOW": "400000", "AHEAD": "1200000", "FIRST_WAIT": "0.01", "STALL": "1"}.items():
        monkeypatch.setenv(f"SA1B_WDS_{name}", value)


@pytest.fixture
def web() -> Iterator[FaultProxy]:
    with FaultProxy({"/sa_000001.tar": DATA, "/empty.tar": b"", "/with space.tar": b"12"}) as proxy:
        yield proxy


@pytest.fixture
def bucket(s3: servers.Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A real S3 server behind a proxy, with one object."""
    with FaultProxy(s3.address) as proxy:
        for name, value in s3.environment(proxy.url).items():
            monkeypatch.setenv(name, value)
        obstore.put(clouds.store("s3", servers.BUCKET, Limits(), writing=True), "in/sa_000001.tar", DATA)
        proxy.requests.clear()
        yield proxy


S3_URL = f"s3://{servers.BUCKET}/in/sa_000001.tar"


def read_all(url: str, piece: int = 100_003) -> bytes:
    raw, out, buffer = open_raw(url), bytearray(), memoryview(bytearray(piece))
    try:
        while got := raw.readinto(buffer):
            out += buffer[:got]
    finally:
        raw.close()
    return bytes(out)


def read_ranges(url: str) -> None:
    """Random places by several threads at once."""
    file, wrong = open_ranged(url), []
    draw = random.Random(1)
    places = [(draw.randrange(len(DATA)), draw.randrange(1, 300_000)) for _ in range(12)]

    def some(mine: list[tuple[int, int]]) -> None:
        for offset, length in mine:
            views = [memoryview(bytearray(n)) for n in (length // 3, 0, length - length // 3)]
            got = file.read(offset, views)
            if b"".join(views)[:got] != DATA[offset : offset + length] or got != min(length, len(DATA) - offset):
                wrong.append((offset, length))

    threads = [threading.Thread(target=some, args=(places[i::3],)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert file.behind(0) == len(DATA)
    assert file.read(len(DATA), [memoryview(bytearray(7))]) == 0
    file.close()


def test_a_web_server(web: FaultProxy) -> None:
    url = f"{web.url}/sa_000001.tar"
    assert size_of(url) == len(DATA)
    assert read_all(url) == DATA
    read_ranges(url)
    assert read_all(f"{web.url}/empty.tar") == b""
    assert read_all(f"{web.url}/with space.tar") == b"12"
    assert read_all(f"{web.url}/with%20space.tar") == b"12"
    assert expand([url]) == [url]


def test_s3(bucket: FaultProxy) -> None:
    assert size_of(S3_URL) == len(DATA)
    assert read_all(S3_URL) == DATA
    read_ranges(S3_URL)
    assert expand([f"s3://{servers.BUCKET}/in"]) == [S3_URL]
    assert expand([f"s3://{servers.BUCKET}/in/sa_{{000001..000002}}.tar"])[1].endswith("in/sa_000002.tar")
    with pytest.raises(NotFound, match=r"no \*\.tar"):
        expand([f"s3://{servers.BUCKET}/nothing"])


def test_gcs(gcs: servers.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://{gcs.address}")
    servers.gcs_put(gcs, "in/sa_000001.tar", DATA)
    url = f"gs://{servers.BUCKET}/in/sa_000001.tar"
    assert size_of(url) == len(DATA)
    assert read_all(url) == DATA
    read_ranges(url)
    assert expand([f"gs://{servers.BUCKET}/in/"]) == [url]
    with pytest.raises(NotFound):
        size_of(f"gs://{servers.BUCKET}/in/sa_000002.tar")


FAULTS = {
    "cut": Fault(cut=123_457, times=5),
    "cut at once": Fault(cut=0, times=5),
    "stalled": Fault(cut=50_000, stall=5, times=1),
    "503": Fault(status=503, times=5, headers={"Retry-After": "0"}),
    "500": Fault(status=500, times=3),
    "429": Fault(status=429, times=3),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("where", ["web", "s3"])
def test_a_passing_fault_costs_time_and_nothing_else(name: str, where: str, request: pytest.FixtureRequest) -> None:
    if where == "web":
        proxy = request.getfixturevalue("web")
        url = f"{proxy.url}/sa_000001.tar"
    else:
        proxy, url = request.getfixturevalue("bucket"), S3_URL
    fault = FAULTS[name]
    mine = Fault(**{**vars(fault), "happened": 0, "met": 0, "when": lambda r: r.is_read, "skip": 1})
    proxy.faults.append(mine)
    before = COUNTS.now().retries
    assert read_all(url) == DATA
    assert mine.happened == mine.times
    assert COUNTS.now().retries - before >= mine.times
    if name == "cut":  # it went on where it had stopped, give or take a piece, and fetched no window twice
        wanted = [r.headers["range"] for r in proxy.requests if r.is_read]
        begins = [int(text.removeprefix("bytes=").split("-")[0]) for text in wanted]
        assert sum(begin % 400_000 != 0 for begin in begins) == 5
        assert len(begins) == len(set(begins))


@pytest.mark.parametrize("where", ["web", "s3"])
def test_one_request_in_five_fails(where: str, request: pytest.FixtureRequest) -> None:
    proxy = request.getfixturevalue("web" if where == "web" else "bucket")
    url = f"{proxy.url}/sa_000001.tar" if where == "web" else S3_URL
    proxy.faults += [
        Fault(cut=77_777, every=5, times=100, when=lambda r: r.is_read),
        Fault(status=503, every=7, times=100),
    ]
    assert read_all(url) == DATA
    read_ranges(url)


def test_retry_after_is_obeyed(web: FaultProxy) -> None:
    web.faults.append(Fault(status=429, headers={"Retry-After": "1"}, when=lambda r: r.is_read))
    begun = time.monotonic()
    assert read_all(f"{web.url}/sa_000001.tar") == DATA
    assert time.monotonic() - begun >= 1.0


@pytest.mark.parametrize("where", ["web", "s3"])
def test_what_does_not_pass_ends_after_some_attempts(
    where: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SA1B_WDS_ATTEMPTS", "3")
    proxy = request.getfixturevalue("web" if where == "web" else "bucket")
    url = f"{proxy.url}/sa_000001.tar" if where == "web" else S3_URL
    proxy.faults.append(Fault(status=503, times=float("inf"), skip=1, when=lambda r: r.is_read))
    with pytest.raises(Unreachable, match=r"byte [\d,]+: gave up after 3 attempts.*503") as raised:
        read_all(url)
    assert raised.value.exit_code == 1


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SA1B_WDS_ATTEMPTS", "2")
    (port,) = servers.free_ports(1)
    with pytest.raises(Unreachable, match="refused"):
        size_of(f"http://127.0.0.1:{port}/x.tar")
    with pytest.raises(Unreachable):
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
        size_of("s3://b/x.tar")


def test_another_object_in_between(web: FaultProxy) -> None:
    url = f"{web.url}/sa_000001.tar"
    web.faults.append(Fault(headers={"ETag": '"other"'}, times=9, skip=3, when=lambda r: r.is_read))
    with pytest.raises(Changed, match="replaced"):
        read_all(url)
    web.faults.clear()
    raw = open_raw(url)
    assert isinstance(web.upstream, dict)
    web.upstream["/sa_000001.tar"] = bytes(len(DATA))  # a real exchange: If-Match is refused
    with pytest.raises(Changed):
        buffer = memoryview(bytearray(1 << 20))
        while raw.readinto(buffer):
            pass
    raw.close()


def test_another_object_in_between_on_s3(bucket: FaultProxy) -> None:
    file = open_ranged(S3_URL)
    view = memoryview(bytearray(1000))
    assert file.read(5, [view]) == 1000
    store = clouds.store("s3", servers.BUCKET, Limits(), writing=True)
    obstore.put(store, "in/sa_000001.tar", bytes(len(DATA)))
    with pytest.raises(Changed, match="replaced"):
        file.read(5, [view])


@pytest.mark.parametrize(
    "headers",
    [{"Content-Range": "bytes 0-9/3000001"}, {"Content-Range": "bytes 400000-799999/4000000"}],
    ids=["another place", "another length"],
)
def test_answers_that_are_not_what_was_asked(web: FaultProxy, headers: dict[str, str]) -> None:
    web.faults.append(Fault(headers=headers, when=lambda r: r.headers.get("range", "").startswith("bytes=400000-")))
    with pytest.raises(Changed):
        read_all(f"{web.url}/sa_000001.tar")


def test_a_length_that_is_wrong(web: FaultProxy) -> None:
    """Longer than was asked for is cut off, shorter is asked for again."""
    when = lambda r: r.headers.get("range", "").startswith("bytes=400000-")  # noqa: E731
    web.faults.append(Fault(headers={"Content-Length": "100"}, when=when))
    assert read_all(f"{web.url}/sa_000001.tar") == DATA
    assert web.faults[0].happened == 1


def test_a_server_without_ranges(web: FaultProxy) -> None:
    web.faults.append(Fault(status=200, body=b"all of it", times=9, when=lambda r: "bytes=400000-" in str(r)))
    with pytest.raises(StorageError, match="pipe:"):
        read_all(f"{web.url}/sa_000001.tar")


@pytest.mark.parametrize("status", [403, 405, 501])
def test_sizes_without_head(web: FaultProxy, status: int) -> None:
    """Signed links are often good for GET alone."""
    web.faults.append(Fault(status=status, times=99, when=lambda r: r.method == "HEAD"))
    url = f"{web.url}/sa_000001.tar?{SECRET}"
    assert size_of(url) == len(DATA)
    assert web.requests[-1].headers["range"] == "bytes=0-0"
    assert size_of(f"{web.url}/empty.tar") == 0
    assert read_all(url) == DATA


@pytest.mark.parametrize(
    ("status", "body", "error", "words"),
    [
        (404, b"", NotFound, "no such object"),
        (404, b"<Code>NoSuchBucket</Code>", NotFound, "no such bucket"),
        (403, b"<Code>AccessDenied</Code>", Denied, "AWS_PROFILE"),
        (401, b"", NoCredentials, "AWS_PROFILE"),
        (400, b"<Code>AuthorizationHeaderMalformed</Code><Region>eu-west-3</Region>", WrongRegion, "eu-west-3"),
        (301, b"<Code>PermanentRedirect</Code>", WrongRegion, "AWS_REGION"),
    ],
)
def test_what_a_store_may_say(bucket: FaultProxy, status: int, body: bytes, error: type[Sa1bError], words: str) -> None:
    bucket.faults.append(Fault(status=status, body=body, times=99))
    with pytest.raises(StorageError, match=words) as raised:
        size_of(S3_URL)
    assert type(raised.value) is error
    assert raised.value.where == S3_URL


def test_what_a_real_store_says(
    s3: servers.Server, bucket: FaultProxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(NotFound):
        open_raw(f"s3://{servers.BUCKET}/in/none.tar")
    with pytest.raises(NotFound):
        open_ranged("s3://nobucket/x.tar")
    with pytest.raises(UsageError, match="names no bucket"):
        size_of("s3:///x.tar")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(Denied, match="SignatureDoesNotMatch"):
        size_of(S3_URL)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9/169.254.169.254")
    with pytest.raises(NoCredentials, match="AWS_PROFILE"):
        size_of(S3_URL)
    credentials = tmp_path / "credentials"
    credentials.write_text(
        f"[me]\naws_access_key_id = {servers.READER[0]}\naws_secret_access_key={servers.READER[1]}\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(credentials))
    monkeypatch.setenv("AWS_PROFILE", "me")
    assert size_of(S3_URL) == len(DATA)
    config = tmp_path / "config"
    config.write_text(f"[profile me]\nendpoint_url = http://{s3.address}\nregion = eu-west-3\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    assert clouds.amazon()["region"] == "us-east-1"  # the environment wins
    assert size_of(S3_URL) == len(DATA)


def test_an_expired_link(web: FaultProxy) -> None:
    web.faults.append(Fault(status=403, times=99, body=b"URL signature expired"))
    with pytest.raises(LinkExpired, match="fetch a new links file") as raised:
        open_raw(f"{web.url}/sa_000001.tar?{SECRET}")
    assert_hushed(raised.value)


def assert_hushed(error: BaseException) -> None:
    text = "".join(traceback.format_exception(error)) + repr(error) + str(error) + repr(vars(error))
    text += repr(pickle.dumps(error))
    assert "HUSH" not in text


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=403, times=99),
        Fault(status=404, times=99),
        Fault(status=503, times=99),
        Fault(cut=5, times=99, when=lambda r: r.method == "GET"),
        Fault(status=302, headers={"Location": "http://127.0.0.1:1/?oh=HUSH"}, times=99),
        Fault(status=200, headers={"Content-Length": "x"}, times=99),
    ],
    ids=["403", "404", "503", "cut", "redirected", "nonsense"],
)
def test_no_message_carries_a_secret(web: FaultProxy, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SA1B_WDS_ATTEMPTS", "2")
    web.faults.append(fault)
    url = web.url.replace("http://", "http://HUSHUSER:HUSHWORD@") + f"/sa_000001.tar?{SECRET}"
    with pytest.raises(StorageError) as raised:
        read_all(url)
    assert_hushed(raised.value)
    assert "/sa_000001.tar?***" in raised.value.where


def test_user_and_password_are_sent_and_masked(web: FaultProxy) -> None:
    url = web.url.replace("http://", "http://me:p%40ss@") + "/sa_000001.tar"
    assert read_all(url) == DATA
    assert web.requests[-1].headers["authorization"] == "Basic bWU6cEBzcw=="
    assert masked(f"x {url} y") == f"x {web.url.replace('http://', 'http://***@')}/sa_000001.tar y"
    assert masked("a/b?c#d") == "a/b?c#d"
    assert masked("pipe:curl -s 'https://h/p/x.tar?sig=1&b=2' | cat") == "pipe:curl -s 'https://h/p/x.tar?***' | cat"


def test_closing_ends_the_reading_ahead(web: FaultProxy) -> None:
    others = lambda r: r.is_read and not r.headers["range"].startswith("bytes=0-")  # noqa: E731
    web.faults.append(Fault(cut=10, stall=20, times=99, when=others))
    raw = open_raw(f"{web.url}/sa_000001.tar")
    buffer = memoryview(bytearray(1000))
    assert raw.readinto(buffer)
    begun = time.monotonic()
    raw.close()
    assert time.monotonic() - begun < 0.5


def test_the_budget_of_reading_ahead_holds(web: FaultProxy) -> None:
    raw = open_raw(f"{web.url}/sa_000001.tar")
    time.sleep(0.3)
    assert 0 < sum(r.is_read for r in web.requests) <= 3  # three windows of 400,000 bytes
    raw.close()


def test_limits_come_from_the_environment() -> None:
    assert Limits.of({}) == Limits()
    assert Limits.of({"SA1B_WDS_STALL": "2.5", "SA1B_WDS_ATTEMPTS": "4"}) == Limits(stall=2.5, attempts=4)
    for wrong in ("x", "0", "-1", "nan", ""):
        if wrong:
            with pytest.raises(ConfigError, match="SA1B_WDS_STALL"):
                Limits.of({"SA1B_WDS_STALL": wrong})


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://cdn.example/a/sa_000017.tar?x=1/2.tar", "sa_000017.tar"),
        ("s3://b/deep/sa%20_1.tar", "sa _1.tar"),
        ("pipe:aws s3 cp s3://b/x/sa_000003.tar -", "sa_000003.tar"),
        ("pipe:curl -s 'https://h/sa_000004.tar?sig=9' | cat", "sa_000004.tar"),
    ],
)
def test_names(url: str, name: str) -> None:
    assert name_of(url) == name


def test_commands(tmp_path: Path) -> None:
    (tmp_path / "sa_000001.tar").write_bytes(DATA)
    url = f"pipe:cat {tmp_path}/sa_000001.tar"
    assert read_all(url) == DATA
    assert expand([f"pipe:cat {tmp_path}/sa_{{000001..000002}}.tar"])[1] == f"pipe:cat {tmp_path}/sa_000002.tar"
    with pytest.raises(StorageError, match="--assume-size"):
        size_of(url)
    with pytest.raises(UsageError, match=r"names no \.tar"):
        name_of("pipe:generate")
    with pytest.raises(StorageError, match=r"the command failed.*exit status 3"):
        read_all(f"pipe:cat {tmp_path}/sa_000001.tar; exit 3")
    with pytest.raises(UsageError, match="not a kind of URL"):
        open_raw("ftp://h/x.tar")


def test_after_a_fork(bucket: FaultProxy) -> None:
    """The library's threads are lost in a fork, and it would wait for them for ever."""
    code = f"""
import os, signal
from sa1b_wds.objects import Bucket
from sa1b_wds.remote import read
from sa1b_wds.errors import UsageError
whole = read({S3_URL!r})
if (pid := os.fork()) == 0:
    signal.alarm(20)
    assert read({S3_URL!r}) == whole
    try:
        Bucket("s3://{servers.BUCKET}/in").put("y", b"1")
    except UsageError as error:
        assert "forkserver" in str(error)
        os._exit(7)
    os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
"""
    subprocess.run([sys.executable, "-c", code], check=True)
