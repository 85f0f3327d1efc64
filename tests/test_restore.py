"""Restore: tars → shards → tars gives every member's bytes again, whatever the documents look like."""

import json
import os
import random
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from zlib_ng import zlib_ng

from sa1b_wds import restore as module
from sa1b_wds import tar
from sa1b_wds.convert import run_task
from sa1b_wds.errors import FormatError, NoSpace, NotFound, Sa1bError, ShardDamaged, UsageError
from sa1b_wds.format import ROW
from sa1b_wds.publication import finalize
from sa1b_wds.restore import Accounts, restore
from sa1b_wds.storage import Destination
from sa1b_wds.verify import verify

from . import making, running
from .conftest import SHARED
from .making import Document, Member


def other_order(d: Document) -> bytes:
    return making.text({"annotations": d["annotations"], "image": d["image"]})


def unknown_fields(d: Document) -> bytes:
    d["annotations"][1]["caption"] = "a “mask”, with\nlines"
    d["licence"] = None
    return making.text(d)


def mixed_numbers(d: Document) -> bytes:
    d["annotations"][0]["bbox"] = [1, 2.0, 3, 4.5]
    d["annotations"][1]["crop_box"] = [0, 0, 32, 24]
    d["annotations"][2]["point_coords"] = [[3, 4.25]]
    d["annotations"][3]["predicted_iou"] = 1
    return making.text(d)


def odd_numbers(d: Document) -> bytes:
    d["annotations"][0]["bbox"] = [-0.0, 1e-05, 1e22, 123456789.12345679]
    d["annotations"][1]["bbox"] = [5e-324, 1.7976931348623157e308, 0.1, 9007199254740993.0]
    d["annotations"][2]["point_coords"] = [[0.30000000000000004, 1e16]]
    return making.text(d)


FORMS: dict[str, Callable[[Document], bytes]] = {
    "Meta's": making.text,
    "other key order": other_order,
    "trailing newline": lambda d: making.text(d) + b"\n",
    "indented": lambda d: json.dumps(d, indent=2).encode(),
    "compact": lambda d: json.dumps(d, separators=(",", ":")).encode(),
    "unknown fields": unknown_fields,
    "mixed ints and floats": mixed_numbers,
    "odd numbers": odd_numbers,
    "-0": lambda d: making.text(d).replace(b'"crop_box": [0.0', b'"crop_box": [-0'),
    "1e5": lambda d: making.text(d).replace(b'"crop_box": [0.0', b'"crop_box": [1E5'),
    "long decimals": lambda d: making.text(d).replace(b'"crop_box": [0.0', b'"crop_box": [0.1000000000000000055'),
    "escaped slash": lambda d: making.text(d | {"note": "a/b"}).replace(b"a/b", rb"a\/b"),
    "escaped letters": lambda d: making.text(d).replace(b".jpg", rb".j\u0070g"),
    "escaped accents": lambda d: making.text(d | {"note": "é"}),
    "raw accents": lambda d: json.dumps(d | {"note": "é"}, ensure_ascii=False).encode(),
    "no annotations": lambda d: making.text({"image": d["image"], "annotations": []}),
    "two points": lambda d: making.text(
        d | {"annotations": [a | {"point_coords": [[1.5, 2.5], [3, 4]]} for a in d["annotations"]]}
    ),
    "a key twice": lambda d: making.text(d).replace(b'"area"', b'"area": 0, "area"', 1),
    "wrong areas": lambda d: making.text(d | {"annotations": [a | {"area": -7} for a in d["annotations"]]}),
}


def awkward() -> list[Member]:
    """A pair for every form."""
    members = []
    for i, form in enumerate(FORMS.values(), start=200):
        members += [
            Member(f"./sa_{i}.jpg", making.jpg(seed=i % 5)),
            Member(f"./sa_{i}.json", form(making.document(i, annotations=4))),
        ]
    return members


