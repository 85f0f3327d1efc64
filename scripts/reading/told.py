"""What the programs beside this file have in common: each reads data sets with one library, and tells what it read.

    python -m scripts.reading.read_NAME OUT.json DEST [DEST …]

Each runs in the environment of its library, which knows nothing of sa1b_wds. OUT.json gets, for each data set and each
way to read it, a row a sample: key, SHA-256 of the jpg (null where the data set has none) and of the packed member.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

Row = tuple[str, str | None, str]
Way = Callable[[Path], Iterable[Row]]


def digest(value: Any) -> str | None:
    """SHA-256 of bytes, of a file to read from, of an array, or of a field {"bytes": …}."""
    if isinstance(value, Mapping):
        value = value["bytes"]
    if hasattr(value, "read"):
        value.seek(0)
        value = value.read()
    return None if value is None else hashlib.sha256(memoryview(value).cast("B")).hexdigest()


def row(key: str, jpg: Any, member: Any) -> Row:
    found = digest(member)
    assert found is not None, f"{key} has no packed member"
    return key, digest(jpg), found


def tars(dest: Path) -> list[str]:
    """The shards, in order."""
    return [str(path) for path in sorted(dest.glob("*.tar"))]


def braces(dest: Path) -> str:
    """The shards as one name with braces."""
    names = [Path(name).name for name in tars(dest)]
    stem = names[0].removesuffix(".tar")[:-6]
    return f"{dest}/{stem}{{000000..{len(names) - 1:06d}}}.tar"


def has_images(dest: Path) -> bool:
    """Whether the samples have a jpg."""
    with Path(tars(dest)[0]).open("rb") as file:
        return file.read(100).rstrip(b"\0").endswith(b".jpg")


def tell(version: str, ways: Mapping[str, Way], *, with_images: Collection[str] = ()) -> None:
    """Read every data set in every way, and write down what came; `with_images`: ways that need a jpg."""
    out, *folders = sys.argv[1:]
    read: dict[str, dict[str, list[Row]]] = {}
    for folder in folders:
        read[folder] = {}
        for name, way in ways.items():
            if name in with_images and not has_images(Path(folder)):
                continue
            print(f"{folder}: {name}", flush=True)
            read[folder][name] = list(way(Path(folder)))
    Path(out).write_text(json.dumps({"version": version, "read": read}))
