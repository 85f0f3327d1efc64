"""A sample in the form that TensorFlow Datasets gives: every key, dtype, shape and value of `segment_anything`.

What `tfds.as_numpy(tfds.load("segment_anything"))` yields for the same image, without TensorFlow. The arithmetic is
that of its builder (`segment_anything_dataset_builder.py`) and of the records in between:

- boxes: `[y / H, x / W, (y + h) / H, (x + w) / W]`, each computed in float64 and rounded to float32 once;
- points and scores are declared float64, but tf.Example has float32 lists only: `float64(float32(v))`;
- the image is decoded as TensorFlow does, with libjpeg-turbo's fast DCT and smooth chroma (`images.tfds_image`).

Held against the real builder by `scripts/oracle/tfds`.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from . import images
from .annotations import Annotations
from .errors import FormatError, SampleRejected, ShardDamaged

if TYPE_CHECKING:
    from typing_extensions import Buffer

Example = dict[str, dict[str, Any]]

FEATURES: Final[dict[str, dict[str, Any]]] = {
    "annotations": {
        "area": ("uint64", (None,)),
        "bbox": ("float32", (None, 4)),
        "crop_box": ("float32", (None, 4)),
        "id": ("uint64", (None,)),
        "point_coords": ("float64", (None, 1, 2)),
        "predicted_iou": ("float64", (None,)),
        "segmentation": {
            "counts": ("string", (None,)),
            "size": ("uint64", (None, 2)),
        },
        "stability_score": ("float64", (None,)),
    },
    "image": {
        "content": ("uint8", (None, None, 3)),
        "file_name": ("string", ()),
        "height": ("uint64", ()),
        "image_id": ("uint64", ()),
        "width": ("uint64", ()),
    },
}
"""The feature structure of TFDS' `segment_anything`: (dtype, shape) of every key; None where lengths differ."""


class Sample(Protocol):
    """What an example is made of."""

    where: str

    @property
    def jpg(self) -> bytes: ...
    @property
    def annotations(self) -> Annotations: ...


class Samples(Protocol):
    """A data set."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Any]: ...
    def __getitem__(self, index: Any, /) -> Any: ...
    def take(self, n: int) -> Any: ...


class Examples:
    """What `tfds.as_numpy(tfds.load("segment_anything", split=…))` gives: iterate over it as often as you like."""

    features = FEATURES

    def __init__(self, samples: Samples) -> None:
        self._samples = samples

    def __repr__(self) -> str:
        return f"Examples({self._samples!r})"

    def __len__(self) -> int:
        return len(self._samples)

    def __iter__(self) -> Iterator[Example]:
        for sample in self._samples:
            yield as_tfds(sample)

    def __getitem__(self, index: int | str) -> Example:
        """The i-th example, or that of a key."""
        return as_tfds(self._samples[index])

    def take(self, n: int) -> "Examples":
        """The first n examples."""
        return Examples(self._samples.take(n))


def as_tfds(sample: Sample) -> Example:
    """One sample as TFDS gives it; see `example`.

    Raises:
        FormatError: what TFDS' builder refuses as well.
        ShardDamaged: it cannot be decoded.
    """
    return example(sample.jpg, sample.annotations, sample.where)


def example(jpg: "Buffer", a: Annotations, where: str) -> Example:
    """One sample as TFDS gives it: the keys of `FEATURES`.

    Scalars are numpy scalars, `file_name` is bytes, `counts` an object array [n] of bytes; boxes are
    `[ymin, xmin, ymax, xmax]` as shares of height and width.

    Args:
        jpg: the image's file.
        a: its annotations.
        where: the sample, for messages.

    Raises:
        FormatError: what TFDS' builder refuses as well: other than one point a mask, a box outside 0..1 or inside out,
            a negative id or area. A photograph that was made smaller.
        ShardDamaged: a JPEG that cannot be decoded.
    """
    if a.stored_size is not None:
        what = "TFDS has the photograph at its full size, and this one was made smaller (--max-side)"
        raise FormatError(where, what, f"{a.height} x {a.width}", "{} x {}".format(*a.stored_size))
    n, points = a.point_coords.shape[:2]
    if points != 1:
        raise FormatError(where, "TFDS has exactly one point a mask", 1, points)
    offsets, counts = a.offsets.tolist(), a.counts.tobytes()
    strings = np.empty(n, object)
    strings[:] = [counts[i:j] for i, j in pairwise(offsets)]
    size = np.tile(np.array([a.height, a.width], np.int64), (n, 1)) if a.size is None else a.size
    annotations = {
        "area": _unsigned(a.area, where, "area"),
        "bbox": _boxes(a.bbox, a, where, "bbox"),
        "crop_box": _boxes(a.crop_box, a, where, "crop_box"),
        "id": _unsigned(a.id, where, "id"),
        "point_coords": _single(a.point_coords),
        "predicted_iou": _single(a.predicted_iou),
        "segmentation": {"counts": strings, "size": size.astype(np.uint64)},
        "stability_score": _single(a.stability_score),
    }
    try:
        content = images.tfds_image(jpg, where)
    except SampleRejected as error:
        raise ShardDamaged(error.where, error.what, error.expected, error.found) from None
    image = {
        "content": content,
        "file_name": a.file_name.encode(),
        "height": np.uint64(a.height),
        "image_id": _unsigned(np.array(a.image_id), where, "image_id")[()],
        "width": np.uint64(a.width),
    }
    return {"annotations": annotations, "image": image}


def _boxes(boxes: npt.NDArray[np.float64], a: Annotations, where: str, name: str) -> npt.NDArray[np.float32]:
    x, y, w, h = boxes.T
    shares = np.stack([y / a.height, x / a.width, (y + h) / a.height, (x + w) / a.width], axis=1)
    # As `tfds.features.BBoxFeature` checks, before it rounds.
    wrong = ~((shares >= 0) & (shares <= 1)).all(axis=1) | (shares[:, 2:] < shares[:, :2]).any(axis=1)
    if wrong.any():
        i = int(np.argmax(wrong))
        found = f"{boxes[i].tolist()} in {a.height} x {a.width}"
        raise FormatError(f"{where}: annotations[{i}].{name}", "TFDS refuses a box outside its image", "0..1", found)
    return shares.astype(np.float32)


def _single(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    with np.errstate(over="ignore"):
        return values.astype(np.float32).astype(np.float64)


def _unsigned(values: npt.NDArray[np.int64], where: str, name: str) -> Any:
    if values.size and values.min() < 0:
        raise FormatError(where, f"TFDS has no negative {name}", "at least 0", int(values.min()))
    return values.astype(np.uint64)
