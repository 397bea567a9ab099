"""Batches for `fit` and `evaluate`, stacked in chunks that one program works through.

Shape letters: B batch, M ensemble members, N rows, S steps of a chunk.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

# Python is visited at least this often, for the progress bar and the check for NaN.
MOST_STEPS = 500
CHUNK_BYTES = 64 * 2**20

# Nothing in these functions is for autograph, which takes as long to find that out as to trace.
_as_it_is = tf.autograph.experimental.do_not_convert


@dataclasses.dataclass(frozen=True)
class Batches:
    """A stream of batches of B rows.

    Attributes:
        chunks: elements (batches, steps): tensors [S, B, ..], or [S, M, B, ..] of an ensemble,
            and how many of the S batches are real, an int32 scalar. Where the rows do not fill a
            batch, it has rows without targets.
        steps: batches an epoch.
        chunk: S, the same for every element.
        complete: no row lacks some of its targets: each has all, or none.
        failures: what ended chunks that Python makes; TensorFlow buries it in an error of its own.
    """

    chunks: tf.data.Dataset
    steps: int
    chunk: int
    complete: bool = False
    failures: list[Exception] = dataclasses.field(default_factory=list)

    def unstacked(self) -> tf.data.Dataset:
        """Return the batches one by one, for Keras's own loop."""

        @_as_it_is
        def take(batches: tuple[tf.Tensor, ...], steps: tf.Tensor) -> tf.data.Dataset:
            return tf.data.Dataset.from_tensor_slices(batches).take(tf.cast(steps, tf.int64))

        return self.chunks.flat_map(take)


