"""Training as a job of a real Slurm: told to stop, put back into the queue, cancelled, gone on with on more nodes."""

from collections import Counter
from pathlib import Path

import pytest

from . import datasets, slurm
from .slurm import ENDED, ROOT, until

torch = pytest.importorskip("torch", reason="torch is not installed: pip install '.[torch]'")

from .test_torch_distributed import all_keys, delivered  # noqa: E402

pytestmark = pytest.mark.slow

OPTIONS = ["--batch-size=1", "--image-size=32", "--mask-size=16", "--masks-per-image=2", "--threads=1"]
EVERY = "1000000"
"""Steps from one checkpoint to the next: none is written but where a run is told to stop, or ends."""


@pytest.mark.timeout(240)  # three runs, each of which imports torch in two or three processes on two cores
def test_training_goes_on_after_preemption_with_nothing_lost_or_repeated(tmp_path: Path) -> None:
    shards = datasets.make(tmp_path / "set", ((700, 6),))
    folder = tmp_path / "slurm"
    folder.mkdir()
    # The ranks meet in a file, a new one for each start: a port would be open beyond loopback.
    (tmp_path / "train.py").write_text(
        "import os, runpy, sys\n"
        "meet = 'meet-' + os.environ['SLURM_JOB_ID'] + '-' + os.environ.get('SLURM_RESTART_COUNT', '0')\n"
        f"sys.argv += ['--init-method', 'file://{tmp_path}/' + meet]\n"
        f"runpy.run_path({str(ROOT / 'scripts/train.py')!r}, run_name='__main__')\n"
    )
    with slurm.cluster(folder, nodes=3) as cluster:
        for name, value in {
            "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
            "SA1B_WDS_TRAIN": str(tmp_path / "train.py"),
        }.items():  # fmt: skip
            cluster.environment[name] = value
        words = [ROOT / "scripts/slurm/train.sbatch", shards, "--checkpoint", tmp_path / "run.pt", *OPTIONS]
        words += ["--save-every", EVERY, "--log-keys", tmp_path / "keys"]

        def logs() -> str:
            said = [path.read_text(errors="replace") for path in sorted(tmp_path.glob("sa1b-train-*.log"))]
            return "\n".join([*said, cluster.run("scontrol", "show", "jobs")])

        def begun() -> list[int]:
            """After which step each run began."""
            return sorted({int(path.name.split("-")[1]) for path in (tmp_path / "keys").glob("from-*")})

        def steps(first: int) -> int:
            path = tmp_path / "keys" / f"from-{first:06d}-rank-0.txt"
            return len(path.read_text().splitlines()) if path.exists() else 0

        def step() -> int:
            return int(torch.load(tmp_path / "run.pt", weights_only=True)["step"])

        # Two nodes; the time limit's signal comes, the job puts itself back into the queue and goes on.
        job = cluster.sbatch("--nodes=2", "--ntasks-per-node=1", *words, cwd=tmp_path)
        until(lambda: steps(0) >= 15, logs)
        cluster.run("scancel", "--signal=USR1", job)
        cluster.wait(job, "PENDING")  # for some seconds: a node refuses what it has not cleaned up behind yet
        first = step()
        assert first >= 15 and f"stopped after step {first}" in logs()
        # The same job again, which is preempted for good: it ends as cleanly, and is not put back.
        until(lambda: steps(first) >= 15, logs)
        assert cluster.job(job)["Restarts"] == "1"
        assert f"resumed after step {first}, at the next image of epoch 0; ranks: 2 before, 2 now" in logs()
        cluster.run("scancel", job)
        assert cluster.wait(job, *ENDED)["JobState"] == "CANCELLED"
        until(lambda: (tmp_path / "run.pt").exists() and step() > first, logs)
        second = step()
        assert second >= first + 15 and f"stopped after step {second}" in logs()
        # Three nodes, to the end of the epoch.
        job = cluster.sbatch("--nodes=3", "--ntasks-per-node=1", *words, cwd=tmp_path)
        assert cluster.wait(job, *ENDED, seconds=120)["JobState"] == "COMPLETED", logs()
        assert f"resumed after step {second}, at the next image of epoch 0; ranks: 2 before, 3 now" in logs()
    assert begun() == [0, first, second]
    assert torch.load(tmp_path / "run.pt", weights_only=True)["loader"]["epoch"] == 1
    # Every step that was logged counts: nothing was done twice, nothing left out.
    logged = Counter(
        key
        for path in (tmp_path / "keys").iterdir()
        for line in path.read_text().splitlines()
        for key in line.split()[1:]
    )
    assert sorted(logged.elements()) == sorted(delivered(tmp_path)) == all_keys(shards)
