"""Fewer components: merged two by two, or dropped.

Shape letters: D event size, K components.
"""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from mdn.density.factors import lower_factor
from mdn.density.parameters import MixtureParameters, broadcast
from mdn.errors import DataError

# Weights are at least this, so that two of them have a mean; a float32 has it.
_LEAST = 1e-30


class _Parts(NamedTuple):
    weight: tf.Tensor  # [.., K]
    loc: tf.Tensor  # [.., K, D]
    scale_tril: tf.Tensor  # [.., K, D, D]


def check_count(k: int) -> None:
    """Raise a DataError unless k is a number of components."""
    if k < 1:
        raise DataError(f"k={k}: a mixture has at least one component")


def reduce(parameters: MixtureParameters, k: int) -> tuple[MixtureParameters, tf.Tensor]:
    """Return a mixture of at most k components, and a bound on what that costs.

    The two components whose merger costs least are replaced by the normal with their moments,
    until k are left; mean and covariance of the mixture stay as they are.

    Args:
        parameters: batch [..], K components.
        k: at least one.

    Returns:
        The mixture, and [..]: an upper bound on KL(before || after), in nats.

    Source:
        Runnalls (2007), Kullback-Leibler approach to Gaussian mixture reduction, IEEE Transactions
        on Aerospace and Electronic Systems 43.
    """
    check_count(k)
    logits, loc, scale_tril = broadcast(parameters)
    bound = tf.zeros_like(logits[..., 0])
    if logits.shape[-1] <= k:
        return MixtureParameters(logits, loc, scale_tril), bound
    parts = _Parts(tf.maximum(tf.nn.softmax(logits), _LEAST), loc, scale_tril)
    first = _Parts(*(tf.expand_dims(t, -r) for r, t in enumerate(parts, 1)))  # [.., K, 1, *]
    second = _Parts(*(tf.expand_dims(t, -r - 1) for r, t in enumerate(parts, 1)))  # [.., 1, K, *]
    cost = _cost(first, second)  # [.., K, K]
    batch_dims = logits.shape.rank - 1
    for count in range(logits.shape[-1], k, -1):
        pairs = tf.linalg.band_part(tf.ones([count, count], tf.bool), 0, -1)
        pairs = pairs & ~tf.eye(count, dtype=tf.bool)  # i < j
        flat = tf.where(pairs, cost, tf.constant(cost.dtype.max, cost.dtype))
        flat = tf.reshape(flat, tf.concat([tf.shape(flat)[:-2], [count * count]], axis=0))
        best = tf.argmin(flat, axis=-1, output_type=tf.int32)  # [..]
        bound += tf.reduce_min(flat, axis=-1)
        i, j = best[..., tf.newaxis] // count, best[..., tf.newaxis] % count  # [.., 1]

        def take(index: tf.Tensor, parts: _Parts = parts) -> _Parts:
            return _Parts(*(tf.gather(t, index, batch_dims=batch_dims) for t in parts))

        merged = _merge(take(i), take(j))  # one component
        rest = tf.range(count - 2) + tf.zeros_like(i)
        rest += tf.cast(rest >= i, tf.int32)
        rest += tf.cast(rest >= j, tf.int32)
        others = take(rest)
        parts = _Parts(
            *(tf.concat(pair, -r) for r, pair in enumerate(zip(others, merged, strict=True), 1))
        )
        cost = tf.gather(tf.gather(cost, rest, batch_dims=batch_dims), rest, axis=-1,
                         batch_dims=batch_dims)  # fmt: skip
        column = _cost(others, merged)[..., tf.newaxis]  # [.., count - 2, 1]
        cost = tf.concat([cost, column], axis=-1)
        cost = tf.concat([cost, tf.zeros_like(cost[..., :1, :])], axis=-2)
    weight, loc, scale_tril = parts
    return MixtureParameters(tf.math.log(weight), loc, scale_tril), bound


def _merge(a: _Parts, b: _Parts) -> _Parts:
    """Return the normals with the moments of two, and their weight together."""
    weight = a.weight + b.weight
    share = (b.weight / weight)[..., tf.newaxis]
    apart = b.loc - a.loc
    loc = a.loc + share * apart
    share = share[..., tf.newaxis]
    # P P^T of these columns is the covariance: within the two, and between them.
    columns = tf.concat(
        [
            tf.sqrt(1.0 - share) * a.scale_tril + tf.zeros_like(b.scale_tril),
            tf.sqrt(share) * b.scale_tril + tf.zeros_like(a.scale_tril),
            tf.sqrt(share * (1.0 - share)) * apart[..., tf.newaxis],
        ],
        axis=-1,
    )
    return _Parts(weight, loc, lower_factor(tf.linalg.matrix_transpose(columns)))


def _cost(a: _Parts, b: _Parts) -> tf.Tensor:
    """Return how much KL two components cost at most when they are merged, in nats."""
    merged = _merge(a, b)
    volumes = [
        tf.reduce_sum(tf.math.log(tf.linalg.diag_part(p.scale_tril)), axis=-1)
        for p in (a, b, merged)
    ]
    of_a, of_b, of_both = volumes
    # As differences, whose digits are those of what is lost.
    return tf.maximum(a.weight * (of_both - of_a) + b.weight * (of_both - of_b), 0.0)


def prune(parameters: MixtureParameters, min_weight: float) -> MixtureParameters:
    """Return the mixture of the components that weigh at least `min_weight`, by weight.

    The heaviest stays in any case. In a batch, a density that keeps fewer than another is filled
    up with components of no weight. Inside a `tf.function`, where shapes cannot depend on values,
    all K stay.

    Args:
        parameters: batch [..], K components.
        min_weight: between 0 and 1.

    Raises:
        DataError: it is not.
    """
    if not 0.0 <= min_weight <= 1.0:
        raise DataError(f"min_weight={min_weight}: give a weight between 0 and 1")
    logits, loc, scale_tril = broadcast(parameters)
    log_weight = tf.nn.log_softmax(logits)
    order = tf.argsort(log_weight, axis=-1, direction="DESCENDING", stable=True)
    batch_dims = logits.shape.rank - 1
    log_weight, loc, scale_tril = (
        tf.gather(t, order, batch_dims=batch_dims) for t in (log_weight, loc, scale_tril)
    )
    first = tf.range(logits.shape[-1]) == 0
    kept = (tf.exp(log_weight) >= tf.cast(min_weight, logits.dtype)) | first
    most = logits.shape[-1]
    if tf.executing_eagerly():
        most = int(tf.reduce_max(tf.math.count_nonzero(kept, axis=-1)))
    log_weight = tf.where(kept, log_weight, tf.constant(-1e9, logits.dtype))
    return MixtureParameters(log_weight[..., :most], loc[..., :most, :],
                             scale_tril[..., :most, :, :])  # fmt: skip


def effective_components(logits: tf.Tensor) -> tf.Tensor:
    """Return the exponential of the weights' entropy, [..]: from 1 to K."""
    log_weight = tf.nn.log_softmax(logits)
    weight = tf.exp(log_weight)
    return tf.exp(-tf.reduce_sum(tf.math.multiply_no_nan(log_weight, weight), axis=-1))
