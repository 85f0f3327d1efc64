"""Shards → the source tars again: every jpg and json byte for byte, pairs adjacent, samples in the source's order.

A plain ustar archive for each source. What the source's own headers, the order of a pair and the gzip framing were is
not kept, and neither are members that were quarantined or ignored. Since the order is the source's, two conversions of
the same sources with other shards restore to the same bytes.

`verify --against` finds and rebuilds members by the same `Places` and `original_json`.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from zlib_ng import zlib_ng

from . import annotations, tar
from .ahead import Ahead
from .buffers import Buffer, Pool
from .errors import FormatError, ShardDamaged, UsageError
from .format import ROW
from .layout import check_offsets, split_span
from .manifest import MANIFEST_NAME, PLAN_NAME, Manifest, ShardFact, load_manifest
from .plan import Plan, load_plan
from .ranged import Ranged, open_ranged
from .storage import Attempt, Destination

I64 = npt.NDArray[np.int64]

MIB = 1 << 20
_OPEN_FILES = 128
"""Shards of a task that are kept open; a task may have thousands."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Accounts:
    """What was restored, and what of the sources was not."""

    sources: int
    samples: int
    members: int
    """That were written: two a sample, or its json."""
    bytes: int
    """Of the tars."""
    quarantined: int
    """Members of these sources that lie in `quarantine/`."""
    ignored: int
    """Members that no shard ever had."""
    excluded: int = 0
    """Members of images that the plan left out."""

    def __str__(self) -> str:
        left = f"; {self.quarantined:,} quarantined and {self.ignored:,} ignored members are not in them"
        if self.excluded:
            left += f", nor are {self.excluded:,} of excluded images"
        return (
            f"{self.sources:,} tars with {self.members:,} members, {self.bytes:,} bytes"
            f"{left if self.quarantined or self.ignored or self.excluded else ''}"
        )


