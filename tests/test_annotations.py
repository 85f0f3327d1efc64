"""Annotations: documents come back byte for byte, the kernel is the general path, members are safetensors, and what is
hostile is refused."""

import hashlib
import itertools
import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco
from safetensors.numpy import load, save

from sa1b_wds import annotations, rle
from sa1b_wds.annotations import Annotations, Packed, Packer, pack_any, restore, unpack
from sa1b_wds.codes import MAX_DIGITS
from sa1b_wds.errors import FormatError, SampleRejected
from sa1b_wds.format import FORMAT, MEMBER_LIMIT

from . import making
from .conftest import SHARED
from .making import Document

PACKER = Packer()
"""One for all: what a document leaves in its scratch must not reach the next."""
KEY = "sa_7"


# ------------------------------------------------------------------------------------------------------------ documents


def sevens(image_id: int = 7, *, height: int = 24, width: int = 32, annotations: int = 3, seed: int = 0) -> Document:
    return making.document(image_id, height=height, width=width, annotations=annotations, seed=seed)


FLOATS = st.one_of(
    st.integers(-8_000, 8_000).map(lambda i: i / 4),
    st.floats(0.88, 1.0).map(lambda x: float(np.float32(x))),
    st.floats(0, 3000).map(lambda x: float(np.float32(x))),
    st.floats(-1e6, 1e6),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, -0.0, 1e-4, 9.999e-5, 1e-5, 1e15, 1e16, 2.0**53, 0.1, 0.30000000000000004, 5e-324]),
    st.decimals(0, 10_000, places=3).map(float),
)
INTS = st.one_of(st.integers(-3000, 3000), st.integers(-(1 << 53), 1 << 53), st.sampled_from([1 << 62, (1 << 53) + 2]))
NUMBERS = st.one_of(FLOATS, INTS)
EDGES = [0, (1 << 63) - 1, -1, -(1 << 63), 10**17, 10**18, 10**18 - 1]
IDS = st.one_of(st.integers(0, 1 << 31), st.sampled_from(EDGES))


@st.composite
def digits(draw: st.DrawFn, value: int, most: int = 8) -> str:
    """A number of an RLE string, now and then with more digits than it needs."""
    out: list[str] = []
    while True:
        digit, value = value & 31, value >> 5
        more = value != (-1 if digit & 16 else 0)
        if not more and len(out) < most - 1 and draw(st.integers(0, 30)) == 0:
            more = True
        out.append(chr(48 + digit + (32 if more else 0)))
        if not more:
            return "".join(out)


@st.composite
def strings(draw: st.DrawFn, pixels: int) -> tuple[str, int]:
    """(RLE string of so many pixels, its area)."""
    cuts = sorted(draw(st.lists(st.integers(0, pixels), max_size=8)))
    runs = [b - a for a, b in itertools.pairwise([0, *cuts, pixels])]
    parts = [draw(digits(run - (runs[i - 2] if i > 2 else 0))) for i, run in enumerate(runs)]
    return "".join(parts), sum(runs[1::2])


@st.composite
def documents(draw: st.DrawFn, numbers: st.SearchStrategy[Any] = NUMBERS) -> bytes:
    """A document in Meta's form; its numbers are anything that JSON can say."""
    height, width = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    out = []
    for _ in range(draw(st.integers(0, 4))):
        counts, area = draw(strings(height * width))
        kind = draw(st.sampled_from([numbers, FLOATS, INTS, FLOATS]))
        box = st.lists(kind, min_size=4, max_size=4)
        annotation = {
            "bbox": draw(box),
            "area": draw(st.one_of(st.just(area), IDS)),
            "segmentation": {"size": [height, width], "counts": counts},
            "predicted_iou": draw(kind),
            "point_coords": [draw(st.lists(kind, min_size=2, max_size=2))],
            "crop_box": draw(box),
            "id": draw(IDS),
            "stability_score": draw(kind),
        }
        out.append(annotation)
    image = {"image_id": 7, "width": width, "height": height, "file_name": f"{KEY}.jpg"}
    return json.dumps({"image": image, "annotations": out}).encode()


def outcome(pack: Any, document: bytes, key: str = KEY) -> tuple[Any, ...]:
    """What packing says: the member and its facts, or that it refuses."""
    try:
        packed: Packed = pack(document, key)
    except SampleRejected:
        return ("rejected",)
    return (
        bytes(packed.member),
        packed.image_id,
        packed.height,
        packed.width,
        packed.annotations,
        packed.area_mismatches,
        packed.stored_source,
    )


