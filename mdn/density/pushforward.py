"""Moments and scores of y = forward(u): u of a Gaussian mixture, an increasing map of each target.

Shape letters: D event size, K components, N terms of a series, S nodes of a rule, P panels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import tensorflow as tf
from tensorflow_probability import bijectors as tfb

from mdn.density.parameters import MixtureParameters
from mdn.density.univariate import Margins, ndtr

_NODES = 64  # of the Gauss-Hermite rule, exact for polynomials of degree 127


# ---------------------------------------------------------------------- moments


def component_moments(
    parameters: MixtureParameters, bijector: tfb.Bijector, pairs: bool
) -> tuple[tf.Tensor, tf.Tensor]:
    """Return each component's means of y, and its variances or covariances.

    Of `tfb.Exp` in closed form. Else by the Hermite expansion of each target's map, whose
    coefficients come from 64 Gauss-Hermite nodes: with a_in those of target i, the covariance of
    two is the sum over n > 0 of a_in a_jn correlation^n.

    Args:
        parameters: batch [..].
        bijector: increasing, elementwise on [.., D].
        pairs: whether covariances are wanted.

    Returns:
        [.., K, D]; and [.., K, D], or [.., K, D, D] of pairs.

    Source:
        Mehler (1866), Ueber die Entwicklung einer Function von beliebig vielen Variablen nach
        Laplaceschen Functionen hoeherer Ordnung, Crelle 66.
    """
    _, loc, scale_tril = parameters
    scale = tf.norm(scale_tril, axis=-1)  # [.., K, D]
    rows = scale_tril / scale[..., tf.newaxis]
    correlation = tf.matmul(rows, rows, transpose_b=True)
    if isinstance(bijector, tfb.Exp):
        mean = tf.exp(loc + 0.5 * tf.square(scale))
        if not pairs:
            return mean, tf.square(mean) * tf.math.expm1(tf.square(scale))
        covariance = correlation * scale[..., tf.newaxis] * scale[..., tf.newaxis, :]
        return mean, mean[..., tf.newaxis] * mean[..., tf.newaxis, :] * tf.math.expm1(covariance)
    nodes, basis = _hermite(loc.dtype.as_numpy_dtype)
    nodes = nodes[:, np.newaxis, np.newaxis]  # [S, 1, 1]
    values = bijector.forward(
        loc[..., tf.newaxis, :, :] + nodes * scale[..., tf.newaxis, :, :]
    )  # [.., S, K, D]
    middle = bijector.forward(loc)  # taken out, as small spreads would lose their digits
    values -= middle[..., tf.newaxis, :, :]
    coefficients = tf.unstack(tf.einsum("sn,...skd->n...kd", basis, values))
    mean = middle + coefficients[0]
    if not pairs:
        return mean, tf.add_n([tf.square(one) for one in coefficients[1:]])
    covariance = tf.zeros_like(correlation)
    for one in coefficients[:0:-1]:  # Horner's scheme
        covariance += one[..., tf.newaxis] * one[..., tf.newaxis, :]
        covariance *= correlation
    return mean, covariance


@functools.lru_cache(maxsize=2)
def _hermite(dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """Return nodes [S] of a normal, and [S, N]: the weights times the normalised polynomials."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(_NODES)
    weights /= weights.sum()
    basis = [np.ones(_NODES), nodes]
    for n in range(1, _NODES - 1):
        basis.append((nodes * basis[n] - np.sqrt(n) * basis[n - 1]) / np.sqrt(n + 1))
    # Nodes that no number of the dtype can weigh are left out: maps may be infinite there.
    kept = weights > np.finfo(dtype).tiny
    products = weights[:, np.newaxis] * np.stack(basis, axis=-1)
    return nodes[kept].astype(dtype), products[kept].astype(dtype)


