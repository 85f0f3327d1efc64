"""Damaged shards: an error that says where, or by `on_error="skip"` an exact count; never fewer samples in silence."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sa1b_wds.dataset import Dataset, open
from sa1b_wds.errors import DataError, FormatError, NotFound, Sa1bError, ShardDamaged, StorageError
from sa1b_wds.stream import Stream

from . import datasets

SHARD = 1


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return datasets.make(tmp_path_factory.mktemp("set"), ((20, 2),))


@pytest.fixture
def dest(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "dest")
    return tmp_path / "dest"


def stream(ds: Dataset, **options: Any) -> Stream:
    few = {"image_size": 32, "mask_size": 8, "masks_per_image": 2, "threads": 2, "batch_size": 3, "drop_last": False}
    return ds.stream(**{"rank": 0, "world_size": 1, **few, **options})


def delivered(ds: Dataset, **options: Any) -> tuple[list[str], int]:
    """Keys of an epoch with on_error="skip", and how many were skipped."""
    s = stream(ds, on_error="skip", **options)
    keys = [k for b in s for k, pad in zip(b["key"], b["is_padding"], strict=True) if not pad]
    return keys, s.stats().skipped


def spans(dest: Path) -> list[int]:
    return list(map(int, np.fromfile(f"{datasets.tars(dest)[SHARD]}.idx", "<i8")))


def middle(data: bytearray, at: int) -> int:
    """Byte of the second member's header of the sample at byte `at`."""
    return at + 512 + -(-int(data[at + 124 : at + 135], 8) // 512) * 512


# Damage that other readers take for an end, done to a shard of 10. Each gives the new bytes, the byte that the error
# must name where that is one byte, and how many samples are lost.
def header_overwritten(data: bytearray, at: list[int]) -> tuple[int, int]:
    data[at[4] : at[4] + 512] = b"\xff" * 512
    return at[4], 1


def second_header_overwritten(data: bytearray, at: list[int]) -> tuple[int, int]:
    begin = middle(data, at[4])
    data[begin : begin + 512] = bytes(512)
    return at[4], 1


def cut_between_samples(data: bytearray, at: list[int]) -> tuple[int, int]:
    del data[at[4] :]
    return at[4], 6


def cut_inside_a_header(data: bytearray, at: list[int]) -> tuple[int, int]:
    del data[at[4] + 200 :]
    return at[4] + 200, 6


def cut_between_two_members(data: bytearray, at: list[int]) -> tuple[int, int]:
    cut = middle(data, at[4])
    del data[cut:]
    return cut, 6


def cut_inside_data(data: bytearray, at: list[int]) -> tuple[int, int]:
    del data[at[4] + 700 :]
    return at[4] + 700, 6


def cut_before_the_end_blocks(data: bytearray, at: list[int]) -> tuple[int, int]:
    del data[at[-1] :]
    return at[-1], 0


def cut_inside_the_end_blocks(data: bytearray, at: list[int]) -> tuple[int, int]:
    del data[-512:]
    return at[-1] + 512, 0


def longer(data: bytearray, at: list[int]) -> tuple[int, int]:
    data += bytes(512)
    return at[-1] + 1024, 0


def sample_removed(data: bytearray, at: list[int]) -> tuple[int, int]:
    del data[at[4] : at[5]]
    return len(data), 6


def flipped_in_a_jpg(data: bytearray, at: list[int]) -> tuple[int, int]:
    data[at[4] + 900] ^= 1
    return at[4], 1


def flipped_in_annotations(data: bytearray, at: list[int]) -> tuple[int, int]:
    data[at[5] - 600] ^= 64
    return at[4], 1


def flipped_in_padding(data: bytearray, at: list[int]) -> tuple[int, int]:
    data[at[5] - 1] ^= 1
    return at[4], 1


def two_samples_exchanged(data: bytearray, at: list[int]) -> tuple[int, int]:
    data[at[3] : at[5]] = data[at[4] : at[5]] + data[at[3] : at[4]]
    return at[3], 2


DAMAGES: list[Callable[[bytearray, list[int]], tuple[int, int]]] = [
    header_overwritten, second_header_overwritten, cut_between_samples, cut_inside_a_header, cut_between_two_members,
    cut_inside_data, cut_before_the_end_blocks, cut_inside_the_end_blocks, longer, sample_removed, flipped_in_a_jpg,
    flipped_in_annotations, flipped_in_padding, two_samples_exchanged,
]  # fmt: skip
CONTENT = {flipped_in_a_jpg, flipped_in_annotations, flipped_in_padding, two_samples_exchanged}
"""What only a checksum can find."""


def damage(dest: Path, how: Callable[[bytearray, list[int]], tuple[int, int]]) -> tuple[int, int]:
    path = datasets.tars(dest)[SHARD]
    data = bytearray(path.read_bytes())
    byte, lost = how(data, spans(dest))
    path.write_bytes(data)
    return byte, lost


@pytest.mark.parametrize("how", DAMAGES, ids=lambda how: how.__name__)
def test_with_a_manifest(dest: Path, how: Callable[[bytearray, list[int]], tuple[int, int]]) -> None:
    whole = datasets.keys(open(dest))
    byte, lost = damage(dest, how)
    ds = open(dest)
    s = stream(ds)
    with pytest.raises(ShardDamaged) as caught:
        list(s)
    error = caught.value
    assert datasets.tars(dest)[SHARD].name in error.where
    assert error.expected is not None and error.found is not None and error.expected != error.found
    assert f"byte {byte:,}" in error.where
    if how in CONTENT:
        assert "CRC-32" in error.what
    # The same error again on every further attempt, and where random access comes to it.
    with pytest.raises(ShardDamaged):
        list(s)
    if lost:
        with pytest.raises(ShardDamaged):
            list(ds)
    keys, skipped = delivered(ds)
    assert skipped == lost and len(keys) == 20 - lost and set(keys) < set(whole) | {""} and len(set(keys)) == len(keys)


@pytest.mark.parametrize("idx", [False, True], ids=["headers", "idx"])
@pytest.mark.parametrize("how", [h for h in DAMAGES if h not in CONTENT], ids=lambda how: how.__name__)
def test_without_a_manifest(
    dest: Path, tmp_path: Path, how: Callable[[bytearray, list[int]], tuple[int, int]], idx: bool
) -> None:
    """What can be known is checked: a sample that was removed without a trace cannot be, unless its index is there."""
    byte, lost = damage(dest, how)
    folder = datasets.without_manifest(dest, tmp_path / "plain", idx)
    if how is sample_removed and not idx:
        assert len(open(folder)) == 19  # a whole archive
        return
    with pytest.raises(ShardDamaged) as caught:
        list(stream(open(folder)))
    where = caught.value.where
    assert datasets.tars(folder)[SHARD].name in where and "byte " in where
    assert caught.value.found is not None
    if idx:
        keys, skipped = delivered(open(folder))
        assert len(keys) + skipped == 20 and len(set(keys)) == len(keys)
        # Without checksums a sample behind one that was removed may happen to stand where another did.
        assert skipped == lost or (how is sample_removed and skipped)
    elif how not in (second_header_overwritten,):
        named = int(where.split("byte ")[1].split(":")[0].replace(",", ""))
        assert abs(named - byte) <= 512


@pytest.mark.parametrize("how", [flipped_in_a_jpg, flipped_in_annotations])
def test_without_a_manifest_damaged_content_is_at_most_an_error(dest: Path, tmp_path: Path, how: Any) -> None:
    damage(dest, how)
    folder = datasets.without_manifest(dest, tmp_path / "plain")
    try:
        assert sum(len(b["key"]) for b in stream(open(folder), batch_size=1)) == 20
    except (ShardDamaged, FormatError) as error:
        assert datasets.tars(folder)[SHARD].name in error.where


@pytest.mark.parametrize("early", ["exit 0", "exit 3", "kill -9 $$"])
@pytest.mark.parametrize("blocks", [0, 30, 20])
def test_commands_that_stop_early(whole: Path, tmp_path: Path, early: str, blocks: int) -> None:
    """Drain, exit status, bytes: in this order, and the same error on every run."""
    folder = datasets.without_manifest(whole, tmp_path / "plain")
    name = str(datasets.tars(folder)[SHARD])
    url = f"pipe:head -c {blocks * 512} {name}; {early}"
    messages = set()
    for _ in range(3):
        with pytest.raises(StorageError if early != "exit 0" else ShardDamaged) as caught:
            open([str(datasets.tars(folder)[0]), url])
        messages.add(str(caught.value))
        assert name in caught.value.where
        if early == "exit 0":
            assert f"byte {blocks * 512:,}" in caught.value.where
    assert len(messages) == 1, messages
    if early == "exit 3":
        assert "exit status 3" in messages.pop()


def test_a_command_that_says_why(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file"):
        open("pipe:cat /nowhere/at/all.tar")


def test_a_command_that_fails_later(whole: Path, tmp_path: Path) -> None:
    """Good when its samples were counted, broken when they are read."""
    folder = datasets.without_manifest(whole, tmp_path / "plain")
    name = datasets.tars(folder)[0]
    ds = open(f"pipe:cat {name}")
    data = name.read_bytes()
    for changed, error in (
        (data[:-2048], ShardDamaged),
        (data[: len(data) // 2], ShardDamaged),
        (data + b"x" * 9, ShardDamaged),
    ):
        name.write_bytes(changed)
        with pytest.raises(error, match="byte"):
            list(stream(ds))
    name.unlink()
    with pytest.raises(StorageError, match="exit status 1"):
        list(stream(ds))
    keys, skipped = delivered(ds)
    assert (keys, skipped) == ([], 10)


def test_shards_exchanged(dest: Path) -> None:
    a, b = datasets.tars(dest)
    one, two = a.read_bytes(), b.read_bytes()
    a.write_bytes(two)
    b.write_bytes(one)
    with pytest.raises(ShardDamaged, match=r"sa1b-train-00000\d.tar"):
        list(stream(open(dest)))
    keys, skipped = delivered(open(dest))
    assert not keys and skipped == 20


def test_a_shard_of_another_data_set(dest: Path, tmp_path: Path) -> None:
    """With all its side files: the manifest knows their digests."""
    other = datasets.make(tmp_path / "other", ((20, 2),), first=500)
    for name in (t.name for t in datasets.tars(other)[SHARD:]):
        for path in (name, f"{name}.idx", f"index/{name[:-4]}.rows"):
            shutil.copy(other / path, dest / path)
    with pytest.raises(ShardDamaged, match="differs from the manifest"):
        list(stream(open(dest)))


def test_a_shard_that_is_not_there(dest: Path) -> None:
    datasets.tars(dest)[SHARD].unlink()
    with pytest.raises(NotFound, match="000001"):
        list(stream(open(dest)))
    assert delivered(open(dest))[1] == 10


def test_no_permission_and_a_folder(dest: Path) -> None:
    path = datasets.tars(dest)[SHARD]
    path.unlink()
    path.mkdir()
    with pytest.raises(Sa1bError, match="000001"):
        list(stream(open(dest)))


def test_a_file_that_shrinks_while_it_is_read(dest: Path) -> None:
    s = stream(open(dest), prefetch=0, batch_size=1, read_ahead=0, threads=1, fetch_threads=1)
    it = iter(s)
    next(it)
    for path in datasets.tars(dest):
        os.truncate(path, 512)
    with pytest.raises(ShardDamaged, match=r"stops inside a sample|length differs"):
        list(it)


def test_good_batches_before_the_error_do_not_hang_on_timing(dest: Path) -> None:
    damage(dest, flipped_in_a_jpg)
    had = set()
    for threads, prefetch in ((1, 0), (3, 4), (2, 2), (4, 8)):
        it, n = iter(stream(open(dest), threads=threads, fetch_threads=threads, prefetch=prefetch, batch_size=2)), 0
        with pytest.raises(ShardDamaged):
            for _ in range(99):
                next(it)
                n += 1
        had.add(n)
    assert len(had) == 1


def test_skipped_places_are_flagged_repeats(dest: Path) -> None:
    damage(dest, flipped_in_a_jpg)
    ds = open(dest)
    lost = datasets.keys(ds)[10 + 4]
    for batch in stream(ds, on_error="skip", batch_size=5):
        assert lost not in batch["key"]
        for b in np.flatnonzero(batch["is_padding"]):
            first = next(i for i in range(5) if not batch["is_padding"][i])
            assert batch["key"][b] == batch["key"][first]
            assert np.array_equal(batch["image"][b], batch["image"][first])
    alone = [b for b in stream(ds, on_error="skip", batch_size=1) if b["is_padding"][0]]
    assert len(alone) == 1 and alone[0]["key"] == [""] and not alone[0]["valid"].any() and not alone[0]["image"].any()
    ragged = [b for b in stream(ds, on_error="skip", batch_size=5, masks_per_image=None) if b["is_padding"].any()]
    assert len(ragged) == 1 and len(ragged[0]["offsets"]) == 6 and ragged[0]["offsets"][-1] == len(ragged[0]["masks"])


def test_skipping_does_not_move_the_others(dest: Path, whole: Path) -> None:
    damage(dest, flipped_in_annotations)
    one, two = stream(open(whole), batch_size=4), stream(open(dest), batch_size=4, on_error="skip")
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert [x for x, y in zip(a["key"], b["is_padding"], strict=True) if not y] == [
            x for x, y in zip(b["key"], b["is_padding"], strict=True) if not y
        ]


def test_the_limit_of_skipping(dest: Path, caplog: pytest.LogCaptureFixture) -> None:
    damage(dest, cut_between_samples)  # 6 lost
    ds = open(dest)
    s = stream(ds, on_error="skip", max_skipped=6)
    assert len(list(s)) == 7 and s.stats().skipped == 6 and len(s.stats().errors) == 6
    assert sum("skipped: " in r.message for r in caplog.records) == 6
    with pytest.raises(DataError, match=r"too many samples skipped.*at most 6"):
        list(s)  # the next epoch: the limit is of the stream
    with pytest.raises(DataError, match="at most 5"):
        list(stream(ds, on_error="skip", max_skipped=5))


def test_damage_that_nobody_comes_to_is_not_met(dest: Path) -> None:
    damage(dest, flipped_in_a_jpg)
    ds = open(dest)
    assert len(list(stream(ds[:14], batch_size=1))) == 14
    with pytest.raises(ShardDamaged):
        list(stream(ds[14:15]))


@pytest.mark.parametrize("seed", range(3))
def test_random_bytes_changed(dest: Path, seed: int) -> None:
    """Every changed byte of a sample's span is found, whatever it is; the end blocks are the length's affair."""
    rng = random.Random(seed)
    path = datasets.tars(dest)[SHARD]
    good, at = path.read_bytes(), spans(dest)
    for _ in range(25):
        data = bytearray(good)
        byte = rng.randrange(at[-1])
        data[byte] ^= rng.randrange(1, 256)
        path.write_bytes(data)
        sample = next(i for i in range(10) if at[i] <= byte < at[i + 1])
        ds = open(dest)
        with pytest.raises(ShardDamaged, match="CRC-32") as caught:
            ds[10 + sample]
        assert f"byte {at[sample]:,}: " in caught.value.where
        others = [i for i in range(20) if i != 10 + sample]
        assert ds[rng.choice(others)].key
