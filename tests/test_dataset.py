import io
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sa1b_wds.dataset import Dataset, open
from sa1b_wds.errors import FormatError, Incomplete, NotFound, ShardDamaged, UsageError
from sa1b_wds.format import KEY_ROW
from sa1b_wds.keys import KeyFile, KeyTable

from . import datasets, making, running


@pytest.fixture(scope="module")
def dest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return datasets.make(tmp_path_factory.mktemp("set"), ((13, 3), (7, 1), (10, 2)))


@pytest.fixture
def ds(dest: Path) -> Dataset:
    return open(dest)


def test_every_sample_is_the_source_s(ds: Dataset, dest: Path) -> None:
    truth = running.samples(dest)
    assert len(ds) == 30 == len(truth)
    seen = []
    for sample in ds:
        jpg, member = truth[sample.key]
        assert sample.jpg == jpg
        made = making.document(sample.image_id, **_shape(sample.image_id))
        assert sample.json == making.text(made)
        assert sample.annotations.id.tolist() == [a["id"] for a in made["annotations"]]
        assert sample.image.shape == (sample.annotations.height, sample.annotations.width, 3)
        assert member
        seen.append(sample.key)
    assert sorted(seen) == sorted(truth)


def _shape(i: int) -> dict[str, int]:
    return {"annotations": i % 5, "height": 16 + i % 9, "width": 24 + i % 11}


def test_the_image_is_the_jpeg_s(ds: Dataset) -> None:
    image = ds[3].image
    with Image.open(io.BytesIO(ds[3].jpg)) as truth:
        assert np.abs(image.astype(int) - np.asarray(truth.convert("RGB"), int)).mean() < 2
    assert image.dtype == np.uint8


def test_by_place_key_slice_and_list(ds: Dataset) -> None:
    keys = datasets.keys(ds)
    assert [ds[i].key for i in (0, 7, -1, -30)] == [keys[0], keys[7], keys[-1], keys[0]]
    assert [ds[key].key for key in keys] == keys
    assert datasets.keys(ds[4:9]) == keys[4:9]
    assert datasets.keys(ds[-3:]) == keys[-3:]
    assert len(ds[9:4]) == 0
    assert datasets.keys(ds.take(4)) == keys[:4]
    assert len(ds.take(99)) == 30
    some = [keys[20], keys[3], keys[21]]
    assert datasets.keys(ds[some]) == [keys[3], keys[20], keys[21]]  # a set, in the order of the shards
    assert datasets.keys(ds.select(some)[1:]) == [keys[20], keys[21]]
    assert len(ds.select([])) == 0
    assert keys[0] in ds and keys[0] not in ds[1:] and "sa_999" not in ds and "x" not in ds and 3 not in ds


def test_open_with_a_split_or_keys(dest: Path, ds: Dataset) -> None:
    keys = datasets.keys(ds)
    assert datasets.keys(open(dest, split="train[:10%]")) == keys[:3]
    assert datasets.keys(open(str(dest), split="train[10:20]+train[-2:]")) == keys[10:20] + keys[-2:]
    assert datasets.keys(open(dest, keys=keys[5:7])) == keys[5:7]
    with pytest.raises(KeyError, match=keys[5]):
        open(dest, split="train[:1]", keys=[keys[5]])


@pytest.mark.parametrize("i", [30, -31, 1 << 40])
def test_no_such_place(ds: Dataset, i: int) -> None:
    with pytest.raises(IndexError, match="of 30"):
        ds[i]


@pytest.mark.parametrize("key", ["sa_999", "sa_", "sa_1x", "1", "", "sa_" + "9" * 30, "sa_-1"])
def test_no_such_key(ds: Dataset, key: str) -> None:
    with pytest.raises(KeyError, match="is not in"):
        ds[key]


def test_wrong_selections(ds: Dataset) -> None:
    key = datasets.keys(ds)[0]
    with pytest.raises(UsageError, match="twice"):
        ds.select([key, key])
    with pytest.raises(UsageError, match="step"):
        ds[::2]
    with pytest.raises(UsageError, match="at least 0"):
        ds.take(-1)


def test_a_data_set_survives_pickling(ds: Dataset) -> None:
    again = pickle.loads(pickle.dumps(ds[5:9]))
    assert [s.key for s in again] == datasets.keys(ds)[5:9]
    assert again.fingerprint(True) == ds[5:9].fingerprint(True)


def test_fingerprint(dest: Path, ds: Dataset, tmp_path: Path) -> None:
    """Names, counts, digests, selection, drop_last; not the location."""
    moved = tmp_path / "elsewhere"
    shutil.copytree(dest, moved)
    assert open(moved).fingerprint(True) == ds.fingerprint(True)
    assert open(moved, split="train[:50%]+train[50%:]").fingerprint(True) == ds.fingerprint(True)
    others = [ds.fingerprint(False), ds[1:].fingerprint(True), ds[:-1].fingerprint(True)]
    assert len({ds.fingerprint(True), *others}) == 4


