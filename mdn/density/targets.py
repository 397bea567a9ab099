"""What a density answers of each target by itself: the interface shared by all three types.

Shape letters: D event size.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf
from tensorflow_probability import distributions as tfd

from mdn.density import moments, univariate
from mdn.density.parameters import MixtureParameters
from mdn.errors import ConfigError, DataError


def check_event(y: tf.Tensor, event_size: int) -> None:
    """Raise a DataError unless the last axis of y is D; anything else would broadcast."""
    if y.shape.rank == 0 or (y.shape.rank is not None and y.shape[-1] not in (event_size, None)):
        raise DataError(
            f"y has shape {y.shape} but the density has {event_size} targets: give "
            f"[.., {event_size}]; a single target is [N, 1]"
        )


class TargetQueries:
    """Mixed into a TFP distribution: each target's margin, in the shape of y.

    Of one target these are the distribution function and so on of the density. Those of several
    targets at once have no closed form.
    """

    dtype: Any
    event_shape: Any

    def mixture_parameters(self) -> MixtureParameters:
        """Return the density as the parameters of a Gaussian mixture, in the units of y."""
        raise NotImplementedError

    # TFP's public methods, which see to names and dtypes; they call the private ones below.

    def cdf(self, value: Any, name: str = "cdf", **kwargs: Any) -> tf.Tensor:
        """Return P(Y_d <= y_d) of each target: [.., D], of y [.., D]; NaN where y is."""
        return tfd.Distribution.cdf(self, value, name, **kwargs)

    def log_cdf(self, value: Any, name: str = "log_cdf", **kwargs: Any) -> tf.Tensor:
        """Return log P(Y_d <= y_d) of each target: [.., D], of y [.., D]; NaN where y is."""
        return tfd.Distribution.log_cdf(self, value, name, **kwargs)

    def survival_function(
        self, value: Any, name: str = "survival_function", **kwargs: Any
    ) -> tf.Tensor:
        """Return P(Y_d > y_d) of each target: [.., D], of y [.., D]; NaN where y is."""
        return tfd.Distribution.survival_function(self, value, name, **kwargs)

    def log_survival_function(
        self, value: Any, name: str = "log_survival_function", **kwargs: Any
    ) -> tf.Tensor:
        """Return log P(Y_d > y_d) of each target: [.., D], of y [.., D]; NaN where y is."""
        return tfd.Distribution.log_survival_function(self, value, name, **kwargs)

    def quantile(self, value: Any, name: str = "quantile", **kwargs: Any) -> tf.Tensor:
        """Return the y with P(Y_d <= y_d) = p, of each target.

        Args:
            value: p, in [0, 1], of any shape [*S].
            name: prefix of the operations.
            **kwargs: none are known.

        Returns:
            [*S, .., D], to the rounding of the dtype for p from 1e-6 to 1 - 1e-6; infinite for 0
            and 1, NaN outside of [0, 1]. The gradient is that of the implicit function.
        """
        return tfd.Distribution.quantile(self, value, name, **kwargs)

    def _margins(self) -> univariate.Margins:
        return univariate.Margins.of(self.mixture_parameters())

    def _cdf(self, y: tf.Tensor) -> tf.Tensor:
        return univariate.cdf(self._margins(), y)

    def _log_cdf(self, y: tf.Tensor) -> tf.Tensor:
        return univariate.log_cdf(self._margins(), y)

    def _survival_function(self, y: tf.Tensor) -> tf.Tensor:
        return univariate.survival(self._margins(), y)

    def _log_survival_function(self, y: tf.Tensor) -> tf.Tensor:
        return univariate.log_survival(self._margins(), y)

    def _quantile(self, probability: tf.Tensor) -> tf.Tensor:
        return univariate.quantile(self._margins(), probability)

    def interval(self, level: float | tf.Tensor) -> tf.Tensor:
        """Return the central intervals of each target.

        Args:
            level: the probability of the interval, in (0, 1).

        Returns:
            [.., D, 2], the lower and the upper end, with (1 - level) / 2 beyond each.

        Raises:
            ConfigError: the level is a number out of its range.
        """
        check_level(level)
        tail = 0.5 * (1.0 - tf.convert_to_tensor(level, self.dtype))
        ends = self.quantile(tf.stack([tail, 1.0 - tail]))  # [2, .., D]
        return tf.stack(tf.unstack(ends), axis=-1)

    def crps(self, y: Any) -> tf.Tensor:
        """Return the continuous ranked probability score of each target, in closed form.

        Args:
            y: [.., D]; NaN marks a missing entry.

        Returns:
            [.., D], in the units of y; NaN where y is.

        Source:
            Gneiting and Raftery (2007), Strictly proper scoring rules, prediction, and
            estimation, JASA 102.
        """
        y = tf.convert_to_tensor(y, self.dtype)
        check_event(y, self.event_shape[-1])
        missing = tf.math.is_nan(y)
        score = univariate.crps(self._margins(), tf.where(missing, tf.zeros_like(y), y))
        return tf.where(missing, tf.constant(float("nan"), score.dtype), score)

    def skewness(self) -> tf.Tensor:
        """Return E[(y_d - mean_d)^3] / stddev_d^3 of each target: [.., D]."""
        return moments.skewness(self._margins())

    def kurtosis(self) -> tf.Tensor:
        """Return E[(y_d - mean_d)^4] / stddev_d^4 - 3 of each target: [.., D]; 0 of a normal."""
        return moments.kurtosis(self._margins())


def check_level(level: float | tf.Tensor) -> None:
    """Raise a ConfigError unless a level that is a number is a probability."""
    if isinstance(level, float | int) and not 0.0 < level < 1.0:
        raise ConfigError(f"level={level}: must be between 0 and 1, such as 0.9")
