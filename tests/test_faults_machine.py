"""The machine fails: full disks, modes, masks, signals at every moment, two at once. Run again, and nothing shows.

How each fault is made: a full disk is a tmpfs of the wanted size in a mount namespace of its own (`full_disk.py`;
skipped where namespaces are forbidden) and, everywhere, an error put into each call that changes the disk in turn;
kills and stops are real signals that a child sends itself just before such a call (`dying.py`), or gets at random.
"""

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sa1b_wds.convert import Job, missing_tasks, run_task, write_plan
from sa1b_wds.errors import Denied, NoSpace, NotFound, PlanMismatch, Sa1bError, StorageError, UsageError
from sa1b_wds.plan import Source, make_plan
from sa1b_wds.publication import finalize
from sa1b_wds.status import read_status
from sa1b_wds.storage import Destination

from . import dying, making, running
from .dying import CALLS, interrupt
from .fault_proxy import Fault, FaultProxy
from .making import Member
from .running import convert_folder, job_of, tree, undisturbed

Tree = dict[str, str]
ROOT = Path(__file__).parents[1]


@pytest.fixture
def room() -> Iterator[Path]:
    """A folder where a sync costs little, that any user may read."""
    fast = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=fast if os.access(fast, os.W_OK) else None) as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small sources, one with something to quarantine."""
    folder = tmp_path_factory.mktemp("sources")
    bad = [Member("sa_99.json", b"{"), Member("sa_98.jpg", making.jpg())]
    running.write(
        folder,
        {
            "sa_000000.tar": making.tar([*making.pairs(range(5)), *bad]),
            "sa_000001.tar": making.gzipped(making.tar(making.pairs(range(10, 14)))),
        },
    )
    return folder


@pytest.fixture(scope="module")
def wanted(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """What an undisturbed run writes."""
    dest = tmp_path_factory.mktemp("undisturbed") / "out"
    convert_folder(str(sources), str(dest))
    running.check_accounts(dest)
    return tree(dest)


def _calls(sources: Path, dest: Path, names: tuple[str, ...] = CALLS + dying.REMOVING) -> list[str]:
    """The calls of an undisturbed run that change the disk."""
    with interrupt(-1, lambda: None, names) as seen:
        convert_folder(str(sources), str(dest))
    shutil.rmtree(dest)
    return seen


# ---------------------------------------------------------------------------------------------------- kills and stops


@pytest.mark.slow
def test_killed_before_any_call_that_changes_the_disk_and_run_again(sources: Path, wanted: Tree, room: Path) -> None:
    calls = _calls(sources, room / "first")
    assert {"rename", "link", "fsync", "writev", "unlink", "mkdir"} <= set(calls)
    for at in range(1, len(calls) + 1):
        dest = room / str(at)
        child = dying.killed_at(at, convert_folder, str(sources), str(dest))
        assert child.join() is None
        assert child.code == -signal.SIGKILL, (at, calls[at - 1])
        convert_folder(str(sources), str(dest))
        assert tree(dest) == wanted, (at, calls[at - 1])
        shutil.rmtree(dest)


def test_killed_at_random_moments_again_and_again(sources: Path, wanted: Tree, room: Path) -> None:
    for _ in range(2):  # the first one starts the fork server
        begun = time.monotonic()
        dying.Child(convert_folder, str(sources), str(room / "timed")).join()
        usual = time.monotonic() - begun
        shutil.rmtree(room / "timed")
    draw = random.Random(20)
    for turn in range(6):
        dest = room / str(turn)
        for _ in range(6):
            child = dying.Child(convert_folder, str(sources), str(dest))
            time.sleep(draw.uniform(0, usual))
            with contextlib.suppress(ProcessLookupError):  # it was faster
                os.kill(child.pid, signal.SIGKILL)
            assert child.join() is None
        convert_folder(str(sources), str(dest))
        assert tree(dest) == wanted


def _first_task(folder: str, dest: str) -> None:
    """Only task 0, as `--task 0` runs it."""
    from sa1b_wds.convert import Options, read_plan
    from sa1b_wds.status import run_reported

    destination = Destination(dest)
    locations = {p.name: str(p) for p in Path(folder).iterdir()}
    options = Options(max_quarantine=running.ALL)
    job = Job(destination=destination, plan=read_plan(destination), locations=locations, options=options)
    run_reported(job, 0)


def _planned(sources: Path, dest: Path) -> None:
    write_plan(Destination(str(dest)), running.planned(sorted(sources.iterdir()), mix=1))


@pytest.mark.slow
def test_stopped_anywhere_and_woken_after_another_has_finished(sources: Path, wanted: Tree, room: Path) -> None:
    _planned(sources, room / "first")
    with interrupt(-1, lambda: None) as calls:
        _first_task(str(sources), str(room / "first"))
    publishing = calls.index("rename", calls.index("open"))
    for at in range(1, len(calls) + 1):
        dest = room / str(at)
        _planned(sources, dest)
        child = dying.stopped_at(at, _first_task, str(sources), str(dest))
        assert child.wait_stopped()
        convert_folder(str(sources), str(dest))  # another process does all of it, and finalizes
        before = {n: digest for n, digest in tree(dest).items() if not n.startswith(".state")}
        assert before == wanted
        child.wake()
        assert child.join() is None, (at, calls[at - 1])
        assert child.code == 0
        assert tree(dest) == wanted, (at, calls[at - 1])
        shutil.rmtree(dest)
    assert publishing < len(calls)


def test_stopped_before_its_first_rename_and_woken_before_finalize(sources: Path, wanted: Tree, room: Path) -> None:
    dest = room / "out"
    _planned(sources, room / "first")
    with interrupt(-1, lambda: None) as calls:
        _first_task(str(sources), str(room / "first"))
    at = max(i for i, name in enumerate(calls) if name == "writev") + 1
    at = calls.index("rename", at) + 1
    _planned(sources, dest)
    child = dying.stopped_at(at, _first_task, str(sources), str(dest))
    assert child.wait_stopped()
    _first_task(str(sources), str(dest))
    child.wake()
    assert child.join() is None
    convert_folder(str(sources), str(dest))
    assert tree(dest) == wanted


@pytest.mark.parametrize("seed", range(8))
def test_two_processes_on_one_destination_at_once(sources: Path, wanted: Tree, room: Path, seed: int) -> None:
    begin = time.time() + 0.15
    children = [dying.jittering(seed * 3 + i, begin, convert_folder, str(sources), str(room / "out")) for i in range(3)]
    for child in children:
        assert child.join() is None
        assert child.code == 0
    assert tree(room / "out") == wanted


def test_everything_is_on_the_disk_before_it_is_visible_and_the_receipt_is_last(
    sources: Path, room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Power may fail at any call: what is synced when is watched, since a test cannot pull the plug."""
    dest = room / "out"
    synced: set[str] = set()  # inodes, by name: of files and folders
    waiting: set[str] = set()  # folders with a new name in them that is not on the disk
    published: list[str] = []
    fsync, rename, link = os.fsync, os.rename, os.link

    def sync(descriptor: int) -> None:
        fsync(descriptor)
        name = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        synced.add(name)
        waiting.discard(name)

    def moved(old: Path, new: Path) -> None:
        assert str(old) in synced, f"{new} is visible, its bytes not on the disk"
        name = str(new.relative_to(dest))
        if name.startswith("receipts/"):
            assert not waiting, f"{name} is visible, the names in {waiting} not on the disk"
            published.append(name)
        elif not name.startswith(".state"):
            waiting.add(str(new.parent))

    def renaming(old: Any, new: Any) -> None:
        moved(Path(old), Path(new))
        rename(old, new)

    def linking(old: Any, new: Any) -> None:
        moved(Path(old), Path(new))
        link(old, new)

    for name, call in (("fsync", sync), ("rename", renaming), ("link", linking)):
        monkeypatch.setattr(os, name, call)
    convert_folder(str(sources), str(dest))
    assert published == ["receipts/task-000000.json", "receipts/task-000001.json"]
    assert not waiting


