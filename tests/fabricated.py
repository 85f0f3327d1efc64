"""A converted archive of any size that nobody converted: plan, receipts and rows as tasks leave them, shards of holes.

For what depends on the number of shards and samples alone: `finalize`, `open`, order, state, `status`. Shards are
sparse files of the length that their receipt states; one sample of the whole archive is real, so that it can be read.
DALI's index stands in the receipts, and nowhere else: nothing here reads it.
"""

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sa1b_wds import tar
from sa1b_wds.annotations import Packer
from sa1b_wds.convert import write_plan
from sa1b_wds.format import ROW
from sa1b_wds.manifest import RECEIPT_FORMAT, FileFact, Receipt, ShardFact, SourceFact, receipt_name, side_names
from sa1b_wds.plan import Plan, Source, make_plan
from sa1b_wds.shard import file_fact
from sa1b_wds.storage import Destination

from . import making

I64 = npt.NDArray[np.int64]

IMAGES = 11_186
"""Of a tar of SA-1B; the last one has fewer."""
TAR_BYTES = 11_303_000_000


@dataclass(frozen=True, kw_only=True)
class Archive:
    """What was fabricated."""

    plan: Plan
    key: str
    """Of the sample that is real."""
    jpg: bytes
    """Its image."""
    samples: int


def sources(tars: int, tar_bytes: int = TAR_BYTES) -> list[Source]:
    """Sources of SA-1B's names, of about these sizes."""
    sizes = np.random.default_rng(0).normal(tar_bytes, tar_bytes * 0.01, tars).astype(np.int64)
    return [Source(name=f"sa_{n:06d}.tar", size=int(size)) for n, size in enumerate(sizes)]


def ids(tars: int, images: int) -> list[I64]:
    """Image ids of each tar: rising over the tars with a few holes; sa_000020.tar begins with 223,750, as the real."""
    counts = [images] * tars
    if (tars, images) == (1000, IMAGES):
        counts[-1] = 10_548  # 11,185,362 in all
    ends = np.cumsum(counts)
    line = (np.arange(end - count, end) for end, count in zip(ends, counts, strict=True))
    return [image_ids(at) for at in line]


def image_ids(at: I64) -> I64:
    """The ids of the images at these places of the archive."""
    return at + 1 + at * 29 // 223_720


def fabricate(
    dest: Path,
    *,
    tars: int,
    images: int = IMAGES,
    tar_bytes: int = TAR_BYTES,
    shard_size: int = 1 << 30,
    mix: int = 4,
    tasks: Sequence[int] | None = None,
) -> Archive:
    """Everything that all tasks of a plan leave, in `dest`.

    Args:
        tasks: these alone have been done.
    """
    plan = make_plan(sources(tars, tar_bytes), shard_size=shard_size, mix=mix, seed=0)
    destination = Destination(str(dest))
    write_plan(destination, plan)
    for folder in ("index", "receipts"):
        (dest / folder).mkdir(parents=True, exist_ok=True)
    all_ids, digest = ids(tars, images), plan.digest
    wanted = int(all_ids[min(20, tars - 1)][0])
    span, jpg = _real(wanted)
    for index, task in enumerate(plan.tasks):
        if tasks is not None and index not in tasks:
            continue
        random = np.random.default_rng([index])
        mixed = [random.permutation(all_ids[n]) for n in task.sources]
        # The sources take turns; a source that has ended is passed over.
        turn = np.concatenate([np.arange(len(part)) for part in mixed])
        number = np.repeat(np.array(task.sources), [len(part) for part in mixed])
        order = np.lexsort([np.repeat(np.arange(len(mixed)), [len(part) for part in mixed]), turn])
        rows = np.zeros(len(turn), ROW)
        rows["image_id"], rows["source"] = np.concatenate(mixed)[order], number[order]
        rows["jpg_ordinal"], rows["json_ordinal"] = 2 * turn[order], 2 * turn[order] + 1
        rows["crc32"] = random.integers(1 << 32, size=len(rows), dtype=np.uint32)
        mean = plan.bytes_of(task) // len(rows)
        spans = random.integers(mean // 4 // 512 + 4, mean * 7 // 4 // 512 + 8, len(rows)) * 512
        shards = []
        for shard, name in enumerate(plan.shard_names(task)):
            mine, lengths = rows[shard :: task.shards].copy(), spans[shard :: task.shards].copy()
            at = np.flatnonzero(mine["image_id"] == wanted)
            if at.size:
                mine["crc32"][at], lengths[at] = zlib.crc32(span), len(span)
            offsets = np.concatenate([[0], np.cumsum(lengths)]).astype("<i8")
            with (dest / name).open("wb") as file:
                file.truncate(int(offsets[-1]) + len(tar.END))
                if at.size:
                    file.seek(int(offsets[at[0]]))
                    file.write(span)
            shards.append(_shard(dest, name, mine, offsets))
        receipt = Receipt(
            format=RECEIPT_FORMAT,
            plan=digest,
            task=index,
            on_damage="fail",
            sources=[_source(plan.sources[n].name, len(part)) for n, part in zip(task.sources, mixed, strict=True)],
            shards=shards,
            quarantine=[],
        )
        (dest / receipt_name(index)).write_bytes(receipt.to_bytes())
    return Archive(plan=plan, key=f"sa_{wanted}", jpg=jpg, samples=sum(map(len, all_ids)))


def _real(image_id: int) -> tuple[bytes, bytes]:
    """(the span of a real sample in a shard, its jpg)."""
    jpg, document = (member.data for member in making.pair(image_id))
    packed = bytes(Packer().pack(document, f"sa_{image_id}").member)
    members = ((f"sa_{image_id}.jpg", jpg), (f"sa_{image_id}.safetensors", packed))
    return b"".join(tar.header(name, len(d)) + d + bytes(tar.padding(len(d))) for name, d in members), jpg


def _shard(dest: Path, name: str, rows: "np.ndarray[tuple[int], np.dtype[np.void]]", offsets: I64) -> ShardFact:
    idx_name, rows_name, dali = side_names(name)
    made = {idx_name: offsets.tobytes(), rows_name: rows.tobytes()}
    for side, data in made.items():
        (dest / side).write_bytes(data)
    facts = [file_fact(*file) for file in made.items()]
    facts.append(FileFact(name=dali, bytes=60 * len(rows), sha256=hashlib.sha256(dali.encode()).hexdigest()))
    return ShardFact(
        name=name,
        bytes=int(offsets[-1]) + len(tar.END),
        samples=len(rows),
        annotations=98 * len(rows),
        area_mismatches=0,
        stored_sources=0,
        sha256=hashlib.sha256(name.encode()).hexdigest(),
        files=facts,
    )


def _source(name: str, images: int) -> SourceFact:
    return SourceFact(
        name=name,
        members=2 * images + 1,
        samples=images,
        quarantined=0,
        ignored={"directory": 1},
        skipped=[],
        greatest_distance=2 * images - 1,
    )
