"""The annotations for those who do not want the photographs: shards without images, Parquet, COCO's JSON.

Every sample is read whole and held against its CRC-32 first, the photograph too: so an export costs one pass over the
selected samples, of which it writes about a twentieth. A subset is exported by opening it: `open(…, split=…, keys=…)`.

- `annotations_only`: one shard for each shard that has a selected sample, numbered from 0 without gaps, with the packed
  members as they are, and the side files of other readers. A shard is published whole, its receipt last: run it again
  after an interruption and it goes on.
- `parquet`: one file, one row a mask, the columns of `table.COLUMNS`.
- `coco`: one JSON document as pycocotools' `COCO` reads it. Boxes get COCO's convention, [x, y, w + 1, h + 1], which is
  what `pycocotools.mask.toBbox` gives; annotation ids must be unique, since COCO keeps one of two without a word.
"""

import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import orjson

from . import sidecars, table, tar
from .annotations import Annotations, unpack
from .buffers import Pool
from .dataset import Dataset
from .errors import DuplicateKey, FormatError, MissingPackage, Sa1bError, UsageError
from .format import FORMAT
from .layout import PACKED
from .manifest import FileFact, ShardFact, totals
from .reader import PackedSample, ReadCost
from .storage import Attempt, Destination

if TYPE_CHECKING:
    from .storage import FileWriter

Report = Callable[[int, int], None]
"""Gets bytes of shards read, and about how many it will be in all."""

EXPORT_NAME = "export.json"
_AT_ONCE = 32
_ROW_GROUP = 1 << 18


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """What was written."""

    samples: int
    annotations: int
    bytes: int
    files: int
    """Shards, or 1."""


class _Head(msgspec.Struct, frozen=True, kw_only=True):
    """What an export is of: written first, so that no other export goes on with it."""

    format: str
    of: str
    """Fingerprint of the data set and the selection."""
    shards: int


def _silent(done: int, total: int) -> None:
    pass


class _Counter:
    def __init__(self, ds: Dataset, report: Report) -> None:
        self._report, self._done = report, 0
        self._total = round(float((ds.shards.mean_bytes[ds.selection.shard] * ds.selection.count).sum()))

    def add(self, count: int) -> None:
        self._done += count
        self._report(self._done, max(self._done, self._total))

    def finish(self) -> None:
        self._report(self._done, self._done)


# ---------------------------------------------------------------------------------------------- shards without images


def annotations_only(ds: Dataset, out: str, *, report: Report = _silent) -> Exported:
    """Write the samples without their photographs: shards whose samples have one member, `sa_<id>.safetensors`.

    Args:
        ds: what to export.
        out: a folder outside of the data set; what an export of the same samples wrote there already stays.
        report: gets bytes read, and about how many it will be.

    Raises:
        UsageError: nothing is selected; `out` lies in the data set, or holds something else.
        FormatError, ShardDamaged, StorageError: a sample cannot be read. The shards finished before stay.
    """
    parts = len(ds.selection.shard)
    head = _Head(format="sa1b-wds-export/1", of=ds.fingerprint(False), shards=parts)
    folder = _folder(ds, out)
    _begin(folder, head)
    facts: list[ShardFact] = []
    counter = _Counter(ds, report)
    try:
        for part in range(parts):
            name = f"sa1b-train-{part:06d}.tar"
            receipt = f"receipts/shard-{part:06d}.json"
            if not folder.exists(receipt):
                with folder.attempt(f"export-{part:06d}") as attempt:
                    fact = _shard(attempt, ds, part, name, counter)
                    attempt.publish(receipt, msgspec.json.encode(fact))
            facts.append(_receipt(folder, receipt))
        counter.finish()
        sums = totals([], facts)
        plan = hashlib.sha256(head.of.encode()).hexdigest()
        for side_name, data in sidecars.files(plan, sums, facts, images=False):
            folder.put(side_name, data)
    finally:
        folder.clear_state()
    return Exported(samples=sums.samples, annotations=sums.annotations, bytes=sums.bytes, files=parts)


def _folder(ds: Dataset, out: str) -> Destination:
    if not len(ds):
        raise UsageError(repr(ds), "nothing to export")
    folder = Destination(out)
    local = ds.manifest is not None and ("://" not in ds.where or ds.where.startswith("file://"))
    if local and folder.root.resolve().is_relative_to(Destination(ds.where).root.resolve()):
        raise UsageError(out, "lies in the data set: readers would take what is written for a part of it")
    return folder


