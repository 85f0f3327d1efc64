"""The scripts of the project: they parse, say what they are for, stop at the first failure, and find a Python."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def first_line(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.readline()


FILES = sorted(
    path
    for folder in ("scripts", ".ci")
    for path in (ROOT / folder).rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
)
SHELL = [
    path for path in FILES if path.suffix == ".sh" or (b"sh" in first_line(path)[:24] and first_line(path)[:2] == b"#!")
]
PROGRAMS = [path for path in FILES if first_line(path)[:2] == b"#!"]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def bash(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_they_are_there() -> None:
    assert {"scripts/test", "scripts/check", "scripts/environment.sh", ".ci/run"} <= {name_of(path) for path in SHELL}


@pytest.mark.parametrize("path", SHELL, ids=name_of)
def test_shell_scripts_parse(path: Path) -> None:
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("path", PROGRAMS, ids=name_of)
def test_programs_can_be_called_and_say_what_they_are_for(path: Path) -> None:
    assert os.access(path, os.X_OK)
    _, second, *_ = path.read_text(encoding="utf-8").splitlines()
    assert second.startswith(("# ", '"""')) and len(second) > 20


@pytest.mark.parametrize("path", [path for path in SHELL if path in PROGRAMS], ids=name_of)
def test_shell_scripts_stop_at_the_first_failure(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    code = [line for line in lines if line and not line.startswith("#")]
    assert code[0] == "set -euo pipefail"
    # They work from wherever they are called. Slurm runs a copy, in the folder that it was submitted from.
    if path.suffix != ".sbatch":
        assert any(re.match(r'(cd |here=\$\(cd )"\$\(dirname "\$0"\)', line) for line in code)


def test_a_python_is_found() -> None:
    done = bash("source scripts/environment.sh; find_python; echo $PYTHON", PYTHON=sys.executable)
    assert done.stdout.strip() == sys.executable


def test_a_python_that_is_too_old_is_passed_over(tmp_path: Path) -> None:
    for name, code in (("python3", "exit 1"), ("python3.12", f'exec {sys.executable} "$@"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{code}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:/usr/bin:/bin"
    for gone in ("python3.13", "python3.11"):
        (tmp_path / gone).write_text("#!/bin/sh\nexit 127\n")
        (tmp_path / gone).chmod(0o755)
    done = bash("unset PYTHON; source scripts/environment.sh; find_python; echo $PYTHON", PATH=path)
    assert done.stdout.strip() == "python3.12", done.stderr


def test_no_python_is_said_in_two_lines() -> None:
    done = bash("source scripts/environment.sh; find_python; echo went on", PYTHON="/nowhere/python3")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("No Python >= 3.11 with its venv module found (tried: /nowhere/python3).\n")


@pytest.mark.slow
def test_an_environment_is_made_once(tmp_path: Path) -> None:
    # Nothing to download: pip is there already.
    make = f"set -euo pipefail; source scripts/environment.sh; make_environment {tmp_path}/venv --no-index"
    first = bash(f"{make} pip; $PY -c 'print(7)'", PYTHON=sys.executable)
    assert first.returncode == 0, first.stderr
    assert first.stdout.endswith("7\n") and "the first time only" in first.stdout
    assert bash(f"{make} pip; $PY -c 'print(7)'", PYTHON=sys.executable).stdout == "7\n"
    # Something else is wanted, and cannot be had: it fails, and does not pass for done the next time.
    for _ in range(2):
        assert (
            bash(f"{make} no-such-package-anywhere; echo went on", PYTHON=sys.executable).stdout.count("went on") == 0
        )


def test_an_environment_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    done = bash(f"source scripts/environment.sh; make_environment {tmp_path} pip; echo went on", PYTHON=sys.executable)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"{tmp_path} is there and was not made by this script; move it away first.\n"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
