"""A source's bytes → the bytes of its tar, gzip or plain, sniffed from the first two bytes and never from the name.

ISA-L inflates the bare deflate data; gzip's frame (RFC 1952: header, its optional fields and their CRC-16, trailer) is
read here, so the start of every gzip member is known to the byte, and its CRC-32 and length are compared by this
module and by nobody else. A stream may have many members, and zeros may follow the last. Everything else is damage:
above all a stream that stops early, which is never taken for an end.

Output comes in 64 KiB pieces: bytes of that size live on the heap, so the kernel maps no fresh page for them, and they
are copied into the caller's buffer while they are in the cache. The GIL is free while ISA-L works.

A file that can be read from its beginning again takes a faster way: isal's own gzip reader inflates straight into the
caller's buffer, without pieces and copies, and gives up the GIL once where the other does five times (a whole
conversion on two cores: 10 to 15 % less processor time). It knows of damage, but not where the gzip member began; so
what it stumbles over is read again by the other, whose words the error has.

To salvage, the input is fed in small pieces (at half the speed), so an error costs little of what stands before it; the
stream then goes on at the next place that reads like a gzip member (header, then deflate data without an error as far
as one look goes). What was lost is listed in `gaps`, and nothing is promised about where in the tar the next byte
belongs.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from gzip import BadGzipFile
from typing import BinaryIO, Literal, Protocol, cast

from isal import igzip_lib, isal_zlib

from .errors import SourceDamaged

OnDamage = Literal["fail", "salvage"]

_OUT = 64 << 10  # bytes inflated at once: larger objects are mapped, and faulted in, anew every time
_IN = 256 << 10  # bytes read from storage at once
_IN_DIRECT = 1 << 20  # by isal's reader, which stops for each with the GIL (a fifth fewer thread switches than by _IN)
_FIRST_FEED = 16 << 10  # of a gzip member: what follows its end is copied once, which thousands of tiny ones would feel
_SALVAGE_FEED = 1 << 10  # an error loses what was fed last
_SALVAGE_BACK = 64 << 10  # a decoder out of step may run past the start of the next member before it notices
_LOOK = 64 << 10  # compressed bytes that must inflate before a magic number found while salvaging is believed
_HEADER_MAX = 128 << 10  # of a gzip header: an extra field of 64 KiB, a name and a comment
_KEEP = 16  # the decoder holds at most 8 bytes it does not need; they are given back

_IsalError = cast(type[Exception], igzip_lib.IsalError)  # its stub calls it an instance

_MAGIC = b"\x1f\x8b"
_FHCRC, _FEXTRA, _FNAME, _FCOMMENT, _RESERVED = 2, 4, 8, 16, 0xE0


class Raw(Protocol):
    """What storage hands over. With a method `rewind() -> bool`, which goes back to the first byte where that is
    possible, the faster way is open."""

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill some of `buffer`, at least one byte; 0 at the end."""


