"""Gaussians and their mixtures by the Cholesky factors of the precisions: products, no solve.

The precision, the inverse of the covariance, is P P^T with P lower triangular. Then
z = P^T (y - loc) is white, and z_i / P_ii is the residual of y_i given the targets behind it:
1 / P_ii is the standard deviation of y_i given y_{i+1}, .., y_D.

Shape letters: B batch, D event size, K components.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf
from tensorflow_probability import distributions as tfd
from tensorflow_probability.python.internal import dtype_util, parameter_properties

from mdn.density.factors import lower_factor
from mdn.density.gaussian import LOG_2_PI, diag_log_prob
from mdn.density.mixture import GaussianMixture
from mdn.density.normal import one_component
from mdn.density.parameters import MixtureParameters
from mdn.density.queries import Queries
from mdn.density.targets import check_event


def precision_log_prob(
    y: tf.Tensor, loc: tf.Tensor, precision_tril: tf.Tensor, complete: bool = False
) -> tf.Tensor:
    """Return log N(y; loc, (P P^T)^-1) of the entries of y that are there.

    Only a batch that has a missing entry pays for the marginalisation.

    Args:
        y: [.., D], NaN marks a missing entry.
        loc: [.., D], broadcasts with y.
        precision_tril: [.., D, D], P: lower triangular with a positive diagonal.
        complete: no entry of y is missing, and the program need not be ready for any.

    Returns:
        [..], nats. Zero where all D entries are missing.
    """
    if precision_tril.shape[-1] == 1:
        return diag_log_prob(y, loc, 1.0 / precision_tril[..., 0])
    missing = tf.math.is_nan(y)
    residual = tf.where(missing, tf.zeros_like(y), y - loc)  # [.., D]
    if complete:
        return _full_log_prob(residual, precision_tril)
    return _log_prob(residual, missing, precision_tril)


@tf.custom_gradient
def _log_prob(
    residual: tf.Tensor, missing: tf.Tensor, precision_tril: tf.Tensor
) -> tuple[tf.Tensor, Callable]:
    # The gradient of `tf.cond` is not left to TensorFlow: XLA cannot compile it where the batch
    # is not static.
    some = tf.reduce_any(missing)

    def marginal() -> tf.Tensor:
        return _marginal_log_prob(residual, missing, precision_tril)

    def full() -> tf.Tensor:
        return _full_log_prob(residual, precision_tril)

    def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, None, tf.Tensor]:
        def of(log_prob: Callable[[], tf.Tensor]) -> list[tf.Tensor]:
            with tf.GradientTape() as tape:
                tape.watch([residual, precision_tril])
                again = log_prob()
            return tape.gradient(again, [residual, precision_tril], upstream)

        by_residual, by_factor = tf.cond(some, lambda: of(marginal), lambda: of(full))
        return by_residual, None, by_factor

    return tf.cond(some, marginal, full), gradient


def _full_log_prob(residual: tf.Tensor, precision_tril: tf.Tensor) -> tf.Tensor:
    z = tf.linalg.matvec(precision_tril, residual, transpose_a=True)  # [.., D]
    log_diag = tf.math.log(tf.linalg.diag_part(precision_tril))
    return tf.reduce_sum(log_diag - 0.5 * (tf.square(z) + LOG_2_PI), axis=-1)


def _marginal_log_prob(
    residual: tf.Tensor, missing: tf.Tensor, precision_tril: tf.Tensor
) -> tf.Tensor:
    """Return the log density of the observed entries, without a loop over patterns.

    Integrated over the missing residuals r_m, exp(-|z|^2 / 2) leaves of z = P^T r what is
    orthogonal to the rows of P that belong to r_m, and one over their volume. The rows are made
    orthogonal one after the other (modified Gram-Schmidt), so that neither the covariance nor a
    block of the precision is formed, whose condition numbers are squares.
    """
    missing = tf.stop_gradient(missing)
    z = tf.linalg.matvec(precision_tril, residual, transpose_a=True)  # [.., D]
    rows = tf.where(missing[..., tf.newaxis], precision_tril, tf.zeros_like(precision_tril))
    log_volume = tf.reduce_sum(tf.math.log(tf.linalg.diag_part(precision_tril)), axis=-1)
    for i in range(precision_tril.shape[-1]):
        absent = missing[..., i]  # [..]
        row = rows[..., 0, :]
        one = tf.ones_like(row[..., 0])
        length = tf.sqrt(tf.where(absent, tf.reduce_sum(tf.square(row), axis=-1), one))
        direction = row / length[..., tf.newaxis]  # [.., D], zero where y_i is there
        z -= tf.reduce_sum(z * direction, axis=-1, keepdims=True) * direction
        log_volume -= tf.math.log(length)
        share = tf.linalg.matvec(rows[..., 1:, :], direction)  # [.., D - i - 1]
        rows = rows[..., 1:, :] - share[..., tf.newaxis] * direction[..., tf.newaxis, :]
    observed = tf.reduce_sum(tf.cast(~missing, z.dtype), axis=-1)
    log_prob = log_volume - 0.5 * (tf.reduce_sum(tf.square(z), axis=-1) + LOG_2_PI * observed)
    return tf.where(observed > 0, log_prob, tf.zeros_like(log_prob))


def invert_factor(factor: tf.Tensor) -> tf.Tensor:
    """Return the lower triangular G with G G^T = (F F^T)^-1: `scale_tril` from P, and P from it.

    By an orthogonal decomposition of F^-1, so that F F^T, whose condition number is the square of
    the factor's, is never formed.

    Args:
        factor: [.., D, D], F: lower triangular with a positive diagonal.

    Returns:
        [.., D, D], with a positive diagonal.
    """
    eye = tf.eye(factor.shape[-1], dtype=factor.dtype)
    inverse = tf.linalg.triangular_solve(factor, tf.broadcast_to(eye, tf.shape(factor)))
    return lower_factor(inverse)


class MultivariateNormalPrecision(Queries, tfd.MultivariateNormalLinearOperator):
    """A multivariate normal by the Cholesky factor of its precision.

    Its `log_prob` marginalises NaN entries; `complete` is as in `MultivariateNormalTriL`.

    Args:
        loc: [.., D], the mean.
        precision_tril: [.., D, D], P: the precision is P P^T.
        validate_args: check the parameters at run time, as in TFP.
        allow_nan_stats: as in TFP.
        name: prefix of the operations.
    """

    def __init__(
        self,
        loc: Any,
        precision_tril: Any,
        validate_args: bool = False,
        allow_nan_stats: bool = True,
        name: str = "MultivariateNormalPrecision",
    ) -> None:
        parameters = dict(locals())
        with tf.name_scope(name) as name:
            dtype = dtype_util.common_dtype([loc, precision_tril], tf.float32)
            loc = tf.convert_to_tensor(loc, dtype)
            self._precision_tril = tf.convert_to_tensor(precision_tril, dtype)
            # y = loc + P^-T noise.
            factor = tf.linalg.LinearOperatorLowerTriangular(
                self._precision_tril, is_non_singular=True
            )
            tfd.MultivariateNormalLinearOperator.__init__(
                self,
                loc=loc,
                scale=factor.adjoint().inverse(),
                validate_args=validate_args,
                allow_nan_stats=allow_nan_stats,
                name=name,
            )
            self._parameters = parameters

    _composite_tensor_nonshape_params = ("loc", "precision_tril")

    @classmethod
    def _parameter_properties(cls, dtype: Any, num_classes: Any = None) -> dict[str, Any]:
        return {
            "loc": parameter_properties.ParameterProperties(event_ndims=1),
            "precision_tril": parameter_properties.ParameterProperties(event_ndims=2),
        }

    def _log_prob(self, y: tf.Tensor, complete: bool = False) -> tf.Tensor:
        check_event(y, self.loc.shape[-1])
        return precision_log_prob(y, self.loc, self.precision_tril, complete)

    def _mean(self) -> tf.Tensor:
        return self.loc + tf.zeros_like(self.precision_tril[..., 0])

    def _variance(self) -> tf.Tensor:
        variance = tf.reduce_sum(tf.square(self.scale_tril), axis=-1)
        return variance + tf.zeros_like(self.loc)

    def _stddev(self) -> tf.Tensor:
        return tf.sqrt(self._variance())

    @property
    def precision_tril(self) -> tf.Tensor:
        """[.., D, D], the Cholesky factor P of the precision P P^T."""
        return self._precision_tril

    @property
    def scale_tril(self) -> tf.Tensor:
        """[.., D, D], the Cholesky factor of the covariance, computed when asked for."""
        return invert_factor(self.precision_tril)

    def mixture_parameters(self) -> MixtureParameters:
        return one_component(self.loc, self.scale_tril)

    def as_mixture(self) -> PrecisionGaussianMixture:
        loc = self.loc[..., tf.newaxis, :]
        factor = self.precision_tril[..., tf.newaxis, :, :]
        return PrecisionGaussianMixture(tf.zeros_like(loc[..., 0]), loc, factor)


class PrecisionGaussianMixture(GaussianMixture):
    """A `GaussianMixture` that keeps the Cholesky factors of the component precisions.

    Its `log_prob` takes products only; `scale_tril` is computed when asked for.

    Args:
        logits: [.., K], unnormalised log weights.
        loc: [.., K, D], component means.
        precision_tril: [.., K, D, D], P: the precision of a component is P P^T.
        validate_args: check the parameters at run time, as in TFP.
        allow_nan_stats: as in TFP.
        name: prefix of the operations.
    """

    def __init__(
        self,
        logits: Any,
        loc: Any,
        precision_tril: Any,
        validate_args: bool = False,
        allow_nan_stats: bool = True,
        name: str = "PrecisionGaussianMixture",
    ) -> None:
        self._assemble(dict(locals()), MultivariateNormalPrecision, precision_tril)

    @classmethod
    def _parameter_properties(cls, dtype: Any, num_classes: Any = None) -> dict[str, Any]:
        return {
            "logits": parameter_properties.ParameterProperties(event_ndims=1),
            "loc": parameter_properties.ParameterProperties(event_ndims=2),
            "precision_tril": parameter_properties.ParameterProperties(event_ndims=3),
        }

    @property
    def precision_tril(self) -> tf.Tensor:
        """[.., K, D, D], Cholesky factors of the component precisions."""
        return self.components_distribution.precision_tril
