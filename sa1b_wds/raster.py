"""Masks straight from their runs to any size, without the full-size mask ever existing.

One walk over the runs of a string, which are ordered by column. Two ways to make a target pixel:

`nearest`   takes the source pixel under the target pixel's centre. A run inside one column covers the target rows whose
            centres lie in it; nothing happens unless the column is sampled at all. Its two ends are marked in the
            output by XOR, and at the end each row inside the bounding box is XORed with the row above it. So all
            writes but the two marks a run go along rows, though the runs go along columns.
`area`      takes the exact fraction of the target pixel that is covered, as an integer in units of
            1 / (target height · target width) of a source pixel. The two ends of a run add to a table of differences
            down the rows; the sum down the rows is the covered area.

Both place the source in the same way: a *window* of it (y0, x0, h, w), in source pixels, which may reach outside the
image (nothing is there), is stretched to the target (H, W); for `nearest` row i takes source row
y0 + ⌊(2i + 1)·h / 2H⌋, columns alike. A flip mirrors the result.

Cost on one core (`scripts/bench/rle`): a walk takes about a nanosecond a character, clearing and writing the output the
rest, which is the speed of the memory. 100 masks of 2250 × 1500 to 256 × 256 take 0.15 to 0.4 ms, depending on whether
the output is in a cache, at full size 6 ms.
"""

import threading
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from .codes import BAD_OFFSETS, BAD_SUM, inside, next_run
from .errors import SampleRejected, UsageError
from .format import PIXEL_LIMIT, SIDE_LIMIT
from .geometry import Window
from .jit import inline, jit

Mode = Literal["nearest", "area"]

U8 = npt.NDArray[np.uint8]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]

_FAR: Final = 1 << 20
"""How far outside a window may begin: keeps all products below 2**63."""


@inline
def _mark(out: Any, at: int, stride: int, left: int, right: int, top: int, bottom: int, last: int, turn: int) -> None:
    """XOR the ends of a run that covers rows top..bottom of target columns left..right."""
    for x in range(left, right):
        column = turn - x if turn >= 0 else x
        out[np.uint64(at + top * stride + column)] ^= 1
        if bottom <= last:
            out[np.uint64(at + bottom * stride + column)] ^= 1


@jit
def nearest(
    counts: Any,
    offsets: Any,
    index: Any,
    height: int,
    width: int,
    rows: Any,
    columns: Any,
    flip: bool,
    out: Any,
    start: int,
    step: int,
    stride: int,
    size_h: int,
    size_w: int,
) -> tuple[int, int]:
    """Masks `index` of (height, width) by nearest sampling; (number of masks, 0), or (which of `index`, error code).

    Args:
        counts, offsets: uint8 [bytes], int64 [n + 1]; need not have been checked.
        index: int64 [k].
        rows, columns: int32 [height + 1], [width + 1] of `samples`.
        flip: mirror left and right.
        out: uint8, one-dimensional, contiguous. Row y of mask m begins at start + m·step + y·stride; the caller makes
            sure that all rows lie inside. Nothing between the rows is touched.
        size_h, size_w: the target.
    """
    pixels = height * width
    turn = size_w - 1 if flip else -1
    last = size_h - 1
    foot: int = rows[height]
    head: int = rows[0]
    for m in range(len(index)):
        i = index[m]
        if i < 0 or i >= len(offsets) - 1 or not inside(offsets, i, len(counts)):
            return m, BAD_OFFSETS
        base = start + m * step
        if stride == size_w:
            for k in range(size_h * size_w):
                out[np.uint64(base + k)] = 0
        else:
            for y in range(size_h):
                for k in range(size_w):
                    out[np.uint64(base + y * stride + k)] = 0
        at: int = offsets[i]
        end: int = offsets[i + 1]
        total = 0
        zeros = 0
        ones = 0
        x = 0  # the run begins in source column x, row y
        y = 0
        left, right, top, bottom = size_w, 0, size_h, 0  # the bounding box in the target, so far
        first = True
        while at < end:
            run, at = next_run(counts, at, end, zeros)
            if at < 0:
                return m, at
            zeros = 0 if first else run
            first = False
            total += run
            if total > pixels:
                return m, BAD_SUM
            y += run
            if y >= height:
                y -= height
                x += 1
                if y >= height:
                    q = y // height
                    x += q
                    y -= q * height
            if at >= end:
                break
            ones, at = next_run(counts, at, end, ones)
            if at < 0:
                return m, at
            total += ones
            if total > pixels:
                return m, BAD_SUM
            if ones == 0:
                continue
            stop = y + ones
            x0: int = columns[np.uint64(x)]
            x1: int = columns[np.uint64(x + 1)]
            y0: int = rows[np.uint64(y)]
            y1: int = rows[np.uint64(stop)] if stop < height else foot
            if x0 < x1 and y0 < y1:
                _mark(out, base, stride, x0, x1, y0, y1, last, turn)
                left, right, top, bottom = min(left, x0), max(right, x1), min(top, y0), max(bottom, y1)
            y = stop
            if stop < height:
                continue
            y -= height  # the run reaches the foot of its column: whole columns, and the head of one more
            x += 1
            if y >= height:
                q = y // height
                y -= q * height
                x0 = columns[np.uint64(x)]
                x1 = columns[np.uint64(x + q)]
                if x0 < x1 and head < foot:
                    _mark(out, base, stride, x0, x1, head, foot, last, turn)
                    left, right, top, bottom = min(left, x0), max(right, x1), min(top, head), max(bottom, foot)
                x += q
            if y > 0:
                x0 = columns[np.uint64(x)]
                x1 = columns[np.uint64(x + 1)]
                y1 = rows[np.uint64(y)]
                if x0 < x1 and head < y1:
                    _mark(out, base, stride, x0, x1, head, y1, last, turn)
                    left, right, top, bottom = min(left, x0), max(right, x1), min(top, head), max(bottom, y1)
        if total != pixels:
            return m, BAD_SUM
        if flip:
            left, right = size_w - right, size_w - left
        for y in range(top + 1, min(bottom + 1, size_h)):
            here = base + y * stride
            for k in range(left, right):
                out[np.uint64(here + k)] ^= out[np.uint64(here - stride + k)]
    return len(index), 0


