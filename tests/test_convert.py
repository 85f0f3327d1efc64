"""The conversion end to end: every form of source, the plan's K, dealing's bounds, pairing, and what readers find."""

import hashlib
import io
import itertools
import json
import random
import struct
import tarfile
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import safetensors.numpy
import simplejpeg
import webdataset
import zlib_ng.zlib_ng
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco

from sa1b_wds import tar
from sa1b_wds.buffers import Pool
from sa1b_wds.convert import missing_tasks, ranges, run_task, survey, write_plan
from sa1b_wds.errors import FormatError, Incomplete, NotFound, UsageError
from sa1b_wds.files import Scratch
from sa1b_wds.plan import Plan, Source, load_plan, make_plan
from sa1b_wds.publication import finalize
from sa1b_wds.shard import deal
from sa1b_wds.storage import Destination

from . import making, running
from .conftest import SHARED
from .making import Member
from .running import ALL, convert, job_of, quarantined, tree, undisturbed

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _undisturbed() -> Iterator[None]:
    with undisturbed():
        yield


# ----------------------------------------------------------------------------------------------------- forms of source


def _packed(data: bytes, packing: str) -> bytes:
    match packing:
        case "gzip":
            return making.gzipped(data, level=6)
        case "stored gzip":
            return making.gzipped(data, level=0)
        case "gzip of many members":
            return making.gzipped(data, members=29)
        case "gzip with a name":
            out = io.BytesIO()
            import gzip

            with gzip.GzipFile("sa_000000.tar", "wb", fileobj=out, mtime=1) as file:
                file.write(data)
            return out.getvalue()
    return data


@pytest.mark.parametrize("packing", ["plain", "gzip", "stored gzip", "gzip of many members", "gzip with a name"])
@pytest.mark.parametrize("dialect", ["gnu", "ustar", "pax", "v7"])
def test_every_packing_and_dialect(tmp_path: Path, packing: str, dialect: making.Dialect) -> None:
    members = making.pairs(range(6))
    data = _packed(making.tar(members, dialect=dialect), packing)
    paths = running.write(tmp_path / "in", {"sa_000000.tar": data})
    convert(paths, tmp_path / "out")
    running.check_samples(tmp_path / "out", members)


@pytest.mark.parametrize("mode", ["w|", "w|gz"])
@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def test_what_tarfile_writes(tmp_path: Path, mode: Any, form: Any) -> None:
    """Padded to 10 KiB, with PAX times and owners that are names."""
    members = making.pairs(range(6), folder="a/deep/folder/")
    path = tmp_path / "sa_000000.tar"
    with tarfile.open(str(path), mode, format=form) as archive:
        for i, member in enumerate(members):
            information = tarfile.TarInfo(member.name)
            information.size, information.mtime, information.uname = len(member.data), 1e9 + i + 0.25, "ünal"
            archive.addfile(information, io.BytesIO(member.data))
    convert([path], tmp_path / "out")
    running.check_samples(tmp_path / "out", members)


