"""The spread of a pool of densities: by how much it is to be narrower, and its weights sharper.

A mixture of densities that differ is wider than they are, and its mean is nearer to the truth than
theirs: a pool of calibrated densities is too wide. Components that are narrower, or wider where
all of them are too narrow, make up for it: the spread-adjusted linear pool. The same goes for the
weights, which training that stops early leaves too even.

Source:
    Gneiting and Ranjan (2013), Combining predictive distributions.

Shape letters: D event size, V ensembles, M members of each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from mdn.data.rows import Data
from mdn.data.splits import thin
from mdn.density.recalibration import Recalibration
from mdn.recalibration import LEAST_ROWS, MOST_ROWS, HeldOut, fit_spread, hold_out
from mdn.selection import held_out_weight


def pooled_spread(
    models: Mapping[str, Any], data: Data, folds: np.ndarray | None, seed: int = 0
) -> Recalibration | None:
    """Return the map of each member's density that is best for a mixture of them.

    A row is held out by one member of an ensemble, or a few, and never by all of an ensemble with
    folds. Those of all V ensembles that hold it out, in equal shares, are the pool that comes
    nearest to the mixture of all V M members.

    Args:
        models: trained ensembles, by name, without a map.
        data: the rows.
        folds: [M, n], the rows that each member held out; None: the validation rows, by all.
        seed: of the points in the cells of targets on a grid.

    Returns:
        Scales and a sharpness, no shifts, nearer to the identity by what the rows leave in doubt.
        None where there is nothing to see it by: a single ensemble, or hardly any rows.
    """
    if len(models) < 2 or len(held_out_weight(data, folds)) < LEAST_ROWS:
        return None
    held_out = [_held_out(model, data, folds, seed) for model in models.values()]
    members = [member for one in held_out for member in one.members]
    log, variance = fit_spread(dataclasses.replace(held_out[0], members=members))
    *scale, sharpness = np.exp(shrink(log, variance)).tolist()
    return Recalibration((0.0,) * len(scale), tuple(scale), sharpness)


def _held_out(model: Any, data: Data, folds: np.ndarray | None, seed: int) -> HeldOut:
    """Return what a model says of the rows that it held out, or of evenly many of them."""
    if folds is None:
        rows, own = data.validation.take(thin(len(data.validation), MOST_ROWS)), None
    else:
        every = np.unique(folds)
        kept = every[thin(len(every), MOST_ROWS)]
        rows = data.train.append(data.validation).take(kept)
        own = [np.searchsorted(kept, fold[np.isin(fold, kept)]) for fold in folds]
    return hold_out(model, rows.x, rows.y, rows.weight, own, seed)


def shrink(estimate: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Return estimates nearer to zero by what is in doubt: the positive part of Stein's."""
    square = np.maximum(estimate**2, np.finfo(float).tiny)
    return estimate * np.maximum(0.0, 1.0 - variance / square)
