"""Seeded permutations from one hash, written down here with golden values in the tests.

Not numpy's generators: their streams may change with a release, and neither a plan nor the state of a loader may.
"""

import numpy as np
import numpy.typing as npt

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix64(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014) on uint64 arrays, which wrap."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def hashes(n: int, *key: int) -> npt.NDArray[np.uint64]:
    """n 64-bit hashes that depend on the key alone."""
    h = np.zeros(1, np.uint64)
    for k in key:
        h = mix64((h ^ np.uint64(k)) + _GOLDEN)
    return mix64(h + np.arange(1, n + 1, dtype=np.uint64) * _GOLDEN)


def permutation(n: int, *key: int) -> npt.NDArray[np.int64]:
    """0 … n−1, sorted by their hashes."""
    return np.argsort(hashes(n, *key), kind="stable")
