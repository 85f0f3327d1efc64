"""Which annotations of an image are used, decided from the columns alone: nothing is rasterised that is not chosen."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .annotations import Annotations
from .augment import Frame, first_points
from .errors import UsageError
from .permutation import permutation

I64 = npt.NDArray[np.int64]

CHOICE = 2  # what the hash is for; augmentation has a number of its own


@dataclass(frozen=True, kw_only=True, slots=True)
class Filter:
    """What an annotation must be to be used."""

    min_area: int = 0
    """Pixels of the source."""
    max_area_fraction: float = 1.0
    """Of the image."""
    min_predicted_iou: float = 0.0
    min_stability_score: float = 0.0

    def __post_init__(self) -> None:
        for name in ("max_area_fraction", "min_predicted_iou", "min_stability_score"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(name, "out of range", "0 to 1", getattr(self, name))
        if self.min_area < 0:
            raise UsageError("min_area", "out of range", "at least 0", self.min_area)

    @property
    def is_none(self) -> bool:
        return self == Filter()

    def passing(self, a: Annotations, frame: Frame) -> I64:
        """Rising indices of the annotations that pass, and whose point lies in the window where an image is cropped."""
        keep = np.ones(len(a), np.bool_)
        if not self.is_none:
            keep = (
                (a.area >= self.min_area)
                & (a.area <= self.max_area_fraction * a.height * a.width)
                & (a.predicted_iou >= self.min_predicted_iou)
                & (a.stability_score >= self.min_stability_score)
            )
        if not frame.is_whole:
            keep &= frame.inside(first_points(a.point_coords))
        return np.flatnonzero(keep)


def choose(passing: I64, most: int | None, seed: int, epoch: int, image_id: int) -> I64:
    """At most `most` of them, in their order: at random, but the same for the same (seed, epoch, image)."""
    if most is None or len(passing) <= most:
        return passing
    return passing[np.sort(permutation(len(passing), seed, epoch, image_id, CHOICE)[:most])]
