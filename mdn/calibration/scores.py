"""What a density is worth at each row: ranks of y, the CRPS, and how wide it is.

Everything after the network is float64. Targets on a grid are judged on y + U(-d/2, d/2): a
density of whole minutes cannot know what was rounded away, and only the ranks of the cell's
points are uniform.

Shape letters: N rows, D event size, K components, S draws.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from mdn.data.splits import thin
from mdn.margins import Margins, join_rows, take_rows

if TYPE_CHECKING:
    from mdn.density.queries import Queries

DRAWS = 99
_MOST_DRAWN = 5000  # rows that are compared with draws
_NUMBERS = 2**22  # in one array


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a density says of each of N rows; NaN where an entry of y is missing.

    Attributes:
        pit: [N, D], each entry through the distribution function of its margin.
        region: [N], probability of the smallest highest-density region that holds y; NaN also
            for the rows that were compared with no draws.
        crps: [N, D], in the units of y; of transformed targets NaN also for such rows.
        width50: [N, D], of the central 50 % intervals.
        width90: [N, D], of the central 90 % intervals.
        mean: [N, D], of the density.
    """

    pit: np.ndarray
    region: np.ndarray
    crps: np.ndarray
    width50: np.ndarray
    width90: np.ndarray
    mean: np.ndarray


def score(density: Queries, y: np.ndarray, *, draws: int = DRAWS, seed: int = 0) -> Scores:
    """Return what a density says of rows.

    Args:
        density: batch [N], or [] for all rows.
        y: [N, D], NaN marks a missing entry; each row has one that is not.
        draws: S, of the highest-density regions.
        seed: of the draws.
    """
    return score_parts([(slice(0, len(y)), density)], y, draws=draws, seed=seed)


def score_parts(
    parts: Iterable[tuple[slice, Queries]], y: np.ndarray, *, draws: int = DRAWS, seed: int = 0
) -> Scores:
    """Return what a density says of rows, as it says it: a few rows of it at a time.

    Args:
        parts: rows [n], one after the other, and their density, batch [n], or [] for all.
        y: as for `score`.
        draws: as for `score`.
        seed: as for `score`.
    """
    drawn, kept, found = thin(len(y), _MOST_DRAWN), [], []
    for rows, density in parts:
        found.append(_score_margins(density, y[rows]))
        here = drawn[(drawn >= rows.start) & (drawn < rows.stop)] - rows.start
        kept.append(take_rows(density, (rows.stop - rows.start,), here))
    pit, crps, width50, width90, mean = (np.concatenate(p) for p in zip(*found, strict=True))
    region = np.full(len(y), np.nan)
    region[drawn], sampled = _compare_with_draws(join_rows(kept), y[drawn], draws, seed)
    if np.isnan(crps).all():  # of transformed targets there is no closed form
        crps[drawn] = sampled
    return Scores(pit, region, crps, width50, width90, mean)


