"""Densities of targets of which a monotone transform is a Gaussian mixture's.

Shape letters: B batch, D event size, K components, S samples.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow_probability import bijectors as tfb
from tensorflow_probability import distributions as tfd

from mdn.density.draws import draw
from mdn.density.parameters import MixtureParameters
from mdn.density.queries import Queries
from mdn.density.regions import Region
from mdn.density.targets import check_event
from mdn.errors import ConfigError

# Of the Gauss-Hermite rule, exact for polynomials of degree 127.
_NODES = 64


class Transformed(Queries, tfd.TransformedDistribution):
    """The density of y = forward(u) where u has the density `distribution`: in the units of y.

    Each target is transformed by itself, and a missing one is marginalised as it is in u. What
    has no closed form says how it is computed; what is asked of a Gaussian mixture can be asked
    of `distribution`, in the units of u.

    Args:
        distribution: batch [..], event [D].
        bijector: increasing, of numbers or elementwise on [D]; `forward` takes u to y.
        name: prefix of the operations.
    """

    def __init__(self, distribution: Any, bijector: tfb.Bijector, name: str | None = None) -> None:
        tfd.TransformedDistribution.__init__(
            self,
            distribution=distribution,
            bijector=bijector,
            name=name or f"Transformed{type(distribution).__name__}",
        )

    @classmethod
    def _parameter_properties(cls, dtype: Any, num_classes: Any = None) -> dict[str, Any]:
        # Those of TFP's: it warns of a subclass with an `__init__` of its own that says nothing.
        return super()._parameter_properties(dtype, num_classes)

    def _log_prob(self, y: tf.Tensor, complete: bool = False) -> tf.Tensor:
        """Return log p_u(u) + sum log du/dy over what is observed; -inf outside of the domain."""
        check_event(y, self.distribution.event_shape[-1])
        u, log_slope, inside = to_base(self.bijector, y)
        log_prob = self.distribution.log_prob(u, complete=complete) + log_slope
        return tf.where(inside, log_prob, tf.constant(-np.inf, log_prob.dtype))

    def _mean(self) -> tf.Tensor:
        """[.., D], by Gauss-Hermite quadrature of each component's margins, 64 nodes."""
        return self._expectation(self.bijector.forward)

    def _variance(self) -> tf.Tensor:
        """[.., D], by the same quadrature."""
        mean = self._mean()[..., tf.newaxis, tf.newaxis, :]  # [.., 1, 1, D]
        return self._expectation(lambda u: tf.square(self.bijector.forward(u) - mean))

    def _stddev(self) -> tf.Tensor:
        return tf.sqrt(self._variance())

    def _expectation(self, function: Callable[[tf.Tensor], tf.Tensor]) -> tf.Tensor:
        """Return E[function(u_d)] for each d, [.., D]."""
        logits, loc, scale_tril = self.distribution.mixture_parameters()
        nodes, weights = np.polynomial.hermite_e.hermegauss(_NODES)
        nodes = tf.constant(nodes, loc.dtype)[:, tf.newaxis, tf.newaxis]  # [S, 1, 1]
        weights = tf.constant(weights / weights.sum(), loc.dtype)  # [S]
        scale = tf.norm(scale_tril, axis=-1)  # [.., K, D]
        u = loc[..., tf.newaxis, :, :] + nodes * scale[..., tf.newaxis, :, :]  # [.., S, K, D]
        values = tf.einsum("s,...skd->...kd", weights, function(u))
        return tf.einsum("...k,...kd->...d", tf.nn.softmax(logits), values)

    # As the transform increases, those of `distribution` at the transformed y.

    def _cdf(self, y: tf.Tensor) -> tf.Tensor:
        return self.distribution.cdf(self._inverse(y))

    def _log_cdf(self, y: tf.Tensor) -> tf.Tensor:
        return self.distribution.log_cdf(self._inverse(y))

    def _survival_function(self, y: tf.Tensor) -> tf.Tensor:
        return self.distribution.survival_function(self._inverse(y))

    def _log_survival_function(self, y: tf.Tensor) -> tf.Tensor:
        return self.distribution.log_survival_function(self._inverse(y))

    def _quantile(self, probability: tf.Tensor) -> tf.Tensor:
        return self.bijector.forward(self.distribution.quantile(probability))

    def _inverse(self, y: tf.Tensor) -> tf.Tensor:
        """Return u, infinite where y is outside of the domain; NaN where y is."""
        edge = tf.fill(tf.shape(y), tf.constant(np.inf, y.dtype))
        u = self.bijector.inverse(y)
        u = tf.where(y <= self.bijector.forward(-edge), -edge, u)
        return tf.where(y >= self.bijector.forward(edge), edge, u)

    def _call_sample_n(self, sample_shape: Any, seed: Any, **kwargs: Any) -> tf.Tensor:
        return self.bijector.forward(self.distribution.sample(sample_shape, seed, **kwargs))

    def _region(self, level: tf.Tensor, n: int, seed: tf.Tensor) -> Region:
        return self._sampled_region(level, n, seed)  # also of one target

    def pit(self, y: Any) -> tf.Tensor:
        """Return `distribution.pit` of u: [.., D]; NaN where y is or is outside of the domain."""
        u = self._inverse(tf.convert_to_tensor(y, self.dtype))
        return self.distribution.pit(tf.where(tf.math.is_inf(u), tf.constant(np.nan, u.dtype), u))

    def responsibilities(self, y: Any) -> tf.Tensor:
        """Return the probability of each component given y: [.., K]; NaN outside of the domain."""
        u, _, inside = to_base(self.bijector, tf.convert_to_tensor(y, self.dtype))
        found = self.distribution.responsibilities(u)
        return tf.where(inside[..., tf.newaxis], found, tf.constant(np.nan, found.dtype))

    def mixture_parameters(self) -> MixtureParameters:
        """Raise: the density is no Gaussian mixture in the units of y.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "the density of transformed targets is no Gaussian mixture in their units: ask "
            "density.distribution, which is one in transformed units, or draw samples"
        )

    def to_dict(self) -> dict[str, Any]:
        """Raise: a transform is no array.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("a transform is no array: use to_dict() of density.distribution")

    def __repr__(self) -> str:
        return f"{self.bijector.name} of targets of {self.distribution!r}"

    __str__ = __repr__

    def tensors(self) -> dict[str, tf.Tensor]:
        """Return the tensors of `distribution`: `rebuilder(d)(**d.tensors())` is this density."""
        return self.distribution.tensors()