@inline
def _cover(
    table: Any,
    x: int,
    y: int,
    stop: int,
    rows: Any,
    columns: Any,
    origin_y: int,
    origin_x: int,
    span_h: int,
    span_w: int,
    size_h: int,
    size_w: int,
    turn: int,
) -> None:
    """Add rows y..stop of source column x to the table of differences, modulo 2**32 (the sums are less)."""
    first: int = rows[np.uint64(y)]
    final: int = rows[np.uint64(stop)]
    # How much of the target row in which an end lies is below that end; the rest is made up for in the next row.
    from_first = min(span_h, (first + 1) * span_h - (y - origin_y) * size_h)
    from_final = min(span_h, (final + 1) * span_h - (stop - origin_y) * size_h)
    begin = (x - origin_x) * size_w
    end = begin + size_w
    column: int = columns[np.uint64(x)]
    while column < size_w and column * span_w < end:
        share = min(end, (column + 1) * span_w) - max(begin, column * span_w)
        k = turn - column if turn >= 0 else column
        a = first * size_w + k
        b = final * size_w + k
        table[np.uint64(a)] += np.uint32(from_first * share)
        table[np.uint64(a + size_w)] += np.uint32((span_h - from_first) * share)
        table[np.uint64(b)] -= np.uint32(from_final * share)
        table[np.uint64(b + size_w)] -= np.uint32((span_h - from_final) * share)
        column += 1


