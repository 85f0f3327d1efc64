"""COCO's run-length masks as SA-1B stores them: validation, areas, boxes, and the strings themselves.

A mask of (h, w) pixels is read column by column; its runs alternate between 0 and 1 and begin with 0 (a first run of
length 0 where pixel (0, 0) is set). The string holds each run as a little-endian base-32 number in two's complement,
five bits a character, `48 + digit + 32 if more digits follow`; from the fourth run on, what is written is the
difference to the run two before (`rleToString` of COCO's maskApi.c).

Many strings lie end to end in one array `counts` (uint8), string i in `counts[offsets[i] : offsets[i + 1]]`.

Here a number has at most `MAX_DIGITS` characters: 30 bits hold every run and every difference within the limits, and
COCO's own reader is undefined beyond them. Runs of length 0 in the middle and superfluous digits are accepted.

All kernels run without the GIL, and none trusts the bytes it is given.
"""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from .errors import SampleRejected, UsageError
from .jit import inline, jit

U8 = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]

MAX_SIDE: Final = 65_535
"""Longest side of an image, in pixels."""
MAX_PIXELS: Final = 1 << 28
"""Most pixels of an image, and the longest run."""
MAX_DIGITS: Final = 6
"""Most characters of one number."""

CUT: Final = -1
BAD_CHARACTER: Final = -2
TOO_LONG: Final = -3
NEGATIVE: Final = -4
TOO_LARGE: Final = -5
BAD_SUM: Final = -6
BAD_OFFSETS: Final = -7

REASONS: Final = {
    CUT: "the RLE string ends inside a number",
    BAD_CHARACTER: "a character that RLE strings do not have",
    TOO_LONG: "an RLE number that is too long",
    NEGATIVE: "a negative RLE run",
    TOO_LARGE: "an RLE run over the limit",
    BAD_SUM: "RLE runs do not add up",
    BAD_OFFSETS: "RLE offsets do not rise, or point outside",
}


@inline
def next_run(text: Any, at: int, end: int, before: int) -> tuple[int, int]:
    """Read one run of the string that ends at `end`, as (run, place of the next run), for use inside a kernel.

    `before` is the run two before; 0 for the first three. (Equally: 0 for the first three, if the caller takes the
    first run for 0 where it serves as `before`; so `ones` and `zeros` need no counter. See `scan`.)
    Needs at < end <= len(text). A place below 0 is an error code, one of `REASONS`; then the run is where it was found.
    """
    digit: int = text[np.uint64(at)] - 48
    if 0 <= digit < 32:
        # Most runs have one character: sign-extend five bits.
        run = before + ((digit ^ 16) - 16)
        if run < 0:
            return at, NEGATIVE
        if run > MAX_PIXELS:
            return at, TOO_LARGE
        return run, at + 1
    if digit < 0 or digit >= 64:
        return at, BAD_CHARACTER
    start = at
    value = digit & 31
    shift = 5
    while digit & 32:
        at += 1
        if at >= end:
            return start, CUT
        if shift == 5 * MAX_DIGITS:
            return start, TOO_LONG
        digit = text[np.uint64(at)] - 48
        if digit < 0 or digit >= 64:
            return at, BAD_CHARACTER
        value |= (digit & 31) << shift
        shift += 5
    if digit & 16:
        value -= 1 << shift
    run = before + value
    if run < 0:
        return start, NEGATIVE
    if run > MAX_PIXELS:
        return start, TOO_LARGE
    return run, at + 1


@inline
def scan(text: Any, start: int, end: int, pixels: int) -> tuple[int, int]:
    """Check the string text[start:end], whose runs must add up to `pixels`, as (area, 0), for use inside a kernel.

    Where it fails: (found, code), `found` being the sum for BAD_SUM and the place of the number for all other codes.
    Needs 0 <= start <= end <= len(text).
    """
    area = 0
    total = 0
    zeros = 0
    ones = 0
    at = start
    first = True
    while at < end:
        run, at = next_run(text, at, end, zeros)
        if at < 0:
            return run, at
        total += run
        zeros = 0 if first else run
        first = False
        if at >= end:
            break
        ones, at = next_run(text, at, end, ones)
        if at < 0:
            return ones, at
        total += ones
        area += ones
    if total != pixels:
        return total, BAD_SUM
    return area, 0


