"""Streams from a real S3 server through a cache: the same batches cold, warm, shared, damaged, too small and killed."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sa1b_wds
from sa1b_wds.errors import ShardDamaged
from sa1b_wds.objects import Bucket
from sa1b_wds.stats import Stats

from . import datasets, keeping, servers
from .fault_proxy import Fault, FaultProxy, Request
from .test_stream_remote import batch_digest

PLACE = f"s3://{servers.BUCKET}/cached"
OPTIONS = {"image_size": 32, "mask_size": 16, "masks_per_image": 2, "batch_size": 2, "seed": 3, "threads": 2}
MUCH = 1 << 30


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return datasets.make(tmp_path_factory.mktemp("cached"), ((20, 2), (20, 2)))


@pytest.fixture(scope="module")
def uploaded(local: Path, s3: servers.Server) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3.environment().items():
            patch.setenv(name, value)
        for path in local.rglob("*"):
            if path.is_file():
                Bucket(PLACE).put(str(path.relative_to(local)), path.read_bytes())


@pytest.fixture
def proxy(s3: servers.Server, uploaded: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with FaultProxy(s3.address) as proxy:
        for name, value in s3.environment(proxy.url).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("SA1B_WDS_FIRST_WAIT", "0.01")
        yield proxy


def epochs(ds: sa1b_wds.Dataset, n: int, rank: int = 0, world: int = 1) -> tuple[list[list[str]], Stats]:
    """A hash of every batch of some epochs, and what it took."""
    stream = ds.stream(rank=rank, world_size=world, **OPTIONS)
    return [[batch_digest(batch) for batch in stream] for _ in range(n)], stream.stats()


def is_data(request: Request) -> bool:
    return request.path.endswith(".tar") and request.method == "GET"


def sample_bytes(requests: list[Request]) -> int:
    """Bytes of shards that were asked for."""
    ranges = [r.headers["range"].removeprefix("bytes=").split("-") for r in requests if is_data(r)]
    return sum(int(b) - int(a) + 1 for a, b in ranges)


def test_the_second_epoch_asks_for_nothing(local: Path, proxy: FaultProxy, tmp_path: Path) -> None:
    want, _ = epochs(sa1b_wds.open(local), 3)
    ds = sa1b_wds.open(PLACE, cache=tmp_path, cache_size=MUCH)
    first, cold = epochs(ds, 1)
    assert first == want[:1]
    assert (cold.cache_hits, cold.cache_misses, cold.source_bytes) == (0, 40, cold.bytes)
    before = len(proxy.requests)
    again, warm = epochs(sa1b_wds.open(PLACE, cache=tmp_path, cache_size=MUCH), 3)
    assert again == want
    assert (warm.cache_hits, warm.cache_misses, warm.source_bytes) == (120, 0, 0)
    assert warm.cache_bytes == 3 * cold.bytes
    asked = {r.path.partition("?")[0] for r in proxy.requests[before:]}
    assert asked == {"/sa1b/cached/manifest.json"}
    assert "cache: 100% of 120 samples" in str(warm)
    before = len(proxy.requests)
    assert ds[7].jpg == sa1b_wds.open(local)[7].jpg  # random access, too
    assert len(proxy.requests) == before


def test_the_same_batches_while_being_evicted(local: Path, proxy: FaultProxy, tmp_path: Path) -> None:
    want, _ = epochs(sa1b_wds.open(local), 3)
    size = 150_000
    with keeping.watched(tmp_path) as seen:
        got, stats = epochs(sa1b_wds.open(PLACE, cache=tmp_path, cache_size=size), 3)
    assert got == want
    assert 0 < max(seen) <= size
    assert stats.cache_misses > 0
    assert stats.cache_damaged == 0


RANK = """
import json, sys
import sa1b_wds
from tests.test_cache_remote import MUCH, PLACE, epochs
rank, world, folder, size = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
got, stats = epochs(sa1b_wds.open(PLACE, cache=folder, cache_size=size), 2, rank, world)
print(json.dumps([got, stats.cache_hits, stats.cache_misses, stats.cache_damaged]))
"""


def start(rank: int, world: int, folder: Path, size: int = MUCH) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-c", RANK, str(rank), str(world), str(folder), str(size)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1], env=os.environ)


def ended(process: "subprocess.Popen[bytes]") -> Any:
    return json.loads(process.communicate(timeout=100)[0])


def test_three_ranks_share_it(local: Path, proxy: FaultProxy, tmp_path: Path) -> None:
    ranks = [start(rank, 3, tmp_path) for rank in range(3)]
    got = [ended(rank) for rank in ranks]
    for rank in range(3):
        assert got[rank][0] == epochs(sa1b_wds.open(local), 2, rank, 3)[0]
    hits, misses, damaged = (sum(each[k] for each in got) for k in (1, 2, 3))
    assert (hits + misses, damaged) == (72, 0)  # whole global batches of 6
    assert misses <= 40
    assert hits >= 32


def test_three_runs_fetch_once(local: Path, proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same epochs at the same time, as in a sweep: what one fetches the others wait for."""
    monkeypatch.setenv("SA1B_WDS_HEDGE", "0")  # which asks twice on purpose
    runs = [start(0, 1, tmp_path) for _ in range(3)]
    want = epochs(sa1b_wds.open(local), 2)[0]
    got = [ended(run) for run in runs]
    assert [each[0] for each in got] == [want] * 3
    assert sum(each[2] for each in got) == 40  # misses, of 240 samples
    assert sample_bytes(proxy.requests) == sum(tar.stat().st_size - 1024 for tar in datasets.tars(local))