@jit
def area(
    counts: Any,
    offsets: Any,
    index: Any,
    height: int,
    width: int,
    rows: Any,
    columns: Any,
    window: Window,
    flip: bool,
    levels: int,
    table: Any,
    out: Any,
    start: int,
    step: int,
    stride: int,
    size_h: int,
    size_w: int,
) -> tuple[int, int]:
    """As `nearest`, but the covered fraction of each target pixel; results and arguments as there, and:

    Args:
        rows, columns: int32 of `places`.
        window: its (h, w) each at most 65,535, so that their product fits 32 bits.
        levels: 0 for fractions as float32; 255 for ⌊255·fraction + ½⌋ as uint8.
        table: uint32 [(size_h + 2) · size_w], all zero; it is left so if the result is not an error.
        out: float32 or uint8.
    """
    pixels = height * width
    origin_y, origin_x, span_h, span_w = window
    whole = float(span_h) * float(span_w)
    turn = size_w - 1 if flip else -1
    for m in range(len(index)):
        i = index[m]
        if i < 0 or i >= len(offsets) - 1 or not inside(offsets, i, len(counts)):
            return m, BAD_OFFSETS
        base = start + m * step
        if stride == size_w:
            for k in range(size_h * size_w):
                out[np.uint64(base + k)] = 0
        else:
            for y in range(size_h):
                for k in range(size_w):
                    out[np.uint64(base + y * stride + k)] = 0
        at: int = offsets[i]
        end: int = offsets[i + 1]
        total = 0
        zeros = 0
        ones = 0
        x = 0
        y = 0
        left, right, top, bottom = width, 0, height, 0  # the bounding box in the source, so far
        first = True
        while at < end:
            run, at = next_run(counts, at, end, zeros)
            if at < 0:
                return m, at
            zeros = 0 if first else run
            first = False
            total += run
            if total > pixels:
                return m, BAD_SUM
            y += run
            if y >= height:
                y -= height
                x += 1
                if y >= height:
                    q = y // height
                    x += q
                    y -= q * height
            if at >= end:
                break
            ones, at = next_run(counts, at, end, ones)
            if at < 0:
                return m, at
            total += ones
            if total > pixels:
                return m, BAD_SUM
            if ones == 0:
                continue
            left = min(left, x)
            rest = ones
            while rest > 0:
                stop = min(y + rest, height)
                _cover(table, x, y, stop, rows, columns, origin_y, origin_x, span_h, span_w, size_h, size_w, turn)
                top, bottom, right = min(top, y), max(bottom, stop), max(right, x + 1)
                rest -= stop - y
                y = stop
                if stop == height:
                    y = 0
                    x += 1
        if total != pixels:
            return m, BAD_SUM
        if right == 0:
            continue
        head: int = rows[np.uint64(top)]
        foot = min(rows[np.uint64(bottom)] + 1, size_h)
        x0: int = columns[np.uint64(left)]
        x1 = min(columns[np.uint64(right)] + 1, size_w)
        if flip:
            x0, x1 = size_w - x1, size_w - x0
        for y in range(head, foot):
            here = y * size_w
            if y > head:
                for k in range(x0, x1):
                    table[np.uint64(here + k)] += table[np.uint64(here - size_w + k)]
            there = base + y * stride
            if levels:
                for k in range(x0, x1):
                    out[np.uint64(there + k)] = np.uint8(table[np.uint64(here + k)] * 255.0 / whole + 0.5)
            else:
                for k in range(x0, x1):
                    out[np.uint64(there + k)] = np.float32(table[np.uint64(here + k)] / whole)
        for y in range(head, min(foot + 2, size_h + 2)):
            for k in range(x0, x1):
                table[np.uint64(y * size_w + k)] = 0
    return len(index), 0


