"""Gaussian log densities in which NaN marks a missing entry, marginalised exactly.

Shape letters: B batch, D event size.
"""

from __future__ import annotations

import math

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


def tril_log_prob(y: tf.Tensor, loc: tf.Tensor, scale_tril: tf.Tensor) -> tf.Tensor:
    """Return log N(y; loc, scale_tril scale_tril^T) of the entries of y that are there.

    Only a batch that has a missing entry pays for the marginalisation.

    Args:
        y: [.., D], NaN marks a missing entry.
        loc: [.., D], broadcasts with y.
        scale_tril: [.., D, D], lower triangular with a positive diagonal.

    Returns:
        [..], nats. Zero where all D entries are missing.
    """
    missing = tf.math.is_nan(y)
    residual = tf.where(missing, tf.zeros_like(y), y - loc)  # [.., D]
    scale_tril = tf.linalg.band_part(scale_tril, -1, 0)
    if scale_tril.shape[-1] == 1:
        return diag_log_prob(y, loc, scale_tril[..., 0])
    return tf.cond(
        tf.reduce_any(missing),
        lambda: _marginal_log_prob(residual, missing, scale_tril),
        lambda: _full_log_prob(residual, scale_tril),
    )


def _full_log_prob(residual: tf.Tensor, scale_tril: tf.Tensor) -> tf.Tensor:
    # The batch shapes are made equal first: the gradient of a broadcasting solve is slow.
    batch = tf.broadcast_dynamic_shape(tf.shape(residual)[:-1], tf.shape(scale_tril)[:-2])
    d = scale_tril.shape[-1]
    residual = tf.broadcast_to(residual, tf.concat([batch, [d]], 0))
    scale_tril = tf.broadcast_to(scale_tril, tf.concat([batch, [d, d]], 0))
    z = tf.linalg.triangular_solve(scale_tril, residual[..., tf.newaxis])[..., 0]  # [.., D]
    log_diag = tf.math.log(tf.linalg.diag_part(scale_tril))
    return tf.reduce_sum(-0.5 * (tf.square(z) + LOG_2_PI) - log_diag, axis=-1)


def _marginal_log_prob(
    residual: tf.Tensor, missing: tf.Tensor, scale_tril: tf.Tensor
) -> tf.Tensor:
    """Return the log density of the observed entries, without a loop over patterns.

    A missing entry becomes an independent standard normal observed at zero: its row of the
    factor is cleared and a one added to its variance. Then the quadratic form and the
    determinant are those of the observed block, and only the constant counts the observed.
    Rows are scaled to unit variance before the Cholesky decomposition, so that targets of very
    different scales do not cost precision.
    """
    observed = tf.cast(tf.logical_not(missing), residual.dtype)  # [.., D]
    stddev = tf.sqrt(tf.reduce_sum(tf.square(scale_tril), axis=-1))  # [.., D]
    rows = observed[..., tf.newaxis] * scale_tril / stddev[..., tf.newaxis]  # [.., D, D]
    correlation = tf.linalg.matmul(rows, rows, transpose_b=True)
    correlation = tf.linalg.set_diag(correlation, tf.ones_like(correlation[..., 0]))
    whitened = observed * residual / stddev
    factor = tf.linalg.cholesky(correlation)
    return (
        _full_log_prob(whitened, factor)
        + 0.5 * LOG_2_PI * tf.reduce_sum(1.0 - observed, axis=-1)
        - tf.reduce_sum(observed * tf.math.log(stddev), axis=-1)
    )
