"""Plots of a fitted distribution: rows and density, margins and pairs.

Shape letters: N rows, D event size, G grid points.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.special import softmax
from tensorflow_probability import distributions as tfd

from mdn.data.splits import thin
from mdn.density.queries import Queries
from mdn.figures import BLUE, GREY, ORANGE, style_axes
from mdn.fitting.likelihood import row_log_prob
from mdn.margins import Margins

_GRID = 400
_CELLS = 120  # of a pair, across and up
_MOST_PAIRED = 4  # targets in the figure
_FEW_ROWS, _MOST_ROWS = 50, 4000
_SHARES = (0.9, 0.5)  # of the mass inside of the contours
_DRAWS = 20_000


def fit_figure(
    distribution: tfd.Distribution,
    y: np.ndarray,
    names: Sequence[str],
    size: tuple[float, float] | None = None,
) -> Figure:
    """Draw rows and the distribution that was fitted to them.

    One target: the histogram and the density. More: the same for each of the first four, and for
    each pair the rows and the contours that hold 50 and 90 % of the mass.

    Args:
        distribution: of rows [D]: batch and event shape together are [D].
        y: [N, D]; NaN where an entry is missing.
        names: of the D targets.
        size: width and height in inches, at 100 dots each.
    """
    shown = min(y.shape[1], _MOST_PAIRED)
    side = 2.4 * shown + 1.0
    size = size or ((8.0, 5.0) if shown == 1 else (side, side))
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    draws = np.asarray(distribution.sample(_DRAWS, seed=0), np.float64).reshape(_DRAWS, -1)
    every = figure.subplots(shown, shown, squeeze=False)
    for row, column in itertools.product(range(shown), repeat=2):
        axes = every[row, column]
        if column > row:
            axes.set_axis_off()
            continue
        bottom, left = row == shown - 1, column == 0
        style_axes(axes, names[column] if bottom else "", names[row] if left and row else "")
        if row == column:
            _draw_margin(axes, distribution, y, draws, row)
        else:
            _draw_pair(axes, distribution, y, draws, [column, row])
    return figure


def _draw_margin(
    axes: Axes, distribution: tfd.Distribution, y: np.ndarray, draws: np.ndarray, target: int
) -> None:
    values = y[~np.isnan(y[:, target]), target]
    low, high = _limits(np.concatenate([values, np.quantile(draws[:, target], [0.001, 0.999])]))
    discrete = distribution.dtype.is_integer or (values == np.round(values)).all()
    if discrete and high - low < 200:
        bins = np.arange(np.floor(low) - 0.5, np.ceil(high) + 1.0)
    else:
        bins = np.linspace(low, high, int(np.clip(np.sqrt(len(values)), 10, 60)) + 1)
    axes.hist(values, bins.tolist(), density=True, color=BLUE, alpha=0.25, label="rows")
    density = _margin_density(distribution, target, y.shape[1], (low, high))
    if density is None:  # only draws tell what this margin looks like
        axes.hist(
            draws[:, target],
            bins.tolist(),
            density=True,
            histtype="step",
            color=BLUE,
            label="fit",
        )
    else:
        axes.plot(*density, color=BLUE, linewidth=2, label="fit")
    axes.set_xlim(low, high)
    axes.set_yticks([])
    if target == 0:
        axes.legend(frameon=False, fontsize=9)


def _margin_density(
    distribution: tfd.Distribution, target: int, targets: int, limits: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return a grid [G] and the density of one target on it, where it has a formula."""
    grid = np.linspace(*limits, _GRID)
    if isinstance(distribution, Queries):
        margins = Margins.of(distribution)
        weight, loc, scale = margins.weight, margins.loc[:, target], margins.scale[:, target]
        z = (grid[:, np.newaxis] - loc) / scale  # [G, K]
        return grid, np.exp(-0.5 * z**2) @ (weight / (scale * np.sqrt(2 * np.pi)))
    if targets > 1 and not distribution.batch_shape.rank:
        return None
    if distribution.dtype.is_integer or distribution.dtype.is_bool:
        grid = np.arange(np.ceil(limits[0]), limits[1])
    one = distribution[..., target] if distribution.batch_shape.rank else distribution
    with np.errstate(all="ignore"):
        density = np.exp(row_log_prob(one, grid))
    return grid, np.nan_to_num(density, posinf=np.nan)


def _draw_pair(
    axes: Axes, distribution: tfd.Distribution, y: np.ndarray, draws: np.ndarray, pair: list[int]
) -> None:
    shown = y[:, pair]
    shown = shown[~np.isnan(shown).any(axis=1)]
    drawn = draws[:, pair]
    limits = [_limits(np.concatenate([a, b])) for a, b in zip(shown.T, drawn.T, strict=True)]
    shown = shown[thin(len(shown), _MOST_ROWS)]
    size, alpha = (3, 0.4) if len(shown) > _FEW_ROWS else (10, 0.8)  # a few must not be overlooked
    axes.plot(*shown.T, ".", color=GREY, markersize=size, alpha=alpha, markeredgewidth=0)
    edges = [np.linspace(*limit, _CELLS + 1) for limit in limits]
    centres = [0.5 * (e[1:] + e[:-1]) for e in edges]
    if isinstance(distribution, Queries):
        mass = _pair_density(distribution, pair, centres)
    else:
        from scipy import ndimage  # takes long to import, and only these draws need it

        mass = np.histogram2d(drawn[:, 0], drawn[:, 1], bins=edges)[0]
        mass = ndimage.gaussian_filter(mass, _CELLS / 40)
    order = np.sort(mass, axis=None)[::-1]
    inside = np.cumsum(order) / order.sum()
    levels = [order[np.searchsorted(inside, share)] for share in _SHARES]
    axes.contour(*centres, mass.T, levels, colors=[BLUE, ORANGE])
    axes.set_xlim(*limits[0])
    axes.set_ylim(*limits[1])


def _pair_density(distribution: Queries, pair: list[int], centres: list[np.ndarray]) -> np.ndarray:
    """Return the density of two targets of a Gaussian mixture on a grid, [X, Y]."""
    parameters = distribution.mixture_parameters()
    logits, loc, scale_tril = (np.asarray(p, np.float64) for p in parameters)
    rows = scale_tril[:, pair]  # [K, 2, D]
    l11, l21, l22 = np.moveaxis(
        np.linalg.cholesky(rows @ rows.swapaxes(1, 2))[:, [0, 1, 1], [0, 0, 1]], 1, 0
    )
    a = (centres[0][:, np.newaxis] - loc[:, pair[0]]) / l11  # [X, K]
    b = centres[1][:, np.newaxis] - loc[:, pair[1]] - (l21 * a)[:, np.newaxis]  # [X, Y, K]
    return np.exp(-0.5 * (a[:, np.newaxis] ** 2 + (b / l22) ** 2)) @ (softmax(logits) / l11 / l22)


def _limits(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [0.001, 0.999])
    pad = 0.05 * (high - low) or 0.5
    return float(low - pad), float(high + pad)
