"""Chunks that Python makes, read ahead by a thread of its own.

`tf.data` could read ahead by itself, but its threads wait for Python's lock: an iterator that is
still alive when the interpreter ends would wait forever. A daemon thread keeps nobody waiting.

Shape letters: B batch, S steps of a chunk.
"""

from __future__ import annotations

import atexit
import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from mdn.data.pipeline import shard_by_row

Chunk = tuple[tuple[np.ndarray, ...], np.int32]
AHEAD = 2


def python_chunks(
    generate: Callable[[], Iterator[Chunk]], shapes: Sequence[tuple[int, ...]]
) -> tf.data.Dataset:
    """Return the chunks of a generator as a dataset, see `mdn.data.pipeline.Batches.chunks`.

    Args:
        generate: starts the generator of (arrays, steps); arrays [S, B, ..] float32.
        shapes: of the arrays.
    """
    chunks = tf.data.Dataset.from_generator(
        lambda: _Ahead(generate()).chunks(),
        output_signature=(
            tuple(tf.TensorSpec(shape, tf.float32) for shape in shapes),
            tf.TensorSpec((), tf.int32),
        ),
    )
    options = tf.data.Options()
    options.experimental_optimization.inject_prefetch = False
    return shard_by_row(chunks.with_options(options))


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

    def chunks(self) -> Iterator[Any]:
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