@inline
def inside(offsets: Any, i: int, length: int) -> bool:
    """Whether string i lies inside an array of `length` bytes."""
    return bool(0 <= offsets[i] <= offsets[i + 1] <= length)


@jit
def _scan_all(counts: Any, offsets: Any, pixels: int, areas: Any) -> tuple[int, int, int]:
    """Areas of all strings; (n, 0, 0), else (index, code, found) of the first that fails."""
    for i in range(len(areas)):
        if not inside(offsets, i, len(counts)):
            return i, BAD_OFFSETS, 0
        area, code = scan(counts, offsets[i], offsets[i + 1], pixels)
        if code < 0:
            return i, code, area
        areas[i] = area
    return len(areas), 0, 0


@jit
def _boxes_all(counts: Any, offsets: Any, height: int, width: int, out: Any) -> tuple[int, int, int]:
    """Boxes of all strings; the result as that of `_scan_all`."""
    h = height
    pixels = h * width
    for i in range(len(out)):
        if not inside(offsets, i, len(counts)):
            return i, BAD_OFFSETS, 0
        x0, x1, y0, y1 = width, -1, h, -1
        total = 0
        zeros = 0
        ones = 0
        at, end = offsets[i], offsets[i + 1]
        first = True
        while at < end:
            run, at = next_run(counts, at, end, zeros)
            if at < 0:
                return i, at, run
            total += run
            zeros = 0 if first else run
            first = False
            if at >= end:
                break
            ones, at = next_run(counts, at, end, ones)
            if at < 0:
                return i, at, ones
            if ones > 0 and total + ones <= pixels:
                left = total // h
                top = total - left * h
                last = total + ones - 1
                bottom = last - left * h
                right = left
                if bottom >= h:  # goes on in another column, so it touches the bottom edge and the top one
                    right = last // h
                    top, bottom = 0, h - 1
                x0, x1 = min(x0, left), max(x1, right)
                y0, y1 = min(y0, top), max(y1, bottom)
            total += ones
        if total != pixels:
            return i, BAD_SUM, total
        if x1 < 0:
            x0, y0, x1, y1 = 0, 0, 0, 0
        out[i, 0], out[i, 1], out[i, 2], out[i, 3] = x0, y0, x1 - x0, y1 - y0
    return len(out), 0, 0


@jit
def _runs(text: Any, out: Any) -> tuple[int, int, int]:
    """All runs of one string into `out`, which has room for one a character; (how many, code, found)."""
    end = len(text)
    at = 0
    n = 0
    while at < end:
        run, at = next_run(text, at, end, out[n - 2] if n > 2 else 0)
        if at < 0:
            return n, at, run
        out[n] = run
        n += 1
    return n, 0, 0


@jit
def _encode_runs(runs: Any, out: Any) -> int:
    """The string of `runs` into `out`, which has room for MAX_DIGITS characters a run; its length, or an error code."""
    at = 0
    for i in range(len(runs)):
        value = runs[i]
        if value < 0:
            return NEGATIVE
        if value > MAX_PIXELS:
            return TOO_LARGE
        if i > 2:
            value -= runs[i - 2]
        while True:
            digit = value & 31
            value >>= 5
            more = value != (-1 if digit & 16 else 0)
            out[np.uint64(at)] = 48 + digit + (32 if more else 0)
            at += 1
            if not more:
                break
    return at


@jit
def _mask_runs(pixels: Any, out: Any) -> int:
    """Runs of a mask given column by column; their number. Only counts where `out` is full."""
    n = 0
    run = 0
    value = False
    for i in range(len(pixels)):
        if (pixels[i] != 0) != value:
            if n < len(out):
                out[n] = run
            n += 1
            run = 0
            value = not value
        run += 1
    if n < len(out):
        out[n] = run
    return n + 1


def check_size(height: int, width: int) -> None:
    """Raise SampleRejected unless both sides are in 1..65,535 and their product is at most 2**28."""
    if not (0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE and height * width <= MAX_PIXELS):
        raise SampleRejected(
            "image",
            "size outside the limits",
            expected=f"sides in 1..{MAX_SIDE}, at most {MAX_PIXELS} pixels",
            found=f"{height} x {width}",
        )


def _rejected(index: int, code: int, found: int, offsets: Any, height: int, width: int) -> SampleRejected:
    where = f"annotations[{index}].segmentation.counts"
    if code == BAD_SUM:
        return SampleRejected(where, REASONS[code], expected=height * width, found=found)
    if code == BAD_OFFSETS:
        return SampleRejected(where, REASONS[code], found=f"{int(offsets[index])} to {int(offsets[index + 1])}")
    return SampleRejected(where, REASONS[code], found=f"this at character {found - int(offsets[index])}")


