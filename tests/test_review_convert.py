"""The converter at its edges: what is said on the command line, how jobs share tasks, and what a finalize believes."""

import hashlib
import os
import resource
import signal
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sa1b_wds import engines
from sa1b_wds.cli import INDEX_VARIABLES, main, tasks_of
from sa1b_wds.convert import Outcome, Progress, read_plan, run_task
from sa1b_wds.errors import Sa1bError, StorageError, UsageError
from sa1b_wds.heartbeat import Beat
from sa1b_wds.plan import Source, make_plan
from sa1b_wds.publication import finalize
from sa1b_wds.sample import Rejected
from sa1b_wds.shard import Quarantine
from sa1b_wds.storage import Destination, expand

from . import making, running


def tars(folder: Path, *names: str, samples: int = 3) -> Path:
    """A folder of sources with images of their own."""
    sources = {
        name: making.tar(making.pairs(range(i * samples + 1, (i + 1) * samples + 1))) for i, name in enumerate(names)
    }
    running.write(folder, sources)
    return folder


def call(*arguments: object) -> int:
    return main([str(a) for a in arguments])


# ------------------------------------------------------------------------------------------------ how jobs share tasks


@pytest.mark.parametrize("name", INDEX_VARIABLES)
def test_auto_takes_the_index_of_every_batch_system(name: str) -> None:
    assert tasks_of("auto", 10, {name: "3"}) == [3]
    with pytest.raises(UsageError, match=rf"{name}: beyond the plan's tasks: expected 0 to 9, found 10"):
        tasks_of("auto", 10, {name: "10"})


@pytest.mark.parametrize("index", ["", "-1", "one", "²", "٣", "1.0", " 1", "9" * 30])
def test_an_index_that_is_none_is_one_line(index: str) -> None:
    with pytest.raises(UsageError):
        tasks_of("auto", 10, {"JOB_COMPLETION_INDEX": index})
    with pytest.raises(UsageError, match="not a task of the plan"):
        tasks_of(index, 10, {})


def test_two_batch_systems_at_once_are_refused() -> None:
    with pytest.raises(UsageError, match="SLURM_ARRAY_TASK_ID and CLOUD_RUN_TASK_INDEX are set"):
        tasks_of("auto", 10, {"SLURM_ARRAY_TASK_ID": "1", "CLOUD_RUN_TASK_INDEX": "1"})


SLURM = {"SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "2"}


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("SLURM_ARRAY_TASK_ID", SLURM),
        ("CLOUD_RUN_TASK_INDEX", {"CLOUD_RUN_TASK_COUNT": "3"}),
        *((name, {"SA1B_WDS_JOBS": "3"}) for name in INDEX_VARIABLES),
    ],
)
def test_fewer_jobs_than_tasks_share_all_of_them(name: str, more: dict[str, str]) -> None:
    shares = [tasks_of("auto", 10, {name: str(i), **more}) for i in range(3)]
    assert shares[1] == [1, 4, 7]
    assert sorted(task for share in shares for task in share) == list(range(10))


