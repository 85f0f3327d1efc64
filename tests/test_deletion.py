"""`--delete-source`: a source goes only when all of it was found again; killed at any moment, nothing is ever lost."""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sa1b_wds import cli
from sa1b_wds.config import Convert
from sa1b_wds.convert import Job, run_task
from sa1b_wds.deletion import delete_sources, is_left
from sa1b_wds.errors import NotFound
from sa1b_wds.restore import restore
from sa1b_wds.status import command, run_reported
from sa1b_wds.storage import Destination

from . import dying, making, running, servers
from .making import Member
from .running import tree

MEMBERS = {n: making.pairs(range(9 * n + 1, 9 * n + 5)) for n in range(3)}


def call(*words: object) -> int:
    return cli.main([str(word) for word in words])


def made(folder: Path, more: dict[int, list[Member]] | None = None) -> Path:
    running.write(folder, {f"sa_{n}.tar": making.tar(m + (more or {}).get(n, [])) for n, m in MEMBERS.items()})
    return folder


def convert(folder: str, out: str, *more: str) -> None:
    """For child processes; the shards' number and the options are always the same."""
    options = ["--mix", "1", "--workers", "1", "--max-quarantine", "1", "--delete-source", *more]
    assert cli.main(["convert", folder, "--out", out, *options]) == 0


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def room() -> Iterator[Path]:
    """A folder where a sync costs little."""
    import tempfile

    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        yield Path(name)


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What comes of it without the option."""
    folder = tmp_path_factory.mktemp("plain")
    options = ("--mix", 1, "--workers", 1, "--max-quarantine", 1)
    assert call("convert", made(folder / "in"), "--out", folder / "out", *options) == 0
    assert left(folder / "in") == ["sa_0.tar", "sa_1.tar", "sa_2.tar"]
    return tree(folder / "out")


def test_the_sources_go_and_the_data_set_is_the_same(
    tmp_path: Path, wanted: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = made(tmp_path / "in"), tmp_path / "out"
    convert(str(folder), str(out))
    assert left(folder) == []
    assert tree(out) == wanted
    assert "deleted sa_" in capsys.readouterr().err
    convert(str(folder), str(out))  # again: the folder is empty
    assert tree(out) == wanted
    convert(str(folder / "sa_{0..2}.tar"), str(out))  # named one by one
    assert call("convert", folder, "--out", out, "--task", 1, "--delete-source") == 0
    assert call("verify", out, "--deep") == 0
    restored = restore(Destination(str(out)), tmp_path / "again")
    assert restored.samples == 12
    assert call("verify", out, "--against", tmp_path / "again") == 3  # another order of pairs, but:
    for n, members in MEMBERS.items():
        there = dict(making.read_tar((tmp_path / f"again/sa_{n}.tar").read_bytes()))
        assert there == {member.name: member.data for member in members}


def test_other_options_are_refused_still(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = made(tmp_path / "in"), tmp_path / "out"
    assert call("plan", folder, "--out", out, "--mix", 1) == 0
    assert call("convert", folder, "--out", out, "--task", 0, "--delete-source") == 0
    assert len(left(folder)) == 2
    capsys.readouterr()
    assert call("convert", folder, "--out", out, "--mix", 1) == 2  # nobody said that sources may be gone
    assert "1 sources fewer here" in capsys.readouterr().err
    assert call("convert", folder, "--out", out, "--mix", 2, "--delete-source") == 2
    assert "mix 1 there, 2 here" in capsys.readouterr().err
    missing = folder / left(folder)[0]
    whole = missing.read_bytes()
    missing.unlink()  # of a task that is not done
    assert call("convert", folder, "--out", out, "--mix", 1, "--delete-source") == 2
    assert "1 sources fewer here" in capsys.readouterr().err
    missing.write_bytes(whole)
    assert call("convert", folder, "--out", out, "--mix", 1, "--delete-source") == 0
    assert left(folder) == []


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([Member("sa_99.json", b"{}")], "1 members in quarantine"),
        ([Member("notes.txt", b"hello")], "1 members ignored (.txt)"),
    ],
)
def test_what_no_shard_has_keeps_its_source(
    tmp_path: Path, more: list[Member], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = made(tmp_path / "in", {1: more}), tmp_path / "out"
    convert(str(folder), str(out))
    assert left(folder) == ["sa_1.tar"]
    assert f"{folder / 'sa_1.tar'}: kept: {said}" in capsys.readouterr().err


def test_what_salvage_passed_over_keeps_its_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = made(tmp_path / "in"), tmp_path / "out"
    data = (folder / "sa_1.tar").read_bytes()
    at = making.offsets(MEMBERS[1])["./sa_11.json"]
    (folder / "sa_1.tar").write_bytes(data[:at] + b"?" * 512 + data[at + 512 :])
    convert(str(folder), str(out), "--on-damage", "salvage")
    assert left(folder) == ["sa_1.tar"]
    assert "bytes passed over by salvage" in capsys.readouterr().err


def _done(tmp_path: Path) -> tuple[Job, Path, Any]:
    """A task that is done, its source, and its receipt."""
    folder = made(tmp_path / "in")
    job = running.job_of(sorted(folder.iterdir()), tmp_path / "out", mix=1, delete_source=True)
    receipt = run_task(job, 0).receipt
    return job, folder / job.plan.sources[job.plan.tasks[0].sources[0]].name, receipt


@pytest.mark.parametrize("what", ["shard", "side file", "another source", "another photograph", "a link", "changed"])
def test_anything_that_is_not_as_it_was_keeps_the_source(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, source, receipt = _done(tmp_path)
    shard = job.destination.path(receipt.shards[0].name)
    if what == "shard":
        data = bytearray(shard.read_bytes())
        data[-600] ^= 1
        shard.write_bytes(data)
    elif what == "side file":
        job.destination.path(receipt.shards[0].files[1].name).write_bytes(b"x")
    elif what == "another source":
        source.write_bytes(making.tar(making.pairs(range(500, 503))))
    elif what == "another photograph":
        data = bytearray(source.read_bytes())
        data[data.index(b"\xff\xd9", 2048) - 1] ^= 1
        source.write_bytes(data)
    elif what == "a link":
        moved = source.rename(tmp_path / "elsewhere.tar")
        source.symlink_to(moved)
    else:
        compare = sys.modules["sa1b_wds.deletion"].compare

        def slowly(*arguments: Any) -> Any:
            found = compare(*arguments)
            source.write_bytes(source.read_bytes())
            return found

        monkeypatch.setattr("sa1b_wds.deletion.compare", slowly)
    done = delete_sources(job, 0, receipt)
    assert done.deleted == []
    (said,) = done.kept
    assert said.startswith(f"{source}: kept: ")
    assert source.exists()
    assert is_left(job, 0)


def test_it_is_on_the_disk_before_its_source_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Power may fail at any moment: files and folders of the task are synced, and read back from the disk."""
    import os

    job, source, receipt = _done(tmp_path)
    steps: list[str] = []

    def recorded(name: str, call: Any) -> Any:
        def inner(*arguments: Any, **options: Any) -> Any:
            about = arguments[0]
            steps.append(f"{name} {Path(f'/proc/self/fd/{about}').readlink() if isinstance(about, int) else about}")
            return call(*arguments, **options)

        return inner

    for name in ("fsync", "unlink"):
        monkeypatch.setattr(os, name, recorded(name, getattr(os, name)))
    assert delete_sources(job, 0, receipt).deleted == [source.name]
    assert steps[-1] == f"unlink {source}"
    out = job.destination.root
    for name in ("receipts/task-000000.json", "receipts", receipt.shards[0].name, "index", ""):
        assert f"fsync {out / name}" in steps