def test_killed_and_again(local: Path, proxy: FaultProxy, tmp_path: Path) -> None:
    want = epochs(sa1b_wds.open(local), 2)[0]
    proxy.faults.append(Fault(cut=2000, stall=60.0, skip=5, times=float("inf"), when=is_data))
    run = start(0, 1, tmp_path)
    while len([r for r in proxy.requests if is_data(r)]) < 8:  # in the middle of fetching
        assert run.poll() is None
        time.sleep(0.01)
    run.kill()
    run.wait()
    assert run.stdout is not None
    run.stdout.close()
    proxy.faults.clear()
    got = ended(start(0, 1, tmp_path))
    assert got[0] == want
    assert got[2] < 40  # what was kept before is used
    assert got[3] == 0


def test_damage_in_the_store_is_no_part_of_the_cache(local: Path, proxy: FaultProxy, tmp_path: Path) -> None:
    place = f"{PLACE}-damaged"
    for path in local.rglob("*"):
        if path.is_file():
            data = bytearray(path.read_bytes())
            if path.name == "sa1b-train-000001.tar":
                data[2000] ^= 1
            Bucket(place).put(str(path.relative_to(local)), bytes(data))
    ds = sa1b_wds.open(place, cache=tmp_path, cache_size=MUCH)
    at = int(ds.shards.counts[0])
    for _ in range(2):
        with pytest.raises(ShardDamaged, match="CRC-32"):
            ds[at]
    assert ds[at + 1].jpg
    # The same manifest, so the same samples: what is sound is taken from there, what is not is still an error.
    (name,) = {p.parent for p in keeping.parts(tmp_path)}
    assert name.name == ds.manifest.digest[:32]  # type: ignore[union-attr]


def test_another_data_set_at_the_same_url(
    local: Path, proxy: FaultProxy, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place, folder = f"{PLACE}-changing", tmp_path / "cache"
    other = datasets.make(tmp_path_factory.mktemp("other"), ((20, 2), (20, 2)), first=900)
    for dest in (local, other):
        for path in dest.rglob("*"):
            if path.is_file():
                Bucket(place).put(str(path.relative_to(dest)), path.read_bytes())
        got, stats = epochs(sa1b_wds.open(place, cache=folder, cache_size=MUCH), 1)
        assert got == epochs(sa1b_wds.open(dest), 1)[0]
        assert stats.cache_hits == 0
