"""What a batch holds, against oracles: pycocotools at full size, numpy, and the image drawn from its own mask."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco

from sa1b_wds import images, rle
from sa1b_wds.augment import Augment, Frame, frame
from sa1b_wds.batch import Batch
from sa1b_wds.dataset import Dataset, Sample, open
from sa1b_wds.errors import UsageError

from . import making, running
from .conftest import SHARED

# pycocotools 2.0.11 under numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

S, M, SIDE = 48, 3, 20


@pytest.fixture(scope="module")
def ds(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Images of 16 to 24 × 24 to 34 pixels with 0 to 7 masks."""
    folder = tmp_path_factory.mktemp("set")
    members = [m for i in range(1, 25) for m in making.pair(i, annotations=i % 8, height=16 + i % 9, width=34 - i % 11)]
    members += making.pair(90, annotations=4, height=40, width=7)
    running.convert(running.write(folder, {"sa_000000.tar": making.tar(members)}), folder / "dest", shards=3)
    return open(folder / "dest")


def stream(ds: Dataset, **options: Any) -> Any:
    few = {
        "batch_size": 5,
        "image_size": S,
        "mask_size": SIDE,
        "masks_per_image": M,
        "threads": 2,
        "rank": 0,
        "world_size": 1,
    }
    return ds.stream(**{**few, "drop_last": False, **options})


def samples(ds: Dataset, batches: list[Batch]) -> list[tuple[Sample, dict[str, Any]]]:
    """Each sample delivered, with its part of every array."""
    out = []
    for batch in batches:
        for b, key in enumerate(batch["key"]):
            if not batch["is_padding"][b]:
                out.append((ds[key], {n: v[b] for n, v in batch.items() if n not in ("step", "offsets")}))  # type: ignore[index]
    return out


def full_masks(sample: Sample) -> npt.NDArray[np.uint8]:
    a = sample.annotations
    return (
        np.stack([coco.decode(a.rle(i)) for i in range(len(a))])
        if len(a)
        else np.empty((0, a.height, a.width), np.uint8)
    )


def seen(full: npt.NDArray[Any], f: Frame) -> npt.NDArray[Any]:
    """(…, h, w) through the window at full size: (…, side, side), nothing outside."""
    out = np.zeros((*full.shape[:-2], f.side, f.side), full.dtype)
    y, x, h, w = f.visible
    out[..., y - f.top : y - f.top + h, x - f.left : x - f.left + w] = full[..., y : y + h, x : x + w]
    return out


def sampled(square: npt.NDArray[Any], pixels: int, flip: bool) -> npt.NDArray[Any]:
    """Row i takes row ⌊(2i + 1) · L / 2m⌋, columns alike."""
    at = (2 * np.arange(pixels) + 1) * square.shape[-1] // (2 * pixels)
    out = square[..., at[:, None], at]
    return out[..., ::-1] if flip else out


AUGMENTS: dict[str, dict[str, Any]] = {
    "none": {},
    "flip": {"flip": 1.0},
    "crop": {"scale": (1.2, 3.0)},
    "zoom": {"flip": 0.5, "scale": (0.3, 2.5)},
    "pad": {"flip": 1.0, "scale": (0.3, 0.9)},
}


