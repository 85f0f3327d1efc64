"""Files of this machine, written so that a job of days leaves the rest of it alone; and what its errors mean.

A shard goes to the disk past the page cache (O_DIRECT), straight from the memory its samples were inflated into: 10 TiB
through the cache would push out everything else that is in it, cost a copy and a fresh page for every 4 KiB, and wait
at the end for a disk that has not kept up. Where that is not to be had, the cache it is, and the disk works along.
"""

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import Denied, NoSpace, NotFound, StorageError

if TYPE_CHECKING:
    from typing_extensions import Buffer


def translated(error: OSError, where: str) -> StorageError:
    """The error of this project that says what an OSError means."""
    match error.errno:
        case errno.ENOENT:
            return NotFound(where, "no such file or folder")
        case errno.ENOTDIR:
            return NotFound(where, "a part of this path is a file, not a folder")
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return Denied(where, f"{os.strerror(error.errno).lower()}: check the owner and the mode of the folder")
        case errno.ENOSPC | errno.EDQUOT:
            return NoSpace(where, "no space left: free some and run the same command again")
    return StorageError(where, os.strerror(error.errno).lower() if error.errno else str(error))


@contextlib.contextmanager
def translating(where: str) -> Iterator[None]:
    """Everything below raises this project's errors instead of OSError."""
    try:
        yield
    except OSError as error:
        raise translated(error, where) from error


def free_bytes(folder: Path) -> int:
    """Bytes that may still be written below `folder`."""
    with translating(str(folder)):
        return shutil.disk_usage(folder).free


def _file_system(device: int) -> str:
    """The kind of file system that has a device number: `ext4`, `tmpfs`, …; "" where nobody says."""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
            mount, _, kind = line.partition(" - ")
            if mount.split()[2] == wanted:
                return kind.split()[0]
    return ""


def is_memory(folder: Path) -> bool:
    """Whether a folder lies on tmpfs, where spilled bytes would be memory again."""
    with contextlib.suppress(OSError):
        return _file_system(folder.stat().st_dev) in ("tmpfs", "ramfs")
    return False


def _write_out() -> Callable[[int, int, int], None]:
    """(descriptor, offset, bytes): begin to write dirty pages to the disk, and do not wait for it."""
    try:
        call = ctypes.CDLL(None).sync_file_range
    except (OSError, AttributeError):  # Linux alone has it
        return lambda descriptor, offset, length: None
    call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return lambda descriptor, offset, length: call(descriptor, offset, length, 2)  # SYNC_FILE_RANGE_WRITE


_begin_writing_out = _write_out()
_DIRTY = 4 << 20  # bytes in the cache from which on the disk is put to work
_PAGE = 1 << 12
_CACHED = 0
_DIRECT: int = getattr(os, "O_DIRECT", _CACHED)


@cache
def _way(device: int) -> int:
    """O_DIRECT for the file systems and disks that are better off with it, 0 for all others.

    Over a network (NFS, Lustre) each write would wait for a server; a disk that turns would seek between the shards of
    a task at every sample. Virtio's disks always say that they turn, so they are not asked.
    """
    if _file_system(device) not in ("ext4", "xfs"):
        return _CACHED
    disk = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    if not (disk / "queue").is_dir():
        disk = disk.parent  # of a partition
    try:
        turns = (disk / "queue" / "rotational").read_text().strip() != "0"
    except OSError:
        return _CACHED
    return _CACHED if turns and not disk.name.startswith("vd") else _DIRECT