@pytest.mark.parametrize("name", ["sa_000000.tar.gz", "archive", "ä b.tar"])
def test_a_source_is_sniffed_whatever_its_name(tmp_path: Path, name: str) -> None:
    members = making.pairs(range(3))
    paths = running.write(tmp_path / "in", {name: making.gzipped(making.tar(members))})
    convert(paths, tmp_path / "out")
    running.check_samples(tmp_path / "out", members)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_mixture_in_any_order_has_exact_accounts(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """A model in a few lines says what must become of each member of random sources."""
    folder = tmp_path_factory.mktemp("mixture")
    good: dict[str, tuple[bytes, bytes]] = {}
    bad: Counter[tuple[str, bytes]] = Counter()
    ignored = 0
    sources = {}
    ids = itertools.count(1)
    for number in range(data.draw(st.integers(1, 3))):
        members: list[Member] = []
        for kind in data.draw(st.lists(st.sampled_from("ppppjoxdi"), min_size=1, max_size=8)):
            i = next(ids)
            jpg, document = making.pairs([i])
            broken = Member(document.name, document.data[:-1])
            match kind:
                case "p":  # a pair
                    members += [jpg, document]
                    good[jpg.key] = jpg.data, document.data
                case "j":  # orphans
                    members.append(jpg)
                    bad[jpg.name, jpg.data] += 1
                case "o":
                    members.append(document)
                    bad[document.name, document.data] += 1
                case "x":  # a broken document takes its jpg along
                    members += [jpg, broken]
                    bad.update({(jpg.name, jpg.data): 1, (broken.name, broken.data): 1})
                case "d":  # one twice: which of the two equal ones is kept cannot be told
                    members += [jpg, document, jpg]
                    good[jpg.key] = jpg.data, document.data
                    bad[jpg.name, jpg.data] += 1
                case "i":
                    members.append(Member(f"note{i}.txt", b"?" * i))
                    ignored += 1
        order = data.draw(st.permutations(members))
        packed = making.tar(order, dialect=data.draw(st.sampled_from(["gnu", "pax", "v7"])))
        sources[f"s{number}.tar"] = making.gzipped(packed) if data.draw(st.booleans()) else packed
    if not good:
        return
    shards = data.draw(st.integers(1, min(4, len(good))))
    budget = data.draw(st.sampled_from([0, 2000, 70_000, 200_000, 1 << 30]))
    paths = running.write(folder / "in", sources)
    manifest = convert(paths, folder / "out", shards=shards, max_quarantine=ALL, pairing_buffer=budget)
    assert running.samples(folder / "out") == good
    assert Counter((q.name, q.data) for q in quarantined(folder / "out")) == bad
    assert manifest.totals.ignored == ignored + len(sources)
    _check_dealing(folder / "out", shards)


# -------------------------------------------------------------------------------------------------------------- pairing


def _apart(count: int) -> list[Member]:
    """All jpgs first, then all documents in the opposite order: as far apart as they can be."""
    members = making.pairs(range(count))
    return [*members[::2], *reversed(members[1::2])]


@pytest.mark.parametrize("budget", [0, 1, 4096, 100_000, 1 << 30])
def test_pairs_are_found_however_little_memory_there_is(tmp_path: Path, budget: int) -> None:
    members = _apart(40)
    paths = running.write(tmp_path / "in", {"a.tar": making.tar(members), "b.tar": making.tar(making.pairs([77]))})
    job = job_of(paths, tmp_path / "out", shards=2, pairing_buffer=budget, scratch=tmp_path)
    outcome = run_task(job, 0)
    assert (outcome.spilled_bytes > 0) == (budget < 1 << 30)
    finalize(job.destination)
    running.check_accounts(tmp_path / "out")
    running.check_samples(tmp_path / "out", [*members, *making.pairs([77])])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.parametrize("budget", [0, 50_000, 1 << 30])
def test_every_buffer_and_slot_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int) -> None:
    """Of samples, quarantined ones, duplicates and orphans: or a long task would run out of budget, then of disk."""
    pools: list[Pool] = []
    scratches: list[Scratch] = []

    class WatchedPool(Pool):
        def __init__(self, idle: int) -> None:
            super().__init__(idle)
            pools.append(self)

    class WatchedScratch(Scratch):
        def __init__(self, folder: Path) -> None:
            super().__init__(folder)
            scratches.append(self)

    monkeypatch.setattr("sa1b_wds.convert.Pool", WatchedPool)
    monkeypatch.setattr("sa1b_wds.convert.Scratch", WatchedScratch)
    members = _apart(30)
    bad = [Member("sa_500.jpg", b"?"), Member("sa_500.json", b"{"), Member("../sa_501.jpg", b"x"), *members[4:7]]
    bad += [Member("sa_502.jpg", making.jpg()), Member("sa_503.json", making.pair(503)[1].data)]
    paths = running.write(tmp_path / "in", {"a.tar": making.gzipped(making.tar([*members, *bad]))})
    convert(paths, tmp_path / "out", shards=3, pairing_buffer=budget, max_quarantine=ALL)
    (pool,), (scratch,) = pools, scratches
    assert pool.outstanding == 0
    assert sum(len(slots) for slots in scratch._free.values()) == len({p for s in scratch._free.values() for p in s})
    assert sum(grains * len(slots) for grains, slots in scratch._free.items()) << 16 == scratch._end
    assert (scratch._end == 0) == (budget == 1 << 30)


def test_the_greatest_distance_of_a_pair_is_reported(tmp_path: Path) -> None:
    paths = running.write(tmp_path / "in", {"a.tar": making.tar(_apart(10)), "b.tar": making.tar(making.pairs([50]))})
    manifest = convert(paths, tmp_path / "out")
    assert [s.greatest_distance for s in manifest.sources if s] == [19, 1]


def test_samples_stand_where_their_second_member_stood_and_sources_take_turns(tmp_path: Path) -> None:
    a, b = making.pairs([1, 2, 3, 4]), making.pairs([11, 12])
    sources = {"a.tar": [a[0], a[2], a[3], a[4], a[1], a[5], a[7], a[6]], "b.tar": b}  # 2, 1, 3, 4 and 11, 12
    paths = running.write(tmp_path / "in", {n: making.tar(m) for n, m in sources.items()})
    manifest = convert(paths, tmp_path / "out")
    first = load_plan((tmp_path / "out/plan.json").read_bytes(), "").tasks[0].sources
    streams = [[["sa_2", "sa_1", "sa_3", "sa_4"], ["sa_11", "sa_12"]][n] for n in first]
    turns = [key for both in itertools.zip_longest(*streams) for key in both if key]
    assert list(running.samples(tmp_path / "out")) == turns
    assert manifest.totals.samples == 6


