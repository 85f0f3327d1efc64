"""URLs → bytes, and bytes → destinations; foreign errors become this project's here and nowhere else.

Reading: `open_raw`, `size_of`, `expand`. Writing: a `Destination`, below which every file is made in an `Attempt`: a
folder of its own under `.state/attempts/`, locked while its process lives. Files are written there, synced, and
renamed into place only when the whole task has succeeded; whatever a killed process left is swept by the next one
that works on the same task, because nobody holds its lock.
"""

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar, cast
from urllib.parse import unquote, urlsplit

import braceexpand

from .errors import NotFound, StorageError, UsageError, masked
from .files import FileWriter, translated, translating
from .limits import Limits
from .pipe import PREFIX, Pipe
from .remote import RemoteRaw, is_remote, listed
from .remote import size_of as remote_size_of

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Buffer

STATE = ".state"
_DONE = "manifest.json"

T = TypeVar("T")


class Raw(Protocol):
    """An open source: bytes from the start to the end, once."""

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill some of `buffer`; the number of bytes, 0 only at the end."""

    def interrupt(self) -> None:
        """Called from another thread: `readinto` waits for nobody any more, neither a server nor a command."""

    def close(self) -> None: ...


def local_path(url: str) -> Path:
    """The path that a URL names on this machine."""
    parts = urlsplit(url)
    if parts.scheme == "file":
        return Path(unquote(parts.path))
    if is_remote(url) or url.startswith(PREFIX):
        raise UsageError(url, "a path on this machine is needed here", "a path or file://", url.split(":")[0] + ":")
    if "://" in url:
        kinds = "a path, file://, http://, https://, s3://, gs://, az:// or pipe:COMMAND"
        raise UsageError(masked(url), "not a kind of URL that this release opens", kinds, url.split(":")[0] + ":")
    return Path(url)


def name_of(url: str) -> str:
    """The last part of a path or URL: what a plan knows a source by. Of a command, the tar that it names.

    Raises:
        UsageError: a command that names no tar.
    """
    if url.startswith(PREFIX):
        names = _TAR.findall(url)
        if not names:
            raise UsageError(url, "the command names no .tar, and a plan knows its sources by their names")
        return str(names[-1])
    if is_remote(url):
        return unquote(urlsplit(url).path).rstrip("/").rpartition("/")[2]
    return local_path(url).name


_TAR = re.compile(r"[^\s/'\"=;|&<>]+\.tar\b")


def expand(urls: Iterable[str], *, may_be_empty: bool = False) -> list[str]:
    """Braces (`{000000..000999}`) expanded, and a folder replaced by the tars in it, sorted.

    Raises:
        NotFound: a folder without tars, unless `may_be_empty`.
    """
    out: list[str] = []
    for url in urls:
        for one in _braces(url):
            if one.startswith(PREFIX) or (is_remote(one) and name_of(one).endswith(".tar")):
                out.append(one)
                continue
            if is_remote(one):
                found = listed(one)
                if not found:
                    raise NotFound(one, "no *.tar below this URL")
                out += found
                continue
            path = local_path(one)
            with translating(one):
                folder = path.is_dir()
            if folder:
                with translating(one):
                    found = sorted(str(p) for p in path.iterdir() if p.suffix == ".tar")
                if not found and not may_be_empty:
                    raise NotFound(one, "no *.tar in this folder")
                out += found
            else:
                out.append(one)
    return out


def _braces(url: str) -> list[str]:
    """What braces mean; none in a path that is there as it stands, whatever characters its name has."""
    if not url.startswith(PREFIX) and not is_remote(url):
        with contextlib.suppress(OSError):  # as pattern it may be longer than a name can be
            if local_path(url).exists():
                return [url]
    try:
        return list(braceexpand.braceexpand(url))
    except ValueError:
        raise UsageError(url, "its braces do not match; without them it is the name of nothing that is there") from None


def size_of(url: str, limits: Limits | None = None) -> int:
    """Bytes of a source.

    Raises:
        StorageError: it is not there, does not say how long it is (a command never does), or cannot be asked.
    """
    if url.startswith(PREFIX):
        raise StorageError(url, "the length of a command's output is not known: give --assume-size")
    if is_remote(url):
        return remote_size_of(url, limits)
    with translating(url):
        status = local_path(url).stat()
    if not stat.S_ISREG(status.st_mode):
        raise StorageError(url, "not a regular file, so its length is not known: give --assume-size")
    return status.st_size


def is_local(url: str) -> bool:
    """Whether a source is a path on this machine."""
    return not url.startswith(PREFIX) and not is_remote(url)


def local_size(url: str) -> int | None:
    """Bytes of a file on this machine; None for anything else, whose size is unknown or costs a request.

    Raises:
        NotFound, StorageError: it is not there, or cannot be looked at.
    """
    if not is_local(url):
        return None
    with translating(url):
        status = local_path(url).stat()
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def open_raw(url: str, limits: Limits | None = None) -> Raw:
    """A source, opened for one sequential pass. Without limits, those of the environment hold."""
    if url.startswith(PREFIX):
        return Pipe(url)
    if is_remote(url):
        return RemoteRaw(url, limits)
    path = local_path(url)
    with translating(url):
        return _LocalRaw(os.open(path, os.O_RDONLY), url)


class _LocalRaw:
    def __init__(self, descriptor: int, where: str) -> None:
        self._descriptor, self._where = descriptor, where
        with contextlib.suppress(OSError):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def readinto(self, buffer: memoryview, /) -> int:
        try:
            return os.readv(self._descriptor, [buffer])
        except OSError as error:
            raise translated(error, self._where) from error

    def rewind(self) -> bool:
        """Begin with the first byte again; False where the file is a pipe."""
        try:
            return os.lseek(self._descriptor, 0, os.SEEK_SET) == 0
        except OSError:
            return False

    def interrupt(self) -> None:
        """A read of a file comes back by itself."""

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


# ------------------------------------------------------------------------------------------------------------- writing


def _remove_empty(*folders: Path) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # not empty, or not there
            folder.rmdir()


def _insisting(act: Callable[[], T]) -> T:
    """`act`, again where what it had just made below `.state/` is gone: another process may clear it at any moment."""
    for _ in range(100):
        with contextlib.suppress(FileNotFoundError):
            return act()
    return act()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Destination:
    """The folder, or the place in a bucket, that a data set is written to, and everything in it by relative name."""

    def __new__(cls, url: str, limits: Limits | None = None) -> "Destination":
        # Objects have no folders, locks or renames: another class, with the same methods (a test holds them equal).
        if is_remote(url) or url.startswith(PREFIX):
            from .objects import Bucket

            return cast(Destination, Bucket(url, limits))
        return super().__new__(cls)

    def __init__(self, url: str, limits: Limits | None = None) -> None:
        """`limits` hold for a store; without them those of the environment do."""
        self.where = url
        self.root = local_path(url)

    def __reduce__(self) -> tuple[type["Destination"], tuple[str]]:
        return Destination, (self.where,)

    def path(self, name: str) -> Path:
        return self.root / name

    def place(self, name: str) -> str:
        """A name as messages show it."""
        return f"{self.where.rstrip('/')}/{name}"

    def exists(self, name: str) -> bool:
        with translating(self.place(name)):
            return self.path(name).exists()

    def holds(self, url: str) -> bool:
        """Whether a source lies in this folder."""
        if url.startswith(PREFIX) or is_remote(url):
            return False
        with translating(url):
            return local_path(url).resolve().is_relative_to(self.root.resolve())

    def size(self, name: str) -> int:
        with translating(self.place(name)):
            return self.path(name).stat().st_size

    def read(self, name: str) -> bytes:
        with translating(self.place(name)):
            return self.path(name).read_bytes()

    def names(self, folder: str = "") -> list[str]:
        """Relative names of all files below a folder, sorted; hidden ones included."""
        with translating(self.place(folder)):
            found = [p for p in self.path(folder).rglob("*") if not p.is_dir()]
        return sorted(str(p.relative_to(self.root)) for p in found)

    def files_in(self, folder: str) -> list[str]:
        """Relative names of the files directly in a folder, which may be gone, sorted."""
        with translating(self.place(folder)):
            return [f"{folder}/{path.name}" for path in _listed(self.path(folder)) if not path.is_dir()]

    def put(self, name: str, data: bytes) -> None:
        """Write a small file whole: a reader sees the old one or the new one."""
        self._put(name, data, replace=True)

    def put_new(self, name: str, data: bytes) -> bool:
        """Write a small file if there is none of that name; False if there was one."""
        return self._put(name, data, replace=False)

    def _put(self, name: str, data: bytes, *, replace: bool) -> bool:
        path, state = self.path(name), self.root / STATE
        temporary = state / f"put-{secrets.token_hex(8)}"

        def put() -> bool:
            for folder in (state, path.parent):
                folder.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if replace:
                temporary.rename(path)
            else:
                try:
                    os.link(temporary, path)
                except FileExistsError:
                    return False
            _sync_folder(path.parent)
            return True

        with translating(self.place(name)):
            try:
                return _insisting(put)
            finally:
                with contextlib.suppress(OSError):  # as below: what stays, the next run removes
                    temporary.unlink(missing_ok=True)
                self.leave()

    def settle(self, names: Sequence[str]) -> None:
        """Whatever happens to the machine, these files stay; and whoever reads them next reads the disk, not memory."""
        for name in names:
            with translating(self.place(name)):
                descriptor = os.open(self.path(name), os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                    with contextlib.suppress(OSError):
                        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                finally:
                    os.close(descriptor)
        for folder in sorted({self.path(name).parent for name in names}):
            with translating(self.where):
                _sync_folder(folder)

    def leave(self) -> None:
        """The last one to work on a data set that is published leaves no empty folder behind."""
        if self.exists(_DONE):
            _remove_empty(self.root / STATE / "attempts", self.root / STATE)

    def remove(self, name: str) -> None:
        """Remove a file or a folder, if it is there."""
        path = self.path(name)
        with translating(self.place(name)):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
            self.leave()

    def remove_empty(self, folder: str) -> None:
        """Remove a folder if it is there and has nothing in it."""
        _remove_empty(self.path(folder))

    def clear_state(self) -> None:
        """Remove what runs keep below `.state/`, but for the attempts of live processes."""
        self.sweep()
        state = self.root / STATE
        with translating(self.place(STATE)):
            for path in _listed(state):
                if not path.is_dir():
                    path.unlink(missing_ok=True)
        _remove_empty(state / "attempts", state)

    def attempt(self, label: str) -> "Attempt":
        """A new attempt at the piece of work called `label`; sweeps what dead ones left."""
        return Attempt(self, label)

    def sweep(self, label: str = "") -> None:
        """Remove the attempts, at the piece of work called `label` or at any, whose process is dead."""
        attempts = self.root / STATE / "attempts"
        with translating(self.place(STATE)):
            for path in _listed(attempts):
                if label and not path.name.startswith(f"{label}-"):
                    continue
                if path.suffix == ".lock":
                    _remove_if_dead(path)
                elif not path.with_suffix(".lock").exists():  # it could not be removed with its lock
                    shutil.rmtree(path, ignore_errors=True)

    def at_work(self, label: str) -> bool:
        """Whether a live process has an attempt at the piece of work called `label`."""
        self.sweep(label)
        return any(p.name.startswith(f"{label}-") for p in _listed(self.root / STATE / "attempts"))


def _listed(folder: Path) -> list[Path]:
    """What stands in a folder, which may be gone."""
    with contextlib.suppress(FileNotFoundError):
        return sorted(folder.iterdir())
    return []


def _lock(path: Path) -> int:
    """A descriptor that holds the lock file `path`, made now."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        # A sweep may have taken and removed it between these two calls: then the name is gone, or another file's.
        try:
            if path.stat().st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)


