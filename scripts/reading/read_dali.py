"""DALI's CPU reader: with our index, without one, and shuffled without mmap."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import nvidia.dali
from nvidia.dali import fn, pipeline_def

from .told import Row, has_images, row, tars, tell


def keys(dest: Path) -> list[str]:
    """Of all samples, in order: DALI gives none, so they are taken from its index, which is read in this order."""
    lines = [line for tar in tars(dest) for line in index(dest, tar).read_text().splitlines()[1:]]
    return [line.split()[3].partition(".")[0] for line in lines]


def index(dest: Path, tar: str) -> Path:
    return dest / "index" / f"{Path(tar).stem}.idx"


def rows(dest: Path, with_index: bool, shuffled: bool) -> Iterator[Row]:
    names = tars(dest)
    suffixes = ["jpg", "safetensors"] if has_images(dest) else ["safetensors"]
    paths = [str(index(dest, name)) for name in names] if with_index else None

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)  # type: ignore[untyped-decorator]
    def reading() -> object:
        found = fn.readers.webdataset(
            paths=names,
            index_paths=paths,
            ext=suffixes,
            missing_component_behavior="error",
            random_shuffle=shuffled,
            dont_use_mmap=shuffled,
            name="reader",
        )
        return found if isinstance(found, tuple) else tuple(found) if isinstance(found, list) else found

    pipe = reading()
    pipe.build()
    order = keys(dest)
    if pipe.reader_meta("reader")["epoch_size"] != len(order):
        raise SystemExit(f"DALI sees {pipe.reader_meta('reader')['epoch_size']} samples for {len(order)}")
    for key in order:
        *jpg, member = (np.asarray(out.at(0)) for out in pipe.run())
        yield row("" if shuffled else key, jpg[0] if jpg else None, member)


if __name__ == "__main__":
    tell(
        nvidia.dali.__version__,
        {
            "index_paths": partial(rows, with_index=True, shuffled=False),
            "no index": partial(rows, with_index=False, shuffled=False),
            "index_paths, shuffled (bytes alone)": partial(rows, with_index=True, shuffled=True),
        },
    )