# ---------------------------------------------------------------------------------------------- which sources there are


def test_sources_are_files_folders_and_braces(tmp_path: Path) -> None:
    data = making.tar(making.pairs([1]))
    paths = running.write(tmp_path / "in", {f"sa_00000{i}.tar": data for i in range(4)})
    (tmp_path / "in" / "notes.txt").write_text("no source")
    wanted = {p.name: (str(p), len(data)) for p in paths}
    assert survey([str(tmp_path / "in")]) == wanted
    assert survey([f"{tmp_path}/in/sa_{{000000..000003}}.tar"]) == wanted
    assert survey([str(p) for p in paths] + [str(paths[0])]) == wanted  # the same twice is one
    assert survey([paths[0].as_uri()]) == {paths[0].name: (paths[0].as_uri(), len(data))}


def test_sources_that_cannot_be(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        running.write(tmp_path / folder, {"sa_000000.tar": b"x"})
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"b/sa_000000\.tar: a second source named sa_000000\.tar.*names tell"):
        survey([str(tmp_path / "a"), str(tmp_path / "b")])
    with pytest.raises(NotFound, match=r"empty: no \*\.tar in this folder"):
        survey([str(tmp_path / "empty")])
    with pytest.raises(NotFound, match=r"none\.tar: no such file"):
        survey([str(tmp_path / "none.tar")])


def test_real_photographs_and_documents(tmp_path: Path) -> None:
    """Built on the fly: real documents with a jpg of their size, real jpgs with a document of theirs."""
    if not SHARED.is_dir():
        pytest.skip("the real photographs and documents are not part of the project")
    members: dict[str, list[Member]] = {}
    for path in sorted((SHARED / "real_json").glob("*.json")):
        image = json.loads(path.read_bytes())["image"]
        picture = simplejpeg.encode_jpeg(np.zeros((image["height"], image["width"], 3), np.uint8))
        members[path.stem] = [Member(f"./{path.stem}.jpg", picture), Member(f"./{path.name}", path.read_bytes())]
    for path in sorted((SHARED / "real_jpg").glob("*.jpg")):
        height, width, *_ = simplejpeg.decode_jpeg_header(path.read_bytes())
        document = making.text(making.document(int(path.stem[3:]), height=height, width=width, annotations=5))
        theirs = members.setdefault(path.stem, [Member("", b""), Member(f"./{path.stem}.json", document)])
        size = json.loads(theirs[1].data)["image"]
        if (size["height"], size["width"]) == (height, width):
            theirs[0] = Member(f"./{path.name}", path.read_bytes())
    assert len(members) > 10
    order = [m for pair in members.values() for m in pair]
    random.Random(1).shuffle(order)
    paths = running.write(tmp_path / "in", {"sa_000000.tar": making.gzipped(making.tar(order))})
    manifest = convert(paths, tmp_path / "out", shards=3)
    running.check_samples(tmp_path / "out", order)
    assert manifest.totals.stored_sources == 0  # all are in Meta's form: the columns give their bytes again
    assert manifest.totals.area_mismatches == 0


# -------------------------------------------------------------------------------------------------------------- dealing


@given(
    st.lists(st.integers(1, 10**9), min_size=1, max_size=200),
    st.integers(1, 12),
)
def test_dealing_holds_both_bounds_after_every_round(spans: list[int], shards: int) -> None:
    loads, counts = [0] * shards, [0] * shards
    for begin in range(0, len(spans), shards):
        hand = spans[begin : begin + shards]
        before = list(loads)
        places = deal(hand, loads)
        assert len(set(places)) == len(hand)  # each shard at most one
        for place, span in zip(places, hand, strict=True):
            counts[place] += 1
            before[place] += span
        assert before == loads
        assert max(counts) - min(counts) <= 1
        assert max(loads) - min(loads) <= max(spans[: begin + len(hand)])


def test_dealing_gives_the_largest_to_the_emptiest() -> None:
    loads = [50, 0, 20]
    assert deal([1, 9, 5], loads) == [0, 1, 2]
    assert loads == [51, 9, 25]
    assert deal([7, 7], loads) == [1, 2]  # a partial round, ties by number
    assert loads == [51, 16, 32]


def _check_dealing(dest: Path, shards: int) -> None:
    """Both bounds on what was written, sizes taken from the shards themselves."""
    sizes: list[list[int]] = []
    for path in sorted(dest.glob("*.tar")):
        ends = np.fromfile(f"{path}.idx", "<i8")
        sizes.append(np.diff(ends).tolist())
    assert len(sizes) == shards
    counts, loads = [len(s) for s in sizes], [sum(s) for s in sizes]
    assert min(counts) >= 1
    assert max(counts) - min(counts) <= 1
    assert max(loads) - min(loads) <= max(max(s) for s in sizes)