class FileWriter:
    """A file being written, past the page cache where that is possible.

    Whole pages go to the disk as they lie in memory; less than a page waits for the next pieces. That takes pieces of
    whole sectors, at addresses of whole sectors, as a shard's are. With others, and with what a full disk leaves over,
    the file goes on through the cache: what is written is the same.
    """

    def __init__(self, path: Path, where: str) -> None:
        self.where = where
        self._written = self._begun = 0
        self._rest, self._waiting = memoryview(b""), 0
        with translating(where):
            self._direct = _way(path.parent.stat().st_dev)
            how = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            try:
                self._descriptor = os.open(path, how | self._direct, 0o666)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                path.unlink(missing_ok=True)
                self._direct = _CACHED
                self._descriptor = os.open(path, how, 0o666)
            if self._direct:
                self._rest = memoryview(mmap.mmap(-1, _PAGE))

    def write(self, pieces: Sequence["Buffer"]) -> None:
        """Append the pieces, all of their bytes."""
        views = [memoryview(piece).cast("B") for piece in pieces]
        with translating(self.where):
            if self._direct:
                views = self._past_the_cache(views)
            if views:
                self._through_the_cache(views)

    def _past_the_cache(self, views: list[memoryview]) -> list[memoryview]:
        """Write whole pages and keep what is left over; returns what has to go through the cache."""
        views = [self._rest[: self._waiting], *views]
        total = sum(map(len, views))
        pages = total - total % _PAGE
        whole, left = _parted(views, pages)
        written = 0
        try:
            if pages:
                written = os.writev(self._descriptor, whole)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        self._written += written
        if written != pages:  # other pieces than a shard's, a signal, or a disk that is nearly full
            self._leave_direct()
            return _parted(views, written)[1]
        kept = b"".join(left)
        self._waiting = len(kept)
        self._rest[: self._waiting] = kept
        return []

    def _leave_direct(self) -> None:
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, fcntl.fcntl(self._descriptor, fcntl.F_GETFL) & ~self._direct)
        self._direct, self._begun = _CACHED, self._written

    def _through_the_cache(self, views: list[memoryview]) -> None:
        total = sum(map(len, views))
        written = os.writev(self._descriptor, views)
        if written != total:  # a signal, or a disk that is nearly full
            rest = memoryview(b"".join(views))[written:]
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        self._written += total
        if self._written - self._begun >= _DIRTY:
            _begin_writing_out(self._descriptor, self._begun, self._written - self._begun)
            self._begun = self._written

    def finish(self) -> None:
        """Everything written is on the disk when this returns."""
        with translating(self.where):
            if self._direct:
                self._leave_direct()
                if self._waiting:
                    self._through_the_cache([self._rest[: self._waiting]])
            os.fsync(self._descriptor)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _parted(views: list[memoryview], at: int) -> tuple[list[memoryview], list[memoryview]]:
    """The bytes before and from `at`, none of them copied."""
    before: list[memoryview] = []
    for i, view in enumerate(views):
        if len(view) > at:
            return [*before, *([view[:at]] if at else [])], [view[at:], *views[i + 1 :]]
        before.append(view)
        at -= len(view)
    return before, []


class Scratch:
    """An unlinked file on the node's own disk, in slots that are used again: it vanishes with its process."""

    _GRAIN = 1 << 16

    def __init__(self, folder: Path) -> None:
        self._where, self._folder = str(folder), folder
        self._descriptor = -1
        self._end = 0
        self._free: dict[int, list[int]] = {}
        self.bytes_written = 0

    def write(self, data: "Buffer") -> tuple[int, int]:
        """Put bytes away; the (place, length) that `read` takes."""
        view = memoryview(data).cast("B")
        if self._descriptor < 0:
            self._open()
        grains = self._grains(len(view))
        slots = self._free.get(grains)
        place = slots.pop() if slots else self._end
        if place == self._end:
            self._end += grains * self._GRAIN
        done = 0
        with translating(f"scratch {self._where}"):
            while done < len(view):
                done += os.pwrite(self._descriptor, view[done:], place + done)
        self.bytes_written += len(view)
        return place, len(view)

    def read(self, slot: tuple[int, int], into: memoryview) -> None:
        """Get them again; `into` must have their length. May be called from another thread than `write`."""
        place, length = slot
        done = 0
        with translating(f"scratch {self._where}"):
            while done < length:
                got = os.preadv(self._descriptor, [into[done:length]], place + done)
                if not got:
                    raise StorageError(f"scratch {self._where}", "bytes are missing", length, done)
                done += got

    def give_back(self, slot: tuple[int, int]) -> None:
        place, length = slot
        self._free.setdefault(self._grains(length), []).append(place)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _grains(self, length: int) -> int:
        # Size classes an eighth apart, so that a slot fits the next sample of about that size too.
        grains = max(1, -(-length // self._GRAIN))
        step = max(1, 1 << max(0, grains.bit_length() - 4))
        return -(-grains // step) * step

    def _open(self) -> None:
        with translating(f"scratch {self._where}"):
            with contextlib.suppress(OSError, AttributeError):  # not every file system has files without a name
                self._descriptor = os.open(self._folder, os.O_RDWR | os.O_TMPFILE, 0o600)
                return
            path = self._folder / f".sa1b-wds-{secrets.token_hex(8)}"
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            path.unlink()
