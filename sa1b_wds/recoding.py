"""Photographs made smaller: the same bytes on every machine, with any number of threads.

A photograph whose longest side is more than `max_side` is decoded at full size (accurate DCT, smooth chroma), brought
to its new size, and encoded again (baseline, accurate DCT, 4:2:0; grey stays grey). A pixel of the new size is the mean
of the area that it covers, computed in whole numbers and rounded half up: no library's resize, whose vector code
differs from machine to machine. libjpeg-turbo's accurate DCT gives the same with any processor's vector instructions
and without (the tests try both). `encoder` is a digest of what this machine makes of a fixed picture; it stands in the
plan, and a task on a machine that has another one refuses to begin.

EXIF and colour profiles are not kept. No orientation is applied: masks refer to the pixels as they are stored.
"""

import hashlib
import threading
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from . import images
from .errors import PlanMismatch
from .jit import jit
from .permutation import hashes
from .plan import Recoding

if TYPE_CHECKING:
    from typing_extensions import Buffer

U8 = npt.NDArray[np.uint8]
I32 = npt.NDArray[np.int32]

_KEPT = 64 << 20
"""Bytes of the largest buffer that a thread keeps."""
_local = threading.local()


def recoding(max_side: int, quality: int) -> Recoding:
    """What this machine would put into a plan."""
    return Recoding(max_side=max_side, quality=quality, encoder=encoder())


def check(wanted: Recoding) -> None:
    """Refuse to make photographs smaller in other bytes than the plan's.

    Raises:
        PlanMismatch: the JPEG library here is not the one that it was planned with, nor one that gives the same.
    """
    if encoder() != wanted.encoder:
        what = (
            f"{images.libraries()} here make other JPEGs than the plan was made with: install the versions used there"
        )
        raise PlanMismatch("--max-side", what, wanted.encoder, encoder())


@cache
def encoder() -> str:
    """16 hex digits of the SHA-256 of a fixed picture, encoded, made smaller and encoded again."""
    rows, columns = 150, 210
    coarse = hashes(rows // 10 * (columns // 10) * 3, 1, 2) >> np.uint64(57)
    fine = hashes(rows * columns * 3, 3, 4) >> np.uint64(58)
    picture = np.kron(coarse.reshape(rows // 10, columns // 10, 3), np.ones((10, 10, 1), np.uint64))
    pixels = (picture + fine.reshape(rows, columns, 3)).astype(np.uint8)
    smaller = recode(images.encode(pixels, 95), (69, 96), 90, "the fixed picture")
    return hashlib.sha256(smaller).hexdigest()[:16]


def recode(jpg: "Buffer", size: tuple[int, int], quality: int, where: str) -> bytes:
    """A photograph at a smaller size.

    Args:
        jpg: the source's file.
        size: (h, w) in pixels, neither more than the source's; see `plan.Recoding.size`.
        quality: of the new JPEG.
        where: begins the message of an error.

    Raises:
        SampleRejected: it cannot be decoded; see `images.decode`.

    Threads may call it at the same time; the GIL is dropped for everything that takes long.
    """
    head = images.header(jpg, where)
    pixels = images.decode(jpg, out=_buffer(head.height, head.width), fast=False, where=where)
    # A grey JPEG decodes to three equal channels.
    return images.encode(shrunk(pixels[:, :, : 3 if head.components > 1 else 1], *size), quality)


def _buffer(height: int, width: int) -> U8:
    """This thread's memory for decoded pixels: fresh memory costs page faults, a quarter of the time of a decode."""
    length = 3 * height * width
    buffer: U8 | None = getattr(_local, "buffer", None)
    if buffer is None or len(buffer) < length:
        buffer = np.empty(length, np.uint8)
        _local.buffer = buffer if length <= _KEPT else None
    return buffer[:length].reshape(height, width, 3)


def shrunk(pixels: U8, height: int, width: int) -> U8:
    """(h, w, c) → (height, width, c), each the mean of the area it covers, rounded half up; exact."""
    h, w, channels = pixels.shape
    out = np.empty((height, width, channels), np.uint8)
    flat = np.ascontiguousarray(pixels).reshape(h, w * channels)
    _shrink(flat, out, np.empty(w * channels, np.int32))
    return out


@jit
def _shrink(pixels: U8, out: U8, row: I32) -> None:
    """Row i of H covers i · h / H to (i + 1) · h / H: in units of 1/H, i · h to (i + 1) · h; a source row is H long.

    The weights of a target pixel add up to h · w; 255 times that is less than 2³⁶, and a quotient of two such numbers
    in float64, correctly rounded, never reaches a whole number from below.
    """
    rows, columns, channels = out.shape
    h, length = pixels.shape
    w = length // channels
    half, whole = h * w, 2.0 * h * w
    for i in range(rows):
        top, bottom = i * h, (i + 1) * h
        row[:] = 0
        for r in range(top // rows, (bottom + rows - 1) // rows):
            weight = np.int32(min(bottom, (r + 1) * rows) - max(top, r * rows))
            line = pixels[r]
            for k in range(length):
                row[k] += weight * np.int32(line[k])
        for j in range(columns):
            left, right = j * w, (j + 1) * w
            first, last = left // columns, (right - 1) // columns
            before, after = left - first * columns, (last + 1) * columns - right
            for c in range(channels):
                total = np.int64(0)
                for k in range(first * channels + c, (last + 1) * channels, channels):
                    total += row[k]
                total = total * columns - before * np.int64(row[first * channels + c])
                total -= after * np.int64(row[last * channels + c])
                out[i, j, c] = np.uint8((2 * total + half) / whole)
