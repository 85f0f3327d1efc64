"""Samples that are no good go to quarantine with the reason and their bytes; all others come back byte for byte."""

import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sa1b_wds import tar
from sa1b_wds.convert import run_task
from sa1b_wds.errors import DuplicateKey, SourceDamaged, TooFewSamples, TooManyQuarantined
from sa1b_wds.manifest import Manifest
from sa1b_wds.plan import Source, make_plan

from . import making, running
from .making import BLOCK, Document, Member
from .running import ALL, convert, job_of, quarantined, undisturbed

KEY = 5
SOUND = making.pairs([1, 2, 3])


@pytest.fixture(autouse=True)
def _undisturbed() -> Iterator[None]:
    with undisturbed():
        yield


def _one(**changes: Any) -> Document:
    """A sound document of sa_5 with one annotation, some of whose fields are changed."""
    out = making.document(KEY, annotations=1)
    out["annotations"][0] |= changes
    return out


def _image(**changes: Any) -> Document:
    out = _one()
    out["image"] |= changes
    return out


def _members(document: bytes, picture: bytes | None = None) -> list[Member]:
    return [Member(f"sa_{KEY}.json", document), Member(f"sa_{KEY}.jpg", picture or making.jpg())]


def _run(tmp_path: Path, members: list[Member], **options: Any) -> Manifest:
    """Convert a tar of these members and the sound ones around them."""
    data = making.tar([*SOUND[:2], *members, *SOUND[2:]])
    paths = running.write(tmp_path / "in", {"sa_000000.tar": data})
    return convert(paths, tmp_path / "out", max_quarantine=ALL, **options)


def _rejected(tmp_path: Path, members: list[Member], reason: str) -> None:
    """All of these members are quarantined for this reason, with their bytes; the sound ones are samples."""
    _run(tmp_path, members)
    running.check_samples(tmp_path / "out", SOUND)
    found = quarantined(tmp_path / "out")
    assert sorted((q.name, q.data) for q in found) == sorted((m.name, m.data) for m in members)
    for q in found:
        assert re.search(reason, q.reason), q.reason
        assert (q.source, q.key) == ("sa_000000.tar", f"sa_{KEY}")
    starts = making.offsets([*SOUND[:2], *members, *SOUND[2:]])
    assert {q.name: q.byte for q in found} == {m.name: starts[m.name] for m in members}


# ------------------------------------------------------------------------------------------------- what must survive

WIDE = [[1.5, 2.25], [3.0, 4.0]]
_LONG = '{"image": {"image_id": 5, "width": 32, "height": 24, "file_name": "sa_5.jpg"}, "annotations": []}'


def _replaced(old: str, new: str, document: Document | None = None) -> bytes:
    written = making.text(document or _one()).decode()
    assert old in written
    return written.replace(old, new).encode()


def _reordered(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _reordered(v) for k, v in reversed(value.items())}
    return [_reordered(v) for v in value] if isinstance(value, list) else value


