"""Azure, and Google's dialect of uploads: written, read, streamed, killed and gone on with, as on S3.

Azure is Microsoft's own emulator. No emulator of GCS that could be installed takes the uploads that obstore makes: they
are Google's XML interface, which is S3's but for the way of signing and for one header. So a proxy takes away the first
and translates the second, and a real S3 server does the rest: it shows that our requests, in their order, make the
objects; it cannot show what Google does with them beyond that, nor anything of signing in.
"""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import sa1b_wds
from sa1b_wds import cli
from sa1b_wds.errors import Denied, NotFound
from sa1b_wds.objects import Bucket
from sa1b_wds.remote import size_of
from sa1b_wds.storage import Destination
from sa1b_wds.verify import verify

from . import making, running, servers
from .fault_proxy import Fault, FaultProxy


def googles(headers: dict[str, str]) -> dict[str, str]:
    """A request of GCS' XML interface as one of S3's."""
    headers = {name.lower(): value for name, value in headers.items() if name.lower() != "authorization"}
    if (generation := headers.pop("x-goog-if-generation-match", None)) is not None:
        assert generation == "0"
        headers["if-none-match"] = "*"
    return headers


@pytest.fixture(params=["az", "gs"])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[FaultProxy, str]]:
    """(proxy in front of it, a place of its own)"""
    kind = request.param
    server: servers.Server = request.getfixturevalue("azure" if kind == "az" else "s3")
    monkeypatch.setenv("SA1B_WDS_FIRST_WAIT", "0.01")
    with FaultProxy(server.address) as proxy:
        if kind == "az":
            for name, value in servers.azure_environment(proxy.url).items():
                monkeypatch.setenv(name, value)
        else:
            monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
            proxy.translate = googles
        bucket = servers.BUCKET if kind == "az" else servers.OPEN
        yield proxy, f"{kind}://{bucket}/{hashlib.sha1(request.node.name.encode()).hexdigest()[:12]}"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    running.write(folder, {f"sa_{n:06d}.tar": making.tar(making.pairs(range(9 * n + 1, 9 * n + 9))) for n in range(3)})
    return folder


@pytest.fixture(scope="module")
def local(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    dest = tmp_path_factory.mktemp("local") / "dest"
    assert cli.main(["convert", str(sources), "--out", str(dest), "--mix", "1", "--workers", "1"]) == 0
    return dest


def local_tree(dest: Path) -> dict[str, str]:
    return {name: value for name, value in running.tree(dest).items() if value != "folder"}


def tree(url: str) -> dict[str, str]:
    bucket = Bucket(url)
    return {name: hashlib.sha256(bucket.read(name)).hexdigest() for name in bucket.names()}


def convert(sources: Path | str, dest: str) -> int:
    return cli.main(["convert", str(sources), "--out", dest, "--mix", "1", "--workers", "1"])


def keys_of(location: str | Path) -> list[list[str]]:
    stream = sa1b_wds.open(location).stream(
        batch_size=2, image_size=32, mask_size=16, masks_per_image=2, seed=3, rank=0, world_size=1, threads=1
    )
    return [list(batch["key"]) for batch in stream]


def test_the_same_data_set_and_the_same_stream(store: tuple[FaultProxy, str], sources: Path, local: Path) -> None:
    _, place = store
    for path in sources.iterdir():
        Bucket(f"{place}/in").put(path.name, path.read_bytes())
    assert convert(f"{place}/in", f"{place}/out") == 0
    assert tree(f"{place}/out") == local_tree(local)
    assert verify(Destination(f"{place}/out"), deep=True, against=[str(sources)]) == []
    assert keys_of(f"{place}/out") == keys_of(local)
    assert convert(f"{place}/in", f"{place}/out") == 0  # nothing to do
    assert cli.main(["status", f"{place}/out"]) == 0


def test_a_bad_network(store: tuple[FaultProxy, str], sources: Path, local: Path) -> None:
    proxy, place = store
    proxy.faults += [
        Fault(status=503, every=5, times=99, when=lambda r: r.method in ("PUT", "POST")),
        Fault(status=429, every=5, times=99, when=lambda r: r.method == "GET"),
        Fault(cut=20, every=6, times=99, when=lambda r: r.method == "GET"),
    ]
    assert convert(sources, place) == 0
    assert sum(fault.happened for fault in proxy.faults) > 5
    proxy.faults.clear()
    assert tree(place) == local_tree(local)


def test_large_objects_stay_invisible_until_they_are_complete(store: tuple[FaultProxy, str]) -> None:
    _, place = store
    data = os.urandom(1 << 20)
    with Bucket(place).attempt("task-000000") as attempt:
        bucket, writer = attempt.destination, attempt.create("a.tar")
        for _ in range(20):
            writer.write([data])
        writer.finish()
        assert not bucket.exists("a.tar")
        assert attempt.publish("receipt", b"done")
        assert not bucket.put_new("receipt", b"again")
    assert bucket.names() == ["a.tar", "receipt"]
    assert bucket.read("a.tar") == data * 20
    assert bucket.read("receipt") == b"done"


@pytest.mark.slow
def test_killed_at_any_moment_and_run_again(store: tuple[FaultProxy, str], sources: Path, local: Path) -> None:
    proxy, place = store
    options = ["--out", place, "--mix", "1", "--workers", "1"]
    command = [sys.executable, "-c", "from sa1b_wds.cli import run; run()", "convert", str(sources), *options]
    for after in (4, 12):
        count, reached = 0, threading.Event()

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
        process.kill()
        assert process.wait() == -signal.SIGKILL
    proxy.faults = []
    assert convert(sources, place) == 0
    assert tree(place) == local_tree(local)


def test_what_is_not_there_and_what_is_denied(store: tuple[FaultProxy, str], monkeypatch: pytest.MonkeyPatch) -> None:
    _, place = store
    with pytest.raises(NotFound, match="no such object"):
        size_of(f"{place}/none.tar")
    where = f"{place[:5]}nobucket/none.tar"
    if place.startswith("az"):
        with pytest.raises(NotFound):
            size_of(where)
        where = f"{place}/none.tar"
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "d3JvbmcgYnV0IGxvbmcgZW5vdWdo")
    with pytest.raises(Denied, match="access denied"):  # on the other, nobody may look into other buckets unsigned
        size_of(where)
