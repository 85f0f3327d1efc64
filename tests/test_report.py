"""Stats: held against all values of the sources' own JSON, sorted."""

import json
import math
import random
from fractions import Fraction
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sa1b_wds import report
from sa1b_wds.errors import FormatError, NotFound, ShardDamaged
from sa1b_wds.report import Distribution, Statistics, statistics, table
from sa1b_wds.storage import Destination

from . import making, running

WIDTH = 2.0**-14
"""Of a bin, relative."""


def check(found: Distribution, values: npt.ArrayLike, *, exact: bool = False) -> None:
    """A distribution is what numpy says of all values."""
    array = np.asarray(values, np.float64)
    assert found.count == len(array)
    if not len(array):
        assert found == Distribution(count=0)
        return
    assert (found.min, found.max) == (array.min(), array.max())
    assert found.mean == pytest.approx(array.mean(), rel=1e-12, abs=1e-300)
    ordered = np.sort(array)
    for name, percent in (("p10", 10), ("p50", 50), ("p90", 90), ("p99", 99)):
        wanted, there = float(ordered[math.ceil(Fraction(percent * len(array), 100)) - 1]), getattr(found, name)
        if exact or (wanted == int(wanted) and abs(wanted) < 1 << 15):
            assert there == wanted, name
        else:
            # Towards zero, but never beyond the extremes.
            assert abs(wanted) * (1 - WIDTH) <= abs(there) or there in (found.min, found.max)
            assert there == pytest.approx(wanted, rel=WIDTH), name


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Destination, list[dict[str, object]]]:
    folder = tmp_path_factory.mktemp("report")
    sources = {f"sa_{i:06d}.tar": making.pairs(range(30 * i + 1, 30 * i + 26)) for i in range(3)}
    paths = running.write(folder / "sources", {name: making.tar(members) for name, members in sources.items()})
    running.convert(paths, folder / "dest", shards=3, mix=2)
    texts = [json.loads(m.data) for members in sources.values() for m in members if m.name.endswith("json")]
    return Destination(str(folder / "dest")), texts


def test_statistics_are_those_of_the_sources(made: tuple[Destination, list[dict[str, object]]]) -> None:
    destination, documents = made
    seen: list[tuple[int, int]] = []
    with running.undisturbed():
        found = statistics(destination, report=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (75, 75)
    annotations = [a for d in documents for a in d["annotations"]]  # type: ignore[attr-defined]
    check(found.masks_per_image, [len(d["annotations"]) for d in documents])  # type: ignore[arg-type]
    check(found.counts_length, [len(a["segmentation"]["counts"]) for a in annotations])
    check(found.area, [a["area"] for a in annotations])
    check(found.predicted_iou, [a["predicted_iou"] for a in annotations])
    check(found.stability_score, [a["stability_score"] for a in annotations])
    sizes = [p.stat().st_size for p in destination.root.glob("*.tar")]
    check(found.shard_bytes, sizes, exact=True)
    assert (found.shard_samples.count, found.totals.samples, found.totals.annotations) == (6, 75, len(annotations))
    assert found.totals.shards == len(sizes)


def test_the_same_every_time_and_as_json(made: tuple[Destination, list[dict[str, object]]]) -> None:
    found = statistics(made[0])
    assert statistics(made[0]) == found
    assert msgspec.json.decode(msgspec.json.encode(found), type=Statistics) == found


def test_the_table_has_a_line_for_each(made: tuple[Destination, list[dict[str, object]]]) -> None:
    found = statistics(made[0])
    lines = table(found).splitlines()
    assert lines[0].startswith("75 images, ")
    assert f"largest/smallest shard {found.shard_bytes.max / found.shard_bytes.min:.3f}" in lines[0]  # type: ignore[operator]
    assert [line.split("  ")[0] for line in lines[5:]] == [
        "bytes a shard",
        "samples a shard",
        "masks an image",
        "RLE characters a mask",
        "area, pixels",
        "predicted_iou",
        "stability_score",
    ]
    assert {len(line) for line in lines[4:]} == {len(lines[4])}
    assert {len(line[24:].split()) for line in lines[4:]} == {8}
    assert f"{found.area.count:,}" in lines[9]


def test_images_without_masks(tmp_path: Path) -> None:
    paths = running.write(tmp_path / "s", {"sa_000000.tar": making.tar(making.pairs(range(1, 4), annotations=0))})
    running.convert(paths, tmp_path / "dest", shards=1)
    found = statistics(Destination(str(tmp_path / "dest")))
    assert found.area == Distribution(count=0)
    assert found.masks_per_image == Distribution(count=3, min=0, p10=0, p50=0, p90=0, p99=0, max=0, mean=0)
    assert "–" in table(found)


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("manifest.json", FormatError),
        ("index/sa1b-train-000001.idx", FormatError),
        ("sa1b-train-000001.tar", ShardDamaged),
    ],
)
def test_damage_is_an_error(
    made: tuple[Destination, list[dict[str, object]]], name: str, error: type[Exception]
) -> None:
    path = made[0].path(name)
    data = path.read_bytes()
    try:
        path.write_bytes(data[: len(data) // 2])
        with running.undisturbed(), pytest.raises(error, match=name.rpartition("/")[2].split(".")[0]):
            statistics(made[0])
        path.unlink()
        with running.undisturbed(), pytest.raises(NotFound):
            statistics(made[0])
    finally:
        path.write_bytes(data)


@given(
    st.lists(
        st.lists(
            st.one_of(
                st.integers(0, 1 << 28).map(float),
                st.floats(-1e300, 1e300, allow_subnormal=False),
                st.floats(0.88, 1.0),
                st.sampled_from([0.0, -0.0, -1.0]),
            ),
            max_size=40,
        ),
        max_size=8,
    )
)
def test_bins_are_numpys_quantiles(shards: list[list[float]]) -> None:
    """In any order, cut anyhow, and with a join after every one."""
    results = []
    for order in (shards, list(reversed(shards))):
        bins = report._Bins()
        for values in order:
            other = report._Bins()
            other.add(np.array(values, np.float64))
            bins.merge(other)
            if bins.keys and random.Random(len(values)).random() < 0.5:
                bins._join()
        results.append(bins.distribution())
    everything = [v for values in shards for v in values]
    if everything and abs(sum(everything)) > 1e-6 * sum(map(abs, everything)):  # else the mean is all rounding
        check(results[0], everything)
    assert results[0] == results[1]


def test_many_shards_are_joined() -> None:
    bins = report._Bins()
    for i in range(1000):
        other = report._Bins()
        other.add(np.array([float(i % 100), 5.0]))
        bins.merge(other)
    assert len(bins.keys) <= 65
    found = bins.distribution()
    assert (found.count, found.p50, found.p99, found.max) == (2000, 5.0, 97.0, 99.0)
