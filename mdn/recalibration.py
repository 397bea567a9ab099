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

_MOST_ROWS = 20_000
_FOLDS = 5
_LEAST_ROWS = 20
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


def recalibrate(
    model: Any,
    x: Any,
    y: np.ndarray,
    weight: Any = None,
    rows: Sequence[np.ndarray] | None = None,
    seed: int = 0,
) -> RecalibrationFit:
    """Fit a map to what a model says of rows.

    Args:
        model: an `mdn.MDN` without a map.
        x: [N, F], [N, T, F], or a mapping of columns [N].
        y: [N, D] or [N, T, D].
        weight: [N], or None.
        rows: of an ensemble, the row numbers that each member has not learned from, increasing;
            None: all rows are new to all members.
        seed: as for `MDN.recalibrate`.

    Raises:
        DataError: rows that the model cannot learn from, or without any observed target.
    """
    y = np.asarray(y, np.float64)
    model.check_arrays(x, y, weight)
    y = np.asarray(model.known_targets(x, y), np.float64)
    counted = ~np.isnan(y).all(axis=-1)  # [N] or [N, T]
    if weight is not None:
        weight = np.asarray(weight, np.float64)
        counted &= weight.reshape(-1, *[1] * (counted.ndim - 1)) > 0.0
        weight = weight[np.nonzero(counted)[0]]
    if counted.sum() < _LEAST_ROWS:
        raise DataError(
            f"{counted.sum()} rows with an observed target: give at least {_LEAST_ROWS} to "
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
    return fit_recalibration(
        members,
        judged,
        exact,
        model.head.y_scale.numpy().astype(np.float64),
        weight,
        seed,
    )


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


def fit_recalibration(
    members: Sequence[tuple[np.ndarray, Queries]],
    y: np.ndarray,
    exact: np.ndarray,
    units: np.ndarray,
    weight: np.ndarray | None = None,
    seed: int = 0,
) -> RecalibrationFit:
    """Fit a map by the likelihood of rows, if it gains any on rows it was not fitted to.

    The map is fitted by L-BFGS from the identity, and accepted where its gain, cross-fitted over
    five folds, exceeds two standard errors: with few rows there is nothing to be learned.

    Args:
        members: for each member, the rows [n] that it has not learned from and its density there,
            batch [n]; one member for a single model. A row's density is the mixture, in equal
            shares, of those that have it.
        y: [N, D], NaN marks a missing entry; targets on a grid spread over their cells, as no
            scale is narrow enough for ties.
        exact: [N, D], as they were observed: their likelihood must not suffer.
        units: [D], in which the shifts are searched: the standard deviations of y.
        weight: [N], or None.
        seed: of the folds.
    """
    kept = np.sort(np.unique(np.concatenate([rows for rows, _ in members])))
    kept = kept[thin(len(kept), _MOST_ROWS)]
    weight = np.ones(len(y)) if weight is None else weight
    n, d = len(kept), y.shape[-1]
    parts = []
    for rows, density in members:
        place = np.searchsorted(kept, rows)
        known = np.isin(rows, kept)
        tensors = {name: np.asarray(t)[known] for name, t in density.tensors().items()}
        parts.append((place[known], type(density), tensors))
    score = _log_likelihood(parts, y[kept], units)
    weight = weight[kept] / weight[kept].mean()
    identity = np.zeros(2 * d + 1)
    fold = np.random.default_rng([seed, 0x666F6C64]).permutation(n) % _FOLDS
    before, gain = score(identity)[0], np.zeros(n)
    for held_out in (fold == f for f in range(_FOLDS)):
        theta = _minimise(score, np.where(held_out, 0.0, weight), identity)
        gain[held_out] = (score(theta)[0] - before)[held_out]
    mean = float(np.average(gain, weights=weight))
    error = float(np.sqrt(np.sum((weight * (gain - mean)) ** 2)) / weight.sum())
    found = None
    theta = _minimise(score, weight, identity) if mean > 2.0 * error else identity
    plain = _log_likelihood(parts, exact[kept], units)
    if theta.any() and weight @ (plain(theta)[0] - plain(identity)[0]) > 0.0:
        found = Recalibration(
            tuple((theta[:d] * units).tolist()),
            tuple(np.exp(theta[d : 2 * d]).tolist()),
            float(np.exp(theta[-1])),
        )
    return RecalibrationFit(found, mean, error, n)


def _minimise(score: Callable, weight: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Return the unconstrained numbers of the most likely map for weighted rows."""

    def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
        log_prob, slope = score(theta, weight)
        return -float(log_prob @ weight) / weight.sum(), -slope / weight.sum()

    bounds = [(-_WIDEST, _WIDEST)] * len(start)
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
