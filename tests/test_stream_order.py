"""Every sample exactly once, whatever the worlds, threads, batch sizes and layouts, and however often it is resumed."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sa1b_wds.dataset import Dataset, open
from sa1b_wds.errors import StateMismatch, UsageError
from sa1b_wds.state import merge_states
from sa1b_wds.stream import Stream

from . import datasets

LAYOUTS = {
    "even": ((24, 4),),
    "uneven": ((13, 3), (40, 2), (3, 3), (1, 1)),
    "one shard": ((37, 1),),
    "singles": ((9, 9),),
}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Dataset]:
    return {
        name: open(datasets.make(tmp_path_factory.mktemp(name.replace(" ", "")), each))
        for name, each in LAYOUTS.items()
    }


def stream(ds: Dataset, rank: int = 0, world: int = 1, **options: Any) -> Stream:
    """Keys matter here, not pixels."""
    few = {"image_size": None, "mask_size": 8, "masks_per_image": 2, "threads": 1, "fetch_threads": 1, "prefetch": 1}
    return ds.stream(rank=rank, world_size=world, **{**few, **options})


def keys(batches: Any) -> list[list[str]]:
    return [[k if not pad else f"({k})" for k, pad in zip(b["key"], b["is_padding"], strict=True)] for b in batches]


def real(batches: Sequence[Sequence[str]]) -> list[str]:
    return [key for batch in batches for key in batch if not key.startswith("(")]


def test_the_union_over_ranks_is_the_epoch(sets: dict[str, Dataset]) -> None:
    rng = random.Random(3)
    for name, ds in sets.items():
        for _ in range(6):
            world, batch, drop = rng.choice([1, 2, 3, 5, 8]), rng.choice([1, 2, 3, 8]), rng.random() < 0.5
            seed, epoch = rng.randrange(9), rng.randrange(9)
            ranks = []
            for rank in range(world):
                options = {
                    "threads": rng.choice([1, 2, 3]),
                    "fetch_threads": rng.choice([1, 2]),
                    "prefetch": rng.randrange(3),
                }
                s = stream(ds, rank, world, batch_size=batch, seed=seed, epoch=epoch, drop_last=drop, **options)
                got = keys(s)
                assert len(got) == len(s) == (len(ds) // (world * batch) if drop else -(-len(ds) // (world * batch)))
                assert all(len(b) == batch for b in got)
                ranks.append(got)
            had = [key for got in ranks for key in real(got)]
            assert len(set(had)) == len(had), name
            if drop:
                assert len(had) == len(ds) // (world * batch) * world * batch
            else:
                assert sorted(had) == sorted(datasets.keys(ds))


def test_threads_and_budgets_do_not_change_a_byte(sets: dict[str, Dataset]) -> None:
    ds = sets["uneven"]
    first: list[Any] = []
    for options in (
        {"threads": 1, "fetch_threads": 1, "prefetch": 0},
        {"threads": 4, "fetch_threads": 3, "prefetch": 5},
        {"threads": 2, "fetch_threads": 1, "read_ahead": 0},
        {"threads": 1, "fetch_threads": 4, "read_ahead": 20_000},
    ):
        s = stream(ds, 1, 2, batch_size=3, image_size=32, drop_last=False, flip=0.5, scale=(0.5, 2.0), **options)
        got = list(s)
        first = first or got
        assert len(got) == len(first)
        for a, b in zip(got, first, strict=True):
            assert a.keys() == b.keys() and a["key"] == b["key"]
            for name in a:
                assert np.array_equal(a[name], b[name]), (name, options)  # type: ignore[literal-required]


def test_epochs_differ_and_repeat(sets: dict[str, Dataset]) -> None:
    s = stream(sets["even"], batch_size=4)
    one, two = keys(s), keys(s)
    assert s.epoch == 2 and one != two and sorted(real(one)) == sorted(real(two))
    s.set_epoch(0)
    assert keys(s) == one
    s.set_epoch(1)
    it = iter(s)
    assert keys([next(it)]) == two[:1]
    s.set_epoch(1)  # the current one: nothing happens
    assert keys(s) == two[1:]
    assert keys(stream(sets["even"], batch_size=4, epoch=1)) == two
    assert keys(stream(sets["even"], batch_size=4, seed=1)) != one


def test_going_on_after_a_break(sets: dict[str, Dataset]) -> None:
    s = stream(sets["even"], batch_size=2, prefetch=4)
    whole = keys(stream(sets["even"], batch_size=2))
    got = []
    while s.epoch == 0:
        for n, batch in enumerate(s):
            got.append(batch)
            if n == 2:
                break
    assert keys(got) == whole
    assert len(s) == len(whole)


def test_stop_anywhere_and_go_on(sets: dict[str, Dataset]) -> None:
    """grain's check: take a state before every batch, restore each, compare the rest."""
    ds = sets["uneven"]
    options: dict[str, Any] = {"batch_size": 4, "drop_last": False, "seed": 5}
    s = stream(ds, **options)
    whole, states, after = [], [s.state_dict()], []
    for batch in s:
        whole += keys([batch])
        states.append(s.state_dict())
        after.append(s.state_dict(after=batch))
    assert after == [*states[1:]]
    for i, state in enumerate(states):
        again = stream(ds, **options)
        again.load_state_dict(json.loads(json.dumps(state)))
        assert len(again) == len(whole) and again.epoch == 0
        assert keys(again) == whole[i:]
        assert again.epoch == 1


