"""Damaged sources: a conversion never succeeds on one, says at which byte, leaves nothing; or salvages, to the byte."""

import errno
import gzip
import os
import random
import re
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from sa1b_wds.convert import Job, run_task
from sa1b_wds.errors import (
    DataError,
    NotFound,
    SourceDamaged,
    StorageError,
    TooFewSamples,
    TooManyQuarantined,
)
from sa1b_wds.publication import finalize

from . import making, running
from .making import BLOCK, END, Member
from .running import ALL, job_of, quarantined, undisturbed

MEMBERS = making.pairs([7, 3, 11])
NAME = "sa_000000.tar"


@pytest.fixture(autouse=True)
def _undisturbed() -> Iterator[None]:
    with undisturbed():
        yield


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """A job on one sound source, whose file each test then damages."""
    return _job(tmp_path, making.tar(MEMBERS))


def _job(tmp_path: Path, data: bytes, **options: Any) -> Job:
    return job_of(running.write(tmp_path / "in", {NAME: data}), tmp_path / "out", **options)


def _source(job: Job) -> Path:
    return Path(job.locations[NAME])


def _fails(job: Job, data: bytes) -> SourceDamaged:
    """The error that these bytes are; nothing may be left of the task."""
    _source(job).write_bytes(data)
    with pytest.raises(SourceDamaged) as caught:
        run_task(job, 0)
    assert caught.value.where.startswith(str(_source(job)))
    running.check_no_trace(job.destination.root)
    return caught.value


def _byte(error: SourceDamaged) -> int:
    """The byte of the tar that the message names."""
    found = re.search(r": byte ([\d,]+) of the tar", str(error))
    assert found, str(error)
    return int(found[1].replace(",", ""))


def _cuts(size: int) -> list[int]:
    """Every 512-byte boundary, one byte before it and one after."""
    return sorted({c for b in range(0, size + BLOCK, BLOCK) for c in (b - 1, b, b + 1) if 0 <= c < size})


def _succeeds(job: Job, data: bytes, members: Sequence[Member] = MEMBERS) -> None:
    _source(job).write_bytes(data)
    run_task(job, 0)
    finalize(job.destination)
    running.check_accounts(job.destination.root)
    running.check_samples(job.destination.root, members)


# --------------------------------------------------------------------------------------------------------------- cuts


@pytest.mark.parametrize("dialect", ["gnu", "pax"])
def test_a_plain_tar_cut_anywhere_fails_at_the_cut(tmp_path: Path, dialect: making.Dialect) -> None:
    whole = making.tar([*MEMBERS, Member("./" + "n" * 120 + "/sa_5.jpg", making.jpg())][:-1], dialect=dialect)
    job = _job(tmp_path, whole)
    for cut in _cuts(len(whole)):
        error = _fails(job, whole[:cut])
        if cut == 0:
            assert "the file is empty" in str(error)
        else:
            assert _byte(error) == cut, (cut, str(error))
    _succeeds(job, whole)


def test_a_gzip_stream_cut_anywhere_fails_behind_the_last_byte_it_gave(job: Job) -> None:
    whole = making.gzipped(making.tar(MEMBERS))
    cuts = {*_cuts(len(whole)), *range(min(20, len(whole))), *range(len(whole) - 20, len(whole))}
    for cut in sorted(cuts):
        error = _fails(job, whole[:cut])
        if cut < 2:
            assert ("the file is empty" if cut == 0 else "not a tar header") in str(error) or "ends inside" in str(
                error
            )
            continue
        assert "the gzip stream ends early" in str(error)
        assert "gzip member at compressed byte 0" in str(error)
        given = len(zlib.decompressobj(31).decompress(whole[:cut]))
        assert given - 300 <= _byte(error) <= given, cut  # decoders differ in when they hand over the last few codes
    _succeeds(job, whole)


@pytest.mark.parametrize("parts", [1, 3])
def test_a_cut_tar_in_a_sound_gzip_stream_fails_at_the_cut(job: Job, parts: int) -> None:
    whole = making.tar(MEMBERS)
    for cut in _cuts(len(whole))[1:]:
        assert _byte(_fails(job, making.gzipped(whole[:cut], members=parts))) == cut


