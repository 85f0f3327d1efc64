"""A bucket as a destination: what `storage.Destination` does with folders, done with objects.

Shards go up in parts while they are made and are invisible until their task publishes; then every upload is completed,
the side files follow, and the receipt comes last and only where there is none. A process that was killed leaves parts
of uploads, which the next one at the same task ends where it may (see `uploads`), and perhaps some shards, which it
writes again with the same bytes.

There are no locks: an attempt is an object below `.state/attempts/` that says whose it is, renewed while it writes. It
is dead when its process is, on this machine, or when nobody renewed it for a quarter of an hour.
"""

import contextlib
import errno
import json
import os
import secrets
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import IO, TYPE_CHECKING
from urllib.parse import urlsplit

from . import clouds, uploads
from .errors import NoSpace, NotFound, StorageError, UsageError, masked
from .limits import Limits
from .pipe import PREFIX, feed, place_of
from .process import has_ended, identity
from .remote import insisting, open_object, read, size_of
from .traffic import Passing

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Buffer

_ATTEMPTS = ".state/attempts"
_RENEW_SECONDS = 20.0
_DEAD_SECONDS = 900.0
_COMPLETERS = 8


class Bucket:
    """The place that a data set is written to or read from, and everything in it by relative name."""

    def __init__(self, url: str, limits: Limits | None = None) -> None:
        """Without limits, those of the environment hold."""
        self.command = url if url.startswith(PREFIX) else None
        """What writes objects, if it is not this program."""
        self.where, self.limits = (place_of(url) if self.command else url).rstrip("/"), limits
        parts = urlsplit(self.where)
        self._is_web = parts.scheme not in clouds.SCHEMES
        if self._is_web and parts.query:
            raise UsageError(masked(url), "a signed URL is good for one file, not for a data set")

    def __reduce__(self) -> tuple[type["Bucket"], tuple[str, Limits | None]]:
        return Bucket, (self.command or self.where, self.limits)

    def __repr__(self) -> str:
        return f"Bucket({masked(self.where)!r})"

    def place(self, name: str) -> str:
        """The URL of a name."""
        return f"{self.where}/{name}"

    def exists(self, name: str) -> bool:
        try:
            open_object(self.place(name), self.limits)
        except NotFound:
            return False
        return True

    def holds(self, url: str) -> bool:
        """Whether a source lies below this place."""
        return url.startswith(f"{self.where}/")

    def size(self, name: str) -> int:
        return size_of(self.place(name), self.limits)

    def read(self, name: str) -> bytes:
        return read(self.place(name), self.limits)

    def _listing(self, folder: str) -> list[clouds.Listed]:
        if self._is_web:
            raise UsageError(self.where, "a web server does not say what it has")
        where = self.place(folder).rstrip("/")
        return insisting(where, lambda limits: clouds.listing(where, limits), self.limits)

    def names(self, folder: str = "") -> list[str]:
        """Relative names of all objects below a folder, sorted; hidden ones included."""
        prefix = f"{folder.rstrip('/')}/" if folder else ""
        return sorted(prefix + one.name for one in self._listing(folder))

    def files_in(self, folder: str) -> list[str]:
        """Relative names of the objects directly in a folder, sorted: one listing, however many there are."""
        return sorted(f"{folder}/{one.name}" for one in self._listing(folder) if "/" not in one.name)

    def put(self, name: str, data: "Buffer") -> None:
        """Write a small object whole: a reader sees the old one or the new one."""
        self._put(name, data, new=False)

    def put_new(self, name: str, data: "Buffer") -> bool:
        """Write a small object if there is none of that name; False if there was one."""
        return self._put(name, data, new=True)

    def _put(self, name: str, data: "Buffer", *, new: bool) -> bool:
        if self._is_web:
            raise UsageError(self.where, "a web server is only read from", "a path, s3://, gs:// or az://")
        where = self.place(name)
        if self.command is not None:
            if new and self.exists(name):
                return False
            with tempfile.TemporaryFile() as file:
                file.write(data)
                self.send(name, file)
            return True
        return insisting(where, lambda limits: clouds.put(where, data, limits, new=new), self.limits)

    def settle(self, names: Sequence[str]) -> None:
        """What a store has acknowledged is safe."""

    def send(self, name: str, file: IO[bytes]) -> None:
        """Have the command write an object, and see that it is there, whole.

        Raises:
            Unreachable: the command fails, or stores something else, however often it is run.
        """
        assert self.command is not None
        command, size = self.command, file.seek(0, os.SEEK_END)

        def run(limits: Limits) -> None:
            try:
                feed(command, name, file)
                if (found := size_of(self.place(name), limits)) != size:
                    raise StorageError(self.place(name), "the command has stored another length", size, found)
            except StorageError as error:
                with contextlib.suppress(StorageError):  # what is there is not what it should be
                    clouds.delete(self.place(name), limits)
                raise Passing(str(error)) from None

        insisting(self.place(name), run, self.limits)

    def leave(self) -> None:
        """There are no folders that could be empty."""

    def remove(self, name: str) -> None:
        """Remove an object, and everything below it as if it were a folder."""
        for one in [name, *self.names(name)]:
            where = self.place(one)
            insisting(where, partial(clouds.delete, where), self.limits)

    def remove_empty(self, folder: str) -> None:
        """There are no folders."""

    def clear_state(self) -> None:
        """Remove what runs keep below `.state/`, and unfinished uploads, but for those of live processes."""
        alive = self._alive("")
        for name in self.names(".state"):
            if not any(name.startswith(attempt) for attempt in alive):
                self.remove(name)
        if not alive:
            self.end_uploads()

    def attempt(self, label: str) -> "ObjectAttempt":
        """A new attempt at the piece of work called `label`; sweeps what dead ones left."""
        return ObjectAttempt(self, label)

    def sweep(self, label: str = "") -> None:
        """Forget the attempts, at the piece of work called `label` or at any, whose process is dead."""
        self._alive(label)

    def at_work(self, label: str) -> bool:
        """Whether a live process has an attempt at the piece of work called `label`."""
        return bool(self._alive(label))

    def _alive(self, label: str) -> list[str]:
        """Names of the attempts of live processes; removes the others."""
        alive = []
        for one in self._listing(_ATTEMPTS):
            if label and not one.name.startswith(f"{label}-"):
                continue
            name = f"{_ATTEMPTS}/{one.name}"
            try:
                dead = _is_dead(self.read(name), time.time() - one.modified)
            except NotFound:
                continue
            if dead:
                self.remove(name)
            else:
                alive.append(name)
        return alive

    def end_uploads(self, name: str = "") -> None:
        """End every upload below this place, or to one name, that was begun and not completed."""
        where = self.place(name).rstrip("/")
        with contextlib.suppress(StorageError):  # not everybody may list them; the lifecycle rule removes them then
            for upload in uploads.pending(where) or ():
                uploads.abort(where, upload)


