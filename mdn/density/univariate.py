"""Margins of Gaussian mixtures: distribution functions, quantiles, and the CRPS.

The margin of one target is a mixture of K normals on a line. All functions keep their digits in
both tails: what is small is computed as it is, and not as one minus what is not.

Shape letters: D event size, K components.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from mdn.density.gaussian import LOG_2_PI
from mdn.density.parameters import MixtureParameters

# Of the search, at most. Newton's steps are few; halving alone takes 93 from a bracket of 1e12
# down to the rounding of 1e-6 in float64.
_STEPS = 200


class Margins(NamedTuple):
    """D mixtures of K normals on a line.

    Attributes:
        log_weight: [.., 1, K], normalised.
        loc: [.., D, K].
        scale: [.., D, K], standard deviations.
    """

    log_weight: tf.Tensor
    loc: tf.Tensor
    scale: tf.Tensor

    @classmethod
    def of(cls, parameters: MixtureParameters) -> Margins:
        """Return the margins of a mixture with batch [..]."""
        return cls.of_rows(*parameters)

    @classmethod
    def of_rows(cls, logits: tf.Tensor, loc: tf.Tensor, rows: tf.Tensor) -> Margins:
        """Return the margins where the length of a row of [.., K, D, R] is the scale."""
        # The largest entry is taken out, as squares of large ones are infinite.
        largest = tf.reduce_max(tf.abs(rows), axis=-1, keepdims=True)
        scale = largest[..., 0] * tf.norm(rows / largest, axis=-1)
        return cls(
            tf.nn.log_softmax(logits)[..., tf.newaxis, :],
            tf.linalg.matrix_transpose(loc),
            tf.linalg.matrix_transpose(scale),
        )


def log_cdf(margins: Margins, y: tf.Tensor) -> tf.Tensor:
    """Return log P(Y_d <= y_d), [.., D], of y [.., D]; NaN where y is."""
    return _log_tail(margins, _standard(margins, y))


def log_survival(margins: Margins, y: tf.Tensor) -> tf.Tensor:
    """Return log P(Y_d > y_d), [.., D], of y [.., D]; NaN where y is."""
    return _log_tail(margins, -_standard(margins, y))


def log_density(margins: Margins, y: tf.Tensor) -> tf.Tensor:
    """Return the log densities of the margins, [.., D], of y [.., D]."""
    z = _standard(margins, y)
    return _log_mix(margins, -0.5 * (tf.square(z) + LOG_2_PI) - tf.math.log(margins.scale))


def cdf(margins: Margins, y: tf.Tensor) -> tf.Tensor:
    """Return P(Y_d <= y_d), [.., D], of y [.., D]; NaN where y is."""
    return _probability(margins, _standard(margins, y))


def survival(margins: Margins, y: tf.Tensor) -> tf.Tensor:
    """Return P(Y_d > y_d), [.., D], of y [.., D]; NaN where y is."""
    return _probability(margins, -_standard(margins, y))


def quantile(margins: Margins, probability: tf.Tensor) -> tf.Tensor:
    """Return the y with P(Y_d <= y_d) = probability.

    The quantile of a mixture lies between the smallest and the largest of its components'. From
    there Newton's steps on the log of the nearer tail are taken, and the bracket is halved
    wherever they leave it or do not halve it: the search ends at the rounding of the dtype also
    where components are far apart. The gradient is that of the implicit function: it does not go
    through the search.

    Args:
        margins: of a mixture with batch [..].
        probability: [*S], in [0, 1].

    Returns:
        [*S, .., D]; infinite for 0 and 1, NaN outside of [0, 1].
    """
    dtype = margins.loc.dtype
    given = tf.convert_to_tensor(probability, dtype)
    shape = tf.concat([tf.shape(given), tf.ones([tf.rank(margins.loc) - 1], tf.int32)], axis=0)
    p = tf.reshape(given, shape)
    inside = (p > 0.0) & (p < 1.0)
    safe = tf.where(inside, p, tf.constant(0.5, dtype))
    frozen = Margins(*(tf.stop_gradient(part) for part in margins))
    y = tf.stop_gradient(search(frozen, tf.stop_gradient(safe)))
    # y as a function of p and of the parameters: one step of Newton's, whose value is zero.
    sign = tf.where(safe <= 0.5, tf.ones_like(safe), -tf.ones_like(safe))  # of the nearer tail
    tail = _log_tail(margins, sign[..., tf.newaxis] * _standard(margins, y))
    target = tf.where(safe <= 0.5, tf.math.log(safe), tf.math.log1p(-safe))
    # Where nothing is between components far apart, the slope has no bound.
    slope = tf.exp(tf.minimum(tail - log_density(margins, y), 60.0))
    step = sign * (target - tail) * tf.stop_gradient(slope)
    y += step - tf.stop_gradient(step)
    edge = tf.where(p == 0.0, tf.constant(-math.inf, dtype), tf.constant(math.inf, dtype))
    outside = tf.where((p == 0.0) | (p == 1.0), edge, tf.constant(math.nan, dtype))
    return tf.where(inside, y, outside)


def search(margins: Margins, p: tf.Tensor) -> tf.Tensor:
    """Return the quantiles of p [.., 1], which broadcasts with the margins [.., D]."""
    dtype = p.dtype
    lower = p <= 0.5
    component = margins.loc + margins.scale * tf.math.ndtri(p)[..., tf.newaxis]  # [.., D, K]
    # A weight that underflows adds to no tail.
    present = margins.log_weight > math.log(np.finfo(dtype.as_numpy_dtype).tiny)
    infinity = tf.constant(math.inf, dtype)
    low = tf.reduce_min(tf.where(present, component, infinity), axis=-1)  # [.., D]
    high = tf.reduce_max(tf.where(present, component, -infinity), axis=-1)
    epsilon = tf.constant(2.0 * np.finfo(dtype.as_numpy_dtype).eps, dtype)

    sign = tf.where(lower, tf.ones_like(p), -tf.ones_like(p))
    share = tf.exp(margins.log_weight)
    height = share / (margins.scale * math.sqrt(2.0 * math.pi))
    near = tf.where(lower, p, 1.0 - p)

    def above(y: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Return how far y's log tail is above that of the quantile, and Newton's step to it."""
        z = _standard(margins, y)
        # No logs of each component, which take most of the time: a tail that underflows is far
        # from the quantile, and the bracket is halved.
        beyond = tf.math.erfc(-math.sqrt(0.5) * sign[..., tf.newaxis] * z)
        tail = tf.reduce_sum(0.5 * share * beyond, axis=-1)
        density = tf.reduce_sum(height * tf.exp(-0.5 * tf.square(z)), axis=-1)
        excess = sign * tf.math.log(tail / near)
        return excess, -excess * tail / density

    def unfinished(i: tf.Tensor, y: tf.Tensor, low: tf.Tensor, *rest: tf.Tensor) -> tf.Tensor:
        return (i < _STEPS) & tf.reduce_any(~rest[-1])

    def improve(
        i: tf.Tensor,
        y: tf.Tensor,
        low: tf.Tensor,
        high: tf.Tensor,
        width: tf.Tensor,
        done: tf.Tensor,
    ) -> tuple[tf.Tensor, ...]:
        excess, step = above(y)
        low = tf.where(excess < 0.0, tf.maximum(low, y), low)
        high = tf.where(excess > 0.0, tf.minimum(high, y), high)
        newton = y + step
        useful = (newton > low) & (newton < high) & (tf.abs(step) < 0.5 * width)
        # Halves first: their sum may overflow.
        following = tf.where(useful, newton, 0.5 * low + 0.5 * high)
        moved = tf.abs(following - y)
        small = epsilon * tf.abs(y)
        now = done | (excess == 0.0) | (moved <= small) | (high - low <= small)
        return i + 1, tf.where(done | (excess == 0.0), y, following), low, high, moved, now

    start = 0.5 * low + 0.5 * high
    done = tf.zeros_like(start, tf.bool)
    state = (tf.constant(0), start, low, high, high - low, done)
    return tf.while_loop(unfinished, improve, state)[1]


