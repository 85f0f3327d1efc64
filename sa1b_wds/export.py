"""The annotations for those who do not want the photographs: shards without images, Parquet, COCO's JSON.

The packed members are read alone, by their places in each shard's index: a few percent of the bytes. Headers, forms and
every RLE are checked, and for whole shards the counts that the manifest has; the CRC-32s cover photographs too, so with
`check` every sample is read whole and held against its own. Shards are read by several processes; what is written does
not depend on how many. A subset is exported by opening it: `open(…, split=…, keys=…)`.

- `annotations_only`: one shard for each shard that has a selected sample, numbered from 0 without gaps, with the packed
  members as they are, the side files of other readers, and a manifest, by which `open`, `verify` and `stats` take it
  for what it is. A shard is published whole, its receipt last: run it again after an interruption and it goes on.
- `parquet`: one file, one row a mask, the columns of `table.COLUMNS`.
- `coco`: one JSON document as pycocotools' `COCO` reads it. Boxes get COCO's convention, [x, y, w + 1, h + 1], which is
  what `pycocotools.mask.toBbox` gives; annotation ids must be unique, since COCO keeps one of two without a word.
"""

import hashlib
import io
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
import orjson
from zlib_ng import zlib_ng

from . import members, sidecars, table, tar
from .annotations import Annotations, areas, unpack
from .buffers import Pool
from .dataset import Dataset
from .errors import (
    DuplicateKey,
    FormatError,
    MissingPackage,
    Sa1bError,
    ShardDamaged,
    StorageError,
    UsageError,
)
from .format import FORMAT, KEY_ROW, ROW
from .layout import PACKED
from .manifest import (
    EXPORT_NAME,
    KEYS_NAME,
    MANIFEST_NAME,
    FileFact,
    Manifest,
    ShardFact,
    exported_name,
    side_names,
    totals,
)
from .plan import SHARD_NAME
from .reader import ReadCost, SideFiles
from .storage import Attempt, Destination

if TYPE_CHECKING:
    from .files import FileWriter

Report = Callable[[int, int], None]
"""Gets bytes of shards done with, and about how many it will be in all."""
Tell = Callable[[int], None]
"""Gets bytes of a shard done with."""
T = TypeVar("T")
Work = Callable[[Dataset, int, bool, Tell], T]
"""What is made of one part of a selection; runs in any process."""

_AT_ONCE = 32
_ROW_GROUP = 1 << 18
_UNKNOWN = 0xFFFFFFFF
"""Source and ordinals in the rows of samples that came from shards without a manifest."""


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
        self.reach(self._done + count)

    def reach(self, done: int) -> None:
        self._done = done
        self._report(done, max(done, self._total))

    def finish(self) -> None:
        self._report(self._done, self._done)


# ------------------------------------------------------------------------------------------------- several processes


def _each(
    ds: Dataset, work: "Work[T]", parts: Sequence[int], counter: _Counter, workers: int, check: bool
) -> Iterator[T]:
    """What `work` makes of each of these parts, in their order."""
    if workers <= 1 or len(parts) <= 1:
        for part in parts:
            yield work(ds, part, check, counter.add)
        return
    workers = min(workers, len(parts))
    context = multiprocessing.get_context("spawn")
    done, stop = context.Value("q", 0), context.Value("b", 0)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(ds, check, done, stop))
    rest, running = iter(parts), deque[Future[T]]()
    try:
        while True:
            # Ctrl-C reaches every process of a terminal; these inherit that they do not see it, and end by `stop`.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                running += [pool.submit(_in_process, work, part) for part in islice(rest, 2 * workers - len(running))]
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            if not running:
                return
            while wait([running[0]], timeout=0.2).not_done:
                counter.reach(done.value)
            yield running.popleft().result()
    except BrokenProcessPool:
        what = "a worker process died (out of memory? fewer --workers help); run the same command again"
        raise StorageError("export", what) from None
    finally:
        stop.value = 1
        pool.shutdown(cancel_futures=True)


_state: tuple[Dataset, bool, Tell] | None = None
"""Of a worker process."""


def _begin(ds: Dataset, check: bool, done: Any, stop: Any) -> None:
    """A worker process begins."""
    global _state

    def tell(count: int) -> None:
        if stop.value:
            raise SystemExit
        with done.get_lock():
            done.value += count

    _state = ds, check, tell
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed cannot say so, and a worker would wait for its next part for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _in_process(work: "Work[T]", part: int) -> T:
    assert _state is not None
    ds, check, tell = _state
    return work(ds, part, check, tell)


# ------------------------------------------------------------------------------------------------------------- reading


