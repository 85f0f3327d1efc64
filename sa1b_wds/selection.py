"""Which samples of a data set are meant: TFDS's slice notation, ranges and lists as one canonical form.

A selection is a set. Its samples stand in the order of the shards and of the places in them, however it was written:
`train[50%:]+train[:10%]` equals `train[:10%]+train[50%:]`. So the state of a loader can name it by a digest.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from .errors import UsageError

I64 = npt.NDArray[np.int64]

SPLIT = "train"

_TERM = re.compile(r"(?P<name>[\w-]+)(\[(?P<from>[^:\[\]]*)(?P<colon>:)?(?P<to>[^:\[\]]*)\])?")
_BOUND = re.compile(r"(?P<value>-?[\d_]+(\.\d+)?)(?P<unit>%|shard|)")


def parse_split(split: str, counts: Sequence[int] | I64) -> list[tuple[int, int]]:
    """The ranges [a, b) of a split in TensorFlow Datasets' notation.

    `train`, `train[:1%]`, `train[10%:20%]`, `train[100:200]`, `train[-5%:]`, `train[2shard:4shard]`, `train[3shard]`,
    and sums of these with `+`. Percentages may have decimals and are rounded as TFDS's default does (`closest`, halves
    to even), so neighbouring slices share a bound and no sample is in two.

    Args:
        split: the notation; the only split of SA-1B is `train`.
        counts: samples of each shard.

    Raises:
        UsageError: another notation or split, or a bound outside the data set.
    """
    total = int(np.sum(counts))
    ends = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    ranges = []
    for term in split.split("+"):
        match = _TERM.fullmatch(term.strip())
        if not match:
            raise UsageError(
                f"split {split!r}", "not a slice", "train, train[:1%], train[10:20], sums with +", repr(term)
            )
        if match["name"] != SPLIT:
            raise UsageError(f"split {split!r}", "no such split", SPLIT, match["name"])
        a, b = 0, total
        if match["from"] is not None:
            if not match["colon"]:
                unit = match["from"].removesuffix("shard")
                if unit == match["from"]:
                    raise UsageError(
                        f"split {split!r}", "a slice needs a colon", "train[10:20] or train[3shard]", repr(term)
                    )
                first = _bound(split, match["from"], total, ends)
                a, b = first, int(ends[np.searchsorted(ends, first, side="right")]) if first < total else first
            else:
                units = {m["unit"] for m in (_BOUND.fullmatch(match[k].strip()) for k in ("from", "to")) if m}
                if len(units) > 1:
                    raise UsageError(f"split {split!r}", "both bounds of a slice have one unit", None, repr(term))
                a = _bound(split, match["from"], total, ends) if match["from"].strip() else 0
                b = _bound(split, match["to"], total, ends) if match["to"].strip() else total
        if b > a:
            ranges.append((a, b))
    ranges.sort()
    for (_, end), (begin, _) in pairwise(ranges):
        if begin < end:
            raise UsageError(f"split {split!r}", f"the slices overlap at sample {begin:,}: a selection is a set")
    return ranges


def _bound(split: str, text: str, total: int, ends: I64) -> int:
    match = _BOUND.fullmatch(text.strip())
    if not match or (match[2] and match["unit"] != "%"):
        raise UsageError(f"split {split!r}", "not a bound", "as 10, 10%, 2shard, -5%", repr(text))
    value = Fraction(match["value"].replace("_", ""))
    limit = {"%": 100, "shard": len(ends) - 1, "": total}[match["unit"]]
    if abs(value) > limit:
        raise UsageError(
            f"split {split!r}", "a bound outside the data set", f"at most {limit:,}{match['unit']}", text.strip()
        )
    if match["unit"] == "shard":
        return int(ends[int(value) if value >= 0 else len(ends) - 1 + int(value)])
    at = round(value * total / 100) if match["unit"] == "%" else int(value)
    return at if at >= 0 and not text.strip().startswith("-") else total + at


@dataclass(frozen=True, eq=False)
class Selection:
    """Samples of a data set, a part for each shard that has any: what an `Order` permutes."""

    shard: I64
    """[parts] rising numbers of shards."""
    count: I64
    """[parts] samples selected of each."""
    first: I64
    """[parts] place of the first one in its shard, where they are consecutive; else −1."""
    lists: dict[int, I64]
    """The rising places in the shard of each other part."""

    def __len__(self) -> int:
        return int(self.count.sum())

    @classmethod
    def of_ranges(cls, counts: Sequence[int] | I64, ranges: Sequence[tuple[int, int]]) -> "Selection":
        """The samples [a, b) of each range, which must rise and not overlap; `counts`: samples of each shard."""
        ends = np.cumsum(np.asarray(counts, np.int64))
        starts = ends - counts
        merged: list[list[int]] = []
        for a, b in ranges:
            if merged and merged[-1][1] == a:
                merged[-1][1] = b
            elif b > a:
                merged.append([a, b])
        pieces: dict[int, list[tuple[int, int]]] = {}
        for a, b in merged:
            low, high = np.searchsorted(ends, [a, b - 1], side="right")
            for s in range(int(low), int(high) + 1):
                begin, end = max(a - int(starts[s]), 0), min(b, int(ends[s])) - int(starts[s])
                if end > begin:
                    pieces.setdefault(s, []).append((begin, end))
        return cls._of({s: [np.arange(a, b) for a, b in p] if len(p) > 1 else p[0] for s, p in pieces.items()})

    @classmethod
    def of_places(cls, shard: npt.ArrayLike, index: npt.ArrayLike) -> "Selection":
        """Single samples, each by its shard and its place there; in any order, each once."""
        shards, places = np.asarray(shard, np.int64), np.asarray(index, np.int64)
        order = np.lexsort([places, shards])
        shards, places = shards[order], places[order]
        numbers, begins = np.unique(shards, return_index=True)
        return cls._of(dict(zip(numbers.tolist(), ([p] for p in np.split(places, begins[1:])), strict=False)))

    @classmethod
    def _of(cls, parts: "dict[int, tuple[int, int] | list[I64]]") -> "Selection":
        n = len(parts)
        shard, count, first = np.fromiter(parts, np.int64, n), np.empty(n, np.int64), np.empty(n, np.int64)
        lists: dict[int, I64] = {}
        for p, part in enumerate(parts.values()):
            if isinstance(part, tuple):
                first[p], count[p] = part[0], part[1] - part[0]
                continue
            places = np.concatenate(part)
            count[p] = len(places)
            if places[-1] - places[0] + 1 == len(places):
                first[p] = places[0]
            else:
                first[p], lists[p] = -1, places
        return cls(shard, count, first, lists)

    def places(self, part: I64, i: I64) -> tuple[I64, I64]:
        """(shard, place in it) of the i-th samples of these parts."""
        index = self.first[part] + i
        if self.lists:
            for p in np.unique(part[self.first[part] < 0]).tolist():
                of = part == p
                index[of] = self.lists[p][i[of]]
        return self.shard[part], index

    def at(self, i: int) -> tuple[int, int]:
        """(shard, place in it) of the i-th sample, 0 ≤ i < len."""
        ends = np.cumsum(self.count)
        p = int(np.searchsorted(ends, i, side="right"))
        shard, index = self.places(np.array([p]), np.array([i - int(ends[p]) + int(self.count[p])]))
        return int(shard[0]), int(index[0])

    def find(self, shard: int, index: int) -> bool:
        """Whether the sample at that place is selected."""
        p = int(np.searchsorted(self.shard, shard))
        if p == len(self.shard) or self.shard[p] != shard:
            return False
        if p in self.lists:
            return bool(np.any(self.lists[p] == index))
        return 0 <= index - int(self.first[p]) < int(self.count[p])

    def part(self, a: int, b: int) -> "Selection":
        """The samples from the a-th to before the b-th."""
        starts = np.cumsum(self.count) - self.count
        parts: dict[int, tuple[int, int] | list[I64]] = {}
        touched = (starts < b) & (starts + self.count > a) & (a < b)
        for p in np.flatnonzero(touched).tolist():
            low, high = max(a - int(starts[p]), 0), min(b - int(starts[p]), int(self.count[p]))
            begin = int(self.first[p])
            parts[int(self.shard[p])] = [self.lists[p][low:high]] if p in self.lists else (begin + low, begin + high)
        return self._of(parts)

    @property
    def digest(self) -> str:
        """SHA-256 of the selection."""
        h = hashlib.sha256()
        for column in (self.shard, self.count, self.first, *self.lists.values()):
            h.update(np.ascontiguousarray(column, "<i8").tobytes())
        return h.hexdigest()
