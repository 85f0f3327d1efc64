"""One object far away, read as if it were near: retried from the byte where it stopped, and never another object.

A read is a loop of requests for the bytes that are still missing. A request that ends early, stalls or is told to come
back later (429, 503, …) is followed by another one, after a pause that doubles with each attempt in a row that brought
nothing, drawn at random below its bound ("full jitter": clients that failed together do not come back together); a
`Retry-After` is a lower bound. Every request but the first carries the ETag, so an object that was replaced in between
is an error, never a mixture. How many requests one server gets at a time, and which of them are asked for twice
because their answer is late, is the business of `traffic`.
"""

import random
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

from .errors import (
    Changed,
    Denied,
    LinkExpired,
    NoCredentials,
    NotFound,
    StorageError,
    Unreachable,
    WrongRegion,
    masked,
)
from .limits import Limits
from .traffic import COUNTS, Counts, Passing, server

if TYPE_CHECKING:
    from typing_extensions import Buffer

_PROGRESS = 4096  # bytes: a request that brings fewer has brought nothing, or a sick server would keep us for weeks


@dataclass(frozen=True, kw_only=True, slots=True)
class Stat:
    """What identifies an object."""

    size: int
    """Bytes."""
    etag: str | None


class Transport(Protocol):
    """How one kind of store is spoken to; raises `Passing` for what may be tried again, else this project's errors."""

    server: str
    """Which one it is: what is shared between all that talk to it (see `traffic`)."""

    def stat(self) -> Stat: ...

    def get(self, begin: int, end: int, stat: Stat) -> "Iterator[Buffer]":
        """The bytes from `begin` to `end`, of that very object, in pieces; they may end early."""


class Pauses:
    """The pauses between attempts that bring nothing."""

    def __init__(self, where: str, limits: Limits, stop: threading.Event, counts: Counts = COUNTS) -> None:
        self._where, self._limits, self._stop, self._counts = where, limits, stop, counts
        self._attempts = 0

    def progress(self) -> None:
        self._attempts = 0

    def wait(self, why: Passing, at: int | None = None) -> None:
        """Raises: Unreachable, when it was tried often enough."""
        limits = self._limits
        self._attempts += 1
        if self._attempts >= limits.attempts:
            where = self._where if at is None else f"{self._where}: byte {at:,}"
            raise Unreachable(where, f"gave up after {self._attempts} attempts in a row; the last: {why}") from None
        bound = min(limits.longest_wait, limits.first_wait * 2 ** (self._attempts - 1))
        seconds = random.uniform(0, bound) + min(why.retry_after, 10 * limits.longest_wait)
        self._counts.add(retries=1, throttled=int(why.throttled), stalled=int(why.stalled), waited=seconds)
        self._stop.wait(seconds)


class Object:
    """One object of a store, the same one from the first byte to the last."""

    def __init__(self, where: str, transport: Transport, limits: Limits) -> None:
        self.where = masked(where)
        self._transport, self._limits = transport, limits
        self._server = server(transport.server, limits)
        self.stop = threading.Event()
        """Set: whoever reads leaves as soon as possible."""
        self.counts = Counts(COUNTS)
        pauses = Pauses(self.where, limits, self.stop, self.counts)
        while True:
            try:
                self.counts.add(requests=1)
                self.stat = transport.stat()
                return
            except Passing as why:
                self._server.slower(why)
                pauses.wait(why)

    def pieces(self, begin: int, end: int) -> "Iterator[memoryview]":
        """The bytes from `begin` to `end`, which is at most its size.

        Raises:
            Changed: it is another object now.
            Unreachable: no progress, however often it was tried.
            NotFound, Denied, StorageError: what else a store may say.
        """
        at, pauses = begin, Pauses(self.where, self._limits, self.stop, self.counts)
        while at < end and not self.stop.is_set():
            begun = at
            try:
                rest = partial(self._transport.get, at, end, self.stat)
                for piece in self._server.answer(rest, end - at, self.stop, self.counts):
                    view = memoryview(piece).cast("B")[: end - at]
                    at += len(view)
                    self.counts.add(bytes=len(view))
                    if at - begun >= _PROGRESS:
                        pauses.progress()
                    yield view
                    if at == end or self.stop.is_set():
                        return
                if self.stop.is_set():
                    return
                raise Passing(f"the connection ended {end - at:,} bytes early")
            except Passing as why:
                self._server.slower(why)
                pauses.wait(why, at)

    def fill(self, begin: int, views: Sequence[memoryview]) -> int:
        """Fill the views with the bytes from `begin` on; how many there were, short only at the end."""
        wanted = sum(map(len, views))
        end = min(begin + wanted, self.stat.size)
        rest = iter(views)
        room, done = memoryview(b""), 0
        for piece in self.pieces(begin, end):
            while len(piece):
                while not len(room):
                    room = next(rest)
                n = min(len(room), len(piece))
                room[:n] = piece[:n]
                room, piece, done = room[n:], piece[n:], done + n
        if done < end - begin:
            raise StorageError(self.where, "reading was stopped")
        return done


_CODE = re.compile(r"<Code>(\w+)</Code>")
_REGION = re.compile(r"<Region>([\w-]+)</Region>")
_TOO_MANY = {"SlowDown", "Throttling", "ThrottlingException"}
_AGAIN = {"RequestTimeout", "InternalError", "ServiceUnavailable", "ServerBusy", "OperationTimedOut"} | _TOO_MANY


def refusal(where: str, status: int, body: str, *, signed: bool = False, retry_after: float = 0.0) -> Exception:
    """What a server's answer means: `Passing`, or the error to raise.

    Args:
        status: HTTP's.
        body: of the answer; its `<Code>` is looked at, if it has one.
        signed: the URL carries its own permission, which expires.
    """
    found = _CODE.search(body)
    code = found[1] if found else ""
    said = f"{status} {code}".strip()
    if status in (408, 425, 429) or (status >= 500 and status != 501) or code in _AGAIN:
        throttled = status in (429, 503) or code in _TOO_MANY
        return Passing(f"the server said {said}", retry_after, throttled=throttled)
    if code in ("NoSuchUpload", "NoSuchBucket") or status in (404, 410):
        return NotFound(where, "no such bucket" if code == "NoSuchBucket" else "no such object", None, said)
    if code in ("AuthorizationHeaderMalformed", "PermanentRedirect", "IncorrectEndpoint") or 300 <= status < 400:
        region = _REGION.search(body)
        hint = f"set AWS_REGION={region[1]}" if region else "set AWS_REGION, or AWS_ENDPOINT_URL, to the bucket's own"
        return WrongRegion(where, f"the bucket lies in another region: {hint}", None, said)
    if status == 412:
        return Changed(where, "the object was replaced while it was read: run again")
    if status == 416:
        return Changed(where, "the object is shorter than it was: run again")
    if status in (401, 407) or code in ("MissingSecurityHeader", "MissingAuthenticationToken"):
        return NoCredentials(where, f"the server wants credentials: {HOW_TO_SIGN_IN}", None, said)
    if status == 403 and signed:
        return LinkExpired(where, "the link is refused, it has probably expired: fetch a new links file", None, said)
    if status == 403:
        return Denied(where, f"access denied: check the credentials and their rights ({HOW_TO_SIGN_IN})", None, said)
    return StorageError(where, "an answer that was not expected", None, said)


HOW_TO_SIGN_IN = (
    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; GOOGLE_APPLICATION_CREDENTIALS; "
    "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY"
)
