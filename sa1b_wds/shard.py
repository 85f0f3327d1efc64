"""Samples → shards: dealt, written, indexed and hashed in one pass.

Dealing is a game of cards: of K samples the largest goes to the emptiest of K shards, the next to the next emptiest,
and so on. Two bounds hold at once at any time: the shards' sample counts differ by at most 1, their bytes by at most
the largest sample. (With loads L₁ ≤ … ≤ L_K given sizes s₁ ≥ … ≥ s_K, the new difference of i < j is
(L_j − L_i) − (s_i − s_j), both brackets ≥ 0: no difference exceeds max(old spread, range of the round); a round that
is short is one padded with zeros.)

The side files come from the same pass: `<shard>.idx` (Energon), `index/<stem>.rows` (ours), `index/<stem>.idx` (DALI).
"""

import hashlib
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import msgspec
import numpy as np
from zlib_ng import zlib_ng

from . import tar
from .format import ROW
from .manifest import FileFact, ShardFact, side_names
from .sample import Held, Rejected, Sample

if TYPE_CHECKING:
    from typing_extensions import Buffer


class Writer(Protocol):
    """What a shard is written through."""

    def write(self, pieces: "Sequence[Buffer]") -> None: ...
    def finish(self) -> None: ...
    def close(self) -> None: ...


class Outlet(Protocol):
    """Where files of a task go, invisible until all are complete."""

    def create(self, name: str) -> Writer: ...
    def put(self, name: str, data: "Buffer") -> None: ...


def deal(spans: Sequence[int], loads: list[int]) -> list[int]:
    """The shard of each sample of a round; adds the spans to `loads`.

    Args:
        spans: bytes of at most as many samples as there are shards.
        loads: bytes of each shard so far; changed in place.
    """
    emptiest = sorted(range(len(loads)), key=lambda shard: (loads[shard], shard))
    largest = sorted(range(len(spans)), key=lambda sample: (-spans[sample], sample))
    places = [0] * len(spans)
    for shard, sample in zip(emptiest, largest, strict=False):
        places[sample] = shard
        loads[shard] += spans[sample]
    return places


def _member(held: Held, name: str, size: int) -> memoryview:
    """A member as it stands in the archive: its header filled in, its padding cleared."""
    view = held.load()
    view[: tar.BLOCK] = tar.header(name, size)
    end = tar.BLOCK + size
    view[end:] = bytes(len(view) - end)
    return view


class ShardWriter:
    """One shard being written, with everything its side files need."""

    def __init__(self, name: str, outlet: Outlet) -> None:
        self.name = name
        self._outlet = outlet
        self._file = outlet.create(name)
        self._hash = hashlib.sha256()
        self._bytes = 0
        self._samples = self._annotations = self._mismatches = self._stored = 0
        self._offsets: list[int] = []
        self._rows: list[tuple[int, int, int, int, int]] = []
        self._lines: list[str] = []

    def add(self, sample: Sample) -> None:
        """Append a sample's two members, and let go of its memory."""
        key, size = sample.key, sample.packed_size
        jpg = _member(sample.jpg, f"{key}.jpg", sample.jpg_size)
        packed = _member(sample.packed, f"{key}.safetensors", size)
        crc = zlib_ng.crc32(packed, zlib_ng.crc32(jpg))
        self._append(jpg, packed)
        begin = self._bytes - len(jpg) - len(packed)
        self._offsets.append(begin)
        self._rows.append((sample.image_id, sample.source, sample.jpg_ordinal, sample.json_ordinal, crc))
        data, behind = begin + tar.BLOCK, begin + len(jpg) + tar.BLOCK
        self._lines.append(f"jpg {data} {sample.jpg_size} {key}.jpg safetensors {behind} {size} {key}.safetensors\n")
        self._samples += 1
        self._annotations += sample.annotations
        self._mismatches += sample.area_mismatches
        self._stored += sample.stored_source
        sample.release()

    def _append(self, *pieces: "Buffer") -> None:
        for piece in pieces:
            self._hash.update(piece)
            self._bytes += memoryview(piece).nbytes
        self._file.write(pieces)

    def finish(self) -> ShardFact:
        """End the archive, sync it, and write its side files."""
        self._offsets.append(self._bytes)
        self._append(tar.END)
        self._file.finish()
        self._file.close()
        contents = (
            np.array(self._offsets, "<i8").tobytes(),
            np.array(self._rows, ROW).tobytes(),
            f"v1.2 {self._samples}\n{''.join(self._lines)}".encode(),
        )
        return ShardFact(
            name=self.name,
            bytes=self._bytes,
            samples=self._samples,
            annotations=self._annotations,
            area_mismatches=self._mismatches,
            stored_sources=self._stored,
            sha256=self._hash.hexdigest(),
            files=[place(self._outlet, *file) for file in zip(side_names(self.name), contents, strict=True)],
        )

    def close(self) -> None:
        self._file.close()


