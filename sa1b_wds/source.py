"""Members → samples: what a source tar holds, paired by key, with everything that is no sample accounted for.

Members come in any order. A json is packed as soon as it arrives and waits for its jpg, or the jpg waits for its json,
in a table with a byte budget; beyond it they wait in an unlinked scratch file. A sample's place is where its second
member stands. Members: seen = 2 · samples + quarantined + ignored + excluded, always.
"""

import itertools
import re
from collections import Counter, deque
from collections.abc import Callable, Container, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Literal

from . import images, recoding, tar
from .ahead import Ahead
from .annotations import Packed, Packer, restore, unpack
from .buffers import Buffer, Pool
from .errors import SampleRejected
from .exclusion import is_excluded
from .format import MEMBER_LIMIT
from .inflate import Gap, open_bytes
from .plan import Recoding
from .sample import Held, Rejected, Sample, Table
from .storage import Raw

OnDamage = Literal["fail", "salvage"]

_KEY = re.compile(r"sa_(?:0|[1-9][0-9]{0,18})", re.ASCII)
_LARGEST_ID = (1 << 63) - 1
_NOTHING = memoryview(b"")
_IN_WORK = 16
"""Photographs of a source that are being made smaller, or wait behind one that is."""
_KINDS = 50
"""Kinds of ignored members that are named; a tar of 10,000 suffixes must not swell the receipt."""


@dataclass(kw_only=True)
class Account:
    """What became of the members of one source."""

    name: str
    members: int = 0
    samples: int = 0
    quarantined: int = 0
    ignored: Counter[str] = field(default_factory=Counter)
    """How many of each kind: `directory`, `hidden`, a suffix, or `other` beyond 50 kinds."""
    skipped: list[tuple[int, int, str]] = field(default_factory=list)
    """Salvage only: (byte of the tar, bytes, reason) of each stretch that was passed over."""
    greatest_distance: int = 0
    """Members from the first of a pair to the second, at most."""

    excluded: int = 0
    """Of images that the plan leaves out."""

    def balances(self) -> bool:
        return self.members == 2 * self.samples + self.quarantined + sum(self.ignored.values()) + self.excluded


_Kind = Literal["jpg", "json", "ignored", "rejected", "excluded"]


@dataclass(slots=True, eq=False)
class _Member:
    entry: tar.Entry
    kind: "_Kind"
    key: str
    """Or the reason, where it is ignored or rejected."""
    buffer: Buffer | None


def _classify(entry: tar.Entry, excluded: Container[int]) -> tuple[_Kind, str]:
    if entry.kind == "directory":
        return "ignored", "directory"
    if is_excluded(entry.name, excluded):  # first of all: its bytes must come to quarantine neither
        return "excluded", ""
    if entry.kind != "file":
        return "rejected", f"{'an' if entry.kind == 'other' else 'a'} {entry.kind} entry, not a file"
    *folders, base = entry.name.split("/")
    stem, dot, suffix = base.partition(".")
    if suffix not in ("jpg", "json"):
        return "ignored", "hidden" if dot and not stem else _text((dot + suffix)[:40]) or "no suffix"
    if entry.name.startswith("/") or ".." in folders:
        return "rejected", "a name that leads out of its folder"
    if not _KEY.fullmatch(stem) or int(stem[3:]) > _LARGEST_ID:
        return "rejected", "its key is not sa_<id>"
    if entry.size > MEMBER_LIMIT:
        return "rejected", f"too large: {entry.size:,} bytes, at most {MEMBER_LIMIT:,}"
    return ("jpg", stem) if suffix == "jpg" else ("json", stem)


def _room(pool: Pool, size: int) -> Buffer:
    """Memory for a member as it stands in a shard: a block for its header in front, padding behind.

    Behind its view there is room for one block more, for the tar's reader.
    """
    length = tar.BLOCK + size + tar.padding(size)
    buffer = pool.take(length + tar.BLOCK)
    buffer.length = length
    return buffer