def _arrays(counts: npt.ArrayLike, offsets: npt.ArrayLike) -> tuple[U8, I64]:
    """Both arrays as the kernels take them (contiguous; no copy where they are)."""
    u8 = np.ascontiguousarray(counts, dtype=np.uint8)
    i64 = np.ascontiguousarray(offsets, dtype=np.int64)
    if u8.ndim != 1 or i64.ndim != 1 or len(i64) < 1:
        raise UsageError("rle", "wrong shapes", expected="counts [bytes] and offsets [n + 1]", found=str(i64.shape))
    return u8, i64


def check(counts: npt.ArrayLike, offsets: npt.ArrayLike, height: int, width: int) -> I64:
    """Validate all strings and give their areas, int64 [n], in pixels.

    Args:
        counts: uint8 [bytes], all strings end to end.
        offsets: int64 [n + 1].
        height, width: the size of every mask.

    Raises:
        SampleRejected: a size outside the limits, offsets that do not rise or point outside, a character outside
            48..111, a string that ends inside a number, a number of more than `MAX_DIGITS` characters, a run below 0
            or above 2**28, runs that do not add up to height * width.
    """
    check_size(height, width)
    counts, offsets = _arrays(counts, offsets)
    areas = np.empty(len(offsets) - 1, np.int64)
    index, code, found = _scan_all(counts, offsets, height * width, areas)
    if code < 0:
        raise _rejected(index, code, found, offsets, height, width)
    return areas


def boxes(counts: npt.ArrayLike, offsets: npt.ArrayLike, height: int, width: int) -> F64:
    """Bounding boxes as SA-1B writes them, float64 [n, 4]: x, y, w = xmax - xmin, h = ymax - ymin, in pixels.

    pycocotools' `toBbox` gives w and h one larger. A mask without pixels has the box 0, 0, 0, 0.

    Raises:
        SampleRejected: as `check`.
    """
    check_size(height, width)
    counts, offsets = _arrays(counts, offsets)
    out = np.empty((len(offsets) - 1, 4), np.float64)
    index, code, found = _boxes_all(counts, offsets, height, width, out)
    if code < 0:
        raise _rejected(index, code, found, offsets, height, width)
    return out


def runs(counts: bytes | bytearray | memoryview) -> I64:
    """The runs of one string, int64 [m]: 0s, 1s, 0s, … in pixels.

    Raises:
        SampleRejected: as `check`, but for the sum, which is not known here.
    """
    text = np.frombuffer(counts, np.uint8)
    out = np.empty(len(text), np.int64)
    n, code, found = _runs(text, out)
    if code < 0:
        raise _rejected(0, code, found, (0,), 0, 0)
    return out[:n].copy()


def encode_runs(runs: npt.ArrayLike) -> bytes:
    """The string of `runs` (0s, 1s, 0s, …, each 0..2**28), byte for byte as pycocotools writes it.

    Raises:
        UsageError: a run outside the limits.
    """
    array = np.ascontiguousarray(runs, dtype=np.int64)
    out = np.empty(MAX_DIGITS * len(array), np.uint8)
    length = _encode_runs(array, out)
    if length < 0:
        raise UsageError("rle", REASONS[length], expected=f"0..{MAX_PIXELS}", found=f"{array.min()}..{array.max()}")
    return out[:length].tobytes()


def encode(mask: npt.ArrayLike) -> bytes:
    """The string of a mask (h, w), every value but 0 being inside; byte for byte as pycocotools writes it.

    Raises:
        SampleRejected: a size outside the limits.
    """
    array = np.asarray(mask)
    array = array.astype(np.uint8) if array.dtype == np.bool_ else array
    if array.ndim != 2 or array.dtype != np.uint8:
        raise UsageError("rle", "not a mask", expected="uint8 (h, w)", found=f"{array.dtype} {array.shape}")
    check_size(*array.shape)
    pixels = np.ascontiguousarray(array.T).reshape(-1)
    out = np.empty(4096, np.int64)
    n = _mask_runs(pixels, out)
    if n > len(out):
        out = np.empty(n, np.int64)
        _mask_runs(pixels, out)
    return encode_runs(out[:n])
