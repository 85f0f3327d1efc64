"""A batch: a few contiguous arrays on one piece of memory that is used again.

The arrays belong to whoever holds them, for as long as they are held. When the last view on a batch is gone (torch's
tensors that share its memory included), its memory serves a later batch: so a loop that lets go of each batch writes to
the same few pages all the time, and one that collects batches gets new memory for each.
"""

import contextlib
import mmap
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

Layout = Mapping[str, tuple[tuple[int, ...], "npt.DTypeLike"]]
"""(shape, dtype) of each array."""

U8 = npt.NDArray[np.uint8]

_ALIGN = 4096


class Batch(TypedDict, total=False):
    """B samples. M is `masks_per_image`, S `image_size`, m `mask_size`.

    With `masks_per_image=None` the arrays of masks have no (B, M) in front but (K,), the masks of all samples end to
    end, `offsets` says whose they are, and there is no `valid`.
    """

    image: npt.NDArray[np.uint8]
    """(B, S, S, 3) RGB, longest side S, black at the bottom and on the right. Not with `image_size=None`."""
    masks: npt.NDArray[Any]
    """(B, M, m, m) uint8 0 or 1, or float32 covered fraction, over the padded square. Not with `mask_size=None`."""
    run_ends: npt.NDArray[np.int32]
    """(R,) only with `mask_mode="runs"`, which has no `masks`: where the runs of all B · M masks (of all K) end, one
    mask after the other, in pixels of the original counted column by column; see `rle.ends`."""
    run_offsets: npt.NDArray[np.int64]
    """(B · M + 1,) or (K + 1,): mask i has the ends run_offsets[i] to run_offsets[i + 1], none without a mask."""
    window: npt.NDArray[np.int32]
    """(B, 4) only with `mask_mode="runs"`: y0, x0, h, w, the part of the original that `image` and masks show, in its
    pixels; it may reach outside."""
    flip: npt.NDArray[np.bool_]
    """(B,) only with `mask_mode="runs"`: whether they show it mirrored."""
    valid: npt.NDArray[np.bool_]
    """(B, M) which places hold a mask; all others are zeros."""
    offsets: npt.NDArray[np.int64]
    """(B + 1,) only with `masks_per_image=None`: sample b has the masks offsets[b] to offsets[b + 1]."""
    boxes: npt.NDArray[np.float32]
    """(B, M, 4) x0, y0, x1, y1 in the pixels of `image`."""
    points: npt.NDArray[np.float32]
    """(B, M, 2) x, y in the pixels of `image`: the point that SA-1B's model was prompted with."""
    area: npt.NDArray[np.int64]
    """(B, M) pixels of the original image."""
    predicted_iou: npt.NDArray[np.float32]
    """(B, M)"""
    stability_score: npt.NDArray[np.float32]
    """(B, M)"""
    annotation_id: npt.NDArray[np.int64]
    """(B, M)"""
    size: npt.NDArray[np.int32]
    """(B, 2) h, w of the picture inside `image`, without the black."""
    original_size: npt.NDArray[np.int32]
    """(B, 2) h, w of the original image."""
    key: list[str]
    """B keys, `sa_<id>`."""
    is_padding: npt.NDArray[np.bool_]
    """(B,) true for repeats: those that fill the last batch, or the place of a sample that was skipped."""
    step: npt.NDArray[np.int64]
    """(2,) epoch, and number of the batch in its leg; what `state_dict(after=batch)` looks at."""


class _Lease:
    """A piece of memory that goes back to its pool when nobody looks at it any more."""

    def __init__(self, pool: "Memory", piece: U8) -> None:
        self._pool, self.piece = pool, piece
        address = piece.__array_interface__["data"]
        # numpy keeps this object alive for as long as any array on it lives.
        self.__array_interface__ = {"shape": piece.shape, "typestr": "|u1", "data": address, "version": 3}

    def __del__(self) -> None:
        self._pool.give(self.piece)


def piece_of(array: npt.NDArray[Any]) -> U8 | None:
    """The whole piece of memory that an array of a batch lies on, as it was allocated; None for any other array."""
    base: object = array
    while isinstance(base, np.ndarray):
        base = base.base
    return base.piece if isinstance(base, _Lease) else None


def _fresh(size: int) -> U8:
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError, AttributeError):  # not every kernel has them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


class Memory:
    """Pieces of memory of any size, those given back last first."""

    def __init__(self, keep: int, allocate: Callable[[int], U8] = _fresh) -> None:
        """
        Args:
            keep: how many unused pieces may lie around. 0 where the last view is not the last use: memory that a
                device or another process still reads is for its own allocator to use again.
            allocate: bytes → an array of so many, contiguous, whose address is a multiple of 64 (page-locked memory,
                shared memory).
        """
        self._keep, self._allocate = keep, allocate
        self._free: list[U8] = []
        # Reentrant: a lease may die, and give back, while this thread is inside.
        self._lock = threading.RLock()

    def arrays(self, layout: Layout) -> dict[str, npt.NDArray[Any]]:
        """Arrays of undefined content, side by side on one piece of memory."""
        places, end = {}, 0
        for name, (shape, dtype) in layout.items():
            size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
            places[name] = end, size
            end += -(-size // _ALIGN) * _ALIGN
        flat = np.asarray(_Lease(self, self._take(max(end, _ALIGN))))
        return {
            name: flat[begin : begin + size].view(layout[name][1]).reshape(layout[name][0])
            for name, (begin, size) in places.items()
        }

    def _take(self, size: int) -> U8:
        with self._lock:
            for i in range(len(self._free) - 1, -1, -1):
                if size <= len(self._free[i]) <= size + size // 2:
                    return self._free.pop(i)
        return self._allocate(size)

    def give(self, piece: U8) -> None:
        """A piece that nobody uses any more."""
        with self._lock:
            self._free.append(piece)
            if len(self._free) > self._keep:
                del self._free[0]

    @property
    def unused(self) -> int:
        """Pieces that wait to be used again."""
        return len(self._free)
