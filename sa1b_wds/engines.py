"""Ways to run tasks: in this process, or in a pool of processes. An engine is `map(run_task, tasks)`.

A task that fails does not stop the others: each ends as an `Outcome` or a `Failure`.
"""

import contextlib
import gc
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from .convert import Job, Outcome, Progress
from .errors import Sa1bError, StorageError, UsageError
from .status import leave_error, run_reported

if TYPE_CHECKING:
    from types import FrameType

Report = Callable[[Progress], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """A task that did not end well."""

    task: int
    error: Sa1bError


class Engine(Protocol):
    """Runs tasks, and yields how each ended, as they end."""

    def __call__(self, job: Job, tasks: list[int], report: Report) -> Iterator[Outcome | Failure]: ...


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


def one_process(job: Job, tasks: list[int], report: Report) -> Iterator[Outcome | Failure]:
    """The tasks one after the other, in this process (whose threads still work side by side)."""
    gc.freeze()  # what the imports made need not be looked at again in every collection
    for task in tasks:
        try:
            yield run_reported(job, task, report)
        except Sa1bError as error:
            yield Failure(task=task, error=error)


def pool(workers: int) -> Engine:
    """The engine of `workers` processes; 1 is this process alone."""
    if workers < 1:
        raise UsageError("--workers", "out of range", "at least 1", workers)
    if workers == 1:
        return one_process

    def run(job: Job, tasks: list[int], report: Report) -> Iterator[Outcome | Failure]:
        with _Pool(job, min(workers, len(tasks))) as processes:
            yield from processes.run(tasks, report)

    return run


_Connection = multiprocessing.connection.Connection


class _Worker:
    def __init__(self, job: Job) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, job), daemon=True)
        self.process.start()
        theirs.close()
        self.task: int | None = None

    def start(self, task: int) -> None:
        self.task = task
        with contextlib.suppress(OSError):  # it died idle: its pipe will say so, in the place where that is looked for
            self.pipe.send(task)


class _Pool:
    def __init__(self, job: Job, workers: int) -> None:
        self._job = job
        self._workers = [_Worker(job) for _ in range(workers)]

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.pipe.close()
            if worker.task is not None:
                worker.process.terminate()  # it removes what it had begun
        for worker in self._workers:
            worker.process.join()

    def run(self, tasks: list[int], report: Report) -> Iterator[Outcome | Failure]:
        rest = list(reversed(tasks))
        for worker in self._workers:
            worker.start(rest.pop())
        while busy := [w for w in self._workers if w.task is not None]:
            for ready in multiprocessing.connection.wait([w.pipe for w in busy]):
                worker = next(w for w in busy if w.pipe is ready)
                try:
                    said = worker.pipe.recv()
                except (EOFError, OSError):
                    yield self._died(worker)
                    continue
                if isinstance(said, Progress):
                    report(said)
                    continue
                worker.task = None
                if rest:
                    worker.start(rest.pop())
                yield said
            for worker in [w for w in self._workers if not w.process.is_alive() and w.task is None and rest]:
                self._workers[self._workers.index(worker)] = fresh = _Worker(self._job)
                fresh.start(rest.pop())

    def _died(self, worker: _Worker) -> Failure:
        worker.process.join()
        task, code = worker.task, worker.process.exitcode or 0
        assert task is not None
        worker.task = None
        worker.pipe.close()
        how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit status {code}"
        hint = " (out of memory? fewer --workers or a smaller --pairing-buffer help)" if code == -signal.SIGKILL else ""
        error = StorageError(f"task {task}", f"its process ended {how}{hint}; run the same command again")
        leave_error(self._job, task, error)
        return Failure(task=task, error=error)


def _work(pipe: _Connection, job: Job) -> None:
    """A worker's life: tasks come in, progress and outcomes go out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and decides
    signal.signal(signal.SIGTERM, _stop)
    gc.freeze()
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            task = pipe.recv()
            try:
                ended: Any = run_reported(job, task, pipe.send)
            except Sa1bError as error:
                ended = Failure(task=task, error=error)
            pipe.send(ended)


def _stop(number: int, frame: "FrameType | None") -> None:
    sys.exit(128 + number)