def _is_dead(data: bytes, age: float) -> bool:
    if age > _DEAD_SECONDS:
        return True
    try:
        return has_ended(json.loads(data))
    except (ValueError, TypeError, AttributeError):
        return False


class ObjectAttempt:
    """Objects of one piece of work, invisible until `publish`; a context manager that leaves nothing behind."""

    def __init__(self, destination: Bucket, label: str) -> None:
        self.destination = destination
        self._alone = not destination.at_work(label)
        self._files: dict[str, ObjectWriter | bytes] = {}
        self._name = f"{_ATTEMPTS}/{label}-{secrets.token_hex(8)}"
        self._about = json.dumps(identity()).encode()
        self._renewed = 0.0
        self.renew()

    def renew(self) -> None:
        """Say that this attempt lives, if that was long ago."""
        if time.monotonic() - self._renewed > _RENEW_SECONDS or not self._renewed:
            self._renewed = time.monotonic()
            self.destination.put(self._name, self._about)

    def create(self, name: str) -> "ObjectWriter":
        """A new object that will be called `name`."""
        if self._alone:
            self.destination.end_uploads(name)
        kind = ObjectWriter if self.destination.command is None else SpooledWriter
        writer = kind(self.destination.place(name), self)
        self._files[name] = writer
        return writer

    def put(self, name: str, data: "Buffer") -> None:
        """A new, small object of these bytes that will be called `name`."""
        self._files[name] = bytes(data)

    def publish(self, last: str, data: "Buffer") -> bool:
        """Complete every object, each finished; then make one more, which says that they are all there.

        False if there was an object of that name.
        """
        with ThreadPoolExecutor(_COMPLETERS, "sa1b-wds-complete") as completers:
            for _ in completers.map(self._complete, list(self._files)):
                self.renew()
        return self.destination.put_new(last, data)

    def _complete(self, name: str) -> None:
        file = self._files[name]
        if isinstance(file, bytes):
            self.destination.put(name, file)
        else:
            file.complete()

    def publish_one(self, name: str, *, replace: bool = False) -> bool:
        """Complete one finished object; False, and nothing happens, if there is one already and may stay."""
        if not replace and self.destination.exists(name):
            return False
        self._complete(name)
        return True

    def __enter__(self) -> "ObjectAttempt":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: "TracebackType | None"
    ) -> None:
        begun = [name for name, file in self._files.items() if isinstance(file, ObjectWriter) and not file.completed]
        for file in self._files.values():
            if isinstance(file, SpooledWriter):
                file.discard()
        self._files.clear()
        if self._alone:
            for name in begun:
                self.destination.end_uploads(name)
        with contextlib.suppress(StorageError):  # no error here may hide the one that led here
            self.destination.remove(self._name)


