"""A stream as an IterableDataset: bare, under DataLoader with any number of workers, and under StatefulDataLoader.

Bare is best: decoding runs in threads, so a worker process has nothing to win and a hand-over to lose. With P workers
they are part of the leg: worker p makes every P-th batch, beginning with the p-th to come, and what DataLoader takes
from them in turn is the leg's order.
"""

import pickle
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from ...errors import StateMismatch, UsageError
from ...stats import Stats
from ...stream import Stream
from .board import Board
from .tensors import page_locked, shared, tensors

WORKER_FORMAT = "sa1b-wds-worker/1"


class TorchStream(IterableDataset[dict[str, Any]]):
    """Batches of a stream as tensors; iterate over it once an epoch.

    Batches are those of `tensors`. Under a loader they must not be batched again, nor taken out of order:
    `DataLoader(stream, batch_size=None, num_workers=P)`. An epoch that ends goes to the next one, in every worker,
    whether workers are kept or made anew.

    A loader with workers takes batches ahead and does not say which of them the loop got. So with workers

    - `state_dict(after=batch)` is exact, and `state_dict()` is refused;
    - what begins after a `break` begins where the last iteration began, or with the next epoch if the workers had made
      all of this one; to go on after the last batch instead, `stream.load_state_dict(stream.state_dict(after=batch))`;
    - an error arrives as a RuntimeError that holds its whole text;
    - a forked worker cannot read from every object store, and says so: `multiprocessing_context="forkserver"`.

    Args:
        stream: what to iterate over; do not iterate over it by itself as well. Workers of a loader share its threads
            and its read-ahead.
        pin_memory: make batches in page-locked memory, so that `.to(device, non_blocking=True)` needs no other copy
            and a loader's own `pin_memory` finds nothing left to do; None: where CUDA is there. Not in workers.
    """

    def __init__(self, stream: Stream, *, pin_memory: bool | None = None) -> None:
        self.stream = stream
        self._pin = pin_memory
        self._board = Board()
        self._board.set(stream.state_dict())
        # In a worker only: its own stream, how far it came, and the state that it was handed and has not begun yet.
        self._own: Stream | None = None
        self._place: dict[str, Any] | None = None
        self._handed: dict[str, Any] | None = None

    def __repr__(self) -> str:
        return f"TorchStream({self.stream!r})"

    def __len__(self) -> int:
        """Batches of this epoch: those delivered, over all legs, and those to come. The same on every rank."""
        return len(self._moved())

    @property
    def epoch(self) -> int:
        """The epoch that the next batch belongs to; under workers, that the next iteration begins in."""
        return self._moved().epoch

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch; nothing happens if it is the current one. Reaches workers that are kept."""
        if epoch != self.epoch:
            self.stream.set_epoch(epoch)
            self._board.set(self.stream.state_dict())

    def _moved(self) -> Stream:
        """The stream, moved to the epoch that workers have come to."""
        if self._board.workers:
            self.stream.set_epoch(self._board.epoch)
        return self.stream

    # -- state

    def state_dict(self, after: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Where this run stands: small, plain JSON, the same on every rank that is in step.

        Args:
            after: a batch of this stream: the state after exactly that one, whatever a loader has taken since. By
                default, after the last one that `next` returned.

        Raises:
            UsageError: a batch that this stream cannot have made; no batch, where a loader has workers.
        """
        if self._place is not None:  # StatefulDataLoader asks its workers
            return self._place
        workers = self._board.workers
        if not workers:
            return self.stream.state_dict(after)
        if after is None:
            what = "a loader's workers are ahead of the loop: say after which batch, state_dict(after=batch)"
            raise UsageError("state_dict", what)
        worker = self.stream.in_worker(0, workers)
        worker.load_state_dict(self._board.state)
        worker.set_epoch(self._board.epoch)
        return worker.state_dict(after)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a run stood, with this or any other number of ranks, workers and batch size.

        Args:
            state: of `state_dict`, or of a StatefulDataLoader over a TorchStream; see `state_of`.

        Raises:
            StateMismatch: a state of other data, another selection of it, or another `drop_last`; or none at all.
        """
        if state.get("format") == WORKER_FORMAT:  # StatefulDataLoader hands each worker its own
            self._handed = dict(state)
            return
        self.stream.load_state_dict(state_of(state))
        self._board.set(self.stream.state_dict())

    # -- iteration

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The rest of this epoch; at its end the stream is at the beginning of the next."""
        worker = get_worker_info()
        return self._bare() if worker is None else self._begin(worker.id, worker.num_workers)

    def _bare(self) -> Iterator[dict[str, Any]]:
        if self._pin or (self._pin is None and torch.cuda.is_available()):
            self.stream.memory = page_locked()
        for batch in self.stream:  # whose threads end when this iterator is let go of
            self._board.set(self.stream.state_dict())
            yield tensors(batch)
        self._board.set(self.stream.state_dict())

    def _begin(self, worker: int, workers: int) -> Iterator[dict[str, Any]]:
        """At once, not at the first `next`: a loader may ask for the state in between, or drop the iterator."""
        if self._own is None:  # files, locks and commands of its own, where the process was forked
            self._own = pickle.loads(pickle.dumps(self.stream))
        own, handed, self._handed = self._own, self._handed, None
        if handed is not None:
            base, number = handed["state"], handed["next"]
            self._board.resume(worker, workers, base)
            own.load_state_dict(_after(base, number))
            made = own.in_worker(0, workers)
            leg = made.state_dict()["legs"][-1]
            if leg[-1] != number:
                what = "of a loader with other ranks, batches or workers: load the loader's state into the TorchStream"
                raise StateMismatch("state of a worker", what, base["legs"][-1][:-1], leg[:-1])
        else:
            epoch = self._board.begin(worker, workers)
            own.load_state_dict(self._board.state)
            own.set_epoch(epoch)
            made = own.in_worker(worker, workers)
            base = made.state_dict()
            number = base["legs"][-1][-1] + worker
        made.memory = shared()
        self._place = _place(base, number)
        if number >= made.order.cut.steps:
            self._board.end(worker, workers, made.epoch + 1)
        return self._run(made, base, worker, workers)

    def _run(self, made: Stream, base: dict[str, Any], worker: int, workers: int) -> Iterator[dict[str, Any]]:
        with made:
            for batch in made:
                number = int(batch["step"][1]) + workers
                self._place = _place(base, number)
                if number >= made.order.cut.steps:
                    # Not only at StopIteration: a loader that was resumed behind the last batch never asks again.
                    self._board.end(worker, workers, made.epoch + 1)
                yield tensors(batch)
            self._place = _place(made.state_dict(), worker)

    def close(self) -> None:
        """End the threads of the iteration that is under way; iterating again goes on with the next batch."""
        self.stream.close()

    def stats(self) -> Stats:
        """What was done so far in this process, and where the time went."""
        return self.stream.stats()


