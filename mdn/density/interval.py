"""Probabilities of intervals under normals, in logs, exact to rounding in both tails.

Shape letters: D event size, K components.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from mdn.density.gaussian import LOG_2_PI
from mdn.density.mixture import DiagGaussianMixture
from mdn.density.normal import MultivariateNormalDiag
from mdn.density.queries import Queries
from mdn.density.univariate import log_ndtr
from mdn.errors import ConfigError

# Intervals over which a density changes by less than a factor of e or so: for these, 8 nodes are
# exact to float64's rounding.
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(8)

_FARTHEST = 1e18  # standard deviations: the square is a float32


def log_interval(middle: tf.Tensor, width: tf.Tensor) -> tf.Tensor:
    """Return log(Phi(middle + width / 2) - Phi(middle - width / 2)) of the standard normal.

    The difference of two logs of Phi loses its digits where the interval is narrow; there the
    density is integrated by Gauss-Legendre's rule, in logs. Elsewhere the logs are those of the
    nearer tail, where they keep their digits.

    Args:
        middle: [..].
        width: [..], positive, of the same shape.

    Returns:
        [..], nats.
    """
    one = tf.ones_like(middle)
    distance = tf.abs(middle)
    narrow = width * tf.maximum(distance, one) < one
    # Each branch is computed of harmless numbers where the other is taken, for its gradient.
    half = 0.5 * tf.where(narrow, width, one)
    centre = tf.where(narrow, middle, tf.zeros_like(middle))
    terms = [
        np.log(weight) - 0.5 * tf.square(centre + node * half)
        for node, weight in zip(_NODES, _WEIGHTS, strict=True)
    ]
    integral = tf.reduce_logsumexp(tf.stack(terms), axis=0) + tf.math.log(half) - 0.5 * LOG_2_PI
    distance = tf.clip_by_value(tf.where(narrow, one, distance), 0.0, _FARTHEST)
    width = tf.clip_by_value(tf.where(narrow, one, width), 0.0, _FARTHEST)
    near, far = 0.5 * width - distance, -0.5 * width - distance  # Phi(near) - Phi(far)
    log_near, log_far = log_ndtr(near), log_ndtr(far)
    # log Phi falls at least as fast as -x^2 / 2, also where rounding says that it does not; and
    # beyond 80 there is no digit left of the further tail.
    gap = tf.maximum(log_near - log_far, distance * width)
    gap = tf.minimum(gap, 80.0 * one)
    return tf.where(narrow, integral, log_near + tf.math.log(-tf.math.expm1(-gap)))


def log_cell(density: Queries, y: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
    """Return log P(y - step / 2 < Y < y + step / 2), the box around each row of y.

    Args:
        density: a normal or a mixture, batch [..], with one target or diagonal covariances.
        y: [.., D], NaN marks a missing entry, whose side of the box is the whole line.
        step: [D], positive.

    Returns:
        [..], nats.

    Raises:
        ConfigError: the density has several targets and full covariances, under which a box has
            no closed form.
    """
    if y.shape[-1] != 1 and not isinstance(density, MultivariateNormalDiag | DiagGaussianMixture):
        raise ConfigError(
            f"the probability of a box of {y.shape[-1]} targets has no closed form under full "
            "covariances: use model=mixture_diag or model=diag, or one target"
        )
    logits, loc, scale_tril = density.mixture_parameters()
    scale = tf.linalg.diag_part(scale_tril)  # [.., K, D]
    missing = tf.math.is_nan(y)[..., tf.newaxis, :]
    z = (tf.where(missing, loc, y[..., tf.newaxis, :]) - loc) / scale
    log_sides = log_interval(z, step / scale + tf.zeros_like(z))
    log_box = tf.reduce_sum(tf.where(missing, tf.zeros_like(z), log_sides), axis=-1)  # [.., K]
    return tf.reduce_logsumexp(tf.nn.log_softmax(logits) + log_box, axis=-1)


def log_cell_density(
    density: Queries, y: tf.Tensor, step: tf.Tensor, points: int = 16
) -> tf.Tensor:
    """Return the log of the mean density over the box around each row of y.

    Exact where `log_cell` is. Under full covariances of several targets it is the mean over the
    points of a lattice, the same for each row.

    Args:
        density: a normal or a mixture, batch [..].
        y: [.., D], NaN marks a missing entry, which is marginalised.
        step: the sides of the boxes, [D] or what broadcasts to y; zero: the density at y itself.
        points: of the lattice.

    Returns:
        [..], nats.
    """
    d = y.shape[-1]
    if d != 1 and not isinstance(density, MultivariateNormalDiag | DiagGaussianMixture):
        logs = [density.log_prob(y + step * offset) for offset in lattice(points, d)]
        return tf.reduce_logsumexp(tf.stack(logs), axis=0) - np.log(points)
    logits, loc, scale_tril = density.mixture_parameters()
    scale = tf.linalg.diag_part(scale_tril)  # [.., K, D]
    missing = tf.math.is_nan(y)[..., tf.newaxis, :]
    z = (tf.where(missing, loc, y[..., tf.newaxis, :]) - loc) / scale
    width = step[..., tf.newaxis, :] + tf.zeros_like(z)
    tied = width > 0.0
    width = tf.where(tied, width, tf.ones_like(width))
    point = -0.5 * tf.square(z) - 0.5 * LOG_2_PI - tf.math.log(scale)
    sides = tf.where(tied, log_interval(z, width / scale) - tf.math.log(width), point)
    log_box = tf.reduce_sum(tf.where(missing, tf.zeros_like(z), sides), axis=-1)  # [.., K]
    return tf.reduce_logsumexp(tf.nn.log_softmax(logits) + log_box, axis=-1)


def lattice(points: int, dimensions: int) -> np.ndarray:
    """Return points that fill the box [-1/2, 1/2]^D evenly, [J, D].

    Source:
        Roberts (2018), The unreasonable effectiveness of quasirandom sequences: a Kronecker
        sequence by powers of the root of x^(D + 1) = x + 1.
    """
    root = 2.0
    for _ in range(64):
        root = (1.0 + root) ** (1.0 / (dimensions + 1))
    steps = root ** -np.arange(1.0, dimensions + 1)
    return (0.5 + np.arange(1.0, points + 1)[:, np.newaxis] * steps) % 1.0 - 0.5
