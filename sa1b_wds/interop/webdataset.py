"""The decoder of plain WebDataset pipelines: the same arrays as a stream's, without its order, state and checks.

    wds.WebDataset("…/sa1b-train-{000000..000099}.tar").map(sa1b_wds.decoder(image_size=1024, mask_size=256))

What a plain pipeline reads, it takes for whole: a shard that is cut loses samples without a word. Sample by sample,
everything is checked that can be without an index.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..decode import DecodeCost, MaskMode, View
from ..errors import FormatError


@dataclass(frozen=True, slots=True)
class _Members:
    where: str
    image_id: int | None
    jpg: memoryview
    member: memoryview


class Decoder:
    """A function from a sample of a plain pipeline, `{"__key__", "jpg", "safetensors"}`, to its arrays; it pickles."""

    def __init__(self, view: View, seed: int, epoch: int) -> None:
        self.view, self.seed, self.epoch = view, seed, epoch

    def __call__(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """The arrays by the names of a `Batch`, without its first dimension; `key`, and `__key__` for the pipeline.

        Args:
            sample: what readers of WebDataset shards give: `__key__`, and the members by suffix, with a leading dot or
                without, as bytes, a file to read from, a uint8 array, or `{"bytes": …}`.

        Raises:
            FormatError: a member is missing, was decoded already, or is not of format version 1.
            ShardDamaged: it cannot be decoded, or its members belong to different images.
        """
        where = ": ".join(str(sample[name]) for name in ("__url__", "__key__") if name in sample)
        # Shards of annotations alone have no jpg.
        jpg = memoryview(b"") if self.view.image_size is None else _bytes(sample, "jpg", where)
        member = _bytes(sample, "safetensors", where)
        key = str(sample.get("__key__", "")).rpartition("/")[2]
        image_id = int(key[3:]) if key.startswith("sa_") and key[3:].isdecimal() else None
        layout = self.view.of_samples()
        if self.view.masks_per_image is not None:
            more = {n: ((self.view.masks_per_image, *s), d) for n, (s, d) in self.view.of_masks().items()}
            layout = {**layout, **more}
        row = {name: np.empty(shape, dtype) for name, (shape, dtype) in layout.items()}
        members = _Members(where, image_id, jpg, member)
        masks = self.view.decode(members, row, self.seed, self.epoch, DecodeCost())
        of_masks = {name: array for name, array in masks.items() if name not in row}
        return {"__key__": key, "key": key, **row, **of_masks}


def _bytes(sample: Mapping[str, Any], suffix: str, where: str) -> memoryview:
    value = sample.get(suffix, sample.get(f".{suffix}"))
    if isinstance(value, Mapping):
        value = value.get("bytes")
    if value is None:
        raise FormatError(where, "a member is missing", suffix, ", ".join(map(str, sample)))
    if hasattr(value, "read") and not hasattr(value, "convert"):
        value.seek(0)
        value = value.read()
    try:
        return memoryview(value).cast("B")
    except TypeError:
        what = f"{suffix} was decoded already: take the decoder out of the pipeline, or decode=False"
        raise FormatError(where, what, "its bytes", type(value).__name__) from None


def decoder(
    *,
    image_size: int | None = 1024,
    mask_size: int | None = 256,
    masks_per_image: int | None = 64,
    mask_mode: MaskMode = "nearest",
    min_area: int = 0,
    max_area_fraction: float = 1.0,
    min_predicted_iou: float = 0.0,
    min_stability_score: float = 0.0,
    flip: float = 0.0,
    scale: tuple[float, float] = (1.0, 1.0),
    seed: int = 0,
    epoch: int = 0,
) -> Decoder:
    """A function from a sample of a plain WebDataset pipeline to its arrays; the options are those of `Stream`."""
    view = View.of(
        image_size=image_size,
        mask_size=mask_size,
        masks_per_image=masks_per_image,
        mask_mode=mask_mode,
        min_area=min_area,
        max_area_fraction=max_area_fraction,
        min_predicted_iou=min_predicted_iou,
        min_stability_score=min_stability_score,
        flip=flip,
        scale=scale,
    )
    return Decoder(view, seed, epoch)
