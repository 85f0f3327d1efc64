"""Exports, each by its real consumer: pycocotools' COCO, pyarrow; shards without images byte by byte."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO

from sa1b_wds import cli, export
from sa1b_wds.errors import DuplicateKey, MissingPackage, ShardDamaged, UsageError
from sa1b_wds.table import COLUMNS
from scripts import matrix

from . import datasets, edges, making, running


@pytest.fixture(scope="module")
def dest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    data = {
        "sa_000000.tar": making.tar([*edges.members(tfds=False), *making.pairs(range(1, 30))]),
        "sa_000001.tar": making.tar(making.pairs(range(100, 130))),
    }
    running.convert(running.write(folder / "sources", data), folder / "dest", shards=3, mix=1)
    return folder / "dest"


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---------------------------------------------------------------------------------------------------- annotations only


def test_shards_without_images(dest: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    done = export.annotations_only(datasets.open(dest), str(tmp_path / "a"), report=lambda *counts: seen.append(counts))
    full, alone = dict(matrix.members(dest)), dict(matrix.members(tmp_path / "a"))
    assert alone == {name: data for name, data in full.items() if name.endswith(".safetensors")}
    # In the same shards, in the same order: the samples that were read together are.
    assert list(alone) == [name for name in full if name.endswith(".safetensors")]
    assert (done.samples, done.files) == (len(alone), 6)
    assert done.bytes == sum(p.stat().st_size for p in (tmp_path / "a").glob("*.tar"))
    assert done.annotations == sum(len(s.annotations) for s in datasets.open(dest))
    assert seen[-1][0] == seen[-1][1] and seen[:-1] == sorted(seen[:-1])
    assert not list((tmp_path / "a").rglob(".state*"))


def test_a_subset_is_numbered_without_gaps(dest: Path, tmp_path: Path) -> None:
    ds = datasets.open(dest, split="train[:3]+train[60%:75%]")
    export.annotations_only(ds, str(tmp_path / "a"))
    names = [p.name for p in sorted((tmp_path / "a").glob("*.tar"))]
    assert names == [f"sa1b-train-{i:06d}.tar" for i in range(len(names))]
    assert [name for name, _ in matrix.members(tmp_path / "a")] == [f"{s.key}.safetensors" for s in ds]


def test_it_goes_on_where_it_stopped(dest: Path, tmp_path: Path) -> None:
    ds = datasets.open(dest)
    export.annotations_only(ds, str(tmp_path / "whole"))
    whole = files(tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise Stop

    with pytest.raises(Stop):
        export.annotations_only(ds, str(tmp_path / "a"), report=stop)
    part = files(tmp_path / "a")
    assert 0 < len(part) < len(whole)
    assert all(whole[name] == data for name, data in part.items())  # nothing half, nothing temporary
    export.annotations_only(ds, str(tmp_path / "a"))
    assert files(tmp_path / "a") == whole
    export.annotations_only(ds, str(tmp_path / "a"))
    assert files(tmp_path / "a") == whole


def test_another_export_is_not_mixed_in(dest: Path, tmp_path: Path) -> None:
    ds = datasets.open(dest)
    export.annotations_only(ds.take(5), str(tmp_path / "a"))
    with pytest.raises(UsageError, match=r"export.json: the export of other samples"):
        export.annotations_only(ds, str(tmp_path / "a"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(UsageError, match="is not empty"):
        export.annotations_only(ds, str(tmp_path / "mine"))
    with pytest.raises(UsageError, match="lies in the data set"):
        export.annotations_only(ds, str(dest / "annotations"))
    with pytest.raises(UsageError, match="nothing to export"):
        export.annotations_only(ds.take(0), str(tmp_path / "b"))


@pytest.mark.parametrize("write", [export.annotations_only, export.parquet, export.coco])
def test_damage_is_an_error_and_nothing_half_is_left(
    dest: Path, tmp_path: Path, write: Callable[..., export.Exported]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(dest, copy)
    shard = sorted(copy.glob("*.tar"))[-1]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1  # in a photograph or not: the CRC is over both
    shard.write_bytes(data)
    out = tmp_path / "out"
    with pytest.raises(ShardDamaged, match=f"{shard.name}: byte .*CRC-32"):
        write(datasets.open(copy), str(out))
    if write is export.annotations_only:
        assert not (out / shard.name).exists() and not (out / "wids.json").exists()
    else:
        assert not out.exists()
    assert not list(tmp_path.glob(".state*"))


# ------------------------------------------------------------------------------------------------------------- parquet


def test_parquet_by_pyarrow(dest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(export, "_ROW_GROUP", 100)
    ds = datasets.open(dest)
    done = export.parquet(ds, str(tmp_path / "masks.parquet"))
    file = parquet.ParquetFile(tmp_path / "masks.parquet")
    read = file.read()
    assert file.num_row_groups > 2
    assert done.bytes == (tmp_path / "masks.parquet").stat().st_size
    assert read.column_names == list(COLUMNS) and read.num_rows == done.annotations
    expected = ds.as_dataframe()
    for name, dtype in COLUMNS.items():
        values = read[name].to_numpy()
        assert values.dtype == dtype
        assert np.array_equal(values, expected[name].to_numpy())
    with pytest.raises(UsageError, match=r"masks.parquet: is there already"):
        export.parquet(ds, str(tmp_path / "masks.parquet"))


def test_parquet_without_pyarrow(dest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(MissingPackage, match="pip install pyarrow"):
        export.parquet(datasets.open(dest), str(tmp_path / "masks.parquet"))


def test_no_masks_at_all(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    paths = running.write(tmp_path / "s", {"sa_000000.tar": making.tar(making.pairs(range(1, 4), annotations=0))})
    running.convert(paths, tmp_path / "dest")
    ds = datasets.open(tmp_path / "dest")
    assert export.parquet(ds, str(tmp_path / "x.parquet")).annotations == 0
    assert parquet.read_table(tmp_path / "x.parquet").num_rows == 0
    export.coco(ds, str(tmp_path / "x.json"))
    assert json.loads((tmp_path / "x.json").read_bytes())["annotations"] == []
    assert len(COCO(tmp_path / "x.json").getImgIds()) == 3


# ---------------------------------------------------------------------------------------------------------------- COCO


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools' own
def test_coco_by_pycocotools(dest: Path, tmp_path: Path) -> None:
    ds = datasets.open(dest)
    done = export.coco(ds, str(tmp_path / "instances.json"))
    assert done.bytes == (tmp_path / "instances.json").stat().st_size
    coco = COCO(tmp_path / "instances.json")
    assert sorted(coco.getImgIds()) == sorted(s.image_id for s in ds)
    assert coco.getCatIds() == [1] and len(coco.getAnnIds()) == done.annotations
    boxes = 0
    for sample in ds:
        a = sample.annotations
        image = coco.loadImgs([sample.image_id])[0]
        assert (image["height"], image["width"], image["file_name"]) == (a.height, a.width, a.file_name)
        found = coco.loadAnns(coco.getAnnIds([sample.image_id]))
        assert [row["id"] for row in found] == a.id.tolist()
        for i, row in enumerate(found):
            assert (row["category_id"], row["iscrowd"], row["area"]) == (1, 0, a.area[i])
            mask = coco.annToMask(row)
            if a.size is None:
                assert np.array_equal(mask, a.masks(index=[i])[0])
            # Where the stated box is that of the mask, it is now COCO's box of the mask.
            x, y, w, h = a.bbox[i]
            rows, columns = np.nonzero(mask.any(axis=1))[0], np.nonzero(mask.any(axis=0))[0]
            if [x, y, x + w, y + h] == [columns[0], rows[0], columns[-1], rows[-1]] and a.size is None:
                assert row["bbox"] == coco_masks.toBbox(row["segmentation"]).tolist()
                boxes += 1
            assert row["bbox"] == [x, y, w + 1, h + 1]
            assert (row["predicted_iou"], row["stability_score"]) == (a.predicted_iou[i], a.stability_score[i])
    assert boxes > 0


def test_two_annotations_of_one_id_are_refused(tmp_path: Path) -> None:
    first, second = making.document(1, annotations=2), making.document(2, annotations=1)
    second["annotations"][0]["id"] = first["annotations"][1]["id"]
    members = [making.Member(f"sa_{i}.jpg", making.jpg()) for i in (1, 2)]
    members += [making.Member(f"sa_{i}.json", making.text(d)) for i, d in ((1, first), (2, second))]
    running.convert(running.write(tmp_path / "s", {"sa_000000.tar": making.tar(members)}), tmp_path / "dest", shards=1)
    with pytest.raises(DuplicateKey, match=r"sa_1 and sa_2: annotation id .* stands there twice"):
        export.coco(datasets.open(tmp_path / "dest"), str(tmp_path / "x.json"))
    assert not (tmp_path / "x.json").exists()
    export.coco(datasets.open(tmp_path / "dest").take(1), str(tmp_path / "x.json"))


# ------------------------------------------------------------------------------------------------------------- command


def run(*arguments: Any) -> int:
    return cli.main([str(a) for a in arguments])


def test_the_command(dest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    half = len(datasets.open(dest, split="train[:50%]"))
    assert run("export", dest, "--coco", "--split", "train[:50%]", "--out", tmp_path / "c.json") == 0
    assert len(json.loads((tmp_path / "c.json").read_bytes())["images"]) == half
    assert f"{half:,} images" in capsys.readouterr().out
    assert run("export", dest, "--annotations-only", "--out", tmp_path / "a") == 0
    assert "6 shards" in capsys.readouterr().out
    (tmp_path / "x.toml").write_text(f'[export]\ndest = "{dest}"\nout = "{tmp_path}/c2.json"\ncoco = true\n')
    assert run("export", "--config", tmp_path / "x.toml") == 0
    assert (tmp_path / "c2.json").exists()
    for wrong in ([], ["--coco", "--parquet"]):
        assert run("export", dest, *wrong, "--out", tmp_path / "d") == 2
        assert "one of --annotations-only, --parquet, --coco" in capsys.readouterr().err
    assert run("export", dest, "--coco") == 2
    assert "--out" in capsys.readouterr().err
