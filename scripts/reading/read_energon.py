"""Megatron-Energon: the data set as it is, without `energon prepare`; alone, and as 2 ranks × 2 workers."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron.energon import (
    Cooker,
    DefaultTaskEncoder,
    Sample,
    WorkerConfig,
    basic_sample_keys,
    get_loader,
    get_train_dataset,
    stateless,
)

from .told import Row, row, tell


@dataclass
class Members(Sample):  # type: ignore[misc]
    jpg: bytes | None
    member: bytes


@stateless  # type: ignore[untyped-decorator]
def cook(sample: dict[str, Any]) -> Members:
    return Members(**basic_sample_keys(sample), jpg=sample.get("jpg"), member=sample["safetensors"])


class Encoder(DefaultTaskEncoder):  # type: ignore[misc]
    decoder = None
    cookers = [Cooker(cook)]  # noqa: RUF012


def rows(dest: Path, rank: int, world_size: int, workers: int) -> Iterator[Row]:
    config = WorkerConfig(rank=rank, world_size=world_size, num_workers=workers)
    ds = get_train_dataset(
        dest,
        worker_config=config,
        batch_size=None,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        task_encoder=Encoder(),
        repeat=False,
    )
    for sample in get_loader(ds):
        yield row(sample.__key__.rpartition("/")[2], sample.jpg, sample.member)


def alone(dest: Path) -> Iterator[Row]:
    return rows(dest, 0, 1, 0)


def ranks(dest: Path) -> Iterator[Row]:
    for rank in range(2):
        yield from rows(dest, rank, 2, 2)


if __name__ == "__main__":
    tell(version("megatron-energon"), {"get_train_dataset": alone, "2 ranks × 2 workers": ranks})
