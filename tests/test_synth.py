"""Synthetic tars: Meta's layout, SA-1B's statistics, honest masks, the same bytes every time."""

import gzip
import hashlib
import io
import itertools
import json
import os
import random
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from sa1b_wds import synth
from sa1b_wds.errors import StorageError, UsageError

KEYS = ["bbox", "area", "segmentation", "predicted_iou", "point_coords", "crop_box", "id", "stability_score"]
# pycocotools 2.0.11 warns under numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
SMALL: dict[str, Any] = {"short_side": 64, "masks": 3}


@pytest.fixture(scope="module")
def documents() -> list[dict[str, Any]]:
    """200 documents of full-size images: about 20,000 masks."""
    return [json.loads(synth.document(synth.photo(0, 0, place, 200))) for place in range(200)]


def members(path: Path) -> dict[str, bytes]:
    found = {}
    with tarfile.open(path) as tar:
        for member in tar:
            if member.isfile():
                file = tar.extractfile(member)
                assert file is not None
                found[member.name] = file.read()
    return found


def annotations(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [annotation for document in documents for annotation in document["annotations"]]


# ---- annotations -----------------------------------------------------------------------------------------------------


def test_masks_an_image_follow_sa1b(documents: list[dict[str, Any]]) -> None:
    counts = [synth.photo(1, tar, place, 500).masks for tar in range(4) for place in range(500)]
    assert 93 <= np.mean(counts) <= 103
    assert min(counts) == 0 and counts.count(0) == 1  # the last image of the first tar
    assert sorted(counts)[1] >= 3 and max(counts) <= 400
    assert [len(document["annotations"]) for document in documents[:3]] == [
        synth.photo(0, 0, place, 200).masks for place in range(3)
    ]


def test_counts_strings_follow_sa1b(documents: list[dict[str, Any]]) -> None:
    strings = [annotation["segmentation"]["counts"] for annotation in annotations(documents)]
    lengths = np.array([len(string) for string in strings])
    assert 380 <= lengths.mean() <= 460
    assert 250 <= np.percentile(lengths, 50) <= 310
    assert 720 <= np.percentile(lengths, 90) <= 900
    assert lengths.max() > 10_000
    # The last character of a run lacks bit 32.
    text = np.frombuffer("".join(strings).encode(), np.uint8) - 48
    assert 1.08 <= len(text) / np.count_nonzero(text & 32 == 0) <= 1.20
    assert any("\\" in string for string in strings)
    assert len(set(strings)) > 0.999 * len(strings)  # masks differ from image to image
    bytes_a_mask = sum(len(json.dumps(document)) for document in documents) / len(strings)
    assert 620 <= bytes_a_mask <= 720


def test_areas_span_sa1b(documents: list[dict[str, Any]]) -> None:
    pixels = {
        document["image"]["image_id"]: document["image"]["height"] * document["image"]["width"]
        for document in documents
    }
    shares = [
        annotation["area"] / pixels[document["image"]["image_id"]]
        for document in documents
        for annotation in document["annotations"]
    ]
    assert min(shares) * 1500 * 2250 < 200
    assert 0.8 < max(shares) < 0.97


@pytest.mark.parametrize("short_side", [1500, 300, 64, 8])
def test_masks_are_what_pycocotools_reads_and_writes(short_side: int) -> None:
    first_run_0 = 0
    for place in range(6 if short_side == 1500 else 40):
        document = json.loads(synth.document(synth.photo(3, 0, place, 1000, short_side=short_side)))
        height, width = document["image"]["height"], document["image"]["width"]
        for annotation in document["annotations"][: 25 if short_side == 1500 else None]:
            counts = annotation["segmentation"]["counts"].encode()
            rle = {"size": [height, width], "counts": counts}
            assert annotation["segmentation"]["size"] == rle["size"]
            mask = coco.decode(rle)
            assert coco.encode(mask)["counts"] == counts
            assert annotation["area"] == mask.sum() > 0
            ys, xs = np.nonzero(mask)
            assert annotation["bbox"] == [xs.min(), ys.min(), np.ptp(xs), np.ptp(ys)]
            assert coco.toBbox(rle).tolist() == [
                *annotation["bbox"][:2],
                *(side + 1 for side in annotation["bbox"][2:]),
            ]
            x, y, w, h = annotation["crop_box"]
            assert x <= xs.min() and y <= ys.min() and xs.max() < x + w and ys.max() < y + h
            first_run_0 += bool(mask[0, 0])
    if short_side == 64:
        assert first_run_0 >= 4


def test_the_corner_is_covered_now_and_then(documents: list[dict[str, Any]]) -> None:
    covered = [a for a in annotations(documents) if a["segmentation"]["counts"].startswith("0")]
    assert len(covered) >= 10
    rle = [{**a["segmentation"], "counts": a["segmentation"]["counts"].encode()} for a in covered[:3]]
    assert coco.decode(rle)[0, 0].tolist() == [1, 1, 1]


def test_the_form_of_the_json(documents: list[dict[str, Any]]) -> None:
    for place in range(50):
        image = synth.photo(0, 0, place, 200)
        text = synth.document(image)
        document = json.loads(text)
        assert (
            json.dumps(document).encode() == text
        )  # default separators, nothing behind, doubles as Python prints them
        assert list(document) == ["image", "annotations"]
        assert list(document["image"].items()) == [
            ("image_id", image.image_id),
            ("width", image.width),
            ("height", image.height),
            ("file_name", f"sa_{image.image_id}.jpg"),
        ]
    forms: Counter[tuple[type, ...]] = Counter()
    crop_forms = []
    for document in documents:
        for annotation in document["annotations"]:
            assert list(annotation) == KEYS
            assert list(annotation["segmentation"]) == ["size", "counts"]
            forms[tuple(sorted({type(side) for side in annotation["bbox"]}, key=str))] += 1
        crop_forms.append({type(side) for a in document["annotations"] for side in a["crop_box"]})
    assert set(forms) == {(int,), (float,)}
    assert 0.04 <= forms[(int,)] / forms.total() <= 0.06
    assert {frozenset(form) for form in crop_forms} == {frozenset({int}), frozenset({float}), frozenset()}
    assert 0.04 <= crop_forms.count({int}) / len(crop_forms) <= 0.2


def test_numbers_lie_where_sa1b_has_them(documents: list[dict[str, Any]]) -> None:
    everything = annotations(documents)
    iou = np.array([annotation["predicted_iou"] for annotation in everything])
    stability = np.array([annotation["stability_score"] for annotation in everything])
    assert np.array_equal(iou, iou.astype(np.float32)) and np.array_equal(stability, stability.astype(np.float32))
    assert 0.88 < iou.min() < 0.881 and 0.999 < iou.max() <= 1.0
    assert 0.95 <= stability.min() < 0.951 and 0.99 < stability.max() < 1.0
    ids = np.array([annotation["id"] for annotation in everything])
    assert len(np.unique(ids)) == len(ids)
    assert ids.min() > 0 and 1.1e9 < ids.max() < 1.21e9
    firsts = [document["annotations"][0]["id"] for document in documents if document["annotations"]]
    assert firsts != sorted(firsts)
    assert np.any(np.diff(ids) > 1) and np.any(np.diff(ids) == 1)
    for document in documents[:20]:
        boxes = [list(box) for box in synth.crop_boxes(document["image"]["height"], document["image"]["width"])]
        for annotation in document["annotations"]:
            place = boxes.index(annotation["crop_box"])
            side = 32 if place == 0 else 16 if place < 5 else 8
            ((px, py),) = annotation["point_coords"]
            x, y, w, h = annotation["crop_box"]
            for step in ((px - x) / w * side, (py - y) / h * side):
                assert step % 1 == 0.5 and 0 < step < side
            assert np.float32(px) == px and np.float32(py) == py


def test_crops_are_sams() -> None:
    boxes = synth.crop_boxes(1500, 2000)
    assert len(boxes) == len(set(boxes)) == 21
    assert boxes[0] == (0, 0, 2000, 1500)
    # Found in SA-1B's own documents for this size.
    assert {(744, 494, 1256, 1006), (744, 0, 1256, 1006), (872, 311, 692, 567), (436, 933, 692, 567)} < set(boxes)


# ---- photographs -----------------------------------------------------------------------------------------------------


def test_formats_and_ids() -> None:
    images = [synth.photo(0, tar, place, 1000) for tar in range(3) for place in range(1000)]
    formats = Counter((image.width, image.height) for image in images)
    assert 0.59 <= formats[2250, 1500] / 3000 <= 0.65
    assert 0.07 <= sum(n for (w, h), n in formats.items() if h > w) / 3000 <= 0.11
    assert all(min(size) == 1500 and 2000 <= max(size) <= 2347 for size in formats)
    assert 0.63 <= sum(image.quality == 95 for image in images) / 3000 <= 0.70
    ids = [image.image_id for image in images]
    assert ids == sorted(set(ids)) and ids[0] in (1, 2, 3)
    assert 3000 < ids[-1] <= 3006  # with a few holes


def test_jpgs_follow_sa1b() -> None:
    images = [synth.photo(0, 0, place, 200) for place in range(80)]
    sizes = []
    for image in images:
        jpg = synth.jpeg(image)
        sizes.append(len(jpg))
        assert 0.8 < len(jpg) / image.jpg_bytes < 1.25
        with Image.open(io.BytesIO(jpg)) as photo:
            assert photo.size == (image.width, image.height)
            assert photo.mode == "RGB" and not photo.getexif() and "progressive" not in photo.info
            assert [part[1:3] for part in photo.layer] == [(2, 2), (1, 1), (1, 1)]  # type: ignore[attr-defined]
            assert photo.quantization[0][0] == {95: 2, 75: 8}[image.quality]  # type: ignore[attr-defined]
            if image is images[0]:
                pixels = np.asarray(photo)
                assert pixels.std() > 20
    assert len(set(sizes)) == len(sizes)
    # 80 images: wide enough for the luck of the draw (a standard error is 0.06 MB).
    assert 0.90e6 <= np.mean(sizes) <= 1.25e6
    wanted = [synth.photo(1, 0, place, 4000).jpg_bytes for place in range(4000)]
    assert 1.0e6 <= np.mean(wanted) <= 1.1e6
    assert 0.40e6 <= np.percentile(wanted, 10) <= 0.48e6
    assert 1.54e6 <= np.percentile(wanted, 90) <= 1.70e6


@pytest.mark.parametrize("size", [(8, 8), (9, 13), (75, 76), (64, 301), (301, 64)])
def test_any_size_can_be_drawn(size: tuple[int, int]) -> None:
    image = synth.photo(0, 0, 0, 1, image=size, masks=4)
    with Image.open(io.BytesIO(synth.jpeg(image))) as photo:
        photo.load()
        assert photo.size == size[::-1]
    assert json.loads(synth.document(image))["annotations"][3]["segmentation"]["size"] == list(size)


# ---- tars ------------------------------------------------------------------------------------------------------------


def test_the_layout_is_metas(tmp_path: Path) -> None:
    paths = synth.synthesise(tmp_path / "new" / "folder", tars=2, samples=30, **SMALL)
    assert [path.name for path in paths] == ["sa_000000.tar", "sa_000001.tar"]
    assert sorted(paths[0].parent.iterdir()) == paths
    ids = []
    for path in paths:
        packed = path.read_bytes()
        assert packed[:2] == b"\x1f\x8b"
        content = gzip.decompress(packed)
        assert len(content) % 10240 == 0 and not any(content[-1024:])
        with tarfile.open(path) as tar:
            first, *rest = tar.getmembers()
        assert first.isdir() and content[:3] == b"./\0"
        names = [member.name for member in rest]
        assert names != sorted(names)
        pairs = [name[:-4].removesuffix(".") for name in names]
        assert sum(a == b for a, b in itertools.pairwise(pairs)) < 10  # not adjacent
        assert Counter(pairs) == dict.fromkeys(pairs, 2)
        assert all(member.mtime > 1.6e9 and member.uid and member.mode == 0o644 for member in rest)
        found = members(path)
        for name in names:
            if name.endswith(".json"):
                document = json.loads(found[name])
                assert document["image"]["file_name"] == name.removeprefix("./").replace(".json", ".jpg")
                with Image.open(io.BytesIO(found[name.replace(".json", ".jpg")])) as photo:
                    assert photo.size == (document["image"]["width"], document["image"]["height"])
                ids.append(document["image"]["image_id"])
    assert len(set(ids)) == 60 and max(ids[:30]) < min(ids[30:])


def test_other_layouts(tmp_path: Path) -> None:
    reference = members(synth.synthesise(tmp_path / "a", tars=1, samples=12, **SMALL)[0])
    (plain,) = synth.synthesise(tmp_path / "b", tars=1, samples=12, plain=True, order="adjacent", **SMALL)
    assert plain.read_bytes()[257:262] == b"ustar"
    found = members(plain)
    assert found == reference
    names = [name.split(".j")[0] for name in found]
    assert names[::2] == names[1::2] and names[::2] != sorted(names[::2])
    (jsons_first,) = synth.synthesise(tmp_path / "c", tars=1, samples=12, order="jsons-first", level=6, **SMALL)
    found = members(jsons_first)
    assert found == reference
    assert [name.endswith(".json") for name in found] == [True] * 12 + [False] * 12


@pytest.mark.parametrize("pieces", [2, 5, 24])
def test_gzip_members(tmp_path: Path, pieces: int) -> None:
    (one,) = synth.synthesise(tmp_path / "one", tars=1, samples=12, **SMALL)
    (many,) = synth.synthesise(tmp_path / "many", tars=1, samples=12, gzip_members=pieces, **SMALL)
    packed = many.read_bytes()
    assert gzip.decompress(packed) == gzip.decompress(one.read_bytes())
    assert packed.count(b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00") >= pieces > 1


def digest(folder: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.iterdir()))).hexdigest()


