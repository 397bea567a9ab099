"""Answers for any number of rows, by programs that are compiled once for each of a few sizes.

XLA compiles a program for each shape. Rows are therefore taken in batches of a few sizes only, and
the last batch is filled up to the next of them. A program takes a second or more to compile, which
only many batches earn back: the first few of a size are answered by a graph.

Shape letters: B batch, N rows, P parameters.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from mdn.errors import ConfigError

SIZES = 16, 256, 4096  # and the largest batch
MOST_ROWS = 16_384
FEW_BATCHES = 8  # of one size, that a graph answers
BATCH_NUMBERS = 2**22  # of parameters: so many that a batch of them stays out of the way


def largest_batch(params_size: int) -> int:
    """Return how many rows with P parameters each go through the network at a time."""
    rows = 2 ** ((BATCH_NUMBERS // params_size).bit_length() - 1)
    return min(MOST_ROWS, max(SIZES[1], rows))


class RowProgram:
    """A function of rows, traced once for each of a few batch sizes, and compiled where it pays.

    Args:
        function: of tensors [B, ..], to a tensor [B, ..] or a structure of them.
        jit_compile: compile by XLA what answers more than `FEW_BATCHES` of a size.
    """

    def __init__(self, function: Callable[..., Any], jit_compile: bool) -> None:
        self._graph = tf.function(function, autograph=False)
        self._compiled = tf.function(function, autograph=False, jit_compile=True)
        self._jit_compile = jit_compile
        self._answered = collections.Counter[int]()  # batches of each size

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
        n = len(arrays[0])
        sizes = [*(size for size in SIZES if size < batch_size), batch_size]
        for start in range(0, n, batch_size):
            rows = slice(start, min(start + batch_size, n))
            count = rows.stop - start
            size = next(size for size in sizes if size >= count)
            function = self._function(size, math.ceil((n - start) / size))
            outputs = function(*(tf.constant(_filled(a[rows], size)) for a in arrays))
            yield rows, outputs if count == size else _first(outputs, count)

    def _function(self, size: int, ahead: int) -> Callable[..., Any]:
        """Return what answers a batch of a size, of which so many are ahead."""
        pays = self._jit_compile and self._answered[size] + ahead > FEW_BATCHES
        self._answered[size] += 1
        return self._compiled if pays else self._graph


def _first(outputs: Any, count: int) -> Any:
    return tf.nest.map_structure(lambda tensor: tensor[:count], outputs)


def _filled(array: np.ndarray, size: int) -> np.ndarray:
    """Return an array [n, ..] as [size, ..], with copies of its last row."""
    if len(array) == size:
        return array
    return np.concatenate([array, np.repeat(array[-1:], size - len(array), axis=0)])
