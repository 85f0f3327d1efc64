"""A bucket as a destination: the same data set as in a folder, whatever happens on the way, and nothing left over."""

import hashlib
import inspect
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from sa1b_wds import cli, objects, signing, storage, uploads
from sa1b_wds.convert import missing_tasks, read_plan
from sa1b_wds.errors import Denied, StorageError, Unreachable, UsageError
from sa1b_wds.objects import Bucket, ObjectAttempt
from sa1b_wds.process import identity
from sa1b_wds.storage import Destination
from sa1b_wds.verify import verify

from . import making, running, servers
from .fault_proxy import Fault, FaultProxy


@pytest.fixture
def proxy(s3: servers.Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with FaultProxy(s3.address) as proxy:
        for name, value in s3.environment(proxy.url).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("SA1B_WDS_FIRST_WAIT", "0.01")
        yield proxy


@pytest.fixture
def place(proxy: FaultProxy, request: pytest.FixtureRequest) -> str:
    """A place of its own in the bucket."""
    return f"s3://{servers.BUCKET}/{hashlib.sha1(request.node.name.encode()).hexdigest()[:12]}"


def tree(url: str) -> dict[str, str]:
    bucket = Bucket(url)
    return {name: hashlib.sha256(bucket.read(name)).hexdigest() for name in bucket.names()}


def local_tree(dest: Path) -> dict[str, str]:
    return {name: value for name, value in running.tree(dest).items() if value != "folder"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    running.write(folder, {f"sa_{n:06d}.tar": making.tar(making.pairs(range(9 * n + 1, 9 * n + 9))) for n in range(3)})
    return folder


@pytest.fixture(scope="module")
def expected(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    dest = tmp_path_factory.mktemp("local") / "dest"
    assert cli.main(["convert", str(sources), "--out", str(dest), "--mix", "1", "--workers", "1"]) == 0
    return local_tree(dest)


def convert(sources: Path | str, dest: str, *more: str) -> int:
    return cli.main(["convert", str(sources), "--out", dest, "--mix", "1", "--workers", "1", *more])


def nothing_left_over(place: str) -> None:
    assert uploads.pending(place) == []
    assert not [name for name in Bucket(place).names() if name.startswith(".state")]


def test_the_same_surface() -> None:
    for here, there in ((Destination, Bucket), (storage.Attempt, ObjectAttempt)):
        for name, method in inspect.getmembers(here, inspect.isfunction):
            if name.startswith("_") or name == "path":  # which only folders have
                continue
            other = getattr(there, name)
            assert list(inspect.signature(method).parameters) == list(inspect.signature(other).parameters), name
    assert isinstance(Destination("s3://b/x"), Bucket)
    assert type(Destination("/tmp/x")) is Destination


@pytest.mark.slow
def test_the_same_data_set(sources: Path, expected: dict[str, str], place: str, proxy: FaultProxy) -> None:
    assert convert(sources, place) == 0
    assert tree(place) == expected
    nothing_left_over(place)
    assert verify(Destination(place), deep=True, against=[str(sources)]) == []
    writes = [r for r in proxy.requests if r.method == "PUT" and r.body and "x-amz-checksum-sha256" in r.headers]
    assert len(writes) >= len(expected)
    receipts = [r for r in proxy.requests if r.method == "PUT" and "/receipts/" in r.path]
    assert all(r.headers.get("if-none-match") == "*" for r in receipts)
    count = len(proxy.requests)
    assert convert(sources, place) == 0  # nothing to do
    assert not [r for r in proxy.requests[count:] if ".tar" in r.path and r.method in ("PUT", "POST")]
    assert tree(place) == expected
    assert cli.main(["status", place]) == 0


def test_from_a_bucket_into_a_bucket(sources: Path, expected: dict[str, str], place: str) -> None:
    for path in sources.iterdir():
        Bucket(f"{place}/in").put(path.name, path.read_bytes())
    assert convert(f"{place}/in", f"{place}/out") == 0
    assert tree(f"{place}/out") == expected
    assert convert(f"{place}/in", f"{place}/in") == 2  # tars in the data set


def test_a_bad_network(sources: Path, expected: dict[str, str], place: str, proxy: FaultProxy) -> None:
    proxy.faults += [
        Fault(status=503, every=4, times=99, when=lambda r: r.method in ("PUT", "POST")),
        Fault(status=500, every=5, times=99, when=lambda r: r.method == "GET"),
        Fault(cut=20, every=6, times=99, when=lambda r: r.method == "GET"),
    ]
    assert convert(sources, place) == 0
    proxy.faults.clear()
    assert tree(place) == expected
    nothing_left_over(place)


def big_attempt(place: str, label: str = "task-000000", size: int = 20 << 20) -> ObjectAttempt:
    """An attempt with one large object whose first parts are on the server."""
    attempt = Bucket(place).attempt(label)
    writer = attempt.create("a.tar")
    data = random.Random(1).randbytes(1 << 20)
    for _ in range(size >> 20):
        writer.write([data])
    return attempt


def test_large_objects_go_up_in_parts_and_stay_invisible(place: str, proxy: FaultProxy) -> None:
    with big_attempt(place) as attempt:
        bucket = attempt.destination
        assert len(uploads.pending(place) or ()) == 1
        assert not bucket.exists("a.tar")
        writer = attempt._files["a.tar"]
        assert isinstance(writer, objects.ObjectWriter)
        writer.finish()
        writer.close()
        assert not bucket.exists("a.tar")
        attempt.put("b.idx", b"side")
        assert bucket.at_work("task-000000")
        assert not bucket.at_work("task-000001")
        assert attempt.publish("receipt", b"done")
    assert not bucket.at_work("task-000000")
    assert bucket.names() == ["a.tar", "b.idx", "receipt"]
    assert bucket.size("a.tar") == 20 << 20
    assert bucket.read("a.tar") == random.Random(1).randbytes(1 << 20) * 20
    parts = [r for r in proxy.requests if r.method == "PUT" and "partNumber" in r.path]
    assert [len(r.body) >= 8 << 20 for r in parts] == [True, True, False]
    assert all("x-amz-checksum-sha256" in r.headers for r in parts)
    with bucket.attempt("task-000000") as second:
        assert not second.publish("receipt", b"done")


def test_a_failed_attempt_leaves_nothing(place: str) -> None:
    with pytest.raises(ZeroDivisionError), big_attempt(place):
        raise ZeroDivisionError
    assert uploads.pending(place) == []
    assert Bucket(place).names() == []


def test_what_a_dead_process_left_is_swept(place: str) -> None:
    code = f"from tests.test_objects import big_attempt; import os; a = big_attempt({place!r}); os.kill(os.getpid(), 9)"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(uploads.pending(place) or ()) == 1
    assert len(Bucket(place).names(".state")) == 1
    with Bucket(place).attempt("task-000000") as attempt:
        attempt.create("a.tar")
        assert uploads.pending(place) == []
    assert Bucket(place).names() == []


def test_a_living_one_is_left_alone(place: str) -> None:
    with big_attempt(place) as first:
        with Bucket(place).attempt("task-000000") as second:
            second.create("a.tar").write([b"x"])
        Bucket(place).clear_state()
        assert len(uploads.pending(place) or ()) == 1
        writer = first._files["a.tar"]
        assert isinstance(writer, objects.ObjectWriter)
        writer.finish()
        assert first.publish("receipt", b"done")
    assert Bucket(place).names() == ["a.tar", "receipt"]


def test_who_is_dead() -> None:
    mine = json.dumps(identity()).encode()
    assert not objects._is_dead(mine, 5)
    assert objects._is_dead(mine, 901)
    ended = subprocess.Popen(["true"])
    ended.wait()
    for change in ({"pid": ended.pid}, {"start": "1"}):
        assert objects._is_dead(json.dumps({**identity(), **change}).encode(), 5)
    for change in ({"host": "other"}, {"boot": "x"}, {"processes": "pid:[1]"}):
        assert not objects._is_dead(json.dumps({**identity(), **change, "pid": ended.pid}).encode(), 5)
    assert not objects._is_dead(b"[", 5)


@pytest.mark.slow
def test_killed_at_any_moment_and_run_again(
    sources: Path, expected: dict[str, str], place: str, proxy: FaultProxy
) -> None:
    """The process dies after so many requests that write; the same command then ends with the same objects."""
    code = "from sa1b_wds.cli import run; run()"
    options = ["--out", place, "--mix", "1", "--workers", "1"]
    command = [sys.executable, "-c", code, "convert", str(sources), *options]
    for after in (3, 8, 13, 30):
        count = 0
        reached = threading.Event()

        def writes(r: object, after: int = after, reached: threading.Event = reached) -> bool:
            nonlocal count
            count += getattr(r, "method", "") in ("PUT", "POST", "DELETE")
            if count == after:
                reached.set()
            return False

        proxy.faults = [Fault(when=writes)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 30
        while not reached.is_set() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.005)
        with_receipt = process.poll() is None
        process.kill()
        process.wait()
        assert with_receipt or after == 30
    proxy.faults = []
    assert convert(sources, place) == 0
    assert tree(place) == expected
    nothing_left_over(place)


def test_two_processes_on_one_task(sources: Path, expected: dict[str, str], place: str) -> None:
    assert cli.main(["plan", str(sources), "--out", place, "--mix", "1"]) == 0
    code = "from sa1b_wds.cli import run; run()"
    command = [sys.executable, "-c", code, "convert", str(sources), "--out", place, "--task", "0"]
    both = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert missing_tasks(Destination(place), read_plan(Destination(place))) == [1, 2]
    assert convert(sources, place) == 0
    assert tree(place) == expected
    nothing_left_over(place)


def test_what_cannot_be_written(
    s3: servers.Server, sources: Path, place: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.environment(proxy.url, servers.READER).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Denied, match="AWS_PROFILE"):
        Bucket(place).put("x", b"")
    with pytest.raises(UsageError, match="only read from"):
        Destination("https://h/x").put("x", b"")
    monkeypatch.setenv("SA1B_WDS_ATTEMPTS", "2")
    proxy.faults.append(Fault(status=503, times=float("inf")))
    with pytest.raises(Unreachable, match="503"):
        Bucket(place).put("x", b"")


def test_sixteen_shards_stay_within_their_memory(place: str) -> None:
    """Two parts a shard: the one that fills, the one on its way."""
    code = f"""
from sa1b_wds.objects import Bucket
def peak():  # not ru_maxrss, which a new program takes over from the one that started it
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
data = bytes(1 << 20)
with Bucket({place!r}).attempt("task-000000") as attempt:
    warm = attempt.create("warm"); warm.write([data] * 17)
    before = peak()
    files = [attempt.create(str(i)) for i in range(16)]
    for _ in range(20):
        for file in files:
            file.write([data])
    print((peak() - before) >> 10)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 16 * 2 * 8 + 64


def test_signatures_are_amazons() -> None:
    """The example "GET Bucket Lifecycle" of Amazon's documentation of Signature 4."""
    headers = signing.signature(
        method="GET",
        host="examplebucket.s3.amazonaws.com",
        path="/",
        query={"lifecycle": ""},
        region="us-east-1",
        access="AKIAIOSFODNN7EXAMPLE",
        secret="wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
        token=None,
        when=datetime(2013, 5, 24, tzinfo=UTC),
    )
    assert headers["Authorization"].endswith("fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543")


def test_a_store_that_does_not_tell_of_uploads(place: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy.faults.append(Fault(status=403, times=99, when=lambda r: "uploads=" in r.path and r.method == "GET"))
    with pytest.raises(StorageError):
        uploads.pending(place)
    with Bucket(place).attempt("t") as attempt:
        attempt.create("x").write([b"1"])
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    assert uploads.pending(place) is None
    assert uploads.pending("gs://b/x") is None
