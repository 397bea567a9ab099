"""Answers for any number of rows, by programs that are compiled once for each of a few sizes.

XLA compiles a program for each shape. Rows are therefore taken in batches of a few sizes only, and
the last batch is filled up to the next of them.

Shape letters: B batch, N rows, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from mdn.errors import ConfigError

SIZES = 16, 256, 4096  # and the largest batch
MOST_ROWS = 16_384
BATCH_NUMBERS = 2**22  # of parameters: so many that a batch of them stays out of the way


def largest_batch(params_size: int) -> int:
    """Return how many rows with P parameters each go through the network at a time."""
    rows = 2 ** ((BATCH_NUMBERS // params_size).bit_length() - 1)
    return min(MOST_ROWS, max(SIZES[1], rows))


class RowProgram:
    """A function of rows, compiled once for each of a few batch sizes.

    Args:
        function: of tensors [B, ..], to a tensor [B, ..] or a structure of them.
        jit_compile: compile by XLA; otherwise it is a graph.
    """

    def __init__(self, function: Callable[..., Any], jit_compile: bool) -> None:
        self._function = tf.function(function, jit_compile=jit_compile, autograph=False)

    def __call__(
        self, arrays: Sequence[np.ndarray], batch_size: int
    ) -> Iterator[tuple[slice, Any]]:
        """Yield (rows, what the function makes of them) in order, a batch at a time.

        Args:
            arrays: [N, ..] each.
            batch_size: B at most.

        Raises:
            ConfigError: `batch_size` is below one.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size}: must be at least 1")
        sizes = [*(size for size in SIZES if size < batch_size), batch_size]
        for start in range(0, len(arrays[0]), batch_size):
            rows = slice(start, min(start + batch_size, len(arrays[0])))
            count = rows.stop - start
            size = next(size for size in sizes if size >= count)
            outputs = self._function(*(tf.constant(_filled(a[rows], size)) for a in arrays))
            yield rows, outputs if count == size else _first(outputs, count)


def _first(outputs: Any, count: int) -> Any:
    return tf.nest.map_structure(lambda tensor: tensor[:count], outputs)


def _filled(array: np.ndarray, size: int) -> np.ndarray:
    """Return an array [n, ..] as [size, ..], with copies of its last row."""
    if len(array) == size:
        return array
    return np.concatenate([array, np.repeat(array[-1:], size - len(array), axis=0)])