def files(path: Path) -> list[tuple[str, bytes]]:
    """(name, bytes) of a tar, by tarfile, with everything that is not a plain ustar file refused."""
    out = []
    with tarfile.open(path, "r:" if path.read_bytes()[:2] != b"\x1f\x8b" else "r:gz") as archive:
        for information in archive:
            if information.isdir():
                continue
            file = archive.extractfile(information)
            assert file is not None
            out.append((information.name, file.read()))
    return out


def check_restored(sources: list[Path], out: Path, *, without: Sequence[str] = ()) -> None:
    """Every tar has the members of its source but for `without`, pairs adjacent, in the source's order."""
    assert sorted(p.name for p in out.rglob("*")) == sorted(p.name for p in sources)
    for path in sources:
        before = [(n, b) for n, b in files(path) if n not in without]
        after = files(out / path.name)
        assert len(after) == len(before)
        assert dict(after) == dict(before)
        keys = [n.rpartition(".")[0] for n, _ in after]
        assert keys[::2] == keys[1::2]
        assert [n.rpartition(".")[2] for n, _ in after] == ["jpg", "json"] * (len(after) // 2)
        last = {n.rpartition(".")[0]: i for i, (n, _) in enumerate(before)}
        assert keys[::2] == sorted(last, key=lambda key: last[key])
        data = (out / path.name).read_bytes()
        assert data[-1024:] == bytes(1024)
        assert data == b"".join(tar.header(n, len(b)) + b + bytes(tar.padding(len(b))) for n, b in after) + bytes(1024)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    members = [making.pairs(range(1, 20)), awkward(), making.pairs(range(50, 63), folder="sa1b/part/")]
    for i, some in enumerate(members):
        random.Random(i).shuffle(some)
    texts = {f"sa_{i:06d}.tar": making.tar(some, directory=None) for i, some in enumerate(members)}
    texts["sa_000001.tar"] = making.gzipped(texts["sa_000001.tar"], members=3)
    return running.write(tmp_path_factory.mktemp("restore"), texts)


def converted(sources: list[Path], dest: Path, **options: int) -> Destination:
    running.convert(sources, dest, **options)
    return Destination(str(dest))


def renamed(name: str) -> str:
    return f"./{name.rpartition('/')[2]}"


def test_every_member_comes_back_byte_for_byte(sources: list[Path], tmp_path: Path) -> None:
    destination = converted(sources, tmp_path / "dest", shards=2, mix=2)
    seen: list[tuple[int, int]] = []
    with running.undisturbed():
        done = restore(destination, tmp_path / "out", report=lambda a, b: seen.append((a, b)))
    assert seen[-1][0] == seen[-1][1] == sum(p.stat().st_size for p in (tmp_path / "dest").glob("*.tar"))
    assert sorted(seen) == seen
    size, n = sum(p.stat().st_size for p in (tmp_path / "out").iterdir()), 19 + len(FORMS) + 13
    assert done == Accounts(sources=3, samples=n, members=2 * n, bytes=size, quarantined=0, ignored=0)
    assert str(done) == f"3 tars with {2 * done.samples} members, {size:,} bytes"
    check_restored(sources[:2], _only(tmp_path / "out", "sa_000002.tar"))
    # A folder in the source is not kept.
    after = dict(files(tmp_path / "out.rest/sa_000002.tar"))
    assert after == {renamed(n): b for n, b in files(sources[2])}


def _only(out: Path, besides: str) -> Path:
    rest = out.with_name("out.rest")
    rest.mkdir()
    (out / besides).rename(rest / besides)
    return out


def test_other_shards_restore_to_the_same_bytes(sources: list[Path], tmp_path: Path) -> None:
    trees = []
    for i, (shards, mix, seed) in enumerate([(1, 1, 0), (3, 3, 0), (2, 2, 9)]):
        dest, out = tmp_path / f"dest{i}", tmp_path / f"out{i}"
        restore(converted(sources, dest, shards=shards, mix=mix, seed=seed), out)
        trees.append(running.tree(out))
    assert trees[0] == trees[1] == trees[2]


def test_what_was_restored_converts_to_the_same_samples_and_restores_to_the_same_tars(
    sources: list[Path], tmp_path: Path
) -> None:
    first = converted(sources, tmp_path / "first", shards=2, mix=3)
    restore(first, tmp_path / "tars")
    tars = sorted((tmp_path / "tars").iterdir())
    second = converted(tars, tmp_path / "second", shards=2, mix=3)
    assert running.samples(tmp_path / "first") == running.samples(tmp_path / "second")
    restore(second, tmp_path / "again")
    assert running.tree(tmp_path / "tars") == running.tree(tmp_path / "again")
    assert verify(second, deep=True, against=[str(tmp_path / "tars")]) == []
    # Against the first data set they are other tars of the same members, and that is all that is said.
    found = verify(first, against=[str(tmp_path / "tars")])
    assert {d.what.partition(":")[0] for d in found} == {
        "members that stand elsewhere in this tar than index/*.rows says"
    }


def test_quarantined_and_ignored_members_are_counted(tmp_path: Path) -> None:
    members = [*making.pairs(range(1, 8)), Member("./sa_99.jpg", making.jpg()), Member("./x.txt", b"x")]
    paths = running.write(tmp_path / "sources", {"sa_000000.tar": making.tar(members)})
    destination = converted(paths, tmp_path / "dest", shards=2, max_quarantine=1)
    done = restore(destination, tmp_path / "out")
    assert (done.samples, done.quarantined, done.ignored) == (7, 1, 2)
    assert str(done).endswith("; 1 quarantined and 2 ignored members are not in them")
    check_restored(paths, tmp_path / "out", without=["./sa_99.jpg", "./x.txt"])


def test_a_partial_data_set_restores_what_it_has(tmp_path: Path) -> None:
    texts = {f"sa_{i:06d}.tar": making.tar(making.pairs(range(9 * i + 1, 9 * i + 9)), directory=None) for i in range(3)}
    paths = running.write(tmp_path / "sources", texts)
    job = running.job_of(paths, tmp_path / "dest", mix=1, shards=2)
    for index in (0, 2):
        run_task(job, index)
    finalize(job.destination, partial=True)
    missing = job.plan.sources[job.plan.tasks[1].sources[0]].name
    assert restore(job.destination, tmp_path / "out").sources == 2
    check_restored([p for p in paths if p.name != missing], tmp_path / "out")


# -------------------------------------------------------------------------------------------------------------- refused


@pytest.fixture
def dest(sources: list[Path], tmp_path: Path) -> Destination:
    return converted(sources, tmp_path / "dest", shards=2, mix=2)


def test_nothing_is_overwritten(dest: Destination, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "sa_000001.tar").write_bytes(b"mine")
    with pytest.raises(UsageError, match=r"sa_000001\.tar: is there already"):
        restore(dest, out)
    assert running.tree(out).keys() == {"sa_000001.tar"}
    assert (out / "sa_000001.tar").read_bytes() == b"mine"


def test_a_file_that_appears_meanwhile_is_not_overwritten(dest: Destination, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def appear(done: int, total: int) -> None:
        for i in range(3):
            (out / f"sa_{i:06d}.tar").write_bytes(b"mine")

    with pytest.raises(UsageError, match="is there already"):
        restore(dest, out, report=appear)
    assert {n: (out / n).read_bytes() for n in running.tree(out)} == {f"sa_{i:06d}.tar": b"mine" for i in range(3)}


@pytest.mark.parametrize("inside", ["", "tars", ".state"])
def test_not_into_the_data_set(dest: Destination, inside: str) -> None:
    before = running.tree(dest.root)
    with pytest.raises(UsageError, match="lies in the data set"):
        restore(dest, dest.root / inside)
    assert running.tree(dest.root) == before


def spoil(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ("shard", ShardDamaged),
        ("cut shard", ShardDamaged),
        ("no shard", NotFound),
        ("rows", ShardDamaged),
        ("offsets", ShardDamaged),
        ("no rows", NotFound),
        ("manifest", FormatError),
        ("plan", FormatError),
        ("no manifest", NotFound),
    ],
)
def test_damage_is_an_error_and_leaves_nothing(
    dest: Destination, tmp_path: Path, what: str, error: type[Sa1bError]
) -> None:
    shard = dest.path("sa1b-train-000000.tar")
    paths = {
        "rows": dest.path("index/sa1b-train-000000.rows"),
        "offsets": dest.path("sa1b-train-000000.tar.idx"),
        "manifest": dest.path("manifest.json"),
        "plan": dest.path("plan.json"),
    }
    path = paths.get(what.removeprefix("no "), shard)
    if what.startswith("no "):
        path.unlink()
    elif what == "cut shard":
        os.truncate(path, 3000)
    else:
        spoil(path, 900 if path == shard else 9)
    with running.undisturbed(), pytest.raises(error) as caught:
        restore(dest, tmp_path / "out")
    assert path.name in str(caught.value)
    left = running.tree(tmp_path / "out") if (tmp_path / "out").exists() else {}
    whole = {"sa_000000.tar", "sa_000001.tar", "sa_000002.tar"}
    assert set(left) < whole  # those of the other task may have been finished before
    for name in left:
        assert files(tmp_path / "out" / name)


def test_a_wrong_crc_says_which_sample(dest: Destination, tmp_path: Path) -> None:
    rows = np.frombuffer(dest.read("index/sa1b-train-000000.rows"), ROW)
    span = np.frombuffer(dest.read("sa1b-train-000000.tar.idx"), "<i8")
    spoil(dest.path("sa1b-train-000000.tar"), int(span[2]) + 700)
    data = dest.read("sa1b-train-000000.tar")
    found = zlib_ng.crc32(data[span[2] : span[3]])
    with pytest.raises(ShardDamaged) as caught:
        restore(dest, tmp_path / "out")
    text = str(caught.value)
    assert f"byte {int(span[2]):,}: sa_{int(rows['image_id'][2])}: CRC-32 of this sample" in text
    assert f"expected {int(rows['crc32'][2]):08x}, found {found:08x}" in text


def test_a_full_disk_leaves_nothing(dest: Destination, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sa1b_wds.storage.os.writev", full)
    with running.undisturbed(), pytest.raises(NoSpace):
        restore(dest, tmp_path / "out")
    assert running.tree(tmp_path / "out") == {}


def test_what_a_killed_run_left_is_swept(dest: Destination, tmp_path: Path) -> None:
    left = tmp_path / "out/.state/attempts/restore-000000-0123456789abcdef"
    left.mkdir(parents=True)
    (left / "sa_000000.tar").write_bytes(b"half")
    left.with_suffix(".lock").touch()
    restore(dest, tmp_path / "out")
    assert set(running.tree(tmp_path / "out")) == {"sa_000000.tar", "sa_000001.tar", "sa_000002.tar"}


def test_many_shards_need_few_open_files(sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_OPEN_FILES", 2)
    destination = converted(sources, tmp_path / "dest", shards=9, mix=3)
    with running.undisturbed():
        restore(destination, tmp_path / "out")
    assert len(running.tree(tmp_path / "out")) == 3


# ------------------------------------------------------------------------------------------------------------ real data


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real documents at {SHARED}")
def test_real_documents_come_back(tmp_path: Path) -> None:
    members = []
    for path in sorted((SHARED / "real_json").glob("*.json")):
        text = path.read_bytes()
        image = json.loads(text)["image"]
        height, width = image["height"], image["width"]
        members += [
            Member(f"./{path.stem}.jpg", making.jpg(height, width, quality=1)),
            Member(f"./{path.name}", text),
        ]
    paths = running.write(tmp_path / "sources", {"sa_000000.tar": making.gzipped(making.tar(members))})
    manifest = running.convert(paths, tmp_path / "dest", shards=1)
    restore(Destination(str(tmp_path / "dest")), tmp_path / "out")
    check_restored(paths, tmp_path / "out")
    assert verify(Destination(str(tmp_path / "dest")), deep=True, against=[str(p) for p in paths]) == []
    assert manifest.totals.stored_sources < len(members) // 2  # the one-line form of the archive needs no copy
