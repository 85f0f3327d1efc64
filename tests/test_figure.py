"""What people look at: the figure, and the table of all masks."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from sa1b_wds import figure
from sa1b_wds.errors import MissingPackage, UsageError
from sa1b_wds.table import COLUMNS

from . import datasets, edges, making, running


@pytest.fixture(scope="module")
def dest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("figure")
    data = making.tar([*edges.members(tfds=False), *making.pairs(range(1, 9))])
    running.convert(running.write(folder / "sources", {"sa_000000.tar": data}), folder / "dest", shards=2)
    return folder / "dest"


def test_masks_are_drawn_where_they_are(dest: Path) -> None:
    for sample in datasets.open(dest):
        a = sample.annotations
        side = max(a.height, a.width)
        drawn, plain = figure.overlay(sample, side), sample.image
        assert drawn.shape == plain.shape and drawn.dtype == np.uint8
        covered = a.masks().any(axis=0) if len(a) else np.zeros(plain.shape[:2], bool)
        assert np.array_equal(drawn[~covered], plain[~covered])
        if covered.any():
            assert (drawn[covered] != plain[covered]).any(axis=1).mean() > 0.9


def test_the_smaller_mask_is_seen(dest: Path) -> None:
    sample = next(s for s in datasets.open(dest) if len(s.annotations) == 3)
    a = sample.annotations
    small = int(np.argmin(a.area))
    inside = a.masks()[small] > 0
    drawn = figure.overlay(sample, max(a.height, a.width)).astype(float)
    # One colour over all of it: what is left of the photograph is half of it, or nothing on an outline.
    colour = figure._colours(len(a) + 1)[small + 1]
    half = np.abs(drawn - (sample.image * 0.5 + colour * 0.5)).max(axis=2) <= 1
    line = np.abs(drawn - colour).max(axis=2) <= 1
    assert (half | line)[inside].all()


def test_the_grid(dest: Path, tmp_path: Path) -> None:
    ds = datasets.open(dest)
    made = ds.show_examples(2, 3, side=50, path=tmp_path / "figure.png")
    assert made.size == (3 * 54 - 4, 2 * 54 - 4)
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"
    assert ds.take(2).show_examples(side=20).size == (44, 20)  # no more columns than pictures
    with pytest.raises(UsageError):
        ds.take(0).show_examples()


def test_the_table_has_every_number(dest: Path) -> None:
    pytest.importorskip("pandas")
    ds = datasets.open(dest)
    table = ds.as_dataframe()
    assert list(table.columns) == list(COLUMNS)
    assert [table[name].dtype for name in COLUMNS] == [np.dtype(kind) for kind in COLUMNS.values()]
    row = 0
    for sample in ds:
        document = json.loads(sample.json)
        for annotation in document["annotations"]:
            found = table.iloc[row].to_dict()
            point, size = annotation["point_coords"][0], annotation["segmentation"]["size"]
            expected = {
                **{name: document["image"][name] for name in ("image_id", "height", "width")},
                **{name: annotation[name] for name in ("id", "area", "predicted_iou", "stability_score")},
                **{f"bbox_{side}": value for side, value in zip("xywh", annotation["bbox"], strict=True)},
                **{f"crop_{side}": value for side, value in zip("xywh", annotation["crop_box"], strict=True)},
                "point_x": point[0],
                "point_y": point[1],
                "points": len(annotation["point_coords"]),
                "counts_bytes": len(annotation["segmentation"]["counts"]),
                "rle_height": size[0],
                "rle_width": size[1],
            }
            assert found == expected
            row += 1
    assert row == len(table) > 400
    assert list(ds.take(0).as_dataframe().columns) == list(COLUMNS)


@pytest.mark.parametrize(("package", "call"), [("PIL", "show_examples"), ("pandas", "as_dataframe")])
def test_what_is_missing_is_named(dest: Path, monkeypatch: pytest.MonkeyPatch, package: str, call: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackage, match=f"{call}: needs .*pip install"):
        getattr(datasets.open(dest), call)()
