"""The times of a training step as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmarks.speed.contenders import NETWORK
from benchmarks.speed.measure import Entrant
from benchmarks.speed.results import Results

_COLORS = {"mdn": "#c1272d", "Keras": "#e6a23c", "PyTorch": "#6b7fa8", "JAX": "#5b9a6f"}


def plot(results: Results, path: Path) -> bool:
    """Draw the time of a step by workload and contender; return whether there is any."""
    if not results.race:
        return False
    names = list(results.race)
    labels = list(dict.fromkeys(e.label for name in names for e in results.race[name]))
    size = (2.4 + 2.6 * len(names), 1.3 + 0.34 * len(labels))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(names), sharey=True, squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for entrant in results.race[name]:
            spread = entrant.spread
            if spread is None:
                continue
            place = labels.index(entrant.label)
            bare = entrant.key == NETWORK.key
            color = next(c for family, c in _COLORS.items() if entrant.label.startswith(family))
            error = [[spread.median - spread.least], [spread.most - spread.median]]
            axis.barh(
                place,
                spread.median,
                xerr=error,
                color="white" if bare else color,
                edgecolor=color,
                hatch="////" if bare else None,
                error_kw={"lw": 0.8, "ecolor": "0.25"},
            )
            axis.annotate(
                f"{spread.median:,.0f}",
                (spread.most, place),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        axis.set_xscale("log")
        low, high = _limits(results.race[name])
        axis.set_xlim(10.0 ** np.floor(np.log10(low)), high * 4.0)  # room for the numbers
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_title(f"{name}: D = {_targets(results, name)}", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", which="major", color="0.9", lw=0.8)
        axis.set_axisbelow(True)
        axis.tick_params(axis="x", labelsize=8)
    axes[0][0].set_yticks(range(len(labels)), labels, fontsize=9)
    axes[0][0].invert_yaxis()
    figure.supxlabel("a training step, microseconds (median; least to most)", fontsize=9)
    figure.savefig(path, dpi=150)
    return True


def _limits(entrants: Sequence[Entrant]) -> tuple[float, float]:
    times = [t for e in entrants if e.failure is None for t in e.microseconds] or [1.0]
    return min(times), max(times)


def _targets(results: Results, name: str) -> int:
    return results.race[name][0].workload.targets
