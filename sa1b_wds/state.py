"""The state of a loader: small, exact, plain JSON, and the same on every rank.

    {"format": "sa1b-wds-state/1", "fingerprint": …, "seed": 0, "epoch": 3,
     "legs": [[world, batch, lanes, block, workers, batches], …]}

`batches` counts what `next()` returned on every rank; a list, one entry a rank, where they were not in step.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from .errors import StateMismatch, UsageError
from .order import Leg

FORMAT = "sa1b-wds-state/1"

ALL = 1 << 62
"""Batches of a rank that ended the epoch, where their number is not known; an `Order` takes it for all there are."""

LIMIT = 1 << 26
"""Lanes of a leg, over all ranks: beyond it a state is a mistake, and would take the memory of one."""


class _Stored(msgspec.Struct, forbid_unknown_fields=True):
    format: str
    fingerprint: str
    seed: int
    epoch: int
    legs: list[tuple[int, int, int, int, int, int | list[int]]]


@dataclass(frozen=True, kw_only=True)
class State:
    """Where a run stands."""

    fingerprint: str
    """What it runs over: `fingerprint()`."""
    seed: int
    """0 ≤ seed < 2^64."""
    epoch: int
    """0 ≤ epoch < 2^64."""
    legs: tuple[Leg, ...] = ()
    """The runs so far in this epoch, the last of them the one that goes on."""

    def __post_init__(self) -> None:
        for name in ("seed", "epoch"):
            value = getattr(self, name)
            if not isinstance(value, int) or not 0 <= value < 1 << 64:
                raise UsageError(name, "out of range", "0 to 2^64 - 1", value)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            "epoch": self.epoch,
            "legs": [
                [
                    x.world,
                    x.batch,
                    x.lanes,
                    x.block,
                    x.workers,
                    list(x.batches) if isinstance(x.batches, tuple) else x.batches,
                ]
                for x in self.legs
            ],
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> "State":
        """The state that `to_dict` wrote.

        Raises:
            StateMismatch: anything else, or a version this release does not know.
        """
        if not isinstance(state, Mapping) or state.get("format") != FORMAT:
            found = state.get("format") if isinstance(state, Mapping) else type(state).__name__
            raise StateMismatch("state", "not a state this release knows", FORMAT, found)
        try:
            stored = msgspec.convert(dict(state), _Stored)
            legs = [Leg(*x[:5], tuple(x[5]) if isinstance(x[5], list) else x[5]) for x in stored.legs]
            made = cls(fingerprint=stored.fingerprint, seed=stored.seed, epoch=stored.epoch, legs=tuple(legs))
        except (msgspec.ValidationError, UsageError) as error:
            raise StateMismatch("state", f"damaged: {error}") from None
        for leg in legs:
            if leg.world * leg.lanes > LIMIT:
                raise StateMismatch("state", "damaged: lanes of all ranks", f"at most {LIMIT:,}", leg.world * leg.lanes)
        return made


def fingerprint(shards: Sequence[tuple[str, int, str]], selection: str, drop_last: bool) -> str:
    """What a state is bound to: never the location, nor how images and masks are made.

    Args:
        shards: (name, samples, digest) of each, in order.
        selection: its digest.
        drop_last: since it decides where an epoch ends.
    """
    return hashlib.sha256(msgspec.json.encode([shards, selection, drop_last])).hexdigest()


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One state of those of all ranks, in the order of the ranks, for when they were not in step.

    Raises:
        StateMismatch: states of different runs, or not one of each rank.
    """
    if not states:
        raise StateMismatch("merge_states", "no states")
    parsed = [State.from_dict(state) for state in states]
    epoch = min(state.epoch for state in parsed)
    first = next(state for state in parsed if state.epoch == epoch)
    for rank, state in enumerate(parsed):
        if state.epoch == epoch + 1 and not any(leg.most for leg in state.legs):
            continue  # it has just ended the epoch that others are still in
        for name in ("fingerprint", "seed", "epoch"):
            if getattr(state, name) != getattr(first, name):
                raise StateMismatch(
                    f"state {rank}", f"of another run: {name}", getattr(first, name), getattr(state, name)
                )
        if state.legs[:-1] != first.legs[:-1] or [x.shape for x in state.legs] != [x.shape for x in first.legs]:
            raise StateMismatch(
                f"state {rank}", "of another run: legs", first.to_dict()["legs"], state.to_dict()["legs"]
            )
    if not first.legs:
        return first.to_dict()
    last = first.legs[-1]
    if last.world != len(states):
        raise StateMismatch("merge_states", "one state of each rank", last.world, len(states))
    had = [state.legs[-1].batches if state.epoch == epoch else ALL for state in parsed]
    each = [x[rank] if isinstance(x, tuple) else x for rank, x in enumerate(had)]
    leg = replace(last, batches=each[0] if len(set(each)) == 1 else tuple(each))
    return replace(first, legs=(*first.legs[:-1], leg)).to_dict()
