"""Batches that carry runs instead of masks, drawn by a few lines of numpy, against the kernels' masks."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sa1b_wds
from sa1b_wds import rle
from sa1b_wds.dataset import Dataset, open
from sa1b_wds.errors import SampleRejected, UsageError

from . import making, running

SIDE = 20


def strings(texts: list[bytes]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    return np.frombuffer(b"".join(texts), np.uint8), np.cumsum([0, *map(len, texts)])


@given(
    st.integers(1, 9).flatmap(
        lambda h: st.integers(1, 9).flatmap(
            lambda w: st.tuples(
                st.just((h, w)),
                st.lists(st.lists(st.integers(0, 1), min_size=h * w, max_size=h * w), max_size=5),
            )
        )
    ),
    st.data(),
)
def test_ends_are_the_running_sums_of_the_runs(drawn: tuple[tuple[int, int], list[list[int]]], data: Any) -> None:
    (h, w), pixels = drawn
    masks = [np.array(p, np.uint8).reshape(h, w) for p in pixels]
    texts = [rle.encode(mask) for mask in masks]
    index = data.draw(st.none() | st.lists(st.integers(0, len(masks) - 1), max_size=6) if masks else st.none())
    ends, places = rle.ends(*strings(texts), h, w, index=index)
    assert ends.dtype == np.int32 and places.dtype == np.int64
    chosen = range(len(masks)) if index is None else index
    assert len(places) == len(chosen) + 1
    assert places[0] == 0
    assert places[-1] == len(ends)
    for i, a, b in zip(chosen, places[:-1], places[1:], strict=True):
        assert np.array_equal(ends[a:b], np.cumsum(rle.runs(texts[i])))


def test_what_cannot_be_drawn_is_rejected() -> None:
    counts, offsets = strings([rle.encode(making.mask(9, 7, i)) for i in range(3)])
    with pytest.raises(SampleRejected, match=r"annotations\[2\]\.segmentation\.counts: RLE runs do not add up"):
        rle.ends(counts, offsets, 9, 8, index=[2, 0])
    with pytest.raises(SampleRejected, match=r"annotations\[1\]\.segmentation\.counts: RLE offsets"):
        rle.ends(counts, [0, 30, 20, 40], 9, 7, index=[1])
    with pytest.raises(UsageError, match="index outside"):
        rle.ends(counts, offsets, 9, 7, index=[3])


@given(st.binary(max_size=30), st.lists(st.integers(-3, 40), min_size=1, max_size=5), st.integers(1, 9))
def test_no_bytes_break_the_kernel(counts: bytes, offsets: list[int], side: int) -> None:
    try:
        ends, places = rle.ends(np.frombuffer(counts, np.uint8), offsets, side, side)
    except SampleRejected:
        return
    assert all(ends[b - 1] == side * side for b in places[1:])


# ---- batches ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ds(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Images of many shapes with 0 to 5 masks, and one with a string of another size than its image."""
    folder = tmp_path_factory.mktemp("set")
    members = [m for i in range(1, 20) for m in making.pair(i, annotations=i % 6, height=16 + i % 9, width=34 - i % 11)]
    document = making.document(99, height=24, width=32, annotations=2)
    document["annotations"][1]["segmentation"] = {
        "size": [12, 16],
        "counts": rle.encode(making.mask(12, 16, 3)).decode(),
    }
    document["annotations"][1]["area"] = int(making.mask(12, 16, 3).sum())
    members += [making.Member("./sa_99.jpg", making.jpg(24, 32)), making.Member("./sa_99.json", making.text(document))]
    running.convert(running.write(folder, {"sa_000000.tar": making.tar(members)}), folder / "dest", shards=2)
    return open(folder / "dest")


def batches(ds: Dataset, **options: Any) -> list[dict[str, Any]]:
    few: dict[str, Any] = {"batch_size": 3, "image_size": 24, "mask_size": SIDE, "masks_per_image": 3, "threads": 2}
    return list(ds.stream(**{**few, "rank": 0, "world_size": 1, "drop_last": False, **options}))  # type: ignore[arg-type]


