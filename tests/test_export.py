"""Exports, each by its real consumer: pycocotools' COCO, pyarrow; shards without images byte by byte."""

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO

import sa1b_wds
from sa1b_wds import cli, export, tar
from sa1b_wds.errors import DuplicateKey, FormatError, MissingPackage, ShardDamaged, UsageError
from sa1b_wds.format import ROW
from sa1b_wds.manifest import load_manifest
from sa1b_wds.report import statistics, table
from sa1b_wds.restore import restore as restore_tars
from sa1b_wds.storage import Destination
from sa1b_wds.table import COLUMNS
from sa1b_wds.verify import verify
from scripts import matrix

from . import datasets, edges, making, running, test_verify


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


WRITERS = [export.annotations_only, export.parquet, export.coco]


@pytest.mark.parametrize(("write", "workers"), [*((w, 1) for w in WRITERS), (export.coco, 2)])
def test_damage_is_an_error_and_nothing_half_is_left(
    dest: Path, tmp_path: Path, write: Callable[..., export.Exported], workers: int
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(dest, copy)
    shard = sorted(copy.glob("*.tar"))[-1]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1  # in a photograph or not: the CRC is over both
    shard.write_bytes(data)
    out = tmp_path / "out"
    with pytest.raises(ShardDamaged, match=f"{shard.name}: byte .*CRC-32"):
        write(datasets.open(copy), str(out), workers=workers, check=True)
    if write is export.annotations_only:
        assert not (out / shard.name).exists() and not (out / "wids.json").exists()
    else:
        assert not out.exists()
    assert not list(tmp_path.glob(".state*"))


def spoiled(dest: Path, copy: Path, key: str, change: Callable[[bytearray, int, int], None]) -> str:
    """A copy of the data set with a change around a sample's packed member; the name of its shard."""
    shutil.copytree(dest, copy)
    path, (_, _, _, middle, size, _) = test_verify.find(copy, key)
    with test_verify.opened(path) as data:
        change(data, middle, size)
    return path.name


def flip_a_run(data: bytearray, middle: int, size: int) -> None:
    data[middle + making.BLOCK + size - 2] ^= 2  # the last RLE string stands last


def state_another_area(data: bytearray, middle: int, size: int) -> None:
    begin = middle + making.BLOCK
    data[begin + 8 + int.from_bytes(data[begin : begin + 8], "little")] ^= 1  # the areas come first


def rename(data: bytearray, middle: int, size: int) -> None:
    data[middle + 3] ^= 1


def another_key(data: bytearray, middle: int, size: int) -> None:
    data[middle : middle + making.BLOCK] = tar.header("sa_105.safetensors", size)


def cut(data: bytearray, middle: int, size: int) -> None:
    del data[middle + making.BLOCK + size // 2 :]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (flip_a_run, r"sa_104.*segmentation.counts"),
        (state_another_area, r"areas that are not those of their masks, .* others than the manifest says"),
        (rename, "not the header of a .safetensors member"),
        (another_key, "another member than the index names: expected sa_104 of"),
        (cut, "sa_104.safetensors: the shard stops inside this member"),
    ],
)
@pytest.mark.parametrize("write", WRITERS)
def test_what_is_found_without_reading_photographs(
    dest: Path,
    tmp_path: Path,
    write: Callable[..., export.Exported],
    change: Callable[[bytearray, int, int], None],
    said: str,
) -> None:
    name = spoiled(dest, tmp_path / "copy", "sa_104", change)
    with pytest.raises((ShardDamaged, FormatError), match=rf"{name}.*{said}"):
        write(datasets.open(tmp_path / "copy"), str(tmp_path / "out"))
    assert not (tmp_path / "out" / name).exists()


@pytest.mark.parametrize("write", WRITERS)
def test_photographs_are_not_read(dest: Path, tmp_path: Path, write: Callable[..., export.Exported]) -> None:
    """Their bytes may be anything, and the result is the same; `check` reads them."""

    def no_photograph(data: bytearray, middle: int, size: int) -> None:
        data[middle - 600] ^= 1  # before its padding

    spoiled(dest, tmp_path / "copy", "sa_104", no_photograph)
    write(datasets.open(dest), str(tmp_path / "one"))
    write(datasets.open(tmp_path / "copy"), str(tmp_path / "two"))
    one, two = (files(p) if p.is_dir() else p.read_bytes() for p in (tmp_path / "one", tmp_path / "two"))
    assert one == two
    with pytest.raises(ShardDamaged, match="CRC-32"):
        write(datasets.open(tmp_path / "copy"), str(tmp_path / "three"), check=True)


# ---------------------------------------------------------------------------------------------------- many processes


WAYS: list[dict[str, Any]] = [{}, {"workers": 2}, {"check": True}]


