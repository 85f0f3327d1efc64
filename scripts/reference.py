"""Write the reference of the commands into README.md, from their own `--help`.

python scripts/reference.py            writes it between the two marker lines
python scripts/reference.py --check    exits 1 if README.md does not have it as it is now
"""

import sys
import textwrap
from pathlib import Path

from rich.console import Console

from sa1b_wds.cli import app

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- commands: written by scripts/reference.py -->", "<!-- end of commands -->"


def commands() -> list[str]:
    """Names of all commands, in the order of the program's own help."""
    return [name for name in app if not name.startswith("-")]


def help_of(command: str) -> str:
    """What `sa1b-wds COMMAND --help` says, without its frames, wrapped by us: rich's lines differ between releases."""
    console = Console(width=10_000, no_color=True, force_terminal=False)
    app[command].help_formatter = "plain"
    with console.capture() as captured:
        app.help_print([command], console=console)
    lines = captured.get().strip().splitlines()
    wrapped = (
        textwrap.wrap(
            line,
            118,
            subsequent_indent="      " if line.startswith("  ") else "",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for line in lines
    )
    return "\n".join("\n".join(line) for line in wrapped)


def reference() -> str:
    """The whole section, markers included."""
    parts = [BEGIN]
    for command in commands():
        parts += [f"### `sa1b-wds {command}`", "```text", help_of(command), "```"]
    return "\n".join([*parts, END])


def spliced(readme: str) -> str:
    """A README with the section as it is now."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise SystemExit(f"README.md must have these two lines once, in this order:\n{BEGIN}\n{END}")
    before, rest = readme.split(BEGIN)
    return before + reference() + rest.split(END)[1]


def main(arguments: list[str]) -> int:
    readme = README.read_text(encoding="utf-8")
    new = spliced(readme)
    if arguments == ["--check"]:
        if new != readme:
            print("README.md does not have the commands as they are: run python scripts/reference.py", file=sys.stderr)
        return int(new != readme)
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
