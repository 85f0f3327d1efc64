"""What a conversion is said to need of memory, against what it is measured at; and what is refused before it begins."""

import subprocess
import sys
from pathlib import Path

import pytest

from sa1b_wds import cli, memory, world
from sa1b_wds.errors import UsageError
from sa1b_wds.memory import MIB, Need, check, look, workers
from sa1b_wds.synth import synthesise

from . import servers

S3 = Need(pairing_buffer=512 * MIB, sources=4, ahead=32 * MIB, shards=46, part=8 * MIB)


def test_the_need_is_a_sum() -> None:
    assert Need(pairing_buffer=0).total == memory.PROCESS
    assert S3.total == memory.PROCESS + 512 * MIB + 4 * 32 * MIB + 46 * 17 * MIB
    assert S3.least < S3.total


@pytest.mark.parametrize(
    ("need", "count", "there", "advice"),
    [
        (Need(pairing_buffer=512 * MIB), 8, 4 << 30, "lower --workers to 5"),
        (Need(pairing_buffer=512 * MIB), 2, 600 * MIB, "lower --workers to 1, and --pairing-buffer to 344MiB"),
        (S3, 1, 1500 * MIB, "lower --pairing-buffer to 334MiB"),
        (S3, 1, 1 << 30, "lower the number of shards a task: plan with a smaller --mix or a larger --shard-size"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_advice_helps(need: Need, count: int, there: int, advice: str) -> None:
    with pytest.raises(UsageError, match=advice) as caught:
        check(need, count, there)
    assert "--pairing-buffer" in str(caught.value)
    assert advice in look(need, count, there) or count * need.least > there


def test_what_fits_says_nothing() -> None:
    check(S3, 2, 2 * S3.total)
    assert look(S3, 2, 2 * S3.total) == ""
    assert (workers(S3, 5 * S3.total, 8), workers(S3, 5 * S3.total, 3), workers(S3, 1, 3)) == (5, 3, 1)


def test_without_a_limit_only_what_certainly_does_not_fit_is_refused() -> None:
    assert look(S3, 1, S3.least).startswith("1 worker may need")
    with pytest.raises(UsageError, match="not enough memory"):
        look(S3, 1, S3.least - 1)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"proc/meminfo": "MemTotal:  1000 kB\n"}, 1_024_000),
        ({"proc/meminfo": "MemTotal:  1000 kB\n", "sys/fs/cgroup/memory.max": "max\n"}, 1_024_000),
        ({"proc/meminfo": "MemTotal:  1000 kB\n", "sys/fs/cgroup/memory.max": "4096\n"}, 4096),
        ({"proc/self/cgroup": "0::/job/step\n", "sys/fs/cgroup/job/memory.max": "77\n"}, 77),
        (
            {
                "proc/self/cgroup": "5:cpu,memory:/job\n1:name=systemd:/\n",
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "55\n",
            },
            55,
        ),
        ({}, None),
    ],
)
def test_the_memory_there_is(tmp_path: Path, files: dict[str, str], expected: int | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert world.memory(tmp_path) == expected


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return synthesise(tmp_path_factory.mktemp("sources"), tars=2, samples=110, plain=True, workers=2)


def test_refused_before_anything_is_read_or_written(
    sources: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dest = tmp_path / "dest"
    words = ["convert", str(sources[0].parent), "--out", str(dest), "--memory", "400MiB"]
    assert cli.main(words) == 2
    assert "--pairing-buffer to 144MiB" in capsys.readouterr().err
    assert not dest.exists()


_MEASURE = """
import sys
from sa1b_wds import convert, memory
from sa1b_wds.storage import Destination
def peak():  # not ru_maxrss, which a new program takes over from the one that started it
    return next(int(x.split()[1]) for x in open("/proc/self/status") if x.startswith("VmHWM")) << 10
folder, out, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
found = convert.survey([folder])
plan = convert.plan_sources(found, shard_size=size, mix=2, seed=0)
job = convert.Job(destination=Destination(out), plan=plan, locations={n: u for n, (u, _) in found.items()},
                  options=convert.Options(pairing_buffer=64 << 20))
need = convert.memory_of(job)
convert.run_task(job, 0)
print(plan.tasks[0].shards, need.shards, need.least, peak(), need.total)
"""


def measured(sources: list[Path], out: str, size: int) -> list[int]:
    command = [sys.executable, "-c", _MEASURE, str(sources[0].parent), out, str(size)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


@pytest.mark.slow
def test_a_folder_takes_no_more_than_is_said(sources: list[Path], tmp_path: Path) -> None:
    _, uploads, least, peak, most = measured(sources, str(tmp_path / "dest"), 17 << 20)
    assert uploads == 0
    assert least <= peak <= most


@pytest.mark.slow
def test_many_shards_open_on_s3_take_no_more_than_is_said(
    sources: list[Path], s3: servers.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    shards, uploads, least, peak, most = measured(sources, f"s3://{servers.BUCKET}/memory-of-a-task", 17 << 20)
    assert shards == uploads >= 10
    assert least <= peak <= most
