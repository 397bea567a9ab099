"""Gaussian log densities in which NaN marks a missing entry, marginalised exactly.

Shape letters: B batch, D event size.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import tensorflow as tf

LOG_2_PI = math.log(2.0 * math.pi)


def diag_log_prob(y: tf.Tensor, loc: tf.Tensor, scale_diag: tf.Tensor) -> tf.Tensor:
    """Return log N(y; loc, diag(scale_diag)^2) of the entries of y that are there.

    Args:
        y: [.., D], NaN marks a missing entry.
        loc: [.., D], broadcasts with y.
        scale_diag: [.., D], positive standard deviations.

    Returns:
        [..], nats. Zero where all D entries are missing.
    """
    missing = tf.math.is_nan(y)
    z = (tf.where(missing, loc, y) - loc) / scale_diag  # [.., D]
    terms = -0.5 * (tf.square(z) + LOG_2_PI) - tf.math.log(scale_diag)
    return tf.reduce_sum(tf.where(missing, tf.zeros_like(terms), terms), axis=-1)


def tril_log_prob(
    y: tf.Tensor, loc: tf.Tensor, scale_tril: tf.Tensor, complete: bool = False
) -> tf.Tensor:
    """Return log N(y; loc, scale_tril scale_tril^T) of the entries of y that are there.

    Only a batch that has a missing entry pays for the marginalisation.

    Args:
        y: [.., D], NaN marks a missing entry.
        loc: [.., D], broadcasts with y.
        scale_tril: [.., D, D], lower triangular with a positive diagonal.
        complete: no entry of y is missing, and the program need not be ready for any.

    Returns:
        [..], nats. Zero where all D entries are missing.
    """
    d = scale_tril.shape[-1]
    if d == 1:
        return diag_log_prob(y, loc, scale_tril[..., 0])
    missing = tf.math.is_nan(y)
    residual = tf.where(missing, tf.zeros_like(y), y - loc)  # [.., D]
    if complete and _is_shared(residual.shape, scale_tril.shape):
        return _shared_log_prob(residual, scale_tril)
    if _is_shared(residual.shape, scale_tril.shape):
        return tf.cond(
            tf.reduce_any(missing),
            lambda: _broadcast_log_prob(residual, missing, scale_tril),
            lambda: _shared_log_prob(residual, scale_tril),
        )
    return _broadcast_log_prob(residual, missing, scale_tril)


def _is_shared(residual: tf.TensorShape, scale_tril: tf.TensorShape) -> bool:
    """Whether residuals [*rows, *batch, D] lie under factors [*batch, D, D] with fewer axes."""
    if not (residual.is_fully_defined() and scale_tril.is_fully_defined()):
        return False
    rows = residual.rank - 1 - (scale_tril.rank - 2)
    return rows > 0 and residual[rows:-1] == scale_tril[:-2]


def _shared_log_prob(residual: tf.Tensor, scale_tril: tf.Tensor) -> tf.Tensor:
    """Return the log density of residuals [*rows, *batch, D] under factors [*batch, D, D].

    All rows are columns of one solve for each factor, which is not copied for each row.
    """
    shape, d = residual.shape[:-1], residual.shape[-1]
    batch = scale_tril.shape[:-2]
    columns = tf.reshape(residual, [-1, *batch, d])  # [n, *batch, D]
    axes = [*range(1, len(batch) + 2), 0]
    z = tf.linalg.triangular_solve(scale_tril, tf.transpose(columns, axes))  # [*batch, D, n]
    log_diag = tf.math.log(tf.linalg.diag_part(scale_tril))
    constant = tf.reduce_sum(log_diag, axis=-1) + 0.5 * d * LOG_2_PI  # [*batch]
    log_prob = -0.5 * tf.reduce_sum(tf.square(z), axis=-2) - constant[..., tf.newaxis]
    return tf.reshape(tf.transpose(log_prob, [len(batch), *range(len(batch))]), shape)


def _broadcast_log_prob(
    residual: tf.Tensor, missing: tf.Tensor, scale_tril: tf.Tensor
) -> tf.Tensor:
    d = scale_tril.shape[-1]
    if residual.shape[:-1] != scale_tril.shape[:-2] or not residual.shape.is_fully_defined():
        batch = tf.broadcast_dynamic_shape(tf.shape(residual)[:-1], tf.shape(scale_tril)[:-2])
        residual = tf.broadcast_to(residual, tf.concat([batch, [d]], 0))
        missing = tf.broadcast_to(missing, tf.concat([batch, [d]], 0))
        scale_tril = tf.broadcast_to(scale_tril, tf.concat([batch, [d, d]], 0))
    return _log_prob(residual, missing, scale_tril)


@tf.custom_gradient
def _log_prob(
    residual: tf.Tensor, missing: tf.Tensor, scale_tril: tf.Tensor
) -> tuple[tf.Tensor, Callable]:
    """Return the log density of residuals [.., D] under factors [.., D, D] of the same batch.

    The gradient is written out because it is cheaper so (one transposed solve), and because XLA
    cannot compile the derivative of `tf.cond` where the batch is not static.
    """
    some = tf.reduce_any(missing)
    value, z = tf.cond(
        some,
        lambda: (_marginal_log_prob(residual, missing, scale_tril), tf.zeros_like(residual)),
        lambda: _full_log_prob(residual, scale_tril),
    )

    def marginal_gradient(upstream: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch([residual, scale_tril])
            again = _marginal_log_prob(residual, missing, scale_tril)
        return tape.gradient(again, [residual, scale_tril], upstream)

    def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, None, tf.Tensor]:
        d_residual, d_scale_tril = tf.cond(
            some,
            lambda: marginal_gradient(upstream),
            lambda: _full_gradient(z, scale_tril, upstream),
        )
        return d_residual, None, d_scale_tril

    return value, gradient


def _full_log_prob(residual: tf.Tensor, scale_tril: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the log density, [..], and the whitened residual z = L^-1 r, [.., D]."""
    z = tf.linalg.triangular_solve(scale_tril, residual[..., tf.newaxis])[..., 0]
    log_diag = tf.math.log(tf.linalg.diag_part(scale_tril))
    return tf.reduce_sum(-0.5 * (tf.square(z) + LOG_2_PI) - log_diag, axis=-1), z


