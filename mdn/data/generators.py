"""Chunks that Python makes, read ahead by a thread of its own.

`tf.data` could read ahead by itself, but its threads wait for Python's lock: an iterator that is
still alive when the interpreter ends would wait forever. A daemon thread keeps nobody waiting.

Shape letters: B batch, S steps of a chunk.
"""

from __future__ import annotations

import atexit
import itertools
import math
import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from mdn.data.pipeline import Batches, chunk_size, untuned
from mdn.errors import DataError

Chunk = tuple[tuple[np.ndarray, ...], np.int32]
AHEAD = 2


def python_batches(
    generate: Callable[[], Iterator[Chunk]],
    shapes: Sequence[tuple[int, ...]],
    steps: int,
    complete: bool = False,
) -> Batches:
    """Return the chunks of a generator.

    Args:
        generate: starts the generator of (arrays, steps); arrays [S, B, ..] float32.
        shapes: of the arrays.
        steps: batches an epoch.
        complete: see `Batches`.
    """
    failures: list[Exception] = []

    def chunks() -> Iterator[Chunk]:
        try:
            yield from _Ahead(generate()).elements()
        except Exception as error:
            failures.append(error)
            raise

    dataset = tf.data.Dataset.from_generator(
        chunks,
        output_signature=(
            tuple(tf.TensorSpec(shape, tf.float32) for shape in shapes),
            tf.TensorSpec((), tf.int32),
        ),
    )
    options = tf.data.Options()
    options.experimental_optimization.inject_prefetch = False
    return Batches(untuned(dataset.with_options(options)), steps, shapes[0][0], complete, failures)


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

    def generate() -> Iterator[Chunk]:
        source = read()
        for _ in range(epochs):
            for start in range(0, steps, size):
                taken = list(itertools.islice(source, min(size, steps - start)))
                if not taken:
                    return
                filled = [fill_chunk(t, [(1, *shape) for shape in batch]) for t in taken]
                joined = tuple(np.concatenate(a) for a in zip(*filled, strict=True))  # [n, B, ..]
                flat = [a.reshape(-1, *a.shape[2:]) for a in joined]
                yield fill_chunk(flat, shapes), np.int32(len(taken))

    return python_batches(generate, shapes, steps)


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


class _Ahead:
    """Reads a generator in a thread, some elements ahead."""

    def __init__(self, elements: Iterator[Any]) -> None:
        self._queue: queue.Queue = queue.Queue(AHEAD)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(elements,), daemon=True)
        _ALIVE.add(self)
        self._thread.start()

    def elements(self) -> Iterator[Any]:
        try:
            while True:
                kind, value = self._queue.get()
                if kind == "end":
                    return
                if kind == "error":
                    raise value
                yield value
        finally:
            self._stop.set()

    def close(self) -> None:
        """Stop the thread, as a library may end under its hands."""
        self._stop.set()
        self._thread.join(timeout=10)

    def _read(self, elements: Iterator[Any]) -> None:
        try:
            for element in elements:
                if not self._put(("element", element)):
                    return
            self._put(("end", None))
        except Exception as error:  # raised where the elements are taken
            self._put(("error", error))

    def _put(self, item: tuple[str, Any]) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.2)
            except queue.Full:
                continue
            return True
        return False


_ALIVE: weakref.WeakSet[_Ahead] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for ahead in list(_ALIVE):
        ahead.close()
