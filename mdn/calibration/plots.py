"""Figures of calibration: a page for a report, and the ranks of an SBC.

Grey bands hold what a calibrated density shows in 95 of 100 cases.

Shape letters: N rows, D event size.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from mdn.calibration.simulations import SBC, ecdf_band
from mdn.calibration.slices import Slice
from mdn.calibration.uniformity import (
    BINS,
    histogram_band,
    relative_histogram,
    share_band,
)
from mdn.figures import BLUE, GREY, INK, RED, SERIES, plain, style_axes

if TYPE_CHECKING:
    from mdn.calibration.summary import Report

_LEVELS = np.linspace(0.0, 1.0, 201)
_MOST_SLICES = 12
_BAND: dict[str, Any] = {"color": GREY, "alpha": 0.25, "linewidth": 0}


def calibration_figure(report: Report) -> Figure:
    """Draw a report: PIT, quantiles, coverage, and below them the slices.

    Args:
        report: of up to five targets; more are left out of the picture.
    """
    chosen = _chosen_slices(report.slices)
    rows = len(chosen)
    height = 4.0 + (0.9 + 0.24 * rows if rows else 0.0)
    figure = Figure(figsize=(11, height), dpi=100, layout="constrained")
    above: Any = figure
    if rows:
        parts: Any = figure.subfigures(2, 1, height_ratios=[4.0, height - 4.0])
        above = parts[0]
    left, middle, right = above.subplots(1, 3)
    shown = [d for d in range(len(report.targets)) if report.test(d).n][: len(SERIES)]
    _draw_histogram(left, report, shown)
    _draw_quantiles(middle, report, shown)
    _draw_coverage(right, report, shown)
    if rows:
        _draw_slices(parts[1], chosen, report)
    return figure


def _draw_histogram(axes: Axes, report: Report, shown: list[int]) -> None:
    style_axes(axes, "PIT: P(Y < y) by the density", "frequency, relative to uniform")
    fewest = min((report.test(d).n for d in shown), default=1.0)
    bins = int(np.clip(fewest // 5, 2, BINS))
    low, high = histogram_band(fewest, bins)
    axes.axhspan(low, high, **_BAND)
    axes.axhline(1, color=GREY, linewidth=1)
    top = 2.0
    for d, color in zip(shown, SERIES, strict=False):
        heights = relative_histogram(report.pit[:, d], bins, report.weight)
        top = max(top, 1.1 * heights.max())
        edges = np.linspace(0, 1, bins + 1)
        axes.stairs(heights, edges, baseline=None, color=color, linewidth=1.8)
        if len(shown) == 1:
            axes.stairs(heights, edges, color=color, alpha=0.2, fill=True)
    axes.set(xlim=(0, 1), ylim=(0, top), box_aspect=1)
    note = "grey: 95 % of cases, if calibrated"
    axes.text(0.5, 0.03, note, transform=axes.transAxes, ha="center", fontsize=8, color=INK)
    title = "Are all ranks as frequent?"
    if len(shown) == 1:
        title += f"  p = {_p(report.test(shown[0]).p_value)}"
    _title(axes, title)


def _draw_quantiles(axes: Axes, report: Report, shown: list[int]) -> None:
    style_axes(axes, "quantile of the density", "share of y below it, minus nominal")
    reach = 0.03
    for d, color in zip(shown, SERIES, strict=False):
        off = report.below(_LEVELS, d) - _LEVELS
        reach = max(reach, 1.15 * np.abs(off).max())
        axes.plot(_LEVELS, off, color=color, linewidth=1.8)
    _draw_band(axes, report, shown, minus=True)
    axes.set(xlim=(0, 1), ylim=(-reach, reach), box_aspect=1)
    _percent(axes)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    _title(axes, "Are the quantiles right?")


def _draw_coverage(axes: Axes, report: Report, shown: list[int]) -> None:
    style_axes(axes, "level of the region", "share of y inside")
    for d, color in zip(shown, SERIES, strict=False):
        label = plain(report.targets[d]) if len(report.targets) > 1 else "central intervals"
        marks: dict[str, Any] = {"marker": "o", "markersize": 4, "markevery": [100, 180]}
        axes.plot(
            _LEVELS, report.coverage(_LEVELS, d), color=color, linewidth=1.8, label=label, **marks
        )
    axes.plot(
        _LEVELS,
        report.region_coverage(_LEVELS),
        "--",
        color=INK,
        linewidth=1.2,
        label="all together" if len(report.targets) > 1 else "highest density",
    )
    _draw_band(axes, report, shown)
    axes.set(xlim=(0, 1), ylim=(0, 1), box_aspect=1)
    axes.legend(frameon=False, loc="upper left", fontsize=9, labelcolor=INK)
    _percent(axes)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    inside = report.coverage(0.9)
    _title(axes, f"Do the intervals hold?  90 %: {inside:.1%}")


def _draw_band(axes: Axes, report: Report, shown: list[int], minus: bool = False) -> None:
    fewest = min((report.test(d).n for d in shown), default=1.0)
    low, high = share_band(fewest, _LEVELS)
    base = _LEVELS if minus else np.zeros_like(_LEVELS)
    axes.fill_between(_LEVELS, low - base, high - base, **_BAND)
    axes.plot([0, 1], [0, 0 if minus else 1], color=GREY, linewidth=1)


def _chosen_slices(slices: tuple[Slice, ...]) -> list[Slice]:
    """Return the slices to show: those farthest off, in the order of the report."""
    if len(slices) <= _MOST_SLICES:
        return list(slices)
    order = np.argsort([each.p_value for each in slices], kind="stable")[:_MOST_SLICES]
    return [slices[i] for i in sorted(order)]


def _draw_slices(figure: Any, chosen: list[Slice], report: Report) -> None:
    """Draw the coverage of the 50 % and of the 90 % intervals of each slice, and its mean PIT."""
    panels = figure.subplots(1, 3, sharey=True, width_ratios=[1.0, 1.0, 1.0])
    place = np.arange(len(chosen))[::-1]
    n = np.array([each.n for each in chosen])
    colors = [RED if each.adjusted_p < 0.05 else BLUE for each in chosen]
    series = [
        ("share inside of 50 % intervals", [s.coverage50 for s in chosen], 0.5),
        ("share inside of 90 % intervals", [s.coverage90 for s in chosen], 0.9),
        ("mean PIT: y is lower | higher", [s.mean for s in chosen], None),
    ]
    for axes, (label, values, level) in zip(panels, series, strict=True):
        style_axes(axes, label, "")
        middle = 0.5 if level is None else level
        if level is None:
            half = 1.96 / np.sqrt(12.0 * n)
            low, high = 0.5 - half, 0.5 + half
        else:
            low, high = np.transpose([share_band(size, np.array(level)) for size in n])
        axes.hlines(place, low, high, color=GREY, alpha=0.3, linewidth=9)
        axes.axvline(middle, color=GREY, linewidth=1)
        axes.scatter(values, place, c=colors, s=26, zorder=3)
        reach = 1.15 * max(0.05, np.abs(np.array([values, low, high]) - middle).max())
        axes.set_xlim(max(0.0, middle - reach), min(1.0, middle + reach))
        if level is not None:
            axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.tick_params(left=False)
        axes.spines["left"].set_visible(False)
    many = len(report.targets) > 1
    names = [
        f"{_short(each.target, 12) + ': ' if many else ''}{_short(each.by)}  {_short(each.label)}"
        for each in chosen
    ]
    panels[0].set_yticks(place, [plain(name) for name in names])
    panels[0].set_ylim(-0.7, len(chosen) - 0.3)
    off = sum(each.adjusted_p < 0.05 for each in report.slices)
    total = len(report.slices)
    which = "all" if len(chosen) == total else f"the {len(chosen)} farthest off of"
    title = f"Parts of the rows: {which} {total} slices"
    title += f"; red: off by more than chance ({off})" if off else "; none is off beyond chance"
    figure.suptitle(title, fontsize=10, color=INK)


def sbc_figure(found: SBC) -> Figure:
    """Draw the rank histogram of each parameter and of the joint density, and their ECDFs.

    Args:
        found: of up to eight parameters; more are left out of the picture.
    """
    columns = [*found.uniform.T[:8], found.region]
    titles = [*found.names[:8], found.region_name]
    figure = Figure(figsize=(max(5.0, 2.7 * len(columns)), 5.0), dpi=100, layout="constrained")
    panels = figure.subplots(2, len(columns), sharey="row", squeeze=False)
    n = len(found.ranks)
    bins = int(np.clip(n // 20, 5, BINS))
    low, high = histogram_band(n, bins)
    reach = ecdf_band(n)
    largest = reach
    for (above, below), ranks, title in zip(panels.T, columns, titles, strict=True):
        heights = relative_histogram(ranks, bins)
        style_axes(above, "", "")
        above.axhspan(low, high, **_BAND)
        above.axhline(1, color=GREY, linewidth=1)
        above.stairs(heights, np.linspace(0, 1, bins + 1), color=BLUE, alpha=0.25, fill=True)
        above.stairs(
            heights, np.linspace(0, 1, bins + 1), baseline=None, color=BLUE, linewidth=1.5
        )
        test = found.test_region() if title == found.region_name else found.test(title)
        _title(above, f"{plain(title)}  p = {_p(test.p_value)}")
        above.set(xlim=(0, 1))
        order = np.sort(ranks)
        off = np.arange(1, n + 1) / n - order
        style_axes(below, "rank of the true value", "")
        below.axhspan(-reach, reach, **_BAND)
        below.axhline(0, color=GREY, linewidth=1)
        below.plot(order, off, color=BLUE, linewidth=1.5)
        below.set(xlim=(0, 1))
        largest = max(largest, np.abs(off).max())
    top = max(2.0, 1.05 * max(relative_histogram(ranks, bins).max() for ranks in columns))
    panels[0, 0].set_ylim(0, top)
    panels[0, 0].set_ylabel("frequency, relative to uniform", color=INK)
    panels[1, 0].set_ylim(-1.15 * largest, 1.15 * largest)
    panels[1, 0].set_ylabel("ECDF minus uniform", color=INK)
    return figure


def _percent(axes: Axes) -> None:
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, fontsize=10, color=INK)


def _short(text: str, most: int = 22) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _p(value: float) -> str:
    if value >= 0.01:
        return f"{value:.2f}"
    return f"10$^{{{math.floor(math.log10(value))}}}$" if value > 1e-300 else "0"
