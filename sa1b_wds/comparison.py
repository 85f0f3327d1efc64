"""A source tar against the data set made of it: every member looked up by its key and compared byte for byte."""

from collections.abc import Iterator, Sequence

import numpy as np

from . import images, recoding, tar
from .accounts import Held, quarantine
from .ahead import Ahead
from .buffers import Buffer, Pool
from .contents import Room
from .differences import Found, Tell, first_difference
from .errors import DataError, ShardDamaged, SourceDamaged, StorageError
from .exclusion import is_excluded
from .format import MEMBER_LIMIT
from .inflate import open_bytes
from .layout import JPG, PACKED, parse_header
from .manifest import FileFact, ShardFact, SourceFact, load_receipt, quarantine_stem, receipt_name
from .plan import Recoding
from .ranged import open_ranged
from .restore import Places, original_json
from .source import OnDamage
from .storage import Destination, Raw, open_raw

_SUFFIXES = ("jpg", "json")


def compare(
    tell: Tell,
    destination: Destination,
    url: str,
    number: int,
    fact: SourceFact,
    task: int,
    shards: list[ShardFact],
    files: list[FileFact],
    how: Recoding | None = None,
    excluded: Sequence[int] = (),
) -> Found:
    """One source, member by member, against its samples; `how` their photographs were made smaller.

    Members of `excluded` images must be in none of them.
    """
    found = Found()
    try:
        on_damage = load_receipt(destination.read(receipt_name(task)), destination.place(receipt_name(task))).on_damage
        places = Places(destination, shards, number)
        held = {h.line.byte: h for h in quarantine(destination, task, files) if h.line.source == fact.name}
    except (DataError, StorageError) as error:
        found.error(error)
        return found
    comparison = _Comparison(
        url, places, held, destination.place(f"{quarantine_stem(task)}.members"), found, how, excluded
    )
    raw = _Told(open_raw(url), tell)
    try:
        comparison.read(raw, "salvage" if on_damage == "salvage" else "fail", fact)
    except (SourceDamaged, StorageError) as error:
        found.error(error)
    finally:
        raw.close()
        places.close()
    return found


class _Told:
    """A source whose bytes are counted as they are read."""

    def __init__(self, raw: Raw, tell: Tell) -> None:
        self._raw, self._tell = raw, tell
        self.close, self.interrupt = raw.close, raw.interrupt

    def readinto(self, buffer: memoryview, /) -> int:
        got = self._raw.readinto(buffer)
        self._tell(got)
        return got


