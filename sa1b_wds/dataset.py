"""A converted data set: `open` reads the manifest and nothing else; samples are read when asked for, decoded when used.

ds = sa1b_wds.open("s3://bucket/sa1b", split="train[:1%]")
ds[0].annotations.bbox, ds["sa_223750"].image, ds.take(4), ds.select(["sa_1", "sa_2"])
"""

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any, overload

import braceexpand
import numpy as np

from . import state as states
from .annotations import Annotations, restore, unpack
from .buffers import Pool
from .cache import Cache
from .errors import (
    Denied,
    FormatError,
    Incomplete,
    NotFound,
    Sa1bError,
    SampleRejected,
    ShardDamaged,
    UsageError,
    masked,
)
from .keys import KeyFile, KeyIndex, KeyTable
from .layout import ShardIndex, check_offsets, image_id_of, scan
from .manifest import KEYS_NAME, MANIFEST_NAME, PLAN_NAME, Manifest, load_manifest
from .pipe import PREFIX
from .ranged import open_ranged
from .reader import Known, ReadCost, Shard, ShardPlace, Shards, SideFiles, length_of
from .remote import is_remote, read
from .selection import SPLIT, Selection, parse_split
from .storage import Destination, expand, local_path

if TYPE_CHECKING:
    from .examples import Examples
    from .images import U8
    from .stream import Stream

_log = logging.getLogger("sa1b_wds")

_NO_IMAGES = "no photographs here: the annotations alone were exported (export --annotations-only)"
_SCANNERS = 8  # shards read at once where there is no manifest


class Sample:
    """One image with its annotations; its bytes are here and checked, nothing is decoded before it is asked for."""

    def __init__(self, key: str, image_id: int, where: str, jpg: bytes | None, packed: bytes) -> None:
        self.key, self.image_id, self.where = key, image_id, where
        self._jpg = jpg
        self.packed = packed
        """The member that holds the annotations, in safetensors' format."""

    def __repr__(self) -> str:
        return f"Sample({self.key!r}, {'no' if self._jpg is None else f'{len(self._jpg):,} bytes of'} JPEG)"

    @property
    def jpg(self) -> bytes:
        """The JPEG as Meta published it, or made smaller: see `annotations.stored_size`.

        Raises:
            UsageError: the data set has annotations alone.
        """
        if self._jpg is None:
            raise UsageError(self.where, _NO_IMAGES)
        return self._jpg

    @cached_property
    def annotations(self) -> Annotations:
        """All annotations as columns.

        Raises:
            FormatError: a member that is not of format version 1.
            ShardDamaged: the annotations of another image.
        """
        a = unpack(self.packed, self.where)
        if a.image_id != self.image_id:
            raise ShardDamaged(self.where, "annotations of another image", self.image_id, a.image_id)
        return a

    @cached_property
    def image(self) -> "U8":
        """(H, W, 3) uint8 RGB, at the size that is stored: `annotations.jpg_size`."""
        from . import images

        try:
            return images.decode(self.jpg)
        except SampleRejected as error:
            raise ShardDamaged(f"{self.where}: {error.where}", error.what, error.expected, error.found) from None

    @property
    def json(self) -> bytes:
        """The annotations' JSON document, byte for byte as Meta published it."""
        return restore(self.annotations)


