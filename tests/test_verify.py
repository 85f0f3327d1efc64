"""Verify: one changed byte anywhere is found; where all digests were made right again, `deep` or `against` finds it."""

import contextlib
import hashlib
import os
import random
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import pytest
from zlib_ng import zlib_ng

from sa1b_wds import convert, publication, rle, sidecars, tar
from sa1b_wds.annotations import unpack
from sa1b_wds.differences import LIMIT, LIMIT_OF_ONE
from sa1b_wds.errors import NotFound, StorageError
from sa1b_wds.format import KEY_ROW, ROW
from sa1b_wds.manifest import (
    MANIFEST_NAME,
    Manifest,
    Receipt,
    ShardFact,
    SourceFact,
    load_manifest,
    receipt_name,
    totals,
)
from sa1b_wds.plan import load_plan
from sa1b_wds.shard import file_fact
from sa1b_wds.storage import Destination
from sa1b_wds.verify import Difference, verify

from . import making, running
from .making import Member

BLOCK = tar.BLOCK


# -------------------------------------------------------------------------------------------------------- the data set


def filled(jpg: bytes, size: int) -> bytes:
    """A jpg with zeros behind its end, which every reader ignores, up to `size` bytes."""
    assert len(jpg) <= size
    return jpg + bytes(size - len(jpg))


def sources() -> dict[str, list[Member]]:
    """Three sources with everything: int boxes, no annotations, awkward documents, wrong areas, rejected, ignored."""
    first = making.pairs(range(1, 13))
    for i in (101, 102):  # two of one size in pixels and bytes
        pair = making.pair(i, height=20, width=30)
        first += [Member(pair[0].name, filled(pair[0].data, 4096)), pair[1]]
    wide = making.pair(103, height=30, width=20)
    first += [Member(wide[0].name, filled(wide[0].data, 4096)), wide[1]]
    second = making.pairs(range(20, 31))
    second += [Member("./notes.txt", b"ignored"), Member("./sa_300.jpg", making.jpg(seed=3))]
    wrong = making.document(40)
    wrong["annotations"][1]["area"] += 1
    second += [Member("./sa_40.jpg", making.jpg(seed=4)), Member("./sa_40.json", making.text(wrong))]
    third = making.pairs(range(50, 60))
    third.append(Member("./sa_50.json", b"a second one"))
    third += [
        Member("./sa_61.jpg", making.jpg(seed=1)),
        Member("./sa_61.json", making.text(making.document(61)) + b"\n"),
    ]
    random.Random(3).shuffle(third)
    return {"sa_000000.tar": first, "sa_000001.tar": second, "sa_000002.tar": third}