SURVIVES: dict[str, tuple[bytes, bool]] = {
    # name → (document, whether the document itself must be stored)
    "as Meta wrote it": (making.text(_one()), False),
    "zero annotations": (_LONG.encode(), False),
    "int boxes": (making.text(_one(bbox=[1, 2, 3, 4], crop_box=[0, 0, 32, 24])), False),
    "mixed ints and floats in one box": (making.text(_one(bbox=[1, 2.0, 3.5, 4])), False),
    "int scores and points": (making.text(_one(predicted_iou=1, stability_score=1, point_coords=[[3, 4.5]])), False),
    "-0.0": (making.text(_one(bbox=[-0.0, 1.0, 0.0, -1.5])), False),
    "1e-05": (making.text(_one(predicted_iou=1e-05)), False),
    "5e-324 and the largest double": (making.text(_one(bbox=[5e-324, 1.7976931348623157e308, 1e22, 1e16])), False),
    "2^53 as an int in a float column": (making.text(_one(bbox=[1 << 53, 0, -(1 << 53), 1])), False),
    "2^53 + 1 as id and area": (making.text(_one(id=(1 << 53) + 1, area=(1 << 53) + 1)), False),
    "the largest id": (making.text(_one(id=(1 << 63) - 1, area=-(1 << 63))), False),
    "an area that is not the mask's": (making.text(_one(area=1)), False),
    "two points": (making.text(_one(point_coords=WIDE)), False),
    "an RLE of another size": (making.text(_one(segmentation={"size": [3, 4], "counts": "<"})), False),
    "2^53 + 1 written as a float": (_replaced("[0.0, 0.0, 32.0, 24.0]", "[9007199254740993.0, 0.0, 1.0, 1.0]"), True),
    "an int written as -0": (_replaced("[0.0, 0.0, 32.0, 24.0]", "[-0, 0, 32, 24]"), True),
    "1E-5": (_replaced('"crop_box": [0.0', '"crop_box": [1E-5'), True),
    "more digits than a double has": (
        _replaced('"crop_box": [0.0', '"crop_box": [0.1000000000000000055511151231'),
        True,
    ),
    "trailing zeros": (_replaced("32.0, 24.0]", "32.000, 24.0]"), True),
    "unknown field of the image": (making.text(_image(licence="none")), True),
    "unknown field of an annotation": (making.text(_one(iscrowd=0)), True),
    "unknown field of the document": (making.text(_one() | {"info": {"year": [2023, None, True, "é"]}}), True),
    "escaped \\u00e9": (making.text(_one() | {"note": "caf\u00e9"}), True),
    "raw UTF-8": (json.dumps(_one() | {"note": "café 🎈"}, ensure_ascii=False).encode(), True),
    "escaped \\/": (_replaced('"image": {', '"note": "a\\/b", "image": {'), True),
    "an escaped letter in file_name": (_replaced('"sa_5.jpg"', '"\\u0073a_5.jpg"'), True),
    "other key order": (making.text(_reordered(_one())), True),
    "trailing newline": (making.text(_one()) + b"\n", True),
    "leading blanks": (b"  \t" + making.text(_one()), True),
    "compact": (json.dumps(_one(), separators=(",", ":")).encode(), True),
    "indented": (json.dumps(_one(), indent=2).encode(), True),
    "a key twice": (_replaced('"area": ', '"area": 7, "area": '), True),
    "many annotations": (making.text(making.document(KEY, annotations=300)), False),
}


@pytest.mark.parametrize("name", SURVIVES)
def test_survives_byte_for_byte(tmp_path: Path, name: str) -> None:
    document, stored = SURVIVES[name]
    members = _members(document)
    manifest = _run(tmp_path, members)
    assert not quarantined(tmp_path / "out")
    running.check_samples(tmp_path / "out", [*SOUND, *members])
    assert manifest.totals.stored_sources == stored


@pytest.mark.parametrize(("area", "mismatches"), [(0, 0), (1, 1), (-1, 1)])
def test_an_area_that_is_not_the_masks_is_kept_and_counted(tmp_path: Path, area: int, mismatches: int) -> None:
    right: int = _one()["annotations"][0]["area"]
    members = _members(making.text(_one(area=right + area)))
    assert _run(tmp_path, members).totals.area_mismatches == mismatches
    running.check_samples(tmp_path / "out", [*SOUND, *members])


@pytest.mark.parametrize("spilled", [False, True], ids=["in memory", "through scratch"])
def test_all_survivors_in_one_tar_in_any_order(tmp_path: Path, spilled: bool) -> None:
    members: list[Member] = []
    for i, (document, _) in enumerate(SURVIVES.values()):
        key = 50 + i
        named = document.replace(b'"image_id": 5', b'"image_id": %d' % key, 1).replace(
            b"sa_5.jpg", b"sa_%d.jpg" % key, 1
        )
        named = named.replace(b'"image_id":5', b'"image_id":%d' % key, 1).replace(
            b"\\u0073a_5", b"\\u0073a_%d" % key, 1
        )
        members += [Member(f"x/sa_{key}.jpg", making.jpg()), Member(f"sa_{key}.json", named)]
    order = [*members[::2], *reversed(members[1::2])]
    _run(tmp_path, order, pairing_buffer=0 if spilled else 1 << 30)
    assert not quarantined(tmp_path / "out")
    running.check_samples(tmp_path / "out", [*SOUND, *members])


# ---------------------------------------------------------------------------------------------- what is quarantined


def _without(*path: str) -> bytes:
    out = _one()
    at: Any = out
    for step in path[:-1]:
        at = at[step][0] if step == "annotations" else at[step]
    del at[path[-1]]
    return making.text(out)


FIELDS = [
    ("image",),
    ("annotations",),
    *(("image", name) for name in ("image_id", "width", "height", "file_name")),
    *(("annotations", name) for name in _one()["annotations"][0]),
    ("annotations", "segmentation", "size"),
    ("annotations", "segmentation", "counts"),
]


