"""Train a small mask decoder on converted shards: a whole loop to copy, stopped at any moment, resumed exactly.

torchrun --nproc-per-node 2 scripts/train.py SHARDS --checkpoint run.pt

Kill it, even with kill -9, and start it again, on as many processes as before or any other number: it goes on after the
last checkpoint, and over an epoch every image is trained on exactly once. All that takes is `stream.state_dict()` in
the checkpoint. Runs without torchrun too, and on GPUs where there are some.

A batch system that takes the machines back says so first, by SIGUSR1 or SIGTERM: then all ranks end after the same
step, which is in the checkpoint, with exit status 75 (scripts/slurm/train.sbatch starts it again).

The model is a toy: strided convolutions see the image, and for each prompt point a small network makes the weights with
which the pixels' features become a mask. It shows where the parts of a batch go, not how to segment anything well.
"""

import argparse
import os
import signal
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

import sa1b_wds
from sa1b_wds.interop.torch import TorchStream, rasterise


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("shards", help="folder or URL that `sa1b-wds convert` wrote")
    parser.add_argument("--checkpoint", type=Path, required=True, help="is resumed from if it is there")
    parser.add_argument("--save-every", type=int, default=50, metavar="STEPS")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=8, help="of each process")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--mask-size", type=int, default=256)
    parser.add_argument("--masks-per-image", type=int, default=16)
    parser.add_argument("--runs", action="store_true", help="load masks as runs, and draw them on the device")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="that decode, in each process")
    parser.add_argument("--print-every", type=int, default=10, metavar="STEPS")
    parser.add_argument("--log-keys", type=Path, metavar="DIR", help="write down what each process is given, by step")
    parser.add_argument("--init-method", help="of torch.distributed; without, what torchrun says")
    return parser.parse_args()


# ---- the toy ---------------------------------------------------------------------------------------------------------