@dataclass(frozen=True)
class DataSet:
    """A converted data set and its sources."""

    dest: Path
    sources: list[Path]

    def verify(self, *, deep: bool = False, against: bool = False, workers: int = 1) -> list[Difference]:
        urls = [str(p) for p in self.sources] if against else None
        return verify(Destination(str(self.dest)), deep=deep, against=urls, workers=workers)

    def manifest(self) -> Manifest:
        return load_manifest((self.dest / MANIFEST_NAME).read_bytes(), "")

    def shards(self) -> list[Path]:
        return sorted(self.dest.glob("*.tar"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    folder = tmp_path_factory.mktemp("verify")
    texts = {name: making.tar(members) for name, members in sources().items()}
    texts["sa_000001.tar"] = making.gzipped(texts["sa_000001.tar"], members=2)
    paths = running.write(folder / "sources", texts)
    running.convert(paths, folder / "dest", shards=2, mix=2, max_quarantine=running.ALL)
    return DataSet(folder / "dest", paths)


@pytest.fixture
def copy(made: DataSet, tmp_path: Path) -> DataSet:
    """A data set to spoil."""
    shutil.copytree(made.dest, tmp_path / "dest")
    return DataSet(tmp_path / "dest", made.sources)


def said(found: list[Difference]) -> str:
    return "\n".join(map(str, found))


# ---------------------------------------------------------------------------------- every digest made right once again


def spans(data: bytes) -> list[tuple[str, int, int, int, int, int]]:
    """(key, begin, jpg size, begin of the second header, member size, end) of each sample, by tarfile's headers."""
    out, at = [], 0
    while data[at : at + BLOCK] != bytes(BLOCK):
        jpg = tarfile.TarInfo.frombuf(data[at : at + BLOCK], "ascii", "strict")
        middle = at + BLOCK + jpg.size + tar.padding(jpg.size)
        member = tarfile.TarInfo.frombuf(data[middle : middle + BLOCK], "ascii", "strict")
        end = middle + BLOCK + member.size + tar.padding(member.size)
        out.append((jpg.name.removesuffix(".jpg"), at, jpg.size, middle, member.size, end))
        at = end
    return out


def reseal(dest: Path, *, indexes: bool = True, shards: Callable[[ShardFact], ShardFact] = lambda fact: fact) -> None:
    """Make every digest, length, CRC-32, index and side file right again, as somebody would who hides a change.

    Args:
        indexes: rebuild the shards' own indexes too; else they stay as they are and only their digests are made right.
        shards: changes facts of shards on the way.
    """
    manifest = msgspec.json.decode((dest / MANIFEST_NAME).read_bytes(), type=Manifest)
    plan = load_plan((dest / "plan.json").read_bytes(), "")
    facts = {}
    for fact in manifest.shards:
        data, stem = (dest / fact.name).read_bytes(), fact.name.removesuffix(".tar")
        if indexes:
            _rebuild(dest, stem, data)
        files = [file_fact(f.name, (dest / f.name).read_bytes()) for f in fact.files]
        sealed = file_fact(fact.name, data)
        facts[fact.name] = shards(msgspec.structs.replace(fact, bytes=sealed.bytes, sha256=sealed.sha256, files=files))
    for index in range(len(plan.tasks)):
        path = dest / receipt_name(index)
        receipt = msgspec.json.decode(path.read_bytes(), type=Receipt)
        quarantine = [file_fact(f.name, (dest / f.name).read_bytes()) for f in receipt.quarantine]
        again = [facts[s.name] for s in receipt.shards]
        path.write_bytes(msgspec.structs.replace(receipt, shards=again, quarantine=quarantine).to_bytes())
    resealed = [facts[s.name] for s in manifest.shards]
    sums = totals([s for s in manifest.sources if s is not None], resealed)
    for name, text in sidecars.files(plan.digest, sums, resealed, recoding=plan.recoding):
        (dest / name).write_bytes(text)
    files = [file_fact(f.name, (dest / f.name).read_bytes()) for f in manifest.files]
    replaced = msgspec.structs.replace(manifest, shards=resealed, files=files, totals=sums)
    (dest / MANIFEST_NAME).write_bytes(replaced.to_bytes())


def _rebuild(dest: Path, stem: str, data: bytes) -> None:
    """Offsets, DALI's index and CRC-32s of a shard of these bytes; places in the source stay with their keys."""
    old = {int(row["image_id"]): row for row in np.frombuffer((dest / f"index/{stem}.rows").read_bytes(), ROW)}
    rows, lines, offsets = [], [], [0]
    for key, begin, size, middle, length, end in spans(data):
        row = old[int(key[3:])].copy()
        row["crc32"] = zlib_ng.crc32(data[begin:end])
        rows.append(row)
        offsets.append(end)
        lines.append(f"jpg {begin + BLOCK} {size} {key}.jpg safetensors {middle + BLOCK} {length} {key}.safetensors\n")
    (dest / f"{stem}.tar.idx").write_bytes(np.array(offsets, "<i8").tobytes())
    (dest / f"index/{stem}.idx").write_text(f"v1.2 {len(rows)}\n{''.join(lines)}")
    (dest / f"index/{stem}.rows").write_bytes(np.array(rows, ROW).tobytes())


def rekey(dest: Path) -> None:
    """Make index/keys.bin right again."""
    keys = []
    for number, path in enumerate(sorted(dest.glob("*.tar"))):
        rows = np.frombuffer((dest / f"index/{path.stem}.rows").read_bytes(), ROW)
        keys += [(int(row["image_id"]), number, i) for i, row in enumerate(rows)]
    (dest / "index/keys.bin").write_bytes(np.array(sorted(keys), KEY_ROW).tobytes())


def find(dest: Path, key: str) -> tuple[Path, tuple[str, int, int, int, int, int]]:
    """The shard of a sample and its span."""
    for path in sorted(dest.glob("*.tar")):
        for span in spans(path.read_bytes()):
            if span[0] == key:
                return path, span
    raise AssertionError(key)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[bytearray]:
    """A file's bytes, written back after they were changed."""
    data = bytearray(path.read_bytes())
    yield data
    path.write_bytes(data)


def member_of(dest: Path, key: str) -> tuple[Path, int, bytes]:
    """(shard, byte of the packed member, its bytes) of a sample."""
    path, (_, _, _, middle, length, _) = find(dest, key)
    return path, middle + BLOCK, path.read_bytes()[middle + BLOCK : middle + BLOCK + length]


def place_of(member: bytes, column: bytes) -> int:
    """Where in a packed member the bytes of a column stand."""
    at = member.index(column, 8 + int.from_bytes(member[:8], "little"))
    assert member.count(column) == 1
    return at


# --------------------------------------------------------------------------------------------------------------- sound


@pytest.mark.parametrize("workers", [1, 2])
def test_a_sound_data_set_has_no_difference(made: DataSet, workers: int) -> None:
    seen: list[tuple[int, int]] = []
    found = verify(
        Destination(str(made.dest)),
        deep=True,
        against=[str(made.sources[0].parent)],
        report=lambda done, total: seen.append((done, total)),
        workers=workers,
    )
    assert said(found) == ""
    assert seen[-1][0] == seen[-1][1]
    done = [a for a, _ in seen]
    assert done == sorted(done)
    files = (
        sum(p.stat().st_size for p in made.dest.rglob("*") if p.is_file()) - (made.dest / MANIFEST_NAME).stat().st_size
    )
    assert seen[-1][1] == files + sum(p.stat().st_size for p in made.sources)


def test_what_the_data_set_of_these_tests_has(made: DataSet) -> None:
    sums = made.manifest().totals
    assert (sums.shards, sums.quarantined, sums.ignored, sums.area_mismatches, sums.stored_sources) == (4, 2, 4, 1, 1)


def test_resealing_a_sound_data_set_changes_nothing(copy: DataSet) -> None:
    before = running.tree(copy.dest)
    reseal(copy.dest)
    rekey(copy.dest)
    assert running.tree(copy.dest) == before


# ------------------------------------------------------------------------------------------------------ one byte, 1000x


def test_any_one_byte_changed_is_a_difference(copy: DataSet) -> None:
    names = [n for n, kind in running.tree(copy.dest).items() if kind != "folder"]
    kinds = {"plan.json", "manifest.json", "wids.json", "README.md", "index/keys.bin", ".nv-meta/index.uuid"}
    assert kinds < set(names)
    assert {Path(n).suffix for n in names} >= {".tar", ".idx", ".rows", ".members", ".jsonl", ".yaml"}
    draw = random.Random(5)
    shards = [n for n in names if n.endswith(".tar")]
    for i in range(1000):
        name = draw.choice(shards if i % 3 == 0 else names)
        path = copy.dest / name
        at, bits = draw.randrange(path.stat().st_size), draw.randrange(1, 256)
        with path.open("r+b", buffering=0) as file:
            byte = os.pread(file.fileno(), 1, at)
            os.pwrite(file.fileno(), bytes([byte[0] ^ bits]), at)
            found = copy.verify()
            assert found, f"byte {at} of {name} ^ {bits} was not found"
            os.pwrite(file.fileno(), byte, at)
        if not path.name.startswith(("manifest", "plan")):
            assert any(name in str(difference) for difference in found)
    assert copy.verify() == []


def test_a_missing_file_is_a_difference_each(copy: DataSet) -> None:
    for name, kind in running.tree(copy.dest).items():
        if kind == "folder":
            continue
        path = copy.dest / name
        data = path.read_bytes()
        path.unlink()
        for deep, against in ((False, False), (True, True)):
            assert name in said(copy.verify(deep=deep, against=against))
        path.write_bytes(data)
    assert copy.verify(deep=True) == []


@pytest.mark.parametrize("cut", [0, 1, 511, 512, 1024, 1025, 3000])
def test_a_file_that_is_cut_or_grown_is_a_difference(copy: DataSet, cut: int) -> None:
    for path in (copy.shards()[1], *(copy.dest / n for n in ("README.md", "index/keys.bin", "manifest.json"))):
        data = path.read_bytes()
        for changed in (data[: max(len(data) - cut - 1, 0)], data + bytes(cut + 1)):
            path.write_bytes(changed)
            for deep in (False, True):
                assert path.name in said(copy.verify(deep=deep))
        path.write_bytes(data)


def test_all_differences_are_collected(copy: DataSet) -> None:
    (copy.dest / "README.md").write_text("changed")
    (copy.dest / "wids.json").unlink()
    for path in copy.shards()[:2]:
        with opened(path) as data:
            data[600] ^= 1
    found = copy.verify()
    assert [d.where.removeprefix(f"{copy.dest}/") for d in found] == [
        "README.md",
        "wids.json",
        "sa1b-train-000000.tar",
        "sa1b-train-000001.tar",
    ]
    assert [d.what for d in found] == ["length", "no such file or folder", "SHA-256", "SHA-256"]


def test_strays_are_differences_and_other_programs_files_are_not(copy: DataSet) -> None:
    for name in ("sa1b-train-000009.tar", "index/more.rows", ".state/attempts/task-000000-ab/x", "notes", ".hidden"):
        path = copy.dest / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        (found,) = copy.verify()
        assert found.where.endswith(name)
        path.unlink()
    for name in (".gitattributes", ".git/config", ".cache/huggingface/download/x.lock", ".nv-meta/index.sqlite"):
        path = copy.dest / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    assert copy.verify() == []


def test_a_folder_where_a_file_should_be(copy: DataSet) -> None:
    path = copy.shards()[0]
    path.unlink()
    path.mkdir()
    for deep in (False, True):
        assert path.name in said(copy.verify(deep=deep))


@pytest.mark.parametrize("text", [b"", b"{}", b"[]", b"\xff", b'{"format": "sa1b-wds/9"}'])
def test_no_manifest_is_one_difference(copy: DataSet, text: bytes) -> None:
    (copy.dest / MANIFEST_NAME).write_bytes(text)
    (found,) = copy.verify(deep=True, against=True)
    assert MANIFEST_NAME in found.where


def test_no_data_set_at_all(tmp_path: Path) -> None:
    (found,) = verify(Destination(str(tmp_path / "none")))
    assert found.where.endswith(MANIFEST_NAME)


# ------------------------------------------------------------------------------------ with all digests made right again


def test_two_jpgs_exchanged_are_found_by_against(copy: DataSet) -> None:
    """Nothing inside tells: they have the same size in pixels and bytes."""
    (one, a), (other, b) = find(copy.dest, "sa_101"), find(copy.dest, "sa_102")
    assert a[2] == b[2] == 4096
    jpgs = [p.read_bytes()[s[1] + BLOCK : s[1] + BLOCK + 4096] for p, s in ((one, a), (other, b))]
    assert jpgs[0] != jpgs[1]
    for path, span, jpg in ((one, a, jpgs[1]), (other, b, jpgs[0])):
        with opened(path) as data:
            data[span[1] + BLOCK : span[1] + BLOCK + 4096] = jpg
    reseal(copy.dest)
    assert copy.verify(deep=True) == []
    found = copy.verify(against=True)
    assert len(found) == 2
    assert {"sa_101", "sa_102"} == {d.where.rpartition(": ")[2] for d in found}


def test_two_jpgs_of_other_pixels_exchanged_are_found_by_deep(copy: DataSet) -> None:
    (one, a), (other, b) = find(copy.dest, "sa_101"), find(copy.dest, "sa_103")
    jpgs = [p.read_bytes()[s[1] + BLOCK : s[1] + BLOCK + 4096] for p, s in ((one, a), (other, b))]
    for path, span, jpg in ((one, a, jpgs[1]), (other, b, jpgs[0])):
        with opened(path) as data:
            data[span[1] + BLOCK : span[1] + BLOCK + 4096] = jpg
    reseal(copy.dest)
    assert copy.verify() == []
    found = said(copy.verify(deep=True))
    assert "sa_101.jpg: its header disagrees with the annotations: expected 20 x 30, found 30 x 20" in found
    assert "sa_103.jpg: its header disagrees with the annotations: expected 30 x 20, found 20 x 30" in found


def test_an_area_changed_is_found_by_deep_and_by_against(copy: DataSet) -> None:
    path, at, member = member_of(copy.dest, "sa_11")
    area = unpack(member, "").area
    with opened(path) as data:
        place = at + place_of(member, area.tobytes())
        data[place : place + 8] = int(area[0] + 1).to_bytes(8, "little")
    reseal(copy.dest)
    assert copy.verify() == []
    (found,) = copy.verify(deep=True)
    assert (found.what, found.where.rpartition("/")[2]) == ("area_mismatches", path.name)
    (found,) = copy.verify(against=True)
    assert found.where.endswith("sa_11")


@pytest.mark.parametrize(
    ("moved", "deep"),
    [((-1, 1, 0), True), ((0, 1, 0), True), ((-1, 0, 1), False)],
    ids=["other area", "other sum", "same area and sum"],
)
def test_a_run_moved_is_found(copy: DataSet, moved: tuple[int, int, int], deep: bool) -> None:
    path, at, member = member_of(copy.dest, "sa_12")
    columns = unpack(member, "")
    for i in range(len(columns)):
        counts = columns.rle(i)["counts"]
        runs = rle.runs(counts)
        if len(runs) < 3 or runs.min() < 2:
            continue
        runs[:3] += moved
        changed = rle.encode_runs(runs)
        if len(changed) == len(counts):
            break
    else:
        raise AssertionError("no string that stays as long")
    with opened(path) as data:
        place = at + place_of(member, counts)
        data[place : place + len(counts)] = changed
    reseal(copy.dest)
    assert copy.verify() == []
    assert bool(copy.verify(deep=True)) is deep
    found = copy.verify(against=True)
    assert len(found) == 1
    assert "sa_12" in found[0].where


def test_a_document_kept_needlessly_is_found_by_deep(copy: DataSet) -> None:
    """The bytes that packing would write, with the document beside: no information lost, but not this format."""
    from safetensors.numpy import load, save

    key = "sa_11"
    path, (_, begin, _, middle, length, end) = find(copy.dest, key)
    data = path.read_bytes()
    member = data[middle + BLOCK : middle + BLOCK + length]
    document = next(data for p in copy.sources for name, data in files_of(p) if name == f"{key}.json")
    grown = save({**load(member), "source.json": np.frombuffer(document, np.uint8)}, {"format": "sa1b-wds/1"})
    span = data[begin:middle] + tar.header(f"{key}.safetensors", len(grown)) + grown + bytes(tar.padding(len(grown)))
    path.write_bytes(data[:begin] + span + data[end:])
    reseal(
        copy.dest, shards=lambda f: msgspec.structs.replace(f, stored_sources=f.stored_sources + (f.name == path.name))
    )
    assert copy.verify(against=True) == []
    found = copy.verify(deep=True)
    assert any("packing its document again gives other bytes" in d.what for d in found)


def files_of(path: Path) -> list[tuple[str, bytes]]:
    """(base name, bytes) of the files of a source."""
    with tarfile.open(path) as archive:
        files = [(m.name.rpartition("/")[2], archive.extractfile(m)) for m in archive if m.isfile()]
        return [(name, file.read()) for name, file in files if file is not None]


def test_samples_in_another_order_are_found_by_deep(copy: DataSet) -> None:
    path = copy.shards()[0]
    data = path.read_bytes()
    a, b = spans(data)[2:4]
    path.write_bytes(data[: a[1]] + data[b[1] : b[5]] + data[a[1] : a[5]] + data[b[5] :])
    reseal(copy.dest)
    rekey(copy.dest)
    reseal(copy.dest)
    found = copy.verify(deep=True)
    assert [d.what for d in found] == ["not where dealing puts it"]


def test_a_sample_removed_is_found(copy: DataSet) -> None:
    path = copy.shards()[0]
    data = path.read_bytes()
    a = spans(data)[1]
    lost = len(unpack(data[a[3] + BLOCK : a[3] + BLOCK + a[4]], ""))
    path.write_bytes(data[: a[1]] + data[a[5] :])

    def fewer(fact: ShardFact) -> ShardFact:
        if fact.name != path.name:
            return fact
        return msgspec.structs.replace(fact, samples=fact.samples - 1, annotations=fact.annotations - lost)

    reseal(copy.dest, shards=fewer)
    rekey(copy.dest)
    reseal(copy.dest)
    assert "samples of its sources" in said(copy.verify())
    assert f"{a[0]}.jpg" in said(copy.verify(against=True))


@pytest.mark.parametrize(
    "name",
    ["index/keys.bin", "index/sa1b-train-000001.rows", "index/sa1b-train-000001.idx", "sa1b-train-000001.tar.idx"],
)
def test_an_index_that_lies_is_found_by_deep(copy: DataSet, name: str) -> None:
    path = copy.dest / name
    sound = path.read_bytes()
    draw = random.Random(name)
    for _ in range(15):
        with opened(path) as data:
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        reseal(copy.dest, indexes=False)
        assert copy.verify() == []
        assert copy.verify(deep=True) != []
        path.write_bytes(sound)
    reseal(copy.dest, indexes=False)
    assert copy.verify(deep=True) == []


def test_a_quarantine_that_lies_is_found(copy: DataSet) -> None:
    for path in (copy.dest / "quarantine").glob("*.jsonl"):
        sound = path.read_bytes()
        lines = sound.splitlines()
        for changed in ([*lines, lines[0]], [lines[0].replace(b'"byte":', b'"byte":1')], [], [b"{}"]):
            path.write_bytes(b"".join(line + b"\n" for line in changed))
            reseal(copy.dest)
            assert copy.verify() == []
            assert copy.verify(deep=True) != []
            assert copy.verify(against=True) != []
        path.write_bytes(sound)
        members = path.with_suffix(".members")
        with opened(members) as data:
            data[BLOCK] ^= 1
        reseal(copy.dest)
        assert copy.verify(deep=True) == []
        (found,) = copy.verify(against=True)
        assert found.what == "differs from quarantine at its byte 0"
        with opened(members) as data:
            data[BLOCK] ^= 1
        reseal(copy.dest)
    assert copy.verify(deep=True, against=True) == []


@pytest.mark.parametrize("deep", [False, True])
def test_facts_that_lie_are_found(copy: DataSet, deep: bool) -> None:
    """Every number of a shard's facts, with all digests, totals and receipts made right."""
    fields = ["samples", "annotations", "area_mismatches", "stored_sources"]
    for field in fields:
        before = copy.manifest()

        def lie(fact: ShardFact, field: str = field) -> ShardFact:
            return msgspec.structs.replace(fact, **{field: getattr(fact, field) + 1})

        saved = {n: (copy.dest / n).read_bytes() for n, kind in running.tree(copy.dest).items() if kind != "folder"}
        reseal(copy.dest, shards=lie)
        found = copy.verify(deep=deep)
        assert bool(found) is (deep or field == "samples"), (field, said(found))
        for name, data in saved.items():
            (copy.dest / name).write_bytes(data)
        assert copy.manifest() == before


def test_facts_of_sources_that_lie_are_found(copy: DataSet) -> None:
    manifest = copy.manifest()
    saved = {n: (copy.dest / n).read_bytes() for n, kind in running.tree(copy.dest).items() if kind != "folder"}
    for number, fact in enumerate(manifest.sources):
        assert fact is not None
        lies = [
            {"members": fact.members + 1, "quarantined": fact.quarantined + 1},
            {"members": fact.members + 1, "ignored": {**fact.ignored, "more": 1}},
            {"greatest_distance": fact.greatest_distance + 1},
            {"name": "sa_999999.tar"},
        ]
        for change in lies:
            lie = msgspec.structs.replace(fact, **cast("dict[str, Any]", change))
            lied = [lie if i == number else f for i, f in enumerate(manifest.sources)]
            _rewrite_sources(copy.dest, manifest, fact.name, lie, lied)
            assert copy.verify(deep=True, against=True) != [], change
            for name, data in saved.items():
                (copy.dest / name).write_bytes(data)


def _rewrite_sources(
    dest: Path, manifest: Manifest, name: str, lie: SourceFact, sources: list[SourceFact | None]
) -> None:
    for path in (dest / "receipts").iterdir():
        receipt = msgspec.json.decode(path.read_bytes(), type=Receipt)
        told = [lie if s.name == name else s for s in receipt.sources]
        path.write_bytes(msgspec.structs.replace(receipt, sources=told).to_bytes())
    (dest / MANIFEST_NAME).write_bytes(msgspec.structs.replace(manifest, sources=sources).to_bytes())
    reseal(dest)


# Each of these changes one thing and makes every digest right again that hangs on it.


def change_manifest(dest: Path, **changes: Any) -> None:
    manifest = load_manifest((dest / MANIFEST_NAME).read_bytes(), "")
    (dest / MANIFEST_NAME).write_bytes(msgspec.structs.replace(manifest, **changes).to_bytes())


def change_receipt(dest: Path, **changes: Any) -> None:
    path = dest / receipt_name(0)
    receipt = msgspec.json.decode(path.read_bytes(), type=Receipt)
    path.write_bytes(msgspec.structs.replace(receipt, **changes).to_bytes())
    reseal(dest)


def change_row(dest: Path, column: str, value: int) -> None:
    path = dest / "index/sa1b-train-000000.rows"
    rows = np.frombuffer(path.read_bytes(), ROW).copy()
    rows[3][column] = value
    path.write_bytes(rows.tobytes())
    reseal(dest, indexes=False)


def other_totals(dest: Path) -> None:
    sums = load_manifest((dest / MANIFEST_NAME).read_bytes(), "").totals
    change_manifest(dest, totals=msgspec.structs.replace(sums, ignored=sums.ignored + 1))


def a_file_more(dest: Path) -> None:
    (dest / "zzz.txt").write_bytes(b"listed, with the right digest")
    files = load_manifest((dest / MANIFEST_NAME).read_bytes(), "").files
    change_manifest(dest, files=[*files, file_fact("zzz.txt", (dest / "zzz.txt").read_bytes())])


def a_side_file_more(dest: Path) -> None:
    (dest / "index/more.txt").write_bytes(b"x")
    more = file_fact("index/more.txt", b"x")
    reseal(dest, shards=lambda f: msgspec.structs.replace(f, files=[*f.files, more] if "0002" in f.name else f.files))


def another_row_in_keys(dest: Path) -> None:
    data = (dest / "index/keys.bin").read_bytes()
    (dest / "index/keys.bin").write_bytes(data + np.array([(10**9, 0, 0)], KEY_ROW).tobytes())
    reseal(dest)


def other_plan_in_a_receipt(dest: Path) -> None:
    change_receipt(dest, plan="0" * 64)


def other_task_in_a_receipt(dest: Path) -> None:
    change_receipt(dest, task=1)


def other_sources_in_a_receipt(dest: Path) -> None:
    receipt = msgspec.json.decode((dest / receipt_name(0)).read_bytes(), type=Receipt)
    first = receipt.sources[0]
    lie = msgspec.structs.replace(first, members=first.members + 1, quarantined=first.quarantined + 1)
    change_receipt(dest, sources=[lie, *receipt.sources[1:]])


def unbalanced(dest: Path) -> None:
    manifest = load_manifest((dest / MANIFEST_NAME).read_bytes(), "")
    fact = manifest.sources[0]
    assert fact is not None
    lie = msgspec.structs.replace(fact, members=fact.members + 1)
    _rewrite_sources(dest, manifest, fact.name, lie, [lie, *manifest.sources[1:]])


def a_task_missing(dest: Path) -> None:
    change_manifest(dest, missing_tasks=[1])


def no_such_task_missing(dest: Path) -> None:
    change_manifest(dest, missing_tasks=[7])


def manifest_in_other_spaces(dest: Path) -> None:
    text = b" " + (dest / MANIFEST_NAME).read_bytes()
    head, mark, tail = text.rpartition(b'"digest": "')
    zeros = head + mark + b"0" * 64 + tail[64:]
    (dest / MANIFEST_NAME).write_bytes(head + mark + hashlib.sha256(zeros).hexdigest().encode() + tail[64:])


def receipt_in_other_spaces(dest: Path) -> None:
    path = dest / receipt_name(1)
    path.write_bytes(path.read_bytes() + b"\n")
    files = load_manifest((dest / MANIFEST_NAME).read_bytes(), "").files
    change_manifest(dest, files=[file_fact(f.name, (dest / f.name).read_bytes()) for f in files])


def shards_swapped(dest: Path) -> None:
    a, b, *rest = load_manifest((dest / MANIFEST_NAME).read_bytes(), "").shards
    change_manifest(dest, shards=[b, a, *rest])


@pytest.mark.parametrize(
    ("lie", "what"),
    [
        (other_totals, "totals: ignored"),
        (a_file_more, "names of its files"),
        (a_side_file_more, "side files"),
        (other_plan_in_a_receipt, f"{receipt_name(0)}: plan"),
        (other_task_in_a_receipt, f"{receipt_name(0)}: task"),
        (other_sources_in_a_receipt, "sources of the manifest"),
        (unbalanced, "members = 2 · samples + quarantined + ignored"),
        (a_task_missing, "shards that the plan has"),
        (no_such_task_missing, "missing_tasks are not tasks of the plan"),
        (manifest_in_other_spaces, "manifest.json: says the same in other bytes"),
        (receipt_in_other_spaces, f"{receipt_name(1)}: says the same in other bytes"),
        (shards_swapped, "shards that the plan has"),
    ],
)
def test_facts_that_disagree_are_found_without_looking_deep(
    copy: DataSet, lie: Callable[[Path], None], what: str
) -> None:
    lie(copy.dest)
    found = said(copy.verify())
    assert what in found
    assert "SHA-256: " not in found
    assert what in said(copy.verify(deep=True, against=True))


@pytest.mark.parametrize(
    ("lie", "what"),
    [
        (another_row_in_keys, "index/keys.bin: rows"),
        (lambda dest: change_row(dest, "source", 99), "rows of a source that the task does not have"),
        (lambda dest: change_row(dest, "source", _neighbour(dest)), "samples in the rows"),
        (lambda dest: change_row(dest, "json_ordinal", 1000), "the number of a member"),
        (lambda dest: change_row(dest, "json_ordinal", _taken(dest)), "members used once"),
    ],
    ids=["a key more", "a strange source", "another source", "no such member", "a member twice"],
)
def test_indexes_that_disagree_are_found_by_deep(copy: DataSet, lie: Callable[[Path], None], what: str) -> None:
    lie(copy.dest)
    assert copy.verify() == []
    assert what in said(copy.verify(deep=True))


def _neighbour(dest: Path) -> int:
    """The number of another source of the first task."""
    plan = load_plan((dest / "plan.json").read_bytes(), "")
    row = np.frombuffer((dest / "index/sa1b-train-000000.rows").read_bytes(), ROW)[3]
    return next(n for n in plan.tasks[0].sources if n != row["source"])


def _taken(dest: Path) -> int:
    """A member of the same source that another sample has."""
    rows = np.frombuffer((dest / "index/sa1b-train-000000.rows").read_bytes(), ROW)
    others = [row for i, row in enumerate(rows) if i != 3 and row["source"] == rows[3]["source"]]
    return int(others[0]["json_ordinal"])


# ------------------------------------------------------------------------------------------------- the form of a shard


def padded(data: bytearray, span: tuple[str, int, int, int, int, int]) -> None:
    data[span[3] - 1] = 7


def dated(data: bytearray, span: tuple[str, int, int, int, int, int]) -> None:
    block = making.rewritten(bytes(data[span[1] : span[1] + BLOCK]), {136: b"00000000001\0"})
    data[span[1] : span[1] + BLOCK] = block


def renamed(data: bytearray, span: tuple[str, int, int, int, int, int]) -> None:
    data[span[3] : span[3] + BLOCK] = tar.header("sa_77777.safetensors", span[4])


def one_block(data: bytearray, span: tuple[str, int, int, int, int, int]) -> None:
    del data[-BLOCK:]


def more_blocks(data: bytearray, span: tuple[str, int, int, int, int, int]) -> None:
    data += bytes(BLOCK)


def no_end(data: bytearray, span: tuple[str, int, int, int, int, int]) -> None:
    del data[-2 * BLOCK :]


def half_pair(data: bytearray, span: tuple[str, int, int, int, int, int]) -> None:
    del data[span[3] : span[5]]


def garbled(data: bytearray, span: tuple[str, int, int, int, int, int]) -> None:
    data[span[3] + BLOCK + 9] ^= 1


def no_jpg(data: bytearray, span: tuple[str, int, int, int, int, int]) -> None:
    data[span[1] + BLOCK] = 0


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (padded, "padding that is not zero"),
        (dated, "not the header of a .jpg member"),
        (renamed, "two members that are no pair"),
        (one_block, "the shard stops without its end"),
        (more_blocks, "bytes behind the end of the archive"),
        (no_end, "the shard stops without its end"),
        (half_pair, "not the header of a .safetensors member|a member out of place"),
        (garbled, "safetensors header|tensor|format"),
        (no_jpg, "not a JPEG"),
    ],
)
def test_a_shard_of_another_form_is_found_by_deep(
    copy: DataSet, spoil: Callable[[bytearray, tuple[str, int, int, int, int, int]], None], what: str
) -> None:
    path = copy.shards()[-1]
    found_span = next(s for s in spans(path.read_bytes()) if tar.padding(s[2]))
    with opened(path) as data:
        spoil(data, found_span)
    reseal(copy.dest, indexes=spoil in (padded, garbled, no_jpg))
    assert copy.verify() == []
    found = said(copy.verify(deep=True))
    assert any(w in found for w in what.split("|")), found
    assert path.name in found


