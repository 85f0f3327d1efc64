"""Packed sample → arrays: what a batch holds of it, decoded at the size it is wanted.

Choose first, decode after: the columns say which masks are used; only those are rasterised, straight at `mask_size`.
"""

from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from . import images, rle
from .annotations import Annotations, unpack
from .augment import Augment, Frame, first_points
from .batch import Layout
from .choice import Filter, choose
from .errors import SampleRejected, ShardDamaged, UsageError

I64 = npt.NDArray[np.int64]
Arrays = dict[str, npt.NDArray[Any]]

MaskMode = Literal["nearest", "area", "runs"]

OF_MASKS = ("masks", "boxes", "points", "area", "predicted_iou", "stability_score", "annotation_id")
"""The keys of a batch that have a row for each mask."""


@dataclass(slots=True)
class DecodeCost:
    """What decoding took in one thread, in seconds, and how much it was."""

    unpack: float = 0.0
    image: float = 0.0
    masks: float = 0.0
    samples: int = 0
    drawn: int = 0
    """Masks."""


class Members(Protocol):
    """A sample's two members, read."""

    @property
    def where(self) -> str:
        """For messages."""

    @property
    def image_id(self) -> int | None:
        """What its key says; None where it says nothing."""

    @property
    def jpg(self) -> memoryview: ...
    @property
    def member(self) -> memoryview:
        """The packed annotations."""


