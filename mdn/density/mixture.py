"""The Gaussian mixture that a mixture density network returns.

Shape letters: B batch, D event size, K components.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf
from tensorflow_probability import distributions as tfd
from tensorflow_probability.python.distributions import kullback_leibler
from tensorflow_probability.python.internal import dtype_util, parameter_properties

from mdn.density.normal import MultivariateNormalDiag, MultivariateNormalTriL
from mdn.density.parameters import MixtureParameters
from mdn.density.queries import Queries


class GaussianMixture(Queries, tfd.MixtureSameFamily):
    """A mixture of K multivariate normals, a `tfd.MixtureSameFamily` built from plain tensors.

    Its `log_prob` marginalises NaN entries, its moments are closed forms, and as a tensor it is
    its mean. `log_prob(y, complete=True)` does not look for NaN: a smaller program, for y that has
    none.

    Args:
        logits: [.., K], unnormalised log weights.
        loc: [.., K, D], component means.
        scale_tril: [.., K, D, D], Cholesky factors of the component covariances.
        validate_args: check the parameters at run time, as in TFP.
        allow_nan_stats: as in TFP.
        name: prefix of the operations.
    """

    def __init__(
        self,
        logits: Any,
        loc: Any,
        scale_tril: Any,
        validate_args: bool = False,
        allow_nan_stats: bool = True,
        name: str = "GaussianMixture",
    ) -> None:
        self._assemble(dict(locals()), MultivariateNormalTriL, scale_tril)

    def _assemble(self, parameters: dict[str, Any], kind: type, *scale: Any) -> None:
        """Make the TFP mixture whose components are `kind(loc, *scale)`."""
        with tf.name_scope(parameters["name"]) as name:
            values = (parameters["logits"], parameters["loc"], *scale)
            dtype = dtype_util.common_dtype(values, tf.float32)
            logits, loc, *scales = (tf.convert_to_tensor(value, dtype) for value in values)
            check = parameters["validate_args"]
            tfd.MixtureSameFamily.__init__(
                self,
                tfd.Categorical(logits=logits),
                kind(loc, *scales, validate_args=check),
                validate_args=check,
                allow_nan_stats=parameters["allow_nan_stats"],
                name=name,
            )
            self._parameters = self._no_dependency(parameters)

    @classmethod
    def from_diag(cls, logits: Any, loc: Any, scale_diag: Any) -> GaussianMixture:
        """Return a mixture whose components have diagonal covariances.

        Args:
            logits: [.., K].
            loc: [.., K, D].
            scale_diag: [.., K, D], standard deviations.
        """
        return DiagGaussianMixture(logits, loc, scale_diag)

    @classmethod
    def from_low_rank(cls, logits: Any, loc: Any, scale_diag: Any, factor: Any) -> GaussianMixture:
        """Return a mixture whose covariances are diag(scale_diag^2) + factor factor^T.

        Args:
            logits: [.., K].
            loc: [.., K, D].
            scale_diag: [.., K, D], positive.
            factor: [.., K, D, R].
        """
        from mdn.density.low_rank import LowRankGaussianMixture  # a subclass of this one

        return LowRankGaussianMixture(logits, loc, scale_diag, factor)

    @classmethod
    def from_precision_tril(cls, logits: Any, loc: Any, precision_tril: Any) -> GaussianMixture:
        """Return a mixture by the Cholesky factors P of the component precisions P P^T.

        Args:
            logits: [.., K].
            loc: [.., K, D].
            precision_tril: [.., K, D, D], lower triangular with a positive diagonal.
        """
        from mdn.density.precision import PrecisionGaussianMixture  # a subclass of this one

        return PrecisionGaussianMixture(logits, loc, precision_tril)

    @classmethod
    def _parameter_properties(cls, dtype: Any, num_classes: Any = None) -> dict[str, Any]:
        return {
            "logits": parameter_properties.ParameterProperties(event_ndims=1),
            "loc": parameter_properties.ParameterProperties(event_ndims=2),
            "scale_tril": parameter_properties.ParameterProperties(event_ndims=3),
        }

    def _log_prob(self, y: tf.Tensor, complete: bool = False) -> tf.Tensor:
        components = self.components_distribution
        joint = components.log_prob(y[..., tf.newaxis, :], complete=complete)  # [.., K]
        return tf.reduce_logsumexp(joint + tf.nn.log_softmax(self.logits), axis=-1)

    # The moments by the law of total variance. TFP's own take hundreds of operations to find the
    # shapes of a batch that is not static; here the arithmetic broadcasts.

    def _weights(self) -> tf.Tensor:
        """Return the weights, [.., K, 1]."""
        return tf.nn.softmax(self.logits)[..., tf.newaxis]

    def _mean(self) -> tf.Tensor:
        return tf.reduce_sum(self._weights() * self.components_distribution.mean(), axis=-2)

    def _variance(self) -> tf.Tensor:
        weights, components = self._weights(), self.components_distribution
        loc, variance = components.mean(), components.variance()  # [.., K, D]
        mean = tf.reduce_sum(weights * loc, axis=-2, keepdims=True)
        return tf.reduce_sum(weights * (variance + tf.square(loc - mean)), axis=-2)

    def _covariance(self) -> tf.Tensor:
        weights, components = self._weights(), self.components_distribution
        loc = components.mean()  # [.., K, D]
        residual = loc - tf.reduce_sum(weights * loc, axis=-2, keepdims=True)
        spread = residual[..., tf.newaxis] * residual[..., tf.newaxis, :]
        return tf.reduce_sum(
            weights[..., tf.newaxis] * (components.covariance() + spread), axis=-3
        )

    @property
    def logits(self) -> tf.Tensor:
        """[.., K], unnormalised log weights."""
        return self.mixture_distribution.logits

    @property
    def loc(self) -> tf.Tensor:
        """[.., K, D], component means."""
        return self.components_distribution.loc

    @property
    def scale_tril(self) -> tf.Tensor:
        """[.., K, D, D], Cholesky factors of the component covariances."""
        return self.components_distribution.scale_tril

    def mixture_parameters(self) -> MixtureParameters:
        return MixtureParameters(self.logits, self.loc, self.scale_tril)

    def as_mixture(self) -> GaussianMixture:
        return self


@kullback_leibler.RegisterKL(GaussianMixture, GaussianMixture)
def _kl_one_component(
    a: GaussianMixture, b: GaussianMixture, name: str | None = None
) -> tf.Tensor:
    """Return KL(a || b), [..], of mixtures with one component each; others have no closed form."""
    if a.logits.shape[-1] != 1 or b.logits.shape[-1] != 1:
        raise NotImplementedError("KL of mixtures has no closed form unless K = 1")
    one = a.components_distribution.kl_divergence(b.components_distribution, name=name)
    return one[..., 0]


class DiagGaussianMixture(GaussianMixture):
    """A `GaussianMixture` that stores and evaluates diagonal covariances in O(K D).

    Args:
        logits: [.., K], unnormalised log weights.
        loc: [.., K, D], component means.
        scale_diag: [.., K, D], component standard deviations.
        validate_args: check the parameters at run time, as in TFP.
        allow_nan_stats: as in TFP.
        name: prefix of the operations.
    """

    diagonal = True

    def __init__(
        self,
        logits: Any,
        loc: Any,
        scale_diag: Any,
        validate_args: bool = False,
        allow_nan_stats: bool = True,
        name: str = "DiagGaussianMixture",
    ) -> None:
        self._assemble(dict(locals()), MultivariateNormalDiag, scale_diag)

    @classmethod
    def _parameter_properties(cls, dtype: Any, num_classes: Any = None) -> dict[str, Any]:
        return {
            "logits": parameter_properties.ParameterProperties(event_ndims=1),
            "loc": parameter_properties.ParameterProperties(event_ndims=2),
            "scale_diag": parameter_properties.ParameterProperties(event_ndims=2),
        }

    @property
    def scale_diag(self) -> tf.Tensor:
        """[.., K, D], component standard deviations."""
        return self.components_distribution.scale_diag

    @property
    def scale_tril(self) -> tf.Tensor:
        """[.., K, D, D], diagonal Cholesky factors."""
        return tf.linalg.diag(self.scale_diag)
