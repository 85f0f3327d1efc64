"""Whether manifest, plan, receipts and side files say the same, and nothing else lies below the destination."""

from collections.abc import Iterator

import msgspec

from . import sidecars
from .differences import Found
from .errors import DataError, NotFound, StorageError
from .layout import PACKED
from .manifest import (
    EXPORT_NAME,
    KEYS_NAME,
    MANIFEST_NAME,
    PLAN_NAME,
    FileFact,
    Manifest,
    Receipt,
    ShardFact,
    SourceFact,
    exported_name,
    load_manifest,
    load_receipt,
    quarantine_stem,
    receipt_name,
    side_names,
    totals,
)
from .plan import SHARD_NAME, Plan, Task
from .restore import read_plan, shards_of
from .shard import file_fact
from .storage import Destination

FOREIGN = {
    ".git/": "a clone of a repository of the Hugging Face Hub",
    ".gitattributes": "the Hub adds one to every repository",
    ".cache/huggingface/": "the Hub's downloader keeps its marks there",
    ".nv-meta/index.sqlite": "`energon prepare` makes it",
}
"""Files below a data set that are nobody's fault: a name, or the beginning of one where it ends in /, and why."""


def read_manifest(destination: Destination, found: Found) -> Manifest | None:
    where = destination.place(MANIFEST_NAME)
    try:
        data = destination.read(MANIFEST_NAME)
        manifest = load_manifest(data, where)
    except NotFound:
        found.add(where, "no manifest there: not a data set, or one that `sa1b-wds finalize` has not made yet")
        return None
    except (DataError, StorageError) as error:
        found.error(error)
        return None
    if manifest.to_bytes() != data:
        found.add(where, "says the same in other bytes than this project writes")
    return manifest


def check_facts(destination: Destination, manifest: Manifest, found: Found) -> Plan | None:
    """Whether manifest, plan, receipts and side files agree; the plan, where there is one and it is sound."""
    where = destination.place(MANIFEST_NAME)
    if not manifest.has_images:
        _check_export(destination, manifest, found)
        return None
    sums = totals([s for s in manifest.sources if s is not None], manifest.shards)
    found.same(where, "totals", sums, manifest.totals)
    _side_files(manifest, found, where)
    try:
        plan = read_plan(destination, manifest)
    except (DataError, StorageError) as error:
        found.error(error)
        return None
    if file_fact(PLAN_NAME, plan.to_bytes()).sha256 != manifest.plan:
        found.add(destination.place(PLAN_NAME), "says the same in other bytes than this project writes")
    found.same(where, "recoding of the plan", plan.recoding, manifest.recoding)
    made = sidecars.files(plan.digest, sums, manifest.shards, recoding=plan.recoding)
    expected = [file_fact(name, data) for name, data in made]
    facts = {f.name: f for f in manifest.files}
    for fact in expected:
        found.same(f"{where}: {fact.name}", "what follows from the manifest", fact.sha256, _sha256(facts, fact.name))
    names = [PLAN_NAME, KEYS_NAME, *(f.name for f in expected)]
    if not _tasks_fit(manifest, plan, found, where):
        return None
    for index, task in enumerate(plan.tasks):
        receipt = _receipt(destination, manifest, plan, index, found)
        if receipt is not None:
            names += [receipt_name(index), *(f.name for f in receipt.quarantine)]
            for fact in receipt.quarantine:
                found.same(f"{where}: {fact.name}", "the receipt's SHA-256", fact.sha256, _sha256(facts, fact.name))
        if index not in manifest.missing_tasks:
            _task_facts(manifest, plan, task, index, found, where)
    found.same(where, "names of its files", sorted(names), [f.name for f in manifest.files])
    return plan


def _side_files(manifest: Manifest, found: Found, where: str) -> None:
    for shard in manifest.shards:
        found.same(f"{where}: {shard.name}", "side files", list(side_names(shard.name)), [f.name for f in shard.files])


def _check_export(destination: Destination, manifest: Manifest, found: Found) -> None:
    """The same for annotations alone, which have no plan and no sources, but a receipt for each shard."""
    where, shards = destination.place(MANIFEST_NAME), manifest.shards
    sums = totals([], shards)
    found.same(where, "totals", sums, manifest.totals)
    found.same(where, "members of a sample", [PACKED[1:]], manifest.members)
    found.same(where, "sources and missing tasks", ([], []), (manifest.sources, manifest.missing_tasks))
    _side_files(manifest, found, where)
    expected = [file_fact(name, data) for name, data in sidecars.files(manifest.plan, sums, shards, images=False)]
    expected += [file_fact(exported_name(i), msgspec.json.encode(shard)) for i, shard in enumerate(shards)]
    facts = {f.name: f for f in manifest.files}
    for fact in expected:
        found.same(f"{where}: {fact.name}", "what follows from the manifest", fact.sha256, _sha256(facts, fact.name))
    found.same(
        f"{where}: {EXPORT_NAME}", "what the manifest calls the plan", manifest.plan, _sha256(facts, EXPORT_NAME)
    )
    names = sorted([EXPORT_NAME, KEYS_NAME, *(f.name for f in expected)])
    found.same(where, "names of its files", names, [f.name for f in manifest.files])
    found.same(
        where, "names of its shards", [SHARD_NAME.format(i) for i in range(len(shards))], [s.name for s in shards]
    )


