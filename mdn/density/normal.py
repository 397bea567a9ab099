"""Multivariate normals that marginalise missing entries and answer what a mixture answers.

Shape letters: D event size.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf
from tensorflow_probability import distributions as tfd

from mdn.density.gaussian import diag_log_prob, tril_log_prob
from mdn.density.parameters import MixtureParameters
from mdn.density.queries import Queries
from mdn.density.targets import check_event


class MultivariateNormalDiag(Queries, tfd.MultivariateNormalDiag):
    """`tfd.MultivariateNormalDiag` whose `log_prob` marginalises NaN entries.

    Args:
        loc: [.., D], the mean.
        scale_diag: [.., D], the standard deviations.
    """

    diagonal = True

    def _log_prob(self, y: tf.Tensor, complete: bool = False) -> tf.Tensor:
        check_event(y, self.loc.shape[-1])
        return diag_log_prob(y, self.loc, self.scale_diag)

    # Zeros of the other parameter give each moment the batch of both.

    def _mean(self) -> tf.Tensor:
        return self.loc + tf.zeros_like(self.scale_diag)

    def _stddev(self) -> tf.Tensor:
        return tf.abs(self.scale_diag) + tf.zeros_like(self.loc)

    def _variance(self) -> tf.Tensor:
        return tf.square(self._stddev())

    def _covariance(self) -> tf.Tensor:
        return tf.linalg.diag(self._variance())

    @property
    def scale_diag(self) -> tf.Tensor:
        """[.., D], the standard deviations."""
        return self._scale_diag

    def mixture_parameters(self) -> MixtureParameters:
        return one_component(self.loc, tf.linalg.diag(self.scale_diag))

    def as_mixture(self) -> Any:
        from mdn.density.mixture import DiagGaussianMixture  # whose components are such normals

        loc = self.loc[..., tf.newaxis, :]
        scale_diag = self.scale_diag[..., tf.newaxis, :]
        return DiagGaussianMixture(tf.zeros_like(loc[..., 0]), loc, scale_diag)


class MultivariateNormalTriL(Queries, tfd.MultivariateNormalTriL):
    """`tfd.MultivariateNormalTriL` whose `log_prob` marginalises NaN entries.

    `log_prob(y, complete=True)` does not look for them: a smaller program, for y that has none.

    Args:
        loc: [.., D], the mean.
        scale_tril: [.., D, D], the Cholesky factor of the covariance.
    """

    def _log_prob(self, y: tf.Tensor, complete: bool = False) -> tf.Tensor:
        check_event(y, self.loc.shape[-1])
        return tril_log_prob(y, self.loc, self.scale_tril, complete)

    # Zeros of the other parameter give each moment the batch of both.

    def _mean(self) -> tf.Tensor:
        return self.loc + tf.zeros_like(self.scale_tril[..., 0])

    def _variance(self) -> tf.Tensor:
        rows = tf.linalg.band_part(self.scale_tril, -1, 0)
        return tf.reduce_sum(tf.square(rows), axis=-1) + tf.zeros_like(self.loc)

    def _stddev(self) -> tf.Tensor:
        return tf.sqrt(self._variance())

    def _covariance(self) -> tf.Tensor:
        factor = tf.linalg.band_part(self.scale_tril, -1, 0)
        covariance = tf.linalg.matmul(factor, factor, transpose_b=True)
        return covariance + tf.zeros_like(self.loc)[..., tf.newaxis]

    def mixture_parameters(self) -> MixtureParameters:
        return one_component(self.loc, self.scale_tril)

    def as_mixture(self) -> Any:
        from mdn.density.mixture import GaussianMixture  # whose components are such normals

        return GaussianMixture(*self.mixture_parameters())


def one_component(loc: tf.Tensor, scale_tril: tf.Tensor) -> MixtureParameters:
    loc = loc[..., tf.newaxis, :]  # [.., 1, D]
    return MixtureParameters(tf.zeros_like(loc[..., 0]), loc, scale_tril[..., tf.newaxis, :, :])
