"""The modes of Gaussian mixtures.

Shape letters: D event size, K components, S starts.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from mdn.density.parameters import MixtureParameters, broadcast

_STEPS = 200
_DOUBLINGS = 6  # 64 terms of the series
# Starts stand this far from a component's mean, in its standard deviations: a mean may be a
# saddle by symmetry, from which no step leads away.
_NUDGE = 1e-2
# Points are one mode if they are this near, in units of the local standard deviation.
_SAME = 1e-2


class Modes(NamedTuple):
    """Local maxima of a density, the highest first, padded to K.

    Attributes:
        loc: [.., K, D], the modes; where `mask` is false, copies of others.
        log_prob: [.., K], the log density there.
        mask: [.., K], which are modes of their own; the first always is.
    """

    loc: tf.Tensor
    log_prob: tf.Tensor
    mask: tf.Tensor


class _Field(NamedTuple):
    """What a mixture is like at points [.., S, D]."""

    log_prob: tf.Tensor  # [.., S]
    gradient: tf.Tensor  # [.., S, D], of the log density
    factor: tf.Tensor  # [.., S, D, D], Cholesky of the mean precision A
    spread: tf.Tensor  # [.., S, D, D], M: the Hessian is -C (I - M) C^T


def find_modes(parameters: MixtureParameters) -> Modes:
    """Return the modes that a fixed-point iteration reaches from every component's mean.

    A step is x + A^-1 g, with g the gradient of the log density and A the mean of the components'
    precisions given x: it never loses density. As such steps shrink slowly where components
    overlap, what 64 of them would do by the local curvature is tried first, and kept where the
    density says that it is better.

    The gradient of a mode by the parameters is that of the implicit function.

    Args:
        parameters: batch [..].

    Source:
        Carreira-Perpinan (2000), Mode-finding for mixtures of Gaussian distributions, IEEE PAMI
        22.
    """
    logits, loc, scale_tril = parameters = broadcast(parameters)
    if loc.shape[-2] == 1:
        log_prob = _log_peak(scale_tril) + tf.zeros_like(loc[..., 0])
        return Modes(loc, log_prob, tf.ones_like(log_prob, tf.bool))
    frozen = _Mixture(MixtureParameters(*(tf.stop_gradient(t) for t in parameters)))
    x = tf.stop_gradient(_climb(frozen))
    at = frozen.field(x)
    # A component whose weight is zero in the dtype is nowhere.
    present = tf.exp(tf.nn.log_softmax(logits)) > 0.0
    height = tf.where(present, at.log_prob, tf.constant(-np.inf, x.dtype))
    order = tf.argsort(height, axis=-1, direction="DESCENDING", stable=True)
    batch_dims = logits.shape.rank - 1
    x, factor, spread, present = (
        tf.gather(t, order, batch_dims=batch_dims) for t in (x, at.factor, at.spread, present)
    )
    mask = _distinct(x, factor) & present
    # One step of Newton's, whose value is nothing and whose gradient is the implicit one.
    newton = tf.stop_gradient(_inverse(factor, spread, doublings=12))
    newton = tf.where(tf.math.is_finite(newton), newton, tf.zeros_like(newton))
    field = _Mixture(parameters).field(x)
    step = tf.linalg.matvec(newton, field.gradient)
    return Modes(x + step - tf.stop_gradient(step), field.log_prob, mask)


def _log_peak(scale_tril: tf.Tensor) -> tf.Tensor:
    log_diag = tf.math.log(tf.linalg.diag_part(scale_tril))
    return -tf.reduce_sum(log_diag + 0.5 * np.log(2.0 * np.pi), axis=-1)


class _Mixture:
    """A mixture with the inverses of its factors."""

    def __init__(self, parameters: MixtureParameters) -> None:
        self.logits, self.loc, self.scale_tril = parameters
        d = self.loc.shape[-1]
        eye = tf.broadcast_to(tf.eye(d, dtype=self.loc.dtype), tf.shape(self.scale_tril))
        self.inverse = tf.linalg.triangular_solve(self.scale_tril, eye)  # [.., K, D, D]
        self.log_height = tf.nn.log_softmax(self.logits) + _log_peak(self.scale_tril)

    def joint(self, x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Return the weighted log densities at x [.., S, D], [.., S, K], and z [.., S, K, D]."""
        inverse = self.inverse[..., tf.newaxis, :, :, :]  # [.., 1, K, D, D]
        away = self.loc[..., tf.newaxis, :, :] - x[..., tf.newaxis, :]  # [.., S, K, D]
        z = tf.linalg.matvec(inverse, away)
        height = self.log_height[..., tf.newaxis, :]
        return height - 0.5 * tf.reduce_sum(tf.square(z), axis=-1), z

    def log_prob(self, x: tf.Tensor) -> tf.Tensor:
        """Return the log density at x [.., S, D], [.., S]."""
        return tf.reduce_logsumexp(self.joint(x)[0], axis=-1)

    def field(self, x: tf.Tensor) -> _Field:
        """Return what the mixture is like at x [.., S, D]."""
        inverse = self.inverse[..., tf.newaxis, :, :, :]  # [.., 1, K, D, D]
        joint, z = self.joint(x)
        share = tf.nn.softmax(joint)  # [.., S, K]
        pulls = tf.linalg.matvec(inverse, z, transpose_a=True)  # P_k^-1 (m_k - x)
        gradient = tf.reduce_sum(share[..., tf.newaxis] * pulls, axis=-2)
        precision = tf.einsum("...sk,...kij,...kil->...sjl", share, self.inverse, self.inverse)
        # A little more than the mean precision: the step is shorter, and rounding never makes it
        # indefinite.
        d = self.loc.shape[-1]
        more = 16.0 * d * np.finfo(x.dtype.as_numpy_dtype).eps
        diagonal = tf.linalg.diag_part(precision) * (1.0 + more)
        factor = tf.linalg.cholesky(tf.linalg.set_diag(precision, diagonal))
        around = tf.sqrt(share)[..., tf.newaxis] * (pulls - gradient[..., tf.newaxis, :])
        white = tf.linalg.triangular_solve(factor, tf.linalg.matrix_transpose(around))
        spread = tf.matmul(white, white, transpose_b=True)
        return _Field(tf.reduce_logsumexp(joint, axis=-1), gradient, factor, spread)


