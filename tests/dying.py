"""Child processes for tests that kill, stop, starve and race them; everything here can be called by name in a child.

Children come from a fork server that has the converter loaded, so one costs milliseconds and shares no thread with
pytest. They are steered by the calls that change the disk: `interrupt(n, …)` does something just before the n-th.
"""

import errno
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from sa1b_wds.annotations import Packer

from . import making

CALLS = ("open", "write", "writev", "pwrite", "fsync", "rename", "replace", "link", "mkdir")
"""Of `os`: what makes, fills and publishes files."""
REMOVING = ("unlink", "rmdir")

Packer().pack(making.text(making.document(1)), "sa_1")  # the kernel is loaded now, and so in every child


@contextmanager
def interrupt(at: int, action: Callable[[], None], calls: tuple[str, ...] = CALLS + REMOVING) -> Iterator[list[str]]:
    """Call `action` just before call number `at` (from 1; 0: every one) of these functions of `os`.

    Gives the list of the calls so far, by name.
    """
    seen: list[str] = []

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*arguments: Any, **options: Any) -> Any:
            if name == "open" and len(arguments) > 1 and not arguments[1] & os.O_CREAT:
                return call(*arguments, **options)
            seen.append(name)
            if at in (0, len(seen)):
                action()
            return call(*arguments, **options)

        return inner

    originals = {name: getattr(os, name) for name in calls}
    for name, call in originals.items():
        setattr(os, name, counted(name, call))
    try:
        yield seen
    finally:
        for name, call in originals.items():
            setattr(os, name, call)


def fail(code: int) -> Callable[[], None]:
    """An action: the call fails with this errno."""

    def action() -> None:
        raise OSError(code, os.strerror(code))

    return action


FULL = fail(errno.ENOSPC)


def send_self(number: int) -> Callable[[], None]:
    """An action: this process gets a signal."""
    return lambda: os.kill(os.getpid(), number)


# ------------------------------------------------------------------------------------------------------- in children


def _killed_at(at: int, work: Callable[..., None], *arguments: Any) -> None:
    with interrupt(at, send_self(signal.SIGKILL)):
        work(*arguments)


def _stopped_at(at: int, work: Callable[..., None], *arguments: Any) -> None:
    with interrupt(at, send_self(signal.SIGSTOP)):
        work(*arguments)


def _jittering(seed: int, begin: float, work: Callable[..., None], *arguments: Any) -> None:
    """Work that begins at a given time, and sleeps a little at random before each change to the disk."""
    draw = random.Random(seed)
    time.sleep(max(0.0, begin - time.time()))
    with interrupt(0, lambda: time.sleep(draw.random() * 0.004 if draw.random() < 0.3 else 0)):
        work(*arguments)


def _masked(mask: int, work: Callable[..., None], *arguments: Any) -> None:
    os.umask(mask)
    work(*arguments)


def _as_nobody(work: Callable[..., None], *arguments: Any) -> None:
    if os.getuid() == 0:  # whom no mode keeps out
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    work(*arguments)


# ----------------------------------------------------------------------------------------------------------- parents

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.dying", "tests.running"])


def _child(say: Connection, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    try:
        work(*arguments)
    except BaseException as error:
        say.send(error)
        os._exit(1)
    say.send(None)


class Child:
    """A process of the fork server that runs `work(*arguments)`."""

    def __init__(self, work: Callable[..., None], *arguments: Any) -> None:
        self._heard, say = _CONTEXT.Pipe(duplex=False)
        self.process: BaseProcess = _CONTEXT.Process(target=_child, args=(say, work, arguments))
        self.process.start()
        say.close()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def join(self, timeout: float = 60) -> BaseException | None:
        """Wait for its end: what it raised, None where it went well or was killed."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, "a child hangs"
        try:
            said: BaseException | None = self._heard.recv() if self._heard.poll() else None
        except EOFError:
            said = None
        self._heard.close()
        return said

    @property
    def code(self) -> int | None:
        return self.process.exitcode

    def wait_stopped(self, timeout: float = 30) -> bool:
        """Wait until it has stopped (True) or ended (False)."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            try:
                state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
            except (FileNotFoundError, ProcessLookupError):
                return False
            if state == "T":
                return True
            if state in "ZX":
                return False
            time.sleep(0.001)
        raise AssertionError("a child neither stopped nor ended")

    def wake(self) -> None:
        os.kill(self.pid, signal.SIGCONT)


def killed_at(at: int, work: Callable[..., None], *arguments: Any) -> Child:
    """A child that is killed just before its call number `at` that changes the disk."""
    return Child(_killed_at, at, work, *arguments)


def stopped_at(at: int, work: Callable[..., None], *arguments: Any) -> Child:
    """A child that stops there."""
    return Child(_stopped_at, at, work, *arguments)


def jittering(seed: int, begin: float, work: Callable[..., None], *arguments: Any) -> Child:
    """A child that begins at a time, and dawdles."""
    return Child(_jittering, seed, begin, work, *arguments)


def masked(mask: int, work: Callable[..., None], *arguments: Any) -> Child:
    """A child with this umask."""
    return Child(_masked, mask, work, *arguments)


def as_nobody(work: Callable[..., None], *arguments: Any) -> Child:
    """A child without root's rights."""
    return Child(_as_nobody, work, *arguments)
