"""Sources and shards behind a URL: sequentially with read-ahead in a byte budget, or at any place."""

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from . import clouds, signing
from .errors import Sa1bError, StorageError
from .limits import Limits
from .traffic import Passing, Traffic
from .transfer import Object, Pauses, Stat

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from .web import Web

T = TypeVar("T")

_WEB = ("http", "https")
_SMALLEST = 2 << 20  # bytes of a window, where many are on their way: each costs a request


def is_remote(url: str) -> bool:
    """Whether a URL lies in an object store or on a web server."""
    return urlsplit(url).scheme in (*_WEB, *clouds.SCHEMES) if "://" in url else False


def open_object(url: str, limits: Limits | None = None) -> Object:
    """An object, asked who it is. Without limits, those of the environment hold.

    Raises:
        NotFound, Denied, …: as the server says.
    """
    limits = limits or Limits.of(os.environ)
    if urlsplit(url).scheme in _WEB:
        from .web import Web

        return Object(url, Web(url, limits), limits)
    scheme = urlsplit(url).scheme
    if clouds.has_forked() and scheme == "s3" and clouds.keys() is not None:
        # A worker of torch's DataLoader, say. What reads for it has no threads that a fork would lose.
        return Object(url, _signed(url, limits), limits)
    if scheme == "s3" and clouds.keys() is not None:
        return Object(url, _Told(url, limits), limits)
    return Object(url, clouds.Cloud(url, limits), limits)


def _signed(url: str, limits: Limits) -> "Web":
    """An object of S3 by signed requests of our own."""
    from .web import Web

    _, bucket, key = clouds.split(url)
    here, _ = signing.signed("GET", bucket, key)
    return Web(here, limits, where=url, sign=lambda method: signing.signed(method, bucket, key)[1])


class _Told(clouds.Cloud):
    """An object of S3 whose store is asked in our own way while it has too many requests.

    The library that speaks to the clouds does not show the Retry-After of an answer; ours does.
    """

    def __init__(self, url: str, limits: Limits) -> None:
        super().__init__(url, limits)
        self._ours = _signed(url, limits)
        self._refused = False

    def stat(self) -> Stat:
        with self._watching():
            return self._ours.stat() if self._refused else super().stat()

    def get(self, begin: int, end: int, stat: Stat) -> "Iterator[Buffer]":
        with self._watching():
            yield from self._ours.get(begin, end, stat) if self._refused else super().get(begin, end, stat)

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        try:
            yield
        except Passing as why:
            self._refused = why.throttled
            raise
        self._refused = False


def size_of(url: str, limits: Limits | None = None) -> int:
    """Bytes of an object."""
    return open_object(url, limits).stat.size


def listed(url: str) -> list[str]:
    """URLs of the tars directly below a URL, sorted; of a web server, which cannot be asked, the URL itself."""
    if urlsplit(url).scheme in _WEB:
        return [url]
    return [
        f"{url.rstrip('/')}/{one.name}"
        for one in insisting(url, lambda limits: clouds.listing(url, limits))
        if "/" not in one.name and one.name.endswith(".tar")
    ]


def insisting(where: str, act: Callable[[Limits], T], limits: Limits | None = None) -> T:
    """`act`, again where what hinders it may pass.

    Raises:
        Unreachable: it did not pass.
    """
    limits = limits or Limits.of(os.environ)
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


