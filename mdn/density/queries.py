"""What every density of `mdn` answers, whatever its type: the interface shared by all three.

Shape letters: B batch, D event size, K components.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from mdn.density import univariate
from mdn.density.parameters import MixtureParameters
from mdn.errors import ConfigError, DataError


def draw(parameters: MixtureParameters, n: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Return n draws from a mixture: [n, .., D].

    TFP's own sampling fails where there are no rows, and makes K draws to keep one.

    Args:
        parameters: batch [..], K components.
        n: int32 scalar.
        seed: int32 [2]; the draws are the same on every device.
    """
    logits, loc, scale_tril = parameters
    seeds = tf.random.split(seed, 2, "philox")

    def shape(like: tf.Tensor) -> tf.Tensor:
        return tf.concat([[n], tf.shape(like)], axis=0)

    level = tf.random.stateless_uniform(
        shape(logits[..., :1]), seeds[0], dtype=loc.dtype, alg="philox"
    )  # [n, .., 1]
    noise = tf.random.stateless_normal(
        shape(loc[..., 0, :]), seeds[1], dtype=loc.dtype, alg="philox"
    )  # [n, .., D]
    below = level >= tf.cumsum(tf.nn.softmax(logits), axis=-1)[..., :-1]  # [n, .., K - 1]
    component = tf.one_hot(tf.math.count_nonzero(below, -1), logits.shape[-1], dtype=loc.dtype)
    return tf.einsum("n...k,...ki->n...i", component, loc) + tf.einsum(
        "n...k,...kij,n...j->n...i", component, scale_tril, noise
    )


def check_event(y: tf.Tensor, event_size: int) -> None:
    """Raise a DataError unless the last axis of y is D; anything else would broadcast."""
    if y.shape.rank == 0 or (y.shape.rank is not None and y.shape[-1] not in (event_size, None)):
        raise DataError(
            f"y has shape {y.shape} but the density has {event_size} targets: give "
            f"[.., {event_size}]; a single target is [N, 1]"
        )


class Queries:
    """Mixed into a TFP distribution; as a tensor the distribution is its mean."""

    log_prob: Any
    quantile: Any
    mean: Any
    covariance: Any
    dtype: Any
    batch_shape: Any
    event_shape: Any
    parameters: dict[str, Any]
    parameter_properties: Any

    def mixture_parameters(self) -> MixtureParameters:
        """Return the density as the parameters of a Gaussian mixture, in the units of y."""
        raise NotImplementedError

    def tensors(self) -> dict[str, tf.Tensor]:
        """Return the tensors that the constructor takes, by name: `type(d)(**d.tensors())`."""
        return {name: getattr(self, name) for name in self.parameter_properties()}

    # ------------------------------------------------------------------ margins
    #
    # Each target by itself, in the shape of y: for D = 1 that is the distribution function. TFP's
    # `cdf`, `log_cdf`, `survival_function`, `log_survival_function` and `quantile` call these;
    # those of several targets at once have no closed form.

    def _margins(self) -> univariate.Margins:
        return univariate.Margins.of(self.mixture_parameters())

    def _cdf(self, y: tf.Tensor) -> tf.Tensor:
        """Return P(Y_d <= y_d) of each target, [.., D]."""
        return univariate.cdf(self._margins(), y)

    def _log_cdf(self, y: tf.Tensor) -> tf.Tensor:
        """Return log P(Y_d <= y_d) of each target, [.., D]."""
        return univariate.log_cdf(self._margins(), y)

    def _survival_function(self, y: tf.Tensor) -> tf.Tensor:
        """Return P(Y_d > y_d) of each target, [.., D]."""
        return univariate.survival(self._margins(), y)

    def _log_survival_function(self, y: tf.Tensor) -> tf.Tensor:
        """Return log P(Y_d > y_d) of each target, [.., D]."""
        return univariate.log_survival(self._margins(), y)

    def _quantile(self, probability: tf.Tensor) -> tf.Tensor:
        """Return the quantiles of each target, [*S, .., D], of probabilities [*S]."""
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
        if isinstance(level, float | int) and not 0.0 < level < 1.0:
            raise ConfigError(f"level={level}: must be between 0 and 1, such as 0.9")
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
        return univariate.crps(self._margins(), y)

    # A deterministic answer wherever TensorFlow or NumPy wants a tensor, never a random draw.
    def __tf_tensor__(self, dtype: tf.DType | None = None, name: str | None = None) -> tf.Tensor:
        return tf.convert_to_tensor(self.mean(), dtype, name=name)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.mean(), dtype)
