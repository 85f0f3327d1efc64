"""From an image's id to its place: `index/keys.bin` by bisection, or a table made from what the shards say."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .errors import ShardDamaged
from .format import KEY_ROW
from .ranged import Ranged, open_ranged

I64 = npt.NDArray[np.int64]

_PIECE = 4096  # rows: 64 KiB, about what one request costs anyway


class KeyIndex(Protocol):
    """Where each image is."""

    def places(self, image_ids: Sequence[int]) -> list[tuple[int, int] | None]:
        """(shard, place in it) of each, or None."""


class KeyFile:
    """`index/keys.bin`, never read as a whole: 170 MiB for all of SA-1B, of which a key needs a few pieces."""

    def __init__(self, where: str, rows: int) -> None:
        self.where, self._rows = where, rows
        self._file: Ranged | None = None

    def __reduce__(self) -> tuple[type["KeyFile"], tuple[str, int]]:
        return KeyFile, (self.where, self._rows)

    def places(self, image_ids: Sequence[int]) -> list[tuple[int, int] | None]:
        """Raises: ShardDamaged, StorageError."""
        if self._file is None:
            file = open_ranged(self.where)
            expected = self._rows * KEY_ROW.itemsize
            behind = file.behind(expected)
            if behind:
                raise ShardDamaged(self.where, "length differs from the manifest", expected, expected + behind)
            self._file = file
        wanted = np.unique(np.asarray(image_ids, np.int64))
        found: dict[int, tuple[int, int]] = {}
        self._search(wanted, 0, self._rows, self._file, found)
        return [found.get(int(i)) for i in image_ids]

    def _search(self, wanted: I64, low: int, high: int, file: Ranged, found: dict[int, tuple[int, int]]) -> None:
        """Find what lies in the rows low … high-1, a piece in the middle first."""
        if not len(wanted) or low >= high:
            return
        begin = max(low, (low + high - _PIECE) // 2)
        rows = self._read(begin, min(high, begin + _PIECE), file)
        ids = rows["image_id"]
        at = np.searchsorted(ids, wanted)
        here = (at < len(ids)) & (ids[np.minimum(at, len(ids) - 1)] == wanted)
        for i, row in zip(wanted[here].tolist(), rows[at[here]], strict=True):
            found[i] = int(row["shard"]), int(row["index"])
        self._search(wanted[wanted < ids[0]], low, begin, file, found)
        self._search(wanted[wanted > ids[-1]], begin + len(rows), high, file, found)

    def _read(self, begin: int, end: int, file: Ranged) -> npt.NDArray[np.void]:
        data = bytearray((end - begin) * KEY_ROW.itemsize)
        got = file.read(begin * KEY_ROW.itemsize, [memoryview(data)])
        if got < len(data):
            place = f"{self.where}: byte {begin * KEY_ROW.itemsize + got:,}"
            raise ShardDamaged(place, "the file stops", f"{len(data):,} bytes", f"{got:,}")
        return np.frombuffer(data, KEY_ROW)


class KeyTable:
    """All ids in memory, for shards without a manifest."""

    def __init__(self, ids: Sequence[I64]) -> None:
        """`ids`: of each shard, in its order."""
        flat = np.concatenate([*ids, np.empty(0, np.int64)])
        self._order = np.argsort(flat, kind="stable")
        self._sorted = flat[self._order]
        self._starts = np.cumsum([0, *map(len, ids)])

    def places(self, image_ids: Sequence[int]) -> list[tuple[int, int] | None]:
        out: list[tuple[int, int] | None] = []
        for i in image_ids:
            at = int(np.searchsorted(self._sorted, i))
            if at == len(self._sorted) or self._sorted[at] != i:
                out.append(None)
                continue
            line = int(self._order[at])
            shard = int(np.searchsorted(self._starts, line, side="right")) - 1
            out.append((shard, line - int(self._starts[shard])))
        return out