def test_what_a_killed_attempt_on_a_damaged_source_quarantined_goes_when_the_source_is_sound(
    tmp_path: Path, room: Path
) -> None:
    """Another copy of a damaged tar, of the same size: nothing of the first attempt may stay."""
    members = making.pairs(range(4))
    sound = making.tar(members)
    at = making.offsets(members)["./sa_2.json"]
    paths = running.write(tmp_path / "in", {"a.tar": sound[:at] + b"?" * 512 + sound[at + 512 :]})
    options: dict[str, Any] = {"on_damage": "salvage", "max_quarantine": 1.0}
    job = job_of(paths, room / "first", **options)
    with interrupt(-1, lambda: None) as calls:
        run_task(job, 0)
    assert "quarantine/task-000000.members" in tree(room / "first")
    before_link = calls.index("link")  # the receipt's is the only one
    job = job_of(paths, room / "out", **options)
    with pytest.raises(StorageError), interrupt(before_link, dying.fail(errno.EIO)):
        run_task(job, 0)
    assert "quarantine/task-000000.members" in tree(room / "out")
    running.write(tmp_path / "in", {"a.tar": sound})
    running.run(job_of(paths, room / "out"))
    running.check_accounts(room / "out")
    running.check_samples(room / "out", members)
    assert not [n for n in tree(room / "out") if n.startswith("quarantine")]


