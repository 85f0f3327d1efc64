"""Ray Data: a list of shards, and the folder with file_extensions; in a network namespace of its own."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_DATA_DISABLE_PROGRESS_BARS="1")

import ray

from .told import Row, row, tars, tell


def rows(ds: Any) -> Iterator[Row]:
    for sample in ds.iter_rows():
        yield row(sample["__key__"], sample.get("jpg"), sample["safetensors"])


def listed(dest: Path) -> Iterator[Row]:
    return rows(ray.data.read_webdataset(tars(dest), decoder=None))


def folder(dest: Path) -> Iterator[Row]:
    return rows(ray.data.read_webdataset(str(dest), file_extensions=["tar"], decoder=None))


if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=200 << 20, log_to_driver=False)
    tell(ray.__version__, {"list of shards": listed, "folder, file_extensions": folder})
    ray.shutdown()
