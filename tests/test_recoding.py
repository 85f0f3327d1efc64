"""Photographs made smaller: exact bytes, the geometry of a stream, and what every command says of such a data set."""

import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load, save

import sa1b_wds
from sa1b_wds import cli, images, recoding
from sa1b_wds.annotations import Annotations, Packer, pack_any, restore, unpack
from sa1b_wds.errors import FormatError, PlanMismatch, ShardDamaged, UsageError
from sa1b_wds.format import FORMAT
from sa1b_wds.plan import PACKER, Plan, Recoding, difference, load_plan
from sa1b_wds.restore import restore as restore_tars
from sa1b_wds.storage import Destination
from sa1b_wds.verify import verify

from . import datasets, making, running, test_verify
from .making import Member
from .test_images import jpeg, picture, psnr

GOLDEN = Path(__file__).parent / "golden"
ENCODER = "c0d3e79c4659913e"
SIDE = 64
HOW = Recoding(max_side=SIDE, quality=90, encoder=ENCODER)
TINY = Recoding(max_side=5, quality=90, encoder=ENCODER)

U8 = npt.NDArray[np.uint8]


# ----------------------------------------------------------------------------------------------------------- the bytes


def means(pixels: U8, rows: int, columns: int) -> U8:
    """The exact mean of the area of each target pixel, rounded half up: every weight written out."""

    def weights(n: int, k: int) -> Any:
        i, r = np.arange(k)[:, None], np.arange(n)[None, :]
        return np.maximum(0, np.minimum((i + 1) * n, (r + 1) * k) - np.maximum(i * n, r * k))

    h, w, _ = pixels.shape
    sums: Any = np.einsum(
        "ir,rxc,jx->ijc", weights(h, rows), pixels.astype(np.int64), weights(w, columns), optimize=True
    )
    return np.asarray((2 * sums + h * w) // (2 * h * w), np.uint8)


@given(st.data())
def test_a_pixel_is_the_mean_of_its_area(data: st.DataObject) -> None:
    h, w = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    rows, columns = data.draw(st.integers(1, h)), data.draw(st.integers(1, w))
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 32)))
    extreme = data.draw(st.booleans())
    shape = h, w, data.draw(st.sampled_from([1, 3]))
    pixels = (rng.choice([0, 255], shape) if extreme else rng.integers(0, 256, shape)).astype(np.uint8)
    assert np.array_equal(recoding.shrunk(pixels, rows, columns), means(pixels, rows, columns))


def test_a_large_picture_of_one_colour_stays_that_colour() -> None:
    """The largest sums there are."""
    for value in (0, 1, 254, 255):
        pixels = np.full((2, 65_535, 1), value, np.uint8)
        assert (recoding.shrunk(pixels, 1, 1024) == value).all()
        assert (recoding.shrunk(pixels.reshape(65_535, 2, 1), 1023, 1) == value).all()


@given(st.integers(1, 65_535), st.integers(1, 65_535), st.integers(16, 65_535))
def test_sizes(height: int, width: int, side: int) -> None:
    size = Recoding(max_side=side, quality=90, encoder="").size(height, width)
    if max(height, width) <= side:
        assert size is None
        return
    assert size is not None
    assert max(size) == side and min(size) >= 1
    short, long = sorted((height, width))
    assert min(size) == max(1, int(short * side / long + 0.5)) or (2 * short * side) % long == 0
    assert (size[0] >= size[1]) == (height >= width) or min(size) == max(size)


PROBE = """
import hashlib, sys
from sa1b_wds import images, recoding
from tests.test_images import jpeg, picture
digest = hashlib.sha256()
for mode in ("RGB", "L"):
    for options in ({}, {"subsampling": 0}, {"progressive": True}):
        jpg = jpeg(picture(301, 403), mode, **options)
        for quality in (1, 75, 90, 97, 100):
            digest.update(recoding.recode(jpg, (96, 128), quality, ""))
print(recoding.encoder(), digest.hexdigest()[:16])
"""


