"""JPEG headers and pixels, against PIL and against the kernels that draw masks with the same geometry."""

import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sa1b_wds import images, rle
from sa1b_wds.errors import SampleRejected, UsageError
from sa1b_wds.geometry import square
from sa1b_wds.images import Header

REAL = Path(__file__).parents[2] / "shared" / "data" / "real_jpg"

Array = npt.NDArray[Any]


def picture(height: int, width: int, seed: int = 0) -> Array:
    """Smooth waves with some noise: neither trivial to compress nor all noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / a + y / b) for a, b in rng.uniform(5, 40, (3, 2))]
    pixels = 127 + 90 * np.stack(waves, -1) + rng.normal(0, 8, (height, width, 3))
    return pixels.clip(0, 255).astype(np.uint8)


def jpeg(pixels: Array, mode: str = "RGB", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "JPEG", **{"quality": 95, **options})
    return file.getvalue()


def pil(jpg: bytes) -> Array:
    return np.asarray(Image.open(io.BytesIO(jpg)).convert("RGB"))


def psnr(a: Array, b: Array) -> float:
    error = float(np.mean((a.astype(float) - b) ** 2))
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def frame(jpg: bytes) -> int:
    """Where the frame header stands."""
    return next(jpg.index(bytes([0xFF, kind])) for kind in (0xC0, 0xC2) if bytes([0xFF, kind]) in jpg)


SMALL = jpeg(picture(50, 70))


# The header


@pytest.mark.parametrize(
    ("mode", "options", "components", "progressive"),
    [
        ("RGB", {}, 3, False),
        ("RGB", {"subsampling": 0}, 3, False),
        ("RGB", {"progressive": True}, 3, True),
        ("RGB", {"comment": b"x" * 60_000}, 3, False),
        ("RGB", {"restart_marker_blocks": 3}, 3, False),
        ("L", {}, 1, False),
        ("CMYK", {}, 4, False),
    ],
)
def test_headers_of_many_kinds(mode: str, options: dict[str, Any], components: int, progressive: bool) -> None:
    jpg = jpeg(picture(31, 45), mode, **options)
    expected = Header(height=31, width=45, components=components, precision=8, progressive=progressive)
    assert images.header(jpg) == images.header(memoryview(jpg)) == expected
    assert images.header(np.frombuffer(jpg, np.uint8).data) == expected


@pytest.mark.parametrize(("height", "width"), [(1, 1), (65_500, 1), (1, 65_500), (1500, 2250)])
def test_headers_of_many_sizes(height: int, width: int) -> None:
    found = images.header(jpeg(np.zeros((height, width, 3), np.uint8)))
    assert (found.height, found.width) == (height, width)


def test_a_header_behind_fill_bytes_and_an_embedded_thumbnail() -> None:
    thumbnail = jpeg(picture(8, 8))
    segment = b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
    found = images.header(SMALL[:2] + b"\xff\xff" + segment[0:] + b"\xff\xff" + SMALL[2:])
    assert (found.height, found.width) == (50, 70)


def test_every_cut_before_the_end_of_the_frame_header_is_told() -> None:
    end = frame(SMALL) + 2 + 8
    for length in range(end):
        with pytest.raises(SampleRejected, match="cut before its frame header") as caught:
            images.header(SMALL[:length], "sa_1.jpg")
        assert caught.value.where == "sa_1.jpg"
        assert caught.value.found == f"{length} bytes"
    assert images.header(SMALL[:end]).width == 70


def patched(at: int, new: bytes) -> bytes:
    at += frame(SMALL)
    return SMALL[:at] + new + SMALL[at + len(new) :]


@pytest.mark.parametrize(
    ("jpg", "message"),
    [
        (b"\x89PNG\r\n\x1a\n" + bytes(64), "not a JPEG: expected ff d8, found 89 50"),
        (b"\xff\xd8" + bytes(64), "no marker at byte 2: expected ff, found 00"),
        (b"\xff\xd8\xff\xd9\0\0", "a wrong segment at byte 2: found ff d9"),
        (b"\xff\xd8\xff\xda\0\x0c" + bytes(64), "a wrong segment at byte 2: found ff da"),
        (b"\xff\xd8\xff\xe0\0\x01" + bytes(64), "a wrong segment at byte 2: found ff e0"),
        (patched(1, b"\xc3"), "not supported: found SOF3"),
        (patched(1, b"\xc9"), "not supported: found SOF9"),
        (patched(4, b"\7"), "impossible frame header: found 50 x 70, 3 components of 7 bits"),
        (patched(5, b"\0\0"), "impossible frame header: found 0 x 70"),
        (patched(7, b"\0\0"), "impossible frame header: found 50 x 0"),
        (patched(9, b"\2"), "impossible frame header"),
        (patched(2, b"\0\x12"), "wrong length: expected 17 bytes, found 18 bytes"),
    ],
)
def test_headers_that_cannot_be(jpg: bytes, message: str) -> None:
    with pytest.raises(SampleRejected) as caught:
        images.header(jpg)
    assert message in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@given(st.binary(max_size=80), st.integers(0, 200))
def test_any_bytes_give_a_header_or_an_error(noise: bytes, at: int) -> None:
    for jpg in (noise, b"\xff\xd8" + noise, b"\xff\xd8\xff" + noise, SMALL[:at] + noise):
        try:
            found = images.header(jpg)
        except SampleRejected:
            continue
        assert 0 < found.height <= 65_535
        assert 0 < found.width <= 65_535


# Whole pixels


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGB", {}),
        ("RGB", {"subsampling": 0}),
        ("RGB", {"subsampling": 1, "quality": 40}),
        ("RGB", {"progressive": True}),
        ("RGB", {"restart_marker_blocks": 2}),
        ("L", {}),
    ],
)
def test_full_size_is_bit_equal_to_pil(mode: str, options: dict[str, Any]) -> None:
    jpg = jpeg(picture(101, 77), mode, **options)
    for fast in (True, False):
        assert (images.decode(jpg, fast=fast) == pil(jpg)).all()
    assert (images.decode(memoryview(jpg)) == images.decode(np.frombuffer(jpg, np.uint8).data)).all()


def test_cmyk_becomes_rgb() -> None:
    jpg = jpeg(picture(60, 80), "CMYK")
    assert np.abs(images.decode(jpg).astype(int) - pil(jpg)).max() <= 1
    assert images.decode(jpg, 40).shape == (40, 40, 3)


def test_an_orientation_is_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    pixels = picture(40, 90)
    turned = jpeg(pixels, exif=exif)
    assert Image.open(io.BytesIO(turned)).getexif()[0x0112] == 6
    assert (images.decode(turned) == images.decode(jpeg(pixels))).all()
    assert (images.header(turned).height, images.header(turned).width) == (40, 90)
    assert (images.decode(turned, 45) == images.decode(jpeg(pixels), 45)).all()


def test_the_pixels_of_tfds_have_the_fast_dct_and_smooth_chroma() -> None:
    jpg = jpeg(picture(90, 120), subsampling=2, quality=75)
    found = images.tfds_image(jpg)
    assert found.shape == (90, 120, 3)
    difference = np.abs(found.astype(int) - pil(jpg))
    assert 0 < difference.max() < 12  # another DCT, not another chroma filter
    with pytest.raises(SampleRejected, match="cut or damaged"):
        images.tfds_image(jpg[:-1])


# Damage


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 2}])
def test_every_cut_is_an_error(options: dict[str, Any]) -> None:
    jpg = jpeg(picture(50, 70), **options)
    for length in range(len(jpg)):
        for size in (None, 20):
            with pytest.raises(SampleRejected, match=r"^sa_1.jpg: "):
                images.decode(jpg[:length], size, where="sa_1.jpg")


@pytest.mark.parametrize(
    "damaged",
    [
        SMALL[: len(SMALL) // 2] + bytes(40) + SMALL[len(SMALL) // 2 + 40 :],
        SMALL[: len(SMALL) // 2] + SMALL[len(SMALL) // 2 + 40 :],
        SMALL[:-2] + bytes(64),
        patched(5, (500).to_bytes(2, "big")),
    ],
    ids=["zeros", "hole", "no end", "taller"],
)
def test_damage_inside_is_an_error(damaged: bytes) -> None:
    for size in (None, 20):
        with pytest.raises(SampleRejected, match="a JPEG that is cut or damaged: found "):
            images.decode(damaged, size)


def test_bytes_after_the_end_do_not_matter() -> None:
    assert (images.decode(SMALL + b"more") == images.decode(SMALL)).all()


def test_what_is_refused() -> None:
    with pytest.raises(SampleRejected, match="other than 8 bits a component: expected 8, found 12"):
        images.decode(patched(4, b"\x0c"))
    with pytest.raises(SampleRejected, match="too many pixels: expected at most 268435456, found 65535 x 65535"):
        images.decode(patched(5, b"\xff\xff\xff\xff"), 64)
    with pytest.raises(SampleRejected, match="too many pixels"):
        images.tfds_image(patched(5, b"\xff\xff\xff\xff"))


def test_bytes_at_random_give_pixels_or_an_error() -> None:
    rng = np.random.default_rng(3)
    texts = [SMALL, jpeg(picture(50, 70), progressive=True), jpeg(picture(50, 70), "CMYK")]
    refused = 0
    for round_ in range(600):
        damaged = bytearray(texts[round_ % 3])
        for _ in range(rng.integers(1, 4)):
            damaged[rng.integers(2, len(damaged) if round_ % 2 else 700)] = rng.integers(256)
        try:
            found = images.decode(damaged, 32)
        except SampleRejected:
            refused += 1
            continue
        assert found.shape == (32, 32, 3)
    assert 100 < refused < 600


# Sizes


@pytest.mark.parametrize(
    ("height", "width", "side", "shape"),
    [
        (1500, 2250, 1024, (683, 1024)),  # 682.67
        (1500, 2000, 1024, (768, 1024)),
        (2060, 1500, 1024, (1024, 746)),  # 745.6
        (30, 40, 40, (30, 40)),
        (30, 40, 100, (75, 100)),
        (100, 3, 10, (10, 1)),  # 0.3, but at least one
        (3, 8, 4, (2, 4)),  # 1.5: half up
        (1, 1, 5, (5, 5)),
    ],
)
def test_the_longest_side_fits_and_the_rest_is_black(
    height: int, width: int, side: int, shape: tuple[int, int]
) -> None:
    jpg = jpeg(np.full((height, width, 3), 255, np.uint8))
    out = np.full((side, side, 3), 7, np.uint8)
    assert images.decode(jpg, side, out=out) is out
    assert (out[: shape[0], : shape[1]] > 250).all()
    assert not out[shape[0] :].any()
    assert not out[:, shape[1] :].any()


@pytest.mark.parametrize("side", [1500, 1024, 700, 512, 300, 225, 100, 40])
def test_pixels_are_near_those_of_a_full_decode_and_area_resize(side: int) -> None:
    smooth = cv2.GaussianBlur(picture(900, 1200), (0, 0), 4)
    jpg = jpeg(smooth)
    height = (2 * 900 * side + 1200) // 2400
    how = cv2.INTER_AREA if side < 1200 else cv2.INTER_LINEAR
    expected = cv2.resize(pil(jpg), (side, height), interpolation=how)
    assert psnr(images.decode(jpg, side)[:height], expected) > (40 if side >= 150 else 34)
    exact = images.decode(jpg, side, fast=False)[:height]
    assert (exact == expected).all()


@pytest.mark.parametrize("side", [8, 60, 96, 150])
def test_nothing_is_skipped_however_small_the_target(side: int) -> None:
    # Lines one pixel wide: a filter that skipped source pixels would see black or white.
    lines = np.zeros((1200, 1200, 3), np.uint8)
    lines[:, ::2] = 255
    out = images.decode(jpeg(lines, subsampling=0), side)
    assert np.abs(out.astype(int) - 127).max() < 12


geometries = st.tuples(
    st.tuples(st.integers(-80, 250), st.integers(-80, 350), st.integers(60, 420), st.integers(60, 420)),
    st.tuples(st.integers(40, 300), st.integers(40, 300)) | st.integers(40, 300) | st.none(),
    st.booleans(),
    st.booleans(),
)

DISK = ((np.mgrid[:300, :400][0] - 140) / 110) ** 2 + ((np.mgrid[:300, :400][1] - 180) / 150) ** 2 < 1
DISK_JPEG = jpeg(np.repeat(DISK[:, :, None] * np.uint8(255), 3, 2), "L")
DISK_TEXT = np.frombuffer(rle.encode(DISK), np.uint8)


@settings(max_examples=150)
@given(geometries)
def test_pixels_lie_where_masks_lie(
    case: tuple[tuple[int, int, int, int], tuple[int, int] | int | None, bool, bool],
) -> None:
    window, size, flip, fast = case
    pixels = images.decode(DISK_JPEG, size, window=window, flip=flip, fast=fast)[:, :, 0]
    if isinstance(size, int):
        window, size = square(window, flip), (size, size)
    mask = rle.decode(
        DISK_TEXT, [0, len(DISK_TEXT)], DISK.shape, size or window[2:], window=window, flip=flip, mode="area"
    )
    covered, seen = mask[0] > 0.5, pixels > 127
    assert covered.shape == seen.shape
    # Half a target pixel at the edge of what is inside, and a source pixel from rounding to the DCT scale.
    grow = 2 + 2 * max(pixels.shape[0] / window[2], pixels.shape[1] / window[3])
    margin = int(grow) + 1
    kernel = np.ones((2 * margin + 1, 2 * margin + 1), np.uint8)
    core = cv2.erode(covered.astype(np.uint8), kernel) > 0
    hull = cv2.dilate(covered.astype(np.uint8), kernel) > 0
    inner = np.s_[margin:-margin, margin:-margin]  # at the edges, what lies just outside may come into sight
    assert not (core & ~seen)[inner].any()
    assert not (seen & ~hull)[inner].any()


def test_a_flip_mirrors_what_is_inside() -> None:
    jpg = jpeg(picture(120, 200))
    for size, window in (
        (None, None),
        ((64, 100), None),
        ((64, 100), (10, 20, 80, 90)),
        ((50, 50), (-10, -20, 200, 300)),
    ):
        plain = images.decode(jpg, size, window=window)
        if window is None or window[1] >= 0:
            assert (images.decode(jpg, size, window=window, flip=True) == plain[:, ::-1]).all()
        else:  # what is outside on the left comes to lie on the right
            assert psnr(images.decode(jpg, size, window=window, flip=True), plain[:, ::-1]) > 35
    tall = jpeg(picture(200, 120))
    plain, flipped = images.decode(tall, 100), images.decode(tall, 100, flip=True)
    assert (flipped[:, :60] == plain[:, :60][:, ::-1]).all()
    assert not flipped[:, 60:].any()


def test_windows_outside_the_image_are_black() -> None:
    for window in ((50, 0, 10, 10), (-10, 0, 10, 10), (0, 70, 9, 9), (0, -300, 50, 300)):
        out = np.full((16, 16, 3), 9, np.uint8)
        images.decode(SMALL, (16, 16), window=window, out=out)
        assert not out.any()
    sliver = images.decode(SMALL, (10, 10), window=(-999, 0, 1000, 70))
    assert not sliver[:9].any()
    assert sliver[9].any()


def test_windows_at_their_own_size_are_parts_of_the_whole() -> None:
    whole = images.decode(SMALL)
    assert (images.decode(SMALL, window=(10, 20, 30, 25)) == whole[10:40, 20:45]).all()
    around = images.decode(SMALL, window=(-5, -6, 60, 90))
    assert (around[5:55, 6:76] == whole).all()
    around[5:55, 6:76] = 0
    assert not around.any()


def test_writes_into_a_slice_of_a_batch_and_nowhere_else() -> None:
    for size, inside in ((40, np.s_[1, 5:45, 3:43]), ((50, 70), np.s_[0, :50, :70]), ((50, 70), np.s_[1, 9:59, 10:80])):
        batch, outside = np.full((2, 60, 80, 3), 9, np.uint8), np.ones((2, 60, 80, 3), bool)
        outside[inside] = False
        images.decode(SMALL, size, out=batch[inside])
        assert (batch[inside] == images.decode(SMALL, size)).all()
        assert (batch[outside] == 9).all()
    contiguous = np.full((3, 50, 70, 3), 9, np.uint8)
    images.decode(SMALL, out=contiguous[1])
    assert (contiguous[1] == pil(SMALL)).all()
    assert (contiguous[::2] == 9).all()


def test_sizes_windows_and_arrays_that_cannot_be() -> None:
    fixed = np.zeros((50, 70, 3), np.uint8)
    fixed.flags.writeable = False
    bad = [
        np.zeros((70, 50, 3), np.uint8),
        np.zeros((50, 70), np.uint8),
        np.zeros((50, 70, 3), np.int8),
        np.zeros((50, 70, 4), np.uint8)[:, :, :3],
        np.zeros((3, 50, 70), np.uint8).transpose(1, 2, 0),
        np.zeros((50, 70, 3), np.uint8)[::-1],
        fixed,
    ]
    for out in bad:
        with pytest.raises(UsageError, match="out cannot be written to"):
            images.decode(SMALL, out=out)  # type: ignore[arg-type]
    for size in (0, -1, 65_536, (0, 1), (65_535, 65_535)):
        with pytest.raises(UsageError, match="target size"):
            images.decode(SMALL, size)
    for window in ((0, 0, 0, 1), (0, 0, 1, 65_536), (0, 0, -5, 5)):
        with pytest.raises(UsageError, match="window"):
            images.decode(SMALL, 8, window=window)


def test_threads_share_no_buffer() -> None:
    jpgs = [jpeg(picture(100 + 7 * i, 150 + 5 * i, i)) for i in range(8)]
    expected = [images.decode(jpg, 64) for jpg in jpgs]
    results = [images.decode(jpg, 64, window=(0, 0, 90, 90)) for jpg in jpgs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            assert all(
                (a == b).all()
                for a, b in zip(pool.map(lambda jpg: images.decode(jpg, 64), jpgs), expected, strict=True)
            )
    again = [images.decode(jpg, 64, window=(0, 0, 90, 90)) for jpg in jpgs]
    assert all((a == b).all() for a, b in zip(results, again, strict=True))
    assert cv2.getNumThreads() == 1


def real_photographs() -> list[Any]:
    if not REAL.is_dir():
        return [pytest.param(None, marks=pytest.mark.skip(reason="no SA-1B photographs beside the checkout"))]
    return [pytest.param(path, id=path.stem) for path in sorted(REAL.glob("*.jpg"))]


@pytest.mark.parametrize("path", real_photographs())
def test_real_photographs(path: Path) -> None:
    jpg = path.read_bytes()
    full = pil(jpg)
    height, width = full.shape[:2]
    head = images.header(jpg)
    assert (head.height, head.width, head.components, head.progressive) == (height, width, 3, False)
    assert (images.decode(jpg) == full).all()
    side = max(height, width)
    for size, least in ((1024, 33), (640, 33), (512, 31)):
        shape = tuple((2 * n * size + side) // (2 * side) for n in (height, width))
        expected = cv2.resize(full, shape[::-1], interpolation=cv2.INTER_AREA)
        assert psnr(images.decode(jpg, size)[: shape[0], : shape[1]], expected) > least
