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
        The smallest gap between distinct values, rounding noise apart, in the units of y.
    """
    y = np.asarray(y, np.float64)
    y = np.sort(y[~np.isnan(y)])
    if len(y) < 2:
        return 0.0
    noise = 1e-6 * max(abs(y[0]), abs(y[-1]), y[-1] - y[0])  # float32 keeps about seven digits
    gaps = np.diff(y)
    if np.mean(gaps <= noise) < _TIED_SHARE:
        return 0.0
    gaps = gaps[gaps > noise]
    return float(gaps.min()) if len(gaps) else 0.0