@dataclass(slots=True, eq=False)
class _Sample:
    """A selected sample; good until the next."""

    key: str
    index: int
    """Its place in the shard."""
    member: memoryview
    annotations: Annotations
    area_mismatches: int


def _read(ds: Dataset, part: int, check: bool, tell: Tell) -> Iterator[_Sample]:
    """The selected samples of one shard in their order."""
    count = int(ds.selection.count[part])
    shards, index = ds.selection.places(np.full(count, part), np.arange(count))
    place = ds.shards.places[int(shards[0])]
    find = place.find if isinstance(place.find, SideFiles) else None
    each = place.length / max(place.samples, 1)
    found = _whole(ds, part, count) if check or find is None else _alone(place.where, find, index.tolist())
    sums, told = [0, 0, 0], 0
    for n, (key, image_id, where, member) in enumerate(found):
        a = unpack(member, where)
        if a.image_id != image_id:
            raise FormatError(where, "annotations of another image", image_id, a.image_id)
        mismatches = int(np.sum(areas(a, where) != a.area))
        yield _Sample(key, int(index[n]), member, a, mismatches)
        sums = [s + more for s, more in zip(sums, (len(a), mismatches, a.source_json is not None), strict=True)]
        if (n + 1) % _AT_ONCE == 0 or n + 1 == count:
            tell(round(each * (n + 1)) - told)
            told = round(each * (n + 1))
    if find is not None and count == find.fact.samples:
        fact = find.fact
        said = [fact.annotations, fact.area_mismatches, fact.stored_sources]
        if sums != said:
            what = "annotations, areas that are not those of their masks, documents: others than the manifest says"
            raise ShardDamaged(place.where, what, str(said), str(sums))


_Found = tuple[str, int, str, memoryview]
"""key, image_id, where, packed member"""


def _alone(url: str, find: SideFiles, index: list[int]) -> Iterator[_Found]:
    """Only the packed members."""
    name = next(f.name for f in find.fact.files if f.name.endswith(side_names(find.fact.name)[2]))
    places = members.places(find.file(name), f"{find.where}: {name}", find.fact.samples)
    for member in members.read(url, [places[i] for i in index]):
        yield member.key, member.image_id, member.where, member.data


def _whole(ds: Dataset, part: int, count: int) -> Iterator[_Found]:
    """Every byte of the samples, held against their CRC-32s."""
    pool = Pool(idle=1 << 24)
    for begin in range(0, count, _AT_ONCE):
        i = np.arange(begin, min(begin + _AT_ONCE, count))
        shards, places = ds.selection.places(np.full(len(i), part), i)
        for found in ds.shards[int(shards[0])].read(places.tolist(), pool, ReadCost()):
            if isinstance(found, Sa1bError):
                raise found
            yield found.key, found.image_id, found.where, found.member
            found.release()


# ---------------------------------------------------------------------------------------------- shards without images


def annotations_only(
    ds: Dataset, out: str, *, report: Report = _silent, workers: int = 1, check: bool = False
) -> Exported:
    """Write the samples without their photographs: shards whose samples have one member, `sa_<id>.safetensors`.

    Args:
        ds: what to export.
        out: a folder outside of the data set; what an export of the same samples wrote there already stays.
        report: gets bytes done with, and about how many it will be.
        workers: processes.
        check: read every sample whole, and hold it against its CRC-32.

    Raises:
        UsageError: nothing is selected; `out` lies in the data set, or holds something else.
        FormatError, ShardDamaged, StorageError: a sample cannot be read. The shards finished before stay.
    """
    parts = len(ds.selection.shard)
    head = _text(_Head(format="sa1b-wds-export/2", of=ds.fingerprint(False), shards=parts))
    folder = _folder(ds, out)
    _begin_export(folder, head)
    counter = _Counter(ds, report)
    try:
        missing = [part for part in range(parts) if not folder.exists(exported_name(part))]
        for _ in _each(ds, partial(_export_shard, out), missing, counter, workers, check):
            pass
        facts = [_receipt(folder, exported_name(part)) for part in range(parts)]
        counter.finish()
        manifest = _finish(folder, head, facts, ds)
    finally:
        folder.clear_state()
    sums = manifest.totals
    return Exported(samples=sums.samples, annotations=sums.annotations, bytes=sums.bytes, files=parts)


def _folder(ds: Dataset, out: str) -> Destination:
    if not len(ds):
        raise UsageError(repr(ds), "nothing to export")
    folder = Destination(out)
    local = ds.manifest is not None and ("://" not in ds.where or ds.where.startswith("file://"))
    if local and folder.root.resolve().is_relative_to(Destination(ds.where).root.resolve()):
        raise UsageError(out, "lies in the data set: readers would take what is written for a part of it")
    return folder