def _full_gradient(z: tf.Tensor, scale_tril: tf.Tensor, upstream: tf.Tensor) -> list[tf.Tensor]:
    """Return the gradients by r and L: -w, and tril(w z^T) - diag(1 / L_ii), with w = L^-T z."""
    w = tf.linalg.triangular_solve(scale_tril, z[..., tf.newaxis], adjoint=True)[..., 0]
    # Weighed first: beside the product of two lengths a weight of nothing comes too late.
    upstream = upstream[..., tf.newaxis]
    weighted = upstream * w
    by_scale = tf.linalg.band_part(weighted[..., tf.newaxis] * z[..., tf.newaxis, :], -1, 0)
    by_scale -= tf.linalg.diag(upstream / tf.linalg.diag_part(scale_tril))
    return [-weighted, by_scale]


def _marginal_log_prob(
    residual: tf.Tensor, missing: tf.Tensor, scale_tril: tf.Tensor
) -> tf.Tensor:
    """Return the log density of the observed entries, without a loop over patterns.

    The observed rows of the factor are made orthogonal one after the other (modified
    Gram-Schmidt); their lengths are then the diagonal of the factor of the observed block, and the
    residuals are whitened on the way. The covariance itself, whose condition number is the square
    of the factor's, is never formed. A missing row has length one, and no part in the rest.
    """
    z, length = whiten_observed(residual, missing, scale_tril)
    terms = -0.5 * (tf.square(z) + LOG_2_PI) - tf.math.log(length)
    return tf.reduce_sum(tf.where(missing, tf.zeros_like(terms), terms), axis=-1)


def whiten_observed(
    residual: tf.Tensor, missing: tf.Tensor, scale_tril: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Return each residual given the observed ones before it: z in units of its length.

    Args:
        residual: [.., D], zero where missing.
        missing: [.., D], bool.
        scale_tril: [.., D, D], of the same batch.

    Returns:
        z and length, [.., D] each. A missing entry has length one.
    """
    missing = tf.stop_gradient(missing)
    rows = tf.where(missing[..., tf.newaxis], tf.zeros_like(scale_tril), scale_tril)
    rows = tf.linalg.band_part(rows, -1, 0)  # [.., D, D]
    found, lengths = [], []
    for i in range(scale_tril.shape[-1]):
        absent = missing[..., i]  # [..]
        one = tf.ones_like(rows[..., 0, 0])
        length = tf.sqrt(tf.where(absent, one, tf.reduce_sum(tf.square(rows[..., 0, :]), axis=-1)))
        direction = rows[..., 0, :] / length[..., tf.newaxis]  # [.., D]
        z = residual[..., 0] / length
        found.append(z)
        lengths.append(length)
        share = tf.linalg.matvec(rows[..., 1:, :], direction)  # [.., D - i - 1]
        rows = rows[..., 1:, :] - share[..., tf.newaxis] * direction[..., tf.newaxis, :]
        residual = residual[..., 1:] - share * z[..., tf.newaxis]
    return tf.stack(found, axis=-1), tf.stack(lengths, axis=-1)