def mixture_moments(
    parameters: MixtureParameters, bijector: tfb.Bijector, pairs: bool
) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the mean of y, [.., D], and its variance [.., D] or covariance [.., D, D]."""
    mean, spread = component_moments(parameters, bijector, pairs)
    weight = tf.nn.softmax(parameters.logits)
    whole = tf.einsum("...k,...kd->...d", weight, mean)
    away = mean - whole[..., tf.newaxis, :]
    if not pairs:
        return whole, tf.einsum("...k,...kd->...d", weight, spread + tf.square(away))
    spread += away[..., tf.newaxis] * away[..., tf.newaxis, :]
    return whole, tf.einsum("...k,...kij->...ij", weight, spread)


def standard_moment(
    parameters: MixtureParameters, bijector: tfb.Bijector, power: int
) -> tf.Tensor:
    """Return E[((y_d - mean_d) / stddev_d)^power], [.., D], by 64 Gauss-Hermite nodes."""
    mean, variance = (
        one[..., tf.newaxis, tf.newaxis, :]
        for one in mixture_moments(parameters, bijector, pairs=False)
    )

    def values(u: tf.Tensor) -> tf.Tensor:
        return ((bijector.forward(u) - mean) / tf.sqrt(variance)) ** power

    return expectation(parameters, values)


def log_slope(bijector: tfb.Bijector, u: tf.Tensor) -> tf.Tensor:
    """Return log dy/du of each target, [.., D]."""
    return bijector.forward_log_det_jacobian(u, event_ndims=0) + tf.zeros_like(u)


def expectation(
    parameters: MixtureParameters, function: Callable[[tf.Tensor], tf.Tensor]
) -> tf.Tensor:
    """Return E[function(u_d)] of each d, [.., D], by 64 Gauss-Hermite nodes of each component.

    Args:
        parameters: batch [..].
        function: elementwise, of u [.., S, K, D].
    """
    logits, loc, scale_tril = parameters
    nodes, basis = _hermite(loc.dtype.as_numpy_dtype)
    scale = tf.norm(scale_tril, axis=-1)
    nodes = nodes[:, np.newaxis, np.newaxis]
    values = function(loc[..., tf.newaxis, :, :] + nodes * scale[..., tf.newaxis, :, :])
    means = tf.einsum("s,...skd->...kd", basis[:, 0], values)
    weight = tf.nn.softmax(logits)[..., tf.newaxis]
    # Components without weight may be anywhere.
    return tf.reduce_sum(tf.math.multiply_no_nan(means, weight), axis=-2)


# ---------------------------------------------------------------------- CRPS


def crps(margins: Margins, bijector: tfb.Bijector, y: tf.Tensor, u: tf.Tensor) -> tf.Tensor:
    """Return the continuous ranked probability score of y in its units, by quadrature.

    It is the integral of (F(t) - 1{t >= y})^2 over t. In u the panels between y and points around
    all components have 8 Gauss-Legendre nodes each. What is constant over a panel is integrated
    as it is, so that panels where no component is may be as long as they like.

    Args:
        margins: of u, batch [..].
        bijector: increasing, elementwise on [.., D].
        y: [.., D].
        u: [.., D], y transformed; infinite where y is outside of the domain.

    Returns:
        [.., D], in the units of y; to about 1e-9 of the spread of y in float64.

    Source:
        Matheson and Winkler (1976), Scoring rules for continuous probability distributions,
        Management Science 22.
    """
    dtype = margins.loc.dtype
    margins = margins._replace(loc=margins.loc + tf.zeros_like(y)[..., tf.newaxis])
    points = tf.stop_gradient(_around(margins))  # [P, .., D]
    low, high = tf.reduce_min(points, axis=0), tf.reduce_max(points, axis=0)
    at = tf.clip_by_value(tf.stop_gradient(u) + tf.zeros_like(low), low, high)
    points = tf.sort(tf.concat([points, at[tf.newaxis]], axis=0), axis=0)
    values = bijector.forward(points)
    left, right = points[:-1], points[1:]
    half, centre = 0.5 * (right - left), 0.5 * (left + right)
    sign = tf.where(centre < at, tf.ones_like(centre), -tf.ones_like(centre))

    def height(u: tf.Tensor) -> tf.Tensor:
        """Return F^2 to the left of y, and (1 - F)^2 to the right: [P, .., D]."""
        z = (u[..., tf.newaxis] - margins.loc) / margins.scale
        tails = ndtr(sign[..., tf.newaxis] * z)
        return tf.square(tf.reduce_sum(tf.exp(margins.log_weight) * tails, axis=-1))

    middle = height(centre)
    area = middle * (values[1:] - values[:-1])
    for node, weight in zip(*np.polynomial.legendre.leggauss(8), strict=True):
        place = centre + tf.constant(node, dtype) * half
        slope = tf.exp(log_slope(bijector, place))
        area += tf.constant(weight, dtype) * half * slope * (height(place) - middle)
    fixed = tf.stop_gradient(y)
    outside = tf.nn.relu(values[0] - fixed) + tf.nn.relu(fixed - values[-1])
    cumulative = tf.reduce_sum(
        tf.exp(margins.log_weight) * ndtr((at[..., tf.newaxis] - margins.loc) / margins.scale),
        axis=-1,
    )
    moved = (2.0 * tf.stop_gradient(cumulative) - 1.0) * (y - fixed)  # zero, but for its gradient
    return tf.reduce_sum(area, axis=0) + outside + moved


def _around(margins: Margins) -> tf.Tensor:
    """Return points around all components that have a weight, [P, .., D]."""
    offsets = [0.0, 1.0, 2.0, 3.2, 5.0] + ([8.3] if margins.loc.dtype == tf.float64 else [])
    # Beyond, a part of less than the dtype's rounding is left.
    lightest = np.log(np.finfo(margins.loc.dtype.as_numpy_dtype).eps) - 10.0
    present = margins.log_weight + tf.zeros_like(margins.loc) > lightest
    points = [
        margins.loc + sign * offset * margins.scale for offset in offsets for sign in (1, -1)
    ]
    lowest = tf.reduce_min(
        tf.where(present, points[-1], tf.constant(np.inf, margins.loc.dtype)), -1, keepdims=True
    )
    columns = [tf.where(present, one, lowest) for one in points[1:]]
    return tf.concat(_leading(columns), axis=0)


def _leading(columns: list[tf.Tensor]) -> list[tf.Tensor]:
    """Return tensors [.., D, K] as [K, .., D]."""
    rank = columns[0].shape.rank
    return [tf.transpose(one, [rank - 1, *range(rank - 1)]) for one in columns]
