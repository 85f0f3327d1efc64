"""What this process asks one server for: so much at a time, some of it twice, all of it counted.

All readers of a server share its `Server`. It lets `connections` requests through at once; a 429 or 503 halves that
number, each second of answers brings it back up by one, and a `Retry-After` holds everybody ("additive increase,
multiplicative decrease", as TCP does it). Where the first byte of an answer is late, later than nineteen of twenty and
at least a twentieth of a second, the same bytes are asked for once more, and whichever answer begins first is taken
("hedged requests": Dean and Barroso, The Tail at Scale, 2013). The other is closed when its first piece comes. So what
is asked for twice is at most the share `hedge` of all bytes, and what is fetched twice usually a piece.
"""

import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from time import monotonic, perf_counter
from typing import TYPE_CHECKING

from .errors import masked
from .limits import Limits

if TYPE_CHECKING:
    from typing_extensions import Buffer

_KNOWN = 20  # answers before any can be called late
_REMEMBERED = 128
_LATE = 0.05  # seconds: on a fast network the odds are bad that a second request gains anything
_CUT_PAUSE = 0.2  # seconds: many requests that are refused at once are one refusal
_RISE_PAUSE = 1.0  # seconds between steps up: who was refused comes back slowly


class Passing(Exception):
    """Something that may well not happen again: the read goes on. Never leaves this package's readers."""

    def __init__(self, why: str, retry_after: float = 0.0, *, throttled: bool = False, stalled: bool = False) -> None:
        super().__init__(masked(why))
        self.retry_after = retry_after
        """Seconds that the server asked for."""
        self.throttled, self.stalled = throttled, stalled
        """The server has too many requests; no byte came for too long."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """What happened on the way."""

    requests: int = 0
    bytes: int = 0
    """That were taken."""
    retries: int = 0
    """Reads that were taken up again after an answer that broke off or was none."""
    throttled: int = 0
    """Of these, because the server said 429 or 503."""
    stalled: int = 0
    """Of these, because no byte came for too long."""
    hedged: int = 0
    """Requests made for bytes that were already asked for, because the answer was late."""
    again: int = 0
    """Bytes that came twice."""
    waited: float = 0.0
    """Seconds of pauses, over all threads."""

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def __sub__(self, other: "Traffic") -> "Traffic":
        return Traffic(**{f.name: getattr(self, f.name) - getattr(other, f.name) for f in fields(self)})

    def __str__(self) -> str:
        """What is worth a line: nothing if nothing went wrong."""
        words = []
        if self.retries:
            why = [f"{n:,} {word}" for n, word in ((self.throttled, "throttled"), (self.stalled, "stalled")) if n]
            words.append(f"{self.retries:,} retries" + (f" ({', '.join(why)})" if why else ""))
            words.append(f"{self.waited:.1f} s of pauses")
        if self.hedged:
            words.append(f"{self.hedged:,} late answers asked for twice")
        if self.again:
            words.append(f"{self.again:,} bytes fetched again")
        return ", ".join(words)


class Counts:
    """Traffic so far; what is added is added to the whole process's, too."""

    def __init__(self, whole: "Counts | None" = None) -> None:
        self._lock, self._whole = threading.Lock(), whole
        self._sums: dict[str, float] = {}

    def add(self, **more: float) -> None:
        with self._lock:
            for name, value in more.items():
                self._sums[name] = self._sums.get(name, 0) + value
        if self._whole is not None:
            self._whole.add(**more)

    def now(self) -> Traffic:
        with self._lock:
            return Traffic(**self._sums)  # type: ignore[arg-type]  # whole numbers but for `waited`


COUNTS = Counts()
"""Of this process, over all reads."""


class _Request:
    """A request whose first piece is waited for, perhaps in a thread of its own, perhaps in vain."""

    def __init__(self, ask: "Callable[[], Iterator[Buffer]]", server: "Server", counts: Counts) -> None:
        self._ask, self._server, self._counts = ask, server, counts
        self._lock = threading.Lock()
        self._over = self._unwanted = False
        self.first: Buffer | None = None
        self.rest: Iterator[Buffer] = iter(())
        self.error: BaseException | None = None

    def run(self) -> None:
        begun = perf_counter()
        try:
            self.rest = self._ask()
            self.first = next(self.rest, None)
            self._server.answered(perf_counter() - begun)
        except BaseException as error:
            self.error = error
        with self._lock:
            self._over = True
            if not self._unwanted:
                return
        self._throw_away()

    def once_more(self) -> "_Request":
        """A second request for the same."""
        self._counts.add(requests=1, hedged=1)
        return _Request(self._ask, self._server, self._counts)

    def abandon(self) -> None:
        """The other one was first."""
        with self._lock:
            self._unwanted = True
            if not self._over:
                return  # its thread does the rest
        self._throw_away()

    def _throw_away(self) -> None:
        if self.first is not None:
            self._counts.add(again=memoryview(self.first).nbytes)
        self.close()

    def close(self) -> None:
        if hasattr(self.rest, "close"):
            self.rest.close()
        self._server.leave()


