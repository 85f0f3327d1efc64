"""Conversions on a real Ray cluster of two nodes: workers and a node killed, stopped and gone on with, unfit nodes.

Sources wait at a gate in their middle, so that what is done to the tasks is done while they run.
"""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from sa1b_wds.cli import main
from sa1b_wds.plan import Source, make_plan

from . import cluster, making, running
from .cluster import ADDRESS, ROOT, Network, Node, interpreter

TASKS = 4
OPTIONS = ["--mix", "1", "--shard-size", "1MiB", "--assume-size", "1MiB"]

Tree = dict[str, str]


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="ray is installed here")
def test_without_ray_one_line_says_what_to_install(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    running.write(tmp_path / "tars", {"sa_000000.tar": making.tar(making.pairs(range(1, 4)))})
    assert main(["convert", str(tmp_path / "tars"), "--out", str(tmp_path / "out"), "--engine", "ray"]) == 2
    assert capsys.readouterr().err == "sa1b-wds: --engine ray: needs ray: pip install 'sa1b-wds[ray]'\n"
    assert not (tmp_path / "out").exists()  # said before anything was planned


def test_one_task_is_not_for_a_cluster(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "x.tar", "--out", str(tmp_path), "--engine", "ray", "--task", "0"]) == 2
    assert "runs all tasks of a plan, --task one of them" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ a cluster


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with cluster.network() as made:
        yield made


@pytest.fixture(scope="module")
def head(network: Network) -> Iterator[Node]:
    node = Node(network, "head", head=True)
    try:
        node.wait()
        yield node
    finally:
        node.kill()


@contextlib.contextmanager
def joined(network: Network, name: str, *inside: str, path: Path = ROOT) -> Iterator[Node]:
    """Another node of the cluster, for a while."""
    node = Node(network, name, inside=inside, path=path)
    try:
        node.wait()
        yield node
    finally:
        node.kill()


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    running.write(
        folder,
        {f"sa_{n:06d}.tar": making.tar(making.pairs(range(100 * n + 1, 100 * n + 30))) for n in range(TASKS)},
    )
    return folder


