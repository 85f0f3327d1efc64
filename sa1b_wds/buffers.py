"""Memory for whole members, used again: fresh memory a megabyte long costs more in page faults than inflating it.

Buffers are carved from mappings of 16 MiB. The kernel makes the pages of a buffer in one go when it is carved, by a
call that gives up the GIL: `MAP_POPULATE` in `mmap.mmap` keeps it, and holds up all other threads for 5 to 15 ms a
mapping. (Huge pages were tried: clearing them cost more than the faults they spared.)
"""

import ctypes
import mmap
import threading
from bisect import bisect_left, insort
from collections.abc import Callable

GRAIN = 1 << 14
SLAB = 1 << 24


class Buffer:
    """A piece of memory, and the bytes of it in use."""

    __slots__ = ("length", "memory", "room")

    def __init__(self, memory: memoryview) -> None:
        self.memory, self.room, self.length = memory, len(memory), 0

    @property
    def view(self) -> memoryview:
        return self.memory[: self.length]


class Pool:
    """Buffers of any size, given back and taken again by any thread.

    A buffer serves a request if at most a third of it would be left over. Requests of more than an eighth of a mapping
    have one of their own: of these `idle` bytes are kept for later. All others stay for the life of the pool.
    """

    def __init__(self, idle: int) -> None:
        self._idle_limit, self._idle = idle, 0
        self._free: list[tuple[int, int, Buffer]] = []  # (room, id, buffer), sorted
        self._slab, self._used = memoryview(b""), 0
        self._lock = threading.Lock()
        self.outstanding = 0
        """Bytes of room now in use."""

    def take(self, length: int) -> Buffer:
        """A buffer whose view has `length` bytes of undefined content."""
        with self._lock:
            at = bisect_left(self._free, (length, 0))
            if at < len(self._free) and self._free[at][0] <= max(length * 3 // 2, 4 * GRAIN):
                buffer = self._free.pop(at)[2]
                self._idle -= buffer.room if buffer.room > SLAB // 8 else 0
                fresh = False
            else:
                buffer, fresh = self._carve(length), True
            self.outstanding += buffer.room
        if fresh:
            _populate(buffer.memory)
        buffer.length = length
        return buffer

    def _carve(self, length: int) -> Buffer:
        # Room in steps of a sixteenth: so that the next members of about this size fit too.
        step = max(GRAIN, 1 << max(0, length.bit_length() - 4))
        room = -(-max(length, 1) // step) * step
        if room > SLAB // 8:
            return Buffer(_mapping(room))
        if self._used + room > len(self._slab):
            self._slab, self._used = _mapping(SLAB), 0
        self._used += room
        return Buffer(self._slab[self._used - room : self._used])

    def close(self) -> None:
        """Let all memory go that is not in use, now: a task must not leave its own to the garbage collector."""
        with self._lock:
            self._free.clear()
            self._slab, self._used = memoryview(b""), 0
            self._idle = 0

    def give(self, buffer: Buffer) -> None:
        """Give a buffer back; its view must not be used any more."""
        with self._lock:
            self.outstanding -= buffer.room
            if buffer.room > SLAB // 8:
                if self._idle + buffer.room > self._idle_limit:
                    return
                self._idle += buffer.room
            insort(self._free, (buffer.room, id(buffer), buffer))


def _mapping(size: int) -> memoryview:
    return memoryview(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def _populator() -> Callable[[memoryview], None]:
    """Makes the pages of memory that was never touched; where nobody can, they come one by one when they are."""
    try:
        call = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return lambda memory: None
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

    def populate(memory: memoryview) -> None:
        call(ctypes.addressof(ctypes.c_char.from_buffer(memory)), len(memory), 23)  # MADV_POPULATE_WRITE, Linux 5.14

    return populate


_populate = _populator()
