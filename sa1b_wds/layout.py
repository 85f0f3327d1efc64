"""How samples stand in a shard: headers byte for byte, spans, the end, and the index of them.

A sample is two adjacent members, `<key>.jpg` and `<key>.safetensors`, each a 512-byte ustar header, its data, and zeros
up to a whole block; its span is all of these bytes. The archive ends with two zero blocks and nothing behind them.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from . import tar
from .errors import FormatError, ShardDamaged
from .format import MEMBER_LIMIT
from .ranged import Ranged

I64 = npt.NDArray[np.int64]
U32 = npt.NDArray[np.uint32]

JPG, PACKED = ".jpg", ".safetensors"
_SPAN_LIMIT = 2 * (MEMBER_LIMIT + 2 * tar.BLOCK)


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardIndex:
    """Where the samples of a shard stand."""

    offsets: I64
    """[n + 1] byte of each sample's first header, then the end of the last."""
    image_id: I64 | None
    """[n], where the rows are known."""
    crc32: U32 | None
    """[n] of each span, where the rows are known."""
    images: bool = True
    """Whether a sample has a jpg, or its packed member alone."""

    def __len__(self) -> int:
        return len(self.offsets) - 1


def split_span(span: memoryview, where: str, images: bool = True) -> tuple[str, memoryview, memoryview]:
    """(key, jpg, packed member) of a sample's span, its two headers compared byte for byte.

    Args:
        span: the sample's bytes.
        where: for messages.
        images: False where samples have no jpg: then that is empty.

    Raises:
        ShardDamaged: headers that this format does not write, or members that do not fill the span.
    """
    if not images:
        key, member, at = _member(span, 0, PACKED, where)
        if at != len(span):
            raise ShardDamaged(where, f"{key}: its member does not fill its span", len(span), at)
        return key, span[:0], member
    key, jpg, at = _member(span, 0, JPG, where)
    other, member, at = _member(span, at, PACKED, where)
    if other != key:
        raise ShardDamaged(where, "two members that are no pair", key + PACKED, other + PACKED)
    if at != len(span):
        raise ShardDamaged(where, f"{key}: two members do not fill their span", len(span), at)
    return key, jpg, member


def _member(span: memoryview, at: int, suffix: str, where: str) -> tuple[str, memoryview, int]:
    key, size = parse_header(bytes(span[at : at + tar.BLOCK]), suffix, where)
    begin = at + tar.BLOCK
    end = begin + size + tar.padding(size)
    if end > len(span):
        raise ShardDamaged(where, f"{key}{suffix} is longer than its sample's span", len(span) - begin, size)
    return key, span[begin : begin + size], end


def parse_header(block: bytes, suffix: str, where: str) -> tuple[str, int]:
    """(key, size) of a member's header, which must be the one that this format writes, byte for byte."""
    try:
        name = block[: block.index(0)] if 0 in block[:100] else block[:100]
        text, size = name.decode("ascii"), int(block[124:135], 8)
        if block != tar.header(text, size) or size > MEMBER_LIMIT:
            raise ValueError
    except (ValueError, FormatError):
        shown = repr(block[:40].split(b"\0", 1)[0])[1:] if any(block) else "zeros"
        raise ShardDamaged(where, f"not the header of a {suffix} member", "a header of this format", shown) from None
    if not text.endswith(suffix) or "." in text[: -len(suffix)]:
        raise ShardDamaged(where, "a member out of place", f"<key>{suffix}", text)
    return text.removesuffix(suffix), size


def check_offsets(offsets: I64, where: str) -> None:
    """Refuse an index that no shard can have.

    Raises:
        FormatError: offsets that do not begin with 0, rise in whole blocks, and stay within the limits.
    """
    if len(offsets) < 2 or offsets[0] != 0 or np.any(offsets % tar.BLOCK):
        raise FormatError(where, "not an index of a shard", "rising multiples of 512 from 0", offsets[:3].tolist())
    spans = np.diff(offsets)
    if np.any(spans < 2 * tar.BLOCK) or np.any(spans > _SPAN_LIMIT):
        at = int(np.flatnonzero((spans < 2 * tar.BLOCK) | (spans > _SPAN_LIMIT))[0])
        raise FormatError(
            where, f"sample {at} has an impossible span", "two members within their limits", int(spans[at])
        )


def scan(file: Ranged, where: str) -> ShardIndex:
    """The index of a shard from its headers alone, to the last byte.

    Raises:
        ShardDamaged: a header that is none, a member without its other half, a shard without its end or with something
            behind it.
    """
    offsets, ids, at = [0], [], 0
    head = memoryview(bytearray(tar.BLOCK))
    while True:
        first = _block(file, at, head, where)
        if first == bytes(tar.BLOCK):
            break
        place = f"{where}: byte {at:,}"
        key, size = parse_header(first, JPG, place)
        middle = at + tar.BLOCK + size + tar.padding(size)
        place = f"{where}: byte {middle:,}"
        second = _block(file, middle, head, where)
        if second == bytes(tar.BLOCK):
            raise ShardDamaged(place, f"{key}{JPG} without its other half", key + PACKED, "the end of the archive")
        other, size = parse_header(second, PACKED, place)
        if other != key:
            raise ShardDamaged(place, "two members that are no pair", key + PACKED, other + PACKED)
        at = middle + tar.BLOCK + size + tar.padding(size)
        offsets.append(at)
        ids.append(image_id_of(key, place))
    check_end(file, at, where, seen=tar.BLOCK)
    if len(offsets) == 1:
        raise ShardDamaged(f"{where}: byte 0", "a shard without a sample", "at least one", 0)
    return ShardIndex(offsets=np.array(offsets, np.int64), image_id=np.array(ids, np.int64), crc32=None)


def check_end(file: Ranged, at: int, where: str, seen: int = 0) -> None:
    """The archive must end at byte `at` with two zero blocks, `seen` bytes of them read, and nothing behind."""
    end = memoryview(bytearray(len(tar.END) - seen))
    got = file.read(at + seen, [end])
    if got < len(end):
        raise ShardDamaged(f"{where}: byte {at + seen + got:,}", "the shard stops in its end", len(tar.END), seen + got)
    if any(end):
        raise ShardDamaged(f"{where}: byte {at:,}", "no end of the archive", "two zero blocks", "other bytes")
    behind = file.behind(at + len(tar.END))
    if behind:
        raise ShardDamaged(f"{where}: byte {at + len(tar.END):,}", "bytes behind the end of the archive", 0, behind)


def _block(file: Ranged, at: int, head: memoryview, where: str) -> bytes:
    got = file.read(at, [head])
    if got < len(head):
        # What stands before this header was passed over, not read: the shard may have ended there.
        end = at + got if got else at + min(0, file.behind(at))
        place = f"{where}: byte {end:,}"
        raise ShardDamaged(
            place, "the shard stops without its end", f"a header or the end at byte {at:,}", f"{got} bytes"
        )
    return bytes(head)


def image_id_of(key: str, where: str) -> int:
    """The id in a key `sa_<id>`."""
    number = key.removeprefix("sa_")
    if number == key or not number.isdecimal():
        raise ShardDamaged(where, "a key that is none of SA-1B", "sa_<id>", key)
    return int(number)
