"""Shard bytes → packed samples: ranged reads, every span held against its CRC-32 before anybody uses it.

With a manifest, each shard has `<shard>.idx` (where its samples begin) and `index/<stem>.rows` (their ids and CRC-32s),
both held against the manifest's SHA-256 when first needed: so a shard that is cut, changed, exchanged or has lost a
sample is found before one of its bytes is decoded. Without one (brace lists, `pipe:`), what can be known is checked:
every header byte for byte, whole pairs, the two end blocks and nothing behind them.

With a cache, samples are taken from there where they are kept; the shard itself is opened when one is not.
"""

import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from time import perf_counter
from typing import cast

import numpy as np
import numpy.typing as npt
from zlib_ng import zlib_ng

from . import tar
from .buffers import Buffer, Pool
from .cache import ShardCache, Spans
from .errors import FormatError, Sa1bError, ShardDamaged, StorageError
from .format import ROW
from .layout import I64, ShardIndex, check_end, check_offsets, image_id_of, split_span
from .limits import Limits
from .manifest import ShardFact
from .pipe import PREFIX
from .ranged import ForwardFile, Ranged, open_ranged
from .traffic import Traffic

_log = logging.getLogger("sa1b_wds")

_MOST_BYTES_AT_ONCE = 64 << 20


@dataclass(slots=True, eq=False)
class PackedSample:
    """A sample's bytes, in a buffer that is lent until `release`."""

    where: str
    """Shard, byte and key, for messages."""
    key: str
    image_id: int
    jpg: memoryview
    member: memoryview
    """The packed annotations."""
    buffer: Buffer
    pool: Pool

    def release(self) -> None:
        """The bytes are no longer needed; the views must not be used any more."""
        self.pool.give(self.buffer)


Found = PackedSample | Sa1bError
"""A sample, or why there is none."""


@dataclass(slots=True)
class ReadCost:
    """What reading took, summed over calls."""

    read: float = 0.0
    """Seconds."""
    check: float = 0.0
    """Seconds."""
    bytes: int = 0
    """Of samples, wherever they came from."""
    traffic: Traffic = field(default_factory=Traffic)
    cache_bytes: int = 0
    """Of these, from the cache."""
    cache_hits: int = 0
    """Samples."""
    cache_misses: int = 0
    """Samples."""
    cache_damaged: int = 0
    """Samples that were in the cache and not what they should be; they count as misses."""


