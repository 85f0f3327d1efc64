"""The threads of one epoch on one rank: reads in the order due, samples decoded into batches, batches in order.

    schedule → fetch threads → packed samples → decode threads → assemblies → `next`

Neither the number of threads nor their timing can change what comes out: which samples a batch has is arithmetic, and
each is decoded into a place of its own. Bounds: `read_ahead` bytes of samples read and not yet decoded, and `prefetch`
batches made ahead of the one asked for. What the next batch waits for is read whatever the budget says, sample by
sample, so a small budget costs requests but cannot stop anything.
"""

import heapq
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

from .assembly import Assembly
from .batch import Batch, Memory
from .buffers import Pool
from .decode import View
from .errors import DataError, Sa1bError, UsageError
from .limits import Limits as NetworkLimits
from .order import Order
from .reader import Found, PackedSample, ReadCost, Shards
from .schedule import Id, Plan, Read, Schedule
from .selection import Selection
from .stats import Tally

OnError = Literal["raise", "skip"]

_log = logging.getLogger("sa1b_wds")

_IDLE = 64 << 20  # bytes of sample buffers kept while no sample is in them


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a pipeline may use."""

    threads: int
    """That decode."""
    fetch_threads: int
    read_ahead: int
    """Bytes of samples read and not yet decoded."""
    prefetch: int
    """Batches made ahead."""
    on_error: OnError
    max_skipped: int
    """Samples that may be skipped before it is an error all the same."""
    network: NetworkLimits | None = None
    """How shards far away are read; None: as the environment says."""


class Pipeline:
    """The batches `numbers` of a rank, made ahead by threads until `close`."""

    def __init__(
        self,
        *,
        shards: Shards,
        selection: Selection,
        order: Order,
        rank: int,
        numbers: Iterable[int],
        view: View,
        seed: int,
        epoch: int,
        limits: Limits,
        memory: Memory,
        skipped: int = 0,
    ) -> None:
        """`skipped`: how many samples were skipped before, which counts against the limit."""
        self._shards = shards.apart(max(128, 2 * order.leg.lanes), limits.network)
        self._view, self._limits, self._memory = view, limits, memory
        self._seed, self._epoch = seed, epoch
        self._before = skipped
        self.tally = Tally.of(limits.threads, limits.fetch_threads)
        self._schedule = Schedule(order, selection, rank, numbers, singly=limits.prefetch + 1)
        self._pool = Pool(_IDLE)
        self._mean = shards.mean_bytes
        lane_bytes = order.leg.lanes * float(self._mean[selection.shard].mean()) if len(selection) else 1.0
        # Blocks end one after the other, so half a piece of each lane is held on average; a quarter is for unevenness.
        self._most = max(1, int(1.5 * limits.read_ahead / lane_bytes))

        self._lock = threading.Lock()
        self._can_fetch = threading.Condition(self._lock)
        self._can_decode = threading.Condition(self._lock)
        self._can_deliver = threading.Condition(self._lock)
        self._closing = False
        self._failure: BaseException | None = None
        self._held = 0  # bytes read or being read, and not yet decoded
        self._need = 0.0  # bytes of the next read
        self._found: dict[Id, Found] = {}
        self._waiting: dict[Id, tuple[int, int]] = {}  # samples of open batches that are not there yet
        self._ready: list[tuple[int, int, Id]] = []  # a heap of (batch, slot, sample)
        self._plans: deque[Plan] = deque()
        self._opened = 0  # batches whose slots were handed out
        self._delivered = 0
        self._open: dict[int, Assembly] = {}  # opened and not delivered
        self._reading = 0  # fetch threads at work

        works = [("fetch", self._fetch, limits.fetch_threads), ("decode", self._decode, limits.threads)]
        self._threads = [
            threading.Thread(target=self._run, args=(work, i), name=f"sa1b-wds-{name}-{i}", daemon=True)
            for name, work, n in works
            for i in range(n)
        ]
        for thread in self._threads:
            thread.start()

    def next(self) -> Batch | None:
        """The next batch, or None after the last.

        Raises:
            DataError: the first sample of the batch, in order, that cannot be used; or too many were skipped.
            StorageError: it cannot be read.
        """
        begin = perf_counter()
        with self._lock:
            while not self._closing:
                if self._failure is not None:
                    raise self._failure
                assembly = self._open.get(self._delivered)
                if assembly is not None and assembly.done is not None:
                    break
                if assembly is None and self._schedule.peek() is None and not self._plans and not self._schedule.plans:
                    return None
                self._can_deliver.wait()
            if self._closing:
                return None
            assembly = self._open[self._delivered]
            self._judge(assembly)
            del self._open[self._delivered]
            self._delivered += 1
            self._open_batches()
            self.tally.wait += perf_counter() - begin
            self.tally.batches += 1
            self.tally.ahead = sum(a.done is not None for a in self._open.values())
            assert assembly.done is not None
            return assembly.done

    def _judge(self, assembly: Assembly) -> None:
        if not assembly.errors:
            return
        first = assembly.errors[min(assembly.errors)]
        if self._limits.on_error == "raise":
            raise first
        for slot, error in sorted(assembly.errors.items()):
            if not assembly.plan.slots[slot].padding:  # else it was counted where it stood first
                self.tally.skipped += 1
                self.tally.errors.append(str(error))
                _log.warning("skipped: %s", error)
        skipped = self._before + self.tally.skipped
        if skipped > self._limits.max_skipped:
            text = f"too many samples skipped; the last one: {first.what}"
            raise DataError(first.where, text, f"at most {self._limits.max_skipped:,}", f"{skipped:,}")

    def close(self) -> None:
        """Stop all threads and wait for them; may be called twice, and from anywhere."""
        with self._lock:
            if not self._closing:
                self._closing = True
                self.tally.stop()
            for condition in (self._can_fetch, self._can_decode, self._can_deliver):
                condition.notify_all()
        self._shards.interrupt()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        with self._lock:
            self._found.clear()
            self._open.clear()
            self._ready.clear()
            self._waiting.clear()
        self._shards.close()

    @property
    def closing(self) -> bool:
        """Whether `close` was called."""
        return self._closing

    # -- threads

    def _run(self, work: Callable[[int], None], number: int) -> None:
        try:
            work(number)
        except BaseException as error:  # a bug, or no memory: the consumer is told, whatever it is
            with self._lock:
                if self._failure is None and not self._closing:
                    self._failure = error
                self._can_deliver.notify_all()

    def _fetch(self, number: int) -> None:
        cost = self.tally.read[number]
        while True:
            with self._lock:
                read = self._next_read()
            if read is None:
                return
            begin = perf_counter()
            found, sizes = self._read(read, cost)
            self.tally.busy_fetch[number] += perf_counter() - begin
            with self._lock:
                if self._closing:
                    return
                self._held += sum(sizes) - self._estimate(read)
                self.tally.held = self._held
                for id, sample in zip(read.ids, found, strict=True):
                    self._found[id] = sample
                    place = self._waiting.pop(id, None)
                    if place is not None:
                        heapq.heappush(self._ready, (*place, id))
                self._can_decode.notify(len(read.ids))
                self._can_fetch.notify_all()

    def _next_read(self) -> Read | None:
        """Wait until the budget allows the next read; None at the end. Holds the lock."""
        while not self._closing:
            step = self._schedule.peek()
            if step is None:
                self._take_plans()
                return None
            due, most, shard = step
            if due > self._limits.prefetch and not self._begun:
                self._can_fetch.wait()  # the first batch has the machine for itself
                continue
            most = min(most, self._most)
            self._need = most * float(self._mean[shard])
            if self._held + self._need <= self._limits.read_ahead:
                n = most
            elif due <= self._next_due():
                n = 1
            else:
                self._can_fetch.wait()
                continue
            read = self._schedule.take(n)
            self._held += self._estimate(read)
            self._take_plans()
            return read
        return None

    @property
    def _begun(self) -> bool:
        """Whether the first batch is complete."""
        first = self._open.get(0)
        return self._delivered > 0 or (first is not None and first.done is not None)

    def _estimate(self, read: Read) -> int:
        return int(self._mean[read.shard].sum())

    def _next_due(self) -> int:
        """The first batch that is not complete and that may be made now."""
        for due in range(self._delivered, self._delivered + self._limits.prefetch + 1):
            assembly = self._open.get(due)
            if assembly is None or assembly.done is None:
                return due
        return -1

    def _take_plans(self) -> None:
        self._plans.extend(self._schedule.plans)
        self._schedule.plans.clear()
        self._open_batches()

    def _open_batches(self) -> None:
        """Hand out the slots of the batches that may be made now. Holds the lock."""
        opened = False
        while self._plans and self._opened <= self._delivered + self._limits.prefetch:
            plan = self._plans.popleft()
            assembly = self._open[self._opened] = Assembly(plan, self._view, self._memory)
            for i, slot in enumerate(plan.slots):
                if slot.id is None:
                    continue
                if slot.id in self._found:
                    heapq.heappush(self._ready, (self._opened, i, slot.id))
                else:
                    self._waiting[slot.id] = self._opened, i
            assert assembly.left
            self._opened += 1
            opened = True
        if opened:
            self._can_decode.notify_all()
        # Whatever moved may have changed which batch is next, or that there is none.
        self._can_fetch.notify_all()
        self._can_deliver.notify_all()

    def _read(self, read: Read, cost: ReadCost) -> tuple[list[Found], list[int]]:
        """The samples of a read, in its order, and their bytes."""
        found: list[Found | None] = [None] * len(read.ids)
        places: dict[int, list[tuple[int, int]]] = {}
        for i, (shard, index) in enumerate(zip(read.shard.tolist(), read.index.tolist(), strict=True)):
            places.setdefault(shard, []).append((index, i))
        for shard, wanted in places.items():
            wanted.sort()
            try:
                got = self._shards[shard].read(
                    [index for index, _ in wanted], self._pool, cost, tolerant=self._limits.on_error == "skip"
                )
            except Sa1bError as error:
                got = [error] * len(wanted)
            for (_, i), sample in zip(wanted, got, strict=True):
                found[i] = sample
        whole = [sample for sample in found if sample is not None]
        return whole, [sample.buffer.length if isinstance(sample, PackedSample) else 0 for sample in whole]

    def _decode(self, number: int) -> None:
        cost = self.tally.decode[number]
        while True:
            with self._lock:
                while not self._ready and not self._closing:
                    self._can_decode.wait()
                if self._closing:
                    return
                batch, slot, id = heapq.heappop(self._ready)
                assembly, sample = self._open[batch], self._found.pop(id)
            begin = perf_counter()
            size, error = 0, None
            if isinstance(sample, PackedSample):
                size = sample.buffer.length
                try:
                    assembly.decode(slot, sample, self._seed, self._epoch, cost)
                except Sa1bError as caught:
                    if isinstance(caught, UsageError):
                        raise
                    error = caught
                finally:
                    sample.release()
            else:
                error = sample
            with self._lock:
                self._held -= size
                self.tally.held = self._held
                if error is not None:
                    assembly.errors[slot] = error
                assembly.left -= 1
                last = not assembly.left
                if self._held + self._need <= self._limits.read_ahead:  # else waking up would be in vain
                    self._can_fetch.notify()
            if last:
                assembly.finish(self._epoch)
                with self._lock:
                    self._can_fetch.notify_all()
                    self._can_deliver.notify_all()
            self.tally.busy_decode[number] += perf_counter() - begin
