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
from mdn.density.gaussian import LOG_2_PI
from mdn.density.packed import packed_low_rank_log_prob, packed_precision_log_prob
from mdn.density.precision import invert_factor
from mdn.errors import ConfigError
from mdn.fitting.start import Start, centre
from mdn.heads.base import Head, register

BACKGROUND_SCALE = 1.5  # standard deviations of the targets
BACKGROUNDS = ("auto", "learned")
MOST_WEIGHT = 0.01  # of a background whose weight is found or learned
PSEUDO_ROWS = 10.0
STARTS = ("clusters", "centre")


class MixtureHead(Head):
    """A head with K components, and perhaps one more that is fixed: the background.

    The background is a normal about the mean of the targets, independent in each of them, with
    one and a half times their standard deviations. However sure the others are of themselves, no
    target that is far from them all then costs more than its log weight.

    Args:
        event_size: D, the number of targets.
        components: K.
        background: the weight of the background, between 0 (there is none) and 1; "auto", which
            `adapt` sets to 10 / N but 0.01 at most, as the more rows there are the less they
            leave to chance; or "learned", a function of x that starts at 0.01.
        start: what `adapt` starts the components from: "clusters" of the targets; or "centre",
            K normals of all widths about their mean, which are as good at any x.
        **kwargs: as for `Head`.

    Raises:
        ConfigError: an argument is out of its range.
    """

    def __init__(
        self,
        event_size: int,
        components: int = 3,
        *,
        background: float | str = 0.0,
        start: str = "clusters",
        **kwargs: Any,
    ) -> None:
        if components < 1:
            raise ConfigError(f"components={components}: a mixture needs at least one (k=1)")
        if start not in STARTS:
            raise ConfigError(f"start={start!r}: must be one of {', '.join(STARTS)}")
        if background not in BACKGROUNDS and (
            isinstance(background, str) or not 0.0 <= background < 1.0
        ):
            raise ConfigError(
                f"background={background}: must be at least 0 and below 1, or one of "
                f"{', '.join(BACKGROUNDS)}"
            )
        self._components = int(components)
        self.background, self.start = background, start
        super().__init__(event_size, **kwargs)

    def _add_statistics(self) -> None:
        super()._add_statistics()
        if self.background != 0.0:
            given = self.background
            weight = MOST_WEIGHT if isinstance(given, str) else given
            self.background_weight = self._statistic("background_weight", [], weight)

    @property
    def statistics(self) -> dict[str, tf.Variable]:
        own = {} if self.background == 0.0 else {"background_weight": self.background_weight}
        return {**super().statistics, **own}

    def _adapt_background(self, rows: int) -> None:
        if self.background == "auto":
            self.background_weight.assign(min(MOST_WEIGHT, PSEUDO_ROWS / rows))

    @property
    def components(self) -> int:
        """K, without the background."""
        return self._components

    @property
    def fixed_components(self) -> int:
        return int(self.background != 0.0)

    @property
    def _logits_size(self) -> int:
        return self.components + (self.background == "learned")

    def get_config(self) -> dict[str, Any]:
        own = {"components": self.components, "background": self.background, "start": self.start}
        return {**super().get_config(), **own}

    def _start(self, y: np.ndarray, rng: np.random.Generator) -> Start:
        return centre(y, self.components) if self.start == "centre" else super()._start(y, rng)

    # ------------------------------------------------------------------ background

    def _with_background(
        self, logits: tf.Tensor, loc: tf.Tensor, *scales: tuple[tf.Tensor, tf.Tensor]
    ) -> list[tf.Tensor]:
        """Return logits, loc and scales of the mixture, the background behind the K components.

        Args:
            logits: [.., K], or [.., K + 1] where the weight is learned.
            loc: [.., K, D].
            *scales: for each tensor [.., K, *event] what the background has there, [*event].
        """
        if self.background == 0.0:
            return [logits, loc, *(scale for scale, _ in scales)]
        if logits.shape[-1] == self.components:
            weight = self.background_weight
            logits = tf.nn.log_softmax(logits) + tf.math.log1p(-weight)
            last = tf.zeros_like(logits[..., :1]) + tf.math.log(weight)
            logits = tf.concat([logits, last], axis=-1)
        joined = []
        for tensor, row in ((loc, self.y_loc), *scales):
            axis = tensor.shape.rank - row.shape.rank - 1  # of K
            last = tf.zeros_like(tf.gather(tensor, [0], axis=axis)) + row
            joined.append(tf.concat([tensor, last], axis=axis))
        return [logits, *joined]

    def _without_background(
        self, logits: tf.Tensor, loc: tf.Tensor, *scales: tf.Tensor
    ) -> list[tf.Tensor]:
        """Return what `_with_background` was given, the logits up to a constant."""
        k, rank = self.components, logits.shape.rank
        rest = [tf.gather(t, tf.range(k), axis=rank - 1) for t in (loc, *scales)]
        return [logits[..., : self._logits_size], *rest]

    def _mixed_log_prob(self, log_prob, logits, unit):
        if self.background == 0.0:
            mixed = tf.reduce_logsumexp(logits + log_prob, axis=1)
            return mixed - tf.reduce_logsumexp(logits, axis=1)
        z = unit / BACKGROUND_SCALE
        constant = np.log(BACKGROUND_SCALE) + 0.5 * LOG_2_PI
        behind = -tf.reduce_sum(0.5 * tf.square(z) + constant, axis=1)  # [M, B]
        if self.background == "learned":
            log_prob = tf.concat([log_prob, behind[:, tf.newaxis]], axis=1)
            mixed = tf.reduce_logsumexp(logits + log_prob, axis=1)
            return mixed - tf.reduce_logsumexp(logits, axis=1)
        mixed = tf.reduce_logsumexp(logits + log_prob, axis=1)
        mixed += tf.math.log1p(-self.background_weight) - tf.reduce_logsumexp(logits, axis=1)
        behind += tf.math.log(self.background_weight)
        return tf.reduce_logsumexp(tf.stack([mixed, behind]), axis=0)

    @property
    def _background_scale(self) -> tf.Tensor:
        """[D], the standard deviations of the background."""
        return BACKGROUND_SCALE * self.y_scale