def test_golden_encoder() -> None:
    """Another digest here is another JPEG library: what is planned with it cannot go on with the one before."""
    assert recoding.encoder() == ENCODER


@pytest.mark.parametrize("simd", ["JSIMD_FORCENONE", "JSIMD_FORCESSE2"])
def test_no_processor_gives_other_bytes(simd: str) -> None:
    """libjpeg-turbo in plain C, and with other vector instructions, in both libraries that bring it along."""
    said = set()
    for more in ({}, {simd: "1"}):
        done = subprocess.run(
            [sys.executable, "-c", PROBE], capture_output=True, text=True, check=True, env={**os.environ, **more}
        )
        said.add(done.stdout)
    assert len(said) == 1 and said.pop().startswith(ENCODER)


def test_the_encoder_is_pillows_too() -> None:
    """A third build of libjpeg-turbo: the bytes are those of any that uses the accurate DCT."""
    pixels = picture(90, 121)
    for quality in (1, 50, 75, 90, 95, 96, 100):
        assert images.encode(pixels, quality) == jpeg(pixels, quality=quality, subsampling=2)


def test_kinds_of_jpegs() -> None:
    colour = picture(200, 300)
    size = HOW.size(200, 300)
    assert size == (43, 64)
    expected = images.encode(means(np.asarray(Image.open(io.BytesIO(jpeg(colour)))), *size), 90)
    assert recoding.recode(jpeg(colour), size, 90, "") == expected
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees, for those who apply it
    assert recoding.recode(jpeg(colour, exif=exif), size, 90, "") == expected
    grey = recoding.recode(jpeg(colour, "L"), size, 90, "")
    assert images.header(grey).components == 1
    cmyk = recoding.recode(jpeg(colour, "CMYK"), size, 90, "")
    assert images.header(cmyk).components == 3
    assert cmyk == images.encode(means(images.decode(jpeg(colour, "CMYK"), fast=False), *size), 90)


# ------------------------------------------------------------------------------------------------------------ the plan


def test_a_plan_says_it_and_others_keep_their_bytes(tmp_path: Path) -> None:
    paths = running.write(tmp_path, {"sa_000000.tar": making.tar(making.pairs(range(3)))})
    plain, small = running.planned(paths), running.planned(paths, recoding=HOW)
    assert b"recoding" not in plain.to_bytes()
    assert load_plan(small.to_bytes(), "") == small
    assert (small.max_side, small.quality, plain.max_side) == (SIDE, 90, None)
    assert difference(small, plain) == (
        "packer 1 there, 2 here; max_side None there, 64 here; quality None there, 90 here"
    )
    other = msgspec.structs.replace(small, recoding=msgspec.structs.replace(HOW, encoder="0" * 16))
    assert "JPEG library that gives other bytes" in difference(small, other)
    # A release that has never heard of it would drop the field, but it knows no such packer.
    for made, packer in ((small, PACKER), (plain, 2)):
        with pytest.raises(FormatError, match="does not know"):
            load_plan(msgspec.structs.replace(made, packer=packer).to_bytes(), "")


def test_a_task_refuses_another_jpeg_library(tmp_path: Path) -> None:
    paths = running.write(tmp_path / "s", {"sa_000000.tar": making.tar(making.pairs(range(3)))})
    how = msgspec.structs.replace(HOW, encoder="0" * 16)
    with pytest.raises(PlanMismatch, match=r"simplejpeg [0-9.]+ and OpenCV [0-9.]+ here make other JPEGs"):
        running.convert(paths, tmp_path / "d", recoding=how)
    running.check_no_trace(tmp_path / "d")


# ---------------------------------------------------------------------------------------------------------- the format


