"""Side files that let other readers open the data set without an indexing pass of their own: manifest → bytes.

wids.json (webdataset's wids), `.nv-meta/` (Megatron-Energon) and README.md (the card of the Hugging Face Hub). DALI's
and Energon's index of each shard are written with the shard.
"""

import uuid
from collections.abc import Iterator

import msgspec

from .manifest import ShardFact, Totals
from .plan import Recoding

ENERGON_VERSION = "7.4.0"


def files(
    plan: str,
    totals: Totals,
    shards: list[ShardFact],
    *,
    images: bool = True,
    recoding: Recoding | None = None,
) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of every side file of a data set.

    Args:
        plan: SHA-256 of the plan, hex: Energon's uuid is made from it, so that the same data has the same.
        images: whether the samples have a jpg.
        recoding: how they were made smaller; None: they are the source's.
    """
    yield "wids.json", _wids(shards)
    yield (
        ".nv-meta/.info.json",
        _json({"energon_version": ENERGON_VERSION, "shard_counts": {s.name: s.samples for s in shards}}),
    )
    yield ".nv-meta/split.yaml", _split(shards)
    yield ".nv-meta/dataset.yaml", b"__module__: megatron.energon\n__class__: CrudeWebdataset\n"
    yield ".nv-meta/index.uuid", str(uuid.UUID(hex=plan[:32], version=4)).encode()
    yield "README.md", _card(totals, images, recoding)


def _json(value: object) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n"


def _wids(shards: list[ShardFact]) -> bytes:
    listed = [{"url": s.name, "nsamples": s.samples, "filesize": s.bytes} for s in shards]
    head = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "name": "sa1b", "info": {}}
    return _json({**head, "shardlist": listed})


def _split(shards: list[ShardFact]) -> bytes:
    names = [s.name for s in shards]
    numbers = [int(n.removesuffix(".tar")[-6:]) for n in names]
    if numbers == list(range(numbers[0], numbers[0] + len(numbers))) and len(numbers) > 1:
        stem = names[0].removesuffix(".tar")[:-6]
        names = [f"{stem}{{{numbers[0]:06d}..{numbers[-1]:06d}}}.tar"]
    train = "".join(f'  - "{name}"\n' for name in names)
    return f"exclude: []\nsplit_parts:\n  train:\n{train}  val: []\n  test: []\n".encode()


def _card(totals: Totals, images: bool, recoding: Recoding | None) -> bytes:
    jpg = "  - name: jpg\n    dtype: image\n" if images else ""
    if images and recoding is not None:
        members = (
            "Each sample is two members: `sa_<id>.jpg`, the photograph with at most "
            f"{recoding.max_side:,} pixels on its longest\nside (JPEG quality {recoding.quality}; "
            "those that had no more are as Meta published them), and `sa_<id>.safetensors`,\n"
            "all annotations of the image as columns, in pixels of the original. `manifest.json` lists every shard\n"
            "with its size, counts and SHA-256."
        )
    elif images:
        members = (
            "Each sample is two members: `sa_<id>.jpg`, the bytes that Meta published, and `sa_<id>.safetensors`, all\n"
            "annotations of the image as columns. `manifest.json` lists every shard with its size, counts and SHA-256."
        )
    else:
        members = (
            "Each sample is one member, `sa_<id>.safetensors`: all annotations of the image as columns, without the\n"
            "image. `manifest.json` lists every shard with its size, counts and SHA-256."
        )
    return f"""---
pretty_name: SA-1B as WebDataset shards
license: other
license_name: sa-1b-dataset-research-license
license_link: https://ai.meta.com/datasets/segment-anything/
tags:
- webdataset
- segment-anything
task_categories:
- image-segmentation
configs:
- config_name: default
  default: true
  data_files:
  - split: train
    path: "sa1b-train-*.tar"
dataset_info:
  config_name: default
  features:
{jpg}  - name: safetensors
    dtype: binary
  - name: __key__
    dtype: string
  - name: __url__
    dtype: string
  splits:
  - name: train
    num_bytes: {totals.bytes}
    num_examples: {totals.samples}
  download_size: {totals.bytes}
  dataset_size: {totals.bytes}
---

# SA-1B as WebDataset shards

{totals.samples:,} images with {totals.annotations:,} masks in {totals.shards:,} shards ({totals.bytes:,} bytes), made
by sa1b-wds. {members}

SA-1B is published by Meta under a research licence, which applies to these shards as it does to the original.
""".encode()
