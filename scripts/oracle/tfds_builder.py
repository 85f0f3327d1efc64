"""Hold `as_tfds` and `as_tf_dataset` against the real builder of TensorFlow Datasets, value by value.

Runs in the environment that `scripts/oracle/tfds` makes, with TensorFlow in it. The sources are synthetic tars in
Meta's layout (gzip under `.tar`, members in random order) and `tests/edges.py`; the builder downloads, unpacks and
records them by itself, unpatched, from a links file of `file://` addresses. What it gives is read back with
`tfds.as_numpy(tfds.load(...))`.

    python -m scripts.oracle.tfds_builder [--record FILE] [--samples 24]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.update(NO_GCE_CHECK="true", CUDA_VISIBLE_DEVICES="", TF_CPP_MIN_LOG_LEVEL="2", TFDS_DISABLE_TELEMETRY="1")

import numpy as np

from sa1b_wds import open
from sa1b_wds.errors import FormatError
from sa1b_wds.interop.tfds import FEATURES, as_tf_dataset, load
from tests import edges, making

PROGRAM = Path(sys.executable).with_name("sa1b-wds")
LINKS = "segment_anything_links.txt"


def sources(folder: Path, samples: int) -> None:
    """Synthetic tars, and one with the edges; real documents, where there are any, stay in this temporary folder."""
    command = [str(PROGRAM), "synth", str(folder), "--tars", "2", "--samples", str(samples)]
    subprocess.run(command, check=True)
    (folder / "sa_000900.tar").write_bytes(making.gzipped(making.tar([*edges.members(), *edges.photographs()])))


def built(folder: Path, work: Path) -> Any:
    """The real builder, prepared from these tars."""
    import tensorflow_datasets as tfds

    manual = work / "manual"
    manual.mkdir(parents=True)
    rows = [f"{path.name}\t{path.as_uri()}" for path in sorted(folder.iterdir())]
    (manual / LINKS).write_text("\n".join(["file_name\tcdn_link", *rows]) + "\n")
    builder = tfds.builder("segment_anything", data_dir=work / "data")
    how = tfds.download.DownloadConfig(manual_dir=manual, force_checksums_validation=False, verify_ssl=False)
    builder.download_and_prepare(download_dir=work / "downloads", download_config=how)
    return builder


def convert(folder: Path, dest: Path) -> None:
    command = [str(PROGRAM), "convert", str(folder), "--out", str(dest)]
    subprocess.run([*command, "--shard-size", "16MiB", "--mix", "2", "--workers", "1"], check=True)


def differences(expected: Any, found: Any, path: str = "") -> Iterator[str]:
    """Where two examples differ: in keys, types, dtypes, shapes or bytes."""
    if isinstance(expected, dict) or isinstance(found, dict):
        if type(expected) is not type(found) or list(expected) != list(found):
            yield f"{path}: expected {list(expected)}, found {list(found)}"
            return
        for name in expected:
            yield from differences(expected[name], found[name], f"{path}.{name}")
        return
    if type(expected) is not type(found):
        yield f"{path}: expected {type(expected)}, found {type(found)}"
    elif isinstance(expected, bytes):
        if expected != found:
            yield f"{path}: expected {expected!r}, found {found!r}"
    elif expected.dtype != found.dtype or expected.shape != found.shape:
        yield f"{path}: expected {expected.dtype} {expected.shape}, found {found.dtype} {found.shape}"
    elif expected.dtype == object:
        kinds = {type(value) for value in [*expected, *found]}
        if kinds - {bytes} or list(expected) != list(found):
            yield f"{path}: strings differ"
    elif expected.tobytes() != found.tobytes():
        wrong = int(np.sum(np.asarray(expected) != np.asarray(found)))
        yield f"{path}: {wrong:,} of {expected.size:,} values differ"


def values(example: Any) -> int:
    """How many numbers and strings an example has."""
    if isinstance(example, dict):
        return sum(values(value) for value in example.values())
    return 1 if isinstance(example, bytes) else int(example.size)


def specs(tree: Any) -> Any:
    """(dtype, shape) of every tensor spec of a tree, as `FEATURES` has them."""
    if isinstance(tree, dict):
        return {name: specs(tree[name]) for name in sorted(tree)}
    return tree.dtype.name, tuple(tree.shape.as_list())


def refused(work: Path) -> list[str]:
    """What the builder refuses, and whether we refuse it too: a line for each that only one of them takes."""
    wrong: list[str] = []
    cases: dict[str, dict[str, Any]] = {
        "two points": {"point_coords": [[1.0, 2.0], [3.0, 4.0]]},
        "a box outside": {"bbox": [30.0, 0.0, 3.0, 4.0]},
        "a box inside out": {"bbox": [3.0, 4.0, -1.0, 2.0]},
    }
    for number, (name, change) in enumerate(cases.items()):
        document = making.document(7, annotations=2)
        document["annotations"][1].update(change)
        if name == "two points":
            document["annotations"][0].update(change)
        folder, here = work / f"refused-{number}", work / f"builder-{number}"
        folder.mkdir()
        pair = [making.Member("./sa_7.jpg", making.jpg()), making.Member("./sa_7.json", making.text(document))]
        (folder / "sa_000000.tar").write_bytes(making.tar(pair))
        convert(folder, work / f"dest-{number}")
        try:
            built(folder, here)
        except Exception as error:
            print(f"{name}: TFDS says: {' '.join(str(error).split())[:120]}")
        else:
            wrong.append(f"{name}: TFDS takes it")
        try:
            print(load(work / f"dest-{number}")[0])
        except FormatError as error:
            print(f"{name}: we say: {error}")
        else:
            wrong.append(f"{name}: as_tfds takes it")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--record", type=Path)
    parser.add_argument("--samples", type=int, default=24)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sa1b-wds-oracle-") as name:
        work = Path(name)
        folder, dest = work / "sources", work / "dest"
        sources(folder, given.samples)
        convert(folder, dest)
        builder = built(folder, work)
        import tensorflow_datasets as tfds

        real = builder.as_dataset(split="train")
        ours = load(dest)
        found: list[str] = []
        count = numbers = masks = 0
        for expected in tfds.as_numpy(real):
            key = f"sa_{int(expected['image']['image_id'])}"
            found += [f"{key}{line}" for line in differences(expected, ours[key])]
            count, numbers = count + 1, numbers + values(expected)
            masks += len(expected["annotations"]["id"])
        if count != len(ours):
            found.append(f"{count:,} examples by TFDS, {len(ours):,} here")
        if specs(real.element_spec) != FEATURES:
            found.append(f"FEATURES: {specs(real.element_spec)}")
        # The tf.data.Dataset: its signature, and its values against our own, which were just held against TFDS'.
        made = as_tf_dataset(open(dest))
        if made.element_spec != real.element_spec:
            found.append(f"element_spec: {made.element_spec}")
        if int(made.cardinality()) != int(real.cardinality()):
            found.append("cardinality")
        for expected, example in zip(ours, tfds.as_numpy(made), strict=True):
            found += [f"as_tf_dataset{line}" for line in differences(expected, example)]
        # Slices: as many examples as TFDS gives.
        for split in ("train[:1%]", "train[10%:55%]", "train[-5:]", "train[:7]+train[90%:]", "train[33%:34%]"):
            try:
                theirs = int(builder.as_dataset(split=split).cardinality())
            except ValueError as error:
                assert "corresponds to no data" in str(error)  # what TFDS says of an empty slice
                theirs = 0
            mine = len(load(dest, split=split))
            if theirs != mine:
                found.append(f"{split}: {theirs} by TFDS, {mine} here")
        found += refused(work)
    for line in found:
        print(line)
    versions = {name: version(name) for name in ("tensorflow-datasets", "tensorflow-cpu", "numpy", "simplejpeg")}
    print(f"{count:,} examples, {masks:,} annotations, {numbers:,} values: {len(found):,} differences")
    if given.record:
        record = {"versions": versions, "examples": count, "annotations": masks, "values": numbers}
        given.record.write_text(json.dumps({**record, "differences": len(found)}, indent=1) + "\n")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