def _begin_export(folder: Destination, head: bytes) -> None:
    if folder.exists(EXPORT_NAME):
        if folder.read(EXPORT_NAME) != head:
            raise UsageError(folder.place(EXPORT_NAME), "the export of other samples is there: use another folder")
        return
    if folder.root.exists() and any(folder.root.iterdir()):
        raise UsageError(folder.where, "is not empty, and no export: use another folder")
    folder.put_new(EXPORT_NAME, head)


def _text(head: _Head) -> bytes:
    return msgspec.json.format(msgspec.json.encode(head), indent=1) + b"\n"


def _receipt(folder: Destination, name: str) -> ShardFact:
    try:
        return msgspec.json.decode(folder.read(name), type=ShardFact)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise FormatError(folder.place(name), f"not a receipt: {error}") from None


def _export_shard(out: str, ds: Dataset, part: int, check: bool, tell: Tell) -> None:
    """One shard with its receipt."""
    with Destination(out).attempt(f"export-{part:06d}") as attempt:
        fact = _shard(attempt, ds, part, check, tell)
        attempt.publish(exported_name(part), msgspec.json.encode(fact))


def _shard(attempt: Attempt, ds: Dataset, part: int, check: bool, tell: Tell) -> ShardFact:
    """One shard and its indices, in the attempt."""
    name, before = SHARD_NAME.format(part), _rows(ds, part)
    writer, digest = attempt.create(name), hashlib.sha256()
    rows: list[tuple[int, int, int, int, int]] = []
    offsets, lines, annotations, mismatches, stored, at = [0], [], 0, 0, 0, 0
    try:
        for sample in _read(ds, part, check, tell):
            a, size, member = sample.annotations, len(sample.member), f"{sample.key}{PACKED}"
            if a.stored_size is not None and ds.manifest is None:
                what = "photographs made smaller, and no manifest that says how: open the data set by its folder"
                raise UsageError(ds.where, what)
            pieces: list[bytes | memoryview] = [tar.header(member, size), sample.member, bytes(tar.padding(size))]
            crc = 0
            for piece in pieces:
                digest.update(piece)
                crc = zlib_ng.crc32(piece, crc)
            writer.write(pieces)
            source = before[sample.index].tolist()[1:4] if before is not None else (_UNKNOWN,) * 3
            rows.append((a.image_id, *source, crc))
            lines.append(f"{PACKED[1:]} {at + tar.BLOCK} {size} {member}\n")
            at += sum(map(len, pieces))
            offsets.append(at)
            annotations += len(a)
            mismatches += sample.area_mismatches
            stored += a.source_json is not None
        digest.update(tar.END)
        writer.write([tar.END])
        writer.finish()
    finally:
        writer.close()
    contents = (
        np.array(offsets, "<i8").tobytes(),
        np.array(rows, ROW).tobytes(),
        f"v1.2 {len(lines)}\n{''.join(lines)}".encode(),
    )
    sides = dict(zip(side_names(name), contents, strict=True))
    for side, data in sides.items():
        attempt.put(side, data)
    return ShardFact(
        name=name,
        bytes=at + len(tar.END),
        samples=len(lines),
        annotations=annotations,
        area_mismatches=mismatches,
        stored_sources=stored,
        sha256=digest.hexdigest(),
        files=[_fact(side, data) for side, data in sides.items()],
    )


