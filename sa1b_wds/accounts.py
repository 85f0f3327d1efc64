"""What stands over all of a task's shards, or over all shards: rows, dealing, quarantine and the key index."""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from . import tar
from .differences import Found, Tell
from .errors import DataError, FormatError, StorageError
from .format import KEY_ROW, ROW
from .inflate import open_bytes
from .manifest import KEYS_NAME, FileFact, ShardFact, SourceFact, quarantine_stem
from .plan import Task
from .restore import side_files
from .shard import deal
from .storage import Destination, open_raw


def check_keys(
    tell: Tell, destination: Destination, shards: Sequence[ShardFact], excluded: Sequence[int] = ()
) -> Found:
    """`index/keys.bin` against the rows of all shards; none of the images that are excluded may be there."""
    found = Found()
    where = destination.place(KEYS_NAME)
    try:
        data = destination.read(KEYS_NAME)
        if len(data) % KEY_ROW.itemsize or not data:
            found.add(where, "length", f"a multiple of {KEY_ROW.itemsize}", len(data))
            return found
        table = np.frombuffer(data, KEY_ROW)
        ids = np.ascontiguousarray(table["image_id"])
        if np.any(ids[1:] <= ids[:-1]):
            i = int(np.flatnonzero(ids[1:] <= ids[:-1])[0])
            found.add(
                f"{where}: row {i + 1}", "keys do not rise", f"more than sa_{int(ids[i])}", f"sa_{int(ids[i + 1])}"
            )
            return found
        for image_id in ids[np.isin(ids, np.array(excluded, np.int64))].tolist():
            found.add(where, f"sa_{image_id} is in the data set, and excluded by its plan")
        samples = 0
        for number, fact in enumerate(shards):
            tell(0)
            rows = np.frombuffer(destination.read(f"index/{fact.name.removesuffix('.tar')}.rows"), ROW)
            samples += len(rows)
            at = np.minimum(np.searchsorted(ids, rows["image_id"]), len(ids) - 1)
            right = (table["shard"][at] == number) & (table["index"][at] == np.arange(len(rows)))
            for i in np.flatnonzero((ids[at] != rows["image_id"]) | ~right).tolist():
                found.add(
                    where, f"does not lead to sample {i:,} of {fact.name}", f"sa_{int(rows['image_id'][i])}", "another"
                )
        if samples != len(table):
            found.add(where, "rows", samples, len(table))
    except (StorageError, ValueError):
        pass  # a file that is missing or cut is in the list already
    return found


class Listed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A line of `quarantine/*.jsonl`."""

    source: str
    byte: int
    name: str
    key: str
    reason: str
    stored: bool


@dataclass(frozen=True, slots=True)
class Held:
    """A member in quarantine."""

    line: Listed
    begin: int
    """Byte of its data in `quarantine/*.members`."""
    size: int


def quarantine(destination: Destination, task: int, files: Sequence[FileFact]) -> list[Held]:
    """Everything in a task's quarantine.

    Raises:
        DataError, StorageError: it cannot be read, or its two files do not fit.
    """
    if not files:
        return []
    stem = quarantine_stem(task)
    where = destination.place(f"{stem}.jsonl")
    try:
        lines = [msgspec.json.decode(line, type=Listed) for line in destination.read(f"{stem}.jsonl").splitlines()]
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise FormatError(where, f"not a list of rejected members: {error}") from None
    place = destination.place(f"{stem}.members")
    raw = open_raw(place)
    try:
        reader = tar.Reader(open_bytes(raw, place), allocate=lambda entry: None)
        members = []
        for entry, _ in reader:
            members.append((reader.spans - entry.size - tar.padding(entry.size), entry))
    finally:
        raw.close()
    stored = sum(line.stored for line in lines)
    if stored != len(members):
        raise FormatError(place, f"members that {where} says are stored", stored, len(members))
    out, rest = [], iter(members)
    for line in lines:
        if not line.stored:
            out.append(Held(line, 0, 0))
            continue
        begin, entry = next(rest)
        if not entry.name.startswith(f"{line.source[:60]}/{line.byte}."):
            at = f"{place}: byte {entry.offset:,}"
            raise FormatError(at, "not the next member that is listed", line.name, entry.name)
        out.append(Held(line, begin, entry.size))
    return out


def check_task(
    tell: Tell,
    destination: Destination,
    index: int,
    task: Task,
    shards: list[ShardFact],
    sources: list[SourceFact],
    files: list[FileFact],
) -> Found:
    """A task's rows against its accounts, its dealing replayed, and its quarantine against its accounts."""
    found = Found()
    tell(0)
    try:
        tables = [side_files(destination, shard) for shard in shards]
        where = f"{destination.place(shards[0].name)} and the other shards of task {index}"
        _sources_of(found, where, task, sources, [rows for _, rows in tables])
        if not found.count:
            _replay(found, where, task, [(np.diff(offsets).tolist(), rows) for offsets, rows in tables])
        rejected = Counter(held.line.source for held in quarantine(destination, index, files))
        for s in sources:
            if rejected.pop(s.name, 0) != s.quarantined:
                found.add(destination.place(f"{quarantine_stem(index)}.jsonl"), f"lines of {s.name}", s.quarantined)
        for name in rejected:
            found.add(destination.place(f"{quarantine_stem(index)}.jsonl"), "a source of another task", found=name)
    except (DataError, StorageError) as error:
        found.error(error)
    return found


