"""Probabilities of rectangles under two correlated normals, in logs, by quadrature.

Shape letters: P panels, S nodes of a panel.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from mdn.density.gaussian import LOG_2_PI
from mdn.density.interval import log_interval

# Nodes of each panel; how far the exponent falls where the rule may leave off; and how far around
# an end of the second target's side its panels reach, in standard deviations.
_RULES = {tf.float32: (10, 18.0, 5.0), tf.float64: (24, 40.0, 7.5)}

_STEPS = 6  # of Newton's, on a convex function with three quadratic pieces


def log_rectangle(
    low: tf.Tensor, high: tf.Tensor, width: tf.Tensor, slope: tf.Tensor
) -> tf.Tensor:
    """Return log P(low_1 < X < high_1, low_2 < Z + slope X < high_2), of X and Z standard normal.

    The integral over X of its density times the probability of an interval, which is a logarithm
    all the way: cells far out, and cells that are tiny beside the scales, keep their digits. Where
    the integrand is follows from its exponent, a convex function of X with quadratic pieces; there
    the rule of Gauss and Legendre is taken over panels that end where X brings Z to an end of its
    side. The tests hold the error below 1e-9 nats + 1e-13 |log P| in float64, and below 2e-4 of
    1 + |log P| in float32.

    Args:
        low: [.., 2], finite numbers; 1e18 is as good as infinity.
        high: [.., 2].
        width: [.., 2], high - low, which may be known to more digits than the difference has.
        slope: [..].

    Returns:
        [..], nats.
    """
    (a, c), (b, d) = (tf.unstack(end, axis=-1) for end in (low, high))
    nodes, fall, edge = _RULES[low.dtype]
    first, last, points = _support(a, b, c, d, slope, fall, edge)
    start, stop = tf.where(a > first, a, first), tf.where(b < last, b, last)
    length = tf.where((a > first) & (b < last), width[..., 0], stop - start)
    length = tf.maximum(length, 1e-30)
    # As shares of the length, so that the nodes move with the ends of the rectangle.
    share = (points - tf.stop_gradient(start)[..., tf.newaxis]) / tf.stop_gradient(length)[
        ..., tf.newaxis
    ]
    share = tf.sort(tf.clip_by_value(share, 0.0, 1.0), axis=-1)
    share = tf.concat([tf.zeros_like(share[..., :1]), share, tf.ones_like(share[..., :1])], -1)
    panel = share[..., 1:] - share[..., :-1]  # [.., P]
    rule, weight = np.polynomial.legendre.leggauss(nodes)
    rule = tf.constant(0.5 * rule + 0.5, low.dtype)
    place = share[..., :-1, tf.newaxis] + panel[..., tf.newaxis] * rule - 0.5  # [.., P, S]

    def beside(value: tf.Tensor) -> tf.Tensor:
        return value[..., tf.newaxis, tf.newaxis]

    x = beside(0.5 * start + 0.5 * stop) + beside(length) * place
    moved = beside(slope) * x
    inner = log_interval(beside(c) - moved, beside(d) - moved, beside(width[..., 1]))
    some = panel > 0.0
    log_panel = tf.math.log(tf.where(some, panel, tf.ones_like(panel)))
    log_panel = tf.where(some, log_panel, tf.constant(-1e30, low.dtype))
    terms = inner - 0.5 * tf.square(x) + log_panel[..., tf.newaxis]
    terms += tf.constant(np.log(0.5 * weight), low.dtype)
    return tf.reduce_logsumexp(terms, axis=[-2, -1]) + tf.math.log(length) - 0.5 * LOG_2_PI


def _support(
    a: tf.Tensor,
    b: tf.Tensor,
    c: tf.Tensor,
    d: tf.Tensor,
    slope: tf.Tensor,
    fall: float,
    edge: float,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Return between which X the integrand has not fallen by exp(-fall), and ends of panels.

    Up to factors that vary little it is exp(-x^2 / 2 - r^2 / 2), with r the distance of slope x
    from the side [c, d].

    Returns:
        The first and the last X, [..] each; and points [.., P - 1].
    """

    a, b, c, d, slope = (tf.stop_gradient(one) for one in (a, b, c, d, slope))

    def distance(x: tf.Tensor) -> tf.Tensor:
        return slope * x - tf.clip_by_value(slope * x, c, d)

    steep = tf.sign(slope) * tf.maximum(tf.abs(slope), 0.1)
    steep = tf.where(tf.equal(slope, 0.0), tf.ones_like(slope), steep)
    nearest = tf.clip_by_value(tf.zeros_like(c), c, d)
    top = tf.clip_by_value(slope / (1.0 + tf.square(slope)) * nearest, a, b)
    at_top = distance(top)
    ends = []
    for sign in (-1.0, 1.0):
        # The curvature is one at least, and slope^2 more once X has left the side for good: two
        # bounds on how far it may be. From there Newton's steps stay outside.
        steepness = tf.maximum(sign * (top + slope * at_top), 0.0)
        farthest = 2.0 * fall / (steepness + tf.sqrt(tf.square(steepness) + 2.0 * fall))
        left = sign * (tf.where(sign * steep > 0.0, d, c) / steep - top)
        left = tf.maximum(left, 0.0) + np.sqrt(2.0 * fall) / tf.abs(steep)
        t = tf.where(tf.abs(slope) > 0.1, tf.minimum(farthest, left), farthest)
        for _ in range(_STEPS):
            x = top + sign * t
            r = distance(x)
            fallen = 0.5 * (sign * 2.0 * top + t) * t + 0.5 * (r - at_top) * (r + at_top)
            rate = sign * (x + slope * r)
            t = tf.clip_by_value(t - (fallen - fall) / tf.maximum(rate, 1e-6), 0.0, farthest)
        ends.append(top + sign * t)
    points = [(end + offset) / steep for end in (c, d) for offset in (-edge, 0.0, edge)]
    return *ends, tf.stack([*points, top], axis=-1)
