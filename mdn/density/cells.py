"""Probabilities of boxes under a density, in logs: of the cells of a grid that targets stand on.

Shape letters: D event size, K components.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from tensorflow_probability import bijectors as tfb

from mdn.density.gaussian import LOG_2_PI
from mdn.density.interval import FARTHEST, log_interval
from mdn.density.parameters import MixtureParameters
from mdn.density.queries import Queries
from mdn.density.rectangle import log_rectangle
from mdn.density.transformed import split_transform
from mdn.errors import ConfigError


class Cell(NamedTuple):
    """Boxes from low - margin to high + margin, in the units of a Gaussian mixture.

    In three parts, as a sum of a large and a small number would lose digits of the small one.

    Attributes:
        low: [.., D], -inf where the box has no end.
        high: [.., D], inf where it has none.
        width: [.., D], from end to end.
        margin: [.., D].
    """

    low: tf.Tensor
    high: tf.Tensor
    width: tf.Tensor
    margin: tf.Tensor


def log_cell(density: Queries, y: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
    """Return log P(y - step / 2 < Y < y + step / 2), the box around each row of y.

    Of one target and of diagonal covariances in closed form; of two targets with full covariances
    by quadrature, see `mdn.density.rectangle.log_rectangle`. A box that reaches out of the domain
    of transformed targets ends at its border.

    Args:
        density: batch [..]; with more than two targets of diagonal covariances.
        y: [.., D], NaN marks a missing entry, whose side of the box is the whole line.
        step: [D], positive.

    Returns:
        [..], nats.

    Raises:
        ConfigError: the density has more than two targets and full covariances. The box is then
            an integral over D - 1 dimensions, for which there is no rule of a known accuracy
            that a step of training could afford.
    """
    density, bijector = split_transform(density)
    d = y.shape[-1]
    if d > 2 and not density.diagonal:
        raise ConfigError(
            f"the probability of a box of {d} targets has no closed form under full covariances: "
            "use model=mixture_diag or model=diag, or at most two targets"
        )
    infinity = tf.constant(math.inf, y.dtype)
    missing = tf.math.is_nan(y)
    if bijector is None:
        middle = tf.where(missing, tf.zeros_like(y), y)
        width = step + tf.zeros_like(y)
        cell = Cell(middle, middle, width, 0.5 * width)
    else:
        middle = tf.where(missing, bijector.forward(tf.zeros_like(y)), y)
        cell = _transform(bijector, middle, step)
    whole = Cell(-infinity, infinity, infinity, 0.0 * step)
    cell = Cell(*(tf.where(missing, w, one) for w, one in zip(whole, cell, strict=True)))
    logits, log_box = _log_boxes(density.mixture_parameters(), cell, density.diagonal or d == 1)
    return tf.reduce_logsumexp(tf.nn.log_softmax(logits) + log_box, axis=-1)


def _log_boxes(
    parameters: MixtureParameters, cell: Cell, diagonal: bool
) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the logits, and the log probabilities [.., K] of a box under each component."""
    logits, loc, scale_tril = parameters
    cell = Cell(*(one[..., tf.newaxis, :] for one in cell))  # [.., 1, D]
    scale = tf.linalg.diag_part(scale_tril)  # [.., K, D]
    margin = cell.margin / scale
    low = _standardise(cell.low, loc, scale) - margin
    high = _standardise(cell.high, loc, scale) + margin
    width = tf.where(tf.math.is_inf(cell.width), tf.ones_like(scale), cell.width) / scale
    width = tf.where(tf.math.is_inf(cell.width), tf.constant(FARTHEST, loc.dtype), width)
    if diagonal:
        return logits, tf.reduce_sum(log_interval(low, high, width), axis=-1)
    slope = scale_tril[..., 1, 0] / scale[..., 1]
    return logits, log_rectangle(low, high, width, slope)


def _standardise(end: tf.Tensor, loc: tf.Tensor, scale: tf.Tensor) -> tf.Tensor:
    infinite = tf.math.is_inf(end)
    z = (tf.where(infinite, loc, end) - loc) / scale
    return tf.where(infinite, tf.sign(end) * tf.constant(FARTHEST, end.dtype), z)


def _transform(bijector: tfb.Bijector, y: tf.Tensor, step: tf.Tensor) -> Cell:
    """Return the box around y, [.., D], in transformed units.

    The difference of two ends has few digits where the box is small beside them; so where the
    slope of the transform changes little its integral is the width.
    """
    inner = bijector.forward(tf.zeros_like(y))  # in the domain
    ends, inside = [], []
    for end in (y - 0.5 * step, y + 0.5 * step):
        there = tf.math.is_finite(bijector.inverse(end))
        u = bijector.inverse(tf.where(there, end, inner))
        beyond = tf.where(end < inner, -tf.ones_like(y), tf.ones_like(y)) * math.inf
        ends.append(tf.where(there, u, beyond))
        inside.append(there)
    low, high = ends
    whole = inside[0] & inside[1]
    middle, half = tf.where(whole, y, inner), tf.where(whole, 0.5 * step, tf.zeros_like(y))

    def log_slope(node: float) -> tf.Tensor:
        slope = bijector.inverse_log_det_jacobian(middle + node * half, event_ndims=0)
        return slope + tf.zeros_like(y)

    even = whole & (tf.abs(log_slope(1.0) - log_slope(-1.0)) < 1.0)
    width = tf.zeros_like(y)
    for node, weight in zip(*np.polynomial.legendre.leggauss(8), strict=True):
        width += weight * half * tf.exp(tf.where(even, log_slope(node), tf.zeros_like(y)))
    finite = tf.where(whole, high, tf.ones_like(y)) - tf.where(whole, low, tf.zeros_like(y))
    width = tf.where(even, width, tf.where(whole, finite, math.inf * tf.ones_like(y)))
    return Cell(low, high, width, tf.zeros_like(y))


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
    if d != 1 and not density.diagonal:
        logs = [density.log_prob(y + step * offset) for offset in lattice(points, d)]
        return tf.reduce_logsumexp(tf.stack(logs), axis=0) - np.log(points)
    logits, loc, scale_tril = density.mixture_parameters()
    scale = tf.linalg.diag_part(scale_tril)  # [.., K, D]
    missing = tf.math.is_nan(y)[..., tf.newaxis, :]
    z = (tf.where(missing, loc, y[..., tf.newaxis, :]) - loc) / scale
    width = (step + tf.zeros_like(y))[..., tf.newaxis, :] + tf.zeros_like(z)
    tied = width > 0.0
    width = tf.where(tied, width, tf.ones_like(width))
    point = -0.5 * tf.square(z) - 0.5 * LOG_2_PI - tf.math.log(scale)
    half = 0.5 * width / scale
    sides = log_interval(z - half, z + half, 2.0 * half) - tf.math.log(width)
    sides = tf.where(tied, sides, point)
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