def _sources_of(
    found: Found, where: str, task: Task, sources: list[SourceFact], tables: list[npt.NDArray[np.void]]
) -> None:
    """What the rows say of each source, against its account."""
    rows = np.concatenate(tables)
    for number, fact in zip(task.sources, sources, strict=True):
        mine = rows[rows["source"] == number]
        ordinals = np.concatenate([mine["jpg_ordinal"], mine["json_ordinal"]]).astype(np.int64)
        distance = np.abs(mine["jpg_ordinal"].astype(np.int64) - mine["json_ordinal"].astype(np.int64))
        found.same(f"{where}: {fact.name}", "samples in the rows", fact.samples, len(mine))
        found.same(f"{where}: {fact.name}", "members used once", len(ordinals), len(np.unique(ordinals)))
        if len(mine):
            found.same(f"{where}: {fact.name}", "greatest_distance", fact.greatest_distance, int(distance.max()))
            if int(ordinals.max()) >= fact.members:
                found.add(
                    f"{where}: {fact.name}", "the number of a member", f"below {fact.members:,}", int(ordinals.max())
                )
    strangers = rows[~np.isin(rows["source"], task.sources)]
    if len(strangers):
        found.add(where, "rows of a source that the task does not have", found=int(strangers["source"][0]))


def _replay(found: Found, where: str, task: Task, tables: list[tuple[list[int], npt.NDArray[np.void]]]) -> None:
    """Whether every sample stands where dealing puts it (see `shard.deal`): sources take turns, a round at a time."""
    queues: dict[int, list[tuple[int, int, int, int]]] = {n: [] for n in task.sources}
    for shard, (_, rows) in enumerate(tables):
        place = np.maximum(rows["jpg_ordinal"], rows["json_ordinal"])
        for i, (source, at) in enumerate(zip(rows["source"].tolist(), place.tolist(), strict=True)):
            queues[source].append((at, shard, i, int(rows["image_id"][i])))
    turns = deque(deque(sorted(queues[n])) for n in task.sources if queues[n])
    line = []
    while turns:
        queue = turns.popleft()
        line.append(queue.popleft())
        if queue:
            turns.append(queue)
    loads = [0] * len(tables)
    filled = [0] * len(tables)
    for begin in range(0, len(line), len(tables)):
        hand = line[begin : begin + len(tables)]
        dealt = deal([tables[shard][0][i] for _, shard, i, _ in hand], loads)
        for (_, shard, i, image_id), wanted in zip(hand, dealt, strict=True):
            if (shard, i) != (wanted, filled[wanted]):
                to, there = f"shard {wanted} of the task, sample {filled[wanted]:,}", f"shard {shard}, sample {i:,}"
                found.add(f"{where}: sa_{image_id}", "not where dealing puts it", to, there)
                return  # all that follow are elsewhere too
            filled[wanted] += 1
