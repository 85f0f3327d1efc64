"""A folder on a node's own disk that keeps what its processes read from far away, for the next epoch or the next run.

*Grain.* A rank reads blocks of some 30 neighbouring samples from places all over the data set, never whole shards: so
a sample is kept as it was read, at its own place in a sparse file, and nothing is fetched that nobody asked for. Each
file stands for 64 MiB of a shard (see `extents`); it is what is evicted. A shard's two side files are kept too, so a
warm node asks the store for the manifest alone.

*Whose.* A file is named and sealed by the manifest's digest, the shard's name and SHA-256: what was kept of another
data set at the same URL is never served. What is served is held against the CRC-32 in the manifest's side files, as
everything that is read; what fails is dropped, counted and fetched again.

*Processes* share a folder without one that serves them. The head of a file has a byte a sample: nothing, counted, or
whole; it becomes whole after the last of its bytes was written, by one write of one byte, so a killed process leaves
nothing that could be mistaken. Who fetches holds a lock of the kernel's on that range of bytes (gone with its process),
and others that want the same wait for it, ten seconds at most. No file stays open between reads, so a file that is
evicted is gone at once, and whoever is reading it reads on.

*Bound.* `accounts` holds the pages in use, under `flock`; each data set's `ledger` what every file has and when it was
last used. Room is made and counted before a byte is written. Numbers carry their complement: one that is damaged is
taken from the file system again. Not counted: the ledgers (16 bytes for 64 MiB of data set) and what was evicted while
somebody wrote to it, for as long as that write takes.

*A disk that is full*, or fails, is no error: it is said once, and reading goes on without keeping for a minute.

*Cost.* One write more for each byte that is fetched; 0.1 ms a read of neighbours for the books. When the folder is
full, making room reads the ledgers, 3 MB for all of SA-1B.

*What to expect.* Every epoch permutes the data set anew, so a node reads other samples in each. Let f be the share of
the data set that is kept. With n nodes each reads 1/n an epoch, so after e epochs f = 1 − (1 − 1/n)^e where there is
room, and the next one finds f of what it reads: with one node everything, with 4 a quarter in the second epoch and
58 % in the fourth, with 64 nodes 1.6 % in the second. Where there is no room for all, the least recently used goes
first, which hurts a single node: it reads everything once an epoch, so what it read last is what it needs last. It then
finds f + (1 − f) ln(1 − f) of its samples (15 % for f = 0.5, 67 % for f = 0.9). Runs that repeat an order (the same
seed and ranks: a sweep, a restart) find what the first one left.
"""

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep, time_ns

import numpy as np
import numpy.typing as npt

from .errors import UsageError
from .extents import I64, KEY, PAGE, Mask, Stretch, pages, runs, stretch_at, stretches, victims
from .files import translated

Records = npt.NDArray[np.void]

_log = logging.getLogger("sa1b_wds")

_LAYOUT = "sa1b-wds-cache-1"  # another layout of the files gets another folder
_RECORD = np.dtype([("pages", "<u4"), ("check", "<u4"), ("used", "<i8")])
_TOTAL = struct.Struct("<QQ")
_ONES = (1 << 64) - 1
_NOTHING, _COUNTED, _WHOLE = 0, 1, 2
_PATIENCE = 10.0  # seconds that one waits for another's fetch
_AGAIN = 60.0  # seconds without keeping anything, after the disk refused
_SIDE_FILES = 2


