"""JPEGs: their header."""

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from .errors import SampleRejected

if TYPE_CHECKING:
    from typing_extensions import Buffer

_FRAMES: Final = {0xC0: False, 0xC1: False, 0xC2: True}
"""Start-of-frame markers of 8-bit Huffman-coded JPEGs, and whether they are progressive."""
_OTHER_FRAMES: Final = frozenset({0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF})
"""Lossless, differential and arithmetic-coded ones: no browser and few libraries read them."""
_BARE: Final = frozenset({0x01, *range(0xD0, 0xDA)})
"""Markers without a length; none may stand before the frame."""
_SOS: Final = 0xDA

_segment = struct.Struct(">BBH").unpack_from
_frame = struct.Struct(">BHHB").unpack_from


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """What a JPEG's frame header (SOF) states: the pixels as stored, whatever an EXIF orientation says."""

    height: int
    """Pixels, 1..65,535."""
    width: int
    """Pixels, 1..65,535."""
    components: int
    """1 grayscale, 3 colour (YCbCr or RGB), 4 CMYK or YCCK."""
    precision: int
    """Bits a component: 8, or 12 in extended JPEGs, which `decode` refuses."""
    progressive: bool


def header(jpg: "Buffer", where: str = "jpg") -> Header:
    """Read the frame header of a JPEG (ITU-T T.81, B.1 and B.2); segments before it are skipped by their length.

    Raises:
        SampleRejected: not a JPEG, cut before its frame header, a coding that libjpeg's users do not write (lossless,
            differential, arithmetic), or a size, precision or number of components that cannot be. `where` begins the
            message.
    """
    view = memoryview(jpg)
    at = 2
    try:
        if view[0] != 0xFF or view[1] != 0xD8:
            raise SampleRejected(where, "not a JPEG", expected="ff d8", found=bytes(view[:2]).hex(" "))
        while True:
            mark, kind, length = _segment(view, at)
            if mark != 0xFF:
                raise SampleRejected(where, f"not a JPEG: no marker at byte {at}", expected="ff", found=f"{mark:02x}")
            if kind in _FRAMES:
                precision, height, width, components = _frame(view, at + 4)
                break
            if kind == 0xFF:  # any number of fill bytes may stand before a marker
                at += 1
                continue
            if kind in _OTHER_FRAMES:
                raise SampleRejected(where, "a JPEG of a coding that is not supported", found=f"SOF{kind - 0xC0}")
            if kind in _BARE or kind == _SOS or length < 2:
                raise SampleRejected(where, f"not a JPEG: a wrong segment at byte {at}", found=f"ff {kind:02x}")
            at += 2 + length
    except (IndexError, struct.error):
        raise SampleRejected(
            where, "a JPEG that is cut before its frame header", found=f"{view.nbytes} bytes"
        ) from None
    if not height or not width or components not in (1, 3, 4) or precision not in (8, 12):
        found = f"{height} x {width}, {components} components of {precision} bits"
        raise SampleRejected(where, "a JPEG with an impossible frame header", found=found)
    if length != 8 + 3 * components:
        found = f"{length} bytes"
        raise SampleRejected(
            where, "a frame header of wrong length", expected=f"{8 + 3 * components} bytes", found=found
        )
    return Header(height=height, width=width, components=components, precision=precision, progressive=_FRAMES[kind])
