"""Differences, collected: what checks find, bounded in number but counted to the last."""

from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import numpy as np

from .errors import Different, Sa1bError

LIMIT = 1000
"""Differences that are listed; beyond it they are counted."""
LIMIT_OF_ONE = 100
"""The same for one shard, source or task."""

Tell = Callable[[int], None]
"""Called with the bytes that were read since the last call; raises where work is to stop."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not what it must be."""

    where: str
    """File or URL, then byte, key, field."""
    what: str
    expected: str | int | None = None
    found: str | int | None = None

    def __str__(self) -> str:
        return str(Different(self.where, self.what, self.expected, self.found))


@dataclass(slots=True)
class Found:
    """Differences in the order they were found; the first `limit` are kept, all are counted."""

    limit: int = LIMIT_OF_ONE
    kept: list[Difference] = field(default_factory=list)
    count: int = 0

    def add(self, where: str, what: str, expected: object = None, found: object = None) -> None:
        self.count += 1
        if len(self.kept) < self.limit:
            self.kept.append(Difference(where, what, _plain(expected), _plain(found)))

    def same(self, where: str, what: str, expected: object, there: object) -> None:
        """Add a difference unless two things are equal; of lists and records, the part that differs is shown."""
        if expected == there:
            return
        if isinstance(expected, list) and isinstance(there, list):
            more = [x for x in there if x not in expected]
            less = [x for x in expected if x not in there]
            expected, there = less[:1] or f"{len(expected)} in this order", more[:1] or f"{len(there)}"
        elif isinstance(expected, msgspec.Struct) and type(expected) is type(there):
            a, b = msgspec.structs.asdict(expected), msgspec.structs.asdict(there)
            name = next(k for k in a if a[k] != b[k])
            what, expected, there = f"{what}: {name}", a[name], b[name]
        self.add(where, what, expected, there)

    def error(self, error: Sa1bError) -> None:
        """An error of this project, as the difference that it means."""
        self.add(error.where, error.what, error.expected, error.found)

    def merge(self, other: "Found") -> None:
        self.count += other.count
        self.kept += other.kept[: self.limit - len(self.kept)]

    def listed(self, where: str) -> list[Difference]:
        if self.count == len(self.kept):
            return self.kept
        return [*self.kept, Difference(where, "more differences, not listed", found=self.count - len(self.kept))]


def _plain(value: object) -> str | int | None:
    if value is None or isinstance(value, str):
        return value
    return int(value) if isinstance(value, (int, np.integer)) else str(value)


def first_difference(a: memoryview | bytes, b: memoryview | bytes) -> int | None:
    """The first byte in which two differ, the shorter one's length if that is all; None: equal."""
    x, y = np.frombuffer(a, np.uint8), np.frombuffer(b, np.uint8)
    if np.array_equal(x, y):
        return None
    n = min(len(x), len(y))
    unequal = np.flatnonzero(x[:n] != y[:n])
    return int(unequal[0]) if len(unequal) else n
