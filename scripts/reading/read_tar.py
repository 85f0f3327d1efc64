"""Plain tar: Python's tarfile, seeking and as a stream, and GNU tar from a pipe."""

import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal

from .told import Row, Way, row, tars, tell


def rows(members: Iterator[tuple[str, bytes]]) -> Iterator[Row]:
    """Members in the order of the archive → samples; as webdataset groups them: adjacent, up to the first dot."""
    sample: dict[str, bytes] = {}
    current = ""
    for name, data in members:
        key, _, suffix = name.partition(".")
        if key != current and sample:
            yield row(current, sample.get("jpg"), sample["safetensors"])
            sample = {}
        assert suffix not in sample, f"{name} twice"
        current, sample[suffix] = key, data
    yield row(current, sample.get("jpg"), sample["safetensors"])


def by_tarfile(dest: Path, mode: Literal["r:", "r|"]) -> Iterator[Row]:
    for path in tars(dest):
        with tarfile.open(path, mode) as archive:
            yield from rows((m.name, file.read()) for m in archive if (file := archive.extractfile(m)))


def by_gnu_tar(dest: Path) -> Iterator[Row]:
    for path in tars(dest):
        with tempfile.TemporaryDirectory() as folder:
            with Path(path).open("rb") as file:
                command = ["tar", "-xvf", "-", "-C", folder]
                done = subprocess.run(command, stdin=file, capture_output=True, text=True, check=True)
            assert not done.stderr, done.stderr
            yield from rows((name, (Path(folder) / name).read_bytes()) for name in done.stdout.split())


if __name__ == "__main__":
    version = f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    ways: dict[str, Way] = {
        "tarfile": partial(by_tarfile, mode="r:"),
        "tarfile, as a stream": partial(by_tarfile, mode="r|"),
    }
    if shutil.which("tar"):
        said = subprocess.run(["tar", "--version"], capture_output=True, text=True, check=True).stdout
        if found := re.match(r"tar \(GNU tar\) (\S+)", said):
            version += f"; GNU tar {found[1]}"
            ways["GNU tar, from a pipe"] = by_gnu_tar
    tell(version, ways)
