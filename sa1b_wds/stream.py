"""Shards into training: batches in an exact order, resumable at the exact sample, with masks at the training size.

    manifest → order → shard bytes → packed samples → decoded samples → batches

A `Stream` is one rank's share of a data set, an epoch at a time:

    stream = ds.stream(batch_size=8)
    for epoch in range(stream.epoch, epochs):
        for batch in stream:
            ...
            save({"loader": stream.state_dict(), …})

One process a rank, threads inside. What a batch holds is arithmetic on (seed, epoch, the legs run so far), see `order`;
threads only make it sooner. A batch counts when `next` returns it, never when it is made ahead.
"""

import logging
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace
from time import monotonic
from typing import TYPE_CHECKING, Any

from . import world as worlds
from .batch import Batch, Memory
from .decode import MaskMode, View
from .errors import StateMismatch, UsageError
from .limits import Limits as NetworkLimits
from .order import Leg, Order, go_on
from .pipeline import Limits, OnError, Pipeline
from .state import State, merge_states
from .stats import Stats, Sums
from .world import World

if TYPE_CHECKING:
    from types import TracebackType

    from .dataset import Dataset

__all__ = ["Batch", "Stats", "Stream", "merge_states"]

_log = logging.getLogger("sa1b_wds")


class Stream:
    """Batches of a data set for one rank; iterate over it once an epoch.

    Args:
        dataset: what to stream.
        batch_size: samples of this rank's batches.
        image_size: pixels of the longest side; images are padded to a square. None: no images.
        mask_size: pixels of a mask's side, over the padded square. None: no masks, only their columns.
        masks_per_image: how many masks of an image, at random where it has more; None: all, ragged (see `Batch`).
        mask_mode: `nearest` (uint8, 0 or 1), `area` (float32, the exact covered fraction), or `runs`: a few bytes a
            mask instead, from which a device draws them at any size (`interop.torch.rasterise`).
        min_area, max_area_fraction, min_predicted_iou, min_stability_score: what a mask must have, in pixels of the
            original image or as a fraction. A sample none of whose masks pass is delivered all the same.
        flip: chance that an image is mirrored.
        scale: (low, high) of the zoom for random crops, (1, 1) for none; see `Augment`.
        seed, epoch: what order, choice of masks and augmentation hang on.
        rank, world_size: both or neither; by default from torch.distributed or the environment, see `world`.
        threads: that decode; by default one for each core of this process's share of the machine.
        fetch_threads: that read; by default 2 from local disks, 8 from object stores, whose requests have to wait.
        read_ahead: bytes of samples read and not yet decoded. It never shapes the order.
        prefetch: batches made ahead of `next`.
        drop_last: leave out what does not fill a batch on every rank at the end of an epoch. Otherwise the last
            batches are filled with repeats, flagged `is_padding`.
        on_error: `raise`, or `skip`: a sample that is damaged is counted and its place filled with a repeat.
        max_skipped: how many may be skipped before it is an error all the same.
        network: how shards on object stores are read, see `limits`; by default as the environment says.
        log_every: seconds between lines with `stats()` on the logger `sa1b_wds` (level INFO); None for none.

    Raises:
        UsageError: an option that cannot be, or images of a data set that has none.
        WorldError: ranks that contradict each other.
    """

    def __init__(
        self,
        dataset: "Dataset",
        *,
        batch_size: int = 8,
        image_size: int | None = 1024,
        mask_size: int | None = 256,
        masks_per_image: int | None = 64,
        mask_mode: MaskMode = "nearest",
        min_area: int = 0,
        max_area_fraction: float = 1.0,
        min_predicted_iou: float = 0.0,
        min_stability_score: float = 0.0,
        flip: float = 0.0,
        scale: tuple[float, float] = (1.0, 1.0),
        seed: int = 0,
        epoch: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        threads: int | None = None,
        fetch_threads: int | None = None,
        read_ahead: int = 1 << 30,
        prefetch: int = 2,
        drop_last: bool = True,
        on_error: OnError = "raise",
        max_skipped: int = 100,
        log_every: float | None = None,
        network: NetworkLimits | None = None,
    ) -> None:
        at_least: dict[str, tuple[int | None, int]] = {
            "batch_size": (batch_size, 1), "threads": (threads, 1), "fetch_threads": (fetch_threads, 1),
            "read_ahead": (read_ahead, 0), "prefetch": (prefetch, 0), "max_skipped": (max_skipped, 0),
        }  # fmt: skip
        for name, (value, low) in at_least.items():
            if value is not None and value < low:
                raise UsageError(name, "out of range", f"at least {low}", value)
        if on_error not in ("raise", "skip"):
            raise UsageError("on_error", "no such policy", "raise or skip", on_error)
        if image_size is not None and not dataset.has_images:
            raise UsageError(dataset.where, "annotations alone, without photographs: stream with image_size=None")
        self.dataset = dataset
        self.world: World = worlds.detect(rank, world_size)
        self.view = View.of(
            image_size=image_size,
            mask_size=mask_size,
            masks_per_image=masks_per_image,
            mask_mode=mask_mode,
            min_area=min_area,
            max_area_fraction=max_area_fraction,
            min_predicted_iou=min_predicted_iou,
            min_stability_score=min_stability_score,
            flip=flip,
            scale=scale,
        )
        self.batch_size, self.drop_last = batch_size, drop_last
        self.limits = Limits(
            threads=threads or max(1, worlds.cores() // self.world.local_size),
            fetch_threads=fetch_threads or (8 if "://" in dataset.where else 2),
            read_ahead=read_ahead,
            prefetch=prefetch,
            on_error=on_error,
            max_skipped=max_skipped,
            network=network,
        )
        self._log_every = log_every
        self._worker, self._workers, self._section = 0, 1, 0
        self.memory = Memory(keep=prefetch + 2)
        """What batches are made on; an adapter may put memory of another kind here before it iterates."""
        self._past = Sums()
        self._running: weakref.ref[_Batches] | None = None
        self._resumed: State | None = None
        self._order: Order | None = None
        self._state = State(fingerprint=dataset.fingerprint(drop_last), seed=seed, epoch=epoch)
        self._move(self._state)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_running": None, "_order": None, "memory": None, "_past": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.memory, self._past = Memory(keep=self.limits.prefetch + 2), Sums()

    def __repr__(self) -> str:
        return f"Stream({self.dataset!r}, batch_size={self.batch_size}, {self.world}, epoch={self.epoch})"

    # -- order

    @property
    def seed(self) -> int:
        return self._state.seed

    @property
    def epoch(self) -> int:
        """The epoch that the next batch belongs to."""
        return self._state.epoch

    @property
    def order(self) -> Order:
        """The order of this epoch."""
        if self._order is None:
            state = self._state
            counts = self.dataset.selection.count
            self._order = Order(counts, state.seed, state.epoch, state.legs, self.drop_last)
        return self._order

    def __len__(self) -> int:
        """Batches of this epoch: those delivered, over all legs, and those to come. The same on every rank."""
        return self.order.total

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch; nothing happens if it is the current one."""
        if epoch != self.epoch:
            self.close()
            if self._resumed is not None and self._resumed.epoch == epoch:
                self._resumed = None
            self._move(replace(self._state, epoch=epoch, legs=()))

    def _move(self, state: State) -> None:
        """Go on from `state` in this stream's shape."""
        had = [leg for leg in state.legs if leg.most]
        legs = go_on(had, self._leg(had[-1] if had else None))
        self._state = replace(state, legs=tuple(legs))
        self._order = None
        self._section = (legs[-1].most + self._worker) % self._workers

    def _leg(self, last: Leg | None) -> Leg:
        """This stream's shape; where the global batch stays the same, with the lanes that let the order go on."""
        size, workers = self.world.size, self._workers
        if last is not None and last.workers == workers and last.world * last.batch == size * self.batch_size:
            lanes, rest = divmod(last.world * last.lanes, size)
            if not rest and lanes and lanes % workers == 0:
                return Leg(size, self.batch_size, lanes, last.block, workers)
        lanes = max(32, self.batch_size)
        return Leg(size, self.batch_size, -(-lanes // workers) * workers, max(8, 1024 // lanes), workers)

    # -- state

    def state_dict(self, after: Batch | Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Where this run stands: small, plain JSON, the same on every rank that is in step.

        Args:
            after: a batch of this stream: the state after exactly that one, whatever a prefetcher has taken since. By
                default, after the last one that `next` returned.

        Raises:
            UsageError: a batch that this stream cannot have made.
        """
        if after is None:
            return self._state.to_dict()
        epoch, number = (int(x) for x in after["step"])
        if epoch > self.epoch:
            raise UsageError("state_dict", "a batch of an epoch to come", f"at most {self.epoch}", epoch)
        # An epoch has one leg, this stream's, but for the one that it was resumed in.
        legs = self._resumed.legs if self._resumed is not None and self._resumed.epoch == epoch else (self._leg(None),)
        leg = replace(legs[-1], batches=number + 1)
        return replace(self._state, epoch=epoch, legs=(*legs[:-1], leg)).to_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a run stood, with this or any other number of ranks and batch size.

        Every rank loads the same state (`merge_states` makes one of those that were not in step). Seed and epoch are
        the state's.

        Raises:
            StateMismatch: a state of other data, another selection of it, or another `drop_last`; or none at all.
        """
        parsed = State.from_dict(state)
        if parsed.fingerprint != self._state.fingerprint:
            raise StateMismatch(
                "state",
                "it belongs to other data, another selection, or another drop_last (fingerprint)",
                self._state.fingerprint,
                parsed.fingerprint,
            )
        self.close()
        self._move(parsed)
        self._resumed = self._state

    # -- iteration

    def __iter__(self) -> Iterator[Batch]:
        """The rest of this epoch; at its end the stream is at the beginning of the next."""
        self.close()
        batches = _Batches(self)
        self._running = weakref.ref(batches)
        return batches

    def in_worker(self, worker: int, workers: int) -> "Stream":
        """This stream in one of several worker processes of a rank, which makes every `workers`-th batch.

        Worker 0 begins with the next batch of the leg, worker 1 with the one after it, and so on: what takes from them
        in turn gets the leg's order. They share the rank's threads and its budget; one worker keeps the bare order.
        """
        if not 0 <= worker < workers:
            raise UsageError("worker", "out of range", f"0 to {workers - 1}", worker)
        made = Stream.__new__(Stream)
        made.__setstate__(self.__getstate__())
        made._worker, made._workers = worker, workers
        made.limits = replace(
            self.limits,
            threads=max(1, self.limits.threads // workers),
            read_ahead=self.limits.read_ahead // workers,
        )
        made._move(self._state)
        return made

    def close(self) -> None:
        """End the threads of the iteration that is under way; iterating again goes on with the next batch."""
        running = self._running() if self._running else None
        self._running = None
        if running is not None:
            running.close()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: "TracebackType | None"
    ) -> None:
        self.close()

    def stats(self) -> Stats:
        """What was done so far, and where the time went."""
        running = self._running() if self._running else None
        return self._past.stats(running.pipeline.tally if running else None)

    def _start(self) -> Pipeline:
        order, state = self.order, self._state
        begin = state.legs[-1].most
        first = begin + (self._section - begin) % self._workers
        return Pipeline(
            shards=self.dataset.shards,
            selection=self.dataset.selection,
            order=order,
            rank=self.world.rank,
            numbers=range(first, order.cut.steps, self._workers),
            view=self.view,
            seed=state.seed,
            epoch=state.epoch,
            limits=self.limits,
            memory=self.memory,
            skipped=self._past.skipped,
        )

    def _count(self, batch: Batch) -> None:
        leg = replace(self._state.legs[-1], batches=int(batch["step"][1]) + 1)
        self._state = replace(self._state, legs=(*self._state.legs[:-1], leg))

    def _end_epoch(self) -> None:
        self._move(replace(self._state, epoch=self.epoch + 1, legs=()))


class _Batches(Iterator[Batch]):
    """One iteration over a stream. Its threads end with it: by `close`, at the end, or when it is let go of."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._logged = monotonic()
        self.pipeline = stream._start()
        self._over = False

    def __next__(self) -> Batch:
        if self._over:
            raise StopIteration
        try:
            batch = self.pipeline.next()
        except BaseException:
            self.close()
            raise
        stream = self._stream
        if batch is None:
            ended = not self.pipeline.closing
            self.close()
            if ended:
                stream._end_epoch()
            raise StopIteration
        stream._count(batch)
        if stream._log_every is not None and monotonic() - self._logged >= stream._log_every:
            self._logged = monotonic()
            _log.info("rank %d: %s", stream.world.rank, stream.stats())
        return batch

    def close(self) -> None:
        if not self._over:
            self._over = True
            self.pipeline.close()
            self._stream._past.add(self.pipeline.tally)

    def __del__(self) -> None:
        if hasattr(self, "_over"):
            self.close()