# -------------------------------------------------------------------------------------------------- errors of the disk


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_an_error_of_any_call_leaves_nothing_of_the_task_and_running_again_repairs(
    sources: Path, wanted: Tree, room: Path, code: int
) -> None:
    making_calls = tuple(c for c in CALLS if c != "pwrite")
    calls = _calls(sources, room / "first", making_calls)
    failed = 0
    for at in range(1, len(calls) + 1):
        dest = room / str(at)
        with undisturbed():
            try:
                with interrupt(at, dying.fail(code), making_calls):
                    convert_folder(str(sources), str(dest))
            except StorageError as error:
                failed += 1
                assert isinstance(error, NoSpace) == (code == errno.ENOSPC)
                assert str(error).startswith(str(dest)), str(error)
                assert not (dest / "manifest.json").exists() or calls[at - 1] == "fsync"
                if calls[at - 1] in ("open", "write", "writev"):
                    assert not running.receiptless(dest), (at, calls[at - 1])
                attempts = dest / ".state" / "attempts"
                assert not attempts.exists() or not list(attempts.iterdir()), (at, calls[at - 1])
        convert_folder(str(sources), str(dest))
        assert tree(dest) == wanted, (at, calls[at - 1])
        shutil.rmtree(dest)
    assert failed > len(calls) * 0.6  # a heartbeat may fail and do no harm, and so may a folder that is there


def test_files_that_cannot_be_removed_are_removed_by_the_next_run(sources: Path, wanted: Tree, room: Path) -> None:
    calls = _calls(sources, room / "first", dying.REMOVING)
    for at in range(1, len(calls) + 1):
        dest = room / str(at)
        with contextlib.suppress(StorageError), interrupt(at, dying.fail(errno.EBUSY), dying.REMOVING):
            convert_folder(str(sources), str(dest))
        convert_folder(str(sources), str(dest))
        assert tree(dest) == wanted, (at, calls[at - 1])
        shutil.rmtree(dest)


def test_a_disk_that_writes_less_than_it_is_given(sources: Path, wanted: Tree, room: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    writev, write, draw = os.writev, os.write, random.Random(4)

    def some(descriptor: int, pieces: "list[bytes]") -> int:
        joined = b"".join(pieces)
        return writev(descriptor, [joined[: draw.randint(1, len(joined))]])

    monkeypatch.setattr(os, "writev", some)
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[: draw.randint(1, len(data))]))
    convert_folder(str(sources), str(room / "out"))
    assert tree(room / "out") == wanted


