"""What the whole archive asks for, on a tenth of its shards: counts and memory, never times (scripts/bench/scale).

Memory is that of a process of its own, beyond what it had when its imports were done.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sa1b_wds
from sa1b_wds.errors import DuplicateKey
from sa1b_wds.files import Scratch
from sa1b_wds.format import KEY_ROW, ROW
from sa1b_wds.manifest import side_names
from sa1b_wds.publication import finalize
from sa1b_wds.runs import Runs
from sa1b_wds.storage import Destination

from . import fabricated

MB = 10**6


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, fabricated.Archive]:
    dest = tmp_path_factory.mktemp("archive")
    made = fabricated.fabricate(dest, tars=100)
    assert 1_000 < made.plan.shards < 1_200
    return dest, made


def measured(code: str, dest: Path) -> dict[str, int]:
    """What a child's code says (a dict called `said`), and how much its memory grew in MB."""
    program = f"""
import json
import sa1b_wds, sa1b_wds.dataset, sa1b_wds.publication, sa1b_wds.storage, sa1b_wds.stream
def kilobytes(name):  # not ru_maxrss, which a new program takes over from the one that started it
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
dest, said, before = {str(dest)!r}, {{}}, kilobytes("VmRSS")
{code}
print(json.dumps({{**said, "grown": (kilobytes("VmHWM") - before) * 1024}}))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def published(archive: tuple[Path, fabricated.Archive]) -> tuple[Path, fabricated.Archive, dict[str, int]]:
    code = """
made = sa1b_wds.publication.finalize(sa1b_wds.storage.Destination(dest))
said = {"samples": made.totals.samples, "shards": made.totals.shards}
"""
    return *archive, measured(code, archive[0])


def test_finalize_holds_a_bounded_part_of_the_keys(
    published: tuple[Path, fabricated.Archive, dict[str, int]],
) -> None:
    dest, made, said = published
    assert (said["samples"], said["shards"]) == (made.samples, made.plan.shards)
    # 4 kB a shard, and two runs' worth of sorting; all keys by the straight way (sort, gather, join) are 100 MB here.
    assert said["grown"] < 70 * MB
    keys = np.fromfile(dest / "index/keys.bin", KEY_ROW)
    assert len(keys) == made.samples
    assert np.all(keys["image_id"][1:] > keys["image_id"][:-1])
    names = sorted(path.name for path in dest.glob("*.tar"))
    for number in (0, len(names) // 2, len(names) - 1):  # each of their rows is found where it stands
        rows = np.fromfile(dest / side_names(names[number])[1], ROW)
        at = np.searchsorted(keys["image_id"], rows["image_id"])
        assert np.array_equal(keys["image_id"][at], rows["image_id"])
        assert np.all(keys["shard"][at] == number)
        assert np.array_equal(keys["index"][at], np.arange(len(rows)))


def test_open_reads_the_manifest_alone(
    published: tuple[Path, fabricated.Archive, dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    dest, made, _ = published
    asked = []
    for name in ("read", "size", "exists", "names", "files_in"):
        whole = getattr(Destination, name)

        def counted(self: Destination, what: str = "", *, name: str = name, whole: object = whole) -> object:
            asked.append((name, what))
            return whole(self, what)  # type: ignore[operator]

        monkeypatch.setattr(Destination, name, counted)
    monkeypatch.setattr("sa1b_wds.dataset.open_ranged", None)
    ds = sa1b_wds.open(dest, split="train[:10%]+train[50%:]")
    assert asked == [("exists", "manifest.json"), ("read", "manifest.json")]
    assert abs(len(ds) - 0.6 * made.samples) < 2


def test_memory_of_open_and_stream_grows_with_the_shards_alone(
    published: tuple[Path, fabricated.Archive, dict[str, int]],
) -> None:
    dest, made, _ = published
    code = """
ds = sa1b_wds.open(dest)
for world in (1, 64, 4096):
    stream = ds.stream(batch_size=8, rank=world - 1, world_size=world)
    said[f"due {world}"] = len(stream.order.batch(0, world - 1).shard)
half = ds[: len(ds) // 2]
said["half"] = len(half)
"""
    said = measured(code, dest)
    assert [said[f"due {world}"] for world in (1, 64, 4096)] == [8, 8, 8]
    assert said["half"] == made.samples // 2
    # Twelve kilobytes a shard, and the lanes of 4,096 ranks: 2^17 of them, a few numbers each.
    assert said["grown"] < 12_000 * made.plan.shards + 24 * MB


def test_a_sample_by_its_key(published: tuple[Path, fabricated.Archive, dict[str, int]]) -> None:
    dest, made, _ = published
    ds = sa1b_wds.open(dest)
    assert ds[made.key].jpg == made.jpg
    assert made.key == "sa_223750"
    assert "sa_999999999" not in ds


def test_a_state_is_small_whatever_happened(published: tuple[Path, fabricated.Archive, dict[str, int]]) -> None:
    """It does not grow with shards at all, and with ranks only where they were out of step."""
    dest, _, _ = published
    ds = sa1b_wds.open(dest)
    stream = ds.stream(batch_size=8, rank=0, world_size=4096)
    assert len(json.dumps(stream.state_dict())) < 300
    state = stream.state_dict()
    lanes, block = state["legs"][-1][2:4]
    state["legs"] = [[8 + n, 8, lanes, block, 1, 1] for n in range(20)] + [[4096, 8, lanes, block, 1, [2, 3] * 2048]]
    stream.load_state_dict(state)
    assert len(stream.state_dict()["legs"]) == 22  # ranks out of step begin another
    assert len(json.dumps(stream.state_dict())) < 100_000


# ---------------------------------------------------------------------------------------------------------------- rows


@given(
    st.lists(st.lists(st.integers(-5, 40) | st.integers(-(2**63), 2**63 - 1), max_size=30), max_size=12),
    st.integers(1, 40),
    st.integers(1, 9),
)
def test_runs_are_one_sort(parts: list[list[int]], run: int, block: int) -> None:
    scratch = Scratch(Path(tempfile.gettempdir()))
    try:
        runs, flat = Runs(scratch, run=run, block=block), []
        for number, part in enumerate(parts):
            rows = np.zeros(len(part), KEY_ROW)
            rows["image_id"], rows["shard"], rows["index"] = part, number, np.arange(len(part))
            runs.add(rows)
            flat += rows.tolist()
        found = [row for piece in runs.merged() for row in piece.tolist()]
    finally:
        scratch.close()
    assert [row[0] for row in found] == sorted(row[0] for row in flat)
    assert sorted(found) == sorted(flat)


def test_keys_that_meet_at_a_seam_of_pieces_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One run in blocks of one row: every pair of equal keys is in two pieces."""
    monkeypatch.setattr("sa1b_wds.publication.Runs", lambda scratch: Runs(scratch, run=24, block=1))
    monkeypatch.setattr(fabricated, "ids", lambda tars, images: [np.arange(1, images + 1) for _ in range(tars)])
    fabricated.fabricate(tmp_path, tars=2, images=12, tar_bytes=4 << 20, shard_size=1 << 20, mix=1)
    with pytest.raises(DuplicateKey, match=r"sa_1 stands in two sources: .*12 keys in all"):
        finalize(Destination(str(tmp_path)))
    assert not (tmp_path / "index/keys.bin").exists()