def test_a_source_in_a_group_of_several_is_named(tmp_path: Path) -> None:
    sound = {f"sa_{i:06d}.tar": making.tar(making.pairs([i, i + 100])) for i in range(3)}
    paths = running.write(tmp_path / "in", sound)
    job = job_of(paths, tmp_path / "out", mix=3)
    paths[1].write_bytes(sound["sa_000001.tar"][:-700])
    with pytest.raises(SourceDamaged, match=r"sa_000001\.tar: byte [\d,]+ of the tar"):
        run_task(job, 0)
    running.check_no_trace(tmp_path / "out")


# ------------------------------------------------------------------------------------------------------------- damage


def _headers() -> list[int]:
    return sorted(making.offsets(MEMBERS).values())


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda block: random.Random(1).randbytes(BLOCK), id="noise"),
        pytest.param(lambda block: bytes(BLOCK), id="zeros"),
        pytest.param(lambda block: block[:20] + bytes([block[20] ^ 4]) + block[21:], id="one bit of the name"),
        pytest.param(lambda block: block[:124] + b"zzzzzzzzzzz\0" + block[136:], id="the size"),
    ],
)
@pytest.mark.parametrize("packing", ["plain", "gzip"])
def test_a_header_overwritten_fails_at_its_byte(job: Job, damage: Callable[[bytes], bytes], packing: str) -> None:
    whole = making.tar(MEMBERS)
    for at in _headers():
        data = whole[:at] + damage(whole[at : at + BLOCK]) + whole[at + BLOCK :]
        error = _fails(job, making.gzipped(data) if packing == "gzip" else data)
        assert _byte(error) in (at, at + BLOCK), str(error)  # behind a zero block taken for the end's first


def test_any_bit_of_a_header_is_held_by_its_checksum(job: Job) -> None:
    whole, draw = making.tar(MEMBERS), random.Random(5)
    for _ in range(60):
        at = draw.choice(_headers()) + draw.randrange(148)  # not the checksum: it may have bytes nobody reads
        _fails(job, whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(7)]) + whole[at + 1 :])


@pytest.mark.parametrize("place", [-8, -5, -4, -1], ids=["crc", "crc end", "length", "length end"])
def test_a_gzip_trailer_that_is_wrong_fails(job: Job, place: int) -> None:
    whole = bytearray(making.gzipped(making.tar(MEMBERS)))
    whole[place] ^= 1
    error = _fails(job, bytes(whole))
    assert ("checksum differs" if place < -4 else "length differs") in str(error)
    assert _byte(error) == len(making.tar(MEMBERS))


def test_any_byte_of_a_gzip_stream_changed_fails_or_changes_nothing(tmp_path: Path) -> None:
    whole, draw = making.gzipped(making.tar(MEMBERS), members=2), random.Random(8)
    for turn in range(80):
        at = draw.randrange(len(whole))
        data = whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :]
        job = _job(tmp_path / str(turn), whole)
        _source(job).write_bytes(data)
        try:
            run_task(job, 0)
        except SourceDamaged:
            running.check_no_trace(job.destination.root)
        else:  # the time, the system, the level: what gzip's header says and no checksum covers
            running.check_samples(job.destination.root, MEMBERS)


@pytest.mark.parametrize("packing", ["plain", "gzip", "gzip member of its own"])
@pytest.mark.parametrize(
    ("behind", "said"),
    [
        (b"x", "garbage behind the end"),
        (random.Random(2).randbytes(3000), "garbage behind the end"),
        (bytes(700) + b"x", "garbage behind the end"),
        (making.tar(making.pairs([5])), "a second archive behind the end"),
        (bytes(5 * BLOCK) + making.tar(making.pairs([5])), "a second archive behind the end"),
    ],
    ids=["a byte", "noise", "zeros and a byte", "an archive", "zeros and an archive"],
)
def test_what_stands_behind_the_end_is_damage(job: Job, packing: str, behind: bytes, said: str) -> None:
    whole = making.tar(MEMBERS)
    match packing:
        case "plain":
            data = whole + behind
        case "gzip":
            data = making.gzipped(whole + behind)
        case _:
            data = making.gzipped(whole) + making.gzipped(behind)
    error = _fails(job, data)
    assert said in str(error)
    first = len(whole) + len(behind) - len(behind.lstrip(b"\0"))
    assert first - BLOCK < _byte(error) <= first


