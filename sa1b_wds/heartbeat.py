"""What tasks say of themselves below `.state/` while they run, and their last words.

Nothing here is ever part of the data set: `finalize` removes it. Losing a heartbeat loses a line of `status`, so
writing one never fails a task.
"""

import contextlib
import re
import threading
import time
from collections.abc import Container
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from .errors import NotFound, StorageError
from .manifest import MANIFEST_NAME
from .process import has_ended, identity
from .storage import STATE, Destination

BEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
"""A task that was not heard of for so long counts as dead."""

_NAME = re.compile(rf"{re.escape(STATE)}/task-(\d{{6,}})\.json", re.ASCII)
_READERS = 16  # on object storage a thousand in a row would take minutes


class Beat(msgspec.Struct, frozen=True, kw_only=True):
    """What a running task says of itself, or its last words."""

    task: int
    host: str
    pid: int
    started: float
    """Seconds since 1970, by the clock of the host."""
    now: float
    bytes_read: int
    bytes_total: int
    samples: int
    error: str | None = None
    """Why it failed."""
    ended: bool = False
    """It is done: what it says is how long that took."""
    moved: float = 0.0
    """When it last got a byte or a sample further."""
    command: str = ""
    """What a user would type to have all of the plan done, and where."""
    folder: str = ""
    process: dict[str, str | int] = {}
    """See `process.identity`."""

    @property
    def rate(self) -> float:
        """Bytes of the sources a second, on average."""
        return self.bytes_read / max(self.now - self.started, 1e-9)

    def is_alive(self, now: float) -> bool:
        """Whether its process still works on it, as far as that can be known."""
        if self.error is not None or self.ended:
            return False
        return now - self.now <= STALE_SECONDS and not has_ended(self.process)


def beat_name(task: int) -> str:
    return f"{STATE}/task-{task:06d}.json"


def read_beats(destination: Destination, tasks: Container[int]) -> dict[int, Beat]:
    """The last word of each of these tasks that has left one: one listing, then as many at once as is decent."""
    found = [int(match[1]) for name in destination.files_in(STATE) if (match := _NAME.fullmatch(name))]
    wanted = [task for task in found if task in tasks]
    if not wanted:
        return {}
    with ThreadPoolExecutor(min(_READERS, len(wanted)), "sa1b-wds-beats") as readers:
        beats = list(readers.map(lambda task: _read(destination, task), wanted))
    return {beat.task: beat for beat in beats if beat is not None}


def _read(destination: Destination, task: int) -> Beat | None:
    try:
        return msgspec.json.decode(destination.read(beat_name(task)), type=Beat)
    except (NotFound, msgspec.DecodeError):
        return None


def here() -> str:
    """Where this process is; empty where that is gone, or has a name that JSON cannot hold."""
    with contextlib.suppress(OSError, UnicodeEncodeError):
        folder = str(Path.cwd())
        folder.encode()
        return folder
    return ""


class Heart:
    """Says every few seconds that a task lives, from a thread of its own: publishing to a store takes minutes too.

    A context manager. `progressed` says how far the task is, `end` or `failed` its last words.
    """

    def __init__(self, destination: Destination, task: int, bytes_total: int, command: str = "") -> None:
        about, now = identity(), time.time()
        self._destination = destination
        self._beat = Beat(
            task=task, host=str(about["host"]), pid=int(about["pid"]), started=now, now=now, bytes_read=0,
            bytes_total=bytes_total, samples=0, moved=now, command=command, folder=here() if command else "",
            process=about,
        )  # fmt: skip
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._live, name=f"heart of task {task}", daemon=True)

    def __enter__(self) -> "Heart":
        self._put(self._beat)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._rest(None if kind is None or issubclass(kind, Exception) else 5.0)

    def _rest(self, timeout: float | None = None) -> None:
        """No more beats come after this, or they would hide the last words; who is stopped waits for no server."""
        self._stop.set()
        self._thread.join(timeout)

    def _live(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            self._put(self._beat)

    def progressed(self, bytes_read: int, samples: int) -> None:
        """How far the task is; said at the next beat."""
        if (bytes_read, samples) != (self._beat.bytes_read, self._beat.samples):
            self._beat = msgspec.structs.replace(self._beat, bytes_read=bytes_read, samples=samples, moved=time.time())

    def failed(self, error: str) -> None:
        """The task has failed, or was stopped."""
        self._rest()
        self._last_words(error)

    def last_words_of(self, last: Beat | None, error: str) -> None:
        """What another process would have said at its end, with its own last beat where there is one."""
        if last is not None:
            self._beat = last
        self._last_words(error)

    def _last_words(self, error: str) -> None:
        # A path that is not UTF-8 stands in it with surrogates, which JSON cannot hold.
        self._put(msgspec.structs.replace(self._beat, error=error.encode("utf-8", "backslashreplace").decode()))

    def end(self, seconds: float) -> None:
        """The task is done; what it took stays until the data set is published."""
        self._rest()
        with contextlib.suppress(StorageError):
            if seconds:
                beat = self._beat
                self._put(msgspec.structs.replace(beat, ended=True, started=time.time() - seconds))
            # Whoever published meanwhile has cleared `.state/`, and nothing may stay behind in a data set.
            if not seconds or self._destination.exists(MANIFEST_NAME):
                self._destination.remove(beat_name(self._beat.task))

    def _put(self, beat: Beat) -> None:
        with contextlib.suppress(StorageError):
            data = msgspec.json.encode(msgspec.structs.replace(beat, now=time.time())) + b"\n"
            self._destination.put(beat_name(beat.task), data)