@pytest.mark.parametrize("name", AUGMENTS)
def test_every_key_of_a_batch(ds: Dataset, name: str) -> None:
    options = AUGMENTS[name]
    augment = Augment(**options)
    batches = list(stream(ds, seed=5, epoch=3, **options))
    assert [b["step"].tolist() for b in batches] == [[3, t] for t in range(5)]
    got = samples(ds, batches)
    assert len({s.key for s, _ in got}) == len(ds) == 25
    cropped = 0
    for sample, row in got:
        a = sample.annotations
        f = augment.frame(a.height, a.width, 5, 3, sample.image_id)
        full = full_masks(sample)
        assert row["original_size"].tolist() == [a.height, a.width]
        n = int(row["valid"].sum())
        assert row["valid"].tolist() == [True] * n + [False] * (M - n)
        at = [a.id.tolist().index(i) for i in row["annotation_id"][:n].tolist()]
        assert at == sorted(at)
        if f.is_whole:
            assert n == min(M, len(a))
        else:
            cropped += 1
        assert np.array_equal(row["masks"][:n], sampled(seen(full[at], f), SIDE, f.flip))
        for column in ("area", "predicted_iou", "stability_score"):
            assert np.array_equal(row[column][:n], getattr(a, column)[at].astype(row[column].dtype)), column
        x, y, w, h = a.bbox[at].T
        u0, u1 = x - f.left, x + w - f.left
        if f.flip:
            u0, u1 = f.side - 1 - u1, f.side - 1 - u0
        box = np.stack([u0, y - f.top, u1, y + h - f.top], 1) * S / f.side
        assert np.array_equal(row["boxes"][:n], np.clip(box, 0, S).astype(np.float32))
        px, py = a.point_coords[at, 0].T
        u = f.side - 1 - (px - f.left) if f.flip else px - f.left
        assert np.array_equal(row["points"][:n], (np.stack([u, py - f.top], 1) * S / f.side).astype(np.float32))
        if not f.is_whole and n:
            assert row["points"][:n].min() >= 0 and row["points"][:n].max() < S
        for column in ("masks", "boxes", "points", "area", "predicted_iou", "stability_score", "annotation_id"):
            assert not row[column][n:].any(), column
        rows, columns = row["size"].tolist()
        y0, x0, h0, w0 = f.visible
        assert (rows, columns) == (int(h0 * S / f.side + 0.5) or 1, int(w0 * S / f.side + 0.5) or 1)
        picture = images.decode(sample.jpg, (rows, columns), window=(y0, x0, h0, w0))
        assert np.array_equal(row["image"][:rows, :columns], picture[:, ::-1] if f.flip else picture)
        assert not row["image"][rows:].any() and not row["image"][:, columns:].any()
    assert bool(cropped) == (name in ("crop", "zoom"))


def test_without_augmentation_it_is_the_padded_square(ds: Dataset) -> None:
    """The definition itself, without this project's geometry."""
    for sample, row in samples(ds, list(stream(ds, masks_per_image=9))):
        a = sample.annotations
        longest, n = max(a.height, a.width), len(a)
        padded = np.zeros((n, longest, longest), np.uint8)
        padded[:, : a.height, : a.width] = full_masks(sample)
        i = (2 * np.arange(SIDE) + 1) * longest // (2 * SIDE)
        assert np.array_equal(row["masks"][:n], padded[:, i][:, :, i])
        x, y, w, h = a.bbox.T
        assert np.array_equal(row["boxes"][:n], np.float32(np.stack([x, y, x + w, y + h], 1) * S / longest))
        assert np.array_equal(row["points"][:n], np.float32(a.point_coords[:, 0] * S / longest))
        assert np.array_equal(row["image"], images.decode(sample.jpg, S))
        assert max(row["size"]) == S


def test_covered_area(ds: Dataset) -> None:
    for sample, row in samples(ds, list(stream(ds, masks_per_image=9, mask_mode="area"))):
        a = sample.annotations
        assert row["masks"].dtype == np.float32
        longest = max(a.height, a.width)
        square = seen(full_masks(sample), frame(a.height, a.width)).astype(np.float64)
        fine = np.repeat(np.repeat(square, SIDE, 1), SIDE, 2)  # every source pixel as SIDE × SIDE
        exact = fine.reshape(len(a), SIDE, longest, SIDE, longest).mean(axis=(2, 4))
        assert np.allclose(row["masks"][: len(a)], exact, atol=1e-6)


def test_ragged(ds: Dataset) -> None:
    for batch in stream(ds, masks_per_image=None, flip=0.5):
        assert "valid" not in batch
        offsets = batch["offsets"]
        assert offsets.dtype == np.int64 and len(offsets) == 6
        for name in ("masks", "boxes", "points", "area", "predicted_iou", "stability_score", "annotation_id"):
            assert len(batch[name]) == offsets[-1]
        assert batch["masks"].shape[1:] == (SIDE, SIDE) and batch["boxes"].shape[1:] == (4,)
        for b, key in enumerate(batch["key"]):
            a = ds[key].annotations
            assert batch["annotation_id"][offsets[b] : offsets[b + 1]].tolist() == a.id.tolist()
    few = stream(ds, masks_per_image=None, min_area=1 << 40)
    assert all(batch["offsets"].tolist() == [0] * 6 and batch["masks"].shape == (0, SIDE, SIDE) for batch in few)


def test_ragged_is_the_dense_batch(ds: Dataset) -> None:
    options = {"flip": 0.5, "scale": (0.5, 1.5), "drop_last": False, "batch_size": 4}
    for dense, ragged in zip(
        stream(ds, masks_per_image=9, **options), stream(ds, masks_per_image=None, **options), strict=True
    ):
        for name in ("masks", "boxes", "points", "area", "annotation_id"):
            assert np.array_equal(dense[name][dense["valid"]], ragged[name]), name
        for name in ("image", "size", "is_padding"):
            assert np.array_equal(dense[name], ragged[name])


