"""Data sets and streams on object stores: the same samples in the same order, over a network that breaks."""

import hashlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import sa1b_wds
from sa1b_wds import cli, export
from sa1b_wds.batch import Batch
from sa1b_wds.errors import Incomplete, NotFound, ShardDamaged, StorageError, Unreachable
from sa1b_wds.objects import Bucket
from sa1b_wds.restore import restore
from sa1b_wds.storage import Destination

from . import datasets, servers
from .fault_proxy import Fault, FaultProxy

PLACE = f"s3://{servers.BUCKET}/stream"
OPTIONS = {"image_size": 32, "mask_size": 16, "masks_per_image": 2, "batch_size": 2, "seed": 3}


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return datasets.make(tmp_path_factory.mktemp("remote"), ((20, 2), (21, 2)))


@pytest.fixture(scope="module")
def uploaded(local: Path, s3: servers.Server) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3.environment().items():
            patch.setenv(name, value)
        for path in local.rglob("*"):
            if path.is_file():
                Bucket(PLACE).put(str(path.relative_to(local)), path.read_bytes())


@pytest.fixture
def proxy(s3: servers.Server, uploaded: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with FaultProxy(s3.address) as proxy:
        for name, value in s3.environment(proxy.url).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("SA1B_WDS_FIRST_WAIT", "0.01")
        yield proxy


@pytest.mark.parametrize("workers", [1, 2])
def test_an_export_from_s3(local: Path, proxy: FaultProxy, tmp_path: Path, workers: int) -> None:
    """Only the annotations' bytes come over the network, some after a connection broke."""
    export.annotations_only(sa1b_wds.open(local), str(tmp_path / "here"))
    fault = Fault(cut=700, every=9, times=float("inf"), when=lambda r: r.is_read and r.path.endswith(".tar"))
    proxy.faults.append(fault)
    export.annotations_only(sa1b_wds.open(PLACE), str(tmp_path / "there"), workers=workers)
    for path in (tmp_path / "here").rglob("*"):
        if path.is_file():
            assert (tmp_path / "there" / path.relative_to(tmp_path / "here")).read_bytes() == path.read_bytes()
    assert fault.happened > 2


def digest_of(location: str | Path, rank: int = 0, world: int = 1) -> list[str]:
    """A hash of each batch of a rank's epoch."""
    stream = sa1b_wds.open(location).stream(rank=rank, world_size=world, threads=2, **OPTIONS)
    return [batch_digest(batch) for batch in stream]


def batch_digest(batch: Batch) -> str:
    """A hash of all that a batch holds, and its keys."""
    parts = [f"{k}".encode() + (np.ascontiguousarray(v).tobytes() if k != "key" else b"") for k, v in batch.items()]
    return hashlib.sha256(b"".join(parts)).hexdigest() + " " + " ".join(batch["key"])


def same_samples(a: object, b: object) -> None:
    assert isinstance(a, sa1b_wds.Dataset)
    assert isinstance(b, sa1b_wds.Dataset)
    assert len(a) == len(b)
    for i in range(0, len(a), 5):
        assert (a[i].key, a[i].jpg, a[i].packed) == (b[i].key, b[i].jpg, b[i].packed)


def test_open_reads_the_manifest_and_samples_their_own_bytes(local: Path, proxy: FaultProxy) -> None:
    here, there = sa1b_wds.open(local), sa1b_wds.open(PLACE)
    assert len(proxy.requests) < 6
    same_samples(here, there)
    key = here[7].key
    assert there[key].json == here[key].json
    assert key in there
    assert "sa_999" not in there
    same_samples(sa1b_wds.open(local, split="train[30%:60%]"), sa1b_wds.open(PLACE, split="train[30%:60%]"))
    same_samples(here.select([here[3].key]), there.select([here[3].key]))
    whole = [r for r in proxy.requests if r.path.endswith(".tar") and r.method == "GET" and "range" not in r.headers]
    assert not whole


def test_a_stream_from_s3_is_the_same(local: Path, proxy: FaultProxy) -> None:
    assert digest_of(PLACE) == digest_of(local)


def test_resume_on_s3(local: Path, proxy: FaultProxy) -> None:
    stream = sa1b_wds.open(local).stream(rank=0, world_size=1, threads=2, **OPTIONS)
    seen = [next(iter(stream))["key"] for _ in range(1)]
    state = stream.state_dict()
    rest = [list(batch["key"]) for batch in stream]
    there = sa1b_wds.open(PLACE).stream(rank=0, world_size=1, threads=2, **OPTIONS)
    there.load_state_dict(state)
    assert [list(batch["key"]) for batch in there] == rest
    assert seen


RANK = """
import json, sys
from tests.test_stream_remote import PLACE, digest_of
print(json.dumps(digest_of(PLACE, int(sys.argv[1]), 3)))
"""


def test_three_ranks_while_one_connection_in_twenty_breaks(local: Path, proxy: FaultProxy) -> None:
    fault = Fault(cut=3000, every=20, times=float("inf"), when=lambda r: r.is_read)
    proxy.faults.append(fault)
    command = [sys.executable, "-c", RANK]
    root = Path(__file__).parents[1]
    ranks = [subprocess.Popen([*command, str(r)], stdout=subprocess.PIPE, cwd=root, env=os.environ) for r in range(3)]
    got = [json.loads(rank.communicate(timeout=100)[0]) for rank in ranks]
    assert fault.happened >= 2
    assert got == [digest_of(local, rank, 3) for rank in range(3)]
    keys = [key for rank in got for batch in rank for key in batch.split()[1:]]
    assert len(keys) == len(set(keys)) == 36  # 41 samples, whole global batches of 6


def test_shard_lists(local: Path, proxy: FaultProxy) -> None:
    urls = f"{PLACE}/sa1b-train-{{000000..000003}}.tar"
    same_samples(sa1b_wds.open(f"{local}/sa1b-train-{{000000..000003}}.tar"), sa1b_wds.open(urls))
    proxy.faults.append(Fault(status=404, times=999, when=lambda r: r.path.endswith(".tar.idx")))
    same_samples(sa1b_wds.open(local), sa1b_wds.open(urls))
    with pytest.raises(NotFound):
        sa1b_wds.open(f"{PLACE}/sa1b-train-000009.tar")
    with pytest.raises(NotFound):
        sa1b_wds.open(f"{PLACE}/nothing")
    Bucket(f"{PLACE}-unfinished").put("plan.json", b"{}")
    with pytest.raises(Incomplete):
        sa1b_wds.open(f"{PLACE}-unfinished")


def test_gcs(local: Path, gcs: servers.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://{gcs.address}")
    for path in local.rglob("*"):
        if path.is_file():
            servers.gcs_put(gcs, f"ds/{path.relative_to(local)}".replace("/", "%2F"), path.read_bytes())
    place = f"gs://{servers.BUCKET}/ds"
    same_samples(sa1b_wds.open(local), sa1b_wds.open(place))
    assert digest_of(place) == digest_of(local)
    assert cli.main(["verify", place]) == 0


def test_a_web_server(local: Path) -> None:
    files = {f"/d/{path.relative_to(local)}": path.read_bytes() for path in local.rglob("*") if path.is_file()}
    with FaultProxy(files) as web:
        same_samples(sa1b_wds.open(local), sa1b_wds.open(f"{web.url}/d"))
        assert digest_of(f"{web.url}/d") == digest_of(local)
        signed = [f"{web.url}/d/sa1b-train-{n:06d}.tar?oh=HUSH" for n in range(4)]
        ds = sa1b_wds.open(signed)
        same_samples(sa1b_wds.open(local), ds)
        assert "HUSH" not in repr(ds)


def test_commands_as_shards(local: Path, proxy: FaultProxy) -> None:
    """Any command that writes a tar to its standard output; here one that reads from S3."""
    code = "import sys; from sa1b_wds.remote import read; sys.stdout.buffer.write(read(sys.argv[1]))"
    command = f"pipe:{shlex.join([sys.executable, '-c', code])} {PLACE}/sa1b-train-{{000000..000003}}.tar"
    ds = sa1b_wds.open(command)
    assert len(ds) == 41
    here = digest_of(f"{local}/sa1b-train-{{000000..000003}}.tar")
    assert sorted(k for b in digest_of(command) for k in b.split()[1:]) == sorted(
        k for b in here for k in b.split()[1:]
    )
    with pytest.raises(StorageError, match="the command failed"):
        sa1b_wds.open(f"{command}x")


def test_damage_on_s3(local: Path, proxy: FaultProxy) -> None:
    place = f"{PLACE}-damaged"
    for path in local.rglob("*"):
        if path.is_file():
            data = bytearray(path.read_bytes())
            if path.name == "sa1b-train-000001.tar":
                data[2000] ^= 1
            if path.name == "sa1b-train-000002.tar":
                del data[-1:]
            Bucket(place).put(str(path.relative_to(local)), bytes(data))
    ds = sa1b_wds.open(place)
    with pytest.raises(ShardDamaged, match=r"s3://.*000001\.tar: byte 0: sa_\d+: CRC-32"):
        ds[int(ds.shards.counts[0])]
    with pytest.raises(ShardDamaged, match="length differs"):
        ds[int(ds.shards.counts[:2].sum())]
    assert cli.main(["verify", place]) == 3


def test_a_dead_store_is_an_error_not_a_hang(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SA1B_WDS_ATTEMPTS", "2")
    stream = sa1b_wds.open(PLACE).stream(rank=0, world_size=1, threads=2, **OPTIONS)
    proxy.faults.append(Fault(status=503, times=float("inf")))
    with pytest.raises(Unreachable, match="503"):
        list(stream)


def test_restore_and_stats_from_s3(local: Path, proxy: FaultProxy, tmp_path: Path) -> None:
    restore(Destination(PLACE), tmp_path / "there")
    restore(Destination(str(local)), tmp_path / "here")
    names = sorted(p.name for p in (tmp_path / "here").iterdir())
    assert names
    for name in names:
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
    assert cli.main(["stats", PLACE]) == 0


@pytest.fixture
def aws(proxy: FaultProxy) -> str:
    """The AWS CLI, as a command."""
    program = Path(sys.executable).parent / "aws"
    if not program.exists():
        pytest.skip("##### NO AWS CLI: pip install awscli (part of the `test` extra) #####")
    return shlex.quote(str(program))


def test_the_aws_cli(aws: str, local: Path, tmp_path: Path) -> None:
    """`pipe:aws s3 cp s3://… -`: as a source, as shards, and in a plain webdataset pipeline."""
    url = f"pipe:{aws} s3 cp --quiet {PLACE}/sa1b-train-{{000000..000001}}.tar -"
    ds = sa1b_wds.open(url)
    here = sa1b_wds.open(f"{local}/sa1b-train-{{000000..000001}}.tar")
    assert datasets_keys(ds) == datasets_keys(here)
    with pytest.raises(StorageError, match="the command failed"):
        sa1b_wds.open(f"pipe:{aws} s3 cp --quiet {PLACE}/none.tar -")
    tar = sorted((local.parent / "sources").glob("*.tar"))[0]
    Bucket(f"{PLACE}-in").put("sa_000000.tar", tar.read_bytes())
    source = f"pipe:{aws} s3 cp --quiet {PLACE}-in/sa_000000.tar -"
    size = str(tar.stat().st_size)
    assert cli.main(["convert", source, "--out", str(tmp_path / "out"), "--assume-size", size, "--workers", "1"]) == 0
    assert cli.main(["verify", str(tmp_path / "out"), "--against", str(tar)]) == 0


def datasets_keys(ds: sa1b_wds.Dataset) -> list[str]:
    return [sample.key for sample in ds]
