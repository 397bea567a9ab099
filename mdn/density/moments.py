"""Moments of the margins of a Gaussian mixture, beyond those that TFP has.

Shape letters: D event size, K components.
"""

from __future__ import annotations

import tensorflow as tf

from mdn.density.univariate import Margins


def correlation(covariance: tf.Tensor) -> tf.Tensor:
    """Return the correlations, [.., D, D], of covariances [.., D, D]; ones on the diagonal."""
    stddev = tf.sqrt(tf.linalg.diag_part(covariance))
    # One after the other, as the product of two may leave the dtype's range.
    found = covariance / stddev[..., tf.newaxis] / stddev[..., tf.newaxis, :]
    eye = tf.eye(covariance.shape[-1], dtype=tf.bool)
    return tf.where(eye, tf.ones_like(found), tf.clip_by_value(found, -1.0, 1.0))


def skewness(margins: Margins) -> tf.Tensor:
    """Return E[(y_d - mean)^3] / stddev^3, [.., D]."""
    weight, away, spread = _standardise(margins)
    third = away * (tf.square(away) + 3.0 * tf.square(spread))
    return tf.reduce_sum(weight * third, axis=-1)


def kurtosis(margins: Margins) -> tf.Tensor:
    """Return E[(y_d - mean)^4] / stddev^4 - 3, [.., D]: zero of a normal."""
    weight, away, spread = _standardise(margins)
    a, s = tf.square(away), tf.square(spread)
    return tf.reduce_sum(weight * (tf.square(a) + 6.0 * a * s + 3.0 * tf.square(s)), axis=-1) - 3.0


def _standardise(margins: Margins) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Return weights, and means and scales in units of the margin's own, [.., D, K] each."""
    weight = tf.exp(margins.log_weight)
    away = margins.loc - tf.reduce_sum(weight * margins.loc, axis=-1, keepdims=True)
    # In units of the largest, whose square is then no overflow.
    unit = tf.stop_gradient(
        tf.reduce_max(tf.where(weight > 0.0, tf.abs(away) + margins.scale, 0.0), -1, keepdims=True)
    )
    # Components without weight may be anywhere.
    present = weight > 0.0
    away = tf.where(present, away / unit, 0.0)
    spread = tf.where(present, margins.scale / unit, 0.0)
    variance = tf.reduce_sum(weight * (tf.square(away) + tf.square(spread)), -1, keepdims=True)
    stddev = tf.sqrt(variance)
    return weight, away / stddev, spread / stddev
