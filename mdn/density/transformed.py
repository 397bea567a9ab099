"""Densities of targets of which a monotone transform is a Gaussian mixture's.

Shape letters: B batch, D event size, K components, S samples.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow_probability import bijectors as tfb
from tensorflow_probability import distributions as tfd

from mdn.density import pushforward
from mdn.density.algebra import check_dims
from mdn.density.draws import draw
from mdn.density.entropy import Entropy
from mdn.density.parameters import MixtureParameters
from mdn.density.queries import Queries, Reduction
from mdn.density.regions import Region
from mdn.density.targets import check_event
from mdn.density.transforms import Selected, select
from mdn.density.univariate import Margins
from mdn.errors import ConfigError


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
        parameters = dict(locals())
        tfd.TransformedDistribution.__init__(
            self,
            distribution=distribution,
            bijector=bijector,
            name=name or f"Transformed{type(distribution).__name__}",
        )
        self._parameters = self._no_dependency(parameters)  # what `copy` and slices start from

    def __getitem__(self, slices: Any) -> Transformed:
        """Return the density of a slice of the batch, whose transform is the same."""
        return Transformed(self.distribution[slices], self.bijector)

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

    # Of a log transform in closed form, else by the 64 nodes of a Gauss-Hermite rule.

    def _mean(self) -> tf.Tensor:
        return self._moments()[0]

    def _variance(self) -> tf.Tensor:
        return self._moments()[1]

    def _stddev(self) -> tf.Tensor:
        return tf.sqrt(self._variance())

    def _covariance(self) -> tf.Tensor:
        return self._moments(pairs=True)[1]

    def _moments(self, pairs: bool = False) -> tuple[tf.Tensor, tf.Tensor]:
        parameters = self.distribution.mixture_parameters()
        return pushforward.mixture_moments(parameters, self.bijector, pairs)

    def skewness(self) -> tf.Tensor:
        """Return E[(y_d - mean_d)^3] / stddev_d^3 of each target, [.., D], by 64 nodes."""
        parameters = self.distribution.mixture_parameters()
        return pushforward.standard_moment(parameters, self.bijector, 3)

    def kurtosis(self) -> tf.Tensor:
        """Return E[(y_d - mean_d)^4] / stddev_d^4 - 3 of each target, [.., D], by 64 nodes."""
        parameters = self.distribution.mixture_parameters()
        return pushforward.standard_moment(parameters, self.bijector, 4) - 3.0

    # What of a density of transformed targets is one again.

    def marginal(self, dims: int | Sequence[int]) -> Any:
        """Return the density of some of the targets, in their units: as of a mixture."""
        chosen = [dims] if isinstance(dims, int | np.integer) else list(dims)
        return self._of(self.distribution.marginal(chosen), chosen)

    def condition(self, given: Mapping[int, Any]) -> Any:
        """Return the density of the other targets, given some in their units: as of a mixture.

        A value outside of the domain gives NaN.
        """
        d = self.distribution.event_shape[-1]
        chosen = check_dims(list(given), d)
        transformed = {}
        for dim, value in zip(chosen, given.values(), strict=True):
            one = Selected(self.bijector, [dim], d)
            value = tf.convert_to_tensor(value, self.dtype)[..., tf.newaxis]
            transformed[dim] = one.inverse(value)[..., 0]
        rest = [dim for dim in range(d) if dim not in chosen]
        return self._of(self.distribution.condition(transformed), rest)

    def _of(self, distribution: Any, dims: Sequence[int]) -> Transformed:
        d = self.distribution.event_shape[-1]
        return Transformed(distribution, select(self.bijector, check_dims(dims, d), d))

    def reduce(self, k: int) -> Reduction:
        """Return a density of at most k components, as of a mixture: in the transformed units.

        There the moments are kept; the bound on the divergence holds in all units.
        """
        found = self.distribution.reduce(k)
        return Reduction(Transformed(found.mixture, self.bijector), found.kl_bound)

    def prune(self, min_weight: float) -> Any:
        """Return the density of components that weigh `min_weight` or more: as of a mixture."""
        return Transformed(self.distribution.prune(min_weight), self.bijector)

    def effective_components(self) -> tf.Tensor:
        """Return the exponential of the weights' entropy: [..], from 1 to K."""
        return self.distribution.effective_components()

    def entropy_estimate(self, n: int = 500, seed: Any = 0) -> Entropy:
        """Return the entropy in nats of the units of y, as of a mixture.

        The entropy of u, and the mean of log dy/du, which 64 Gauss-Hermite nodes give.
        """
        found = self.distribution.entropy_estimate(n, seed)
        parameters = self.distribution.mixture_parameters()
        slope = functools.partial(pushforward.log_slope, self.bijector)
        more = tf.reduce_sum(pushforward.expectation(parameters, slope), axis=-1)
        return Entropy(
            found.estimate + more, found.standard_error, found.lower + more, found.upper + more
        )

    def crps(self, y: Any) -> tf.Tensor:
        """Return the continuous ranked probability score of each target, by quadrature.

        Args:
            y: [.., D], also outside of the domain; NaN marks a missing entry.

        Returns:
            [.., D], in the units of y; NaN where y is.

        Source:
            Matheson and Winkler (1976), Scoring rules for continuous probability distributions,
            Management Science 22.
        """
        y = tf.convert_to_tensor(y, self.dtype)
        check_event(y, self.distribution.event_shape[-1])
        missing = tf.math.is_nan(y)
        safe = tf.where(missing, self.bijector.forward(tf.zeros_like(y)), y)
        margins = Margins.of(self.distribution.mixture_parameters())
        found = pushforward.crps(margins, self.bijector, safe, self._inverse(safe))
        return tf.where(missing, tf.constant(np.nan, found.dtype), found)

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