def check(document: bytes, key: str = KEY) -> Annotations | None:
    """Everything that must hold of any bytes whatsoever; the columns, where they are a document."""
    fast, general = outcome(PACKER.pack, document, key), outcome(pack_any, document, key)
    assert fast == general
    if fast == ("rejected",):
        return None
    member = fast[0]
    columns = unpack(member, KEY)
    assert restore(columns) == document
    assert (len(columns), columns.source_json is not None) == (fast[4], fast[6])
    check_safetensors(member, columns)
    return columns


def check_safetensors(member: bytes, columns: Annotations) -> None:
    """The safetensors library reads every column equal, and writes the same bytes."""
    tensors = load(member)
    assert save(tensors, {"format": FORMAT}) == member
    assert int(tensors["image.image_id"]) == columns.image_id
    assert (int(tensors["image.height"]), int(tensors["image.width"])) == (columns.height, columns.width)
    names = {f"annotations.{n}": n for n in ("id", "area", "bbox", "crop_box", "point_coords", "json_form")}
    names |= {f"annotations.{n}": n for n in ("predicted_iou", "stability_score")}
    names |= {f"annotations.segmentation.{n}": n for n in ("counts", "offsets", "size")}
    for name, field in names.items():
        column = getattr(columns, field)
        assert (name in tensors) is (column is not None)
        if column is not None:
            np.testing.assert_array_equal(tensors[name], column, strict=True)
            assert tensors[name].tobytes() == column.tobytes()  # −0.0 as well
            assert column.ctypes.data % column.itemsize == 0 or not column.size
    assert (tensors["source.json"].tobytes() if "source.json" in tensors else None) == columns.source_json


# ------------------------------------------------------------------------------------- the kernel and the general path


@given(documents())
def test_any_document_of_metas_form_comes_back(document: bytes) -> None:
    check(document)


@given(documents(FLOATS))
def test_floats_of_any_size_need_no_copy(document: bytes) -> None:
    columns = check(document)
    assert columns is None or columns.source_json is None


@pytest.mark.parametrize("count", [0, 1, 7, 120])
def test_metas_form_takes_the_kernel(count: int) -> None:
    """Or all that holds the kernel to the general path would compare the general path with itself."""
    document = making.text(sevens(annotations=count))
    assert PACKER._fast(np.frombuffer(document, np.uint8), KEY) is not None
    assert check(document) is not None


@given(document=documents(), seed=st.randoms(use_true_random=False), edits=st.integers(1, 3))
@settings(max_examples=300)
def test_bytes_edited_anywhere(document: bytes, seed: Any, edits: int) -> None:
    out = bytearray(document)
    for _ in range(edits):
        at = seed.randrange(len(out))
        piece = bytes(seed.choice(b'0123456789.-+eE"\\ ,:[]{}`OPop/\x00\x7f\xff\n') for _ in range(seed.randrange(3)))
        out[at : at + seed.randrange(3)] = piece
    check(bytes(out))


NUMBER = re.compile(rb"-?[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?")


WRITTEN = """
-0 -0.0 00 1e16 1e+16 0.0001 1e-4 1e-04 1e-05 0.00001 1E5 1.0E5 1e400 9007199254740992 9007199254740993 .5 5. 0.1e1
9007199254740994 9223372036854775807 9223372036854775808 18446744073709551616 123456789012345678 1234567890123456789
99999999999999999 10000000000000000.0 1234567890123456.0 123456789012345.6 NaN Infinity null true 1_0 0x10 \u0661
"""


def forms(token: str, draw: Any) -> str:
    """Another way to write a number, or another number near it, or none."""
    value = float(token)
    ways = (
        lambda: "0" + token,
        lambda: token + "0",
        lambda: token + ".0",
        lambda: token + ".",
        lambda: "-" + token,
        lambda: "+" + token,
        lambda: f"{value:.17g}",
        lambda: f"{value:.16g}",
        lambda: f"{value:.15g}",
        lambda: f"{value:.20f}",
        lambda: f"{value:.21f}",
        lambda: f"{value:.22f}",
        lambda: f"{value:e}",
        lambda: f"{value:E}",
        lambda: repr(value),
        lambda: repr(float(np.nextafter(value, 1e300))),
        lambda: repr(float(np.float32(value if abs(value) < 1e38 else 0))),
        lambda: str(draw.randrange(10 ** draw.randrange(1, 25))),
        lambda: f"{draw.randrange(10 ** draw.randrange(1, 18))}.{draw.randrange(10 ** draw.randrange(1, 18))}",
        lambda: f"0.{'0' * draw.randrange(8)}{draw.randrange(10**6)}",
        lambda: f"{draw.randrange(1000)}e{draw.randrange(-330, 320)}",
        lambda: draw.choice(WRITTEN.split()),
    )
    return str(draw.choice(ways)())