def _begin(folder: Destination, head: _Head) -> None:
    if folder.exists(EXPORT_NAME):
        there = folder.read(EXPORT_NAME)
        if there != _text(head):
            raise UsageError(folder.place(EXPORT_NAME), "the export of other samples is there: use another folder")
        return
    if folder.root.exists() and any(folder.root.iterdir()):
        raise UsageError(folder.where, "is not empty, and no export: use another folder")
    folder.put_new(EXPORT_NAME, _text(head))


def _text(head: _Head) -> bytes:
    return msgspec.json.format(msgspec.json.encode(head), indent=1) + b"\n"


def _receipt(folder: Destination, name: str) -> ShardFact:
    try:
        return msgspec.json.decode(folder.read(name), type=ShardFact)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise FormatError(folder.place(name), f"not a receipt: {error}") from None


def _shard(attempt: Attempt, ds: Dataset, part: int, name: str, counter: _Counter) -> ShardFact:
    """One shard and its indices, in the attempt."""
    writer, digest = attempt.create(name), hashlib.sha256()
    offsets, lines, annotations, stored, at = [0], [], 0, 0, 0
    try:
        for sample, a in _read(ds, part, counter):
            size, member = len(sample.member), f"{sample.key}{PACKED}"
            pieces: list[bytes | memoryview] = [tar.header(member, size), sample.member, bytes(tar.padding(size))]
            for piece in pieces:
                digest.update(piece)
            writer.write(pieces)
            lines.append(f"{PACKED[1:]} {at + tar.BLOCK} {size} {member}\n")
            at += sum(map(len, pieces))
            offsets.append(at)
            annotations += len(a)
            stored += a.source_json is not None
        digest.update(tar.END)
        writer.write([tar.END])
        writer.finish()
    finally:
        writer.close()
    sides = {
        f"{name}.idx": np.array(offsets, "<i8").tobytes(),
        f"index/{name.removesuffix('.tar')}.idx": f"v1.2 {len(lines)}\n{''.join(lines)}".encode(),
    }
    for side, data in sides.items():
        attempt.put(side, data)
    return ShardFact(
        name=name,
        bytes=at + len(tar.END),
        samples=len(lines),
        annotations=annotations,
        area_mismatches=0,
        stored_sources=stored,
        sha256=digest.hexdigest(),
        files=[FileFact(name=n, bytes=len(d), sha256=hashlib.sha256(d).hexdigest()) for n, d in sides.items()],
    )


def _read(ds: Dataset, part: int, counter: _Counter) -> Iterator[tuple[PackedSample, Annotations]]:
    """The selected samples of one shard in their order; each is good until the next."""
    pool = Pool(idle=1 << 24)
    count = int(ds.selection.count[part])
    for begin in range(0, count, _AT_ONCE):
        i = np.arange(begin, min(begin + _AT_ONCE, count))
        shards, places = ds.selection.places(np.full(len(i), part), i)
        cost = ReadCost()
        read = ds.shards[int(shards[0])].read(places.tolist(), pool, cost)
        counter.add(cost.bytes)
        for found in read:
            if isinstance(found, Sa1bError):
                raise found
            a = unpack(found.member, found.where)
            if a.image_id != found.image_id:
                raise FormatError(found.where, "annotations of another image", found.image_id, a.image_id)
            yield found, a
            found.release()


def _all(ds: Dataset, report: Report) -> Iterator[tuple[PackedSample, Annotations]]:
    counter = _Counter(ds, report)
    for part in range(len(ds.selection.shard)):
        yield from _read(ds, part, counter)
    counter.finish()


# ------------------------------------------------------------------------------------------------------ single files


def _one_file(ds: Dataset, out: str, kind: str, write: Callable[["FileWriter"], tuple[int, int]]) -> Exported:
    """`out` written whole or not at all, by a function that returns (annotations, bytes)."""
    path = Path(out)
    folder, place = _folder(ds, str(path.parent)), f"{path.parent}/{path.name}"
    if folder.exists(path.name):
        raise UsageError(place, "is there already")
    try:
        with folder.attempt(f"{kind}-{path.name}") as attempt:
            writer = attempt.create(path.name)
            try:
                annotations, size = write(writer)
                writer.finish()
            finally:
                writer.close()
            if not attempt.publish_one(path.name):
                raise UsageError(place, "is there already")
    finally:
        folder.clear_state()
    return Exported(samples=len(ds), annotations=annotations, bytes=size, files=1)


