"""The order of an epoch as index arithmetic: numbers in, numbers out, no I/O.

Line      (seed, epoch) permutes the shards; the samples of the permuted shards, end to end, are the positions 0 … N-1.
Cut       A leg has n positions and `world` ranks of `lanes` lanes each. The positions are cut into G = world · lanes
          contiguous lanes, equal within 1; inside a lane every `block` positions are permuted. The first block of lane
          j is cut to (j + 1)/G of a block: so blocks end one after the other, half a block a lane is in memory on
          average, reading is smooth, and the first batch waits for few bytes.
Sequence  Number g is the (g // G)-th sample of lane g mod G. Rank r's m-th sample is number m · world + r: so a rank
          owns the lanes ≡ r (mod world) and takes from them in turn, and global batch t is exactly the numbers
          [tM, (t+1)M), M = world · batch size. What has been delivered is thus one integer, the same on every rank.
Legs      Another cut is laid over the positions not yet delivered, *in line order*: the rest of each lane's unfinished
          block, then the lane's tail. So every leg's line is an increasing part of the epoch's line: reading stays
          sequential however many legs there were, and nothing of size N is ever built.
Workers   P DataLoader workers: worker p makes the batches t ≡ p (mod P), t counted in the leg. The line is cut into P
          sections, sized by their batches, each with lanes of its own; P = 1 (threads) is the plain case.
Cost      O(shards + lanes) to start: 1 to 8 ms for 11 million samples, 10,500 shards and up to 4,096 ranks.
          O(legs · log lanes) a sample; a block is `block` numbers.

The permutations' values, and everything above, are part of the format of a state: a change of either is a new format.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import UsageError
from .permutation import permutation

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Leg:
    """A run of an epoch with one shape."""

    world: int
    """Ranks."""
    batch: int
    """Samples of a rank's batch."""
    lanes: int
    """Lanes of a rank, a multiple of workers."""
    block: int
    """Samples of a lane that are permuted together."""
    workers: int = 1
    """DataLoader workers of a rank; 1 when only threads are used."""
    batches: int | tuple[int, ...] = 0
    """Batches delivered by every rank; one entry a rank where they were not in step."""

    def __post_init__(self) -> None:
        for name in ("world", "batch", "lanes", "block", "workers"):
            if getattr(self, name) < 1:
                raise UsageError(f"leg.{name}", "out of range", "at least 1", getattr(self, name))
        if self.lanes % self.workers:
            raise UsageError("leg.lanes", "out of range", f"a multiple of {self.workers} workers", self.lanes)
        if isinstance(self.batches, tuple) and len(self.batches) != self.world:
            raise UsageError("leg.batches", "one entry a rank", self.world, len(self.batches))
        if min(self.batches if isinstance(self.batches, tuple) else [self.batches]) < 0:
            raise UsageError("leg.batches", "out of range", "at least 0", self.batches)

    @property
    def cut(self) -> tuple[int, int, int, int]:
        """What shapes the order: world and batch size may change without a new leg while these products stay."""
        return self.world * self.batch, self.world * self.lanes, self.block, self.workers

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Everything but how far it came."""
        return self.world, self.batch, self.lanes, self.block, self.workers

    @property
    def most(self) -> int:
        """Batches delivered by the rank that was ahead."""
        return max(self.batches) if isinstance(self.batches, tuple) else self.batches


class Cut:
    """n positions, cut for one leg."""

    def __init__(self, n: int, leg: Leg, drop_last: bool, key: tuple[int, ...]) -> None:
        self.leg, self.key, self.n = leg, key, n
        world, batch, workers = leg.world, leg.batch, leg.workers
        full, rest = divmod(n, world * batch)
        self.steps = full if drop_last else -(-n // (world * batch))
        """Batches of every rank."""
        p = np.arange(workers)[:, None]
        self.size = world * batch * ((full - p + workers - 1) // workers) + rest * (p == full % workers)
        """Samples of each section, shape (workers, 1)."""
        self.lanes = leg.lanes // workers * world
        """Lanes of a section, G."""
        j = np.arange(self.lanes)
        row, rank = j // world, j % world
        self.length = (self.size // self.lanes + (j < self.size % self.lanes)).ravel()
        self.start = _ends(self.length)
        self.shift = np.tile(leg.block * (self.lanes - 1 - j) // self.lanes, workers)
        """How much each lane's first block is shortened."""
        batches = np.minimum(np.broadcast_to(np.asarray(leg.batches, np.int64), world), self.steps)[rank]
        had = np.minimum(batch * ((batches - p + workers - 1) // workers), (self.size - rank + world - 1) // world)
        a_rank = self.lanes // world
        self.done = ((had - row + a_rank - 1) // a_rank).ravel()
        """Samples of each lane that were delivered."""
        self.left = _ends(self.length - self.done)
        over = drop_last and bool(np.all(batches == self.steps))  # a dropped tail stays dropped
        self.remaining = 0 if over else int(self.left[-1])
        """Positions for the next leg."""

    def span(self, lane: int, q: int) -> tuple[int, int]:
        """Where a lane's q-th block begins and ends in its lane."""
        begin = q * self.leg.block - int(self.shift[lane])
        return max(begin, 0), min(begin + self.leg.block, int(self.length[lane]))

    def block(self, lane: int, q: int) -> I64:
        """Positions of a lane's q-th block in the order of delivery."""
        begin, end = self.span(lane, q)
        return int(self.start[lane]) + begin + permutation(end - begin, *self.key, lane, q)

    def undelivered(self, x: I64) -> I64:
        """The x-th positions, in line order, that this leg did not deliver."""
        lanes = np.searchsorted(self.left, x, side="right") - 1
        y, done = x - self.left[lanes], self.done[lanes]
        out: I64 = self.start[lanes] + done + y  # the lane's tail …
        for lane in np.unique(lanes).tolist():  # … and what is left of its unfinished block
            had = int(self.done[lane])
            q = (had + int(self.shift[lane])) // self.leg.block
            begin, end = self.span(lane, q)
            if had > begin:
                of = (lanes == lane) & (y < end - had)
                out[of] = np.sort(self.block(lane, q)[had - begin :])[y[of]]
        return out


@dataclass(frozen=True, slots=True)
class Block:
    """One block in the order of delivery: what a fetcher reads, sorted, in one go. Arrays of one length."""

    shard: I64
    index: I64
    """Place of the sample in its shard."""
    position: I64
    """Place on the epoch's line."""


@dataclass(frozen=True, slots=True)
class Due:
    """The samples of one batch of a rank, arrays of shape (batch,)."""

    shard: I64
    index: I64
    """Place of the sample in its shard."""
    position: I64
    """Place on the epoch's line."""
    padding: npt.NDArray[np.bool_]
    """True for the repeats that fill the last batch."""
    lane: I64
    q: I64
    """Which block of the lane holds the sample."""
    place: I64
    """Where in that block, in the order of delivery."""


class Order:
    """One epoch after `legs`, the last of which is the one that runs.

    Args:
        counts: samples of each shard.
        seed, epoch: what the permutations hang on.
        legs: at least one.
        drop_last: whether the leg that ends the epoch drops what does not fill a global batch.
    """

    def __init__(self, counts: npt.ArrayLike, seed: int, epoch: int, legs: Sequence[Leg], drop_last: bool = True):
        n = np.asarray(counts, np.int64)
        self.shards = permutation(len(n), seed, epoch)
        self.first = _ends(n[self.shards])
        self.cuts: list[Cut] = []
        left = int(self.first[-1])
        for i, leg in enumerate(legs):
            self.cuts.append(Cut(left, leg, drop_last, (seed, epoch, i)))
            left = self.cuts[-1].remaining
        self.cut, self.leg = self.cuts[-1], legs[-1]
        done = [min(leg.most, cut.steps) for leg, cut in zip(legs, self.cuts, strict=True)]
        self.delivered = sum(done)
        """Batches of this epoch so far, over all legs."""
        self.left = self.cut.steps - done[-1]
        """Batches to come."""
        self.total = self.delivered + self.left
        self._blocks: dict[int, tuple[int, Block]] = {}

    def block(self, lane: int, q: int) -> Block:
        """A lane's q-th block; the last one asked for of each lane is kept."""
        held = self._blocks.get(lane)
        if held is None or held[0] != q:
            x = self.cut.block(lane, q)
            for cut in self.cuts[-2::-1]:
                x = cut.undelivered(x)
            k = np.searchsorted(self.first, x, side="right") - 1
            held = self._blocks[lane] = q, Block(self.shards[k], x - self.first[k], x)
        return held[1]

    def batch(self, t: int, rank: int) -> Due:
        """The t-th batch of this leg on a rank, 0 ≤ t < cut.steps."""
        world, batch = self.leg.world, self.leg.batch
        p, u = t % self.leg.workers, t // self.leg.workers
        size, lanes = int(self.cut.size[p, 0]), self.cut.lanes
        rows = np.empty((6, batch), np.int64)
        padding = np.zeros(batch, np.bool_)
        for i in range(batch):
            g = u * world * batch + i * world + rank
            if g >= size:
                padding[i] = True
                g -= -(-(g - size + 1) // world) * world  # the rank's own last sample …
                if g < 0:
                    g = size - 1  # … or, if it has none, the last of all
            lane, k = p * lanes + g % lanes, g // lanes
            q = (k + int(self.cut.shift[lane])) // self.leg.block
            place = k - self.cut.span(lane, q)[0]
            block = self.block(lane, q)
            rows[:, i] = block.shard[place], block.index[place], block.position[place], lane, q, place
        return Due(rows[0], rows[1], rows[2], padding, rows[3], rows[4], rows[5])


def go_on(legs: Sequence[Leg], leg: Leg) -> list[Leg]:
    """The legs with which a run of `leg`'s shape continues after `legs`.

    The last leg goes on at its very next sample if it has the same cut and its ranks were in step; otherwise `leg`
    begins over what none of `legs` delivered.
    """
    had = [x for x in legs if x.most]
    if had and had[-1].cut == leg.cut and isinstance(had[-1].batches, int):
        return [*had[:-1], replace(leg, batches=had[-1].batches)]
    return [*had, replace(leg, batches=0)]


def _ends(lengths: npt.NDArray[Any]) -> I64:
    """0 and the running sums: shape (n + 1,)."""
    out = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=out[1:])
    return out