@pytest.mark.parametrize("write", WRITERS)
def test_workers_and_check_change_no_byte(
    dest: Path, tmp_path: Path, write: Callable[..., export.Exported], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "_ROW_GROUP", 37)
    found = []
    for n, options in enumerate(WAYS):
        out, seen = tmp_path / str(n), list[tuple[int, int]]()
        with running.undisturbed():
            ds = datasets.open(dest, split="train[:30%]+train[45%:90%]")
            done = write(ds, str(out), report=lambda *counts, seen=seen: seen.append(counts), **options)
            del ds  # and its open shards
        assert seen[-1][0] == seen[-1][1]
        assert all(a[0] <= b[0] for a, b in itertools.pairwise(seen))
        found.append((done, files(out) if out.is_dir() else out.read_bytes()))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_anywhere_and_run_again_gives_the_same_bytes(dest: Path, tmp_path: Path, workers: int) -> None:
    export.annotations_only(datasets.open(dest), str(tmp_path / "whole"))
    command = [sys.executable, "-c", "from sa1b_wds.cli import run; run()", "export", str(dest)]
    command += ["--annotations-only", "--workers", str(workers)]
    killed = 0
    for n, wait_for in enumerate(("export.json", "receipts/*3.json")):
        out = tmp_path / str(n)
        child = subprocess.Popen([*command, "--out", str(out)], start_new_session=True)
        until = time.monotonic() + 60
        while child.poll() is None and not list(out.glob(wait_for)) and time.monotonic() < until:
            time.sleep(0.001)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGKILL)  # the parent alone: its workers must end by themselves
        killed += child.wait() == -signal.SIGKILL
        while living(child.pid) and time.monotonic() < until:
            time.sleep(0.01)
        assert not living(child.pid)
        assert not (out / "manifest.json").exists() or files(out) == files(tmp_path / "whole")
        export.annotations_only(datasets.open(dest), str(out), workers=workers)
        assert files(out) == files(tmp_path / "whole")
    assert killed


def living(session: int) -> list[str]:
    """Processes of a session."""
    out = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if fields[3] == str(session) and fields[0] != "Z":
                out.append(stat.parent.name)
    return out


# --------------------------------------------------------------------------------- annotations alone, as a data set


@pytest.fixture(scope="module")
def alone(dest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "a"
    export.annotations_only(datasets.open(dest), str(out))
    return out


def test_it_opens(dest: Path, alone: Path) -> None:
    full, ds = datasets.open(dest), datasets.open(alone)
    assert full.has_images and not ds.has_images and len(ds) == len(full)
    for a, b in zip(full, ds, strict=True):
        assert (a.key, a.packed, a.json) == (b.key, b.packed, b.json)
    sample = ds["sa_104"]
    assert sample.packed == full["sa_104"].packed and "no JPEG" in repr(sample)
    for ask in (lambda: sample.jpg, lambda: sample.image, lambda: sample.annotations and ds.show_examples(1, 1)):
        with pytest.raises(
            UsageError, match=r"sa1b-train-.*: no photographs here: the annotations alone were exported"
        ):
            ask()
    with pytest.raises(UsageError, match="no photographs here"):
        next(iter(ds.as_tfds()))
    assert ds.take(3).as_dataframe().equals(full.take(3).as_dataframe())


@pytest.mark.parametrize("mode", ["nearest", "runs"])
def test_it_streams_without_images(dest: Path, alone: Path, mode: str) -> None:
    options: dict[str, Any] = {"batch_size": 4, "image_size": None, "mask_size": 8, "masks_per_image": 3, "seed": 1}
    options |= {"rank": 0, "world_size": 1, "mask_mode": mode}
    batches = list(datasets.open(alone).stream(**options))
    for a, b in zip(datasets.open(dest).stream(**options), batches, strict=True):
        assert a.keys() == b.keys() and "image" not in b
        for name, value in a.items():
            assert np.array_equal(value, b[name]), name  # type: ignore[arg-type,literal-required]
    assert len(batches) == len(datasets.open(alone)) // 4
    with pytest.raises(UsageError, match="annotations alone, without photographs: stream with image_size=None"):
        datasets.open(alone).stream(**{**options, "image_size": 64})
    decode = sa1b_wds.decoder(image_size=None, mask_size=8)
    sample = datasets.open(alone)[0]
    assert decode({"__key__": sample.key, "safetensors": sample.packed})["masks"].shape == (64, 8, 8)


def test_damage_of_it_is_found_by_its_crc(alone: Path, tmp_path: Path) -> None:
    shutil.copytree(alone, tmp_path / "copy")
    shard = sorted((tmp_path / "copy").glob("*.tar"))[0]
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ShardDamaged, match=r"byte 0: sa_.*CRC-32"):
        datasets.open(tmp_path / "copy")[0].json  # noqa: B018