@pytest.mark.parametrize("shards", [1, 2, 3, 7, 20])
def test_a_conversion_holds_both_bounds(tmp_path: Path, shards: int) -> None:
    draw = random.Random(shards)
    members = []
    for i in range(60):  # sizes that rise, then fall: a greedy writer would be far off
        side = 16 + 4 * min(i, 60 - i)
        members += making.pair(i, height=side, width=side, annotations=draw.randint(0, 20))
    paths = running.write(tmp_path / "in", {"a.tar": making.tar(members)})
    convert(paths, tmp_path / "out", shards=shards)
    running.check_samples(tmp_path / "out", members)
    _check_dealing(tmp_path / "out", shards)


# ------------------------------------------------------------------------------------------------------------- the plan


def _sources(sizes: list[int]) -> list[Source]:
    return [Source(name=f"sa_{i:06d}.tar", size=size) for i, size in enumerate(sizes)]


@given(
    st.lists(st.integers(1, 12 << 30), min_size=1, max_size=60),
    st.integers(MIB, 4 << 30),
    st.integers(1, 8),
    st.integers(0, (1 << 63) - 1),
)
def test_any_plan(sizes: list[int], shard_size: int, mix: int, seed: int) -> None:
    plan = make_plan(_sources(sizes), shard_size=shard_size, mix=mix, seed=seed)
    assert sorted(n for t in plan.tasks for n in t.sources) == list(range(len(sizes)))  # each in one task
    assert [len(t.sources) for t in plan.tasks[:-1]] == [mix] * (len(plan.tasks) - 1)
    assert 1 <= len(plan.tasks[-1].sources) <= mix
    first = 0
    for task in plan.tasks:  # numbers without a gap
        assert task.first_shard == first
        assert task.shards >= 1
        first += task.shards
        ideal = plan.bytes_of(task) / shard_size
        assert task.shards == 1 or ideal / 1.1 - 0.5 <= task.shards <= ideal / 0.9 + 0.5
    assert plan.shards == first
    assert make_plan(_sources(sizes)[::-1], shard_size=shard_size, mix=mix, seed=seed) == plan
    assert load_plan(plan.to_bytes(), "") == plan


@given(
    st.lists(st.integers(1 << 30, 12 << 30), min_size=1, max_size=40), st.integers(64 * MIB, 4 << 30), st.integers(1, 4)
)
def test_no_shard_size_within_a_tenth_balances_the_whole_run_better(
    sizes: list[int], shard_size: int, mix: int
) -> None:
    plan = make_plan(_sources(sizes), shard_size=shard_size, mix=mix, seed=0)
    loads = [plan.bytes_of(t) for t in plan.tasks]

    def ratio(size: float) -> float:
        each = [load / max(1, round(load / size)) for load in loads]
        return max(each) / min(each)

    mine = max(plan.expected_sizes()) / min(plan.expected_sizes())
    assert mine <= min(ratio(shard_size * (1 + step / 1000)) for step in range(-100, 101)) * (1 + 1e-12)
    assert mine <= ratio(shard_size) * (1 + 1e-12)


GOLDEN: list[tuple[list[int], int, int, int, list[list[int]], list[int]]] = [
    # sizes, shard size, mix, seed → the tasks' sources, their K
    ([3 * MIB], MIB, 4, 0, [[0]], [3]),
    ([5 * MIB + 600_000], MIB, 4, 0, [[0]], [6]),
    ([100], MIB, 4, 0, [[0]], [1]),
    ([MIB * k for k in (1, 2, 3, 4, 5, 6, 7)], 2 * MIB, 2, 0, [[5, 2], [0, 3], [1, 6], [4]], [5, 3, 5, 3]),
    ([10 << 30] * 10, 1 << 30, 4, 1, [[2, 8, 4, 9], [7, 0, 6, 5], [3, 1]], [40, 40, 20]),
]


def test_golden_plans() -> None:
    """The grouping and K are part of the plan's digest: they never change."""
    found = []
    for sizes, shard_size, mix, seed, *_ in GOLDEN:
        plan = make_plan(_sources(sizes), shard_size=shard_size, mix=mix, seed=seed)
        found.append((sizes, shard_size, mix, seed, [t.sources for t in plan.tasks], [t.shards for t in plan.tasks]))
    assert found == GOLDEN
    assert plan.digest == "53bf5c10a6f817b7539daba215d5246d1e1b6fe83ac131dbede30c1564baf465"