def test_state_after_a_batch_whatever_a_prefetcher_took(sets: dict[str, Dataset]) -> None:
    ds = sets["even"]
    s = stream(ds, batch_size=4)
    batches = [*s, *s]  # far ahead of the one that training is at, over the end of an epoch
    n = len(batches) // 2
    for i in (n - 2, n - 1, n, 2 * n - 1):
        again = stream(ds, batch_size=4)
        again.load_state_dict(s.state_dict(after=batches[i]))
        rest = keys(again)
        if not rest:  # the epoch was over: the next one
            assert i in (n - 1, 2 * n - 1)
            continue
        assert rest == keys(batches[i + 1 : n if i < n else 2 * n])
    with pytest.raises(UsageError, match="epoch"):
        stream(ds, batch_size=4).state_dict(after=batches[-1])


def test_state_after_a_batch_of_a_resumed_epoch(sets: dict[str, Dataset]) -> None:
    ds = sets["even"]
    first = stream(ds, batch_size=5)
    next(iter(first))
    s = stream(ds, batch_size=3)
    s.load_state_dict(first.state_dict())
    batches = list(s)
    states = [s.state_dict(after=b) for b in batches]
    next_epoch = list(s)
    assert [s.state_dict(after=b) for b in batches] == states
    for i, state in enumerate(states):
        again = stream(ds, batch_size=3)
        again.load_state_dict(state)
        assert keys(again) == keys(batches[i + 1 :])
    again.load_state_dict(s.state_dict(after=next_epoch[1]))
    assert keys(again) == keys(next_epoch[2:])


CHAINS = {
    "1 to 3": [(1, 4), (3, 4)],
    "4 to 2": [(4, 2), (2, 2)],
    "8 to 5": [(8, 1), (5, 1)],
    "4 to 2, same global batch": [(4, 2), (2, 4)],
    "again and again": [(1, 4), (3, 2), (8, 1), (5, 2), (2, 3), (1, 1)],
}


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("in_step", [True, False])
def test_resume_on_other_worlds(sets: dict[str, Dataset], chain: str, in_step: bool) -> None:
    for name, ds in sets.items():
        rng = random.Random(f"{chain} {name} {in_step}")
        had: list[str] = []
        state: dict[str, Any] | None = None
        length = 0
        for leg, (world, batch) in enumerate(CHAINS[chain]):
            last = leg == len(CHAINS[chain]) - 1
            ranks = []
            for rank in range(world):
                s = stream(ds, rank, world, batch_size=batch, drop_last=False, seed=11, epoch=2)
                if state is not None:
                    s.load_state_dict(state)
                ranks.append(s)
            assert len({len(s) for s in ranks}) == 1
            to_come = len(ranks[0]) - length
            stop = rng.randrange(to_come + 1)
            states, most = [], 0
            for s in ranks:
                mine = to_come if last else stop if in_step else rng.randrange(to_come + 1)
                it = iter(s)
                got = [next(it) for _ in range(mine)]
                had += real(keys(got))
                states.append(s.state_dict())
                assert s.epoch == 2
                most = max(most, mine)
                s.close()
            length += most
            state = json.loads(json.dumps(merge_states(states)))
            if in_step and not last:
                assert all(x == states[0] for x in states) and state == states[0]
        assert sorted(had) == sorted(datasets.keys(ds)), name


def test_half_the_ranks_go_on_with_the_same_global_batches(sets: dict[str, Dataset]) -> None:
    ds = sets["uneven"]

    def global_batches(streams: list[Stream], n: int | None = None) -> list[set[str]]:
        its = [iter(s) for s in streams]
        out: list[set[str]] = []
        while n is None or len(out) < n:
            batches = [next(it, None) for it in its]
            if batches[0] is None:
                break
            out.append({k for b in batches if b is not None for k in b["key"]})
        return out

    four = [stream(ds, r, 4, batch_size=2) for r in range(4)]
    whole = global_batches([stream(ds, r, 4, batch_size=2) for r in range(4)])
    first = global_batches(four, 2)
    two = [stream(ds, r, 2, batch_size=4) for r in range(2)]
    for s in two:
        s.load_state_dict(four[0].state_dict())
    assert len(two[0]) == len(four[0])
    assert first + global_batches(two) == whole


def test_drop_last_drops_less_than_one_global_batch(sets: dict[str, Dataset]) -> None:
    ds = sets["uneven"]
    first = [stream(ds, r, 2, batch_size=3) for r in range(2)]
    had = []
    for s in first:
        it = iter(s)
        had += real(keys([next(it) for _ in range(2)]))
        s.close()
    rest = stream(ds, batch_size=5)
    rest.load_state_dict(first[0].state_dict())
    got = real(keys(rest))
    assert len(ds) - 5 < len(had) + len(got) <= len(ds) and not set(had) & set(got)


