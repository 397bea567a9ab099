"""Highest-density regions of Gaussian mixtures.

Shape letters: D event size, K components, S draws, J points on a line.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import tensorflow as tf
import tensorflow_probability as tfp

from mdn.density import univariate
from mdn.density.modes import find_modes
from mdn.density.parameters import MixtureParameters, broadcast

_GOLDEN = 0.5 * (math.sqrt(5.0) - 1.0)


class Region(NamedTuple):
    """The smallest region that holds a given probability.

    Attributes:
        log_threshold: [..], nats: y is inside if its log density is not below it.
        intervals: [.., K, 2], of one target: the ends of the intervals whose union the region is,
            from left to right; NaN where `mask` is false. None of several targets.
        mask: [.., K], which intervals there are. None of several targets.
    """

    log_threshold: tf.Tensor
    intervals: tf.Tensor | None = None
    mask: tf.Tensor | None = None


def sampled_threshold(log_prob: tf.Tensor, level: tf.Tensor) -> tf.Tensor:
    """Return the log density that a share `level` of draws exceeds, [..], of [S, ..]."""
    return tfp.stats.percentile(log_prob, 100.0 * (1.0 - level), axis=0, interpolation="linear")


def line_region(parameters: MixtureParameters, level: tf.Tensor) -> Region:
    """Return the region of one target, by its boundaries.

    Between two neighbouring modes the density has one minimum. So each side of each mode has one
    boundary at most, which is bracketed; and the probability inside falls as the threshold rises,
    so that the threshold is bracketed too. All of it in float64.

    Args:
        parameters: batch [..], D = 1.
        level: in (0, 1), a scalar or [..].

    Source:
        Hyndman (1996), Computing and graphing highest density regions, The American Statistician
        50.
    """
    dtype = parameters.loc.dtype
    parameters = broadcast(MixtureParameters(*(tf.cast(t, tf.float64) for t in parameters)))
    level = tf.cast(level, tf.float64) + tf.zeros_like(parameters.logits[..., 0])
    frozen = MixtureParameters(*(tf.stop_gradient(t) for t in parameters))
    search = _program(parameters.logits.shape.rank, parameters.logits.shape[-1])
    # Without gradients on the way out too: the program would be derived for nothing.
    found = search(frozen, tf.stop_gradient(level))
    log_threshold, low, high = (tf.stop_gradient(t) for t in found)
    mask = tf.math.is_finite(low) & tf.math.is_finite(high)
    log_threshold, low, high = _attach(_Line(parameters), level, log_threshold, low, high, mask)
    intervals = tf.stack([low, high], axis=-1)
    intervals = tf.where(mask[..., tf.newaxis], intervals, tf.constant(math.nan, tf.float64))
    return Region(tf.cast(log_threshold, dtype), tf.cast(intervals, dtype), mask)


def _attach(
    line: _Line,
    level: tf.Tensor,
    log_threshold: tf.Tensor,
    low: tf.Tensor,
    high: tf.Tensor,
    mask: tf.Tensor,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Return the threshold and the ends as they are, with the gradients of the implicit function.

    At an end the log density is the threshold's, and the probabilities between the ends add up to
    the level. How threshold and ends move follows from the derivatives of both.
    """

    def change(value: tf.Tensor) -> tf.Tensor:
        return value - tf.stop_gradient(value)  # zero, but for its gradient

    ends = tf.concat([low, high], axis=-1)  # [.., 2 K]
    there = tf.concat([mask, mask], axis=-1)
    ends = tf.stop_gradient(tf.where(there, ends, tf.zeros_like(ends)))
    side = tf.concat([-tf.ones_like(low), tf.ones_like(high)], axis=-1)
    side = tf.where(there, side, tf.zeros_like(side))
    log_density = line.log_density(ends)
    slope = tf.stop_gradient(line.slope(ends))
    slope = tf.where(there, slope, tf.ones_like(slope))
    density = tf.stop_gradient(tf.exp(log_threshold))[..., tf.newaxis]
    of_ends = side * (density / slope * change(log_density) - change(line.cumulative(ends)))
    moved = change(level) + tf.reduce_sum(of_ends, axis=-1)
    by_threshold = tf.reduce_sum(side * density / slope, axis=-1)
    step = moved / by_threshold
    ends += (step[..., tf.newaxis] - change(log_density)) / slope
    low, high = tf.split(ends, 2, axis=-1)
    return log_threshold + step, low, high


@functools.lru_cache(maxsize=64)
def _program(rank: int, components: int) -> tf.types.experimental.PolymorphicFunction:
    """Return the search as one graph for all batch sizes; its loops are slow step by step."""
    return tf.function(_line_region, autograph=False, reduce_retracing=True)


