"""Sources that go once they are shards, for a disk that holds one copy only (`convert --delete-source`).

A source is deleted when its task's receipt and shards are on the disk, every file of them has been read back and has
the receipt's SHA-256, and then every member of the source has been found again in them, byte for byte: the same walk
as `verify --against`. It costs a second pass over both. What shards do not hold keeps its source: members in
quarantine, ignored ones (but directories), bytes that salvage passed over, a link, a file that changed meanwhile.

Killed at any moment, the next run of the same command goes on: a task that is done and has sources left is looked at
again, from the beginning.
"""

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from .comparison import compare
from .contents import check_files
from .convert import Job
from .errors import StorageError
from .files import translating
from .manifest import FileFact, Receipt, ShardFact, SourceFact, receipt_name
from .storage import local_path, local_size


@dataclass(kw_only=True)
class Deletion:
    """What became of a task's sources."""

    deleted: list[str] = field(default_factory=list)
    """Names."""
    kept: list[str] = field(default_factory=list)
    """Where, and why."""


def is_left(job: Job, index: int) -> bool:
    """Whether a source of a task is still there."""
    urls = (job.locations.get(job.plan.sources[n].name) for n in job.plan.tasks[index].sources)
    return any(url is not None and local_path(url).exists() for url in urls)


def delete_sources(job: Job, index: int, receipt: Receipt) -> Deletion:
    """Delete the sources of a task that is done, as far as that loses nothing. Errors keep a source, and are said."""
    done, checked = Deletion(), False
    for number, fact in zip(job.plan.tasks[index].sources, receipt.sources, strict=True):
        url = job.locations.get(fact.name)
        try:
            if url is None or local_size(url) is None or not (path := local_path(url)).exists():
                continue
        except StorageError:  # gone: by an earlier run, or by another process at the same task
            continue
        if reason := _not_in_shards(fact):
            done.kept.append(f"{url}: kept: {reason}")
            continue
        try:
            before = _state(path)
            if not stat.S_ISREG(before[0]):
                done.kept.append(f"{url}: kept: a link, which says nothing of the file")
                continue
            if not checked:
                _read_back(job, index, receipt)
                checked = True
            found = compare(
                lambda count: None,
                job.destination,
                url,
                number,
                fact,
                index,
                receipt.shards,
                [],
                None,
                job.plan.excluded,
            )
            if found.count:
                done.kept.append(f"{url}: kept: {found.kept[0]}")
                continue
            if _state(path) != before:
                done.kept.append(f"{url}: kept: it has changed meanwhile")
                continue
            with translating(url):
                path.unlink()
        except StorageError as error:
            done.kept.append(f"{url}: kept: {error}")
            continue
        done.deleted.append(fact.name)
    return done


def _not_in_shards(fact: SourceFact) -> str:
    """What of a source stands in no shard, in a few words; empty where all does."""
    ignored = {kind: count for kind, count in fact.ignored.items() if kind != "directory"}
    said = [f"{fact.quarantined:,} members in quarantine"] if fact.quarantined else []
    said += [f"{sum(ignored.values()):,} members ignored ({', '.join(ignored)})"] if ignored else []
    said += [f"{sum(s.bytes for s in fact.skipped):,} bytes passed over by salvage"] if fact.skipped else []
    return ", ".join(said)


def _state(path: Path) -> tuple[int, ...]:
    """What changes when a file does."""
    with translating(str(path)):
        s = os.lstat(path)
    return s.st_mode, s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns


def _read_back(job: Job, index: int, receipt: Receipt) -> None:
    """Raises: StorageError: something of the task is not on the disk as its receipt says."""
    facts: list[FileFact | ShardFact] = [*receipt.shards]
    facts += [file for shard in receipt.shards for file in shard.files]
    job.destination.settle([receipt_name(index), *(fact.name for fact in facts)])
    found = check_files(lambda count: None, job.destination, facts)
    if found.count:
        raise StorageError("", f"its task is not what its receipt says: {found.kept[0]}")
