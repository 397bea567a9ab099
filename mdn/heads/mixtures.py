"""Heads that return a mixture of K normals.

Shape letters: B batch, D event size, K components, P parameters, R rank.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_probability as tfp

from mdn.density import GaussianMixture
from mdn.density import positivity as scales
from mdn.density.packed import packed_low_rank_log_prob, packed_precision_log_prob
from mdn.density.precision import invert_factor
from mdn.errors import ConfigError
from mdn.heads.base import Head, register


class MixtureHead(Head):
    """A head with K components.

    Args:
        event_size: D, the number of targets.
        components: K.
        **kwargs: as for `Head`.
    """

    def __init__(self, event_size: int, components: int = 3, **kwargs: Any) -> None:
        if components < 1:
            raise ConfigError(f"components={components}: a mixture needs at least one (k=1)")
        self._components = int(components)
        super().__init__(event_size, **kwargs)

    @property
    def components(self) -> int:
        return self._components

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "components": self.components}


@register
class Mixture(MixtureHead):
    """K normals with full covariances: `mdn.GaussianMixture`."""

    @property
    def layout(self) -> dict[str, tuple[int, ...]]:
        k, d = self.components, self.event_size
        return {"logits": (k,), "loc": (k, d), "unconstrained_scale": (k, d * (d + 1) // 2)}

    def _density(self, params: tf.Tensor) -> GaussianMixture:
        parts = self.split(params)
        return GaussianMixture(
            parts["logits"],
            self._loc(parts["loc"]),
            self._scale_tril(parts["unconstrained_scale"]),  # [.., K, D, D]
        )

    def _parameters_of(self, distribution: Any) -> tf.Tensor:
        return self.join(
            {
                "logits": distribution.logits,
                "loc": self._loc_inverse(distribution.loc),
                "unconstrained_scale": self._scale_tril_inverse(distribution.scale_tril),
            }
        )

    def _from_gaussians(self, logits, loc, scale_tril):
        return GaussianMixture(logits, loc, scale_tril)


@register
class MixtureDiag(MixtureHead):
    """K normals with diagonal covariances: `mdn.GaussianMixture`, evaluated in O(K D)."""

    @property
    def layout(self) -> dict[str, tuple[int, ...]]:
        k, d = self.components, self.event_size
        return {"logits": (k,), "loc": (k, d), "unconstrained_scale": (k, d)}

    def _density(self, params: tf.Tensor) -> GaussianMixture:
        parts = self.split(params)
        return GaussianMixture.from_diag(
            parts["logits"],
            self._loc(parts["loc"]),
            self._scale_diag(parts["unconstrained_scale"]),  # [.., K, D]
        )

    def _parameters_of(self, distribution: Any) -> tf.Tensor:
        return self.join(
            {
                "logits": distribution.logits,
                "loc": self._loc_inverse(distribution.loc),
                "unconstrained_scale": self._scale_diag_inverse(distribution.scale_diag),
            }
        )

    def _from_gaussians(self, logits, loc, scale_tril):
        return GaussianMixture.from_diag(logits, loc, tf.norm(scale_tril, axis=-1))


@register
class MixturePrecision(MixtureHead):
    """K normals by the Cholesky factors P of their precisions: `mdn.GaussianMixture`.

    The densities are those of `Mixture`, and training solves no system: the log density takes
    products with P alone. 1 / P_ii is the standard deviation of y_i given the targets behind it.
    The floor of the scales (`min_scale`, or the width of a step where targets are tied) is a
    lower bound of it, a cap on P_ii, so that no density can collapse; and `min_scale` is also a
    floor of P_ii, so that no scale exceeds 1 / min_scale standard deviations of the target.

    Args:
        event_size: D, the number of targets.
        components: K.
        **kwargs: as for `Head`.
    """

    @property
    def layout(self) -> dict[str, tuple[int, ...]]:
        k, d = self.components, self.event_size
        return {"logits": (k,), "loc": (k, d), "unconstrained_precision": (k, d * (d + 1) // 2)}

    def _density(self, params: tf.Tensor) -> GaussianMixture:
        parts = self.split(params)
        unit = scales.fill_diagonal(
            parts["unconstrained_precision"],
            lambda raw: scales.precision_diag(raw, *self._precision_bounds),
        )
        return GaussianMixture.from_precision_tril(
            parts["logits"],
            self._loc(parts["loc"]),
            unit / self.y_scale[:, tf.newaxis],  # [.., K, D, D]
        )

    def _parameters_of(self, distribution: Any) -> tf.Tensor:
        unit = distribution.precision_tril * self.y_scale[:, tf.newaxis]
        raw = scales.precision_diag_inverse(tf.linalg.diag_part(unit), *self._precision_bounds)
        triangle = tf.linalg.set_diag(unit, raw)
        return self.join(
            {
                "logits": distribution.logits,
                "loc": self._loc_inverse(distribution.loc),
                "unconstrained_precision": tfp.math.fill_triangular_inverse(triangle),
            }
        )

    @property
    def _precision_bounds(self) -> tuple[str, float, tf.Tensor]:
        return self.positivity, self.min_scale, self.floor

    def _packed_log_prob(self, residual, parts):
        raw = parts["unconstrained_precision"]
        return packed_precision_log_prob(residual, raw, *self._precision_bounds)

    def _from_gaussians(self, logits, loc, scale_tril):
        unit = invert_factor(scale_tril / self.y_scale[:, tf.newaxis])
        widest = tf.constant(2.0 * self.min_scale, self.dtype)
        narrowest = tf.constant(1.0 / self._narrowest_start, self.dtype)  # [D]
        diagonal = tf.clip_by_value(tf.linalg.diag_part(unit), widest, narrowest)
        unit = tf.linalg.set_diag(unit, diagonal)
        return GaussianMixture.from_precision_tril(logits, loc, unit / self.y_scale[:, tf.newaxis])


@register
class MixtureLowRank(MixtureHead):
    """K normals with covariances diag(s^2) + W W^T, W [D, R]: `mdn.GaussianMixture`.

    Each takes O(D R) parameters and O(D R^2) time, for D in the hundreds. The floor of the scales
    is that of s, so that no density can collapse.

    Args:
        event_size: D, the number of targets.
        components: K.
        rank: R, the number of shared directions; from D - 1 on all covariances are in reach.
        **kwargs: as for `Head`.

    Raises:
        ConfigError: an argument is out of its range.
    """

    def __init__(self, event_size: int, components: int = 3, rank: int = 2, **kwargs: Any) -> None:
        if rank < 1:
            raise ConfigError(f"rank={rank}: must be at least 1; without any use MixtureDiag")
        self._rank = int(rank)
        super().__init__(event_size, components, **kwargs)

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def layout(self) -> dict[str, tuple[int, ...]]:
        k, d = self.components, self.event_size
        return {
            "logits": (k,),
            "loc": (k, d),
            "unconstrained_scale": (k, d),
            "factor": (k, d, self.rank),
        }

    def _density(self, params: tf.Tensor) -> GaussianMixture:
        parts = self.split(params)
        return GaussianMixture.from_low_rank(
            parts["logits"],
            self._loc(parts["loc"]),
            self._scale_diag(parts["unconstrained_scale"]),  # [.., K, D]
            self.y_scale[:, tf.newaxis] * parts["factor"],  # [.., K, D, R]
        )

    def _parameters_of(self, distribution: Any) -> tf.Tensor:
        return self.join(
            {
                "logits": distribution.logits,
                "loc": self._loc_inverse(distribution.loc),
                "unconstrained_scale": self._scale_diag_inverse(distribution.scale_diag),
                "factor": distribution.factor / self.y_scale[:, tf.newaxis],
            }
        )

    def _packed_log_prob(self, residual, parts):
        m, n = residual.shape[0], tf.shape(residual)[2]
        factor = tf.reshape(parts["factor"], [m, self.event_size, self.rank, n])
        raw = parts["unconstrained_scale"]
        return packed_low_rank_log_prob(residual, raw, factor, self.positivity, self.floor)

    def _from_gaussians(self, logits, loc, scale_tril):
        """Return the density with the leading principal axes as factors, and the same variances.

        At least half of an axis' variance is shared, as a factor of zero would have no gradient;
        and no more than half where no axis is left to say how much is not.

        Source:
            Tipping and Bishop (1999), Probabilistic principal component analysis, JRSS B 61.
        """
        unit = scale_tril.numpy() / self.y_scale.numpy()[:, np.newaxis]  # [K, D, D]
        covariance = np.einsum("kij,klj->kil", unit, unit)
        values, axes = (a[..., ::-1] for a in np.linalg.eigh(covariance))  # the largest first
        rank = min(self.rank, self.event_size)
        shared = 0.5 * values[:, :rank]
        if rank < self.event_size:
            rest = values[:, rank:].mean(axis=-1, keepdims=True)
            shared = np.maximum(shared, values[:, :rank] - rest)
        factor = np.zeros([*covariance.shape[:2], self.rank])
        factor[..., :rank] = axes[..., :rank] * np.sqrt(shared)[:, np.newaxis]
        own = np.einsum("kdd->kd", covariance) - np.square(factor).sum(axis=-1)
        scale = np.maximum(np.sqrt(np.maximum(own, 0.0)), self._narrowest_start)
        y_scale = self.y_scale.numpy()
        return GaussianMixture.from_low_rank(
            logits,
            loc,
            tf.constant(y_scale * scale, self.dtype),
            tf.constant(y_scale[:, np.newaxis] * factor, self.dtype),
        )

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "rank": self.rank}