# ---------------------------------------------------------------------------------------------------- other sources


def test_any_of_the_sources_may_be_given_in_any_form(made: DataSet, tmp_path: Path) -> None:
    for name, members in sources().items():
        plain = making.tar(members)
        for data in (plain, making.gzipped(plain), making.gzipped(plain, members=5)):
            path = tmp_path / name
            path.write_bytes(data)
            assert verify(Destination(str(made.dest)), against=[str(path)]) == []


def changed_sources() -> Iterator[tuple[str, str, list[Member], str]]:
    """(id, name of a source, its members, what must be said) of sources that are not what was converted."""
    for name, members in sources().items():
        data = [m for m in members if m.data]
        for i in range(0, len(data), 5):
            m = data[i]
            if not m.name.endswith(("jpg", "json")):
                continue
            spoilt = bytearray(m.data)
            spoilt[len(spoilt) // 2] ^= 1
            others = [Member(x.name, bytes(spoilt)) if x is m else x for x in members]
            yield f"{name} {m.name} changed", name, others, m.key
            yield f"{name} {m.name} gone", name, [x for x in members if x is not m], m.key
    first = sources()["sa_000000.tar"]
    yield "one more pair", "sa_000000.tar", first + making.pair(900), "sa_900"
    yield "one more orphan", "sa_000000.tar", [*first, making.pair(901)[0]], "sa_901"
    yield "one more of no kind", "sa_000000.tar", [*first, Member("./x.txt", b"1")], "ignored"
    yield "a pair of another source", "sa_000000.tar", first + making.pair(20), "sa_20"
    yield "a second one", "sa_000000.tar", [*first, first[0]], "a second sa_1.jpg"
    second = sources()["sa_000001.tar"]
    renamed = [Member("./sa_301.jpg", m.data) if m.name == "./sa_300.jpg" else m for m in second]
    yield "a rejected one renamed", "sa_000001.tar", renamed, "its name in quarantine"
    yield "a rejected one gone", "sa_000001.tar", [m for m in second if m.name != "./sa_300.jpg"], "members: "
    yield "two exchanged", "sa_000000.tar", [first[2], first[3], first[0], first[1], *first[4:]], "stand elsewhere"


@pytest.mark.parametrize(("name", "members", "what"), [pytest.param(*c[1:], id=c[0]) for c in changed_sources()])
def test_a_source_that_differs(made: DataSet, tmp_path: Path, name: str, members: list[Member], what: str) -> None:
    path = tmp_path / name
    path.write_bytes(making.gzipped(making.tar(members)))
    found = verify(Destination(str(made.dest)), against=[str(path)])
    assert what in said(found)


def test_a_source_that_cannot_be_read_to_its_end(made: DataSet, tmp_path: Path) -> None:
    path = tmp_path / "sa_000000.tar"
    whole = made.sources[0].read_bytes()
    path.write_bytes(whole[:-5000])
    (found,) = verify(Destination(str(made.dest)), against=[str(path)])
    assert "the file ends" in found.what
    assert "byte" in found.where


def test_sources_that_are_not_of_this_data_set(made: DataSet, tmp_path: Path) -> None:
    path = tmp_path / "sa_000009.tar"
    shutil.copy(made.sources[0], path)
    (found,) = verify(Destination(str(made.dest)), against=[str(path)])
    assert found.what == "the plan has no source of this name"
    with pytest.raises(NotFound):
        verify(Destination(str(made.dest)), against=[str(tmp_path / "sa_000000.tar")])


def test_a_partial_data_set(tmp_path: Path) -> None:
    paths = running.write(
        tmp_path / "sources",
        {f"sa_{i:06d}.tar": making.tar(making.pairs(range(9 * i + 1, 9 * i + 9))) for i in range(3)},
    )
    job = running.job_of(paths, tmp_path / "dest", mix=1, shards=2)
    for index in (0, 2):
        convert.run_task(job, index)
    publication.finalize(job.destination, partial=True)
    missing = job.plan.sources[job.plan.tasks[1].sources[0]].name
    assert verify(job.destination, deep=True) == []
    (found,) = verify(job.destination, deep=True, against=[str(p) for p in paths])
    assert missing in found.where
    assert "missing" in found.what


def test_a_salvaged_source(tmp_path: Path) -> None:
    members = making.pairs(range(1, 12))
    whole = bytearray(making.tar(members))
    at = making.offsets(members)["./sa_5.json"]
    whole[at : at + BLOCK] = bytes(BLOCK - 1) + b"x"
    paths = running.write(tmp_path / "sources", {"sa_000000.tar": bytes(whole)})
    running.convert(paths, tmp_path / "dest", shards=2, on_damage="salvage", max_quarantine=running.ALL)
    data = DataSet(tmp_path / "dest", paths)
    assert data.manifest().totals.skipped_bytes
    assert data.verify(deep=True, against=True) == []
    paths[0].write_bytes(making.tar(members))
    found = said(data.verify(against=True))
    assert "skipped bytes" in found
    assert "sa_5.json" in found


# --------------------------------------------------------------------------------------------------- many, and stopping


@pytest.mark.parametrize("deep", [False, True])
def test_workers_find_the_same(copy: DataSet, deep: bool) -> None:
    for path in copy.shards():
        with opened(path) as data:
            data[len(data) // 2] ^= 255
    (copy.dest / "README.md").unlink()
    alone = copy.verify(deep=deep)
    assert len(alone) > 4
    assert copy.verify(deep=deep, workers=3) == alone


def test_the_list_is_bounded_and_everything_counted(made: DataSet, tmp_path: Path) -> None:
    for i in range(LIMIT + 50):
        (made.dest / f"stray-{i}").touch()
    try:
        found = made.verify()
    finally:
        for path in made.dest.glob("stray-*"):
            path.unlink()
    assert len(found) == LIMIT + 1
    assert found[-1] == Difference(str(made.dest), "more differences, not listed", None, 50)
    path = tmp_path / "sa_000000.tar"
    path.write_bytes(making.tar([Member(f"./sa_{i}.jpg", b"x") for i in range(10_000, 10_500)]))
    found = verify(Destination(str(made.dest)), against=[str(path)])
    assert len(found) == LIMIT_OF_ONE + 1
    assert int(found[-1].found or 0) >= 400


@pytest.mark.parametrize(("deep", "workers"), [(False, 1), (False, 2), (True, 1), (True, 2)])
def test_interrupted_it_leaves_no_thread_and_no_process(made: DataSet, deep: bool, workers: int) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with running.undisturbed(), pytest.raises(KeyboardInterrupt):
        urls = [str(made.sources[0])] if deep else None
        verify(Destination(str(made.dest)), deep=deep, against=urls, workers=workers, report=stop)


def _die(tell: object, *arguments: object) -> None:
    os.kill(os.getpid(), 9)


def test_a_worker_that_dies_is_an_error(made: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sa1b_wds.verify.check_keys", _die)
    with pytest.raises(StorageError, match="a worker process died"):
        made.verify(deep=True, workers=2)


def test_a_difference_reads_as_one_line() -> None:
    assert str(Difference("d/x.tar: byte 1,024", "length", 2048, 1024)) == (
        "d/x.tar: byte 1,024: length: expected 2,048, found 1,024"
    )
