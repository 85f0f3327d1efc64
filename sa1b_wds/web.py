"""http(s):// objects by ranged GET, with nothing but the standard library.

Not through the library that speaks to the clouds: it would encode the query of a signed URL, and shows neither
Retry-After nor whether the server kept to the range that was asked for. Proxies come from the environment
(`https_proxy`, `no_proxy`), certificates from the system's store (`SSL_CERT_FILE`).
"""

import base64
import http.client
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from .errors import Changed, StorageError, masked
from .limits import Limits
from .traffic import Passing
from .transfer import Stat, refusal

if TYPE_CHECKING:
    from http.client import HTTPResponse

_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)")
_PIECE = 1 << 18


class Web:
    """The transport of one http(s):// URL.

    Args:
        where: what messages call it.
        sign: headers that let a request of this method through.
    """

    def __init__(
        self,
        url: str,
        limits: Limits,
        *,
        where: str | None = None,
        sign: Callable[[str], dict[str, str]] = lambda method: {},
    ) -> None:
        parts = urlsplit(url)
        self.where = masked(where or url)
        self.server = parts.netloc.rpartition("@")[2]
        self._sign = sign
        self._signed = bool(parts.query)
        host = parts.netloc.rpartition("@")[2]
        path = quote(parts.path, safe="/%:@!$&'()*+,;=~-._")
        self._url = urlunsplit((parts.scheme, host, path, parts.query, ""))
        self._headers = {"Accept-Encoding": "identity", "User-Agent": "sa1b-wds"}
        if parts.username is not None:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
            self._headers["Authorization"] = f"Basic {base64.b64encode(pair).decode()}"
        self._timeout = limits.stall
        self._opener = urllib.request.build_opener()

    def stat(self) -> Stat:
        """By HEAD; where that is refused, as signed URLs do, by asking for the first byte."""
        try:
            with self._ask("HEAD") as answer:
                length = answer.headers.get("Content-Length")
                if length is not None and length.isdigit():
                    return Stat(size=int(length), etag=_strong(answer))
        except StorageError:
            pass  # whatever is wrong, GET says it better
        with self._ask("GET", {"Range": "bytes=0-0"}, empty_is_fine=True) as answer:
            if answer.status == 206 or answer.status == 416:
                found = _RANGE.fullmatch(answer.headers.get("Content-Range", ""))
                if found and found[3] != "*":
                    return Stat(size=int(found[3]), etag=_strong(answer))
            length = answer.headers.get("Content-Length")
            if answer.status == 200 and length is not None and length.isdigit():
                return Stat(size=int(length), etag=_strong(answer))
        raise StorageError(self.where, "the server does not say how long it is")

    def get(self, begin: int, end: int, stat: Stat) -> Iterator[memoryview]:
        headers = {"Range": f"bytes={begin}-{end - 1}"}
        if stat.etag is not None:
            headers["If-Match"] = stat.etag
        with self._ask("GET", headers) as answer:
            self._check(answer, begin, stat)
            buffer = memoryview(bytearray(min(_PIECE, end - begin)))
            while True:
                try:
                    got = answer.readinto(buffer)
                except (OSError, http.client.HTTPException) as error:
                    raise _passing(error) from None
                if not got:
                    return
                yield buffer[:got]

    def _check(self, answer: "HTTPResponse", begin: int, stat: Stat) -> None:
        """That the answer is what was asked for, of the object that was begun."""
        etag = _strong(answer)
        if stat.etag is not None and etag is not None and etag != stat.etag:
            raise Changed(self.where, "the object was replaced while it was read: run again", stat.etag, etag)
        if answer.status == 200 and begin == 0:
            length = answer.headers.get("Content-Length")
            if length is None or int(length) == stat.size:
                return
            raise Changed(self.where, "its length has changed: run again", stat.size, int(length))
        found = _RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        if answer.status != 206 or not found or found[1] is None:
            raise StorageError(
                self.where,
                "the server cannot send a part of it, so a broken download cannot go on: use pipe:, or another copy",
                f"206, from byte {begin:,}",
                answer.status,
            )
        if int(found[1]) != begin or (found[3] != "*" and int(found[3]) != stat.size):
            expected, said = f"from byte {begin:,} of {stat.size:,}", answer.headers["Content-Range"]
            raise Changed(self.where, "another range than the one asked for: run again", expected, said)

    def _ask(self, method: str, extra: dict[str, str] | None = None, *, empty_is_fine: bool = False) -> "HTTPResponse":
        headers = self._headers | (extra or {}) | self._sign(method)
        request = urllib.request.Request(self._url, headers=headers, method=method)
        try:
            return self._opener.open(request, timeout=self._timeout)  # type: ignore[no-any-return]
        except urllib.error.HTTPError as error:
            if error.code == 416 and empty_is_fine:
                return error  # type: ignore[return-value]  # it has the same surface
            with error:
                try:
                    body = error.read(4096).decode("utf-8", "replace")
                except (OSError, http.client.HTTPException):
                    body = ""
            after = _retry_after(error.headers.get("Retry-After", ""))
            raise refusal(self.where, error.code, body, signed=self._signed, retry_after=after) from None
        except urllib.error.URLError as error:
            raise _passing(error.reason) from None
        except (OSError, http.client.HTTPException) as error:
            raise _passing(error) from None


def _strong(answer: "HTTPResponse") -> str | None:
    etag: str | None = answer.headers.get("ETag")
    return etag if etag and not etag.startswith("W/") else None


def _passing(error: object) -> Passing:
    return Passing(str(error) or type(error).__name__, stalled=isinstance(error, TimeoutError))


def _retry_after(text: str) -> float:
    """Seconds of a Retry-After, which is a number or a date."""
    if text.strip().isdigit():
        return float(text)
    try:
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0
