"""The machinery: threads that end, memory that is bounded, metrics that add up, processes that share nothing."""

import gc
import json
import logging
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sa1b_wds.batch import Memory
from sa1b_wds.dataset import Dataset, open
from sa1b_wds.decode import View
from sa1b_wds.errors import ShardDamaged, StorageError
from sa1b_wds.order import Leg, Order
from sa1b_wds.pipe import Pipe
from sa1b_wds.ranged import LocalFile
from sa1b_wds.reader import Shard
from sa1b_wds.schedule import Schedule
from sa1b_wds.stream import Stream

from . import datasets


@pytest.fixture(scope="module")
def ds(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return open(datasets.make(tmp_path_factory.mktemp("set"), ((40, 3), (20, 2))))


def stream(ds: Dataset, **options: Any) -> Stream:
    few = {"image_size": 32, "mask_size": 8, "masks_per_image": 2, "threads": 2, "batch_size": 3, "prefetch": 2}
    return ds.stream(**{"rank": 0, "world_size": 1, **few, **options})


def ours() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("sa1b-wds")]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    gc.collect()
    assert ours() == []


def test_threads_end_with_the_epoch(ds: Dataset) -> None:
    s = stream(ds)
    it = iter(s)
    next(it)
    assert ours()
    list(it)
    assert ours() == []


def test_threads_end_with_a_break(ds: Dataset) -> None:
    s = stream(ds)
    for _ in s:
        break
    assert ours() == []
    for i, _ in enumerate(s):
        if i == 5:
            break
    assert ours() == [] and s.state_dict()["legs"][-1][-1] == 7


def test_threads_end_with_an_exception_in_the_loop(ds: Dataset) -> None:
    def train() -> None:
        for _ in stream(ds):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    assert ours() == []


def test_threads_end_with_close_and_with(ds: Dataset) -> None:
    s = stream(ds)
    it = iter(s)
    next(it)
    s.close()
    assert ours() == []
    s.close()
    assert next(it, None) is None  # not the end of the epoch
    assert s.epoch == 0
    with stream(ds) as s:
        it = iter(s)
        next(it)
    assert ours() == []


def test_threads_end_with_a_new_iteration_a_state_or_an_epoch(ds: Dataset) -> None:
    s = stream(ds)
    one = iter(s)
    next(one)
    two = iter(s)
    next(two)
    assert ours() and next(one, None) is None
    s.load_state_dict(s.state_dict())
    assert ours() == [] and next(two, None) is None
    it = iter(s)
    next(it)
    s.set_epoch(4)
    assert ours() == [] and s.epoch == 4


def test_threads_end_when_everything_is_let_go_of(ds: Dataset) -> None:
    it = iter(stream(ds))
    next(it)
    del it
    assert ours() == []


def test_threads_end_while_they_are_at_work(ds: Dataset) -> None:
    for wait in (0.0, 0.001, 0.01):
        s = stream(ds, prefetch=50, threads=3)
        it = iter(s)
        next(it)
        time.sleep(wait)
        s.close()
        assert ours() == []


def test_a_command_that_hangs_is_ended(ds: Dataset, tmp_path: Path) -> None:
    folder = datasets.without_manifest(Path(ds.where), tmp_path / "plain")
    name = datasets.tars(folder)[0]
    flag = tmp_path / "slow"
    plain = open(f"pipe:if [ -e {flag} ]; then head -c 20000 {name}; sleep 300; else cat {name}; fi")
    flag.touch()
    s = stream(plain, batch_size=1, prefetch=0)
    it = iter(s)
    next(it)
    begin = time.monotonic()
    timer = threading.Timer(0.3, s.close)
    timer.start()
    while next(it, None) is not None:
        pass
    timer.join()
    assert time.monotonic() - begin < 20


