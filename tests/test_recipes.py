"""The README's recipes for training code, run as they stand there, stopped and resumed: every image once an epoch."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from scripts import environments

from . import datasets

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = {found[1]: found[2] for found in re.finditer(r"(?ms)^```python\n# (\w+)\b[^\n]*\n(.*?)^```", README)}

# What a reader of the recipes brings along: a model, and a loss that here also writes down what it was given.
BEFORE = """
import atexit, json, os, sys
import torch
torch.set_num_threads(1)
SEEN = []
atexit.register(lambda: open("seen.json", "w").write(json.dumps(SEEN)))

def loss_of(model, batch):
    assert batch["image"].shape == (8, 3, 1024, 1024) and batch["masks"].shape == (8, 32, 256, 256)
    if len(SEEN) == int(os.environ.get("LEAVE_AFTER", -1)):
        raise SystemExit  # as if it was killed in the middle of a step
    SEEN.append(list(batch["key"]))
    few = batch["image"][:, :, ::64, ::64].float() / 255
    drawn = model(few) - batch["masks"][:, :1, ::16, ::16].float()
    return (drawn ** 2 * batch["valid"][:, :1, None, None]).mean()

model = torch.nn.Conv2d(3, 1, 3, padding=1)
"""


@pytest.fixture(scope="module")
def dest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return datasets.make(tmp_path_factory.mktemp("recipes"), [(45, 4)])


@pytest.fixture(scope="module")
def expected(dest: Path) -> list[list[str]]:
    """The keys of all batches of two epochs."""
    batches = []
    with datasets.open(dest).stream(batch_size=8, masks_per_image=32, threads=1) as stream:
        for _ in range(2):
            batches += [list(batch["key"]) for batch in stream]
    assert len(batches) == 2 * (45 // 8)
    return batches


def interpreter(name: str) -> str:
    """Of the environment that has what a recipe needs."""
    packages = {"torch": ["torch"], "decoder": ["torch", "webdataset"]}.get(name, ["torch", name])
    if all(find_spec(package) for package in packages):
        return sys.executable
    inside = environments.python("training")
    if inside is None:
        pytest.skip(f"{packages[-1].upper()} IS NOT INSTALLED: READERS=training scripts/test installs it")
    return str(inside)


def run(
    name: str, dest: Path, folder: Path, *changes: tuple[str, str], after: str = "", leave_after: int = -1
) -> list[list[str]]:
    """Run a recipe with a few words changed; the keys of the batches that its loss was given."""
    code = BLOCKS[name].replace("/data/shards", str(dest))
    for old, new in changes:
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    (folder / "seen.json").unlink(missing_ok=True)
    (folder / "recipe.py").write_text(BEFORE + code + after)
    environment = {
        **os.environ,
        "HOME": str(folder),
        "HF_HUB_OFFLINE": "1",
        "LEAVE_AFTER": str(leave_after),
        "PYTHONWARNINGS": "ignore",
    }
    command = [interpreter({"trainer": "transformers"}.get(name, name)), "recipe.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    seen: list[list[str]] = json.loads((folder / "seen.json").read_text())
    return seen


pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def test_torch(dest: Path, expected: list[list[str]], tmp_path: Path) -> None:
    interpreter("torch")
    stop = ('"run.pt")', '"run.pt")\n    raise SystemExit')
    first = run("torch", dest, tmp_path, stop)
    resume = ("optimizer = ", "stream.load_state_dict(torch.load('run.pt')['loader'])\noptimizer = ")
    assert first + run("torch", dest, tmp_path, resume) == expected


def test_lightning(dest: Path, expected: list[list[str]], tmp_path: Path) -> None:
    interpreter("lightning")
    quiet = "enable_progress_bar=False, logger=False, enable_model_summary=False"
    keep = "lightning.pytorch.callbacks.ModelCheckpoint('.', 'a', every_n_train_steps=3)"
    stop = ("max_epochs=2", f"max_epochs=2, {quiet}, callbacks=[{keep}]")
    first = run("lightning", dest, tmp_path, stop, leave_after=3)
    assert first == expected[:3]
    resume = ("fit(Training(model))", "fit(Training(model), ckpt_path='a.ckpt')")
    again = ("max_epochs=2", f"max_epochs=2, {quiet}")
    assert first + run("lightning", dest, tmp_path, again, resume) == expected
    # A checkpoint of the end of an epoch: the next one begins.
    whole = ("max_epochs=2", f"max_epochs=1, {quiet}, enable_checkpointing=False")
    assert run("lightning", dest, tmp_path, whole, after="trainer.save_checkpoint('a.ckpt')\n") == expected[:5]
    assert run("lightning", dest, tmp_path, again, resume) == expected[5:]


def test_accelerate(dest: Path, expected: list[list[str]], tmp_path: Path) -> None:
    interpreter("accelerate")
    leave = "if len(SEEN) == 3:\n            accelerator.save_state('checkpoint')\n            raise SystemExit"
    first = run("accelerate", dest, tmp_path, ("optimizer.zero_grad()", f"optimizer.zero_grad()\n        {leave}"))
    assert first == expected[:3]
    resume = ("for epoch in", "accelerator.load_state('checkpoint')\nfor epoch in")
    assert first + run("accelerate", dest, tmp_path, resume) == expected


def test_trainer(dest: Path, expected: list[list[str]], tmp_path: Path) -> None:
    interpreter("transformers")
    quiet = ", disable_tqdm=True, report_to=[], use_cpu=True"
    first = run("trainer", dest, tmp_path, ("num_train_epochs=2", f"max_steps=2{quiet}"))
    assert first == expected[:2]
    load = "stream.load_state_dict(json.loads(Path('run/checkpoint-2/loader.json').read_text()))\n"
    resume = ("trainer.train() ", f"{load}trainer.train(resume_from_checkpoint='run/checkpoint-2') ")
    again = run("trainer", dest, tmp_path, ("num_train_epochs=2", f"num_train_epochs=2{quiet}"), resume)
    assert first + again == expected


def test_decoder(dest: Path, tmp_path: Path) -> None:
    interpreter("decoder")
    after = """
for batch in loader:
    assert batch["image"].shape[1:] == (1024, 1024, 3) and batch["masks"].shape[1:] == (32, 256, 256)
    SEEN.append(list(batch["key"]))
"""
    seen = run("decoder", dest, tmp_path, after=after)
    keys = [key for batch in seen for key in batch]
    assert sorted(keys) == sorted(datasets.keys(datasets.open(dest)))
