"""Weights of a pool's components by what the pool as a whole says of them.

A mixture of densities that differ says that any of them may be right, and keeps each mode of each
of them. Where they are right about some modes and each wrong about others, as with little noise,
the modes that they agree on are likelier than their shares: a component counts by the density of
the whole pool at its mean, to a power. That is a part of the way to the product of the densities,
and the result stays a mixture of the same components.

Shape letters: D event size, K components.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from mdn.density.gaussian import LOG_2_PI
from mdn.density.mixing import event_ranks
from mdn.density.mixture import GaussianMixture
from mdn.density.queries import Queries
from mdn.density.transformed import Transformed, split_transform

BLOCK = 16  # means at a time
MOST_UNROLLED = 8  # targets
FLOOR = 60.0  # nats below the best supported component: nothing, and still a number in float32


def agree(density: Queries, power: float, kept: np.ndarray) -> Any:
    """Return the mixture whose weights are w times its own density at their means, to a power.

    Args:
        density: a mixture, batch [..]; of a `Transformed` the one of the transformed targets.
        power: 0 leaves the weights; above it, those grow whose components others agree with.
        kept: [K] booleans, components whose weights stay as they are, such as a background; the
            weights of the others sum to what they did.

    Returns:
        Of the same type.
    """
    base: Any
    base, bijector = split_transform(density)
    tensors = base.tensors()
    tensors["logits"] = reweigh(tensors["logits"], support(base), power, kept)
    mixture = type(base)(**tensors)
    return mixture if bijector is None else Transformed(mixture, bijector)


def support(mixture: GaussianMixture, points: Any = None) -> tf.Tensor:
    """Return the log density of a mixture at the means of its components, or other points.

    That is `mixture.log_prob`, but for few targets by one exponential for each two components; a
    density that has nothing left beside the highest is `FLOOR` below it, or lower.

    Args:
        mixture: batch [..].
        points: [.., n, D]; by default the means, n = K.

    Returns:
        [.., n].
    """
    points = mixture.loc if points is None else points
    if mixture.event_shape[-1] <= MOST_UNROLLED:
        return in_blocks(_unrolled_log_prob(mixture), points)
    one = {
        name: tf.expand_dims(tensor, -1 - event_ranks(mixture)[name])
        for name, tensor in mixture.tensors().items()
    }  # batch [.., 1]
    log_prob = type(mixture)(**one).log_prob
    return in_blocks(lambda some: log_prob(some, complete=True), points)


def _unrolled_log_prob(mixture: GaussianMixture) -> Callable[[tf.Tensor], tf.Tensor]:
    """Return the log density of a mixture, batch [..], at points [.., n, D]."""
    _, loc, scale_tril = mixture.mixture_parameters()
    d, dtype = loc.shape[-1], loc.dtype
    log_diag = tf.math.log(tf.linalg.diag_part(scale_tril))
    peak = tf.nn.log_softmax(mixture.logits) - tf.reduce_sum(log_diag, axis=-1)  # [.., K]
    top = tf.reduce_max(peak, axis=-1, keepdims=True)
    height = tf.expand_dims(peak - top, -2)  # [.., 1, K]
    white = tf.linalg.triangular_solve(scale_tril, tf.eye(d, dtype=dtype))[
        ..., tf.newaxis, :, :, :
    ]
    least = np.finfo(dtype.as_numpy_dtype).tiny

    def log_prob(points: tf.Tensor) -> tf.Tensor:
        away = [points[..., i, tf.newaxis] - loc[..., tf.newaxis, :, i] for i in range(d)]
        square = tf.zeros([], dtype)
        for i in range(d):
            others = () if mixture.diagonal else range(i)
            z = white[..., i, i] * away[i]
            for j in others:
                z += white[..., i, j] * away[j]
            square += tf.square(z)  # [.., n, K]
        total = tf.reduce_sum(tf.exp(height - 0.5 * square), axis=-1)
        return top - 0.5 * d * LOG_2_PI + tf.math.log(tf.maximum(total, least))

    return log_prob


def in_blocks(log_prob: Callable[[tf.Tensor], tf.Tensor], points: tf.Tensor) -> tf.Tensor:
    """Return the log density [.., n] at points [.., n, D], of `BLOCK` of them at a time."""
    found: list[tf.Tensor] = []
    for i in range(0, points.shape[-2], BLOCK):
        # One after the other: what a block needs is many times larger than what it leaves.
        with tf.control_dependencies(found[-1:]):
            found.append(log_prob(tf.identity(points[..., i : i + BLOCK, :])))
    return tf.concat(found, axis=-1)


def reweigh(logits: tf.Tensor, support: tf.Tensor, power: float, kept: np.ndarray) -> tf.Tensor:
    """Return the logits [.., K] of weights times exp(power support), normalised.

    Args:
        logits: [.., K].
        support: [.., K]; what is more than `FLOOR` below the highest counts as that.
        power: of the density of which the support is the log.
        kept: [K] booleans, of components whose weights stay as they are: some, but not all. The
            weights of the others sum to what they did.
    """
    moved, stay = np.flatnonzero(~kept), np.flatnonzero(kept)
    logits = tf.nn.log_softmax(logits)
    support = tf.maximum(support, tf.reduce_max(support, axis=-1, keepdims=True) - FLOOR)
    before = tf.gather(logits, moved, axis=-1)
    total = tf.reduce_logsumexp(before, axis=-1, keepdims=True)
    after = total + tf.nn.log_softmax(before + power * tf.gather(support, moved, axis=-1))
    # Not by a mask of infinities: runtimes differ in what they make of those.
    whole = tf.concat([after, tf.gather(logits, stay, axis=-1)], axis=-1)
    return tf.gather(whole, np.argsort(np.append(moved, stay)), axis=-1)