def test_without_images_or_masks(ds: Dataset) -> None:
    batch = next(iter(stream(ds, image_size=None, mask_size=None)))
    assert "image" not in batch and "masks" not in batch
    for b, key in enumerate(batch["key"]):
        a = ds[key].annotations
        at = [a.id.tolist().index(i) for i in batch["annotation_id"][b][batch["valid"][b]]]
        x, y, w, h = a.bbox[at].T
        assert np.array_equal(batch["boxes"][b][: len(at)], np.float32(np.stack([x, y, x + w, y + h], 1)))
        assert batch["size"][b].tolist() == [a.height, a.width]


FILTERS: dict[str, tuple[dict[str, Any], Any]] = {
    "min_area": ({"min_area": 100}, lambda a: a.area >= 100),
    "max_area_fraction": ({"max_area_fraction": 0.3}, lambda a: a.area <= 0.3 * a.height * a.width),
    "min_predicted_iou": ({"min_predicted_iou": 0.94}, lambda a: a.predicted_iou >= 0.94),
    "min_stability_score": ({"min_stability_score": 0.97}, lambda a: a.stability_score >= 0.97),
    "none pass": ({"min_area": 1 << 40}, lambda a: a.area < 0),
}


@pytest.mark.parametrize("name", FILTERS)
def test_filters(ds: Dataset, name: str) -> None:
    options, passes = FILTERS[name]
    had = total = 0
    got = samples(ds, list(stream(ds, masks_per_image=9, **options)))
    assert len(got) == len(ds)  # the number of samples never depends on their content
    for sample, row in got:
        a = sample.annotations
        assert row["annotation_id"][row["valid"]].tolist() == a.id[passes(a)].tolist()
        had, total = had + int(row["valid"].sum()), total + len(a)
    assert had < total and (had > 0) == (name != "none pass")


def test_the_choice_hangs_on_seed_epoch_and_image_alone(ds: Dataset) -> None:
    def chosen(**options: Any) -> dict[str, list[int]]:
        return {s.key: r["annotation_id"][r["valid"]].tolist() for s, r in samples(ds, list(stream(ds, **options)))}

    first = chosen(seed=1)
    assert chosen(seed=1, batch_size=2, threads=1, image_size=None, mask_size=4) == first
    assert chosen(seed=2) != first and chosen(seed=1, epoch=1) != first
    assert chosen(seed=1, masks_per_image=9) != first
    counts: dict[int, int] = {}
    rich = max((s for s in ds), key=lambda s: len(s.annotations))
    for seed in range(200):
        for i in chosen_of(rich, seed):
            counts[i] = counts.get(i, 0) + 1
    n = len(rich.annotations)
    assert n == 7 and len(counts) == n  # every mask has its turn, about as often as any other
    assert max(counts.values()) < 1.5 * 200 * M / n and min(counts.values()) > 0.5 * 200 * M / n


def chosen_of(sample: Sample, seed: int) -> list[int]:
    from sa1b_wds.choice import choose

    return list(choose(np.arange(len(sample.annotations)), M, seed, 0, sample.image_id))


@given(
    st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 1500), st.floats(0.05, 20), st.floats(0.05, 20),
    st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 2**63 - 1),
)  # fmt: skip
def test_any_window(height: int, width: int, pixels: int, one: float, two: float, flip: float, image_id: int) -> None:
    """Whatever is drawn: a window that meets the image, its picture in the square, black at the bottom and right."""
    f = Augment(flip=flip, scale=(min(one, two), max(one, two))).frame(height, width, 1, 2, image_id)
    y, x, h, w = f.visible
    assert h > 0 and w > 0 and y + h <= height and x + w <= width
    assert f.top == y and (f.left == x or (f.flip and f.left < 0 and x == 0))
    rows, columns = f.size(pixels)
    assert 1 <= rows <= pixels and 1 <= columns <= pixels
    assert max(rows, columns) == pixels or f.side > max(h, w)
    inside = np.array([[x, y], [x + w - 1, y], [x, y + h - 1], [x + w - 1, y + h - 1]], float)
    assert f.inside(inside).all()
    assert not f.inside(np.array([[x - 1.0, y], [x + f.side, y], [x, y - 1.0], [x, y + f.side]])).any() or f.flip
    points = f.points(inside, pixels)
    assert points.min() >= 0 and points.max() <= pixels
    assert np.isclose(sorted(points[:, 0])[0], 0) and np.isclose(points[:, 1].min(), 0)  # nothing black above or left
    box = f.boxes(np.array([[x, y, w - 1, h - 1]], float), pixels)[0]
    assert np.allclose(box, [points[:, 0].min(), points[:, 1].min(), points[:, 0].max(), points[:, 1].max()])