class ByteStream(Protocol):
    """The bytes of a tar, in order."""

    @property
    def where(self) -> str:
        """Path or URL, for messages."""

    @property
    def position(self) -> int:
        """Bytes of the tar delivered so far."""

    @property
    def broken(self) -> bool:
        """After a short read: bytes are missing here and more may follow (salvage), instead of the end."""

    def readinto(self, view: memoryview, /) -> int:
        """Fill `view` completely; short only at the end of all data, or before a gap (then `broken` is true)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gap:
    """A place where salvaging lost bytes of a gzip stream."""

    position: int
    """byte of the tar, counted in what was delivered, where the bytes are missing"""
    start: int
    """byte of the tar where the damaged gzip member began: from here to `position` no checksum vouches for the bytes"""
    compressed: int
    """byte of the source where the damage was noticed"""
    lost: int
    """bytes of the source passed over"""
    reason: str
    """what was wrong"""


def open_bytes(raw: Raw, where: str, *, on_damage: OnDamage = "fail") -> "Plain | Inflated | Direct":
    """The bytes of the tar in `raw`, inflated where it begins with gzip's magic number.

    Raises SourceDamaged if there is not a single byte.
    """
    source = _Input(raw, keep=_KEEP if on_damage == "fail" else _SALVAGE_BACK)
    first = bytes(source.peek(2))
    if not first:
        raise SourceDamaged(where, "the file is empty", "a tar", "0 bytes")
    if first != _MAGIC:
        return Plain(source, where)
    rewind: Callable[[], bool] | None = getattr(raw, "rewind", None)
    if on_damage == "fail" and rewind is not None and rewind():
        return Direct(raw, where, rewind)
    return Inflated(source, where, on_damage=on_damage)


class _Input:
    """Bytes of the source through one buffer, used again and again; the last `keep` bytes can be taken back."""

    def __init__(self, raw: Raw, *, keep: int) -> None:
        self._raw, self._keep = raw, keep
        self._buffer = memoryview(bytearray(keep + _IN))
        self._low = self._high = 0
        self._ended = False
        self.offset = 0  # in the source, of the next byte

    def peek(self, want: int) -> memoryview:
        """The next `want` bytes (at most 256 KiB), fewer only at the end; they stay where they are."""
        if self._high - self._low < want:
            self._more(want)
        return self._buffer[self._low : min(self._high, self._low + want)]

    def take(self, limit: int) -> memoryview:
        """1 to `limit` of the next bytes, none only at the end; valid until the next call."""
        if self._low == self._high:
            self._more(1)
        piece = self._buffer[self._low : min(self._high, self._low + limit)]
        self._low += len(piece)
        self.offset += len(piece)
        return piece

    def skip(self, size: int) -> None:
        """Pass over bytes that were peeked at."""
        self._low += size
        self.offset += size

    def back(self, size: int) -> int:
        """Take back up to `size` of the bytes taken last; how many it were."""
        size = min(size, self._low)
        self._low -= size
        self.offset -= size
        return size

    def readinto(self, view: memoryview) -> int:
        """Fill `view` completely, short only at the end; a large one without a stop in the buffer."""
        size, done = len(view), 0
        while done < size:
            have = self._high - self._low
            if have:
                n = min(have, size - done)
                view[done : done + n] = self._buffer[self._low : self._low + n]
                self._low += n
            elif self._ended:
                break
            elif size - done >= _IN // 4:
                n = self._raw.readinto(view[done:])
                self._ended = not n
            else:
                self._more(1)
                continue
            done += n
            self.offset += n
        return done

    def _more(self, want: int) -> None:
        if len(self._buffer) - self._low < want or self._low == self._high:
            first = max(0, self._low - self._keep)
            kept = self._high - first
            self._buffer[:kept] = self._buffer[first : self._high]
            self._low -= first
            self._high = kept
        while self._high - self._low < want and not self._ended:
            n = self._raw.readinto(self._buffer[self._high :])
            self._ended = not n
            self._high += n


class Plain:
    """A tar that is not compressed."""

    gaps: Sequence[Gap] = ()
    broken = False

    def __init__(self, source: _Input, where: str) -> None:
        self.where = where
        self._source = source

    @property
    def position(self) -> int:
        """Bytes delivered so far."""
        return self._source.offset

    def readinto(self, view: memoryview, /) -> int:
        """Fill `view` completely, short only at the end."""
        return self._source.readinto(view)


class _Broken(Exception):
    """Damage of the gzip stream, before it is known whether that is an error or a gap."""

    def __init__(self, what: str, expected: object = None, found: object = None) -> None:
        super().__init__(what, expected, found)
        self.what, self.expected, self.found = what, expected, found


class Inflated:
    """A tar inside a gzip stream of one or more members."""

    def __init__(self, source: _Input, where: str, *, on_damage: OnDamage) -> None:
        self.where = where
        self.position = 0
        self.broken = False
        self.gaps: list[Gap] = []
        self.members = 0
        """gzip members begun so far"""
        self._source = source
        self._salvage = on_damage == "salvage"
        self._inflater: igzip_lib.IgzipDecompressor | None = None
        self._feed = 0
        self._member = 0  # where the gzip member begins in the source
        self._start = 0  # and in the tar
        self._chunk = memoryview(b"")  # inflated, not yet delivered
        self._ended = False

    def readinto(self, view: memoryview, /) -> int:
        """Fill `view` completely; short only at the end, or (salvage) before a gap, with `broken` true.

        Raises SourceDamaged where the gzip stream breaks (unless salvaging).
        """
        size, done = len(view), 0
        self.broken = False
        while done < size:
            chunk = self._chunk
            if not len(chunk):
                if not self._next():
                    break
                continue
            n = min(len(chunk), size - done)
            if n == len(chunk):
                view[done : done + n] = chunk
                self._chunk = chunk[:0]
            else:
                view[done : done + n] = chunk[:n]
                self._chunk = chunk[n:]
            done += n
            self.position += n
        return done

    def _next(self) -> bool:
        """Inflate until there is something to deliver; False at the end and at a gap."""
        try:
            while not self._ended:
                if self._inflater is None:
                    self._open()
                elif self._inflater.eof:
                    self._close(self._inflater)
                else:
                    piece = self._inflate(self._inflater)
                    if piece:
                        self._chunk = memoryview(piece)
                        return True
        except _Broken as damage:
            if not self._salvage:
                place = (
                    f"{self.where}: byte {self.position:,} of the tar (gzip member at compressed byte {self._member:,})"
                )
                raise SourceDamaged(place, damage.what, damage.expected, damage.found) from damage.__cause__
            self._resume(damage)
        return False

    def _open(self) -> None:
        """Read the header of the next member, or find that there is none."""
        while self.members:
            zeros = self._source.peek(_LOOK)
            if not zeros:
                self._ended = True
                return
            padding = len(zeros) - len(bytes(zeros).lstrip(b"\0")) if not zeros[0] else 0
            self._source.skip(padding)
            if padding < len(zeros):
                break
        self._member, self._start = self._source.offset, self.position
        head = self._source.peek(10)
        if len(head) == 10 and head[3]:
            head = self._source.peek(_HEADER_MAX)
        size = _header_size(bytes(head))
        self._source.skip(size)
        self.members += 1
        self._begin()

    def _begin(self) -> None:
        self._inflater = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP_NO_HDR)
        self._feed = _SALVAGE_FEED if self._salvage else _FIRST_FEED

    def _inflate(self, inflater: igzip_lib.IgzipDecompressor) -> bytes:
        feed: memoryview | bytes = b""
        if inflater.needs_input:
            feed = self._source.take(self._feed)
            if not len(feed):
                raise _Broken("the gzip stream ends early", "more compressed data", "end of file")
            if not self._salvage and self._feed < _IN:
                self._feed *= 2
        try:
            return inflater.decompress(feed, _OUT)
        except _IsalError as error:
            self._source.back(len(feed))
            raise _Broken(f"the compressed data is damaged ({error})") from error

    def _close(self, inflater: igzip_lib.IgzipDecompressor) -> None:
        """Compare the trailer: CRC-32 and length modulo 2**32 of the member's bytes."""
        self._source.back(len(inflater.unused_data))
        trailer = bytes(self._source.peek(8))
        if len(trailer) < 8:
            raise _Broken("the gzip stream ends early", "8 bytes of checksum and length", f"{len(trailer)} bytes")
        expected, size = int.from_bytes(trailer[:4], "little"), int.from_bytes(trailer[4:], "little")
        if inflater.crc != expected:
            raise _Broken("the gzip member's checksum differs", f"CRC-32 {expected:08x}", f"{inflater.crc:08x}")
        length = self.position - self._start
        if length & 0xFFFFFFFF != size:
            raise _Broken("the gzip member's length differs", f"{size:,} bytes (modulo 2**32)", f"{length:,}")
        self._source.skip(8)
        self._inflater = None

    def _resume(self, damage: _Broken) -> None:
        """Go on at the next gzip member, or nowhere; write down the gap."""
        noticed = self._source.offset
        # Never the member that broke, unless not even its header could be read.
        self._source.back(min(_SALVAGE_BACK, max(0, noticed - self._member - 1)))
        if self._source.offset == self._member:
            self._source.skip(min(1, len(self._source.peek(1))))
        while True:
            window = bytes(self._source.peek(2 * _LOOK))
            at = window.find(_MAGIC + b"\x08")
            if at < 0 and len(window) < 2 * _LOOK:
                self._source.skip(len(window))
                self._ended = True
                break
            if at < 0:
                self._source.skip(len(window) - 2)  # a magic number may stand across two looks
            elif at and len(window) - at < _LOOK:
                self._source.skip(at)  # look again, with enough behind it
            elif _plausible(window[at : at + _LOOK]):
                self._source.skip(at)
                break
            else:
                self._source.skip(at + 1)
        lost = max(0, self._source.offset - noticed)
        self.gaps.append(
            Gap(position=self.position, start=self._start, compressed=noticed, lost=lost, reason=_reason(damage))
        )
        self._inflater = None
        self.broken = True


