"""Writer × reader: what this project writes, read by every other reader of WebDataset shards, compared byte by byte.

    python -m scripts.matrix [--record] [READER …]

The truth is a parser of a few lines (`truth`); each reader runs as a program of its own in the environment of its
library (`scripts/reading`, `scripts/environments.py`). `--record` keeps the result in scripts/readers.json and writes
the table in README.md, which a test holds against it.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sa1b_wds.synth import synthesise
from tests import edges, making, running

from . import environments

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "scripts" / "readers.json"
README = ROOT / "README.md"
BEGIN, END = "<!-- readers: written by scripts/readers --record -->", "<!-- end of readers -->"
CONVERTED, ALONE = "convert", "export --annotations-only"


@dataclass(frozen=True, kw_only=True)
class Reader:
    """One library, and where it runs."""

    title: str
    module: str
    environment: str | None = None
    """Of `scripts/environments.py`; None: that of the tests."""
    without_network: bool = False
    """It listens on every address of the machine, so it gets a network of its own."""
    sets: tuple[str, ...] = (CONVERTED, ALONE)


READERS = {
    "sa1b-wds": Reader(title="sa1b-wds", module="read_sa1b_wds"),
    "webdataset": Reader(title="webdataset", module="read_webdataset"),
    "tar": Reader(title="Python tarfile; tar", module="read_tar"),
    "wids": Reader(title="wids (in webdataset)", module="read_wids", environment="wids"),
    "energon": Reader(title="Megatron-Energon", module="read_energon", environment="energon"),
    "huggingface": Reader(title="Hugging Face datasets", module="read_huggingface", environment="huggingface"),
    "dali": Reader(title="DALI (CPU)", module="read_dali", environment="dali"),
    "ray": Reader(title="Ray Data", module="read_ray", environment="ray", without_network=True),
}

Row = tuple[str, str | None, str]


def make_sets(work: Path) -> dict[str, Path]:
    """The data sets to read: photographs in real sizes and every edge of the form, converted and exported."""
    paths = synthesise(work / "sources", tars=2, samples=12)
    (work / "sources" / "sa_000900.tar").write_bytes(making.tar(edges.members(tfds=False)))
    paths.append(work / "sources" / "sa_000900.tar")
    running.convert(paths, work / "convert", shards=2, mix=2)
    from sa1b_wds import export, open

    export.annotations_only(open(work / "convert"), str(work / "annotations"))
    return {CONVERTED: work / "convert", ALONE: work / "annotations"}


def members(dest: Path) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of all members of all shards, by the bytes that USTAR prescribes and nothing else."""
    for path in sorted(dest.glob("*.tar")):
        data, at = path.read_bytes(), 0
        assert data[-1024:] == bytes(1024)
        while at < len(data) - 1024:
            head = data[at : at + 512]
            assert head[257:265] == b"ustar\x0000" and head[156:157] == b"0"
            size = int(head[124:135], 8)
            yield head[:100].rstrip(b"\0").decode("ascii"), data[at + 512 : at + 512 + size]
            at += 512 + -(-size // 512) * 512


def truth(dest: Path) -> list[Row]:
    """A row a sample, as `scripts/reading/told.py` has them."""
    found: dict[str, dict[str, str]] = {}
    for name, data in members(dest):
        key, _, suffix = name.partition(".")
        found.setdefault(key, {})[suffix] = hashlib.sha256(data).hexdigest()
    return [(key, of.get("jpg"), of["safetensors"]) for key, of in found.items()]


def differences(expected: Sequence[Row], found: Sequence[Sequence[Any]]) -> list[str]:
    """How what a reader told differs from the truth, whatever the order; "" is a key that a reader does not give."""
    rows = [tuple(row) for row in found]
    if all(row[0] == "" for row in rows):
        expected = [("", *row[1:]) for row in expected]
    missing, extra = Counter(expected), Counter(rows)
    return [f"missing {row}" for row in missing - extra] + [f"not expected {row}" for row in extra - missing]


@cache
def isolation() -> list[str] | None:
    """What to put before a command to run it in a network namespace with nothing but a loopback; None: cannot be."""
    if not shutil.which("unshare") or not shutil.which("ip"):
        return None
    for options in (["-n"], ["-rn"]):
        command = ["unshare", *options, "bash", "-c", 'ip link set lo up && exec "$@"', "bash"]
        if subprocess.run([*command, "true"], capture_output=True).returncode == 0:
            return command
    return None


def command(name: str) -> list[str] | str:
    """How to run a reader; or, as text, why it cannot run here."""
    reader = READERS[name]
    inside: Path | None = Path(sys.executable)
    if reader.environment is not None:
        inside = environments.python(reader.environment)
        if inside is None:
            return f"NOT INSTALLED: run scripts/readers {name}, or READERS={name} scripts/test"
    elif name == "webdataset" and find_spec("webdataset") is None:
        return "NOT INSTALLED: pip install webdataset"
    before: list[str] = []
    if reader.without_network:
        found = isolation()
        if found is None:
            return "IT NEEDS A NETWORK NAMESPACE of its own, and unshare or ip is missing or not allowed here"
        before = found
    return [*before, str(inside), "-m", f"scripts.reading.{reader.module}"]


def left(dest: Path) -> set[tuple[str, int]]:
    """(name, bytes) of every file of a data set: no reader may need to add one, or an index of its own."""
    return {(str(p.relative_to(dest)), p.stat().st_size) for p in dest.rglob("*") if p.is_file()}


def read(name: str, sets: Mapping[str, Path], work: Path) -> dict[str, Any]:
    """Let a reader read all it can: {"version", "read": {set: {way: rows}}}.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    program = command(name)
    assert not isinstance(program, str), program
    out = work / f"{name}.json"
    folders = {str(sets[key]): key for key in READERS[name].sets}
    before = {key: left(sets[key]) for key in READERS[name].sets}
    # Everything a library leaves behind goes into the temporary folder.
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "TMPDIR": str(work), "HOME": str(work)}
    environment.pop("PYTEST_CURRENT_TEST", None)
    done = subprocess.run(
        [*program, str(out), *folders], cwd=ROOT, capture_output=True, text=True, env=environment, timeout=600
    )
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    for key, files in before.items():
        if changed := files.symmetric_difference(left(sets[key])):
            raise RuntimeError(f"{name} changed the data set: {sorted(changed)}")
    told = json.loads(out.read_text())
    return {"version": told["version"], "read": {folders[folder]: ways for folder, ways in told["read"].items()}}


def result(told: Mapping[str, Any], truths: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """What is recorded of one reader."""

    def compared(kind: str, rows: Sequence[Sequence[Any]]) -> dict[str, int]:
        return {"samples": len(rows), "differences": len(differences(truths[kind], rows))}

    read = told["read"].items()
    ways = {kind: {way: compared(kind, rows) for way, rows in of.items()} for kind, of in read}
    return {"version": told["version"], "ways": ways}


def table(record: Mapping[str, Any]) -> str:
    """The README's table, of what was recorded."""
    head = ["reader", "version", "read by", f"`{CONVERTED}`", f"`{ALONE}`"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, reader in READERS.items():
        of = record["readers"].get(name)
        if of is None:
            lines.append(f"| {reader.title} | – | not run | | |")
            continue
        how = "; ".join(of["ways"][CONVERTED])
        cells = [reader.title, of["version"], how, *(_cell(of["ways"].get(kind)) for kind in (CONVERTED, ALONE))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([BEGIN, *lines, END])


def _cell(ways: Mapping[str, Mapping[str, int]] | None) -> str:
    if not ways:
        return "–"
    wrong = sum(way["differences"] for way in ways.values())
    samples = {way["samples"] for way in ways.values()}
    counts = " or ".join(f"{n:,}" for n in sorted(samples))
    return f"{counts} samples, {'all equal' if not wrong else f'**{wrong:,} differences**'}"


def spliced(readme: str, record: Mapping[str, Any]) -> str:
    """A README with the table as it is now."""
    before, rest = readme.split(BEGIN)
    return before + table(record) + rest.split(END)[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("readers", nargs="*", metavar="READER", help=", ".join(READERS))
    given = parser.parse_args()
    names = given.readers or list(READERS)
    if unknown := set(names) - set(READERS):
        parser.error(f"no such reader: {', '.join(sorted(unknown))}; there are {', '.join(READERS)}")
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {"readers": {}}
    failed = False
    with tempfile.TemporaryDirectory(prefix="sa1b-wds-readers-") as folder:
        work = Path(folder)
        sets = make_sets(work)
        truths = {kind: truth(dest) for kind, dest in sets.items()}
        record["samples"] = {kind: len(rows) for kind, rows in truths.items()}
        for name in names:
            why = command(name)
            if isinstance(why, str):
                print(f"##### {name}: {why} #####")
                continue
            try:
                record["readers"][name] = found = result(read(name, sets, work), truths)
            except RuntimeError as error:
                print(f"##### {error} #####")
                failed = True
                continue
            for kind, ways in found["ways"].items():
                for way, of in ways.items():
                    counts = f"{of['samples']} samples, {of['differences']} differences"
                    print(f"{name} {found['version']}: {kind}: {way}: {counts}")
                    failed |= bool(of["differences"])
    if given.record:
        RECORD.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        README.write_text(spliced(README.read_text(encoding="utf-8"), record), encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