def test_an_array_that_names_its_tasks_does_these_alone() -> None:
    """`left: --array=2,5,8` of `status`: three jobs, which are not a third of the work each."""
    array = {"SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "2", "SLURM_ARRAY_TASK_MAX": "8"}
    for i in (2, 5, 8):
        assert tasks_of("auto", 10, {"SLURM_ARRAY_TASK_ID": str(i), **array}) == [i]


@pytest.mark.parametrize("jobs", ["zwei", "0", "-3", "²"])
def test_a_number_of_jobs_that_is_none_is_not_passed_over(jobs: str) -> None:
    with pytest.raises(UsageError, match="SA1B_WDS_JOBS: not a number of jobs"):
        tasks_of("auto", 10, {"AWS_BATCH_JOB_ARRAY_INDEX": "0", "SA1B_WDS_JOBS": jobs})


def test_jobs_that_count_from_one_are_refused() -> None:
    with pytest.raises(UsageError, match="indices begin with 0"):
        tasks_of("auto", 10, {"AWS_BATCH_JOB_ARRAY_INDEX": "3", "SA1B_WDS_JOBS": "3"})


def test_auto_from_the_environment_to_the_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources, out = tars(tmp_path / "in", "sa_0.tar", "sa_1.tar", "sa_2.tar"), tmp_path / "out"
    assert call("plan", sources, "--out", out, "--mix", 1) == 0
    monkeypatch.setenv("CLOUD_RUN_TASK_COUNT", "2")
    for i in range(2):
        monkeypatch.setenv("CLOUD_RUN_TASK_INDEX", str(i))
        assert call("convert", sources, "--out", out, "--task", "auto") == 0
    assert call("finalize", out) == 0
    running.check_accounts(out)
    assert len(running.samples(out)) == 9


# --------------------------------------------------------------------------------------------------- the command line


def test_a_task_refuses_two_sources_of_one_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Or the second would be converted in the place of the first."""
    sources, other, out = tars(tmp_path / "in", "sa_0.tar"), tars(tmp_path / "other", "sa_0.tar"), tmp_path / "out"
    assert call("plan", sources, "--out", out) == 0
    assert call("convert", sources, other, "--out", out, "--task", 0) == 2
    assert f"{other}/sa_0.tar: a second source named sa_0.tar, beside {sources}/sa_0.tar" in capsys.readouterr().err
    running.check_no_trace(out)


def test_a_task_holds_its_config_against_the_plan_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources, out, config = tars(tmp_path / "in", "sa_0.tar"), tmp_path / "out", tmp_path / "c.toml"
    assert call("plan", sources, "--out", out, "--mix", 2) == 0
    config.write_text(f'[plan]\nsources = ["{sources}"]\nout = "{out}"\nmix = 3\n')
    assert call("convert", "--config", config, "--task", 0) == 2
    assert "plan.json: another plan is there: mix is 2 in it, 3 here" in capsys.readouterr().err
    assert call("convert", "--config", config, "--task", 0, "--mix", 2) == 0


@pytest.mark.parametrize("task", [None, 0])
def test_a_source_in_the_destination_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], task: int | None
) -> None:
    """Below it readers take every tar for a shard."""
    sources = tars(tmp_path / "in", "sa_0.tar")
    if task is not None:
        running.job_of([sources / "sa_0.tar"], sources)
    before = running.tree(sources)
    more = () if task is None else ("--task", task)
    assert call("convert", tmp_path / "in" / "sa_0.tar", "--out", sources, *more) == 2
    assert "a source in" in capsys.readouterr().err
    assert running.tree(sources) == before
    assert call("convert", sources, "--out", sources / "shards") == 0  # the other way round is fine


@pytest.mark.parametrize("arguments", [("IN", "--out", ""), ("", "--out", "OUT")])
def test_an_empty_word_is_not_the_folder_one_is_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    """`--out "$DEST"` where DEST is not set."""
    here = tars(tmp_path / "IN", "sa_0.tar")
    monkeypatch.chdir(here)
    words = [str(tmp_path / a) if a.isupper() else a for a in arguments]
    assert call("convert", *words) == 2
    assert [p.name for p in here.iterdir()] == ["sa_0.tar"]


@pytest.mark.parametrize("words", [(), ("",)])
def test_a_comparison_with_nothing_is_not_a_success(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    """`--against $SOURCES` where SOURCES is not set."""
    assert call("convert", tars(tmp_path / "in", "sa_0.tar"), "--out", tmp_path / "out") == 0
    assert call("verify", tmp_path / "out", "--against", *words) == 2
    assert "--against: is missing" in capsys.readouterr().err


def test_an_empty_path_in_an_option_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("restore", tmp_path, "--out", "") == 2
    assert "--out: wrong value: expected a path" in capsys.readouterr().err


def test_one_failed_task_is_an_exit_code_not_an_exception(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = tmp_path / "in"
    running.write(sources, {"sa_0.tar": b"x" * 600})
    assert call("convert", sources, "--out", tmp_path / "out") == 1
    assert "not a tar header" in capsys.readouterr().err


def test_options_that_no_task_can_run_with_are_exit_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = tars(tmp_path / "in", "sa_0.tar", "sa_1.tar")
    monkeypatch.setattr("sa1b_wds.convert.is_memory", lambda folder: True)
    words = ("--out", tmp_path / "out", "--mix", 1, "--pairing-buffer", 1, "--workers", 1)
    assert call("convert", sources, *words) == 2


def test_a_folder_that_is_not_utf8(tmp_path: Path) -> None:
    """An error that names it must still fit into a heartbeat."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    running.write(folder, {"sa_0.tar": making.tar(making.pairs([1]))[:700]})
    assert call("convert", folder, "--out", tmp_path / "out") == 1
    assert b"\\\\udcff" in next((tmp_path / "out" / ".state").glob("task-*.json")).read_bytes()


# ------------------------------------------------------------------------------------------------------------- sources


@pytest.mark.parametrize("name", ["a{b", "a}b", "a{1..3}b", r"a\b", "a{b,c}", "a b", "ä"])
def test_a_path_that_is_there_is_taken_as_it_stands(tmp_path: Path, name: str) -> None:
    folder = tars(tmp_path / name, "sa_0.tar")
    assert expand([str(folder)]) == [str(folder / "sa_0.tar")] == expand([str(folder / "sa_0.tar")])


def test_braces_that_do_not_match_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="its braces do not match"):
        expand([str(tmp_path / "sa_{000000.tar")])


