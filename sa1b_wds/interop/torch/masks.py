"""Masks drawn on the device from their runs, with plain torch operations.

Pixel p of an image, counted column by column, is set in a mask if an odd number of its runs' ends are ≤ p. So the
pixels under the centres of the target's pixels are looked up in the ends of all masks at once: the ends of mask i are
moved up by i times a number larger than any pixel, which keeps them rising from mask to mask, and one binary search
does the rest. No loop over masks, no wait for the device, equal to the kernels of `raster` for every bit.

Cost: log2(R) steps for each target pixel, R being the ends of a batch, about 300 a mask; about 24 bytes of memory for
each of the `at_once` target pixels, and one for each of all.
"""

from collections.abc import Mapping
from typing import Any

import torch

from ...errors import UsageError
from ...format import PIXEL_LIMIT

_APART = PIXEL_LIMIT + 2
"""Beyond every end of a mask and every pixel, with −1 (outside the image) of the next mask still above."""


def rasterise(batch: Mapping[str, Any], size: int | tuple[int, int], *, at_once: int = 1 << 21) -> torch.Tensor:
    """The masks of a batch with runs (`mask_mode="runs"`), uint8 0 or 1, where its tensors are.

    As the stream with `mask_mode="nearest"` makes them: row i shows source row y0 + ⌊(2i + 1)·h / 2H⌋ of the sample's
    window (y0, x0, h, w), columns alike, 0 outside the image, mirrored where the sample is.

    Args:
        batch: tensors, on any device: `run_ends`, `run_offsets`, `window`, `flip`, `original_size`, `boxes` (for its
            shape alone), and `offsets` where masks are ragged. The rest need not be there.
        size: pixels of a mask's side, or (H, W).
        at_once: bounds the memory beside the result: target pixels that are looked up together, at least one mask.

    Returns:
        (B, M, H, W), all zeros where there is no mask; (K, H, W) where masks are ragged.

    Raises:
        UsageError: a batch without runs, or a size that cannot be.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if not (1 <= height <= 65_535 and 1 <= width <= 65_535):
        raise UsageError("size", "out of range", "1 to 65,535", size)
    if "run_ends" not in batch:
        raise UsageError("batch", 'no runs in it: make the stream with mask_mode="runs"')
    ends, offsets, window = batch["run_ends"], batch["run_offsets"], batch["window"].long()
    device, masks, samples = ends.device, len(offsets) - 1, len(window)
    shape = batch["boxes"].shape[:-1]
    if "offsets" in batch:
        of = torch.searchsorted(batch["offsets"][1:].contiguous(), torch.arange(masks, device=device), right=True)
    else:
        of = torch.arange(masks, device=device) // (masks // max(samples, 1) or 1)

    source_h, source_w = batch["original_size"].long().unbind(1)
    y, x, h, w = (column[:, None] for column in window.unbind(1))
    rows = y + (2 * torch.arange(height, device=device) + 1) * h // (2 * height)
    columns = x + (2 * torch.arange(width, device=device) + 1) * w // (2 * width)
    columns = torch.where(batch["flip"][:, None], columns.flip(1), columns)
    sees_row = (rows >= 0) & (rows < source_h[:, None])
    sees_column = (columns >= 0) & (columns < source_w[:, None])

    number = torch.arange(masks, device=device)
    whose = torch.repeat_interleave(number, offsets.diff(), output_size=len(ends))
    keys = ends + whose * _APART
    out = torch.empty((masks, height, width), dtype=torch.uint8, device=device)
    step = max(1, at_once // (height * width))
    for begin in range(0, masks, step):
        i = slice(begin, begin + step)
        s = of[i]
        pixel = columns[s][:, None, :] * source_h[s][:, None, None] + rows[s][:, :, None]
        pixel = torch.where(sees_row[s][:, :, None] & sees_column[s][:, None, :], pixel, -1)
        before = torch.searchsorted(keys, pixel.add_((number[i] * _APART)[:, None, None]), right=True)
        out[i] = (before - offsets[:-1][i, None, None]) & 1
    return out.view(*shape, height, width)
