"""Who works on what, from the destination alone: heartbeats and errors that tasks leave in `.state/`.

Nothing here is ever part of the data set: `finalize` removes it. Losing a heartbeat loses a line of `status`, so
writing one never fails a task.
"""

import contextlib
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import msgspec

from .convert import Job, Outcome, Progress, missing_tasks, ranges, read_plan, run_task
from .errors import NotFound, Sa1bError, StorageError
from .storage import STATE, Destination

BEAT_SECONDS = 5.0
STALE_SECONDS = 60.0
"""A task that was not heard of for so long counts as dead."""


class Beat(msgspec.Struct, frozen=True, kw_only=True):
    """What a running task says of itself, or its last words."""

    task: int
    host: str
    pid: int
    started: float
    """Seconds since 1970."""
    now: float
    bytes_read: int
    bytes_total: int
    samples: int
    error: str | None = None


def _name(task: int) -> str:
    return f"{STATE}/task-{task:06d}.json"


def run_reported(job: Job, index: int, report: Callable[[Progress], None] = lambda progress: None) -> Outcome:
    """`run_task`, with heartbeats while it runs and its error left behind when it fails."""
    started, last = time.time(), 0.0
    latest = Progress(task=index, bytes_read=0, bytes_total=job.plan.bytes_of(job.plan.tasks[index]), samples=0)

    def beat(error: str | None = None) -> None:
        about = Beat(
            task=index,
            host=socket.gethostname(),
            pid=os.getpid(),
            started=started,
            now=time.time(),
            bytes_read=latest.bytes_read,
            bytes_total=latest.bytes_total,
            samples=latest.samples,
            # A path that is not UTF-8 stands in it with surrogates, which JSON cannot hold.
            error=error and error.encode("utf-8", "backslashreplace").decode(),
        )
        with contextlib.suppress(StorageError):
            job.destination.put(_name(index), msgspec.json.encode(about) + b"\n")

    def both(progress: Progress) -> None:
        nonlocal latest, last
        latest = progress
        if time.monotonic() - last > BEAT_SECONDS:
            last = time.monotonic()
            beat()
        report(progress)

    try:
        outcome = run_task(job, index, both)
    except Sa1bError as error:
        beat(str(error))
        raise
    except (KeyboardInterrupt, SystemExit) as stopped:  # by a signal: the time limit is near, or another job wants in
        beat(f"stopped by {stopped}" if isinstance(stopped, KeyboardInterrupt) and str(stopped) else "stopped")
        raise
    with contextlib.suppress(StorageError):
        job.destination.remove(_name(index))
    return outcome


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskStatus:
    """Where a task is."""

    task: int
    state: Literal["done", "running", "stale", "failed", "missing"]
    beat: Beat | None


def read_status(destination: Destination, *, now: float) -> list[TaskStatus]:
    """The state of every task of the plan, from receipts and heartbeats.

    Args:
        now: seconds since 1970; a heartbeat older than a minute is stale.
    """
    plan = read_plan(destination)
    missing = set(missing_tasks(destination, plan))
    out = []
    for index in range(len(plan.tasks)):
        if index not in missing:
            out.append(TaskStatus(task=index, state="done", beat=None))
            continue
        beat = _read_beat(destination, index)
        if beat is None:
            out.append(TaskStatus(task=index, state="missing", beat=None))
        elif beat.error is not None:
            out.append(TaskStatus(task=index, state="failed", beat=beat))
        else:
            state: Literal["running", "stale"] = "stale" if now - beat.now > STALE_SECONDS else "running"
            out.append(TaskStatus(task=index, state=state, beat=beat))
    return out


def _read_beat(destination: Destination, index: int) -> Beat | None:
    try:
        return msgspec.json.decode(destination.read(_name(index)), type=Beat)
    except (NotFound, msgspec.DecodeError):
        return None


def array_of(statuses: list[TaskStatus]) -> str:
    """The tasks to run again, as Slurm's --array takes them."""
    return ranges([s.task for s in statuses if s.state != "done"])