class MaskDecoder(nn.Module):
    """Images and points → one mask a point."""

    waves: Tensor

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        blocks = [(3, width), (width, width), (width, width)]
        self.encoder = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(a, b, 5, 2, 2), nn.GroupNorm(4, b), nn.GELU()) for a, b in blocks)
        )
        self.pixels = nn.Conv2d(2 * width, width, 1)
        self.prompt = nn.Sequential(nn.Linear(2 * width, 2 * width), nn.GELU(), nn.Linear(2 * width, width + 1))
        self.register_buffer("waves", 3 * torch.randn(2, width // 2))

    def place(self, xy: Tensor) -> Tensor:
        """(…, 2) in −1 to 1 → (…, width) Fourier features: near places have near ones."""
        angles = xy @ self.waves
        return torch.cat([angles.sin(), angles.cos()], -1)

    def forward(self, image: Tensor, points: Tensor, size: int) -> Tensor:
        """(B, 3, S, S) uint8 and (B, M, 2) x, y in its pixels → (B, M, size, size) logits."""
        features = self.encoder(image.float() / 127.5 - 1)
        axes = [torch.arange(0.5, n, device=image.device) / n * 2 - 1 for n in features.shape[:-3:-1]]
        grid = self.place(torch.stack(torch.meshgrid(*axes, indexing="xy"), -1)).permute(2, 0, 1)
        pixels = self.pixels(torch.cat([features, grid.expand(len(image), -1, -1, -1)], 1))
        where = points / image.shape[-1] * 2 - 1
        there = functional.grid_sample(features, where[:, :, None], align_corners=False)[..., 0].transpose(1, 2)
        weights = self.prompt(torch.cat([there, self.place(where)], 2))
        masks = torch.einsum("bmc,bchw->bmhw", weights[..., 1:], pixels) + weights[..., :1, None]
        return functional.interpolate(masks, (size, size), mode="bilinear", align_corners=False)


def losses(logits: Tensor, masks: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy with dice, and the intersection over union, both over the masks that there are."""
    cross = functional.binary_cross_entropy_with_logits(logits, masks.float(), reduction="none").mean((2, 3))
    soft, drawn = logits.sigmoid(), logits > 0
    dice = 1 - (2 * (soft * masks).sum((2, 3)) + 1) / (soft.sum((2, 3)) + masks.sum((2, 3)) + 1)
    iou = (drawn & masks.bool()).sum((2, 3)) / (drawn | masks.bool()).sum((2, 3)).clamp(min=1)
    count = valid.sum().clamp(min=1)
    return ((cross + dice) * valid).sum() / count, (iou * valid).sum() / count


class Notice:
    """Whether somebody told a rank to stop; all ranks hear of it after the same step."""

    def __init__(self, device: torch.device) -> None:
        self._flag = torch.zeros(1, device=device)
        self._here = False
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._given)

    def _given(self, number: int, frame: object) -> None:
        self._here = True

    def close(self) -> None:
        """One that comes late, to a rank that has ended by another's, must not look like a failure."""
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)

    def heard(self) -> bool:
        """Of all ranks, which must ask in step."""
        if not dist.is_initialized():
            return self._here
        self._flag.fill_(self._here)
        dist.all_reduce(self._flag, dist.ReduceOp.MAX)
        return bool(self._flag.item())


STOPPED = 75
"""The exit status of a run that was told to stop and goes on when it is started again (EX_TEMPFAIL of sysexits.h)."""


# ---- the loop --------------------------------------------------------------------------------------------------------


def save(path: Path, checkpoint: dict[str, Any]) -> None:
    """Whole or not at all: who is killed here leaves the checkpoint before."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def main() -> int:
    a = arguments()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else torch.device("cpu")
    if "RANK" in os.environ:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group("nccl" if gpu else "gloo", init_method=a.init_method, rank=rank, world_size=size)
    notice = Notice(device)
    torch.manual_seed(a.seed)
    model: Any = MaskDecoder().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), a.learning_rate)

    ds = sa1b_wds.open(a.shards)
    stream = TorchStream(
        ds.stream(  # rank and world size come from torch.distributed
            batch_size=a.batch_size,
            image_size=a.image_size,
            mask_size=a.mask_size,
            masks_per_image=a.masks_per_image,
            mask_mode="runs" if a.runs else "nearest",
            max_area_fraction=0.9,
            seed=a.seed,
            threads=a.threads,
            drop_last=False,
        )
    )
    world = stream.stream.world
    say = print if world.rank == 0 else lambda *words, **options: None

    step = 0
    if a.checkpoint.exists():
        checkpoint = torch.load(a.checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        stream.load_state_dict(checkpoint["loader"])  # the same on every rank, however many there were
        step = checkpoint["step"]
        ranks = f"ranks: {checkpoint['world']} before, {world.size} now"
        say(
            f"{a.checkpoint}: resumed after step {step:,}, at the next image of epoch {stream.epoch}; {ranks}",
            flush=True,
        )
    bare = model
    if dist.is_initialized():
        model = nn.parallel.DistributedDataParallel(model)
    keys = None
    if a.log_keys:
        a.log_keys.mkdir(parents=True, exist_ok=True)
        keys = (a.log_keys / f"from-{step:06d}-rank-{world.rank}.txt").open("w", buffering=1)
    say(f"{len(ds):,} images; {len(stream):,} steps an epoch, each {world.size} × {a.batch_size} images", flush=True)

    def checkpoint_now() -> None:
        if world.rank == 0:  # all ranks are in step, so this one's state is everybody's
            states = {"model": bare.state_dict(), "optimizer": optimizer.state_dict()}
            save(a.checkpoint, {**states, "loader": stream.state_dict(), "step": step, "world": world.size})

    names = ["image", "points", "boxes", "valid", "is_padding"]
    names += ["run_ends", "run_offsets", "window", "flip", "original_size"] if a.runs else ["masks"]
    then, waited, since = perf_counter(), 0.0, step
    stopped = False
    for epoch in range(stream.epoch, a.epochs):
        for batch in stream:
            on = {name: batch[name].to(device, non_blocking=True) for name in names}
            masks = rasterise(on, a.mask_size) if a.runs else on["masks"]
            valid = on["valid"] & ~on["is_padding"][:, None]  # the last batches are filled up with repeats
            loss, iou = losses(model(on["image"], on["points"], a.mask_size), masks, valid)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1

            if keys:
                both = zip(batch["key"], batch["is_padding"].tolist(), strict=True)
                print(step, *(key for key, is_padding in both if not is_padding), file=keys)
            if step % a.print_every == 0:
                stats, seconds = stream.stats(), perf_counter() - then
                speed, share = (step - since) * world.size * a.batch_size / seconds, (stats.wait - waited) / seconds
                text = f"{speed:,.1f} images/s, {share:.0%} of the time waiting for data"
                say(f"epoch {epoch} step {step:,}: loss {loss:.3f}, IoU {iou:.3f}, {text}", flush=True)
                then, waited, since = perf_counter(), stats.wait, step
            if stopped := notice.heard():
                break
            if step % a.save_every == 0:
                checkpoint_now()
        checkpoint_now()
        if stopped:
            break
    say(f"{'stopped' if stopped else 'done'} after step {step:,}; {stream.stats()}", flush=True)
    if keys:
        keys.close()
    if dist.is_initialized():
        dist.destroy_process_group()
    notice.close()
    return STOPPED if stopped else 0


if __name__ == "__main__":
    sys.exit(main())