def state_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of the stream under a StatefulDataLoader, for any other number of ranks or workers.

    The snapshots of the workers say which batch each would make next; the first of them all is the next to deliver, and
    the loop has had as many more as the loader has counted since the snapshot.

    Args:
        state: of `StatefulDataLoader.state_dict`; a stream's own state is given back as it is.

    Raises:
        StateMismatch: it has no state of a TorchStream in it.
    """
    if "_snapshot" in state:
        snapshots = [w.get("dataset_state") for w in state["_snapshot"]["_worker_snapshots"].values()]
        if not snapshots or any(s is None or s.get("format") != WORKER_FORMAT for s in snapshots):
            raise StateMismatch("state", "a loader's, but not over a TorchStream", WORKER_FORMAT, snapshots)
        base = snapshots[0]["state"]
        if state["_iterator_finished"]:
            return {**base, "epoch": base["epoch"] + 1, "legs": []}
        return _after(base, min(s["next"] for s in snapshots) + state["_steps_since_snapshot"])
    if "dataset_state" in state:  # a loader without workers
        return dict(state["dataset_state"] or {})
    return dict(state)


def _place(base: dict[str, Any], number: int) -> dict[str, Any]:
    return {"format": WORKER_FORMAT, "state": base, "next": number}


def _after(base: dict[str, Any], number: int) -> dict[str, Any]:
    """The state with `number` batches of its last leg delivered."""
    *legs, last = base["legs"]
    return {**base, "legs": [*legs, [*last[:-1], number]]}