def _line_region(
    parameters: MixtureParameters, level: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Return the log threshold [..] and sorted ends [.., K], infinite where there is none."""
    line = _Line(parameters)
    found = find_modes(parameters)
    last = tf.reduce_max(
        tf.where(found.mask, found.loc[..., 0], tf.constant(-math.inf, tf.float64)),
        axis=-1,
        keepdims=True,
    )
    # Copies of the rightmost mode: intervals of no length between them.
    mode = tf.sort(tf.where(found.mask, found.loc[..., 0], last), axis=-1)  # [.., K]
    valley = line.minimum(mode[..., :-1], mode[..., 1:])  # [.., K - 1]

    # The central interval holds the level, so the region's threshold is not below its least.
    tail = 0.5 * (1.0 - level)
    central = line.central(tail)  # [.., 2]
    inside = (valley > central[..., :1]) & (valley < central[..., 1:])
    highest = tf.reduce_max(line.log_density(mode), axis=-1)
    depth = tf.where(inside, line.log_density(valley), highest[..., tf.newaxis])
    least = tf.concat([line.log_density(central), depth], axis=-1)
    lowest = tf.reduce_min(least, axis=-1) - 1e-9
    ends = line.beyond(lowest)  # [.., 2]
    left = tf.concat([ends[..., :1], valley], axis=-1)  # [.., K], of each mode
    right = tf.concat([valley, ends[..., 1:]], axis=-1)
    outer = tf.concat([left, right], axis=-1)  # [.., 2 K]
    inner = tf.concat([mode, mode], axis=-1)
    log_outer, log_inner = line.log_density(outer), line.log_density(inner)

    @tf.function(autograph=False)  # asked at four places, and traced at one
    def boundaries(log_threshold: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Return where the density passes the threshold, [.., 2 K], and where it does so."""
        target = log_threshold[..., tf.newaxis]
        passes = (log_outer < target) & (log_inner > target)
        spacing = tf.maximum(tf.abs(outer), tf.abs(inner)) * 1e-15 + 1e-300
        root = tfp.math.find_root_chandrupatla(
            lambda y: line.log_density(y) - target,
            low=tf.where(passes, outer, inner),
            high=inner,
            position_tolerance=spacing,
            max_iterations=100,
        ).estimated_root
        edge = tf.where(log_inner > target, outer, inner)
        return tf.where(passes, root, edge), passes

    def excess(log_threshold: tf.Tensor) -> tf.Tensor:
        low, high = tf.split(boundaries(log_threshold)[0], 2, axis=-1)
        return tf.reduce_sum(line.cumulative(high) - line.cumulative(low), axis=-1) - level

    log_threshold = tfp.math.find_root_chandrupatla(
        excess, low=lowest, high=highest, position_tolerance=1e-13, max_iterations=100
    ).estimated_root
    at, passes = boundaries(log_threshold)
    absent = tf.constant(math.inf, tf.float64)
    low, high = tf.split(tf.where(passes, at, absent), 2, axis=-1)
    return log_threshold, tf.sort(low, axis=-1), tf.sort(high, axis=-1)


class _Line:
    """A mixture of normals on a line, at points [.., J]."""

    def __init__(self, parameters: MixtureParameters) -> None:
        margins = univariate.Margins.of(parameters)
        self.margins = margins
        # [.., 1, K] each: the one target is the axis of points.
        self.log_weight, self.loc, self.scale = margins

    def log_density(self, y: tf.Tensor) -> tf.Tensor:
        return univariate.log_density(self.margins, y)

    def cumulative(self, y: tf.Tensor) -> tf.Tensor:
        return univariate.cdf(self.margins, y)

    def slope(self, y: tf.Tensor) -> tf.Tensor:
        """Return the derivative of the log density."""
        z = (y[..., tf.newaxis] - self.loc) / self.scale  # [.., J, K]
        share = tf.nn.softmax(self.log_weight - tf.math.log(self.scale) - 0.5 * tf.square(z))
        return -tf.reduce_sum(share * z / self.scale, axis=-1)

    def central(self, tail: tf.Tensor) -> tf.Tensor:
        ends = [univariate.search(self.margins, p[..., tf.newaxis]) for p in (tail, 1.0 - tail)]
        return tf.concat(ends, axis=-1)

    def beyond(self, log_threshold: tf.Tensor) -> tf.Tensor:
        """Return points on both sides of everything that is denser, [.., 2]."""
        log_height = self.log_weight - tf.math.log(self.scale * math.sqrt(2.0 * math.pi))
        height = tf.reduce_logsumexp(log_height, axis=-1)[..., 0]
        # A sum of K bells is below K times the highest one's height times its fall.
        reach = tf.sqrt(2.0 * tf.maximum(height - log_threshold, 0.0) + 1.0)
        reach = reach[..., tf.newaxis] * self.scale[..., 0, :]
        present = self.log_weight[..., 0, :] > -1e4
        infinity = tf.constant(math.inf, tf.float64)
        low = tf.where(present, self.loc[..., 0, :] - reach, infinity)
        high = tf.where(present, self.loc[..., 0, :] + reach, -infinity)
        return tf.stack([tf.reduce_min(low, axis=-1), tf.reduce_max(high, axis=-1)], axis=-1)

    def minimum(self, low: tf.Tensor, high: tf.Tensor) -> tf.Tensor:
        """Return where the density is least between neighbouring modes, by golden sections."""

        def narrow(i: tf.Tensor, low: tf.Tensor, high: tf.Tensor) -> tuple[tf.Tensor, ...]:
            a, b = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
            rising = self.log_density(a) < self.log_density(b)
            return i + 1, tf.where(rising, low, a), tf.where(rising, b, high)

        state = (tf.constant(0), low, high)
        _, low, high = tf.while_loop(lambda i, low, high: i < 120, narrow, state)
        return 0.5 * (low + high)
