"""Gaussians and their mixtures with covariances diag(s^2) + W W^T, W [D, R], for large D.

With A = W / s and u = (y - loc) / s, Woodbury's identity and the determinant lemma are statements
about the least-squares problem [A; I] z = [u; 0]: the squared Mahalanobis distance is its residual
sum of squares, |u - A z|^2 + |z|^2 at the best z, and det(I + A^T A) is the squared volume of its
columns. It is solved by modified Gram-Schmidt, which takes O(D R^2), and neither subtracts two
large numbers nor forms I + A^T A, whose condition number is the square of the problem's.

A missing entry of y is a row that is left out, so that marginalising it is exact and free.

Shape letters: B batch, D event size, K components, R rank.

Source:
    Bjoerck (1967), Solving linear least squares problems by Gram-Schmidt orthogonalization, BIT 7;
    Woodbury (1950), Inverting modified matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf
from tensorflow_probability import distributions as tfd
from tensorflow_probability.python.internal import dtype_util, parameter_properties

from mdn.density.factors import lower_factor
from mdn.density.gaussian import LOG_2_PI
from mdn.density.mixture import GaussianMixture
from mdn.density.normal import one_component
from mdn.density.parameters import MixtureParameters
from mdn.density.queries import Queries
from mdn.density.targets import check_event
from mdn.density.univariate import Margins


def low_rank_log_prob(
    y: tf.Tensor, loc: tf.Tensor, scale_diag: tf.Tensor, factor: tf.Tensor
) -> tf.Tensor:
    """Return log N(y; loc, diag(scale_diag^2) + factor factor^T) of the entries that are there.

    Args:
        y: [.., D], NaN marks a missing entry.
        loc: [.., D], broadcasts with y.
        scale_diag: [.., D], positive.
        factor: [.., D, R].

    Returns:
        [..], nats. Zero where all D entries are missing.
    """
    y = tf.ensure_shape(y, y.shape[:-1].concatenate(scale_diag.shape[-1:]))
    missing = tf.math.is_nan(y)
    residual = tf.where(missing, tf.zeros_like(y), y - loc)
    observed = tf.cast(~missing, y.dtype)
    white = factor / scale_diag[..., tf.newaxis] * observed[..., tf.newaxis]  # [.., D, R]
    columns = tf.unstack(white, axis=-1)
    constant = tf.reduce_sum(observed * (0.5 * LOG_2_PI + tf.math.log(scale_diag)), axis=-1)
    return white_log_density(residual / scale_diag, columns, axis=-1) - constant


def white_log_density(u: tf.Tensor, columns: list[tf.Tensor], axis: int) -> tf.Tensor:
    """Return -u^T (I + A A^T)^-1 u / 2 - log det(I + A A^T) / 2.

    Args:
        u: [.., D, ..], D at `axis`.
        columns: the columns of A, R >= 1 tensors [.., D, ..].
        axis: of D.

    Returns:
        The shape of u without `axis`.
    """
    shape = tf.broadcast_dynamic_shape(tf.shape(u), tf.shape(columns[0]))
    static = tf.broadcast_static_shape(u.shape, columns[0].shape)
    parts = [tf.ensure_shape(tf.broadcast_to(part, shape), static) for part in (u, *columns)]
    return _white_log_density(axis, *parts)


def _white_log_density(axis: int, u: tf.Tensor, *columns: tf.Tensor) -> tf.Tensor:
    rank, d = len(columns), u.shape[axis]

    def product(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum(a * b, axis=axis, keepdims=True)

    @tf.custom_gradient
    def log_density(u: tf.Tensor, *columns: tf.Tensor) -> tuple[tf.Tensor, Callable]:
        zero = tf.zeros_like(product(u, u))  # [.., 1, ..]
        one = tf.ones_like(zero)
        rest = tf.concat([u, *[zero] * rank], axis)  # [u; 0], in the end [u - A z; -z]
        basis: list[tf.Tensor] = []
        log_volume = zero
        for i, column in enumerate(columns):
            unit = [one if i == j else zero for j in range(rank)]
            column = tf.concat([column, *unit], axis)  # [.., D + R, ..], of [A; I]
            for direction in basis:
                column -= product(column, direction) * direction
            length = tf.sqrt(product(column, column))
            basis.append(column / length)
            rest -= product(rest, basis[-1]) * basis[-1]
            log_volume += tf.math.log(length)
        value = -0.5 * product(rest, rest) - log_volume

        def gradient(upstream: tf.Tensor) -> list[tf.Tensor]:
            # With [A; I] = Q R in blocks Q1 and Q2 = R^-1: by u it is -(u - A z), and by A
            # (u - A z) z^T - A (I + A^T A)^-1, of which the last is Q1 Q2^T.
            upstream = tf.expand_dims(upstream, axis)
            above, *below = tf.split(rest, [d, *[1] * rank], axis)
            by_columns = [-above * z for z in below]
            for direction in basis:
                first, *second = tf.split(direction, [d, *[1] * rank], axis)
                by_columns = [b - first * q for b, q in zip(by_columns, second, strict=True)]
            return [upstream * g for g in (-above, *by_columns)]

        return tf.squeeze(value, axis), gradient

    return log_density(u, *columns)


class MultivariateNormalLowRank(Queries, tfd.MultivariateNormalDiagPlusLowRankCovariance):
    """A multivariate normal with the covariance diag(scale_diag^2) + factor factor^T.

    Its `log_prob` marginalises NaN entries, in O(D R^2).

    Args:
        loc: [.., D], the mean.
        scale_diag: [.., D], standard deviations of the part that the targets do not share.
        factor: [.., D, R].
        validate_args: check the parameters at run time, as in TFP.
        allow_nan_stats: as in TFP.
        name: prefix of the operations.
    """

    def __init__(
        self,
        loc: Any,
        scale_diag: Any,
        factor: Any,
        validate_args: bool = False,
        allow_nan_stats: bool = True,
        name: str = "MultivariateNormalLowRank",
    ) -> None:
        parameters = dict(locals())
        with tf.name_scope(name) as name:
            dtype = dtype_util.common_dtype([loc, scale_diag, factor], tf.float32)
            self._scale_diag = tf.convert_to_tensor(scale_diag, dtype)
            tfd.MultivariateNormalDiagPlusLowRankCovariance.__init__(
                self,
                loc=tf.convert_to_tensor(loc, dtype),
                cov_diag_factor=tf.square(self._scale_diag),
                cov_perturb_factor=tf.convert_to_tensor(factor, dtype),
                validate_args=validate_args,
                allow_nan_stats=allow_nan_stats,
                name=name,
            )
            self._parameters = parameters

    _composite_tensor_nonshape_params = ("loc", "scale_diag", "factor")

    @classmethod
    def _parameter_properties(cls, dtype: Any, num_classes: Any = None) -> dict[str, Any]:
        return {
            "loc": parameter_properties.ParameterProperties(event_ndims=1),
            "scale_diag": parameter_properties.ParameterProperties(event_ndims=1),
            "factor": parameter_properties.ParameterProperties(event_ndims=2),
        }

    def _log_prob(self, y: tf.Tensor, complete: bool = False) -> tf.Tensor:
        check_event(y, self.loc.shape[-1])
        return low_rank_log_prob(y, self.loc, self.scale_diag, self.factor)

    def _mean(self) -> tf.Tensor:
        return self.loc + tf.zeros_like(self.scale_diag)

    def _variance(self) -> tf.Tensor:
        variance = tf.square(self.scale_diag) + tf.reduce_sum(tf.square(self.factor), axis=-1)
        return variance + tf.zeros_like(self.loc)

    def _stddev(self) -> tf.Tensor:
        return tf.sqrt(self._variance())

    @property
    def scale_diag(self) -> tf.Tensor:
        """[.., D], standard deviations of the part that the targets do not share."""
        return self._scale_diag

    @property
    def factor(self) -> tf.Tensor:
        """[.., D, R], W: what the targets share has the covariance W W^T."""
        return self.cov_perturb_factor

    @property
    def scale_tril(self) -> tf.Tensor:
        """[.., D, D], the Cholesky factor of the covariance, computed when asked for."""
        rows = [tf.linalg.diag(self.scale_diag), tf.linalg.matrix_transpose(self.factor)]
        return lower_factor(tf.concat(rows, axis=-2))

    def mixture_parameters(self) -> MixtureParameters:
        return one_component(self.loc, self.scale_tril)

    def as_mixture(self) -> LowRankGaussianMixture:
        loc = self.loc[..., tf.newaxis, :]
        scale_diag, factor = (
            self.scale_diag[..., tf.newaxis, :],
            self.factor[..., tf.newaxis, :, :],
        )
        return LowRankGaussianMixture(tf.zeros_like(loc[..., 0]), loc, scale_diag, factor)

    def _margins(self) -> Margins:
        return self.as_mixture()._margins()


class LowRankGaussianMixture(GaussianMixture):
    """A `GaussianMixture` that stores and evaluates low-rank covariances, O(K D R) numbers.

    The covariance of a component is diag(scale_diag^2) + factor factor^T; `scale_tril` is computed
    when asked for.

    Args:
        logits: [.., K], unnormalised log weights.
        loc: [.., K, D], component means.
        scale_diag: [.., K, D], standard deviations of the part that the targets do not share.
        factor: [.., K, D, R].
        validate_args: check the parameters at run time, as in TFP.
        allow_nan_stats: as in TFP.
        name: prefix of the operations.
    """

    def __init__(
        self,
        logits: Any,
        loc: Any,
        scale_diag: Any,
        factor: Any,
        validate_args: bool = False,
        allow_nan_stats: bool = True,
        name: str = "LowRankGaussianMixture",
    ) -> None:
        self._assemble(dict(locals()), MultivariateNormalLowRank, scale_diag, factor)

    @classmethod
    def _parameter_properties(cls, dtype: Any, num_classes: Any = None) -> dict[str, Any]:
        return {
            "logits": parameter_properties.ParameterProperties(event_ndims=1),
            "loc": parameter_properties.ParameterProperties(event_ndims=2),
            "scale_diag": parameter_properties.ParameterProperties(event_ndims=2),
            "factor": parameter_properties.ParameterProperties(event_ndims=3),
        }

    @property
    def scale_diag(self) -> tf.Tensor:
        """[.., K, D], standard deviations of the part that the targets do not share."""
        return self.components_distribution.scale_diag

    @property
    def factor(self) -> tf.Tensor:
        """[.., K, D, R], W: what the targets share has the covariance W W^T."""
        return self.components_distribution.factor

    def _margins(self) -> Margins:
        """Return the margins without `scale_tril`, which takes O(D^3)."""
        parts = tf.concat([self.scale_diag[..., tf.newaxis], self.factor], axis=-1)
        return Margins.of_rows(self.logits, self.loc, parts)