@lru_cache(maxsize=512)
def samples(length: int, target: int, origin: int, span: int) -> I32:
    """Along one axis, int32 [length + 1]: how many target centres lie before source pixel 0, 1, …, `length`.

    Centre i lies in source pixel origin + ⌊(2i + 1)·span / (2·target)⌋; so source pixels a..b (without b) are sampled
    by target pixels samples[a]..samples[b].
    """
    before = np.arange(length + 1) - origin
    found = np.clip(-((span - 2 * target * before) // (2 * span)), 0, target).astype(np.int32)
    found.flags.writeable = False
    return found


@lru_cache(maxsize=512)
def places(length: int, target: int, origin: int, span: int) -> I32:
    """Along one axis, int32 [length + 1]: the target pixel in which the near edge of source pixel 0, 1, … lies.

    0 for what lies before the window, `target` for what lies behind it.
    """
    found = np.clip((np.arange(length + 1) - origin) * target // span, 0, target).astype(np.int32)
    found.flags.writeable = False
    return found


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Raster:
    """How masks of one source size come to lie on a target: all that does not depend on the runs. See `raster`."""

    source: tuple[int, int]
    """h, w of the masks, in pixels."""
    size: tuple[int, int]
    """H, W of the target, in pixels."""
    window: Window
    flip: bool
    mode: Mode
    rows: I32
    """[h + 1], of `samples` or `places`."""
    columns: I32
    """[w + 1], likewise."""

    def draw(self, counts: U8, offsets: I64, index: I64, out: U8 | F32) -> tuple[int, int]:
        """Write masks `index` into `out` (k, H, W); (k, 0), or (which of `index`, error code of `codes`).

        The kernels check all of counts, offsets and index; this checks `out`. Threads may call it at the same time,
        without the GIL for all but a few microseconds. `out` as for `rle.decode`.
        """
        height, width = self.size
        flat, step, stride = _flat(out, (len(index), height, width))
        if not len(index):
            return 0, 0
        if self.mode == "nearest":
            if out.dtype != np.uint8:
                raise UsageError("rle", "wrong dtype for nearest sampling", expected="uint8", found=out.dtype)
            return nearest(
                counts,
                offsets,
                index,
                *self.source,
                self.rows,
                self.columns,
                self.flip,
                flat,
                0,
                step,
                stride,
                *self.size,
            )
        levels = 255 if out.dtype == np.uint8 else 0
        if not levels and out.dtype != np.float32:
            raise UsageError("rle", "wrong dtype for covered areas", expected="float32 or uint8", found=out.dtype)
        table = _table((height + 2) * width)
        try:
            result = area(
                counts,
                offsets,
                index,
                *self.source,
                self.rows,
                self.columns,
                self.window,
                self.flip,
                levels,
                table,
                flat,
                0,
                step,
                stride,
                *self.size,
            )
        except BaseException:
            _local.table = None
            raise
        if result[1] < 0:
            _local.table = None
        return result


@lru_cache(maxsize=256)
def raster(
    source: tuple[int, int],
    size: tuple[int, int] | None = None,
    window: Window | None = None,
    flip: bool = False,
    mode: Mode = "nearest",
) -> Raster:
    """The raster for masks of `source` (h, w); kept, since most images of a data set share a size.

    Args:
        size: the target (H, W); None for as many pixels as the window has.
        window: None for the whole image.
        mode: "nearest" or "area".

    Raises:
        SampleRejected: a source outside the limits (sides of 1..65,535, at most 2**28 pixels).
        UsageError: a target outside them, a window with sides outside 1..65,535 or too far away, an unknown mode.
    """
    height, width = source
    if not (0 < height <= SIDE_LIMIT and 0 < width <= SIDE_LIMIT and height * width <= PIXEL_LIMIT):
        limits = f"sides in 1..{SIDE_LIMIT}, at most {PIXEL_LIMIT} pixels"
        raise SampleRejected("image", "size outside the limits", expected=limits, found=f"{height} x {width}")
    y, x, h, w = window = (0, 0, height, width) if window is None else window
    if not (abs(y) <= _FAR and abs(x) <= _FAR and 0 < h <= SIDE_LIMIT and 0 < w <= SIDE_LIMIT):
        raise UsageError("rle", "window outside the limits", expected=f"sides in 1..{SIDE_LIMIT}", found=window)
    tall, wide = size = (h, w) if size is None else size
    if not (0 < tall <= SIDE_LIMIT and 0 < wide <= SIDE_LIMIT and tall * wide <= PIXEL_LIMIT):
        raise UsageError("rle", "target size outside the limits", expected=f"sides in 1..{SIDE_LIMIT}", found=size)
    if mode not in ("nearest", "area"):
        raise UsageError("rle", "no such mode", expected="nearest or area", found=mode)
    along = samples if mode == "nearest" else places
    return Raster(
        source=source, size=size, window=window, flip=flip, mode=mode,
        rows=along(height, tall, y, h), columns=along(width, wide, x, w),
    )  # fmt: skip


_local = threading.local()
_KEPT: Final = 4 << 20
"""Entries of the largest table that a thread keeps: 16 MiB, enough for images at full size."""


def _table(length: int) -> npt.NDArray[np.uint32]:
    """This thread's table of differences, all zero."""
    table: npt.NDArray[np.uint32] | None = getattr(_local, "table", None)
    if table is None or len(table) < length:
        table = np.zeros(length, np.uint32)
        _local.table = table if length <= _KEPT else None
    return table


def _flat(out: U8 | F32, shape: tuple[int, int, int]) -> tuple[U8 | F32, int, int]:
    """`out` as one contiguous line, and the steps of masks and rows on it, in elements."""
    if out.shape != shape:
        raise UsageError("rle", "wrong shape of out", expected=shape, found=out.shape)
    if out.flags.c_contiguous and out.flags.writeable:
        return out.reshape(-1), shape[1] * shape[2], shape[2]
    step, stride, one = out.strides
    item = out.itemsize
    apart = (shape[1] == 1 or stride >= shape[2] * item) and (
        shape[0] == 1 or step >= (shape[1] - 1) * stride + shape[2] * item
    )
    if not (out.flags.writeable and one == item and apart and step % item == 0 and stride % item == 0):
        expected = "writable, contiguous along rows, rows apart from each other"
        raise UsageError("rle", "out cannot be written to", expected=expected, found=f"strides {out.strides}")
    length = (shape[0] - 1) * step + (shape[1] - 1) * stride + shape[2] * item
    line: Any = np.lib.stride_tricks.as_strided(out, (length // item,), (item,))
    return line, step // item, stride // item
