"""Samples to look at: photographs with their masks, in a grid."""

import os
from collections.abc import Sequence
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from . import images
from .annotations import Annotations
from .errors import MissingPackage, SampleRejected, ShardDamaged, UsageError
from .permutation import hashes

U8 = npt.NDArray[np.uint8]
F64 = npt.NDArray[np.float64]

_OPACITY: Final = 0.5
_GAP: Final = 4
"""White pixels between two pictures."""


class Sample(Protocol):
    """What a picture is made of."""

    where: str

    @property
    def jpg(self) -> bytes: ...
    @property
    def annotations(self) -> Annotations: ...


def overlay(sample: Sample, side: int) -> U8:
    """The photograph, its longest side `side` pixels, with its masks in colours: (H, W, 3) uint8.

    Where masks overlap the smaller one is seen; each has the colour of its place among the annotations, and an outline.

    Raises:
        FormatError, ShardDamaged: the sample cannot be decoded.
    """
    a = sample.annotations
    longest = max(a.height, a.width)
    size = max(1, round(a.height * side / longest)), max(1, round(a.width * side / longest))
    try:
        pixels = images.decode(sample.jpg, size, where=sample.where)
        masks = a.masks(size)
    except SampleRejected as error:
        raise ShardDamaged(error.where, error.what, error.expected, error.found) from None
    label = np.zeros(size, np.int64)
    for i in np.argsort(-a.area, kind="stable").tolist():
        label[masks[i] > 0] = i + 1
    colours = _colours(len(a) + 1)[label]
    edge = np.zeros(size, bool)
    edge[:-1] |= label[:-1] != label[1:]
    edge[:, :-1] |= label[:, :-1] != label[:, 1:]
    share = np.where(edge, 1.0, _OPACITY) * (label > 0)
    mixed: F64 = pixels * (1 - share[:, :, None]) + colours * share[:, :, None]
    return (mixed + 0.5).astype(np.uint8)


def _colours(n: int) -> F64:
    """[n, 3] colours of full saturation; the hue of each depends on its number alone."""
    hue = hashes(n, 1).astype(np.float64) / 2.0**64 * 6
    shifted = (hue[:, None] + np.array([0, 4, 2])) % 6
    return np.asarray(255 * np.clip(np.abs(shifted - 3) - 1, 0, 1), np.float64)


def grid(samples: Sequence[Sample], columns: int, side: int) -> U8:
    """Pictures side by side on white, `columns` a row: (rows · side, columns · side, 3) uint8, gaps included."""
    if not samples or columns < 1 or side < 1:
        raise UsageError("a figure", f"{len(samples)} samples, {columns} columns of {side} pixels", "at least 1", 0)
    columns = min(columns, len(samples))
    rows = -(-len(samples) // columns)
    step = side + _GAP
    out = np.full((rows * step - _GAP, columns * step - _GAP, 3), 255, np.uint8)
    for i, sample in enumerate(samples):
        picture = overlay(sample, side)
        top = i // columns * step + (side - picture.shape[0]) // 2
        left = i % columns * step + (side - picture.shape[1]) // 2
        out[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return out


def figure(samples: Sequence[Sample], columns: int, side: int, path: str | os.PathLike[str] | None) -> Any:
    """The grid as a Pillow image, which notebooks show; saved too, where a path says so.

    Raises:
        MissingPackage: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingPackage("show_examples", "needs Pillow: pip install pillow") from error
    made = Image.fromarray(grid(samples, columns, side))
    if path is not None:
        made.save(path)
    return made