def test_a_scratch_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = making.pairs(range(6))
    paths = running.write(tmp_path / "in", {"a.tar": making.tar([*members[::2], *members[1::2]])})
    job = job_of(paths, tmp_path / "out", pairing_buffer=0, scratch=tmp_path)
    for at in range(1, 9):
        with undisturbed(), interrupt(at, dying.FULL, ("pwrite",)), pytest.raises(NoSpace) as caught:
            run_task(job, 0)
        assert str(caught.value).startswith(f"scratch {tmp_path}: no space left")
        running.check_no_trace(tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]
    running.run(job)


# ------------------------------------------------------------------------------------------------------- a full disk

_UNSHARE = ["unshare", "--user", "--map-root-user", "--mount"]


def _namespaces() -> bool:
    probe = [*_UNSHARE, "sh", "-c", "mount -t tmpfs none /mnt"]
    return shutil.which("unshare") is not None and not subprocess.run(probe, capture_output=True).returncode


@pytest.mark.slow
@pytest.mark.skipif(not _namespaces(), reason="this machine forbids mounting in a namespace of one's own")
def test_a_full_disk_and_then_room(sources: Path, wanted: Tree, tmp_path: Path) -> None:
    command = [*_UNSHARE, sys.executable, "-m", "tests.full_disk", str(sources), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    *rows, readonly = [json.loads(line) for line in done.stdout.splitlines()]
    kinds = []
    for limit, kind, said, left, receiptless, again, there in rows:
        kinds.append((limit.partition("=")[0], kind))
        if kind:
            assert kind == "NoSpace", (limit, said)
            assert said.endswith("no space left: free some and run the same command again")
            assert "manifest.json" not in left
            assert not any(n.startswith(".state/attempts/") for n in left), (limit, left)
            # A link to the receipt takes an inode on tmpfs: the last step may fail there, but not for lack of bytes.
            assert not receiptless or limit.startswith("nr_inodes"), (limit, receiptless)
        assert again == ["", ""], limit
        assert there == wanted, limit
    assert {("size", "NoSpace"), ("size", ""), ("nr_inodes", "NoSpace"), ("nr_inodes", "")} == set(kinds)
    assert readonly[1] == "Denied"
    assert "read-only file system" in readonly[2]


# ------------------------------------------------------------------------------------------------------ modes, masks


def test_a_destination_that_may_not_be_written(sources: Path, room: Path) -> None:
    shutil.copytree(sources, room / "in")
    _readable(room / "in")
    fresh, planned = room / "fresh", room / "planned"
    fresh.mkdir(mode=0o555)
    _planned(sources, planned)
    for folder in (planned, planned / ".state"):
        folder.chmod(0o555)
    for dest in (fresh, planned, room / "not" / "there"):
        if not dest.exists():
            room.chmod(0o555)
        before = tree(room)
        error = dying.as_nobody(convert_folder, str(room / "in"), str(dest)).join()
        assert isinstance(error, Denied)
        assert "permission denied: check the owner and the mode of the folder" in str(error)
        assert str(error).startswith(str(dest))
        assert tree(room) == before
    for folder in (room, fresh, planned, planned / ".state"):
        folder.chmod(0o755)


def _readable(folder: Path) -> None:
    folder.chmod(0o755)
    for path in folder.iterdir():
        path.chmod(0o644)


def test_a_source_that_may_not_be_read(sources: Path, room: Path) -> None:
    shutil.copytree(sources, room / "in")
    _readable(room / "in")
    (room / "in" / "sa_000001.tar").chmod(0)
    (room / "out").mkdir()
    (room / "out").chmod(0o777)
    error = dying.as_nobody(convert_folder, str(room / "in"), str(room / "out")).join()
    assert isinstance(error, Denied)
    assert str(error).startswith(f"{room}/in/sa_000001.tar: permission denied")
    assert "sa1b-train-000001.tar" not in tree(room / "out")


@pytest.mark.parametrize(
    ("mask", "file", "folder"), [(0o027, 0o640, 0o750), (0o077, 0o600, 0o700), (0o002, 0o664, 0o775)]
)
def test_the_umask_is_honoured(sources: Path, wanted: Tree, room: Path, mask: int, file: int, folder: int) -> None:
    child = dying.masked(mask, convert_folder, str(sources), str(room / "out"))
    assert child.join() is None
    assert tree(room / "out") == wanted
    modes = {stat.S_IMODE(p.stat().st_mode) for p in (room / "out").rglob("*") if p.is_file()}
    assert modes == {file}
    folders = {stat.S_IMODE(p.stat().st_mode) for p in [room / "out", *(room / "out").rglob("*")] if p.is_dir()}
    assert folders == {folder}


# ----------------------------------------------------------------------------------------------------------- scratch


def _large(folder: Path, size: int) -> Path:
    """A source of this many bytes, nearly all of them a hole behind the end of the archive."""
    (path,) = running.write(folder, {"a.tar": making.tar(making.pairs(range(3)))})
    with path.open("r+b") as file:
        file.truncate(size)
    return path


def test_scratch_that_is_too_small_is_found_before_anything_is_read(tmp_path: Path) -> None:
    path = _large(tmp_path / "in", 1 << 43)  # a quarter of it may have to wait
    if shutil.disk_usage(tmp_path).free > 1 << 41:
        pytest.skip("the disk has room for terabytes")
    plan = make_plan([Source(name=path.name, size=1 << 43)], shard_size=1 << 43, mix=1, seed=0)
    job = job_of([path], tmp_path / "out", plan=plan, scratch=tmp_path)
    with pytest.raises(NoSpace, match=r"scratch .*: too small; give --scratch a folder .* bytes free, found [\d,]+"):
        run_task(job, 0)
    running.check_no_trace(tmp_path / "out")


def test_scratch_in_memory_is_refused(tmp_path: Path) -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir():
        pytest.skip("no /dev/shm")
    path = _large(tmp_path / "in", 1 << 20)
    job = job_of([path], tmp_path / "out", scratch=memory, pairing_buffer=1000)
    with pytest.raises(
        UsageError, match=r"scratch /dev/shm: lies in memory \(tmpfs\), and 292,601 bytes may have to wait"
    ):
        run_task(job, 0)
    running.check_no_trace(tmp_path / "out")
    job = job_of([path], tmp_path / "out", scratch=memory, pairing_buffer=1 << 20)  # nothing may have to wait
    run_task(job, 0)


def test_scratch_that_is_not_there(tmp_path: Path) -> None:
    path = _large(tmp_path / "in", 1 << 20)
    job = job_of([path], tmp_path / "out", scratch=tmp_path / "none", pairing_buffer=1000)
    with pytest.raises(NotFound, match=r"scratch .*/none: no such folder; give --scratch"):
        run_task(job, 0)
    running.check_no_trace(tmp_path / "out")


@pytest.mark.parametrize("named", [True, False], ids=["O_TMPFILE", "unlinked by hand"])
def test_scratch_has_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool) -> None:
    if not named:  # as on a file system that knows no files without a name
        monkeypatch.delattr(os, "O_TMPFILE")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    members = making.pairs(range(6))
    paths = running.write(tmp_path / "in", {"a.tar": making.tar([*members[::2], *members[1::2]])})
    seen: list[str] = []
    pread = os.preadv

    def watching(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        seen.extend(p.name for p in scratch.iterdir())
        return pread(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", watching)
    running.convert(paths, tmp_path / "out", pairing_buffer=0, scratch=scratch)
    assert not seen
    assert not list(scratch.iterdir())
    running.check_samples(tmp_path / "out", members)


# -------------------------------------------------------------------------------------------------- another plan there


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 1}, "seed 0 there, 1 here"),
        ({"mix": 2}, "mix 1 there, 2 here"),
        ({"shard_size": 1 << 21}, "shard_size 1048576 there, 2097152 here"),
    ],
)
def test_another_plan_on_the_same_destination_is_refused_and_says_what_differs(
    sources: Path, room: Path, changes: dict[str, int], said: str
) -> None:
    convert_folder(str(sources), str(room))
    before = tree(room)
    found = [Source(name=p.name, size=p.stat().st_size) for p in sources.iterdir()]
    options: dict[str, Any] = {"shard_size": 1 << 20, "mix": 1, "seed": 0, **changes}
    other = make_plan(found, **options)
    with pytest.raises(PlanMismatch) as caught:
        write_plan(Destination(str(room)), other)
    assert str(caught.value) == f"{room}/plan.json: another plan is there; use another --out, or its options: {said}"
    assert caught.value.exit_code == 2
    assert tree(room) == before


