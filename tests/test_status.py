"""What can be known of a run from its destination alone: who works, who died, what is left, and what finishes it."""

import io
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sa1b_wds import cli, heartbeat
from sa1b_wds.convert import Job, Progress, read_plan
from sa1b_wds.errors import DataError, StorageError
from sa1b_wds.heartbeat import Beat, Heart, beat_name, read_beats
from sa1b_wds.objects import Bucket
from sa1b_wds.plan import Plan, Source, make_plan
from sa1b_wds.process import identity
from sa1b_wds.progress import duration, plan_lines, status_lines, watch
from sa1b_wds.status import GUESS, Rate, command, expected_rate, leave_error, read_status, run_reported
from sa1b_wds.storage import Destination

from . import making, running, servers
from .fault_proxy import FaultProxy

ROOT = Path(__file__).parents[1]
PROGRAM = [sys.executable, "-c", "from sa1b_wds.cli import run; run()"]


def call(*words: object) -> int:
    return cli.main([str(word) for word in words])


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    running.write(folder, {f"sa_{n}.tar": making.tar(making.pairs(range(5 * n + 1, 5 * n + 4))) for n in range(4)})
    return folder


@pytest.fixture
def job(sources: Path, tmp_path: Path) -> Job:
    return running.job_of(sorted(sources.iterdir()), tmp_path / "out", mix=1)


def states(job: Job, now: float | None = None) -> list[str]:
    return [task.state for task in read_status(job.destination, now=now or time.time()).tasks]


def beat(job: Job, task: int, **changes: Any) -> Beat:
    """A heartbeat of another machine, ten seconds old."""
    now = time.time() - 10
    made = Beat(
        task=task, host="node12", pid=4242, started=now - 100, now=now, bytes_read=5_000, bytes_total=10_240, samples=2,
        moved=now,
    )  # fmt: skip
    made = msgspec.structs.replace(made, **changes)
    job.destination.put(beat_name(task), msgspec.json.encode(made))
    return made


# ---- heartbeats ------------------------------------------------------------------------------------------------------


def test_a_task_is_heard_of_while_it_runs_and_remembered_when_it_is_done(job: Job) -> None:
    seen: list[tuple[list[str], Beat]] = []

    def report(progress: Progress) -> None:
        if not seen:
            seen.append((states(job), read_beats(job.destination, [0])[0]))

    assert states(job) == ["missing"] * 4
    run_reported(job, 0, report)
    during, said = seen[0]
    assert during == ["running", "missing", "missing", "missing"]
    assert (said.task, said.pid, said.ended, said.error) == (0, os.getpid(), False, None)
    assert states(job) == ["done", "missing", "missing", "missing"]
    after = read_beats(job.destination, [0])[0]
    assert after.ended
    assert after.bytes_read == after.bytes_total == job.plan.bytes_of(job.plan.tasks[0])
    assert 0 < after.now - after.started < 60
    run_reported(job, 0)  # done before: nothing that could be taken for a measurement
    assert read_beats(job.destination, [0]) == {}


