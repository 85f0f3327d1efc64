from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sa1b_wds.errors import UsageError
from sa1b_wds.selection import Selection, parse_split

COUNTS = [5, 9, 7, 4]  # 25
SPLITS = {
    "train": [(0, 25)],
    "train[:]": [(0, 25)],
    "train[:1%]": [],  # round(0.25)
    "train[:10%]": [(0, 2)],  # round(2.5), half to even, as TFDS
    "train[10%:20%]": [(2, 5)],
    "train[:50%]": [(0, 12)],
    "train[50%:]": [(12, 25)],
    "train[-20%:]": [(20, 25)],
    "train[:-20%]": [(0, 20)],
    "train[:0.5%]+train[99.5%:]": [],
    "train[2%:6%]": [(0, 2)],  # 0.5 and 1.5 round to 0 and 2
    "train[10:20]": [(10, 20)],
    "train[-5:]": [(20, 25)],
    "train[:1_0]": [(0, 10)],
    "train[5:5]": [],
    "train[:2shard]": [(0, 14)],
    "train[1shard:3shard]": [(5, 21)],
    "train[-1shard:]": [(21, 25)],
    "train[1shard]": [(5, 14)],
    "train[-1shard]": [(21, 25)],
    "train[20:] + train[:3]": [(0, 3), (20, 25)],
}


@pytest.mark.parametrize("split", SPLITS)
def test_notation(split: str) -> None:
    assert parse_split(split, COUNTS) == SPLITS[split]


@pytest.mark.parametrize(
    "split",
    [
        "", "test", "train[", "train[10]", "train[10%]", "train[:1.5]", "train[:101%]", "train[:26]", "train[-26:]",
        "train[:5shard]", "train[1:2:3]", "train[a:b]", "train[10:20%]", "train[:1%]+", "train[:10]+train[9:12]",
    ],
)  # fmt: skip
def test_refused(split: str) -> None:
    with pytest.raises(UsageError, match="split"):
        parse_split(split, COUNTS)


@given(st.integers(0, 100_000), st.lists(st.integers(0, 100), min_size=1, max_size=8))
def test_percentages_tile_and_round_as_tfds(total: int, bounds: list[int]) -> None:
    edges = [0, *sorted(bounds), 100]
    got = []
    for a, b in pairwise(edges):
        ranges = parse_split(f"train[{a}%:{b}%]", [total])
        # tensorflow_datasets.core.splits: int(round(boundary * num_examples / 100.))
        assert sum(y - x for x, y in ranges) == round(b * total / 100.0) - round(a * total / 100.0)
        got += ranges
    assert sum(b - a for a, b in got) == total


counts = st.lists(st.integers(1, 12), min_size=1, max_size=12)


@given(counts, st.data())
def test_ranges_and_places_are_one_form(counts: list[int], data: st.DataObject) -> None:
    line = [(s, i) for s, n in enumerate(counts) for i in range(n)]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(line)), min_size=2, max_size=8)))
    ranges = [(a, b) for a, b in zip(cuts[::2], cuts[1::2], strict=False)]
    chosen = [line[x] for a, b in ranges for x in range(a, b)]
    chosen = list(dict.fromkeys(chosen))
    selection = Selection.of_ranges(counts, ranges)
    assert len(selection) == len(chosen)
    assert [selection.at(i) for i in range(len(chosen))] == chosen
    if chosen:
        mixed = data.draw(st.permutations(chosen))
        assert Selection.of_places(*zip(*mixed, strict=True)).digest == selection.digest
    assert [place for place in line if selection.find(*place)] == chosen
    a, b = sorted(data.draw(st.tuples(st.integers(0, len(chosen)), st.integers(0, len(chosen)))))
    part = selection.part(a, b)
    assert [part.at(i) for i in range(len(part))] == chosen[a:b]
    assert len(part.shard) == len({shard for shard, _ in chosen[a:b]})  # no part without a sample
    # What an order asks: many samples of many parts at once.
    p = np.repeat(np.arange(len(selection.shard)), selection.count)
    i = np.concatenate([np.arange(n) for n in selection.count]) if len(p) else p
    assert list(zip(*(x.tolist() for x in selection.places(p, i)), strict=True)) == chosen


def test_an_empty_part_in_the_middle_of_a_list() -> None:
    for selection in (Selection.of_places([0, 0], [0, 2]), Selection.of_ranges([3], [(0, 3)])):
        part = selection.part(1, 1)
        assert len(part) == 0 == len(part.shard)


def test_the_whole_and_the_sum_of_its_parts_are_the_same() -> None:
    whole = Selection.of_ranges(COUNTS, parse_split("train", COUNTS))
    parts = Selection.of_ranges(COUNTS, parse_split("train[50%:]+train[:50%]", COUNTS))
    assert whole.digest == parts.digest
    assert whole.digest != Selection.of_ranges(COUNTS, parse_split("train[1:]", COUNTS)).digest


def test_golden_digest() -> None:
    """Part of the fingerprint of a state."""
    selection = Selection.of_places([3, 0, 3, 1, 1], [0, 2, 3, 4, 5])
    assert selection.digest == "522fce5f2132c4d3c54074bb8529414644f6de6259b01a0098fa70bf074bb4f9"
