"""The decoder in plain pipelines gives what a stream gives."""

import gc
import io
import json
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

import sa1b_wds
from sa1b_wds.errors import FormatError, ShardDamaged

from . import datasets

OPTIONS: dict[str, Any] = {
    "image_size": 32,
    "mask_size": 16,
    "masks_per_image": 3,
    "flip": 0.5,
    "scale": (0.5, 2.0),
    "seed": 3,
}


@pytest.fixture(autouse=True)
def webdataset_leaves_files_open() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()


@pytest.fixture(scope="module")
def dest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return datasets.make(tmp_path_factory.mktemp("set"), ((12, 2),))


def test_a_plain_pipeline_gives_what_a_stream_gives(dest: Path) -> None:
    truth = {}
    for batch in sa1b_wds.open(dest).stream(batch_size=1, rank=0, world_size=1, **OPTIONS):
        truth[batch["key"][0]] = {n: v[0] for n, v in batch.items() if n not in ("step", "is_padding")}  # type: ignore[index]
    urls = [str(t) for t in datasets.tars(dest)]
    pipeline = webdataset.WebDataset(urls, shardshuffle=False).map(sa1b_wds.decoder(**OPTIONS))
    seen = 0
    for sample in pipeline:
        expected = truth[sample["__key__"]]
        assert sample.keys() - {"__key__"} == expected.keys()
        for name, value in expected.items():
            assert np.array_equal(sample[name], value), name
        seen += 1
    assert seen == 12
    braces = f"pipe:cat {dest}/sa1b-train-{{000000..000001}}.tar"
    batched = webdataset.WebDataset(braces, shardshuffle=False).map(sa1b_wds.decoder(**OPTIONS)).batched(5)
    shapes = [batch["image"].shape for batch in batched]
    assert shapes == [(5, 32, 32, 3), (5, 32, 32, 3), (2, 32, 32, 3)]


def test_ragged(dest: Path) -> None:
    ds = sa1b_wds.open(dest)
    decode = sa1b_wds.decoder(**{**OPTIONS, "masks_per_image": None, "scale": (1.0, 1.0)})
    for sample in ds:
        made = decode({"__key__": sample.key, "jpg": sample.jpg, "safetensors": member(dest, sample.key)})
        assert made["annotation_id"].tolist() == sample.annotations.id.tolist()
        assert made["masks"].shape == (len(sample.annotations), 16, 16) and "valid" not in made


def member(dest: Path, key: str) -> bytes:
    return sa1b_wds.open(dest)[key].packed


def test_members_in_every_form_that_readers_give(dest: Path) -> None:
    sample = sa1b_wds.open(dest)[3]
    packed = member(dest, sample.key)
    decode = pickle.loads(pickle.dumps(sa1b_wds.decoder(**OPTIONS)))
    expected = decode({"__key__": sample.key, "jpg": sample.jpg, "safetensors": packed})
    forms: list[dict[str, Any]] = [
        {"__key__": f"./{sample.key}", ".jpg": io.BytesIO(sample.jpg), ".safetensors": io.BytesIO(packed)},  # wids
        {
            "__key__": sample.key,
            "jpg": np.frombuffer(sample.jpg, np.uint8),
            "safetensors": np.frombuffer(packed, np.uint8),
        },
        {"__key__": sample.key, "jpg": {"bytes": sample.jpg, "path": None}, "safetensors": packed},  # Hugging Face
        {"jpg": bytearray(sample.jpg), "safetensors": memoryview(packed)},
    ]
    for form in forms:
        made = decode(form)
        for name in expected:
            assert name.strip("_") == "key" or np.array_equal(made[name], expected[name]), name


def test_what_cannot_be_decoded(dest: Path) -> None:
    ds = sa1b_wds.open(dest)
    one, two = ds[0], ds[1]
    decode = sa1b_wds.decoder(**OPTIONS)
    with pytest.raises(FormatError, match="a member is missing"):
        decode({"__key__": one.key, "__url__": "x.tar", "jpg": one.jpg})
    with pytest.raises(FormatError, match=r"decoded already.*decode=False"):
        decode({"__key__": one.key, "jpg": one.image.tolist(), "safetensors": member(dest, one.key)})
    with pytest.raises(ShardDamaged, match=r"x.tar: .*annotations of another image"):
        decode({"__key__": one.key, "__url__": "x.tar", "jpg": one.jpg, "safetensors": member(dest, two.key)})
    with pytest.raises(ShardDamaged, match="jpg"):
        decode({"__key__": one.key, "jpg": one.jpg[:-300], "safetensors": member(dest, one.key)})
    with pytest.raises(FormatError):
        decode({"__key__": one.key, "jpg": one.jpg, "safetensors": member(dest, one.key)[:-5]})


def test_the_public_names_load_nothing_until_they_are_used(dest: Path) -> None:
    code = f"""
import sys, json, sa1b_wds
before = set(sys.modules)
names = sa1b_wds.__all__
ds = sa1b_wds.open({str(dest)!r})
opened = set(sys.modules)
sample = ds[0]
print(json.dumps([sorted(m for m in x if m in ("torch", "numba", "webdataset", "cv2", "simplejpeg", "obstore"))
                  for x in (before, set(sys.modules))]))
for name in names:
    assert getattr(sa1b_wds, name).__module__.startswith("sa1b_wds"), name
try:
    sa1b_wds.nothing
except AttributeError as error:
    assert "nothing" in str(error)
else:
    raise SystemExit("no error")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = json.loads(done.stdout)
    assert before == [] and set(after) <= {"numba"}  # the kernels, which annotations need