def _sha256(facts: dict[str, FileFact], name: str) -> str:
    return facts[name].sha256 if name in facts else "not listed"


def _tasks_fit(manifest: Manifest, plan: Plan, found: Found, where: str) -> bool:
    """Whether sources and shards of the manifest are those of the plan's tasks; nothing else makes sense otherwise."""
    missing = set(manifest.missing_tasks)
    if sorted(missing) != manifest.missing_tasks or not missing < set(range(len(plan.tasks))):
        found.add(
            where, "missing_tasks are not tasks of the plan", f"some of {len(plan.tasks)}", manifest.missing_tasks
        )
        return False
    sources = [s.name if s is not None else None for s in manifest.sources]
    done = {n for i, task in enumerate(plan.tasks) if i not in missing for n in task.sources}
    names = [s.name if n in done else None for n, s in enumerate(plan.sources)]
    shards = [name for i, task in enumerate(plan.tasks) if i not in missing for name in plan.shard_names(task)]
    found.same(where, "sources that the plan has", names, sources)
    found.same(where, "shards that the plan has", shards, [s.name for s in manifest.shards])
    return names == sources and shards == [s.name for s in manifest.shards]


def _receipt(destination: Destination, manifest: Manifest, plan: Plan, index: int, found: Found) -> Receipt | None:
    name = receipt_name(index)
    where = destination.place(name)
    if index in manifest.missing_tasks:
        return None
    try:
        data = destination.read(name)
        receipt = load_receipt(data, where)
    except (DataError, StorageError) as error:
        found.error(error)
        return None
    if receipt.to_bytes() != data:
        found.add(where, "says the same in other bytes than this project writes")
    found.same(where, "plan", manifest.plan, receipt.plan)
    found.same(where, "task", index, receipt.task)
    sources = [manifest.sources[n] for n in plan.tasks[index].sources]
    found.same(where, "sources of the manifest", sources, receipt.sources)
    found.same(where, "shards of the manifest", shards_of(manifest, plan, index), receipt.shards)
    return receipt


def _task_facts(manifest: Manifest, plan: Plan, task: Task, index: int, found: Found, where: str) -> None:
    """The accounts of a task's sources, and what dealing promises of its shards."""
    shards = shards_of(manifest, plan, index) or []
    sources = [s for n in task.sources if (s := manifest.sources[n]) is not None]
    for s in sources:
        told = 2 * s.samples + s.quarantined + sum(s.ignored.values()) + s.excluded
        found.same(f"{where}: {s.name}", "members = 2 · samples + quarantined + ignored + excluded", told, s.members)
    samples = [shard.samples for shard in shards]
    found.same(f"{where}: task {index}", "samples of its sources", sum(s.samples for s in sources), sum(samples))
    if min(samples) < 1 or max(samples) - min(samples) > 1:
        what = "samples of its shards differ by more than one, or are none"
        found.add(f"{where}: task {index}", what, min(samples), max(samples))


def check_strays(destination: Destination, manifest: Manifest, found: Found) -> None:
    """Files that nobody lists."""
    listed = {MANIFEST_NAME, *(f.name for f in manifest.files)}
    for shard in manifest.shards:
        listed |= {shard.name, *(f.name for f in shard.files)}
    for name in destination.names():
        if name in listed or any(name.startswith(f) if f.endswith("/") else name == f for f in FOREIGN):
            continue
        if name.startswith(".state/"):
            what = "left by a run that was killed, or is still at work: `sa1b-wds finalize` clears it"
        elif name.endswith(".tar"):
            what = "not in the manifest, and readers would take it for a shard"
        else:
            what = "not in the manifest"
        found.add(destination.place(name), what)


def tasks_done(
    manifest: Manifest, plan: Plan
) -> "Iterator[tuple[int, Task, list[ShardFact], list[SourceFact], list[FileFact]]]":
    """(number, task, its shards, its sources, its quarantine) of each task that is done."""
    for index, task in enumerate(plan.tasks):
        shards = shards_of(manifest, plan, index)
        if shards is not None:
            sources = [s for n in task.sources if (s := manifest.sources[n]) is not None]
            stem = quarantine_stem(index)
            files = [f for f in manifest.files if f.name in (f"{stem}.members", f"{stem}.jsonl")]
            yield index, task, shards, sources, files