def test_the_whole_archive_is_nearly_balanced() -> None:
    draw = random.Random(0)
    sizes = [int(draw.gauss(11.04e9, 0.25e9)) for _ in range(999)] + [10_400_000_000]
    plan = make_plan(_sources(sizes), shard_size=1 << 30, mix=4, seed=0)
    assert len(plan.tasks) == 250
    assert max(plan.expected_sizes()) / min(plan.expected_sizes()) < 1.13


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sources": []}, "no sources"),
        ({"shard_size": MIB - 1}, "--shard-size: too small: expected at least 1MiB, found 1,048,575 bytes"),
        ({"mix": 0}, "--mix: out of range: expected 1 to 64, found 0"),
        ({"mix": 65}, "--mix: out of range"),
        ({"seed": -1}, "--seed: out of range"),
        ({"seed": 1 << 63}, "--seed: out of range"),
        ({"sources": [Source(name="a.tar", size=1), Source(name="a.tar", size=2)]}, "a.tar: two sources of this name"),
        ({"sources": [Source(name="a.tar", size=0)]}, "a.tar: an empty source"),
        ({"sources": [Source(name="../a.tar", size=1)]}, "not the name of a file"),
        ({"sources": [Source(name="a\n.tar", size=1)]}, "not the name of a file"),
    ],
)
def test_a_plan_that_cannot_be(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_plan(**{"sources": _sources([5]), "shard_size": MIB, "mix": 4, "seed": 0, **changes})
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[]", b"\xff", b'{"format": "sa1b-wds-plan/2"}'], ids=["empty", "{}", "[]", "ff", "version"]
)
def test_a_plan_that_is_none(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "plan.json").write_bytes(data)
    with pytest.raises(FormatError, match=r"plan\.json: not a plan"):
        write_plan(Destination(str(tmp_path)), make_plan(_sources([5]), shard_size=MIB, mix=4, seed=0))


def test_a_plan_of_a_later_version_is_refused(tmp_path: Path) -> None:
    plan = make_plan(_sources([5]), shard_size=MIB, mix=4, seed=0)
    later = msgspec.structs.replace(plan, packer=plan.packer + 1)
    with pytest.raises(
        FormatError, match="a plan this release does not know: expected sa1b-wds-plan/1, packer 1, found"
    ):
        load_plan(later.to_bytes(), "plan.json")


def test_the_plan_names_no_place(tmp_path: Path) -> None:
    """Sources may move, and links hold secrets."""
    paths = running.write(tmp_path / "in", {"a.tar": making.tar(making.pairs([1]))})
    convert(paths, tmp_path / "out")
    for name, kind in tree(tmp_path / "out").items():
        if kind != "folder":
            assert str(tmp_path).encode() not in (tmp_path / "out" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([], ""), ([3], "3"), ([0, 1], "0-1"), ([0, 2, 3, 4, 9], "0,2-4,9"), (list(range(1000)), "0-999")],
)
def test_ranges(numbers: list[int], text: str) -> None:
    assert ranges(numbers) == text


@given(st.sets(st.integers(0, 300)))
def test_ranges_say_exactly_these_numbers(numbers: set[int]) -> None:
    out: list[int] = []
    for part in filter(None, ranges(sorted(numbers)).split(",")):
        a, _, b = part.partition("-")
        out += range(int(a), int(b or a) + 1)
    assert out == sorted(numbers)


# ------------------------------------------------------------------------------------------------------------- readers


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]], dict[str, bytes]]:
    """A data set of several tasks and shards; key → document, key → jpg."""
    folder = tmp_path_factory.mktemp("made")
    documents, pictures, sources = {}, {}, {}
    for number in range(3):
        members = making.pairs(range(number * 50, number * 50 + 7))
        random.Random(number).shuffle(members)
        sources[f"sa_{number:06d}.tar"] = making.gzipped(making.tar(members))
        for member in members:
            if member.name.endswith("jpg"):
                pictures[member.key] = member.data
            else:
                documents[member.key] = json.loads(member.data)
    paths = running.write(folder / "in", sources)
    running.convert(paths, folder / "out", mix=2, shards=[3, 1], max_quarantine=ALL)
    return folder / "out", documents, pictures


Made = tuple[Path, dict[str, dict[str, Any]], dict[str, bytes]]


def _check_columns(member: bytes, document: dict[str, Any]) -> None:
    """A packed member by the safetensors library against json.loads: every value equal, dtypes as the format says."""
    columns = safetensors.numpy.load(member)
    annotations = document["annotations"]
    n = len(annotations)
    for name in ("image_id", "height", "width"):
        column = columns[f"image.{name}"]
        assert (column.dtype, column.shape, int(column)) == (np.dtype(np.int64), (), document["image"][name])
    assert f"sa_{document['image']['image_id']}.jpg" == document["image"]["file_name"]
    shapes = {
        "bbox": (n, 4),
        "crop_box": (n, 4),
        "point_coords": (n, 1, 2),
        "predicted_iou": (n,),
        "stability_score": (n,),
    }
    for name, shape in shapes.items():
        column = columns[f"annotations.{name}"]
        assert (column.dtype, column.shape) == (np.dtype(np.float64), shape)
        assert column.tolist() == [a[name] for a in annotations]
    for name in ("id", "area"):
        column = columns[f"annotations.{name}"]
        assert (column.dtype, column.tolist()) == (np.dtype(np.int64), [a[name] for a in annotations])
    counts, offsets = columns["annotations.segmentation.counts"], columns["annotations.segmentation.offsets"]
    assert (counts.dtype, offsets.dtype, offsets.shape) == (np.dtype(np.uint8), np.dtype(np.int64), (n + 1,))
    for i, a in enumerate(annotations):
        assert counts[offsets[i] : offsets[i + 1]].tobytes().decode() == a["segmentation"]["counts"]
        assert coco.area({"size": a["segmentation"]["size"], "counts": a["segmentation"]["counts"]}) == a["area"]
    with_header = struct.unpack("<Q", member[:8])[0]
    assert json.loads(member[8 : 8 + with_header])["__metadata__"] == {"format": "sa1b-wds/1"}
    # the library writes the same bytes: so any version of it reads them, and every column is aligned
    assert safetensors.numpy.save(columns, {"format": "sa1b-wds/1"}) == member


