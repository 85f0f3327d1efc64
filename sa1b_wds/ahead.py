"""An iterable run ahead of its consumer in a thread of its own, by a bounded number of items and bytes."""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T], Iterator[T]):
    """Iterates over `items` in a thread; what that raises is raised here, after everything before it.

    `close` stops the thread and waits for it; items it had made but nobody took go to `discard`. While the consumer
    waits for an item, `idle` is called about once a second, in the consumer's thread.
    """

    def __init__(
        self,
        items: Iterable[T],
        *,
        name: str,
        depth: int = 64,
        budget: int = 1 << 25,
        weigh: Callable[[T], int] = lambda item: 0,
        discard: Callable[[T], None] = lambda item: None,
        idle: Callable[[], None] | None = None,
    ) -> None:
        self._items, self._depth, self._budget = items, depth, budget
        self._weigh, self._discard, self._idle = weigh, discard, idle
        self._ready: deque[tuple[T, int]] = deque()
        self._held = 0
        self._error: BaseException | None = None
        self._done = self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for item in self._items:
                weight = self._weigh(item)
                with self._changed:
                    # One item always fits, or a large one would wait for ever.
                    while self._ready and (len(self._ready) >= self._depth or self._held + weight > self._budget):
                        if self._closed:
                            break
                        self._changed.wait()
                    if self._closed:
                        self._discard(item)
                        return
                    self._ready.append((item, weight))
                    self._held += weight
                    if len(self._ready) == 1:
                        self._changed.notify_all()
        except BaseException as error:
            self._error = error
        finally:
            if isinstance(self._items, Generator):
                self._items.close()
            with self._changed:
                self._done = True
                self._changed.notify_all()

    def _waited(self) -> bool:
        """Whether there is something to take, or never will be; False after a second without either."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._ready or self._done), 1.0)

    def __next__(self) -> T:
        while self._idle is not None and not self._ready and not self._waited():
            self._idle()
        with self._changed:
            while not self._ready and not self._done:
                self._changed.wait()
            if not self._ready:
                if self._error is not None:
                    error, self._error = self._error, None
                    raise error
                raise StopIteration
            item, weight = self._ready.popleft()
            self._held -= weight
            # Woken only when half is free: a hand-over for every item would cost two thread switches each.
            if len(self._ready) <= self._depth // 2 and self._held <= self._budget // 2:
                self._changed.notify_all()
        return item

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        while self._ready:
            self._discard(self._ready.popleft()[0])
