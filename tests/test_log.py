"""What a conversion says: sentences, or one JSON object a line, errors and the end included."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from sa1b_wds import cli
from sa1b_wds.convert import read_plan
from sa1b_wds.errors import DataError
from sa1b_wds.heartbeat import read_beats
from sa1b_wds.log import Log
from sa1b_wds.storage import Destination

from . import making, running
from .making import Member


def call(*words: object) -> int:
    return cli.main([str(word) for word in words])


def events(said: str) -> list[dict[str, Any]]:
    """Every line is an object."""
    return [json.loads(line) for line in said.splitlines()]


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    bad = [Member("sa_99.json", b"{"), Member("notes.txt", b"hello")]
    tars = {n: making.pairs(range(5 * n + 1, 5 * n + 4)) + (bad if n == 0 else []) for n in range(2)}
    running.write(folder, {f"sa_{n}.tar": making.tar(members) for n, members in tars.items()})
    return folder


@pytest.mark.parametrize("workers", [1, 2])
def test_a_whole_run_in_objects(
    sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    out = tmp_path / "out"
    options = ("--mix", 1, "--max-quarantine", 1, "--log-format", "json", "--workers", workers)
    assert call("convert", sources, "--out", out, *options) == 0
    said = capsys.readouterr()
    assert said.out == ""
    lines = events(said.err)
    assert [line["event"] for line in lines] == ["plan", "shard", "task", "shard", "task", "published"]
    assert all(datetime.fromisoformat(line["time"]).utcoffset() is not None for line in lines)
    plan, *rest, published = lines
    assert (plan["sources"], plan["shards"], plan["tasks"], plan["done"]) == (2, 2, 2, 0)
    shards = {line["shard"]: line for line in rest if line["event"] == "shard"}
    tasks = {line["task"]: line for line in rest if line["event"] == "task"}
    for receipt in running.receipts(out):
        told = tasks[receipt.task]
        assert told["sources"] == [s.name for s in receipt.sources]
        assert told["members"] == sum(s.members for s in receipt.sources)
        assert told["samples"] == sum(s.samples for s in receipt.sources) == 3
        assert told["quarantined"] == sum(s.quarantined for s in receipt.sources)
        assert told["ignored"] == sum(sum(s.ignored.values()) for s in receipt.sources)
        assert told["bytes"] == sum((sources / s.name).stat().st_size for s in receipt.sources)
        assert told["bytes_written"] == sum(s.bytes for s in receipt.shards)
        assert told["mb_per_second"] == pytest.approx(told["bytes"] / told["seconds"] / 1e6, rel=1e-2)
        assert told["peak_memory"] > 10e6
        for shard in receipt.shards:
            line = shards[shard.name]
            assert (line["task"], line["samples"], line["bytes"]) == (receipt.task, shard.samples, shard.bytes)
            assert (out / shard.name).stat().st_size == shard.bytes
    assert sorted(t["quarantined"] for t in tasks.values()) == [0, 1]
    assert published["samples"] == 6
    assert call("convert", sources, "--out", out, *options) == 0
    assert [line["event"] for line in events(capsys.readouterr().err)] == ["plan", "published"]
    assert call("convert", sources, "--out", out, "--task", 0, "--log-format", "json") == 0
    assert [(line["event"], line["done_before"]) for line in events(capsys.readouterr().err)] == [("task", True)]


def test_errors_in_objects(sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, json_ = tmp_path / "out", ("--log-format", "json")
    broken = sources / "sa_1.tar"
    broken.write_bytes(broken.read_bytes()[:-1024])
    options = ("--mix", 1, "--max-quarantine", 1, *json_)
    assert call("convert", sources, "--out", out, *options) == 1
    lines = events(capsys.readouterr().err)
    failed = [line for line in lines if line["event"] == "error"]
    assert [line.get("task") for line in failed] == [failed[0]["task"], None]
    assert failed[0]["kind"] == "SourceDamaged"
    assert failed[0]["where"].startswith(f"{broken}: byte ")
    assert failed[0]["message"].startswith(failed[0]["where"])
    assert "1 of 2 tasks failed" in failed[1]["what"]
    assert call("convert", sources, "--out", out, "--seed", 5, *options) == 2
    (line,) = events(capsys.readouterr().err)
    assert (line["event"], line["kind"]) == ("error", "PlanMismatch")
    assert call("convert", tmp_path / "nothing", "--out", out, *json_) == 1
    (line,) = events(capsys.readouterr().err)
    assert (line["event"], line["kind"]) == ("error", "NotFound")


def test_being_stopped_in_objects(tmp_path: Path) -> None:
    fifo = tmp_path / "sa_0.tar"
    os.mkfifo(fifo)
    hold = os.open(fifo, os.O_RDWR)
    command = [
        sys.executable,
        "-c",
        "from sa1b_wds.cli import run; run()",
        "convert",
        str(fifo),
        "--assume-size",
        "9999",
    ]
    command += ["--out", str(tmp_path / "out"), "--workers", "1", "--log-format", "json"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    destination = Destination(str(tmp_path / "out"))
    until = time.monotonic() + 60
    while not read_beats(destination, [0]) and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    os.close(hold)  # else the thread that reads would wait for a writer's bytes
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    last = events(said)[-1]
    assert (last["event"], last["by"]) == ("stopped", "SIGTERM")


def test_what_cannot_be_json(capsys: pytest.CaptureFixture[str]) -> None:
    out = io.StringIO()
    Log("json", out).error(DataError("a\udcff.tar", "what", "x\udcff", 3), 4)
    (line,) = events(out.getvalue())
    assert (line["where"], line["expected"], line["found"], line["task"]) == ("a\\udcff.tar", "x\\udcff", "3", 4)


def test_no_secret_in_an_object() -> None:
    out = io.StringIO()
    log = Log("json", out, now=lambda: datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC))
    log.error(DataError("https://me:word@h/x.tar?sig=abc", "what"))
    assert "abc" not in out.getvalue()
    assert "word" not in out.getvalue()
    assert out.getvalue().startswith('{"time":"2026-01-02T03:04:05.000Z","event":"error",')


# ---- the size of a source --------------------------------------------------------------------------------------------


def test_a_task_takes_only_the_file_that_was_planned(
    sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert call("plan", sources, "--out", out, "--mix", 1) == 0
    plan = read_plan(Destination(str(out)))
    path = sources / plan.sources[plan.tasks[1].sources[0]].name
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(512))
    assert call("convert", sources, "--out", out, "--task", 1, "--max-quarantine", 1) == 2
    said = capsys.readouterr().err
    assert f"{path}: another file than was planned" in said
    assert f"expected {len(whole):,}, found {len(whole) + 512:,}" in said
    beat = read_beats(Destination(str(out)), [1])[1]
    assert beat.error is not None
    assert "another file than was planned" in beat.error
    path.write_bytes(whole)
    assert call("convert", sources, "--out", out, "--task", 1, "--max-quarantine", 1) == 0
    path.write_bytes(b"")  # it is done: nobody looks at it again
    assert call("convert", sources, "--out", out, "--task", 1, "--max-quarantine", 1) == 0
    path.unlink()
    assert call("convert", sources, "--out", out, "--task", 1, "--max-quarantine", 1) == 0


def test_an_assumed_size_is_not_held_against_what_has_none(tmp_path: Path) -> None:
    whole = tmp_path / "sa_0.tar"
    whole.write_bytes(making.tar(making.pairs(range(1, 4))))
    source = f"pipe:cat {whole}"
    assert call("plan", source, "--out", tmp_path / "out", "--assume-size", "5MiB") == 0
    assert call("convert", source, "--out", tmp_path / "out", "--task", 0) == 0


def test_a_better_copy_of_a_source_is_taken_when_it_is_named(
    sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tar that was damaged, and is whole now, must not cost the tasks that are done."""
    out = tmp_path / "out"
    whole = {path.name: path.read_bytes() for path in sources.iterdir()}
    name = sorted(whole)[-1]
    (sources / name).write_bytes(whole[name][: len(whole[name]) // 2])
    call_once = ("convert", sources, "--out", out, "--mix", 1, "--workers", 1, "--max-quarantine", 1)
    assert call(*call_once) == 1
    (sources / name).write_bytes(whole[name])
    assert call(*call_once) == 2  # another plan, since a size differs
    assert call(*call_once, "--replaced", "sa_999999.tar") == 2
    assert "sa_999999.tar is not a source of a plan that is there" in capsys.readouterr().err
    done = {path.name: path.stat().st_ino for path in out.glob("*.tar")}
    assert done
    assert call(*call_once, "--replaced", name) == 0
    assert {path.name: path.stat().st_ino for path in out.glob("*.tar")}.items() > done.items()
    assert call("verify", out, "--deep", "--against", sources) == 0