def test_open_reads_the_manifest_alone(dest: Path, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes((dest / "manifest.json").read_bytes())
    assert len(open(tmp_path)) == 30
    with pytest.raises(NotFound, match=r"sa1b-train-\d+\.tar"):
        open(tmp_path)[0]


def test_without_a_manifest(dest: Path, ds: Dataset, tmp_path: Path) -> None:
    keys = datasets.keys(ds)
    for idx in (False, True):
        folder = datasets.without_manifest(dest, tmp_path / str(idx), idx)
        braces = str(folder / "sa1b-train-{000000..000005}.tar")
        for location in (
            folder,
            str(folder),
            braces,
            [str(t) for t in datasets.tars(folder)],
            list(datasets.tars(folder)),
        ):
            plain = open(location)
            assert [s.key for s in plain] == keys
            assert plain[keys[17]].key == keys[17]
            assert plain.manifest is None
            assert [s.key for s in pickle.loads(pickle.dumps(plain))] == keys
        one = open(datasets.tars(folder)[1])
        assert [s.key for s in one] == keys[one_begin(ds, 1) : one_begin(ds, 2)]


def one_begin(ds: Dataset, shard: int) -> int:
    return int(ds.shards.counts[:shard].sum())


def test_a_command_for_shards(dest: Path, ds: Dataset, tmp_path: Path) -> None:
    folder = datasets.without_manifest(dest, tmp_path / "plain")
    plain = open(f"pipe:cat {folder}/sa1b-train-{{000000..000005}}.tar")
    keys = datasets.keys(ds)
    assert [s.key for s in plain] == keys
    assert [plain[i].key for i in (29, 3, 17, 2)] == [keys[i] for i in (29, 3, 17, 2)]
    assert plain[keys[11]].key == keys[11]
    plain.shards.close()


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        open(tmp_path / "nothing")
    with pytest.raises(NotFound, match=r"no \*\.tar"):
        open(tmp_path)
    with pytest.raises(NotFound):
        open(tmp_path / "nothing.tar")
    with pytest.raises(UsageError):
        open([])


def test_not_finalized(dest: Path, tmp_path: Path) -> None:
    shutil.copytree(dest, tmp_path / "d")
    (tmp_path / "d" / "manifest.json").unlink()
    with pytest.raises(Incomplete, match="finalize"):
        open(tmp_path / "d")


@pytest.mark.parametrize("name", ["sa1b-train-000002.tar.idx", "index/sa1b-train-000002.rows"])
@pytest.mark.parametrize("damage", ["flip", "cut", "longer", "gone"])
def test_damaged_side_files_are_found(dest: Path, tmp_path: Path, name: str, damage: str) -> None:
    shutil.copytree(dest, tmp_path / "d")
    path = tmp_path / "d" / name
    data = bytearray(path.read_bytes())
    data[11] ^= 1
    changed = {"flip": bytes(data), "cut": bytes(data[:-8]), "longer": bytes(data) + bytes(8), "gone": b""}[damage]
    path.write_bytes(changed)
    if damage == "gone":
        path.unlink()
    ds = open(tmp_path / "d")
    good = [s for s in range(6) if s != 2]
    for s in good:
        ds.shards[s].index()
    with pytest.raises(NotFound if damage == "gone" else ShardDamaged, match="000002"):
        ds.shards[2].index()


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_damaged_manifest(dest: Path, tmp_path: Path, damage: str) -> None:
    data = bytearray((dest / "manifest.json").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "manifest.json").write_bytes(data if damage == "flip" else data[:-30])
    with pytest.raises(FormatError, match=r"manifest\.json"):
        open(tmp_path)


def test_key_file_finds_every_key_with_few_reads(tmp_path: Path) -> None:
    n = 200_000
    rows = np.empty(n, KEY_ROW)
    rows["image_id"] = np.cumsum(np.random.default_rng(0).integers(1, 5, n))
    rows["shard"], rows["index"] = np.arange(n) // 100, np.arange(n) % 100
    (tmp_path / "keys.bin").write_bytes(rows.tobytes())
    file = KeyFile(str(tmp_path / "keys.bin"), n)
    some = [0, 1, n // 2, n - 1, 77_777]
    assert file.places(rows["image_id"][some].tolist()) == [(i // 100, i % 100) for i in some]
    missing = sorted(set(range(1, 1000)) - set(rows["image_id"][:1000].tolist()))
    assert file.places([*missing, -5, 1 << 60]) == [None] * (len(missing) + 2)
    table = KeyTable([rows["image_id"][i : i + 100] for i in range(0, n, 100)])
    assert table.places(rows["image_id"][some].tolist()) == file.places(rows["image_id"][some].tolist())
    os.truncate(tmp_path / "keys.bin", n * 16 - 16)
    with pytest.raises(ShardDamaged, match=r"keys\.bin"):
        KeyFile(str(tmp_path / "keys.bin"), n).places([1])


def test_no_keys_at_all() -> None:
    assert KeyTable([]).places([1]) == [None]


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_descriptors_are_bounded_and_given_back(tmp_path: Path) -> None:
    ds = open(datasets.make(tmp_path, ((30, 30),)))
    ds.shards._keep = 4
    before = descriptors()
    for sample in ds:
        assert sample.key
        assert descriptors() <= before + 5
    ds.shards.close()
    assert descriptors() == before
