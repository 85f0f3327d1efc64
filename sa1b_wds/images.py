"""JPEGs: their header, and their pixels at the size a model wants.

`decode` reads an image in three steps: a decode at a DCT scale of 1, 1/2, 1/4 or 1/8, a resize straight into the
caller's array, linear where the ratio allows it, and zeros for what lies outside the image. Entropy decoding takes most
of the time at any scale, so the scale is chosen for quality too: 1/2 where that leaves at least 15/16 of the target (a
linear resize from full size would be slower and no better), 1/4 and 1/8 only where they leave 7/4 of it. Scales between
these, such as 5/8, have no fast code in libjpeg-turbo and cost more than the whole image.

How far that is from a full decode and an area resize (`fast=False`, which takes twice as long), on eight SA-1B
photographs (`scripts/bench/images`), as PSNR in dB, lowest and mean: 33.5 and 37.8 at 1024, 34.3 and 39.2 at 640, 31.6
and 36.2 at 512, 31.1 and 33.8 at 256. Most of it is sharpness: the DCT scale keeps what the area filter blurs.

An EXIF orientation is never applied: SA-1B's masks, boxes and points refer to the pixels as they are stored.
"""

import struct
import threading
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from .errors import SampleRejected, UsageError
from .format import PIXEL_LIMIT, SIDE_LIMIT
from .geometry import Window, square

if TYPE_CHECKING:
    from typing_extensions import Buffer

U8 = npt.NDArray[np.uint8]

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


def decode(
    jpg: "Buffer",
    size: int | tuple[int, int] | None = None,
    *,
    out: U8 | None = None,
    window: Window | None = None,
    flip: bool = False,
    of: tuple[int, int] | None = None,
    fast: bool = True,
    where: str = "jpg",
) -> U8:
    """Decode a JPEG to RGB (H, W, 3) uint8 at a target size.

    The geometry is that of `rle.decode`: a window of the stored pixels is stretched to the target, what lies outside
    the image is 0, and a flip mirrors the result. Here the part inside the image begins and ends at whole target
    pixels (rounded half up), so it may be off by half a target pixel; at DCT scale 1/k the window's edges are rounded
    to k source pixels, which is less than that.

    Args:
        jpg: the whole file. Grayscale and CMYK become RGB; anything but 8 bits a component is refused.
        size: the longest side S of a square (S, S) in which the window, in its own proportions, fills the top left
            corner (also when flipped), its shorter side being ⌊shorter · S / longer + ½⌋ long; or (H, W), to which
            the window is stretched; or None for the window's own size.
        out: where to write, (H, W, 3) uint8 with contiguous rows: a slice of a batch. None for a new array.
        window: (y0, x0, h, w) in stored pixels, which may reach outside the image; None for the whole image.
        flip: mirror left and right.
        of: (h, w) of the image that this JPEG is a smaller copy of: the window is in its pixels, and so is everything
            said of the window above. Where the part begins and ends is then rounded to stored pixels.
        fast: False for a full decode with accurate DCT and smooth chroma, and an area resize. No difference at full
            size, where the pixels are those of PIL.
        where: begins the message of an error.

    Raises:
        SampleRejected: as `header`; more than 2**28 pixels, 12 bits a component; a JPEG that is cut or damaged,
            be it only that its end marker is missing.
        UsageError: a size, window or `out` that cannot be.

    Threads may call it at the same time; the GIL is dropped for the decode and the resize. OpenCV is set to one thread
    a call at the first call in a process, since a loader has a thread a core already.
    """
    head = header(jpg, where)
    _refuse(head, where)
    h, w = of or (head.height, head.width)
    y0, x0, tall, wide = (0, 0, h, w) if window is None else window
    if not (0 < tall <= SIDE_LIMIT and 0 < wide <= SIDE_LIMIT):
        raise UsageError("images", "window outside the limits", expected=f"sides in 1..{SIDE_LIMIT}", found=window)
    if size is None:
        size = tall, wide
    elif not isinstance(size, tuple):
        y0, x0, tall, wide = square((y0, x0, tall, wide), flip)
        size = size, size
    rows, columns = size
    if not (0 < rows <= SIDE_LIMIT and 0 < columns <= SIDE_LIMIT and rows * columns <= PIXEL_LIMIT):
        raise UsageError("images", "target size outside the limits", expected=f"sides in 1..{SIDE_LIMIT}", found=size)
    if out is None:
        out = np.empty((rows, columns, 3), np.uint8)
    elif not _writable(out, (rows, columns, 3)):
        expected = f"writable uint8 {(rows, columns, 3)} with contiguous rows"
        raise UsageError("images", "out cannot be written to", expected=expected, found=f"{out.dtype} {out.shape}")

    # The part of the window that the image covers: in stored pixels, and in the target.
    top, bottom, left, right = max(y0, 0), min(y0 + tall, h), max(x0, 0), min(x0 + wide, w)
    if top >= bottom or left >= right:
        out[:] = 0
        return out
    over, under = _place(top - y0, bottom - y0, rows, tall)
    before, after = _place(left - x0, right - x0, columns, wide)
    if flip:
        before, after = columns - after, columns - before
    part = out[over:under, before:after]
    out[:over] = 0
    out[under:] = 0
    out[over:under, :before] = 0
    out[over:under, after:] = 0

    high, broad = head.height / h, head.width / w  # 1, but for a smaller copy
    shrink = min(high * (bottom - top) / (under - over), broad * (right - left) / (after - before))
    scale = next((k for k, least in _SCALES if shrink >= k * least), 1) if fast else 1
    whole = bottom - top == h and right - left == w
    if part.shape == (head.height, head.width, 3) and whole and part.flags.c_contiguous:
        _pixels(jpg, head, 1, False, part.reshape(-1), where)
    else:
        quick = fast and scale == 1 and shrink > 1
        pixels = _pixels(jpg, head, scale, quick, _buffer(head, scale), where)
        down, across = _span(top, bottom, h, head.height, scale), _span(left, right, w, head.width, scale)
        _resize(pixels[down, across], part, fast)
    if flip:
        _opencv().flip(part, 1, part)
    return out


