"""What one server is asked for: turns, fewer of them after a 429, late answers asked for twice, all of it counted."""

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sa1b_wds import cli, remote, traffic
from sa1b_wds.config import Convert, Stream, limits, load
from sa1b_wds.errors import Unreachable
from sa1b_wds.limits import Limits
from sa1b_wds.ranged import open_ranged
from sa1b_wds.remote import RemoteRaw, _Lanes
from sa1b_wds.storage import open_raw
from sa1b_wds.traffic import Counts, Passing, Server, Traffic

from . import making, running, servers
from .fault_proxy import Fault, FaultProxy

DATA = random.Random(8).randbytes(6_000_000)
QUICK = Limits(first_wait=0.01, window=200_000, ahead=600_000)


@pytest.fixture
def web() -> Iterator[FaultProxy]:
    with FaultProxy({"/sa_000001.tar": DATA}) as proxy:
        yield proxy


def drain(raw: RemoteRaw) -> bytes:
    out, buffer = bytearray(), memoryview(bytearray(100_000))
    while n := raw.readinto(buffer):
        out += buffer[:n]
    raw.close()
    return bytes(out)


def test_turns_are_bounded_and_fewer_after_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    server, stop = Server(Limits(connections=8)), threading.Event()
    for _ in range(8):
        assert server.enter(stop)
    stop.set()
    assert not server.enter(stop)
    stop.clear()
    server.slower(Passing("503", throttled=True))
    server.slower(Passing("503", throttled=True))  # of the same moment: one refusal
    assert server.allowed == 4
    server.slower(Passing("cut"))
    assert server.allowed == 4
    for _ in range(5):
        server.leave()
    assert server.enter(stop)
    server.answered(0.01)  # too soon for more
    assert server.allowed == 4
    monkeypatch.setattr(traffic, "_RISE_PAUSE", 0.0)
    for _ in range(40):
        server.answered(0.01)
    assert server.allowed == 8


def test_retry_after_holds_everybody() -> None:
    server, stop = Server(Limits()), threading.Event()
    server.slower(Passing("429", 0.4, throttled=True))
    begun = time.monotonic()
    assert server.enter(stop)
    assert time.monotonic() - begun >= 0.35


def test_parallelism_goes_down_where_the_server_says_so(web: FaultProxy) -> None:
    """A server that takes two requests at a time: hardly any is refused once that is known."""
    many = Limits(first_wait=0.01, window=20_000, ahead=320_000, connections=16, hedge=0)
    busy, refused, lock = 0, 0, threading.Lock()
    served = web._server.RequestHandlerClass._send  # type: ignore[attr-defined]

    def send(self: object, status: int, headers: dict[str, str], body: bytes, fault: object) -> None:
        nonlocal busy, refused
        with lock:
            busy += 1
            full = busy > 2
            refused += full
        try:
            time.sleep(0.01)
            served(self, 429, {"Content-Length": "0", "Retry-After": "0"}, b"", None) if full else served(
                self, status, headers, body, fault
            )
        finally:
            with lock:
                busy -= 1

    web._server.RequestHandlerClass._send = send  # type: ignore[attr-defined]
    raw = RemoteRaw(f"{web.url}/sa_000001.tar", many)
    assert drain(raw) == DATA
    counts = raw._object.counts.now()
    assert counts.throttled == refused > 0
    assert refused < 0.5 * len(DATA) / 20_000  # where nobody slows down, the reading gives up


