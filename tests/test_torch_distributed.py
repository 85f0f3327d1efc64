"""Streams on real ranks: gloo processes on loopback, stopped anywhere, killed, resumed on another number of them."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install '.[torch]'")

import torch.distributed as dist  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from sa1b_wds.dataset import open  # noqa: E402
from sa1b_wds.errors import WorldError  # noqa: E402
from sa1b_wds.interop.torch import TorchStream  # noqa: E402
from sa1b_wds.state import merge_states  # noqa: E402

from . import datasets  # noqa: E402

if not dist.is_available():
    pytest.skip("this torch has no distributed part", allow_module_level=True)

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]

ROOT = Path(__file__).parents[1]
SAMPLES = 61

Task = dict[str, Any]


@pytest.fixture(scope="module")
def dest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return datasets.make(tmp_path_factory.mktemp("set"), ((40, 5), (21, 2)))


# ---- ranks that take tasks -------------------------------------------------------------------------------------------


SMALL: Task = {"batch_size": 2, "image_size": 16, "mask_size": 8, "masks_per_image": 2, "threads": 1}


def live(connection: Connection, dest: str) -> None:
    """A process that is a rank of one group after the other."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # nothing listens beyond loopback
    torch.set_num_threads(1)
    next(iter(open(dest).stream(**SMALL)))  # loads the kernels, once for all workers that are forked from here
    while True:
        task = connection.recv()
        if task is None:
            return
        try:
            connection.send(work(**task))
        except BaseException as error:
            connection.send(error)


def work(
    *, dest: str, rank: int, world: int, meet: str, state: Any, most: Sequence[int] | None, workers: int, options: Task
) -> Task:
    """Stream at most `most[rank]` batches of an epoch as one rank of a group; what it got and where it stands."""
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=world)
    try:
        stream = TorchStream(open(dest).stream(**{**SMALL, **options}))
        if state is not None:
            stream.load_state_dict(state)
        turns = DataLoader(stream, batch_size=None, num_workers=workers)
        length, keys, steps = len(stream), [], []
        now = stream.state_dict()
        epoch = stream.epoch
        if most is None or most[rank]:
            for batch in turns:
                keys += [k for k, pad in zip(batch["key"], batch["is_padding"].tolist(), strict=True) if not pad]
                steps.append(int(batch["step"][1]))
                now = stream.state_dict(after=batch)
                if most is not None and len(steps) == most[rank]:
                    break
        states: list[Any] = [None] * world
        dist.all_gather_object(states, now)
        return {
            "world": stream.stream.world, "len": length, "keys": keys, "steps": steps, "states": states,
            "epochs": (epoch, stream.epoch),
        }  # fmt: skip
    finally:
        dist.destroy_process_group()


Ranks = Callable[..., list[Task]]