def split_transform(density: Queries) -> tuple[Queries, tfb.Bijector | None]:
    """Return the density in transformed units, and the transform; None where there is none."""
    if isinstance(density, Transformed):
        return density.distribution, density.bijector
    return density, None


def rebuilder(density: Queries) -> Callable[..., Queries]:
    """Return what makes such a density of its `tensors()`; it holds none of them."""
    base, bijector = split_transform(density)
    return type(base) if bijector is None else functools.partial(_construct, type(base), bijector)


def draw_from(density: Queries, n: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Return n draws, [n, .., D], in the units of y: a function of the seed, int32 [2]."""
    base, bijector = split_transform(density)
    draws = draw(base.mixture_parameters(), n, seed)
    return draws if bijector is None else bijector.forward(draws)


def _construct(
    constructor: Callable[..., Queries], bijector: tfb.Bijector, **tensors: Any
) -> Transformed:
    return Transformed(constructor(**tensors), bijector)


def to_base(bijector: tfb.Bijector, y: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Return u, the log slope summed over what is observed, and whether y is in the domain.

    Args:
        bijector: elementwise on [.., D].
        y: [.., D], NaN marks a missing entry, which stays one.

    Returns:
        u [.., D], log du/dy [..], and [..], which is false where an entry is outside of the
        domain; the other two are then finite all the same, and so are their gradients.
    """
    missing = tf.math.is_nan(y)
    inner = bijector.forward(tf.zeros_like(y))  # in the domain
    first = bijector.inverse(tf.where(missing, inner, y))
    inside = tf.math.is_finite(first)
    safe = tf.where(missing | ~inside, inner, y)
    u = tf.where(missing, y, bijector.inverse(safe))
    log_slope = bijector.inverse_log_det_jacobian(safe, event_ndims=0)
    log_slope = tf.where(missing, tf.zeros_like(y), log_slope + tf.zeros_like(y))
    return u, tf.reduce_sum(log_slope, axis=-1), tf.reduce_all(inside, axis=-1)