class _File:
    """What isal takes for a file: it looks for `read`, and calls `readinto`."""

    def __init__(self, raw: Raw) -> None:
        self.readinto = raw.readinto

    def read(self, size: int = -1, /) -> bytes:
        raise NotImplementedError


class Direct:
    """A tar inside a gzip stream that can be read again: inflated straight into the buffers of who asks."""

    gaps: Sequence[Gap] = ()
    broken = False

    def __init__(self, raw: Raw, where: str, rewind: Callable[[], bool]) -> None:
        self.where = where
        self.position = 0
        self._raw, self._rewind = raw, rewind
        self._reader = isal_zlib._GzipReader(cast(BinaryIO, _File(raw)), _IN_DIRECT)

    def readinto(self, view: memoryview, /) -> int:
        """Fill `view` completely; short only at the end.

        Raises SourceDamaged where the gzip stream breaks.
        """
        size, done = len(view), 0
        try:
            while done < size:
                got = self._reader.readinto(view[done:])
                if not got:
                    break
                done += got
        except (EOFError, BadGzipFile, OverflowError, _IsalError) as error:
            raise self._explained(error) from error
        self.position += done
        return done

    def _explained(self, error: Exception) -> SourceDamaged:
        """What is wrong with the stream, by reading it again."""
        position = self._reader.tell()
        if self._rewind():
            again, nowhere = Inflated(_Input(self._raw, keep=_KEEP), self.where, on_damage="fail"), bytearray(_OUT)
            try:
                while again.readinto(memoryview(nowhere)):
                    pass
            except SourceDamaged as damage:
                return damage
        place = f"{self.where}: byte {position:,} of the tar"
        return SourceDamaged(place, f"the gzip stream was damaged ({error}), and was sound when it was read again")