def test_whole_batches_of_padding(sets: dict[str, Dataset]) -> None:
    """9 samples, 8 ranks of 2: the last rank has a batch with one sample, or none at all."""
    ds = sets["singles"]
    for world, batch in ((8, 2), (13, 1), (13, 2)):
        all_keys = datasets.keys(ds)
        had = []
        for rank in range(world):
            got = keys(stream(ds, rank, world, batch_size=batch, drop_last=False))
            assert len(got) == 1
            had += real(got)
            assert all(k.strip("()") in all_keys for k in got[0])
        assert sorted(had) == sorted(all_keys)


def test_a_selection_is_streamed_alone(sets: dict[str, Dataset]) -> None:
    ds = sets["uneven"]
    some = datasets.keys(ds)[3:40:3]
    for part in (ds.select(some), ds[5:31], ds.take(1)):
        got = [k for r in range(2) for k in real(keys(stream(part, r, 2, batch_size=3, drop_last=False)))]
        assert sorted(got) == sorted(datasets.keys(part))
    assert list(stream(ds.take(0))) == [] == list(stream(ds.take(0), drop_last=False))
    assert len(stream(ds.take(0))) == 0


def test_states_of_other_data_are_refused(sets: dict[str, Dataset]) -> None:
    ds = sets["even"]
    state = stream(ds).state_dict()
    for other in (stream(sets["uneven"]), stream(ds[1:]), stream(ds, drop_last=False)):
        with pytest.raises(StateMismatch, match="belongs to other data"):
            other.load_state_dict(state)
    with pytest.raises(StateMismatch):
        stream(ds).load_state_dict({})
    other = stream(ds, image_size=16, mask_size=4, masks_per_image=3, flip=1.0, seed=7, epoch=9)
    other.load_state_dict(state)  # how images and masks are made has no part in it; seed and epoch are the state's
    assert (other.seed, other.epoch) == (0, 0)


def test_without_a_manifest_and_from_a_command(sets: dict[str, Dataset], tmp_path: Path) -> None:
    ds = sets["uneven"]
    whole = keys(stream(ds, batch_size=3, drop_last=False))
    folder = datasets.without_manifest(Path(ds.where), tmp_path / "plain")
    plain = open(folder)
    assert keys(stream(plain, batch_size=3, drop_last=False)) == whole
    piped = open(f"pipe:cat {folder}/sa1b-train-{{000000..000008}}.tar")
    assert piped.fingerprint(True) == plain.fingerprint(True)
    s = stream(piped, batch_size=3, drop_last=False, fetch_threads=2)
    it = iter(s)
    first = keys([next(it) for _ in range(7)])
    s.close()
    again = stream(plain, batch_size=3, drop_last=False)
    again.load_state_dict(s.state_dict())
    assert first + keys(again) == whole


def test_workers_of_a_rank_share_its_batches(sets: dict[str, Dataset]) -> None:
    ds = sets["uneven"]
    bare = stream(ds, batch_size=3, drop_last=False)
    assert keys(bare.in_worker(0, 1)) == keys(bare)
    for workers in (2, 3):
        for drop in (False, True):
            s = stream(ds, 1, 2, batch_size=3, drop_last=drop)
            other = stream(ds, 0, 2, batch_size=3, drop_last=drop)
            each = [keys(s.in_worker(p, workers)) for p in range(workers)]
            numbers = [int(b["step"][1]) for b in s.in_worker(1, workers)]
            assert numbers == list(range(1, len(s.in_worker(0, workers)), workers))
            assert sum(map(len, each)) == len(s.in_worker(0, workers))
            had = [k for e in each for k in real(e)] + [
                k for p in range(workers) for k in real(keys(other.in_worker(p, workers)))
            ]
            assert len(set(had)) == len(had)
            if not drop:
                assert sorted(had) == sorted(datasets.keys(ds))


@pytest.mark.slow
def test_many_shapes(sets: dict[str, Dataset]) -> None:
    rng = random.Random(8)
    for _ in range(60):
        ds = sets[rng.choice(list(sets))]
        had: list[str] = []
        state: dict[str, Any] | None = None
        legs = rng.randrange(1, 5)
        for leg in range(legs):
            world, batch = rng.choice([1, 2, 3, 4, 5, 8]), rng.choice([1, 2, 3, 7])
            streams = [
                stream(ds, r, world, batch_size=batch, drop_last=False, threads=rng.choice([1, 2]))
                for r in range(world)
            ]
            for s in streams:
                if state is not None:
                    s.load_state_dict(state)
            order = streams[0].order
            stop = order.left if leg == legs - 1 else rng.randrange(order.left + 1)
            for s in streams:
                it = iter(s)
                had += real(keys([next(it) for _ in range(stop)]))
                s.close()
            state = streams[-1].state_dict()
        assert sorted(had) == sorted(datasets.keys(ds))
