"""What every density of `mdn` answers, whatever its type: the interface shared by all three.

Shape letters: B batch, D event size, K components.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import tensorflow as tf
from tensorflow_probability import distributions as tfd

from mdn.density import algebra, modes, moments, plain, reduction, regions, scores
from mdn.density import entropy as entropies
from mdn.density.draws import as_seed, draw, temper
from mdn.density.parameters import MixtureParameters, broadcast
from mdn.density.targets import TargetQueries, check_event, check_level
from mdn.errors import DataError

if TYPE_CHECKING:
    from mdn.density.mixture import GaussianMixture


class Reduction(NamedTuple):
    """A mixture with fewer components, and what they cost.

    Attributes:
        mixture: batch [..].
        kl_bound: [..], nats: KL(before || after) is not above it.
    """

    mixture: GaussianMixture
    kl_bound: tf.Tensor


def _check_draws(n: int) -> None:
    if isinstance(n, int) and n < 2:
        raise DataError(f"n={n}: at least two draws have a spread")


class Queries(TargetQueries):
    """Mixed into a TFP distribution; as a tensor the distribution is its mean."""

    diagonal = False  # whether the type holds diagonal covariances only

    mean: Any
    covariance: Any
    batch_shape: Any
    parameters: dict[str, Any]
    parameter_properties: Any

    def log_prob(self, value: Any, name: str = "log_prob", **kwargs: Any) -> tf.Tensor:
        """Return the log density of y.

        Args:
            value: y, [.., D]; NaN marks a missing entry, which is marginalised.
            name: prefix of the operations.
            **kwargs: `complete=True` says that no entry is missing, for a smaller program.

        Returns:
            [..], nats; zero where all D entries are missing.

        Raises:
            DataError: y has not D targets.
        """
        return tfd.Distribution.log_prob(self, value, name, **kwargs)

    def correlation(self) -> tf.Tensor:
        """Return the correlations between the targets: [.., D, D]."""
        return moments.correlation(self.covariance())

    def tensors(self) -> dict[str, tf.Tensor]:
        """Return the tensors that the constructor takes, by name: `type(d)(**d.tensors())`."""
        return {name: getattr(self, name) for name in self.parameter_properties()}

    # ------------------------------------------------------------------ other mixtures

    def as_mixture(self) -> GaussianMixture:
        """Return the density as a mixture with the same form of covariances; K = 1 of a normal."""
        raise NotImplementedError

    def _mixture(self, parameters: MixtureParameters) -> GaussianMixture:
        from mdn.density.mixture import DiagGaussianMixture, GaussianMixture  # subclasses of this

        logits, loc, scale_tril = parameters
        if self.diagonal:
            return DiagGaussianMixture(logits, loc, tf.linalg.diag_part(scale_tril))
        return GaussianMixture(logits, loc, scale_tril)

    def marginal(self, dims: int | Sequence[int]) -> GaussianMixture:
        """Return the density of some of the targets.

        Args:
            dims: targets by number, in the order wanted; negative ones count from the end.

        Returns:
            Batch [..], event [M] of M dims, K components. Of diagonal covariances diagonal.

        Raises:
            DataError: a dim is out of range or named twice, or there is none.
        """
        chosen = [dims] if isinstance(dims, int | np.integer) else list(dims)
        return self._mixture(algebra.marginal(self.mixture_parameters(), chosen))

    def condition(self, given: Mapping[int, Any]) -> GaussianMixture:
        """Return the density of the other targets, given the values of some.

        Args:
            given: from targets by number, in any order, to their values: numbers, or tensors that
                broadcast with the batch [..]; a [B, 1] value of a density with batch [] gives
                batch [B, 1].

        Returns:
            The batch broadcast with the values, event [D - len(given)] in the order that the
            targets have, K components whose weights are those given the values. Of diagonal
            covariances diagonal.

        Raises:
            DataError: a dim is out of range or named twice, or all targets are given.
        """
        return self._mixture(algebra.condition(self.mixture_parameters(), given))

    def affine(self, shift: Any = 0.0, scale: Any = 1.0) -> GaussianMixture:
        """Return the density of scale * y + shift, target by target.

        Args:
            shift: a number or [.., D].
            scale: a number or [.., D], nowhere zero.

        Returns:
            Batch [..], event [D].
        """
        return self._mixture(algebra.affine(self.mixture_parameters(), shift, scale))

    def linear(self, matrix: Any, shift: Any = None) -> GaussianMixture:
        """Return the density of matrix y + shift.

        Args:
            matrix: [.., M, D] of rank M; more rows than D have no density.
            shift: [.., M], or None.

        Returns:
            Batch [..], event [M].

        Raises:
            DataError: the matrix has not D columns, or more rows.
        """
        from mdn.density.mixture import GaussianMixture  # a subclass of this

        return GaussianMixture(*algebra.linear(self.mixture_parameters(), matrix, shift))

    def concat(self, *others: Queries) -> GaussianMixture:
        """Return the mixture of the components of this and other densities, side by side.

        Their weights are as the logits say, all taken together: a density weighs as much as its
        exp(logits) add up to. `mdn.mixture_of` gives each density the same or a given share.

        Args:
            *others: densities of D targets whose batches broadcast with this one's.

        Returns:
            The batches broadcast, as many components as all have, of the type that `mixture_of`
            has.

        Raises:
            DataError: they have different targets or transforms.
        """
        from mdn.density.mixing import join  # of all types

        return join([self, *others])

    def reduce(self, k: int) -> Reduction:
        """Return a mixture of at most k components with the same mean and covariance.

        The pair that costs least is merged, until k are left.

        Args:
            k: at least one.

        Returns:
            `mixture`, batch [..] with min(k, K) components, dense where components were merged;
            and `kl_bound`, [..], an upper bound on KL(this || mixture), in nats.

        Raises:
            DataError: k is less than one.

        Source:
            Runnalls (2007), Kullback-Leibler approach to Gaussian mixture reduction, IEEE
            Transactions on Aerospace and Electronic Systems 43.
        """
        from mdn.density.mixture import GaussianMixture  # a subclass of this

        parameters, bound = reduction.reduce(self.mixture_parameters(), k)
        return Reduction(GaussianMixture(*parameters), bound)

    def prune(self, min_weight: float) -> GaussianMixture:
        """Return the mixture of the components that weigh at least `min_weight`, by weight.

        Args:
            min_weight: between 0 and 1; the heaviest component stays in any case.

        Returns:
            Batch [..], with as many components as the density of the batch that keeps most;
            others are filled up with components of no weight. Inside a `tf.function`, where
            shapes cannot depend on values, all K stay, and those below have no weight.

        Raises:
            DataError: `min_weight` is not between 0 and 1.
        """
        return self._mixture(reduction.prune(self.mixture_parameters(), min_weight))

    def effective_components(self) -> tf.Tensor:
        """Return the exponential of the weights' entropy: [..], from 1 to K."""
        parameters = broadcast(self.mixture_parameters())
        return reduction.effective_components(parameters.logits)

    def responsibilities(self, y: Any) -> tf.Tensor:
        """Return the probability of each component given y.

        Args:
            y: [.., D]; NaN marks a missing entry, which is marginalised.

        Returns:
            [.., K], sums to one.
        """
        from mdn.density.normal import MultivariateNormalTriL  # a subclass of this

        y = tf.convert_to_tensor(y, self.dtype)
        check_event(y, self.event_shape[-1])
        logits, loc, scale_tril = self.mixture_parameters()
        components = MultivariateNormalTriL(loc, scale_tril)
        log_prob = components.log_prob(y[..., tf.newaxis, :])  # [.., K]
        return tf.nn.softmax(tf.nn.log_softmax(logits) + log_prob)

    # ------------------------------------------------------------------ modes and regions

    def mode(self, name: str = "mode", **kwargs: Any) -> tf.Tensor:
        """Return the highest of `modes()`: [.., D]."""
        return tfd.Distribution.mode(self, name, **kwargs)

    def _mode(self) -> tf.Tensor:
        return self.modes().loc[..., 0, :]

    def modes(self) -> modes.Modes:
        """Return the local maxima that a fixed-point iteration reaches from each component.

        Returns:
            `loc` [.., K, D] with the highest first, `log_prob` [.., K], and `mask` [.., K], false
            where a mode was reached before.

        Source:
            Carreira-Perpinan (2000), Mode-finding for mixtures of Gaussian distributions, IEEE
            PAMI 22.
        """
        return modes.find_modes(self.mixture_parameters())

    def hdr(self, level: float | tf.Tensor, n: int = 10_000, seed: Any = 0) -> regions.Region:
        """Return the highest-density region: the smallest that holds a given probability.

        Args:
            level: in (0, 1): the probability of the region.
            n: draws, of several targets; the error of the probability is about
                sqrt(level (1 - level) / n).
            seed: of the draws, an int or int32 [2].

        Returns:
            `log_threshold` [..], the log density that is reached inside. Of one target exact, and
            with `intervals` [.., K, 2], whose union the region is, and `mask` [.., K], which of
            them there are.

        Raises:
            ConfigError: the level is a number out of its range.
            DataError: n is less than two.

        Source:
            Hyndman (1996), Computing and graphing highest density regions, The American
            Statistician 50.
        """
        _check_draws(n)
        check_level(level)
        return self._region(tf.convert_to_tensor(level, self.dtype), n, as_seed(seed))

    def _region(self, level: tf.Tensor, n: int, seed: tf.Tensor) -> regions.Region:
        if self.event_shape[-1] == 1:
            return regions.line_region(self.mixture_parameters(), level)
        return self._sampled_region(level, n, seed)

    def _sampled_region(self, level: tf.Tensor, n: int, seed: tf.Tensor) -> regions.Region:
        log_prob = self.log_prob(self.sample(n, seed))
        return regions.Region(regions.sampled_threshold(log_prob, level))

    def pit(self, y: Any) -> tf.Tensor:
        """Return Rosenblatt's transform of y: each target's rank given those before it.

        Args:
            y: [.., D]; NaN marks a missing entry, on which nothing is conditioned.

        Returns:
            [.., D] in [0, 1], independent and uniform if y has this density; NaN where y is.

        Source:
            Rosenblatt (1952), Remarks on a multivariate transformation, Annals of Mathematical
            Statistics 23.
        """
        y = tf.convert_to_tensor(y, self.dtype)
        check_event(y, self.event_shape[-1])
        return scores.pit(self.mixture_parameters(), y)

    # ------------------------------------------------------------------ draws

    def sample(
        self,
        sample_shape: Any = (),
        seed: Any = None,
        name: str = "sample",
        temperature: float | tf.Tensor = 1.0,
        sigma_temperature: float | tf.Tensor = 1.0,
    ) -> tf.Tensor:
        """Return draws; of a mixture first a component and only then one normal.

        Args:
            sample_shape: n, or a shape.
            seed: an int or an int32 [2], which always give the same draws, or None.
            name: prefix of the operations.
            temperature: the logits are divided by it: below one the heavy components are drawn
                more often, above one the light ones.
            sigma_temperature: the covariances of the components are multiplied by it: near zero
                the draws are their means.

        Returns:
            [*sample_shape, .., D].

        Raises:
            DataError: a temperature is not positive.
        """
        for key, value in (
            ("temperature", temperature),
            ("sigma_temperature", sigma_temperature),
        ):
            if isinstance(value, int | float) and not value > 0.0:
                raise DataError(f"{key}={value}: give a positive number; 1 leaves all as it is")
        return tfd.Distribution.sample(
            self,
            sample_shape,
            seed,
            name,
            temperature=temperature,
            sigma_temperature=sigma_temperature,
        )

    # TFP's normals have a path of their own, without temperatures.
    def _call_sample_n(self, sample_shape: Any, seed: Any, **kwargs: Any) -> tf.Tensor:
        return tfd.Distribution._call_sample_n(self, sample_shape, seed, **kwargs)

    def _sample_n(
        self, n: tf.Tensor, seed: Any, temperature: Any = 1.0, sigma_temperature: Any = 1.0
    ) -> tf.Tensor:
        parameters = self.mixture_parameters()
        for value in (temperature, sigma_temperature):
            if not (isinstance(value, int | float) and value == 1.0):
                parameters = temper(parameters, temperature, sigma_temperature)
                break
        return draw(parameters, n, as_seed(seed))

    # ------------------------------------------------------------------ information

    def entropy(self, name: str = "entropy", **kwargs: Any) -> tf.Tensor:
        """Return the estimate of `entropy_estimate(n=, seed=)`: [..], nats; exact where K = 1."""
        return tfd.Distribution.entropy(self, name, **kwargs)

    def _entropy(self, n: int = 500, seed: Any = 0) -> tf.Tensor:
        return self.entropy_estimate(n, seed).estimate

    def entropy_estimate(self, n: int = 500, seed: Any = 0) -> entropies.Entropy:
        """Return the entropy in nats: estimated by draws, and bounded in closed form.

        Args:
            n: draws from each component, at least two.
            seed: an int or int32 [2].

        Returns:
            `estimate`, its `standard_error`, `lower` and `upper`, [..] each. The estimate is
            unbiased, and exact where K = 1.

        Raises:
            DataError: n is less than two.

        Source:
            Kolchinsky and Tracey (2017), Estimating mixture entropy with pairwise distances,
            Entropy 19; Huber, Bailey, Durrant-Whyte and Hanebeck (2008), On entropy approximation
            for Gaussian mixture random variables, IEEE MFI.
        """
        _check_draws(n)
        parameters = self.mixture_parameters()
        lower, upper = entropies.bounds(parameters)
        return entropies.Entropy(*entropies.estimate(parameters, n, as_seed(seed)), lower, upper)

    def energy_score(self, y: Any, n: int = 100, seed: Any = 0) -> tf.Tensor:
        """Return the energy score E|Y - y| - E|Y - Y'| / 2, estimated without bias by draws.

        Args:
            y: [.., D]; NaN marks a missing entry, which is left out of the distances.
            n: draws, at least two.
            seed: an int or int32 [2].

        Returns:
            [..], in the units of y, which all targets should share. No gradient by the weights.

        Raises:
            DataError: n is less than two, or y has not D targets.

        Source:
            Gneiting and Raftery (2007), Strictly proper scoring rules, prediction, and
            estimation, JASA 102.
        """
        _check_draws(n)
        y = tf.convert_to_tensor(y, self.dtype)
        check_event(y, self.event_shape[-1])
        return scores.energy_score(self.sample(n, as_seed(seed)), y)

    # ------------------------------------------------------------------ plain arrays, text

    def to_dict(self) -> dict[str, Any]:
        """Return the density as plain values: `type`, `dtype`, and each parameter as an array.

        `from_dict` takes it, and lists in place of arrays, as JSON has them.
        """
        tensors = {name: np.asarray(value) for name, value in self.tensors().items()}
        return {"type": type(self).__name__, "dtype": self.dtype.name, **tensors}

    @classmethod
    def from_dict(cls, plain_density: Mapping[str, Any]) -> Any:
        """Return the density that `to_dict` wrote down, of the type that it had.

        Raises:
            DataError: the type is none of mdn's.
        """
        return plain.from_dict(Queries, plain_density)

    def __repr__(self) -> str:
        return plain.describe(self)

    __str__ = __repr__

    # A deterministic answer wherever TensorFlow or NumPy wants a tensor, never a random draw.
    def __tf_tensor__(self, dtype: tf.DType | None = None, name: str | None = None) -> tf.Tensor:
        return tf.convert_to_tensor(self.mean(), dtype, name=name)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.mean(), dtype)
