"""This project itself: by the manifest, and by the shards alone."""

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import sa1b_wds

from .told import Row, row, tars, tell


def by_manifest(dest: Path) -> Iterator[Row]:
    ds = sa1b_wds.open(dest)
    for sample in ds:
        yield row(sample.key, sample.jpg if ds.has_images else None, sample.packed)


def by_shards(dest: Path) -> Iterator[Row]:
    for sample in sa1b_wds.open(tars(dest)):
        yield row(sample.key, sample.jpg, sample.packed)


if __name__ == "__main__":
    tell(version("sa1b-wds"), {"manifest": by_manifest, "shards alone": by_shards}, with_images=["shards alone"])