@given(document=documents(), seed=st.randoms(use_true_random=False), edits=st.integers(1, 4))
@settings(max_examples=400)
def test_numbers_written_in_any_way(document: bytes, seed: Any, edits: int) -> None:
    tokens = list(NUMBER.finditer(document))
    text = document
    for token in sorted(seed.sample(tokens, min(edits, len(tokens))), key=lambda t: -t.start()):
        text = text[: token.start()] + forms(token[0].decode(), seed).encode() + text[token.end() :]
    check(text)


DECIMALS = """
0.0 -0.0 0.1 -0.1 0.0001 0.00010 0.0000999 1e-05 0.5 100.0 100.00 1e16 1e+16 10000000000000000.0 9999999999999998.0
0.9834724068641663 0.98347240686416626 0.98347240686416630 0.983472406864166 123456789012345.6 1234567890123456.7
12345678901234567.0 123456789012345678.0 0.12345678901234567 0.123456789012345678 0.00012345678901234567
0.000012345678901234567 5e-324 1.7976931348623157e308 1797693134862315700000.0 0.3 0.30000000000000004
0.299999999999999999 1 0 -0 01 -1 9007199254740992 9007199254740993 9007199254740994 -9007199254740992
99999999999999999 100000000000000000 1e0 1E0 1.0e0 1.5e3 0.1234567890123456789012 0.000000000000000000001
0.100000000000000005551115123125782702 0.00001234567890123456 0.00009999999999999999 0.00002500000000000001
"""
FIELDS = ["bbox", "crop_box", "predicted_iou", "point_coords", "stability_score", "area", "id"]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("number", DECIMALS.split())
def test_numbers_at_the_edges(number: str, field: str) -> None:
    text = making.text(sevens(annotations=2)).decode()
    changed = re.sub(rf'("{field}": \[*)[-0-9.e]+', rf"\g<1>{number}", text, count=1)
    assert number in changed
    check(changed.encode())


@pytest.mark.parametrize("length", range(1, 10))
@pytest.mark.parametrize("place", [0, 2, 4])
@pytest.mark.parametrize("negative", [False, True])
def test_superfluous_digits_of_a_run(length: int, place: int, negative: bool) -> None:
    """Up to six characters are a number; kernel and general path must agree where it ends."""
    runs = [5, 9, 10, 7, 3, 2]  # later runs are written as differences, some of them negative
    at = place if not negative else place + 1
    parts = []
    for i, run in enumerate(runs):
        value = run - (runs[i - 2] if i > 2 else 0)
        n = length if i == at else 1
        characters = [(value >> (5 * k)) & 31 for k in range(n)]
        parts.append("".join(chr(48 + d + (32 if k < n - 1 else 0)) for k, d in enumerate(characters)))
    made = sevens(height=6, width=6, annotations=1)
    made["annotations"][0]["segmentation"]["counts"] = "".join(parts)
    accepted = check(making.text(made))
    assert (accepted is not None) == (length <= MAX_DIGITS)


@example(b"")
@example(b"{")
@example(b"\xef\xbb\xbf{}")
@example(b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}")
@example(b"[" * 100_000)
@given(st.binary(max_size=200))
def test_bytes_that_are_no_document(document: bytes) -> None:
    assert check(document) is None


@pytest.mark.parametrize("digits", [20, 100, 4_299, 4_301, 50_000])
def test_integers_without_end_are_refused_with_a_short_message(digits: int) -> None:
    text = making.text(sevens(annotations=1)).decode()
    for field in ("area", "id", "predicted_iou", "stability_score"):
        document = re.sub(rf'"{field}": [-0-9.e]+', f'"{field}": 1{"0" * (digits - 2)}1', text).encode()
        with pytest.raises(SampleRejected) as caught:
            PACKER.pack(document, KEY)
        assert len(str(caught.value)) < 300


