"""Memory for whole members, used again: a fresh mapping a megabyte long costs more in page faults than inflating it."""

import mmap
import threading
from bisect import bisect_left, insort

GRAIN = 1 << 16


class Buffer:
    """One mapping, and the bytes of it in use."""

    __slots__ = ("length", "memory", "room")

    def __init__(self, room: int) -> None:
        self.room = room
        self.memory = memoryview(mmap.mmap(-1, room))
        self.length = 0

    @property
    def view(self) -> memoryview:
        return self.memory[: self.length]


class Pool:
    """Buffers of any size, given back and taken again by any thread.

    A buffer serves a request if at most a third of it would be left over. What lies unused is bounded: beyond `idle`
    bytes the buffers given back are let go.
    """

    def __init__(self, idle: int) -> None:
        self._idle_limit = idle
        self._idle = 0
        self._free: list[tuple[int, int, Buffer]] = []  # (room, id, buffer), sorted
        self._lock = threading.Lock()
        self.outstanding = 0
        """Bytes of room now in use."""
        self.peak = 0

    def take(self, length: int) -> Buffer:
        """A buffer whose view has `length` bytes of undefined content."""
        with self._lock:
            at = bisect_left(self._free, (length, 0))
            if at < len(self._free) and self._free[at][0] <= max(length * 3 // 2, 2 * GRAIN):
                buffer = self._free.pop(at)[2]
                self._idle -= buffer.room
            else:
                # An eighth of slack in the grain: so that later members of about this size fit.
                grain = max(GRAIN, 1 << max(0, length.bit_length() - 3))
                buffer = Buffer(-(-max(length, 1) // grain) * grain)
            self.outstanding += buffer.room
            self.peak = max(self.peak, self.outstanding + self._idle)
        buffer.length = length
        return buffer

    def give(self, buffer: Buffer) -> None:
        """Give a buffer back; its view must not be used any more."""
        with self._lock:
            self.outstanding -= buffer.room
            if self._idle + buffer.room <= self._idle_limit:
                insort(self._free, (buffer.room, id(buffer), buffer))
                self._idle += buffer.room
