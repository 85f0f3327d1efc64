"""Where samples lie in the files of a cache, what they take there, and which file goes first: numbers in, numbers out.

A shard is cut every 64 MiB into stretches; a sample belongs to the stretch that its first byte lies in, and may reach
beyond its end. Each stretch is a file of the cache (see `cache`) with a head in whole pages, of its key and a byte a
sample, then the samples as they stand in the shard; what has not been read is a hole. A sample counts as every page
that it touches, so that what is counted is never less than what the disk gives: 0.4 % more for samples of a megabyte.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

STRETCH = 64 << 20
"""Bytes of a shard that one file of the cache stands for: what is evicted together."""
PAGE = 4096
"""Bytes in which a disk is given away."""
KEY = 32
"""Bytes at the beginning of a file that say whose it is."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Stretch:
    """Neighbouring spans of bytes that one file of the cache holds, each there or not."""

    begins: I64
    """[n + 1] byte of each span from the beginning of the first, then the end of the last."""

    @classmethod
    def of(cls, offsets: I64, number: int) -> tuple["Stretch", int]:
        """A shard's `number`-th stretch, and how many samples stand before it; `offsets` as in a `ShardIndex`."""
        a, b = np.searchsorted(offsets[:-1], [number * STRETCH, (number + 1) * STRETCH])
        return cls(begins=offsets[a : b + 1] - offsets[a]), int(a)

    def __len__(self) -> int:
        return len(self.begins) - 1

    @property
    def head(self) -> int:
        """Bytes before the first span."""
        return pages(0, KEY + len(self)) * PAGE

    @property
    def length(self) -> int:
        """Bytes of the file."""
        return self.head + int(self.begins[-1])

    def pages(self, i: int, j: int) -> I64:
        """[j − i] pages that each of these spans counts as."""
        begins = self.begins[i : j + 1]
        out: I64 = -(-begins[1:] // PAGE) - begins[:-1] // PAGE
        return out


def pages(begin: int, end: int) -> int:
    """Pages that the bytes [begin, end) touch."""
    return -(-end // PAGE) - begin // PAGE


def stretch_at(byte: int) -> int:
    """The number of the stretch that a sample belongs to which begins at this byte."""
    return byte // STRETCH


def stretches(length: int) -> int:
    """How many stretches a shard of so many bytes has; the last may have no sample that begins in it."""
    return -(-length // STRETCH)


def runs(mask: Mask) -> list[tuple[int, int]]:
    """The longest ranges [a, b) in which a mask is true, rising."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]])))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def victims(used: I64, pages: I64, wanted: int, spare: int | None = None) -> I64:
    """Numbers of the files to remove, the least recently used first, so that at least `wanted` pages become free.

    Args:
        used: [n] when each was last used.
        pages: [n] that each has; those without any are none.
        wanted: pages; all files go if they have fewer together.
        spare: the number of one that must stay.
    """
    candidates = np.flatnonzero(pages > 0)
    candidates = candidates[candidates != (-1 if spare is None else spare)]
    n = min(16 if wanted > 0 else 0, len(candidates))
    while True:  # of 170,000 files few have to go at a time: sorting all would take ten times as long
        oldest = candidates[np.argpartition(used[candidates], n - 1)[:n]] if 0 < n < len(candidates) else candidates[:n]
        oldest = oldest[np.argsort(used[oldest], kind="stable")]
        freed = np.cumsum(pages[oldest])
        if n == len(candidates) or (n and freed[-1] >= wanted) or wanted <= 0:
            out: I64 = oldest[: int(np.searchsorted(freed, wanted)) + 1]
            return out
        n = min(8 * n, len(candidates))
