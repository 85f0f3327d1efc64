import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from sa1b_wds.errors import WorldError
from sa1b_wds.world import World, cores, detect, judge

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "none"}
HAND = {"RANK": "3", "WORLD_SIZE": "8"}
MPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "8"}
SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8"}


def torch(rank: int, size: int, initialised: bool = True, available: bool = True) -> dict[str, ModuleType]:
    module = ModuleType("torch.distributed")
    module.is_available = lambda: available  # type: ignore[attr-defined]
    module.is_initialized = lambda: initialised  # type: ignore[attr-defined]
    module.get_rank = lambda: rank  # type: ignore[attr-defined]
    module.get_world_size = lambda: size  # type: ignore[attr-defined]
    return {"torch": ModuleType("torch"), "torch.distributed": module}


AGREED = {
    "nothing": ({}, {}, (0, 1)),
    "torchrun": (TORCHRUN, {}, (5, 8)),
    "variables set by hand": (HAND, {}, (3, 8)),
    "Open MPI": (MPI, {}, (3, 8)),
    "srun": (SLURM, {}, (3, 8)),
    "srun, an old one": ({"SLURM_PROCID": "3", "SLURM_NTASKS": "8"}, {}, (3, 8)),
    "srun of some tasks of a job": ({**SLURM, "SLURM_STEP_NUM_TASKS": "4"}, {}, (3, 4)),
    "the shell of an allocation": ({"SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}, {}, (0, 1)),
    "torch.distributed": ({}, torch(1, 2), (1, 2)),
    "torch loaded, not initialised": (SLURM, torch(0, 1, initialised=False), (3, 8)),
    "torch without distributed": (MPI, torch(0, 1, available=False), (3, 8)),
    "torch.distributed by torchrun": (TORCHRUN, torch(5, 8), (5, 8)),
    "torch.distributed by srun": (SLURM, torch(3, 8), (3, 8)),
    "torchrun, one task a node": ({**TORCHRUN, "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, torch(5, 8), (5, 8)),
    "torchrun that numbers nodes itself": (
        {**TORCHRUN, "LOCAL_WORLD_SIZE": "1", "SLURM_PROCID": "2", "SLURM_NTASKS": "8"}, {}, (5, 8),
    ),
    "torchrun in a task of its own": ({**TORCHRUN, "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, {}, (5, 8)),
    "mpirun, one torchrun a node": (
        {**TORCHRUN, "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, {}, (5, 8),
    ),
    "mpirun in a batch script": ({**MPI, "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, {}, (3, 8)),
    "mpirun's daemon on a second node": ({**MPI, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, {}, (3, 8)),
    "srun sets all of them alike": ({**HAND, **MPI, **SLURM}, torch(3, 8), (3, 8)),
}  # fmt: skip


@pytest.mark.parametrize("name", AGREED)
def test_who_says_so(name: str) -> None:
    environ, modules, expected = AGREED[name]
    world = detect(environ=environ, modules=modules)
    assert (world.rank, world.size) == expected


REFUSED = {
    "rank 0 exported to every task": ({"RANK": "0", "WORLD_SIZE": "8", **SLURM}, {}, "rank 0 of 8 .*rank 3 of 8"),
    "a world of one inside eight tasks": ({"RANK": "0", "WORLD_SIZE": "1", **SLURM}, {}, "contradict"),
    "two sizes": ({"RANK": "1", "WORLD_SIZE": "4", **SLURM}, {}, "contradict"),
    "a larger world by hand": ({"RANK": "3", "WORLD_SIZE": "16", **SLURM}, {}, "contradict"),
    "Open MPI and srun": ({**MPI, **SLURM, "SLURM_PROCID": "4"}, {}, "Open MPI.*Slurm"),
    "Open MPI and variables by hand": ({**MPI, "RANK": "4", "WORLD_SIZE": "8"}, {}, "torchrun.*Open MPI"),
    "torch and torchrun": (TORCHRUN, torch(4, 8), "torch.distributed.*torchrun"),
    "torch and torchrun's size": (TORCHRUN, torch(0, 2), "contradict"),
    "torch and srun": (SLURM, torch(0, 4), "contradict"),
    "torchrun on half of the tasks": ({**TORCHRUN, "SLURM_PROCID": "1", "SLURM_NTASKS": "4"}, {}, "contradict"),
    "half a claim": ({"RANK": "1"}, {}, "WORLD_SIZE is not set"),
    "the other half": ({"WORLD_SIZE": "2"}, {}, "RANK is not set"),
    "Slurm without a size": ({"SLURM_PROCID": "1"}, {}, "SLURM_NTASKS is not set"),
    "no number": ({"RANK": "one", "WORLD_SIZE": "2"}, {}, "RANK: not a number.*'one'"),
    "rank too large": ({"RANK": "2", "WORLD_SIZE": "2"}, {}, "torchrun: rank out of range: expected 0 to 1, found 2"),
    "negative rank": ({"RANK": "-1", "WORLD_SIZE": "2"}, {}, "rank out of range"),
    "no world": ({"RANK": "0", "WORLD_SIZE": "0"}, {}, "world size out of range"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_contradictions_are_refused(name: str) -> None:
    environ, modules, message = REFUSED[name]
    with pytest.raises(WorldError, match=message):
        detect(environ=environ, modules=modules)


def test_the_caller_wins() -> None:
    world = detect(1, 3, environ=SLURM, modules=torch(0, 8))
    assert (world.rank, world.size, world.source) == (1, 3, "the arguments")


@pytest.mark.parametrize(("rank", "size"), [(None, 2), (0, None), (2, 2), (-1, 2), (0, 0)])
def test_half_or_wrong_arguments(rank: int | None, size: int | None) -> None:
    with pytest.raises(WorldError):
        detect(rank, size, environ={}, modules={})


def test_the_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert detect(modules={}) == World(rank=1, size=2, source="torchrun")
    assert judge({}) == World()


def test_processes_of_a_machine_share_its_cores() -> None:
    assert detect(environ=TORCHRUN, modules={}).local_size == 4
    assert detect(environ=SLURM, modules={}).local_size == 1  # Slurm binds each task to cores of its own
    assert detect(environ={**TORCHRUN, "LOCAL_WORLD_SIZE": "many"}, modules={}).local_size == 1


def test_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    limits = tmp_path / "cpu.max"
    for text, expected in (
        ("max 100000", 16),
        ("400000 100000", 4),
        ("50000 100000", 1),
        ("3200000 100000", 16),
        ("", 16),
    ):
        limits.write_text(text)
        assert cores(limits) == expected
    assert cores(tmp_path / "none") == 16


def test_torch_is_never_imported() -> None:
    code = "import sys; from sa1b_wds.world import detect; detect(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
