"""How an image is seen in a batch: which square of it, whether mirrored, and where its pixels, boxes and points go.

An image of (h, w) pixels is looked at through a square window of `side` source pixels with its corner at (top, left);
it may reach outside the image, where everything is black. The window becomes the batch's S × S image and m × m masks; a
flip mirrors the result. Black lies at the bottom and on the right, after a flip too, for which `left` may be negative.
Without augmentation the window is the image padded to a square: corner (0, 0), side its longest.

Boxes and points name pixels: (x, y) of the source is (u · S / side, v · S / side) in the batch's image, with
v = y − top, and u = x − left, or side − 1 − (x − left) after a flip.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import UsageError
from .format import SIDE_LIMIT
from .permutation import hashes

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

AUGMENT = 1  # what the hash is for; masks have a number of their own


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """The window through which one image is seen."""

    height: int
    """Of the source, pixels."""
    width: int
    top: int
    """First row of the window, ≥ 0."""
    left: int
    """First column of the window; negative where a flip brings what lies outside to the right."""
    side: int
    """Source pixels the window is high and wide."""
    flip: bool
    """Whether what is seen is mirrored."""

    @property
    def window(self) -> tuple[int, int, int, int]:
        """y0, x0, h, w in source pixels."""
        return self.top, self.left, self.side, self.side

    @property
    def visible(self) -> tuple[int, int, int, int]:
        """y0, x0, h, w of the part of the image in the window."""
        y0, x0 = self.top, max(self.left, 0)
        return y0, x0, min(self.height, self.top + self.side) - y0, min(self.width, self.left + self.side) - x0

    @property
    def is_whole(self) -> bool:
        """Whether all of the image is inside."""
        return self.visible == (0, 0, self.height, self.width)

    def size(self, pixels: int) -> tuple[int, int]:
        """Rows and columns of the visible part where the window becomes `pixels` × `pixels`: rounded half up, ≥ 1."""
        _, _, h, w = self.visible
        double = 2 * self.side
        return max(1, (2 * h * pixels + self.side) // double), max(1, (2 * w * pixels + self.side) // double)

    def boxes(self, bbox: F64, pixels: int) -> F32:
        """(n, 4) x, y, w, h in source pixels → x0, y0, x1, y1 in the pixels of the batch's image, cut at its edges."""
        x0, y0 = bbox[:, 0] - self.left, bbox[:, 1] - self.top
        x1, y1 = x0 + bbox[:, 2], y0 + bbox[:, 3]
        if self.flip:
            x0, x1 = self.side - 1 - x1, self.side - 1 - x0
        corners = np.stack([x0, y0, x1, y1], axis=1)
        return np.clip(corners * pixels / self.side, 0, pixels).astype(np.float32)

    def points(self, points: F64, pixels: int) -> F32:
        """(n, 2) x, y in source pixels → in the pixels of the batch's image."""
        return (self._moved(points) * pixels / self.side).astype(np.float32)

    def inside(self, points: F64) -> npt.NDArray[np.bool_]:
        """(n,) whether points x, y in source pixels lie in the window."""
        x, y = self._moved(points).T
        return np.asarray((x >= 0) & (x < self.side) & (y >= 0) & (y < self.side))

    def _moved(self, points: F64) -> F64:
        u = points[:, 0] - self.left
        return np.stack([self.side - 1 - u if self.flip else u, points[:, 1] - self.top], axis=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Augment:
    """Random changes of what is seen; the same for the same (seed, epoch, image)."""

    flip: float = 0.0
    """Chance that an image is mirrored."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Zoom, uniform between the two: the image's longest side becomes scale · S; what is larger than the batch's image
    is cropped at random, what is smaller is padded (Ghiasi et al. 2021, large scale jittering)."""

    def __post_init__(self) -> None:
        if not 0 <= self.flip <= 1:
            raise UsageError("flip", "not a chance", "0 to 1", self.flip)
        if len(self.scale) != 2 or not 0.01 <= self.scale[0] <= self.scale[1] <= 100:
            raise UsageError("scale", "not a range", "(low, high) between 0.01 and 100", self.scale)

    @property
    def is_none(self) -> bool:
        """Whether nothing is ever changed."""
        return self.flip == 0 and tuple(self.scale) == (1.0, 1.0)

    def frame(self, height: int, width: int, seed: int, epoch: int, image_id: int) -> Frame:
        """The window for an image of this size."""
        longest = max(height, width)
        if self.is_none:
            return frame(height, width)
        # The upper 53 bits: an exact double in [0, 1).
        mirror, zoom, down, right = ((hashes(4, seed, epoch, image_id, AUGMENT) >> np.uint64(11)) / 2.0**53).tolist()
        low, high = self.scale
        side = min(max(1, int(longest / (low + zoom * (high - low)) + 0.5)), SIDE_LIMIT)
        top, left = int(down * (max(height - side, 0) + 1)), int(right * (max(width - side, 0) + 1))
        return frame(height, width, top=top, left=left, side=side, flip=mirror < self.flip)


def frame(
    height: int, width: int, *, top: int = 0, left: int = 0, side: int | None = None, flip: bool = False
) -> Frame:
    """The window at (top, left) of an image, by default all of it padded to a square; black goes to the right."""
    side = max(height, width) if side is None else side
    if flip:
        left = min(left + side, width) - side
    return Frame(height=height, width=width, top=top, left=left, side=side, flip=flip)


def first_points(point_coords: npt.NDArray[Any]) -> F64:
    """(n, p, 2) → (n, 2), the first point of each annotation; (0, 0) where p is 0."""
    if point_coords.shape[1] == 0:
        return np.zeros((len(point_coords), 2))
    return point_coords[:, 0]