@pytest.mark.filterwarnings("ignore")
def test_plain_webdataset_reads_every_sample_equal(made: Made) -> None:
    dest, documents, pictures = made
    last = len(list(dest.glob("*.tar"))) - 1
    url = f"{dest}/sa1b-train-{{000000..{last:06d}}}.tar"
    seen = set()
    for sample in webdataset.WebDataset(url, shardshuffle=False):
        assert {k for k in sample if not k.startswith("__")} == {"jpg", "safetensors"}
        key = sample["__key__"]
        assert sample["jpg"] == pictures[key]
        _check_columns(sample["safetensors"], documents[key])
        seen.add(key)
    assert seen == set(documents)


@pytest.mark.parametrize("mode", ["r:", "r|", "r|*"])
def test_plain_tarfile_reads_every_sample_equal(made: Made, mode: Any) -> None:
    dest, documents, pictures = made
    seen = []
    for path in sorted(dest.glob("*.tar")):
        with tarfile.open(path, mode) as archive:
            for information in archive:
                file = archive.extractfile(information)
                assert file is not None
                key, _, suffix = information.name.partition(".")
                if suffix == "jpg":
                    assert file.read() == pictures[key]
                else:
                    _check_columns(file.read(), documents[key])
                seen.append(information.name)
    assert sorted(seen) == sorted(f"{k}.{s}" for k in documents for s in ("jpg", "safetensors"))


def test_headers_are_tarfiles_own_and_the_end_is_exact(made: Made) -> None:
    for path in made[0].glob("*.tar"):
        data, at = path.read_bytes(), 0
        with tarfile.open(path) as archive:
            for information in archive:
                mine = tarfile.TarInfo(information.name)
                mine.size = information.size
                assert data[at : at + 512] == mine.tobuf(tarfile.USTAR_FORMAT)
                end = at + 512 + information.size
                at = end + -information.size % 512
                assert not data[end:at].strip(b"\0")
        assert data[at:] == bytes(1024)


@given(st.integers(0, (8 << 30) - 1), st.text("abcdefghijklmnopqrstuvwxyz0123456789_.-", min_size=1, max_size=100))
def test_any_header_is_tarfiles_own(size: int, name: str) -> None:
    information = tarfile.TarInfo(name)
    information.size = size
    assert tar.header(name, size) == information.tobuf(tarfile.USTAR_FORMAT)


# ---------------------------------------------------------------------------------------------------------- side files


def _members_of(path: Path) -> list[tuple[str, int, int, int]]:
    """(name, offset of the header, offset of the data, size) of every member, by tarfile."""
    with tarfile.open(path) as archive:
        return [(i.name, i.offset, i.offset_data, i.size) for i in archive]