def test_verify_of_it(alone: Path, dest: Path, tmp_path: Path) -> None:
    for options in ({}, {"deep": True}, {"deep": True, "workers": 2}):
        assert verify(Destination(str(alone)), **options) == []
    with pytest.raises(UsageError, match="compare the data set that they were exported from"):
        verify(Destination(str(alone)), against=[str(dest.parent / "sources")])
    with pytest.raises(UsageError, match="annotations alone: restore from the data set"):
        restore_tars(Destination(str(alone)), tmp_path / "out")


def test_any_one_byte_changed_in_it_is_a_difference(alone: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(alone, copy)
    draw = random.Random(7)
    for name, data in files(alone).items():
        at = draw.randrange(len(data))
        (copy / name).write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        assert verify(Destination(str(copy))), f"{name}: byte {at}"
        (copy / name).write_bytes(data)
        (copy / name).unlink()
        assert verify(Destination(str(copy))), name
        (copy / name).write_bytes(data)
    assert verify(Destination(str(copy))) == []


def lie(copy: Path, **changes: Any) -> None:
    path = copy / "manifest.json"
    manifest = load_manifest(path.read_bytes(), "")
    path.write_bytes(msgspec.structs.replace(manifest, **changes).to_bytes())


def test_facts_of_it_that_lie_are_found(alone: Path, tmp_path: Path) -> None:
    """Every digest is right; what is said is not."""
    manifest = load_manifest((alone / "manifest.json").read_bytes(), "")
    first, last = manifest.shards[0], msgspec.structs.replace(manifest.shards[-1], area_mismatches=7)
    lies: list[tuple[dict[str, Any], bool, str]] = [
        ({"members": ["json"]}, False, "members of a sample"),
        ({"missing_tasks": [0]}, False, "sources and missing tasks"),
        ({"plan": "0" * 64}, False, "what the manifest calls the plan"),
        ({"files": manifest.files[1:]}, False, "names of its files"),
        ({"totals": msgspec.structs.replace(manifest.totals, members=4)}, False, "totals"),
        ({"shards": [msgspec.structs.replace(first, samples=7), *manifest.shards[1:]]}, False, "what follows from"),
        ({"shards": [*manifest.shards[:-1], last]}, True, "area_mismatches"),
        ({"shards": [first, *manifest.shards[2:]]}, False, "names of its shards"),
    ]
    for n, (changes, deep, what) in enumerate(lies):
        copy = tmp_path / str(n)
        shutil.copytree(alone, copy)
        lie(copy, **changes)
        assert what in test_verify.said(verify(Destination(str(copy)), deep=deep)), changes


def test_stats_of_it(alone: Path, dest: Path) -> None:
    a, b = (statistics(Destination(str(folder))) for folder in (alone, dest))
    for name in ("masks_per_image", "counts_length", "area", "predicted_iou", "stability_score"):
        assert getattr(a, name) == getattr(b, name)
    assert a.totals.area_mismatches == b.totals.area_mismatches
    assert "members of the sources" in table(b) and "members of the sources" not in table(a)


def test_an_export_of_an_export_is_that_export(alone: Path, dest: Path, tmp_path: Path) -> None:
    ds = datasets.open(alone)
    export.annotations_only(ds, str(tmp_path / "again"))
    one, two = files(alone), files(tmp_path / "again")
    # Only what it is an export of differs, and what that is part of.
    assert {n for n in one if one[n] != two[n]} == {"export.json", "manifest.json", ".nv-meta/index.uuid"}
    export.coco(ds, str(tmp_path / "one.json"))
    export.coco(datasets.open(dest), str(tmp_path / "two.json"))
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()


def test_places_in_the_sources_are_kept(alone: Path, dest: Path) -> None:
    for name in ("sa1b-train-000000", "sa1b-train-000005"):
        one, two = (np.fromfile(folder / f"index/{name}.rows", ROW) for folder in (alone, dest))
        assert (one[["image_id", "source", "jpg_ordinal", "json_ordinal"]] == two[list(ROW.names or ())[:4]]).all()


def test_shards_without_a_manifest(dest: Path, alone: Path, tmp_path: Path) -> None:
    plain = datasets.without_manifest(dest, tmp_path / "plain")
    export.annotations_only(datasets.open(plain), str(tmp_path / "a"))
    assert dict(matrix.members(tmp_path / "a")) == dict(matrix.members(alone))
    assert verify(Destination(str(tmp_path / "a")), deep=True) == []
    # Such shards without their manifest are none of ours.
    with pytest.raises(ShardDamaged, match="a member out of place"):
        datasets.open(datasets.without_manifest(alone, tmp_path / "none"))


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


@pytest.mark.parametrize("place", ["s3://bucket/a", "gs://bucket/a", "file:///tmp/a"])
def test_places_elsewhere_are_refused(
    dest: Path, place: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (["export", "--annotations-only"], ["restore"]):
        assert run(command[0], dest, *command[1:], "--out", place) == 2
        assert "not a local path" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