def golden() -> tuple[bytes, bytes]:
    document = (GOLDEN / "plain.json").read_bytes()
    return document, bytes.fromhex("".join((GOLDEN / "smaller.member.hex").read_text().split()))


def test_golden_member_with_a_stored_size() -> None:
    """Bytes that version 1 writes for ever; and the library's own."""
    document, member = golden()
    for pack in (Packer(TINY).pack(document, "sa_223750"), pack_any(document, "sa_223750", recoding=TINY)):
        assert bytes(pack.member) == member
    a = unpack(member, "")
    assert a.stored_size == a.jpg_size == TINY.size(a.height, a.width)
    assert restore(a) == document
    assert save(load(member), {"format": FORMAT}) == member
    # All else is that of a member without it.
    plain = load(bytes(Packer().pack(document, "sa_223750").member))
    mine = load(member)
    assert set(mine) - set(plain) == {"image.stored_height", "image.stored_width"}
    assert all(np.array_equal(mine[name], plain[name]) for name in plain)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image.stored_height": None}, "image.stored_height and image.stored_width alone"),
        ({"image.stored_width": None}, "image.stored_height and image.stored_width alone"),
        ({"image.stored_height": 0}, "not smaller than the image"),
        ({"image.stored_width": -1}, "not smaller than the image"),
        ({"image.stored_height": 1 << 40}, "not smaller than the image"),
        ({"image.stored_height": "image.height", "image.stored_width": "image.width"}, "not smaller than the image"),
        ({"image.stored_depth": 3}, "image.stored_depth is not part of"),
    ],
)
def test_stored_sizes_that_cannot_be(change: dict[str, Any], said: str) -> None:
    tensors = load(golden()[1])
    for name, value in change.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = tensors[value] if isinstance(value, str) else np.array(value, np.int64)
    with pytest.raises(FormatError, match=said):
        unpack(save(tensors, {"format": FORMAT}), "")


# ---------------------------------------------------------------------------------------------------------- converting


def photographs(first: int, count: int) -> list[Member]:
    """Pairs of many sizes, one in three of them small enough already; every fourth grey."""
    out = []
    for i in range(first, first + count):
        h, w = ((40, 64), (130, 201), (222, 96))[i % 3]
        h += i % 5 * (i % 3 > 0)
        pixels = picture(h, w, i) // 2 + 100  # nowhere near black
        out.append(Member(f"./sa_{i}.jpg", jpeg(pixels, "L" if i % 4 == 0 else "RGB", quality=92)))
        out.append(Member(f"./sa_{i}.json", making.text(making.document(i, height=h, width=w, annotations=i % 6))))
    return out


@dataclass(frozen=True)
class Pair:
    """One set of sources, converted as they are and smaller."""

    sources: list[Path]
    full: Path
    small: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("recoding")
    texts = {f"sa_{n:06d}.tar": making.tar(photographs(100 * n + 1, 17)) for n in range(2)}
    paths = running.write(folder / "sources", texts)
    # The same plan but for the size; with one shard samples stand in the same order.
    running.convert(paths, folder / "full", shards=1, mix=2)
    running.convert(paths, folder / "small", shards=1, mix=2, recoding=HOW)
    return Pair(paths, folder / "full", folder / "small")


def test_what_is_stored(made: Pair) -> None:
    kept = smaller = 0
    for full, small in zip(sa1b_wds.open(made.full), sa1b_wds.open(made.small), strict=True):
        assert full.key == small.key and full.json == small.json
        a, size = small.annotations, HOW.size(full.annotations.height, full.annotations.width)
        assert (a.height, a.width) == (full.annotations.height, full.annotations.width)
        assert a.stored_size == size
        assert small.image.shape[:2] == a.jpg_size
        if size is None:
            assert small.jpg == full.jpg and small.packed == full.packed
            kept += 1
        else:
            pixels = np.asarray(Image.open(io.BytesIO(full.jpg)))
            expected = images.encode(means(pixels.reshape(*pixels.shape[:2], -1), *size), HOW.quality)
            assert small.jpg == expected
            smaller += 1
    assert kept > 5 and smaller > 15
    manifest = sa1b_wds.open(made.small).manifest
    assert manifest is not None and manifest.recoding == HOW
    assert b"recoding" not in (made.full / "manifest.json").read_bytes()
    assert "at most 64 pixels" in (made.small / "README.md").read_text()