def place(outlet: Outlet, name: str, data: bytes) -> FileFact:
    """Write a small file and return its fact."""
    outlet.put(name, data)
    return file_fact(name, data)


def file_fact(name: str, data: bytes) -> FileFact:
    """What a file of these bytes must be."""
    return FileFact(name=name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


_LINES = 1 << 16
"""Bytes of lines that wait to be written; a source may have a million members that are no good."""


@dataclass(kw_only=True)
class Quarantine:
    """A task's extra output: a tar of the members it could not use, and a line of JSON for each.

    The archive's name does not end in `.tar`: below the destination only shards' names do, since readers take every
    `*.tar` for data.
    """

    outlet: Outlet
    stem: str
    members: int = 0
    first_reason: str = ""

    def __post_init__(self) -> None:
        self._file: Writer | None = None
        self._hash = hashlib.sha256()
        self._bytes = 0
        self._list: Writer | None = None
        self._list_hash = hashlib.sha256()
        self._list_bytes = 0
        self._lines = bytearray()

    def add(self, rejected: Rejected) -> None:
        if self._file is None:
            self._file = self.outlet.create(f"{self.stem}.members")
            self._list = self.outlet.create(f"{self.stem}.jsonl")
        if not self.members:
            name = rejected.name if rejected.name.isprintable() else ascii(rejected.name)[1:-1]
            self.first_reason = f"{rejected.source}: byte {rejected.offset:,}: {name[:200]}: {rejected.reason}"
        self.members += 1
        line = {
            "source": rejected.source,
            "byte": rejected.offset,
            "name": rejected.name,
            "key": rejected.key,
            "reason": rejected.reason,
            "stored": rejected.data is not None,
        }
        self._lines += msgspec.json.encode(line) + b"\n"
        if len(self._lines) >= _LINES:
            self._write_lines()
        if rejected.data is not None:
            # The place, not the name, tells two members apart: names may be hostile, long, or the same.
            suffix = rejected.name.rpartition(".")[2]
            name = f"{rejected.source[:60]}/{rejected.offset}.{suffix if suffix in ('jpg', 'json') else 'bin'}"
            information = tarfile.TarInfo(name)
            information.size = len(rejected.data)
            header = information.tobuf(tarfile.PAX_FORMAT)
            self._append(header, rejected.data, bytes(tar.padding(len(rejected.data))))

    def _append(self, *pieces: bytes) -> None:
        assert self._file is not None
        for piece in pieces:
            self._hash.update(piece)
            self._bytes += len(piece)
        self._file.write(pieces)

    def _write_lines(self) -> None:
        assert self._list is not None
        self._list_hash.update(self._lines)
        self._list_bytes += len(self._lines)
        self._list.write([self._lines])
        self._lines = bytearray()

    def finish(self) -> list[FileFact]:
        """The facts of its files; none where nothing was rejected."""
        if self._file is None or self._list is None:
            return []
        self._append(tar.END)
        self._write_lines()
        for file in (self._file, self._list):
            file.finish()
            file.close()
        return [
            FileFact(name=f"{self.stem}.members", bytes=self._bytes, sha256=self._hash.hexdigest()),
            FileFact(name=f"{self.stem}.jsonl", bytes=self._list_bytes, sha256=self._list_hash.hexdigest()),
        ]

    def close(self) -> None:
        for file in (self._file, self._list):
            if file is not None:
                file.close()