@dataclass(frozen=True, kw_only=True)
class View:
    """How samples are seen: the options of a stream that have no part in its order."""

    image_size: int | None = 1024
    """Pixels of the longest side; None: no images, boxes and points in pixels of the original."""
    mask_size: int | None = 256
    """Pixels of a mask's side; None: no masks."""
    masks_per_image: int | None = 64
    """At most, chosen at random; None: all that pass, ragged."""
    mask_mode: MaskMode = "nearest"
    """`nearest`: uint8 0 or 1; `area`: float32 covered fraction; `runs`: no masks but what draws them, see `Batch`."""
    filter: Filter = field(default_factory=Filter)
    augment: Augment = field(default_factory=Augment)

    def __post_init__(self) -> None:
        for name, limit in (("image_size", 16_384), ("mask_size", 16_384), ("masks_per_image", 1 << 20)):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | np.integer) and 1 <= value <= limit):
                raise UsageError(name, "out of range", f"1 to {limit:,}, or None", value)
        if self.mask_mode not in ("nearest", "area", "runs"):
            raise UsageError("mask_mode", "no such mode", "nearest, area or runs", self.mask_mode)

    @property
    def has_runs(self) -> bool:
        """Whether samples have runs instead of masks."""
        return self.mask_mode == "runs" and self.mask_size is not None

    @classmethod
    def of(
        cls,
        *,
        min_area: int = 0,
        max_area_fraction: float = 1.0,
        min_predicted_iou: float = 0.0,
        min_stability_score: float = 0.0,
        flip: float = 0.0,
        scale: tuple[float, float] = (1.0, 1.0),
        **view: Any,
    ) -> "View":
        """A view by the flat options of the surface."""
        chosen = Filter(
            min_area=min_area,
            max_area_fraction=max_area_fraction,
            min_predicted_iou=min_predicted_iou,
            min_stability_score=min_stability_score,
        )
        return cls(filter=chosen, augment=Augment(flip=flip, scale=scale), **view)

    def of_masks(self) -> Layout:
        """(shape, dtype) of each array's row for one mask."""
        layout: dict[str, tuple[tuple[int, ...], npt.DTypeLike]] = {}
        if self.mask_size is not None and self.mask_mode != "runs":
            layout["masks"] = (self.mask_size, self.mask_size), np.uint8 if self.mask_mode == "nearest" else np.float32
        return layout | {
            "boxes": ((4,), np.float32),
            "points": ((2,), np.float32),
            "area": ((), np.int64),
            "predicted_iou": ((), np.float32),
            "stability_score": ((), np.float32),
            "annotation_id": ((), np.int64),
        }

    def of_samples(self) -> Layout:
        """(shape, dtype) of each array's row for one sample, without those that have rows for masks."""
        layout: dict[str, tuple[tuple[int, ...], npt.DTypeLike]] = {}
        if self.image_size is not None:
            layout["image"] = (self.image_size, self.image_size, 3), np.uint8
        if self.masks_per_image is not None:
            layout["valid"] = (self.masks_per_image,), np.bool_
        if self.has_runs:
            layout |= {"window": ((4,), np.int32), "flip": ((), np.bool_)}
        return layout | {"size": ((2,), np.int32), "original_size": ((2,), np.int32)}

    def layout(self, batch: int) -> Layout:
        """(shape, dtype) of the arrays of a batch; without those of masks where they are ragged."""
        rows = {name: ((batch, *shape), dtype) for name, (shape, dtype) in self.of_samples().items()}
        if self.masks_per_image is None:
            return rows
        masks = {n: ((batch, self.masks_per_image, *shape), dtype) for n, (shape, dtype) in self.of_masks().items()}
        return rows | masks

    def decode(self, sample: Members, row: Arrays, seed: int, epoch: int, cost: DecodeCost) -> Arrays:
        """Decode a sample into `row`, its part of every array of a batch; every byte of them is written.

        Returns:
            The arrays of its masks, by themselves: parts of `row`, or new ones where masks are ragged. With runs also
            `run_ends` and `run_offsets`, the latter as long as `row` has places for masks, and one more.

        Raises:
            FormatError, ShardDamaged: it cannot be decoded.
        """
        begin = perf_counter()
        try:
            a = unpack(sample.member, sample.where)
            if sample.image_id is not None and a.image_id != sample.image_id:
                raise ShardDamaged(sample.where, "annotations of another image", sample.image_id, a.image_id)
            frame = self.augment.frame(a.height, a.width, seed, epoch, a.image_id)
            chosen = choose(self.filter.passing(a, frame), self.masks_per_image, seed, epoch, a.image_id)
            masks = self._columns(a, frame, chosen, row)
            between = perf_counter()
            if self.image_size is not None:
                self._image(sample, a, frame, row["image"])
            after = perf_counter()
            if self.has_runs:
                masks |= self._runs(a, chosen)
            elif self.mask_size is not None:
                self._masks(a, frame, chosen, masks["masks"])
        except SampleRejected as error:
            where = f"{sample.where}: {error.where}" if error.where else sample.where
            raise ShardDamaged(where, error.what, error.expected, error.found) from error
        cost.unpack += between - begin
        cost.image += after - between
        cost.masks += perf_counter() - after
        cost.samples += 1
        cost.drawn += len(chosen) if self.mask_size is not None else 0
        return masks

    def _columns(self, a: Annotations, frame: Frame, chosen: I64, row: Arrays) -> Arrays:
        pixels = frame.side if self.image_size is None else self.image_size
        k = len(chosen)
        if self.masks_per_image is None:
            masks = {name: np.empty((k, *shape), dtype) for name, (shape, dtype) in self.of_masks().items()}
        else:
            masks = {name: row[name][:k] for name in self.of_masks()}
            for name in masks:
                row[name][k:] = 0
            row["valid"][:k], row["valid"][k:] = True, False
        masks["boxes"][:] = frame.boxes(a.bbox[chosen], pixels)
        masks["points"][:] = frame.points(first_points(a.point_coords)[chosen], pixels)
        for name, column in (("area", a.area), ("annotation_id", a.id)):
            masks[name][:] = column[chosen]
        for name, scores in (("predicted_iou", a.predicted_iou), ("stability_score", a.stability_score)):
            masks[name][:] = scores[chosen]
        row["size"][:] = frame.size(pixels)
        row["original_size"][:] = a.height, a.width
        if self.has_runs:
            row["window"][:], row["flip"][...] = frame.window, frame.flip
        return masks

    def _image(self, sample: Members, a: Annotations, frame: Frame, out: npt.NDArray[np.uint8]) -> None:
        head = images.header(sample.jpg)
        if (head.height, head.width) != a.jpg_size:
            expected, found = "{} x {}".format(*a.jpg_size), f"{head.height} x {head.width}"
            raise ShardDamaged(sample.where, "a JPEG of another size than its annotations say", expected, found)
        h, w = frame.size(len(out))
        out[h:] = 0
        out[:h, w:] = 0
        of = None if a.stored_size is None else (a.height, a.width)
        images.decode(sample.jpg, (h, w), out=out[:h, :w], window=frame.visible, flip=frame.flip, of=of)

    def _masks(self, a: Annotations, frame: Frame, chosen: I64, out: npt.NDArray[Any]) -> None:
        counts, offsets, index = _strings(a, chosen)
        rle.decode(
            counts, offsets, (a.height, a.width), out.shape[1:],
            index=index, out=out, window=frame.window, flip=frame.flip,
            mode="area" if self.mask_mode == "area" else "nearest",
        )  # fmt: skip

    def _runs(self, a: Annotations, chosen: I64) -> Arrays:
        counts, offsets, index = _strings(a, chosen)
        ends, places = rle.ends(counts, offsets, a.height, a.width, index=index)
        more = 0 if self.masks_per_image is None else self.masks_per_image - len(chosen)
        return {"run_ends": ends, "run_offsets": np.pad(places, (0, more), mode="edge")}


def _strings(a: Annotations, chosen: I64) -> tuple[npt.NDArray[np.uint8], I64, I64]:
    """(counts, offsets, index) of the chosen masks in the image's size; strings of other sizes are brought to it."""
    if a.size is None:
        return a.counts, a.offsets, chosen
    texts = []
    for i in chosen.tolist():
        own = (int(a.size[i, 0]), int(a.size[i, 1]))
        texts.append(rle.encode(rle.decode(a.counts, a.offsets, own, (a.height, a.width), index=[i])[0]))
    offsets = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    return np.frombuffer(b"".join(texts), np.uint8), offsets, np.arange(len(texts))
