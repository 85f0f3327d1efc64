"""Receipts → manifest: one data set of all finished tasks, or none.

receipts → shards that are there → key index of their rows → side files of other readers → manifest   (`finalize`)
"""

import numpy as np

from . import sidecars
from .convert import check_receipt, label_of, missing_tasks, ranges, read_plan
from .errors import DuplicateKey, Incomplete, StorageError
from .format import FORMAT, KEY_ROW, ROW
from .manifest import (
    KEYS_NAME,
    MANIFEST_NAME,
    PLAN_NAME,
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
from .shard import file_fact
from .storage import Destination


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
    for index in done:
        data = destination.read(receipt_name(index))
        receipt = load_receipt(data, destination.place(receipt_name(index)))
        check_receipt(destination, receipt, plan.digest, index)
        receipts.append(receipt)
        files.append(file_fact(receipt_name(index), data))
        files += receipt.quarantine
    shards = [shard for receipt in receipts for shard in receipt.shards]
    for shard in shards:
        if (found := destination.size(shard.name)) != shard.bytes:
            raise StorageError(destination.place(shard.name), "wrong size since its receipt", shard.bytes, found)
    sources: list[SourceFact | None] = [None] * len(plan.sources)
    for index, receipt in zip(done, receipts, strict=True):
        for number, fact in zip(plan.tasks[index].sources, receipt.sources, strict=True):
            sources[number] = fact
    sums = totals([s for s in sources if s is not None], shards)
    made = [(KEYS_NAME, _key_index(destination, plan, shards))]
    made += sidecars.files(plan.digest, sums, shards, recoding=plan.recoding)
    for name, data in made:
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


def _key_index(destination: Destination, plan: Plan, shards: list[ShardFact]) -> bytes:
    """`index/keys.bin`; refuses an image that stands in two sources."""
    rows, keys = [], []
    for number, shard in enumerate(shards):
        found = _rows(destination, shard)
        key = np.empty(len(found), KEY_ROW)
        key["image_id"], key["shard"], key["index"] = found["image_id"], number, np.arange(len(found))
        rows.append(found["source"])
        keys.append(key)
    joined, source = np.concatenate(keys), np.concatenate(rows)
    order = np.argsort(joined["image_id"], kind="stable")
    joined, source = joined[order], source[order]
    same = np.flatnonzero(joined["image_id"][1:] == joined["image_id"][:-1])
    if same.size:
        i = int(same[0])
        names = [plan.sources[int(source[j])].name for j in (i, i + 1)]
        places = [
            f"{names[j - i]} (now {shards[int(joined['shard'][j])].name}, sample {int(joined['index'][j]):,})"
            for j in (i, i + 1)
        ]
        raise DuplicateKey(
            destination.where,
            f"sa_{int(joined['image_id'][i])} stands in two sources: {places[0]} and {places[1]}; "
            f"{same.size:,} keys in all. Leave one of the sources out and convert into an empty folder",
        )
    return joined.tobytes()