def _text(name: str) -> str:
    """A name that can be encoded: bytes that are not UTF-8, which stand in it as surrogates, written as `\\udcff`."""
    return name.encode("utf-8", "backslashreplace").decode()


def _members(
    raw: Raw, where: str, pool: Pool, on_damage: OnDamage, skipped: list[tar.Skipped], excluded: Container[int]
) -> Generator[_Member]:
    """Every member of a source in its order, with its bytes in a buffer; runs in the reading thread."""
    pending: _Member | None = None

    def allocate(entry: tar.Entry) -> memoryview | None:
        nonlocal pending
        if pending is not None and pending.buffer is not None:
            pool.give(pending.buffer)  # salvage gave that member up
        kind, key = _classify(entry, excluded)
        pending = _Member(entry, kind, key, None)
        if kind in ("ignored", "excluded") or entry.kind != "file" or entry.size > MEMBER_LIMIT:
            return None
        pending.buffer = _room(pool, entry.size)
        return pending.buffer.memory[tar.BLOCK :]

    try:
        stream = open_bytes(raw, where, on_damage=on_damage)
        reader = tar.Reader(stream, allocate=allocate, on_damage=on_damage)
        for entry, _ in reader:
            member, pending = pending, None
            if member is None or member.entry is not entry:
                kind, key = _classify(entry, excluded)
                member = _Member(entry, kind, key, None)
            yield member
        # A gap says what broke the gzip stream; what it cost of the tar stands in the reader's own entries.
        gaps = [tar.Skipped(offset=gap.position, size=0, reason=_gap(gap)) for gap in stream.gaps]
        skipped += sorted([*reader.skipped, *gaps], key=lambda s: s.offset)
    finally:
        if pending is not None and pending.buffer is not None:
            pool.give(pending.buffer)
        raw.close()


