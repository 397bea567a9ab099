"""Batches for `fit`, from arrays in memory.

Shape letters: B batch, N rows.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf


def training_batches(
    arrays: tuple[np.ndarray, ...], batch_size: int, *, seed: int, first_epoch: int = 0
) -> tf.data.Dataset:
    """Return an endless stream of shuffled batches, N // B of them an epoch.

    The order is a function of (seed, epoch) alone, so that a resumed run sees the batches that
    the uninterrupted run would have seen. The rows left over after the last whole batch differ
    from epoch to epoch.

    Args:
        arrays: x [N, ..], y [N, ..] and perhaps weights [N].
        batch_size: B.
        seed: of the order.
        first_epoch: the epoch that the stream starts with.
    """
    tensors = tuple(tf.constant(a, tf.float32) for a in arrays)
    n = len(arrays[0])

    def order(epoch: tf.Tensor) -> tf.data.Dataset:
        return tf.data.Dataset.from_tensor_slices(epoch_order(n, batch_size, seed, epoch))

    batches = tf.data.Dataset.counter(first_epoch).flat_map(order)
    batches = batches.map(lambda rows: tuple(tf.gather(t, rows) for t in tensors))
    return _shard_by_row(batches.prefetch(tf.data.AUTOTUNE))


def epoch_order(n: int, batch_size: int, seed: int, epoch: int | tf.Tensor) -> tf.Tensor:
    """Return the rows of each batch of an epoch, [n // B, B]."""
    rows = tf.random.experimental.stateless_shuffle(
        tf.range(n), seed=tf.stack([tf.constant(seed, tf.int64), tf.cast(epoch, tf.int64)])
    )
    steps = n // batch_size
    return tf.reshape(rows[: steps * batch_size], [steps, batch_size])


def evaluation_batches(arrays: tuple[np.ndarray, ...], batch_size: int) -> tf.data.Dataset:
    """Return the rows once, in order; the last batch may be smaller."""
    tensors = tuple(tf.constant(a, tf.float32) for a in arrays)
    batches = tf.data.Dataset.from_tensor_slices(tensors).batch(batch_size)
    return _shard_by_row(batches.cache().prefetch(tf.data.AUTOTUNE))


def _shard_by_row(batches: tf.data.Dataset) -> tf.data.Dataset:
    # Several workers share a batch out by rows: there are no files to share out.
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    return batches.with_options(options)
