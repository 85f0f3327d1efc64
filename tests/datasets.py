"""Small converted data sets for tests of the loader, made by the real converter."""

from collections.abc import Sequence
from pathlib import Path

from sa1b_wds.annotations import unpack
from sa1b_wds.dataset import Dataset, open
from sa1b_wds.layout import I64

from . import making, running


def make(folder: Path, layout: Sequence[tuple[int, int]] = ((20, 4),), first: int = 1, **options: int) -> Path:
    """Convert tars of (samples, shards) each; ids run from `first`. Returns the destination."""
    sources, i = {}, first
    for number, (samples, _) in enumerate(layout):
        sources[f"sa_{number:06d}.tar"] = making.tar(making.pairs(range(i, i + samples), **options))
        i += samples
    paths = running.write(folder / "sources", sources)
    # Each source is a task of its own; tasks stand in the order of the plan's permutation.
    by_name = dict(zip(sources, (shards for _, shards in layout), strict=True))
    plan = running.planned(paths, mix=1)
    shards = [by_name[plan.sources[task.sources[0]].name] for task in plan.tasks]
    running.convert(paths, folder / "dest", shards=shards, mix=1)
    return folder / "dest"


def keys(ds: Dataset) -> list[str]:
    """Keys of all samples, in order, from the side files."""
    out = []
    for i in range(len(ds)):
        shard, index = ds.selection.at(i)
        ids = ds.shards[shard].index().image_id
        assert ids is not None
        out.append(f"sa_{ids[index]}")
    return out


def offsets(ds: Dataset, shard: int) -> I64:
    """Where the samples of a shard stand."""
    return ds.shards[shard].index().offsets


def tars(dest: Path) -> list[Path]:
    return sorted(dest.glob("*.tar"))


def without_manifest(dest: Path, folder: Path, idx: bool = False) -> Path:
    """The shards alone, with or without Energon's index beside each."""
    folder.mkdir()
    for tar in tars(dest):
        (folder / tar.name).write_bytes(tar.read_bytes())
        if idx:
            (folder / f"{tar.name}.idx").write_bytes(Path(f"{tar}.idx").read_bytes())
    return folder


__all__ = ["keys", "make", "offsets", "open", "tars", "unpack", "without_manifest"]
