"""A cache on a node's disk: what it gives back, what it takes, and what no fault may do to either.

Samples go through the loader's reader from shards on this disk (`keeping.py`); `test_cache_remote.py` has the store.
"""

import errno
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import sa1b_wds
from sa1b_wds import cache, extents
from sa1b_wds.buffers import Pool
from sa1b_wds.errors import NotFound, StorageError, UsageError
from sa1b_wds.reader import PackedSample, ReadCost, Shard

from . import datasets, dying, keeping
from .keeping import counted, on_disk, parts, read_all
from .test_faults_machine import _UNSHARE, _namespaces

MUCH = 1 << 30
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def dest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return datasets.make(tmp_path_factory.mktemp("kept"), ((20, 2), (22, 2)))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other samples under the same names."""
    return datasets.make(tmp_path_factory.mktemp("others"), ((20, 2), (22, 2)), first=500)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extents, "STRETCH", keeping.STRETCH)


def size_of(dest: Path, folder: Path) -> int:
    """Bytes that all of a data set takes in a cache."""
    read_all(dest, folder, MUCH)
    return counted(folder)


def test_cold_and_warm(dest: Path, tmp_path: Path) -> None:
    cold = read_all(dest, tmp_path, MUCH)
    assert (cold.cache_hits, cold.cache_misses, cold.cache_bytes, cold.cache_damaged) == (0, 42, 0, 0)
    warm = read_all(dest, tmp_path, MUCH, seed=1)
    assert (warm.cache_hits, warm.cache_misses, warm.cache_damaged) == (42, 0, 0)
    assert warm.cache_bytes == warm.bytes == cold.bytes
    assert on_disk(tmp_path) <= counted(tmp_path) <= on_disk(tmp_path) + 60 * extents.PAGE
    assert len(parts(tmp_path)) > 12  # four shards' side files and some stretches


def test_another_data_set_is_never_served(dest: Path, other: Path, tmp_path: Path) -> None:
    assert [p.name for p in datasets.tars(dest)] == [p.name for p in datasets.tars(other)]
    read_all(dest, tmp_path, MUCH)
    assert read_all(other, tmp_path, MUCH).cache_hits == 0
    assert read_all(dest, tmp_path, MUCH).cache_misses == 0
    # Nor where its files lie under the other's name.
    home, foreign = sorted((tmp_path / "sa1b-wds-cache-1").glob("*/"), key=lambda p: p.is_dir())[-2:]
    for part in home.glob("*.part"):
        part.write_bytes((foreign / part.name).read_bytes()) if (foreign / part.name).exists() else None
    for folder in (dest, other):
        cost = read_all(folder, tmp_path, MUCH)
        assert cost.cache_damaged == 0
        assert read_all(folder, tmp_path, MUCH).cache_misses == 0


@pytest.mark.parametrize("share", [0.02, 0.3, 0.7])
def test_the_bound_holds_and_the_oldest_goes(dest: Path, tmp_path: Path, share: float) -> None:
    size = int(size_of(dest, tmp_path / "all") * share)
    folder = tmp_path / "some"
    with keeping.watched(folder) as seen:
        cost = read_all(dest, folder, size, rounds=12)
    assert max(seen) <= size
    assert counted(folder) <= size
    assert share < 0.1 or counted(folder) > 0.5 * size
    assert (cost.cache_hits > 5) == (share > 0.1)
    assert cost.cache_damaged == 0


def test_the_least_recently_used_goes(dest: Path, tmp_path: Path) -> None:
    size = size_of(dest, tmp_path / "all")
    found = keeping.shards(dest, tmp_path / "some", size * 2 // 3)

    def hits(shard: Shard) -> int:
        cost = ReadCost()
        for sample in shard.read(range(len(shard.index())), Pool(1 << 20), cost):
            assert isinstance(sample, PackedSample)
        return cost.cache_hits

    for number in (0, 1, 0, 2, 0, 3):
        hits(found[number])
    assert hits(found[0]) == len(found[0].index())  # used again and again, it stayed
    assert hits(found[1]) == 0  # and this went


def test_a_smaller_bound_on_the_same_folder(dest: Path, tmp_path: Path) -> None:
    size = size_of(dest, tmp_path)
    read_all(dest, tmp_path, size // 2, seed=4, rounds=2)
    assert counted(tmp_path) <= size // 2
    assert on_disk(tmp_path) <= size // 2


# ------------------------------------------------------------------------------------------------ several processes


@pytest.mark.parametrize("share", [2.0, 0.4])
def test_three_processes(dest: Path, tmp_path: Path, share: float) -> None:
    """Also where each evicts what the others read."""
    size = int(size_of(dest, tmp_path / "all") * share)
    folder = tmp_path / "shared"
    begin = time.time() + 0.3
    with keeping.watched(folder) as seen:
        children = [
            dying.jittering(seed, begin, keeping.read_in_child, dest, folder, size, seed, 4) for seed in range(3)
        ]
        assert [child.join() for child in children] == [None] * 3
    assert [child.code for child in children] == [0] * 3
    # Of what is evicted while it is written there may be a read of each process's.
    assert max(seen) <= size
    cost = read_all(dest, folder, size)
    assert cost.cache_damaged == 0
    assert share < 1 or cost.cache_misses == 0
    assert on_disk(folder) <= counted(folder) <= size


def half_written(at: int, dest: Path, folder: Path, size: int) -> None:
    """Killed in the middle of the `at`-th write of a sample or a side file: half of its bytes are there."""
    write, left = os.pwrite, [at]

    def pwrite(descriptor: int, data: bytes, offset: int) -> int:
        left[0] -= len(data) > 100  # the books, the seal and the states are shorter
        if left[0] == 0:
            write(descriptor, memoryview(data)[: len(data) // 2], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        return write(descriptor, data, offset)

    os.pwrite = pwrite  # type: ignore[assignment]
    read_all(dest, folder, size)


def check_after_a_kill(dest: Path, folder: Path, size: int) -> None:
    assert on_disk(folder) <= counted(folder)
    again = read_all(dest, folder, size)
    assert again.cache_damaged == 0  # nothing half written was taken for whole
    assert counted(folder) <= size
    assert on_disk(folder) <= counted(folder)
    last = read_all(dest, folder, MUCH)
    assert read_all(dest, folder, MUCH).cache_misses == 0
    assert last.cache_damaged == 0


@pytest.mark.parametrize("share", [2.0, 0.5])
def test_killed_before_any_call(dest: Path, tmp_path: Path, share: float) -> None:
    size = int(size_of(dest, tmp_path / "all") * share)
    with dying.interrupt(0, lambda: None) as calls:
        read_all(dest, tmp_path / "once", size)
    draw = random.Random(0)
    for at in sorted({*range(1, 12, 2), *draw.sample(range(12, len(calls)), 8)}):
        folder = tmp_path / str(at)
        child = dying.killed_at(at, keeping.read_in_child, dest, folder, size)
        child.join()
        assert child.code == -signal.SIGKILL, at
        check_after_a_kill(dest, folder, size)


def test_killed_in_the_middle_of_a_write(dest: Path, tmp_path: Path) -> None:
    size = size_of(dest, tmp_path / "all")
    for at in (1, 2, 5, 9, 20, 40):  # of 42 samples and 8 side files
        child = dying.Child(half_written, at, dest, tmp_path / str(at), size)
        child.join()
        assert child.code == -signal.SIGKILL, at
        check_after_a_kill(dest, tmp_path / str(at), size)


def test_killed_while_others_go_on(dest: Path, tmp_path: Path) -> None:
    size = size_of(dest, tmp_path / "all")
    folder = tmp_path / "shared"
    begin = time.time() + 0.2
    others = [dying.jittering(seed, begin, keeping.read_in_child, dest, folder, size, seed, 6) for seed in range(2)]
    for at in range(20, 200, 18):
        victim = dying.killed_at(at, keeping.read_in_child, dest, folder, size, at)
        victim.join()
    assert [child.join() for child in others] == [None] * 2
    check_after_a_kill(dest, folder, size)


def stopped_in_a_write(dest: Path, folder: Path) -> None:
    """Stops with a sample claimed and fetched, but not written."""
    write, left = cache.PartFile.write, [20]

    def slow(file: cache.PartFile, i: int, view: memoryview) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        write(file, i, view)

    cache.PartFile.write = slow  # type: ignore[assignment,method-assign]
    read_all(dest, folder, MUCH)


def test_who_stops_with_a_claim_holds_nobody_up_for_ever(
    dest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_PATIENCE", 0.3)
    child = dying.Child(stopped_in_a_write, dest, tmp_path)
    assert child.wait_stopped()
    begin = time.monotonic()
    read_all(dest, tmp_path, MUCH, seed=5)
    assert time.monotonic() - begin > 0.3  # it was waited for
    child.wake()
    assert child.join() is None
    assert read_all(dest, tmp_path, MUCH).cache_misses == 0


# ------------------------------------------------------------------------------------------------------------ damage


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def test_bits_flip_anywhere(dest: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    size = size_of(dest, tmp_path)
    draw = random.Random(0)
    for part in parts(tmp_path):
        flip(part, draw.randrange(8 * 40))  # the seal, or a sample's state
    assert read_all(dest, tmp_path, size).cache_misses > 0
    assert read_all(dest, tmp_path, MUCH).cache_misses == 0
    for part in parts(tmp_path):
        flip(
            part, 8 * 4096 + draw.randrange(8 * min(512, part.stat().st_size - 4096))
        )  # the first sample's header, or a side file
    with caplog.at_level(logging.WARNING, "sa1b_wds"):
        damaged = read_all(dest, tmp_path, MUCH)
    files = len(parts(tmp_path)) - 8
    assert damaged.cache_damaged == damaged.cache_misses == files
    assert len([r for r in caplog.records if "damaged in the cache, fetched again" in r.getMessage()]) == files
    assert len([r for r in caplog.records if "a side file was damaged" in r.getMessage()]) == 8
    again = read_all(dest, tmp_path, MUCH)
    assert (again.cache_misses, again.cache_damaged) == (0, 0)


def test_bits_flip_in_the_books(dest: Path, tmp_path: Path) -> None:
    size = size_of(dest, tmp_path)
    (ledger,) = tmp_path.glob("*/*/ledger")
    draw = random.Random(0)
    for seed in range(20):
        flip(ledger, draw.randrange(8 * ledger.stat().st_size))
        if seed % 3 == 0:
            flip(ledger.parents[1] / "accounts", draw.randrange(8 * 16))
        read_all(dest, tmp_path, size * 2 // 3, seed)
        assert on_disk(tmp_path) <= size * 2 // 3


@pytest.mark.parametrize("what", ["ledger", "accounts", "*.part", "short", "empty"])
def test_files_go_missing(dest: Path, tmp_path: Path, what: str) -> None:
    size = size_of(dest, tmp_path)
    root = tmp_path / "sa1b-wds-cache-1"
    if what in ("short", "empty"):
        for part in parts(tmp_path)[::2]:
            os.truncate(part, 5000 if what == "short" else 0)
    else:
        for path in [*root.glob(what), *root.glob(f"*/{what}")]:
            path.unlink()
    read_all(dest, tmp_path, size)
    last = read_all(dest, tmp_path, size)
    assert (last.cache_misses, last.cache_damaged) == (0, 0)
    assert on_disk(tmp_path) <= size


# ------------------------------------------------------------------------------------------------- disks that refuse


def test_every_call_may_fail(dest: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """ENOSPC and EIO from any call that changes the disk: read all the same, and one word."""
    with dying.interrupt(0, lambda: None) as calls:
        read_all(dest, tmp_path / "once", MUCH)
    draw = random.Random(0)
    for at in sorted({*range(1, 14), *draw.sample(range(14, len(calls)), 16)}):
        code = draw.choice([errno.ENOSPC, errno.EIO, errno.EDQUOT])
        caplog.clear()
        with caplog.at_level(logging.WARNING, "sa1b_wds"):
            try:
                with dying.interrupt(at, dying.fail(code)):
                    read_all(dest, tmp_path / str(at), MUCH)
            except StorageError:
                assert at <= 4, at  # the folder itself cannot be made
                assert code == errno.EIO
                continue
        # mkdir is called for folders that are there, too, where its failing does not matter
        assert len(caplog.records) == 1 or calls[at - 1] == "mkdir", at
        assert all("reading goes on without keeping" in r.getMessage() for r in caplog.records)
        assert read_all(dest, tmp_path / str(at), MUCH).cache_damaged == 0
        assert read_all(dest, tmp_path / str(at), MUCH).cache_misses == 0


def test_after_a_while_it_is_tried_again(dest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_AGAIN", 0.0)
    with dying.interrupt(40, dying.FULL):
        read_all(dest, tmp_path, MUCH)
    assert read_all(dest, tmp_path, MUCH).cache_misses < 21


@pytest.mark.skipif(not _namespaces(), reason="this machine forbids mounting in a namespace of one's own")
def test_a_disk_that_is_full(dest: Path, tmp_path: Path) -> None:
    command = [*_UNSHARE, sys.executable, "-m", "tests.keeping", str(dest), str(tmp_path), "100"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "no space left on device; reading goes on without keeping" in done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 34
    assert all(hits + misses == 84 and not damaged for _, hits, misses, damaged, _ in rows)
    assert rows[1][1] < 42 <= rows[-1][1]  # hardly anything where there is hardly room, all where there is


# ------------------------------------------------------------------------------------------------------- the surface


def test_only_far_away_and_with_a_manifest(dest: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "sa1b_wds"):
        ds = sa1b_wds.open(dest, cache=tmp_path / "cache", cache_size=MUCH)
    assert "not used" in caplog.text
    assert ds[3].jpg
    assert not (tmp_path / "cache").exists()
    for where in (f"{dest}/sa1b-train-{{000000..000001}}.tar", [f"{dest}/sa1b-train-000000.tar"], "pipe:cat x.tar"):
        with pytest.raises(UsageError, match="only a data set with a manifest can be kept"):
            sa1b_wds.open(where, cache=tmp_path, cache_size=MUCH)
    with pytest.raises(UsageError, match="a cache needs a bound"):
        sa1b_wds.open(dest, cache=tmp_path)
    for size in (0, -1):
        with pytest.raises(UsageError, match="at least 1"):
            cache.Cache(tmp_path, size, "d", [1])
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotFound, match="a file, not a folder"):
        cache.Cache(tmp_path / "file" / "x", 1, "d", [1]).prepare()