def test_other_sources_on_the_same_destination_are_named(sources: Path, room: Path) -> None:
    convert_folder(str(sources), str(room / "out"))
    before = tree(room / "out")
    for change, said in (
        (
            lambda f: shutil.copy(f / "sa_000000.tar", f / "sa_000002.tar"),
            "1 sources more here, sa_000002.tar the first",
        ),
        (lambda f: (f / "sa_000001.tar").unlink(), "1 sources fewer here, sa_000001.tar the first"),
        (lambda f: os.truncate(f / "sa_000000.tar", 1 << 19), "sa_000000.tar has [0-9,]+ bytes there, 524,288 here"),
    ):
        folder = Path(tempfile.mkdtemp(dir=room))
        shutil.copytree(sources, folder / "in")
        change(folder / "in")
        with pytest.raises(PlanMismatch, match=said):
            convert_folder(str(folder / "in"), str(room / "out"))
        assert tree(room / "out") == before


def test_a_receipt_of_another_plan_is_not_taken_for_ours(sources: Path, room: Path) -> None:
    convert_folder(str(sources), str(room / "other"), mix=2)
    job = job_of(sorted(sources.iterdir()), room / "out", mix=1, max_quarantine=running.ALL)
    (room / "out/receipts").mkdir()
    shutil.copy(room / "other/receipts/task-000000.json", room / "out/receipts/")
    with pytest.raises(Sa1bError, match="a receipt of another plan: expected task 0 of plan"):
        run_task(job, 0)
    with pytest.raises(Sa1bError, match="a receipt of another plan"):
        finalize(job.destination, partial=True)
    assert missing_tasks(job.destination, job.plan) == [1]