def test_a_list_in_braces_may_be_longer_than_a_name(tmp_path: Path) -> None:
    many = ",".join(f"sa_{i:06d}" for i in range(100))
    assert len(expand([f"{tmp_path}/{{{many}}}.tar"])) == 100


def test_a_fifo_has_no_length_until_one_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "sa_0.tar")
    assert call("plan", tmp_path / "sa_0.tar", "--out", tmp_path / "out") == 1
    assert "its length is not known: give --assume-size" in capsys.readouterr().err
    assert call("plan", tmp_path / "sa_0.tar", "--out", tmp_path / "out", "--assume-size", "1GiB") == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_a_folder_that_may_not_be_looked_into(tmp_path: Path) -> None:
    closed = tars(tmp_path / "closed", "sa_0.tar")
    closed.chmod(0)
    tmp_path.chmod(0o755)
    if (child := os.fork()) == 0:
        code = 1
        try:
            for folder in [closed, *closed.parents]:
                if folder.name.startswith("pytest"):
                    folder.chmod(0o755)
            os.setuid(65534)
            for act in (lambda: expand([str(closed / "in")]), lambda: Destination(str(closed)).exists("plan.json")):
                try:
                    act()
                except Sa1bError:
                    continue
                break
            else:
                code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


# ------------------------------------------------------------------------------------------------------ plan and tasks


def test_more_shards_than_numbers_are_refused() -> None:
    sources = [Source(name=f"{i}.tar", size=1 << 41) for i in range(2)]
    with pytest.raises(UsageError, match="--shard-size: too small"):
        make_plan(sources, shard_size=1 << 20, mix=1, seed=0)


def test_many_shards_may_be_open_at_once(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    shards = 200
    paths = running.write(tmp_path / "in", {"a.tar": making.tar(making.pairs(range(1, shards + 1), annotations=0))})
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, limits[1]))
        manifest = running.convert(paths, tmp_path / "out", shards=shards)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert manifest.totals.shards == shards


def test_more_shards_than_may_be_open_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = running.write(tmp_path / "in", {"a.tar": making.tar(making.pairs([1, 2, 3]))})
    monkeypatch.setattr(resource, "getrlimit", lambda which: (64, 64))
    job = running.job_of(paths, tmp_path / "out", shards=3)
    with pytest.raises(UsageError, match="--shard-size or a smaller --mix: expected 131 files, found 64"):
        run_task(job, 0)
    running.check_no_trace(tmp_path / "out")


def test_a_worker_that_died_idle_costs_its_next_task_alone(tmp_path: Path) -> None:
    paths = running.write(tmp_path / "in", {f"{i}.tar": making.tar(making.pairs([i + 1])) for i in range(2)})
    job = running.job_of(paths, tmp_path / "out", mix=1)
    with engines._Pool(job, 1) as pool:
        process = pool._workers[0].process
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        ends = list(pool.run([0, 1], lambda progress: None))
    assert isinstance(ends[0], engines.Failure)
    assert "SIGKILL" in str(ends[0].error)
    assert isinstance(ends[1], Outcome)