def test_golden_choice_and_window() -> None:
    """What a state resumes must be the same with the next release."""
    from sa1b_wds.choice import choose

    assert choose(np.arange(20), 5, 1, 2, 223_750).tolist() == GOLDEN_CHOICE
    f = Augment(flip=0.5, scale=(0.5, 2.0)).frame(1500, 2250, 1, 2, 223_750)
    assert (f.top, f.left, f.side, f.flip) == GOLDEN_FRAME
    f = Augment(flip=0.5, scale=(0.5, 2.0)).frame(1500, 2250, 1, 3, 223_751)
    assert (f.top, f.left, f.side, f.flip) == GOLDEN_FRAME_2


GOLDEN_CHOICE = [1, 4, 5, 11, 18]
GOLDEN_FRAME = (6, 273, 1393, True)
GOLDEN_FRAME_2 = (261, 916, 1219, False)


def test_windows_are_spread_over_the_image() -> None:
    frames = [Augment(flip=0.5, scale=(1.0, 4.0)).frame(1500, 2250, 0, 0, i) for i in range(2000)]
    assert 0.45 < np.mean([f.flip for f in frames]) < 0.55
    zoom = np.array([2250 / f.side for f in frames])
    assert zoom.min() > 0.99 and zoom.max() < 4.01 and 2.4 < zoom.mean() < 2.6
    assert all(f.top + f.side <= max(1500, f.side) and f.left >= 0 and f.left + f.side <= 2250 for f in frames)
    across = [f.left / (2250 - f.side) for f in frames if f.side < 1500]
    assert 0.45 < np.mean(across) < 0.55 and min(across) < 0.02 and max(across) > 0.98


@pytest.mark.parametrize("name", ["none", "flip", "crop", "zoom"])
def test_image_masks_boxes_and_points_lie_on_each_other(tmp_path: Path, name: str) -> None:
    """Each image is white where its mask is: whatever is done to one must be done to the other."""
    members = []
    for i in range(1, 13):
        h, w = (90, 120) if i % 2 else (130, 80)
        y, x, tall, wide = 20 + i, 15 + 2 * i, 30, 24
        drawn = np.zeros((h, w), np.uint8)
        drawn[y : y + tall, x : x + wide] = 1
        doc = making.document(i, height=h, width=w, annotations=1)
        doc["annotations"][0] |= {
            "bbox": [float(x), float(y), float(wide - 1), float(tall - 1)],
            "area": tall * wide,
            "segmentation": {"size": [h, w], "counts": rle.encode(drawn).decode()},
            "point_coords": [[x + wide / 2, y + tall / 2]],
        }
        jpg = simplejpeg.encode_jpeg(np.repeat(drawn[:, :, None] * 255, 3, 2), 95, "RGB", "444")
        members += [making.Member(f"./sa_{i}.jpg", jpg), making.Member(f"./sa_{i}.json", making.text(doc))]
    running.convert(running.write(tmp_path, {"sa_000000.tar": making.tar(members)}), tmp_path / "dest", shards=2)
    checked = 0
    for batch in stream(open(tmp_path / "dest"), image_size=128, mask_size=128, masks_per_image=1, **AUGMENTS[name]):
        for b in np.flatnonzero(batch["valid"][:, 0]):
            white, mask = batch["image"][b, :, :, 1], batch["masks"][b, 0]
            assert np.mean((white > 127) == mask) > 0.985
            rows, columns = np.nonzero(mask)
            x0, y0, x1, y1 = batch["boxes"][b, 0]
            scale = 128 / max(batch["original_size"][b]) * 4  # a pixel or so of the source, at the largest zoom
            assert abs(x0 - columns.min()) <= scale and abs(x1 - columns.max()) <= scale
            assert abs(y0 - rows.min()) <= scale and abs(y1 - rows.max()) <= scale
            px, py = batch["points"][b, 0]
            assert mask[int(py), int(px)] == 1
            checked += 1
    assert checked >= 4