# ----------------------------------------------------------------------------------------------------- other documents


def decoded(columns: Annotations, i: int) -> npt.NDArray[np.uint8]:
    """Annotation i at its own size, by pycocotools."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # its arrays predate numpy 2
        return np.asarray(coco.decode(columns.rle(i)))


def keep(document: Document) -> Annotations:
    columns = check(making.text(document))
    assert columns is not None
    return columns


def test_sizes_that_are_not_the_images() -> None:
    made = sevens(annotations=3)
    other = sevens(height=11, width=5, annotations=1, seed=5)
    made["annotations"][1]["segmentation"] = other["annotations"][0]["segmentation"]
    columns = keep(made)
    assert columns.source_json is None
    assert columns.size is not None
    assert columns.size.tolist() == [[24, 32], [11, 5], [24, 32]]
    for i, a in enumerate(made["annotations"]):
        segmentation = a["segmentation"]
        assert columns.rle(i) == {"size": segmentation["size"], "counts": segmentation["counts"].encode()}
        whole = decoded(columns, i)
        size = whole.shape
        np.testing.assert_array_equal(columns.masks(size, index=[i])[0], whole)
    assert columns.masks().shape == (3, 24, 32)


def test_sizes_that_are_all_the_images_are_not_kept() -> None:
    columns = keep(sevens())
    assert columns.size is None


def test_more_points_than_one() -> None:
    made = sevens(annotations=2)
    for a in made["annotations"]:
        a["point_coords"] = [[1.5, 2.25], [3.0, 4.0], [5, 6.5]]
    columns = keep(made)
    assert columns.source_json is None
    assert columns.point_coords.shape == (2, 3, 2)
    assert columns.json_form.shape == (2, 16)
    made["annotations"][1]["point_coords"].pop()
    with pytest.raises(SampleRejected, match=r"annotations\[1\]\.point_coords: points differ in number"):
        PACKER.pack(making.text(made), KEY)


def test_no_annotations() -> None:
    columns = keep(sevens(annotations=0))
    assert columns.source_json is None
    shapes = [columns.bbox.shape, columns.point_coords.shape, columns.counts.shape, columns.offsets.tolist()]
    assert shapes == [(0, 4), (0, 1, 2), (0,), [0]]
    assert columns.masks().shape == (0, 24, 32)
    assert len(columns) == 0


def test_json_form_is_bits_where_it_can_be() -> None:
    made = sevens(annotations=3)
    made["annotations"][0] |= {"crop_box": [0, 0, 1, 2], "predicted_iou": 1, "stability_score": 0}
    made["annotations"][1]["point_coords"] = [[1, 2]]
    made["annotations"][2]["bbox"] = [1, 2, 3, 4]
    columns = keep(made)
    assert columns.json_form.tolist() == [2 + 8 + 16, 4, 1]
    made["annotations"][2]["bbox"] = [1, 2.0, 3, 4]
    assert keep(made).json_form.shape == (3, 12)


def test_a_document_of_megabytes_and_then_a_small_one() -> None:
    packer = Packer()
    big, small = making.text(sevens(annotations=4000)), making.text(sevens(annotations=2))
    assert len(big) > 1 << 20
    for document in (small, big, small):
        packed = packer.pack(document, KEY)
        assert bytes(packed.member) == bytes(pack_any(document, KEY).member)
        assert restore(unpack(packed.member, KEY)) == document


def test_the_member_is_written_where_it_is_told() -> None:
    document = making.text(sevens())
    room = bytearray(1 << 16)
    asked: list[int] = []

    def allocate(length: int) -> memoryview:
        asked.append(length)
        return memoryview(room)[:length]

    for pack in (PACKER.pack, pack_any):
        packed = pack(document, KEY, allocate)
        assert bytes(room[: asked[-1]]) == bytes(packed.member) == bytes(PACKER.pack(document, KEY).member)


def test_columns_are_views_and_cannot_be_written() -> None:
    member = bytearray(PACKER.pack(making.text(sevens()), KEY).member)
    columns = unpack(member, KEY)
    for name in ("id", "area", "bbox", "counts", "offsets", "json_form"):
        column = getattr(columns, name)
        assert not column.flags.writeable
        assert np.shares_memory(column, np.frombuffer(member, np.uint8))


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real documents at {SHARED}")
def test_real_documents() -> None:
    kept = []
    for path in sorted((SHARED / "real_json").glob("*.json")):
        columns = check(path.read_bytes(), path.stem)
        assert columns is not None, path
        assert len(columns)
        kept.append(columns.source_json is not None)
        for i, mask in enumerate(columns.masks(index=range(min(3, len(columns))))):
            np.testing.assert_array_equal(mask, decoded(columns, i))
            assert mask.sum() == columns.area[i]
    assert not all(kept)


# --------------------------------------------------------------------------------------------------------------- limits


def huge() -> list[tuple[int, int]]:
    return [(65_536, 1), (1, 65_536), (0, 5), (5, 0), (-1, 5), (10**6, 10**6), (16_385, 16_384), (1 << 40, 1 << 40)]


@pytest.mark.parametrize(("height", "width"), huge())
@pytest.mark.parametrize("part", ["image", "segmentation", "both"])
def test_sizes_beyond_the_limits_reach_no_kernel(
    height: int, width: int, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a size beyond the limits reached a kernel")

    made = sevens(annotations=1)
    if part in ("image", "both"):
        made["image"] |= {"height": height, "width": width}
    if part in ("segmentation", "both"):
        made["annotations"][0]["segmentation"]["size"] = [height, width]
    document = making.text(made)
    assert annotations._walk(np.frombuffer(document, np.uint8), *_scratch(len(document))) == -1
    monkeypatch.setattr(rle, "check", never)
    for pack in (PACKER.pack, pack_any):
        with pytest.raises(SampleRejected, match="size beyond the limits"):
            pack(document, KEY)


def _scratch(length: int) -> tuple[Any, ...]:
    p = Packer()
    assert length < p._room
    return (p._image, p._ids, p._area, p._floats, p._counts, p._offsets, p._form, p._tokens, p._long, p._state)


@pytest.mark.parametrize(("height", "width"), [(1, 65_535), (65_535, 1), (16_384, 16_384), (4096, 65_535)])
def test_sizes_at_the_limits(height: int, width: int) -> None:
    made = sevens(annotations=2)
    made["image"] |= {"height": height, "width": width}
    counts = [rle.encode_runs([height * width]), rle.encode_runs([0, height * width])]
    for a, text, area in zip(made["annotations"], counts, (0, height * width), strict=True):
        a["segmentation"] = {"size": [height, width], "counts": text.decode()}
        a["area"] = area
    columns = keep(made)
    assert columns.source_json is None
    assert PACKER.pack(making.text(made), KEY).area_mismatches == 0


def test_a_member_beyond_the_limit() -> None:
    with pytest.raises(SampleRejected, match="too large"):
        PACKER.pack(np.zeros(MEMBER_LIMIT + 1, np.uint8).data, KEY)
    with pytest.raises(FormatError, match="not a packed member"):
        unpack(np.zeros(MEMBER_LIMIT + 1, np.uint8).data, "x")


def test_a_member_that_would_grow_beyond_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    document = making.text(sevens()) + b" " * 4000  # kept beside its columns
    size = len(PACKER.pack(document, KEY).member)
    monkeypatch.setattr(annotations, "MEMBER_LIMIT", size - 1)
    with pytest.raises(SampleRejected, match="too large"):
        PACKER.pack(document, KEY)
    monkeypatch.setattr(annotations, "MEMBER_LIMIT", size)
    assert len(PACKER.pack(document, KEY).member) == size


# ------------------------------------------------------------------------------------------------------ hostile members


def hostile(member: bytes) -> None:
    """Unpacked and used, or refused: with an error of this project's, and nothing else."""
    try:
        columns = unpack(member, KEY)
    except FormatError:
        return
    assert columns.height * columns.width <= 1 << 28
    try:
        document = restore(columns)
    except FormatError:
        document = b""
    # It gives the same member again, or it is not one that this project writes, which verify says.
    outcome(PACKER.pack, document, f"sa_{columns.image_id}")
    for i in range(len(columns)):
        columns.rle(i)
    try:
        columns.masks((5, 7))
        columns.masks((5, 7), index=list(range(len(columns)))[::-2])
    except SampleRejected:
        pass


