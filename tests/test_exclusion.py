"""Images that are left out on request: their bytes are nowhere, the accounts hold, and nothing is missed."""

import json
import shutil
from pathlib import Path

import msgspec
import pytest

from sa1b_wds import cli
from sa1b_wds.convert import read_plan
from sa1b_wds.deletion import delete_sources
from sa1b_wds.errors import FormatError, NotFound
from sa1b_wds.exclusion import image_ids, is_excluded
from sa1b_wds.manifest import Manifest
from sa1b_wds.plan import Source, difference, make_plan
from sa1b_wds.restore import restore
from sa1b_wds.storage import Destination
from sa1b_wds.verify import verify

from . import making, running
from .making import Member

OUT = (2, 5, 99, 12)
"""99 is in no source."""


def call(*words: object) -> int:
    return cli.main([str(word) for word in words])


@pytest.fixture
def members() -> dict[int, list[Member]]:
    """Excluded images as a pair, twice, alone, under odd names, as a link, and as broken bytes."""
    first = making.pairs(range(1, 7))
    odd = [
        Member("./sa_2.jpg", b"a second one"),
        Member("elsewhere/sa_5.json", b"{ broken"),
        Member("../sa_5.jpg", b"leads out"),
        Member("sa_0005.json", b"zeros in front"),
        Member("sa_12.jpg", b"no partner"),
        Member("sa_50.jpg", making.jpg()),  # quarantined: no partner, and nobody wants it out
    ]
    return {0: first + odd, 1: making.pairs(range(10, 15))}


@pytest.fixture
def sources(tmp_path: Path, members: dict[int, list[Member]]) -> Path:
    running.write(tmp_path / "in", {f"sa_{n}.tar": making.tar(m) for n, m in members.items()})
    return tmp_path / "in"


def convert(sources: Path, out: Path, *more: object) -> int:
    options = ("--mix", 2, "--max-quarantine", 1, "--workers", 1)
    return call("convert", sources, "--out", out, *options, *more)


def test_their_bytes_are_nowhere_and_the_accounts_hold(
    sources: Path, tmp_path: Path, members: dict[int, list[Member]], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert convert(sources, out, "--exclude", *OUT) == 0
    assert (
        ", 11 excluded, " in capsys.readouterr().err
    )  # five odd ones and two pairs of the first tar, one of the other
    everything = [m for n in (0, 1) for m in members[n]]
    gone = [m for m in everything if is_excluded(m.name, OUT)]
    assert len(gone) == 11
    kept = [m for m in making.pairs([*range(1, 7), *range(10, 15)]) if not is_excluded(m.name, OUT)]
    running.check_samples(out, kept)
    manifest = msgspec.json.decode((out / "manifest.json").read_bytes(), type=Manifest)
    totals = manifest.totals
    assert totals.excluded == 11
    assert totals.members == 2 * totals.samples + totals.quarantined + totals.ignored + totals.excluded
    assert [q.key for q in running.quarantined(out)] == ["sa_50"]
    for path in out.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert not [m.name for m in gone if len(m.data) > 8 and m.data in data], path
    assert verify(Destination(str(out)), deep=True, against=[str(sources)]) == []
    done = restore(Destination(str(out)), tmp_path / "again")
    assert done.excluded == 11
    assert "nor are 11 of excluded images" in str(done)
    assert call("stats", out) == 0
    assert "+ 11 excluded" in capsys.readouterr().out


def test_without_any_nothing_is_written_of_it(sources: Path, tmp_path: Path) -> None:
    assert convert(sources, tmp_path / "a") == 0
    for name in ("plan.json", "manifest.json", "receipts/task-000000.json"):
        assert b"excluded" not in (tmp_path / "a" / name).read_bytes()


def test_verify_finds_one_that_is_there_nevertheless(sources: Path, tmp_path: Path) -> None:
    """A data set whose plan says so, and whose shards do not do so."""
    from sa1b_wds import source

    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "is_excluded", lambda name, ids: False)
        assert convert(sources, out, "--exclude", 3) == 0
    said = [str(d) for d in verify(Destination(str(out)), deep=True, against=[str(sources)])]
    assert any("sa_3 is in the data set, and excluded by its plan" in line for line in said)
    assert any("excluded: the manifest against the source: expected 0, found 2" in line for line in said)


