"""Every other reader of WebDataset shards on what this project writes; and its side files, byte by byte.

A reader whose library is not installed is skipped with a word on how to get it; what it would read is then held against
the form that its tool documents.
"""

import ast
import gzip
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sa1b_wds.annotations import restore, unpack
from scripts import environments, matrix

from . import edges, making

README = matrix.README.read_text(encoding="utf-8")
RECORD = json.loads(matrix.RECORD.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readers")


@pytest.fixture(scope="module")
def sets(work: Path) -> dict[str, Path]:
    return matrix.make_sets(work)


@pytest.fixture(scope="module")
def truths(sets: dict[str, Path]) -> dict[str, list[matrix.Row]]:
    return {kind: matrix.truth(dest) for kind, dest in sets.items()}


# ------------------------------------------------------------------------------------------------------------- readers


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", matrix.READERS)
def test_reader(name: str, sets: dict[str, Path], truths: dict[str, list[matrix.Row]], work: Path) -> None:
    why = matrix.command(name)
    if isinstance(why, str):
        pytest.skip(f"{matrix.READERS[name].title.upper()}: {why}; its side files are checked byte by byte instead")
    told = matrix.read(name, sets, work)
    assert told["read"].keys() == set(matrix.READERS[name].sets)
    for kind, ways in told["read"].items():
        for way, rows in ways.items():
            assert matrix.differences(truths[kind], rows) == [], f"{kind}: {way}"
            assert len(rows) == len(truths[kind]), f"{kind}: {way}"


def test_the_comparison_can_fail(truths: dict[str, list[matrix.Row]]) -> None:
    rows = truths[matrix.CONVERTED]
    key, jpg, member = rows[3]
    assert not matrix.differences(rows, [list(row) for row in rows[::-1]])
    for wrong in (
        rows[1:],
        [*rows, rows[0]],
        [*rows[:3], (key, jpg, jpg), *rows[4:]],
        [(key, None, member), *rows[1:]],
    ):
        assert matrix.differences(rows, wrong)
    assert matrix.differences(rows, [("", jpg, jpg) for jpg in map(str, range(len(rows)))])
    assert not matrix.differences(rows, [("", row[1], row[2]) for row in rows])


def test_the_truth_is_what_the_sources_hold(sets: dict[str, Path], work: Path) -> None:
    source: dict[str, bytes] = {}
    for path in (work / "sources").glob("*.tar"):
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        source |= {name.rpartition("/")[2]: member for name, member in making.read_tar(data) if member}
    both = {kind: dict(matrix.members(dest)) for kind, dest in sets.items()}
    for name, member in both[matrix.CONVERTED].items():
        key, _, suffix = name.partition(".")
        if suffix == "jpg":
            assert member == source[name]
        else:
            assert restore(unpack(member, name)) == source[f"{key}.json"]
            assert both[matrix.ALONE][name] == member
    assert len(both[matrix.CONVERTED]) == 2 * len(both[matrix.ALONE]) == len(source) > 2 * 30
    assert {m.name.removeprefix("./") for m in edges.members(tfds=False)} <= set(source)


# --------------------------------------------------------------------------------------------- side files, byte by byte


def by_shard(dest: Path) -> dict[str, list[tuple[int, str, int]]]:
    """Shard → (byte of its header, name, size) of each member."""
    out: dict[str, list[tuple[int, str, int]]] = {}
    for path in sorted(dest.glob("*.tar")):
        at, data = 0, path.read_bytes()
        rows = out.setdefault(path.name, [])
        while at < len(data) - 1024:
            size = int(data[at + 124 : at + 135], 8)
            rows.append((at, data[at : at + 100].rstrip(b"\0").decode(), size))
            at += 512 + -(-size // 512) * 512
        assert at == len(data) - 1024
    return out


@pytest.mark.parametrize("kind", [matrix.CONVERTED, matrix.ALONE])
def test_side_files_are_those_of_the_tools(sets: dict[str, Path], kind: str) -> None:
    dest, wide = sets[kind], 2 if kind == matrix.CONVERTED else 1
    shards = by_shard(dest)
    assert len(shards) > 1
    for name, members in shards.items():
        end = (dest / name).stat().st_size - 1024
        # Energon: int64, each sample's first header, then the end of the last.
        starts = [at for at, _, _ in members[::wide]] + [end]
        assert (dest / f"{name}.idx").read_bytes() == np.array(starts, "<i8").tobytes()
        # DALI, as its wds2idx writes it: suffix, byte of the data, bytes, name.
        lines = [f"v1.2 {len(members) // wide}"]
        for i in range(0, len(members), wide):
            parts = [f"{m.partition('.')[2]} {at + 512} {size} {m}" for at, m, size in members[i : i + wide]]
            lines.append(" ".join(parts))
        stem = name.removesuffix(".tar")
        assert (dest / "index" / f"{stem}.idx").read_text() == "\n".join(lines) + "\n"
    counts = {name: len(members) // wide for name, members in shards.items()}
    wids = json.loads((dest / "wids.json").read_text())
    assert (wids["__kind__"], wids["wids_version"]) == ("wids-shard-index-v1", 1)
    sizes = {name: (dest / name).stat().st_size for name in shards}
    assert wids["shardlist"] == [{"url": n, "nsamples": counts[n], "filesize": sizes[n]} for n in shards]
    assert json.loads((dest / ".nv-meta" / ".info.json").read_text())["shard_counts"] == counts
    last = len(shards) - 1
    assert (dest / ".nv-meta" / "split.yaml").read_text() == (
        f'exclude: []\nsplit_parts:\n  train:\n  - "sa1b-train-{{000000..{last:06d}}}.tar"\n  val: []\n  test: []\n'
    )
    card = (dest / "README.md").read_text().split("---\n")[1]
    assert ("name: jpg" in card) == (kind == matrix.CONVERTED)
    assert f"num_examples: {sum(counts.values())}\n" in card and 'path: "sa1b-train-*.tar"' in card
    # Readers that take every *.tar for data find nothing else.
    assert sorted(p.name for p in dest.rglob("*.tar*") if p.suffix == ".tar") == list(shards)


# -------------------------------------------------------------------------------------------------------------- README


def test_the_matrix_in_the_readme_is_what_was_recorded() -> None:
    assert matrix.spliced(README, RECORD) == README, "run scripts/readers --record"
    assert RECORD["readers"].keys() == matrix.READERS.keys()
    for name, of in RECORD["readers"].items():
        assert of["ways"].keys() == set(matrix.READERS[name].sets)
        for kind, ways in of["ways"].items():
            assert ways and all(way["differences"] == 0 for way in ways.values())
            assert all(way["samples"] == RECORD["samples"][kind] > 30 for way in ways.values())
        pinned = matrix.READERS[name].environment
        if pinned is not None:
            assert of["version"] == environments.REQUIREMENTS[pinned][0].partition("==")[2]


RECIPES = {found[1]: found[0] for found in re.finditer(r"(?ms)^```python\n# (\w+)\b[^\n]*\n.*?^```", README)}
COUNT = {
    "energon": "n = sum(bool(sample['jpg'] and sample['safetensors']) for sample in ds)",
    "wids": "n = sum(bool(ds[i]['.jpg'] and ds[i]['.safetensors']) for i in range(len(ds)))",
    "dali": "pipe = pipeline(); pipe.build(); n = pipe.reader_meta('reader')['epoch_size']\n"
    "for _ in range(n): assert all(len(out.at(0)) for out in pipe.run())",
}
BEFORE = {"ray": "import ray; ray.init(num_cpus=2, include_dashboard=False, object_store_memory=200 << 20)"}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["webdataset", "wids", "huggingface", "energon", "dali", "ray"])
def test_recipe(name: str, sets: dict[str, Path], truths: dict[str, list[matrix.Row]], tmp_path: Path) -> None:
    program = matrix.command(name)
    if isinstance(program, str):
        pytest.skip(f"{matrix.READERS[name].title.upper()}: {program}")
    dest = sets[matrix.CONVERTED]
    code = "\n".join(RECIPES[name].splitlines()[1:-1])
    ast.parse(code)
    last = len(list(dest.glob("*.tar"))) - 1
    code = code.replace("/data/shards", str(dest)).replace("{000000..000003}", f"{{000000..{last:06d}}}")
    count = COUNT.get(name, "n = sum(bool(sample['jpg'] and sample['safetensors']) for sample in ds)")
    script = tmp_path / "recipe.py"
    script.write_text("\n".join([BEFORE.get(name, ""), code, count, "print('samples', n)"]))
    quiet: dict[str, Any] = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    environment = {**os.environ, **quiet, "HOME": str(tmp_path), "PYTHONWARNINGS": "ignore"}
    command = [*program[:-2], str(script)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"samples {len(truths[matrix.CONVERTED])}" in done.stdout
