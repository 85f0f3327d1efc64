"""Which task reads which sources and writes which shards; numbers in, numbers out.

A task reads a group of `mix` sources together and deals their samples to its own K shards. The groups are consecutive
pieces of a seeded permutation of the sources, so that a shard holds distant parts of the archive. K is the group's
bytes over the shard size, rounded; the shard size may move by a tenth to the value that makes the shards of the whole
run as equal as possible. So every shard has its number before the first byte moves, and tasks share nothing.
"""

import hashlib
import itertools
from collections.abc import Sequence
from pathlib import PurePosixPath

import msgspec
import numpy as np

from .errors import FormatError, UsageError
from .format import SIDE_LIMIT
from .permutation import permutation

FORMAT = "sa1b-wds-plan/1"
PACKER = 1
"""Revision of everything that shapes the bytes of a shard beside the format; another one makes another plan."""
RECODER = 2
"""The same for plans that make photographs smaller: releases that cannot do it refuse them."""
SHARD_NAME = "sa1b-train-{:06d}.tar"
_SHARDS = 1_000_000
"""With more, their names would no longer sort by number."""


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """A source tar, known by its name: it may move, and links to it may expire."""

    name: str
    size: int
    """Bytes as it lies there, compressed or not."""


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """A group of sources, and the shards they become."""

    sources: list[int]
    """Numbers of the sources in the plan's list, in the order in which they take turns."""
    first_shard: int
    shards: int


