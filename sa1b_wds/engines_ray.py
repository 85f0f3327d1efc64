"""Tasks on a Ray cluster: the one that RAY_ADDRESS names, or one of this machine's own.

Each task is a Ray task that reserves cores and memory. Ray starts it again when its process or its node is lost; what
fails for its data comes back as a value, so nobody tries it again. A task that was lost after it had published finds
its receipt the second time.

A node that cannot work on the job (it lacks the package, the destination, the sources, credentials or scratch) is left
out and its task goes elsewhere: it fails so fast that it would soon have failed all the others. No node left is an
error. Progress comes to the driver through an actor beside it, which nothing depends on.
"""

import contextlib
import os
import pickle
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .convert import Job, Outcome, Progress, checked_scratch, read_plan
from .engines import Engine, Failure, Report, cores
from .errors import MissingPackage, NoCredentials, Sa1bError, StorageError, Unreachable, UsageError
from .manifest import receipt_name
from .pipe import PREFIX
from .remote import is_remote
from .status import leave_error, run_reported
from .storage import Destination, local_path

MIB = 1 << 20
SHARED = "it must lie where every node sees it (a shared file system or a bucket)"
RETRIES = 3
"""How often a task is begun again when its process or node is lost."""
_TELL_SECONDS = 1.0  # between two words of a task to the driver
_LOOK_SECONDS = 0.5  # between two looks of the driver
_ROOM_SECONDS = 15.0  # without any task begun, before that is said
_REACH_SECONDS = 10.0  # for the head of a cluster to answer; Ray itself would try for minutes
_CANCEL_SECONDS = 60.0  # for tasks to remove what they had begun


def engine(*, cpus_per_task: int, at_once: int | None = None, say: Callable[[str], None] = lambda text: None) -> Engine:
    """The engine of a Ray cluster.

    Args:
        cpus_per_task: cores that Ray reserves for each task.
        at_once: the most tasks at a time; None: as many as there is room for.
        say: takes what a person should know: nodes left out, tasks begun again, no room.

    Raises:
        MissingPackage: ray is not installed.
    """
    ray = _package()

    def run(job: Job, tasks: list[int], report: Report) -> Iterator[Outcome | Failure]:
        with _connected(ray, say):
            yield from _Driver(ray, _rooted(job, cpus_per_task), cpus_per_task, at_once, say).run(tasks, report)

    return run


def _package() -> Any:
    try:
        import ray
    except ImportError as error:
        raise MissingPackage("--engine ray", "needs ray: pip install 'sa1b-wds[ray]'") from error
    return ray


@contextlib.contextmanager
def _connected(ray: Any, say: Callable[[str], None]) -> Iterator[None]:
    """A connection to a cluster, closed at the end; one that was there before stays."""
    if ray.is_initialized():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        try:
            _connect(ray, os.environ.get("RAY_ADDRESS", ""), say)
        except (ValueError, RuntimeError) as error:  # an address it cannot read; other versions of Python or Ray there
            raise UsageError("RAY_ADDRESS", " ".join(str(error).split())) from error
        for number, handler in handlers.items():  # it puts its own there, which end the process on the spot
            signal.signal(number, handler)
        yield
    finally:
        ray.shutdown()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _connect(ray: Any, address: str, say: Callable[[str], None]) -> None:
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if address in ("", "local"):
        # Never one that it finds by itself: that may be another user's, or one that is gone, which takes it minutes.
        say(f"Ray: on this machine alone, {cores():,} cores; set RAY_ADDRESS to use a cluster")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        small = 100 * MIB  # a plan and some receipts are all that passes through it
        ray.init(address="local", num_cpus=cores(), include_dashboard=False, object_store_memory=small, **quiet)
        return
    if address != "auto":
        _reach(address)
    try:
        ray.init(address=address, **quiet)
    except ConnectionError as error:
        raise Unreachable(f"RAY_ADDRESS {address}", "no Ray cluster runs on this machine") from error


def _reach(address: str) -> None:
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdigit():
        raise UsageError("RAY_ADDRESS", "not the address of a Ray cluster", "HOST:PORT", address)
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_SECONDS).close()
    except OSError as error:
        raise Unreachable(f"RAY_ADDRESS {address}", f"no Ray cluster answers there: {error}") from error


def _rooted(job: Job, threads: int) -> Job:
    """The same job for tasks elsewhere: no relative paths, as many threads as cores are reserved."""

    def rooted(url: str) -> str:
        return url if url.startswith(PREFIX) or is_remote(url) or "://" in url else str(local_path(url).absolute())

    there, scratch = job.destination, job.options.scratch
    return replace(
        job,
        destination=there if rooted(there.where) == there.where else Destination(rooted(there.where)),
        locations={name: rooted(url) for name, url in job.locations.items()},
        options=replace(job.options, scratch=scratch and scratch.absolute(), threads=threads),
    )


