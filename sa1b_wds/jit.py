"""Numba's compiler as this project uses it: GIL-free kernels, compiled once and cached on disk.

The cache lies in the package's own `__pycache__`. Where that is not writable (an installed package on a cluster) numba
would fall back to the home directory, which on a cluster is shared, slow, or missing; here it is a folder of this user
on the node's own temporary disk instead. `NUMBA_CACHE_DIR`, where set, goes before both.

Numba compiles a kernel again when the file it stands in changes, but not when a piece that it inlines from another file
does. So the folder's name holds a hash of all files that have such pieces.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba

_compile: Any = numba.njit  # its stubs know only some of the options
_config: Any = numba.config

F = TypeVar("F", bound=Callable[..., object])


def _node_local() -> Path:
    """A folder on the node's temporary disk that nobody else can write: numba runs what it finds there."""
    folder = Path(tempfile.gettempdir()) / f"sa1b-wds-numba-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022 or folder.is_symlink():
        return Path(tempfile.mkdtemp(prefix="sa1b-wds-numba-"))
    return folder


def _cache_folder() -> Path:
    package = Path(__file__).parent
    if named := os.environ.get("NUMBA_CACHE_DIR"):
        base = Path(named)
    elif os.access(package, os.W_OK):
        base = package / "__pycache__"
    else:
        base = _node_local()
    texts = (path.read_bytes() for path in sorted(package.rglob("*.py")))
    digest = hashlib.sha256(b"\0".join(text for text in texts if b"@inline" in text))
    digest.update(Path(__file__).read_bytes())
    return base / f"kernels-{digest.hexdigest()[:16]}"


_FOLDER = str(_cache_folder())


def jit(function: F) -> F:
    """Compile `function` to machine code that runs without the GIL; the cache on disk survives the process."""
    # Numba reads the folder at this moment only, so other packages that use numba keep theirs.
    before = _config.CACHE_DIR
    _config.CACHE_DIR = _FOLDER
    try:
        return cast(F, _compile(function, nogil=True, cache=True, error_model="numpy"))
    finally:
        _config.CACHE_DIR = before


def inline(function: F) -> F:
    """A piece of a kernel: compiled into each kernel that calls it. It cannot allocate.

    Not cached, since machine code from the cache cannot be inlined; and without numba's reference counts, or every
    call would cost two atomic operations for each array (measured: 12 ns a call, ten times the work of `rle.next_run`).
    """
    return cast(F, _compile(function, nogil=True, error_model="numpy", forceinline=True, _nrt=False))
