"""Samples read through a cache as a rank does it, from a data set on this disk; also in child processes, by name.

The reader and the cache are the real ones; only the shards are near, and a cache's files small, so that there are many.
"""

import json
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from sa1b_wds import extents
from sa1b_wds.buffers import Pool
from sa1b_wds.cache import Cache
from sa1b_wds.manifest import load_manifest
from sa1b_wds.reader import PackedSample, ReadCost, Shard, ShardPlace, SideFiles
from sa1b_wds.storage import Destination

STRETCH = 16 << 10


def small_files() -> None:
    """Files of 16 KiB of a shard instead of 64 MiB, in this process."""
    extents.STRETCH = STRETCH


def shards(dest: Path, folder: Path, size: int) -> list[Shard]:
    """The shards of a data set behind a cache."""
    destination = Destination(str(dest))
    manifest = load_manifest(destination.read("manifest.json"), "manifest.json")
    kept = Cache(folder, size, manifest.digest, [fact.bytes for fact in manifest.shards])
    kept.prepare()
    out = []
    for number, fact in enumerate(manifest.shards):
        shard = kept.shard(number, fact.name, fact.sha256)
        place = destination.place(fact.name)
        find = SideFiles(where=place, fact=fact, read=destination.read, kept=shard)
        out.append(Shard(ShardPlace(place, fact.samples, fact.bytes, find, shard)))
    return out


def read_all(dest: Path, folder: Path, size: int, seed: int = 0, rounds: int = 1) -> ReadCost:
    """Every sample, some neighbours at a time, in random order, held against the shards' own bytes."""
    small_files()
    cost, pool = ReadCost(), Pool(1 << 24)
    found = shards(dest, folder, size)
    draw = random.Random(seed)
    for _ in range(rounds):
        reads = []
        for shard in found:
            n = len(shard.index())
            cuts = sorted({0, n, *draw.choices(range(n), k=n // 3)})
            reads += [(shard, list(range(a, b))) for a, b in pairwise(cuts)]
        draw.shuffle(reads)
        for shard, places in reads:
            whole, offsets = Path(shard.where).read_bytes(), shard.index().offsets
            for place, sample in zip(places, shard.read(places, pool, cost), strict=True):
                assert isinstance(sample, PackedSample), sample
                assert sample.buffer.view == whole[int(offsets[place]) : int(offsets[place + 1])]
                sample.release()
    return cost


def read_in_child(dest: Path, folder: Path, size: int, seed: int = 0, rounds: int = 1) -> None:
    """The same, for a process that gives nothing back."""
    read_all(dest, folder, size, seed, rounds)


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*/*.part"))


def _sizes(folder: Path) -> dict[tuple[str, int], int]:
    """(name, file) → bytes that the file system gave to it, of what is kept."""
    found = {}
    for path in parts(folder):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        found[str(path), status.st_ino] = status.st_blocks * 512
    return found


def on_disk(folder: Path) -> int:
    """Bytes that the file system gave to what is kept."""
    return sum(_sizes(folder).values())


def counted(folder: Path) -> int:
    """Bytes that the cache believes it has, by its ledgers."""
    total = 0
    for ledger in folder.glob("*/*/ledger"):
        data = ledger.read_bytes()
        total += sum(int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 16))
    return total * extents.PAGE


@contextmanager
def watched(folder: Path) -> Iterator[list[int]]:
    """What is on the disk, looked at all the time."""
    seen, over = [on_disk(folder)], threading.Event()

    def look() -> None:
        # One look takes a while: it may count a file that goes before it comes to the one that takes its place. What
        # two looks find alike was there, all of it, at one moment.
        before = _sizes(folder)
        while not over.is_set():
            now = _sizes(folder)
            if now == before:
                seen.append(sum(now.values()))
            before = now

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def main(dest: str, folder: str, size: str) -> None:
    """On a disk that is too small, in a mount namespace of its own: `full_disk` says how that is called."""
    from .full_disk import _mount

    for pages in range(0, int(size), 3):
        _mount(folder, f"size={max(4 * pages, 4)}k" if pages else "nr_inodes=4")
        cost = read_all(Path(dest), Path(folder), 1 << 30, pages, 2)
        print(json.dumps([pages, cost.cache_hits, cost.cache_misses, cost.cache_damaged, on_disk(Path(folder))]))
        subprocess.run(["umount", folder], check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