def test_verify_finds_one_in_quarantine(sources: Path, tmp_path: Path) -> None:
    from sa1b_wds import source

    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "is_excluded", lambda name, ids: False)
        assert convert(sources, out, "--exclude", 50) == 0
    said = [str(d) for d in verify(Destination(str(out)), against=[str(sources)])]
    assert any("sa_50.jpg: of an image that is excluded, and yet in quarantine" in line for line in said)


def test_an_account_without_them_is_found(sources: Path, tmp_path: Path) -> None:
    from .test_verify import change_manifest

    out = tmp_path / "out"
    assert convert(sources, out, "--exclude", *OUT) == 0
    manifest = json.loads((out / "manifest.json").read_bytes())
    for fact in manifest["sources"]:
        fact.pop("excluded")
    change_manifest(out, sources=manifest["sources"])
    said = [str(d) for d in verify(Destination(str(out)))]
    assert any("members = 2 · samples + quarantined + ignored + excluded" in line for line in said)


def test_another_list_is_another_plan(sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, file = tmp_path / "out", tmp_path / "ids.txt"
    file.write_text("# asked for on Monday\nsa_2\n5   # and on Tuesday\n\n12\n99\n")
    assert call("plan", sources, "--out", out, "--mix", 2, "--exclude", file) == 0
    assert read_plan(Destination(str(out))).excluded == sorted(OUT)
    assert call("plan", sources, "--out", out, "--mix", 2, "--exclude", "sa_99", 12, 5, 2) == 0  # the same
    capsys.readouterr()
    assert convert(sources, out, "--exclude", 2) == 2
    assert "4 images excluded there, 1 here, sa_5 the first that differs" in capsys.readouterr().err
    assert convert(sources, out) == 2
    assert call("convert", sources, "--out", out, "--task", 0, "--exclude", 2) == 2
    assert "4 images are excluded in it, 1 here" in capsys.readouterr().err
    task = ("convert", sources, "--out", out, "--task", 0, "--max-quarantine", 1)
    assert call(*task, "--exclude", file) == 0
    shutil.rmtree(out / "receipts")
    assert call(*task) == 0  # the plan knows them
    assert call("finalize", out) == 0
    assert verify(Destination(str(out)), deep=True, against=[str(sources)]) == []


def test_the_plan_compares_them() -> None:
    source = [Source(name="sa_0.tar", size=1 << 20)]
    plans = [make_plan(source, shard_size=1 << 20, mix=1, seed=0, excluded=ids) for ids in ([], [3, 1, 3])]
    assert plans[1].excluded == [1, 3]
    assert plans[0].digest != plans[1].digest
    assert difference(plans[0], plans[1]) == "2 images excluded there, 0 here, sa_1 the first that differs"


def test_a_source_with_excluded_members_may_be_deleted(tmp_path: Path) -> None:
    paths = running.write(tmp_path / "in", {"sa_0.tar": making.tar(making.pairs(range(1, 6)))})
    plan = make_plan(
        [Source(name="sa_0.tar", size=paths[0].stat().st_size)], shard_size=1 << 20, mix=1, seed=0, excluded=[2]
    )
    job = running.job_of(paths, tmp_path / "out", plan=plan, delete_source=True)
    from sa1b_wds.convert import run_task

    assert delete_sources(job, 0, run_task(job, 0).receipt).deleted == ["sa_0.tar"]


@pytest.mark.parametrize(
    ("name", "is_out"),
    [
        ("sa_5.jpg", True), ("./sa_5.json", True), ("/x/y/sa_5.jpg", True), ("sa_005.jpg", True), ("sa_50.jpg", False),
        ("xsa_5.jpg", False), ("sa_5.txt", False), ("sa_5.jpg.json", False), ("sa_5/a.jpg", False),
        ("a\n/sa_5.jpg", True),
    ],
)  # fmt: skip
def test_whose_member_it_is(name: str, is_out: bool) -> None:
    assert is_excluded(name, {5}) is is_out


def test_ids_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="neither an id"):
        image_ids(["sa_x"])
    (tmp_path / "ids").write_text("1\nsa_2, sa_3\n")
    with pytest.raises(FormatError, match="line 2: not an image id"):
        image_ids([str(tmp_path / "ids")])
