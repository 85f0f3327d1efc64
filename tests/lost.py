"""A data set whose writer dies just after it has published a task, before anybody hears of it."""

import os
import signal
from pathlib import Path

from sa1b_wds import engines_ray
from sa1b_wds.convert import Outcome
from sa1b_wds.publication import finalize
from sa1b_wds.storage import Destination

from . import running


class Dying(Destination):
    """The first time that a heartbeat says that a task is done, its process is killed."""

    def __reduce__(self) -> tuple[type[Destination], tuple[str]]:
        return Dying, (self.where,)

    def put(self, name: str, data: bytes) -> None:
        died = self.root.parent / "died"
        if name.startswith(".state/task-") and b'"ended":true' in data and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        super().put(name, data)


def main(folder: str, dest: str) -> None:
    job = running.job_of(sorted(Path(folder).glob("*.tar")), Path(dest), mix=1)
    tasks = list(range(len(job.plan.tasks)))
    engine = engines_ray.engine(cpus_per_task=1, say=lambda text: print(text, flush=True))
    dying = type(job)(destination=Dying(dest), plan=job.plan, locations=job.locations, options=job.options)
    for ended in engine(dying, tasks, lambda progress: None):
        assert isinstance(ended, Outcome), ended
        print("ended", ended.task, "done before" if ended.already_done else "", flush=True)
    finalize(job.destination)
