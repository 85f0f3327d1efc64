import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sa1b_wds.errors import StateMismatch, UsageError
from sa1b_wds.order import Leg, Order
from sa1b_wds.state import State, fingerprint, merge_states

legs = st.lists(
    st.builds(
        lambda w, b, k, n, p, t: Leg(w, b, k * p, n, p, t),
        *[st.integers(1, 9)] * 3, st.integers(1, 99), st.integers(1, 4), st.integers(0, 99),
    ),
    max_size=4,
)  # fmt: skip


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), legs)
def test_round_trip_through_json(seed: int, epoch: int, run: list[Leg]) -> None:
    state = State(fingerprint="f", seed=seed, epoch=epoch, legs=tuple(run))
    assert State.from_dict(json.loads(json.dumps(state.to_dict()))) == state


def test_golden() -> None:
    state = State(fingerprint="f", seed=1, epoch=2, legs=(Leg(2, 8, 32, 32, 1, 5), Leg(2, 4, 32, 32, 2, (7, 8))))
    text = '{"format": "sa1b-wds-state/1", "fingerprint": "f", "seed": 1, "epoch": 2, '
    text += '"legs": [[2, 8, 32, 32, 1, 5], [2, 4, 32, 32, 2, [7, 8]]]}'
    assert json.dumps(state.to_dict()) == text
    assert State.from_dict(json.loads(text)) == state
    assert fingerprint([("a.tar", 3, "00")], "d", True) == (
        "41a48cdbadbdcdb79a894051549e41a4b886b20489b7beff326fe3f2577638ee"
    )


GOOD = State(fingerprint="f", seed=1, epoch=2, legs=(Leg(2, 8, 32, 32, 1, 5),)).to_dict()


@pytest.mark.parametrize(
    "wrong",
    [
        {"format": "sa1b-wds-state/2"}, {"format": None}, {"seed": -1}, {"seed": "0"}, {"epoch": 1 << 64},
        {"fingerprint": 3}, {"legs": None}, {"legs": [[1, 2]]}, {"legs": [[0, 8, 32, 32, 1, 5]]}, {"more": 1},
        {"legs": [[2, 8, 32, 32, 1, [1, 2, 3]]]},
        {"legs": [[1 << 40, 8, 32, 32, 1, 5]]}, {"legs": [[2, 8, 32, 32, 1, -1]]},
    ],
)  # fmt: skip
def test_damaged_states_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(StateMismatch):
        State.from_dict({**GOOD, **wrong})


@pytest.mark.parametrize("wrong", [None, [], "state", {}])
def test_what_is_no_state(wrong: object) -> None:
    with pytest.raises(StateMismatch):
        State.from_dict(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"epoch": 1 << 64}, {"seed": 0.5}])
def test_seeds_and_epochs_have_limits(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        State(**{"fingerprint": "", "seed": 0, "epoch": 0, **wrong})  # type: ignore[arg-type]


def ranks(*batches: int, **other: object) -> list[dict[str, object]]:
    first = Leg(3, 2, 4, 8, 1, 9)
    return [
        {**State(fingerprint="f", seed=1, epoch=2, legs=(first, Leg(len(batches), 2, 4, 8, 1, t))).to_dict(), **other}
        for t in batches
    ]


def test_merge() -> None:
    assert merge_states(ranks(5, 5, 5))["legs"][-1] == [3, 2, 4, 8, 1, 5]
    merged = merge_states(ranks(5, 7, 6))
    assert merged["legs"][-1] == [3, 2, 4, 8, 1, [5, 7, 6]]
    assert merge_states([merged] * 3) == merged  # each was resumed from a merged one and has not moved
    fresh = State(fingerprint="f", seed=1, epoch=2).to_dict()
    assert merge_states([fresh, fresh]) == fresh


def test_merge_when_some_have_ended_the_epoch() -> None:
    counts = [10, 20]
    behind = State(fingerprint="f", seed=1, epoch=2, legs=(Leg(2, 2, 4, 8, 1, 6),)).to_dict()
    over = State(fingerprint="f", seed=1, epoch=3).to_dict()
    state = State.from_dict(merge_states([over, behind]))
    assert state.epoch == 2
    order = Order(counts, 1, 2, [*state.legs, Leg(1, 1, 1, 1)])
    assert order.cut.n == 30 - 14 - 12  # rank 0 had all its 7 batches, of two
    assert order.delivered == 7


@pytest.mark.parametrize(
    "states",
    [
        [],
        ranks(1, 2, 3)[:2],
        [*ranks(1, 2), ranks(1, 2, 3)[2]],
        [*ranks(1, 2, 3)[:2], *ranks(1, 1, 1, seed=7)[:1]],
        [*ranks(1, 2, 3)[:2], *ranks(1, 1, 1, fingerprint="g")[:1]],
        [*ranks(1, 2, 3)[:2], *ranks(1, 1, 1, epoch=4)[:1]],
        [*ranks(1, 2, 3)[:2], {**ranks(1, 1, 1)[0], "legs": ranks(1, 1, 1)[0]["legs"][1:]}],  # type: ignore[index]
    ],
)
def test_states_that_do_not_belong_together(states: list[dict[str, object]]) -> None:
    with pytest.raises(StateMismatch):
        merge_states(states)