# ------------------------------------------------------------------------------------------------- the command, signals


def _command(*arguments: object) -> list[str]:
    return [sys.executable, "-c", "from sa1b_wds.cli import run; run()", *map(str, arguments)]


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[object], Tree]:
    """Sources that take a second or two to read, since each has a hole; the options for them; what they become."""
    folder = tmp_path_factory.mktemp("slow")
    for i in range(2):
        before, behind = making.pairs([10 * i, 10 * i + 1]), making.pairs([10 * i + 2])
        hole = 7 << 30  # two workers that start one after the other are still both at work for a while
        block = making.rewritten(making.header(Member("hole.bin")), {124: b"%011o\0" % hole})
        path = folder / f"sa_00000{i}.tar"
        with path.open("wb") as file:
            file.write(making.tar(before, end=b"") + block)
            file.seek(hole, 1)
            file.write(making.tar(behind, directory=None))
    options: list[object] = ["--shard-size", "100GiB", "--mix", 1, "--pairing-buffer", "2GiB", "--workers", 2]
    dest = tmp_path_factory.mktemp("slow-out") / "out"
    subprocess.run(_command("convert", folder, "--out", dest, *options), check=True, capture_output=True)
    running.check_accounts(dest)
    return folder, options, tree(dest)


def _session(leader: int) -> list[int]:
    """Living processes of a session."""
    out = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[3]) == leader and fields[0] not in "ZX":
                out.append(int(folder.name))
    return out


