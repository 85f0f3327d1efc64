"""webdataset: plain, with braces, through a pipe, and split by node and worker."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import webdataset as wds

from .told import Row, braces, row, tars, tell


def rows(samples: Any) -> Iterator[Row]:
    for sample in samples:
        yield row(sample["__key__"], sample.get("jpg"), sample["safetensors"])


def plain(dest: Path) -> Iterator[Row]:
    return rows(wds.WebDataset(tars(dest), shardshuffle=False))


def with_braces(dest: Path) -> Iterator[Row]:
    return rows(wds.WebDataset(braces(dest), shardshuffle=False))


def piped(dest: Path) -> Iterator[Row]:
    return rows(wds.WebDataset([f"pipe:cat {name}" for name in tars(dest)], shardshuffle=False))


def split(dest: Path) -> Iterator[Row]:
    from torch.utils.data import DataLoader

    for rank in range(2):
        os.environ.update(RANK=str(rank), WORLD_SIZE="2")
        ds = wds.WebDataset(
            tars(dest),
            shardshuffle=False,
            empty_check=False,
            nodesplitter=wds.split_by_node,
            workersplitter=wds.split_by_worker,
        )
        yield from rows(DataLoader(ds, batch_size=None, num_workers=2))
    del os.environ["RANK"], os.environ["WORLD_SIZE"]


if __name__ == "__main__":
    ways = {"list of shards": plain, "braces": with_braces, "pipe:cat": piped}
    try:
        import torch  # noqa: F401
    except ImportError:
        print("torch is not installed: not read with nodes and workers")
    else:
        ways["2 nodes × 2 DataLoader workers"] = split
    tell(wds.__version__, ways)
