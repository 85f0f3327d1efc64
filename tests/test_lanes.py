"""Lanes: order within a number, errors out of any thread, nothing left running."""

import threading
import time
from collections import defaultdict

import pytest

from sa1b_wds.lanes import Lanes


def running() -> set[str]:
    return {t.name for t in threading.enumerate() if t.name.startswith("lane-test")}


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_items_of_a_number_keep_their_order(threads: int) -> None:
    done: dict[int, list[int]] = defaultdict(list)

    def work(number: int, item: int) -> None:
        if item % 7 == 0:
            time.sleep(0.0005)
        done[number].append(item)

    with Lanes(work, threads, name="lane-test", depth=3) as lanes:
        for item in range(200):
            lanes.put(item % 5, item)
        lanes.finish()
    assert done == {n: list(range(n, 200, 5)) for n in range(5)}
    assert not running()


def test_an_error_ends_all_lanes_and_reaches_the_caller() -> None:
    started = threading.Event()

    def work(number: int, item: int) -> None:
        if item == 10:
            started.set()
            raise ValueError("item 10")
        time.sleep(0.001)

    with pytest.raises(ValueError, match="item 10"), Lanes(work, 2, name="lane-test", depth=2) as lanes:
        for item in range(1000):
            lanes.put(item, item)
        lanes.finish()
    assert started.is_set()
    assert not running()


def test_the_last_error_is_raised_by_finish() -> None:
    def work(number: int, item: int) -> None:
        raise OSError(28, "no space")

    with pytest.raises(OSError, match="no space"), Lanes(work, 2, name="lane-test") as lanes:
        lanes.put(0, 0)
        lanes.finish()


def test_leaving_early_drops_what_waits() -> None:
    done: list[int] = []
    begun, hold = threading.Event(), threading.Event()

    def work(number: int, item: int) -> None:
        begun.set()
        hold.wait(5)
        done.append(item)

    with pytest.raises(KeyError), Lanes(work, 1, name="lane-test", depth=8) as lanes:
        for item in range(5):
            lanes.put(0, item)
        assert begun.wait(5)
        threading.Timer(0.05, hold.set).start()
        raise KeyError
    assert done == [0]
    assert not running()
