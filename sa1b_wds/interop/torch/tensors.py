"""The arrays of a batch as tensors on the same memory, and that memory page-locked or shared where it helps.

Decode threads write each batch straight to the memory that the tensors lie on, so there is nothing to copy before it
goes to a device or to another process: page-locked for the one, shared for the other. Such memory is never used again
by this project: a device may still read it when Python has let go of the tensors, and only torch's allocator knows.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ...batch import U8, Batch, Memory, piece_of


def tensors(batch: Batch | Mapping[str, Any]) -> dict[str, Any]:
    """The batch with tensors for arrays, nothing copied; keys and dtypes as they are, `key` a list of str.

    `image` becomes (B, 3, S, S) in channels-last memory format, which is how its pixels lie; all other shapes stay.
    """
    out: dict[str, Any] = {}
    for name, value in batch.items():
        out[name] = _tensor(value) if isinstance(value, np.ndarray) else value
    if "image" in out:
        out["image"] = out["image"].permute(0, 3, 1, 2)
    return out


def page_locked() -> Memory:
    """Memory that a GPU can read by itself."""
    return Memory(keep=0, allocate=lambda size: _array(torch.empty(size, dtype=torch.uint8, pin_memory=True)))


def shared() -> Memory:
    """Memory that goes to another process as a file descriptor."""

    def allocate(size: int) -> U8:
        # Not share_memory_(), which would copy fresh memory to shared memory; torch's own collate does the same.
        storage = torch.UntypedStorage._new_shared(size, device="cpu")
        return _array(torch.empty(0, dtype=torch.uint8).set_(storage))

    return Memory(keep=0, allocate=allocate)


def _array(tensor: torch.Tensor) -> U8:
    array: U8 = tensor.numpy()
    return array


def _tensor(array: np.ndarray[Any, Any]) -> torch.Tensor:
    piece = piece_of(array)
    whole = None if piece is None else piece.base
    if piece is None or not isinstance(whole, torch.Tensor):
        return torch.from_numpy(array)
    # A view of torch's own tensor: only of its own memory does torch know when a device has read it.
    begin = array.__array_interface__["data"][0] - piece.__array_interface__["data"][0]
    dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
    return whole[begin : begin + array.nbytes].view(dtype).view(array.shape)
