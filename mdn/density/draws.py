"""Draws from Gaussian mixtures: the component first, and only then one Gaussian.

Shape letters: D event size, K components.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf
from tensorflow_probability.python.internal import samplers

from mdn.density.parameters import MixtureParameters, broadcast


def as_seed(seed: Any) -> tf.Tensor:
    """Return int32 [2] of a seed: a whole number always gives the same, None never does.

    Args:
        seed: an int, an int32 [2], or None.
    """
    if seed is None:
        return samplers.sanitize_seed(None)
    if isinstance(seed, int):
        low, high = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
        return tf.constant([_signed(high), _signed(low)], tf.int32)
    seed = tf.cast(seed, tf.int32)
    return tf.stack([tf.zeros_like(seed), seed]) if seed.shape.rank == 0 else seed


def _signed(number: int) -> int:
    return number - (1 << 32) if number >= (1 << 31) else number


def draw(parameters: MixtureParameters, n: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Return n draws from a mixture: [n, .., D].

    TFP's own sampling fails where there are no rows, and makes K draws to keep one.

    Args:
        parameters: batch [..], K components.
        n: int32 scalar.
        seed: int32 [2]; the draws are the same on every device.
    """
    logits, loc, scale_tril = broadcast(parameters)
    seeds = tf.random.split(seed, 2, "philox")

    def shape(like: tf.Tensor) -> tf.Tensor:
        return tf.concat([[n], tf.shape(like)], axis=0)

    level = tf.random.stateless_uniform(
        shape(logits[..., :1]), seeds[0], dtype=loc.dtype, alg="philox"
    )  # [n, .., 1]
    noise = tf.random.stateless_normal(
        shape(loc[..., 0, :]), seeds[1], dtype=loc.dtype, alg="philox"
    )  # [n, .., D]
    share = tf.cumsum(tf.nn.softmax(logits), axis=-1)
    # Of the sum as it is rounded: a last component without weight is never drawn.
    below = level * share[..., -1:] >= share[..., :-1]  # [n, .., K - 1]
    component = tf.one_hot(tf.math.count_nonzero(below, -1), logits.shape[-1], dtype=loc.dtype)
    return tf.einsum("n...k,...ki->n...i", component, loc) + tf.einsum(
        "n...k,...kij,n...j->n...i", component, scale_tril, noise
    )


def temper(
    parameters: MixtureParameters, temperature: Any, sigma_temperature: Any
) -> MixtureParameters:
    """Return the mixture with weights and covariances sharpened (below 1) or flattened (above).

    Args:
        parameters: batch [..].
        temperature: the logits are divided by it.
        sigma_temperature: the covariances are multiplied by it.
    """
    logits, loc, scale_tril = parameters
    logits = tf.nn.log_softmax(logits) / tf.cast(temperature, logits.dtype)
    scale = tf.sqrt(tf.cast(sigma_temperature, loc.dtype))
    return MixtureParameters(logits, loc, scale * scale_tril)
