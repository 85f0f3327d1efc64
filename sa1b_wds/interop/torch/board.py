"""What a stream in the main process and its copies in DataLoader's workers tell each other.

DataLoader gives a data set no way back: its workers have copies, made anew for each epoch or kept for all of them
(`persistent_workers`), and the main process is told nothing of what they did. A little shared memory mends that:

    state       where the main process has set the stream (JSON), or a worker that was handed a state
    epoch       that the last iteration began in
    workers     of the last iteration; 0 if the stream was set since
    slots       one a worker: up to which epoch it has made its batches, and among how many workers

Nothing is locked. The main process writes while no iteration runs. Workers write what all of them would write, or
their own slot; a slot is one word. An epoch is over when all workers of an iteration have made their last batch.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ...errors import UsageError

_LENGTH, _EPOCH, _WORKERS, _SLOTS = 0, 1, 2, 3
_MOST = 1023
"""Workers."""
_WORDS = _SLOTS + _MOST
_BYTES = 1 << 18
"""Of a state: those of runs whose ranks were not in step have a number for each rank."""


class Board:
    """See above."""

    def __init__(self) -> None:
        self._memory = torch.zeros(8 * _WORDS + _BYTES, dtype=torch.uint8).share_memory_()

    @property
    def _words(self) -> npt.NDArray[np.int64]:
        words: npt.NDArray[np.int64] = self._memory[: 8 * _WORDS].numpy().view(np.int64)
        return words

    # -- by the main process

    def set(self, state: Mapping[str, Any]) -> None:
        """Iterations begin at `state` from now on."""
        self._write(state)
        self._words[_WORKERS:] = 0

    @property
    def state(self) -> dict[str, Any]:
        """Where iterations begin, if `epoch` is still its epoch; else at the beginning of that."""
        text = self._memory[8 * _WORDS :][: int(self._words[_LENGTH])].numpy().tobytes()
        state: dict[str, Any] = json.loads(text)
        return state

    @property
    def epoch(self) -> int:
        """The epoch of the next iteration."""
        words = self._words
        slots = words[_SLOTS:][: words[_SLOTS] % (_MOST + 1)]
        over = 0
        if len(slots) and np.all(slots % (_MOST + 1) == len(slots)):  # else some are of an iteration before
            over = int(slots.min()) // (_MOST + 1)
        return max(int(words[_EPOCH]), over)

    @property
    def workers(self) -> int:
        """How many workers the last iteration had; 0 if the stream was set since."""
        return int(self._words[_WORKERS])

    # -- by workers

    def begin(self, worker: int, workers: int) -> int:
        """A worker begins an iteration: the epoch."""
        if workers > _MOST:
            raise UsageError("num_workers", "too many", f"at most {_MOST:,}", workers)
        words, epoch = self._words, self.epoch
        words[_EPOCH], words[_WORKERS] = epoch, workers
        self.end(worker, workers, epoch)
        return epoch

    def resume(self, worker: int, workers: int, state: Mapping[str, Any]) -> None:
        """A worker was handed the state to begin at, and so was every other."""
        self._write(state)
        self._words[_SLOTS + worker] = 0
        self.begin(worker, workers)

    def end(self, worker: int, workers: int, epoch: int) -> None:
        """A worker has made its last batch before `epoch`."""
        self._words[_SLOTS + worker] = epoch * (_MOST + 1) + workers

    def _write(self, state: Mapping[str, Any]) -> None:
        text = json.dumps(state).encode()
        if len(text) > _BYTES:
            raise UsageError("state", "too large to hand to workers", f"at most {_BYTES:,} bytes", len(text))
        self._memory[8 * _WORDS :][: len(text)].numpy()[:] = np.frombuffer(text, np.uint8)
        self._words[_LENGTH], self._words[_EPOCH] = len(text), state["epoch"]