# ------------------------------------------------------------------------------------------------------------ the nodes


@dataclass(frozen=True, kw_only=True, slots=True)
class _Unfit:
    """A node that cannot work on the job."""

    node: str
    """Ray's id of it."""
    host: str
    why: Sa1bError
    source: Path | None = None
    """What it does not see, where that is a source."""


def _version() -> str:
    return version("sa1b-wds")


def _work(packed: bytes, task: int, driver: str, folder: str, board: Any) -> "Outcome | Failure | _Unfit":
    """A task on its node; runs in a process of Ray's.

    Args:
        packed: the job, still pickled: another version of the package could not be told once it is unpacked.
        driver: the version of the package where the command runs.
        folder: the driver's working folder, for the words of a `pipe:` command.
        board: who is told of progress.
    """
    import ray

    host = socket.gethostname()

    def unfit(why: Sa1bError, source: Path | None = None) -> _Unfit:
        return _Unfit(node=ray.get_runtime_context().get_node_id(), host=host, why=why, source=source)

    if (here := _version()) != driver:
        return unfit(UsageError("sa1b-wds", "must have the same version on every node", driver, here))
    job: Job = pickle.loads(packed)
    with contextlib.suppress(OSError):
        os.chdir(folder)
    try:
        _check_node(job, task)
    except Sa1bError as error:
        return unfit(error)
    # Of a task that was lost after it had published, the sources may be deleted by now.
    for path in [] if job.destination.exists(receipt_name(task)) else _local_sources(job, task):
        if not path.exists():
            return unfit(StorageError(str(path), f"this node does not see this source: {SHARED}"), path)
    board.begun.remote(task, host)
    last = 0.0

    def tell(progress: Progress) -> None:
        nonlocal last
        if (now := time.monotonic()) - last > _TELL_SECONDS:
            last = now
            board.tell.remote(progress)

    try:
        return run_reported(job, task, tell)
    except NoCredentials as error:  # the driver has some
        return unfit(error)
    except Sa1bError as error:
        return Failure(task=task, error=error)


def _check_node(job: Job, task: int) -> None:
    """What the driver has seen must be seen here too.

    Raises:
        Sa1bError: what is not.
    """
    plan, where = job.plan, job.destination.where
    try:
        there = read_plan(job.destination)
    except StorageError as error:
        raise StorageError(where, f"the data set cannot be read from this node: {SHARED}: {error}") from error
    if there != plan:
        raise StorageError(where, f"another data set, seen from this node: {SHARED}")
    checked_scratch(plan, plan.tasks[task], job.options)


def _local_sources(job: Job, task: int) -> list[Path]:
    urls = [job.locations.get(job.plan.sources[number].name, "") for number in job.plan.tasks[task].sources]
    return [local_path(url) for url in urls if url and not url.startswith(PREFIX) and not is_remote(url)]


class _Board:
    """Where tasks say how far they are; the driver takes it from there."""

    def __init__(self) -> None:
        self._progress: dict[int, Progress] = {}
        self._begun: list[tuple[int, str]] = []

    def begun(self, task: int, host: str) -> None:
        self._begun.append((task, host))

    def tell(self, progress: Progress) -> None:
        self._progress[progress.task] = progress

    def take(self) -> tuple[list[tuple[int, str]], list[Progress]]:
        said = self._begun, list(self._progress.values())
        self._begun, self._progress = [], {}
        return said


# ----------------------------------------------------------------------------------------------------------- the driver


