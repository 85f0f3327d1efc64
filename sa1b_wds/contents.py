"""The files of a data set against their facts: hashed and, to look deep, the shards parsed in the same pass."""

import hashlib
import mmap
import threading
from collections.abc import Sequence

import numpy as np
from zlib_ng import zlib_ng

from . import images, tar
from .annotations import Packer
from .differences import Found, Tell, first_difference
from .errors import DataError, SampleRejected, ShardDamaged, StorageError
from .format import ROW
from .layout import JPG, PACKED, image_id_of, parse_header
from .manifest import FileFact, ShardFact
from .plan import Recoding
from .restore import original_json
from .storage import Destination, open_raw

MIB = 1 << 20
_ZERO = bytes(tar.BLOCK)


class _Local(threading.local):
    def __init__(self) -> None:
        self.view = memoryview(bytearray(MIB))
        self._packers: dict[Recoding | None, Packer] = {}

    def packer(self, recoding: Recoding | None) -> Packer:
        if recoding not in self._packers:
            self._packers[recoding] = Packer(recoding)
        return self._packers[recoding]


_local = _Local()


class _Hashed:
    """A file of the data set, read once from its beginning; hashed on the way."""

    def __init__(self, destination: Destination, name: str, tell: Tell) -> None:
        self._raw = open_raw(destination.place(name))
        self._hash = hashlib.sha256()
        self._tell = tell
        self.position = 0

    def fill(self, view: memoryview) -> int:
        """Fill the view; how many bytes there were, short only at the end."""
        done = 0
        while done < len(view):
            got = self._raw.readinto(view[done:])
            if not got:
                break
            done += got
        self._hash.update(view[:done])
        self.position += done
        self._tell(done)
        return done

    def finish(self) -> tuple[int, str]:
        """(bytes, SHA-256) of the file, after reading what is left of it."""
        while self.fill(_local.view):
            pass
        return self.position, self._hash.hexdigest()

    def close(self) -> None:
        self._raw.close()


def _compare(found: Found, destination: Destination, fact: FileFact | ShardFact, size: int, sha256: str) -> None:
    if size != fact.bytes:
        found.add(destination.place(fact.name), "length", fact.bytes, size)
    elif sha256 != fact.sha256:
        found.add(destination.place(fact.name), "SHA-256", fact.sha256, sha256)


def check_files(tell: Tell, destination: Destination, facts: Sequence[FileFact | ShardFact]) -> Found:
    """Lengths and digests."""
    found = Found()
    for fact in facts:
        try:
            file = _Hashed(destination, fact.name, tell)
            try:
                _compare(found, destination, fact, *file.finish())
            finally:
                file.close()
        except StorageError as error:
            found.error(error)
    return found


def check_shard(
    tell: Tell,
    destination: Destination,
    fact: ShardFact,
    deep: bool,
    recoding: Recoding | None = None,
    images: bool = True,
) -> Found:
    """A shard and its side files.

    Args:
        recoding: how the manifest says that photographs were made smaller.
        images: whether it says that samples have a jpg.
    """
    found = check_files(tell, destination, fact.files)
    if not deep:
        found.merge(check_files(tell, destination, [fact]))
        return found
    try:
        file = _Hashed(destination, fact.name, tell)
    except StorageError as error:
        found.error(error)
        return found
    shard = _Shard(destination.place(fact.name), found, recoding, images)
    try:
        whole = True
        try:
            shard.read(file)
        except ShardDamaged as error:
            found.error(error)
            whole = False
        _compare(found, destination, fact, *file.finish())
        if whole:
            _hold_against(destination, fact, shard, found)
    except StorageError as error:
        found.error(error)
    finally:
        file.close()
    return found


