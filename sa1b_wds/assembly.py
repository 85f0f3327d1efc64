"""A batch under construction: slots decoded in any order by any thread, then finished in the same way."""

from typing import Any, cast

import numpy as np
import numpy.typing as npt

from .batch import Batch, Memory
from .decode import OF_MASKS, Arrays, DecodeCost, View
from .errors import Sa1bError
from .reader import PackedSample
from .schedule import Plan


class Assembly:
    """One batch, its arrays, and what became of its slots."""

    def __init__(self, plan: Plan, view: View, memory: Memory) -> None:
        self.plan = plan
        self._view = view
        self._arrays = memory.arrays(view.layout(len(plan.slots)))
        self._masks: dict[int, Arrays] = {}
        self._keys: list[str] = [""] * len(plan.slots)
        self.errors: dict[int, Sa1bError] = {}
        """Of the slots that could not be decoded."""
        self.left = sum(slot.id is not None for slot in plan.slots)
        """Slots to come; whoever brings it to 0 calls `finish`."""
        self.done: Batch | None = None

    def decode(self, slot: int, sample: PackedSample, seed: int, epoch: int, cost: DecodeCost) -> None:
        """Decode a sample into a slot; the slots of a batch may be decoded at the same time.

        Raises:
            FormatError, ShardDamaged: it cannot be decoded.
        """
        row = {name: array[slot, ...] for name, array in self._arrays.items()}
        self._masks[slot] = self._view.decode(sample, row, seed, epoch, cost)
        self._keys[slot] = sample.key

    def finish(self, epoch: int) -> None:
        """Fill the slots that repeat others or could not be decoded, and make the batch."""
        slots = self.plan.slots
        good = [i for i, slot in enumerate(slots) if slot.id is not None and i not in self.errors]
        padding = np.array([slot.padding for slot in slots])
        of = np.arange(len(slots))
        for i, slot in enumerate(slots):
            of[i] = i if slot.id is not None else slot.repeats
            if of[i] in self.errors:
                padding[i] = True
                # A repeat of the first sound sample; with none in the batch the place is blank.
                of[i] = good[0] if good else -1
        for i in np.flatnonzero(of != np.arange(len(slots))).tolist():
            for array in self._arrays.values():
                array[i] = array[of[i]] if of[i] >= 0 else 0
            self._keys[i] = self._keys[of[i]] if of[i] >= 0 else ""
        batch: dict[str, Any] = dict(self._arrays)
        if self._view.masks_per_image is None:
            batch |= self._ragged(of.tolist())
        if self._view.has_runs:
            batch |= self._runs(of.tolist())
        batch |= {"key": self._keys, "is_padding": padding, "step": np.array([epoch, self.plan.number], np.int64)}
        self.done = cast(Batch, batch)
        self._arrays, self._masks = {}, {}

    def _ragged(self, of: list[int]) -> dict[str, npt.NDArray[Any]]:
        rows = self._view.of_masks()
        none = {name: np.empty((0, *shape), dtype) for name, (shape, dtype) in rows.items()}
        parts = [self._masks[i] if i >= 0 else none for i in of]
        offsets = np.cumsum([0, *(len(part["boxes"]) for part in parts)], dtype=np.int64)
        return {name: np.concatenate([part[name] for part in parts]) for name in OF_MASKS if name in rows} | {
            "offsets": offsets
        }

    def _runs(self, of: list[int]) -> dict[str, npt.NDArray[Any]]:
        places = np.zeros((self._view.masks_per_image or 0) + 1, np.int64)
        none: Arrays = {"run_ends": np.empty(0, np.int32), "run_offsets": places}
        parts = [self._masks[i] if i >= 0 else none for i in of]
        lengths = np.concatenate([part["run_offsets"][1:] - part["run_offsets"][:-1] for part in parts])
        return {
            "run_ends": np.concatenate([part["run_ends"] for part in parts]),
            "run_offsets": np.concatenate([[0], np.cumsum(lengths)]),
        }