@pytest.mark.parametrize("path", FIELDS, ids=".".join)
def test_a_missing_field(tmp_path: Path, path: tuple[str, ...]) -> None:
    _rejected(tmp_path, _members(_without(*path)), f"missing required field `{path[-1]}`")


WRONG = [
    (path, wrong)
    for path in FIELDS
    for wrong in ("null", "true", '"7"', "{}", "[[]]", "[1, 2, 3]", "1.5")
    if not (wrong == "1.5" and path[-1] in ("predicted_iou", "stability_score"))
    and not (wrong == '"7"' and path[-1] in ("file_name", "counts"))
]


@pytest.mark.parametrize(("path", "wrong"), WRONG, ids=[f"{'.'.join(path)} {wrong}" for path, wrong in WRONG])
def test_a_wrong_type(tmp_path: Path, path: tuple[str, ...], wrong: str) -> None:
    out: Any = _one()
    at = out
    for step in path[:-1]:
        at = at[step][0] if step == "annotations" else at[step]
    at[path[-1]] = json.loads(wrong)
    # an annotation's own field is named with its place; what is not even a list has none
    _rejected(tmp_path, _members(making.text(out)), rf"sa_5\.json: not a valid SA-1B document: .* - at `\$\.{path[0]}")


def _rle(counts: str, **changes: Any) -> bytes:
    return making.text(_one(segmentation={"size": [24, 32], "counts": counts, **changes}))


def _sized(height: int, width: int) -> bytes:
    out = _image(height=height, width=width)
    out["annotations"][0]["segmentation"]["size"] = [height, width]
    return making.text(out)


COUNTS = _one()["annotations"][0]["segmentation"]["counts"]


def _last_run(step: int) -> str:
    """The sound RLE with its last run longer or shorter by `step`."""
    from sa1b_wds import rle

    runs = rle.runs(COUNTS.encode())
    runs[-1] += step
    return rle.encode_runs(runs).decode()