OTHER_SIZE = making.text(sevens(annotations=2)).replace(b'"size": [24, 32]', b'"size": [32, 24]', 1)
DOCUMENTS = [
    making.text(sevens()),
    making.text(sevens(annotations=0)),
    making.text(sevens(annotations=1)) + b"\n",
    OTHER_SIZE,
]
MEMBERS = [bytes(PACKER.pack(document, KEY).member) for document in DOCUMENTS]


@pytest.mark.parametrize("member", MEMBERS)
def test_a_member_cut_anywhere_is_refused(member: bytes) -> None:
    for length in range(len(member)):
        with pytest.raises(FormatError):
            unpack(member[:length], KEY)
    with pytest.raises(FormatError):
        unpack(member + b"\0", KEY)
    assert unpack(member, KEY).image_id == 7


@pytest.mark.parametrize("member", MEMBERS)
def test_every_byte_of_the_header_changed(member: bytes) -> None:
    header = 8 + int.from_bytes(member[:8], "little")
    for at in range(header):
        for flip in (1, 2, 16, 128, 255):
            changed = bytearray(member)
            changed[at] ^= flip
            hostile(bytes(changed))


@given(index=st.integers(0, 3), edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=8))
@settings(max_examples=400)
def test_bytes_of_a_member_changed(index: int, edits: list[tuple[float, int]]) -> None:
    member = bytearray(MEMBERS[index])
    for place, value in edits:
        member[min(int(place * len(member)), len(member) - 1)] = value
    hostile(bytes(member))