@pytest.mark.parametrize("damage", [lambda rows: rows[:-1], lambda rows: rows[:-24], lambda rows: b"\7" + rows[1:]])
def test_finalize_makes_no_key_index_of_rows_that_changed(tmp_path: Path, damage: Any) -> None:
    """They would be vouched for by a manifest that is right about everything else."""
    paths = running.write(tmp_path / "in", {"a.tar": making.tar(making.pairs(range(1, 5)))})
    job = running.job_of(paths, tmp_path / "out")
    run_task(job, 0)
    rows = next((tmp_path / "out" / "index").glob("*.rows"))
    rows.write_bytes(damage(rows.read_bytes()))
    with pytest.raises(StorageError, match=r"\.rows: has changed since its receipt"):
        finalize(job.destination)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_quarantine_does_not_grow_in_memory(tmp_path: Path) -> None:
    """A line each of a million members would be a gigabyte."""
    destination = Destination(str(tmp_path))
    with destination.attempt("task-000000") as attempt:
        quarantine = Quarantine(outlet=attempt, stem="quarantine/task-000000")
        for i in range(2000):
            quarantine.add(
                Rejected(source="a.tar", name=f"{i}.jpg", offset=i * 512, key="x", reason="no good", data=None)
            )
            assert len(quarantine._lines) < 1 << 17
        facts = quarantine.finish()
        attempt.publish("receipts/task-000000.json", b"{}")
    for fact in facts:
        data = (tmp_path / fact.name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (fact.bytes, fact.sha256)
    lines = (tmp_path / facts[1].name).read_bytes().splitlines()
    assert len(lines) == 2000
    assert len(set(lines)) == 2000


def test_stopping_restore_does_not_promise_what_it_will_not_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sa1b_wds.restore.restore", stop)
    monkeypatch.setattr("sa1b_wds.publication.finalize", stop)
    assert call("restore", tmp_path, "--out", tmp_path / "x") == 130
    assert "again" not in capsys.readouterr().err
    assert call("finalize", tmp_path) == 130
    assert "run the same command again" in capsys.readouterr().err


def test_a_task_says_that_it_is_alive_before_it_has_a_sample(tmp_path: Path) -> None:
    """With all jpgs before all jsons the first sample comes when most has been read."""
    data = making.tar(making.pairs(range(1, 4)))
    fifo = tmp_path / "sa_0.tar"
    os.mkfifo(fifo)
    plan = make_plan([Source(name=fifo.name, size=len(data))], shard_size=1 << 20, mix=1, seed=0)
    job = running.job_of([fifo], tmp_path / "out", plan=plan)
    said: list[Progress] = []
    alive = threading.Event()

    def write() -> None:
        with fifo.open("wb") as pipe:
            pipe.write(data[:600])
            pipe.flush()
            alive.wait(30)
            pipe.write(data[600:])

    def report(progress: Progress) -> None:
        said.append(progress)
        if len(said) == 2:
            alive.set()

    writer = threading.Thread(target=write)
    writer.start()
    run_task(job, 0, report)
    writer.join()
    assert [p.samples for p in said[:2]] == [0, 0]
    assert said[1].bytes_read == 600
    assert said[-1].samples == 3


def test_status_tells_done_running_stale_failed_and_missing_tasks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources, out = tars(tmp_path / "in", *(f"sa_{i}.tar" for i in range(5))), tmp_path / "out"
    assert call("plan", sources, "--out", out, "--mix", 1) == 0
    plan = read_plan(Destination(str(out)))
    assert call("convert", sources, "--out", out, "--task", 0) == 0
    broken = sources / plan.sources[plan.tasks[1].sources[0]].name
    broken.write_bytes(broken.read_bytes()[:-1024] + b"?" * 1024)
    assert call("convert", sources, "--out", out, "--task", 1) == 1
    beat = msgspec.json.decode((out / ".state" / "task-000001.json").read_bytes(), type=Beat)
    for task, now in ((2, time.time()), (3, time.time() - 61)):
        alive = msgspec.structs.replace(beat, task=task, error=None, now=now, process={})
        (out / ".state" / f"task-{task:06d}.json").write_bytes(msgspec.json.encode(alive))
    capsys.readouterr()
    assert call("status", out) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "1 done, 1 running, 1 stale, 1 failed, 1 missing"
    assert said[2].startswith("task 1 failed: ")
    assert f"{broken}: byte " in said[2]
    assert "left: --array=1-4 (of which 1 running now)" in said
    assert call("status", out, "--json") == 0
    rows = msgspec.json.decode(capsys.readouterr().out)
    assert [row["state"] for row in rows["tasks"]] == ["done", "failed", "running", "stale", "missing"]
    assert rows["left"] == "1-4"


def test_a_batch_log_has_a_line_a_shard_and_the_accounts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("convert", tars(tmp_path / "in", "sa_0.tar"), "--out", tmp_path / "out") == 0
    said = capsys.readouterr()
    assert "sa1b-train-000000.tar: 3 samples, 6 masks, " in said.err
    assert "task 0: 7 members in, 3 samples out, 0 quarantined, 1 ignored, " in said.err
    assert said.out.endswith("3 images, 6 masks in 1 shards; largest/smallest 1.000; 0 members quarantined\n")
