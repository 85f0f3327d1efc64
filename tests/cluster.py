"""A Ray cluster for tests: nodes in a network namespace of their own, stopped by their own process ids.

Ray binds wildcard ports and asks an outside address for its own: in the namespace there is nothing but loopback.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from scripts import environments

ROOT = Path(__file__).parents[1]
ADDRESS = "127.0.0.1:6379"

# Up with loopback (SIOCSIFFLAGS; iproute2 may not be there), then the namespace stays until this process's parent ends.
_ANCHOR = """
import fcntl, socket, struct, sys
with socket.socket() as s:
    fcntl.ioctl(s, 0x8914, struct.pack("16sH", b"lo", 0x41))
print("up", flush=True)
sys.stdin.read()
"""


def _missing(what: str) -> None:
    text = f"##### NO RAY: {what}; its tests are SKIPPED #####"
    sys.__stderr__.write(f"\n{text}\n") if sys.__stderr__ else None
    pytest.skip(text)


def interpreter() -> str:
    """Of the environment that has ray and this project."""
    inside = environments.python("engine")
    if inside is None:
        _missing("READERS=engine scripts/test installs it")
    return str(inside)


class Network:
    """A network namespace; programs started in it see each other, and nobody else."""

    def __init__(self, anchor: "subprocess.Popen[str]", enter: list[str], home: Path) -> None:
        self._anchor, self._enter, self.home = anchor, enter, home

    def start(
        self, command: Sequence[str], *, log: Path, inside: Sequence[str] = (), **more: str
    ) -> "subprocess.Popen[bytes]":
        """Start a program in a session of its own.

        Args:
            log: takes what it says.
            inside: words before the command, for a mount namespace.
            more: variables of its environment.
        """
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment |= {
            "HOME": str(self.home),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "disabled",
            "RAY_memory_monitor_refresh_ms": "0",  # the machine belongs to others too
            "RAY_health_check_initial_delay_ms": "500",
            "RAY_health_check_period_ms": "500",
            "RAY_health_check_timeout_ms": "2000",
            "RAY_health_check_failure_threshold": "3",
            **more,
        }
        with log.open("wb") as out:
            return subprocess.Popen(
                [*self._enter, *inside, *command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=environment,
                start_new_session=True,
            )


@contextlib.contextmanager
def network() -> Iterator[Network]:
    """A namespace, where this user may have one."""
    interpreter()
    tries: list[list[str]] = [["--net"], ["--user", "--map-root-user", "--net"]]
    if shutil.which("unshare") is None or shutil.which("nsenter") is None:
        _missing("unshare and nsenter (util-linux) are not there")
    for flags in tries:
        anchor = subprocess.Popen(
            ["unshare", *flags, sys.executable, "-c", _ANCHOR],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert anchor.stdout is not None and anchor.stdin is not None
        with tempfile.TemporaryDirectory(prefix="sa1b-ray-") as home:  # short: sockets lie in it
            try:
                if anchor.stdout.readline() == "up\n":
                    users = ["--user", "--preserve-credentials"] if "--user" in flags else []
                    yield Network(anchor, ["nsenter", f"--target={anchor.pid}", *users, "--net"], Path(home))
                    return
            finally:
                with contextlib.suppress(BrokenPipeError):
                    anchor.stdin.close()
                anchor.stdout.close()
                anchor.wait()
    _missing("unshare is not permitted here")


def children(pid: int) -> list[int]:
    """All processes below one, nearest first."""
    out: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            out += [int(word) for word in (task / "children").read_text().split()]
    return [*out, *(deeper for child in out for deeper in children(child))]


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


class Node:
    """A Ray node: a raylet, and around it what Ray thinks it needs."""

    def __init__(
        self,
        network: Network,
        name: str,
        *,
        head: bool = False,
        inside: Sequence[str] = (),
        path: Path = ROOT,
    ) -> None:
        self._log = network.home / f"{name}.log"
        command = [interpreter(), "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        where = ["--head", "--port=6379", f"--temp-dir={network.home}/r"] if head else [f"--address={ADDRESS}"]
        own = [
            "--node-ip-address=127.0.0.1",
            "--num-cpus=1",
            f"--memory={4 << 30}",
            f"--object-store-memory={80 << 20}",
        ]
        own += ["--include-dashboard=false"] if head else []
        self._process = network.start([*command, *where, *own], log=self._log, inside=inside, PYTHONPATH=str(path))

    def wait(self) -> None:
        """Until it is part of the cluster."""
        until = time.monotonic() + 60
        while time.monotonic() < until and self._process.poll() is None:
            if b"Ray runtime started" in self._log.read_bytes():
                return
            time.sleep(0.1)
        raise AssertionError(f"the node did not come up: {self._log.read_text(errors='replace')[-3000:]}")

    @property
    def raylet(self) -> int:
        (found,) = [pid for pid in children(self._process.pid) if "/raylet/raylet" in command_of(pid).split(" ")[0]]
        return found

    def workers(self) -> list[int]:
        """Process ids of its workers."""
        return children(self.raylet)

    def kill(self) -> None:
        """As if the power went: all of it at once."""
        for pid in [self._process.pid, *children(self._process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
