"""A command's standard output as a stream that cannot end unnoticed.

`pipe:` commands fail in two ways that a reader of tars would take for an end: the command dies, or it stops early and
still exits with 0 (`curl … || true`). So the order of checks is: drain the pipe, then the exit status, then (by the
reader) the bytes.

A command that writes gets a file, never a pipe, as its standard input: should this process be killed, the command goes
on to the end of the file, where it would take the end of a pipe for the end of the data and publish half of it.
"""

import contextlib
import os
import re
import signal
import subprocess
import tempfile
from typing import IO

from .errors import StorageError, UsageError

PREFIX = "pipe:"

_F_SETPIPE_SZ = 1031
_PIPE_BYTES = 1 << 20


class Pipe:
    """The output of a shell command; started at once, in a session of its own."""

    def __init__(self, url: str) -> None:
        self.where = url
        # A file, since a pipe that nobody reads would stop a talkative command.
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            url.removeprefix(PREFIX),
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            bufsize=0,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        self._output = self._process.stdout.fileno()
        with contextlib.suppress(OSError, ImportError):
            import fcntl

            fcntl.fcntl(self._output, _F_SETPIPE_SZ, _PIPE_BYTES)
        self._ended = False

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill some of `buffer`; 0 only at the end, when the command has succeeded.

        Raises:
            StorageError: the command failed; with the last line of its complaints.
        """
        if self._ended:
            return 0
        got = os.readv(self._output, [buffer]) if len(buffer) else 0
        if got or not len(buffer):
            return got
        self._ended = True
        status = self._process.wait()
        if status:
            found = f"signal {-status}" if status < 0 else f"exit status {status}"
            raise StorageError(self.where, f"the command failed{self._last_words()}", "exit status 0", found)
        return 0

    def close(self) -> None:
        """End the command, if it runs, with everything it started."""
        if self._process.stdout is not None:
            self._process.stdout.close()
        if self._process.returncode is None:
            self.kill()
            self._process.wait()
        self._complaints.close()

    def kill(self) -> None:
        """End the command and everything it started; a read that waits for it ends too."""
        if self._process.returncode is None:  # else its number may be another's by now
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    interrupt = kill

    def _last_words(self) -> str:
        return _last_words(self._complaints)


def _last_words(complaints: IO[bytes]) -> str:
    complaints.seek(0, os.SEEK_END)
    complaints.seek(max(0, complaints.tell() - 2000))
    lines = complaints.read().decode(errors="replace").split("\n")
    words = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f" ({words[:200]})" if words else ""


_PLACE = re.compile(r"((?:s3|gs|az)://[^\s'\"{}]+)/\{name\}")


def place_of(url: str) -> str:
    """Where a command of the form `pipe:… gs://bucket/place/{name} …` writes.

    Raises:
        UsageError: it does not say.
    """
    found = _PLACE.findall(url)
    if len(found) != 1:
        example = "pipe:gsutil cp - gs://bucket/sa1b/{name}"
        raise UsageError(url, "does not say where it writes, and where that is read again", example)
    return str(found[0])


def feed(url: str, name: str, data: IO[bytes]) -> None:
    """Run a command that writes, with a file as its standard input.

    Raises:
        StorageError: the command failed; with the last line of its complaints.
    """
    data.seek(0)
    command = url.removeprefix(PREFIX).replace("{name}", name)
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(
            command, shell=True, stdin=data, stdout=subprocess.DEVNULL, stderr=complaints, start_new_session=True
        )
        try:
            status = process.wait()
        except BaseException:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        if status:
            found = f"signal {-status}" if status < 0 else f"exit status {status}"
            raise StorageError(
                f"pipe:{command}", f"the command failed{_last_words(complaints)}", "exit status 0", found
            )
