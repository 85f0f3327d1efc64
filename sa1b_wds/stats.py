"""What a stream has done so far, for telling whether loading or training is the bottleneck."""

from collections import deque
from dataclasses import dataclass, field
from time import perf_counter

from .decode import DecodeCost
from .reader import ReadCost
from .traffic import Traffic

MIB = 1 << 20
_ERRORS = 20  # reasons kept
_TRAFFIC = {name: name for name in ("retries", "throttled", "stalled", "hedged", "again")} | {"paused": "waited"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Stats:
    """Sums since the stream was made; seconds of stages are summed over threads."""

    elapsed: float
    """Seconds that threads were running, idle or not."""
    batches: int
    """Returned by `next`."""
    samples: int
    """Decoded, those ahead of `next` included."""
    masks: int
    """Rasterised."""
    bytes: int
    """Of samples read, from wherever."""
    cache_bytes: int
    """Of these, from the cache."""
    cache_hits: int
    """Samples read from the cache."""
    cache_misses: int
    """Samples that a cache did not have; 0 without one."""
    cache_damaged: int
    """Samples dropped from the cache because they were not what they should be."""
    skipped: int
    """Samples left out by `on_error="skip"`."""
    retries: int
    """Reads taken up again after an answer that broke off or was none."""
    throttled: int
    """Of these, because the server had too many requests (429, 503)."""
    stalled: int
    """Of these, because no byte came for too long."""
    hedged: int
    """Late answers that were asked for a second time."""
    again: int
    """Bytes that were fetched twice."""
    paused: float
    """Seconds of pauses between attempts to read."""
    read: float
    """Seconds in reading bytes."""
    check: float
    """Seconds in comparing CRC-32s."""
    unpack: float
    """Seconds in columns, filters and choice."""
    image: float
    """Seconds in decoding and resizing JPEGs."""
    mask: float
    """Seconds in rasterising."""
    wait: float
    """Seconds that `next` waited: time that training lost."""
    fetch_busy: float
    """Fraction of the fetch threads' time that they were at work."""
    decode_busy: float
    """Fraction of the decode threads' time that they were at work."""
    held: int
    """Bytes of samples read and not yet decoded, now."""
    ahead: int
    """Batches that wait for `next`, now."""
    errors: tuple[str, ...]
    """The last few reasons for skipping."""

    @property
    def traffic(self) -> str:
        """What went wrong on the way, in words; empty if nothing did."""
        return str(Traffic(**{its: getattr(self, name) for name, its in _TRAFFIC.items()}))

    @property
    def source_bytes(self) -> int:
        """Bytes of samples that came from where the data set lies."""
        return self.bytes - self.cache_bytes

    @property
    def bottleneck(self) -> str:
        """`training`, or which part of loading: `reading` or `decoding`."""
        if self.wait < 0.1 * self.elapsed:
            return "training"
        return "reading" if self.fetch_busy > self.decode_busy else "decoding"

    def __str__(self) -> str:
        seconds = max(self.elapsed, 1e-9)
        each = 1000 / max(self.samples, 1)
        text = (
            f"{self.samples / seconds:,.1f} samples/s, {self.bytes / MIB / seconds:,.1f} MiB/s; "
            f"ms a sample: read {self.read * each:.2f}, check {self.check * each:.2f}, "
            f"unpack {self.unpack * each:.2f}, image {self.image * each:.2f}, masks {self.mask * each:.2f}; "
            f"threads busy: fetch {self.fetch_busy:.0%}, decode {self.decode_busy:.0%}; "
            f"waited {self.wait / seconds:.0%} of the time; {self.ahead} batches and "
            f"{self.held / MIB:,.0f} MiB ahead; bottleneck: {self.bottleneck}"
        )
        if looked := self.cache_hits + self.cache_misses:
            text += f"; cache: {self.cache_hits / looked:.0%} of {looked:,} samples, {self.cache_bytes / MIB:,.0f} MiB"
            text += f", {self.cache_damaged:,} damaged" if self.cache_damaged else ""
        if self.traffic:
            text += f"; {self.traffic}"
        if self.skipped:
            text += f"; {self.skipped:,} skipped, the last: {self.errors[-1]}"
        return text


@dataclass(slots=True)
class Tally:
    """What the threads of one iteration did so far; each adds to its own costs, and reading them is only a sum."""

    read: list[ReadCost]
    """Of each fetch thread."""
    decode: list[DecodeCost]
    """Of each decode thread."""
    busy_fetch: list[float]
    """Seconds that each fetch thread was at work."""
    busy_decode: list[float]
    """Seconds that each decode thread was at work."""
    wait: float = 0.0
    """Seconds that `next` waited."""
    batches: int = 0
    skipped: int = 0
    held: int = 0
    ahead: int = 0
    errors: deque[str] = field(default_factory=lambda: deque(maxlen=_ERRORS))
    started: float = field(default_factory=perf_counter)
    stopped: float | None = None

    @classmethod
    def of(cls, threads: int, fetch_threads: int) -> "Tally":
        """Nothing done yet, by so many threads."""
        return cls(
            read=[ReadCost() for _ in range(fetch_threads)],
            decode=[DecodeCost() for _ in range(threads)],
            busy_fetch=[0.0] * fetch_threads,
            busy_decode=[0.0] * threads,
        )

    def stop(self) -> None:
        """The threads end now."""
        self.stopped = perf_counter()
        self.held = self.ahead = 0

    @property
    def elapsed(self) -> float:
        return (perf_counter() if self.stopped is None else self.stopped) - self.started


class Sums:
    """The tallies of all iterations of a stream."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._errors: deque[str] = deque(maxlen=_ERRORS)

    @property
    def skipped(self) -> int:
        return int(self._sums.get("skipped", 0))

    def add(self, tally: Tally) -> None:
        """Add what an iteration did, once it is over."""
        self._sums = self._with(tally)
        self._errors.extend(tally.errors)

    def _with(self, tally: Tally) -> dict[str, float]:
        read, decode, elapsed = tally.read, tally.decode, tally.elapsed
        more: dict[str, float] = {
            "elapsed": elapsed,
            "batches": tally.batches,
            "samples": sum(d.samples for d in decode),
            "masks": sum(d.drawn for d in decode),
            "bytes": sum(r.bytes for r in read),
            "cache_bytes": sum(r.cache_bytes for r in read),
            "cache_hits": sum(r.cache_hits for r in read),
            "cache_misses": sum(r.cache_misses for r in read),
            "cache_damaged": sum(r.cache_damaged for r in read),
            "skipped": tally.skipped,
            **{name: sum(getattr(r.traffic, its) for r in read) for name, its in _TRAFFIC.items()},
            "read": sum(r.read for r in read),
            "check": sum(r.check for r in read),
            "unpack": sum(d.unpack for d in decode),
            "image": sum(d.image for d in decode),
            "mask": sum(d.masks for d in decode),
            "wait": tally.wait,
            "busy_fetch": sum(tally.busy_fetch),
            "busy_decode": sum(tally.busy_decode),
            "time_fetch": elapsed * len(read),
            "time_decode": elapsed * len(decode),
        }
        return {name: self._sums.get(name, 0) + value for name, value in more.items()}

    def stats(self, running: Tally | None) -> Stats:
        """Everything so far, `running` included."""
        nothing = Tally.of(0, 0)
        nothing.stopped = nothing.started
        sums = self._with(running or nothing)
        return Stats(
            elapsed=sums["elapsed"],
            batches=int(sums["batches"]),
            samples=int(sums["samples"]),
            masks=int(sums["masks"]),
            bytes=int(sums["bytes"]),
            cache_bytes=int(sums["cache_bytes"]),
            cache_hits=int(sums["cache_hits"]),
            cache_misses=int(sums["cache_misses"]),
            cache_damaged=int(sums["cache_damaged"]),
            skipped=int(sums["skipped"]),
            retries=int(sums["retries"]),
            throttled=int(sums["throttled"]),
            stalled=int(sums["stalled"]),
            hedged=int(sums["hedged"]),
            again=int(sums["again"]),
            paused=sums["paused"],
            read=sums["read"],
            check=sums["check"],
            unpack=sums["unpack"],
            image=sums["image"],
            mask=sums["mask"],
            wait=sums["wait"],
            fetch_busy=sums["busy_fetch"] / max(sums["time_fetch"], 1e-9),
            decode_busy=sums["busy_decode"] / max(sums["time_decode"], 1e-9),
            held=running.held if running else 0,
            ahead=running.ahead if running else 0,
            errors=(*self._errors, *(running.errors if running else ()))[-_ERRORS:],
        )