class _Lanes:
    """How many windows are on their way: more while the consumer has to wait for them and more do help.

    One connection to a distant server brings what one connection brings, whatever the budget. So the number grows by
    a half at a time, in the same budget and hence with smaller windows, as long as each step brings a tenth more bytes
    a second; else it goes back, and tries again much later.
    """

    _GAIN = 1.1
    _HELD = 24  # rounds, of two windows a lane, after which it tries again

    def __init__(self, first: int, most: int) -> None:
        self.count, self._most = min(first, most), most
        self._before: tuple[int, float] | None = None
        self._held = self._settling = 0
        self._restart()

    def _restart(self) -> None:
        self._begun, self._waited, self._bytes, self._windows = perf_counter(), 0.0, 0, 0

    def waited(self, seconds: float) -> None:
        """The consumer waited so long."""
        self._waited += seconds

    def taken(self, size: int) -> None:
        """A window was taken, whole."""
        if self._settling:  # those that were on their way before the last change
            self._settling -= 1
            self._restart()
            return
        self._bytes += size
        self._windows += 1
        if self._windows < 2 * self.count:
            return
        elapsed = max(perf_counter() - self._begun, 1e-9)
        rate, starved = self._bytes / elapsed, self._waited > 0.3 * elapsed
        self._restart()
        if self._held:
            self._held -= 1
        elif self._before is not None and rate < self._GAIN * self._before[1]:
            self.count, self._before, self._held = self._before[0], None, self._HELD
            self._settling = self.count
        elif starved and self.count < self._most:
            self._before = self.count, rate
            self.count = min(self._most, self.count + (self.count + 1) // 2)
            self._settling = self.count
        else:
            self._before = None


class RemoteRaw:
    """An object, once from its first byte to its last; some windows are on their way ahead of the consumer."""

    def __init__(self, url: str, limits: Limits | None = None) -> None:
        limits = limits or Limits.of(os.environ)
        self._object = open_object(url, limits)
        self._size, self._window = self._object.stat.size, limits.window
        # Bytes that are ahead stand in a ring: byte n of the object at n modulo its length.
        self._ring = memoryview(bytearray(min(max(limits.ahead, limits.window), self._size)))
        smallest = min(limits.window, _SMALLEST)
        first = max(1, len(self._ring) // limits.window)
        self._lanes = _Lanes(
            min(first, limits.connections), min(limits.connections, max(first, limits.ahead // smallest))
        )
        self._changed = threading.Condition()
        self._windows: deque[_Window] = deque()
        self._asked = self._taken = 0
        self._ask()

    def _ask(self) -> None:
        room = len(self._ring)
        while self._asked < self._size and len(self._windows) < self._lanes.count:
            most = max(min(self._window, room // self._lanes.count), min(room, _SMALLEST, self._window))
            begin = self._asked % room
            length = min(most, self._size - self._asked, room - begin)
            if length > room - (self._asked - self._taken):
                return  # the consumer makes room
            window = _Window(self._asked, self._ring[begin : begin + length])
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
            if window.filled == window.taken:
                begun = perf_counter()
                while window.filled == window.taken and window.error is None and not self._object.stop.is_set():
                    self._changed.wait()
                self._lanes.waited(perf_counter() - begun)
            filled = window.filled
        if filled == window.taken:
            raise self._failed(window.error)
        n = min(len(buffer), filled - window.taken)
        buffer[:n] = window.memory[window.taken : window.taken + n]
        window.taken += n
        self._taken += n
        if window.taken == len(window.memory):
            self._windows.popleft()
            self._lanes.taken(len(window.memory))
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
        self._ring = memoryview(b"")


class RemoteFile:
    """An object, at any place, by several threads at once."""

    parallel = True

    def __init__(self, url: str, limits: Limits | None = None) -> None:
        self._object = open_object(url, limits)

    @property
    def traffic(self) -> Traffic:
        return self._object.counts.now()

    def read(self, offset: int, views: Sequence[memoryview]) -> int:
        """Fill the views with the bytes from `offset` on; how many there were, short only at the end."""
        return self._object.fill(offset, views)

    def behind(self, offset: int) -> int:
        return self._object.stat.size - offset

    def interrupt(self) -> None:
        self._object.stop.set()

    def close(self) -> None:
        """Nothing is held open between reads."""


def read(url: str, limits: Limits | None = None) -> bytes:
    """A small object, whole."""
    found = open_object(url, limits)
    data = bytearray(found.stat.size)
    found.fill(0, [memoryview(data)])
    return bytes(data)
