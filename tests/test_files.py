"""Files written past the page cache, and the ways out of it: the bytes are always those that were handed over."""

import errno
import mmap
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sa1b_wds import files
from sa1b_wds.errors import NoSpace
from sa1b_wds.files import FileWriter

_O_DIRECT = getattr(os, "O_DIRECT", 0)


def _memory(size: int, seed: int) -> memoryview:
    """Bytes at the start of a page, as a sample's are."""
    view = memoryview(mmap.mmap(-1, max(1, size)))[:size]
    view[:] = np.random.default_rng(seed).bytes(size)
    return view


def _takes_it(folder: Path) -> bool:
    try:
        os.close(os.open(folder / "probe", os.O_WRONLY | os.O_CREAT | _O_DIRECT, 0o600))
    except OSError:
        return False
    return bool(_O_DIRECT)


@pytest.fixture(params=["past the cache", "through the cache"])
def way(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    direct = request.param == "past the cache"
    if direct and not _takes_it(tmp_path):
        pytest.skip(f"{tmp_path} is on a file system without O_DIRECT: the way past the cache is not tested here")
    monkeypatch.setattr(files, "_way", lambda device: _O_DIRECT if direct else 0)
    return str(request.param)


def _written(path: Path, writes: Sequence[Sequence[memoryview]]) -> bytes:
    path.unlink(missing_ok=True)
    writer = FileWriter(path, str(path))
    for pieces in writes:
        writer.write(pieces)
    writer.finish()
    writer.close()
    return path.read_bytes()


# Sectors, as a shard has them; now and then a size or an address that is none, which ends the way past the cache.
_piece = st.tuples(
    st.one_of(st.integers(0, 40).map(lambda n: n * 512), st.integers(0, 20_000)), st.sampled_from([0, 0, 0, 512, 1])
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(_piece, max_size=4), max_size=8))
def test_the_file_has_the_bytes_of_all_pieces(way: str, tmp_path: Path, writes: list[list[tuple[int, int]]]) -> None:
    made = [[_memory(n + at, i * 10 + j)[at:] for j, (n, at) in enumerate(row)] for i, row in enumerate(writes)]
    assert _written(tmp_path / "file", made) == b"".join(bytes(p) for row in made for p in row)


def test_a_shard_goes_past_the_cache_to_its_last_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not _takes_it(tmp_path):
        pytest.skip(f"{tmp_path} is on a file system without O_DIRECT")
    monkeypatch.setattr(files, "_way", lambda device: _O_DIRECT)
    left: list[int] = []
    leave = FileWriter._leave_direct

    def watched(self: FileWriter) -> None:
        left.append(self._written)
        leave(self)

    monkeypatch.setattr(FileWriter, "_leave_direct", watched)
    made = [[_memory(512 * n, n), _memory(512 * 3, n + 1)] for n in (7, 100, 3, 2000, 1)]
    data = _written(tmp_path / "file", made)
    assert data == b"".join(bytes(p) for row in made for p in row)
    assert left == [len(data) // 4096 * 4096]


def _short(limit: int) -> Callable[[int, list[memoryview]], int]:
    real = os.writev

    def writev(descriptor: int, views: list[memoryview]) -> int:
        return real(descriptor, files._parted(views, limit)[0])

    return writev


@pytest.mark.parametrize("limit", [512, 4096, 5000 // 512 * 512, 3 * 4096])
def test_a_disk_that_takes_less_than_it_is_given(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    made = [[_memory(512 * n, n)] for n in (7, 100, 3)]
    monkeypatch.setattr(os, "writev", _short(limit))
    assert _written(tmp_path / "file", made) == b"".join(bytes(p) for row in made for p in row)


def test_a_full_disk_is_said(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, views: list[memoryview]) -> int:
        raise OSError(errno.ENOSPC, "no")

    monkeypatch.setattr(os, "writev", full)
    writer = FileWriter(tmp_path / "file", "here")
    with pytest.raises(NoSpace, match="here: no space left"):
        writer.write([_memory(8192, 1)])
    writer.close()


def test_a_file_system_that_refuses_to_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def refusing(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & _O_DIRECT:
            raise OSError(errno.EINVAL, "no O_DIRECT here")
        return opened(path, flags, mode)

    monkeypatch.setattr(files, "_way", lambda device: _O_DIRECT)
    monkeypatch.setattr(os, "open", refusing)
    made = [[_memory(9000, 1)]]
    assert _written(tmp_path / "file", made) == bytes(made[0][0])


def test_memory_and_what_nobody_knows_go_through_the_cache() -> None:
    shm = Path("/dev/shm")
    if files.is_memory(shm):
        assert files._way(shm.stat().st_dev) == 0
    assert files._way(os.makedev(4095, 1048575)) == 0
    assert files._file_system(os.makedev(4095, 1048575)) == ""