def test_another_process_was_faster_and_deleted_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made(tmp_path / "in")
    job = running.job_of(sorted(folder.iterdir()), tmp_path / "out", mix=1, delete_source=True)
    calls = 0

    def late(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            run_reported(job, 0)
            raise NotFound(str(folder), "no such file")
        return run_task(*arguments)

    monkeypatch.setattr("sa1b_wds.status.run_task", late)
    assert run_reported(job, 0).already_done
    assert len(left(folder)) == 2


@pytest.mark.parametrize("source", ["https://127.0.0.1:1/sa_0.tar", "pipe:cat sa_0.tar", "s3://b/sa_0.tar"])
def test_only_files_of_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str) -> None:
    folder = made(tmp_path / "in")
    assert call("plan", folder / "sa_0.tar", "--out", tmp_path / "out") == 0
    assert call("convert", source, "--out", tmp_path / "out", "--task", 0, "--delete-source") == 2
    assert "--delete-source: deletes files on this machine alone" in capsys.readouterr().err


def test_photographs_made_smaller_are_no_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made(tmp_path / "in")
    assert call("convert", folder, "--out", tmp_path / "out", "--max-side", 16, "--delete-source") == 2
    assert "would be lost" in capsys.readouterr().err
    assert len(left(folder)) == 3
    assert not (tmp_path / "out").exists()