def _reason(damage: _Broken) -> str:
    return damage.what + (f": expected {damage.expected}, found {damage.found}" if damage.expected else "")


def _header_size(head: bytes) -> int:
    """Length of the gzip header that `head` begins with; _Broken if it is none, or is cut."""
    if head[:3] != (_MAGIC + b"\x08")[: len(head)] or not head:
        raise _Broken("neither a gzip member nor zeros to the end of the file", "1f8b08", head[:3].hex())
    cut = _Broken("the gzip stream ends early", "the rest of a gzip header", "end of file")
    if len(head) < 10:
        raise cut
    flags, size = head[3], 10
    if flags & _RESERVED:
        raise _Broken("a gzip header has flags that do not exist", "flags below 20", f"{flags:02x}")
    if len(head) == _HEADER_MAX:
        cut = _Broken("a gzip header is too long", f"at most {_HEADER_MAX:,} bytes", "more")
    if flags & _FEXTRA:
        if len(head) < size + 2:
            raise cut
        size += 2 + int.from_bytes(head[size : size + 2], "little")
    for flag in (_FNAME, _FCOMMENT):
        if flags & flag:
            end = head.find(b"\0", size)
            if end < 0:
                raise cut
            size = end + 1
    if flags & _FHCRC:
        expected = head[size : size + 2]
        if len(expected) == 2 and zlib.crc32(head[:size]) & 0xFFFF != int.from_bytes(expected, "little"):
            raise _Broken(
                "a gzip header's checksum differs", expected[::-1].hex(), f"{zlib.crc32(head[:size]) & 0xFFFF:04x}"
            )
        size += 2
    if len(head) < size:
        raise cut
    return size


def _plausible(window: bytes) -> bool:
    """Whether a gzip member begins here, as far as the window shows."""
    try:
        size = _header_size(window)
        igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP_NO_HDR).decompress(window[size:], 1 << 20)
    except (_Broken, _IsalError):
        return False
    return True
