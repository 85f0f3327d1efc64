"""Numba's compiler as this project uses it: GIL-free kernels, compiled once and cached on disk.

Numba keeps its cache beside the module. Where that folder is not writable (an installed package on a cluster) it would
fall back to the home directory, which on a cluster is shared, slow, or missing; here it is a folder of this user on
the node's own temporary disk instead.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

if "NUMBA_CACHE_DIR" not in os.environ and not os.access(Path(__file__).parent, os.W_OK):
    # Before numba is imported: it reads the variable once.
    os.environ["NUMBA_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / f"sa1b-wds-numba-{os.getuid()}")

import numba

F = TypeVar("F", bound=Callable[..., object])


def jit(function: F) -> F:
    """Compile `function` to machine code that runs without the GIL; the cache on disk survives the process."""
    return cast(F, numba.njit(function, nogil=True, cache=True, error_model="numpy"))


def inline(function: F) -> F:
    """A piece of a kernel: compiled into each kernel that calls it."""
    return cast(F, numba.njit(function, nogil=True, cache=True, error_model="numpy", inline="never"))