def _remove_if_dead(lock: Path) -> None:
    try:
        descriptor = os.open(lock, os.O_RDWR)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return  # alive
    else:
        shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
        lock.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


class Attempt:
    """Files of one piece of work, invisible until `publish`; a context manager that leaves nothing behind."""

    def __init__(self, destination: Destination, label: str) -> None:
        self.destination = destination
        self._names: list[str] = []
        self._folder = destination.root / STATE / "attempts" / f"{label}-{secrets.token_hex(8)}"
        destination.sweep(label)
        with translating(destination.where):
            self._lock = _insisting(lambda: _lock(self._folder.with_suffix(".lock")))
            try:
                self._folder.mkdir()
            except BaseException:
                self._release()
                raise

    def create(self, name: str) -> "FileWriter":
        """A new file that will be called `name`."""
        self._names.append(name)
        return FileWriter(self._path(name), self.destination.place(name))

    def _path(self, name: str) -> Path:
        return self._folder / name.replace("/", "%")

    def put(self, name: str, data: "Buffer") -> None:
        """A new file of these bytes that will be called `name`."""
        writer = self.create(name)
        try:
            writer.write([data])
            writer.finish()
        finally:
            writer.close()

    def publish(self, last: str, data: "Buffer") -> bool:
        """Move every file, each finished, to its place; then make one more, which says that they are all there.

        False if there was a file of that name. It is written before anything moves: a disk that is full by then
        leaves nothing visible.
        """
        root, names = self.destination.root, list(self._names)
        self.put(last, data)
        with translating(self.destination.where):
            folders = {(root / name).parent for name in names}
            for folder in {*folders, (root / last).parent}:
                folder.mkdir(parents=True, exist_ok=True)
            for name in names:
                self._path(name).rename(root / name)
            for folder in sorted(folders):
                _sync_folder(folder)
            try:
                os.link(self._path(last), root / last)
            except FileExistsError:
                return False
            _sync_folder((root / last).parent)
        return True

    def publish_one(self, name: str, *, replace: bool = False) -> bool:
        """Put one finished file in its place; False, and nothing happens, if there is one already and may stay."""
        path = self.destination.path(name)
        with translating(self.destination.place(name)):
            if replace:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._path(name).rename(path)
            else:
                try:
                    os.link(self._path(name), path)
                except FileExistsError:
                    return False
            _sync_folder(path.parent)
        return True

    def __enter__(self) -> "Attempt":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: "TracebackType | None"
    ) -> None:
        self._release()
        self.destination.leave()

    def _release(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # no error here may hide the one that led here; the next run removes it
            self._folder.with_suffix(".lock").unlink(missing_ok=True)
        os.close(self._lock)