COLUMNS = """
annotations.segmentation.offsets annotations.segmentation.size image.height image.width image.image_id
annotations.bbox annotations.area annotations.json_form
"""
VALUES = [0, 1, -1, 1 << 62, -(1 << 63), 65_535, 65_536, 1 << 28, 0x7FF0000000000000, 0x7FF8000000000001]


@given(st.integers(0, 3), st.sampled_from(COLUMNS.split()), st.sampled_from(VALUES), st.integers(0, 40))
def test_values_of_a_member_changed(index: int, name: str, value: int, place: int) -> None:
    tensors = {k: v.copy() for k, v in load(MEMBERS[index]).items()}
    if name not in tensors or not tensors[name].size:
        return
    flat = tensors[name].reshape(-1)
    raw = flat.view(np.int64) if flat.itemsize == 8 else flat
    raw[place % raw.size] = value if flat.itemsize == 8 else value & 255
    hostile(save(tensors, {"format": FORMAT}))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda t: t.pop("annotations.id"), "tensor annotations.id is missing"),
        (lambda t: t.update(other=np.zeros(1)), "tensor other is not part of sa1b-wds/1"),
        (lambda t: t.update({"annotations.id": t["annotations.id"].astype(np.int32)}), "annotations.id: dtype I32"),
        (lambda t: t.update({"annotations.id": t["annotations.id"].view(np.float64)}), "annotations.id: dtype F64"),
        (lambda t: t.update({"annotations.id": t["annotations.id"][:-1]}), "tensor annotations"),
        (lambda t: t.update({"annotations.bbox": t["annotations.bbox"].reshape(-1)}), "tensor annotations.bbox"),
        (lambda t: t.update({"annotations.point_coords": np.zeros((3, 0, 2))}), "at least one point"),
        (lambda t: t.update({"image.height": np.array([24])}), "tensor image.height"),
        (lambda t: t.update({"image.height": np.array(0)}), "size beyond the limits"),
        (lambda t: t.update({"image.height": np.array(65_536)}), "size beyond the limits"),
        (lambda t: t["annotations.segmentation.offsets"].__setitem__(1, 1 << 40), "offsets of the RLE strings"),
        (lambda t: t["annotations.segmentation.offsets"].__setitem__(0, 1), "offsets of the RLE strings"),
        (lambda t: t["annotations.segmentation.offsets"].__setitem__(-1, 0), "offsets of the RLE strings"),
        (
            lambda t: t.update({"annotations.segmentation.size": np.full((3, 2), 65_536)}),
            "an RLE's size is beyond the limits",
        ),
        (
            lambda t: t.update({"annotations.segmentation.size": np.full((3, 2), 65_535)}),
            "an RLE's size is beyond the limits",
        ),
    ],
)
def test_what_is_wrong_with_a_member_is_said(change: Any, what: str) -> None:
    tensors = {k: v.copy() for k, v in load(MEMBERS[0]).items()}
    change(tensors)
    with pytest.raises(FormatError, match=r"^where: ") as caught:
        unpack(save(tensors, {"format": FORMAT}), "where")
    assert what in str(caught.value)