def test_a_late_answer_is_asked_for_twice(web: FaultProxy) -> None:
    limits = Limits(hedge=0.1)
    file, buffer = open_ranged(f"{web.url}/sa_000001.tar", limits), memoryview(bytearray(100_000))
    web.faults.append(Fault(every=15, times=99, late=1.0, when=lambda r: r.is_read, skip=25))
    slowest = 0.0
    for i in range(60):
        begun = time.monotonic()
        assert file.read(i * 100_000, [buffer]) == 100_000
        assert buffer == DATA[i * 100_000 : (i + 1) * 100_000]
        slowest = max(slowest, time.monotonic() - begun)
    assert web.faults[0].happened >= 2
    assert slowest < 0.9
    seen = file.traffic
    assert 2 <= seen.hedged <= 6  # a tenth of sixty
    assert seen.bytes == len(DATA)
    assert seen.retries == 0
    time.sleep(1.1)  # the late ones come, and are counted and let go
    assert 0 < file.traffic.again <= seen.hedged * 100_000


@pytest.mark.parametrize("hedge", [0.0, 0.05])
def test_no_more_than_the_share_is_asked_for_twice(web: FaultProxy, hedge: float) -> None:
    """Where every answer is late, nearly nothing is gained by asking again."""
    file, buffer = open_ranged(f"{web.url}/sa_000001.tar", Limits(hedge=hedge)), memoryview(bytearray(100_000))
    web.faults.append(Fault(times=99, late=0.3, when=lambda r: r.is_read, skip=20))
    for i in range(30):
        assert file.read(i * 100_000, [buffer]) == 100_000
    assert file.traffic.hedged <= hedge * 30
    assert (file.traffic.hedged > 0) == (hedge > 0)


def test_a_second_request_that_fails_is_no_error(web: FaultProxy) -> None:
    file, buffer = open_ranged(f"{web.url}/sa_000001.tar", Limits(hedge=0.2)), memoryview(bytearray(100_000))
    for i in range(25):
        file.read(i * 100_000, [buffer])
    web.faults += [
        Fault(late=1.5, when=lambda r: r.is_read),
        Fault(status=503, when=lambda r: r.is_read),
    ]
    assert file.read(0, [buffer]) == 100_000
    assert buffer == DATA[:100_000]
    assert (file.traffic.hedged, file.traffic.retries) == (1, 0)
    assert [fault.happened for fault in web.faults] == [1, 1]


def test_lanes_grow_while_that_helps() -> None:
    def rounds(lanes: _Lanes, rate_of: float, starved: bool) -> None:
        for _ in range(lanes._settling + 2 * lanes.count):
            lanes._begun = time.perf_counter() - lanes._windows - 1
            lanes.waited(0.9 if starved else 0.0)
            lanes.taken(int(1e6 * rate_of))

    lanes = _Lanes(4, 16)
    rounds(lanes, 4, starved=True)
    assert lanes.count == 6
    rounds(lanes, 6, starved=True)
    assert lanes.count == 9
    rounds(lanes, 6, starved=True)  # no faster: one step back, and no further for a while
    assert lanes.count == 6
    rounds(lanes, 6, starved=True)
    assert lanes.count == 6
    lanes = _Lanes(4, 16)
    rounds(lanes, 4, starved=False)
    assert lanes.count == 4


def test_more_connections_to_a_host_that_gives_little_to_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same budget, more and smaller windows: several times one connection's rate."""
    monkeypatch.setattr(remote, "_SMALLEST", 256 << 10)
    data = random.Random(5).randbytes(40 << 20)
    with FaultProxy({"/x.tar": data}) as proxy:
        proxy.rate = 2 << 20
        raw = RemoteRaw(f"{proxy.url}/x.tar", Limits(window=1 << 20, ahead=4 << 20, connections=16))
        assert raw._lanes.count == 4
        out, buffer, most = bytearray(), memoryview(bytearray(100_000)), 0
        while n := raw.readinto(buffer):
            out += buffer[:n]
            most = max(most, raw._lanes.count)
            assert raw._asked - raw._taken <= 4 << 20
        raw.close()
    assert out == data
    assert most >= 6  # how much faster that is, the benchmark says: a busy machine would not let it be


