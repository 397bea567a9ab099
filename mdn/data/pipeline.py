"""Batches for `fit` and `evaluate`, stacked in chunks that one program works through.

Shape letters: B batch, N rows, S steps of a chunk.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import tensorflow as tf

# Python is visited at least this often, for the progress bar and the check for NaN.
MOST_STEPS = 500
CHUNK_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class Batches:
    """A stream of batches of B rows.

    Attributes:
        chunks: elements (batches, steps): tensors [S, B, ..], and how many of the S batches are
            real, an int32 scalar. Where the rows do not fill a batch, it has rows without targets.
        steps: batches an epoch.
        chunk: S, the same for every element.
        complete: no row lacks some of its targets: each has all, or none.
    """

    chunks: tf.data.Dataset
    steps: int
    chunk: int
    complete: bool = False

    def unstacked(self) -> tf.data.Dataset:
        """Return the batches one by one, for Keras's own loop."""
        return self.chunks.flat_map(
            lambda batches, steps: tf.data.Dataset.from_tensor_slices(batches).take(
                tf.cast(steps, tf.int64)
            )
        )


def training_batches(
    arrays: tuple[np.ndarray, ...],
    batch_size: int,
    *,
    seed: int | None,
    first_epoch: int = 0,
    drop_remainder: bool = True,
    chunk: int | None = None,
    complete: bool = False,
) -> Batches:
    """Return an endless stream of shuffled batches.

    The order is a function of (seed, epoch) alone, so that a resumed run sees the batches that
    the uninterrupted run would have seen. Where the remainder is dropped, N // B batches are an
    epoch, and the rows left over differ from epoch to epoch.

    Args:
        arrays: x [N, ..], y [N, ..] and perhaps weights [N]; or images [N, D] alone.
        batch_size: B.
        seed: of the order; None: the rows in their own order.
        first_epoch: the epoch that the stream starts with.
        drop_remainder: leave out the rows that do not fill a batch; otherwise the last batch is
            filled up with rows that have no target.
        chunk: S; by default as large as memory and the progress bar allow.
        complete: see `Batches`.
    """
    n = len(arrays[0])
    steps = n // batch_size if drop_remainder else math.ceil(n / batch_size)
    chunk = min(chunk or chunk_size(steps, batch_size * _row_bytes(arrays)), steps)
    tensors = _with_filler(arrays)

    def order(epoch: tf.Tensor) -> tf.data.Dataset:
        rows = epoch_rows(n, seed, epoch)[: steps * batch_size]
        return tf.data.Dataset.from_tensor_slices(_chunked(rows, n, batch_size, chunk))

    chunks = tf.data.Dataset.counter(first_epoch).flat_map(order)
    chunks = chunks.map(lambda rows, real: (tuple(tf.gather(t, rows) for t in tensors), real))
    return Batches(_shard_by_row(chunks.prefetch(1)), steps, chunk, complete)


def evaluation_batches(
    arrays: tuple[np.ndarray, ...],
    batch_size: int,
    *,
    chunk: int | None = None,
    complete: bool = False,
) -> Batches:
    """Return the rows once, in order; the last batch is filled up with rows without target.

    Args:
        arrays: as for `training_batches`.
        batch_size: B at most; of as many batches, the smallest that hold the rows are taken.
        chunk: S; by default as large as memory allows.
        complete: see `Batches`.
    """
    n = len(arrays[0])
    steps = math.ceil(n / batch_size)
    batch_size = math.ceil(n / steps)
    chunk = min(chunk or chunk_size(steps, batch_size * _row_bytes(arrays)), steps)
    tensors = _with_filler(arrays)
    order = _chunked(tf.range(n), n, batch_size, chunk)
    chunks = tf.data.Dataset.from_tensor_slices(order)
    chunks = chunks.map(lambda rows, real: (tuple(tf.gather(t, rows) for t in tensors), real))
    return Batches(_shard_by_row(chunks.cache().prefetch(1)), steps, chunk, complete)


def epoch_rows(n: int, seed: int | None, epoch: int | tf.Tensor) -> tf.Tensor:
    """Return the order of n rows in an epoch, int32 [n]."""
    rows = tf.range(n)
    if seed is None:
        return rows
    key = tf.stack([tf.constant(seed, tf.int64), tf.cast(epoch, tf.int64)])
    return tf.random.experimental.stateless_shuffle(rows, seed=key)


