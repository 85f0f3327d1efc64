"""All numbers of a data set as a table with one row a mask: columns by name, for pandas, Arrow, DuckDB, Polars."""

from collections.abc import Iterable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from .annotations import Annotations
from .errors import MissingPackage

Columns = dict[str, npt.NDArray[Any]]

COLUMNS: Final = {
    "image_id": np.int64,
    "height": np.int32,
    "width": np.int32,
    "id": np.int64,
    "area": np.int64,
    "bbox_x": np.float64,
    "bbox_y": np.float64,
    "bbox_w": np.float64,
    "bbox_h": np.float64,
    "predicted_iou": np.float64,
    "stability_score": np.float64,
    "points": np.int32,
    "point_x": np.float64,
    "point_y": np.float64,
    "crop_x": np.float64,
    "crop_y": np.float64,
    "crop_w": np.float64,
    "crop_h": np.float64,
    "counts_bytes": np.int32,
    "rle_height": np.int32,
    "rle_width": np.int32,
}
"""Name → dtype. Pixels, as in the source (w = xmax − xmin); `point_x`, `point_y`: the first of `points` points, of
which SA-1B has one; `counts_bytes`: length of the RLE string; `rle_height`, `rle_width`: its size (the
image's, in SA-1B)."""


def columns(a: Annotations) -> Columns:
    """The rows of one image: name → [n], in the dtypes of `COLUMNS`."""
    n = len(a)
    size = np.broadcast_to(np.array([a.height, a.width]), (n, 2)) if a.size is None else a.size
    found: dict[str, Any] = {
        "image_id": np.full(n, a.image_id),
        "height": np.full(n, a.height),
        "width": np.full(n, a.width),
        "id": a.id,
        "area": a.area,
        **{f"bbox_{side}": a.bbox[:, i] for i, side in enumerate("xywh")},
        "predicted_iou": a.predicted_iou,
        "stability_score": a.stability_score,
        "points": np.full(n, a.point_coords.shape[1]),
        "point_x": a.point_coords[:, 0, 0],
        "point_y": a.point_coords[:, 0, 1],
        **{f"crop_{side}": a.crop_box[:, i] for i, side in enumerate("xywh")},
        "counts_bytes": np.diff(a.offsets),
        "rle_height": size[:, 0],
        "rle_width": size[:, 1],
    }
    return {name: found[name].astype(dtype) for name, dtype in COLUMNS.items()}


def joined(images: Iterable[Columns]) -> Columns:
    """The rows of many images."""
    parts = list(images)
    empty = {name: [np.empty(0, dtype)] for name, dtype in COLUMNS.items()}
    return {name: np.concatenate([*empty[name], *(part[name] for part in parts)]) for name in COLUMNS}


def dataframe(annotations: Iterable[Annotations]) -> Any:
    """A pandas DataFrame of all masks, one a row.

    Raises:
        MissingPackage: pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise MissingPackage("as_dataframe", "needs pandas: pip install pandas") from error
    return pandas.DataFrame(joined(columns(a) for a in annotations))


def schema() -> Any:
    """The Arrow schema of `COLUMNS`.

    Raises:
        MissingPackage: pyarrow is not installed.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise MissingPackage("--parquet", "needs pyarrow: pip install pyarrow") from error
    return pyarrow.schema([(name, pyarrow.from_numpy_dtype(dtype)) for name, dtype in COLUMNS.items()])