@register
class Mixture(MixtureHead):
    """K normals with full covariances: `mdn.GaussianMixture`."""

    @property
    def layout(self) -> dict[str, tuple[int, ...]]:
        k, d = self.components, self.event_size
        return {
            "logits": (self._logits_size,),
            "loc": (k, d),
            "unconstrained_scale": (k, d * (d + 1) // 2),
        }

    def _density(self, params: tf.Tensor) -> GaussianMixture:
        parts = self.split(params)
        scale_tril = self._scale_tril(parts["unconstrained_scale"])  # [.., K, D, D]
        return self._from_gaussians(parts["logits"], self._loc(parts["loc"]), scale_tril)

    def _parameters_of(self, distribution: Any) -> tf.Tensor:
        logits, loc, scale_tril = self._without_background(
            distribution.logits, distribution.loc, distribution.scale_tril
        )
        return self.join(
            {
                "logits": logits,
                "loc": self._loc_inverse(loc),
                "unconstrained_scale": self._scale_tril_inverse(scale_tril),
            }
        )

    def _from_gaussians(self, logits, loc, scale_tril):
        behind = tf.linalg.diag(self._background_scale)
        return GaussianMixture(*self._with_background(logits, loc, (scale_tril, behind)))


@register
class MixtureDiag(MixtureHead):
    """K normals with diagonal covariances: `mdn.GaussianMixture`, evaluated in O(K D)."""

    @property
    def layout(self) -> dict[str, tuple[int, ...]]:
        k, d = self.components, self.event_size
        return {"logits": (self._logits_size,), "loc": (k, d), "unconstrained_scale": (k, d)}

    def _density(self, params: tf.Tensor) -> GaussianMixture:
        parts = self.split(params)
        scale_diag = self._scale_diag(parts["unconstrained_scale"])  # [.., K, D]
        return self._from_diag(parts["logits"], self._loc(parts["loc"]), scale_diag)

    def _from_diag(self, logits: tf.Tensor, loc: tf.Tensor, scale: tf.Tensor) -> GaussianMixture:
        behind = self._background_scale
        return GaussianMixture.from_diag(*self._with_background(logits, loc, (scale, behind)))

    def _parameters_of(self, distribution: Any) -> tf.Tensor:
        logits, loc, scale_diag = self._without_background(
            distribution.logits, distribution.loc, distribution.scale_diag
        )
        return self.join(
            {
                "logits": logits,
                "loc": self._loc_inverse(loc),
                "unconstrained_scale": self._scale_diag_inverse(scale_diag),
            }
        )

    def _from_gaussians(self, logits, loc, scale_tril):
        return self._from_diag(logits, loc, tf.norm(scale_tril, axis=-1))


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
        return {
            "logits": (self._logits_size,),
            "loc": (k, d),
            "unconstrained_precision": (k, d * (d + 1) // 2),
        }

    def _density(self, params: tf.Tensor) -> GaussianMixture:
        parts = self.split(params)
        unit = scales.fill_diagonal(
            parts["unconstrained_precision"],
            lambda raw: scales.precision_diag(raw, *self._precision_bounds),
        )
        factor = unit / self.y_scale[:, tf.newaxis]  # [.., K, D, D]
        return self._from_precisions(parts["logits"], self._loc(parts["loc"]), factor)

    def _from_precisions(
        self, logits: tf.Tensor, loc: tf.Tensor, factor: tf.Tensor
    ) -> GaussianMixture:
        behind = tf.linalg.diag(1.0 / self._background_scale)
        return GaussianMixture.from_precision_tril(
            *self._with_background(logits, loc, (factor, behind))
        )

    def _parameters_of(self, distribution: Any) -> tf.Tensor:
        logits, loc, factor = self._without_background(
            distribution.logits, distribution.loc, distribution.precision_tril
        )
        unit = factor * self.y_scale[:, tf.newaxis]
        raw = scales.precision_diag_inverse(tf.linalg.diag_part(unit), *self._precision_bounds)
        triangle = tf.linalg.set_diag(unit, raw)
        return self.join(
            {
                "logits": logits,
                "loc": self._loc_inverse(loc),
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
        return self._from_precisions(logits, loc, unit / self.y_scale[:, tf.newaxis])


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
            "logits": (self._logits_size,),
            "loc": (k, d),
            "unconstrained_scale": (k, d),
            "factor": (k, d, self.rank),
        }

    def _density(self, params: tf.Tensor) -> GaussianMixture:
        parts = self.split(params)
        scale_diag = self._scale_diag(parts["unconstrained_scale"])  # [.., K, D]
        factor = self.y_scale[:, tf.newaxis] * parts["factor"]  # [.., K, D, R]
        return self._from_factors(parts["logits"], self._loc(parts["loc"]), scale_diag, factor)

    def _from_factors(
        self, logits: tf.Tensor, loc: tf.Tensor, scale_diag: tf.Tensor, factor: tf.Tensor
    ) -> GaussianMixture:
        none = tf.zeros([self.event_size, self.rank], self.dtype)
        parts = (scale_diag, self._background_scale), (factor, none)
        return GaussianMixture.from_low_rank(*self._with_background(logits, loc, *parts))

    def _parameters_of(self, distribution: Any) -> tf.Tensor:
        logits, loc, scale_diag, factor = self._without_background(
            distribution.logits, distribution.loc, distribution.scale_diag, distribution.factor
        )
        return self.join(
            {
                "logits": logits,
                "loc": self._loc_inverse(loc),
                "unconstrained_scale": self._scale_diag_inverse(scale_diag),
                "factor": factor / self.y_scale[:, tf.newaxis],
            }
        )

    def _packed_log_prob(self, residual, parts):
        raw, factor = parts["unconstrained_scale"], parts["factor"]
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
        return self._from_factors(
            logits,
            loc,
            tf.constant(y_scale * scale, self.dtype),
            tf.constant(y_scale[:, np.newaxis] * factor, self.dtype),
        )

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "rank": self.rank}
