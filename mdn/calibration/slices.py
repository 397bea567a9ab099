"""Calibration of some of the rows: those of a category, or of a stretch of a number.

A density can be calibrated over all rows and wrong for each of two halves that make up for each
other. Slices of the features look for that, and so do slices of what the density itself says: how
large it expects y to be, and how sure it is.

Shape letters: N rows, D event size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np
from scipy import stats

from mdn.calibration.uniformity import central, chi_square_p, effective_size, share_below

BINS = 5
_MOST_CATEGORIES = 8
_LEAST_ROWS = 20


@dataclasses.dataclass(frozen=True)
class Slice:
    """The calibration of one target on some of the rows.

    Attributes:
        target: name of the target.
        by: what the rows are told apart by.
        label: which rows these are.
        n: their number, or as many as the weighted ones are worth.
        mean: of the PIT; above one half where y is above the density.
        coverage50: share of the rows inside of the central 50 % intervals.
        coverage90: and of the 90 % intervals.
        p_value: of the chi-square test of the PIT.
        adjusted_p: the same, for as many slices as there are (Benjamini and Hochberg): of the
            slices below .05, one in twenty is expected to be there by chance.
    """

    target: str
    by: str
    label: str
    n: float
    mean: float
    coverage50: float
    coverage90: float
    p_value: float
    adjusted_p: float = 1.0


def find_slices(
    pit: np.ndarray,
    targets: tuple[str, ...],
    by: Mapping[str, np.ndarray],
    weight: np.ndarray | None = None,
    own: Mapping[str, np.ndarray] | None = None,
) -> list[Slice]:
    """Return the slices of each target, in the order of `by`.

    Args:
        pit: [N, D].
        targets: D names.
        by: name -> [N], numbers or categories, for all targets.
        weight: [N], or None.
        own: name -> [N, D], numbers for each target.
    """
    found = []
    for d, target in enumerate(targets):
        observed = ~np.isnan(pit[:, d])
        columns = {**by, **{name: values[:, d] for name, values in (own or {}).items()}}
        for name, column in columns.items():
            for label, rows in split(column):
                rows = rows & observed
                if rows.sum() < _LEAST_ROWS or rows.sum() == observed.sum():
                    continue  # few, or all: of a column that is constant
                ranks = pit[rows, d]
                w = None if weight is None else weight[rows]
                inside50, inside90 = share_below(central(ranks), np.array([0.5, 0.9]), w)
                found.append(
                    Slice(
                        target,
                        name,
                        label,
                        effective_size(len(ranks), w),
                        float(np.average(ranks, weights=w)),
                        float(inside50),
                        float(inside90),
                        chi_square_p(ranks, w),
                    )
                )
    if not found:
        return found
    adjusted = stats.false_discovery_control([each.p_value for each in found])
    return [
        dataclasses.replace(each, adjusted_p=float(p))
        for each, p in zip(found, adjusted, strict=True)
    ]


def split(column: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (label, which rows [N]) of the values of a column.

    Numbers are cut at quantiles into stretches of about equally many rows, unless they take few
    values. Of categories the most frequent have a slice each, and all others one together.
    """
    column = np.asarray(column)
    if column.dtype.kind in "fiub":
        yield from _split_numbers(column.astype(np.float64))
        return
    text = np.array(["missing" if value is None else str(value) for value in column], object)
    values, counts = np.unique(text, return_counts=True)
    kept = sorted(values[np.argsort(-counts, kind="stable")[:_MOST_CATEGORIES]])
    for value in kept:
        yield value, text == value
    rest = ~np.isin(text, kept)
    if rest.any():
        yield f"{len(values) - len(kept)} others", rest


def _split_numbers(column: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    missing = np.isnan(column)
    present = column[~missing]
    if present.size and np.ptp(present) <= 1e-6 * np.abs(present).max():  # but for rounding
        column = np.where(missing, np.nan, present[0])
    values = np.unique(column[~missing])
    if len(values) <= BINS:
        for value, label in zip(values, _labels(values), strict=True):
            yield label, column == value
    else:
        inner = np.quantile(column[~missing], np.arange(1, BINS) / BINS)
        edges = np.unique(inner)
        place = np.searchsorted(edges, column, side="right")  # NaN comes last
        labels = _labels(np.array([values[0], *edges, values[-1]]))
        for i in range(len(edges) + 1):
            rows = (place == i) & ~missing
            if rows.any():
                yield f"{labels[i]} to {labels[i + 1]}", rows
    if missing.any():
        yield "missing", missing


def _labels(values: np.ndarray) -> list[str]:
    """Return values as text: whole ones as they are, others with digits that tell them apart."""
    if np.all(values == np.round(values)) and np.all(np.abs(values) < 1e9):
        return [f"{value:.0f}" for value in values]
    distinct, labels = len(np.unique(values)), [""]
    for digits in range(3, 18):
        labels = [f"{value:.{digits}g}" for value in values]
        if len(set(labels)) == distinct:
            break
    return labels
