"""What a person sees while tasks run: a bar with rate and time left on a terminal, a line a shard in a batch log."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, TextIO

from .convert import Options, Outcome, Progress, scratch_bytes
from .log import Log
from .plan import Plan
from .status import Overview, Rate, TaskStatus

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID


def megabytes(count: float) -> str:
    """A byte count for people: 3 significant digits, decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.2f} TB"


def duration(seconds: float) -> str:
    """A time for people: the two largest units."""
    whole = round(seconds)
    for unit, size, smaller, part in (("d", 86_400, "h", 3_600), ("h", 3_600, "min", 60)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // part:02} {smaller}"
    return f"{whole // 60} min" if whole >= 120 else f"{whole} s"


_PREEMPTED = 2 * 3600
"""Seconds: tasks that take longer are likely to be lost halfway on machines that may be taken back (spot, preemptible):
those are gone after hours, and a task that is stopped begins again from nothing."""


def plan_lines(plan: Plan, rate: Rate) -> list[str]:
    """What a plan costs: time and scratch of the largest task, hours of all, and a warning where tasks are long."""
    largest = max(plan.tasks, key=plan.bytes_of)
    seconds = plan.bytes_of(largest) / rate.rate
    total = sum(source.size for source in plan.sources) / rate.rate
    scratch = scratch_bytes(plan, largest, Options())
    lines = [
        f"a task: up to {duration(seconds)} at {megabytes(rate.rate)}/s ({rate.basis}), "
        + (f"{megabytes(scratch)} of scratch" if scratch else "no scratch")
        + f" with the usual --pairing-buffer; all of them: {total / 3600:,.2f} task hours"
    ]
    if seconds > _PREEMPTED:
        advice = "a smaller --mix makes smaller ones" if plan.mix > 1 else "take machines that stay"
        lines.append(
            f"warning: a task of {duration(seconds)} is often cut short on machines that may be taken back, and begins "
            f"again from nothing (more than {duration(_PREEMPTED)}): {advice}"
        )
    return lines


_STILL = 120
"""Seconds after which it is worth saying that a running task gets no further."""


def status_lines(overview: Overview) -> list[str]:
    """What `status` prints: the counts, a line for each task that something is known of, and what is left to do."""
    lines = [", ".join(f"{count:,} {state}" for state, count in overview.counts.items())]
    if not overview.is_done:
        share = 1 - overview.bytes_left / max(overview.bytes_total, 1)
        rest = overview.seconds_left
        lines.append(
            f"{share:.1%} of {megabytes(overview.bytes_total)}"
            + (f", {megabytes(overview.rate)}/s, about {duration(rest)} left" if rest is not None else "")
        )
    lines += [
        _task_line(task, overview.now)
        for state in ("failed", "stale", "running")
        for task in overview.tasks
        if task.state == state
    ]
    if overview.left:
        running = overview.counts["running"]
        lines.append(f"left: --array={overview.left}" + (f" (of which {running:,} running now)" if running else ""))
    commands = overview.commands
    lines += [f"{'or' if i else 'finish'}: {command}" for i, command in enumerate(commands)]
    return lines if overview.left or commands else [*lines, f"{overview.where}: published"]


def _task_line(task: TaskStatus, now: float) -> str:
    beat = task.beat
    assert beat is not None
    since = time.strftime("%H:%M:%S" if now - beat.started < 86_400 else "%Y-%m-%d %H:%M", time.localtime(beat.started))
    share = beat.bytes_read / max(beat.bytes_total, 1)
    line = f"task {task.task} {task.state}: {beat.host} pid {beat.pid}, since {since}, {share:.0%}, "
    line += f"{megabytes(beat.rate)}/s"
    if task.state == "stale":
        line += f", last heard of {duration(max(now - beat.now, 0))} ago"
    elif task.state == "running" and beat.moved and now - beat.moved > _STILL:
        line += f", no further for {duration(now - beat.moved)}"
    return line + (f": {beat.error}" if beat.error else "")


def watch(
    look: Callable[[], tuple[str, bool]],
    seconds: float,
    out: TextIO | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Show what `look` says, (text, whether that was the last), every so many seconds: in place on a terminal."""
    out = out or sys.stdout
    if not out.isatty():
        while True:
            text, last = look()
            print(text, file=out, flush=True)
            if last:
                return
            sleep(seconds)
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    with Live(console=Console(file=out), auto_refresh=False) as live:
        while True:
            text, last = look()
            live.update(Text(text), refresh=True)
            if last:
                return
            sleep(seconds)


class Display:
    """Follows tasks; `report` takes their progress, `ended` their outcomes."""

    def __init__(self, plan: Plan, tasks: list[int], log: Log, bar: "Bar | None") -> None:
        self._plan, self._log, self._bar = plan, log, bar
        self._read: dict[int, int] = {}
        self._samples: dict[int, int] = {}
        self._row: TaskID | None = None
        if bar is not None:
            total = sum(plan.bytes_of(plan.tasks[i]) for i in tasks)
            self._row = bar.add_task("converting", total=total, images=0)

    def report(self, progress: Progress) -> None:
        self._read[progress.task], self._samples[progress.task] = progress.bytes_read, progress.samples
        if self._bar is not None and self._row is not None:
            self._bar.update(self._row, completed=sum(self._read.values()), images=sum(self._samples.values()))

    def ended(self, outcome: Outcome) -> None:
        """A line for each shard, then one for the task: its shards become visible with it, all at once.

        They are open side by side from its first sample to its last, so that the seconds of a shard are the task's.
        """
        receipt, task, say = outcome.receipt, outcome.task, self._log.say
        for kept in outcome.kept:
            say("kept", kept, task=task, message=kept)
        if outcome.deleted:
            say("deleted", f"task {task}: deleted {', '.join(outcome.deleted)}", task=task, sources=outcome.deleted)
        if outcome.already_done:
            say("task", f"task {task}: done before", task=task, done_before=True)
            return
        seconds = max(outcome.seconds, 1e-9)
        for shard in receipt.shards:
            text = f"{shard.name}: {shard.samples:,} samples, {shard.annotations:,} masks, {megabytes(shard.bytes)}"
            about: dict[str, object] = {"samples": shard.samples, "annotations": shard.annotations}
            about |= {"bytes": shard.bytes, "seconds": _rounded(seconds)}
            say(
                "shard", text, task=task, shard=shard.name, **about, mb_per_second=_rounded(shard.bytes / seconds / 1e6)
            )
        members = sum(s.members for s in receipt.sources)
        samples = sum(s.samples for s in receipt.sources)
        quarantined = sum(s.quarantined for s in receipt.sources)
        ignored = sum(sum(s.ignored.values()) for s in receipt.sources)
        excluded = sum(s.excluded for s in receipt.sources)
        size = self._plan.bytes_of(self._plan.tasks[task])
        skipped = sum(k.bytes for s in receipt.sources for k in s.skipped)
        say(
            "task",
            f"task {task}: {members:,} members in, {samples:,} samples out, {quarantined:,} quarantined, "
            f"{ignored:,} ignored, "
            + (f"{excluded:,} excluded, " if excluded else "")
            + (f"{skipped:,} bytes skipped, " if skipped else "")
            + f"{outcome.seconds:.1f} s, {megabytes(size / seconds)}/s, peak memory {megabytes(outcome.peak_memory)}"
            + (f", {megabytes(outcome.spilled_bytes)} through scratch" if outcome.spilled_bytes else "")
            + (f"; {outcome.traffic}" if str(outcome.traffic) else ""),
            task=task,
            done_before=False,
            sources=[s.name for s in receipt.sources],
            members=members,
            samples=samples,
            quarantined=quarantined,
            ignored=ignored,
            excluded=excluded,
            skipped_bytes=skipped,
            bytes=size,
            bytes_written=sum(s.bytes for s in receipt.shards),
            shards=len(receipt.shards),
            seconds=_rounded(seconds),
            mb_per_second=_rounded(size / seconds / 1e6),
            peak_memory=outcome.peak_memory,
            spilled_bytes=outcome.spilled_bytes,
            network=asdict(outcome.traffic),
        )


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


@contextmanager
def display(plan: Plan, tasks: list[int], log: Log) -> Iterator[Display]:
    """A display on a terminal if the log goes to one, else plain lines."""
    if log.is_json or not log.out.isatty():
        yield Display(plan, tasks, log, None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("{task.fields[images]:,} images"),
        TimeRemainingColumn(),
    )
    console = Console(file=log.out)

    def line(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    with Progress(*columns, console=console) as bar, log.through(line):
        yield Display(plan, tasks, log, bar)


@contextmanager
def bytes_display(what: str, out: TextIO | None = None) -> Iterator[Callable[[int, int], None]]:
    """A callback (bytes done, bytes in all) that moves a bar on a terminal, and says nothing elsewhere."""
    out = out or sys.stderr
    if not out.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=out), transient=True) as bar:
        row = bar.add_task(what)
        yield lambda done, total: bar.update(row, completed=done, total=total)