class Server:
    """One server, as all readers of this process share it."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._changed = threading.Condition()
        self._allowed = limits.connections
        self._busy = 0
        self._closed_until = self._cut = self._raised = 0.0
        self._late: deque[float] = deque(maxlen=_REMEMBERED)
        self._asked = self._hedged = 0  # bytes

    @property
    def allowed(self) -> int:
        """Requests that may be on their way now."""
        return self._allowed

    def enter(self, stop: threading.Event) -> bool:
        """Wait for a turn; False if `stop` was set in the meantime."""
        with self._changed:
            while not stop.is_set():
                pause = self._closed_until - monotonic()
                if pause <= 0 and self._busy < self._allowed:
                    self._busy += 1
                    return True
                self._changed.wait(min(0.5, pause) if pause > 0 else 0.5)
        return False

    def leave(self) -> None:
        with self._changed:
            self._busy -= 1
            self._changed.notify()

    def answered(self, seconds: float) -> None:
        """An answer began, so many seconds after it was asked for."""
        with self._changed:
            self._late.append(seconds)
            if (now := monotonic()) - self._raised > _RISE_PAUSE:
                self._raised = now
                self._allowed = min(self._limits.connections, self._allowed + 1)
            self._changed.notify()

    def slower(self, why: Passing) -> None:
        """If the server has too many requests, it gets fewer."""
        if not why.throttled:
            return
        with self._changed:
            now = monotonic()
            if now - self._cut > _CUT_PAUSE:
                self._cut = self._raised = now
                self._allowed = max(1, min(self._allowed, self._busy + 1) // 2)
            wait = min(why.retry_after, 10 * self._limits.longest_wait)
            self._closed_until = max(self._closed_until, now + wait)

    def answer(
        self, ask: "Callable[[], Iterator[Buffer]]", size: int, stop: threading.Event, counts: Counts
    ) -> "Iterator[Buffer]":
        """The pieces of the answer to `ask`, or to a second one of the same; nothing if `stop` is set meanwhile."""
        if not self.enter(stop):
            return
        counts.add(requests=1)
        request = _Request(ask, self, counts)
        patience = self._patience(size)
        if patience is None:
            request.run()
        elif (winner := self._race(request, patience, size, stop)) is not None:
            request = winner
        else:
            return
        try:
            if request.error is not None:
                raise request.error
            if request.first is not None and not stop.is_set():
                yield request.first
                yield from request.rest
        finally:
            request.close()

    def _patience(self, size: int) -> float | None:
        """Seconds after which an answer is late; None where there is nothing to go by."""
        with self._changed:
            self._asked += size
            if not self._limits.hedge or len(self._late) < _KNOWN:
                return None
            known = sorted(self._late)
        # Where one in ten is slow, the slow ones must not become the measure.
        return max(_LATE, min(known[int(0.95 * len(known))], 5 * known[len(known) // 2]))

    def _again(self, size: int) -> bool:
        """Whether so many bytes may be asked for a second time, now."""
        with self._changed:
            if self._hedged + size > self._limits.hedge * self._asked or self._closed_until > monotonic():
                return False
            if self._busy >= self._allowed:
                return False
            self._hedged += size
            self._busy += 1
            return True

    def _race(self, first: _Request, patience: float, size: int, stop: threading.Event) -> _Request | None:
        """The request whose answer begins first; None if `stop` was set before one did."""
        ended: queue.SimpleQueue[_Request] = queue.SimpleQueue()

        def start(request: _Request) -> None:
            def run() -> None:
                request.run()
                ended.put(request)

            # A daemon: one that waits for a dead server must not hold up the end of the process.
            threading.Thread(target=run, name="sa1b-wds-request", daemon=True).start()

        running, hedged, begun = [first], False, perf_counter()
        start(first)
        while True:
            left = patience - (perf_counter() - begun)
            try:
                got = ended.get(timeout=min(0.5, left) if left > 0 else 0.5)
            except queue.Empty:
                if stop.is_set():
                    for request in running:
                        request.abandon()
                    return None
                if not hedged and perf_counter() - begun >= patience and self._again(size):
                    hedged = True
                    running.append(first.once_more())
                    start(running[-1])
                continue
            if isinstance(got.error, Passing) and len(running) > 1:
                running.remove(got)
                got.close()
                self.slower(got.error)
                continue  # the other may still come
            for other in running:
                if other is not got:
                    other.abandon()
            return got


@lru_cache(maxsize=256)
def server(name: str, limits: Limits) -> Server:
    """What this process shares of a server."""
    return Server(limits)


# A child may have been made while some thread held a lock, and that thread is not in it.
os.register_at_fork(after_in_child=server.cache_clear)