def _score_margins(density: Queries, y: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return the PIT, CRPS, both widths and the mean of each target, [n, D]; NaN where y is."""
    n, d = y.shape
    pit, crps, width50, width90, mean = (np.full(y.shape, np.nan) for _ in range(5))
    for rows in _blocks(n, 4 * d * _components(density) * max(d, 4)):
        margins = Margins.of(take_rows(density, (n,), rows))
        pit[rows] = margins.cdf(y[rows])
        mean[rows] = margins.mean()
        low, lower, upper, high = margins.quantile(np.array([0.05, 0.25, 0.75, 0.95]))
        width50[rows], width90[rows] = upper - lower, high - low
    if Margins.of(take_rows(density, (n,), slice(1))).units is None:
        crps = mixture_crps(density, y)
    for array in (width50, width90, mean):
        array[np.isnan(y)] = np.nan
    return pit, crps, width50, width90, mean


def region_levels(
    density: Queries, y: np.ndarray, draws: int = DRAWS, seed: int = 0
) -> np.ndarray:
    """Return the probability of the smallest highest-density region that holds each y.

    That is the rank of log p(y) among the log densities of draws, at a point of its cell that is
    drawn too: exactly uniform on [0, 1] where y has the density, however few draws there are. A
    region of probability q holds y where this is at most q.

    Args:
        density: batch [N], or [] for all rows.
        y: [N, D], NaN marks a missing entry: the region is that of the others.
        draws: S.
        seed: of the draws.

    Returns:
        [N].
    """
    return _compare_with_draws(density, y, draws, seed)[0]


def _compare_with_draws(
    density: Queries, y: np.ndarray, draws: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the region levels [N] of rows, and unbiased estimates of their CRPS, [N, D]."""
    import tensorflow as tf

    rng = np.random.default_rng([seed, 0x686472])
    level, crps = np.empty(len(y)), np.empty(y.shape)
    rank = np.arange(1, draws + 1).reshape(-1, 1, 1)
    d = y.shape[1]
    # A row that lacks an entry has factors of its own, [D, D] for each draw.
    numbers = d**2 if np.isnan(y).any() else d
    for block in _blocks(len(y), draws * _components(density) * numbers):
        part, given = take_rows(density, (len(y),), block), y[block]
        sample = part.sample(draws, seed=tf.constant(rng.integers(2**31, size=2), tf.int32))
        sample = np.where(np.isnan(given), np.nan, sample.numpy())  # [S, n, D]
        of_draws = part.log_prob(sample).numpy()  # [S, n]
        of_y = part.log_prob(given.astype(sample.dtype)).numpy()  # [n]
        above, ties = (of_draws > of_y).sum(axis=0), (of_draws == of_y).sum(axis=0)
        level[block] = (above + rng.uniform(size=len(given)) * (ties + 1)) / (draws + 1)
        ranked = np.sort(sample.astype(np.float64), axis=0)
        between = ((2 * rank - draws - 1) * ranked).sum(axis=0) / (draws * (draws - 1))
        crps[block] = np.abs(ranked - given).mean(axis=0) - between
    return level, crps


def mixture_crps(density: Queries, y: np.ndarray) -> np.ndarray:
    """Return the CRPS of each target under a mixture whose targets are not transformed.

    By the closed form, which takes all pairs of components: a few rows at a time.

    Args:
        density: batch [N], or [] for all rows.
        y: [N, D], NaN marks a missing entry.

    Returns:
        [N, D], in the units of y; NaN where y is missing.
    """
    from mdn.density import univariate  # which imports TensorFlow

    n, d = y.shape
    crps = np.empty([n, d])
    for rows in _blocks(n, d * _components(density) ** 2):
        margins = Margins.of(take_rows(density, (n,), rows))
        with np.errstate(divide="ignore"):
            log_weight = np.log(margins.weight)[..., np.newaxis, :]
        parts = log_weight, np.swapaxes(margins.loc, -1, -2), np.swapaxes(margins.scale, -1, -2)
        crps[rows] = univariate.crps(univariate.Margins(*parts), y[rows]).numpy()
    return crps


def marginal_crps(
    y: np.ndarray, reference: np.ndarray, weight: np.ndarray | None = None
) -> np.ndarray:
    """Return the CRPS of the rows of `reference` as the forecast of each y: a column at a time.

    Args:
        y: [N, D].
        reference: [M, D], other rows, or the same.
        weight: [M] of those rows, or None.

    Returns:
        [N, D]; NaN where y is missing.
    """
    found = np.full(y.shape, np.nan)
    weight = np.ones(len(reference)) if weight is None else weight
    for column, given, values in zip(found.T, y.T, reference.T, strict=True):
        order = np.argsort(values)[: np.count_nonzero(~np.isnan(values))]  # NaN comes last
        if not len(order):
            continue
        values, share = values[order], weight[order] / weight[order].sum()
        below = np.concatenate([[0.0], np.cumsum(share)])
        moment = np.concatenate([[0.0], np.cumsum(share * values)])
        at = np.searchsorted(values, given)
        to_y = given * (2 * below[at] - 1.0) - 2 * moment[at] + moment[-1]
        # E|Y - Y'| = 2 E[Y (P(Y' < Y) - P(Y' > Y))], a pair counted once.
        between = 2.0 * (share * values) @ (below[1:] + below[:-1] - 1.0)
        column[:] = to_y - 0.5 * between
    return found


def _components(density: Queries) -> int:
    from mdn.density.transformed import split_transform

    logits = split_transform(density)[0].tensors().get("logits")
    return 1 if logits is None else int(logits.shape[-1])


def _blocks(n: int, numbers: int) -> list[slice]:
    """Return stretches of n rows of which each holds not too many numbers."""
    size = max(1, _NUMBERS // numbers)
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]
