"""What is in a data set: totals, and distributions over its shards, images and masks.

Only the packed members are read, by their places in DALI's index; the photographs between them are passed over. The
values of a column go into bins a 2¹⁴th of their size wide, so memory does not grow with the data, and the result does
not depend on the order: minimum, maximum, count and mean are exact, percentiles are exact for whole numbers below
2¹⁵ and of the shards, and else at most 0.006 % too small.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import msgspec
import numpy as np
import numpy.typing as npt

from . import members
from .annotations import Annotations, unpack
from .layout import PACKED
from .manifest import MANIFEST_NAME, ShardFact, Totals, load_manifest
from .storage import Destination

__all__ = ["Distribution", "Statistics", "statistics", "table"]

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

_PERCENTILES = {"p10": 10, "p50": 50, "p90": 90, "p99": 99}
_DROPPED_BITS = 52 - 14
_THREADS = 4
"""They wait for the disk, or for object storage, at the same time."""


class Distribution(msgspec.Struct, frozen=True, kw_only=True):
    """Of one quantity; all but `count` are None where there is nothing to count.

    A percentile is the smallest value that at least so many percent of all values do not exceed.
    """

    count: int
    min: float | None = None
    p10: float | None = None
    p50: float | None = None
    p90: float | None = None
    p99: float | None = None
    max: float | None = None
    mean: float | None = None


class Statistics(msgspec.Struct, frozen=True, kw_only=True):
    """What `sa1b-wds stats` says."""

    totals: Totals
    missing_tasks: int
    """Tasks that were left out with `--partial`."""
    shard_bytes: Distribution
    shard_samples: Distribution
    masks_per_image: Distribution
    counts_length: Distribution
    """Characters of a mask's RLE string."""
    area: Distribution
    """Pixels of a mask, as the source states it."""
    predicted_iou: Distribution
    stability_score: Distribution


def statistics(
    destination: Destination, *, report: Callable[[int, int], None] = lambda done, total: None
) -> Statistics:
    """Read all annotations of a data set, and sum them up.

    Args:
        destination: a finished data set.
        report: gets images done and in all.

    Raises:
        FormatError, ShardDamaged, StorageError: something is missing, or not what the manifest says.
    """
    where = destination.place(MANIFEST_NAME)
    manifest = load_manifest(destination.read(MANIFEST_NAME), where)
    shards = manifest.shards
    columns = {name: _Bins() for name in _COLUMNS}
    done = 0
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="stats") as pool:
        try:
            # In the order of the shards, so that the mean is the same every time.
            for fact, of_shard in zip(shards, pool.map(lambda s: _read(destination, s), shards), strict=True):
                for name, bins in of_shard.items():
                    columns[name].merge(bins)
                done += fact.samples
                report(done, manifest.totals.samples)
        finally:
            pool.shutdown(cancel_futures=True)
    return Statistics(
        totals=manifest.totals,
        missing_tasks=len(manifest.missing_tasks),
        shard_bytes=_distribution([s.bytes for s in shards]),
        shard_samples=_distribution([s.samples for s in shards]),
        **{name: bins.distribution() for name, bins in columns.items()},
    )


_COLUMNS: dict[str, Callable[[Annotations], F64 | I64]] = {
    "masks_per_image": lambda a: np.array([len(a)]),
    "counts_length": lambda a: np.diff(a.offsets),
    "area": lambda a: a.area,
    "predicted_iou": lambda a: a.predicted_iou,
    "stability_score": lambda a: a.stability_score,
}


def _read(destination: Destination, shard: ShardFact) -> "dict[str, _Bins]":
    """The columns of one shard."""
    gathered: dict[str, list[F64 | I64]] = {name: [] for name in _COLUMNS}
    for columns in _members(destination, shard):
        for name, of in _COLUMNS.items():
            gathered[name].append(of(columns).copy())  # a view would keep the whole member
    out = {}
    for name, pieces in gathered.items():
        out[name] = _Bins()
        out[name].add(np.concatenate(pieces).astype(np.float64))
    return out


def _members(destination: Destination, shard: ShardFact) -> Iterator[Annotations]:
    """The annotations of each sample of a shard."""
    name = f"index/{shard.name.removesuffix('.tar')}.idx"
    found = members.places(destination.read(name), destination.place(name), shard.samples)
    for member in members.read(destination.place(shard.name), found):
        yield unpack(member.data, f"{member.where}{PACKED}")


