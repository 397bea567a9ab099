"""What models say of rows that they have not learned from, and what is most likely by it.

Shape letters: N rows, n some of them, D event size, M ensemble members.
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
from mdn.density.transformed import split_transform
from mdn.margins import take_rows

MOST_ROWS = 20_000
LEAST_ROWS = 20
WIDEST = 3.0  # of the log of a scale, and of a sharpness; far beyond what helps


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

    def judged(self) -> np.ndarray:
        """Return the rows that any member has, or evenly many among them, increasing."""
        rows = np.unique(np.concatenate([rows for rows, _ in self.members]))
        return rows[thin(len(rows), MOST_ROWS)]

    def weights(self, judged: np.ndarray) -> np.ndarray:
        """Return the weights of some of the rows, whose mean is 1."""
        return self.weight[judged] / self.weight[judged].mean()

    def parts(self, judged: np.ndarray) -> list[Part]:
        """Return what the members say of some of the rows, those in one that have other rows."""
        shares = [1.0] * len(self.members) if self.shares is None else self.shares
        parts: list[Part] = []
        for (rows, density), share in zip(self.members, shares, strict=True):
            place = np.searchsorted(judged, rows)
            known = np.isin(rows, judged)
            tensors = {name: np.asarray(t)[known] for name, t in density.tensors().items()}
            parts = _joined(parts, Part(place[known], type(density), tensors, share))
        total = np.zeros(len(judged))
        for part in parts:
            total[part.rows] += part.share
        return [
            dataclasses.replace(part, log_share=np.log(part.share / total[part.rows]))
            for part in parts
        ]


@dataclasses.dataclass(frozen=True)
class Part:
    """What a member says of the rows [n] that it has, and its share: in all, and in each row."""

    rows: np.ndarray
    kind: type[Queries]
    tensors: dict[str, np.ndarray]
    share: float
    log_share: Any = None


def _joined(parts: list[Part], part: Part) -> list[Part]:
    """Return parts with one more, or with more rows of the last where they are other rows."""
    if not parts:
        return [part]
    *before, last = parts
    shapes = [{k: t.shape[1:] for k, t in one.tensors.items()} for one in (last, part)]
    same = last.kind is part.kind and last.share == part.share and shapes[0] == shapes[1]
    if not same or np.isin(part.rows, last.rows).any():
        return [*parts, part]
    tensors = {k: np.concatenate([last.tensors[k], t]) for k, t in part.tensors.items()}
    return [*before, Part(np.append(last.rows, part.rows), part.kind, tensors, part.share)]


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


# ---------------------------------------------------------------------- likelihood


def over_rows(n: int, parts: Sequence[Part], values: Sequence[tf.Tensor]) -> tf.Tensor:
    """Return what each part has for its rows as [parts, n]: -inf where it has none."""
    return tf.stack(
        [
            # A row that the member has learned from adds nothing.
            tf.tensor_scatter_nd_update(
                tf.fill([n], tf.constant(-np.inf, value.dtype)), part.rows[:, np.newaxis], value
            )
            for part, value in zip(parts, values, strict=True)
        ]
    )


def likelihood(n: int, parts: Sequence[Part], log_probs: Callable) -> Callable:
    """Return the function from numbers to log densities [n] and the slope of their sum.

    Args:
        n: rows.
        parts: of a mixture.
        log_probs: of numbers and constants, to the log densities of the parts, shares included.
    """

    @tf.function(autograph=False)
    def log_prob(theta: tf.Tensor, weight: tf.Tensor, constants: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(theta)
            each = over_rows(n, parts, log_probs(theta, *constants))
            rows_log_prob = tf.reduce_logsumexp(each, axis=0)
            total = tf.reduce_sum(weight * rows_log_prob)
        slope = tape.gradient(total, theta, unconnected_gradients="zero")
        return rows_log_prob, slope

    def evaluate(
        theta: np.ndarray, weight: np.ndarray | None = None, constants: Sequence[Any] = ()
    ) -> tuple[np.ndarray, np.ndarray]:
        weight = np.ones(n) if weight is None else weight
        arrays = [tf.constant(array, tf.float64) for array in (theta, weight, *constants)]
        found = log_prob(*arrays[:2], arrays[2:])
        return found[0].numpy(), found[1].numpy()

    return evaluate


def most_likely(
    score: Callable, weight: np.ndarray, start: np.ndarray, least: np.ndarray, most: np.ndarray
) -> np.ndarray:
    """Return the most likely numbers for weighted rows between two bounds."""

    def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
        log_prob, slope = score(theta, weight)
        return -float(log_prob @ weight) / weight.sum(), -slope / weight.sum()

    bounds = np.stack([least, most], axis=1)
    return optimize.minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds).x