def test_energons_index_of_each_shard(made: Made) -> None:
    """Little-endian int64: where each sample begins, then the end of the last; what `energon prepare` writes."""
    for path in made[0].glob("*.tar"):
        members = _members_of(path)
        begins = [offset for _, offset, _, _ in members[::2]]
        end = members[-1][2] + -(-members[-1][3] // 512) * 512
        assert Path(f"{path}.idx").read_bytes() == struct.pack(f"<{len(begins) + 1}q", *begins, end)
        assert end + 1024 == path.stat().st_size


def test_dalis_index_of_each_shard(made: Made) -> None:
    """wds2idx v1.2: count, then a line a sample of suffix, offset of the data, size, name."""
    for path in made[0].glob("*.tar"):
        members = _members_of(path)
        lines = [f"v1.2 {len(members) // 2}"]
        for jpg, packed in zip(members[::2], members[1::2], strict=True):
            lines.append(" ".join(f"{n.partition('.')[2]} {data} {size} {n}" for n, _, data, size in (jpg, packed)))
        assert (made[0] / "index" / f"{path.stem}.idx").read_text() == "\n".join(lines) + "\n"


def test_the_rows_of_each_shard(made: Made) -> None:
    """image id, source, ordinals, and the CRC-32 of the sample's span, all found again in the sources."""
    dest = made[0]
    plan = load_plan((dest / "plan.json").read_bytes(), "")
    ordinals = {}
    for number, source in enumerate(plan.sources):
        with tarfile.open(dest.parent / "in" / source.name) as archive:
            for i, information in enumerate(archive):
                ordinals[number, Path(information.name).name] = i
    layout = np.dtype("<i8,<u4,<u4,<u4,<u4")
    for path in dest.glob("*.tar"):
        data, begins = path.read_bytes(), np.fromfile(f"{path}.idx", "<i8")
        rows = np.fromfile(dest / "index" / f"{path.stem}.rows", layout).tolist()
        keys = [name.partition(".")[0] for name, *_ in _members_of(path)[::2]]
        assert len(rows) == len(keys)
        for key, (image_id, source, jpg, document, crc), a, b in zip(keys, rows, begins, begins[1:], strict=False):
            assert key == f"sa_{image_id}"
            assert (ordinals[source, f"{key}.jpg"], ordinals[source, f"{key}.json"]) == (jpg, document)
            assert crc == zlib_ng.zlib_ng.crc32(data[a:b])


def test_the_key_index(made: Made) -> None:
    dest = made[0]
    rows = np.fromfile(dest / "index/keys.bin", np.dtype("<i8,<u4,<u4")).tolist()
    assert [r[0] for r in rows] == sorted(int(k[3:]) for k in made[1])
    shards = [s["name"] for s in json.loads((dest / "manifest.json").read_bytes())["shards"]]
    for image_id, shard, index in rows:
        assert _members_of(dest / shards[shard])[2 * index][0] == f"sa_{image_id}.jpg"


def test_wids_and_energons_and_the_hubs_files(made: Made) -> None:
    dest = made[0]
    names = sorted(p.name for p in dest.glob("*.tar"))
    assert names == [f"sa1b-train-{i:06d}.tar" for i in range(4)]
    counts = {n: len(_members_of(dest / n)) // 2 for n in names}
    wids = json.loads((dest / "wids.json").read_text())
    assert (wids["__kind__"], wids["wids_version"], wids["name"]) == ("wids-shard-index-v1", 1, "sa1b")
    assert wids["shardlist"] == [
        {"url": n, "nsamples": counts[n], "filesize": (dest / n).stat().st_size} for n in names
    ]
    meta = dest / ".nv-meta"
    assert json.loads((meta / ".info.json").read_text()) == {"energon_version": "7.4.0", "shard_counts": counts}
    assert (meta / "split.yaml").read_text() == (
        'exclude: []\nsplit_parts:\n  train:\n  - "sa1b-train-{000000..000003}.tar"\n  val: []\n  test: []\n'
    )
    assert (meta / "dataset.yaml").read_text() == "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
    assert str(uuid.UUID((meta / "index.uuid").read_text())) == (meta / "index.uuid").read_text()
    assert uuid.UUID((meta / "index.uuid").read_text()).version == 4
    card = (dest / "README.md").read_text()
    total = sum((dest / n).stat().st_size for n in names)
    for line in (
        'path: "sa1b-train-*.tar"',
        f"num_examples: {sum(counts.values())}",
        f"num_bytes: {total}",
        "- webdataset",
        "- image-segmentation",
    ):
        assert line in card
    assert card.startswith("---\n")
    assert [n for n in tree(dest) if n.endswith(".tar")] == names  # readers take every *.tar for data


def test_the_manifests_digest_is_of_its_own_bytes(made: Made) -> None:
    data = (made[0] / "manifest.json").read_bytes()
    digest = json.loads(data)["digest"]
    assert hashlib.sha256(data.replace(digest.encode(), b"0" * 64)).hexdigest() == digest


# ------------------------------------------------------------------------------------------------------------- finalize


@pytest.fixture
def three(tmp_path: Path) -> Any:
    """A job of three tasks, none of them run."""
    sources = {f"sa_{i:06d}.tar": making.tar(making.pairs(range(10 * i, 10 * i + 4))) for i in range(3)}
    return job_of(running.write(tmp_path / "in", sources), tmp_path / "out", mix=1, shards=2, max_quarantine=ALL)


def test_finalize_before_all_is_done_says_what_is_missing(three: Any) -> None:
    run_task(three, 1)
    before = tree(three.destination.root)
    with pytest.raises(
        Incomplete, match=r"2 of 3 tasks are missing: 0,2; run .* or publish the others with .* --partial"
    ):
        finalize(three.destination)
    assert tree(three.destination.root) == before
    assert missing_tasks(three.destination, three.plan) == [0, 2]


def test_finalize_without_a_plan_or_a_task(tmp_path: Path, three: Any) -> None:
    with pytest.raises(NotFound, match="no plan there: run `sa1b-wds plan"):
        finalize(Destination(str(tmp_path / "nothing")))
    with pytest.raises(Incomplete, match="3 of 3 tasks are missing: 0-2"):
        finalize(three.destination, partial=True)


def test_partial_publishes_what_there_is_and_lists_the_rest_and_the_rest_may_follow(three: Any, tmp_path: Path) -> None:
    dest = three.destination.root
    run_task(three, 0)
    run_task(three, 2)
    manifest = finalize(three.destination, partial=True)
    assert manifest.missing_tasks == [1]
    assert [s.name for s in manifest.shards] == [f"sa1b-train-{i:06d}.tar" for i in (0, 1, 4, 5)]
    left_out = three.plan.tasks[1].sources[0]
    assert [i for i, s in enumerate(manifest.sources) if s is None] == [left_out]
    running.check_accounts(dest)
    split = (dest / ".nv-meta/split.yaml").read_text()
    assert split.count("sa1b-train-") == 4
    assert "{" not in split  # a gap: no braces
    missing = {f"sa_{i}" for i in range(10 * left_out, 10 * left_out + 4)}
    assert not missing & set(running.samples(dest))
    run_task(three, 1)
    assert finalize(three.destination).missing_tasks == []
    running.check_accounts(dest)
    whole = job_of(sorted((tmp_path / "in").iterdir()), tmp_path / "whole", plan=three.plan, max_quarantine=ALL)
    running.run(whole)
    assert tree(dest) == tree(tmp_path / "whole")


def test_partial_removes_the_shards_of_a_task_that_was_killed_among_its_renames(three: Any) -> None:
    from . import dying

    dest = three.destination.root
    for index in (0, 2):
        run_task(three, index)
    with dying.interrupt(-1, lambda: None) as calls:
        run_task(three, 1)
    wanted = tree(dest)
    for name in ("receipts/task-000001.json", "sa1b-train-000003.tar"):  # as if it had been killed before these
        (dest / name).unlink()
    assert "link" in calls
    finalize(three.destination, partial=True)
    running.check_accounts(dest)  # no file there that the manifest does not name
    run_task(three, 1)
    finalize(three.destination)
    assert {n: d for n, d in tree(dest).items() if n in wanted} == {
        n: d for n, d in wanted.items() if ".state" not in n
    }


def test_partial_waits_for_a_task_that_is_publishing(three: Any) -> None:
    run_task(three, 0)
    (three.destination.root / "sa1b-train-000002.tar").write_bytes(b"moved, its receipt to come")
    with three.destination.attempt("task-000001"):
        with pytest.raises(Incomplete, match="task 1 is being written by another process: wait for it"):
            finalize(three.destination, partial=True)
        assert (three.destination.root / "sa1b-train-000002.tar").exists()
    finalize(three.destination, partial=True)
    running.check_accounts(three.destination.root)


def test_a_shard_that_changed_its_size_since_its_receipt_is_refused(three: Any) -> None:
    for index in range(3):
        run_task(three, index)
    with (three.destination.root / "sa1b-train-000003.tar").open("ab") as file:
        file.write(b"?")
    with pytest.raises(
        Exception, match=r"sa1b-train-000003\.tar: wrong size since its receipt: expected [\d,]+, found"
    ):
        finalize(three.destination)
    assert not (three.destination.root / "manifest.json").exists()


def test_a_task_that_is_done_is_not_done_again(three: Any) -> None:
    first = run_task(three, 0)
    path = three.destination.root / "sa1b-train-000000.tar"
    before = path.stat()
    again = run_task(three, 0)
    assert (first.already_done, again.already_done) == (False, True)
    assert again.receipt == first.receipt
    assert path.stat() == before


def test_what_a_dead_attempt_left_goes_when_its_task_is_found_done(three: Any) -> None:
    run_task(three, 0)
    attempts = three.destination.root / ".state" / "attempts"
    for label in ("task-000000-dead", "task-000001-dead"):
        (attempts / label).mkdir(parents=True)
        (attempts / label / "sa1b-train-000000.tar").write_bytes(b"half")
        (attempts / f"{label}.lock").touch()
    run_task(three, 0)
    assert sorted(p.name for p in attempts.iterdir()) == ["task-000001-dead", "task-000001-dead.lock"]
    with three.destination.attempt("task-000001"):
        assert not (attempts / "task-000001-dead").exists()
        assert len(list(attempts.iterdir())) == 2  # the living one is let be
        three.destination.sweep()
        assert len(list(attempts.iterdir())) == 2
    assert not list(attempts.iterdir())


def _plan_of(dest: Path) -> Plan:
    return load_plan((dest / "plan.json").read_bytes(), str(dest))


def test_the_receipt_names_the_plan(made: Made) -> None:
    digest = hashlib.sha256((made[0] / "plan.json").read_bytes()).hexdigest()
    assert {r.plan for r in running.receipts(made[0])} == {digest} == {_plan_of(made[0]).digest}
