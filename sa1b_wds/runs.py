"""Rows of the key index sorted by id, with a bounded part of them in memory: sorted runs on the disk, merged.

Rows come in any order. Each 2^19 of them are sorted and put into the scratch file in blocks; at the end one block of
each run is in memory, and everything up to the smallest last id of these can be sorted and given out. Cost: every row
is sorted twice, written and read once; memory is 2^19 rows three times over while they come in, and a block a run while
they go out: 35 MB and 10 MB for the 11 million rows of SA-1B.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from .files import Scratch
from .format import KEY_ROW

Rows = npt.NDArray[np.void]
"""Of KEY_ROW."""


class Runs:
    """Takes rows, gives them back sorted by id."""

    def __init__(self, scratch: Scratch, *, run: int = 1 << 19, block: int = 1 << 14) -> None:
        """`run`: rows that are sorted at once; `block`: rows of a run that are in memory while they are merged."""
        self._scratch, self._run, self._block = scratch, run, block
        self._waiting: list[Rows] = []
        self._count = 0
        self._runs: list[list[tuple[int, int]]] = []

    def add(self, rows: Rows) -> None:
        self._waiting.append(rows)
        self._count += len(rows)
        if self._count >= self._run:
            self._put_away()

    def _put_away(self) -> None:
        rows = _sorted(self._waiting)
        self._waiting, self._count = [], 0
        blocks = [rows[begin : begin + self._block] for begin in range(0, len(rows), self._block)]
        self._runs.append([self._scratch.write(block.view(np.uint8).data) for block in reversed(blocks)])

    def merged(self) -> Iterator[Rows]:
        """All rows in pieces, by rising id; once."""
        if not self._runs:
            yield _sorted(self._waiting)
            return
        if self._waiting:
            self._put_away()
        heads = [np.empty(0, KEY_ROW) for _ in self._runs]
        while True:
            heads = [
                self._read(slots.pop()) if not len(head) and slots else head
                for head, slots in zip(heads, self._runs, strict=True)
            ]
            # Beyond the last id that is here of a run, others of it may come first.
            bounds = [int(head["image_id"][-1]) for head, slots in zip(heads, self._runs, strict=True) if slots]
            if not bounds:
                yield _sorted(heads)
                return
            cuts = [int(np.searchsorted(head["image_id"], min(bounds), side="right")) for head in heads]
            yield _sorted([head[:cut] for head, cut in zip(heads, cuts, strict=True)])
            heads = [head[cut:] for head, cut in zip(heads, cuts, strict=True)]

    def _read(self, slot: tuple[int, int]) -> Rows:
        data = bytearray(slot[1])
        self._scratch.read(slot, memoryview(data))
        self._scratch.give_back(slot)
        return np.frombuffer(data, KEY_ROW)


def _sorted(parts: list[Rows]) -> Rows:
    rows = np.concatenate([np.empty(0, KEY_ROW), *parts])
    return rows[np.argsort(rows["image_id"], kind="stable")]
