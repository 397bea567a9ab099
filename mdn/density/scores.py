"""What an observed y is worth under a Gaussian mixture: its ranks, and its energy score.

Shape letters: D event size, K components, S draws.
"""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

from mdn.density.gaussian import whiten_observed
from mdn.density.parameters import MixtureParameters, broadcast
from mdn.density.univariate import ndtr

# Standard deviations beyond which the square is no float32.
_FARTHEST = 1e17


def pit(parameters: MixtureParameters, y: tf.Tensor) -> tf.Tensor:
    """Return P(Y_d <= y_d | Y_1 = y_1, .., Y_(d-1) = y_(d-1)) of each d: Rosenblatt's transform.

    Args:
        parameters: batch [..].
        y: [.., D], NaN marks a missing entry: what comes after it is not conditioned on it.

    Returns:
        [.., D], independent and uniform if y has this density; NaN where y is.

    Source:
        Rosenblatt (1952), Remarks on a multivariate transformation, Annals of Mathematical
        Statistics 23.
    """
    logits, loc, scale_tril = broadcast(parameters)
    y = y[..., tf.newaxis, :]  # [.., 1, D]
    missing = tf.math.is_nan(y)
    residual = tf.where(missing, tf.zeros_like(y), y - loc)  # [.., K, D]
    missing |= tf.zeros_like(residual, tf.bool)
    factor = scale_tril + tf.zeros_like(residual)[..., tf.newaxis]
    # A whole row is solved, which keeps the digits of a nearly singular factor.
    z = tf.linalg.triangular_solve(factor, residual[..., tf.newaxis])[..., 0]
    some, lengths = whiten_observed(residual, missing, factor)
    incomplete = tf.reduce_any(missing, axis=-1, keepdims=True)
    z = tf.where(incomplete, some, z)
    lengths = tf.where(incomplete, lengths, tf.linalg.diag_part(factor))
    near = tf.clip_by_value(z, -_FARTHEST, _FARTHEST)
    terms = -0.5 * tf.square(near) - tf.math.log(lengths)
    terms = tf.where(missing, tf.zeros_like(terms), terms)
    before = tf.cumsum(terms, axis=-1, exclusive=True)  # [.., K, D]
    log_weight = tf.nn.log_softmax(logits)[..., tf.newaxis]
    weight = tf.nn.softmax(log_weight + before, axis=-2)
    found = tf.minimum(tf.reduce_sum(weight * ndtr(z), axis=-2), 1.0)
    return tf.where(missing[..., 0, :], tf.constant(float("nan"), found.dtype), found)


def energy_score(draws: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
    """Return an unbiased estimate of E|Y - y| - E|Y - Y'| / 2.

    Args:
        draws: of Y, [S, .., D], at least two; each is compared with y and with the next.
        y: [.., D], NaN marks a missing entry, which is left out of the lengths.

    Returns:
        [..], in the units of y.

    Source:
        Gneiting and Raftery (2007), Strictly proper scoring rules, prediction, and estimation,
        JASA 102.
    """
    missing = tf.math.is_nan(y)
    to_y = _distance(draws, tf.where(missing, tf.zeros_like(y), y), missing)
    between = _distance(draws, tf.roll(draws, 1, axis=0), missing)
    return tf.reduce_mean(to_y, axis=0) - 0.5 * tf.reduce_mean(between, axis=0)


def component_energy_score(
    parameters: MixtureParameters,
    forward: Callable[[tf.Tensor], tf.Tensor],
    y: tf.Tensor,
    n: int,
    seed: tf.Tensor,
) -> tf.Tensor:
    """Return an unbiased estimate of the energy score of forward(u), which has all gradients.

    The n draws are of each component, and the weights of the components are exact: no draw depends
    on them.

    Args:
        parameters: of u, batch [..].
        forward: elementwise on [.., D].
        y: [.., D], NaN marks a missing entry, which is left out of the lengths.
        n: at least two.
        seed: int32 [2].

    Returns:
        [..], in the units of y.
    """
    logits, loc, scale_tril = broadcast(parameters)
    shape = tf.concat([[n], tf.shape(loc)], axis=0)
    noise = tf.random.stateless_normal(shape, seed, dtype=loc.dtype, alg="philox")
    draws = forward(loc + tf.linalg.matvec(scale_tril, noise))  # [S, .., K, D]
    weight = tf.nn.softmax(logits)
    missing = tf.math.is_nan(y)[..., tf.newaxis, :]  # [.., 1, D]
    known = tf.where(missing, tf.zeros_like(missing, y.dtype), y[..., tf.newaxis, :])
    to_y = tf.reduce_mean(_distance(draws, known, missing), axis=0)  # [.., K]
    others = tf.roll(draws, 1, axis=0)[..., tf.newaxis, :, :]
    pairs = _distance(draws[..., tf.newaxis, :], others, missing[..., tf.newaxis, :])
    between = tf.einsum("...k,...l,...kl->...", weight, weight, tf.reduce_mean(pairs, axis=0))
    return tf.reduce_sum(weight * to_y, axis=-1) - 0.5 * between


def _distance(a: tf.Tensor, b: tf.Tensor, missing: tf.Tensor) -> tf.Tensor:
    """Return the distances over the entries that are not missing, [..], of [.., D]."""
    apart = tf.abs(tf.where(missing, tf.zeros_like(a - b), a - b))
    # As a hypotenuse, whose squares neither overflow nor vanish, with a gradient at zero.
    largest = tf.stop_gradient(tf.reduce_max(apart, axis=-1, keepdims=True))
    safe = tf.where(largest > 0.0, largest, tf.ones_like(largest))
    squared = tf.reduce_sum(tf.square(apart / safe), axis=-1)
    some = squared > 0.0
    root = tf.sqrt(tf.where(some, squared, tf.ones_like(squared)))
    return safe[..., 0] * tf.where(some, root, tf.zeros_like(root))
