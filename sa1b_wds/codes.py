"""Kernels for COCO's run-length strings, one character after the other.

A mask of (h, w) pixels is read column by column; its runs alternate between 0 and 1 and begin with 0 (a first run of
length 0 where pixel (0, 0) is set). The string holds each run as a little-endian base-32 number in two's complement,
five bits a character, `48 + digit + 32 if more digits follow`; from the fourth run on, what is written is the
difference to the run two before (`rleToString` and `rleFrString` of COCO's maskApi.c).

Here a number has at most `MAX_DIGITS` characters: 30 bits hold every run and every difference within the limits, and
COCO's own reader shifts into undefined behaviour beyond them. Runs of length 0 in the middle and superfluous digits
are accepted.

No kernel trusts the bytes it is given: each checks before it reads, and says by a code what is wrong.
"""

from typing import Any, Final

import numpy as np

from .format import PIXEL_LIMIT
from .jit import inline, jit

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
        if run > PIXEL_LIMIT:
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
    if run > PIXEL_LIMIT:
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
def scan_all(counts: Any, offsets: Any, pixels: int, areas: Any) -> tuple[int, int, int]:
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
def boxes_all(counts: Any, offsets: Any, height: int, width: int, out: Any) -> tuple[int, int, int]:
    """Boxes of all strings; the result as that of `scan_all`."""
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
def ends_all(counts: Any, offsets: Any, index: Any, pixels: int, out: Any, places: Any) -> tuple[int, int]:
    """Where the runs of masks `index` end, one mask after the other; (number of masks, 0), or (which of it, code).

    Args:
        out: int32 with room for one a character of the chosen strings.
        places: int64 [k + 1], where each mask's ends begin in `out`, and where the last one's end.
    """
    n = 0
    places[0] = 0
    for m in range(len(index)):
        i = index[m]
        if i < 0 or i >= len(offsets) - 1 or not inside(offsets, i, len(counts)):
            return m, BAD_OFFSETS
        at: int = offsets[i]
        end: int = offsets[i + 1]
        total = 0
        zeros = 0
        ones = 0
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
            out[np.uint64(n)] = total
            n += 1
            if at >= end:
                break
            ones, at = next_run(counts, at, end, ones)
            if at < 0:
                return m, at
            total += ones
            if total > pixels:
                return m, BAD_SUM
            out[np.uint64(n)] = total
            n += 1
        if total != pixels:
            return m, BAD_SUM
        places[m + 1] = n
    return len(index), 0


@jit
def split(text: Any, out: Any) -> tuple[int, int, int]:
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
def join(runs: Any, out: Any) -> int:
    """The string of `runs` into `out`, which has room for MAX_DIGITS characters a run; its length, or an error code."""
    at = 0
    for i in range(len(runs)):
        value = runs[i]
        if value < 0:
            return NEGATIVE
        if value > PIXEL_LIMIT:
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


@inline
def _differ(mask: Any, y: int, x: int, stop: int) -> bool:
    """Whether two rows of a mask may differ in columns x..stop; a loop without branches, which is compiled to SIMD."""
    differ = 0
    for k in range(x, stop):
        differ |= mask[np.uint64(y), np.uint64(k)] ^ mask[np.uint64(y - 1), np.uint64(k)]
    return differ != 0


@jit
def changes(mask: Any, ends: Any, places: Any) -> int:
    """Where each column of a mask (h, w) changes: its rows y, with mask[y] != mask[y - 1] as truth values, rising.

    Column x has its own in places[ends[x - 1] : ends[x]] (from 0 for the first). Returns how many there are; where
    `places` has no room for them, it is left alone. The walk goes row by row, so that no transposed copy is needed.
    """
    height, width = mask.shape
    ends[:] = 0
    for y in range(1, height):
        for x in range(0, width, 64):
            stop = min(x + 64, width)
            if _differ(mask, y, x, stop):
                for k in range(x, stop):
                    ends[k] += (mask[y, k] != 0) != (mask[y - 1, k] != 0)
    total = 0
    for x in range(width):
        here = ends[x]
        ends[x] = total
        total += here
    if total > len(places):
        return total
    for y in range(1, height):
        for x in range(0, width, 64):
            stop = min(x + 64, width)
            if _differ(mask, y, x, stop):
                for k in range(x, stop):
                    if (mask[y, k] != 0) != (mask[y - 1, k] != 0):
                        places[ends[k]] = y
                        ends[k] += 1
    return total


@jit
def mask_runs(mask: Any, ends: Any, places: Any, out: Any) -> int:
    """Runs of a mask (h, w) from what `changes` gave; `out` has room for all places, and w + 1 more. Their number."""
    height, width = mask.shape
    n = 0
    before = 0
    value = False
    at = 0
    for x in range(width):
        top = mask[0, x] != 0
        if top != value:
            out[n] = x * height - before
            n += 1
            before = x * height
            value = top
        while at < ends[x]:
            here = x * height + places[at]
            out[n] = here - before
            n += 1
            before = here
            value = not value
            at += 1
    out[n] = width * height - before
    return n + 1
