"""Receipts → manifest: one data set of all finished tasks, or none.

receipts → shards that are there → key index of their rows → side files of other readers → manifest   (`finalize`)
"""

import contextlib
import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from . import sidecars
from .convert import check_receipt, label_of, missing_tasks, ranges, read_plan, scratch_folder
from .errors import DuplicateKey, Incomplete, StorageError
from .files import Scratch
from .format import FORMAT, KEY_ROW, ROW
from .manifest import (
    KEYS_NAME,
    MANIFEST_NAME,
    PLAN_NAME,
    FileFact,
    Manifest,
    ShardFact,
    SourceFact,
    load_receipt,
    quarantine_names,
    receipt_name,
    side_names,
    totals,
)
from .plan import Plan
from .runs import Runs
from .shard import file_fact
from .storage import Destination

T = TypeVar("T")
R = TypeVar("R")

_READERS = 16  # small files read at once: one after the other, 10,500 of them would take ten minutes from S3


def finalize(destination: Destination, *, partial: bool = False) -> Manifest:
    """Make one data set of all finished tasks: key index, side files of other readers, manifest.

    Raises:
        Incomplete: tasks have no receipt, and `partial` is not set; or it is, and one of them is being worked on.
        DuplicateKey: an image stands in two sources.
    """
    plan = read_plan(destination)
    missing = missing_tasks(destination, plan)
    if missing and (not partial or len(missing) == len(plan.tasks)):
        raise Incomplete(
            destination.where,
            f"{len(missing):,} of {len(plan.tasks):,} tasks are missing: {ranges(missing)}; "
            "run `sa1b-wds convert` again"
            + ("" if partial else ", or publish the others with `sa1b-wds finalize --partial`"),
        )
    for index in missing:
        _remove_strays(destination, plan, index)
    done = sorted(set(range(len(plan.tasks))) - set(missing))
    receipts, files = [], [file_fact(PLAN_NAME, destination.read(PLAN_NAME))]
    for index, data in zip(done, _side_by_side(destination.read, map(receipt_name, done)), strict=True):
        receipt = load_receipt(data, destination.place(receipt_name(index)))
        check_receipt(destination, receipt, plan.digest, index)
        receipts.append(receipt)
        files.append(file_fact(receipt_name(index), data))
        files += receipt.quarantine
    shards = [shard for receipt in receipts for shard in receipt.shards]
    sizes = _side_by_side(destination.size, (shard.name for shard in shards))
    for shard, found in zip(shards, sizes, strict=True):
        if found != shard.bytes:
            raise StorageError(destination.place(shard.name), "wrong size since its receipt", shard.bytes, found)
    sources: list[SourceFact | None] = [None] * len(plan.sources)
    for index, receipt in zip(done, receipts, strict=True):
        for number, fact in zip(plan.tasks[index].sources, receipt.sources, strict=True):
            sources[number] = fact
    sums = totals([s for s in sources if s is not None], shards)
    files.append(_key_index(destination, plan, shards))
    for name, data in sidecars.files(plan.digest, sums, shards, recoding=plan.recoding):
        destination.put(name, data)
        files.append(file_fact(name, data))
    manifest = Manifest(
        format=FORMAT,
        plan=plan.digest,
        totals=sums,
        missing_tasks=missing,
        sources=sources,
        shards=shards,
        files=sorted(files, key=lambda f: f.name),
        recoding=plan.recoding,
        digest="",
    )
    destination.put(MANIFEST_NAME, manifest.to_bytes())
    destination.clear_state()
    if not missing:  # nobody publishes any more
        destination.remove_empty("quarantine")
    return manifest


def _remove_strays(destination: Destination, plan: Plan, index: int) -> None:
    """Remove what a task that was killed among its renames left, since readers take every shard they see for data."""
    names = [name for shard in plan.shard_names(plan.tasks[index]) for name in (shard, *side_names(shard))]
    strays = [name for name in (*names, *quarantine_names(index)) if destination.exists(name)]
    if not strays:
        return
    if destination.at_work(label_of(index)) or destination.exists(receipt_name(index)):
        raise Incomplete(destination.where, f"task {index} is being written by another process: wait for it")
    for name in strays:
        destination.remove(name)


def _rows(destination: Destination, shard: ShardFact) -> "np.ndarray[tuple[int], np.dtype[np.void]]":
    """A shard's rows, if they are what its task wrote: what is made of them here would vouch for others."""
    name = side_names(shard.name)[1]
    data = destination.read(name)
    if file_fact(name, data) not in shard.files:
        raise StorageError(
            destination.place(name), "has changed since its receipt: remove the receipt of its task and convert again"
        )
    return np.frombuffer(data, ROW)


def _key_index(destination: Destination, plan: Plan, shards: list[ShardFact]) -> FileFact:
    """Write `index/keys.bin`, never all of it in memory; refuses an image that stands in two sources."""
    with contextlib.ExitStack() as stack:
        scratch = Scratch(scratch_folder())
        stack.callback(scratch.close)
        runs = Runs(scratch)
        for number, found in enumerate(_side_by_side(lambda shard: _rows(destination, shard), shards)):
            keys = np.empty(len(found), KEY_ROW)
            keys["image_id"], keys["shard"], keys["index"] = found["image_id"], number, np.arange(len(found))
            runs.add(keys)
        attempt = stack.enter_context(destination.attempt("finalize"))
        file = attempt.create(KEYS_NAME)
        stack.callback(file.close)
        digest, length, twice, last = hashlib.sha256(), 0, _Twice(), np.empty(0, KEY_ROW)
        for rows in runs.merged():
            twice.look(np.concatenate([last, rows]))
            last = rows[-1:].copy()
            data = rows.view(np.uint8).data
            digest.update(data)
            length += len(data)
            file.write([data])
        if twice.first is not None:
            raise _duplicate(destination, plan, shards, twice)
        file.finish()
        file.close()
        attempt.publish_one(KEYS_NAME, replace=True)
    return FileFact(name=KEYS_NAME, bytes=length, sha256=digest.hexdigest())


class _Twice:
    """Ids that stand in more than one row."""

    def __init__(self) -> None:
        self.count = 0
        self.first: np.ndarray[tuple[int], np.dtype[np.void]] | None = None
        """Two rows of the first."""

    def look(self, rows: "np.ndarray[tuple[int], np.dtype[np.void]]") -> None:
        same = np.flatnonzero(rows["image_id"][1:] == rows["image_id"][:-1])
        self.count += len(same)
        if len(same) and self.first is None:
            self.first = np.sort(rows[same[0] : same[0] + 2], order=("shard", "index"))


def _duplicate(destination: Destination, plan: Plan, shards: list[ShardFact], twice: _Twice) -> DuplicateKey:
    places = []
    assert twice.first is not None
    for number, index in twice.first[["shard", "index"]].tolist():
        source = plan.sources[int(_rows(destination, shards[number])["source"][index])].name
        places.append(f"{source} (now {shards[number].name}, sample {index:,})")
    return DuplicateKey(
        destination.where,
        f"sa_{int(twice.first['image_id'][0])} stands in two sources: {places[0]} and {places[1]}; "
        f"{twice.count:,} keys in all. Leave one of the sources out and convert into an empty folder",
    )


def _side_by_side(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`work` of each item, in their order; in threads, since a store far away answers each after a while.

    So many are on their way or wait to be taken as there are threads, and as many again.
    """
    with ThreadPoolExecutor(_READERS, "sa1b-wds-finalize") as readers:
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(readers.submit(work, item))
                if len(waiting) == 2 * _READERS:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
