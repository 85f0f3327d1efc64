"""as_tfds against the builder's arithmetic written down again, number by number; the real builder where it is there."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sa1b_wds import images
from sa1b_wds.errors import FormatError, MissingPackage, ShardDamaged
from sa1b_wds.interop.tfds import FEATURES, Examples, as_tf_dataset, as_tfds, load
from scripts import environments

from . import datasets, edges, making, running

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "scripts" / "oracle" / "tfds.json"


@pytest.fixture(scope="module")
def sources() -> dict[str, bytes]:
    """key.suffix → bytes of the edges and a few plain pairs."""
    return {m.name.removeprefix("./"): m.data for m in [*edges.members(), *making.pairs(range(1, 9))]}


@pytest.fixture(scope="module")
def dest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tfds")
    data = making.tar([*edges.members(), *making.pairs(range(1, 9))])
    running.convert(running.write(folder / "sources", {"sa_000000.tar": data}), folder / "dest", shards=3)
    return folder / "dest"


def by_the_builder(document: Any) -> dict[str, Any]:
    """The annotations of a document, as `segment_anything_dataset_builder.py` and tf.Example make them."""
    image, rows = document["image"], document["annotations"]
    height, width = image["height"], image["width"]

    def box(values: list[float]) -> list[np.float32]:
        x, y, w, h = values
        return [np.float32(v) for v in (y / height, x / width, (y + h) / height, (x + w) / width)]

    def single(value: float) -> float:
        return float(np.float32(value))

    n = len(rows)
    return {
        "area": np.array([a["area"] for a in rows], np.uint64),
        "bbox": np.array([box(a["bbox"]) for a in rows], np.float32).reshape(n, 4),
        "crop_box": np.array([box(a["crop_box"]) for a in rows], np.float32).reshape(n, 4),
        "id": np.array([a["id"] for a in rows], np.uint64),
        "point_coords": np.array(
            [[[single(v) for v in p] for p in a["point_coords"]] for a in rows], np.float64
        ).reshape(n, 1, 2),
        "predicted_iou": np.array([single(a["predicted_iou"]) for a in rows], np.float64),
        "stability_score": np.array([single(a["stability_score"]) for a in rows], np.float64),
        "counts": [a["segmentation"]["counts"].encode() for a in rows],
        "size": np.array([a["segmentation"]["size"] for a in rows], np.uint64).reshape(n, 2),
    }


def test_every_value_is_the_builder_s(dest: Path, sources: dict[str, bytes]) -> None:
    examples = load(dest)
    assert len(examples) == len(sources) // 2
    seen = set()
    for example in examples:
        key = example["image"]["file_name"].decode().removesuffix(".jpg")
        document = json.loads(sources[f"{key}.json"])
        expected, found = by_the_builder(document), dict(example["annotations"])
        found |= found.pop("segmentation")
        assert found.keys() == expected.keys()
        assert isinstance(found["counts"], np.ndarray) and found["counts"].dtype == object
        assert list(found["counts"]) == expected.pop("counts")
        for name, values in expected.items():
            assert (found[name].dtype, found[name].shape) == (values.dtype, values.shape), name
            assert found[name].tobytes() == values.tobytes(), (key, name)
        image = example["image"]
        assert image["file_name"] == document["image"]["file_name"].encode()
        for name in ("height", "width", "image_id"):
            assert type(image[name]) is np.uint64 and image[name] == document["image"][name]
        seen.add(key)
    assert {f"{key}.jpg" for key in seen} == {name for name in sources if name.endswith(".jpg")}


def matches(value: Any, feature: Any) -> bool:
    if isinstance(feature, dict):
        return list(value) == list(feature) and all(matches(value[name], feature[name]) for name in feature)
    dtype, shape = feature
    if dtype == "string" and shape == ():
        return isinstance(value, bytes)
    kind = object if dtype == "string" else np.dtype(dtype)
    sides = zip(value.shape, shape, strict=True)
    return value.dtype == kind and all(wanted in (None, found) for found, wanted in sides)


def test_features_say_what_there_is(dest: Path) -> None:
    for example in load(dest):
        assert matches(example, FEATURES)
    json.dumps(FEATURES)  # plain data
    wrong = {**FEATURES, "image": {**FEATURES["image"], "height": ("int64", ())}}
    assert not matches(load(dest)[0], wrong)


def test_pixels_are_those_of_the_fast_dct(dest: Path) -> None:
    # The accurate one, which Pillow and OpenCV use, differs in nearly every photograph: the oracle has the last word.
    ds = datasets.open(dest)
    differ = 0
    for sample in ds:
        found = as_tfds(sample)["image"]["content"]
        assert np.array_equal(found, images.tfds_image(sample.jpg))
        assert found.shape == sample.image.shape
        differ += not np.array_equal(found, sample.image)
    assert differ > len(ds) // 2


def test_it_reads_like_tfds(dest: Path) -> None:
    examples = load(dest, split="train[:50%]")
    ds = datasets.open(dest, split="train[:50%]")
    assert len(examples) == len(ds) and len(examples.take(4)) == 4
    for _ in range(2):  # again and again
        assert [e["image"]["image_id"] for e in examples.take(4)] == [s.image_id for s in ds.take(4)]
    assert isinstance(ds.as_tfds(), Examples) and len(ds.as_tfds()) == len(ds)
    key = ds[3].key
    assert examples[key]["image"]["file_name"] == f"{key}.jpg".encode() == examples[3]["image"]["file_name"]
    assert [len(e["image"]) for e in load(dest, keys=[key])] == [5]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"point_coords": [[1.0, 2.0], [3.0, 4.0]]}, "one point a mask"),
        ({"bbox": [30.0, 0.0, 3.0, 4.0]}, r"annotations\[0\].bbox: .* outside its image"),
        ({"crop_box": [-1.0, 0.0, 3.0, 4.0]}, r"annotations\[0\].crop_box: .* outside its image"),
        ({"bbox": [3.0, 4.0, -1.0, 2.0]}, "outside its image"),
        ({"id": -1}, "no negative id"),
        ({"area": -5}, "no negative area"),
    ],
)
def test_what_the_builder_refuses_is_refused(tmp_path: Path, change: dict[str, Any], what: str) -> None:
    document = making.document(5, annotations=1)
    document["annotations"][0].update(change)
    pair = [making.Member("sa_5.jpg", making.jpg()), making.Member("sa_5.json", making.text(document))]
    running.convert(running.write(tmp_path / "s", {"sa_000000.tar": making.tar(pair)}), tmp_path / "dest")
    with pytest.raises(FormatError, match=what) as caught:
        load(tmp_path / "dest")[0]
    assert "sa1b-train-000000.tar: byte 0: sa_5" in str(caught.value)


def test_a_jpg_that_is_cut_is_damage(tmp_path: Path) -> None:
    pair = making.pair(5)
    pair[0] = making.Member("sa_5.jpg", pair[0].data[:-200])
    running.convert(running.write(tmp_path / "s", {"sa_000000.tar": making.tar(pair)}), tmp_path / "dest")
    with pytest.raises(ShardDamaged, match="sa_5: a JPEG that is cut"):
        load(tmp_path / "dest")[0]


def test_tensorflow_is_asked_for_by_name(dest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(MissingPackage, match="pip install tensorflow-cpu") as caught:
        as_tf_dataset(datasets.open(dest))
    assert caught.value.exit_code == 2


def test_the_recorded_result_has_no_difference() -> None:
    record = json.loads(RECORD.read_text())
    assert record["differences"] == 0
    assert record["examples"] >= 60 and record["annotations"] > 5_000
    pins = [pin.split("==") for pin in environments.REQUIREMENTS["tfds"] if "==" in pin]
    assert record["versions"].items() >= {name: pin for name, pin in pins if name.startswith("tensorflow")}.items()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    stated = f"{record['examples']:,} images, {record['annotations']:,} annotations, {record['values']:,} values"
    assert stated in " ".join(readme.split()), "README: state what scripts/oracle/tfds.json has"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_real_builder_gives_the_same() -> None:
    inside = environments.python("tfds")
    if inside is None:
        pytest.skip("TENSORFLOW IS NOT INSTALLED: run scripts/oracle/tfds, or READERS=tfds scripts/test (2 GB)")
    command = [str(inside), "-m", "scripts.oracle.tfds_builder", "--samples", "8"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONWARNINGS": ""})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert ": 0 differences" in done.stdout