def test_a_bug_in_a_thread_reaches_the_consumer(ds: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError("no more")

    monkeypatch.setattr(View, "decode", fail)
    with pytest.raises(MemoryError, match="no more"):
        list(stream(ds))
    assert ours() == []
    monkeypatch.undo()
    monkeypatch.setattr(Shard, "read", fail)
    with pytest.raises(MemoryError, match="no more"):
        list(stream(ds))


class Slow:
    """Counts what is held while a consumer does nothing."""

    def __init__(self, s: Stream) -> None:
        self.stream, self.most = s, 0

    def watch(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.most = max(self.most, self.stream.stats().held)
            time.sleep(0.002)


@pytest.mark.parametrize("budget", [0, 20_000, 60_000, 1 << 30])
def test_read_ahead_stays_in_its_budget(ds: Dataset, budget: int) -> None:
    largest = max(int(np.diff(datasets.offsets(ds, s)).max()) for s in range(5))
    s = stream(ds, read_ahead=budget, batch_size=2, prefetch=1, fetch_threads=3)
    slow = Slow(s)
    it, n = iter(s), 0
    for _ in range(4):
        next(it)
        slow.watch(0.05)
        n += 1
    assert len([*it]) + n == 30
    total = sum(int(datasets.offsets(ds, x)[-1]) for x in range(5))
    # The budget, what the next batch needs whatever it says, and the error of the guess of a sample's size.
    assert slow.most <= min(budget + 3 * largest, total) + largest
    if budget == 1 << 30:
        assert slow.most > total / 3  # it does read ahead


def test_batches_ahead_are_bounded(ds: Dataset) -> None:
    for prefetch in (0, 1, 4):
        s = stream(ds, prefetch=prefetch)
        it = iter(s)
        next(it)
        time.sleep(0.2)
        assert s.stats().samples <= 3 * (prefetch + 2)
        list(it)
    s.close()


def test_small_budgets_and_large_ones_read_each_byte_once(ds: Dataset) -> None:
    total = sum(int(datasets.offsets(ds, x)[-1]) for x in range(5))
    for budget in (0, 30_000, 1 << 30):
        s = stream(ds, read_ahead=budget, drop_last=False)
        list(s)
        assert s.stats().bytes == total


def test_what_is_dropped_is_not_read(ds: Dataset) -> None:
    s = stream(ds, batch_size=50)
    assert len(list(s)) == 1
    assert s.stats().samples == 50
    sizes = [int(x) for n in range(5) for x in np.diff(datasets.offsets(ds, n))]
    assert s.stats().bytes < sum(sizes) - 9 * min(sizes)


def test_stats_add_up_over_iterations(ds: Dataset) -> None:
    s = stream(ds, drop_last=False)
    assert s.stats().batches == 0 and str(s.stats())
    for i, _ in enumerate(s):
        if i == 3:
            break
    assert s.stats().batches == 4
    list(s)
    stats = s.stats()
    assert stats.batches == 20 and stats.samples >= 60 and stats.skipped == stats.retries == 0
    assert (
        stats.masks > 0
        and stats.read > 0
        and stats.check > 0
        and stats.unpack > 0
        and stats.image > 0
        and stats.mask > 0
    )
    assert 0 < stats.decode_busy <= 1 and 0 < stats.fetch_busy <= 1 and 0 < stats.wait <= stats.elapsed
    assert stats.held == stats.ahead == 0 and stats.errors == ()
    assert "samples/s" in str(stats) and stats.bottleneck in str(stats)


def test_the_bottleneck_is_named(ds: Dataset) -> None:
    s = stream(ds, prefetch=4)
    for _ in s:
        time.sleep(0.02)
    assert s.stats().bottleneck == "training"
    s = stream(ds, image_size=512, mask_size=256, threads=1)
    list(s)
    assert s.stats().bottleneck == "decoding"


def test_a_line_now_and_then(ds: Dataset, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "sa1b_wds"):
        list(stream(ds, log_every=None))
        assert not caplog.records
        list(stream(ds, log_every=0.0))
    assert len(caplog.records) == 20 and "rank 0: " in caplog.records[0].message


def test_a_stream_survives_pickling(ds: Dataset) -> None:
    s = stream(ds, batch_size=4, flip=0.5)
    it = iter(s)
    next(it)
    again = pickle.loads(pickle.dumps(s))
    assert again.state_dict() == s.state_dict() and len(again) == len(s)
    for a, b in zip(again, it, strict=True):
        assert a["key"] == b["key"] and np.array_equal(a["masks"], b["masks"])


CODE = """
import json, sys
import sa1b_wds
s = sa1b_wds.open(sys.argv[1]).stream(batch_size=3, image_size=16, mask_size=8, drop_last=False, threads=1)
if len(sys.argv) > 2:
    s.load_state_dict(json.loads(sys.argv[2]))
out, n = [], len(s)
for i, batch in enumerate(s):
    out += [k for k, pad in zip(batch["key"], batch["is_padding"]) if not pad]
    if len(sys.argv) == 2 and i == 2:
        break
print(json.dumps([out, s.state_dict(), n, str(s.world)]))
assert "torch" not in sys.modules and "webdataset" not in sys.modules
"""


def test_real_processes(ds: Dataset) -> None:
    """Ranks that know of each other by the environment alone; three, then two."""

    def run(size: int, state: Any = None) -> list[Any]:
        args = [sys.executable, "-c", CODE, ds.where, *([json.dumps(state)] if state else [])]
        started = [
            subprocess.Popen(args, env={"RANK": str(r), "WORLD_SIZE": str(size)}, stdout=subprocess.PIPE)
            for r in range(size)
        ]
        outs = [p.communicate(timeout=100)[0] for p in started]
        assert all(p.returncode == 0 for p in started)
        return [json.loads(out) for out in outs]

    first = run(3)
    assert first[0][1] == first[1][1] == first[2][1] and "rank 2 of 3" in first[2][3]
    second = run(2, first[0][1])
    had = [key for out in first + second for key in out[0]]
    assert sorted(had) == sorted(datasets.keys(ds)) and second[0][2] == second[1][2] == 3 + 6


def test_the_schedule_reads_every_sample_once_and_in_time(ds: Dataset) -> None:
    rng = np.random.default_rng(0)
    for world, batch, lanes, block, drop in (
        (1, 8, 32, 32, True),
        (3, 2, 8, 4, False),
        (2, 5, 4, 16, True),
        (7, 3, 2, 3, False),
    ):
        for resumed in (0, 1, 2):
            counts = ds.selection.count
            order = Order(counts, 1, 2, [Leg(world, batch, lanes, block, 1, resumed)], drop)
            begin = min(resumed, order.cut.steps)
            for rank in range(world):
                schedule = Schedule(order, ds.selection, rank, range(begin, order.cut.steps))
                read: dict[Any, int] = {}
                last: int = 0
                places: list[Any] = []
                while (ahead := schedule.peek()) is not None:
                    due, most, _ = ahead
                    n = int(rng.integers(1, most + 1))
                    got = schedule.take(n)
                    assert got.due == due >= last and len(got.ids) == len(got.shard) == n
                    last = due
                    for id, shard, index in zip(got.ids, got.shard.tolist(), got.index.tolist(), strict=True):
                        assert id not in read
                        read[id] = due
                        places.append((id, (shard, index)))
                assert len(schedule.plans) == order.cut.steps - begin
                where = dict(places)
                used = set()
                for due, plan in enumerate(schedule.plans):
                    expected = order.batch(plan.number, rank)
                    for i, slot in enumerate(plan.slots):
                        wanted = slot.id if slot.id is not None else plan.slots[slot.repeats].id
                        assert wanted is not None and read[wanted] <= due
                        place = ds.selection.places(expected.shard[i : i + 1], expected.index[i : i + 1])
                        assert where[wanted] == (int(place[0][0]), int(place[1][0]))
                        assert slot.padding == expected.padding[i]
                        used.add(wanted)
                assert used == set(read)  # nothing is read in vain


def test_memory_is_used_again_only_when_nobody_looks() -> None:
    memory = Memory(keep=2)
    layout = {"a": ((3, 1000), np.float32), "b": ((0, 4), np.int64), "c": ((7,), np.bool_)}
    one = memory.arrays(layout)
    assert [x.shape for x in one.values()] == [(3, 1000), (0, 4), (7,)] and one["a"].flags.writeable
    where = one["a"].__array_interface__["data"][0]
    part = one["a"][1:, ::2]
    del one
    two = memory.arrays(layout)
    assert two["a"].__array_interface__["data"][0] != where and memory.unused == 0
    del part
    assert memory.unused == 1
    three = memory.arrays(layout)
    assert three["a"].__array_interface__["data"][0] == where
    del two, three
    many = [memory.arrays(layout) for _ in range(5)]
    del many
    assert memory.unused == 2


def test_pipe() -> None:
    pipe = Pipe("pipe:printf abc; printf defg")
    room = memoryview(bytearray(100))
    got = b""
    while n := pipe.readinto(room):
        got += bytes(room[:n])
    assert got == b"abcdefg" and pipe.readinto(room) == 0
    pipe.close()
    pipe.close()
    for command, words in (
        ("echo no luck >&2; exit 7", "no luck.*exit status 7"),
        ("kill -TERM $$", "signal 15"),
        ("no-such-command-at-all", "exit status 127"),
    ):
        pipe = Pipe(f"pipe:{command}")
        with pytest.raises(StorageError, match=words):
            pipe.readinto(room)
        pipe.close()
    begin = time.monotonic()
    pipe = Pipe("pipe:sleep 100 & sleep 100")
    pipe.close()
    assert time.monotonic() - begin < 5


def test_reads_that_come_back_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytes(range(256)) * 40
    (tmp_path / "f").write_bytes(data)
    file = LocalFile(str(tmp_path / "f"))
    preadv = os.preadv
    monkeypatch.setattr("os.preadv", lambda fd, views, at: preadv(fd, [memoryview(views[0])[:7]], at))
    views = [memoryview(bytearray(n)) for n in (3, 0, 1000, 5, 77)]
    assert file.read(100, views) == 1085
    assert b"".join(views) == data[100:1185]
    assert file.read(len(data) - 10, views) == 10
    assert file.behind(1000) == len(data) - 1000
    many = [memoryview(bytearray(1)) for _ in range(3000)]
    monkeypatch.undo()
    assert file.read(1, many) == 3000 and b"".join(many) == data[1:3001]
    with pytest.raises(StorageError):
        LocalFile(str(tmp_path)).read(0, views)


def test_where_is_said_for_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises((StorageError, ShardDamaged), match="nowhere"):
        open(tmp_path / "nowhere" / "x.tar")