class ObjectWriter:
    """An object being written."""

    def __init__(self, where: str, attempt: ObjectAttempt) -> None:
        self.where, self._attempt = where, attempt
        self._upstream: clouds.Upstream | None = None
        self._finished = self.completed = False

    def write(self, pieces: Sequence["Buffer"]) -> None:
        """Append the pieces, all of their bytes."""
        if self._upstream is None:
            limits = self._attempt.destination.limits
            self._upstream = insisting(self.where, partial(clouds.Upstream, self.where), limits)
        for piece in pieces:
            self._upstream.write(piece)
        self._attempt.renew()

    def finish(self) -> None:
        """Everything is written; the last part goes when the attempt publishes, which makes the object visible."""
        self._finished = True

    def complete(self) -> None:
        assert self._finished, f"{self.where} was not finished"
        if self._upstream is None:
            self._attempt.destination.put(self.where.removeprefix(f"{self._attempt.destination.where}/"), b"")
        else:
            self._upstream.complete()
        self.completed = True

    def close(self) -> None:
        """A finished one waits for its attempt; of another one nothing stays."""
        if not self._finished:
            self._upstream = None


class SpooledWriter(ObjectWriter):
    """An object that a command will write: a file without a name until then, see `pipe`."""

    def __init__(self, where: str, attempt: ObjectAttempt) -> None:
        super().__init__(where, attempt)
        self._folder = os.environ.get("SLURM_TMPDIR") or None
        try:
            self._file: IO[bytes] = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> StorageError:
        where = self._folder or tempfile.gettempdir()
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return NoSpace(where, f"no space left for {self.where}, which waits there: set TMPDIR to a larger disk")
        return StorageError(where, f"{self.where} cannot wait there: {os.strerror(error.errno or 0).lower()}")

    def write(self, pieces: Sequence["Buffer"]) -> None:
        """Append the pieces, all of their bytes."""
        try:
            self._file.writelines(pieces)
        except OSError as error:
            raise self._failed(error) from error
        self._attempt.renew()

    def complete(self) -> None:
        assert self._finished, f"{self.where} was not finished"
        bucket = self._attempt.destination
        bucket.send(self.where.removeprefix(f"{bucket.where}/"), self._file)
        self._file.close()
        self.completed = True

    def close(self) -> None:
        """A finished one waits for its attempt; of another one nothing stays."""
        if not self._finished:
            self.discard()

    def discard(self) -> None:
        """Nothing of it stays here."""
        self._file.close()