@pytest.mark.skipif(
    not (SHARED / "real_json" / "sa_1.json").exists(), reason=f"no real images and documents at {SHARED}"
)
def test_a_real_image(tmp_path: Path) -> None:
    """SA-1B's own sa_1: masks by pycocotools, the picture by PIL."""
    jpg, document = ((SHARED / f"real_{kind}" / f"sa_1.{kind}").read_bytes() for kind in ("jpg", "json"))
    members = [making.Member("./sa_1.jpg", jpg), making.Member("./sa_1.json", document)]
    running.convert(running.write(tmp_path, {"sa_000000.tar": making.tar(members)}), tmp_path / "dest", shards=1)
    ds = open(tmp_path / "dest")
    batch = next(iter(ds.stream(batch_size=1, rank=0, world_size=1, threads=1)))
    sample = ds["sa_1"]
    a, n = sample.annotations, len(sample.annotations)
    assert sample.json == document and batch["valid"][0].sum() == n > 0
    assert np.array_equal(
        batch["masks"][0, :n], sampled(seen(full_masks(sample), frame(a.height, a.width)), 256, False)
    )
    rows, columns = batch["size"][0].tolist()
    assert max(rows, columns) == 1024 == batch["image"].shape[1]
    with Image.open(io.BytesIO(jpg)) as picture:
        truth = np.asarray(picture.convert("RGB").resize((columns, rows), Image.Resampling.BOX), np.float64)
    error = np.mean((batch["image"][0, :rows, :columns] - truth) ** 2)
    assert 10 * np.log10(255**2 / error) > 30
    assert not batch["image"][0, rows:].any() and not batch["image"][0, :, columns:].any()


def test_padding_repeats_are_flagged_and_equal(ds: Dataset) -> None:
    last = list(stream(ds, batch_size=7))[-1]
    pad = np.flatnonzero(last["is_padding"])
    assert pad.tolist() == [4, 5, 6]  # 25 = 3 · 7 + 4
    for b in pad:
        assert last["key"][b] == last["key"][3]
        for name in ("image", "masks", "boxes", "valid", "size"):
            assert np.array_equal(last[name][b], last[name][3])


def test_rles_of_another_size_than_the_image(tmp_path: Path) -> None:
    doc = making.document(1, height=24, width=32, annotations=3)
    small = np.zeros((12, 16), np.uint8)
    small[3:9, 2:11] = 1
    doc["annotations"][1]["segmentation"] = {"size": [12, 16], "counts": rle.encode(small).decode()}
    doc["annotations"][1]["area"] = int(small.sum())
    members = [making.Member("./sa_1.jpg", making.jpg(24, 32)), making.Member("./sa_1.json", making.text(doc))]
    running.convert(running.write(tmp_path, {"sa_000000.tar": making.tar(members)}), tmp_path / "dest", shards=1)
    for flip in (0.0, 1.0):
        batch = next(iter(stream(open(tmp_path / "dest"), batch_size=1, flip=flip)))
        full = np.repeat(np.repeat(small, 2, 0), 2, 1)
        f = frame(24, 32, flip=bool(flip))
        assert np.array_equal(batch["masks"][0, 1], sampled(seen(full, f), SIDE, f.flip))


def test_batches_belong_to_whoever_holds_them(ds: Dataset) -> None:
    """Memory is used again, but never under anybody's hands."""
    s = stream(ds, batch_size=2, prefetch=1)
    held, copies = [], []
    for batch in s:
        held.append(batch["masks"][1:])  # a view on a part keeps all of it
        copies.append(held[-1].copy())
    assert all(np.array_equal(a, b) for a, b in zip(held, copies, strict=True))
    addresses = set()
    batch = None
    for _ in range(8):
        for batch in s:
            addresses.add(batch["image"].__array_interface__["data"][0])
    assert batch is not None and len(addresses) <= 8  # of 104 batches: prefetch + 1 at once, and two here
    assert all(np.array_equal(a, b) for a, b in zip(held, copies, strict=True))


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 0}, {"image_size": 0}, {"image_size": 1.5}, {"mask_size": -1}, {"masks_per_image": 0},
        {"mask_mode": "linear"}, {"min_area": -1}, {"max_area_fraction": 1.5}, {"min_predicted_iou": -0.1},
        {"min_stability_score": 2}, {"flip": 2}, {"scale": (2, 1)}, {"scale": (0, 1)}, {"seed": -1}, {"epoch": -1},
        {"threads": 0}, {"fetch_threads": 0}, {"read_ahead": -1}, {"prefetch": -1}, {"on_error": "ignore"},
        {"max_skipped": -1}, {"rank": 3}, {"world_size": None},
    ],
)  # fmt: skip
def test_options_that_cannot_be(ds: Dataset, wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        stream(ds, **wrong)
