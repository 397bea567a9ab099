"""Densities of many rows as arrays: some of the rows, and their margins in float64 NumPy.

What is asked of many rows after the network is answered here; nothing imports TensorFlow before
it must.

Shape letters: D event size, K components.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import special

if TYPE_CHECKING:
    from mdn.density.queries import Queries


@dataclasses.dataclass(frozen=True)
class Units:
    """The way between targets and transformed targets, in NumPy.

    Attributes:
        bijector: from transformed targets [.., size] to targets, elementwise.
        size: the number of targets of the bijector.
        dtype: that the bijector computes in.
        targets: those that are meant here, D of them.
    """

    bijector: Any
    size: int
    dtype: Any
    targets: tuple[int, ...]

    def forward(self, u: np.ndarray) -> np.ndarray:
        """Return the targets [.., D] of transformed ones."""
        return self._apply(self.bijector.forward, u, np.zeros(self.size))

    def inverse(self, y: np.ndarray) -> np.ndarray:
        """Return transformed targets [.., D]; infinite outside of the domain, NaN where y is."""
        inner = self._inner()
        with np.errstate(all="ignore"):
            u = self._apply(self.bijector.inverse, y, inner)
        beyond = np.where(y < inner[list(self.targets)], -np.inf, np.inf)
        return np.where(np.isnan(u) & ~np.isnan(y), beyond, u)

    def slope(self, y: np.ndarray) -> np.ndarray:
        """Return du/dy, [.., D]; zero outside of the domain."""

        def log_slope(y: np.ndarray) -> Any:
            return self.bijector.inverse_log_det_jacobian(y, event_ndims=0) + np.zeros_like(y)

        slope = np.exp(self._apply(log_slope, y, self._inner()))
        return np.where(np.isfinite(self.inverse(y)), np.nan_to_num(slope, nan=0.0), 0.0)

    def take(self, targets: Sequence[int]) -> Units:
        """Return the same for some of the D targets."""
        return dataclasses.replace(self, targets=tuple(self.targets[i] for i in targets))

    def _inner(self) -> np.ndarray:
        """Return values inside of the domain, [size]."""
        return np.asarray(self._apply(self.bijector.forward, np.zeros(0), np.zeros(self.size), ()))

    def _apply(
        self,
        function: Callable[[np.ndarray], Any],
        values: np.ndarray,
        others: np.ndarray,
        targets: tuple[int, ...] | None = None,
    ) -> np.ndarray:
        targets = self.targets if targets is None else targets
        full = np.broadcast_to(others, [*values.shape[:-1], self.size]).copy()
        full[..., list(targets)] = values
        found = np.asarray(function(full.astype(self.dtype)), np.float64)
        found = np.broadcast_to(found, full.shape)
        return found[..., list(targets)] if targets else found


@dataclasses.dataclass(frozen=True)
class Margins:
    """The one-dimensional margins of a density: for each target a mixture of K normals.

    Attributes:
        weight: [.., K], sums to one.
        loc: [.., K, D].
        scale: [.., K, D], standard deviations.
        units: of transformed targets, which weight, loc and scale then describe.
    """

    weight: np.ndarray
    loc: np.ndarray
    scale: np.ndarray
    units: Units | None = None

    @classmethod
    def of(cls, density: Queries) -> Margins:
        """Return the margins of a density."""
        logits, loc, scale_tril, units = as_mixture(density)
        scale = np.linalg.norm(scale_tril, axis=-1)
        return cls(special.softmax(logits, axis=-1), loc, scale, units)

    def first(self) -> Margins:
        """Return the margin of the first target."""
        units = None if self.units is None else self.units.take([0])
        return Margins(self.weight, self.loc[..., :1], self.scale[..., :1], units)

    def mean(self) -> np.ndarray:
        """Return the mean, [.., D]; of transformed targets by Gauss-Hermite quadrature."""
        if self.units is None:
            return self._mix(self.loc)
        nodes, weights = np.polynomial.hermite_e.hermegauss(64)
        weights /= weights.sum()
        # Nodes that no number of the dtype can weigh are left out: maps may be infinite there.
        kept = weights > np.finfo(self.units.dtype).tiny
        total = np.zeros(self.loc.shape)
        for node, weight in zip(nodes[kept], weights[kept], strict=True):
            total += weight * self.units.forward(self.loc + node * self.scale)
        return self._mix(total)

    def cdf(self, y: np.ndarray) -> np.ndarray:
        """Return P(Y_d <= y_d) for each d, [.., D], of y [.., D]; NaN where y is."""
        u = y if self.units is None else self.units.inverse(y)
        below = special.ndtr((u[..., np.newaxis, :] - self.loc) / self.scale)
        return np.minimum(self._mix(below), 1.0)  # the weights sum to 1 but for rounding

    def quantile(self, probability: float | np.ndarray) -> np.ndarray:
        """Return the y with cdf(y) = probability, [.., D]; [*S, .., D] of probabilities [*S]."""
        from mdn.density import univariate  # which imports TensorFlow

        with np.errstate(divide="ignore"):
            log_weight = np.log(self.weight)[..., np.newaxis, :]  # of no weight: -inf
        parts = log_weight, np.swapaxes(self.loc, -1, -2), np.swapaxes(self.scale, -1, -2)
        u = univariate.quantile(univariate.Margins(*parts), probability).numpy()
        return u if self.units is None else self.units.forward(u)

    def _mix(self, values: np.ndarray) -> np.ndarray:
        return np.einsum("...k,...kd->...d", self.weight, values)


def as_mixture(density: Queries) -> tuple[np.ndarray, np.ndarray, np.ndarray, Units | None]:
    """Return logits, loc and scale_tril in float64, and the units where targets are transformed.

    The parameters then describe the transformed targets.
    """
    from mdn.density.transformed import split_transform  # which imports TensorFlow

    base, bijector = split_transform(density)
    logits, loc, scale_tril = (np.asarray(p, np.float64) for p in base.mixture_parameters())
    size, dtype = loc.shape[-1], base.dtype.as_numpy_dtype
    units = None if bijector is None else Units(bijector, size, dtype, tuple(range(size)))
    return logits, loc, scale_tril, units


def take_rows(density: Queries, batch: tuple[int, ...], index: Any) -> Queries:
    """Return some rows of a density that is broadcast to a batch; in float64 if it can be."""
    from mdn.density.transformed import rebuilder, split_transform

    base, bijector = split_transform(density)
    properties = base.parameter_properties()
    dtype = np.float64 if bijector is None else base.dtype.as_numpy_dtype
    arrays = {}
    for name, tensor in base.tensors().items():
        array = np.asarray(tensor, dtype)
        event = array.shape[array.ndim - properties[name].event_ndims :]
        arrays[name] = np.broadcast_to(array, (*batch, *event))[index]
    return rebuilder(density)(**arrays)


def join_rows(parts: Sequence[Queries]) -> Queries:
    """Return the densities of several parts, batch [n] each, as one."""
    from mdn.density.transformed import rebuilder

    tensors = [part.tensors() for part in parts]
    arrays = {name: np.concatenate([t[name] for t in tensors]) for name in tensors[0]}
    return rebuilder(parts[0])(**arrays)