def _inverse(factor: tf.Tensor, spread: tf.Tensor, doublings: int) -> tf.Tensor:
    """Return C^-T (I + M + M^2 + ..) C^-1 to 2^doublings terms: minus the inverse Hessian.

    By repeated squaring, as no decomposition of an indefinite matrix is needed then.
    """
    eye = tf.broadcast_to(tf.eye(factor.shape[-1], dtype=factor.dtype), tf.shape(factor))
    series = tf.linalg.triangular_solve(factor, eye)
    for _ in range(doublings):
        series += spread @ series
        spread = spread @ spread
    return tf.linalg.triangular_solve(factor, series, adjoint=True)


def _climb(mixture: _Mixture) -> tf.Tensor:
    """Return where each component's mean leads, [.., K, D]."""
    loc = mixture.loc
    d = loc.shape[-1]
    dtype = loc.dtype
    epsilon = np.finfo(dtype.as_numpy_dtype).eps
    nudge = _NUDGE * np.cos(1.0 + np.arange(d))  # in no plane of symmetry
    start = loc + tf.linalg.matvec(mixture.scale_tril, tf.constant(nudge, dtype))

    def unfinished(i: tf.Tensor, x: tf.Tensor, done: tf.Tensor) -> tf.Tensor:
        return (i < _STEPS) & tf.reduce_any(~done)

    def length(factor: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
        return tf.norm(tf.linalg.matvec(factor, step, transpose_a=True), axis=-1)

    def improve(i: tf.Tensor, x: tf.Tensor, done: tf.Tensor) -> tuple[tf.Tensor, ...]:
        at = mixture.field(x)
        plain = tf.linalg.cholesky_solve(at.factor, at.gradient[..., tf.newaxis])[..., 0]
        curved = tf.linalg.matvec(_inverse(at.factor, at.spread, _DOUBLINGS), at.gradient)
        # Not beyond where the curvature may be trusted.
        trusted = length(at.factor, curved) <= tf.maximum(length(at.factor, plain), 1.0)
        curved = tf.where(trusted[..., tf.newaxis], curved, plain)
        better = mixture.log_prob(x + curved) >= mixture.log_prob(x + plain)
        step = tf.where(better[..., tf.newaxis], curved, plain)
        small = length(at.factor, step) < epsilon**0.75
        small |= tf.reduce_all(tf.abs(step) <= 2.0 * epsilon * tf.abs(x), axis=-1)
        return i + 1, tf.where(done[..., tf.newaxis], x, x + step), done | small

    done = tf.zeros_like(start[..., 0], tf.bool)
    return tf.while_loop(unfinished, improve, (tf.constant(0), start, done))[1]


def _distinct(x: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Return which of the points [.., S, D] are not near one before them, [.., S]."""
    apart = x[..., tf.newaxis, :] - x[..., tf.newaxis, :, :]  # [.., S, S, D]
    transposed = tf.linalg.matrix_transpose(factor)[..., tf.newaxis, :, :]
    distance = tf.norm(tf.linalg.matvec(transposed, apart), axis=-1)
    # Rounding of points that are far from zero in units of their scale.
    epsilon = np.finfo(x.dtype.as_numpy_dtype).eps
    rounding = tf.norm(tf.linalg.matvec(tf.abs(transposed[..., 0, :, :]), tf.abs(x)), axis=-1)
    near = distance < _SAME + 16.0 * epsilon * rounding[..., tf.newaxis]
    count = x.shape[-2]
    before = tf.linalg.band_part(tf.ones([count, count], tf.bool), -1, 0)
    before &= ~tf.eye(count, dtype=tf.bool)
    return ~tf.reduce_any(near & before, axis=-1)
