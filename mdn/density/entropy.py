"""The entropy of Gaussian mixtures: an estimate with its standard error, and bounds.

Shape letters: D event size, K components, S draws.
"""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from mdn.density.factors import lower_factor
from mdn.density.gaussian import LOG_2_PI
from mdn.density.parameters import MixtureParameters, broadcast


class Entropy(NamedTuple):
    """An entropy in nats, each [..].

    Attributes:
        estimate: unbiased.
        standard_error: of the estimate; zero where there is one component.
        lower: the entropy is not below it.
        upper: the entropy is not above it.
    """

    estimate: tf.Tensor
    standard_error: tf.Tensor
    lower: tf.Tensor
    upper: tf.Tensor


def estimate(
    parameters: MixtureParameters, n: int, seed: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the entropy by n draws from each component, and its standard error: [..] each.

    Only what the components have in common is estimated, as the rest has a closed form: the
    entropy is sum w_k (h_k - log w_k) less the mean entropy of the component given y. So the error
    is zero where K = 1, and vanishes as components move apart.

    Args:
        parameters: batch [..].
        n: at least two.
        seed: int32 [2].
    """
    logits, loc, scale_tril = broadcast(parameters)
    log_weight = tf.nn.log_softmax(logits)
    weight = tf.exp(log_weight)
    shape = tf.concat([tf.shape(loc), [n]], axis=0)
    noise = tf.random.stateless_normal(shape, seed, dtype=loc.dtype, alg="philox")
    y = loc[..., tf.newaxis] + scale_tril @ noise  # [.., i, D, S]
    away = y[..., tf.newaxis, :, :] - loc[..., tf.newaxis, :, :, tf.newaxis]  # [.., i, j, D, S]
    factor = scale_tril[..., tf.newaxis, :, :, :] + tf.zeros_like(away[..., :1])
    z = tf.linalg.triangular_solve(factor, away)
    height = log_weight - _component_entropy(scale_tril)  # up to a constant
    joint = height[..., tf.newaxis, :, tf.newaxis] - 0.5 * tf.reduce_sum(tf.square(z), axis=-2)
    own = tf.linalg.diag_part(tf.experimental.numpy.moveaxis(joint, -1, 0))  # [S, .., i]
    between = own - tf.experimental.numpy.moveaxis(tf.reduce_logsumexp(joint, axis=-2), -1, 0)
    between = tf.where(weight > 0.0, between, tf.zeros_like(between))
    mean, variance = tf.nn.moments(between, axes=[0])  # [.., K]
    squared = tf.reduce_sum(tf.square(weight) * variance, axis=-1) / float(n - 1)
    some = squared > 0.0  # a root has no slope at zero
    error = tf.where(some, tf.sqrt(tf.where(some, squared, tf.ones_like(squared))), squared)
    return _with_labels(log_weight, scale_tril) + tf.reduce_sum(weight * mean, axis=-1), error


def _component_entropy(scale_tril: tf.Tensor) -> tf.Tensor:
    log_diag = tf.math.log(tf.linalg.diag_part(scale_tril))
    return tf.reduce_sum(log_diag + 0.5 * (LOG_2_PI + 1.0), axis=-1)  # [.., K]


def _with_labels(log_weight: tf.Tensor, scale_tril: tf.Tensor) -> tf.Tensor:
    """Return the entropy of y and its component together, [..]."""
    weight = tf.exp(log_weight)
    labels = tf.math.multiply_no_nan(log_weight, weight)
    return tf.reduce_sum(weight * _component_entropy(scale_tril) - labels, axis=-1)


def bounds(parameters: MixtureParameters) -> tuple[tf.Tensor, tf.Tensor]:
    """Return closed-form bounds on the entropy, in nats: the lower and the upper, [..] each.

    Of a mixture whose components all lie together or all lie apart they meet.

    Source:
        Kolchinsky and Tracey (2017), Estimating mixture entropy with pairwise distances, Entropy
        19: by the Bhattacharyya distance below, by the Kullback-Leibler divergence above;
        Huber, Bailey, Durrant-Whyte and Hanebeck (2008), On entropy approximation for Gaussian
        mixture random variables, IEEE MFI: below, by Jensen's inequality; above, the entropy of
        the normal with the same covariance.
    """
    logits, loc, scale_tril = broadcast(parameters)
    log_weight = tf.nn.log_softmax(logits)
    weight = tf.exp(log_weight)
    own = _component_entropy(scale_tril)  # [.., K]
    d = loc.shape[-1]
    apart = loc[..., tf.newaxis, :] - loc[..., tf.newaxis, :, :]  # [.., i, j, D]
    first = scale_tril[..., tf.newaxis, :, :]  # [.., i, 1, D, D]
    zeros = tf.zeros_like(first * scale_tril[..., tf.newaxis, :, :, :])
    first, second = first + zeros, scale_tril[..., tf.newaxis, :, :, :] + zeros

    def log_volume(factor: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum(tf.math.log(tf.linalg.diag_part(factor)), axis=-1)

    def squared(factor: tf.Tensor) -> tf.Tensor:
        z = tf.linalg.triangular_solve(factor, apart[..., tf.newaxis])
        return tf.reduce_sum(tf.square(tf.clip_by_value(z, -1e17, 1e17)), axis=[-2, -1])

    ratio = tf.linalg.triangular_solve(second, first)  # L_j^-1 L_i
    trace = tf.reduce_sum(tf.square(tf.clip_by_value(ratio, -1e17, 1e17)), axis=[-2, -1])
    kl = 0.5 * (trace + squared(second) - d) + log_volume(second) - log_volume(first)
    both = tf.concat([first, second], axis=-1)
    total = lower_factor(tf.linalg.matrix_transpose(both))  # of the sum of two covariances
    volume = log_volume(total) - 0.5 * d * tf.math.log(tf.constant(2.0, loc.dtype))
    near = squared(total)
    bhattacharyya = 0.25 * near + volume - 0.5 * (log_volume(first) + log_volume(second))
    log_overlap = -0.5 * (near + d * LOG_2_PI) - log_volume(total)  # log N(m_i; m_j, P_i + P_j)

    def pairwise(distance: tf.Tensor) -> tf.Tensor:
        inner = tf.reduce_logsumexp(log_weight[..., tf.newaxis, :] - distance, axis=-1)
        return tf.reduce_sum(tf.math.multiply_no_nan(own - inner, weight), axis=-1)

    jensen = tf.reduce_logsumexp(log_weight[..., tf.newaxis, :] + log_overlap, axis=-1)
    lower = tf.maximum(
        pairwise(tf.maximum(bhattacharyya, 0.0)),
        -tf.reduce_sum(tf.math.multiply_no_nan(jensen, weight), axis=-1),
    )
    upper = tf.minimum(pairwise(tf.maximum(kl, 0.0)), _normal_entropy(weight, loc, scale_tril))
    return lower, tf.maximum(lower, upper)


def _normal_entropy(weight: tf.Tensor, loc: tf.Tensor, scale_tril: tf.Tensor) -> tf.Tensor:
    """Return the entropy of the normal with the covariance of the mixture, [..]."""
    root = tf.sqrt(weight)
    mean = tf.reduce_sum(weight[..., tf.newaxis] * loc, axis=-2, keepdims=True)
    between = root[..., tf.newaxis] * (loc - mean)  # [.., K, D]
    within = root[..., tf.newaxis, tf.newaxis] * tf.linalg.matrix_transpose(scale_tril)
    k, d = loc.shape[-2:]
    rows = tf.reshape(within, tf.concat([tf.shape(within)[:-3], [k * d, d]], axis=0))
    factor = lower_factor(tf.concat([rows, between], axis=-2))
    return _component_entropy(factor)
