"""Sources and shards behind a URL: sequentially with read-ahead in a byte budget, or at any place."""

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar
from urllib.parse import urlsplit

from . import clouds, signing
from .errors import Sa1bError, StorageError
from .transfer import Limits, Object, Passing, Pauses

T = TypeVar("T")

_WEB = ("http", "https")


def is_remote(url: str) -> bool:
    """Whether a URL lies in an object store or on a web server."""
    return urlsplit(url).scheme in (*_WEB, *clouds.SCHEMES) if "://" in url else False


def open_object(url: str) -> Object:
    """Raises: NotFound, Denied, … as the server says."""
    limits = Limits.of(os.environ)
    if urlsplit(url).scheme in _WEB:
        from .web import Web

        return Object(url, Web(url, limits), limits)
    scheme, bucket, key = clouds.split(url)
    if clouds.has_forked() and scheme == "s3" and clouds.keys() is not None:
        # A worker of torch's DataLoader, say. What reads for it has no threads that a fork would lose.
        from .web import Web

        here, _ = signing.signed("GET", bucket, key)
        return Object(url, Web(here, limits, where=url, sign=lambda m: signing.signed(m, bucket, key)[1]), limits)
    return Object(url, clouds.Cloud(url, limits), limits)


def size_of(url: str) -> int:
    """Bytes of an object."""
    return open_object(url).stat.size


def listed(url: str) -> list[str]:
    """URLs of the tars directly below a URL, sorted; of a web server, which cannot be asked, the URL itself."""
    if urlsplit(url).scheme in _WEB:
        return [url]
    return [
        f"{url.rstrip('/')}/{one.name}"
        for one in insisting(url, lambda limits: clouds.listing(url, limits))
        if "/" not in one.name and one.name.endswith(".tar")
    ]


def insisting(where: str, act: Callable[[Limits], T]) -> T:
    """`act`, again where what hinders it may pass.

    Raises:
        Unreachable: it did not pass.
    """
    limits = Limits.of(os.environ)
    pauses = Pauses(where, limits, threading.Event())
    while True:
        try:
            return act(limits)
        except Passing as why:
            pauses.wait(why)


class _Window:
    """A stretch of an object on its way."""

    def __init__(self, begin: int, memory: memoryview) -> None:
        self.begin, self.memory = begin, memory
        self.filled = self.taken = 0
        self.error: BaseException | None = None


class RemoteRaw:
    """An object, once from its first byte to its last; some windows are on their way ahead of the consumer."""

    def __init__(self, url: str) -> None:
        self._object = open_object(url)
        limits = Limits.of(os.environ)
        self._size, self._window = self._object.stat.size, limits.window
        self._most = max(1, limits.ahead // limits.window)
        self._changed = threading.Condition()
        self._windows: deque[_Window] = deque()
        self._free: list[memoryview] = []
        self._asked = 0
        self._ask()

    def _ask(self) -> None:
        while self._asked < self._size and len(self._windows) < self._most:
            length = min(self._window, self._size - self._asked)
            memory = self._free.pop() if self._free else memoryview(bytearray(min(self._window, self._size)))
            window = _Window(self._asked, memory[:length])
            self._windows.append(window)
            self._asked += length
            # Daemons: one that waits for a dead server must not hold up the end of the process.
            threading.Thread(target=self._fill, args=(window,), name="sa1b-wds-read-ahead", daemon=True).start()

    def _fill(self, window: _Window) -> None:
        try:
            for piece in self._object.pieces(window.begin, window.begin + len(window.memory)):
                window.memory[window.filled : window.filled + len(piece)] = piece
                with self._changed:
                    window.filled += len(piece)
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                window.error = error
                self._changed.notify_all()

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill some of `buffer`; 0 only at the end.

        Raises:
            StorageError: it cannot be read on; see `transfer.Object.pieces`.
        """
        if not self._windows or not len(buffer):
            return 0
        window = self._windows[0]
        with self._changed:
            while window.filled == window.taken and window.error is None and not self._object.stop.is_set():
                self._changed.wait()
            filled = window.filled
        if filled == window.taken:
            raise self._failed(window.error)
        n = min(len(buffer), filled - window.taken)
        buffer[:n] = window.memory[window.taken : window.taken + n]
        window.taken += n
        if window.taken == len(window.memory):
            self._windows.popleft()
            if len(window.memory) == self._window:
                self._free.append(window.memory)
            self._ask()
        return n

    def _failed(self, error: BaseException | None) -> BaseException:
        if isinstance(error, Sa1bError):
            return error
        return error or StorageError(self._object.where, "was closed")

    def interrupt(self) -> None:
        with self._changed:
            self._object.stop.set()
            self._changed.notify_all()

    def close(self) -> None:
        self.interrupt()
        self._windows.clear()
        self._free.clear()


class RemoteFile:
    """An object, at any place, by several threads at once."""

    parallel = True

    def __init__(self, url: str) -> None:
        self._object = open_object(url)

    @property
    def retries(self) -> int:
        return self._object.retries

    def read(self, offset: int, views: Sequence[memoryview]) -> int:
        """Fill the views with the bytes from `offset` on; how many there were, short only at the end."""
        return self._object.fill(offset, views)

    def behind(self, offset: int) -> int:
        return self._object.stat.size - offset

    def interrupt(self) -> None:
        self._object.stop.set()

    def close(self) -> None:
        """Nothing is held open between reads."""


def read(url: str) -> bytes:
    """A small object, whole."""
    found = open_object(url)
    data = bytearray(found.stat.size)
    found.fill(0, [memoryview(data)])
    return bytes(data)