def test_counts_and_their_words() -> None:
    whole = Counts()
    part = Counts(whole)
    part.add(retries=3, throttled=1, waited=0.25)
    part.add(hedged=1, again=65_536)
    assert whole.now() == part.now()
    assert str(Traffic()) == str(Traffic(requests=5, bytes=7)) == ""
    words = "3 retries (1 throttled), 0.2 s of pauses, 1 late answers asked for twice, 65,536 bytes fetched again"
    assert str(part.now()) == words
    assert part.now() - part.now() == Traffic()
    assert part.now() + Traffic(retries=1) - part.now() == Traffic(retries=1)


def test_options_then_the_environment_then_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text("[convert]\nattempts = 3\nstall = 2.5\nwindow = '1MiB'\n[stream]\nhedge = 0.0\n")
    environment = {"SA1B_WDS_ATTEMPTS": "5", "SA1B_WDS_CONNECTIONS": "4"}
    assert limits(load(file, Convert), environment) == Limits(attempts=3, stall=2.5, window=1 << 20, connections=4)
    assert limits(load(file, Stream), environment) == Limits(attempts=5, hedge=0.0, connections=4)
    assert limits(load(None, Convert), {}) == Limits()


def test_limits_travel_with_the_job(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """In processes of their own too, whose environment says nothing; and what happened stands in the log."""
    tars = {f"sa_{n:06d}.tar": making.tar(making.pairs(range(10 * n + 1, 10 * n + 9))) for n in range(2)}
    running.write(tmp_path / "here", tars)
    with FaultProxy({f"/{name}": data for name, data in tars.items()}) as proxy:
        urls = [f"{proxy.url}/{name}" for name in tars]
        command = ["convert", *urls, "--mix", "1", "--workers", "2", "--out"]
        proxy.faults.append(Fault(status=503, times=float("inf"), when=lambda r: r.is_read))
        begun = time.monotonic()
        few = ["--attempts", "2", "--first-wait", "0.01"]
        assert cli.main([*command, str(tmp_path / "never"), *few]) == 1
        assert time.monotonic() - begun < 20
        assert "gave up after 2 attempts" in capfd.readouterr().err
        proxy.faults = [Fault(status=429, every=2, times=4, when=lambda r: r.is_read)]
        assert cli.main([*command, str(tmp_path / "there"), "--first-wait", "0.01"]) == 0
        said = capfd.readouterr().err
    assert "retries (" in said and "throttled" in said
    assert cli.main(["convert", str(tmp_path / "here"), "--mix", "1", "--out", str(tmp_path / "local")]) == 0
    assert "retries" not in capfd.readouterr().err
    assert running.tree(tmp_path / "there") == running.tree(tmp_path / "local")  # receipts are the same, too


def test_retry_after_is_obeyed_on_s3_too(s3: servers.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library does not show it, so after a refusal the store is asked in our own way."""
    from sa1b_wds.objects import Bucket

    with FaultProxy(s3.address) as proxy:
        for name, value in s3.environment(proxy.url).items():
            monkeypatch.setenv(name, value)
        Bucket(f"s3://{servers.BUCKET}").put("traffic/sa_000001.tar", DATA)
        raw = open_raw(f"s3://{servers.BUCKET}/traffic/sa_000001.tar", Limits(first_wait=0.01))
        assert isinstance(raw, RemoteRaw)
        assert drain(raw) == DATA
        proxy.faults.append(Fault(status=429, headers={"Retry-After": "1"}, times=2, when=lambda r: r.is_read))
        begun = time.monotonic()
        raw = open_raw(f"s3://{servers.BUCKET}/traffic/sa_000001.tar", Limits(first_wait=0.01))
        assert isinstance(raw, RemoteRaw)
        assert drain(raw) == DATA
        assert time.monotonic() - begun >= 1.0
        assert raw._object.counts.now().throttled == 2
        proxy.faults.append(Fault(status=503, times=float("inf"), when=lambda r: r.is_read))
        with pytest.raises(Unreachable, match="503"):
            drain(RemoteRaw(f"s3://{servers.BUCKET}/traffic/sa_000001.tar", Limits(first_wait=0.01, attempts=3)))
