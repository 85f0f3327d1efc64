"""For code that was written for `tfds.load("segment_anything")`: the same values, with and without TensorFlow.

    examples = load("/data/shards", split="train[:1%]")       # no TensorFlow
    for example in examples.take(4):
        example["image"]["content"], example["annotations"]["bbox"]

    as_tf_dataset(sa1b_wds.open("/data/shards")).batch(1)     # with it: a tf.data.Dataset of TFDS' own signature

The arithmetic stands in `sa1b_wds.examples`.
"""

import os
from collections.abc import Iterable, Mapping
from typing import Any

from ..dataset import Dataset, open
from ..errors import MissingPackage
from ..examples import FEATURES, Example, Examples, as_tfds

__all__ = ["FEATURES", "Example", "Examples", "as_tf_dataset", "as_tfds", "load"]


def load(location: str | os.PathLike[str], *, split: str = "train", keys: Iterable[str] | None = None) -> Examples:
    """Like `tfds.load`: the examples of a converted data set; the arguments are those of `sa1b_wds.open`."""
    return Examples(open(location, split=split, keys=keys))


def as_tf_dataset(ds: Dataset) -> Any:
    """A `tf.data.Dataset` with the element spec, the values and the cardinality of TFDS'.

    Examples are made one after the other in Python: this is for code that expects one, not for speed.

    Raises:
        MissingPackage: TensorFlow is not installed.
    """
    try:
        import tensorflow as tf
    except ImportError as error:
        what = "needs TensorFlow: pip install tensorflow-cpu (load, as_tfds and take do without)"
        raise MissingPackage("as_tf_dataset", what) from error

    def spec(features: Any) -> Any:
        if isinstance(features, Mapping):
            return {name: spec(feature) for name, feature in features.items()}
        dtype, shape = features
        return tf.TensorSpec(shape, tf.as_dtype(dtype))

    made = tf.data.Dataset.from_generator(lambda: iter(Examples(ds)), output_signature=spec(FEATURES))
    return made.apply(tf.data.experimental.assert_cardinality(len(ds)))
