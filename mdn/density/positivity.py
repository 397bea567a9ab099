"""Unconstrained numbers to scales: a positive diagonal, and the triangle that stands on it.

`scale_tril` equals `tfb.FillScaleTriL` in parameter order and value. It is spelled out because
the bijector fails under XLA when the batch size is not static, and in float64.

Shape letters: D event size.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import tensorflow as tf
import tensorflow_probability as tfp

from mdn.errors import ConfigError


def _elu_inverse(scale: tf.Tensor) -> tf.Tensor:
    return tf.where(scale > 1.0, scale - 1.0, tf.math.log(tf.minimum(scale, 1.0)))


# name -> (unconstrained to positive, its inverse)
POSITIVITY: dict[str, tuple[Callable, Callable]] = {
    "softplus": (tf.math.softplus, tfp.math.softplus_inverse),
    "exp": (tf.math.exp, tf.math.log),
    "elu": (lambda raw: 1.0 + tf.nn.elu(raw), _elu_inverse),
}


def check_positivity(name: str) -> str:
    """Return `name` if it is known.

    Raises:
        ConfigError: it is not.
    """
    if name not in POSITIVITY:
        raise ConfigError(f"positivity={name!r} is unknown: choose one of {', '.join(POSITIVITY)}")
    return name


def scale_diag(raw: tf.Tensor, positivity: str, floor: tf.Tensor) -> tf.Tensor:
    """Return floor + positive(raw): [.., D] standard deviations.

    Args:
        raw: [.., D], unconstrained.
        positivity: "softplus", "exp" or "elu" (1 + ELU).
        floor: [D], the smallest scale, positive.
    """
    return floor + POSITIVITY[positivity][0](raw)


def scale_diag_inverse(scale: tf.Tensor, positivity: str, floor: tf.Tensor) -> tf.Tensor:
    """Return the raw [.., D] of which `scale_diag` makes `scale`, which is above the floor."""
    return POSITIVITY[positivity][1](scale - floor)


def scale_tril(raw: tf.Tensor, positivity: str, floor: tf.Tensor) -> tf.Tensor:
    """Return the [.., D, D] lower triangle filled from raw [.., D(D+1)/2], as FillScaleTriL does.

    Args:
        raw: [.., D(D+1)/2], unconstrained, in the order of `tfp.math.fill_triangular`.
        positivity: what makes the diagonal positive, see `scale_diag`.
        floor: [D], the smallest diagonal entry.
    """
    return fill_diagonal(raw, lambda diagonal: scale_diag(diagonal, positivity, floor))


def scale_tril_inverse(scale: tf.Tensor, positivity: str, floor: tf.Tensor) -> tf.Tensor:
    """Return the raw [.., D(D+1)/2] of which `scale_tril` makes `scale` [.., D, D]."""
    diagonal = scale_diag_inverse(tf.linalg.diag_part(scale), positivity, floor)
    return tfp.math.fill_triangular_inverse(tf.linalg.set_diag(scale, diagonal))


def precision_diag(
    raw: tf.Tensor, positivity: str, min_scale: float, floor: tf.Tensor
) -> tf.Tensor:
    """Return the diagonal of the Cholesky factor of a precision, [.., D], below 1 / floor.

    The entry for y_i is one over the standard deviation of y_i given the targets behind it, so
    that a floor of scales is a cap here. What is below half of the cap is min_scale +
    positive(raw) itself; from there on it bends, with a continuous slope, towards the cap.

    Args:
        raw: [.., D], unconstrained.
        positivity: "softplus", "exp" or "elu" (1 + ELU).
        min_scale: the smallest entry: scales are at most 1 / min_scale.
        floor: [D], of the scales.
    """
    entry = min_scale + POSITIVITY[positivity][0](raw)
    cap = 1.0 / floor
    # The maximum keeps the branch that is not taken, and its gradient, finite.
    bent = cap - 0.25 * tf.square(cap) / tf.maximum(entry, 0.5 * cap)
    return tf.where(entry < 0.5 * cap, entry, bent)


def precision_diag_inverse(
    diag: tf.Tensor, positivity: str, min_scale: float, floor: tf.Tensor
) -> tf.Tensor:
    """Return the raw [.., D] of which `precision_diag` makes `diag`, which is below the cap."""
    cap = 1.0 / floor
    bent = 0.25 * tf.square(cap) / (cap - tf.maximum(diag, 0.5 * cap))
    return POSITIVITY[positivity][1](tf.where(diag < 0.5 * cap, diag, bent) - min_scale)


def fill_diagonal(raw: tf.Tensor, transform: Callable[[tf.Tensor], tf.Tensor]) -> tf.Tensor:
    """Return the lower triangle of raw [.., D(D+1)/2], [.., D, D], with a transformed diagonal.

    In the order of `tfp.math.fill_triangular`. Masks stand in for TensorFlow's operations on
    triangles and diagonals: XLA cannot compile all of them for a dynamic batch, and no converter
    to another runtime knows them.
    """
    size = raw.shape[-1]
    d = (math.isqrt(8 * size + 1) - 1) // 2
    square = tf.concat([raw[..., d:], tf.reverse(raw, [-1])], axis=-1)  # [.., D^2]
    square = tf.reshape(square, tf.concat([tf.shape(raw)[:-1], [d, d]], axis=0))
    square.set_shape([*raw.shape[:-1], d, d])
    row, column = np.indices([d, d])
    zero = tf.zeros_like(square)
    diagonal = transform(tf.reduce_sum(tf.where(row == column, square, zero), axis=-1))
    below = tf.where(row > column, square, zero)
    return tf.where(row == column, tf.expand_dims(diagonal, -1), below)