class _Comparison:
    """Looks up the members of one source."""

    def __init__(
        self,
        url: str,
        places: Places,
        held: dict[int, Held],
        members: str,
        found: Found,
        how: Recoding | None,
        excluded: Sequence[int],
    ) -> None:
        self._url, self._places, self._held, self._members, self._found = url, places, held, members, found
        self._how, self._excluded = how, frozenset(excluded)
        self._place = {f"sa_{i}": n for n, i in enumerate(places.rows["image_id"].tolist())}
        self._hits = np.zeros((len(places), 2), bool)
        self._head = memoryview(bytearray(tar.BLOCK))
        self._pool, self._room = Pool(idle=32 << 20), Room()
        self._pending: Buffer | None = None
        self._moved = 0

    def read(self, raw: Raw, on_damage: OnDamage, fact: SourceFact) -> None:
        """Every member, then the accounts.

        Raises:
            SourceDamaged, StorageError: the source cannot be read to its end.
        """
        stream = open_bytes(raw, self._url, on_damage=on_damage)
        reader = tar.Reader(stream, allocate=self._allocate, on_damage=on_damage)
        members, quarantined, ignored, excluded = 0, 0, 0, 0
        # Reading and inflating take as long as everything else.
        ahead = Ahead(
            self._entries(reader),
            name="read",
            weigh=lambda m: m[1].room if m[1] else 0,
            discard=lambda m: self._give(m[1]),
        )
        try:
            for entry, buffer in ahead:
                members += 1
                data = buffer.view if buffer is not None else None
                if entry.kind != "directory" and is_excluded(entry.name, self._excluded):
                    excluded += 1
                    if entry.offset in self._held:
                        self._found.add(self._where(entry), "of an image that is excluded, and yet in quarantine")
                elif entry.offset in self._held:
                    quarantined += 1
                    self._quarantined(entry, data, self._held[entry.offset])
                elif (kind := _kind(entry)) is None:
                    ignored += 1
                else:
                    self._member(entry, data, *kind)
                self._give(buffer)
        finally:
            ahead.close()
            self._pool.close()
        where, missing = self._url, np.argwhere(~self._hits)
        for i, half in missing.tolist():
            self._found.add(self._places.where(i), f"{where} has no {_SUFFIXES[half]} of it")
        if self._moved:
            what = "members that stand elsewhere in this tar than index/*.rows says: another tar of the same members?"
            self._found.add(where, what, 0, self._moved)
        skipped = sum(s.size for s in reader.skipped)
        for what, said, there in (
            ("members", fact.members, members),
            ("quarantined", fact.quarantined, quarantined),
            ("excluded", fact.excluded, excluded),
            ("ignored", sum(fact.ignored.values()), ignored),
            ("skipped bytes", sum(s.bytes for s in fact.skipped), skipped),
        ):
            if said != there:
                self._found.add(where, f"{what}: the manifest against the source", said, there)

    def _allocate(self, entry: tar.Entry) -> memoryview | None:
        held = self._held.get(entry.offset)
        wanted = held.line.stored if held is not None else _kind(entry) is not None
        self._give(self._pending)  # salvage gave that member up
        self._pending = self._pool.take(entry.size) if wanted and entry.size <= MEMBER_LIMIT else None
        return self._pending.view if self._pending is not None else None

    def _entries(self, reader: tar.Reader) -> Iterator[tuple[tar.Entry, Buffer | None]]:
        """Members with their bytes, if they have any that matter; runs in the reading thread."""
        for entry, data in reader:
            buffer = None
            if data is not None:
                buffer, self._pending = self._pending, None
            yield entry, buffer

    def _give(self, buffer: Buffer | None) -> None:
        if buffer is not None:
            self._pool.give(buffer)

    def _where(self, entry: tar.Entry) -> str:
        name = entry.name if entry.name.isprintable() else ascii(entry.name)[1:-1]
        return f"{self._url}: byte {entry.offset:,}: {name[:200]}"

    def _quarantined(self, entry: tar.Entry, data: memoryview | None, held: Held) -> None:
        where = self._where(entry)
        # Bytes that are not UTF-8 stand in a name as surrogates, which JSON cannot hold.
        if held.line.name != entry.name.encode("utf-8", "backslashreplace").decode():
            self._found.add(where, "its name in quarantine", "the same", ascii(held.line.name[:200]))
        if not held.line.stored:
            return
        if data is None or len(data) != held.size:
            self._found.add(where, "bytes in quarantine", entry.size, held.size)
            return
        copy = self._room.take(held.size)
        raw = open_ranged(self._members)
        try:
            raw.read(held.begin, [copy])
        finally:
            raw.close()
        at = first_difference(data, copy)
        if at is not None:
            self._found.add(where, f"differs from quarantine at its byte {at:,}")

    def _member(self, entry: tar.Entry, data: memoryview | None, key: str, suffix: str) -> None:
        where = self._where(entry)
        i = self._place.get(key)
        if i is None:
            self._found.add(where, "neither a sample of the data set nor in quarantine")
            return
        kind = _SUFFIXES.index(suffix)
        if self._hits[i, kind]:
            self._found.add(where, f"a second {key}.{suffix} that is not in quarantine")
            return
        self._hits[i, kind] = True
        self._moved += int(self._places.rows[i][f"{suffix}_ordinal"]) != entry.ordinal
        place = self._places.where(i)
        try:
            copy = self._jpg(i, place) if kind == 0 else self._json(i, key, place)
            wanted = self._stored(data if data is not None else memoryview(b""), suffix, key)
        except (DataError, StorageError) as error:
            self._found.error(error)
            return
        at = first_difference(wanted, copy)
        if at is not None:
            what = f"not {where}" if self._how is None or kind else f"not {where}, as the plan stores it"
            self._found.add(place, f"{what}: differs at byte {at:,}", len(wanted), len(copy))

    def _stored(self, data: memoryview, suffix: str, key: str) -> memoryview | bytes:
        """What the data set must have of a member of the source."""
        if self._how is None or suffix != "jpg":
            return data
        where = f"{self._url}: {key}.jpg"
        head = images.header(data, where)
        size = self._how.size(head.height, head.width)
        return data if size is None else recoding.recode(data, size, self._how.quality, where)

    def _jpg(self, i: int, place: str) -> memoryview:
        """The jpg of sample i as its shard has it."""
        self._places.read(i, 0, self._head)
        _, size = parse_header(bytes(self._head), JPG, place)
        copy = self._room.take(size)
        self._places.read(i, tar.BLOCK, copy)
        return copy

    def _json(self, i: int, key: str, place: str) -> bytes:
        """The json of sample i, rebuilt from what its shard has."""
        self._places.read(i, 0, self._head)
        _, size = parse_header(bytes(self._head), JPG, place)
        middle = tar.BLOCK + size + tar.padding(size)
        span = int(self._places.end[i] - self._places.begin[i])
        if middle + tar.BLOCK > span:
            raise ShardDamaged(place, "its jpg is longer than its span", span, middle)
        copy = self._room.take(span - middle)
        self._places.read(i, middle, copy)
        _, size = parse_header(bytes(copy[: tar.BLOCK]), PACKED, place)
        if tar.BLOCK + size > len(copy):
            raise ShardDamaged(place, "its annotations are longer than its span", len(copy), size)
        return original_json(copy[tar.BLOCK : tar.BLOCK + size], key, place)[1]


def _kind(entry: tar.Entry) -> tuple[str, str] | None:
    """(key, suffix) of a member that can be half of a sample, by its name."""
    stem, _, suffix = entry.name.rpartition("/")[2].partition(".")
    return (stem, suffix) if suffix in _SUFFIXES and entry.kind == "file" else None
