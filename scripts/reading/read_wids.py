"""wids: by wids.json, any sample by its number; nothing is copied, since the cache is the data set itself."""

import json
import random
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import wids

from .told import Row, row, tell


def opened(what: Any, dest: Path) -> Any:
    # The default transformations would hand every .safetensors to torch's loader, which wants a file name.
    return wids.ShardListDataset(what, cache_dir=str(dest), transformations=[lambda sample: sample])


def rows(ds: Any) -> Iterator[Row]:
    places = list(range(len(ds)))
    random.Random(0).shuffle(places)
    for i in places:
        yield row(ds[i]["__key__"], ds[i].get(".jpg"), ds[i][".safetensors"])


def by_index(dest: Path) -> Iterator[Row]:
    return rows(opened(str(dest / "wids.json"), dest))


def by_list(dest: Path) -> Iterator[Row]:
    shards = json.loads((dest / "wids.json").read_text())["shardlist"]
    return rows(opened([{**shard, "url": str(dest / shard["url"])} for shard in shards], dest))


if __name__ == "__main__":
    tell(version("webdataset"), {"wids.json, random order": by_index, "list of shards": by_list})
