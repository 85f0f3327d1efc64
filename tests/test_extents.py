"""Stretches, pages and who goes first, against their definitions; and a cache's books against a model of them."""

import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sa1b_wds import cache, extents
from sa1b_wds.extents import KEY, PAGE, Stretch, pages, runs, stretches, victims

SPANS = st.lists(st.integers(2, 400).map(lambda blocks: 512 * blocks), min_size=1, max_size=60)
BYTE = st.binary(min_size=1, max_size=1)
SMALL = 1 << 16


def offsets_of(spans: list[int]) -> extents.I64:
    return np.concatenate([[0], np.cumsum(spans)]).astype(np.int64)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(extents, "STRETCH", SMALL)
    yield


@given(SPANS)
def test_every_sample_is_in_one_stretch_that_it_begins_in(spans: list[int]) -> None:
    extents.STRETCH = SMALL  # the fixture's value; hypothesis runs many examples in one test
    offsets = offsets_of(spans)
    seen = []
    for number in range(stretches(int(offsets[-1]) + 1024)):
        stretch, first = Stretch.of(offsets, number)
        for i in range(len(stretch)):
            assert int(offsets[first + i]) // SMALL == number
            assert int(stretch.begins[i]) == int(offsets[first + i] - offsets[first])
            assert int(stretch.begins[i + 1] - stretch.begins[i]) == spans[first + i]
        assert stretch.head % PAGE == 0
        assert stretch.head >= KEY + len(stretch)
        assert not len(stretch) or stretch.length == stretch.head + sum(spans[first : first + len(stretch)])
        seen += list(range(first, first + len(stretch)))
    assert seen == list(range(len(spans)))


@given(SPANS, st.data())
def test_what_is_counted_covers_every_page_that_is_touched(spans: list[int], data: st.DataObject) -> None:
    stretch = Stretch(begins=offsets_of(spans))
    chosen = data.draw(st.sets(st.integers(0, len(spans) - 1)))
    touched = set()
    for i in chosen:
        begin, end = int(stretch.begins[i]), int(stretch.begins[i + 1])
        touched |= set(range(begin // PAGE, (end - 1) // PAGE + 1))
        assert stretch.pages(i, i + 1).tolist() == [pages(begin, end)]
    counted = sum(int(stretch.pages(i, i + 1)[0]) for i in chosen)
    assert len(touched) <= counted <= len(touched) + len(chosen)


@given(st.lists(st.booleans()))
def test_runs(mask: list[bool]) -> None:
    found = runs(np.array(mask, np.bool_))
    again = np.zeros(len(mask), np.bool_)
    for a, b in found:
        assert a < b
        assert not again[a:b].any()
        assert a == 0 or not mask[a - 1]
        again[a:b] = True
    assert again.tolist() == mask


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 9)), max_size=200),
    st.integers(-5, 1200),
    st.one_of(st.none(), st.integers(0, 199)),
)
def test_the_least_recently_used_go_and_no_more_than_must(
    files: list[tuple[int, int]], wanted: int, spare: int | None
) -> None:
    used, have = (np.array([file[k] for file in files], np.int64) for k in (0, 1))
    out = victims(used, have, wanted, spare).tolist()
    may = [i for i in range(len(files)) if have[i] and i != spare]
    assert len(set(out)) == len(out)
    assert set(out) <= set(may)
    left = set(may) - set(out)
    assert all(used[i] <= used[j] for i in out for j in left)
    freed = [int(have[i]) for i in out]
    assert sum(freed) >= min(wanted, sum(int(have[i]) for i in may))
    assert not out or sum(freed[:-1]) < wanted


class Books(RuleBasedStateMachine):
    """A cache of two data sets of a few stretches, and what it should hold, by plain means."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.size = 40 * PAGE
        self.sets = [cache.Cache(self.folder.name, self.size, digest * 64, [900_000, 500_000]) for digest in "ab"]
        self.stretch = Stretch(begins=offsets_of([1024, 8192, 512 * 37, PAGE, 1536]))
        self.model: dict[tuple[int, int], dict[int, bytes]] = {}  # the least recently used first
        self.now = 0
        for each in self.sets:
            each.prepare()

    def teardown(self) -> None:
        self.folder.cleanup()

    def cost(self, held: dict[int, bytes]) -> int:
        return 1 + sum(int(self.stretch.pages(i, i + 1)[0]) for i in held)

    def file(self, which: int, number: int) -> cache.PartFile:
        return self.sets[which].shard(0, "x", "y").file(number, self.stretch)

    @rule(which=st.integers(0, 1), number=st.integers(0, 4), i=st.integers(0, 4), byte=BYTE)
    def keep(self, which: int, number: int, i: int, byte: bytes) -> None:
        file = self.file(which, number)
        if not file.whole(i, i + 1)[0]:
            file.claim(i, i + 1, threading.Event())
            data = byte * int(self.stretch.begins[i + 1] - self.stretch.begins[i])
            kept = self.sets[which].reserve(file, i, i + 1)
            if kept:
                file.write(i, memoryview(data))
            held = self.model.pop((which, number), {})
            wanted = {**held, i: data}
            while sum(map(self.cost, self.model.values())) + self.cost(wanted) > self.size // PAGE and self.model:
                del self.model[next(iter(self.model))]
            fits = self.cost(wanted) <= self.size // PAGE
            assert kept == fits
            if fits:
                self.model[which, number] = wanted
            elif held:
                self.model[which, number] = held
        file.close()

    @rule(which=st.integers(0, 1), number=st.integers(0, 4))
    def use(self, which: int, number: int) -> None:
        if (which, number) in self.model:
            self.sets[which].touch(number)
            self.model[which, number] = self.model.pop((which, number))

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        """Dropped, then kept again: nothing is counted twice."""
        (which, number), held = data.draw(st.sampled_from(sorted(self.model.items(), key=lambda x: x[0])))
        i = data.draw(st.sampled_from(sorted(held)))
        file = self.file(which, number)
        file.drop(i)
        assert not file.whole(i, i + 1)[0]
        assert self.sets[which].reserve(file, i, i + 1)
        file.write(i, memoryview(held[i]))
        file.close()
        self.model[which, number] = self.model.pop((which, number))

    @rule(garbage=st.binary(min_size=4, max_size=4))
    def damage(self, garbage: bytes) -> None:
        """The sum is garbage: it is found again."""
        path = Path(self.folder.name) / "sa1b-wds-cache-1" / "accounts"
        with path.open("r+b") as accounts:
            accounts.write(garbage)

    @invariant()
    def the_same(self) -> None:
        assert self.sets[0].used == sum(map(self.cost, self.model.values())) * PAGE <= self.size
        for which in range(2):
            for number in range(5):
                held = self.model.get((which, number), {})
                file = self.file(which, number)
                assert np.flatnonzero(file.whole(0, 5)).tolist() == sorted(held)
                for i, data in held.items():
                    view = memoryview(bytearray(len(data)))
                    assert file.read(i, view)
                    assert view == data
                file.close()


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=50)
