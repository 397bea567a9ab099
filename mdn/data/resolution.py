"""Detect the grid that targets were rounded to."""

from __future__ import annotations

import numpy as np

# Targets count as tied when at least this share of the rows repeats the value of another row.
_TIED_SHARE = 0.05


def resolution(y: np.ndarray) -> float:
    """Return the step of the grid that y stands on, or zero where y is not tied.

    A density can spike on a tied value without bound, so scales need a floor there. A uniform
    distribution over one step d has the standard deviation d / sqrt(12).

    Args:
        y: [N] in the user's units; NaN is ignored.

    Returns:
        The smallest gap between values that repeat, in the units of y.
    """
    y = np.asarray(y, np.float64)
    values, counts = np.unique(y[~np.isnan(y)], return_counts=True)
    if counts[counts > 1].sum() < _TIED_SHARE * counts.sum():
        return 0.0
    # Values that occur once may be off the grid: a few of them must not hide it.
    gaps = np.diff(values[counts > 1])
    return float(gaps.min()) if len(gaps) else 0.0


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