def crps(margins: Margins, y: tf.Tensor) -> tf.Tensor:
    """Return the continuous ranked probability score of each margin, in closed form.

    Args:
        margins: of a mixture with batch [..].
        y: [.., D].

    Returns:
        [.., D], in the units of y; NaN where y is.

    Source:
        Grimit et al. (2006), The continuous ranked probability score for circular variables and
        its application to mesoscale forecast ensemble verification, QJRMS 132.
    """
    weight = tf.exp(margins.log_weight)  # [.., 1, K]
    to_y = tf.reduce_sum(
        weight * _mean_distance(y[..., tf.newaxis] - margins.loc, margins.scale), axis=-1
    )
    a, b = margins.scale[..., tf.newaxis], margins.scale[..., tf.newaxis, :]
    longer = tf.maximum(a, b)
    between = _mean_distance(
        margins.loc[..., tf.newaxis] - margins.loc[..., tf.newaxis, :],
        # As a hypotenuse, whose squares neither overflow nor vanish.
        longer * tf.sqrt(tf.square(a / longer) + tf.square(b / longer)),
    )  # [.., D, K, K]
    pairs = weight[..., tf.newaxis] * weight[..., tf.newaxis, :] * between
    return to_y - 0.5 * tf.reduce_sum(pairs, axis=[-2, -1])


