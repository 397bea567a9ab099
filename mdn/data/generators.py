"""Chunks of the batches of a Python generator.

Shape letters: B batch, S steps of a chunk.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from mdn.data.chunks import Batches, Chunk, chunk_size, float_specs
from mdn.errors import DataError


def stack_generator(
    elements: Iterator[Any],
    convert: Callable[[Any], tuple[np.ndarray, ...]],
    steps: int,
    epochs: int,
    chunk: int | None = None,
) -> Batches:
    """Return batches that a Python generator makes, stacked; smaller ones are filled up.

    No more than the batches of these epochs are taken from it, so that it can go on afterwards.

    Args:
        elements: the batches; the first one has B rows, the others at most as many.
        convert: a batch as arrays [B, ..].
        steps: batches an epoch.
        epochs: how many there will be.
        chunk: S; by default as large as memory and the progress bar allow.

    Raises:
        DataError: there is no batch.
    """
    first = next(elements, None)
    if first is None:
        raise DataError("the generator gives no batch: make a new one")
    arrays = convert(first)
    batch = [(len(arrays[0]), *a.shape[1:]) for a in arrays]
    bytes_ = sum(4 * math.prod(shape) for shape in batch)
    size = min(chunk or chunk_size(steps, bytes_), steps)
    shapes = [(size, *shape) for shape in batch]

    def read() -> Iterator[tuple[np.ndarray, ...]]:
        yield arrays
        for element in elements:
            found = convert(element)
            shapes_ = [a.shape[1:] for a in found]
            if shapes_ != [s[1:] for s in batch] or len(found[0]) > batch[0][0]:
                raise DataError(
                    f"the generator gives a batch of shape {[list(a.shape) for a in found]} after "
                    f"one of {[list(s) for s in batch]}: give batches of one shape"
                )
            yield found

    def generate() -> Iterator[Chunk | None]:
        source = read()
        for _ in range(epochs):
            for start in range(0, steps, size):
                taken = []
                for found in itertools.islice(source, min(size, steps - start)):
                    taken.append(found)
                    yield None
                if not taken:
                    return
                filled = [fill_chunk(t, [(1, *shape) for shape in batch]) for t in taken]
                joined = tuple(np.concatenate(a) for a in zip(*filled, strict=True))  # [n, B, ..]
                flat = [a.reshape(-1, *a.shape[2:]) for a in joined]
                yield fill_chunk(flat, shapes), np.int32(len(taken))

    return Batches(generate, float_specs(shapes), steps)


def fill_chunk(
    arrays: Sequence[np.ndarray], shapes: Sequence[tuple[int, ...]]
) -> tuple[np.ndarray, ...]:
    """Return arrays [n, ..] as [S, B, ..]; what is left over has no target, see `Batches`."""
    target = min(1, len(shapes) - 1)
    filled = []
    for i, (array, shape) in enumerate(zip(arrays, shapes, strict=True)):
        rows = shape[0] * shape[1]
        if len(array) == rows:
            filled.append(np.asarray(array, np.float32).reshape(shape))
            continue
        whole = np.full((rows, *shape[2:]), np.nan if i == target else 0.0, np.float32)
        whole[: len(array)] = array
        filled.append(whole.reshape(shape))
    return tuple(filled)