def epoch_order(n: int, batch_size: int, seed: int, epoch: int | tf.Tensor) -> tf.Tensor:
    """Return the rows of each whole batch of an epoch, [n // B, B]."""
    steps = n // batch_size
    return tf.reshape(epoch_rows(n, seed, epoch)[: steps * batch_size], [steps, batch_size])


def chunk_size(steps: int, batch_bytes: int) -> int:
    """Return S for epochs of so many steps: about equal chunks, as few as there can be."""
    most = min(MOST_STEPS, max(1, CHUNK_BYTES // max(batch_bytes, 1)))
    return math.ceil(steps / math.ceil(steps / most))


def _row_bytes(arrays: tuple[np.ndarray, ...]) -> int:
    return sum(4 * math.prod(np.shape(array)[1:]) for array in arrays)


def _with_filler(arrays: tuple[np.ndarray, ...]) -> tuple[tf.Tensor, ...]:
    """Return the arrays with one more row, which fills up batches: the first, without target."""
    tensors = []
    for i, array in enumerate(arrays):
        tensor = tf.constant(array, tf.float32)
        row = tensor[:1]
        if i == min(1, len(arrays) - 1):  # y, or images that have no features beside them
            row = tf.fill(tf.shape(row), np.float32(np.nan))
        tensors.append(tf.concat([tensor, row], axis=0))
    return tuple(tensors)


def _chunked(
    rows: tf.Tensor, filler: int, batch_size: int, chunk: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """Return row numbers as [chunks, S, B], filled up, and the real steps of each, [chunks]."""
    n = rows.shape[0]
    steps = math.ceil(n / batch_size)
    count = math.ceil(steps / chunk)
    rows = tf.pad(rows, [[0, count * chunk * batch_size - n]], constant_values=filler)
    real = np.minimum(chunk, steps - chunk * np.arange(count)).astype(np.int32)
    return tf.reshape(rows, [count, chunk, batch_size]), tf.constant(real)


def stack(
    batches: tf.data.Dataset, steps: int, batch_size: int, filler: Any, chunk: int | None = None
) -> Batches:
    """Return batches that the user made, stacked; smaller ones are filled up.

    Args:
        batches: elements (x, y) or (x, y, weight), or images alone; at most B rows each.
        steps: batches an epoch; an epoch begins where the one before ended.
        batch_size: B.
        filler: what fills each tensor of an element up.
        chunk: S; by default as large as memory and the progress bar allow.
    """
    spec = batches.element_spec
    bytes_ = sum(4 * math.prod(s.shape[1:]) for s in tf.nest.flatten(spec))
    chunk = min(chunk or chunk_size(steps, batch_size * bytes_), steps)
    last = steps - chunk * (math.ceil(steps / chunk) - 1)

    def fill_rows(*element: tf.Tensor) -> tuple[tf.Tensor, ...]:
        return tuple(_fill(t, f, batch_size) for t, f in zip(element, filler, strict=True))

    def fill_steps(*element: tf.Tensor) -> tuple[tuple[tf.Tensor, ...], tf.Tensor]:
        real = tf.shape(element[0])[0]
        return tuple(_fill(t, f, chunk) for t, f in zip(element, filler, strict=True)), real

    filled = batches.map(fill_rows)
    if last == chunk:
        chunks = filled.batch(chunk)
    else:  # the last chunk of an epoch is a smaller one
        per_epoch = math.ceil(steps / chunk)
        chunks = filled.enumerate().group_by_window(
            key_func=lambda i, _: (i % steps) // chunk,
            reduce_func=lambda _, window: window.map(lambda _, element: element).batch(chunk),
            window_size_func=lambda key: tf.where(
                key == per_epoch - 1, tf.constant(last, tf.int64), tf.constant(chunk, tf.int64)
            ),
        )
    return Batches(_shard_by_row(chunks.map(fill_steps).prefetch(1)), steps, chunk)


def _fill(tensor: tf.Tensor, filler: float, size: int) -> tf.Tensor:
    """Return a tensor [n, ..] with n <= size as [size, ..]."""
    shape = [size, *tensor.shape[1:]]
    missing = size - tf.shape(tensor)[0]
    tensor = tf.cast(tensor, tf.float32)
    paddings = [[0, missing], *([[0, 0]] * (len(shape) - 1))]
    return tf.ensure_shape(tf.pad(tensor, paddings, constant_values=filler), shape)


def _shard_by_row(batches: tf.data.Dataset) -> tf.data.Dataset:
    # Several workers share a batch out by rows: there are no files to share out.
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    return batches.with_options(options)