@dataclass(slots=True)
class _Bins:
    """How many values fell into each bin: those that agree in sign, exponent and the first 14 bits behind it."""

    keys: list[I64] = field(default_factory=list)
    counts: list[I64] = field(default_factory=list)
    sums: list[float] = field(default_factory=list)
    low: float = math.inf
    high: float = -math.inf

    def add(self, values: F64) -> None:
        if not len(values):
            return
        bits = values.view(np.int64)
        keys = (bits & np.iinfo(np.int64).max) >> _DROPPED_BITS
        found, counts = np.unique(np.where(bits < 0, ~keys, keys), return_counts=True)
        self.keys.append(found)
        self.counts.append(counts)
        self.sums.append(math.fsum(values.tolist()))
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))

    def merge(self, other: "_Bins") -> None:
        self.keys += other.keys
        self.counts += other.counts
        self.sums += other.sums
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        # Now and then, so that the work is not done for every shard again.
        if len(self.keys) > 64:
            self._join()

    def _join(self) -> None:
        keys, inverse = np.unique(np.concatenate(self.keys), return_inverse=True)
        counts = np.zeros(len(keys), np.int64)
        np.add.at(counts, inverse, np.concatenate(self.counts))
        self.keys, self.counts = [keys], [counts]

    def distribution(self) -> Distribution:
        if not self.keys:
            return Distribution(count=0)
        self._join()
        (keys,), (counts,) = self.keys, self.counts
        upto = np.cumsum(counts)
        n = int(upto[-1])
        ranks = [_rank(share, n) for share in _PERCENTILES.values()]
        chosen = keys[np.searchsorted(upto, ranks)]
        edges = (np.where(chosen < 0, ~chosen, chosen) << _DROPPED_BITS).view(np.float64)
        values = np.clip(np.where(chosen < 0, -edges, edges), self.low, self.high)
        return Distribution(
            count=n,
            min=self.low,
            max=self.high,
            mean=math.fsum(self.sums) / n,
            **dict(zip(_PERCENTILES, values.tolist(), strict=True)),
        )


def _rank(percent: int, n: int) -> int:
    """Which of n values, from 1, is the smallest that so many percent do not exceed."""
    return max(-(-percent * n // 100), 1)


def _distribution(values: Sequence[int]) -> Distribution:
    """Of few values: all of it exact."""
    ordered = sorted(values)
    if not ordered:
        return Distribution(count=0)
    n = len(ordered)
    percentiles = {name: float(ordered[_rank(share, n) - 1]) for name, share in _PERCENTILES.items()}
    low, high = float(ordered[0]), float(ordered[-1])
    return Distribution(count=n, min=low, max=high, mean=math.fsum(ordered) / n, **percentiles)


def table(found: Statistics) -> str:
    """The statistics for people: totals, then a row for each distribution."""
    sums, sizes = found.totals, found.shard_bytes
    balance = f"; largest/smallest shard {sizes.max / sizes.min:.3f}" if sizes.max and sizes.min else ""
    lines = [
        f"{sums.samples:,} images, {sums.annotations:,} masks in {sums.shards:,} shards, {sums.bytes:,} bytes{balance}",
        f"areas that are not those of their masks: {sums.area_mismatches:,}; documents kept beside their columns: "
        f"{sums.stored_sources:,}",
    ]
    if sums.members:  # an export of annotations has no sources
        lines.insert(
            1,
            f"members of the sources: {sums.members:,} = 2 · {sums.samples:,} images + {sums.quarantined:,} "
            f"quarantined + {sums.ignored:,} ignored"
            + (f" + {sums.excluded:,} excluded" if sums.excluded else "")
            + f"; {sums.skipped_bytes:,} bytes skipped",
        )
    if found.missing_tasks:
        lines.append(f"partial: {found.missing_tasks:,} tasks are missing")
    columns = ("min", *_PERCENTILES, "max", "mean")
    rows = [["", "count", *columns]]
    for name, what in _TITLES.items():
        of = getattr(found, name)
        rows.append([what, f"{of.count:,}", *(_number(getattr(of, column)) for column in columns)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines.append("")
    for row in rows:
        cells = [
            f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


_TITLES = {
    "shard_bytes": "bytes a shard",
    "shard_samples": "samples a shard",
    "masks_per_image": "masks an image",
    "counts_length": "RLE characters a mask",
    "area": "area, pixels",
    "predicted_iou": "predicted_iou",
    "stability_score": "stability_score",
}


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    if value == int(value) and abs(value) >= 2:
        return f"{value:,.0f}"
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4g}"