def encode(pixels: U8, quality: int) -> bytes:
    """A baseline JPEG of (H, W, 3) RGB or (H, W, 1) grey uint8: accurate DCT, colour at half size (4:2:0).

    By OpenCV, whose libjpeg-turbo is told to use the accurate DCT: simplejpeg takes the fast one below quality 96.
    """
    cv2 = _opencv()
    colour = pixels.shape[2] == 3
    options = [
        cv2.IMWRITE_JPEG_QUALITY,
        quality,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
    ]
    done, data = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR) if colour else pixels, options)
    if not done:
        raise UsageError("images", "cannot be encoded", found=pixels.shape)
    encoded: bytes = data.tobytes()
    return encoded


def libraries() -> str:
    """What decides the bytes of `encode` and the pixels of `decode`, with versions."""
    import simplejpeg

    return f"simplejpeg {simplejpeg.__version__} and OpenCV {_opencv().__version__}"


def tfds_image(jpg: "Buffer", where: str = "jpg") -> U8:
    """The pixels (h, w, 3) uint8 that TFDS' `segment_anything` gives, bit for bit: fast DCT, smooth chroma.

    Raises:
        SampleRejected: as `decode`.
    """
    head = header(jpg, where)
    _refuse(head, where)
    return _read(jpg, where, fastdct=True, fastupsample=False)


_SCALES: Final = ((8, 7 / 4), (4, 7 / 4), (2, 15 / 16))
"""DCT scales 1/k, and how large, in units of the target, the image must at least be at each."""
_LINEAR: Final = 2.3
"""Largest ratio of a linear resize: beyond it takes too few of the pixels."""
_KEPT: Final = 64 << 20
"""Bytes of the largest buffer that a thread keeps."""

_local = threading.local()


@cache
def _opencv() -> Any:
    import cv2

    cv2.setNumThreads(1)
    return cv2


def _refuse(head: Header, where: str) -> None:
    """Raise for what the decoder cannot, or should not, read."""
    if head.precision != 8:
        raise SampleRejected(where, "a JPEG with other than 8 bits a component", expected=8, found=head.precision)
    if head.height * head.width > PIXEL_LIMIT:
        found = f"{head.height} x {head.width}"
        raise SampleRejected(where, "a JPEG with too many pixels", expected=f"at most {PIXEL_LIMIT}", found=found)


def _writable(out: U8, shape: tuple[int, int, int]) -> bool:
    apart = out.strides[1:] == (3, 1) and (shape[0] == 1 or out.strides[0] >= 3 * shape[1])
    return out.shape == shape and out.dtype == np.uint8 and apart and out.flags.writeable


def _place(begin: int, end: int, target: int, span: int) -> tuple[int, int]:
    """Where begin..end of a window `span` long comes to lie on `target` pixels: rounded half up, at least one pixel."""
    low = min((2 * begin * target + span) // (2 * span), target - 1)
    return low, max((2 * end * target + span) // (2 * span), low + 1)


def _span(begin: int, end: int, length: int, stored: int, scale: int) -> slice:
    """The pixels of an image decoded at 1/scale that begin..end of `length` become; at least one.

    `stored`: how long that image is at scale 1; less than `length` if it is a smaller copy.
    """
    decoded, step = -(-stored // scale), length * scale
    low = min((2 * begin * stored + step) // (2 * step), decoded - 1)
    high = decoded if end == length else (2 * end * stored + step) // (2 * step)
    return slice(low, max(high, low + 1))


def _buffer(head: Header, scale: int) -> U8:
    """This thread's buffer for decoded pixels: fresh memory costs page faults, a quarter of the time of a decode."""
    length = 3 * -(-head.height // scale) * -(-head.width // scale)
    buffer: U8 | None = getattr(_local, "buffer", None)
    if buffer is None or len(buffer) < length:
        buffer = np.empty(length, np.uint8)
        _local.buffer = buffer if length <= _KEPT else None
    return buffer


def _pixels(jpg: "Buffer", head: Header, scale: int, quick: bool, buffer: U8, where: str) -> U8:
    """The image decoded at 1/scale into `buffer`."""
    shape = -(-head.height // scale), -(-head.width // scale), 3
    least = {"min_height": shape[0], "min_width": shape[1]} if scale > 1 else {}
    pixels = _read(jpg, where, fastdct=quick, fastupsample=quick, buffer=buffer, **least)
    if pixels.shape != shape:
        raise SampleRejected(where, "a JPEG that decodes to another size than it states", shape, pixels.shape)
    return pixels


def _read(jpg: "Buffer", where: str, **options: Any) -> U8:
    import simplejpeg

    try:
        # Strict: what libjpeg would only warn of, a cut file among it, is an error.
        pixels: U8 = simplejpeg.decode_jpeg(jpg, "RGB", strict=True, **options)
    except ValueError as error:
        raise SampleRejected(where, "a JPEG that is cut or damaged", found=error) from None
    return pixels


def _resize(pixels: U8, part: U8, fast: bool) -> None:
    height, width, _ = part.shape
    down, along = pixels.shape[0] / height, pixels.shape[1] / width
    if down == along == 1:
        part[:] = pixels
        return
    cv2 = _opencv()
    area = max(down, along) > (_LINEAR if fast else 1)
    cv2.resize(pixels, (width, height), dst=part, interpolation=cv2.INTER_AREA if area else cv2.INTER_LINEAR)
