"""Heads that return one normal.

Shape letters: D event size, K components, P parameters.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from mdn.density import MultivariateNormalDiag, MultivariateNormalTriL
from mdn.heads.base import Head, register


@register
class Diag(Head):
    """One normal with a diagonal covariance: `mdn.density.MultivariateNormalDiag`."""

    @property
    def layout(self) -> dict[str, tuple[int, ...]]:
        d = self.event_size
        return {"loc": (d,), "unconstrained_scale": (d,)}

    def _density(self, params: tf.Tensor) -> MultivariateNormalDiag:
        parts = self.split(params)
        return MultivariateNormalDiag(
            self._loc(parts["loc"]), self._scale_diag(parts["unconstrained_scale"])
        )

    def _parameters_of(self, distribution: Any) -> tf.Tensor:
        return self.join(
            {
                "loc": self._loc_inverse(distribution.loc),
                "unconstrained_scale": self._scale_diag_inverse(distribution.scale_diag),
            }
        )

    def _from_gaussians(self, logits, loc, scale_tril):
        return MultivariateNormalDiag(loc[0], tf.norm(scale_tril[0], axis=-1))


@register
class TriL(Head):
    """One normal with a full covariance: `mdn.density.MultivariateNormalTriL`."""

    @property
    def layout(self) -> dict[str, tuple[int, ...]]:
        d = self.event_size
        return {"loc": (d,), "unconstrained_scale": (d * (d + 1) // 2,)}

    def _density(self, params: tf.Tensor) -> MultivariateNormalTriL:
        parts = self.split(params)
        return MultivariateNormalTriL(
            self._loc(parts["loc"]), self._scale_tril(parts["unconstrained_scale"])
        )

    def _parameters_of(self, distribution: Any) -> tf.Tensor:
        return self.join(
            {
                "loc": self._loc_inverse(distribution.loc),
                "unconstrained_scale": self._scale_tril_inverse(distribution.scale_tril),
            }
        )

    def _from_gaussians(self, logits, loc, scale_tril):
        return MultivariateNormalTriL(loc[0], scale_tril[0])