def _until(condition: Callable[[], bool], what: str, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def _workers(leader: int) -> list[int]:
    """The worker processes among them."""
    out = []
    for pid in _session(leader):
        try:
            if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                out.append(pid)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return out


def _started(slow: tuple[Path, list[object], Tree], dest: Path) -> "subprocess.Popen[str]":
    """A conversion by two workers, both of them at work."""
    folder, options, _ = slow
    command = _command("convert", folder, "--out", dest, *options)
    # Where the tests run in the background of a shell, Ctrl-C is ignored, and what they start would inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
    finally:
        signal.signal(signal.SIGINT, before)
    _until(lambda: len(list((dest / ".state/attempts").glob("*/sa1b-train-*"))) == 2, "no worker has begun")
    return process


def _again(slow: tuple[Path, list[object], Tree], dest: Path) -> None:
    folder, options, wanted = slow
    subprocess.run(_command("convert", folder, "--out", dest, *options), check=True, capture_output=True)
    assert tree(dest) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM", "SIGUSR1"])
def test_stopping_the_command_stops_its_workers_and_leaves_nothing(
    slow: tuple[Path, list[object], Tree], tmp_path: Path, how: str
) -> None:
    dest = tmp_path / "out"
    process = _started(slow, dest)
    if how == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to all of them
    else:
        for _ in range(2):  # batch systems say it more than once
            process.send_signal(signal.Signals[how])
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130, said
    by = "" if how == "Ctrl-C" else f" by {how}"
    assert said.splitlines()[-1] == f"sa1b-wds: stopped{by}; run the same command again to go on"
    assert "Traceback" not in said
    _until(lambda: not _session(process.pid), "processes are left")
    assert not list((dest / ".state/attempts").iterdir())
    assert "sa1b-train-000000.tar" not in tree(dest)
    states = read_status(Destination(str(dest)), now=time.time()).tasks
    assert {(s.state, s.beat and s.beat.error) for s in states[:2]} == {("failed", "stopped")}
    _again(slow, dest)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["server", "command"])
def test_a_task_is_stopped_while_its_source_keeps_it_waiting(tmp_path: Path, kind: str) -> None:
    data = making.tar(making.pairs(range(40)))
    half, dest = len(data) // 2, tmp_path / "out"
    (path,) = running.write(tmp_path, {"sa_000000.tar": data})
    with FaultProxy({"/sa_000000.tar": data}) as web:
        web.faults.append(Fault(cut=half, stall=100, times=9, when=lambda request: request.method == "GET"))
        source = f"{web.url}/sa_000000.tar" if kind == "server" else f"pipe:head -c {half} {path}; sleep 100"
        job_of([path], dest, shards=1)
        command = _command("convert", source, "--out", dest, "--task", 0, "--workers", 1)
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        shard = ".state/attempts/*/sa1b-train-000000.tar"
        _until(lambda: bool(list(dest.glob(shard))), "the task has not begun")
        time.sleep(0.5)  # now it has what there is
        process.terminate()
        try:
            _, said = process.communicate(timeout=5)
        finally:
            process.kill()
    assert said == "sa1b-wds: stopped by SIGTERM; run the same command again to go on\n"
    assert not list((dest / ".state/attempts").iterdir())


@pytest.mark.slow
def test_a_command_that_is_killed_takes_its_workers_along(
    slow: tuple[Path, list[object], Tree], tmp_path: Path
) -> None:
    dest = tmp_path / "out"
    process = _started(slow, dest)
    process.kill()
    process.communicate(timeout=20)
    _until(lambda: not _session(process.pid), "workers outlive their parent")
    _again(slow, dest)


@pytest.mark.slow
def test_a_worker_that_is_killed_is_reported_and_the_rest_goes_on(
    slow: tuple[Path, list[object], Tree], tmp_path: Path
) -> None:
    dest = tmp_path / "out"
    process = _started(slow, dest)
    victim = _workers(process.pid)[0]
    os.kill(victim, signal.SIGKILL)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 1
    assert (
        "its process ended by signal SIGKILL (out of memory? fewer --workers or a smaller --pairing-buffer help)"
        in said
    )
    assert "Traceback" not in said
    assert len(running.receipts(dest)) == 1
    _until(lambda: not _session(process.pid), "processes are left")
    _again(slow, dest)


def test_a_home_that_does_not_exist(sources: Path, wanted: Tree, tmp_path: Path) -> None:
    home = tmp_path / "no" / "home"
    environment = {"HOME": str(home), "PATH": os.environ["PATH"]}
    command = _command("convert", sources, "--out", tmp_path / "out", "--shard-size", "1MiB", "--mix", 1,
                       "--max-quarantine", 1)  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "out") == wanted
    assert not home.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
