"""RLE kernels against pycocotools, and against plain numpy where pycocotools has no such thing."""

import json
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco

from sa1b_wds import codes, raster, rle
from sa1b_wds.errors import SampleRejected, UsageError
from sa1b_wds.geometry import Window, square

REAL = Path(__file__).parents[2] / "shared" / "data" / "real_json"

Array = npt.NDArray[Any]

# pycocotools' result does not know numpy 2's `copy` keyword.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


# Plain oracles


def plain_runs(text: bytes) -> list[int] | None:
    """The runs of a string, or None where it is not valid: slow, and with numbers of any length."""
    runs: list[int] = []
    at = 0
    while at < len(text):
        value, shift, start = 0, 0, at
        while True:
            if at >= len(text) or not 48 <= text[at] <= 111:
                return None
            digit = text[at] - 48
            at += 1
            value |= (digit & 31) << shift
            shift += 5
            if not digit & 32:
                break
        if at - start > 6:
            return None
        value -= (1 << shift) if digit & 16 else 0
        value += runs[-2] if len(runs) > 2 else 0
        if not 0 <= value <= 1 << 28:
            return None
        runs.append(value)
    return runs


def paint(runs: list[int], height: int, width: int) -> Array:
    flat = np.repeat(np.arange(len(runs)) % 2, runs).astype(np.uint8)
    mask: Array = flat.reshape(width, height).T
    return mask


def plain_nearest(mask: Array, size: tuple[int, int], window: Window, flip: bool) -> Array:
    y0, x0, h, w = window
    rows = y0 + (2 * np.arange(size[0]) + 1) * h // (2 * size[0])
    columns = x0 + (2 * np.arange(size[1]) + 1) * w // (2 * size[1])
    inside: Array = ((rows >= 0) & (rows < mask.shape[0]))[:, None] & ((columns >= 0) & (columns < mask.shape[1]))
    taken: Array = mask[np.clip(rows, 0, mask.shape[0] - 1)][:, np.clip(columns, 0, mask.shape[1] - 1)] * inside
    mirrored: Array = taken[:, ::-1]
    return mirrored if flip else taken


def overlaps(length: int, target: int, origin: int, span: int) -> Array:
    """[target, length] int: how much of source pixel a lies in target pixel i, in units of 1 / target."""
    low, high = (np.arange(length) - origin) * target, (np.arange(length) - origin + 1) * target
    begin, end = np.arange(target) * span, (np.arange(target) + 1) * span
    shared: Array = np.clip(np.minimum(high, end[:, None]) - np.maximum(low, begin[:, None]), 0, None)
    return shared


def plain_area(mask: Array, size: tuple[int, int], window: Window, flip: bool) -> Array:
    """Covered areas as exact integers, out of window height · window width."""
    down = overlaps(mask.shape[0], size[0], window[0], window[2])
    along = overlaps(mask.shape[1], size[1], window[1], window[3])
    # Below 2**53, so float64 holds them, and multiplies faster.
    covered: Array = (down.astype(float) @ mask.astype(float) @ along.T.astype(float)).astype(np.int64)
    mirrored: Array = covered[:, ::-1]
    return mirrored if flip else covered


def line(*texts: bytes) -> tuple[Array, Array]:
    return np.frombuffer(b"".join(texts), np.uint8), np.cumsum([0, *map(len, texts)])


def one(runs: list[int]) -> tuple[Array, Array]:
    return line(rle.encode_runs(runs))


# Strategies


@st.composite
def run_lists(draw: st.DrawFn, side: int = 24) -> tuple[int, int, list[int]]:
    """h, w and runs that add up, with runs of length 0 anywhere."""
    height, width = draw(st.integers(1, side)), draw(st.integers(1, side))
    left = height * width
    runs: list[int] = []
    longest = draw(st.sampled_from([2, height, 3 * height, left]))
    for run in draw(st.lists(st.integers(0, longest), max_size=60)):
        runs.append(min(run, left))
        left -= runs[-1]
    if left:
        runs.append(left)
    return height, width, runs


