"""Items spread over a few threads, each lane's in the order in which they came."""

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Lanes(Generic[T]):
    """Calls `work(number, item)` in one of `threads` threads; items of one number keep their order.

    The first error that `work` raises ends all lanes, and is raised by the next `put` or by `finish`. A context
    manager: its threads end with it, whatever waits in the lanes is dropped.
    """

    def __init__(self, work: Callable[[int, T], None], threads: int, *, name: str, depth: int = 8) -> None:
        self._work, self._depth = work, depth
        self._error: BaseException | None = None
        self._closed = self._finished = False
        self._lanes = [_Lane[T]() for _ in range(threads)]
        self._threads = [
            threading.Thread(target=self._run, args=(lane,), name=f"{name} {i}", daemon=True)
            for i, lane in enumerate(self._lanes)
        ]
        for thread in self._threads:
            thread.start()

    def put(self, number: int, item: T) -> None:
        """Hand over an item; waits while its lane is full."""
        lane = self._lanes[number % len(self._lanes)]
        with lane.changed:
            while len(lane.items) >= self._depth and self._error is None:
                lane.changed.wait()
            if self._error is None:
                lane.items.append((number, item))
                if len(lane.items) == 1:
                    lane.changed.notify_all()
        self._raise()

    def finish(self) -> None:
        """Wait until everything handed over is done."""
        self._finished = True
        self._wake()
        for thread in self._threads:
            thread.join()
        self._raise()

    def __enter__(self) -> "Lanes[T]":
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        self._wake()
        for thread in self._threads:
            thread.join()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _wake(self) -> None:
        for lane in self._lanes:
            with lane.changed:
                lane.changed.notify_all()

    def _run(self, lane: "_Lane[T]") -> None:
        while True:
            with lane.changed:
                while not lane.items and not (self._finished or self._closed or self._error):
                    lane.changed.wait()
                if self._closed or self._error or not lane.items:
                    return
                number, item = lane.items.popleft()
                if len(lane.items) <= self._depth // 2:
                    lane.changed.notify_all()
            try:
                self._work(number, item)
            except BaseException as error:
                if self._error is None:
                    self._error = error
                self._wake()
                return


class _Lane(Generic[T]):
    def __init__(self) -> None:
        self.items: deque[tuple[int, T]] = deque()
        self.changed = threading.Condition()
