"""Where compiled kernels are kept: nobody else can put code there, and it is never that of another version."""

import os
import stat
import tempfile
from pathlib import Path

import numba
import pytest

from sa1b_wds import codes, jit


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of three modules in the place of this one."""
    (tmp_path / "jit.py").write_text("compiler")
    (tmp_path / "codes.py").write_text("@inline\ndef next_run(): ...")
    (tmp_path / "raster.py").write_text("@jit\ndef nearest(): ...")
    monkeypatch.setattr(jit, "__file__", str(tmp_path / "jit.py"))
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    return tmp_path


def test_the_folder_changes_with_the_pieces_that_are_inlined_elsewhere(package: Path) -> None:
    first = jit._cache_folder()
    assert first.parent == package / "__pycache__"
    (package / "raster.py").write_text("@jit\ndef nearest(): return 1")  # numba itself sees this
    assert jit._cache_folder() == first
    (package / "codes.py").write_text("@inline\ndef next_run(): return 1")
    second = jit._cache_folder()
    (package / "jit.py").write_text("another compiler")
    assert len({first, second, jit._cache_folder()}) == 3


def test_a_named_folder_goes_before_all(package: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "named"))
    assert jit._cache_folder().parent == tmp_path / "named"


def test_a_package_that_cannot_be_written_has_a_folder_of_this_user(
    package: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    own = jit._cache_folder().parent
    assert own == tmp_path / f"sa1b-wds-numba-{os.getuid()}"
    assert stat.S_IMODE(own.stat().st_mode) == 0o700
    assert jit._cache_folder().parent == own
    own.chmod(0o777)  # as if somebody else had been there first
    assert jit._cache_folder().parent != own
    own.rmdir()
    (tmp_path / "theirs").mkdir()
    own.symlink_to(tmp_path / "theirs")
    assert jit._cache_folder().parent != own


def test_kernels_are_kept_there_and_the_user_s_own_folder_is_left_alone() -> None:
    assert codes.scan_all._cache.cache_path.startswith(jit._FOLDER)  # type: ignore[attr-defined]
    assert os.environ.get("NUMBA_CACHE_DIR", "") == numba.config.CACHE_DIR  # type: ignore[attr-defined]
