"""Streams under torch: the same batches as tensors, in the leg's order, resumable, with masks drawn by torch."""

import copy
import json
import multiprocessing
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install '.[torch]'")
pytest.importorskip("torchdata", reason="torchdata is not installed: pip install '.[torch]'")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from torchdata.stateful_dataloader import StatefulDataLoader  # noqa: E402

from sa1b_wds import rle  # noqa: E402
from sa1b_wds.batch import Memory  # noqa: E402
from sa1b_wds.dataset import Dataset, open  # noqa: E402
from sa1b_wds.errors import StateMismatch, UsageError  # noqa: E402
from sa1b_wds.interop.torch import TorchStream, rasterise, state_of, tensors  # noqa: E402
from sa1b_wds.interop.torch import stream as adapter  # noqa: E402
from sa1b_wds.interop.torch.board import Board  # noqa: E402

from . import datasets  # noqa: E402

pytestmark = [
    # More workers than cores are the point of some tests.
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
    # Of Python 3.12 and later, about any fork once torch has started its own threads.
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    # torchdata 0.11 with torch 2.13.
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),
]

Steps = list[tuple[int, int]]


@pytest.fixture(scope="module")
def ds(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """53 samples in 5 shards: 13 batches of 4, and one sample left over."""
    return open(datasets.make(tmp_path_factory.mktemp("set"), ((30, 3), (23, 2))))


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    threads = set(threading.enumerate())
    yield
    assert not multiprocessing.active_children()
    assert {t for t in set(threading.enumerate()) - threads if t.name.startswith("sa1b-wds")} == set()


def stream(ds: Dataset, rank: int = 0, world: int = 1, **options: Any) -> TorchStream:
    few: dict[str, Any] = {"batch_size": 4, "image_size": 24, "mask_size": 16, "masks_per_image": 3, "threads": 2}
    return TorchStream(ds.stream(**{**few, "rank": rank, "world_size": world, **options}))


def loader(made: TorchStream, workers: int, **options: Any) -> Any:
    return DataLoader(made, batch_size=None, num_workers=workers, **options)


def stateful(made: TorchStream, workers: int, **options: Any) -> Any:
    return StatefulDataLoader(made, batch_size=None, num_workers=workers, **options)


def keys(batches: Any) -> list[list[str]]:
    return [batch["key"] for batch in batches]


def real(batches: Any) -> list[str]:
    return [key for b in batches for key, pad in zip(b["key"], b["is_padding"].tolist(), strict=True) if not pad]


def steps(batches: Any) -> Steps:
    return [(int(b["step"][0]), int(b["step"][1])) for b in batches]


# ---- tensors ---------------------------------------------------------------------------------------------------------


def address(array: Any) -> int:
    return int(array.__array_interface__["data"][0])


@pytest.mark.parametrize(
    "options", [{}, {"masks_per_image": None}, {"mask_mode": "runs"}, {"mask_mode": "area"}], ids=str
)
def test_tensors_lie_on_the_arrays(ds: Dataset, options: dict[str, Any]) -> None:
    batch: Any = next(iter(stream(ds, **options).stream))
    made = tensors(batch)
    assert made.keys() == batch.keys()
    assert made["key"] == batch["key"]
    for name, array in batch.items():
        if name == "key":
            continue
        tensor = made[name]
        assert tensor.data_ptr() == address(array), name
        whole = tensor.permute(0, 2, 3, 1) if name == "image" else tensor
        assert tuple(whole.shape) == array.shape
        assert whole.numpy().dtype == array.dtype
        assert np.array_equal(whole.numpy(), array)
    image = made["image"]
    assert image.shape == (4, 3, 24, 24)
    assert image.stride() == (24 * 24 * 3, 1, 24 * 3, 3)
    assert image.is_contiguous(memory_format=torch.channels_last)
    batch["boxes"][...] = 7  # the same memory, in both directions
    assert bool((made["boxes"] == 7).all())


def test_memory_is_used_again_when_the_tensors_are_gone(ds: Dataset) -> None:
    made = stream(ds, prefetch=1)
    held, copies, places = [], [], set()
    for batch in made:
        held.append(batch["masks"][1:])
        copies.append(held[-1].clone())
    for _ in range(3):
        for batch in made:
            places.add(batch["image"].data_ptr())
    del batch
    assert len(places) <= 8  # of 39 batches
    assert all(torch.equal(a, b) for a, b in zip(held, copies, strict=True))


def test_page_locked_batches_are_made_in_place(ds: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU here: torch's ordinary memory in place of the page-locked one, which it hands out in the same way."""
    pieces = []

    def allocate(size: int) -> Any:
        pieces.append(torch.empty(size, dtype=torch.uint8))
        return pieces[-1].numpy()

    monkeypatch.setattr(adapter, "page_locked", lambda: Memory(keep=0, allocate=allocate))
    truth = list(stream(ds))
    got = list(TorchStream(stream(ds).stream, pin_memory=True))
    assert len(pieces) == len(got) == len(truth)  # each its own: a device may still read what Python let go of
    for a, b in zip(truth, got, strict=True):
        storages = {piece.untyped_storage().data_ptr() for piece in pieces}
        for name in ("image", "masks", "boxes", "points", "valid", "size", "annotation_id"):
            assert torch.equal(a[name], b[name]), name
            assert b[name].untyped_storage().data_ptr() in storages, name  # torch's own storage, not numpy's view of it
        assert b["image"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
def test_page_locked_for_real(ds: Dataset) -> None:
    batch = next(iter(stream(ds)))
    assert batch["image"].is_pinned() and batch["masks"].is_pinned()
    assert batch["image"].pin_memory().data_ptr() == batch["image"].data_ptr()


# ---- bare ------------------------------------------------------------------------------------------------------------


def test_bare_is_the_stream(ds: Dataset) -> None:
    truth, made = stream(ds).stream, stream(ds)
    assert len(made) == 13
    for epoch in range(2):
        assert made.epoch == epoch
        for a, b in zip(list(truth), list(made), strict=True):
            for name in a:
                assert name in ("key", "image") or np.array_equal(a[name], b[name].numpy())  # type: ignore[literal-required]
    assert made.stats().batches == 26


def test_bare_goes_on_after_a_break(ds: Dataset) -> None:
    whole, made, got = keys(stream(ds)), stream(ds), []
    while made.epoch == 0:
        for n, batch in enumerate(made):
            got.append(batch["key"])
            if n == 3:
                break
    assert got == whole


def test_an_old_iterator_does_not_end_a_new_one(ds: Dataset) -> None:
    whole, made = keys(stream(ds)), stream(ds)
    old = iter(made)
    assert next(old)["key"] == whole[0]
    state = made.state_dict()
    made.load_state_dict(state)
    new = iter(made)
    got = [next(new)["key"]]
    del old
    assert got + keys(new) == whole[1:]


def test_from_bare_to_workers(ds: Dataset) -> None:
    made = stream(ds, drop_last=False)
    it = iter(made)
    had = real(next(it) for _ in range(3))
    assert sorted(had + real(loader(made, 2))) == sorted(datasets.keys(ds))
    assert made.epoch == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_a_state_before_every_batch(ds: Dataset, workers: int) -> None:
    """grain's check: one worker and none have the bare order, and each other's states."""
    made = stream(ds, drop_last=False)
    whole, states = [], [made.state_dict()]
    for batch in made:
        whole.append(batch["key"])
        states.append(made.state_dict())
        assert made.state_dict(after=batch) == states[-1]
    for i in range(0, len(states), 1 if workers == 0 else 5):
        again = stream(ds, drop_last=False)
        again.load_state_dict(json.loads(json.dumps(states[i])))
        assert len(again) == 14
        assert keys(loader(again, workers)) == whole[i:]
        assert again.epoch == 1


# ---- DataLoader ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [False, True], ids=["new workers", "kept workers"])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_epochs_under_dataloader(ds: Dataset, workers: int, kept: bool) -> None:
    made = stream(ds, drop_last=False)
    turns = loader(made, workers, persistent_workers=kept)
    bare = stream(ds, drop_last=False)
    for epoch in range(3):
        assert made.epoch == epoch
        assert len(turns) == len(made) == 14
        batches = list(turns)
        assert steps(batches) == [(epoch, t) for t in range(14)]
        assert sorted(real(batches)) == sorted(datasets.keys(ds))
        for p, own in enumerate([made.stream.in_worker(p, workers) for p in range(workers)]):
            own.set_epoch(epoch)
            assert keys(own) == keys(batches)[p::workers]
        if workers == 1:
            assert keys(batches) == keys(bare)
    assert made.epoch == 3


def test_more_workers_than_batches(ds: Dataset) -> None:
    made = stream(ds, batch_size=25)
    for epoch in range(2):
        batches = list(loader(made, 4))
        assert steps(batches) == [(epoch, 0), (epoch, 1)]
        assert len(set(real(batches))) == 50


@pytest.mark.parametrize("kept", [False, True], ids=["new workers", "kept workers"])
def test_a_state_after_every_batch_under_dataloader(ds: Dataset, kept: bool) -> None:
    made = stream(ds)
    turns = loader(made, 2, persistent_workers=kept)
    for epoch in range(2):
        batches = list(turns)
        states = [made.state_dict(after=batch) for batch in batches]
        assert {state["epoch"] for state in states} == {epoch}
        for i in (0, 4, 11, 12):
            again = stream(ds)
            again.load_state_dict(json.loads(json.dumps(states[i])))
            rest = list(loader(again, 2))  # begins with worker 0, wherever the leg stands
            assert steps(rest) == [(epoch, t) for t in range(i + 1, 13)]
            assert keys(rest) == keys(batches)[i + 1 :]
            assert again.state_dict(after=rest[-1] if rest else batches[i]) == states[-1]
            assert again.epoch == epoch + 1
            assert steps(loader(again, 2))[:2] == [(epoch + 1, 0), (epoch + 1, 1)]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_another_number_of_workers(ds: Dataset, workers: int) -> None:
    made = stream(ds, drop_last=False)
    batches = list(loader(made, 2))
    for i in (0, 5):
        again = stream(ds, drop_last=False)
        again.load_state_dict(made.state_dict(after=batches[i]))
        rest = list(loader(again, workers))
        assert sorted(real(batches[: i + 1]) + real(rest)) == sorted(datasets.keys(ds))
        # … and once more, in its turn
        last = stream(ds, drop_last=False)
        last.load_state_dict(again.state_dict(after=rest[1]))
        assert sorted(real(batches[: i + 1]) + real(rest[:2]) + real(loader(last, 2))) == sorted(datasets.keys(ds))


@pytest.mark.parametrize("kept", [False, True], ids=["new workers", "kept workers"])
def test_what_the_main_process_says_reaches_the_workers(ds: Dataset, kept: bool) -> None:
    made = stream(ds)
    turns = loader(made, 2, persistent_workers=kept)
    first = list(turns)
    made.set_epoch(1)  # the current one
    assert made.epoch == 1
    made.set_epoch(0)
    assert keys(turns) == keys(first)
    made.set_epoch(5)
    assert (made.epoch, len(made)) == (5, 13)
    assert steps(turns)[0] == (5, 0)
    made.load_state_dict(made.state_dict(after=first[6]))
    assert keys(turns) == keys(first[7:])
    assert steps(turns) == [(1, t) for t in range(13)]


@pytest.mark.parametrize("kept", [False, True], ids=["new workers", "kept workers"])
def test_a_break_under_dataloader(ds: Dataset, kept: bool) -> None:
    """It begins again where the iteration began, or where it is told to."""
    made = stream(ds)
    turns = loader(made, 2, persistent_workers=kept)
    whole = keys(turns)
    made.set_epoch(0)
    for n, batch in enumerate(turns):  # noqa: B007
        if n == 4:
            break
    assert keys(turns) == whole
    made.load_state_dict(made.state_dict(after=batch))
    assert keys(turns) == whole[5:]


def test_without_a_batch_no_state_is_known_under_workers(ds: Dataset) -> None:
    made = stream(ds)
    assert made.state_dict()["epoch"] == 0
    batches = list(loader(made, 2))
    with pytest.raises(UsageError, match="after which batch"):
        made.state_dict()
    state = made.state_dict(after=batches[-1])
    assert state["legs"][-1][-2:] == [2, 13]
    made.load_state_dict(state)
    assert made.state_dict()["legs"][0] == state["legs"][0]
    assert list(loader(made, 2)) == []
    assert made.epoch == 1
    with pytest.raises(UsageError, match="epoch"):
        made.state_dict(after={"step": (7, 0)})


def test_batches_of_workers_are_shared_not_copied_and_stay(ds: Dataset) -> None:
    truth = list(stream(ds))
    got = list(loader(stream(ds), 1))
    for a, b in zip(truth, got, strict=True):
        assert b["image"].is_shared()
        assert b["image"].untyped_storage().data_ptr() == b["masks"].untyped_storage().data_ptr()  # one piece
        assert b["image"].is_contiguous(memory_format=torch.channels_last)
        for name in a:
            assert a[name] == b[name] if name == "key" else torch.equal(a[name], b[name]), name


def test_an_error_in_a_worker_says_it_all(ds: Dataset, tmp_path: Path) -> None:
    folder = datasets.without_manifest(Path(ds.where), tmp_path / "plain")
    broken = datasets.tars(folder)[2]
    whole = open(folder)
    with broken.open("r+b") as file:
        file.seek(600)
        file.write(b"x" * 3000)
    with pytest.raises(RuntimeError, match=rf"(?s)ShardDamaged.*{broken.name}: byte"):
        list(loader(stream(whole), 2))
    made = stream(whole, on_error="skip")
    assert any(b["is_padding"].any() for b in loader(made, 2))


def test_threads_and_budget_are_shared_by_workers(ds: Dataset) -> None:
    whole = stream(ds, threads=5, read_ahead=1 << 20).stream
    part = whole.in_worker(1, 2)
    assert (part.limits.threads, part.limits.read_ahead) == (2, 1 << 19)
    assert whole.limits.threads == 5


@pytest.mark.slow
@pytest.mark.parametrize("kept", [False, True], ids=["new workers", "kept workers"])
def test_spawned_workers(ds: Dataset, kept: bool) -> None:
    made = stream(ds)
    turns = loader(made, 2, multiprocessing_context="spawn", persistent_workers=kept)
    batches = list(turns)
    assert steps(batches) == [(0, t) for t in range(13)]
    assert keys(batches) == keys(loader(stream(ds), 2))
    assert made.epoch == 1
    made.load_state_dict(made.state_dict(after=batches[9]))
    assert keys(turns) == keys(batches[10:])


def test_copies(ds: Dataset) -> None:
    made = stream(ds)
    first = next(iter(made))
    again = copy.deepcopy(made)
    assert keys(again) == keys(stream(ds))[1:]
    assert made.state_dict() == made.state_dict(after=first)  # untouched


# ---- StatefulDataLoader ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_stateful_loader_resumes(ds: Dataset, workers: int, every: int) -> None:
    made = stateful(stream(ds), workers, snapshot_every_n_steps=every)
    whole, states = [], [made.state_dict()]
    for batch in made:
        whole.append(batch["key"])
        states.append(copy.deepcopy(made.state_dict()))
    assert len(whole) == 13
    finished = copy.deepcopy(made.state_dict())
    second = keys(made)
    for i in (0, 1, 6, 12, 13):
        again = stateful(stream(ds), workers, snapshot_every_n_steps=every)
        again.load_state_dict(states[i])
        assert keys(again) == whole[i:], i
        assert keys(again) == second, i  # every worker went on to the next epoch
    again = stateful(stream(ds), workers, snapshot_every_n_steps=every)
    again.load_state_dict(finished)
    assert keys(again) == second


@pytest.mark.parametrize("workers", [1, 2])
def test_stateful_loader_with_kept_workers(ds: Dataset, workers: int) -> None:
    made = stateful(stream(ds), workers, persistent_workers=True)
    first, second = list(made), keys(made)
    assert steps(first) == [(0, t) for t in range(13)]
    it = iter(made)
    third = [next(it)["key"] for _ in range(3)]
    state = copy.deepcopy(made.state_dict())
    third += keys(it)
    again = stateful(stream(ds), workers, persistent_workers=True)
    again.load_state_dict(state)
    assert keys(again) == third[3:]
    finished = copy.deepcopy(again.state_dict())
    fourth = keys(again)
    assert len({str(x) for x in (keys(first), second, third, fourth)}) == 4
    again = stateful(stream(ds), workers, persistent_workers=True)
    again.load_state_dict(finished)
    assert keys(again) == fourth
    again.load_state_dict(state)  # back again, in a loader that has seen later epochs
    assert keys(again) == third[3:]
    del it


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_stateful_loader_s_state_on_other_ranks(ds: Dataset, workers: int, every: int) -> None:
    """Two ranks are stopped after i batches each; one, then three, go on. Nothing twice, nothing lost."""
    for i in (0, 1, 3, 7):
        had, states = [], []
        for rank in range(2):
            made = stateful(stream(ds, rank, 2, drop_last=False), workers, snapshot_every_n_steps=every)
            it = iter(made)
            had += real(next(it) for _ in range(i))
            states.append(copy.deepcopy(made.state_dict()))
            del it, made
        assert state_of(states[0]) == state_of(states[1])
        one = stream(ds, drop_last=False)
        one.load_state_dict(states[0])
        assert len(one) == i + -(-(53 - 8 * i) // 4)
        it = iter(one)
        had += real(next(it) for _ in range(min(2, 14 - 2 * i)))
        one.close()
        left = one.state_dict()
        for rank in range(3):
            last = stream(ds, rank, 3, drop_last=False)
            last.load_state_dict(left)
            had += real(loader(last, workers))
        assert sorted(had) == sorted(datasets.keys(ds)), i


def test_a_finished_loader_s_state_is_the_next_epoch(ds: Dataset) -> None:
    for workers in (0, 2):
        made = stateful(stream(ds), workers)
        list(made)
        state = state_of(made.state_dict())
        assert state["epoch"] == 1
        again = stream(ds, 1, 2)
        again.load_state_dict(state)
        assert steps(again) == [(1, t) for t in range(6)]


def test_a_worker_s_state_is_refused_on_other_ranks(ds: Dataset) -> None:
    made = stateful(stream(ds, 0, 2), 2)
    it = iter(made)
    next(it)
    state = copy.deepcopy(made.state_dict())
    del it, made
    other = stateful(stream(ds, 0, 3), 2)
    other.load_state_dict(state)
    with pytest.raises(RuntimeError, match="load the loader's state into the TorchStream"):
        next(iter(other))
    del other


def test_states_of_other_loaders_are_refused() -> None:
    with pytest.raises(StateMismatch, match="not over a TorchStream"):
        state_of({"_snapshot": {"_worker_snapshots": {"worker_0": {"dataset_state": None}}}})
    with pytest.raises(StateMismatch, match="not over a TorchStream"):
        state_of({"_snapshot": {"_worker_snapshots": {}}})


# ---- the board -------------------------------------------------------------------------------------------------------


def test_board() -> None:
    board = Board()
    board.set({"epoch": 3, "legs": []})
    assert (board.epoch, board.workers, board.state) == (3, 0, {"epoch": 3, "legs": []})
    assert [board.begin(p, 2) for p in (0, 1)] == [3, 3]
    board.end(0, 2, 4)
    assert board.epoch == 3  # worker 1 has not
    board.end(1, 2, 4)
    assert (board.epoch, board.workers) == (4, 2)
    # The first of three new workers is through before the last has begun.
    assert board.begin(0, 3) == 4
    board.end(0, 3, 5)
    assert [board.begin(p, 3) for p in (1, 2)] == [4, 4]
    board.end(1, 3, 5)
    # The loop broke off; two workers now.
    assert [board.begin(p, 2) for p in (1, 0)] == [4, 4]
    board.end(1, 2, 5)
    board.end(0, 2, 5)
    assert board.epoch == 5
    for p in (1, 0):
        board.resume(p, 2, {"epoch": 1, "legs": [1]})
    assert (board.epoch, board.state["legs"]) == (1, [1])
    board.set({"epoch": 0})
    assert (board.epoch, board.workers) == (0, 0)
    with pytest.raises(UsageError, match="too many"):
        board.begin(0, 5000)
    with pytest.raises(UsageError, match="too large"):
        board.set({"epoch": 0, "legs": ["x" * (1 << 18)]})


# ---- masks drawn by torch --------------------------------------------------------------------------------------------


@settings(max_examples=150)
@given(st.data())
def test_rasterise_equals_the_kernels(data: Any) -> None:
    """Any size, window and flip; masks with first run 0, empty ones, full ones; places without a mask."""
    draw = data.draw
    samples, places = draw(st.integers(0, 3)), draw(st.integers(1, 3))
    size = draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
    ends, offsets, shapes, windows, flips, truth = [], [0], [], [], [], []
    for _ in range(samples):
        h, w = draw(st.tuples(st.integers(1, 10), st.integers(1, 10)))
        window = draw(st.tuples(*[st.integers(-6, 12)] * 2, *[st.integers(1, 25)] * 2))
        flip = draw(st.booleans())
        for _ in range(places):
            if draw(st.booleans()):
                mask = np.array(draw(st.lists(st.integers(0, 1), min_size=h * w, max_size=h * w)), np.uint8)
                counts = np.frombuffer(rle.encode(mask.reshape(h, w)), np.uint8)
                both = [0, len(counts)]
                ends.append(rle.ends(counts, both, h, w)[0])
                truth.append(rle.decode(counts, both, (h, w), size, window=window, flip=flip)[0])
            else:
                ends.append(np.empty(0, np.int32))
                truth.append(np.zeros(size, np.uint8))
            offsets.append(offsets[-1] + len(ends[-1]))
        shapes.append((h, w))
        windows.append(window)
        flips.append(flip)
    batch = {
        "run_ends": torch.from_numpy(np.concatenate([np.empty(0, np.int32), *ends])),
        "run_offsets": torch.tensor(offsets),
        "original_size": torch.tensor(shapes, dtype=torch.int32).reshape(-1, 2),
        "window": torch.tensor(windows, dtype=torch.int32).reshape(-1, 4),
        "flip": torch.tensor(flips, dtype=torch.bool),
        "boxes": torch.zeros(samples, places, 4),
    }
    masks = rasterise(batch, size, at_once=draw(st.integers(1, 300)))
    assert masks.dtype == torch.uint8
    assert masks.shape == (samples, places, *size)
    assert np.array_equal(masks.numpy().reshape(-1, *size), np.array(truth, np.uint8).reshape(-1, *size))


@pytest.mark.parametrize("most", [3, None])
def test_a_batch_with_runs_draws_what_a_dense_one_holds(ds: Dataset, most: int | None) -> None:
    options: dict[str, Any] = {"masks_per_image": most, "flip": 0.5, "scale": (0.4, 2.0), "drop_last": False}
    dense = list(stream(ds, **options))
    runs = list(loader(stream(ds, **options, mask_mode="runs"), 1))
    for a, b in zip(dense, runs, strict=True):
        assert torch.equal(rasterise(b, 16), a["masks"])
    assert sum(int(a["masks"].sum()) for a in dense) > 1000


def test_large_images_do_not_overflow() -> None:
    """The largest image there may be, three times in a row, with a run that ends at its last pixel."""
    h, w = 65_535, 4_096
    counts = np.frombuffer(rle.encode_runs([h * w - 70_000, 70_000]), np.uint8)
    ends, offsets = rle.ends(np.tile(counts, 3), np.arange(4) * len(counts), h, w)
    window = (h - 5_000, w - 10, 6_000, 12)
    batch = {
        "run_ends": torch.from_numpy(ends),
        "run_offsets": torch.from_numpy(offsets),
        "original_size": torch.tensor([[h, w]], dtype=torch.int32),
        "window": torch.tensor([window], dtype=torch.int32),
        "flip": torch.tensor([False]),
        "boxes": torch.zeros(1, 3, 4),
    }
    (truth,) = rle.decode(counts, [0, len(counts)], (h, w), (60, 12), window=window)
    assert 0 < truth.sum() < 2 * 60
    assert all(np.array_equal(mask, truth) for mask in rasterise(batch, (60, 12)).numpy()[0])


def test_what_cannot_be_drawn(ds: Dataset) -> None:
    (batch, *_) = stream(ds)
    with pytest.raises(UsageError, match='mask_mode="runs"'):
        rasterise(batch, 16)
    with pytest.raises(UsageError, match="out of range"):
        rasterise(batch, 0)
