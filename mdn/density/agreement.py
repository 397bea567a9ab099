"""Weights of a pool's components by what the pool as a whole says of them.

A mixture of densities that differ says that any of them may be right, and keeps each mode of each
of them. Where they are right about some modes and each wrong about others, as with little noise,
the modes that they agree on are likelier than their shares: a component counts by the density of
the whole pool at its mean, to a power. It is half of the way to the product of densities, and the
result stays a mixture of the same components.

Shape letters: D event size, K components.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from mdn.density.mixing import event_ranks
from mdn.density.mixture import GaussianMixture
from mdn.density.queries import Queries
from mdn.density.transformed import Transformed, split_transform

BLOCK = 16  # means at a time, which keeps [.., BLOCK, K, D] small


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
    tensors["logits"] = reweigh(tensors["logits"], power * support(base), kept)
    mixture = type(base)(**tensors)
    return mixture if bijector is None else Transformed(mixture, bijector)


def support(mixture: GaussianMixture, loc: Any = None) -> tf.Tensor:
    """Return the log density of a mixture at the means of its components, or other points.

    Args:
        mixture: batch [..].
        loc: [.., n, D]; by default the means, n = K.

    Returns:
        [.., n].
    """
    one = {
        name: tf.expand_dims(tensor, -1 - event_ranks(mixture)[name])
        for name, tensor in mixture.tensors().items()
    }  # batch [.., 1]
    log_prob = type(mixture)(**one).log_prob
    return in_blocks(
        lambda points: log_prob(points, complete=True), mixture.loc if loc is None else loc
    )


def in_blocks(log_prob: Callable[[tf.Tensor], tf.Tensor], loc: tf.Tensor) -> tf.Tensor:
    """Return the log density [.., n] at points [.., n, D], a few of them at a time."""
    starts = range(0, loc.shape[-2], BLOCK)
    return tf.concat([log_prob(loc[..., i : i + BLOCK, :]) for i in starts], axis=-1)


def reweigh(logits: tf.Tensor, change: tf.Tensor, kept: np.ndarray) -> tf.Tensor:
    """Return the logits [.., K] after a change, normalised; of the kept ones as they were.

    Args:
        logits: [.., K].
        change: [.., K], of the log weights.
        kept: [K] booleans, for some but not all; the others share what they had together.
    """
    moved, stay = np.flatnonzero(~kept), np.flatnonzero(kept)
    logits = tf.nn.log_softmax(logits)
    before, change = tf.gather(logits, moved, axis=-1), tf.gather(change, moved, axis=-1)
    total = tf.reduce_logsumexp(before, axis=-1, keepdims=True)
    after = total + tf.nn.log_softmax(before + change)
    # Not by a mask of infinities: runtimes differ in what they make of those.
    whole = tf.concat([after, tf.gather(logits, stay, axis=-1)], axis=-1)
    return tf.gather(whole, np.argsort(np.append(moved, stay)), axis=-1)