REJECTED: dict[str, tuple[bytes, str]] = {
    "an integral float for an int": (_replaced('"image_id": 5', '"image_id": 5.0'), "Expected `int`, got `float`"),
    "empty": (b"", "not a valid SA-1B document"),
    "cut": (making.text(_one())[:-1], "truncated"),
    "cut in a string": (making.text(_one())[:300], "truncated|not a valid"),
    "two documents": (making.text(_one()) * 2, "malformed"),
    "garbage behind": (making.text(_one()) + b"x", "malformed"),
    "a NUL behind": (making.text(_one()) + b"\0", "malformed"),
    "a byte order mark": (b"\xef\xbb\xbf" + making.text(_one()), "malformed"),
    "UTF-16": (making.text(_one()).decode().encode("utf-16"), "not a valid SA-1B document"),
    "NaN": (_replaced('"crop_box": [0.0', '"crop_box": [NaN'), "malformed"),
    "Infinity": (_replaced('"crop_box": [0.0', '"crop_box": [Infinity'), "malformed"),
    "a number beyond all doubles": (_replaced('"crop_box": [0.0', '"crop_box": [1e400'), "out of range"),
    "a number of 5,000 digits": (_replaced('"image_id": 5', '"image_id": ' + "5" * 5000), "out of range"),
    "a leading zero": (_replaced('"image_id": 5', '"image_id": 05'), "malformed"),
    "a single quote": (making.text(_one()).replace(b'"', b"'"), "malformed"),
    "half a surrogate": (_replaced('"sa_5.jpg"', '"sa_5.jpg\\ud800"'), "malformed"),
    "nested a million deep": (
        making.text(_one())[:-1] + b', "x": ' + b"[" * 10**6 + b"]" * 10**6 + b"}",
        "not a valid SA-1B document",
    ),
    "not UTF-8": (_replaced("sa_5.jpg", "sa_5.jpg?").replace(b"?", b"\xff"), "not a valid SA-1B document|disagrees"),
    "image_id": (making.text(_image(image_id=6)), "image_id disagrees with the key: expected sa_5, found sa_6"),
    "file_name": (making.text(_image(file_name="sa_6.jpg")), "file_name disagrees .* expected sa_5.jpg, found 'sa_6"),
    "a hostile file_name": (making.text(_image(file_name="../\x1b[2J\n")), r"found '\.\./\\x1b\[2J\\n'"),
    "2^53 + 1 in a float column": (making.text(_one(bbox=[(1 << 53) + 1, 0, 1, 1])), "an integer that float64 cannot"),
    "10^4000 in a float column": (_replaced('"crop_box": [0.0', '"crop_box": [1' + "0" * 4000), "float64 cannot hold"),
    "2^63 as id": (making.text(_one(id=1 << 63)), r"annotations\[0\]\.id: does not fit a signed 64-bit integer"),
    "-2^63 - 1 as area": (making.text(_one(area=-(1 << 63) - 1)), r"area: does not fit a signed 64-bit integer"),
    "no points": (making.text(_one(point_coords=[])), r"length >= 1 - at `\$\.annotations\[0\]\.point_coords"),
    "points of three numbers": (making.text(_one(point_coords=[[1, 2, 3]])), r"length 2"),
    "points that differ in number": (
        making.text({**_one(), "annotations": [_one()["annotations"][0], _one(point_coords=WIDE)["annotations"][0]]}),
        r"annotations\[1\]\.point_coords: points differ in number: expected 1, found 2",
    ),
    "RLE with a character that is none": (_rle(COUNTS + "~"), r"annotations\[0\]\.segmentation\.counts"),
    "RLE with a blank": (_rle(" " + COUNTS), r"annotations\[0\]\.segmentation\.counts"),
    "RLE that is not ASCII": (_rle(COUNTS + "é"), "not an RLE string"),
    "RLE that ends in the middle of a run": (_rle(COUNTS + "o"), r"annotations\[0\]\.segmentation\.counts"),
    "RLE with a negative run": (_rle("@0"), "negative"),
    "RLE with a run of 40 characters": (_rle("o" * 40 + "0"), r"annotations\[0\]\.segmentation\.counts"),
    "empty RLE": (_rle(""), "RLE runs do not add up: expected 768, found 0"),
    "RLE one too long in its last run": (_rle(_last_run(1)), "RLE runs do not add up: expected 768, found 769"),
    "RLE one too short in its last run": (_rle(_last_run(-1)), "RLE runs do not add up: expected 768, found 767"),
    "RLE of another image": (_rle(COUNTS, size=[24, 33]), "RLE runs do not add up: expected 792, found 768"),
    "an image of 10^6 x 10^6": (_sized(10**6, 10**6), "size beyond the limits.*1000000 x 1000000"),
    "an RLE of 10^6 x 10^6": (_rle(COUNTS, size=[10**6, 10**6]), r"segmentation\.size: size beyond the limits"),
    "an RLE of 65,535 x 65,535": (_rle(COUNTS, size=[65535, 65535]), r"segmentation\.size: size beyond the limits"),
    "an image of 0 x 0": (_sized(0, 0), "size beyond the limits"),
    "an image of -24 x -32": (_sized(-24, -32), "size beyond the limits"),
    "an image 65,536 wide": (_sized(24, 65536), "size beyond the limits"),
    "height and width exchanged": (
        making.text(making.document(KEY, height=32, width=24)),
        r"its header disagrees with the json \(height x width\): expected 32 x 24, found 24 x 32",
    ),
    "one column more": (
        _sized(24, 33).replace(b'"annotations": [{', b'"annotations": [], "x": [{'),
        "header disagrees",
    ),
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejected(tmp_path: Path, name: str) -> None:
    document, reason = REJECTED[name]
    _rejected(tmp_path, _members(document), reason)


def test_all_rejected_in_one_tar_with_the_halves_far_apart(tmp_path: Path) -> None:
    """Many at once, jpgs first, spilled to scratch: every byte is found in quarantine."""
    jpgs, jsons = [], []
    for i, (document, _) in enumerate(REJECTED.values()):
        jpgs.append(Member(f"sa_{100 + i}.jpg", making.jpg(24, 32, i % 7)))
        jsons.append(Member(f"sa_{100 + i}.json", document))
    manifest = _run(tmp_path, [*jpgs, *reversed(jsons)], pairing_buffer=0)
    running.check_samples(tmp_path / "out", SOUND)
    found = quarantined(tmp_path / "out")
    assert sorted((q.name, q.data) for q in found) == sorted((m.name, m.data) for m in jpgs + jsons)
    assert manifest.totals.quarantined == 2 * len(REJECTED)


@pytest.mark.parametrize(
    ("picture", "reason"),
    [
        (b"", "cut before its frame header"),
        (b"\xff", "cut before its frame header"),
        (making.jpg()[:20], "cut before its frame header"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "not a JPEG: expected ff d8, found 89 50"),
        (b"<html>403 Forbidden</html>", "not a JPEG"),
        (making.jpg(25, 32), "header disagrees .* expected 24 x 32, found 25 x 32"),
        (making.jpg(32, 24), "header disagrees .* expected 24 x 32, found 32 x 24"),
        (making.jpg().replace(b"\xff\xc0", b"\xff\xc3", 1), "a coding that is not supported: found SOF3"),
    ],
    ids=["empty", "one byte", "cut", "PNG", "an error page", "another height", "rotated", "lossless"],
)
def test_a_jpg_that_is_none_or_disagrees(tmp_path: Path, picture: bytes, reason: str) -> None:
    members = [Member(f"sa_{KEY}.jpg", picture), Member(f"sa_{KEY}.json", making.text(_one()))]
    _rejected(tmp_path, members, reason)


@pytest.mark.parametrize("kind", ["jpg", "json"])
@pytest.mark.parametrize("spilled", [False, True])
def test_an_orphan(tmp_path: Path, kind: str, spilled: bool) -> None:
    lone = next(m for m in _members(making.text(_one())) if m.name.endswith(kind))
    other = "json" if kind == "jpg" else "jpg"
    manifest = _run(tmp_path, [lone], pairing_buffer=0 if spilled else 1 << 30)
    (q,) = quarantined(tmp_path / "out")
    assert (q.reason, q.data) == (f"no sa_5.{other} in the same source", lone.data)
    assert (manifest.totals.samples, manifest.totals.quarantined) == (3, 1)


def test_a_broken_orphan_says_what_is_broken(tmp_path: Path) -> None:
    _rejected(tmp_path, [Member("sa_5.json", b"{")], "not a valid SA-1B document")


def test_pairs_form_within_one_source_only(tmp_path: Path) -> None:
    jpg, document = making.pair(5)
    sources = {"sa_000000.tar": [*SOUND, jpg], "sa_000001.tar": [*making.pairs([8]), document]}
    paths = running.write(tmp_path / "in", {n: making.tar(m) for n, m in sources.items()})
    manifest = convert(paths, tmp_path / "out", max_quarantine=ALL)
    assert manifest.totals.samples == 4
    found = {(q.source, q.reason) for q in quarantined(tmp_path / "out")}
    assert found == {
        ("sa_000000.tar", "no sa_5.json in the same source"),
        ("sa_000001.tar", "no sa_5.jpg in the same source"),
    }


# -------------------------------------------------------------------------------------------------------- duplicates


def test_the_second_of_two_with_one_key_is_quarantined(tmp_path: Path) -> None:
    first = making.pair(5)
    second = [
        Member("b/sa_5.jpg", making.jpg(24, 32, 6)),
        Member("b/sa_5.json", making.text(making.document(5, seed=9))),
    ]
    for turn, order in enumerate([[*first, *second], [first[0], second[0], second[1], first[1]]]):
        folder = tmp_path / str(turn)
        _run(folder, order)
        kept = [order[0], next(m for m in order if m.name.endswith("json"))]
        running.check_samples(folder / "out", [*SOUND, *kept])
        found = quarantined(folder / "out")
        assert {q.data for q in found} == {m.data for m in order if m not in kept}
        assert {q.reason for q in found} == {
            "a second sa_5.jpg in the same source",
            "a second sa_5.json in the same source",
        }
        assert {q.key for q in found} == {"sa_5"}


def test_a_third_and_a_second_equal_one_are_quarantined_too(tmp_path: Path) -> None:
    jpg, document = making.pair(5)
    _run(tmp_path, [jpg, jpg, document, jpg])
    running.check_samples(tmp_path / "out", [*SOUND, jpg, document])
    assert [q.data for q in quarantined(tmp_path / "out")] == [jpg.data, jpg.data]


@pytest.mark.parametrize("mix", [1, 2])
def test_a_key_in_two_sources_is_refused_by_finalize_which_names_both(tmp_path: Path, mix: int) -> None:
    sources = {"sa_000000.tar": making.pairs([1, 2, 7]), "sa_000001.tar": making.pairs([7, 8, 2])}
    paths = running.write(tmp_path / "in", {n: making.tar(m) for n, m in sources.items()})
    job = job_of(paths, tmp_path / "out", mix=mix)
    with pytest.raises(DuplicateKey) as caught:
        running.run(job)
    said = str(caught.value)
    assert re.search(r"sa_2 stands in two sources: sa_00000\d\.tar \(now sa1b-train-\d{6}\.tar, sample \d\) and", said)
    assert "sa_000000.tar" in said
    assert "sa_000001.tar" in said
    assert "2 keys in all" in said
    names = set(running.tree(tmp_path / "out"))
    assert not names & {"manifest.json", "index/keys.bin", "README.md", "wids.json"}
    assert all(running.balances(fact) for receipt in running.receipts(tmp_path / "out") for fact in receipt.sources)


# ----------------------------------------------------------------------------------------------------- hostile names

LINKS = {"symbolic": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE}


def _sparse_gnu() -> Member:
    """An old GNU sparse file named sa_5.jpg: 512 bytes of data at 4096 of a 8192-byte file."""
    block = making.rewritten(
        making.header(Member("sa_5.jpg", bytes(BLOCK))),
        {156: b"S", 386: b"%011o\0%011o\0" % (4096, BLOCK), 483: b"%011o\0" % 8192},
    )
    return Member("sa_5.jpg", raw=block + bytes(BLOCK))


def _sparse_pax() -> Member:
    information = tarfile.TarInfo("sa_5.jpg")
    information.size = BLOCK
    information.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "sa_5.jpg",
                               "GNU.sparse.realsize": "8192"}  # fmt: skip
    return Member("sa_5.jpg", raw=information.tobuf(tarfile.PAX_FORMAT) + b"1\n4096\n512\n".ljust(BLOCK, b"\0"))


