"""What a person sees while tasks run: a bar with rate and time left on a terminal, a line a shard in a batch log."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from .convert import Outcome, Progress
from .plan import Plan

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


class Display:
    """Follows tasks; `report` takes their progress, `ended` their outcomes."""

    def __init__(self, plan: Plan, tasks: list[int], out: TextIO, bar: "Bar | None") -> None:
        self._plan, self._out, self._bar = plan, out, bar
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
        """A line for each shard, then one for the task."""
        receipt = outcome.receipt
        if outcome.already_done:
            self._line(f"task {outcome.task}: done before")
            return
        for shard in receipt.shards:
            self._line(
                f"{shard.name}: {shard.samples:,} samples, {shard.annotations:,} masks, {megabytes(shard.bytes)}"
            )
        members = sum(s.members for s in receipt.sources)
        samples = sum(s.samples for s in receipt.sources)
        size = self._plan.bytes_of(self._plan.tasks[outcome.task])
        skipped = sum(k.bytes for s in receipt.sources for k in s.skipped)
        self._line(
            f"task {outcome.task}: {members:,} members in, {samples:,} samples out, "
            f"{sum(s.quarantined for s in receipt.sources):,} quarantined, "
            f"{sum(sum(s.ignored.values()) for s in receipt.sources):,} ignored, "
            + (f"{skipped:,} bytes skipped, " if skipped else "")
            + f"{outcome.seconds:.1f} s, {megabytes(size / max(outcome.seconds, 1e-9))}/s, "
            f"peak memory {megabytes(outcome.peak_memory)}"
            + (f", {megabytes(outcome.spilled_bytes)} through scratch" if outcome.spilled_bytes else "")
        )

    def _line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            print(text, file=self._out, flush=True)


@contextmanager
def display(plan: Plan, tasks: list[int], out: TextIO | None = None) -> Iterator[Display]:
    """A display on a terminal if `out`, standard error unless said otherwise, is one, else plain lines."""
    out = out or sys.stderr
    if not out.isatty():
        yield Display(plan, tasks, out, None)
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
    with Progress(*columns, console=Console(file=out)) as bar:
        yield Display(plan, tasks, out, bar)


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
