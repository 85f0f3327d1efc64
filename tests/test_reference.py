"""The commands as documented are the commands as they are: README, help, config schema and its example."""

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sa1b_wds import cli
from sa1b_wds.config import SECTIONS
from scripts import reference

COMMANDS = reference.commands()
# Options that mean nothing in a file: the file itself, and which task this very process does.
NOT_IN_A_FILE = {"config", "task"}


def options(command: str) -> dict[str, inspect.Parameter]:
    function: Any = cli.app[command].default_command
    return dict(inspect.signature(function).parameters)


def test_the_readme_has_the_reference() -> None:
    readme = reference.README.read_text(encoding="utf-8")
    assert reference.spliced(readme) == readme, "run python scripts/reference.py"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_can_stand_in_the_file(command: str) -> None:
    assert command in SECTIONS, f"config.py has no section for {command}"
    assert set(options(command)) - NOT_IN_A_FILE == set(SECTIONS[command].__struct_fields__)
    assert "config" in options(command)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained(command: str) -> None:
    text = reference.help_of(command)
    assert "Example: sa1b-wds " in text
    for name, parameter in options(command).items():
        shown = name.upper() if parameter.kind is parameter.POSITIONAL_ONLY else f"--{name.replace('_', '-')}"
        assert re.search(rf"(?m)^  {shown}\b[^:]*: [^\[\s]", text), f"{command} {shown} is not explained"


def test_the_script_checks(tmp_path: Path) -> None:
    script = Path(reference.__file__)
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with pytest.raises(SystemExit, match="must have these two lines"):
        reference.spliced("# A README without them\n")
    assert reference.reference() in reference.spliced(f"a\n{reference.BEGIN}\nold\n{reference.END}\nb\n")
