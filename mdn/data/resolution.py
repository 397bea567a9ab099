"""Detect the grid that targets were rounded to.

Shape letters: N rows, D targets.
"""

from __future__ import annotations

import numpy as np

# Targets count as tied when at least this share of the rows repeats the value of another row.
_TIED_SHARE = 0.05
# Share of the rows that may stand off a grid.
_OFF_SHARE = 0.05
# In steps: a length so near to a whole number of them is one. float32 targets need some room.
_TOLERANCE = 0.05
# Of the greatest |y|: values that are closer differ by errors of float64, as 0.1 + 0.2 and 0.3.
_SAME = 1e-12


def resolution(y: np.ndarray) -> float:
    """Return the step of the grid that y stands on, or zero where y is not tied.

    A density can spike on a tied value without bound, so scales need a floor there. A uniform
    distribution over one step d has the standard deviation d / sqrt(12).

    The smallest gap between values that repeat is the step where rows are many. Where they are few
    only some values repeat, far from each other: then how far the others are from these leads to
    it, as in Euclid's algorithm. Where only some values repeat, and on no grid, as of a quantity
    that is clipped at two ends, there is no step. Where most do, as of logarithms of counts, it is
    the smallest gap of all: narrow enough for any of them.

    Args:
        y: [N] in the user's units; NaN is ignored.

    Returns:
        The step, in the units of y.
    """
    y = np.asarray(y, np.float64)
    values, counts = _distinct(y[~np.isnan(y)])
    rows, often = counts.sum(), counts > 1
    repeated, single = values[often], values[~often]
    tied = counts[often].sum()
    if len(repeated) < 2 or tied < _TIED_SHARE * rows:
        return 0.0
    gaps, away = np.diff(repeated), _distance(single, repeated)
    step, nothing = gaps.min(), _SAME * np.abs(values).max()
    while step > nothing:
        off_gaps, off_single = (_remainder(length, step) for length in (gaps, away))
        # A value that is on no grid spoils both of its gaps, and one that is on it at most one.
        on = np.append(off_gaps == 0.0, False) | np.append(False, off_gaps == 0.0)
        off = counts[often][~on].sum() + np.count_nonzero(off_single)
        if off <= _OFF_SHARE * rows:
            return float(step)
        remainders = np.append(off_gaps, off_single)
        step = remainders[remainders > 0.0].min()
    return float(np.diff(values).min()) if tied >= 0.5 * rows else 0.0


def _remainder(length: np.ndarray, step: float) -> np.ndarray:
    """Return how far lengths, all positive, are from whole numbers of steps; zero where near."""
    steps = np.round(length / step)
    off = np.abs(length - step * steps)
    return np.where((steps > 0) & (off <= _TOLERANCE * step), 0.0, off)


def _distance(values: np.ndarray, to: np.ndarray) -> np.ndarray:
    """Return how far each of the values is from the nearest of others, in ascending order."""
    after = np.clip(np.searchsorted(to, values), 1, len(to) - 1)
    return np.minimum(np.abs(values - to[after - 1]), np.abs(values - to[after]))


def _distinct(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of y [N] in ascending order, and how many rows have each."""
    values, counts = np.unique(y, return_counts=True)
    if not len(values):
        return values, counts
    starts = np.append(True, np.diff(values) > _SAME * np.abs(values).max())
    return values[starts], np.add.reduceat(counts, np.flatnonzero(starts))


def float32_step(y: np.ndarray) -> float:
    """Return the distance between neighbouring float32 numbers at the greatest |y|: [N] -> float.

    Targets are float32 in the network, which puts them on a grid of their own.
    """
    return float(np.spacing(np.float32(np.nanmax(np.abs(y)))))


def grid_steps(y: np.ndarray) -> np.ndarray:
    """Return the step of the grid that each target of y [N, D] stands on: [D], zero for none."""
    return np.array([resolution(column) for column in y.T])


def spread_over_cells(y: np.ndarray, step: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return y + U(-step/2, step/2), [N, D]: points of the cells that were rounded to y."""
    rng = np.random.default_rng([seed, 0x67726964])
    return y + step * (rng.uniform(size=y.shape) - 0.5)
