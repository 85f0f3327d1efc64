"""Conversions and training as jobs of a real Slurm: killed, requeued, preempted, doubled, out of time, on dying nodes.

Whatever happens, the data set has the bytes that the embedded engine gives it, and nothing is left over. The sources
come from a web server that holds back the second half of a tar until it is told: so each task is hit in its middle.
"""

import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from sa1b_wds.plan import Plan, Source, make_plan
from sa1b_wds.status import read_status
from sa1b_wds.storage import Destination

from . import making, running, slurm
from .fault_proxy import Fault, FaultProxy, Request
from .slurm import ENDED, ROOT, Slurm, until

pytestmark = pytest.mark.slow

SCRIPTS = ROOT / "scripts/slurm"
SMALL = {"SA1B_WDS_WINDOW": "16384", "SA1B_WDS_AHEAD": "65536", "SA1B_WDS_STALL": "100"}
"""Tars are read in pieces, and held back for as long as it takes."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Six nodes, each with room for one task."""
    with slurm.cluster(tmp_path_factory.mktemp("slurm"), nodes=6) as started:
        yield started


class Gates(FaultProxy):
    """A web server of tars that gives their first halves only, until each is opened."""

    def __init__(self, tars: dict[str, bytes]) -> None:
        super().__init__({f"/{name}": data for name, data in tars.items()})
        self.half = {f"/{name}": len(data) // 2 for name, data in tars.items()}
        self.opened = {path: threading.Event() for path in self.half}
        self.waiting: Counter[str] = Counter()
        """Tar → processes that have read its first half."""

    def fault(self, request: Request) -> Fault | None:
        begin = int(request.headers.get("range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        end = int(request.headers.get("range", "-0").rpartition("-")[2])
        half = self.half.get(request.path, 0)
        if begin <= half <= end:
            self.waiting[request.path] += 1
        if end >= half:
            self.opened[request.path].wait(110)
        return super().fault(request)


class Run:
    """A conversion of five tars, a task each, whose tasks stand before their gates."""

    def __init__(self, cluster: Slurm, gates: Gates, folder: Path, plan: Plan) -> None:
        self.cluster, self.gates, self.folder, self.plan = cluster, gates, folder, plan
        self.dest = folder / "dest"
        self.words = [f"{gates.url}/sa_00000{{0..4}}.tar", "--out", str(self.dest)]
        self.command("plan", self.words[0], "--out", self.dest, "--shard-size", "1MiB", "--mix", 1)

    def command(self, *words: object) -> str:
        return self.cluster.run(f"{self.cluster.environment['SA1B_WDS_VENV']}/bin/sa1b-wds", *words, cwd=self.folder)

    def path(self, task: int) -> str:
        return f"/{self.plan.sources[self.plan.tasks[task].sources[0]].name}"

    def open(self, *tasks: int) -> None:
        for task in tasks:
            self.gates.opened[self.path(task)].set()

    def wait_before(self, *tasks: int, times: int = 1) -> None:
        """Until so many processes have come to the middle of each of these tasks."""
        until(
            lambda: all(self.gates.waiting[self.path(task)] >= times for task in tasks),
            lambda: f"tasks {tasks} to be half done: {self.gates.waiting}\n{self.logs()}",
        )

    def pid(self, task: int) -> int:
        """Of the process that is at work on a task."""
        beat = read_status(Destination(str(self.dest)), now=time.time()).tasks[task].beat
        assert beat is not None and beat.error is None
        return beat.pid

    def left(self) -> str:
        """As a shell uses it."""
        said = self.command("status", self.dest, "--left").strip()
        assert f"left: --array={said}" in self.command("status", self.dest)
        return f"--array={said}"

    def trace(self, task: int) -> list[str]:
        """What a task that is not done has left behind: nothing, but its last words."""
        shards = self.plan.shard_names(self.plan.tasks[task])
        names = [name for name in running.tree(self.dest) if any(name.startswith(shard) for shard in shards)]
        return names + [name for name in running.tree(self.dest) if f"attempts/task-{task:06d}" in name]

    def logs(self) -> str:
        return "\n".join(f"--- {p.name}\n{p.read_text()}" for p in sorted(self.folder.rglob("*.log")))


@pytest.fixture(scope="module")
def tars() -> dict[str, bytes]:
    return {f"sa_{n:06d}.tar": making.tar(making.pairs(range(100 * n + 1, 100 * n + 60))) for n in range(5)}


@pytest.fixture(scope="module")
def wanted(tars: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the embedded engine makes of them."""
    folder = tmp_path_factory.mktemp("embedded")
    running.convert(running.write(folder / "tars", tars), folder / "dest", mix=1)
    return running.tree(folder / "dest")


@pytest.fixture
def run(cluster: Slurm, tars: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    for name, value in SMALL.items():
        monkeypatch.setitem(cluster.environment, name, value)
    with Gates(tars) as gates:
        plan = running.planned(running.write(tmp_path / "tars", tars), mix=1)
        yield Run(cluster, gates, tmp_path, plan)
        for gate in gates.opened.values():
            gate.set()


def test_tasks_are_killed_requeued_cancelled_and_run_twice(run: Run, wanted: dict[str, str]) -> None:
    cluster, gates = run.cluster, run.gates
    run.open(4)
    said = cluster.run(SCRIPTS / "submit", *run.words, cwd=run.folder)
    assert "over tasks 0-4" in said, said
    array, last = (line.split()[2].strip(",") for line in said.splitlines() if line.startswith("Submitted"))
    run.wait_before(0, 1, 2, 3)
    cluster.wait(f"{array}_4", "COMPLETED")
    assert run.left() == "--array=0-3"
    # While they are in the queue they are not submitted again.
    assert f"{array}_0" in cluster.run(SCRIPTS / "submit", *run.words, cwd=run.folder, code=1)

    os.kill(run.pid(0), signal.SIGKILL)
    cluster.run("scontrol", "requeue", f"{array}_1")
    cluster.wait(f"{array}_1", "PENDING")
    second = cluster.sbatch("--array=2", SCRIPTS / "convert.sbatch", *run.words, cwd=run.folder)
    cluster.run("scancel", f"{array}_3")
    assert cluster.wait(f"{array}_0", *ENDED)["JobState"] == "FAILED"
    assert cluster.wait(f"{array}_3", *ENDED)["JobState"] == "CANCELLED"
    run.wait_before(1, 2, times=2)
    assert not run.trace(3)
    run.open(1, 2)
    for job in (f"{array}_1", f"{array}_2", f"{second}_2"):
        assert cluster.wait(job, *ENDED)["ExitCode"] == "0:0"
    assert cluster.job(f"{array}_1")["Restarts"] == "1"

    # The job behind them tells what is left, in its log, and the same command does it.
    assert cluster.wait(last, *ENDED)["JobState"] == "FAILED"
    log = (run.folder / f"logs/sa1b-wds-finalize-{last}.log").read_text()
    assert "left: --array=0,3" in log and "Run scripts/slurm/submit again" in log
    assert run.left() == "--array=0,3"
    task_3 = (run.folder / f"logs/sa1b-wds-{array}_3.log").read_text()
    assert "sa1b-wds: stopped by SIGTERM; run the same command again to go on" in task_3
    task_1 = (run.folder / f"logs/sa1b-wds-{array}_1.log").read_text()
    assert task_1.count("stopped by SIGTERM") == 1 and "started again for the 1. time" in task_1
    assert "samples out" in task_1.splitlines()[-1]

    run.open(0, 3)
    said = cluster.run(SCRIPTS / "submit", *run.words, cwd=run.folder)
    assert "over tasks 0,3" in said
    last = said.splitlines()[-1].split()[2].strip(",")
    assert cluster.wait(last, *ENDED)["JobState"] == "COMPLETED", run.logs()
    assert running.tree(run.dest) == wanted
    assert sum(gates.waiting.values()) == 5 + 1 + 1 + 2  # one requeued, one twice, two again: no task did another's


def test_nodes_go_down_and_the_time_limit_strikes(run: Run, wanted: dict[str, str]) -> None:
    """One node is cut off while its task goes on, one dies with all that is on it, one task comes near its limit."""
    cluster = run.cluster
    run.open(3, 4)
    array = cluster.sbatch("--array=0-4", SCRIPTS / "convert.sbatch", *run.words, cwd=run.folder)
    run.wait_before(0, 1, 2)
    cluster.run("scontrol", "update", f"JobId={array}_2", "TimeLimit=1")  # the shortest that there is
    cut_off, dead = (cluster.job(f"{array}_{task}")["BatchHost"] for task in (0, 1))
    lonely = run.pid(0)
    cluster.end_daemon(cut_off)
    cluster.end_node(dead)
    run.wait_before(0, 1, times=2)  # on other nodes
    for task, node in ((0, cut_off), (1, dead)):
        found = cluster.job(f"{array}_{task}")
        assert found["Restarts"] == "1" and found["BatchHost"] != node
    assert Path(f"/proc/{lonely}").exists()
    run.open(0, 1)
    for task in (0, 1, 3, 4):
        assert cluster.wait(f"{array}_{task}", *ENDED)["ExitCode"] == "0:0"
    until(lambda: not Path(f"/proc/{lonely}").exists(), "the task on the node that was cut off")

    struck = cluster.wait(f"{array}_2", *ENDED)
    assert (struck["JobState"], struck["ExitCode"]) == ("FAILED", "130:0")
    log = (run.folder / f"sa1b-wds-{array}_2.log").read_text()
    assert log.splitlines()[-1] == "sa1b-wds: stopped by SIGUSR1; run the same command again to go on"
    assert not run.trace(2)
    assert "task 2 failed" in run.command("status", run.dest) and "stopped by SIGUSR1" in run.command(
        "status", run.dest
    )
    assert run.left() == "--array=2"

    run.open(2)
    again = cluster.sbatch(*run.left().split(), SCRIPTS / "convert.sbatch", *run.words, cwd=run.folder)
    assert cluster.wait(f"{again}_2", *ENDED)["ExitCode"] == "0:0", run.logs()
    run.command("finalize", run.dest)
    assert running.tree(run.dest) == wanted


README = (ROOT / "README.md").read_text(encoding="utf-8").partition("### On a cluster\n")[2].partition("\n**Ray")[0]


def test_the_recipe(cluster: Slurm, tars: dict[str, bytes], tmp_path: Path) -> None:
    """The README's commands as they stand there, with a damaged tar among the sources that is replaced in between."""
    (console,) = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    commands = [line.removeprefix("$ ") for line in console.splitlines() if line.startswith("$ ")]
    (by_hand,) = (" ".join(found.split()) for found in re.findall(r"`(sbatch [^`]*)`", README))
    (tmp_path / "bin").symlink_to(Path(cluster.environment["SA1B_WDS_VENV"]) / "bin")
    replaced = {
        "/data/": f"{tmp_path}/", "{000..999}": "{000..004}", "scripts/slurm": str(SCRIPTS),
        "sa1b-wds ": f"{tmp_path}/bin/sa1b-wds ",
    }  # fmt: skip

    def shell(command: str, code: int = 0) -> str:
        for old, new in replaced.items():
            command = command.replace(old, new)
        return cluster.run("bash", "-c", command, cwd=tmp_path, code=code)

    def ended(said: str) -> str:
        """How the job that finalizes ended."""
        return cluster.wait(said.splitlines()[-1].split()[2].strip(",;"), *ENDED)["JobState"]

    paths = running.write(tmp_path / "sa1b", tars)
    plan, submit, status, again = commands
    assert "5 sources" in shell(plan)
    data = bytearray(paths[0].read_bytes())
    data[len(data) // 2 : len(data) // 2 + 5000] = bytes(5000)
    paths[0].write_bytes(data)
    first = shell(submit)
    assert "Submitted: array" in first and ended(first) == "FAILED"
    said = shell(status)
    assert "1 done, 0 running, 0 stale, 1 failed, 0 missing" in said and f"{paths[0]}: byte" in said
    paths[0].write_bytes(tars[paths[0].name])
    left = cluster.wait(f"{shell(by_hand).split()[-1]}", *ENDED)
    assert left["ExitCode"] == "0:0"
    assert "left:" not in shell(status)
    last = shell(again)
    assert "array" not in last and ended(last) == "COMPLETED"
    running.convert(paths, tmp_path / "embedded", plan=make_plan(
        [Source(name=path.name, size=path.stat().st_size) for path in paths], shard_size=1 << 30, mix=4, seed=0
    ))  # fmt: skip
    assert running.tree(tmp_path / "shards") == running.tree(tmp_path / "embedded")
    assert len(console.splitlines()) < 30
