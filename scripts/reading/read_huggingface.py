"""Hugging Face datasets: by the card (README.md) and by data_files, streaming and not."""

import os
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

cache = tempfile.TemporaryDirectory(prefix="sa1b-wds-hf-")
os.environ.update(HF_HOME=cache.name, HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")

import datasets  # noqa: E402

from .told import Row, row, tell  # noqa: E402


def rows(dest: Path, streaming: bool, card: bool) -> Iterator[Row]:
    if card:
        ds = datasets.load_dataset(str(dest), split="train", streaming=streaming)
    else:
        ds = datasets.load_dataset("webdataset", data_files=f"{dest}/*.tar", split="train", streaming=streaming)
    if "jpg" in ds.features:
        ds = ds.cast_column("jpg", datasets.Image(decode=False))
    for sample in ds:
        yield row(sample["__key__"], sample.get("jpg"), sample["safetensors"])


if __name__ == "__main__":
    ways = {
        f"{'by the card' if card else 'data_files=*.tar'}{', streaming' if streaming else ''}": partial(
            rows, streaming=streaming, card=card
        )
        for card in (True, False)
        for streaming in (False, True)
    }
    tell(datasets.__version__, ways)