class _Shard:
    """What a shard holds, parsed to its last byte."""

    def __init__(self, where: str, found: Found, recoding: Recoding | None, images: bool) -> None:
        self._images = images
        self._where, self._found, self._recoding = where, found, recoding
        self._packer = _local.packer(recoding)
        self.offsets = [0]
        self.keys: list[str] = []
        self.crc32: list[int] = []
        self.lines: list[str] = []
        self.annotations = self.area_mismatches = self.stored_sources = 0
        self._head = memoryview(bytearray(tar.BLOCK))

    def read(self, file: _Hashed) -> None:
        """Every member.

        Raises:
            ShardDamaged: bytes that cannot be followed any further.
        """
        jpg, packed = Room(), Room()
        while True:
            begin = file.position
            first = self._block(file)
            if first == _ZERO:
                break
            if not self._images:
                self._alone(file, first, packed)
                continue
            key, size, crc = self._member(file, first, JPG, jpg, 0)
            middle = file.position
            other, length, crc = self._member(file, self._block(file), PACKED, packed, crc)
            where = f"{self._where}: byte {begin:,}: {key}"
            if other != key:
                raise ShardDamaged(where, "two members that are no pair", key + PACKED, other + PACKED)
            line = f"{size} {key}.jpg safetensors {middle + tar.BLOCK} {length} {key}.safetensors"
            self.lines.append(f"jpg {begin + tar.BLOCK} {line}\n")
            self.offsets.append(file.position)
            self.keys.append(key)
            self.crc32.append(crc)
            self._sample(key, jpg.view[:size], packed.view[:length], where)
        if self._block(file) != _ZERO:
            place = f"{self._where}: byte {file.position - tar.BLOCK:,}"
            raise ShardDamaged(
                place, "one zero block alone, where an archive ends with two", "512 zeros", "other bytes"
            )
        if behind := file.fill(self._head):
            where = f"{self._where}: byte {file.position - behind:,}"
            raise ShardDamaged(where, "bytes behind the end of the archive", 0, f"{behind} or more")
        if not self.keys:
            raise ShardDamaged(f"{self._where}: byte 0", "a shard without a sample")

    def _alone(self, file: _Hashed, first: bytes, packed: "Room") -> None:
        """A sample that is a packed member alone."""
        begin = file.position - tar.BLOCK
        key, length, crc = self._member(file, first, PACKED, packed, 0)
        self.lines.append(f"safetensors {begin + tar.BLOCK} {length} {key}.safetensors\n")
        self.offsets.append(file.position)
        self.keys.append(key)
        self.crc32.append(crc)
        self._sample(key, None, packed.view[:length], f"{self._where}: byte {begin:,}: {key}")

    def _block(self, file: _Hashed) -> bytes:
        got = file.fill(self._head)
        if got < tar.BLOCK:
            place = f"{self._where}: byte {file.position:,}"
            raise ShardDamaged(place, "the shard stops without its end", "a header or the end", f"{got} bytes")
        return bytes(self._head)

    def _member(self, file: _Hashed, head: bytes, suffix: str, room: "Room", crc: int) -> tuple[str, int, int]:
        """(key, size, CRC-32 so far) of the member that begins with `head`; its data is in `room`."""
        where = f"{self._where}: byte {file.position - tar.BLOCK:,}"
        key, size = parse_header(head, suffix, where)
        view = room.take(size + tar.padding(size))
        got = file.fill(view)
        if got < len(view):
            raise ShardDamaged(f"{where}: {key}{suffix}", "the shard stops inside it", len(view), got)
        if any(view[size:]):
            self._found.add(f"{where}: {key}{suffix}", "padding that is not zero")
        return key, size, zlib_ng.crc32(view, zlib_ng.crc32(head, crc))

    def _sample(self, key: str, jpg: memoryview | None, member: memoryview, where: str) -> None:
        """One sample's content."""
        try:
            image_id_of(key, where)
            columns, document = original_json(member, key, where)
            self.annotations += len(columns)
            self.stored_sources += columns.source_json is not None
            wanted = self._recoding.size(columns.height, columns.width) if self._recoding is not None else None
            self._found.same(where, "stored size (height, width)", wanted, columns.stored_size)
            again = self._packer.pack(document, key)
            self.area_mismatches += again.area_mismatches
            at = first_difference(member, again.member)
            if at is not None and wanted == columns.stored_size:
                sizes = f"{len(member):,} and {len(again.member):,} bytes"
                self._found.add(where, f"packing its document again gives other bytes, from {at:,} on", found=sizes)
            if jpg is None:
                return
            header = images.header(jpg, f"{where}.jpg")
            if columns.jpg_size != (header.height, header.width):
                expected, there = "{} x {}".format(*columns.jpg_size), f"{header.height} x {header.width}"
                self._found.add(f"{where}.jpg", "its header disagrees with the annotations", expected, there)
        except SampleRejected as error:
            inside = error.where.removeprefix(where).removeprefix(": ")
            self._found.add(f"{where}: {inside}", error.what, error.expected, error.found)
        except DataError as error:
            self._found.error(error)


class Room:
    """Memory for one member after the other; a fresh mapping for each would cost more in page faults than its hash."""

    def __init__(self) -> None:
        self._memory = memoryview(mmap.mmap(-1, MIB))
        self.view = self._memory[:0]

    def take(self, size: int) -> memoryview:
        """A view of so many bytes; the one before is no longer good."""
        if size > len(self._memory):
            self._memory = memoryview(mmap.mmap(-1, -(-size * 5 // 4 // MIB) * MIB))
        self.view = self._memory[:size]
        return self.view


def _hold_against(destination: Destination, fact: ShardFact, shard: _Shard, found: Found) -> None:
    """The shard's side files and facts against what it holds."""
    n = len(shard.keys)
    where = destination.place(fact.name)
    found.same(where, "samples", n, fact.samples)
    found.same(where, "annotations", shard.annotations, fact.annotations)
    found.same(where, "area_mismatches", shard.area_mismatches, fact.area_mismatches)
    found.same(where, "stored_sources", shard.stored_sources, fact.stored_sources)
    try:
        stem = fact.name.removesuffix(".tar")
        idx = destination.read(f"{fact.name}.idx")
        if idx != np.array(shard.offsets, "<i8").tobytes():
            found.add(destination.place(f"{fact.name}.idx"), "not where the samples of the shard begin")
        lines = f"v1.2 {n}\n{''.join(shard.lines)}".encode()
        if destination.read(f"index/{stem}.idx") != lines:
            found.add(destination.place(f"index/{stem}.idx"), "not where the members of the shard begin")
        data, where = destination.read(f"index/{stem}.rows"), destination.place(f"index/{stem}.rows")
        if len(data) != n * ROW.itemsize:
            found.add(where, "length", n * ROW.itemsize, len(data))
            return
        rows = np.frombuffer(data, ROW)
        for i, (image_id, crc32) in enumerate(zip(rows["image_id"].tolist(), rows["crc32"].tolist(), strict=True)):
            found.same(f"{where}: row {i}", "image_id", shard.keys[i], f"sa_{image_id}")
            found.same(f"{where}: row {i}: {shard.keys[i]}", "CRC-32", f"{shard.crc32[i]:08x}", f"{crc32:08x}")
    except StorageError:
        return  # it is in the list already