def test_threads_and_waiting_change_no_byte(made: Pair, tmp_path: Path) -> None:
    wanted = {}
    runs: list[dict[str, Any]] = [
        {"threads": 1},
        {"threads": 5},
        {"threads": 3, "pairing_buffer": 1 << 12, "scratch": tmp_path},
    ]
    for n, options in enumerate(runs):
        running.convert(made.sources, tmp_path / str(n), shards=2, mix=2, recoding=HOW, **options)
        wanted[n] = running.tree(tmp_path / str(n))
    assert wanted[0] == wanted[1] == wanted[2]


def test_dealing_is_of_what_is_stored(made: Pair, tmp_path: Path) -> None:
    running.convert(made.sources, tmp_path / "d", shards=3, mix=2, recoding=HOW)
    spans = [np.diff(np.fromfile(f"{p}.idx", "<i8")) for p in datasets.tars(tmp_path / "d")]
    sums = [int(s.sum()) for s in spans]
    assert max(sums) - min(sums) <= max(int(s.max()) for s in spans)
    assert verify(Destination(str(tmp_path / "d")), deep=True) == []


def test_what_cannot_be_decoded_goes_to_quarantine(tmp_path: Path) -> None:
    members = photographs(1, 24)
    broken = {"sa_2.jpg": "cut or damaged", "sa_10.jpg": "cut or damaged", "sa_13.jpg": "8 bits a component"}
    for i, member in enumerate(members):
        name = member.name[2:]
        if "cut" in broken.get(name, ""):
            members[i] = Member(member.name, member.data[: len(member.data) * 2 // 3])
        elif name in broken:
            data = bytearray(member.data)
            data[next(data.index(bytes([0xFF, kind])) for kind in (0xC0, 0xC2) if bytes([0xFF, kind]) in data) + 4] = 12
            members[i] = Member(member.name, bytes(data))
    second = Member("./sa_1.json", b"{}")
    members.insert(8, second)  # rejected at once, while photographs before it are still in work
    paths = running.write(tmp_path / "s", {"sa_000000.tar": making.tar(members)})
    trees = []
    for threads in (1, 4):
        dest = tmp_path / f"d{threads}"
        with running.undisturbed():
            running.convert(paths, dest, shards=2, recoding=HOW, max_quarantine=1.0, threads=threads)
        trees.append(running.tree(dest))
        found = running.quarantined(dest)
        assert [f.key for f in found] == ["sa_1", "sa_2", "sa_2", "sa_10", "sa_10", "sa_13", "sa_13"]
        assert found.pop(0).data == second.data
        for f in found:
            assert broken[f"{f.key}.jpg"] in f.reason
            assert f.data == next(m.data for m in members if m.name == f.name)
        assert verify(Destination(str(dest)), deep=True, against=[str(p) for p in paths]) == []
    assert trees[0] == trees[1]


def test_an_error_in_the_middle_leaves_no_thread_and_no_trace(tmp_path: Path) -> None:
    data = making.tar(photographs(1, 60))
    paths = running.write(tmp_path / "s", {"sa_000000.tar": data[: len(data) * 3 // 4]})
    with running.undisturbed(), pytest.raises(sa1b_wds.errors.SourceDamaged):
        running.convert(paths, tmp_path / "d", shards=2, recoding=HOW)
    running.check_no_trace(tmp_path / "d")


# ----------------------------------------------------------------------------------------------------------- streaming


@pytest.mark.parametrize(
    "options",
    [
        {"image_size": SIDE},
        {"image_size": 37, "mask_mode": "area"},
        {"image_size": 100, "mask_mode": "runs"},
        {"image_size": SIDE, "flip": 0.5, "scale": (0.4, 2.5)},
        {"image_size": 24, "flip": 1.0, "scale": (0.1, 1.0), "masks_per_image": None},
    ],
)
def test_batches_are_those_of_the_full_set_but_for_pixels(made: Pair, options: dict[str, Any]) -> None:
    view = {"batch_size": 4, "mask_size": 16, "masks_per_image": 3, "seed": 5, "rank": 0, "world_size": 1, **options}
    batches = 0
    for full, small in zip(
        sa1b_wds.open(made.full).stream(**view), sa1b_wds.open(made.small).stream(**view), strict=True
    ):
        assert full.keys() == small.keys()
        for name, value in full.items():
            if name != "image":
                assert np.array_equal(value, small[name]), name  # type: ignore[arg-type,literal-required]
        # Black lies in the same places; what is seen is the same picture, a little softer.
        black = [(batch["image"] == 0).all(axis=3) for batch in (full, small)]
        assert np.array_equal(*black)
        for a, b in zip(full["image"], small["image"], strict=True):
            assert psnr(a, b) > 24
            assert abs(a.astype(float).mean() - b.astype(float).mean()) < 3
        batches += 1
    assert batches == 8


@given(st.data())
def test_a_copy_is_seen_through_the_same_window(data: st.DataObject) -> None:
    """A smaller copy of smooth waves looks like the original, wherever and however large the window is."""
    h, w = data.draw(st.sampled_from([(200, 300), (310, 190), (256, 256)]))
    y, x = np.mgrid[:h, :w]
    pixels = np.stack([127 + 60 * np.sin(x / 40 + k) + 60 * np.sin(y / 50 + 2 * k) for k in range(3)], -1)
    size = Recoding(max_side=120, quality=95, encoder="").size(h, w)
    assert size is not None
    full = jpeg(pixels.astype(np.uint8), subsampling=0, quality=98)
    copy = recoding.recode(full, size, 98, "")
    y0, x0 = data.draw(st.integers(-50, h - 30)), data.draw(st.integers(-50, w - 30))
    window = y0, x0, data.draw(st.integers(30, 400)), data.draw(st.integers(30, 400))
    target: Any = data.draw(st.sampled_from([60, 33, (50, 90)]))
    flip = data.draw(st.booleans())
    a = images.decode(full, target, window=window, flip=flip)
    b = images.decode(copy, target, window=window, flip=flip, of=(h, w))
    assert np.array_equal((a == 0).all(axis=2), (b == 0).all(axis=2))
    seen = (a > 0).any(axis=2)
    if seen.any():
        # Waves are at most 60/40 steep a source pixel; edges are rounded to pixels of both, at scale 1/2 to two.
        assert np.abs(a[seen].astype(int) - b[seen]).mean() < 3.5


@given(st.integers(1, 130), st.integers(1, 130), st.booleans())
def test_a_whole_copy_is_seen_as_itself(rows: int, columns: int, flip: bool) -> None:
    """Its own pixels and scales count, not those of the original."""
    copy = jpeg(picture(80, 120))
    a, b = (images.decode(copy, (rows, columns), flip=flip, of=of) for of in (None, (200, 300)))
    assert np.array_equal(a, b)


def test_without_a_window_nothing_changes_for_others() -> None:
    jpg = jpeg(picture(200, 300))
    for size in (None, 64, (31, 90)):
        a, b = images.decode(jpg, size), images.decode(jpg, size, of=(200, 300))
        assert np.array_equal(a, b)


def test_the_decoder_of_plain_pipelines(made: Pair) -> None:
    decode = sa1b_wds.decoder(image_size=SIDE, mask_size=16, masks_per_image=3)
    for full, small in zip(sa1b_wds.open(made.full), sa1b_wds.open(made.small), strict=True):
        one, two = (decode({"__key__": s.key, "jpg": s.jpg, "safetensors": s.packed}) for s in (full, small))
        assert all(np.array_equal(one[name], two[name]) for name in one if name != "image")
        assert psnr(one["image"], two["image"]) > 24


def test_a_jpeg_of_another_size_than_stated_is_damage(made: Pair) -> None:
    sample = next(s for s in sa1b_wds.open(made.small) if s.annotations.stored_size)
    other = jpeg(picture(10, 10))
    with pytest.raises(ShardDamaged, match=r"another size than its annotations say: expected .* found 10 x 10"):
        sa1b_wds.decoder(image_size=16)({"__key__": sample.key, "jpg": other, "safetensors": sample.packed})


def test_a_figure_of_it(made: Pair) -> None:
    assert sa1b_wds.open(made.small).show_examples(2, 2, side=50).size[0] > 100


# ------------------------------------------------------------------------------------------------------- every command


@pytest.fixture
def copy(made: Pair, tmp_path: Path) -> Path:
    shutil.copytree(made.small, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("workers", [1, 2])
def test_verify_finds_nothing(made: Pair, workers: int) -> None:
    against = [str(p) for p in made.sources]
    assert verify(Destination(str(made.small)), deep=True, against=against, workers=workers) == []


def first_smaller(dest: Path) -> tuple[str, Annotations]:
    sample = next(s for s in sa1b_wds.open(dest) if s.annotations.stored_size)
    return sample.key, sample.annotations


def test_a_wrong_stored_size_is_found_by_deep(copy: Path) -> None:
    key, a = first_smaller(copy)
    path, at, member = test_verify.member_of(copy, key)
    assert a.stored_size is not None
    now, then = (np.array([h, a.stored_size[1]], np.int64).tobytes() for h in (a.stored_size[0], a.stored_size[0] - 1))
    with test_verify.opened(path) as data:
        place = at + test_verify.place_of(member, now)
        data[place : place + 16] = then
    test_verify.reseal(copy)
    assert verify(Destination(str(copy))) == []
    said = test_verify.said(verify(Destination(str(copy)), deep=True))
    assert f"{key}: stored size (height, width): expected {a.stored_size}" in said
    assert f"{key}.jpg: its header disagrees with the annotations" in said


def test_another_photograph_of_the_right_size_is_found_by_against(copy: Path, made: Pair) -> None:
    keys = [s.key for s in sa1b_wds.open(copy) if s.annotations.stored_size]
    path, (_, begin, size, *_) = test_verify.find(copy, keys[0])
    with test_verify.opened(path) as data:
        at = begin + making.BLOCK
        jpg = bytes(data[at : at + size])
        h, w = images.header(jpg).height, images.header(jpg).width
        other = next(e for q in range(90, 1, -1) if len(e := images.encode(picture(h, w, 77), q)) <= size)
        data[at : at + size] = other + bytes(size - len(other))
    test_verify.reseal(copy)
    assert verify(Destination(str(copy)), deep=True) == []
    found = verify(Destination(str(copy)), against=[str(p) for p in made.sources])
    assert [str(d).split(": ")[2] for d in found] == [keys[0]]
    assert "as the plan stores it: differs at byte" in str(found[0])


def test_against_needs_the_same_jpeg_library(copy: Path, made: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recoding, "encoder", lambda: "f" * 16)
    assert verify(Destination(str(copy)), deep=True) == []
    with pytest.raises(PlanMismatch, match="make other JPEGs"):
        verify(Destination(str(copy)), against=[str(p) for p in made.sources])


def test_a_manifest_that_denies_it_is_found(copy: Path) -> None:
    test_verify.change_manifest(copy, recoding=None)
    assert "recoding of the plan" in test_verify.said(verify(Destination(str(copy))))


def test_restore_refuses_and_gives_the_documents(made: Pair, tmp_path: Path) -> None:
    destination = Destination(str(made.small))
    with pytest.raises(UsageError, match=r"made smaller \(--max-side 64\): .*; --json-only restores the rest"):
        restore_tars(destination, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    done = restore_tars(destination, tmp_path / "out", json_only=True)
    assert (done.samples, done.members) == (34, 34)
    for source in made.sources:
        members = {m.removeprefix("./"): d for m, d in making.read_tar((tmp_path / "out" / source.name).read_bytes())}
        wanted = {m[2:]: d for m, d in making.read_tar(source.read_bytes()) if m.endswith(".json")}
        assert members == wanted


def test_tfds_refuses(made: Pair) -> None:
    with pytest.raises(FormatError, match=r"TFDS has the photograph at its full size"):
        for _ in sa1b_wds.open(made.small).as_tfds():
            pass
    key = next(s.key for s in sa1b_wds.open(made.small) if s.annotations.stored_size is None)
    assert sa1b_wds.open(made.small).as_tfds()[key]["image"]["height"] <= SIDE


def test_exports_are_those_of_the_full_set(made: Pair, tmp_path: Path) -> None:
    for kind in ("coco", "parquet"):
        files = []
        for which in ("full", "small"):
            out = tmp_path / f"{which}.{kind}"
            assert cli.main(["export", str(getattr(made, which)), f"--{kind}", "--out", str(out)]) == 0
            files.append(out.read_bytes())
        assert files[0] == files[1]


def test_the_command(made: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = str(made.sources[0].parent), str(tmp_path / "d")
    plan = ["--shard-size", "1MiB", "--mix", "1"]
    assert cli.main(["convert", folder, "--out", out, *plan, "--max-side", "64", "--workers", "2"]) == 0
    assert "photographs of at most 64 pixels" in capsys.readouterr().out
    written = load_plan((tmp_path / "d" / "plan.json").read_bytes(), "")
    assert written.recoding == HOW
    assert cli.main(["verify", out, "--deep", "--against", folder]) == 0
    for wrong, said in (
        (["--max-side", "65"], "max_side 64 there, 65 here"),
        (["--max-side", "64", "--quality", "91"], "quality 90 there, 91 here"),
        ([], "packer 2 there, 1 here; max_side 64 there, None here"),
        (["--max-side", "64", "--quality", "101"], "--quality: wrong value"),
        (["--max-side", "15"], "--max-side: wrong value"),
        (["--quality", "90"], "--quality: is that of photographs made smaller: give --max-side too"),
        (["--task", "0", "--max-side", "65"], "max_side is 64 in it, 65 here"),
    ):
        assert cli.main(["convert", folder, "--out", out, *plan, *wrong]) == 2, wrong
        assert said in capsys.readouterr().err, wrong
    assert cli.main(["convert", folder, "--out", out, "--task", "0", "--max-side", "64", "--quality", "90"]) == 0
    alone = str(tmp_path / "alone")
    assert cli.main(["convert", folder, "--out", alone, *plan, "--max-side", "64", "--workers", "1"]) == 0
    assert running.tree(tmp_path / "alone") == running.tree(tmp_path / "d")
    assert cli.main(["restore", out, "--out", str(tmp_path / "r")]) == 2
    assert cli.main(["restore", out, "--json-only", "--out", str(tmp_path / "r")]) == 0


def test_a_plan_alone(made: Pair, tmp_path: Path) -> None:
    folder = str(made.sources[0].parent)
    assert cli.main(["plan", folder, "--out", str(tmp_path / "d"), "--max-side", "64", "--quality", "75"]) == 0
    plan: Plan = load_plan((tmp_path / "d" / "plan.json").read_bytes(), "")
    assert plan.recoding == msgspec.structs.replace(HOW, quality=75)
    assert json.loads(plan.to_bytes())["packer"] == 2
