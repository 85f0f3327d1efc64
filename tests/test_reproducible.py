"""The same sources and plan give the same bytes: workers, cores, hash seeds, numpy, buffers, place of the sources.

Everything below the destination is compared, path by path, with one undisturbed conversion in this process. The runs
below are so chosen that every two values of different options meet in one of them.
"""

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType

import pytest

from sa1b_wds.convert import run_task
from sa1b_wds.publication import finalize
from sa1b_wds.storage import Destination

from . import making, running
from .making import Member

MIB = 1 << 20
OPTIONS = ["--shard-size", "1MiB", "--mix", "2", "--max-quarantine", "1"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four sources of a megabyte or two in random order, gzip and plain, with bad members and odd documents."""
    draw = random.Random(11)
    files = {}
    for number in range(4):
        members: list[Member] = []
        for i in range(number * 100, number * 100 + 13):
            height, width = draw.randint(200, 300), draw.randint(200, 300)
            members.append(Member(f"./sa_{i}.jpg", making.jpg(height, width, i % 5, 90)))
            document = making.text(making.document(i, height=height, width=width, annotations=i % 9))
            if i % 13 == 4:
                document += b"\n"
            members.append(Member(f"./sa_{i}.json", document[:-9] if i % 13 == 7 else document))
        draw.shuffle(members)
        data = making.tar(members, dialect="pax" if number == 2 else "gnu")
        files[f"sa_{number:06d}.tar"] = making.gzipped(data, members=number) if number else data
    return running.write(tmp_path_factory.mktemp("sources"), files)


@pytest.fixture(scope="module")
def wanted(sources: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The tree of a conversion in this process, in one worker."""
    dest = tmp_path_factory.mktemp("wanted") / "out"
    manifest = running.convert(sources, dest, mix=2, max_quarantine=running.ALL)
    assert len(manifest.shards) > 4
    assert manifest.totals.quarantined
    assert manifest.totals.stored_sources
    return running.tree(dest)


@pytest.fixture(scope="module")
def other_numpy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with another numpy than the one installed, from the package index, kept in pytest's cache."""
    mine = tuple(map(int, version("numpy").split(".")[:2]))
    refused = []
    for wanted in ("1.26.4", "2.2.6", "2.3.5"):
        if mine == tuple(map(int, wanted.split(".")[:2])):
            continue
        name = f"numpy-{wanted}-py{sys.version_info[0]}{sys.version_info[1]}"
        cache = getattr(request.config, "cache", None)  # none with `-p no:cacheprovider`
        folder = Path(str(cache.mkdir(name))) if cache is not None else tmp_path_factory.mktemp(name)
        if not (folder / "numpy" / "version.py").exists():
            patience = ["--quiet", "--retries", "0", "--timeout", "20"]
            what = ["--no-deps", "--only-binary", ":all:", "--target", str(folder), f"numpy=={wanted}"]
            command = [sys.executable, "-m", "pip", "install", *patience, *what]
            done = subprocess.run(command, capture_output=True, text=True, timeout=90)
            if done.returncode:
                refused.append(f"{wanted}: {done.stderr.strip().splitlines()[-1:]}")
                continue
        return folder
    pytest.skip(f"no second numpy from the package index, so nothing is known about one: {'; '.join(refused)}")


def _run(
    sources: Sequence[Path | str],
    dest: Path,
    *options: object,
    before: str = "",
    folder: Path | None = None,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """The command in a process of its own; `before`: statements to run before anything is imported."""
    code = f"import os, sys; {before}\nfrom sa1b_wds.cli import run\nif __name__ == '__main__': run()"
    command = [sys.executable, "-c", code, "convert", *map(str, sources), "--out", str(dest), *map(str, options)]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=100, cwd=folder
    )
    assert done.returncode == 0, done.stderr


PINNED = "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"
NERVOUS = "sys.setswitchinterval(1e-5)"

RUNS = {
    # name → (workers, statements, PYTHONHASHSEED, another numpy, pairing buffer)
    "two workers": (2, "", "0", False, "8GiB"),
    "one core, all spilled": (1, PINNED, "1", False, "1MiB"),
    "two workers on one core": (2, PINNED, "random", False, "8GiB"),
    "threads that change often": (2, NERVOUS, "2", False, "1MiB"),
    "another numpy": (1, "", "random", True, "1MiB"),
    "another numpy, two workers on one core": (2, PINNED, "3", True, "8GiB"),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_same_bytes(
    sources: list[Path], wanted: dict[str, str], tmp_path: Path, name: str, request: pytest.FixtureRequest
) -> None:
    workers, before, seed, other, buffer = RUNS[name]
    environment = {"PYTHONHASHSEED": seed}
    if other:
        folder: Path = request.getfixturevalue("other_numpy")
        environment["PYTHONPATH"] = str(folder)
        before += f"\nimport numpy; assert numpy.__file__.startswith({str(folder)!r})"
    _run(
        sources,
        tmp_path / "out",
        *OPTIONS,
        "--workers",
        workers,
        "--pairing-buffer",
        buffer,
        before=before,
        environment=environment,
    )
    assert running.tree(tmp_path / "out") == wanted


@pytest.mark.slow
def test_the_same_bytes_on_a_processor_without_any_extension(
    sources: list[Path], wanted: dict[str, str], tmp_path: Path
) -> None:
    """Kernels compiled for the oldest processor of this family: no vectors, no fused multiply-add."""
    cache = tmp_path / "kernels"
    generic = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(cache)}
    _run(sources, tmp_path / "out", *OPTIONS, environment=generic)
    assert list(cache.rglob("*.nbc")), "the kernels were not compiled anew"
    assert running.tree(tmp_path / "out") == wanted


def test_the_same_bytes_wherever_the_sources_lie_and_whatever_order_they_are_given_in(
    sources: list[Path], wanted: dict[str, str], tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    for source in sources:
        shutil.copy(source, moved)
        os.utime(moved / source.name, (1, 1))
    names = [f"moved/{s.name}" for s in reversed(sources)]
    _run(
        names,
        Path("out"),
        *OPTIONS,
        folder=tmp_path,
        environment={"TZ": "Asia/Kathmandu", "LC_ALL": "C", "PYTHONUTF8": "0"},
    )
    assert running.tree(tmp_path / "out") == wanted


def test_the_same_bytes_task_by_task_in_any_order(sources: list[Path], wanted: dict[str, str], tmp_path: Path) -> None:
    job = running.job_of(sources, tmp_path / "out", mix=2, max_quarantine=running.ALL, pairing_buffer=0)
    for index in reversed(range(len(job.plan.tasks))):
        run_task(job, index)
    finalize(Destination(str(tmp_path / "out")))
    assert running.tree(tmp_path / "out") == wanted


def test_finalize_again_changes_nothing(sources: list[Path], wanted: dict[str, str], tmp_path: Path) -> None:
    running.convert(sources, tmp_path / "out", mix=2, max_quarantine=running.ALL)
    finalize(Destination(str(tmp_path / "out")))
    running.convert(sources, tmp_path / "out", mix=2, max_quarantine=running.ALL)
    assert running.tree(tmp_path / "out") == wanted


def test_another_seed_gives_another_data_set(sources: list[Path], wanted: dict[str, str], tmp_path: Path) -> None:
    """So that equality above is not for lack of choices."""
    running.convert(sources, tmp_path / "out", mix=2, seed=1, max_quarantine=running.ALL)
    assert running.tree(tmp_path / "out") != wanted


def test_spilling_was_put_to_the_test(sources: list[Path], tmp_path: Path) -> None:
    """With 1 MiB members wait on disk, with 8 GiB none does: or the runs above compare nothing."""
    job = running.job_of(sources, tmp_path / "a", mix=2, max_quarantine=running.ALL, pairing_buffer=MIB)
    assert run_task(job, 0).spilled_bytes > MIB
    job = running.job_of(sources, tmp_path / "b", mix=2, max_quarantine=running.ALL, pairing_buffer=8 << 30)
    assert run_task(job, 0).spilled_bytes == 0
