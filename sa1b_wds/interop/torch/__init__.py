"""Streams for torch: batches of tensors, under DataLoader and StatefulDataLoader too, masks drawn on the device.

    stream = TorchStream(ds.stream(batch_size=8))
    for epoch in range(stream.epoch, epochs):
        for batch in stream:                        # or DataLoader(stream, batch_size=None, num_workers=…)
            images = batch["image"].to(device, non_blocking=True)

`import torch` happens here and nowhere else in the package.
"""

from ...errors import MissingPackage

try:
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    raise MissingPackage("torch", "not installed: pip install 'sa1b-wds[torch]'") from error

from .masks import rasterise
from .stream import TorchStream, state_of
from .tensors import tensors

__all__ = ["TorchStream", "rasterise", "state_of", "tensors"]