def training_batches(
    arrays: tuple[np.ndarray, ...],
    batch_size: int,
    *,
    seed: int | None,
    first_epoch: int = 0,
    drop_remainder: bool = True,
    chunk: int | None = None,
    complete: bool = False,
    members: np.ndarray | None = None,
    steps: int | None = None,
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
        members: [M, n], the row numbers of each member of an ensemble. Member m sees the batches
            that it would see alone with seed + m.
        steps: batches an epoch, in place of a pass over the rows; passes then go on from one epoch
            into the next, and each leaves out the rows that do not fill a batch.
    """
    filler = len(arrays[0])
    n = filler if members is None else members.shape[1]
    whole = n // batch_size  # batches of a pass
    passes = 1 if steps is None else math.ceil(steps / whole) + 1  # that an epoch may touch
    if steps is None:
        steps = whole if drop_remainder else math.ceil(n / batch_size)
    chunk = min(chunk or chunk_size(steps, _batch_bytes(arrays, batch_size, members)), steps)
    tensors = _with_filler(arrays)
    own = [None] if members is None else [tf.constant(rows, tf.int32) for rows in members]

    @_as_it_is
    def order(epoch: tf.Tensor) -> tf.data.Dataset:
        orders = []
        for m, rows in enumerate(own):
            own_seed = None if seed is None else seed + m
            if passes == 1:
                places = epoch_rows(n, own_seed, epoch)
            else:
                first, skipped = epoch * steps // whole, epoch * steps % whole
                parts = [epoch_order(n, batch_size, own_seed, first + i) for i in range(passes)]
                places = tf.reshape(tf.concat(parts, 0)[skipped : skipped + steps], [-1])
                places = tf.ensure_shape(places, [steps * batch_size])
            places = places[: steps * batch_size]
            orders.append(places if rows is None else tf.gather(rows, places))
        chunks = _chunked(orders, filler, batch_size, chunk, members is not None)
        return tf.data.Dataset.from_tensor_slices(chunks)

    chunks = tf.data.Dataset.counter(first_epoch).flat_map(order)
    chunks = chunks.map(_gather(tensors))
    return Batches(untuned(chunks.prefetch(1)), steps, chunk, complete)


def evaluation_batches(
    arrays: tuple[np.ndarray, ...],
    batch_size: int,
    *,
    chunk: int | None = None,
    complete: bool = False,
    members: np.ndarray | None = None,
) -> Batches:
    """Return the rows once, in order; the last batch is filled up with rows without target.

    Args:
        arrays: as for `training_batches`.
        batch_size: B at most; of as many batches, the smallest that hold the rows are taken.
        chunk: S; by default as large as memory allows.
        complete: see `Batches`.
        members: [M, n], the row numbers of each member of an ensemble.
    """
    filler = len(arrays[0])
    n = filler if members is None else members.shape[1]
    steps = math.ceil(n / batch_size)
    batch_size = math.ceil(n / steps)
    chunk = min(chunk or chunk_size(steps, _batch_bytes(arrays, batch_size, members)), steps)
    tensors = _with_filler(arrays)
    own = [np.arange(n)] if members is None else list(members)
    orders = [tf.constant(rows, tf.int32) for rows in own]
    order = _chunked(orders, filler, batch_size, chunk, members is not None)
    chunks = tf.data.Dataset.from_tensor_slices(order)
    chunks = chunks.map(_gather(tensors))
    return Batches(untuned(chunks.cache().prefetch(1)), steps, chunk, complete)


def epoch_rows(n: int, seed: int | None, epoch: int | tf.Tensor) -> tf.Tensor:
    """Return the order of n rows in an epoch, int32 [n]."""
    rows = tf.range(n)
    if seed is None:
        return rows
    key = tf.stack([tf.constant(seed, tf.int64), tf.cast(epoch, tf.int64)])
    return tf.random.experimental.stateless_shuffle(rows, seed=key)


def epoch_order(n: int, batch_size: int, seed: int | None, epoch: int | tf.Tensor) -> tf.Tensor:
    """Return the rows of each whole batch of an epoch, [n // B, B]."""
    steps = n // batch_size
    return tf.reshape(epoch_rows(n, seed, epoch)[: steps * batch_size], [steps, batch_size])


def chunk_size(steps: int, batch_bytes: int) -> int:
    """Return S for epochs of so many steps: about equal chunks, as few as there can be."""
    most = min(MOST_STEPS, max(1, CHUNK_BYTES // max(batch_bytes, 1)))
    return math.ceil(steps / math.ceil(steps / most))


def _batch_bytes(
    arrays: tuple[np.ndarray, ...], batch_size: int, members: np.ndarray | None
) -> int:
    row_bytes = sum(4 * math.prod(np.shape(array)[1:]) for array in arrays)
    return batch_size * row_bytes * (1 if members is None else len(members))


def _with_filler(arrays: tuple[np.ndarray, ...]) -> tuple[tf.Tensor, ...]:
    """Return the arrays with one more row, which fills up batches: the first, without target."""
    tensors = []
    for i, array in enumerate(arrays):
        tensor = tf.constant(array, tf_keras.backend.floatx())
        row = tensor[:1]
        if i == min(1, len(arrays) - 1):  # y, or images that have no features beside them
            row = tf.fill(tf.shape(row), tf.constant(np.nan, row.dtype))
        tensors.append(tf.concat([tensor, row], axis=0))
    return tuple(tensors)


def _gather(tensors: tuple[tf.Tensor, ...]) -> Callable:
    """Return a function of chunks of row numbers to those rows of the tensors."""

    @_as_it_is
    def gather(rows: tf.Tensor, real: tf.Tensor) -> tuple[tuple[tf.Tensor, ...], tf.Tensor]:
        return tuple(tf.gather(t, rows) for t in tensors), real

    return gather


def _chunked(
    orders: list[tf.Tensor], filler: int, batch_size: int, chunk: int, stacked: bool
) -> tuple[tf.Tensor, tf.Tensor]:
    """Return row numbers [n] as [chunks, S, B], filled up, and the real steps of each, [chunks].

    Stacked: those of all members, as [chunks, S, M, B].
    """
    n = orders[0].shape[0]
    steps = math.ceil(n / batch_size)
    count = math.ceil(steps / chunk)
    padding = [[0, count * chunk * batch_size - n]]
    padded = [tf.pad(rows, padding, constant_values=filler) for rows in orders]
    parts = [tf.reshape(rows, [count, chunk, batch_size]) for rows in padded]
    real = np.minimum(chunk, steps - chunk * np.arange(count)).astype(np.int32)
    return tf.stack(parts, axis=2) if stacked else parts[0], tf.constant(real)


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

    @_as_it_is
    def fill_rows(*element: tf.Tensor) -> tuple[tf.Tensor, ...]:
        return tuple(_fill(t, f, batch_size) for t, f in zip(element, filler, strict=True))

    @_as_it_is
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
    return Batches(shard_by_row(chunks.map(fill_steps).prefetch(1)), steps, chunk)


def _fill(tensor: tf.Tensor, filler: float, size: int) -> tf.Tensor:
    """Return a tensor [n, ..] with n <= size as [size, ..]."""
    shape = [size, *tensor.shape[1:]]
    missing = size - tf.shape(tensor)[0]
    fits = tf.debugging.assert_non_negative(
        missing,
        f"a batch of the dataset has more than the {size} rows of the first one: put the largest "
        "first, or compile the model with jit_compile=False",
    )
    with tf.control_dependencies([fits]):
        tensor = tf.identity(tf.cast(tensor, tf_keras.backend.floatx()))
    paddings = [[0, missing], *([[0, 0]] * (len(shape) - 1))]
    filled = tf.pad(tensor, paddings, constant_values=tf.constant(filler, tensor.dtype))
    return tf.ensure_shape(filled, shape)


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
