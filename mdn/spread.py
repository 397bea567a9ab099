"""The spread of a pool of densities: by how much it is to be narrower, and its weights sharper.

A mixture of densities that differ is wider than they are, and its mean is nearer to the truth than
theirs: a pool of calibrated densities is too wide. Narrower components make up for it, as in the
spread-adjusted linear pool, or wider ones where all members are too sure. Weights that training
left too even are sharpened likewise.

Source:
    Gneiting and Ranjan (2013), Combining predictive distributions, who scale each density about
    its median; here each component is scaled about its mean, and none is moved.

Shape letters: D event size, V ensembles, M members of each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mdn.data.rows import Data, Rows
from mdn.data.splits import thin
from mdn.density.recalibration import Recalibration
from mdn.recalibration import LEAST_ROWS, HeldOut, fit_spread, hold_out

MOST_ROWS = 4000  # that are judged; a scale is then known to a hundredth
MOST_NUMBERS = 2**22  # parameters of all judged densities
LEAST_POOLED = 1.25  # ensembles, counted by their shares, that show what pooling does
MOST_GROWN = 2.0  # times what was seen of it
LEAST_SCALE = 0.3  # far below what pooling can do


def pooled_spread(
    models: Mapping[str, Any],
    shares: Mapping[str, float],
    data: Data,
    folds: np.ndarray | None,
    seed: int = 0,
) -> Recalibration | None:
    """Return the map of each member's density that is best for the mixture of all of them.

    A row is held out by one member of an ensemble, or a few, and of an ensemble with folds never
    by all. But what is best for a pool of n densities is seen at two n, for the ensembles alone
    and for their mixture, and others follow: what pooling changes goes as 1 - 1/n, the share of
    their differences that a pool of n has.

    Args:
        models: trained ensembles of M members, by name, without a map.
        shares: of those that are mixed.
        data: the rows.
        folds: [M, n], the rows that each member held out; None: the validation rows, by all.
        seed: of the points in the cells of targets on a grid.

    Returns:
        Scales and a sharpness, no shifts, nearer to the identity by what the rows leave in doubt.
        None where nothing is beyond doubt, where a single ensemble has nearly all of the shares,
        or where rows that no member has learned from are few or none.
    """
    mixed = np.array(list(shares.values())) / sum(shares.values())
    pooled = float(1.0 / (mixed @ mixed))  # ensembles of equal shares that differ as much
    if pooled < LEAST_POOLED or data.validation is data.train:
        return None
    kept = [models[name] for name in shares]
    rows, own = _held_out_rows(kept, data, folds)
    answers = [hold_out(model, rows.x, rows.y, rows.weight, own, seed) for model in kept]
    if len(answers[0].y) < LEAST_ROWS:
        return None
    alone = mixed @ [fit_spread(answer)[0] for answer in answers]
    together, variance = fit_spread(_pool(answers, mixed))
    seen = sum(len(rows) for rows, _ in answers[0].members) / len(answers[0].y)
    log = extrapolate(alone, together, seen, seen * pooled, kept[0].members * pooled)
    log = shrink(log, variance)
    if not log.any():
        return None
    *scale, sharpness = np.exp(log).tolist()
    shift = (0.0,) * len(scale)
    return Recalibration(shift, tuple(scale), sharpness, answers[0].kept)


def _held_out_rows(
    models: Sequence[Any], data: Data, folds: np.ndarray | None
) -> tuple[Rows, list[np.ndarray] | None]:
    """Return rows that members held out, evenly many, and which of them each member did."""
    numbers = sum(model.head.params_size for model in models)
    judges = models[0].members if folds is None else folds.size / len(np.unique(folds))
    most = max(int(min(MOST_ROWS, MOST_NUMBERS // numbers) / judges), LEAST_ROWS)
    if folds is None:
        return data.validation.take(thin(len(data.validation), most)), None
    every = np.unique(folds)
    kept = every[thin(len(every), most)]
    n = len(data.train)
    rows = data.train.take(kept[kept < n]).append(data.validation.take(kept[kept >= n] - n))
    return rows, [np.searchsorted(kept, fold[np.isin(fold, kept)]) for fold in folds]


def _pool(answers: Sequence[HeldOut], shares: np.ndarray) -> HeldOut:
    """Return what the mixture of several models says of the same rows."""
    members = [member for answer in answers for member in answer.members]
    weights = np.repeat(shares, [len(answer.members) for answer in answers]).tolist()
    return dataclasses.replace(answers[0], members=members, shares=weights)


def extrapolate(
    alone: np.ndarray, together: np.ndarray, few: float, many: float, members: float
) -> np.ndarray:
    """Return the logs of the scales and of the sharpness that suit a pool of n densities.

    The square of a scale and the log of the sharpness are linear in 1 / n; no further than where
    the change is twice the one that was seen, with what is in doubt of it.

    Args:
        alone: [D + 1], what suits a pool of `few` densities.
        together: [D + 1], what suits one of `many`.
        few: densities.
        many: densities, more than `few`.
        members: n.
    """
    grown = min((1.0 / few - 1.0 / members) / (1.0 / few - 1.0 / many), MOST_GROWN)
    change = together - alone
    square = 1.0 + grown * np.expm1(2.0 * change[:-1])  # of a scale, as a share of the one before
    scale = alone[:-1] + 0.5 * np.log(np.maximum(square, LEAST_SCALE**2))
    return np.append(scale, alone[-1] + grown * change[-1])


def shrink(estimate: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Return estimates nearer to zero by what is in doubt: the positive part of Stein's."""
    square = np.square(estimate)
    doubt = np.divide(variance, square, out=np.ones_like(square), where=variance < square)
    return estimate * (1.0 - doubt)