def _fact(name: str, data: bytes) -> FileFact:
    return FileFact(name=name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _rows(ds: Dataset, part: int) -> npt.NDArray[np.void] | None:
    """The rows of a shard that is exported; None where they are not known."""
    find = ds.shards.places[int(ds.selection.shard[part])].find
    if not isinstance(find, SideFiles):
        return None
    name = next(f.name for f in find.fact.files if f.name.endswith(side_names(find.fact.name)[1]))
    return np.frombuffer(find.file(name), ROW)


def _finish(folder: Destination, head: bytes, facts: list[ShardFact], ds: Dataset) -> Manifest:
    """Everything that follows from the shards, the manifest last."""
    sums, plan = totals([], facts), hashlib.sha256(head).hexdigest()
    made = [(KEYS_NAME, _keys(folder, facts)), *sidecars.files(plan, sums, facts, images=False)]
    for name, data in made:
        folder.put(name, data)
    receipts = [(exported_name(part), folder.read(exported_name(part))) for part in range(len(facts))]
    listed = [_fact(name, data) for name, data in (*made, *receipts, (EXPORT_NAME, head))]
    manifest = Manifest(
        format=FORMAT,
        plan=plan,
        totals=sums,
        missing_tasks=[],
        sources=[],
        shards=facts,
        files=sorted(listed, key=lambda f: f.name),
        recoding=ds.manifest.recoding if ds.manifest is not None else None,
        members=[PACKED[1:]],
        digest="",
    )
    folder.put(MANIFEST_NAME, manifest.to_bytes())
    return manifest


def _keys(folder: Destination, facts: list[ShardFact]) -> bytes:
    """`index/keys.bin`.

    Raises:
        DuplicateKey: an image that stands in two of the shards, which had no manifest.
    """
    parts = []
    for number, fact in enumerate(facts):
        rows = np.frombuffer(folder.read(side_names(fact.name)[1]), ROW)
        keys = np.empty(len(rows), KEY_ROW)
        keys["image_id"], keys["shard"], keys["index"] = rows["image_id"], number, np.arange(len(rows))
        parts.append(keys)
    joined = np.concatenate(parts)
    joined = joined[np.argsort(joined["image_id"], kind="stable")]
    same = np.flatnonzero(joined["image_id"][1:] == joined["image_id"][:-1])
    if same.size:
        raise DuplicateKey(folder.where, f"sa_{int(joined['image_id'][same[0]])} stands in the selection twice")
    return joined.tobytes()


def _all(ds: Dataset, work: "Work[T]", report: Report, workers: int, check: bool) -> Iterator[T]:
    counter = _Counter(ds, report)
    yield from _each(ds, work, range(len(ds.selection.shard)), counter, workers, check)
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


def parquet(ds: Dataset, out: str, *, report: Report = _silent, workers: int = 1, check: bool = False) -> Exported:
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
        sink, rows, waiting = _Sink(writer), 0, table.joined([])
        with pyarrow.parquet.ParquetWriter(sink, schema, compression="zstd") as file:

            def put(columns: table.Columns) -> None:
                file.write_table(pyarrow.table(columns, schema=schema), row_group_size=_ROW_GROUP)

            for columns in _all(ds, _columns, report, workers, check):
                rows += len(columns["id"])
                waiting = table.joined([waiting, columns])
                while len(waiting["id"]) >= _ROW_GROUP:
                    put({name: values[:_ROW_GROUP] for name, values in waiting.items()})
                    waiting = {name: values[_ROW_GROUP:] for name, values in waiting.items()}
            if len(waiting["id"]) or not rows:
                put(waiting)
        return rows, sink.tell()

    return _one_file(ds, out, "parquet", write)


def _columns(ds: Dataset, part: int, check: bool, tell: Tell) -> table.Columns:
    """The rows of one shard."""
    return table.joined([table.columns(sample.annotations) for sample in _read(ds, part, check, tell)])


def coco(ds: Dataset, out: str, *, report: Report = _silent, workers: int = 1, check: bool = False) -> Exported:
    """Write one COCO JSON: for a subset, since COCO's readers hold all of it in memory.

    All annotations have category 1; predicted_iou, stability_score, point_coords and crop_box stay beside COCO's keys.

    Raises:
        DuplicateKey: an annotation id stands twice.
        UsageError: nothing is selected, or `out` is there already or lies in the data set.
        FormatError, ShardDamaged, StorageError: a sample cannot be read; nothing is left.
    """

    def write(writer: "FileWriter") -> tuple[int, int]:
        seen: dict[int, int] = {}
        images: list[bytes] = []
        size = 0

        def put(data: bytes) -> None:
            nonlocal size
            writer.write([data])
            size += len(data)

        info = {"description": f"SA-1B, by {FORMAT}", "version": FORMAT}
        head = orjson.dumps({"info": info, "licenses": [], "categories": [{"id": 1, "name": "object"}]})
        put(head[:-1] + b',"annotations":[')
        for of_shard in _all(ds, _coco_rows, report, workers, check):
            for image_id, ids, image, rows in of_shard:
                for number in ids:
                    if number in seen:
                        raise _twice(number, seen[number], image_id)
                    seen[number] = image_id
                if ids:
                    put((b"," if len(seen) > len(ids) else b"") + rows)
                images.append(image)
        put(b'],"images":[' + b",".join(images) + b"]}\n")
        return len(seen), size

    return _one_file(ds, out, "coco", write)


def _coco_rows(ds: Dataset, part: int, check: bool, tell: Tell) -> list[tuple[int, list[int], bytes, bytes]]:
    """(image id, annotation ids, the image, its annotations) of each sample of a shard, the last two as JSON."""
    found = []
    for sample in _read(ds, part, check, tell):
        a = sample.annotations
        image = {"id": a.image_id, "width": a.width, "height": a.height, "file_name": a.file_name}
        rows = orjson.dumps([_coco_row(a, i) for i in range(len(a))])[1:-1]
        found.append((a.image_id, a.id.tolist(), orjson.dumps(image), rows))
    return found


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
