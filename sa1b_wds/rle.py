"""COCO's run-length masks as SA-1B stores them: validation, areas, boxes, rasterising, and the strings themselves.

Many strings lie end to end in one array `counts` (uint8), string i in `counts[offsets[i] : offsets[i + 1]]`; what a
string holds is told in `codes`, how it becomes pixels in `raster`. The kernels do all work without the GIL.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from . import codes
from .codes import BAD_CHARACTER, BAD_OFFSETS, BAD_SUM, MAX_DIGITS, REASONS
from .errors import SampleRejected, UsageError
from .format import PIXEL_LIMIT, SIDE_LIMIT
from .geometry import Window
from .raster import F32, I32, I64, U8, Mode, raster

__all__ = ["boxes", "check", "check_size", "decode", "encode", "encode_runs", "ends", "runs"]

F64 = npt.NDArray[np.float64]


def check_size(height: int, width: int) -> None:
    """Raise SampleRejected unless both sides are in 1..65,535 and their product is at most 2**28."""
    if not (0 < height <= SIDE_LIMIT and 0 < width <= SIDE_LIMIT and height * width <= PIXEL_LIMIT):
        raise SampleRejected(
            "image",
            "size outside the limits",
            expected=f"sides in 1..{SIDE_LIMIT}, at most {PIXEL_LIMIT} pixels",
            found=f"{height} x {width}",
        )


def _rejected(counts: U8, offsets: I64, index: int, code: int, found: int, pixels: int) -> SampleRejected:
    where = f"annotations[{index}].segmentation.counts"
    if code == BAD_SUM:
        return SampleRejected(where, REASONS[code], expected=pixels, found=found)
    start, end = int(offsets[index]), int(offsets[index + 1])
    if code == BAD_OFFSETS:
        return SampleRejected(where, REASONS[code], expected=f"within 0..{len(counts)}", found=f"{start}..{end}")
    what = f"{REASONS[code]}, at character {found - start}"
    if code == BAD_CHARACTER:
        return SampleRejected(where, what, expected="a byte of 48..111", found=int(counts[found]))
    return SampleRejected(where, what)


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
    index, code, found = codes.scan_all(counts, offsets, height * width, areas)
    if code < 0:
        raise _rejected(counts, offsets, index, code, found, height * width)
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
    index, code, found = codes.boxes_all(counts, offsets, height, width, out)
    if code < 0:
        raise _rejected(counts, offsets, index, code, found, height * width)
    return out


def decode(
    counts: npt.ArrayLike,
    offsets: npt.ArrayLike,
    source: tuple[int, int],
    size: tuple[int, int] | None = None,
    *,
    index: Sequence[int] | I64 | None = None,
    out: U8 | F32 | None = None,
    window: Window | None = None,
    flip: bool = False,
    mode: Mode = "nearest",
    dtype: npt.DTypeLike | None = None,
) -> U8 | F32:
    """Rasterise masks straight at a target size: (k, H, W).

    `nearest` is bit-equal to decoding at full size and sampling pixel centres: row i takes source row
    y0 + ⌊(2i + 1)·h / 2H⌋ of the window (y0, x0, h, w), columns alike; at full size it is bit-equal to pycocotools.
    `area` gives the exact fraction of each target pixel that the mask covers. Outside the image there is no mask: so
    window (0, 0, L, L), L the longest side, pads to a square at the bottom and on the right (`geometry.square`).

    Args:
        counts: uint8 [bytes], all strings end to end.
        offsets: int64 [n + 1].
        source: (h, w) of all masks, in pixels.
        size: (H, W) of the target; None for the window's own.
        index: which masks, in this order; None for all n.
        out: where to write, (k, H, W), contiguous along rows, else with any distances (a slice of a batch); undefined
            after an error. None for a new array.
        window: (y0, x0, h, w) in source pixels, which may reach outside the image; None for the whole image.
        flip: mirror the result left to right.
        mode: "nearest" or "area".
        dtype: without `out`, uint8 or float32: 0 and 1 for `nearest` (uint8 only); for `area` fractions in float32
            (the default), or ⌊255·fraction + ½⌋ in uint8.

    Raises:
        SampleRejected: as `check`. Only the chosen strings are read.
        UsageError: an index, window, size, mode, dtype or `out` that cannot be.
    """
    counts, offsets = _arrays(counts, offsets)
    chosen = _chosen(index, len(offsets) - 1)
    grid = raster(source, size, window, flip, mode)
    if out is None:
        default = np.uint8 if mode == "nearest" else np.float32
        out = np.empty((len(chosen), *grid.size), default if dtype is None else dtype)
    at, code = grid.draw(counts, offsets, chosen, out)
    if code < 0:
        raise _explained(counts, offsets, int(chosen[at]), source[0] * source[1])
    return out


def ends(
    counts: npt.ArrayLike,
    offsets: npt.ArrayLike,
    height: int,
    width: int,
    *,
    index: Sequence[int] | I64 | None = None,
) -> tuple[I32, I64]:
    """Where the runs of masks end: what rasterising needs without the strings, on a device or elsewhere.

    Pixel p, counted column by column, is in as many runs' wake as there are ends ≤ p: it is set if that number is odd.

    Args:
        counts, offsets, height, width: as for `check`.
        index: which masks, in this order; None for all n.

    Returns:
        int32 [r], the running sums of each mask's runs, in pixels, one mask after the other; and int64 [k + 1], where
        each mask's begin.

    Raises:
        SampleRejected: as `check`. Only the chosen strings are read.
        UsageError: an index that cannot be.
    """
    check_size(height, width)
    counts, offsets = _arrays(counts, offsets)
    chosen = _chosen(index, len(offsets) - 1)
    room = int(np.maximum(offsets[chosen + 1] - offsets[chosen], 0).clip(max=len(counts)).sum())
    out, places = np.empty(room, np.int32), np.empty(len(chosen) + 1, np.int64)
    at, code = codes.ends_all(counts, offsets, chosen, height * width, out, places)
    if code < 0:
        raise _explained(counts, offsets, int(chosen[at]), height * width)
    return out[: places[-1]].copy(), places


def _chosen(index: Sequence[int] | I64 | None, n: int) -> I64:
    chosen = np.arange(n) if index is None else np.ascontiguousarray(index, dtype=np.int64)
    if chosen.ndim != 1 or (len(chosen) and not 0 <= chosen.min() <= chosen.max() < n):
        raise UsageError("rle", "index outside the masks", expected=f"0..{n - 1}", found=chosen.tolist())
    return chosen


def _explained(counts: U8, offsets: I64, i: int, pixels: int) -> SampleRejected:
    """What is wrong with string i, which a kernel has refused."""
    _, code, found = codes.scan_all(counts, offsets[i : i + 2], pixels, np.empty(1, np.int64))
    return _rejected(counts, offsets, i, code, found, pixels)


def runs(counts: bytes | bytearray | memoryview) -> I64:
    """The runs of one string, int64 [m]: 0s, 1s, 0s, … in pixels.

    Raises:
        SampleRejected: as `check`, but for the sum, which is not known here.
    """
    text = np.frombuffer(counts, np.uint8)
    out = np.empty(len(text), np.int64)
    n, code, found = codes.split(text, out)
    if code < 0:
        raise _rejected(text, np.array([0, len(text)]), 0, code, found, 0)
    return out[:n].copy()


def encode_runs(runs: npt.ArrayLike) -> bytes:
    """The string of `runs` (0s, 1s, 0s, …, each 0..2**28), byte for byte as pycocotools writes it.

    Raises:
        UsageError: a run outside the limits.
    """
    array = np.ascontiguousarray(runs, dtype=np.int64)
    out = np.empty(MAX_DIGITS * len(array), np.uint8)
    length = codes.join(array, out)
    if length < 0:
        raise UsageError("rle", REASONS[length], expected=f"0..{PIXEL_LIMIT}", found=f"{array.min()}..{array.max()}")
    return out[:length].tobytes()


def encode(mask: npt.ArrayLike) -> bytes:
    """The string of a mask (h, w), every value but 0 being inside; byte for byte as pycocotools writes it.

    Raises:
        SampleRejected: a size outside the limits.
    """
    array = np.asarray(mask)
    array = array.view(np.uint8) if array.dtype == np.bool_ else array
    if array.ndim != 2 or array.dtype != np.uint8:
        raise UsageError("rle", "not a mask", expected="uint8 or bool (h, w)", found=f"{array.dtype} {array.shape}")
    check_size(*array.shape)
    array = np.ascontiguousarray(array)
    width = array.shape[1]
    ends = np.empty(width, np.int64)
    places = np.empty(4096, np.int64)
    n = codes.changes(array, ends, places)
    if n > len(places):
        places = np.empty(n, np.int64)
        codes.changes(array, ends, places)
    out = np.empty(n + width + 1, np.int64)
    return encode_runs(out[: codes.mask_runs(array, ends, places, out)])