@pytest.fixture(scope="module")
def ranks(dest: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """ranks(world, state=…, most=…): what each rank of a fresh group of real processes did."""
    context = multiprocessing.get_context("spawn")
    pairs = [context.Pipe() for _ in range(3)]
    processes = [context.Process(target=live, args=(theirs, str(dest))) for _, theirs in pairs]
    for process in processes:
        process.start()
    for _, theirs in pairs:
        theirs.close()  # so that a process that dies is an end of file here
    folder, count = tmp_path_factory.mktemp("groups"), iter(range(1000))

    def run(
        world: int, state: Any = None, most: Sequence[int] | None = None, workers: int = 0, **options: Any
    ) -> list[Task]:
        task = {"dest": str(dest), "world": world, "meet": str(folder / str(next(count))), "workers": workers}
        ours = [connection for connection, _ in pairs[:world]]
        for rank, connection in enumerate(ours):
            connection.send({**task, "rank": rank, "state": state, "most": most, "options": options})
        done = [connection.recv() for connection in ours]
        for error in done:
            if isinstance(error, BaseException):
                raise error
        return done

    yield run
    for ours, _ in pairs:
        ours.send(None)
        ours.close()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0


def all_keys(dest: Path) -> list[str]:
    return sorted(datasets.keys(open(dest)))


@pytest.mark.parametrize(("world", "workers"), [(2, 0), (2, 2), (3, 0)])
def test_an_epoch_on_all_ranks(dest: Path, ranks: Ranks, world: int, workers: int) -> None:
    for drop_last in (False, True):
        done = ranks(world, workers=workers, drop_last=drop_last)
        for rank, one in enumerate(done):
            assert (one["world"].rank, one["world"].size, one["world"].source) == (rank, world, "torch.distributed")
            full, rest = divmod(SAMPLES, 2 * world)
            assert one["len"] == len(one["steps"]) == full + (rest > 0 and not drop_last)
            assert one["states"] == [one["states"][0]] * world
            assert one["epochs"] == (0, 1)
        keys = [key for one in done for key in one["keys"]]
        assert len(set(keys)) == len(keys)
        if drop_last:
            assert len(keys) == SAMPLES // (2 * world) * 2 * world
        else:
            assert sorted(keys) == all_keys(dest)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_stop_anywhere_and_go_on_with_other_ranks(dest: Path, ranks: Ranks, seed: int, drop_last: bool) -> None:
    draw = random.Random(seed * 2 + drop_last)
    state, had, last = None, [], 0
    for turn in range(5):
        world = draw.choice([w for w in (1, 2, 3) if w != last])
        batches = draw.randint(0, 5) if turn < 4 else None
        done = ranks(
            world,
            state,
            None if batches is None else [batches] * world,
            workers=2 if world < 3 and turn == 1 + seed else 0,
            seed=seed,
            drop_last=drop_last,
        )
        assert len({len(one["steps"]) for one in done}) == len({one["len"] for one in done}) == 1
        assert all(one["states"] == [done[0]["states"][0]] * world for one in done)
        had += [key for one in done for key in one["keys"]]
        state = json.loads(json.dumps(done[0]["states"][0]))  # as rank 0 would save it
        last = world
    assert len(set(had)) == len(had)
    if drop_last:
        assert SAMPLES - 2 * 3 < len(had) <= SAMPLES  # less than a global batch of the ranks that ended the epoch
    else:
        assert sorted(had) == all_keys(dest)


def test_ranks_that_were_not_in_step(dest: Path, ranks: Ranks) -> None:
    done = ranks(3, None, [2, 4, 3], drop_last=False)
    had = [key for one in done for key in one["keys"]]
    assert len(had) == 2 * 9
    state = merge_states(done[0]["states"])
    for one in ranks(2, state, workers=2, drop_last=False):
        had += one["keys"]
    assert sorted(had) == all_keys(dest)


def test_a_launcher_that_contradicts_the_group_is_refused(
    dest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(WorldError, match="contradict"):
            open(dest).stream()
    finally:
        dist.destroy_process_group()


# ---- scripts/train.py, killed ----------------------------------------------------------------------------------------


class Run:
    """torchrun with scripts/train.py, for real; in a `with`, at whose end no process is left."""

    def __init__(self, folder: Path, shards: Path, world: int, *options: str) -> None:
        meet = folder / f"meet-{time.monotonic_ns()}"
        launcher = [
            *("--nproc-per-node", str(world), "--rdzv-backend", "c10d", "--rdzv-id", "test"),
            *("--rdzv-endpoint", f"{meet}-agents", "--rdzv-conf", "store_type=file"),
        ]
        script = [
            *(str(ROOT / "scripts/train.py"), str(shards), "--checkpoint", str(folder / "run.pt")),
            *("--init-method", f"file://{meet}", "--log-keys", str(folder / "keys"), *options),
        ]
        # Files to meet in, and loopback for gloo: nothing listens beyond this machine.
        environment = {
            **os.environ,
            "GLOO_SOCKET_IFNAME": "lo",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            "OMP_NUM_THREADS": "1",
        }
        self.folder = folder
        self.output = folder / f"output-{len(list(folder.glob('output-*')))}"
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *launcher, *script],
                stdout=file, stderr=subprocess.STDOUT, env=environment,
            )  # fmt: skip

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        ranks = self.ranks()
        self.process.kill()
        self.process.wait()
        for pid in ranks:
            self.kill(pid)
        self.wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks), "the ranks to end")

    def ranks(self) -> list[int]:
        """Process ids of the ranks that live."""
        try:
            return [
                int(pid)
                for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
            ]
        except OSError:
            return []

    @staticmethod
    def kill(pid: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def text(self) -> str:
        return self.output.read_text()

    def wait_for(self, true: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + 60
        while not true():
            assert time.monotonic() < end, f"waited for {what}:\n{self.text()}"
            time.sleep(0.02)

    def steps(self, first: int) -> int:
        """How many steps rank 0 has taken of the run that began after step `first`."""
        path = self.folder / "keys" / f"from-{first:06d}-rank-0.txt"
        return len(path.read_text().splitlines()) if path.exists() else 0


def delivered(folder: Path) -> list[str]:
    """The keys of all steps that count: those of a run up to the checkpoint that the next one resumed from."""
    logs = sorted((folder / "keys").glob("from-*"))
    starts = sorted({int(path.name.split("-")[1]) for path in logs})
    end = dict(zip(starts, [*starts[1:], 1 << 30], strict=True))
    out = []
    for path in logs:
        for line in path.read_text().splitlines():
            step, *keys = line.split(" ")
            if int(step) <= end[int(path.name.split("-")[1])]:
                out += keys
    return out


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the ranks to kill in /proc")
def test_training_is_killed_and_goes_on_with_other_ranks(tmp_path: Path) -> None:
    """kill -9 of one of two ranks, then of a single one and its launcher, then three ranks to the end of the epoch."""
    shards = datasets.make(tmp_path / "set", ((420, 6),))
    options = ["--batch-size=1", "--image-size=32", "--mask-size=16", "--masks-per-image=2", "--threads=1"]
    options += ["--save-every=4", "--print-every=1"]
    with Run(tmp_path, shards, 2, *options) as run:
        run.wait_for(lambda: run.steps(0) >= 21, "21 steps")
        run.kill(run.ranks()[1])
        assert run.process.wait(60) != 0
    assert "epoch 0 step 20: loss" in run.text() and "of the time waiting for data" in run.text()
    first = torch.load(tmp_path / "run.pt", weights_only=True)
    start = first["step"]
    assert start >= 20 and start % 4 == 0
    assert first["loader"]["legs"][-1][-1] == start

    with Run(tmp_path, shards, 1, *options, "--runs") as run:
        run.wait_for(lambda: run.steps(start) >= 30, "30 steps")
        (only,) = run.ranks()
        run.process.kill()
        run.kill(only)
    assert f"resumed after step {start}, at the next image of epoch 0; ranks: 2 before, 1 now" in run.text()
    second = torch.load(tmp_path / "run.pt", weights_only=True)["step"]
    assert second >= start + 28

    with Run(tmp_path, shards, 3, *options) as run:
        assert run.process.wait(90) == 0, run.text()
    assert f"resumed after step {second}, at the next image of epoch 0; ranks: 1 before, 3 now" in run.text()
    last = torch.load(tmp_path / "run.pt", weights_only=True)
    assert last["loader"]["epoch"] == 1
    assert f"done after step {last['step']}" in run.text()
    assert not (tmp_path / "run.pt.part").exists()

    keys = delivered(tmp_path)
    assert len(keys) == 420
    assert sorted(keys) == all_keys(shards)
    # What the killed runs had done since their last checkpoint was done again: some keys stand in the logs twice.
    lines = [line for path in (tmp_path / "keys").iterdir() for line in path.read_text().splitlines()]
    assert sum(len(line.split()) - 1 for line in lines) > 420