@pytest.fixture(scope="module")
def expected(tars: Path, tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """What the local engine makes of the same sources."""
    dest = tmp_path_factory.mktemp("local") / "dest"
    assert (
        main(["convert", *(f"pipe:cat {path}" for path in sorted(tars.iterdir())), "--out", str(dest), *OPTIONS]) == 0
    )
    tree = running.tree(dest)
    assert len([name for name in tree if name.endswith(".tar")]) == TASKS
    return tree


class Gate:
    """Sources that stop in their middle until it opens."""

    def __init__(self, tars: Path, file: Path, held: Callable[[int], bool] = lambda number: True) -> None:
        self._file = file
        wait = f"n=0; while test ! -e {file} -a $n -lt 1500; do sleep 0.05; n=$((n + 1)); done"  # never for ever
        self.sources = [
            f"pipe:head -c 9000 {path}; {wait if held(n) else 'true'}; tail -c +9001 {path}"
            for n, path in enumerate(sorted(tars.iterdir()))
        ]

    def open(self) -> None:
        self._file.touch()


class Driver:
    """`sa1b-wds convert --engine ray`, running."""

    def __init__(
        self,
        network: Network,
        folder: Path,
        sources: list[str],
        *,
        inside: Sequence[str] = (),
        address: str = ADDRESS,
    ) -> None:
        self.dest, self._log = folder / "dest", folder / "driver.log"
        program = [interpreter(), "-c", "from sa1b_wds.cli import run; run()", "convert", *sources]
        command = [*program, "--out", str(self.dest), "--engine", "ray", "--cpus-per-task", "1", *OPTIONS]
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs of a shell in the background ignore it
        try:
            self.process = network.start(command, log=self._log, inside=inside, RAY_ADDRESS=address)
        finally:
            signal.signal(signal.SIGINT, before)

    def said(self) -> str:
        return self._log.read_text(errors="replace")

    def end(self, timeout: float = 90) -> tuple[int, str]:
        """Its exit code and all it said."""
        try:
            return self.process.wait(timeout), self.said()
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            raise AssertionError(f"the driver hangs: {self.said()}") from None

    def pids(self) -> dict[int, int]:
        """task → process at work on it, from the heartbeats."""
        out = {}
        for path in (self.dest / ".state").glob("task-*.json"):
            with contextlib.suppress(OSError):
                beat = json.loads(path.read_bytes())
                out[beat["task"]] = beat["pid"]
        return out

    def wait_for(self, what: Callable[[], bool]) -> None:
        until = time.monotonic() + 150  # Ray starts its processes one after the other, each of which imports much
        while not what():
            assert self.process.poll() is None, self.said()
            if time.monotonic() > until:
                self.end(0)
            time.sleep(0.05)


def attempts(dest: Path) -> list[str]:
    """What unfinished tasks left."""
    return [str(path) for path in (dest / ".state" / "attempts").rglob("*")]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_worker_and_a_node_are_killed(
    network: Network, head: Node, tars: Path, expected: Tree, tmp_path: Path
) -> None:
    gate = Gate(tars, tmp_path / "gate")
    with joined(network, "second") as second:
        driver = Driver(network, tmp_path, gate.sources)
        driver.wait_for(lambda: len(driver.pids()) == 2)
        there = {task: pid for task, pid in driver.pids().items() if pid in second.workers()}
        here = {task: pid for task, pid in driver.pids().items() if pid in head.workers()}
        assert len(there) == len(here) == 1  # spread over both
        (killed, pid), (lost, _) = *here.items(), *there.items()
        os.kill(pid, signal.SIGKILL)
        driver.wait_for(lambda: len(driver.pids()) == 3)  # the room that it left goes to the next
        second.kill()
    gate.open()
    code, said = driver.end()
    assert code == 0, said
    for task in (killed, lost):
        assert f"task {task}: its process or node was lost" in said
    assert "Traceback" not in said
    assert running.tree(driver.dest) == expected
    assert said.count(" members in, ") == TASKS


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_stopped_and_gone_on_with(network: Network, head: Node, tars: Path, expected: Tree, tmp_path: Path) -> None:
    sources = [Source(name=path.name, size=1 << 20) for path in sorted(tars.iterdir())]
    plan = make_plan(sources, shard_size=1 << 20, mix=1, seed=0)
    (free,) = plan.tasks[0].sources
    gate = Gate(tars, tmp_path / "gate", held=lambda number: number != free)
    driver = Driver(network, tmp_path, gate.sources)
    driver.wait_for(lambda: (driver.dest / "receipts").exists() and len(attempts(driver.dest)) > 0)
    os.killpg(driver.process.pid, signal.SIGINT)
    code, said = driver.end(30)
    assert code == 130, said
    assert said.splitlines()[-1] == "sa1b-wds: stopped; run the same command again to go on"
    assert "Traceback" not in said
    assert attempts(driver.dest) == []
    assert len(running.receipts(driver.dest)) == 1
    gate.open()
    again = Driver(network, tmp_path, gate.sources)
    code, said = again.end()
    assert code == 0, said
    assert "1 of 4 tasks are done already" in said
    assert running.tree(driver.dest) == expected


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_nodes_that_cannot_work_are_left_out(
    network: Network, head: Node, tars: Path, expected: Tree, tmp_path: Path
) -> None:
    gate = Gate(tars, tmp_path / "gate")
    gate.open()
    hidden = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(tmp_path)]
    other = tmp_path.parent / "other"
    (other / "sa1b_wds-9.9.dist-info").mkdir(parents=True)
    (other / "sa1b_wds-9.9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: sa1b-wds\nVersion: 9.9\n")
    with joined(network, "blind", *hidden), joined(network, "old", path=other):
        driver = Driver(network, tmp_path, gate.sources)
        code, said = driver.end()
        assert code == 0, said
        assert "is left out: sa1b-wds: must have the same version on every node: expected 0.1.0, found 9.9" in said
        assert (
            f"is left out: {driver.dest}: the data set cannot be read from this node: it must lie where every" in said
        )
        assert running.tree(driver.dest) == expected
    # A destination that nobody but the driver sees.
    alone = tmp_path / "alone"
    alone.mkdir()
    driver = Driver(network, alone, gate.sources, inside=(*hidden[:-1], str(alone)))
    code, said = driver.end()
    assert code == 2, said
    assert f"{alone}/dest: the data set cannot be read from this node" in said.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_an_outcome_is_lost_after_its_task_was_published(
    network: Network, head: Node, tars: Path, tmp_path: Path
) -> None:
    dest, log = tmp_path / "dest", tmp_path / "log"
    program = "import sys; from tests.lost import main; main(*sys.argv[1:])"  # not as __main__, which workers lack
    command = [interpreter(), "-c", program, str(tars), str(dest)]
    code = network.start(command, log=log, RAY_ADDRESS=ADDRESS, PYTHONPATH=str(ROOT)).wait(90)
    said = log.read_text()
    assert code == 0, said
    assert (tmp_path / "died").exists()
    assert said.count("its process or node was lost") == 1
    assert said.count("done before") == 1
    running.check_accounts(dest)


# ------------------------------------------------------------------------------------------------------------- a laptop


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_on_one_machine_what_the_data_does_is_not_tried_again(tars: Path, expected: Tree, tmp_path: Path) -> None:
    sources = Gate(tars, tmp_path / "gate", held=lambda number: False).sources
    count = tmp_path / "count"
    bad = [f"pipe:echo once >> {count}; head -c 9000 {tars}/sa_000000.tar", *sources[1:]]
    with cluster.network() as network:
        driver = Driver(network, tmp_path, bad, address="")
        code, said = driver.end()
        assert code == 1, said
        (task,) = {*range(TASKS)} - {receipt.task for receipt in running.receipts(driver.dest)}
        assert "set RAY_ADDRESS to use a cluster" in said
        assert said.splitlines()[-1] == f"sa1b-wds: {driver.dest}: 1 of 4 tasks failed: {task}"
        assert count.read_text() == "once\n"
        driver = Driver(network, tmp_path, sources, address="local")
        code, said = driver.end()
        assert code == 0, said
        assert running.tree(driver.dest) == expected


@pytest.mark.slow
def test_no_cluster_answers(tmp_path: Path, tars: Path) -> None:
    with cluster.network() as network:
        begun = time.monotonic()
        driver = Driver(network, tmp_path, sorted(map(str, tars.iterdir())), address="127.0.0.1:7777")
        code, said = driver.end()
        assert code == 1, said
        assert "RAY_ADDRESS 127.0.0.1:7777: no Ray cluster answers there" in said.splitlines()[-1]
        assert time.monotonic() - begun < 30  # Ray itself would try for minutes