class _Driver:
    def __init__(self, ray: Any, job: Job, cpus: int, at_once: int | None, say: Callable[[str], None]) -> None:
        self._ray, self._job, self._cpus, self._at_once, self._say = ray, job, cpus, at_once, say
        self._memory = _memory(job)
        self._unfit: dict[str, _Unfit] = {}
        self._running: dict[Any, int] = {}
        self._hosts: dict[int, str] = {}
        """task → where it was begun last."""

    def run(self, tasks: list[int], report: Report) -> Iterator[Outcome | Failure]:
        ray = self._ray
        # No core and no node but the driver's: it must neither wait for room nor be lost with a node.
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        self._board = ray.remote(_Board).options(num_cpus=0, scheduling_strategy=here).remote()
        self._packed = ray.put(pickle.dumps(self._job))
        rest = list(reversed(tasks))
        begun, asked = time.monotonic(), False
        try:
            while rest or self._running:
                while rest and (self._at_once is None or len(self._running) < self._at_once):
                    self._submit(rest.pop())
                ready, _ = ray.wait(list(self._running), timeout=_LOOK_SECONDS, fetch_local=True)
                self._look(report)
                for ref in ready:
                    task = self._running.pop(ref)
                    ended = self._ended(ref, task)
                    if isinstance(ended, _Unfit):
                        if ended.source is None or ended.source.exists():
                            self._leave_out(ended)
                            rest.append(task)
                            continue
                        ended = Failure(task=task, error=ended.why)  # it is not seen here either: no fault of the node
                    yield ended
                if not asked and not self._hosts and time.monotonic() - begun > _ROOM_SECONDS:
                    asked = True
                    self._say_no_room()
        finally:
            self._cancel()

    def _submit(self, task: int) -> None:
        others = {"label_selector": {"ray.io/node-id": f"!in({','.join(self._unfit)})"}} if self._unfit else {}
        work = self._ray.remote(_work).options(
            name=f"sa1b-wds task {task}",
            num_cpus=self._cpus,
            memory=self._memory,
            max_retries=RETRIES,  # of lost processes and nodes; what `_work` raises is a fault of this program
            scheduling_strategy="SPREAD",  # each node has disks and a network of its own
            **others,
        )
        self._running[work.remote(self._packed, task, _version(), str(Path.cwd()), self._board)] = task

    def _look(self, report: Report) -> None:
        with contextlib.suppress(self._ray.exceptions.RayError):
            begun, progress = self._ray.get(self._board.take.remote(), timeout=5)
            for task, host in begun:
                if task in self._hosts:
                    self._say(f"task {task}: its process or node was lost ({self._hosts[task]}); begun again on {host}")
                self._hosts[task] = host
            for said in progress:
                report(said)

    def _ended(self, ref: Any, task: int) -> "Outcome | Failure | _Unfit":
        errors = self._ray.exceptions
        try:
            ended: Outcome | Failure | _Unfit = self._ray.get(ref)
        except errors.RayTaskError as error:
            if "No module named 'sa1b_wds'" in str(error):
                what = "is not installed on every node of the Ray cluster: pip install the driver's version there"
                raise UsageError("sa1b-wds", what) from error
            what = f"failed in a way that nobody foresaw: {error.cause!r}"
            return self._lost(task, what)
        except errors.RayError as error:
            what = (
                f"its process or node was lost {RETRIES + 1} times, or it cannot be run (out of memory? a smaller "
                "--pairing-buffer helps); run the same command again. Ray says: "
            )
            return self._lost(task, what + " ".join(str(error).split())[:300])
        host = self._hosts.get(task, socket.gethostname())
        if isinstance(ended, Failure) and host != socket.gethostname():
            why = ended.error
            return Failure(task=task, error=type(why)(f"{host}: {why.where}", why.what, why.expected, why.found))
        return ended

    def _lost(self, task: int, what: str) -> Failure:
        error = StorageError(f"task {task}", what)
        leave_error(self._job, task, error)
        return Failure(task=task, error=error)

    def _leave_out(self, unfit: _Unfit) -> None:
        if unfit.node not in self._unfit:
            self._unfit[unfit.node] = unfit
            self._say(f"Ray node {unfit.host} is left out: {unfit.why}")
        able = [node["NodeID"] for node in self._able()]
        if all(node in self._unfit for node in able):
            why = unfit.why
            where = f"Ray: none of {len(able):,} nodes can work on this" if len(able) > 1 else f"Ray node {unfit.host}"
            raise UsageError(f"{where}: {why.where}", why.what, why.expected, why.found)

    def _able(self) -> list[dict[str, Any]]:
        """Nodes that are alive and large enough."""

        def fits(node: dict[str, Any]) -> bool:
            has = node["Resources"]
            return bool(node["Alive"] and has.get("CPU", 0) >= self._cpus and has.get("memory", 0) >= self._memory)

        return [node for node in self._ray.nodes() if fits(node)]

    def _say_no_room(self) -> None:
        what = f"{self._cpus:,} cores (--cpus-per-task) and {self._memory // MIB:,} MiB of memory (--pairing-buffer)"
        why = "all are busy" if self._able() else "no node has them"
        self._say(f"Ray: no task has begun: each takes {what} of a node, and {why}; waiting")

    def _cancel(self) -> None:
        """End what still runs, and wait until it has removed what it had begun."""
        waiting = list(self._running)
        for ref in waiting:
            self._ray.cancel(ref)
        if waiting:
            self._ray.wait(waiting, num_returns=len(waiting), timeout=_CANCEL_SECONDS)
        self._running.clear()


def _memory(job: Job) -> int:
    """Bytes of memory that any task of the job takes at most: what waits for its partner, what is read and written."""
    shards = max(task.shards for task in job.plan.tasks)
    sources = max(len(task.sources) for task in job.plan.tasks)
    remote = 16 * MIB * shards if is_remote(job.destination.where) else 0
    remote += 32 * MIB * sources if any(is_remote(url) for url in job.locations.values()) else 0
    return job.options.pairing_buffer + 256 * MIB + remote
