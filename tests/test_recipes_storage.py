"""README's recipes for object storage, as they stand there: places, endpoints and the links file are exchanged."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import sa1b_wds
from sa1b_wds.objects import Bucket

from . import making, servers
from .fault_proxy import Fault, FaultProxy

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SECTION = README.partition("### Object storage\n")[2].partition("\n### ")[0]
CONSOLE = re.findall(r"```console\n(.*?)```", SECTION, re.DOTALL)
PYTHON = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)


def commands(block: str) -> list[list[str]]:
    return [shlex.split(line) for line in block.replace("\n  ", " ").removeprefix("$ ").strip().split("\n$ ")]


def run(command: list[str], folder: Path, **more: str) -> str:
    assert command[0] == "sa1b-wds"
    program = [sys.executable, "-c", "from sa1b_wds.cli import run; run()", *command[1:]]
    # A module's folder, not the current one: commands are run where their files are.
    where = {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(program, cwd=folder, env={**os.environ, **where, **more}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def tars() -> dict[str, bytes]:
    return {f"sa_{n:06d}.tar": making.tar(making.pairs(range(6 * n + 1, 6 * n + 6))) for n in range(10)}


def test_links_to_s3_and_on_to_training(
    tars: dict[str, bytes], s3: servers.Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    place = f"s3://{servers.BUCKET}/recipe"
    with FaultProxy({f"/{name}": data for name, data in tars.items()}) as web:
        web.faults.append(Fault(status=403, times=9999, when=lambda r: r.method == "HEAD"))
        rows = [f"{name}\t{web.url}/{name}?sig=1" for name in tars]
        (tmp_path / "segment_anything_links.txt").write_text("\n".join(["file_name\tcdn_link", *rows]))
        steps = [[word.replace("s3://bucket/sa1b", place) for word in c] for c in commands(CONSOLE[0])]
        assert [c[0] for c in steps] == ["sa1b-wds", "sbatch", "sa1b-wds", "sa1b-wds"]
        run(steps[0], tmp_path)
        wrapped = shlex.split(steps[1][-1])
        for index in range(3):  # 10 tars, 4 a task
            run(wrapped, tmp_path, SLURM_ARRAY_TASK_ID=str(index))
        assert run(steps[2], tmp_path).startswith("3 done")
        run(steps[3], tmp_path)
    code = PYTHON[0].replace("s3://bucket/sa1b", place) + "\nprint(len(ds), state['epoch'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["50", "0"]
    assert len(sa1b_wds.open(place)) == 50


def test_from_gcs(tars: dict[str, bytes], gcs: servers.Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs.address)
    for name, data in tars.items():
        servers.gcs_put(gcs, f"tars%2F{name}", data)
    convert, rsync = commands(CONSOLE[1])
    replaced = {"gs://bucket/": f"gs://{servers.BUCKET}/", "/data/shards": str(tmp_path / "shards")}
    for old, new in replaced.items():
        convert = [word.replace(old, new) for word in convert]
    run(convert, tmp_path)
    assert len(sa1b_wds.open(tmp_path / "shards")) == 50
    assert rsync[:3] == ["gcloud", "storage", "rsync"]  # Google's own tool, which we do not test
    for path in (tmp_path / "shards").rglob("*"):
        if path.is_file():
            servers.gcs_put(gcs, f"sa1b/{path.relative_to(tmp_path / 'shards')}".replace("/", "%2F"), path.read_bytes())
    assert len(sa1b_wds.open(f"gs://{servers.BUCKET}/sa1b")) == 50


def test_the_lifecycle_rule(s3: servers.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store takes the rule as it stands there."""
    aws = Path(sys.executable).parent / "aws"
    if not aws.exists():
        pytest.skip("##### NO AWS CLI: pip install awscli (part of the `test` extra) #####")
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    Bucket(f"s3://{servers.BUCKET}/x").put("y", b"")
    (rule,) = commands(CONSOLE[2])
    words = [servers.BUCKET if word == "bucket" else word for word in rule]
    subprocess.run([str(aws), *words[1:]], check=True, timeout=60)
