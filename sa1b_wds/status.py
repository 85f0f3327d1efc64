"""Who works on what, from the destination alone: receipts, heartbeats, and what is left to be done.

A task is done when its receipt is there. Any other one is what its last heartbeat says: running, stale (not heard of
for a minute, or its process has ended on this very machine), failed with its error, or missing. A receipt has no time
in it, since it is a fact of the data; how fast tasks were stands in the last heartbeat of those that are done.
"""

import contextlib
import shlex
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import median
from typing import Any, Literal

import msgspec

from . import config
from .convert import Job, Outcome, Progress, check_sizes, missing_tasks, ranges, read_plan, run_task
from .deletion import delete_sources
from .errors import NotFound, Sa1bError, masked
from .heartbeat import Beat, Heart, here, read_beats
from .manifest import MANIFEST_NAME, receipt_name
from .plan import Plan
from .storage import Destination

State = Literal["done", "running", "stale", "failed", "missing"]
STATES: tuple[State, ...] = ("done", "running", "stale", "failed", "missing")

_MEASURED = 32
"""Tasks that are done whose heartbeats are read, to know how long one takes: no more, however many are done."""


def run_reported(job: Job, index: int, report: Callable[[Progress], None] = lambda progress: None) -> Outcome:
    """`run_task`, with heartbeats while it runs and its error left behind when it fails."""
    total = job.plan.bytes_of(job.plan.tasks[index])
    with Heart(job.destination, index, total, job.command) as heart:

        def both(progress: Progress) -> None:
            heart.progressed(progress.bytes_read, progress.samples)
            report(progress)

        try:
            check_sizes(job, index)
            outcome = _run(job, index, both)
            if job.options.delete_source:
                gone = delete_sources(job, index, outcome.receipt)
                outcome = replace(outcome, deleted=tuple(gone.deleted), kept=tuple(gone.kept))
        except Sa1bError as error:
            heart.failed(str(error))
            raise
        except Exception as error:  # a fault of this program: whoever looks from afar should see it too
            heart.failed(f"{type(error).__name__}: {error}")
            raise
        except (
            KeyboardInterrupt,
            SystemExit,
        ) as stopped:  # by a signal: the time limit is near, or another job wants in
            said = str(stopped) if isinstance(stopped, KeyboardInterrupt) else ""
            heart.failed(f"stopped by {said}" if said else "stopped")
            raise
        heart.end(0.0 if outcome.already_done else outcome.seconds)
        return outcome


def _run(job: Job, index: int, report: Callable[[Progress], None]) -> Outcome:
    try:
        return run_task(job, index, report)
    except NotFound:
        # Another process may have finished the task, and deleted what it is made of, before this one opened it.
        if not (job.options.delete_source and job.destination.exists(receipt_name(index))):
            raise
        return run_task(job, index, report)


def leave_error(job: Job, index: int, error: Sa1bError) -> None:
    """The last words of a task whose process could not say any."""
    heart = Heart(job.destination, index, job.plan.bytes_of(job.plan.tasks[index]), job.command)
    last = read_beats(job.destination, [index]).get(index)
    heart.last_words_of(last, str(error))


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskStatus:
    """Where a task is."""

    task: int
    state: State
    beat: Beat | None


@dataclass(frozen=True, kw_only=True)
class Overview:
    """Where a whole run is."""

    where: str
    plan: Plan
    now: float
    """Seconds since 1970."""
    tasks: list[TaskStatus]
    """One of each task of the plan."""
    is_published: bool
    """There is a manifest, and no task is missing from it."""

    @cached_property
    def counts(self) -> dict[str, int]:
        """state → tasks; all five states are there."""
        found = Counter(task.state for task in self.tasks)
        return {state: found[state] for state in STATES}

    @property
    def is_done(self) -> bool:
        return self.counts["done"] == len(self.tasks)

    @property
    def left(self) -> str:
        """The tasks without a receipt, as Slurm's --array takes them; those that run now are among them."""
        return ranges([task.task for task in self.tasks if task.state != "done"])

    @cached_property
    def bytes_total(self) -> int:
        """Of all sources."""
        return sum(source.size for source in self.plan.sources)

    @cached_property
    def bytes_left(self) -> int:
        """Of the sources of tasks that are not done, less what the running ones have read."""
        left = 0
        for task in self.tasks:
            if task.state != "done":
                left += self.plan.bytes_of(self.plan.tasks[task.task])
            if task.state == "running" and task.beat is not None:
                left -= task.beat.bytes_read
        return max(left, 0)

    @cached_property
    def rate(self) -> float:
        """Bytes of the sources a second, of all running tasks together."""
        return sum(task.beat.rate for task in self.tasks if task.state == "running" and task.beat is not None)

    @property
    def seconds_left(self) -> float | None:
        """If it goes on as it does now; None while nothing runs."""
        return self.bytes_left / self.rate if self.rate else None

    @cached_property
    def commands(self) -> list[str]:
        """What finishes the run, the shortest way first; empty where nothing is left to do."""
        where = shlex.quote(masked(self.where))
        if self.is_done:
            return [] if self.is_published else [f"sa1b-wds finalize {where}"]
        array = f"sbatch --array=$(sa1b-wds status {where} --left) JOB && sa1b-wds finalize {where}"
        return [self._command(), array]

    def _command(self) -> str:
        """The last command that somebody gave, else what it must have been."""
        beats = sorted((t.beat for t in self.tasks if t.beat is not None and t.beat.command), key=lambda beat: beat.now)
        if not beats:
            given = config.Convert(out=masked(self.where), **planned(self.plan))
            return command(given, sources="SOURCES")
        last = beats[-1]
        return last.command if last.folder in ("", here()) else f"cd {shlex.quote(last.folder)} && {last.command}"


