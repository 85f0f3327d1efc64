"""The converter as tests run it, and what it must leave: accounts that balance, samples that are equal, no trace."""

import gc
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from sa1b_wds import engines
from sa1b_wds.annotations import restore, unpack
from sa1b_wds.convert import Job, Options, missing_tasks, run_task, survey, write_plan
from sa1b_wds.manifest import Manifest, Receipt, SourceFact
from sa1b_wds.plan import Plan, Recoding, Source, Task, make_plan
from sa1b_wds.publication import finalize
from sa1b_wds.storage import Destination

from . import making
from .making import Member

ALL = 1.0
"""A `max_quarantine` that allows everything."""


def write(folder: Path, sources: Mapping[str, bytes]) -> list[Path]:
    """Source tars of these names and bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in sources.items():
        (folder / name).write_bytes(data)
    return [folder / name for name in sources]


def planned(
    paths: Sequence[Path],
    *,
    shards: int | Sequence[int] | None = None,
    mix: int = 4,
    seed: int = 0,
    recoding: Recoding | None = None,
) -> Plan:
    """The plan of these sources; `shards`: of each task, however few bytes there are."""
    sources = [Source(name=p.name, size=max(1, p.stat().st_size)) for p in paths]
    size = 1 << 20 if shards is None else 1 << 50
    plan = make_plan(sources, shard_size=size, mix=mix, seed=seed, recoding=recoding)
    if shards is None:
        return plan
    counts = [shards] * len(plan.tasks) if isinstance(shards, int) else list(shards)
    tasks, first = [], 0
    for task, k in zip(plan.tasks, counts, strict=True):
        tasks.append(Task(sources=task.sources, first_shard=first, shards=k))
        first += k
    return msgspec.structs.replace(plan, tasks=tasks)


def job_of(
    paths: Sequence[Path],
    dest: Path,
    *,
    shards: int | Sequence[int] | None = None,
    mix: int = 4,
    seed: int = 0,
    plan: Plan | None = None,
    recoding: Recoding | None = None,
    **options: Any,
) -> Job:
    """A job with its plan written below `dest`; `options` are those of convert.Options."""
    plan = plan or planned(paths, shards=shards, mix=mix, seed=seed, recoding=recoding)
    destination = Destination(str(dest))
    write_plan(destination, plan)
    return Job(
        destination=destination,
        plan=plan,
        locations={p.name: str(p) for p in paths},
        options=Options(**options),
    )


def run(job: Job) -> Manifest:
    """What `sa1b-wds convert` does: all tasks that are missing, then finalize."""
    for index in missing_tasks(job.destination, job.plan):
        run_task(job, index)
    return finalize(job.destination)


def convert(paths: Sequence[Path], dest: Path, **options: Any) -> Manifest:
    """A whole conversion, accounts checked."""
    job = job_of(paths, dest, **options)
    manifest = run(job)
    check_accounts(dest)
    return manifest


def convert_folder(folder: str, dest: str, workers: int = 1, shard_size: int = 1 << 20, mix: int = 1) -> None:
    """A whole conversion of a folder with an engine; for child processes, so it takes plain values."""
    found = survey([folder])
    sources = [Source(name=name, size=size) for name, (_, size) in found.items()]
    plan = make_plan(sources, shard_size=shard_size, mix=mix, seed=0)
    destination = Destination(dest)
    write_plan(destination, plan)
    locations = {name: url for name, (url, _) in found.items()}
    job = Job(destination=destination, plan=plan, locations=locations, options=Options(max_quarantine=ALL))
    tasks = missing_tasks(destination, plan)
    for end in engines.pool(workers)(job, tasks, lambda progress: None) if tasks else ():
        if isinstance(end, engines.Failure):
            raise end.error
    finalize(destination)


# ---------------------------------------------------------------------------------------------------- what was written


def tree(dest: Path) -> dict[str, str]:
    """Every path below `dest`, hidden and empty ones included → hash of its bytes, or `folder`."""
    out = {}
    for path in sorted(dest.rglob("*")):
        name = str(path.relative_to(dest))
        out[name] = "folder" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
    return out


def receipts(dest: Path) -> list[Receipt]:
    """All receipts, read without the code under test."""
    return [msgspec.json.decode(p.read_bytes(), type=Receipt) for p in sorted((dest / "receipts").glob("*.json"))]


def receiptless(dest: Path) -> list[str]:
    """Shards and quarantines that no receipt names."""
    named = {fact.name for r in receipts(dest) for fact in r.quarantine} | {
        s.name for r in receipts(dest) for s in r.shards
    }
    there = {n for n, kind in tree(dest).items() if kind != "folder" and (n.endswith(".tar") or "quarantine/" in n)}
    return sorted(n for n in there - named if not n.startswith(".state/"))


@dataclass(frozen=True)
class Quarantined:
    """A line of a quarantine, and the bytes that were stored for it."""

    source: str
    byte: int
    name: str
    key: str
    reason: str
    data: bytes | None


def quarantined(dest: Path) -> list[Quarantined]:
    """Everything in quarantine, in its order; the bytes must be where the lines say."""
    out: list[Quarantined] = []
    for lines in sorted((dest / "quarantine").glob("*.jsonl")):
        stored = iter(making.read_tar(lines.with_suffix(".members").read_bytes()))
        for line in lines.read_bytes().splitlines():
            entry = json.loads(line)
            data = None
            if entry.pop("stored"):
                name, data = next(stored)
                assert re.fullmatch(rf"{re.escape(entry['source'])}/{entry['byte']}\.(jpg|json|bin)", name), name
            out.append(Quarantined(**entry, data=data))
        assert next(stored, None) is None
    return out


def samples(dest: Path) -> dict[str, tuple[bytes, bytes]]:
    """key → (jpg, the JSON restored) of every sample of every shard, by tarfile; pairs must be adjacent."""
    out: dict[str, tuple[bytes, bytes]] = {}
    for path in sorted(dest.glob("*.tar")):
        members = making.read_tar(path.read_bytes())
        for (first, jpg), (second, columns) in zip(members[::2], members[1::2], strict=True):
            key = first.removesuffix(".jpg")
            assert (first, second) == (f"{key}.jpg", f"{key}.safetensors")
            assert key not in out
            out[key] = jpg, restore(unpack(columns, second))
    return out


def check_samples(dest: Path, members: Sequence[Member]) -> None:
    """The shards hold exactly these members, byte for byte."""
    wanted: dict[str, dict[str, bytes]] = {}
    for member in members:
        wanted.setdefault(member.key, {})[member.name.rpartition(".")[2]] = member.data
    assert samples(dest) == {key: (both["jpg"], both["json"]) for key, both in wanted.items()}


def balances(fact: SourceFact) -> bool:
    return fact.members == 2 * fact.samples + fact.quarantined + sum(fact.ignored.values())


def check_accounts(dest: Path) -> None:
    """members = 2 · samples + quarantined + ignored, in each receipt, in the manifest, and against the files."""
    manifest = msgspec.json.decode((dest / "manifest.json").read_bytes(), type=Manifest)
    facts = [fact for receipt in receipts(dest) for fact in receipt.sources]
    assert all(balances(fact) for fact in facts)
    assert sorted(facts, key=lambda f: f.name) == sorted(filter(None, manifest.sources), key=lambda f: f.name)
    totals = manifest.totals
    assert totals.members == 2 * totals.samples + totals.quarantined + totals.ignored
    assert totals.members == sum(fact.members for fact in facts)
    assert totals.quarantined == sum(fact.quarantined for fact in facts) == len(quarantined(dest))
    assert totals.samples == len(samples(dest)) == sum(fact.samples for fact in facts)
    shards = [shard for receipt in receipts(dest) for shard in receipt.shards]
    assert manifest.shards == shards
    stated = {s.name: (s.bytes, s.sha256) for s in shards}
    stated |= {f.name: (f.bytes, f.sha256) for f in [*(f for s in shards for f in s.files), *manifest.files]}
    found = {name: ((dest / name).stat().st_size, digest) for name, digest in tree(dest).items() if digest != "folder"}
    del found["manifest.json"]
    assert found == stated


def check_no_trace(dest: Path) -> None:
    """Nothing of any task below `dest`: only the plan, perhaps with an empty folder where attempts are made."""
    left = [name for name, kind in tree(dest).items() if kind != "folder" or name not in (".state", ".state/attempts")]
    assert left == ["plan.json"]


def _descriptors() -> list[str]:
    out = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            out.append(str(link.readlink()))
        except FileNotFoundError:  # the one that lists them
            continue
    return sorted(t for t in out if t.startswith("/") and not t.startswith(("/dev/", "/proc/")))


@contextmanager
def undisturbed() -> Iterator[None]:
    """What happens inside leaves no thread and no open file."""
    gc.collect()  # what earlier tests left to it
    threads, descriptors = set(threading.enumerate()), _descriptors()
    yield
    assert set(threading.enumerate()) <= threads
    assert _descriptors() == descriptors