def restore(
    destination: Destination,
    out: Path,
    *,
    json_only: bool = False,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Accounts:
    """Write a tar for every source, `out/<name>`, with the members `./sa_<id>.jpg` and `./sa_<id>.json`.

    Args:
        destination: a finished data set.
        out: a folder, outside of the data set.
        json_only: leave the jpgs out.
        report: gets bytes of shards done and in all.

    Raises:
        UsageError: `out` lies in the data set, or has a file of one of these names; or photographs were made smaller,
            so that the source's are not there, and `json_only` is not set.
        FormatError, ShardDamaged: the data set is not what its manifest says. The tars finished before stay.
    """
    where = destination.place(MANIFEST_NAME)
    manifest = load_manifest(destination.read(MANIFEST_NAME), where)
    if not manifest.has_images:
        raise UsageError(destination.where, "annotations alone: restore from the data set that they were exported from")
    plan = read_plan(destination, manifest)
    if plan.recoding is not None and not json_only:
        what = f"its photographs were made smaller (--max-side {plan.recoding.max_side}): the source's are not there"
        raise UsageError(destination.where, f"{what}; --json-only restores the rest")
    folder = Destination(str(out))
    if destination.holds(str(out)):
        raise UsageError(str(out), "lies in the data set: readers would take the tars for shards")
    done = [(task, shards) for i, task in enumerate(plan.tasks) if (shards := shards_of(manifest, plan, i)) is not None]
    for task, _ in done:
        for number in task.sources:
            if folder.exists(plan.sources[number].name):
                raise _is_there(folder, plan.sources[number].name)
    total = sum(shard.bytes for shard in manifest.shards)
    counter = _Counter(report, total)
    restored = 0
    try:
        for task, shards in done:
            for number in task.sources:
                places = Places(destination, shards, number)
                with folder.attempt(f"restore-{number:06d}") as attempt:
                    restored += _restore_one(attempt, plan.sources[number].name, places, counter, json_only)
                    if not attempt.publish_one(plan.sources[number].name):
                        raise _is_there(folder, plan.sources[number].name)
    finally:
        folder.clear_state()
    report(total, total)
    facts = [fact for fact in manifest.sources if fact is not None]
    return Accounts(
        sources=len(facts),
        samples=sum(fact.samples for fact in facts),
        members=sum(fact.samples for fact in facts) * (1 if json_only else 2),
        bytes=restored,
        quarantined=sum(fact.quarantined for fact in facts),
        ignored=sum(sum(fact.ignored.values()) for fact in facts),
        excluded=sum(fact.excluded for fact in facts),
    )


def read_plan(destination: Destination, manifest: Manifest) -> Plan:
    """The plan of a finished data set.

    Raises:
        FormatError: it is not the plan that the manifest names.
    """
    data, where = destination.read(PLAN_NAME), destination.place(PLAN_NAME)
    found = hashlib.sha256(data).hexdigest()
    if found != manifest.plan:
        raise FormatError(where, "not the plan that the manifest names (SHA-256)", manifest.plan, found)
    return load_plan(data, where)


def shards_of(manifest: Manifest, plan: Plan, task: int) -> list[ShardFact] | None:
    """The shards of a task; None where it is missing from a partial data set.

    Raises:
        FormatError: the manifest does not have the plan's shards.
    """
    if task in manifest.missing_tasks:
        return None
    missing = [plan.tasks[i].shards for i in manifest.missing_tasks if i < task]
    begin = plan.tasks[task].first_shard - sum(missing)
    shards = manifest.shards[begin : begin + plan.tasks[task].shards]
    names = plan.shard_names(plan.tasks[task])
    if [shard.name for shard in shards] != names:
        raise FormatError(MANIFEST_NAME, f"not the shards of task {task} of the plan", names[0], len(shards))
    return shards


class Places:
    """Where the samples of one source stand, in the order of the source: that of the second member of each pair."""

    rows: npt.NDArray[np.void]
    """[n] of ROW."""
    shard: I64
    """[n] number of the shard among `shards`."""
    begin: I64
    """[n] byte of the sample's span in its shard."""
    end: I64
    """[n]"""

    def __init__(self, destination: Destination, shards: Sequence[ShardFact], source: int) -> None:
        """Reads the shards' side files.

        Raises:
            FormatError, ShardDamaged, StorageError: they are missing, or not what the manifest says.
        """
        self.shards = shards
        self._where = [destination.place(shard.name) for shard in shards]
        self._files: dict[int, Ranged] = {}
        rows, shard, begin, end = [], [], [], []
        for number, fact in enumerate(shards):
            offsets, table = side_files(destination, fact)
            mine = np.flatnonzero(table["source"] == source)
            rows.append(table[mine])
            shard.append(np.full(len(mine), number, np.int64))
            begin.append(offsets[mine])
            end.append(offsets[mine + 1])
        joined = np.concatenate(rows)
        order = np.argsort(np.maximum(joined["jpg_ordinal"], joined["json_ordinal"]), kind="stable")
        self.rows, self.shard = joined[order], np.concatenate(shard)[order]
        self.begin, self.end = np.concatenate(begin)[order], np.concatenate(end)[order]

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, i: int) -> str:
        """Shard, byte and key of sample i, for messages."""
        return f"{self._where[int(self.shard[i])]}: byte {int(self.begin[i]):,}: sa_{int(self.rows[i]['image_id'])}"

    def read(self, i: int, begin: int, view: memoryview) -> None:
        """Fill `view` with the bytes of sample i from byte `begin` of its span on.

        Raises:
            ShardDamaged: the shard ends there.
        """
        number = int(self.shard[i])
        file = self._files.pop(number, None)
        if file is None:
            file = open_ranged(self._where[number])
            if len(self._files) >= _OPEN_FILES:
                self._files.pop(next(iter(self._files))).close()
        self._files[number] = file  # now the youngest
        got = file.read(int(self.begin[i]) + begin, [view])
        if got < len(view):
            raise ShardDamaged(self.where(i), "the shard stops inside this sample", f"{len(view):,} bytes", f"{got:,}")

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()


