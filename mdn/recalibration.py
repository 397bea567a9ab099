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
        members: of each member, the rows [n] that are new to it, and its density there, in
            transformed units, batch [n]. A row's density is the mixture of those that have it.
        y: [N, D] in the same units, NaN marks a missing entry; targets on a grid spread over their
            cells, as no scale is narrow enough for ties.
        exact: [N, D], as they were observed.
        units: [D], in which shifts are searched: the standard deviations of y.
        weight: [N].
        kept: components at the end that no map changes.
        shares: of the members, positive; None: equal.
    """

    members: Sequence[tuple[np.ndarray, Queries]]
    y: np.ndarray
    exact: np.ndarray
    units: np.ndarray
    weight: np.ndarray
    kept: int = 0
    shares: Sequence[float] | None = None

    def likelihoods(self) -> tuple[Callable, Callable, np.ndarray]:
        """Return the likelihood of y and of the exact y, see `_log_likelihood`, and weights.

        They are of all rows that any member has, or of evenly many among them; the weights [n]
        have mean 1.
        """
        judged = np.unique(np.concatenate([rows for rows, _ in self.members]))
        judged = judged[thin(len(judged), _MOST_ROWS)]
        shares = [1.0] * len(self.members) if self.shares is None else self.shares
        parts: list[_Part] = []
        for (rows, density), share in zip(self.members, shares, strict=True):
            place = np.searchsorted(judged, rows)
            known = np.isin(rows, judged)
            tensors = {name: np.asarray(t)[known] for name, t in density.tensors().items()}
            parts = _joined(parts, _Part(place[known], type(density), tensors, share))
        weight = self.weight[judged] / self.weight[judged].mean()
        y, exact = (
            _log_likelihood(parts, v[judged], self.units, self.kept) for v in (self.y, self.exact)
        )
        return y, exact, weight


@dataclasses.dataclass(frozen=True)
class _Part:
    """What a member says of the rows that it has, and its share."""

    rows: np.ndarray
    kind: type[Queries]
    tensors: dict[str, np.ndarray]
    share: float


def _joined(parts: list[_Part], part: _Part) -> list[_Part]:
    """Return parts with one more, or with more rows of the last where they are other rows."""
    if not parts:
        return [part]
    *before, last = parts
    shapes = [{k: t.shape[1:] for k, t in one.tensors.items()} for one in (last, part)]
    same = last.kind is part.kind and last.share == part.share and shapes[0] == shapes[1]
    if not same or np.isin(part.rows, last.rows).any():
        return [*parts, part]
    tensors = {k: np.concatenate([last.tensors[k], t]) for k, t in part.tensors.items()}
    return [*before, _Part(np.append(last.rows, part.rows), part.kind, tensors, part.share)]


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
        model: an `mdn.MDN`; a map of its own is part of what it says.
        x: [N, F], [N, T, F], or a mapping of columns [N].
        y: [N, D] or [N, T, D].
        weight: [N], or None.
        rows: of an ensemble, the row numbers that each member has not learned from, increasing;
            None: all rows are new to all members.
        seed: of the points in the cells of targets on a grid.
    """
    y = np.asarray(model.known_targets(x, np.asarray(y, np.float64)), np.float64)
    counted = ~np.isnan(y).all(axis=-1)  # [N] or [N, T]
    if weight is None:
        weight = np.ones(counted.sum())
    else:
        weight = np.asarray(weight, np.float64)
        counted &= weight.reshape(-1, *[1] * (counted.ndim - 1)) > 0.0
        weight = weight[np.nonzero(counted)[0]]
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
    units = model.head.y_scale.numpy().astype(np.float64)
    return HeldOut(members, judged, exact, units, weight, model.fixed_components)


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

    Raises:
        DataError: there are hardly any rows.
    """
    if len(held_out.y) < LEAST_ROWS:
        raise DataError(
            f"{len(held_out.y)} rows with an observed target: give at least {LEAST_ROWS} to "
            "recalibrate by, better hundreds"
        )
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
            held_out.kept,
        )
    return RecalibrationFit(found, mean, error, n)


def fit_spread(held_out: HeldOut) -> tuple[np.ndarray, np.ndarray]:
    """Return the logs of the D scales and of the sharpness that are most likely, without shifts.

    Returns:
        [D + 1], and their variances [D + 1], infinite where the rows say nothing: of the estimate
        as it is, whether or not the densities are right (the sandwich of White, 1982).
    """
    score, _, weight = held_out.likelihoods()
    d = held_out.y.shape[-1]
    free = np.arange(2 * d + 1) >= d
    theta = _minimise(score, weight, np.zeros(2 * d + 1), free)
    ends = [
        [score(theta + sign * step, weight) for sign in (1.0, -1.0)]
        for step in _STEP * np.eye(2 * d + 1)[free]
    ]
    slopes = np.stack([(up - down) / (2.0 * _STEP) for (up, _), (down, _) in ends])  # [D + 1, n]
    curvature = -np.stack([(up - down)[free] / (2.0 * _STEP) for (_, up), (_, down) in ends])
    curvature = 0.5 * (curvature + curvature.T)
    variance = np.full(d + 1, np.inf)
    known = np.diag(curvature) > 1e-8 * len(weight)
    known &= np.abs(theta[free]) < _WIDEST  # where the search ended, there is no answer
    inverse = np.linalg.pinv(curvature[np.ix_(known, known)], hermitian=True)
    variance[known] = np.square(inverse @ slopes[known] * weight).sum(axis=1)
    return theta[free], variance


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
    parts: Sequence[_Part], y: np.ndarray, units: np.ndarray, kept: int
) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """Return the function from a map's numbers to log densities [N] and their sum's slope."""
    n, d = y.shape
    total_share = np.zeros(n)
    for part in parts:
        total_share[part.rows] += part.share

    @tf.function(autograph=False)
    def log_prob(theta: tf.Tensor, weight: tf.Tensor) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(theta)
            found = Recalibration(
                theta[:d] * units, tf.exp(theta[d : 2 * d]), tf.exp(theta[2 * d]), kept
            )
            whole = []
            for part in parts:
                one = found.apply(part.kind(**part.tensors)).log_prob(y[part.rows])
                # A row that the member has learned from adds nothing.
                full = tf.tensor_scatter_nd_update(
                    tf.fill([n], tf.constant(-np.inf, one.dtype)), part.rows[:, np.newaxis], one
                )
                whole.append(full + np.log(part.share))
            rows_log_prob = tf.reduce_logsumexp(tf.stack(whole), axis=0) - np.log(total_share)
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