@st.composite
def geometries(draw: st.DrawFn, height: int, width: int) -> tuple[tuple[int, int], Window, bool]:
    """A target size, a window (whole, padded to a square, inside, partly or wholly outside), and a flip."""
    side = max(height, width)
    window = draw(
        st.sampled_from([(0, 0, height, width), (0, 0, side, side)])
        | st.tuples(
            st.integers(-height - 2, height + 2),
            st.integers(-width - 2, width + 2),
            st.integers(1, 40),
            st.integers(1, 40),
        )
    )
    size = draw(st.sampled_from([(height, width), window[2:]]) | st.tuples(st.integers(1, 50), st.integers(1, 50)))
    return size, window, draw(st.booleans())


def blobs(seed: int, height: int, width: int) -> Array:
    """A few ellipses, cut by the edges: masks that look like objects."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    mask = np.zeros((height, width), bool)
    for _ in range(rng.integers(1, 5)):
        cy, cx = rng.random(2) * (height, width)
        ry, rx = rng.random(2) * (height / 2, width / 2) + 1
        mask ^= ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1
    return mask.astype(np.uint8)


CORNERS = [
    (1, 1, [1]),
    (1, 1, [0, 1]),
    (3, 4, [12]),  # empty
    (3, 4, [0, 12]),  # full
    (3, 4, [0, 3, 9]),
    (3, 4, [3, 9]),  # ends with the last pixel
    (3, 4, [2, 2, 8]),  # over the foot of a column
    (3, 4, [2, 9, 1]),  # over several
    (3, 4, [0, 0, 0, 0, 3, 0, 0, 9]),
    (3, 4, [4, 0, 2, 2, 4, 0]),
    (1, 9, [2, 3, 4]),
    (9, 1, [2, 3, 4]),
]


# Strings


@pytest.mark.parametrize(("height", "width", "runs"), CORNERS)
def test_corners_agree_with_pycocotools(height: int, width: int, runs: list[int]) -> None:
    text = coco.frPyObjects([{"size": [height, width], "counts": runs}], height, width)[0]["counts"]
    mask = coco.decode({"size": [height, width], "counts": text})
    assert rle.encode_runs(runs) == text
    assert rle.runs(text).tolist() == runs
    assert rle.check(*line(text), height, width).tolist() == [mask.sum()]
    assert (rle.decode(*line(text), (height, width))[0] == mask).all()


@given(run_lists())
def test_strings_areas_and_masks_are_those_of_pycocotools(case: tuple[int, int, list[int]]) -> None:
    height, width, runs = case
    text = coco.frPyObjects([{"size": [height, width], "counts": runs}], height, width)[0]["counts"]
    known = {"size": [height, width], "counts": text}
    assert rle.encode_runs(runs) == text
    assert rle.runs(text).tolist() == runs
    counts, offsets = line(text)
    assert rle.check(counts, offsets, height, width).tolist() == [coco.area(known)]
    assert (rle.decode(counts, offsets, (height, width))[0] == coco.decode(known)).all()


@given(run_lists())
def test_boxes_and_encoding_are_those_of_pycocotools(case: tuple[int, int, list[int]]) -> None:
    height, width, runs = case
    mask = paint(runs, height, width)
    known = coco.encode(np.asfortranarray(mask))
    assert rle.encode(mask) == rle.encode(mask.astype(bool)) == rle.encode(mask * 7) == known["counts"]
    assert rle.encode(mask[::-1, ::-1]) == coco.encode(np.asfortranarray(mask[::-1, ::-1]))["counts"]
    expected = coco.toBbox(known) - [0, 0, 1, 1] if mask.any() else np.zeros(4)
    # Also from the runs as they came: runs of length 0 draw no box.
    assert rle.boxes(*line(known["counts"], rle.encode_runs(runs)), height, width).tolist() == [expected.tolist()] * 2


@pytest.mark.parametrize("seed", range(6))
def test_encode_and_decode_of_objects(seed: int) -> None:
    mask = blobs(seed, 331, 457)
    known = coco.encode(np.asfortranarray(mask))
    assert rle.encode(mask) == known["counts"]
    counts, offsets = line(known["counts"])
    assert (rle.decode(counts, offsets, mask.shape)[0] == mask).all()
    assert rle.check(counts, offsets, *mask.shape)[0] == mask.sum()
    assert (rle.boxes(counts, offsets, *mask.shape)[0] == coco.toBbox(known) - [0, 0, 1, 1]).all()


def test_encode_of_a_mask_with_many_changes() -> None:
    mask = (np.indices((130, 200)).sum(0) % 2).astype(np.uint8)
    assert rle.encode(mask) == coco.encode(np.asfortranarray(mask))["counts"]


def test_long_runs_and_superfluous_digits() -> None:
    pixels = 1 << 28
    text = rle.encode_runs([0, pixels])
    assert rle.check(*line(text), 1 << 14, 1 << 14).tolist() == [pixels]
    assert rle.boxes(*line(text), 1 << 14, 1 << 14).tolist() == [[0, 0, (1 << 14) - 1, (1 << 14) - 1]]
    assert rle.runs(b"RPP0a0").tolist() == [2, 1 | 1 << 4]  # 2 in four characters where one would do
    assert plain_runs(b"RPP0a0") == [2, 17]


@given(st.binary(max_size=40) | st.lists(st.integers(48, 111), max_size=40).map(bytes))
@example(b"oooooo0")
@example(b"PPPPP0")
@example(b"PPPPPP0")
@example(b"oooooO")
def test_any_bytes_are_read_as_a_plain_reader_reads_them(text: bytes) -> None:
    expected = plain_runs(text)
    try:
        found: list[int] | None = rle.runs(text).tolist()
    except SampleRejected:
        found = None
    assert found == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "RLE runs do not add up: expected 12, found 0"),
        (b";", "RLE runs do not add up: expected 12, found 11"),
        (b"=", "RLE runs do not add up: expected 12, found 13"),
        (rle.encode_runs([5, 3, 3]), "RLE runs do not add up: expected 12, found 11"),
        (rle.encode_runs([5, 3, 5]), "RLE runs do not add up: expected 12, found 13"),
        (rle.encode_runs([0, 1 << 28]), "RLE runs do not add up: expected 12, found 268,435,456"),
        (b"5o", "the RLE string ends inside a number, at character 1"),
        (b"5~", "a character that RLE strings do not have, at character 1: expected a byte of 48..111, found 126"),
        (b"\0", "a character that RLE strings do not have, at character 0: expected a byte of 48..111, found 0"),
        (b"5o/", "a character that RLE strings do not have, at character 2: expected a byte of 48..111, found 47"),
        (b"5PPPPPP0", "an RLE number that is too long, at character 1"),
        (b"5O", "a negative RLE run, at character 1"),
        (b"5111K", "a negative RLE run, at character 4"),
        (b"PPPPPh0", "an RLE number that is too long, at character 0"),
        (b"QPPPP8", "an RLE run over the limit, at character 0"),
    ],
)
def test_wrong_strings_are_rejected_with_their_place(text: bytes, message: str) -> None:
    counts, offsets = line(rle.encode_runs([12]), text)
    full = f"annotations[1].segmentation.counts: {message}"
    calls: list[Callable[[], object]] = [
        lambda: rle.check(counts, offsets, 3, 4),
        lambda: rle.boxes(counts, offsets, 3, 4),
        lambda: rle.decode(counts, offsets, (3, 4)),
        lambda: rle.decode(counts, offsets, (3, 4), (2, 2), mode="area"),
    ]
    for call in calls:
        with pytest.raises(SampleRejected) as caught:
            call()
        assert str(caught.value) == full
        assert str(pickle.loads(pickle.dumps(caught.value))) == full
    assert rle.decode(counts, offsets, (3, 4), index=[0]).tolist() == np.zeros((1, 3, 4)).tolist()


@given(run_lists(8), st.data())
def test_runs_that_end_early_or_late_are_rejected(case: tuple[int, int, list[int]], data: st.DataObject) -> None:
    height, width, runs = case
    i = data.draw(st.integers(0, len(runs) - 1))
    runs[i] += data.draw(st.sampled_from([-1, 1, height, 1 << 20]).filter(lambda d: runs[i] + d >= 0))
    for call in (
        lambda: rle.check(*one(runs), height, width),
        lambda: rle.boxes(*one(runs), height, width),
        lambda: rle.decode(*one(runs), (height, width), (3, 3)),
        lambda: rle.decode(*one(runs), (height, width), (3, 3), mode="area"),
    ):
        with pytest.raises(SampleRejected, match="do not add up") as caught:
            call()
        assert (caught.value.expected, caught.value.found) == (height * width, sum(runs))


@pytest.mark.parametrize("offsets", [[0, 3, 2], [-1, 2], [0, 3], [2, 1], [0, 1 << 62], [-(1 << 62), 1]])
def test_offsets_that_do_not_rise_or_point_outside(offsets: list[int]) -> None:
    counts = np.frombuffer(b"0<", np.uint8)
    for call in (
        lambda: rle.check(counts, offsets, 3, 4),
        lambda: rle.boxes(counts, offsets, 3, 4),
        lambda: rle.decode(counts, offsets, (3, 4)),
    ):
        with pytest.raises(SampleRejected):
            call()


@pytest.mark.parametrize(
    "size", [(0, 4), (4, 0), (-1, -12), (65_536, 1), (1, 65_536), (16_385, 16_384), (10**6, 10**6)]
)
def test_sizes_outside_the_limits(size: tuple[int, int]) -> None:
    counts, offsets = line(b"<")
    for call in (
        lambda: rle.check(counts, offsets, *size),
        lambda: rle.boxes(counts, offsets, *size),
        lambda: rle.decode(counts, offsets, size, (2, 2)),
    ):
        with pytest.raises(SampleRejected, match="size outside the limits"):
            call()


def test_no_strings_at_all() -> None:
    counts, offsets = line()
    assert rle.check(counts, offsets, 3, 4).shape == (0,)
    assert rle.boxes(counts, offsets, 3, 4).shape == (0, 4)
    assert rle.decode(counts, offsets, (3, 4), (5, 6)).shape == (0, 5, 6)


def test_encoding_refuses_what_is_no_mask() -> None:
    with pytest.raises(UsageError, match="negative"):
        rle.encode_runs([3, -1])
    with pytest.raises(UsageError, match="over the limit"):
        rle.encode_runs([(1 << 28) + 1])
    with pytest.raises(UsageError, match="not a mask"):
        rle.encode(np.zeros((2, 2, 2), np.uint8))
    with pytest.raises(UsageError, match="not a mask"):
        rle.encode(np.zeros((2, 2)))
    with pytest.raises(SampleRejected, match="outside the limits"):
        rle.encode(np.zeros((0, 2), np.uint8))


# Pixels


@settings(max_examples=300)
@given(run_lists(), st.data())
def test_nearest_is_full_size_then_sampling(case: tuple[int, int, list[int]], data: st.DataObject) -> None:
    height, width, runs = case
    size, window, flip = data.draw(geometries(height, width))
    out = rle.decode(*one(runs), (height, width), size, window=window, flip=flip)
    assert out.dtype == np.uint8
    assert out[0].tolist() == plain_nearest(paint(runs, height, width), size, window, flip).tolist()


@settings(max_examples=300)
@given(run_lists(), st.data())
def test_area_is_the_exact_covered_fraction(case: tuple[int, int, list[int]], data: st.DataObject) -> None:
    height, width, runs = case
    size, window, flip = data.draw(geometries(height, width))
    covered, whole = plain_area(paint(runs, height, width), size, window, flip), window[2] * window[3]
    fractions = rle.decode(*one(runs), (height, width), size, window=window, flip=flip, mode="area")
    assert fractions.dtype == np.float32
    assert fractions[0].tolist() == (covered / whole).astype(np.float32).tolist()
    levels = rle.decode(*one(runs), (height, width), size, window=window, flip=flip, mode="area", dtype=np.uint8)
    assert levels.dtype == np.uint8
    assert levels[0].tolist() == ((510 * covered + whole) // (2 * whole)).tolist()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("size", [(64, 64), (301, 222), (1, 1), (37, 500), (700, 640)])
def test_objects_at_many_sizes(seed: int, size: tuple[int, int]) -> None:
    mask = blobs(seed, 301, 222 + seed)
    counts, offsets = line(rle.encode(mask))
    height, width = mask.shape
    windows = [(0, 0, height, width), (0, 0, height, height), (-50, 33, 201, 350), (100, 100, 3, 5), (400, 0, 10, 10)]
    for window in windows:
        for flip in (False, True):
            near = rle.decode(counts, offsets, mask.shape, size, window=window, flip=flip)
            assert (near[0] == plain_nearest(mask, size, window, flip)).all()
            area = rle.decode(counts, offsets, mask.shape, size, window=window, flip=flip, mode="area")
            expected = plain_area(mask, size, window, flip) / (window[2] * window[3])
            assert (area[0] == expected.astype(np.float32)).all()


def test_area_in_a_window_as_large_as_can_be() -> None:
    # The sums of a full target pixel come up to 65,535 squared: all but the last of 32 bits.
    source, window = (65_535, 4_096), (0, 0, 65_535, 65_535)
    counts, offsets = one([0, source[0] * source[1]])
    out = rle.decode(counts, offsets, source, (1, 2), window=window, mode="area")
    assert out.tolist() == [[[np.float32(8_192 / 65_535), 0.0]]]
    full = rle.decode(counts, offsets, source, (1, 1), window=(0, 0, 65_535, 4_096), mode="area")
    assert full.tolist() == [[[1.0]]]


def test_masks_of_an_index_in_its_order() -> None:
    masks = [blobs(seed, 40, 50) for seed in range(5)]
    counts, offsets = line(*map(rle.encode, masks))
    out = rle.decode(counts, offsets, (40, 50), index=[3, 0, 3])
    assert (out == np.stack([masks[3], masks[0], masks[3]])).all()
    assert rle.decode(counts, offsets, (40, 50), index=[]).shape == (0, 40, 50)
    for index in ([5], [-1], [[0]]):
        with pytest.raises(UsageError, match="index outside the masks"):
            rle.decode(counts, offsets, (40, 50), index=index)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["nearest", "area"])
def test_writes_into_a_slice_of_a_batch_and_nowhere_else(mode: raster.Mode) -> None:
    masks = [blobs(seed, 90, 70) for seed in range(3)]
    counts, offsets = line(*map(rle.encode, masks))
    dtype = np.uint8 if mode == "nearest" else np.float32
    expected = rle.decode(counts, offsets, (90, 70), (20, 30), mode=mode)
    for part in (
        np.s_[1, 2:5, 2:22, 5:35],  # rows apart
        np.s_[0, ::3, 4:, :30],  # masks apart too
        np.s_[0, :3, :20, :30],
    ):
        batch, outside = np.full((2, 7, 24, 40), 9, dtype), np.ones((2, 7, 24, 40), bool)
        outside[part] = False
        out = batch[part]
        assert rle.decode(counts, offsets, (90, 70), (20, 30), out=out, mode=mode) is out
        assert (batch[part] == expected).all()
        assert (batch[outside] == 9).all()


def test_out_that_cannot_be_written_is_refused() -> None:
    counts, offsets = line(b"<")
    fixed = np.zeros((1, 3, 4), np.uint8)
    fixed.flags.writeable = False
    bad: list[tuple[Array, str]] = [
        (np.zeros((1, 4, 3), np.uint8), "wrong shape"),
        (np.zeros((2, 3, 4), np.uint8), "wrong shape"),
        (np.zeros((1, 3, 4), np.int8), "wrong dtype"),
        (np.zeros((1, 3, 4), np.float32), "wrong dtype"),
        (np.zeros((1, 4, 3), np.uint8).transpose(0, 2, 1), "cannot be written"),
        (np.zeros((1, 3, 8), np.uint8)[:, :, ::2], "cannot be written"),
        (np.zeros((1, 3, 4), np.uint8)[:, ::-1], "cannot be written"),
        (fixed, "cannot be written"),
    ]
    for out, message in bad:
        with pytest.raises(UsageError, match=message):
            rle.decode(counts, offsets, (3, 4), out=out)
    with pytest.raises(UsageError, match="wrong dtype"):
        rle.decode(counts, offsets, (3, 4), out=np.zeros((1, 3, 4)), mode="area")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="wrong dtype"):
        rle.decode(counts, offsets, (3, 4), dtype=np.float32)


def test_geometries_that_cannot_be_are_refused() -> None:
    counts, offsets = line(b"<")
    for size in ((0, 1), (1, -1), (65_536, 1), (65_535, 65_535)):
        with pytest.raises(UsageError, match="target size"):
            rle.decode(counts, offsets, (3, 4), size)
    for window in ((0, 0, 0, 4), (0, 0, 3, 65_536), (1 << 40, 0, 3, 4), (0, -(1 << 40), 3, 4)):
        with pytest.raises(UsageError, match="window"):
            rle.decode(counts, offsets, (3, 4), (2, 2), window=window)
    with pytest.raises(UsageError, match="no such mode"):
        rle.decode(counts, offsets, (3, 4), mode="bilinear")  # type: ignore[arg-type]


def test_square_pads_below_and_on_the_right_also_when_flipped() -> None:
    mask = np.ones((30, 40), np.uint8)
    counts, offsets = line(rle.encode(mask))
    for window in ((0, 0, 30, 40), (3, 4, 20, 7), (3, 4, 7, 20)):
        for flip in (False, True):
            padded = square(window, flip)
            out = rle.decode(counts, offsets, (30, 40), padded[2:], window=padded, flip=flip)[0]
            inside = rle.decode(counts, offsets, (30, 40), window=window, flip=flip)[0]
            assert (out[: window[2], : window[3]] == inside).all()


# Bytes that nobody wrote


def test_kernels_survive_garbage() -> None:
    """Bytes, offsets and indices at random: an error or a result, and no byte outside the output is touched."""
    rng = np.random.default_rng(5)
    guarded = np.full(4_096, 77, np.uint8)
    plane = np.full(4_096, 77, np.float32)
    accepted = 0
    for round_ in range(6_000):
        low, high = ((0, 256), (48, 112), (48, 80))[round_ % 3]
        counts = rng.integers(low, high, rng.integers(0, 60), dtype=np.uint8)
        n = int(rng.integers(1, 5))
        offsets = np.sort(rng.integers(-2, len(counts) + 3, n + 1))
        if round_ % 5 == 0:
            offsets = rng.integers(-(1 << 63), (1 << 63) - 1, n + 1)
        height, width = map(int, rng.integers(1, 20, 2))
        size = int(rng.integers(1, 20)), int(rng.integers(1, 20))
        window = (*map(int, rng.integers(-9, 9, 2)), *map(int, rng.integers(1, 30, 2)))
        flip = bool(rng.integers(2))
        index = rng.integers(-1, n + 1, 2)
        if round_ % 7 == 0:
            index = np.array([rng.integers(-(1 << 63), (1 << 63) - 1), (1 << 63) - 1])
        inside = 2 * size[0] * size[1]
        both: list[tuple[raster.Mode, Array]] = [("nearest", guarded), ("area", plane)]
        for mode, out in both:
            grid = raster.raster((height, width), size, window, flip, mode)
            out[:] = 77
            _, code = grid.draw(counts, offsets, index, out[64 : 64 + inside].reshape(2, *size))
            assert code in codes.REASONS or code == 0
            accepted += code == 0
            assert (out[:64] == 77).all()
            assert (out[64 + inside :] == 77).all()
        for check in (rle.check, rle.boxes):
            try:
                check(counts, offsets, height, width)
            except SampleRejected:
                continue
    # Sums that fit by chance are rare, so cut strings of valid masks too.
    text = rle.encode(blobs(1, 60, 50))
    for _ in range(3_000):
        broken = np.frombuffer(text, np.uint8).copy()
        for _ in range(rng.integers(0, 3)):
            broken[rng.integers(len(broken))] = rng.integers(256)
        offsets = np.array([0, len(broken) - rng.integers(0, 2)])
        for mode, _ in both:
            grid = raster.raster((60, 50), (16, 16), None, False, mode)
            small = np.empty((1, 16, 16), np.uint8)
            _, code = grid.draw(broken, offsets, np.zeros(1, np.int64), small)
            valid = plain_runs(broken[: offsets[1]].tobytes())
            assert (code == 0) == (valid is not None and sum(valid) == 3_000)
            accepted += code == 0
    assert accepted > 500


def test_threads_share_nothing_and_an_error_leaves_nothing_behind() -> None:
    masks = [blobs(seed, 120, 100) for seed in range(40)]
    counts, offsets = line(*map(rle.encode, masks))
    expected = np.stack([plain_area(mask, (32, 24), (0, 0, 120, 100), False) for mask in masks]) / 12_000

    def work(i: int) -> bool:
        bad, ends = line(rle.encode_runs([1_000, 5_000, 1]))
        with pytest.raises(SampleRejected):
            rle.decode(bad, ends, (120, 100), (32, 24), mode="area")
        out = rle.decode(counts, offsets, (120, 100), (32, 24), index=[i], mode="area")
        return bool((out[0] == expected[i].astype(np.float32)).all())

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, list(range(40)) * 5))


def test_all_kernels_run_without_the_gil() -> None:
    kernels = [
        value for module in (codes, raster) for value in vars(module).values() if hasattr(value, "targetoptions")
    ]
    assert len(kernels) > 8
    assert all(kernel.targetoptions["nogil"] for kernel in kernels)


# Real annotations


def real_documents() -> list[Any]:
    if not REAL.is_dir():
        return [pytest.param(None, marks=pytest.mark.skip(reason="no real SA-1B annotations beside the checkout"))]
    return [pytest.param(path, id=path.stem) for path in sorted(REAL.glob("*.json"))]


@pytest.mark.parametrize("path", real_documents())
def test_real_strings(path: Path) -> None:
    annotations = json.loads(path.read_bytes())["annotations"]
    height, width = annotations[0]["segmentation"]["size"]
    texts = [annotation["segmentation"]["counts"].encode() for annotation in annotations]
    counts, offsets = line(*texts)
    assert rle.check(counts, offsets, height, width).tolist() == [annotation["area"] for annotation in annotations]
    assert rle.boxes(counts, offsets, height, width).tolist() == [annotation["bbox"] for annotation in annotations]
    assert [rle.encode_runs(rle.runs(text)) for text in texts] == texts
    full = np.empty((1, height, width), np.uint8)
    side = max(height, width)
    for i, text in enumerate(texts[:8]):
        mask = coco.decode({"size": [height, width], "counts": text})
        assert (rle.decode(counts, offsets, (height, width), index=[i], out=full)[0] == mask).all()
        assert rle.encode(mask) == text
        for window in ((0, 0, height, width), (0, 0, side, side), (-31, 100, 777, 1_001)):
            near = rle.decode(counts, offsets, (height, width), (256, 256), index=[i], window=window)
            assert (near[0] == plain_nearest(mask, (256, 256), window, False)).all()
            area = rle.decode(counts, offsets, (height, width), (256, 256), index=[i], window=window, mode="area")
            expected = plain_area(mask, (256, 256), window, False) / (window[2] * window[3])
            assert (area[0] == expected.astype(np.float32)).all()
