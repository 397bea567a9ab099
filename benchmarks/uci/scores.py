"""Scores of a density on test rows, in the units of y.

Shape letters: D event size, K components, N rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from mdn import losses
from mdn.calibration.scores import mixture_crps
from mdn.data.resolution import resolution
from mdn.margins import Margins

LEVEL = 0.9
POINTS = 512  # of a cell of several targets


def score(density: Any, y: np.ndarray, train: np.ndarray) -> dict[str, Any]:
    """Return the scores of a density.

    Args:
        density: a mixture, batch [N], event [D].
        y: [N, D], the test targets.
        train: [n, D], the train targets, whose resolution is that of all.

    Returns:
        nll: nats a row, joint of all targets; nll_se and nll_interval_se: over the rows.
        nll_interval: the same of the cell that the target was rounded from; equal to `nll` where
            nothing is rounded.
        rmse, crps: of the mean and of the margins; means over the targets.
        coverage90: the share of the targets in the central 90 % interval of their margins. Of a
            rounded target it is the share of its cell that lies in the interval.
    """
    double = _in_float64(density)
    step = np.array([resolution(column) for column in train.T])  # [D]
    margins = Margins.of(double)
    low, high = (margins.quantile(0.5 + side * LEVEL / 2) for side in (-1, 1))  # [N, D]
    half = np.maximum(step, 1e-12 * (1.0 + np.abs(y))) / 2
    inside = np.clip((np.minimum(high, y + half) - np.maximum(low, y - half)) / (2 * half), 0, 1)
    y64 = tf.constant(y, tf.float64)
    nll = -np.asarray(double.log_prob(y64))
    cells = np.asarray(losses.CellNLL(step, POINTS)(y64, double))
    return {
        "nll": float(nll.mean()),
        "nll_se": float(nll.std() / np.sqrt(len(y))),
        "nll_interval": float(cells.mean()),
        "nll_interval_se": float(cells.std() / np.sqrt(len(y))),
        "rmse": float(np.mean(np.sqrt(np.mean((margins.mean() - y) ** 2, axis=0)))),
        "crps": float(np.mean(mixture_crps(density, y))),
        "coverage90": float(np.mean(inside)),
    }


def _in_float64(density: Any) -> Any:
    tensors = {name: tf.cast(t, tf.float64) for name, t in density.tensors().items()}
    return type(density)(**tensors)
