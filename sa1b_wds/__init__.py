"""SA-1B as training-ready WebDataset shards: a one-pass converter and an exact streaming loader.

    ds = sa1b_wds.open("s3://bucket/sa1b", split="train[:1%]")
    for batch in ds.stream(batch_size=8): ...

Importing this loads nothing heavy: each name is brought in where it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .annotations import Annotations
    from .batch import Batch
    from .dataset import Dataset, Sample, open
    from .errors import Sa1bError
    from .interop.webdataset import decoder
    from .state import merge_states
    from .stats import Stats
    from .stream import Stream

_HOME = {
    "Annotations": "annotations",
    "Batch": "batch",
    "Dataset": "dataset",
    "Sa1bError": "errors",
    "Sample": "dataset",
    "Stats": "stats",
    "Stream": "stream",
    "decoder": "interop.webdataset",
    "merge_states": "state",
    "open": "dataset",
}
"""Each public name, and the module it lives in."""

__all__ = [
    "Annotations",
    "Batch",
    "Dataset",
    "Sa1bError",
    "Sample",
    "Stats",
    "Stream",
    "decoder",
    "merge_states",
    "open",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_HOME[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
