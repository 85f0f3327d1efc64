"""A web server that goes wrong on demand: in front of a real server (byte for byte, so that signatures hold), or alone.

with FaultProxy("127.0.0.1:8333") as proxy:             # an S3 server behind it
    proxy.faults.append(Fault(cut=100_000, times=3))    # the next three answers stop after 100,000 bytes
with FaultProxy({"/sa_000000.tar": data}) as proxy: …   # a file server with ranges and ETags
"""

import contextlib
import hashlib
import http.client
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self
from urllib.parse import unquote


@lru_cache(maxsize=64)
def _etag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


@dataclass(kw_only=True)
class Fault:
    """What goes wrong with an answer."""

    when: Callable[["Request"], bool] = lambda request: True
    times: float = 1
    """How often it happens."""
    skip: int = 0
    """How many requests that it would meet it lets pass first."""
    every: int = 1
    """Only every so many-th of them."""
    status: int | None = None
    """This instead of the real answer, with `headers` and `body`."""
    headers: dict[str, str] = field(default_factory=dict)
    """Also without a status: these replace those of the real answer."""
    body: bytes = b""
    cut: int | None = None
    """The connection breaks after so many bytes of the body."""
    late: float = 0.0
    """Seconds before the answer begins."""
    stall: float = 0.0
    """Seconds of silence after `cut` bytes, before it breaks."""
    happened: int = 0
    met: int = 0


@dataclass(frozen=True, kw_only=True)
class Request:
    method: str
    path: str
    """With its query."""
    headers: dict[str, str]
    """Names in lower case."""
    body: bytes

    @property
    def is_read(self) -> bool:
        return self.method == "GET" and "range" in self.headers


class FaultProxy:
    """A server on a free port of 127.0.0.1; a context manager."""

    def __init__(self, upstream: str | dict[str, bytes]) -> None:
        self.upstream = upstream
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.translate: Callable[[dict[str, str]], dict[str, str]] = lambda headers: headers
        """What becomes of a request's headers on their way to the real server."""
        self.rate: int | None = None
        """Bytes a second that each connection gets of an answer."""
        self._lock = threading.Lock()
        outer = self

        class Handler(_Handler):
            proxy = outer

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def fault(self, request: Request) -> Fault | None:
        with self._lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault.happened >= fault.times or not fault.when(request):
                    continue
                fault.met += 1
                if fault.met > fault.skip and (fault.met - fault.skip) % fault.every == 0:
                    fault.happened += 1
                    return fault
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away are part of the game."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultProxy

    def log_message(self, format: str, *args: object) -> None: ...

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        request = Request(
            method=self.command,
            path=self.path,
            headers={k.lower(): v for k, v in self.headers.items()},
            body=self.rfile.read(length) if length else b"",
        )
        fault = self.proxy.fault(request)
        if fault is not None and fault.late:
            threading.Event().wait(fault.late)
        if fault is not None and fault.status is not None:
            self._send(fault.status, {"Content-Length": str(len(fault.body)), **fault.headers}, fault.body, None)
            return
        real = self._files(request) if isinstance(self.proxy.upstream, dict) else self._forward(request)
        status, headers, body = real
        if fault is not None:
            names = {name.lower() for name in fault.headers}
            headers = {k: v for k, v in headers.items() if k.lower() not in names} | fault.headers
        self._send(status, headers, body, fault)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer

    def _send(self, status: int, headers: dict[str, str], body: bytes, fault: Fault | None) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault is None or fault.cut is None:
            self._write(body)
            if len(body) != int(headers.get("Content-Length", len(body))):
                self.close_connection = True
            return
        self.wfile.write(body[: fault.cut])
        self.wfile.flush()
        if fault.stall:
            threading.Event().wait(fault.stall)
        with contextlib.suppress(OSError):  # a reset, not a polite end
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def _write(self, body: bytes) -> None:
        rate = self.proxy.rate
        if rate is None:
            self.wfile.write(body)
            return
        begun, step = time.monotonic(), max(1, rate // 50)
        for at in range(0, len(body), step):
            self.wfile.write(body[at : at + step])
            time.sleep(max(0.0, begun + min(at + step, len(body)) / rate - time.monotonic()))

    def _forward(self, request: Request) -> tuple[int, dict[str, str], bytes]:
        assert isinstance(self.proxy.upstream, str)
        connection = http.client.HTTPConnection(self.proxy.upstream, timeout=60)
        try:
            connection.putrequest(request.method, request.path, skip_host=True, skip_accept_encoding=True)
            headers = self.proxy.translate(dict(self.headers.items()))  # as they came: the signature covers Host too
            for name, value in headers.items():
                if name.lower() != "connection":
                    connection.putheader(name, value)
            connection.endheaders(request.body or None)
            answer = connection.getresponse()
            body = answer.read()
            dropped = ("transfer-encoding", "connection", "content-length")
            headers = {k: v for k, v in answer.getheaders() if k.lower() not in dropped}
            length = answer.getheader("Content-Length") if request.method == "HEAD" else str(len(body))
            return answer.status, headers | ({"Content-Length": length} if length else {}), body
        finally:
            connection.close()

    def _files(self, request: Request) -> tuple[int, dict[str, str], bytes]:
        assert isinstance(self.proxy.upstream, dict)
        data = self.proxy.upstream.get(unquote(request.path.partition("?")[0]))
        if data is None:
            return 404, {"Content-Length": "0"}, b""
        headers = {"ETag": _etag(data), "Accept-Ranges": "bytes"}
        if (wanted := request.headers.get("if-match")) and wanted != headers["ETag"]:
            return 412, {"Content-Length": "0"}, b""
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("range", ""))
        if not found:
            return 200, headers | {"Content-Length": str(len(data))}, data
        begin, end = int(found[1]), min(int(found[2]) + 1, len(data))
        if begin >= len(data):
            return 416, {"Content-Length": "0", "Content-Range": f"bytes */{len(data)}"}, b""
        headers |= {"Content-Length": str(end - begin), "Content-Range": f"bytes {begin}-{end - 1}/{len(data)}"}
        return 206, headers, data[begin:end]
