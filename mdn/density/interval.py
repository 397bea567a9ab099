"""Probabilities of intervals under normals, in logs, exact to rounding in both tails."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from mdn.density.gaussian import LOG_2_PI
from mdn.density.univariate import log_ndtr

# Of Gauss-Legendre's rule over intervals over which a density changes by less than a factor of e
# or so: exact to the rounding of the dtype.
_NODES = {tf.float32: 4, tf.float64: 8}

FARTHEST = 1e18  # standard deviations: the square is a float32


def log_interval(low: tf.Tensor, high: tf.Tensor, width: tf.Tensor) -> tf.Tensor:
    """Return log(Phi(high) - Phi(low)) of the standard normal.

    The difference of two logs of Phi loses its digits where the interval is narrow; there the
    density is integrated by Gauss-Legendre's rule, in logs. Elsewhere the logs are those of the
    nearer tail, where they keep their digits.

    Args:
        low: [..], also infinite.
        high: [..], also infinite.
        width: [..], high - low, which may be known to more digits than the difference has.

    Returns:
        [..], nats.
    """
    dtype = low.dtype
    # Each branch is computed of harmless numbers where the other is taken, for its gradient.
    low, high, width = (_within(one, FARTHEST) for one in (low, high, width))
    one = tf.ones_like(width)
    middle = 0.5 * low + 0.5 * high
    narrow = width * tf.maximum(tf.abs(middle), one) < one
    half = 0.5 * tf.where(narrow, width, one)
    centre = tf.where(narrow, middle, tf.zeros_like(middle))
    terms = [
        np.log(weight) - 0.5 * tf.square(centre + node * half)
        for node, weight in zip(*np.polynomial.legendre.leggauss(_NODES[dtype]), strict=True)
    ]
    integral = tf.reduce_logsumexp(tf.stack(terms), axis=0) + tf.math.log(half) - 0.5 * LOG_2_PI
    below = middle > 0.0  # which is as far as above from zero on the other side
    near = tf.where(narrow, one, tf.where(below, -low, high))
    far = tf.where(narrow, -one, tf.where(below, -high, low))
    log_near, log_far = log_ndtr(near), log_ndtr(far)
    # log Phi falls at least as fast as -x^2 / 2, also where rounding says that it does not; and
    # beyond 80 there is no digit left of the further tail.
    least = tf.where(narrow, one, tf.abs(middle) * width)
    gap = tf.minimum(tf.maximum(log_near - log_far, least), 80.0 * one)
    return tf.where(narrow, integral, log_near + tf.math.log(-tf.math.expm1(-gap)))


def _within(value: tf.Tensor, farthest: float) -> tf.Tensor:
    """Return numbers cut to finite ones, which have no gradient there."""
    return tf.clip_by_value(value, -farthest, farthest)
