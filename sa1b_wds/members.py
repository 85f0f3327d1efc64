"""The packed members of a shard without the photographs between them: each by its place in DALI's index.

A few percent of a shard's bytes. Its CRC-32s cover whole samples, so nothing here can be held against them: headers are
compared byte for byte, and `annotations.unpack` checks the form.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

from . import tar
from .errors import FormatError, ShardDamaged
from .format import MEMBER_LIMIT
from .layout import PACKED, image_id_of, parse_header
from .ranged import Ranged, open_ranged

_REQUESTS = 8
"""On their way at the same time, where each has to wait for a server."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a packed member's bytes stand in its shard."""

    key: str
    begin: int
    """Byte of its data; its header stands before."""
    size: int


@dataclass(frozen=True, slots=True)
class Member:
    """A packed member, read."""

    key: str
    image_id: int
    where: str
    """Shard, byte and key, for messages."""
    data: memoryview


def places(data: bytes, where: str, samples: int) -> list[Place]:
    """Of every sample of a shard, from `index/<stem>.idx`.

    Raises:
        FormatError: not DALI's index of so many samples.
    """
    lines = data.decode("ascii", "replace").splitlines()[1:]
    if len(lines) != samples:
        raise FormatError(where, "another number of samples than the manifest says", samples, len(lines))
    return [_place(line, where) for line in lines]


def _place(line: str, where: str) -> Place:
    # jpg <byte> <size> <name> safetensors <byte> <size> <name>, or the second half alone
    fields = line.split(" ")
    if len(fields) in (4, 8):
        suffix, begin, size, name = fields[-4:]
        whole = (begin + size).isdecimal() and int(size) <= MEMBER_LIMIT and int(begin) >= tar.BLOCK
        if whole and suffix == PACKED[1:] and name.endswith(PACKED):
            return Place(name.removesuffix(PACKED), int(begin), int(size))
    raise FormatError(where, "not a line of DALI's index", found=line[:100])


def read(url: str, wanted: Sequence[Place]) -> Iterator[Member]:
    """These members, in their order.

    Raises:
        ShardDamaged: the shard ends before, or has something else there.
        StorageError: it cannot be read.
    """
    with ExitStack() as stack:
        file = open_ranged(url)
        stack.callback(file.close)
        one: Callable[[Place], Member] = lambda place: _read(file, url, place)  # noqa: E731
        if "://" not in url or not file.parallel:
            yield from map(one, wanted)
            return
        threads = stack.enter_context(ThreadPoolExecutor(_REQUESTS, "members"))
        for i in range(0, len(wanted), 4 * _REQUESTS):  # a bounded number of them waits in memory
            yield from threads.map(one, wanted[i : i + 4 * _REQUESTS])


def _read(file: Ranged, url: str, place: Place) -> Member:
    data = memoryview(bytearray(tar.BLOCK + place.size))
    begin = place.begin - tar.BLOCK
    where = f"{url}: byte {begin:,}: {place.key}"
    got = file.read(begin, [data])
    if got < len(data):
        at = f"{url}: byte {place.begin:,}: {place.key}{PACKED}"
        raise ShardDamaged(at, "the shard stops inside this member", f"{place.size:,} bytes", f"{got - tar.BLOCK:,}")
    key, size = parse_header(bytes(data[: tar.BLOCK]), PACKED, where)
    if (key, size) != (place.key, place.size):
        found = f"{key}{PACKED} of {size:,} bytes"
        raise ShardDamaged(where, "another member than the index names", f"{place.key} of {place.size:,} bytes", found)
    return Member(key, image_id_of(key, where), where, data[tar.BLOCK :])