def side_files(destination: Destination, shard: ShardFact) -> tuple[I64, npt.NDArray[np.void]]:
    """(offsets [n + 1], rows [n]) of a shard, from side files that are what the manifest says.

    Raises:
        FormatError, ShardDamaged, StorageError
    """
    offsets = np.frombuffer(_checked(destination, shard, f"{shard.name}.idx"), "<i8").astype(np.int64)
    stem = shard.name.removesuffix(".tar")
    rows = np.frombuffer(_checked(destination, shard, f"index/{stem}.rows"), ROW)
    if len(offsets) != shard.samples + 1 or len(rows) != shard.samples:
        found = f"{len(offsets) - 1:,} and {len(rows):,}"
        where = destination.place(shard.name)
        raise FormatError(where, "side files of another number of samples", shard.samples, found)
    check_offsets(offsets, destination.place(f"{shard.name}.idx"))
    return offsets, rows


def _checked(destination: Destination, shard: ShardFact, name: str) -> bytes:
    fact = next((f for f in shard.files if f.name == name), None)
    if fact is None:
        raise FormatError(destination.place(MANIFEST_NAME), f"{shard.name} has no side file {name}")
    data = destination.read(name)
    found = hashlib.sha256(data).hexdigest()
    if found != fact.sha256:
        raise ShardDamaged(destination.place(name), "SHA-256 differs from the manifest", fact.sha256, found)
    width = ROW.itemsize if name.endswith(".rows") else 8
    if len(data) % width:
        raise FormatError(destination.place(name), "cut", f"a multiple of {width} bytes", len(data))
    return data


def original_json(member: memoryview, key: str, where: str) -> tuple[annotations.Annotations, bytes]:
    """The columns of a packed member, and the json that it was made of.

    Raises:
        FormatError: not a packed member, or another image's.
    """
    columns = annotations.unpack(member, where)
    if key != f"sa_{columns.image_id}":
        raise FormatError(where, "the annotations of another image", key, f"sa_{columns.image_id}")
    return columns, annotations.restore(columns)


class _Counter:
    def __init__(self, report: Callable[[int, int], None], total: int) -> None:
        self._report, self._total, self._done = report, total, 0

    def add(self, count: int) -> None:
        self._done += count
        self._report(self._done, self._total)


def _is_there(folder: Destination, name: str) -> UsageError:
    return UsageError(folder.place(name), "is there already; restore into another folder, or move it away")


@dataclass(slots=True, eq=False)
class _Restored:
    key: str
    jpg: memoryview
    """With its padding."""
    jpg_size: int
    json: bytes
    buffer: Buffer


def _samples(places: Places, pool: Pool) -> Iterator[_Restored]:
    for i in range(len(places)):
        buffer = pool.take(int(places.end[i] - places.begin[i]))
        places.read(i, 0, buffer.view)
        found, expected = zlib_ng.crc32(buffer.view), int(places.rows[i]["crc32"])
        where = places.where(i)
        if found != expected:
            raise ShardDamaged(where, "CRC-32 of this sample", f"{expected:08x}", f"{found:08x}")
        key, jpg, member = split_span(buffer.view, where)
        padded = buffer.view[tar.BLOCK : tar.BLOCK + len(jpg) + tar.padding(len(jpg))]
        yield _Restored(key, padded, len(jpg), original_json(member, key, where)[1], buffer)


def _restore_one(attempt: Attempt, name: str, places: Places, counter: _Counter, json_only: bool) -> int:
    """Write one source's tar into the attempt; its bytes."""
    pool = Pool(idle=32 * MIB)
    # Reading, checking and rebuilding go on while the bytes before are written.
    ahead = Ahead(
        _samples(places, pool),
        name=f"restore {name}",
        depth=32,
        weigh=lambda s: s.buffer.room,
        discard=lambda s: pool.give(s.buffer),
    )
    writer = attempt.create(name)
    written = 0
    try:
        for sample in ahead:
            jpg, json = f"./{sample.key}.jpg", f"./{sample.key}.json"
            pieces: list[bytes | memoryview] = [] if json_only else [tar.header(jpg, sample.jpg_size), sample.jpg]
            pieces += [tar.header(json, len(sample.json)), sample.json, bytes(tar.padding(len(sample.json)))]
            writer.write(pieces)
            written += sum(map(len, pieces))
            counter.add(sample.buffer.length)
            pool.give(sample.buffer)
        writer.write([tar.END])
        writer.finish()
    finally:
        writer.close()
        ahead.close()
        places.close()
        pool.close()
    return written + len(tar.END)
