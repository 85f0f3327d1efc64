"""A data set held against itself and against its sources; what differs is collected, never raised.

    plain      every listed file: length and SHA-256; nothing else below the destination; the facts of manifest, plan
               and receipts agree, and every side file that follows from the manifest is what follows from it.
               Runs at the speed of the hash.
    deep       the shards are parsed as well (one pass for both): headers byte for byte, padding zero, whole pairs, the
               two end blocks and nothing behind them. Each packed member is unpacked, its document rebuilt, and packed
               again: the same bytes must come out. That walk decodes every RLE, sums its runs to h · w and counts
               the areas that differ from what is stated (a number the manifest has too). jpg headers against h, w,
               or the stored size, and that against the plan;
               every index against what the shards hold; the dealing replayed from the rows.
    against    each source is read once from end to end, and every member looked up by key and compared byte for byte;
               what is not a sample must be in quarantine, byte for byte too, or counted as ignored. Photographs
               that were made smaller are made smaller once more: every byte of the result must be there.

Each finds what the one before cannot, if somebody has recomputed every digest: `deep` a changed area or a run that no
longer fits, only `against` two photographs of one size that were exchanged.

Files that nobody lists are differences, but for those that other programs leave in a data set (`facts.FOREIGN`).
"""

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any, NamedTuple

from . import recoding
from .accounts import check_keys, check_task
from .comparison import compare
from .contents import check_files, check_shard
from .convert import survey
from .differences import LIMIT, Difference, Found
from .errors import StorageError, UsageError
from .facts import check_facts, check_strays, read_manifest, tasks_done
from .manifest import Manifest
from .plan import Plan
from .storage import Destination

if TYPE_CHECKING:
    from multiprocessing.context import SpawnContext

__all__ = ["Difference", "verify"]

Report = Callable[[int, int], None]


def verify(
    destination: Destination,
    *,
    deep: bool = False,
    against: list[str] | None = None,
    report: Report = lambda done, total: None,
    workers: int = 1,
) -> list[Difference]:
    """Every difference between a data set and what it must be; none: it is sound.

    Args:
        destination: a finished data set.
        deep: parse the shards, not only hash them.
        against: source tars (paths, folders, braces; gzip or plain). Those given are compared; they need not be all.
        report: gets bytes done and in all.
        workers: threads for plain hashing; processes for `deep` and `against`.

    Returns:
        At most 1,000 differences; if there were more, the last one says how many.

    Raises:
        UsageError: `against` for annotations alone.
        PlanMismatch: `against` photographs that were made smaller, with a JPEG library that gives other bytes.
        NotFound, StorageError: a source of `against` that cannot be opened, or a worker that died. Nothing that is
            wrong below the destination raises.
    """
    found = Found(limit=LIMIT)
    sources = survey(against, assume_size=0) if against else {}
    manifest = read_manifest(destination, found)
    if manifest is None:
        return found.listed(destination.where)
    plan = check_facts(destination, manifest, found)
    check_strays(destination, manifest, found)
    jobs = [_Job(check_files, (destination, manifest.files))]
    jobs += [
        _Job(check_shard, (destination, shard, deep, manifest.recoding, manifest.has_images))
        for shard in manifest.shards
    ]
    total = sum(f.bytes for f in manifest.files) + sum(s.bytes + sum(f.bytes for f in s.files) for s in manifest.shards)
    if sources and not manifest.has_images:
        what = "annotations alone: compare the data set that they were exported from"
        raise UsageError(destination.where, what)
    if deep and (plan is not None or not manifest.has_images):
        jobs.append(_Job(check_keys, (destination, manifest.shards, plan.excluded if plan is not None else [])))
    if plan is not None:
        if sources and plan.recoding is not None:
            recoding.check(plan.recoding)
        if deep:
            jobs += [_Job(check_task, (destination, *about)) for about in tasks_done(manifest, plan)]
        jobs += list(_comparisons(destination, manifest, plan, sources, found))
        total += sum(size for _, size in sources.values())
    for result in _run(jobs, workers, report, total, processes=deep or bool(sources)):
        found.merge(result)
    report(total, total)
    return found.listed(destination.where)


def _comparisons(
    destination: Destination, manifest: Manifest, plan: Plan, sources: dict[str, tuple[str, int]], found: Found
) -> "Iterator[_Job]":
    """A job for each source given; what is not of this data set is a difference at once."""
    numbers = {source.name: n for n, source in enumerate(plan.sources)}
    about = {n: (index, task, *rest) for index, task, *rest in tasks_done(manifest, plan) for n in task.sources}
    for name, (url, _) in sources.items():
        number = numbers.get(name)
        if number is None:
            found.add(url, "the plan has no source of this name")
        elif number not in about:
            found.add(url, "its task is missing from this data set (published with --partial)")
        else:
            index, _, shards, _, files = about[number]
            fact = manifest.sources[number]
            yield _Job(compare, (destination, url, number, fact, index, shards, files, plan.recoding, plan.excluded))


class _Job(NamedTuple):
    function: Callable[..., Found]
    arguments: tuple[Any, ...]


class _Tally:
    """Bytes read by all threads; once stopped, whoever adds to it ends."""

    def __init__(self) -> None:
        self.done, self.stopped, self._lock = 0, False, threading.Lock()

    def add(self, count: int) -> None:
        if self.stopped:
            raise SystemExit
        with self._lock:
            self.done += count

    def stop(self) -> None:
        self.stopped = True


class _SharedTally:
    """The same over processes."""

    def __init__(self, context: "SpawnContext") -> None:
        self._done, self._stop = context.Value("q", 0), context.Value("b", 0)

    @property
    def done(self) -> int:
        return int(self._done.value)

    def add(self, count: int) -> None:
        if self._stop.value:
            raise SystemExit
        with self._done.get_lock():
            self._done.value += count

    def stop(self) -> None:
        self._stop.value = 1


_tally: _SharedTally | None = None


def _begin(tally: _SharedTally) -> None:
    """A worker process begins."""
    global _tally
    _tally = tally


def _in_process(job: _Job) -> Found:
    assert _tally is not None
    return job.function(_tally.add, *job.arguments)


def _run(jobs: list[_Job], workers: int, report: Report, total: int, *, processes: bool) -> list[Found]:
    """What each job finds, in the order of the jobs."""
    if workers <= 1:
        done = 0

        def tell(count: int) -> None:
            nonlocal done
            done += count
            report(min(done, total), total)

        return [job.function(tell, *job.arguments) for job in jobs]
    workers = min(workers, len(jobs))
    tally: _Tally | _SharedTally
    pool: Executor
    if processes:
        context = get_context("spawn")
        tally = _SharedTally(context)
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(tally,))
    else:
        tally = _Tally()
        pool = ThreadPoolExecutor(workers, thread_name_prefix="verify")
    try:
        if processes:
            # Ctrl-C reaches every process of a terminal; these inherit that they do not see it, and end by the tally.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                futures = [pool.submit(_in_process, job) for job in jobs]
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        else:
            futures = [pool.submit(job.function, tally.add, *job.arguments) for job in jobs]
        pending: set[Future[Found]] = set(futures)
        while pending:
            pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED).not_done
            report(min(tally.done, total), total)
        return [future.result() for future in futures]
    except BrokenProcessPool:
        hint = "out of memory? fewer --workers help"
        raise StorageError("verify", f"a worker process died ({hint})") from None
    finally:
        tally.stop()
        pool.shutdown(cancel_futures=True)