class Cache:
    """One data set's share of a folder that several may share, within one bound.

    Args:
        folder: on a local disk; made if it is not there.
        size: bytes that everything in the folder may take together.
        digest: of the manifest.
        lengths: bytes of its shards, which are what the files are numbered by.
    """

    def __init__(self, folder: str | os.PathLike[str], size: int, digest: str, lengths: Sequence[int]) -> None:
        if size < 1:
            raise UsageError("cache_size", "out of range", "at least 1", size)
        self.folder, self.size, self.digest = os.fspath(folder), size, digest
        counts = [_SIDE_FILES + stretches(length) for length in lengths]
        self._first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._root = Path(self.folder) / _LAYOUT
        self._home = self._root / digest[:32]
        self._resting = 0.0
        self._said = False

    def __repr__(self) -> str:
        return f"Cache({self.folder!r}, {self.size:,})"

    def prepare(self) -> None:
        """Make the folder, and remove from it what is too much.

        Raises:
            Denied, StorageError: it cannot be made, or locks do not work in it.
        """
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            with self._locked() as accounts:
                total = self._recounted()
                if total > self.size // PAGE:
                    total = self._evict(total - self.size // PAGE)
                _write_total(accounts, total)
        except OSError as error:
            if not _is_full(error):
                raise translated(error, self.folder) from error
            self._refused(error)

    def shard(self, number: int, name: str, sha256: str) -> "ShardCache":
        """What is kept of a shard."""
        return ShardCache(self, name, sha256, int(self._first[number]))

    @property
    def used(self) -> int:
        """Bytes that everything in the folder counts as."""
        with self._locked() as accounts:
            return self._total(accounts) * PAGE

    @property
    def keeps(self) -> bool:
        """Whether new bytes are taken; not for a while after the disk refused."""
        return monotonic() >= self._resting

    def path(self, number: int) -> Path:
        return self._home / f"{number}.part"

    def key(self, name: str, sha256: str, number: int) -> bytes:
        return hashlib.sha256("\0".join((self.digest, name, sha256, str(number))).encode()).digest()

    # -- the books: everything below happens under the lock, but for `touch`

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        descriptor = os.open(self._root / "accounts", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)

    def touch(self, number: int) -> None:
        """It was used now."""
        with contextlib.suppress(OSError), _open(self._home / "ledger", os.O_RDWR) as ledger:
            os.pwrite(ledger, time_ns().to_bytes(8, "little"), number * _RECORD.itemsize + 8)

    def reserve(self, file: "PartFile", i: int, j: int) -> bool:
        """Count the spans [i, j) of a file before they are written; False where there is no room for them.

        Raises:
            OSError: the disk refuses.
        """
        with self._locked() as accounts, self._ledger() as ledger:
            total = self._total(accounts)
            had = int(self._sound(self._home, _read_ledger(ledger, file.number, 1), file.number)["pages"][0])
            if not file.renew():
                total, had = total - had, 0
            fresh = file.states(i, j) == _NOTHING
            need = int(file.stretch.pages(i, j)[fresh].sum()) + (0 if had else pages(0, file.stretch.head))
            if total + need > self.size // PAGE:
                total = self._evict(total + need - self.size // PAGE, file.number)
                if total + need > self.size // PAGE:
                    _write_total(accounts, total)
                    return False
            # In this order: a process that is killed in between leaves too much counted, never too little.
            _write_total(accounts, total + need)
            _write_record(ledger, file.number, had + need, time_ns())
            file.seal()
            for a, b in runs(fresh):
                file.mark(i + a, i + b, _COUNTED)
            return True

    @contextlib.contextmanager
    def _ledger(self) -> Iterator[int]:
        """This data set's ledger, for reading and writing; made where there is none, or none of its length."""
        length = int(self._first[-1]) * _RECORD.itemsize
        self._home.mkdir(exist_ok=True)
        with _open(self._home / "ledger", os.O_RDWR | os.O_CREAT) as ledger:
            if os.fstat(ledger).st_size != length:
                for path in self._home.glob("*.part"):  # nobody knows of them
                    path.unlink(missing_ok=True)
                os.ftruncate(ledger, 0)
                os.ftruncate(ledger, length)
                os.truncate(self._root / "accounts", 0)  # to be counted again
            yield ledger

    def _total(self, accounts: int) -> int:
        """Pages in use."""
        data = os.pread(accounts, _TOTAL.size, 0)
        if len(data) == _TOTAL.size:
            total, check = _TOTAL.unpack(data)
            if total ^ check == _ONES:
                return int(total)
        return self._recounted()

    def _ledgers(self) -> list[tuple[Path, Records]]:
        """Every data set's folder and ledger."""
        out = []
        for home in sorted(self._root.iterdir()):
            with (
                contextlib.suppress(FileNotFoundError, NotADirectoryError),
                _open(home / "ledger", os.O_RDONLY) as file,
            ):
                out.append((home, self._sound(home, _read_ledger(file, 0, os.fstat(file).st_size // _RECORD.itemsize))))
        return out

    def _sound(self, home: Path, records: Records, first: int = 0) -> Records:
        """The same, damaged ones counted again."""
        have, check = records["pages"], records["check"]
        for i in np.flatnonzero((have ^ check != 0xFFFFFFFF) & (have | check != 0)):  # 0, 0: never written
            have[i] = 0
            with contextlib.suppress(FileNotFoundError):
                have[i] = pages(0, (home / f"{first + i}.part").stat().st_blocks * 512)
        return records

    def _recounted(self) -> int:
        return sum(int(records["pages"].sum()) for _, records in self._ledgers())

    def _evict(self, wanted: int, spare: int | None = None) -> int:
        """Make room for so many pages, where possible, and not by our file `spare`; the pages in use then."""
        ledgers = self._ledgers()
        used = np.concatenate([records["used"] for _, records in ledgers])
        have = np.concatenate([records["pages"] for _, records in ledgers]).astype(np.int64)
        ends = np.cumsum([len(records) for _, records in ledgers])
        homes = [home for home, _ in ledgers]
        if spare is not None:
            at = homes.index(self._home)
            spare += int(ends[at]) - len(ledgers[at][1])
        for victim in victims(used, have, wanted, spare).tolist():
            k = int(np.searchsorted(ends, victim, side="right"))
            number = victim - int(ends[k]) + len(ledgers[k][1])
            with contextlib.suppress(PermissionError):  # another user's
                (homes[k] / f"{number}.part").unlink(missing_ok=True)
                with _open(homes[k] / "ledger", os.O_RDWR) as ledger:
                    _write_record(ledger, number, 0, 0)
                have[victim] = 0
        return int(have.sum())

    def _refused(self, error: OSError) -> None:
        self._resting = monotonic() + _AGAIN
        if not self._said:
            self._said = True
            why = os.strerror(error.errno).lower() if error.errno else str(error)
            _log.warning("cache %s: %s; reading goes on without keeping", self.folder, why)

    @contextlib.contextmanager
    def forgiving(self) -> Iterator[None]:
        """What the disk refuses is no error."""
        try:
            yield
        except OSError as error:
            self._refused(error)


class PartFile:
    """One file of a cache, open for one read. Its spans are known by their places in it."""

    def __init__(self, cache: Cache, number: int, key: bytes, stretch: Stretch) -> None:
        self.cache, self.number, self.key, self.stretch = cache, number, key, stretch
        self._descriptor = -1
        with contextlib.suppress(FileNotFoundError):
            self._descriptor = os.open(cache.path(number), os.O_RDWR | os.O_CLOEXEC)

    @property
    def is_open(self) -> bool:
        return self._descriptor >= 0

    def close(self) -> None:
        """Let go of it, and of what is claimed."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def states(self, i: int, j: int) -> "npt.NDArray[np.uint8]":
        """[j − i] what is known of each span."""
        out = np.zeros(j - i, np.uint8)
        if self._descriptor >= 0:
            found = np.frombuffer(os.pread(self._descriptor, j - i, KEY + i), np.uint8)
            out[: len(found)] = found
        return out

    def whole(self, i: int, j: int) -> Mask:
        """[j − i] which spans are there."""
        if self._descriptor < 0 or self._key() != self.key:
            return np.zeros(j - i, np.bool_)
        out: Mask = self.states(i, j) == _WHOLE
        return out

    def mark(self, i: int, j: int, state: int) -> None:
        os.pwrite(self._descriptor, bytes([state]) * (j - i), KEY + i)

    def drop(self, i: int) -> None:
        """A span turned out not to be what it should; its pages stay counted."""
        self.mark(i, i + 1, _COUNTED)

    def read(self, i: int, view: memoryview) -> bool:
        """Fill a view of its length with a span; False where the file is too short."""
        at = self.stretch.head + int(self.stretch.begins[i])
        while len(view):
            got = os.preadv(self._descriptor, [view], at)
            if not got:
                return False
            view, at = view[got:], at + got
        return True

    def write(self, i: int, view: memoryview) -> None:
        """Keep a span that was reserved."""
        at, rest = self.stretch.head + int(self.stretch.begins[i]), view
        while len(rest):
            put = os.pwrite(self._descriptor, rest, at)
            rest, at = rest[put:], at + put
        self.mark(i, i + 1, _WHOLE)

    def claim(self, i: int, j: int, stop: threading.Event) -> None:
        """Wait until nobody else fetches one of the spans [i, j), make it known that we do; not for ever.

        Raises:
            OSError: the disk refuses.
        """
        if self._descriptor < 0:
            self._create()
        if not hasattr(fcntl, "F_OFD_SETLK"):
            return
        # Of the open file, not of the process as others are: threads wait for each other too.
        lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, KEY + i, j - i, 0)
        until = monotonic() + _PATIENCE
        while not stop.is_set() and monotonic() < until:
            try:
                fcntl.fcntl(self._descriptor, fcntl.F_OFD_SETLK, lock)
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    return  # a file system without such locks
                sleep(0.002)
            else:
                return

    def renew(self) -> bool:
        """Go on with the file of this name where the open one was evicted, or is another's, which is removed.

        Returns:
            Whether it is ours already: if not, nothing that was counted for it is there. Under the lock of the books.
        """
        if os.fstat(self._descriptor).st_nlink and self._key() not in (self.key, b"", bytes(KEY)):
            self.cache.path(self.number).unlink(missing_ok=True)
        if not os.fstat(self._descriptor).st_nlink:
            self.close()
            self._create()
        return self._key() == self.key

    def seal(self) -> None:
        """It is ours."""
        if self._key() != self.key:
            os.pwrite(self._descriptor, self.key, 0)

    def _key(self) -> bytes:
        return os.pread(self._descriptor, KEY, 0)

    def _create(self) -> None:
        """Make or open it. One that was made takes nothing yet but its name: nothing was counted."""
        path = self.cache.path(self.number)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        if os.fstat(self._descriptor).st_size < self.stretch.length:
            os.ftruncate(self._descriptor, self.stretch.length)


class Spans:
    """Some neighbouring samples of a shard, as far as they are kept; a context manager, for one read.

    What the disk refuses is no error: then nothing is there, and nothing is kept.
    """

    def __init__(self, shard: "ShardCache", offsets: I64, begin: int, end: int) -> None:
        """The samples [begin, end) of a shard with these offsets."""
        self._cache = shard.cache
        self._files: list[tuple[int, int, PartFile]] = []  # first sample of the file, end of those wanted, file
        while begin < end:
            number = stretch_at(int(offsets[begin]))
            stretch, first = Stretch.of(offsets, number)
            stop = min(end, first + len(stretch))
            with self._cache.forgiving():
                self._files.append((first, stop, shard.file(_SIDE_FILES + number, stretch)))
            begin = stop

    def __enter__(self) -> "Spans":
        return self

    def __exit__(self, *error: object) -> None:
        for _, _, file in self._files:
            file.close()

    def _by_file(self, places: Sequence[int]) -> Iterator[tuple[PartFile, int, list[int]]]:
        """The files of some rising places, the first sample of each, and the places in it, counted from there."""
        for first, end, file in self._files:
            inside = [place - first for place in places if first <= place < end]
            if inside:
                yield file, first, inside

    def there(self, places: Sequence[int]) -> list[int]:
        """Which of these rising places are kept."""
        out: list[int] = []
        for file, first, inside in self._by_file(places):
            with self._cache.forgiving():
                whole = file.whole(inside[0], inside[-1] + 1)
                out += [first + i for i in inside if whole[i - inside[0]]]
        return out

    def fill(self, place: int, view: memoryview) -> bool:
        """Fill a view of its length with a sample that is kept; False where that fails."""
        done = False
        for file, _, inside in self._by_file([place]):
            with self._cache.forgiving():
                done = file.read(inside[0], view)
                self._cache.touch(file.number)
        return done

    def drop(self, place: int) -> None:
        """What was there is not what it should be."""
        for file, _, inside in self._by_file([place]):
            with self._cache.forgiving():
                file.drop(inside[0])

    def claim(self, places: Sequence[int], stop: threading.Event) -> None:
        """Wait until nobody else fetches any of these places; see `PartFile.claim`."""
        for file, _, inside in self._by_file(places):
            if self._cache.keeps:
                with self._cache.forgiving():
                    file.claim(inside[0], inside[-1] + 1, stop)

    def keep(self, views: Mapping[int, memoryview]) -> None:
        """Keep samples that were claimed, fetched and checked."""
        for file, first, inside in self._by_file(sorted(views)):
            mask = np.zeros(inside[-1] + 1, np.bool_)
            mask[inside] = True
            for a, b in runs(mask):
                if self._cache.keeps and file.is_open:
                    with self._cache.forgiving():
                        if self._cache.reserve(file, a, b):
                            for i in range(a, b):
                                file.write(i, views[first + i])


@dataclass(frozen=True, slots=True)
class ShardCache:
    """What is kept of one shard."""

    cache: Cache
    name: str
    sha256: str
    first: int
    """Number of its first file in the cache: two for its side files, then one a stretch."""

    def file(self, number: int, stretch: Stretch) -> PartFile:
        """Its `number`-th file, opened if it is there."""
        number += self.first
        return PartFile(self.cache, number, self.cache.key(self.name, self.sha256, number), stretch)

    def spans(self, offsets: I64, begin: int, end: int) -> Spans:
        """The samples [begin, end), for one read; `offsets` as in a `ShardIndex`."""
        return Spans(self, offsets, begin, end)

    def side(self, number: int, length: int, sound: Callable[[bytes], bool], fetch: Callable[[], bytes]) -> bytes:
        """The `number`-th side file, kept or fetched.

        Args:
            length: bytes that it must have.
            sound: whether bytes are what they must be; others are fetched again, and never kept.
            fetch: reads it from far away.
        """
        stretch, data = Stretch(begins=np.array([0, length], np.int64)), memoryview(bytearray(length))
        with contextlib.ExitStack() as stack:
            file: PartFile | None = None
            with self.cache.forgiving():
                file = stack.enter_context(contextlib.closing(self.file(number, stretch)))
                for claimed in (False, True):
                    if claimed and self.cache.keeps:
                        file.claim(0, 1, threading.Event())
                    if file.whole(0, 1)[0]:
                        if file.read(0, data) and sound(found := bytes(data)):
                            self.cache.touch(file.number)
                            return found
                        file.drop(0)
                        _log.warning("cache %s: %s: a side file was damaged", self.cache.folder, self.name)
            found = fetch()
            if file is not None and file.is_open and self.cache.keeps and sound(found):
                with self.cache.forgiving():
                    if self.cache.reserve(file, 0, 1):
                        file.write(0, memoryview(found))
            return found


@contextlib.contextmanager
def _open(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _read_ledger(ledger: int, first: int, count: int) -> Records:
    """[count] records, writable; such as were never written hold zeros."""
    out = np.zeros(count, _RECORD)
    data = os.pread(ledger, count * _RECORD.itemsize, first * _RECORD.itemsize)
    whole = len(data) // _RECORD.itemsize
    out[:whole] = np.frombuffer(data[: whole * _RECORD.itemsize], _RECORD)
    return out


def _write_record(ledger: int, number: int, count: int, used: int) -> None:
    record = np.array([(count, count ^ 0xFFFFFFFF, used)], _RECORD)
    os.pwrite(ledger, record.tobytes(), number * _RECORD.itemsize)


def _write_total(accounts: int, total: int) -> None:
    os.pwrite(accounts, _TOTAL.pack(total, total ^ _ONES), 0)


def _is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
