"""Who a process is: enough that another one on the same machine knows for certain when it has ended."""

import contextlib
import os
import socket
from collections.abc import Mapping
from pathlib import Path


def identity() -> dict[str, str | int]:
    """What a process writes down of itself; host, boot and name space say where its number means something."""
    about: dict[str, str | int] = {"host": socket.gethostname(), "pid": os.getpid(), "start": _start_of(os.getpid())}
    with contextlib.suppress(OSError):
        about["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        about["processes"] = str(Path("/proc/self/ns/pid").readlink())
    return about


def has_ended(theirs: Mapping[str, object]) -> bool:
    """Whether the process of this identity has certainly ended; False also where that cannot be known from here."""
    mine = identity()
    if not theirs or any(theirs.get(key) != mine.get(key) for key in ("host", "boot", "processes")):
        return False
    pid = theirs.get("pid")
    return isinstance(pid, int) and _start_of(pid) != theirs.get("start")


def _start_of(pid: int) -> str:
    """When a process started, in the kernel's ticks; empty if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