def test_a_beat_comes_also_while_nothing_is_reported(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Publishing to a store takes minutes in which no byte is read."""
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.01)
    with running.undisturbed(), Heart(job.destination, 0, 100) as heart:
        heart.progressed(7, 1)
        until = time.monotonic() + 20
        while (said := read_beats(job.destination, [0])[0]).bytes_read != 7:
            assert time.monotonic() < until
        while read_beats(job.destination, [0])[0].now <= said.now:
            assert time.monotonic() < until
        assert read_beats(job.destination, [0])[0].moved == said.moved
        heart.end(1.0)


def test_the_last_words_are_the_last(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """A beat on its way must not come after them."""
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.001)
    put = Destination.put

    def slow(self: Destination, name: str, data: bytes) -> None:
        if threading.current_thread().name.startswith("heart"):
            time.sleep(0.1)
        put(self, name, data)

    monkeypatch.setattr(Destination, "put", slow)
    with Heart(job.destination, 0, 100) as heart:
        time.sleep(0.05)
        heart.failed("s: what")
    time.sleep(0.2)
    assert read_beats(job.destination, [0])[0].error == "s: what"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (DataError("a.tar: byte 7", "is cut", 2, 1), "a.tar: byte 7: is cut: expected 2, found 1"),
        (ZeroDivisionError("a bug"), "ZeroDivisionError: a bug"),
        (KeyboardInterrupt(), "stopped"),
        (KeyboardInterrupt("SIGUSR1"), "stopped by SIGUSR1"),
        (SystemExit(143), "stopped"),
    ],
)
def test_whatever_ends_a_task_is_its_last_word(
    job: Job, monkeypatch: pytest.MonkeyPatch, error: BaseException, words: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("sa1b_wds.status.run_task", fail)
    with pytest.raises(type(error)):
        run_reported(job, 2)
    task = read_status(job.destination, now=time.time()).tasks[2]
    assert (task.state, task.beat and task.beat.error) == ("failed", words)


def test_a_process_that_could_say_nothing(job: Job) -> None:
    last = beat(job, 1)
    leave_error(job, 1, StorageError("task 1", "its process ended by signal SIGKILL"))
    leave_error(job, 2, StorageError("task 2", "its process ended by signal SIGKILL"))
    said = read_beats(job.destination, [1, 2])
    assert (said[1].host, said[1].bytes_read, said[1].started) == (last.host, last.bytes_read, last.started)
    assert [s.error for s in said.values()] == [f"task {n}: its process ended by signal SIGKILL" for n in (1, 2)]
    assert states(job) == ["missing", "failed", "failed", "missing"]


def test_nothing_is_said_behind_a_data_set_that_is_published(job: Job) -> None:
    with Heart(job.destination, 0, 100) as heart:
        job.destination.put("manifest.json", b"{}")
        heart.end(1.0)
    assert job.destination.names() == ["manifest.json", "plan.json"]


def test_a_beat_that_cannot_be_written_or_read_fails_nobody(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise StorageError("x", "no")

    with monkeypatch.context() as patch:
        patch.setattr(Destination, "put", fail)
        run_reported(job, 0)
    job.destination.put(beat_name(1), b'{"task": ')
    assert states(job) == ["done", "missing", "missing", "missing"]


# ---- states ----------------------------------------------------------------------------------------------------------


def test_stale_is_who_was_not_heard_of_for_a_minute_or_has_ended_here(job: Job) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    now = time.time()
    beat(job, 0, now=now - 59)
    beat(job, 1, now=now - 61)
    beat(job, 2, now=now, process={**identity(), "pid": ended.pid})
    beat(job, 3, now=now, process=identity())
    assert states(job, now) == ["running", "stale", "stale", "running"]


def test_rates_and_the_time_left(job: Job) -> None:
    now = time.time()
    size = job.plan.bytes_of(job.plan.tasks[0])
    beat(job, 0, started=now - 20, now=now - 10, bytes_read=4_000)
    beat(job, 1, started=now - 30, now=now - 10, bytes_read=2_000)
    beat(job, 2, error="a.tar: no", bytes_read=3_000)
    overview = read_status(job.destination, now=now)
    assert overview.rate == pytest.approx(400 + 100)
    assert overview.bytes_left == overview.bytes_total - 6_000
    assert overview.seconds_left == pytest.approx((overview.bytes_total - 6_000) / 500)
    said = status_lines(overview)
    assert said[0] == "0 done, 2 running, 0 stale, 1 failed, 1 missing"
    assert "500 B/s, about " in said[1]
    assert said[2].startswith("task 2 failed: node12 pid 4242, since ")
    assert said[2].endswith(": a.tar: no")
    assert "39%, 400 B/s" in said[3], size
    assert said[5] == "left: --array=0-3 (of which 2 running now)"
    still = read_status(job.destination, now=now + 30)
    assert not [line for line in status_lines(still) if "no further" in line]
    beat(job, 0, started=now - 900, now=now, moved=now - 600)
    assert "no further for 10 min" in "\n".join(status_lines(read_status(job.destination, now=now)))


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (119, "119 s"), (125, "2 min"), (3_600, "1 h 00 min"), (7_500, "2 h 05 min"), (100_000, "1 d 03 h")],
)
def test_times_for_people(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_of_many_tasks_that_are_done_a_few_are_read(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = msgspec.structs.replace(job.plan, tasks=job.plan.tasks * 250)
    job.destination.remove("plan.json")
    job.destination.put("plan.json", plan.to_bytes())
    for task in range(1000):
        (job.destination.path("receipts")).mkdir(exist_ok=True)
        job.destination.path(f"receipts/task-{task:06d}.json").touch()
    for task in range(0, 1000, 1):
        path = job.destination.path(beat_name(task))
        path.parent.mkdir(exist_ok=True)
        done = Beat(task=task, host="n", pid=1, started=0, now=1, bytes_read=9, bytes_total=9, samples=1, ended=True)
        path.write_bytes(msgspec.json.encode(done))
    read: list[str] = []
    monkeypatch.setattr(Destination, "read", _recorded(Destination.read, read))
    overview = read_status(job.destination, now=time.time())
    assert overview.counts["done"] == 1000
    assert 16 <= len([name for name in read if ".state" in name]) <= 64


def _recorded(read: Callable[[Destination, str], bytes], names: list[str]) -> Callable[[Destination, str], bytes]:
    def recorded(self: Destination, name: str) -> bytes:
        names.append(name)
        return read(self, name)

    return recorded


# ---- the command -----------------------------------------------------------------------------------------------------


def test_what_is_left_for_a_shell(sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert call("plan", sources, "--out", out, "--mix", 1) == 0
    assert call("convert", sources, "--out", out, "--task", 1) == 0
    capsys.readouterr()
    assert call("status", out, "--left") == 0
    assert capsys.readouterr().out == "0,2-3\n"
    for task in (0, 2, 3):
        assert call("convert", sources, "--out", out, "--task", task) == 0
    capsys.readouterr()
    assert call("status", out, "--left") == 0
    assert capsys.readouterr().out == ""
    assert call("status", out) == 0
    assert capsys.readouterr().out == (
        f"4 done, 0 running, 0 stale, 0 failed, 0 missing\nfinish: sa1b-wds finalize {out}\n"
    )
    assert call("finalize", out) == 0
    capsys.readouterr()
    assert call("status", out) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{out}: published"


def test_a_killed_run_prints_the_command_that_finishes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed, and its workers with it: the line `finish:` typed into a shell makes the whole data set."""
    # Two sources, the second one endless until it is replaced: the kill comes when the first task is done.
    data = making.tar(making.pairs(range(1, 4)))
    running.write(tmp_path / "my in", {"sa_0.tar": data, "sa_1.tar": making.tar(making.pairs(range(5, 8)))})
    whole = (tmp_path / "my in/sa_1.tar").read_bytes()
    out = tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    assert call("plan", "my in", "--out", out, "--mix", 1, "--shard-size", "2MiB") == 0
    order = [read_plan(Destination(str(out))).tasks[n].sources[0] for n in (0, 1)]
    last = tmp_path / "my in" / f"sa_{order[1]}.tar"
    whole = last.read_bytes()
    last.unlink()
    os.mkfifo(last)
    words = ["convert", "my in", "--out", str(out), "--mix", "1", "--shard-size", "2MiB", "--workers", "1"]
    process = subprocess.Popen(
        [*PROGRAM, *words, "--assume-size", str(len(whole))], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    hold = os.open(last, os.O_RDWR)  # it has a writer, who writes nothing
    destination = Destination(str(out))
    until = time.monotonic() + 60
    while [t.state for t in read_status(destination, now=time.time()).tasks] != ["done", "running"]:
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    os.close(hold)
    last.unlink()
    last.write_bytes(whole)
    monkeypatch.chdir(ROOT)
    capsys.readouterr()
    assert call("status", out) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "1 done, 0 running, 1 stale, 0 failed, 0 missing"  # at once: its process is known to have ended
    assert "left: --array=1" in said
    (line,) = [line.removeprefix("finish: ") for line in said if line.startswith("finish: ")]
    assert f"or: sbatch --array=$(sa1b-wds status {out} --left) JOB && sa1b-wds finalize {out}" in said
    typed = line.replace("sa1b-wds convert", shlex.join([*PROGRAM, "convert"]))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run(typed, shell=True, env=environment, stdout=subprocess.DEVNULL).returncode == 0
    running.check_accounts(out)
    assert len(running.samples(out)) == 6
    assert call("status", out) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{out}: published"


def test_a_run_that_nobody_heard_of_has_the_plan_s_options(sources: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert call("plan", sources, "--out", out, "--mix", 2, "--seed", 7, "--max-side", 20) == 0
    line = read_status(Destination(str(out)), now=time.time()).commands[0]
    assert line == f"sa1b-wds convert SOURCES --out {out} --mix 2 --seed 7 --max-side 20"
    assert call(*shlex.split(line.replace("SOURCES", str(sources)))[1:]) == 0


def test_a_command_has_no_secret() -> None:
    from sa1b_wds.config import Convert

    given = Convert(
        sources=["https://me:word@h/sa_1.tar?sig=abc", "pipe:curl -H 'Token: abc' h/sa_2.tar"],
        out="s3://b/x",
        workers=3,
    )
    line = command(given)
    assert "word" not in line
    assert "abc" not in line
    assert shlex.split(line)[-4:] == ["--out", "s3://b/x", "--workers", "3"]


def test_partial_says_whom_it_publishes_without(job: Job, capsys: pytest.CaptureFixture[str], sources: Path) -> None:
    run_reported(job, 0)
    beat(job, 1)
    beat(job, 2, error="a.tar: no")
    where = job.destination.where
    assert call("finalize", where, "--partial") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("task 1 is at work, on node12 pid 4242 (49%): published without it")
    assert len(said) == 2
    for task in (1, 2, 3):
        run_reported(job, task)
    assert call("finalize", where) == 0
    assert capsys.readouterr().out.count("at work") == 0
    running.check_accounts(Path(where))


# ---- watching --------------------------------------------------------------------------------------------------------


def test_watching_ends_when_all_is_done(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        for task in range(4):
            run_reported(job, task)

    worker = threading.Thread(target=work)
    worker.start()
    assert call("status", job.destination.where, "--watch", "0.1") == 0
    worker.join()
    said = capsys.readouterr().out
    assert "4 done, 0 running, 0 stale, 0 failed, 0 missing" in said.splitlines()
    assert call("status", job.destination.where, "--watch", "--json") == 0
    assert msgspec.json.decode(capsys.readouterr().out)["counts"]["done"] == 4


def test_ctrl_c_ends_the_looking_quietly(job: Job) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            [*PROGRAM, "status", job.destination.where, "--watch", "60"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
    finally:
        signal.signal(signal.SIGINT, before)
    assert process.stdout is not None
    assert process.stdout.readline() == b"0 done, 0 running, 0 stale, 0 failed, 4 missing\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=20)
    assert (process.returncode, error) == (0, b"")


def test_a_terminal_is_redrawn_and_anything_else_gets_blocks() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for out in (Terminal(), io.StringIO()):
        texts = iter([("one\nfirst", False), ("two\nsecond", False), ("three\nlast", True)])
        waited: list[float] = []
        watch(lambda texts=texts: next(texts), 7.0, out, waited.append)  # type: ignore[misc]
        assert waited == [7.0, 7.0]
        written = out.getvalue()
        assert "last" in written
        assert ("\x1b[" in written) == isinstance(out, Terminal)
    assert written == "one\nfirst\ntwo\nsecond\nthree\nlast\n"


# ---- on object storage -----------------------------------------------------------------------------------------------


def test_a_thousand_tasks_in_a_bucket_take_a_few_requests(
    s3: servers.Server, job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = f"s3://{servers.BUCKET}/status-of-many"
    plan = msgspec.structs.replace(job.plan, tasks=job.plan.tasks * 100)
    with FaultProxy(s3.address) as proxy:
        for name, value in s3.environment(proxy.url).items():
            monkeypatch.setenv(name, value)
        bucket = Bucket(place)
        bucket.put("plan.json", plan.to_bytes())
        for task in range(0, 400, 8):
            bucket.put(f"receipts/task-{task:06d}.json", b"{}")
        said = beat(job, 1)
        for task in (1, 2, 3):
            about = msgspec.structs.replace(said, task=task, now=time.time(), error="x: no" if task == 3 else None)
            bucket.put(beat_name(task), msgspec.json.encode(about))
        before = len(proxy.requests)
        assert call("status", place, "--json") == 0
        requests = [(r.method, r.path) for r in proxy.requests[before:]]
    found = msgspec.json.decode(capsys.readouterr().out)
    assert found["counts"] == {"done": 50, "running": 2, "stale": 0, "failed": 1, "missing": 347}
    assert found["left"].startswith("1-7,9-15,")
    assert len([r for r in requests if "list-type=2" in r[1]]) == 2, requests
    assert len(requests) <= 2 + 2 * 4 + 2, requests  # the plan and three beats take two each


@pytest.mark.slow
def test_a_run_in_a_bucket_from_its_first_beat_to_its_end(
    s3: servers.Server, sources: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    place = f"s3://{servers.BUCKET}/status-of-a-run"
    assert call("plan", sources, "--out", place, "--mix", 1) == 0
    assert call("convert", sources, "--out", place, "--task", 0) == 0
    plan = read_plan(Destination(place))
    broken = sources / plan.sources[plan.tasks[1].sources[0]].name
    sound = broken.read_bytes()
    broken.write_bytes(sound[:1024] + b"?" * (len(sound) - 1024))
    assert call("convert", sources, "--out", place, "--task", 1) == 1
    capsys.readouterr()
    assert call("status", place) == 0
    said = capsys.readouterr().out
    assert said.startswith("1 done, 0 running, 0 stale, 1 failed, 2 missing\n")
    assert f"{broken}: byte " in said
    assert "left: --array=1-3\n" in said
    broken.write_bytes(sound)
    (line,) = [line.removeprefix("finish: ") for line in said.splitlines() if line.startswith("finish: ")]
    assert call(*shlex.split(line)[1:]) == 0
    assert call("status", place) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{place}: published"
    assert not [name for name in Bucket(place).names() if name.startswith(".state")]


# ---- what a plan costs -----------------------------------------------------------------------------------------------


def archive(mix: int, tars: int = 8, size: int = 11_300_000_000) -> Plan:
    sources = [Source(name=f"sa_{n:06d}.tar", size=size) for n in range(tars)]
    return make_plan(sources, shard_size=1 << 30, mix=mix, seed=0)


def test_a_plan_says_what_it_costs() -> None:
    lines = plan_lines(archive(4), Rate(rate=200e6, basis="a guess"))
    assert lines == [
        "a task: up to 3 min at 200 MB/s (a guess), 12.1 GB of scratch with the usual --pairing-buffer; all of them: "
        "0.13 task hours"
    ]
    assert "no scratch" in plan_lines(archive(1, size=1 << 30), Rate(rate=200e6, basis="a guess"))[0]


def test_tasks_that_outlast_a_machine_that_may_be_taken_back_are_warned_of() -> None:
    slow = Rate(rate=6_200_000, basis="a guess")
    assert len(plan_lines(archive(4), slow)) == 2
    assert "2 h 01 min" in plan_lines(archive(4), slow)[1]
    assert "a smaller --mix" in plan_lines(archive(4), slow)[1]
    assert len(plan_lines(archive(3), slow)) == 1
    assert "take machines that stay" in plan_lines(archive(1), Rate(rate=1e6, basis="a guess"))[1]


def test_what_the_rate_is_based_on(job: Job, sources: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where, now = job.destination, time.time()
    empty = Destination(f"{where.where}-none")
    assert expected_rate(empty, None, now=now).rate == GUESS
    assert expected_rate(where, None, now=now).rate == GUESS
    beat(job, 1, started=now - 20, now=now - 10, bytes_read=4_000)
    running_ = expected_rate(where, None, now=now)
    assert running_.rate == pytest.approx(400)
    assert running_.basis == "the median of 1 running task"
    run_reported(job, 0)
    done = read_beats(where, [0])[0]
    measured = expected_rate(where, None, now=now)
    assert measured.rate == pytest.approx(done.rate)
    assert measured.basis == "the median of 1 finished task"
    assert expected_rate(where, 7, now=now) == Rate(rate=7, basis="as --rate says")
    options = ("--out", where.where, "--mix", 1, "--shard-size", "1MiB", "--dry-run")
    assert call("plan", sources, *options) == 0
    assert "(the median of 1 finished task), no scratch" in capsys.readouterr().out
    assert call("plan", sources, *options, "--rate", "1") == 0
    said = capsys.readouterr().out
    assert "(as --rate says)" in said
    assert "warning: a task of " in said
