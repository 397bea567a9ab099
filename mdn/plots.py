"""Plots: a density beside the rows it must explain, and its training.

Every function returns a `matplotlib.figure.Figure` and leaves matplotlib's global state alone.

Shape letters: N rows, T time, D event size, K components, X and Y cells of a picture.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator, PercentFormatter

from mdn.calibration.plots import calibration_figure
from mdn.data.rows import Data, Features, Rows
from mdn.data.splits import thin
from mdn.evaluation import Evaluation, find_counted
from mdn.figures import BLUE, GREY, INK, ORANGE, plain, style_axes, write_figures
from mdn.margins import Margins, as_mixture

if TYPE_CHECKING:
    from mdn.model import MDN

_COLORMAP = "viridis"
_LINELESS: dict[str, Any] = {"linestyle": "none", "color": "white"}
_POINTS = _LINELESS | {"marker": ".", "markersize": 3, "alpha": 0.35, "markeredgewidth": 0}
_MARKER = _LINELESS | {"marker": "o", "markersize": 5, "markeredgecolor": INK}
_CELLS = 240  # across a picture, and up
_MOST_ROWS = 2000


def save_plots(
    model: MDN,
    data: Data,
    history: Mapping[str, Sequence[float]],
    evaluation: Evaluation,
    directory: str | Path,
) -> list[Path]:
    """Write density.png, history.png (if there is a history) and calibration.png.

    Args:
        model: trained.
        data: where the test rows come from.
        history: metric name -> its value after each epoch.
        evaluation: of the model on the test rows.
        directory: made if it is not there.

    Returns:
        The files.

    Raises:
        RunError: a file cannot be written.
    """
    figures = {"density": density_figure(model, data)}
    if any(history.values()):
        figures["history"] = history_figure(history)
    figures["calibration"] = calibration_figure(evaluation.calibration)
    return write_figures(figures, directory)


# ---------------------------------------------------------------------- density


def density_figure(
    model: MDN, data: Data, rows: Rows | None = None, size: tuple[float, float] = (8.0, 5.0)
) -> Figure:
    """Draw p(y | x) with observed targets on top, in the way that suits the shapes.

    One target and one number for a feature: the density over that feature. One target otherwise:
    the density over the rows in the order of their predicted mean. Two targets or more: the
    density of the first two given the features of four rows. Sequences: the density of the first
    target over the steps of one of them. No influence of the features: one density, all rows.

    Args:
        model: adapted, and trained or not.
        data: where the names come from.
        rows: the rows to show, by default the test rows; of many, some evenly spaced ones.
        size: width and height in inches, at 100 dots each.
    """
    rows = data.test if rows is None else rows
    rows = rows.take(np.flatnonzero(find_counted(rows).reshape(len(rows), -1).any(axis=1)))
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    if rows.y.ndim == 3:
        _draw_sequence(figure, model, data, rows)
        return figure
    rows = rows.take(thin(len(rows), _MOST_ROWS))
    feature = _single_number(rows.x)
    if rows.y.shape[1] == 1 and feature is not None:
        _draw_over_feature(figure, model, data, rows, feature)
        return figure
    density = model.predict_distribution(rows.x)
    margins = Margins.of(density)
    *parameters, _ = as_mixture(density)
    unconditional = not any(np.ptp(p, axis=0).any() for p in parameters)
    if rows.y.shape[1] > 1:
        _draw_planes(figure, data, rows, margins, parameters[-1], unconditional)
    elif unconditional:
        _draw_curve(figure, data, rows, margins)
    else:
        _draw_over_rank(figure, data, rows, margins)
    return figure


def _draw_over_feature(
    figure: Figure, model: MDN, data: Data, rows: Rows, feature: np.ndarray
) -> None:
    low, high = _limits(feature)
    grid = _centres(low, high)
    x: Features = dict.fromkeys(rows.x, grid) if isinstance(rows.x, dict) else grid[:, np.newaxis]
    margins = Margins.of(model.predict_distribution(x))
    axes = _add_axes(figure, data.features[0], data.targets[0])
    label = f"p({data.targets[0]} | {data.features[0]})"
    _draw_heat(figure, axes, margins, (low, high), _limits(rows.y), label)
    axes.plot(feature, rows.y, **_POINTS)


def _draw_over_rank(figure: Figure, data: Data, rows: Rows, margins: Margins) -> None:
    # Rows with nearly the same mean share a column of the picture, which shows the mean of their
    # densities: that is what the points of the column follow, and neighbours look alike.
    order = np.argsort(margins.mean()[:, 0])
    size = max(1, len(order) // 80)
    order = order[thin(len(order), len(order) // size * size)]
    columns = len(order) // size
    pooled = dataclasses.replace(
        margins,
        weight=margins.weight[order].reshape(columns, -1) / size,
        loc=margins.loc[order].reshape(columns, -1, 1),
        scale=margins.scale[order].reshape(columns, -1, 1),
    )
    axes = _add_axes(figure, "rows, in the order of their predicted mean", data.targets[0])
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    _draw_heat(figure, axes, pooled, (0, 1), _limits(rows.y), f"p({data.targets[0]} | x)")
    _draw_bands(axes, pooled, (np.arange(columns) + 0.5) / columns)
    axes.plot((np.arange(len(order)) + 0.5) / len(order), rows.y[order], **_POINTS)


def _draw_sequence(figure: Figure, model: MDN, data: Data, rows: Rows) -> None:
    counted = find_counted(rows)
    row = int(counted.sum(axis=1).argmax())  # the sequence with most to show
    rows = rows.take(np.array([row]))
    steps = int(np.flatnonzero(counted[row])[-1]) + 1
    margins = _take(Margins.of(model.predict_distribution(rows.x)).first(), (0, slice(steps)))
    time, y = np.arange(1, steps + 1), rows.y[0, :steps, 0]
    spread = [y, *(margins.quantile(p)[:, 0] for p in (0.05, 0.95))]
    axes = _add_axes(figure, "step", data.targets[0])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    label = f"p({data.targets[0]} | x)"
    extent = (0.5, steps + 0.5)
    _draw_heat(figure, axes, margins, extent, _limits(np.concatenate(spread)), label)
    _draw_bands(axes, margins, time)
    axes.plot(time, y, **_MARKER)


def _draw_curve(figure: Figure, data: Data, rows: Rows, margins: Margins) -> None:
    low, high = _limits(rows.y)
    one = _take(margins, slice(1))  # they are all alike
    axes = _add_axes(figure, data.targets[0], f"p({data.targets[0]})")
    inside = rows.y[(rows.y > low) & (rows.y < high)]
    share = len(inside) / max(1, np.isfinite(rows.y).sum())
    bins = np.linspace(low, high, 61)
    height = np.histogram(inside, bins, density=True)[0] * share  # the tails count, out of sight
    axes.stairs(height, bins, fill=True, color=BLUE, alpha=0.25, label="observed")
    density = _mean_density(one, np.linspace(low, high, _CELLS + 1))[:, 0]
    axes.plot(_centres(low, high), density, color=BLUE, linewidth=2, label="density")
    axes.set_xlim(low, high)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def _draw_planes(
    figure: Figure,
    data: Data,
    rows: Rows,
    margins: Margins,
    scale_tril: np.ndarray,
    unconditional: bool,
) -> None:
    """Draw the plane of the first two targets: for four rows, or once if they are all alike."""
    first, second = data.targets[:2]
    y, mean = rows.y[:, :2], margins.mean()
    chosen = np.flatnonzero(~np.isnan(y).any(axis=1))
    if not len(chosen):
        chosen = np.arange(len(y))
    chosen = chosen[np.argsort(mean[chosen, 0])]
    panels = 1 if unconditional else min(4, len(chosen))
    chosen = chosen[(2 * np.arange(panels) + 1) * len(chosen) // (2 * panels)]
    shape = math.ceil(panels / 2), min(2, panels)
    every = [figure.add_subplot(*shape, i + 1) for i in range(panels)]
    for row, axes in zip(chosen, every, strict=True):
        one = _take(margins, row)
        style_axes(axes, first, second)
        axes.locator_params(nbins=5)
        if unconditional:
            shown, style = y, _POINTS
        else:
            shown = np.stack([y[row], one.quantile(0.01)[:2], one.quantile(0.99)[:2]])
            style = _MARKER | {"markevery": [0]}  # the others are for the limits alone
            title = f"mean: {first} {mean[row, 0]:.3g}, {second} {mean[row, 1]:.3g}"
            axes.set_title(plain(title), fontsize=10, color=INK)
        limits = [_limits(column) for column in shown.T]
        # The leading block of a triangular factor is the factor of the margin.
        image = _draw_regions(axes, one, scale_tril[row, :, :2, :2], limits)
        axes.plot(*shown.T, **style)
    bar = _add_bar(figure, image, every, "probability mass at higher density")
    bar.ax.invert_yaxis()  # bright and dense is up, as in the other pictures
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    bar.set_ticks([0, 0.5, 0.9, 1])


def _draw_regions(
    axes: Axes,
    margins: Margins,
    scale_tril: np.ndarray,
    limits: list[tuple[float, float]],
) -> AxesImage:
    """Colour each point of the plane by the mass of all points that are denser.

    Unlike densities, these shares mean the same in every panel.

    Args:
        axes: to draw on.
        margins: of one density.
        scale_tril: [K, 2, 2], of its first two targets.
        limits: of the two targets.
    """
    cells = 150
    first, second = (_centres(low, high, cells) for low, high in limits)
    loc, (u, v), slopes = margins.loc, (first, second), (1.0, 1.0)
    if margins.units is not None:
        units = margins.units.take([0, 1])
        grid = np.stack([first, second], axis=-1)  # [X = Y, 2]
        u, v = units.inverse(grid).T
        slopes = units.slope(grid).T
    l11, l21, l22 = scale_tril[:, 0, 0], scale_tril[:, 1, 0], scale_tril[:, 1, 1]  # [K]
    a = (np.nan_to_num(u)[:, np.newaxis] - loc[:, 0]) / l11  # [X, K]
    b = (np.nan_to_num(v)[:, np.newaxis, np.newaxis] - loc[:, 1] - l21 * a) / l22  # [Y, X, K]
    density = np.exp(-0.5 * (a**2 + b**2)) @ (margins.weight / (2 * np.pi * l11 * l22))  # [Y, X]
    density *= slopes[0] * np.reshape(slopes[1], [-1, 1])  # zero outside of the domain
    area = math.prod((high - low) / cells for low, high in limits)
    order = np.argsort(density, axis=None)[::-1]
    inside = np.ones(density.size)
    inside[order] = np.minimum(np.cumsum(density.ravel()[order]) * area, 1.0)
    inside = inside.reshape(density.shape)
    if levels := [level for level in (0.5, 0.9) if inside.min() < level]:
        axes.contour(first, second, inside, levels, colors="white", linewidths=1)
    image = axes.imshow(
        inside,
        origin="lower",
        aspect="auto",
        extent=(*limits[0], *limits[1]),
        interpolation="bilinear",
        cmap=f"{_COLORMAP}_r",
        vmin=0,
        vmax=1,
    )
    axes.autoscale(False)
    return image


# ---------------------------------------------------------------------- training


def history_figure(history: Mapping[str, Sequence[float]]) -> Figure:
    """Draw the NLL of the train and validation rows by epoch, and the learning rate if known.

    Args:
        history: metric name -> its value after each epoch; reads nll, or else minus elbo, or else
            loss, their validation, and learning_rate.
    """
    figure = Figure(figsize=(8, 5), dpi=100, layout="constrained")
    labels = {"nll": "NLL, nats per row", "elbo": "negative ELBO, nats per row"}
    name = next((name for name in labels if history.get(name)), "loss")
    sign = -1.0 if name == "elbo" else 1.0
    rate = history.get("learning_rate") or history.get("lr")
    above, below = figure.subplots(
        2 if rate else 1, 1, sharex=True, height_ratios=[3, 1] if rate else [1], squeeze=False
    )[[0, -1], 0]
    style_axes(above, "", labels.get(name, name))
    series = {
        title: [sign * value for value in history.get(key) or []]
        for title, key in (("train", name), ("validation", f"val_{name}"))
    }
    for (title, values), color in zip(series.items(), (GREY, BLUE), strict=True):
        if values:
            above.plot(range(1, len(values) + 1), values, color=color, linewidth=2, label=title)
    if held := series["validation"]:
        best = int(np.argmin(held))
        above.plot(best + 1, held[best], "o", color=BLUE, label=f"best: {held[best]:.4g}")
    above.legend(frameon=False)
    late = [v for values in series.values() if values for v in values[len(values) // 20 :]]
    above.set_ylim(*_pad(np.nanmin(late), np.nanmax(late)))  # the first steps may be far off
    if rate:
        style_axes(below, "", "learning rate")
        below.plot(range(1, len(rate) + 1), rate, color=ORANGE, linewidth=2)
        below.set_ylim(bottom=0)
    below.set_xlabel("epoch", color=INK)
    figure.align_ylabels()
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


# ---------------------------------------------------------------------- shared by the figures


def _draw_heat(
    figure: Figure,
    axes: Axes,
    margins: Margins,
    across: tuple[float, float],
    up: tuple[float, float],
    label: str,
) -> None:
    """Draw X densities of one target as columns of colours between the limits `across`."""
    edges = np.linspace(*up, _CELLS + 1)
    density = _mean_density(margins, edges)  # [Y, X]
    image = axes.imshow(
        density,
        origin="lower",
        aspect="auto",
        extent=(*across, *up),
        cmap=_COLORMAP,
        interpolation="bilinear",
        # The square root keeps thin branches in sight, and one narrow peak does not dim the rest.
        norm=PowerNorm(0.5, 0, np.median(density.max(axis=0)) or 1.0),
    )
    axes.autoscale(False)  # a point far off stays out of sight
    _add_bar(figure, image, axes, label, extend="max")


def _add_bar(
    figure: Figure, image: AxesImage, axes: Any, label: str, extend: str = "neither"
) -> Colorbar:
    bar = figure.colorbar(image, ax=axes, pad=0.02, extend=extend)
    bar.set_label(plain(label), color=INK)
    bar.ax.tick_params(color=GREY, labelcolor=INK, labelsize=9)
    bar.outline.set_visible(False)
    return bar


def _draw_bands(axes: Axes, margins: Margins, across: np.ndarray) -> None:
    for share, style in [(0.5, "-"), (0.9, ":")]:
        ends = [margins.quantile(p)[:, 0] for p in (0.5 - share / 2, 0.5 + share / 2)]
        labels = [f"central {share:.0%}", None]
        axes.plot(across, np.transpose(ends), style, color="white", linewidth=1.2, label=labels)
    background = {"facecolor": "black", "edgecolor": "none", "framealpha": 0.4}
    axes.legend(loc="upper left", labelcolor="white", fontsize=9, **background)


def _add_axes(figure: Figure, x_label: str, y_label: str) -> Axes:
    axes = figure.subplots()
    style_axes(axes, x_label, y_label)
    return axes


def _limits(values: np.ndarray) -> tuple[float, float]:
    """Return axis limits: the range of the values, but little of a long tail."""
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0
    low, high = np.quantile(values, [0.01, 0.99])
    reach = 0.25 * (high - low)
    return _pad(max(values.min(), low - reach), min(values.max(), high + reach))


def _pad(low: float, high: float) -> tuple[float, float]:
    margin = 0.04 * (high - low) or 0.5
    return float(low - margin), float(high + margin)


def _centres(low: float, high: float, cells: int = _CELLS) -> np.ndarray:
    """Return the middles of equal cells between the limits."""
    return low + (high - low) * (np.arange(cells) + 0.5) / cells


def _mean_density(margins: Margins, edges: np.ndarray) -> np.ndarray:
    """Return the mean density [Y, X] of X margins between Y + 1 edges: no peak falls through."""
    below = margins.cdf(edges[:, np.newaxis, np.newaxis])[..., 0]  # [Y + 1, X]
    return np.diff(below, axis=0) / np.diff(edges)[:, np.newaxis]


def _take(margins: Margins, index: Any) -> Margins:
    """Return the margins of some of the rows."""
    return dataclasses.replace(
        margins,
        weight=margins.weight[index],
        loc=margins.loc[index],
        scale=margins.scale[index],
    )


def _single_number(x: Features) -> np.ndarray | None:
    """Return the one feature [N] of x, if there is one and it is a number."""
    if isinstance(x, np.ndarray):
        return x[:, 0] if x.shape[1:] == (1,) else None
    column, *others = x.values()
    return None if others or column.dtype.kind != "f" else column