class Dataset:
    """Samples of a converted data set: a sequence, and the source of streams. Made by `open`."""

    def __init__(
        self,
        shards: Shards,
        names: Sequence[tuple[str, int, str]],
        selection: Selection,
        *,
        where: str,
        manifest: Manifest | None,
        keys: KeyIndex | None,
    ) -> None:
        self.where = where
        """As it was given to `open`."""
        self.manifest = manifest
        """None where shards were given without one."""
        self.shards = shards
        self.selection = selection
        self._names, self._keys = names, keys
        self._pool = Pool(idle=1 << 24)

    def __reduce__(self) -> tuple[object, ...]:
        return _remake, (self.shards, self._names, self.selection, self.where, self.manifest, self._keys)

    def __repr__(self) -> str:
        return f"Dataset({masked(self.where)!r}, {len(self):,} samples)"

    def __len__(self) -> int:
        return len(self.selection)

    def __iter__(self) -> Iterator[Sample]:
        """One sample after the other, in the order of the shards. To train, use `stream`."""
        for i in range(len(self)):
            yield self[i]

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self._places([key], missing_ok=True) != [None]

    @overload
    def __getitem__(self, index: int | str) -> Sample: ...
    @overload
    def __getitem__(self, index: "slice | list[str] | tuple[str, ...]") -> "Dataset": ...
    def __getitem__(self, index: "int | str | slice | list[str] | tuple[str, ...]") -> "Sample | Dataset":
        """The i-th sample, the sample with a key, a slice (step 1), or the samples of a list of keys.

        Raises:
            IndexError, KeyError: no such sample.
            ShardDamaged, StorageError: it cannot be read, or is not what the manifest says.
        """
        if isinstance(index, str):
            place = self._places([index])[0]
            assert place is not None
            return self._read(*place)
        if isinstance(index, slice):
            begin, end, step = index.indices(len(self))
            if step != 1:
                raise UsageError(f"slice step {step}", "a data set has slices of step 1 only")
            return self._with(self.selection.part(begin, max(begin, end)))
        if not isinstance(index, int | np.integer):
            return self.select(index)
        i = int(index) + (len(self) if index < 0 else 0)
        if not 0 <= i < len(self):
            raise IndexError(f"sample {int(index):,} of {len(self):,}")
        return self._read(*self.selection.at(i))

    def take(self, n: int) -> "Dataset":
        """The first n samples."""
        if n < 0:
            raise UsageError(f"take({n})", "a number of samples is at least 0")
        return self._with(self.selection.part(0, n))

    def select(self, keys: Iterable[str]) -> "Dataset":
        """The samples with these keys, in the order of the shards.

        Raises:
            KeyError: a key that is not here.
            UsageError: a key that is given twice, since a selection is a set.
        """
        listed = list(keys)
        if len(set(listed)) != len(listed):
            seen: set[str] = set()
            twice = next(key for key in listed if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise UsageError(f"key {twice!r}", "given twice: a selection is a set")
        places = [place for place in self._places(listed) if place is not None]
        shards, index = zip(*places, strict=True) if places else ((), ())
        return self._with(Selection.of_places(shards, index))

    @property
    def has_images(self) -> bool:
        """Whether samples have a jpg; `export --annotations-only` makes data sets without."""
        return self.manifest is None or self.manifest.has_images

    def stream(self, **options: Any) -> "Stream":
        """An endless supply of batches, an epoch at a time: see `sa1b_wds.stream.Stream` for the options."""
        from .stream import Stream

        return Stream(self, **options)

    def as_tfds(self) -> "Examples":
        """What `tfds.as_numpy(tfds.load("segment_anything"))` gives: see `sa1b_wds.examples`; no TensorFlow needed."""
        from .examples import Examples

        return Examples(self)

    def show_examples(
        self, rows: int = 3, columns: int = 3, *, side: int = 480, path: str | os.PathLike[str] | None = None
    ) -> Any:
        """The first samples with their masks, as a Pillow image of `side` pixels a picture; saved too, at `path`.

        Raises:
            MissingPackage: Pillow is not installed.
        """
        from .figure import figure

        return figure(list(self.take(rows * columns)), columns, side, path)

    def as_dataframe(self) -> Any:
        """All numbers as a pandas DataFrame, one row a mask: see `sa1b_wds.table.COLUMNS`. Reads every sample.

        Raises:
            MissingPackage: pandas is not installed.
        """
        from .table import dataframe

        return dataframe(sample.annotations for sample in self)

    def fingerprint(self, drop_last: bool) -> str:
        """What the state of a stream over these samples is bound to."""
        return states.fingerprint(self._names, self.selection.digest, drop_last)

    def _with(self, selection: Selection) -> "Dataset":
        return Dataset(self.shards, self._names, selection, where=self.where, manifest=self.manifest, keys=self._keys)

    def _read(self, shard: int, index: int) -> Sample:
        found = self.shards[shard].read([index], self._pool, ReadCost())[0]
        if isinstance(found, Sa1bError):
            raise found
        try:
            jpg = bytes(found.jpg) if self.has_images else None
            return Sample(found.key, found.image_id, found.where, jpg, bytes(found.member))
        finally:
            found.release()

    def _places(self, keys: Sequence[str], missing_ok: bool = False) -> list[tuple[int, int] | None]:
        if self._keys is None:
            self._keys = KeyTable([_ids(self.shards[s]) for s in range(len(self.shards))])
        ids = [int(k[3:]) if k.startswith("sa_") and k[3:].isdecimal() and len(k) < 22 else -1 for k in keys]
        found = self._keys.places(ids)
        places = [p if p is not None and self.selection.find(*p) else None for p in found]
        for key, place in zip(keys, places, strict=True):
            if place is None and not missing_ok:
                raise KeyError(f"{key!r} is not in {self!r}")
        return places


def open(
    location: str | os.PathLike[str] | Sequence[str] | Sequence[os.PathLike[str]],
    *,
    split: str = SPLIT,
    keys: Iterable[str] | None = None,
    cache: str | os.PathLike[str] | None = None,
    cache_size: int | None = None,
) -> Dataset:
    """Open a data set.

    Args:
        location: the folder or URL that `sa1b-wds convert` wrote; or, without a manifest, shards: a path or URL with
            braces (`…-{000000..000999}.tar`), a `pipe:` command with braces, or a list of these. Then every shard is
            read once to find its samples, unless its `.tar.idx` lies beside it.
        split: TFDS's slice notation: `train[:1%]`, `train[100:200]`, sums with `+`; see `selection.parse_split`.
        keys: only the samples with these keys.
        cache: a folder on this node's own disk where samples that come from an object store or a web server are kept,
            shared by the processes of the node and by data sets; see `cache`. Needs a manifest. A data set on a path
            does without, and says so.
        cache_size: bytes that this folder may take.

    Raises:
        NotFound, Denied, StorageError: nothing there, or it cannot be read.
        Incomplete: a conversion that was not finalized.
        FormatError: a manifest that is damaged or of an unknown version.
        ShardDamaged: a shard without a manifest that is cut, or whose members are no pairs.
        UsageError: a split that is none; a cache without a size, or for shards without a manifest.
    """
    if cache is not None and cache_size is None:
        raise UsageError("cache_size", "a cache needs a bound: the bytes that its folder may take")
    if isinstance(location, str | os.PathLike):
        ds = _open_one(os.fspath(location), os.fspath(cache) if cache is not None else None, cache_size or 0)
    elif cache is not None:
        raise UsageError("cache", _NO_CACHE)
    else:
        ds = _open_shards([url for one in location for url in _expanded(os.fspath(one))], f"{len(location)} shards")
    if split != SPLIT:
        counts = ds.shards.counts
        ds = ds._with(Selection.of_ranges(counts, parse_split(split, counts)))
    return ds if keys is None else ds.select(keys)


_NO_CACHE = "only a data set with a manifest can be kept: its checksums tell what is sound"


def _open_one(location: str, cache: str | None, cache_size: int) -> Dataset:
    if location.startswith(PREFIX) or location.endswith(".tar") or "{" in location:
        if cache is not None:
            raise UsageError("cache", _NO_CACHE)
        return _open_shards(_expanded(location), location)
    folder = Destination(location)
    if folder.exists(MANIFEST_NAME):
        if cache is not None and not is_remote(location):
            _log.warning("cache %s: not used, since %s is not an object store", cache, location)
            cache = None
        return _open_manifest(folder, cache, cache_size)
    if folder.exists(PLAN_NAME):
        raise Incomplete(location, f"not finalized: run `sa1b-wds finalize {location}`", MANIFEST_NAME, "only a plan")
    if not is_remote(location) and not local_path(location).exists():
        raise NotFound(location, "no such file or folder")
    if cache is not None:
        raise UsageError("cache", _NO_CACHE)
    return _open_shards(expand([location]), location)


def _open_manifest(folder: Destination, cache: str | None, cache_size: int) -> Dataset:
    manifest = load_manifest(folder.read(MANIFEST_NAME), folder.place(MANIFEST_NAME))
    where = folder.where
    kept = None
    if cache is not None:
        kept = Cache(cache, cache_size, manifest.digest, [fact.bytes for fact in manifest.shards])
        kept.prepare()
    shards = []
    for number, fact in enumerate(manifest.shards):
        place = folder.place(fact.name)
        shard = kept.shard(number, fact.name, fact.sha256) if kept is not None else None
        find = SideFiles(where=place, fact=fact, read=folder.read, images=manifest.has_images, kept=shard)
        shards.append(ShardPlace(place, fact.samples, fact.bytes, find, shard))
    counts = [fact.samples for fact in manifest.shards]
    if sum(counts) != manifest.totals.samples:
        raise FormatError(
            folder.place(MANIFEST_NAME), "totals that do not add up", manifest.totals.samples, sum(counts)
        )
    has_keys = any(fact.name == KEYS_NAME for fact in manifest.files)
    return Dataset(
        Shards(shards),
        [(fact.name, fact.samples, fact.sha256) for fact in manifest.shards],
        Selection.of_ranges(counts, [(0, sum(counts))]),
        where=where,
        manifest=manifest,
        keys=KeyFile(folder.place(KEYS_NAME), sum(counts)) if has_keys else None,
    )


def _expanded(url: str) -> list[str]:
    return list(braceexpand.braceexpand(url)) if url.startswith(PREFIX) else expand([url])


def _open_shards(urls: Sequence[str], where: str) -> Dataset:
    if not urls:
        raise UsageError(where, "no shards")
    with ThreadPoolExecutor(_SCANNERS, "sa1b-wds-scan") as pool:
        found = list(pool.map(_plain_index, urls))
    shards = [
        ShardPlace(url, len(index), length_of(index), Known(index)) for url, index in zip(urls, found, strict=True)
    ]
    counts = [len(index) for index in found]
    names = [
        (url.rpartition("/")[2], len(index), str(length_of(index))) for url, index in zip(urls, found, strict=True)
    ]
    selection = Selection.of_ranges(counts, [(0, sum(counts))])
    return Dataset(Shards(shards), names, selection, where=where, manifest=None, keys=None)


def _plain_index(url: str) -> ShardIndex:
    """The index of a shard without a manifest: from Energon's file beside it, else from its headers."""
    if not url.startswith(PREFIX):
        beside = _beside(url)
        if beside is not None:
            offsets = np.frombuffer(beside[: len(beside) // 8 * 8], "<i8").astype(np.int64)
            check_offsets(offsets, f"{url}.idx")
            return ShardIndex(offsets=offsets, image_id=None, crc32=None)
    file = open_ranged(url)
    try:
        return scan(file, url)
    finally:
        file.close()


def _beside(url: str) -> bytes | None:
    """Energon's index of a shard, if there is one."""
    if is_remote(url):
        if "?" in url:  # a signed link is good for one object
            return None
        with contextlib.suppress(NotFound, Denied):  # a store may deny what is not there
            return read(f"{url}.idx")
        return None
    path = local_path(url).with_name(local_path(url).name + ".idx")
    return path.read_bytes() if path.is_file() else None


def _ids(shard: Shard) -> Any:
    """[n] image ids of a shard, from its index or from its headers."""
    index = shard.index()
    if index.image_id is not None:
        return index.image_id
    file = open_ranged(shard.where)
    try:
        found = scan(file, shard.where)
    finally:
        file.close()
    if not np.array_equal(found.offsets, index.offsets):
        raise ShardDamaged(shard.where, "its samples are not where its .idx says")
    return found.image_id


def _remake(shards: Any, names: Any, selection: Any, where: str, manifest: Any, keys: Any) -> Dataset:
    return Dataset(shards, names, selection, where=where, manifest=manifest, keys=keys)


__all__ = ["Dataset", "Sample", "image_id_of", "open"]