def test_the_command_that_goes_on_says_it_too() -> None:
    assert command(Convert(sources=["in"], out="out", delete_source=True)).endswith("--delete-source")


def test_into_a_bucket(s3: servers.Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    folder, out = made(tmp_path / "in"), f"s3://{servers.BUCKET}/deleting"
    convert(str(folder), out)
    assert left(folder) == []
    convert(str(folder), out)
    assert call("verify", out, "--deep") == 0


# ---- killed ----------------------------------------------------------------------------------------------------------


def _lost_nothing(folder: Path, out: Path) -> None:
    """Of every source either the file is whole, or its task is done."""
    for n, members in MEMBERS.items():
        path = folder / f"sa_{n}.tar"
        if path.exists():
            assert path.read_bytes() == making.tar(members)
        else:
            assert [r for r in running.receipts(out) if r.sources[0].name == path.name]


@pytest.mark.slow
def test_killed_before_any_call_that_changes_the_disk_and_run_again(room: Path, wanted: dict[str, str]) -> None:
    first, there = made(room / "in"), [3]
    with dying.interrupt(0, lambda: there.append(len(left(first)))) as calls:
        convert(str(first), str(room / "first"))
    gone = [at - 1 for at in range(1, len(there)) if there[at] < there[at - 1]]  # the call before took a source away
    assert len(gone) >= 2
    assert {calls[at - 1] for at in gone} == {"unlink"}
    # Around each of these, and here and there; the converter's own calls have their own test.
    for at in sorted({*gone, *(at + 1 for at in gone), *range(1, len(calls) + 1, 9)}):
        folder, out = made(room / f"in-{at}"), room / f"out-{at}"
        child = dying.killed_at(at, convert, str(folder), str(out))
        assert child.join() is None
        assert child.code == -signal.SIGKILL, (at, calls[at - 1])
        _lost_nothing(folder, out)
        convert(str(folder), str(out))
        assert left(folder) == []
        assert tree(out) == wanted, (at, calls[at - 1])
        shutil.rmtree(out)


def test_two_processes_at_once(room: Path, wanted: dict[str, str]) -> None:
    for seed in range(3):
        folder, out = made(room / f"in-{seed}"), room / f"out-{seed}"
        assert call("plan", folder, "--out", out, "--mix", 1) == 0
        begin = time.time() + 0.15
        children = [dying.jittering(seed * 2 + i, begin, convert, str(folder), str(out)) for i in range(2)]
        for child in children:
            assert child.join() is None
            assert child.code == 0
        assert left(folder) == []
        assert tree(out) == wanted


def test_a_killed_command_and_the_same_one_again(tmp_path: Path, wanted: dict[str, str]) -> None:
    """From outside, at a moment that nobody chose: when the first source is gone."""
    folder, out = made(tmp_path / "in"), tmp_path / "out"
    words = ["convert", str(folder), "--out", str(out), "--mix", "1", "--workers", "1", "--max-quarantine", "1"]
    program = [sys.executable, "-c", "from sa1b_wds.cli import run; run()", *words, "--delete-source"]
    process = subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(left(folder)) == 3 and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    process.wait()
    _lost_nothing(folder, out)
    assert subprocess.run(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0
    assert left(folder) == []
    assert tree(out) == wanted
