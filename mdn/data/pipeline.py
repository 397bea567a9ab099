"""Batches of arrays and of datasets for `fit` and `evaluate`.

Shape letters: B batch, M ensemble members, N rows, S steps of a chunk.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

from mdn.data.chunks import Batches, Chunk, chunk_size, shard_by_row

# Nothing in these functions is for autograph, which takes as long to find that out as to trace.
_as_it_is = tf.autograph.experimental.do_not_convert


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
    n = len(arrays[0]) if members is None else members.shape[1]
    whole = n // batch_size  # batches of a pass
    passes = 1 if steps is None else math.ceil(steps / whole) + 1  # that an epoch may touch
    if steps is None:
        steps = whole if drop_remainder else math.ceil(n / batch_size)
    chunk = min(chunk or chunk_size(steps, _batch_bytes(arrays, batch_size, members)), steps)
    own = [None] if members is None else list(members)
    with tf.device("CPU:0"):
        tensors = _with_filler(arrays)

    def places(epoch: int, seed: int | None) -> np.ndarray:
        if passes == 1:
            return epoch_rows(n, seed, epoch).numpy()[: steps * batch_size]
        first, skipped = divmod(epoch * steps, whole)
        parts = [epoch_order(n, batch_size, seed, first + i) for i in range(passes)]
        return np.concatenate(parts)[skipped : skipped + steps].reshape(-1)

    def generate() -> Iterator[Chunk]:
        for epoch in itertools.count(first_epoch):
            orders = []
            for m, rows in enumerate(own):
                order = places(epoch, None if seed is None else seed + m)
                orders.append(order if rows is None else rows[order])
            yield from _chunked(tensors, orders, batch_size, chunk, members is not None)

    spec = _spec(arrays, batch_size, chunk, members)
    return Batches(generate, spec, steps, complete, ahead=1)


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
    n = len(arrays[0]) if members is None else members.shape[1]
    steps = math.ceil(n / batch_size)
    batch_size = math.ceil(n / steps)
    chunk = min(chunk or chunk_size(steps, _batch_bytes(arrays, batch_size, members)), steps)
    orders = [np.arange(n)] if members is None else list(members)
    with tf.device("CPU:0"):
        chunks = [*_chunked(_with_filler(arrays), orders, batch_size, chunk, members is not None)]
    spec = _spec(arrays, batch_size, chunk, members)
    return Batches(lambda: iter(chunks), spec, steps, complete, ahead=0)


def epoch_rows(n: int, seed: int | None, epoch: int) -> tf.Tensor:
    """Return the order of n rows in an epoch, int32 [n]."""
    rows = tf.range(n)
    if seed is None:
        return rows
    key = tf.stack([tf.constant(seed, tf.int64), tf.cast(epoch, tf.int64)])
    return tf.random.experimental.stateless_shuffle(rows, seed=key)


def epoch_order(n: int, batch_size: int, seed: int | None, epoch: int) -> np.ndarray:
    """Return the rows of each whole batch of an epoch, [n // B, B]."""
    steps = n // batch_size
    return epoch_rows(n, seed, epoch).numpy()[: steps * batch_size].reshape(steps, batch_size)


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


def _spec(
    arrays: tuple[np.ndarray, ...], batch_size: int, chunk: int, members: np.ndarray | None
) -> tuple[tf.TensorSpec, ...]:
    leading = [chunk, batch_size] if members is None else [chunk, len(members), batch_size]
    return tuple(
        tf.TensorSpec([*leading, *np.shape(array)[1:]], tf_keras.backend.floatx())
        for array in arrays
    )


def _chunked(
    tensors: tuple[tf.Tensor, ...],
    orders: list[np.ndarray],
    batch_size: int,
    chunk: int,
    stacked: bool,
) -> Iterator[Chunk]:
    """Yield the chunks of one epoch.

    Args:
        tensors: [N + 1, ..], the last row of which fills up.
        orders: rows [n], of each member of an ensemble.
        batch_size: B.
        chunk: S.
        stacked: the chunks have an axis of members.
    """
    n = len(orders[0])
    steps = math.ceil(n / batch_size)
    count = math.ceil(steps / chunk)
    rows = np.full([len(orders), count * chunk * batch_size], len(tensors[0]) - 1, np.int32)
    rows[:, :n] = orders
    parts = rows.reshape(len(orders), count, chunk, batch_size).transpose(1, 2, 0, 3)
    for i, part in enumerate(parts if stacked else parts[:, :, 0]):
        real = np.int32(min(chunk, steps - chunk * i))
        yield tuple(tf.gather(tensor, part) for tensor in tensors), real


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
    # Not prefetched: where it is Python that makes the batches, see `mdn.data.chunks`.
    dataset = shard_by_row(chunks.map(fill_steps))
    return Batches(dataset.__iter__, dataset.element_spec[0], steps, ahead=1, dataset=dataset)


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
