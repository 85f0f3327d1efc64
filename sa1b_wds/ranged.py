"""Bytes of a shard at a place: local files by `preadv`, objects by ranged requests, commands by reading forward."""

import os
from collections.abc import Sequence
from typing import Protocol

from .files import translated, translating
from .limits import Limits
from .pipe import PREFIX, Pipe
from .remote import RemoteFile, is_remote
from .storage import local_path
from .traffic import Traffic

IOV_MAX = 1024


class Ranged(Protocol):
    """A shard that is open for reading; several threads may use it at once only where `parallel` is true."""

    parallel: bool

    @property
    def traffic(self) -> Traffic:
        """What happened on the way, so far."""

    def read(self, offset: int, views: Sequence[memoryview]) -> int:
        """Fill the views with the bytes from `offset` on; how many there were, short only at the end."""

    def behind(self, offset: int) -> int:
        """Bytes that follow `offset`, which is where reading has come to; 0 at the proper end."""

    def interrupt(self) -> None:
        """Whoever waits for bytes gets an error."""

    def close(self) -> None: ...


class LocalFile:
    """A file of this machine."""

    parallel = True
    traffic = Traffic()

    def __init__(self, url: str) -> None:
        self._where = url
        self._descriptor = -1
        with translating(url):
            self._descriptor = os.open(local_path(url), os.O_RDONLY)

    def read(self, offset: int, views: Sequence[memoryview]) -> int:
        done = 0
        try:
            for i in range(0, len(views), IOV_MAX):
                some = views[i : i + IOV_MAX]
                wanted = sum(map(len, some))
                got = os.preadv(self._descriptor, some, offset + done)
                done += got
                if got < wanted:
                    return done + self._rest(offset + done, some, got)
        except OSError as error:
            raise translated(error, self._where) from error
        return done

    def _rest(self, offset: int, views: Sequence[memoryview], done: int) -> int:
        """The rest of a read that came back short: a signal, a file system's limit, or the end of the file."""
        total = 0
        for view in views:
            skip = min(done, len(view))
            done -= skip
            at = memoryview(view)[skip:]
            while at:
                got = os.preadv(self._descriptor, [at], offset + total)
                if not got:
                    return total
                total += got
                at = at[got:]
        return total

    def behind(self, offset: int) -> int:
        with translating(self._where):
            return os.fstat(self._descriptor).st_size - offset

    def interrupt(self) -> None:
        """A disk answers by itself."""

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.close()


class ForwardFile:
    """The output of a command: only forwards, and bytes passed over are read all the same."""

    parallel = False
    traffic = Traffic()

    def __init__(self, url: str) -> None:
        self._pipe = Pipe(url)
        self._scratch = memoryview(bytearray(1 << 18))
        self.position = 0
        """The byte that comes next."""

    def read(self, offset: int, views: Sequence[memoryview]) -> int:
        if offset < self.position:
            raise ValueError(f"byte {offset} has passed")  # a mistake of the caller's, not of the data
        while self.position < offset:
            if not self._some(self._scratch[: offset - self.position]):
                return 0
        done = 0
        for view in views:
            at = view
            while len(at):
                got = self._some(at)
                if not got:
                    return done
                done += got
                at = at[got:]
        return done

    def _some(self, view: memoryview) -> int:
        try:
            got = self._pipe.readinto(view)
        except OSError as error:
            raise translated(error, self._pipe.where) from error
        self.position += got
        return got

    def behind(self, offset: int) -> int:
        while self._some(self._scratch):
            pass
        return self.position - offset

    def interrupt(self) -> None:
        """End the command; a read that waits for it ends too."""
        self._pipe.kill()

    def close(self) -> None:
        self._pipe.close()

    def __del__(self) -> None:
        if hasattr(self, "_pipe"):
            self._pipe.close()


def open_ranged(url: str, limits: Limits | None = None) -> Ranged:
    """A shard, opened for reading at any place (`pipe:` only forwards). Without limits, those of the environment hold.

    Raises:
        StorageError: it cannot be opened.
        UsageError: not a kind of URL that this release opens.
    """
    if url.startswith(PREFIX):
        return ForwardFile(url)
    return RemoteFile(url, limits) if is_remote(url) else LocalFile(url)