def test_the_same_call_writes_the_same_bytes(tmp_path: Path) -> None:
    synth.synthesise(tmp_path / "a", tars=3, samples=4, short_side=63, seed=7)
    script = tmp_path / "call.py"
    script.write_text(
        "import sys; from pathlib import Path; from sa1b_wds import synth\n"
        "if __name__ == '__main__':\n"
        "    synth.synthesise(Path(sys.argv[1]), tars=3, samples=4, short_side=63, seed=7, workers=int(sys.argv[2]))"
    )
    for workers in ("1", "2"):
        folder = tmp_path / workers
        # glibc fills new memory with this byte: what is read before it is written shows.
        environment = {**os.environ, "PYTHONHASHSEED": workers, "MALLOC_PERTURB_": workers}
        subprocess.run([sys.executable, str(script), str(folder), workers], check=True, env=environment)
        assert digest(folder) == digest(tmp_path / "a")
    # In parts, over a tar that is there already, and with `random` in another state.
    random.seed(1)
    synth.synthesise(tmp_path / "parts", tars=2, samples=4, short_side=63, seed=7)
    synth.synthesise(tmp_path / "parts", tars=2, samples=4, short_side=63, seed=7, first=1)
    assert digest(tmp_path / "parts") == digest(tmp_path / "a")
    synth.synthesise(tmp_path / "other", tars=3, samples=4, short_side=63, seed=8)
    assert digest(tmp_path / "other") != digest(tmp_path / "a")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tars": 0}, "synth: tars is out of range: expected 1 to 1,000,000, found 0"),
        ({"samples": 0}, "synth: samples is out of range"),
        ({"masks": -1}, "synth: masks is out of range"),
        ({"masks": 5000}, "synth: masks is out of range"),
        ({"image": (0, 5)}, "synth: height is out of range"),
        ({"short_side": 2}, "synth: short_side is out of range"),
        ({"gzip_members": 300}, "synth: gzip_members is out of range"),
        ({"level": 10}, "synth: level is out of range"),
        ({"workers": 0}, "synth: workers is out of range"),
        ({"order": "sorted"}, "synth: unknown order: expected random, adjacent, jsons-first, found sorted"),
    ],
)
def test_wrong_options(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        synth.synthesise(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_no_folder_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file"):
        synth.synthesise(tmp_path / "file" / "out", **SMALL)


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    script = tmp_path / "call.py"
    script.write_text(
        "import resource, sys; from pathlib import Path; from sa1b_wds import synth\n"
        "synth.synthesise(Path(sys.argv[1]), tars=1, samples=3, short_side=64)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "synth.synthesise(Path(sys.argv[1]), tars=2, samples=30, short_side=64, masks=3)\n"
    )
    call = subprocess.run([sys.executable, str(script), str(tmp_path / "out")], capture_output=True, text=True)
    assert call.returncode == 1
    assert "StorageError" in call.stderr and "sa_000000.tar: file too large" in call.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["sa_000000.tar"]
    assert len(members(tmp_path / "out" / "sa_000000.tar")) == 6  # the one that was there before


def test_progress_is_told_of_every_tar(tmp_path: Path) -> None:
    told: list[Path] = []
    assert synth.synthesise(tmp_path, tars=3, samples=1, progress=told.append, **SMALL) == told