def drawn(batch: dict[str, Any], size: int) -> npt.NDArray[np.uint8]:
    """Every mask of a batch, pixel centre by pixel centre."""
    places = batch["run_offsets"]
    whose = np.repeat(np.arange(len(batch["key"])), 3)
    if "offsets" in batch:
        whose = np.repeat(np.arange(len(batch["key"])), np.diff(batch["offsets"]))
    out = np.zeros((len(whose), size, size), np.uint8)
    for i, b in enumerate(whose.tolist()):
        height, width = batch["original_size"][b].tolist()
        y0, x0, h, w = batch["window"][b].tolist()
        at = 2 * np.arange(size) + 1
        y, x = y0 + at * h // (2 * size), x0 + at * w // (2 * size)
        if batch["flip"][b]:
            x = x[::-1]
        before = np.searchsorted(batch["run_ends"][places[i] : places[i + 1]], x * height + y[:, None], side="right")
        there = (y[:, None] >= 0) & (y[:, None] < height) & (x >= 0) & (x < width)
        out[i] = there & (before % 2 == 1)
    return out


@pytest.mark.parametrize("options", [{}, {"flip": 0.5, "scale": (0.4, 2.5)}, {"min_area": 60}], ids=str)
@pytest.mark.parametrize("most", [3, None])
def test_runs_draw_the_masks(ds: Dataset, options: dict[str, Any], most: int | None) -> None:
    dense = batches(ds, masks_per_image=most, **options)
    runs = batches(ds, masks_per_image=most, mask_mode="runs", **options)
    assert len(dense) == len(runs) == 7
    for a, b in zip(dense, runs, strict=True):
        assert b.keys() ^ a.keys() == {"masks", "run_ends", "run_offsets", "window", "flip"}
        for name in a.keys() & b.keys():
            assert np.array_equal(a[name], b[name]), name
        assert b["run_offsets"][-1] == len(b["run_ends"])
        masks = drawn(b, SIDE)
        assert np.array_equal(masks.reshape(a["masks"].shape), a["masks"])
    assert sum(int(batch["is_padding"].sum()) for batch in runs) == 1


def test_no_mask_size_no_runs(ds: Dataset) -> None:
    (batch, *_) = batches(ds, mask_mode="runs", mask_size=None)
    assert not {"masks", "run_ends", "window"} & batch.keys()


def test_a_batch_with_nothing_sound_in_it_has_no_runs(ds: Dataset, tmp_path: Path) -> None:
    dest = Path(ds.where)
    copy = tmp_path / "dest"
    copy.mkdir()
    for path in dest.rglob("*"):
        if path.is_file():
            (copy / path.relative_to(dest)).parent.mkdir(exist_ok=True)
            data = bytearray(path.read_bytes())
            if path.suffix == ".tar":
                for i in range(700, len(data) - 1024, 512):
                    data[i] ^= 1
            (copy / path.relative_to(dest)).write_bytes(data)
    got = batches(open(copy), mask_mode="runs", on_error="skip", masks_per_image=3)
    assert all(batch["is_padding"].all() and not len(batch["run_ends"]) for batch in got)
    assert all(batch["run_offsets"].tolist() == [0] * 10 for batch in got)


def test_the_plain_pipeline_s_decoder_carries_them_too(ds: Dataset) -> None:
    decode = sa1b_wds.decoder(image_size=None, mask_size=SIDE, masks_per_image=3, mask_mode="runs")
    dense = sa1b_wds.decoder(image_size=None, mask_size=SIDE, masks_per_image=3)
    sample = ds["sa_5"]
    members = {"__key__": sample.key, "jpg": sample.jpg, "safetensors": sample.packed}
    row, truth = decode(members), dense(members)
    batch = {name: value[None] if isinstance(value, np.ndarray) else [value] for name, value in row.items()}
    batch |= {"run_ends": row["run_ends"], "run_offsets": row["run_offsets"]}
    assert np.array_equal(drawn(batch, SIDE), truth["masks"])