def _raw(member: Member, changes: dict[int, bytes]) -> Member:
    block = making.rewritten(making.header(member), changes)
    return Member(member.name, member.data, raw=block + member.data + bytes(-len(member.data) % BLOCK))


PICTURE = making.jpg()
HOSTILE: dict[str, tuple[Member, str, bool]] = {
    # name → (member, reason, whether its bytes are kept)
    "parent": (Member("../sa_5.jpg", PICTURE), "a name that leads out of its folder", True),
    "parent inside": (Member("a/../../sa_5.jpg", PICTURE), "a name that leads out of its folder", True),
    "absolute": (Member("/etc/sa_5.jpg", PICTURE), "a name that leads out of its folder", True),
    "symbolic link": (Member("sa_5.jpg", kind=tarfile.SYMTYPE, link="/etc/passwd"), "a link entry, not a file", False),
    "hard link": (Member("sa_5.jpg", kind=tarfile.LNKTYPE, link="sa_1.jpg"), "a link entry, not a file", False),
    "hard link with data": (Member("sa_5.jpg", PICTURE, kind=tarfile.LNKTYPE), "a link entry, not a file", False),
    "device": (Member("sa_5.jpg", kind=tarfile.CHRTYPE), "an other entry, not a file", False),
    "FIFO": (Member("sa_5.json", kind=tarfile.FIFOTYPE), "not a file", False),
    "GNU sparse": (_sparse_gnu(), "a sparse entry, not a file", False),
    "PAX sparse": (_sparse_pax(), "a sparse entry, not a file", False),
    "300 digits": (Member("sa_" + "1" * 300 + ".jpg", PICTURE), "its key is not sa_<id>", True),
    "20 digits": (Member("sa_12345678901234567890.jpg", PICTURE), "its key is not sa_<id>", True),
    "2^63": (Member(f"sa_{1 << 63}.jpg", PICTURE), "its key is not sa_<id>", True),
    "leading zero": (Member("sa_05.jpg", PICTURE), "its key is not sa_<id>", True),
    "a sign": (Member("sa_-5.jpg", PICTURE), "its key is not sa_<id>", True),
    "digits of another script": (Member("sa_\u0665.jpg", PICTURE), "its key is not sa_<id>", True),
    "a blank": (Member("sa_5 .jpg", PICTURE), "its key is not sa_<id>", True),
    "a line feed": (Member("sa_5\n.jpg", PICTURE), "its key is not sa_<id>", True),
    "an escape": (Member("\x1b[2Jsa_5.jpg", PICTURE), "its key is not sa_<id>", True),
    "upper case": (Member("SA_5.jpg", PICTURE), "its key is not sa_<id>", True),
    "another key": (Member("img_5.json", b"{}"), "its key is not sa_<id>", True),
    "no key": (Member("./.jpg", PICTURE), "its key is not sa_<id>", True),
    "not UTF-8": (Member("sa_\udcff\udcfe.jpg", PICTURE), "its key is not sa_<id>", True),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("dialect", ["gnu", "pax"])
def test_a_hostile_name_is_quarantined_and_touches_nothing(tmp_path: Path, name: str, dialect: making.Dialect) -> None:
    member, reason, kept = HOSTILE[name]
    data = making.tar([*SOUND[:3], member, *SOUND[3:]], dialect=dialect)
    paths = running.write(tmp_path / "in", {"sa_000000.tar": data})
    convert(paths, tmp_path / "out", max_quarantine=ALL)
    running.check_samples(tmp_path / "out", SOUND)
    (q,) = quarantined(tmp_path / "out")
    assert re.search(reason, q.reason)
    assert q.data == (member.data if kept else None)
    assert q.byte == making.offsets([*SOUND[:3], member], dialect=dialect)[member.name]
    expected = member.name.encode("utf-8", "backslashreplace").decode()
    assert q.name == q.key == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.parametrize("folder", ["d" * 300 + "/", "a/" * 140, "é" * 90 + "/", "./././"])
@pytest.mark.parametrize("dialect", ["gnu", "pax"])
def test_a_sample_at_any_depth_and_length_of_name_survives(
    tmp_path: Path, folder: str, dialect: making.Dialect
) -> None:
    members = making.pair(5, folder=folder)
    paths = running.write(tmp_path / "in", {"sa_000000.tar": making.tar([*SOUND, *members], dialect=dialect)})
    convert(paths, tmp_path / "out")
    running.check_samples(tmp_path / "out", [*SOUND, *members])


@pytest.mark.parametrize(
    ("field", "said"),
    [
        (b"\xff" * 12, "a member's size is absurd.*found -1"),
        (b"\x80" + b"\xff" * 11, "a member's size is absurd"),
        (b"-0000000777\0", "a member's size is not a number"),
        (b"77777777777\0", "the file ends inside"),
    ],
    ids=["-1", "2^88 - 1", "a minus sign", "8 GiB"],
)
def test_a_size_that_cannot_be_is_damage(tmp_path: Path, field: bytes, said: str) -> None:
    member = _raw(Member("sa_5.jpg", PICTURE), {124: field})
    data = making.tar([*SOUND, member, *making.pairs([9])])
    paths = running.write(tmp_path / "in", {"sa_000000.tar": data})
    job = job_of(paths, tmp_path / "out")
    with pytest.raises(SourceDamaged, match=said):
        run_task(job, 0)
    running.check_no_trace(tmp_path / "out")


def test_a_member_beyond_the_limit_is_passed_over_and_named(tmp_path: Path) -> None:
    size = (256 << 20) + 1
    information = tarfile.TarInfo("sa_5.jpg")
    information.size = size
    (tmp_path / "in").mkdir()
    source = tmp_path / "in" / "sa_000000.tar"
    with source.open("wb") as file:  # a hole: takes no room on the disk
        file.write(making.tar(SOUND, end=b"") + information.tobuf(tarfile.GNU_FORMAT))
        file.seek(size + -size % BLOCK, 1)
        file.write(making.tar(making.pairs([9]), directory=None))
    manifest = convert([source], tmp_path / "out", shards=1, max_quarantine=ALL)
    (q,) = quarantined(tmp_path / "out")
    assert (q.key, q.reason, q.data) == ("sa_5.jpg", "too large: 268,435,457 bytes, at most 268,435,456", None)
    assert manifest.totals.samples == 4


# ----------------------------------------------------------------------------------------------------------- accounts


def test_what_is_no_sample_is_counted_and_named_by_its_kind(tmp_path: Path) -> None:
    others = [
        Member("images", kind=tarfile.DIRTYPE),
        Member("./a/", kind=tarfile.DIRTYPE),
        Member("README.txt", b"hello"),
        Member("b/notes.txt", b""),
        Member("LICENSE", b"x" * 2000),
        Member("sa_5.jpg.bak", PICTURE),
        Member("sa_5.JPG", PICTURE),
        Member("sa_5.jpeg", PICTURE),
        Member("name.\udcff\udc80", b"?"),
        Member("./._sa_5.jpg", b"Mac OS X"),
        Member("./.DS_Store", b"Mac OS X"),
    ]
    manifest = _run(tmp_path, others)
    running.check_samples(tmp_path / "out", SOUND)
    assert not quarantined(tmp_path / "out")
    assert "quarantine" not in running.tree(tmp_path / "out")
    (fact,) = filter(None, manifest.sources)
    assert fact.ignored == {
        "directory": 3, ".txt": 2, "no suffix": 1, ".jpg.bak": 1, ".JPG": 1, ".jpeg": 1, ".\\udcff\\udc80": 1,
        "hidden": 2,
    }  # fmt: skip
    assert fact.members == 2 * 3 + len(others) + 1


def test_the_kinds_of_what_is_ignored_are_bounded(tmp_path: Path) -> None:
    manifest = _run(tmp_path, [Member(f"x.{i}") for i in range(300)])
    (fact,) = filter(None, manifest.sources)
    assert len(fact.ignored) == 51
    assert fact.ignored["other"] == 300 - 49  # the directory is a kind too


def test_more_in_quarantine_than_allowed_fails_and_leaves_nothing(tmp_path: Path) -> None:
    bad = [Member("sa_5.json", b"{"), Member("\x1b]0;boo\x07.jpg", PICTURE)]
    members = [*making.pairs(range(10, 28)), *bad]  # 2 of 39
    paths = running.write(tmp_path / "in", {"sa_000000.tar": making.tar(members)})
    job = job_of(paths, tmp_path / "out", max_quarantine=2 / 40)
    with pytest.raises(TooManyQuarantined) as caught:
        run_task(job, 0)
    said = str(caught.value)
    assert "task 0 (sa_000000.tar): 2 of 39 members are no good, more than --max-quarantine 0.05 allows" in said
    assert said.isprintable(), ascii(said)
    running.check_no_trace(tmp_path / "out")
    manifest = running.run(job_of(paths, tmp_path / "out", max_quarantine=2 / 39))
    assert manifest.totals.quarantined == 2


def test_the_default_allows_one_in_a_thousand(tmp_path: Path) -> None:
    paths = running.write(tmp_path / "in", {"sa_000000.tar": making.tar([*SOUND, Member("sa_5.json", b"{")])})
    with pytest.raises(
        TooManyQuarantined, match=r"1 of 8 members .* the first: sa_000000\.tar: byte [\d,]+: sa_5\.json: "
    ):
        run_task(job_of(paths, tmp_path / "out"), 0)


def test_fewer_samples_than_shards_names_the_sources_and_the_way_out(tmp_path: Path) -> None:
    paths = running.write(tmp_path / "in", {n: making.tar(making.pairs([i])) for i, n in enumerate(("a.tar", "b.tar"))})
    job = job_of(paths, tmp_path / "out", shards=3)
    with pytest.raises(TooFewSamples) as caught:
        run_task(job, 0)
    said = str(caught.value)
    for part in ("a.tar", "b.tar", "--shard-size", "expected at least 3, found 2"):
        assert part in said
    running.check_no_trace(tmp_path / "out")


def test_the_shard_size_that_is_advised_is_large_enough(tmp_path: Path) -> None:
    for count in range(1, 8):
        folder = tmp_path / str(count)
        (path,) = running.write(folder / "in", {"a.tar": making.tar(making.pairs(range(1, count + 1)))})
        with path.open("r+b") as file:  # a hole: bytes that hold no sample
            file.truncate(30 << 20)
        with pytest.raises(TooFewSamples) as caught:
            run_task(job_of([path], folder / "out"), 0)
        advised = int(re.findall(r"more than ([\d,]+) bytes", str(caught.value))[0].replace(",", ""))
        plan = make_plan([Source(name="a.tar", size=30 << 20)], shard_size=advised + 1, mix=4, seed=0)
        assert plan.shards <= count
        run_task(job_of([path], folder / "again", plan=plan), 0)


def test_quarantine_is_no_shard_to_any_reader(tmp_path: Path) -> None:
    """No file below the destination but a shard ends in .tar, and a tar that was kept is a tar."""
    _run(tmp_path, _members(b"{"))
    names = [n for n in running.tree(tmp_path / "out") if n.endswith(".tar")]
    assert names == ["sa1b-train-000000.tar"]
    assert (tmp_path / "out/quarantine/task-000000.members").read_bytes().endswith(tar.END)
    lines = (tmp_path / "out/quarantine/task-000000.jsonl").read_bytes().splitlines()
    assert [set(msgspec.json.decode(line)) for line in lines] == [
        {"source", "byte", "name", "key", "reason", "stored"}
    ] * 2