class _Sink(io.RawIOBase):
    """What pyarrow writes to."""

    def __init__(self, writer: "FileWriter") -> None:
        self._writer, self._at = writer, 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        if view.nbytes:
            self._writer.write([view])
        self._at += view.nbytes
        return view.nbytes

    def tell(self) -> int:
        return self._at


def parquet(ds: Dataset, out: str, *, report: Report = _silent) -> Exported:
    """Write the numbers of all masks to one Parquet file, one row a mask, in the order of the samples.

    Raises:
        MissingPackage: pyarrow is not installed.
        UsageError: nothing is selected, or `out` is there already or lies in the data set.
        FormatError, ShardDamaged, StorageError: a sample cannot be read; nothing is left.
    """
    schema = table.schema()
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingPackage("--parquet", "needs pyarrow: pip install pyarrow") from error

    def write(writer: "FileWriter") -> tuple[int, int]:
        sink, rows, waiting_rows = _Sink(writer), 0, 0
        waiting: list[table.Columns] = []
        with pyarrow.parquet.ParquetWriter(sink, schema, compression="zstd") as file:

            def flush() -> None:
                columns = table.joined(waiting)
                file.write_table(pyarrow.table(columns, schema=schema), row_group_size=_ROW_GROUP)

            for _, a in _all(ds, report):
                waiting.append(table.columns(a))
                waiting_rows += len(a)
                rows += len(a)
                if waiting_rows >= _ROW_GROUP:
                    flush()
                    waiting, waiting_rows = [], 0
            flush()
        return rows, sink.tell()

    return _one_file(ds, out, "parquet", write)


def coco(ds: Dataset, out: str, *, report: Report = _silent) -> Exported:
    """Write one COCO JSON: for a subset, since COCO's readers hold all of it in memory.

    All annotations have category 1; predicted_iou, stability_score, point_coords and crop_box stay beside COCO's keys.

    Raises:
        DuplicateKey: an annotation id stands twice.
        UsageError: nothing is selected, or `out` is there already or lies in the data set.
        FormatError, ShardDamaged, StorageError: a sample cannot be read; nothing is left.
    """

    def write(writer: "FileWriter") -> tuple[int, int]:
        seen: dict[int, int] = {}
        images: list[dict[str, Any]] = []
        size = 0

        def put(data: bytes) -> None:
            nonlocal size
            writer.write([data])
            size += len(data)

        info = {"description": f"SA-1B, by {FORMAT}", "version": FORMAT}
        head = orjson.dumps({"info": info, "licenses": [], "categories": [{"id": 1, "name": "object"}]})
        put(head[:-1] + b',"annotations":[')
        for _, a in _all(ds, report):
            for number in a.id.tolist():
                if number in seen:
                    raise _twice(number, seen[number], a.image_id)
                seen[number] = a.image_id
            if len(a):
                rows = [_coco_row(a, i) for i in range(len(a))]
                put((b"," if len(seen) > len(a) else b"") + orjson.dumps(rows)[1:-1])
            images.append({"id": a.image_id, "width": a.width, "height": a.height, "file_name": a.file_name})
        put(b'],"images":' + orjson.dumps(images) + b"}\n")
        return len(seen), size

    return _one_file(ds, out, "coco", write)


def _twice(number: int, first: int, second: int) -> DuplicateKey:
    what = f"annotation id {number} stands there twice, and COCO would drop one: select fewer samples"
    return DuplicateKey(f"sa_{first} and sa_{second}", what)


def _coco_row(a: Annotations, i: int) -> dict[str, Any]:
    x, y, w, h = a.bbox[i].tolist()
    rle = a.rle(i)
    return {
        "id": int(a.id[i]),
        "image_id": a.image_id,
        "category_id": 1,
        "iscrowd": 0,
        "area": int(a.area[i]),
        "bbox": [x, y, w + 1, h + 1],
        "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
        "predicted_iou": float(a.predicted_iou[i]),
        "stability_score": float(a.stability_score[i]),
        "point_coords": a.point_coords[i].tolist(),
        "crop_box": a.crop_box[i].tolist(),
    }
