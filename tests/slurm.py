"""A real Slurm on loopback, with nodes that all are this machine, started for a test and stopped by process id.

Debian's slurmctld, slurmd, slurm-client and munge, without systemd, cgroups or accounting; `scripts/test` installs
them. Key, state, sockets and logs lie in a folder of its own, the ports are free ones: two of these know nothing of
each other. A node that dies is noticed after 10 seconds instead of 5 minutes, and a job that is put back into the queue
waits 6 seconds instead of 2 minutes; nothing else is made easier than on a cluster.
"""

import contextlib
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from .servers import free_ports

ROOT = Path(__file__).parents[1]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "sinfo")
PACKAGES = "slurmctld slurmd slurm-client munge"
PATH = f"{os.environ.get('PATH', '')}{os.pathsep}/usr/sbin{os.pathsep}/usr/local/sbin"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=3
SlurmctldTimeout=10
MessageTimeout=2
TCPTimeout=1
BatchStartTimeout=60
KillWait=10
MinJobAge=600
WaitTime=0
PropagateResourceLimitsExcept=ALL
"""


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """A cluster that runs."""

    folder: Path
    nodes: list[str]
    environment: dict[str, str]
    """Of whoever submits, and so of the jobs."""

    def run(self, *command: object, cwd: Path | None = None, code: int = 0) -> str:
        """What a command says, on both channels."""
        done = subprocess.run(
            list(map(str, command)), cwd=cwd, env=self.environment, text=True, timeout=60,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert done.returncode == code, done.stdout
        return done.stdout

    def sbatch(self, *words: object, cwd: Path) -> str:
        """The job's number."""
        return self.run("sbatch", "--parsable", *words, cwd=cwd).strip()

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job, or of a task of an array as `job_task`."""
        said = self.run("scontrol", "--oneliner", "show", "job", number).splitlines()[0]
        return dict(word.split("=", 1) for word in said.split() if "=" in word)

    def wait(self, number: str, *states: str, seconds: float = 60) -> dict[str, str]:
        """Wait until a job is in one of these states."""
        found: dict[str, str] = {}

        def there() -> bool:
            found.update(self.job(number))
            return found["JobState"] in states

        until(there, lambda: f"job {number} to be {states}: {found}", seconds)
        return found

    def end_daemon(self, node: str) -> None:
        """kill -9 of a node's slurmd, so that nothing is heard of it any more; what runs on it goes on."""
        os.kill(int((self.folder / f"{node}.pid").read_text()), signal.SIGKILL)

    def end_node(self, node: str) -> None:
        """kill -9 of everything on it, like a power cut: also of what would still tell how a job ended."""
        self.end_daemon(node)
        jobs = self.processes(node)
        shepherds = {int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in jobs}
        for pid in [*sorted(shepherds & set(self.processes())), *jobs]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def processes(self, node: str = "") -> list[int]:
        """Everything that was started under this Slurm; with a node, by a job on it."""
        wanted = {f"SLURM_CONF={self.environment['SLURM_CONF']}", *([f"SLURMD_NODENAME={node}"] if node else [])}
        out = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if wanted <= set(path.read_text(errors="replace").split("\0")):
                    out.append(int(path.parent.name))
        return [pid for pid in out if pid != os.getpid()]


def until(true: Callable[[], bool], what: str | Callable[[], str], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"waited for {what if isinstance(what, str) else what()}"
        time.sleep(0.1)


def _missing() -> None:
    gone = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    text = f"##### NO SLURM ({', '.join(gone)}): apt-get install {PACKAGES}; its tests are SKIPPED #####"
    if os.environ.get("SLURM") == "no":
        text = "##### SLURM=no: the tests on a real Slurm are SKIPPED #####"
    if gone or os.environ.get("SLURM") == "no":
        sys.__stderr__.write(f"\n{text}\n") if sys.__stderr__ else None
        pytest.skip(text)


@contextlib.contextmanager
def cluster(folder: Path, *, nodes: int, cpus: int = 2) -> Iterator[Slurm]:
    """Nodes that are idle; at the end no process is left."""
    _missing()
    ports = free_ports(1 + nodes)
    names = [f"n{i}" for i in range(nodes)]
    conf = CONF.format(host=socket.gethostname().partition(".")[0], ports=ports, user=getpass.getuser(), folder=folder)
    for name, port in zip(names, ports[1:], strict=True):
        host = socket.gethostname().partition(".")[0]
        conf += f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory=16000\n"
        (folder / f"spool-{name}").mkdir()
    conf += f"PartitionName=cpu Nodes={','.join(names)} Default=YES MaxTime=INFINITE State=UP\n"
    (folder / "slurm.conf").write_text(conf)
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(secrets.token_bytes(1024))
    (folder / "munge.key").chmod(0o400)
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))}
    environment = {**bare, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf"), "SA1B_WDS_VENV": sys.prefix}
    slurm = Slurm(folder=folder, nodes=names, environment=environment)
    daemons: list[list[object]] = [
        ["munged", "--force", *(f"--{what}={folder}/munge.{end}" for what, end in
                                (("key-file", "key"), ("socket", "sock"), ("pid-file", "pid"), ("log-file", "log"),
                                 ("seed-file", "seed")))],
        ["slurmctld", "-c"],
    ]  # fmt: skip
    daemons += [["slurmd", "-N", name] for name in names]
    try:
        for command in daemons:
            with (folder / "start.log").open("ab") as log:  # not a pipe: they would hold it open
                subprocess.run(
                    list(map(str, command)), env=environment, check=True, stdin=subprocess.DEVNULL, stdout=log,
                    stderr=log, timeout=30,
                )  # fmt: skip
        until(lambda: _idle(slurm) == nodes, lambda: _logs(folder), 30)
        yield slurm
    finally:
        _stop(slurm)


def _idle(slurm: Slurm) -> int:
    done = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--format=%T"], env=slurm.environment, capture_output=True, text=True
    )
    return done.stdout.split().count("idle")


def _logs(folder: Path) -> str:
    return "nodes:\n" + "\n".join(path.read_text(errors="replace")[-1000:] for path in sorted(folder.glob("*.log")))


def _stop(slurm: Slurm) -> None:
    """Jobs and their shepherds first, since the daemons would start what is queued; nothing of it is needed again."""
    for pid in slurm.processes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    until(lambda: not slurm.processes(), "all processes to end", 10)