class Recoding(msgspec.Struct, frozen=True, kw_only=True):
    """Photographs made smaller; without one, shards hold the source's bytes."""

    max_side: int
    """Pixels: longest side of the stored photographs; those that are not longer keep their bytes."""
    quality: int
    """JPEG quality, 1 to 100."""
    encoder: str
    """What the JPEG library makes of a fixed picture: see `recoding.encoder`. Another one would give other bytes."""

    def size(self, height: int, width: int) -> tuple[int, int] | None:
        """(h, w) of the stored photograph, the shorter side rounded half up; None: the source's bytes stay."""
        longest = max(height, width)
        if longest <= self.max_side:
            return None
        h, w = ((2 * side * self.max_side + longest) // (2 * longest) for side in (height, width))
        return max(1, h), max(1, w)


class Plan(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The whole run. Everything but this is derived from it."""

    format: str
    packer: int
    seed: int
    mix: int
    shard_size: int
    """Bytes, as asked for."""
    sources: list[Source]
    tasks: list[Task]
    recoding: Recoding | None = None
    """Left out where photographs stay as they are: such a plan has the bytes that it always had."""
    excluded: list[int] = []
    """Ids of images that are left out of the data set, sorted; left out where there are none."""

    @property
    def max_side(self) -> int | None:
        return self.recoding.max_side if self.recoding else None

    @property
    def quality(self) -> int | None:
        return self.recoding.quality if self.recoding else None

    @property
    def shards(self) -> int:
        return sum(task.shards for task in self.tasks)

    def bytes_of(self, task: Task) -> int:
        return sum(self.sources[i].size for i in task.sources)

    def expected_sizes(self) -> list[float]:
        """Expected bytes a shard, one entry a task."""
        return [self.bytes_of(task) / task.shards for task in self.tasks]

    def shard_names(self, task: Task) -> list[str]:
        return [SHARD_NAME.format(task.first_shard + i) for i in range(task.shards)]

    def to_bytes(self) -> bytes:
        """The plan as it is written: the same plan always gives the same bytes."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n"

    @property
    def digest(self) -> str:
        """SHA-256 of `to_bytes()`: what receipts and the manifest name the plan by."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


def make_plan(
    sources: Sequence[Source],
    *,
    shard_size: int,
    mix: int,
    seed: int,
    recoding: Recoding | None = None,
    excluded: Sequence[int] = (),
) -> Plan:
    """The plan of a run.

    Args:
        sources: the tars; their order does not matter.
        shard_size: bytes a shard should have; moved by up to a tenth.
        mix: sources a task reads together.
        seed: of the grouping.
        recoding: how photographs are made smaller; None: they stay as they are.
        excluded: ids of images to leave out.

    Raises:
        UsageError: no sources, two of one name, an empty one, or options out of range.
    """
    if not sources:
        raise UsageError("plan", "no sources")
    if shard_size < 1 << 20:
        raise UsageError("plan: --shard-size", "too small", "at least 1MiB", f"{shard_size:,} bytes")
    if not 1 <= mix <= 64:
        raise UsageError("plan: --mix", "out of range", "1 to 64", mix)
    if not 0 <= seed < 1 << 63:
        raise UsageError("plan: --seed", "out of range", "0 to 2^63 - 1", seed)
    if recoding is not None:
        if not 16 <= recoding.max_side <= SIDE_LIMIT:
            raise UsageError("plan: --max-side", "out of range", f"16 to {SIDE_LIMIT:,}", recoding.max_side)
        if not 1 <= recoding.quality <= 100:
            raise UsageError("plan: --quality", "out of range", "1 to 100", recoding.quality)
    ordered = sorted(sources, key=lambda s: s.name)
    for a, b in itertools.pairwise(ordered):
        if a.name == b.name:
            raise UsageError(f"plan: {a.name}", "two sources of this name: names tell them apart")
    for s in ordered:
        if PurePosixPath(s.name).name != s.name or not s.name.isprintable():
            raise UsageError(f"plan: {s.name!r}", "not the name of a file")
        if s.size < 1:
            raise UsageError(f"plan: {s.name}", "an empty source")
    shuffled = permutation(len(ordered), seed).tolist()
    groups = [shuffled[i : i + mix] for i in range(0, len(shuffled), mix)]
    loads = np.array([sum(ordered[i].size for i in group) for group in groups], np.float64)
    counts = _shard_counts(loads, shard_size)
    if (total := int(counts.sum())) > _SHARDS:
        raise UsageError(
            "plan: --shard-size", "too small: a shard's number has six digits", f"{_SHARDS:,} shards", total
        )
    firsts = np.concatenate([[0], np.cumsum(counts)[:-1]]).tolist()
    tasks = [
        Task(sources=group, first_shard=first, shards=k)
        for group, first, k in zip(groups, firsts, counts.tolist(), strict=True)
    ]
    return Plan(
        format=FORMAT,
        packer=PACKER if recoding is None else RECODER,
        seed=seed,
        mix=mix,
        shard_size=shard_size,
        sources=list(ordered),
        tasks=tasks,
        recoding=recoding,
        excluded=sorted(set(excluded)),
    )


def _shard_counts(
    loads: "np.ndarray[tuple[int], np.dtype[np.float64]]", shard_size: int
) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    """K of each task, with the shard size within a tenth that makes max/min of all shards smallest."""
    best: tuple[float, float] | None = None
    chosen = np.ones(len(loads), np.int64)
    for step in sorted(range(-100, 101), key=abs):  # the nearest to what was asked for wins a tie
        counts = np.maximum(1, np.rint(loads / (shard_size * (1 + step / 1000)))).astype(np.int64)
        sizes = loads / counts
        score = (float(sizes.max() / sizes.min()), abs(step))
        if best is None or score < best:
            best, chosen = score, counts
    return chosen


def load_plan(data: bytes, where: str) -> Plan:
    """A plan from its bytes.

    Raises:
        FormatError: it is not a plan, or one of a version this release does not know.
    """
    try:
        plan = msgspec.json.decode(data, type=Plan)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise FormatError(where, f"not a plan: {error}") from None
    packer = PACKER if plan.recoding is None else RECODER
    if plan.format != FORMAT or plan.packer != packer:
        known, found = f"{FORMAT}, packer {packer}", f"{plan.format}, packer {plan.packer}"
        raise FormatError(where, "a plan this release does not know", known, found)
    return plan


def difference(mine: Plan, there: Plan) -> str:
    """What differs between two plans, in a few words; empty if nothing does."""
    said = [
        f"{name} {getattr(there, name)} there, {getattr(mine, name)} here"
        for name in ("packer", "seed", "mix", "shard_size", "max_side", "quality")
        if getattr(mine, name) != getattr(there, name)
    ]
    a, b = {s.name: s.size for s in mine.sources}, {s.name: s.size for s in there.sources}
    if new := sorted(set(a) - set(b)):
        said.append(f"{len(new)} sources more here, {new[0]} the first")
    if gone := sorted(set(b) - set(a)):
        said.append(f"{len(gone)} sources fewer here, {gone[0]} the first")
    if moved := sorted(n for n in set(a) & set(b) if a[n] != b[n]):
        said.append(f"{moved[0]} has {b[moved[0]]:,} bytes there, {a[moved[0]]:,} here")
    if other := sorted(set(mine.excluded) ^ set(there.excluded)):
        counts = f"{len(there.excluded):,} images excluded there, {len(mine.excluded):,} here"
        said.append(f"{counts}, sa_{other[0]} the first that differs")
    if not said and mine.recoding != there.recoding:
        said.append("it was made with a JPEG library that gives other bytes: install the same version of simplejpeg")
    if not said and mine != there:
        said.append("the tasks")
    return "; ".join(said)