@dataclass(frozen=True, kw_only=True)
class SideFiles:
    """The index of a shard by its side files, each held against the manifest."""

    where: str
    """The shard, for messages."""
    fact: ShardFact
    read: Callable[[str], bytes]
    """Reads a file by its name in the manifest."""
    images: bool = True
    """Whether samples have a jpg."""
    kept: ShardCache | None = None

    def __call__(self) -> ShardIndex:
        """Raises: FormatError, ShardDamaged, StorageError."""
        folder, _, name = self.fact.name.rpartition("/")
        stem = name.removesuffix(".tar")
        rows_name = f"{folder}/index/{stem}.rows" if folder else f"index/{stem}.rows"
        idx, rows = self.file(f"{self.fact.name}.idx"), self.file(rows_name)
        n = self.fact.samples
        if len(idx) != 8 * (n + 1) or len(rows) != ROW.itemsize * n:
            raise FormatError(self.where, "side files of another number of samples", n, len(idx) // 8 - 1)
        offsets, table = np.frombuffer(idx, "<i8").astype(np.int64), np.frombuffer(rows, ROW)
        check_offsets(offsets, f"{self.where}.idx")
        ids, crc32 = table["image_id"].astype(np.int64), table["crc32"].astype(np.uint32)
        return ShardIndex(offsets=offsets, image_id=ids, crc32=crc32, images=self.images)

    def file(self, name: str) -> bytes:
        """A side file, held against the manifest."""
        fact = next((fact for fact in self.fact.files if fact.name == name), None)
        if fact is None:
            raise FormatError(
                self.where, "the manifest lists no such side file", name, [f.name for f in self.fact.files]
            )
        number = next((i for i, end in enumerate((".tar.idx", ".rows")) if name.endswith(end)), None)
        if self.kept is None or number is None:
            data = self.read(name)
        else:
            data = self.kept.side(
                number,
                fact.bytes,
                lambda found: hashlib.sha256(found).hexdigest() == fact.sha256,
                lambda: self.read(name),
            )
        where = f"{self.where}: {name}"
        if len(data) != fact.bytes:
            place = f"{where}: byte {min(len(data), fact.bytes):,}"
            raise ShardDamaged(place, "length differs from the manifest", fact.bytes, len(data))
        found = hashlib.sha256(data).hexdigest()
        if found != fact.sha256:
            raise ShardDamaged(where, "SHA-256 differs from the manifest", fact.sha256, found)
        return data


@dataclass(frozen=True)
class Known:
    """The index of a shard that was read once from end to end."""

    index: ShardIndex

    def __call__(self) -> ShardIndex:
        return self.index


@dataclass(frozen=True)
class ShardPlace:
    """Where a shard is, and what is known of it before it is opened."""

    where: str
    """Path, URL or `pipe:` command."""
    samples: int
    length: int
    """Bytes."""
    find: Callable[[], ShardIndex]
    """Makes its index."""
    kept: ShardCache | None = None
    """What is kept of it on this node."""


@dataclass(slots=True)
class _Open:
    file: Ranged | None
    """None: it cannot be opened, or only reads forwards."""
    damage: Sa1bError | None
    traffic: Traffic = field(default_factory=Traffic)
    """Of the file, as far as it was counted."""


class Shard:
    """One shard, its index and its open file; each is made when first needed. Several threads may read at once."""

    def __init__(self, place: ShardPlace, limits: Limits | None = None) -> None:
        self.where, self.length = place.where, place.length
        self._limits = limits
        self._find, self._kept = place.find, place.kept
        self._lock = threading.Lock()
        self._index: ShardIndex | None = None
        self._open: _Open | None = None
        self._stop = threading.Event()
        self._forward: list[ForwardFile] = []
        self._busy: set[ForwardFile] = set()

    @property
    def is_forward(self) -> bool:
        """Whether it can only be read from its beginning."""
        return self.where.startswith(PREFIX)

    def interrupt(self) -> None:
        """End what is being waited for: whoever waits gets an error, and the shard is of no use any more."""
        self._stop.set()
        with self._lock:
            for forward in self._busy:
                forward.interrupt()
            if self._open is not None and self._open.file is not None:
                self._open.file.interrupt()

    def index(self) -> ShardIndex:
        """Raises: FormatError, ShardDamaged, StorageError."""
        with self._lock:
            if self._index is None:
                self._index = self._find()
            return self._index

    def _opened(self) -> _Open:
        with self._lock:
            if self._open is None:
                try:
                    file = None if self.is_forward else open_ranged(self.where, self._limits)
                    self._open = _Open(file, self._wrong_length(file) if file else None)
                except StorageError as error:
                    self._open = _Open(None, error)
                if self._stop.is_set() and self._open.file is not None:
                    self._open.file.interrupt()
            return self._open

    def _wrong_length(self, file: Ranged) -> ShardDamaged | None:
        found = self.length + file.behind(self.length)
        if found == self.length:
            return None
        place = f"{self.where}: byte {min(self.length, found):,}"
        return ShardDamaged(place, "the shard's length differs from what is known of it", self.length, found)

    def read(self, places: Sequence[int], pool: Pool, cost: ReadCost, *, tolerant: bool = False) -> list[Found]:
        """The samples at these places, each checked, or the error that says why it cannot be used.

        Args:
            places: rising numbers of samples; those that stand together are read in one go.
            pool: lends the buffers.
            cost: is added to.
            tolerant: read what is sound of a shard whose length is wrong, instead of refusing all of it.

        Raises:
            FormatError, ShardDamaged, StorageError: the whole shard cannot be used.
        """
        index = self.index()
        if self._kept is None:
            self._usable(tolerant)
        out: list[Found] = []
        run: list[int] = []
        size = 0
        for place in places:
            span = int(index.offsets[place + 1] - index.offsets[place])
            if run and (place != run[-1] + 1 or size + span > _MOST_BYTES_AT_ONCE):
                out += self._read_run(index, run, pool, cost, tolerant)
                run, size = [], 0
            run.append(place)
            size += span
        return out + self._read_run(index, run, pool, cost, tolerant) if run else out

    def _usable(self, tolerant: bool) -> _Open:
        """The open shard; raises what is wrong with all of it."""
        shard = self._opened()
        if shard.damage is not None and not (tolerant and shard.file is not None):
            raise shard.damage
        return shard

    def _read_run(self, index: ShardIndex, run: list[int], pool: Pool, cost: ReadCost, tolerant: bool) -> list[Found]:
        if self._kept is None:
            return self._fetch(index, run, pool, cost, tolerant)
        found: dict[int, Found] = {}
        with self._kept.spans(index.offsets, run[0], run[-1] + 1) as spans:
            self._look_up(spans, index, run, found, pool, cost)
            missing = [place for place in run if place not in found]
            if missing:
                # Another process may be fetching some of these, or have done so by now.
                spans.claim(missing, self._stop)
                self._look_up(spans, index, missing, found, pool, cost)
                missing = [place for place in missing if place not in found]
            cost.cache_misses += len(missing)
            for some in _neighbours(missing):
                fetched = self._fetch(index, some, pool, cost, tolerant)
                found.update(zip(some, fetched, strict=True))
                begin = perf_counter()
                spans.keep(
                    {p: s.buffer.view for p, s in zip(some, fetched, strict=True) if isinstance(s, PackedSample)}
                )
                cost.read += perf_counter() - begin
        return [found[place] for place in run]

    def _look_up(
        self, spans: Spans, index: ShardIndex, places: list[int], found: dict[int, Found], pool: Pool, cost: ReadCost
    ) -> None:
        """Add to `found` what the cache has of these places."""
        offsets = index.offsets
        for place in spans.there(places):
            buffer = pool.take(int(offsets[place + 1] - offsets[place]))
            begin = perf_counter()
            sample: Found | None = None
            if spans.fill(place, buffer.view):
                between = perf_counter()
                sample = self._check(index, place, int(offsets[place]), buffer, pool, len(buffer.view))
                cost.read += between - begin
                cost.check += perf_counter() - between
            if isinstance(sample, PackedSample):
                found[place] = sample
                cost.cache_hits += 1
                cost.cache_bytes += len(buffer.view)
                cost.bytes += len(buffer.view)
                continue
            pool.give(buffer)
            spans.drop(place)
            cost.cache_damaged += 1
            _log.warning("damaged in the cache, fetched again: %s", sample or f"{self.where}: sample {place}")

    def _fetch(self, index: ShardIndex, run: list[int], pool: Pool, cost: ReadCost, tolerant: bool) -> list[Found]:
        """Samples that stand together, from the shard itself."""
        try:
            shard = self._usable(tolerant)
        except Sa1bError as error:
            return [error] * len(run)
        offsets = index.offsets[run[0] : run[-1] + 2].tolist()
        buffers = [pool.take(b - a) for a, b in pairwise(offsets)]
        begin = perf_counter()
        try:
            got = self._fill(shard, offsets[0], [buffer.view for buffer in buffers], run[-1] + 1 == len(index))
        except Sa1bError as error:
            for buffer in buffers:
                pool.give(buffer)
            if len(run) == 1:
                return [error]
            return [found for place in run for found in self._fetch(index, [place], pool, cost, tolerant)]
        between = perf_counter()
        out: list[Found] = []
        for place, offset, buffer in zip(run, offsets[:-1], buffers, strict=True):
            sample = self._check(index, place, offset, buffer, pool, got - (offset - offsets[0]))
            if isinstance(sample, Sa1bError):
                pool.give(buffer)
            out.append(sample)
        cost.read += between - begin
        cost.check += perf_counter() - between
        cost.bytes += got
        if shard.file is not None:
            with self._lock:
                now = shard.file.traffic
                cost.traffic += now - shard.traffic
                shard.traffic = now
        return out

    def _check(self, index: ShardIndex, place: int, offset: int, buffer: Buffer, pool: Pool, have: int) -> Found:
        span = buffer.view
        name = "" if index.image_id is None else f": sa_{index.image_id[place]}"
        where = f"{self.where}: byte {offset:,}{name}"
        if have < len(span):
            have = max(have, 0)
            where = f"{self.where}: byte {offset + have:,}{name}"
            return ShardDamaged(where, "the shard stops inside a sample", f"{len(span):,} bytes", f"{have:,}")
        if index.crc32 is not None:
            found, expected = zlib_ng.crc32(span), int(index.crc32[place])
            if found != expected:
                return ShardDamaged(
                    where, f"CRC-32 of the {len(span):,} bytes from here", f"{expected:08x}", f"{found:08x}"
                )
        try:
            key, jpg, member = split_span(span, where, index.images)
            image_id = image_id_of(key, where)
        except Sa1bError as error:
            return error
        if index.image_id is not None and image_id != index.image_id[place]:
            return ShardDamaged(where, "another sample than the index names", f"sa_{index.image_id[place]}", key)
        return PackedSample(where if name else f"{where}: {key}", key, image_id, jpg, member, buffer, pool)

    def _fill(self, shard: _Open, offset: int, views: list[memoryview], last: bool) -> int:
        """How many bytes of the views were there."""
        if shard.file is not None:
            return shard.file.read(offset, views)
        forward = self._take_forward(offset)
        wanted = sum(map(len, views))
        got = -1
        try:
            got = forward.read(offset, views)
            if last and got == wanted:
                check_end(forward, offset + got, self.where)
        finally:
            with self._lock:
                self._busy.discard(forward)
                again = got == wanted and not last
                if again:
                    self._forward.append(forward)
            if not again:
                forward.close()
        return got

    def _take_forward(self, offset: int) -> ForwardFile:
        """The running command that has come closest to `offset`, or a new one."""
        with self._lock:
            before = [f for f in self._forward if f.position <= offset]
            if before:
                found = max(before, key=lambda f: f.position)
                self._forward.remove(found)
            else:
                found = cast(ForwardFile, open_ranged(self.where))
            self._busy.add(found)
            return found


class Shards:
    """All shards of a data set; the last few that were used are kept open."""

    def __init__(self, places: Sequence[ShardPlace], keep: int = 128, limits: Limits | None = None) -> None:
        """Without limits, those of the environment hold."""
        self.places, self._keep, self._limits = places, keep, limits
        self._lock = threading.Lock()
        self._open: OrderedDict[int, Shard] = OrderedDict()

    def __reduce__(self) -> tuple[type["Shards"], tuple[Sequence[ShardPlace], int, Limits | None]]:
        return Shards, (self.places, self._keep, self._limits)

    def __len__(self) -> int:
        return len(self.places)

    def apart(self, keep: int, limits: Limits | None = None) -> "Shards":
        """The same shards with open files of their own: what is interrupted here does not disturb others."""
        made = Shards(self.places, keep, limits or self._limits)
        made.__dict__.update(counts=self.counts, mean_bytes=self.mean_bytes)
        return made

    @cached_property
    def counts(self) -> I64:
        """[shards] samples of each."""
        return np.array([place.samples for place in self.places], np.int64)

    @cached_property
    def mean_bytes(self) -> npt.NDArray[np.float64]:
        """[shards] bytes of a sample of each, on average."""
        return np.array([place.length / max(place.samples, 1) for place in self.places], np.float64)

    def __getitem__(self, number: int) -> Shard:
        with self._lock:
            shard = self._open.get(number)
            if shard is None:
                shard = self._open[number] = Shard(self.places[number], self._limits)
                if len(self._open) > self._keep:
                    self._open.popitem(last=False)  # closed when nobody reads from it any more
            else:
                self._open.move_to_end(number)
            return shard

    def interrupt(self) -> None:
        """End what is being waited for, where that is possible."""
        with self._lock:
            shards = list(self._open.values())
        for shard in shards:
            shard.interrupt()

    def close(self) -> None:
        """Let go of everything that is open."""
        with self._lock:
            self._open.clear()


def _neighbours(places: list[int]) -> list[list[int]]:
    """Rising places in groups that stand together."""
    out: list[list[int]] = []
    for place in places:
        if out and out[-1][-1] == place - 1:
            out[-1].append(place)
        else:
            out.append([place])
    return out


def length_of(index: ShardIndex) -> int:
    """Bytes of a shard with this index."""
    return int(index.offsets[-1]) + len(tar.END)
