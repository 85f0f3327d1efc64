"""What a rank reads and when: the batches of an order as slots, the samples they need as reads, in the order due.

A read is a piece of one lane's block, in the order of delivery: all of the block where the budget allows, so that it is
one ranged request per shard touched. The samples of the first few batches are read one by one, so that the first waits
for few bytes, and has the machine for itself, after a resume in the middle of blocks too.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .order import Order
from .selection import Selection

I64 = npt.NDArray[np.int64]

Id = tuple[int, int, int]
"""A sample to be read: lane, number of the block, place in the block. A repeat in a batch of its own has lane −1."""


@dataclass(frozen=True, slots=True)
class Slot:
    """One place of a batch."""

    id: Id | None
    """The sample to decode into it, or None where it repeats another slot."""
    repeats: int
    """The slot of the batch to repeat, or −1."""
    padding: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """One batch."""

    number: int
    """In its leg."""
    slots: tuple[Slot, ...]


@dataclass(frozen=True, slots=True)
class Read:
    """Samples to read together."""

    due: int
    """How many batches of this schedule come before the one that needs the first of them."""
    ids: tuple[Id, ...]
    shard: I64
    """[n] number of each one's shard."""
    index: I64
    """[n] place of each in its shard."""


class Schedule:
    """The batches `numbers` of a rank and their reads, made as they are asked for."""

    def __init__(self, order: Order, selection: Selection, rank: int, numbers: Iterable[int], singly: int = 1) -> None:
        """`singly`: how many batches' samples are read one by one."""
        self._singly = singly
        self._order, self._selection, self._rank = order, selection, rank
        self._numbers = iter(numbers)
        self._planned: dict[int, tuple[int, int]] = {}  # of each lane: block, places of it that have been read
        self._cursor = self._walk()
        self._next: tuple[int, int, int, int, int] | None = None  # due, lane, q, first place, places left
        self._single: Read | None = None
        self.plans: list[Plan] = []
        """Batches seen so far; whoever takes them empties it."""
        self._advance()

    def peek(self) -> tuple[int, int, int] | None:
        """(due, samples that may be read together, shard of the first) of the next read, or None at the end."""
        if self._single is not None:
            return self._single.due, 1, int(self._single.shard[0])
        if self._next is None:
            return None
        due, lane, q, first, left = self._next
        shard = self._selection.shard[self._order.block(lane, q).shard[first]]
        return due, left if due >= self._singly else 1, int(shard)

    def take(self, n: int) -> Read:
        """The next read, of its first n samples; the rest comes again when it falls due."""
        if self._single is not None:
            read = self._single
        else:
            assert self._next is not None
            due, lane, q, first, _ = self._next
            block = self._order.block(lane, q)
            shard, index = self._selection.places(block.shard[first : first + n], block.index[first : first + n])
            self._planned[lane] = q, first + n
            read = Read(due, tuple((lane, q, first + i) for i in range(n)), shard, index)
        self._advance()
        return read

    def _advance(self) -> None:
        self._next = self._single = None
        found = next(self._cursor, None)
        if isinstance(found, Read):
            self._single = found
        else:
            self._next = found

    def _walk(self) -> Iterator["tuple[int, int, int, int, int] | Read"]:
        """Every batch's slots, and between them what has to be read first."""
        order, leg = self._order, self._order.leg
        for due, t in enumerate(self._numbers):
            batch = order.batch(t, self._rank)
            slots: list[Slot] = []
            seen: dict[tuple[int, int, int], int] = {}
            wanted: list[Id | Read] = []
            rows = zip(*(x.tolist() for x in (batch.lane, batch.q, batch.place, batch.padding)), strict=True)
            for i, (lane, q, place, padding) in enumerate(rows):
                at = (lane, q, place)
                if at in seen:
                    slots.append(Slot(None, seen[at], padding))
                    continue
                seen[at] = i
                if padding:  # of a sample delivered before, or on another rank: read again, alone
                    shard, index = self._selection.places(batch.shard[i : i + 1], batch.index[i : i + 1])
                    single = Read(due, ((-1, due, i),), shard, index)
                    slots.append(Slot(single.ids[0], -1, True))
                    wanted.append(single)
                else:
                    slots.append(Slot(at, -1, False))
                    wanted.append(at)
            self.plans.append(Plan(t, tuple(slots)))
            for want in wanted:
                if isinstance(want, Read):
                    yield want
                    continue
                lane, q, place = want
                if self._planned.get(lane, (-1, 0))[0] == q and place < self._planned[lane][1]:
                    continue
                begin, end = order.cut.span(lane, q)
                left = min(end - begin, self._limit(lane, leg.workers) - begin) - place
                yield due, lane, q, place, left

    def _limit(self, lane: int, workers: int) -> int:
        """Samples of a lane that will be delivered: fewer than it has where the last batch is dropped."""
        cut = self._order.cut
        p, j = divmod(lane, cut.lanes)
        batches = (cut.steps - p + workers - 1) // workers
        numbers = min(int(cut.size[p, 0]), batches * self._order.leg.world * self._order.leg.batch)
        return -(-(numbers - j) // cut.lanes)