def _mean_distance(loc: tf.Tensor, scale: tf.Tensor) -> tf.Tensor:
    """Return E|X| of X normal."""
    z = loc / scale
    bell = math.sqrt(2.0 / math.pi) * tf.exp(-0.5 * tf.square(z))
    return scale * bell + loc * tf.math.erf(z * math.sqrt(0.5))


def _standard(margins: Margins, y: tf.Tensor) -> tf.Tensor:
    """Return y in each component's units, [.., D, K]."""
    return (y[..., tf.newaxis] - margins.loc) / margins.scale


def _mix(margins: Margins, values: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(tf.exp(margins.log_weight) * values, axis=-1)


def _probability(margins: Margins, z: tf.Tensor) -> tf.Tensor:
    """Return the mixture of Phi(z), [.., D], of z [.., D, K]."""
    total = _mix(margins, ndtr(z))
    return tf.minimum(total, tf.ones_like(total))  # the weights sum to 1 but for rounding


def _log_tail(margins: Margins, z: tf.Tensor) -> tf.Tensor:
    """Return the log of the mixture of Phi(z), [.., D], of z [.., D, K]."""
    small = _log_mix(margins, log_ndtr(z))
    # Near one a log is as small as the other tail, and has its digits from there.
    other = tf.minimum(_mix(margins, ndtr(-z)), 0.5)
    return tf.where(small > -math.log(2.0), tf.math.log1p(-other), small)


def _log_mix(margins: Margins, values: tf.Tensor) -> tf.Tensor:
    return tf.reduce_logsumexp(margins.log_weight + values, axis=-1)


def ndtr(x: tf.Tensor) -> tf.Tensor:
    """Return Phi(x), with its digits in both tails."""
    return 0.5 * tf.math.erfc(-math.sqrt(0.5) * x)


def log_ndtr(x: tf.Tensor) -> tf.Tensor:
    """Return log Phi(x), with its digits in both tails: TFP's own has none of them near zero."""
    distance = tf.abs(x)
    # Far out, where erfc underflows, by the asymptotic series, whose first term left out is below
    # the rounding of the dtype from here on.
    far = tf.constant(20.0 if x.dtype == tf.float64 else 10.0, x.dtype)
    close = tf.math.log(0.5 * tf.math.erfc(math.sqrt(0.5) * tf.minimum(distance, far)))
    beyond = tf.maximum(distance, far)
    squared = tf.square(beyond)
    series = tf.zeros_like(x)
    for odd in (11.0, 9.0, 7.0, 5.0, 3.0, 1.0):
        series = -odd * (1.0 + series) / squared
    tail = tf.where(
        distance < far,
        close,
        tf.math.log1p(series) - 0.5 * (squared + LOG_2_PI) - tf.math.log(beyond),
    )  # log Phi(-|x|)
    return tf.where(x > 0.0, tf.math.log1p(-tf.exp(tail)), tail)
