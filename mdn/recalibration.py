"""Fitting a `Recalibration` to rows that a model has not learned from.

Shape letters: N rows, D event size, M ensemble members.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from scipy import optimize

from mdn.data.resolution import grid_steps, spread_over_cells
from mdn.data.splits import thin
from mdn.density.queries import Queries
from mdn.density.recalibration import Recalibration
from mdn.density.transformed import split_transform
from mdn.errors import DataError
from mdn.margins import take_rows

MOST_ROWS = 20_000
_FOLDS = 5
LEAST_ROWS = 20
_STEP = 0.01  # of the logs, for differences of slopes
_WIDEST = 3.0  # of the log of a scale, and of the sharpness; far beyond what helps


@dataclasses.dataclass(frozen=True)
class RecalibrationFit:
    """What recalibrating is worth, and the map if it is worth anything.

    Attributes:
        map: or None, where it gains less than two standard errors, or nothing at all on targets
            as they were observed.
        gain: nats per row, each row judged by a map that was fitted to other rows.
        gain_se: its standard error.
        n: rows.
    """

    map: Recalibration | None
    gain: float
    gain_se: float
    n: int

    def __str__(self) -> str:
        worth = f"{self.gain:+.4f} ± {self.gain_se:.4f} nats per row on {self.n:,} held-out rows"
        if self.map is None:
            return f"not recalibrated: no gain that is beyond doubt ({worth})"
        numbers = {
            "scales": ", ".join(f"{s:.3g}" for s in self.map.scale),
            "shifts": ", ".join(f"{s:+.3g}" for s in self.map.shift),
            "sharpness": f"{self.map.sharpness:.3g}",
        }
        return f"recalibrated ({'; '.join(f'{k} {v}' for k, v in numbers.items())}): {worth}"

    def metrics(self, targets: Sequence[str]) -> dict[str, float]:
        """Return flat keys: gain, gain_se, and of a map that is taken its numbers."""
        found = {"gain": self.gain, "gain_se": self.gain_se, "taken": float(self.map is not None)}
        if self.map is not None:
            for name, scale, shift in zip(targets, self.map.scale, self.map.shift, strict=True):
                found |= {f"scale/{name}": scale, f"shift/{name}": shift}
            found["sharpness"] = self.map.sharpness
        return found


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """What models say of rows that they have not learned from.

    Attributes:
        members: of each member, the rows [n] that are new to it, increasing, and its density
            there, in transformed units, batch [n]. A row's density is the mixture, in equal
            shares, of those that have it.
        y: [N, D] in the same units, NaN marks a missing entry; targets on a grid spread over their
            cells, as no scale is narrow enough for ties.
        exact: [N, D], as they were observed.
        units: [D], in which shifts are searched: the standard deviations of y.
        weight: [N].
    """

    members: Sequence[tuple[np.ndarray, Queries]]
    y: np.ndarray
    exact: np.ndarray
    units: np.ndarray
    weight: np.ndarray

    def likelihoods(self) -> tuple[Callable, Callable, np.ndarray]:
        """Return the likelihood of y and of the exact y, see `_log_likelihood`, and weights.

        They are of all rows that any member has, or of evenly many among them; the weights [n]
        have mean 1.
        """
        kept = np.unique(np.concatenate([rows for rows, _ in self.members]))
        kept = kept[thin(len(kept), MOST_ROWS)]
        parts = []
        for rows, density in self.members:
            place = np.searchsorted(kept, rows)
            known = np.isin(rows, kept)
            tensors = {name: np.asarray(t)[known] for name, t in density.tensors().items()}
            parts.append((place[known], type(density), tensors))
        weight = self.weight[kept] / self.weight[kept].mean()
        y, exact = (_log_likelihood(parts, v[kept], self.units) for v in (self.y, self.exact))
        return y, exact, weight


def hold_out(
    model: Any,
    x: Any,
    y: np.ndarray,
    weight: Any = None,
    rows: Sequence[np.ndarray] | None = None,
    seed: int = 0,
) -> HeldOut:
    """Return what a model says of rows.

    Args:
        model: an `mdn.MDN` without a map.
        x: [N, F], [N, T, F], or a mapping of columns [N].
        y: [N, D] or [N, T, D].
        weight: [N], or None.
        rows: of an ensemble, the row numbers that each member has not learned from, increasing;
            None: all rows are new to all members.
        seed: of the points in the cells of targets on a grid.

    Raises:
        DataError: rows that the model cannot learn from, or without any observed target.
    """
    y = np.asarray(y, np.float64)
    model.check_arrays(x, y, weight)
    y = np.asarray(model.known_targets(x, y), np.float64)
    counted = ~np.isnan(y).all(axis=-1)  # [N] or [N, T]
    if weight is None:
        weight = np.ones(counted.sum())
    else:
        weight = np.asarray(weight, np.float64)
        counted &= weight.reshape(-1, *[1] * (counted.ndim - 1)) > 0.0
        weight = weight[np.nonzero(counted)[0]]
    if counted.sum() < LEAST_ROWS:
        raise DataError(
            f"{counted.sum()} rows with an observed target: give at least {LEAST_ROWS} to "
            "recalibrate by, better hundreds"
        )
    place = np.cumsum(counted.ravel()).reshape(counted.shape) - 1  # of a row that counts
    members = []
    for index, density in model.member_answers(x, rows):
        base, bijector = split_transform(density)
        here = counted[index]
        members.append((place[index][here], take_rows(base, here.shape, here)))
    judged, exact = (
        _in_units(values, y[counted], bijector, base.dtype)
        for values in (_spread(y[counted], model.head.grid, seed), y[counted])
    )
    return HeldOut(members, judged, exact, model.head.y_scale.numpy().astype(np.float64), weight)


def _spread(y: np.ndarray, grid: Sequence[float] | None, seed: int) -> np.ndarray:
    """Return y [N, D] spread over the cells of its grid; of a loaded model, as these rows show."""
    return spread_over_cells(y, grid_steps(y) if grid is None else np.asarray(grid), seed)


def _in_units(values: np.ndarray, y: np.ndarray, bijector: Any, dtype: Any) -> np.ndarray:
    """Return [N, D] values near y in transformed units; those of y where they have none."""
    if bijector is None:
        return values
    found, given = (
        bijector.inverse(tf.constant(v, dtype)).numpy().astype(np.float64) for v in (values, y)
    )
    return np.where(np.isfinite(found), found, given)


def fit_recalibration(held_out: HeldOut, seed: int = 0) -> RecalibrationFit:
    """Fit a map by the likelihood of rows, if it gains any on rows it was not fitted to.

    The map is fitted by L-BFGS from the identity, and accepted where its gain, cross-fitted over
    five folds, exceeds two standard errors, with few rows there is nothing to be learned, and the
    likelihood of targets as they were observed does not suffer.

    Args:
        held_out: the rows.
        seed: of the folds.
    """
    score, plain, weight = held_out.likelihoods()
    n, d = len(weight), held_out.y.shape[-1]
    identity = np.zeros(2 * d + 1)
    fold = np.random.default_rng([seed, 0x666F6C64]).permutation(n) % _FOLDS
    before, gain = score(identity)[0], np.zeros(n)
    for judged in (fold == f for f in range(_FOLDS)):
        theta = _minimise(score, np.where(judged, 0.0, weight), identity)
        gain[judged] = (score(theta)[0] - before)[judged]
    mean = float(np.average(gain, weights=weight))
    error = float(np.sqrt(np.sum((weight * (gain - mean)) ** 2)) / weight.sum())
    found = None
    theta = _minimise(score, weight, identity) if mean > 2.0 * error else identity
    if theta.any() and weight @ (plain(theta)[0] - plain(identity)[0]) > 0.0:
        found = Recalibration(
            tuple((theta[:d] * held_out.units).tolist()),
            tuple(np.exp(theta[d : 2 * d]).tolist()),
            float(np.exp(theta[-1])),
        )
    return RecalibrationFit(found, mean, error, n)


def fit_spread(held_out: HeldOut) -> tuple[np.ndarray, np.ndarray]:
    """Return the logs of the D scales and of the sharpness that are most likely, without shifts.

    Returns:
        [D + 1], and their variances [D + 1] by the curvature of the likelihood.
    """
    score, _, weight = held_out.likelihoods()
    d = held_out.y.shape[-1]
    free = np.arange(2 * d + 1) >= d
    theta = _minimise(score, weight, np.zeros(2 * d + 1), free)
    moved = np.eye(2 * d + 1)[free] * _STEP
    slopes = [(score(theta + s, weight)[1] - score(theta - s, weight)[1])[free] for s in moved]
    # What the rows say nothing about has hardly a curvature, and so an endless variance.
    information = np.maximum(-np.diag(slopes) / (2.0 * _STEP), np.finfo(float).tiny)
    return theta[free], 1.0 / information


def _minimise(
    score: Callable, weight: np.ndarray, start: np.ndarray, free: Any = True
) -> np.ndarray:
    """Return the unconstrained numbers of the most likely map for weighted rows, where free."""

    def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
        log_prob, slope = score(theta, weight)
        return -float(log_prob @ weight) / weight.sum(), -slope / weight.sum()

    reach = np.where(free, _WIDEST, 0.0) * np.ones(len(start))
    bounds = np.stack([-reach, reach], axis=1)
    return optimize.minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds).x


def _log_likelihood(
    parts: Sequence[tuple[np.ndarray, type[Queries], dict[str, np.ndarray]]],
    y: np.ndarray,
    units: np.ndarray,
) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """Return the function from a map's numbers to log densities [N] and their sum's slope."""
    n, d = y.shape
    count = np.zeros(n)
    for rows, *_ in parts:
        count[rows] += 1.0

    @tf.function(autograph=False)
    def log_prob(theta: tf.Tensor, weight: tf.Tensor) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(theta)
            found = Recalibration(
                theta[:d] * units, tf.exp(theta[d : 2 * d]), tf.exp(theta[2 * d])
            )
            whole = []
            for rows, kind, tensors in parts:
                one = found.apply(kind(**tensors)).log_prob(y[rows])
                # A row that the member has learned from adds nothing.
                full = tf.tensor_scatter_nd_update(
                    tf.fill([n], tf.constant(-np.inf, one.dtype)), rows[:, np.newaxis], one
                )
                whole.append(full)
            rows_log_prob = tf.reduce_logsumexp(tf.stack(whole), axis=0) - np.log(count)
            total = tf.reduce_sum(weight * rows_log_prob)
        slope = tape.gradient(total, theta, unconnected_gradients="zero")
        return rows_log_prob, slope

    def evaluate(
        theta: np.ndarray, weight: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        weight = np.ones(n) if weight is None else weight
        found = log_prob(tf.constant(theta, tf.float64), tf.constant(weight, tf.float64))
        return found[0].numpy(), found[1].numpy()

    return evaluate
