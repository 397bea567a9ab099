"""`Batches`: a stream of batches in chunks that one program works through, read ahead.

`tf.data` could read ahead by itself, but its threads wait for Python's lock: an iterator that is
still alive when the interpreter ends would wait forever. A daemon thread keeps nobody waiting, and
there is nothing to trace before the first chunk.

Shape letters: B batch, M ensemble members, S steps of a chunk.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import math
import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

# Python is visited at least this often, for the progress bar and the check for NaN.
MOST_STEPS = 500
CHUNK_BYTES = 64 * 2**20

Chunk = tuple[tuple[Any, ...], Any]


@dataclasses.dataclass(frozen=True)
class Batches:
    """A stream of batches of B rows, which begins anew with each iteration over it.

    It cannot where a generator of the user's makes the batches: then it goes on.

    Its elements are chunks, (batches, steps): tensors [S, B, ..], or [S, M, B, ..] of an ensemble,
    and how many of the S batches are real, an int32 scalar. Where the rows do not fill a batch, it
    has rows without targets.

    Attributes:
        generate: starts the stream: chunks of arrays or tensors; or None, where what is read ahead
            may end although no chunk is whole yet.
        spec: of the tensors of a chunk.
        steps: batches an epoch.
        complete: no row lacks some of its targets: each has all, or none.
        ahead: how many chunks a thread reads ahead; 0: they are all there.
        dataset: the same chunks, where it is a dataset that makes them.
        failures: what ended chunks that Python makes; TensorFlow buries it in an error of its own.
    """

    generate: Callable[[], Iterator[Chunk | None]]
    spec: tuple[tf.TensorSpec, ...]
    steps: int
    complete: bool = False
    ahead: int = 2
    dataset: tf.data.Dataset | None = None
    failures: list[Exception] = dataclasses.field(default_factory=list)

    def __iter__(self) -> Iterator[Chunk]:
        if self.ahead:
            return _read_ahead(self.generate(), self.ahead)
        return (chunk for chunk in self.generate() if chunk is not None)

    @property
    def chunk(self) -> int:
        """S, the same for every element."""
        return self.spec[0].shape[0]

    def unstacked(self) -> tf.data.Dataset:
        """Return the batches one by one, for Keras's own loop."""

        @tf.autograph.experimental.do_not_convert
        def take(batches: tuple[tf.Tensor, ...], steps: tf.Tensor) -> tf.data.Dataset:
            return tf.data.Dataset.from_tensor_slices(batches).take(tf.cast(steps, tf.int64))

        chunks = self._as_dataset() if self.dataset is None else self.dataset
        return chunks.flat_map(take)

    def _as_dataset(self) -> tf.data.Dataset:
        def chunks() -> Iterator[Chunk]:
            self.failures.clear()
            try:
                for batches, real in self:
                    # Copies, as TensorFlow takes the memory it is given here for its own.
                    yield tuple(np.array(tensor) for tensor in batches), real
            except Exception as error:
                self.failures.append(error)
                raise

        dataset = tf.data.Dataset.from_generator(
            chunks, output_signature=(self.spec, tf.TensorSpec((), tf.int32))
        )
        options = tf.data.Options()
        options.experimental_optimization.inject_prefetch = False
        return untuned(dataset.with_options(options))


def float_specs(shapes: Sequence[tuple[int, ...]]) -> tuple[tf.TensorSpec, ...]:
    """Return the specs of float32 tensors of these shapes."""
    return tuple(tf.TensorSpec(shape, tf.float32) for shape in shapes)


def chunk_size(steps: int, batch_bytes: int) -> int:
    """Return S for epochs of so many steps: about equal chunks, as few as there can be."""
    most = min(MOST_STEPS, max(1, CHUNK_BYTES // max(batch_bytes, 1)))
    return math.ceil(steps / math.ceil(steps / most))


def untuned(batches: tf.data.Dataset) -> tf.data.Dataset:
    # There is nothing to tune, and the thread that would do it holds up the end of a `fit` or an
    # `evaluate`: it sleeps for 10 ms, 20, 40, .. before it sees that it should stop, so that what
    # takes 1.4 s may end after 2.55.
    options = tf.data.Options()
    options.autotune.enabled = False
    return shard_by_row(batches).with_options(options)


def shard_by_row(batches: tf.data.Dataset) -> tf.data.Dataset:
    # Several workers share a batch out by rows: there are no files to share out.
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    return batches.with_options(options)


def _read_ahead(chunks: Iterator[Chunk | None], count: int) -> Iterator[Chunk]:
    """Yield chunks that a thread reads and makes tensors of, so many ahead."""
    ahead = _Ahead(chunks, count)
    # The thread alone holds it, and lets go of it as it ends. An iterator of `tf.data` that lived
    # until the interpreter ends would wait for its own threads, which wait for Python's lock.
    del chunks
    try:
        yield from ahead.elements()
    finally:
        ahead.close()  # a generator of the user's can then go on elsewhere


class _Ahead:
    """Reads chunks in a thread, some elements ahead."""

    def __init__(self, chunks: Iterator[Chunk | None], count: int) -> None:
        self._queue: queue.Queue = queue.Queue(count)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(chunks,), daemon=True)
        _ALIVE.add(self)
        self._thread.start()

    def elements(self) -> Iterator[Chunk]:
        while not self._stop.is_set():  # or the thread ends, and there is nothing to wait for
            try:
                kind, value = self._queue.get(timeout=0.2)
            except queue.Empty:
                continue
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value

    def stop(self) -> None:
        """Let the thread end as soon as it can."""
        self._stop.set()
        with contextlib.suppress(queue.Empty):
            while True:
                self._queue.get_nowait()  # what it waits to put away

    def close(self) -> None:
        """Stop the thread and wait for it, as a library may end under its hands."""
        self.stop()
        if self._thread is not threading.current_thread():  # whose garbage collector calls this
            self._thread.join(timeout=10)

    def _read(self, chunks: Iterator[Chunk | None]) -> None:
        try:
            with tf.device("CPU:0"):  # whose memory holds what is read ahead
                for chunk in chunks:
                    if chunk is None:
                        if self._stop.is_set():
                            return
                        continue
                    arrays, steps = chunk
                    tensors = tuple(map(tf.convert_to_tensor, arrays))
                    if not self._put(("element", (tensors, tf.convert_to_tensor(steps)))):
                        return
            self._put(("end", None))
        except BaseException as error:  # raised where the elements are taken
            self._put(("error", error))

    def _put(self, item: tuple[str, Any]) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.2)
            except queue.Full:
                continue
            return not self._stop.is_set()
        return False


_ALIVE: weakref.WeakSet[_Ahead] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    alive = list(_ALIVE)
    for ahead in alive:  # first all: one may read what another reads ahead
        ahead.stop()
    for ahead in alive:
        ahead.close()