def _gap(gap: Gap) -> str:
    return (
        f"the gzip stream is damaged at byte {gap.compressed:,} of the file ({gap.reason}): {gap.lost:,} bytes of it "
        f"passed over; no checksum vouches for the tar from byte {gap.start:,} to here"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Recoder:
    """How a task makes photographs smaller, and the threads that do it."""

    how: Recoding
    threads: ThreadPoolExecutor


class SourceReader:
    """The samples of one source, in order; iterate once. A context manager: its thread ends with it."""

    def __init__(
        self,
        *,
        number: int,
        name: str,
        raw: Raw,
        where: str,
        table: Table,
        packer: Packer,
        reject: Callable[[Rejected], None],
        on_damage: OnDamage,
        ahead: int = 24 << 20,
        recoder: Recoder | None = None,
        excluded: Container[int] = (),
    ) -> None:
        """`ahead`: bytes that may be read before they are asked for; `recoder`: None where jpgs stay as they are;
        `excluded`: ids of images to leave out.
        """
        self.account = Account(name=name)
        self._raw = raw
        self._number, self._table, self._packer, self._reject = number, table, packer, reject
        self._skipped: list[tar.Skipped] = []
        self._pool = table.pool
        self._recoder = recoder
        self._in_work: deque[tuple[_Half, _Half, Future[bytes] | None]] = deque()
        self._ahead = Ahead(
            _members(raw, where, self._pool, on_damage, self._skipped, excluded),
            name=f"read {name}",
            budget=ahead,
            weigh=lambda m: m.buffer.room if m.buffer else 0,
            discard=self._discard,
        )

    def _discard(self, member: _Member) -> None:
        if member.buffer is not None:
            self._pool.give(member.buffer)

    def __enter__(self) -> "SourceReader":
        return self

    def interrupt(self) -> None:
        """Whoever waits for its bytes gets an error; called from another thread."""
        self._raw.interrupt()

    def __exit__(self, *_: object) -> None:
        self.interrupt()
        self._ahead.close()

    def __iter__(self) -> Iterator[Sample]:
        account = self.account
        waiting: dict[str, _Half] = {}
        seen: set[tuple[str, str]] = set()
        for member in self._ahead:
            account.members += 1
            if member.kind == "ignored":
                kind = member.key
                if kind not in account.ignored and len(account.ignored) >= _KINDS:
                    kind = "other"
                account.ignored[kind] += 1
                continue
            if member.kind == "excluded":
                account.excluded += 1
                continue
            if member.kind == "rejected":
                self._quarantine(member, member.entry.name, member.key)
                continue
            key = member.key
            if (key, member.kind) in seen:
                self._quarantine(member, key, f"a second {key}.{member.kind} in the same source")
                continue
            seen.add((key, member.kind))
            half = self._half(member)
            other = waiting.pop(key, None)
            if other is None:
                half.hold(self._table)
                waiting[key] = half
                continue
            jpg, json = (half, other) if member.kind == "jpg" else (other, half)
            reason = jpg.reason or json.reason or _disagreement(jpg, json)
            if reason is not None:
                self._give_up(jpg, key, reason)
                self._give_up(json, key, reason)
                continue
            half.hold(self._table)
            if self._recoder is None:
                yield self._whole(jpg, json)
            else:
                yield from self._recoded(self._recoder, jpg, json)
        while self._in_work:
            yield from self._oldest()
        for key, half in waiting.items():
            missing = "json" if half.kind == "jpg" else "jpg"
            self._give_up(half, key, half.reason or f"no {key}.{missing} in the same source")
        account.skipped += [(s.offset, s.size, s.reason) for s in self._skipped]

    def _whole(self, jpg: "_Half", json: "_Half") -> Sample:
        self.account.samples += 1
        distance = abs(jpg.entry.ordinal - json.entry.ordinal)
        self.account.greatest_distance = max(self.account.greatest_distance, distance)
        return _sample(self._number, jpg.key, jpg, json)

    def _recoded(self, recoder: Recoder, jpg: "_Half", json: "_Half") -> Iterator[Sample]:
        """Hand a photograph to the threads; the sample that has now waited long enough, if there is one.

        A fixed number of them wait, however many threads there are: so what is rejected comes to quarantine in the same
        order on every machine.
        """
        packed, held = json.packed, jpg.held
        assert packed is not None
        assert held is not None
        size = recoder.how.size(packed.height, packed.width)
        task = None
        if size is not None:
            task = recoder.threads.submit(_smaller, held, jpg.entry.size, size, recoder.how.quality, f"{jpg.key}.jpg")
        self._in_work.append((jpg, json, task))
        if len(self._in_work) > _IN_WORK:
            yield from self._oldest()

    def _oldest(self) -> Iterator[Sample]:
        jpg, json, task = self._in_work.popleft()
        if task is not None:
            try:
                made = task.result()
            except SampleRejected as error:
                self._give_up(jpg, jpg.key, str(error))
                self._give_up(json, jpg.key, str(error))
                return
            jpg.release(self._pool)
            buffer = _room(self._pool, len(made))
            buffer.view[tar.BLOCK : tar.BLOCK + len(made)] = made
            jpg.held, jpg.size = self._table.hold(buffer), len(made)
        yield self._whole(jpg, json)

    def _half(self, member: _Member) -> "_Half":
        buffer = member.buffer
        assert buffer is not None
        half = _Half(member.entry, member.kind, member.key, buffer, size=member.entry.size)
        try:
            content = buffer.view[tar.BLOCK : tar.BLOCK + member.entry.size]
            if member.kind == "jpg":
                half.jpeg = images.header(content, f"{member.key}.jpg")
            else:
                self._pack(half, content)
                self._pool.give(buffer)
        except SampleRejected as error:
            half.reason = str(error)
        return half

    def _pack(self, half: "_Half", document: memoryview) -> None:
        packed: Buffer | None = None

        def allocate(length: int) -> memoryview:
            nonlocal packed
            packed = _room(self._pool, length)
            return packed.view[tar.BLOCK : tar.BLOCK + length]

        facts = self._packer.pack(document, half.key, allocate)
        assert packed is not None
        half.packed_size = len(facts.member)
        half.packed = replace(facts, member=_NOTHING)  # or it would stay in memory when it is spilled
        half.buffer = packed

    def _quarantine(self, member: _Member, key: str, reason: str) -> None:
        self.account.quarantined += 1
        entry, buffer = member.entry, member.buffer
        data = None if buffer is None else bytes(buffer.view[tar.BLOCK : tar.BLOCK + entry.size])
        self._report(entry, key, reason, data)
        if buffer is not None:
            self._pool.give(buffer)

    def _give_up(self, half: "_Half", key: str, reason: str) -> None:
        """Quarantine a half by the bytes that the source had."""
        self.account.quarantined += 1
        self._report(half.entry, key, reason, half.source_bytes())
        half.release(self._pool)

    def _report(self, entry: tar.Entry, key: str, reason: str, data: bytes | None) -> None:
        name, key = _text(entry.name), _text(key)
        self._reject(
            Rejected(source=self.account.name, name=name, offset=entry.offset, key=key, reason=reason, data=data)
        )


@dataclass(slots=True, eq=False)
class _Half:
    """One of the two members of a sample, waiting for the other."""

    entry: tar.Entry
    kind: str
    key: str
    buffer: Buffer | None
    """A jpg, packed annotations, or the json itself where it was rejected."""
    size: int = 0
    """Bytes of a jpg as it will be stored."""
    held: Held | None = None
    packed: Packed | None = None
    packed_size: int = 0
    jpeg: images.Header | None = None
    reason: str | None = None

    def hold(self, table: Table) -> None:
        if self.buffer is not None:
            self.held = table.hold(self.buffer)
            self.buffer = None

    def source_bytes(self) -> bytes:
        view = self.buffer.view if self.buffer is not None else self.held.load() if self.held else memoryview(b"")
        if self.packed is None:
            return bytes(view[tar.BLOCK : tar.BLOCK + self.entry.size])
        return restore(unpack(view[tar.BLOCK : tar.BLOCK + self.packed_size], f"{self.key}.json"))

    def release(self, pool: Pool) -> None:
        if self.held is not None:
            self.held.release()
        elif self.buffer is not None:
            pool.give(self.buffer)
        self.held = self.buffer = None


def _smaller(held: Held, length: int, size: tuple[int, int], quality: int, where: str) -> bytes:
    """A photograph made smaller; runs in a thread of the recoder's."""
    return recoding.recode(held.load()[tar.BLOCK : tar.BLOCK + length], size, quality, where)


def _disagreement(jpg: _Half, json: _Half) -> str | None:
    header, packed = jpg.jpeg, json.packed
    assert header is not None
    assert packed is not None
    if (header.height, header.width) == (packed.height, packed.width):
        return None
    wanted, found = f"{packed.height} x {packed.width}", f"{header.height} x {header.width}"
    return str(SampleRejected(f"{jpg.key}.jpg", "its header disagrees with the json (height x width)", wanted, found))


def _sample(number: int, key: str, jpg: _Half, json: _Half) -> Sample:
    packed = json.packed
    assert packed is not None
    assert jpg.held is not None
    assert json.held is not None
    return Sample(
        key=key,
        image_id=packed.image_id,
        source=number,
        jpg_ordinal=jpg.entry.ordinal,
        json_ordinal=json.entry.ordinal,
        jpg=jpg.held,
        jpg_size=jpg.size,
        packed=json.held,
        packed_size=json.packed_size,
        annotations=packed.annotations,
        area_mismatches=packed.area_mismatches,
        stored_source=packed.stored_source,
    )


def turns(streams: list[Iterator[Sample]]) -> Iterator[Sample]:
    """One sample of each stream in turn, until all have ended."""
    rest = list(streams)
    end = object()
    while rest:
        for stream in list(rest):
            sample = next(stream, end)
            if sample is end:
                rest.remove(stream)
            else:
                assert isinstance(sample, Sample)
                yield sample


def rounds(samples: Iterator[Sample], count: int) -> Iterator[list[Sample]]:
    """The samples in rounds of `count`; the last may be shorter."""
    while batch := list(itertools.islice(samples, count)):
        yield batch