def planned(plan: Plan) -> dict[str, Any]:
    """The options of `convert` that a plan was made with."""
    found: dict[str, Any] = {"shard_size": config.Size(plan.shard_size), "mix": plan.mix, "seed": plan.seed}
    if plan.recoding is not None:
        found |= {"max_side": plan.recoding.max_side, "quality": plan.recoding.quality}
    if plan.excluded:
        found["exclude"] = [f"sa_{image_id}" for image_id in plan.excluded]
    return found


def command(options: config.Convert, sources: str | None = None) -> str:
    """What a user would type for these options; no more than what differs from what goes without saying.

    Secrets of URLs are masked. A `pipe:` command, which may have some anywhere, is left out: it must be typed again.
    """
    words = ["sa1b-wds", "convert", *([sources] if sources is not None else options.sources)]
    for name in options.__struct_fields__:
        value, usual = getattr(options, name), getattr(config.Convert(), name)
        if name == "sources" or value == usual:
            continue
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            words += [flag, *map(str, value if isinstance(value, list) else [value])]
    line = shlex.join("pipe:…" if word.startswith("pipe:") else masked(word) for word in words)
    return line.encode("utf-8", "backslashreplace").decode()  # a path that is not UTF-8, which JSON cannot hold


def read_status(destination: Destination, *, now: float) -> Overview:
    """The state of every task of the plan, from receipts and heartbeats: two listings, and what they name.

    Args:
        now: seconds since 1970; a heartbeat older than a minute is stale.
    """
    plan = read_plan(destination)
    missing = set(missing_tasks(destination, plan))
    done = [index for index in range(len(plan.tasks)) if index not in missing]
    some = done[:: max(1, len(done) // _MEASURED)]
    beats = read_beats(destination, missing.union(some))
    tasks = [_state(index, index not in missing, beats.get(index), now) for index in range(len(plan.tasks))]
    published = not missing and _is_published(destination)
    return Overview(where=destination.where, plan=plan, now=now, tasks=tasks, is_published=published)


def _state(index: int, done: bool, beat: Beat | None, now: float) -> TaskStatus:
    state: State = "missing"
    if done:
        state, beat = "done", beat if beat is not None and beat.ended else None
    elif beat is not None and not beat.ended:
        state = "failed" if beat.error is not None else "running" if beat.is_alive(now) else "stale"
    return TaskStatus(task=index, state=state, beat=beat)


class _Published(msgspec.Struct):
    missing_tasks: list[int]


def _is_published(destination: Destination) -> bool:
    if not destination.exists(MANIFEST_NAME):
        return False
    return not msgspec.json.decode(destination.read(MANIFEST_NAME), type=_Published).missing_tasks


@dataclass(frozen=True, kw_only=True, slots=True)
class Rate:
    """How fast a task is, and how that is known."""

    rate: float
    """Bytes of the sources a second."""
    basis: str


def measured_rate(overview: Overview) -> Rate | None:
    """What the tasks that are done, else those that run, have shown; None where there are none."""
    done = [t.beat.rate for t in overview.tasks if t.state == "done" and t.beat is not None and t.beat.bytes_read]
    if done:
        return Rate(rate=median(done), basis=f"the median of {len(done):,} finished task{'s' * (len(done) != 1)}")
    running = [t.beat.rate for t in overview.tasks if t.state == "running" and t.beat is not None and t.beat.bytes_read]
    if running:
        return Rate(
            rate=median(running), basis=f"the median of {len(running):,} running task{'s' * (len(running) != 1)}"
        )
    return None


GUESS = 200_000_000
"""Bytes a second of a task of which nothing is known: less than the slowest row of README's table of conversion."""


def expected_rate(destination: Destination, given: int | None, *, now: float) -> Rate:
    """How fast a task will be, as said, as measured here, or guessed."""
    if given is not None:
        return Rate(rate=given, basis="as --rate says")
    with contextlib.suppress(NotFound):
        if (measured := measured_rate(read_status(destination, now=now))) is not None:
            return measured
    return Rate(rate=GUESS, basis="a cautious guess; --rate says it better")
