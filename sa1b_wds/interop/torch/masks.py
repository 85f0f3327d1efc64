"""Masks drawn on the device from their runs: plain torch operations, equal to the kernels of `raster` for every bit.

Pixel p of an image, counted column by column, is set in a mask if an odd number of its runs' ends are ≤ p. For a target
pixel that shows row r of source column c these are

    the ends in columns before c        looked up once for each column of the target, and
    the ends in column c at rows ≤ r    each adds 1 to the first row of the target that shows what follows it; a running
                                        sum down the rows does the rest

So an end is one addition wherever it lies in a column that is sampled at all, and the work on pixels is a sum, a copy
and an exclusive or. No loop over masks, no wait for the device: all shapes are known before.

Cost: about seven bytes of memory for each of `at_once` target pixels, and one for each of all; 512 masks at 256 × 256
in 0.1 s on one core of a CPU, which is what the kernels are for.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import UsageError
from ...format import PIXEL_LIMIT, SIDE_LIMIT

_APART = PIXEL_LIMIT + 1
"""More than any end: added i times to those of mask i, it keeps the ends of all masks rising."""


def rasterise(batch: Mapping[str, Any], size: int | tuple[int, int], *, at_once: int = 1 << 23) -> Tensor:
    """The masks of a batch with runs (`mask_mode="runs"`), uint8 0 or 1, where its tensors are.

    As the stream with `mask_mode="nearest"` makes them: row i shows source row y0 + ⌊(2i + 1)·h / 2H⌋ of the sample's
    window (y0, x0, h, w), columns alike, 0 outside the image, mirrored where the sample is.

    Args:
        batch: tensors, on any device: `run_ends`, `run_offsets`, `window`, `flip`, `original_size`, `boxes` (for its
            shape alone), and `offsets` where masks are ragged. The rest need not be there.
        size: pixels of a mask's side, or (H, W).
        at_once: bounds the memory beside the result: target pixels that are drawn together, at least one mask.

    Returns:
        (B, M, H, W), all zeros where there is no mask; (K, H, W) where masks are ragged.

    Raises:
        UsageError: a batch without runs, or a size that cannot be.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if not (1 <= height <= SIDE_LIMIT and 1 <= width <= SIDE_LIMIT):
        raise UsageError("size", "out of range", f"1 to {SIDE_LIMIT:,}", size)
    if "run_ends" not in batch:
        raise UsageError("batch", 'no runs in it: make the stream with mask_mode="runs"')
    ends, offsets = batch["run_ends"].long(), batch["run_offsets"]
    y, x, h, w = batch["window"].long().unbind(1)
    source_h, source_w = batch["original_size"].long().unbind(1)
    masks, samples = len(offsets) - 1, len(y)
    number = torch.arange(masks, device=ends.device)
    if "offsets" in batch:
        sample_of = torch.searchsorted(batch["offsets"][1:].contiguous(), number, right=True)
    else:
        sample_of = number // max(masks // max(samples, 1), 1)

    # What each row and column of the target shows, (B, H) and (B, W), not yet mirrored.
    rows, columns = _shown(y, h, height), _shown(x, w, width)
    sees_row = (rows >= 0) & (rows < source_h[:, None])
    sees_column = (columns >= 0) & (columns < source_w[:, None])
    # Columns of the target that show the same one of the source share a column of the table.
    shared = torch.zeros_like(columns)
    shared[:, 1:] = (columns.diff(dim=1) != 0).cumsum(1)

    # Ends before each column, (K, W): whether they are odd.
    mask_of = torch.repeat_interleave(number, offsets.diff(), output_size=len(ends))
    heads = columns[sample_of] * source_h[sample_of, None] + number[:, None] * _APART
    odd = (torch.searchsorted(ends + mask_of * _APART, heads) - offsets[:-1, None]).to(torch.uint8) & 1

    # Where each end goes in the table (K, H + 1, W), whose last row takes those that nothing shows.
    s = sample_of[mask_of]
    column, row = ends // source_h[s], ends % source_h[s]
    left, right = (_before(column + k, x[s], w[s], width) for k in (0, 1))
    top = torch.where(left < right, _before(row, y[s], h[s], height), height)
    place = (mask_of * (height + 1) + top) * width + shared[s, left.clamp(max=width - 1)]

    flip = batch["flip"][:, None]
    shared, sees_column = (torch.where(flip, t.flip(1), t) for t in (shared, sees_column))
    odd = torch.where(flip[sample_of], odd.flip(1), odd)
    out = torch.empty((masks, height, width), dtype=torch.uint8, device=ends.device)
    one = torch.ones(1, dtype=torch.uint8, device=ends.device).expand(len(ends))
    step = max(1, at_once // (height * width))
    for begin in range(0, masks, step):
        i = slice(begin, min(begin + step, masks))
        of = sample_of[i]
        table = torch.zeros(len(of) * (height + 1) * width, dtype=torch.uint8, device=ends.device)
        here = place - begin * (height + 1) * width
        table.scatter_add_(0, torch.where((here >= 0) & (here < len(table)), here, len(table) - 1), one)
        sums = table.view(-1, height + 1, width)[:, :height].cumsum(1, dtype=torch.uint8)  # modulo 256 is odd as well
        drawn = sums.gather(2, shared[of, None].expand(-1, height, -1)).add_(odd[i, None]).bitwise_and_(1)
        out[i] = drawn.mul_(sees_row[of, :, None]).mul_(sees_column[of, None])
    return out.view(*batch["boxes"].shape[:-1], height, width)


def _shown(origin: Tensor, span: Tensor, target: int) -> Tensor:
    """(B,) windows along one axis → (B, target), the source pixel under each centre of the target."""
    centres = 2 * torch.arange(target, device=origin.device) + 1
    return origin[:, None] + centres * span[:, None] // (2 * target)


def _before(pixel: Tensor, origin: Tensor, span: Tensor, target: int) -> Tensor:
    """How many of the target's centres lie before source pixels; as `raster.samples`."""
    return (-((span - 2 * target * (pixel - origin)) // (2 * span))).clamp(0, target)