@pytest.mark.parametrize(
    "metadata", [None, {"format": "sa1b-wds/2"}, {"format": FORMAT, "more": "1"}, {"Format": FORMAT}]
)
def test_another_format_is_refused(metadata: dict[str, str] | None) -> None:
    with pytest.raises(FormatError, match="is not known to this release"):
        unpack(save(dict(load(MEMBERS[0])), metadata), "where")


def test_other_layouts_of_the_same_tensors_are_refused() -> None:
    """The library's order aligns the columns; a header may not move them."""
    member = MEMBERS[0]
    length = int.from_bytes(member[:8], "little")
    header, data = member[8 : 8 + length], member[8 + length :]
    entries = json.loads(header)
    metadata = {"__metadata__": entries.pop("__metadata__")}

    def again(entries: dict[str, Any], data: bytes, blanks: int = 0) -> bytes:
        text = json.dumps(metadata | entries).encode()
        text += b" " * (-len(text) % 8 + blanks)
        return len(text).to_bytes(8, "little") + text + data

    assert restore(unpack(again(entries, data), KEY)) == restore(unpack(member, KEY))  # blanks alone mean nothing
    turned = dict(reversed(entries.items()))
    with pytest.raises(FormatError):
        unpack(again(turned, data), KEY)
    out, moved, at = b"", {}, 0
    for name, entry in turned.items():
        begin, end = entry["data_offsets"]
        moved[name] = entry | {"data_offsets": [at, at + end - begin]}
        out, at = out + data[begin:end], at + end - begin
    assert load(again(moved, out)).keys() == load(member).keys()
    with pytest.raises(FormatError, match="order"):
        unpack(again(moved, out), KEY)
    with pytest.raises(FormatError, match="padded to 8"):
        unpack(again(entries, data, blanks=1), KEY)
    for nested in (b"[" * 60_000, b'{"a":' * 12_000):
        with pytest.raises(FormatError):
            unpack(len(nested).to_bytes(8, "little") + nested + data, KEY)


def test_columns_that_no_document_has_are_not_restored() -> None:
    made = making.text(sevens())
    for name, value in (("annotations.bbox", np.nan), ("annotations.predicted_iou", np.inf)):
        tensors = {k: v.copy() for k, v in load(bytes(PACKER.pack(made, KEY).member)).items()}
        tensors[name].reshape(-1)[0] = value
        with pytest.raises(FormatError, match="not finite"):
            restore(unpack(save(tensors, {"format": FORMAT}), KEY))
    tensors = {k: v.copy() for k, v in load(bytes(PACKER.pack(made, KEY).member)).items()}
    tensors["annotations.json_form"][0] = 1
    tensors["annotations.bbox"][0, 0] = 0.5
    with pytest.raises(FormatError, match="not whole"):
        restore(unpack(save(tensors, {"format": FORMAT}), KEY))
    tensors["annotations.json_form"][0] = 0
    for character in b'"\x00\xff/p':
        tensors["annotations.segmentation.counts"][0] = character
        with pytest.raises(FormatError, match="RLE strings do not have"):
            restore(unpack(save(tensors, {"format": FORMAT}), KEY))


# --------------------------------------------------------------------------------------------------------------- golden

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("name", ["plain", "awkward", "kept"])
def test_golden_members_of_version_1(name: str) -> None:
    """Bytes that version 1 writes for ever: another byte here is another format, and needs another number."""
    document = (GOLDEN / f"{name}.json").read_bytes()
    text = "".join((GOLDEN / f"{name}.member.hex").read_text().split())
    member = bytes.fromhex(text)
    assert hashlib.sha256(member).hexdigest() == GOLDEN_SHA256[name]
    for pack in (PACKER.pack, pack_any):
        assert bytes(pack(document, "sa_223750").member) == member
    columns = unpack(member, name)
    assert restore(columns) == document
    assert (columns.source_json is not None) is (name == "kept")
    assert (columns.size is not None, columns.json_form.ndim) == ((True, 2) if name == "awkward" else (False, 1))


GOLDEN_SHA256 = {
    "plain": "2471ee53a4ef9b4c5829da1813eee51731cedff18e4ba8a2634b67dfd5885d43",
    "awkward": "b638cb96d7c045cd4efb3a15bef96f12b024a4b47363e17cd18e5506ec38f763",
    "kept": "68fef2d88f9a23458fa3feb01fd6ce88aa631974090dd5bda87777934692a068",
}
