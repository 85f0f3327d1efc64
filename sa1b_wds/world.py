"""Rank and world size: claims read once from the process, judged by a pure function, then passed as a value.

Whoever started the process says who it is. In order of trust:

    torch.distributed   once it is initialised
    torchrun            RANK, WORLD_SIZE
    Open MPI            OMPI_COMM_WORLD_RANK, OMPI_COMM_WORLD_SIZE
    Slurm               SLURM_PROCID, and SLURM_STEP_NUM_TASKS or SLURM_NTASKS

The first claim counts; none is 0 of 1. The others must agree with it or be those of an outer launcher: Slurm or MPI
starts one torchrun a node, or a batch script calls mpirun. Anything else is refused: two launchers that disagree mean
ranks that read the same samples, or samples that no rank reads, and neither shows in a loss curve.
"""

import contextlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

from .errors import WorldError


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among those that share the work."""

    rank: int = 0
    """0 ≤ rank < size."""
    size: int = 1
    """Number of processes."""
    source: str = "a single process"
    """Who said so."""
    local_size: int = 1
    """Processes that share this machine's cores, where torchrun says so; other launchers bind each to cores."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise WorldError(self.source, "world size out of range", "at least 1", self.size)
        if not 0 <= self.rank < self.size:
            raise WorldError(self.source, "rank out of range", f"0 to {self.size - 1}", self.rank)

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.size} ({self.source})"


def detect(
    rank: int | None = None,
    world_size: int | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    modules: Mapping[str, ModuleType] | None = None,
) -> World:
    """The world of this process; what the caller gives wins over everything found.

    Args:
        rank, world_size: both or neither.
        environ: the environment; the process's own by default.
        modules: loaded modules; torch is looked at only if it is among them, never imported.

    Raises:
        WorldError: one of a pair without the other, a number that is none, a rank outside its world, or claims that
            contradict each other.
    """
    if rank is not None or world_size is not None:
        if rank is None or world_size is None:
            missing = "rank" if rank is None else "world_size"
            raise WorldError("", f"give rank and world_size both or neither: {missing} is missing")
        return World(rank=rank, size=world_size, source="the arguments")
    environ = os.environ if environ is None else environ
    return judge(environ, distributed(sys.modules if modules is None else modules))


def distributed(modules: Mapping[str, ModuleType]) -> World | None:
    """What torch.distributed says, if torch is loaded and its process group initialised."""
    torch = modules.get("torch.distributed")
    if torch is None or not torch.is_available() or not torch.is_initialized():
        return None
    return World(rank=torch.get_rank(), size=torch.get_world_size(), source="torch.distributed")


def judge(environ: Mapping[str, str], initialised: World | None = None) -> World:
    """The world that an environment and an initialised process group agree on."""
    torchrun = _claim(environ, "torchrun", "RANK", "WORLD_SIZE")
    mpi = _claim(environ, "Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")
    slurm = None
    if "SLURM_PROCID" in environ:  # without it, the shell of an allocation: no task of it
        size = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
        slurm = _claim(environ, "Slurm", "SLURM_PROCID", size)
    claims = [claim for claim in (initialised, torchrun, mpi, slurm) if claim]
    if not claims:
        return World()
    world = claims[0]
    local = environ.get("LOCAL_WORLD_SIZE", "")
    if local.isdecimal() and 0 < int(local) <= world.size:
        world = replace(world, local_size=int(local))
    for other in claims[1:]:
        if (other.rank, other.size) != (world.rank, world.size) and not _outer(other, world, environ):
            raise WorldError(
                "rank and world size",
                "two launchers contradict each other (unset one, or give rank and world_size)",
                world,
                other,
            )
    return world


def cores(limits: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores that this process may use: those it is bound to, and no more than a container's quota (cgroup v2)."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = limits.read_text().split()
        return max(1, min(bound, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file, or "max"
        return bound


def memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process may have at most: the machine's, or those of a container or batch job (cgroup)."""
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = (root / "proc/meminfo").read_text().splitlines()
        found.append(1024 * int(next(line.split()[1] for line in lines if line.startswith("MemTotal:"))))
    groups = {"sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes"}  # seen from inside a container
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            here, name = ("", "memory.max") if not kinds else ("memory", "memory.limit_in_bytes")
            if not kinds or "memory" in kinds.split(","):  # every group above it limits it too
                parts = [part for part in path.split("/") if part not in ("", "..")]
                groups |= {"/".join(["sys/fs/cgroup", here, *parts[:n], name]) for n in range(1, len(parts) + 1)}
    for group in groups:
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            found.append(int((root / group).read_text()))
    return min(found, default=None)


def _outer(other: World, world: World, environ: Mapping[str, str]) -> bool:
    """Whether `other` is told by a launcher around the one that started this process."""
    if other.size == 1:
        return True
    if other.source == "torchrun":
        return False  # it starts the processes themselves
    if "TORCHELASTIC_RUN_ID" in environ and world.source in ("torchrun", "torch.distributed"):
        # torchrun for certain, not variables set by hand. One launcher a node, and its rendezvous numbers the nodes
        # itself: the outer rank tells nothing.
        local = environ.get("LOCAL_WORLD_SIZE", "")
        return local.isdecimal() and world.size == other.size * int(local)
    if other.source == "Slurm" and (world.source == "Open MPI" or "OMPI_COMM_WORLD_SIZE" in environ):
        # mpirun in a batch script: Slurm's numbers are the script's, or those of mpirun's own daemons, one a node.
        return "SLURM_STEP_NUM_TASKS" not in environ or other.size < world.size
    return False


def _claim(environ: Mapping[str, str], source: str, rank: str, size: str) -> World | None:
    if rank not in environ and size not in environ:
        return None
    numbers = []
    for name in (rank, size):
        if name not in environ:
            raise WorldError(source, f"{rank} and {size} belong together: {name} is not set")
        try:
            numbers.append(int(environ[name]))
        except ValueError:
            raise WorldError(f"{source}: {name}", "not a number", None, repr(environ[name])) from None
    return World(rank=numbers[0], size=numbers[1], source=source)
