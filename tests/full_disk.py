"""Run conversions on a file system that is too small, in a mount namespace of their own; prints a line of JSON each.

    unshare --user --map-root-user --mount python -m tests.full_disk SOURCES FOLDER

For each size: a tmpfs of that size, a conversion onto it, what it said, what it left; then room is made and the same
conversion is run again.
"""

import json
import subprocess
import sys
from pathlib import Path

from sa1b_wds.errors import Sa1bError

from . import running


def _mount(folder: str, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], check=True)


def _convert(sources: str, dest: Path) -> tuple[str, str]:
    try:
        with running.undisturbed():
            running.convert_folder(sources, str(dest))
    except Sa1bError as error:
        return type(error).__name__, str(error)
    return "", ""


def main(sources: str, folder: str) -> None:
    limits = [f"size={4 * pages}k" for pages in range(1, 40)] + [f"nr_inodes={n}" for n in range(2, 45)]
    for limit in limits:
        _mount(folder, limit)
        dest = Path(folder) / "out"
        kind, said = _convert(sources, dest)
        left = sorted(running.tree(dest)) if dest.exists() else []
        strays = running.receiptless(dest)
        subprocess.run(["mount", "-o", "remount,size=64m,nr_inodes=4096", folder], check=True)
        again = _convert(sources, dest)
        print(json.dumps([limit, kind, said, left, strays, again, running.tree(dest)]))
        subprocess.run(["umount", folder], check=True)
    _mount(folder, "size=64m")
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    print(json.dumps(["ro", *_convert(sources, Path(folder) / "out")]))
    subprocess.run(["umount", folder], check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