@pytest.mark.parametrize("behind", [b"x", b"\x1f", b"\x1f\x8b\x08", making.tar(MEMBERS)])
def test_garbage_behind_a_gzip_stream_is_damage(job: Job, behind: bytes) -> None:
    error = _fails(job, making.gzipped(making.tar(MEMBERS)) + behind)
    assert "gzip" in str(error)


@pytest.mark.parametrize("zeros", [1, 511, 512, 9216, 100_000])
@pytest.mark.parametrize("packing", ["plain", "gzip", "behind gzip"])
def test_zeros_behind_the_end_are_no_damage(job: Job, zeros: int, packing: str) -> None:
    whole = making.tar(MEMBERS)
    match packing:
        case "plain":
            data = whole + bytes(zeros)
        case "gzip":
            data = making.gzipped(whole + bytes(zeros))
        case _:
            data = making.gzipped(whole) + bytes(zeros)
    _succeeds(job, data)


def test_the_second_of_two_gzip_members_damaged_fails_and_names_it(job: Job) -> None:
    whole = making.tar(MEMBERS)
    half = len(whole) // 2 // BLOCK * BLOCK
    first, second = gzip.compress(whole[:half], 1), gzip.compress(whole[half:], 1)
    for at in range(12, len(second), 97):
        damaged = bytearray(second)
        damaged[at] ^= 0x55
        error = _fails(job, first + bytes(damaged))
        assert _byte(error) >= half or "not a tar header" in str(error)
    error = _fails(job, first + second[: len(second) // 2])
    assert f"gzip member at compressed byte {len(first):,}" in str(error)


def test_the_command_ends_with_1_and_one_line(job: Job) -> None:
    whole = making.tar(MEMBERS)
    _source(job).write_bytes(whole[:3200])
    command = [sys.executable, "-c", "from sa1b_wds.cli import run; run()", "convert", str(_source(job))]
    dest = str(job.destination.root.parent / "other")
    done = subprocess.run([*command, "--out", dest, "--workers", "1"], capture_output=True, text=True)
    assert done.returncode == 1
    (said,) = done.stderr.splitlines()
    assert "sa_000000.tar: byte 3,200 of the tar: the file ends inside ./sa_7.json" in said
    assert said.startswith("sa1b-wds: ")
    assert [n for n in running.tree(Path(dest)) if not n.startswith(".state")] == ["plan.json"]


# ------------------------------------------------------------------------------------------------------------ storage


def test_an_error_of_the_disk_in_the_middle_of_a_source(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    read, left = os.readv, [2]

    def failing(descriptor: int, buffers: list[memoryview]) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.EIO, "Input/output error")
        return read(descriptor, [buffers[0][:3000]])

    monkeypatch.setattr(os, "readv", failing)
    with pytest.raises(StorageError, match=r"sa_000000\.tar: input/output error"):
        run_task(job, 0)
    running.check_no_trace(job.destination.root)


def test_a_source_that_has_gone(job: Job) -> None:
    _source(job).unlink()
    with pytest.raises(NotFound, match=r"sa_000000\.tar: no such file"):
        run_task(job, 0)
    running.check_no_trace(job.destination.root)


def test_a_source_that_is_not_among_those_given(tmp_path: Path) -> None:
    paths = running.write(tmp_path / "in", {n: making.tar(MEMBERS) for n in (NAME, "sa_000001.tar")})
    job = job_of(paths, tmp_path / "out")
    del job.locations["sa_000001.tar"]
    with pytest.raises(NotFound, match=r"sa_000001\.tar: the plan has this source, but it is not among those given"):
        run_task(job, 0)
    running.check_no_trace(tmp_path / "out")


def test_a_source_that_gives_its_bytes_in_dribs_is_read_the_same(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    read, draw = os.readv, random.Random(3)
    monkeypatch.setattr(os, "readv", lambda fd, to: read(fd, [to[0][: draw.randint(1, 900)]]))
    _succeeds(job, making.gzipped(making.tar(MEMBERS), members=3))


# ------------------------------------------------------------------------------------------------------------ salvage


def _salvaged(tmp_path: Path, data: bytes, seen: Sequence[Member], *, plain: bool = True) -> None:
    """Salvage these bytes: exactly the members `seen` are accounted for, the pairs among them are samples."""
    job = _job(tmp_path, data, on_damage="salvage", max_quarantine=ALL)
    keys = [m.key for m in seen]
    whole = [m for m in seen if keys.count(m.key) == 2]
    if not whole:
        with pytest.raises(TooFewSamples):
            run_task(job, 0)
        running.check_no_trace(job.destination.root)
        return
    run_task(job, 0)
    manifest = finalize(job.destination)
    dest = job.destination.root
    running.check_accounts(dest)
    running.check_samples(dest, whole)
    (receipt,) = running.receipts(dest)
    assert receipt.on_damage == "salvage"
    (fact,) = receipt.sources
    assert fact.skipped, "salvaged without a word"
    assert all(s.reason for s in fact.skipped)
    assert fact.members == len(seen) + 1  # the directory
    orphans = {m.name: m.data for m in seen if m not in whole}
    assert {q.name: q.data for q in quarantined(dest)} == orphans
    assert manifest.totals.skipped_bytes == sum(s.bytes for s in fact.skipped)
    if plain:  # every byte of the file is a member's, skipped, or the end's
        spans = sum(len(making.packed(m)) for m in seen) + BLOCK
        spans = min(spans, len(data))  # a cut may take nothing but padding
        rest = len(data) - spans - manifest.totals.skipped_bytes
        assert rest == 0 or (0 < rest <= len(END) and not data[-rest:].strip(b"\0"))


def test_salvage_of_a_cut_tar_keeps_every_member_before_the_cut(tmp_path: Path) -> None:
    whole, starts = making.tar(MEMBERS), making.offsets(MEMBERS)
    for cut in _cuts(len(whole)):
        if cut < BLOCK:
            continue
        seen = [m for m in MEMBERS if starts[m.name] + BLOCK + len(m.data) <= cut]
        _salvaged(tmp_path / str(cut), whole[:cut], seen)


@pytest.mark.parametrize("noise", [True, False])
def test_salvage_passes_over_the_member_whose_header_is_gone(tmp_path: Path, noise: bool) -> None:
    whole, starts = making.tar(MEMBERS), making.offsets(MEMBERS)
    for turn, lost in enumerate(MEMBERS):
        at = starts[lost.name]
        garbage = random.Random(turn).randbytes(BLOCK) if noise else bytes(BLOCK)
        folder = tmp_path / str(turn)
        _salvaged(folder, whole[:at] + garbage + whole[at + BLOCK :], [m for m in MEMBERS if m is not lost])
        skipped = running.receipts(folder / "out")[0].sources[0].skipped
        assert [s.byte for s in skipped] == ([at] if noise else [at, at + BLOCK])  # zeros: an end that is none, first
        assert sum(s.bytes for s in skipped) == len(making.packed(lost))


def test_salvage_goes_on_at_the_next_gzip_member(tmp_path: Path) -> None:
    ids = list(range(20, 32))
    parts = [making.pairs([i]) for i in ids]
    pieces = [making.tar(parts[0], end=b"")]
    pieces += [making.tar(p, directory=None, end=b"") for p in parts[1:]]
    pieces[-1] += END
    compressed = [bytearray(gzip.compress(p, 1)) for p in pieces]
    lost = 5
    compressed[lost][30] ^= 0xFF
    seen = [m for i, p in enumerate(parts) if i != lost for m in p]
    _salvaged(tmp_path, b"".join(compressed), seen, plain=False)
    (gap,) = [g for g in _gaps(tmp_path) if "is damaged at byte" in g[1]]
    begin = sum(map(len, compressed[:lost]))
    assert (
        begin
        < int(re.findall(r"at byte ([\d,]+) of the file", gap[1])[0].replace(",", ""))
        <= begin + len(compressed[lost])
    )
    vouched = int(re.findall(r"from byte ([\d,]+) to here", gap[1])[0].replace(",", ""))
    assert vouched == sum(map(len, pieces[:lost])) <= gap[0]


def _gaps(tmp_path: Path) -> list[tuple[int, str]]:
    return [(s.byte, s.reason) for r in running.receipts(tmp_path / "out") for f in r.sources for s in f.skipped]


def test_salvage_of_a_wrong_checksum_keeps_everything_and_says_that_nothing_vouches_for_it(tmp_path: Path) -> None:
    whole = making.tar(MEMBERS)
    data = bytearray(making.gzipped(whole))
    data[-8] ^= 1
    _salvaged(tmp_path, bytes(data), MEMBERS, plain=False)
    assert any("checksum differs" in reason and "from byte 0 to here" in reason for _, reason in _gaps(tmp_path))


def test_salvage_of_a_cut_gzip_stream_reports_the_rest_as_lost(tmp_path: Path) -> None:
    members = making.pairs(range(40, 60))
    whole = making.gzipped(making.tar(members))
    job = _job(tmp_path, whole[: len(whole) * 3 // 4], on_damage="salvage", max_quarantine=ALL)
    run_task(job, 0)
    finalize(job.destination)
    running.check_accounts(tmp_path / "out")
    wanted = {m.key: m for m in members}
    assert 5 < len(running.samples(tmp_path / "out")) < len(wanted)
    assert any("the gzip stream ends early" in reason for _, reason in _gaps(tmp_path))


def test_one_bad_source_is_salvaged_alone_and_the_others_stay(tmp_path: Path) -> None:
    sound = {f"sa_{i:06d}.tar": making.tar(making.pairs([i * 10, i * 10 + 1, i * 10 + 2])) for i in range(1, 4)}
    paths = running.write(tmp_path / "in", sound)
    undamaged = tmp_path / "undamaged"
    running.convert(paths, undamaged, mix=1)

    at = making.offsets(making.pairs([20, 21, 22]))["./sa_21.json"]
    data = sound["sa_000002.tar"]
    paths[1].write_bytes(data[:at] + b"?" * BLOCK + data[at + BLOCK :])
    job = job_of(paths, tmp_path / "out", mix=1)
    bad = next(i for i, t in enumerate(job.plan.tasks) if job.plan.sources[t.sources[0]].name == "sa_000002.tar")
    for index in range(3):
        if index == bad:
            with pytest.raises(SourceDamaged):
                run_task(job, index)
        else:
            run_task(job, index)
    # the receipt records how, the plan does not: the same plan goes on
    again = job_of(paths, tmp_path / "out", mix=1, on_damage="salvage", max_quarantine=0.5)
    running.run(again)
    running.check_accounts(tmp_path / "out")
    assert [r.on_damage == "salvage" for r in running.receipts(tmp_path / "out")] == [i == bad for i in range(3)]
    there, here = running.tree(undamaged), running.tree(tmp_path / "out")
    for index in set(range(3)) - {bad}:
        assert here[f"sa1b-train-{index:06d}.tar"] == there[f"sa1b-train-{index:06d}.tar"]
        assert here[f"receipts/task-{index:06d}.json"] == there[f"receipts/task-{index:06d}.json"]
    (orphan,) = quarantined(tmp_path / "out")
    assert (orphan.key, orphan.reason) == ("sa_21", "no sa_21.json in the same source")


def test_salvage_of_a_sound_source_changes_nothing_but_the_receipt(tmp_path: Path) -> None:
    paths = running.write(tmp_path / "in", {NAME: making.gzipped(making.tar(MEMBERS))})
    running.convert(paths, tmp_path / "a")
    running.convert(paths, tmp_path / "b", on_damage="salvage")
    a, b = running.tree(tmp_path / "a"), running.tree(tmp_path / "b")
    assert {n for n in a if a[n] != b.get(n)} == {"manifest.json", "receipts/task-000000.json"}
    assert set(a) == set(b)


def test_salvage_still_holds_to_max_quarantine(tmp_path: Path) -> None:
    whole = making.tar(MEMBERS)
    job = _job(tmp_path, whole[: making.offsets(MEMBERS)["./sa_11.json"] + 10], on_damage="salvage")
    with pytest.raises(TooManyQuarantined, match=r"no sa_11\.json in the same source"):
        run_task(job, 0)
    running.check_no_trace(job.destination.root)
    assert issubclass(TooManyQuarantined, DataError)
