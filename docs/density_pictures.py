"""The pictures of `docs/density.md`.

python docs/density_pictures.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from mdn.cli.quiet import import_tensorflow

import_tensorflow()

import mdn  # noqa: E402

mpl.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

BLUE, ORANGE, GREY = "#2a6f97", "#e07a2f", "#8a8a8a"
GEYSER = mdn.GaussianMixture(
    logits=np.log([0.36, 0.64]),
    loc=np.array([[2.0, 54.5], [4.3, 80.0]]),
    scale_tril=np.array([[[0.26, 0.0], [1.2, 5.7]], [[0.41, 0.0], [2.2, 5.6]]]),
)
WAIT = GEYSER.marginal(1)
MINUTES = np.linspace(30.0, 105.0, 400)
DURATIONS = np.linspace(1.0, 5.8, 160)


def prob(density: Any, y: np.ndarray = MINUTES) -> np.ndarray:
    """Return the density of one target at y [N]."""
    return density.prob(y[:, np.newaxis]).numpy()


def joint(axes: Any, levels: Any = (0.5, 0.9), color: str = BLUE) -> None:
    """Draw the regions of both targets that hold the given levels."""
    grid = np.stack(np.meshgrid(DURATIONS, MINUTES), axis=-1)
    thresholds = [GEYSER.hdr(level, n=20_000, seed=1).log_threshold.numpy() for level in levels]
    drawn = axes.contour(
        DURATIONS,
        MINUTES,
        GEYSER.log_prob(grid).numpy(),
        sorted(thresholds),
        colors=color,
        linestyles="-",
    )
    names = dict(zip(drawn.levels, [f"{100 * level:.0f} %" for level in sorted(levels)[::-1]],
                     strict=True))  # fmt: skip
    axes.clabel(drawn, fmt=names, fontsize=8)
    axes.set(xlabel="duration, minutes", ylabel="wait, minutes")


def curve(axes: Any, density: Any = WAIT, color: str = BLUE, label: str | None = None) -> None:
    """Draw the density of a wait."""
    axes.plot(MINUTES, prob(density), color=color, label=label)
    axes.set(xlabel="wait, minutes", ylabel="density, 1/minute", ylim=(0.0, None))


def tail(axes: Any) -> None:
    beyond = MINUTES[MINUTES >= 75.0]
    curve(axes)
    axes.fill_between(beyond, prob(WAIT, beyond), color=ORANGE, alpha=0.5)
    share = WAIT.survival_function([75.0]).numpy()[0]
    axes.text(77.5, 0.008, f"{100 * share:.0f} %", fontsize=12)


def interval(axes: Any) -> None:
    curve(axes)
    (low, high), median = WAIT.interval(0.9).numpy()[0], WAIT.quantile(0.5).numpy()[0]
    axes.hlines(0.002, low, high, color=ORANGE, lw=4, label="90 % interval")
    axes.vlines(median, 0.0, prob(WAIT, np.array([median])), color=GREY, ls="--", label="median")
    axes.legend(frameon=False)


def region(left: Any, right: Any) -> None:
    curve(left)
    found = WAIT.hdr(0.9)
    for low, high in found.intervals.numpy()[found.mask]:
        inside = np.linspace(low, high, 100)
        left.fill_between(inside, prob(WAIT, inside), color=ORANGE, alpha=0.5)
    left.axhline(np.exp(found.log_threshold), color=GREY, ls="--", lw=1)
    draws = GEYSER.sample(400, seed=1).numpy()
    right.plot(*draws.T, ".", color=ORANGE, alpha=0.4, ms=4)
    joint(right)


def condition(left: Any, right: Any) -> None:
    joint(left)
    for value, color in ((2.2, ORANGE), (4.5, BLUE)):
        left.axvline(value, color=color, ls="--")
        curve(right, GEYSER.condition({0: value}), color, f"after {value} minutes")
    curve(right, WAIT, GREY, "in general")
    right.set_ylim(0.0, 0.105)  # room for the legend
    right.legend(frameon=False, fontsize=8, loc="upper left")


def modes(axes: Any) -> None:
    joint(axes)
    found = GEYSER.modes()
    axes.plot(*found.loc.numpy()[found.mask].T, "^", color=ORANGE, ms=9, label="modes")
    axes.plot(*GEYSER.mean().numpy(), "x", color="black", ms=9, mew=2, label="mean")
    axes.legend(frameon=False, loc="upper left")


def gap(axes: Any) -> None:
    y = np.stack([DURATIONS, np.full_like(DURATIONS, np.nan)], axis=-1)
    shares = GEYSER.responsibilities(y).numpy()
    for share, color, name in zip(shares.T, (ORANGE, BLUE), ("short", "long"), strict=True):
        axes.plot(DURATIONS, share, color=color, label=name)
    axes.set(xlabel="duration, minutes (the wait is missing)", ylabel="probability of the kind")
    axes.legend(frameon=False)


def pit(left: Any, right: Any) -> None:
    observed = GEYSER.sample(2000, seed=1)
    for axes, model, name in (
        (left, GEYSER, "the mixture"),
        (right, GEYSER.reduce(1).mixture, "one normal"),
    ):
        axes.hist(model.pit(observed).numpy()[:, 0], bins=20, range=(0, 1), density=True,
                  color=BLUE, alpha=0.7)  # fmt: skip
        axes.axhline(1.0, color=ORANGE, ls="--")
        axes.set(xlabel="rank of the duration", ylabel="share / uniform share", title=name)


def crps(axes: Any) -> None:
    axes.plot(MINUTES, WAIT.crps(MINUTES[:, np.newaxis]).numpy()[:, 0], color=BLUE)
    axes.set(xlabel="wait that was observed, minutes", ylabel="CRPS, minutes", ylim=(0.0, None))


def entropy(axes: Any) -> None:
    found = GEYSER.condition({0: DURATIONS}).entropy_estimate(n=500, seed=1)
    axes.fill_between(DURATIONS, found.lower, found.upper, color=ORANGE, alpha=0.4, label="bounds")
    axes.plot(DURATIONS, found.estimate, color=BLUE, label="estimate")
    axes.set(xlabel="duration, minutes", ylabel="entropy of the wait, nats")
    axes.legend(frameon=False)


def draws(*panels: Any) -> None:
    for axes, heat in zip(panels, (0.25, 1.0, 4.0), strict=True):
        y = GEYSER.sample(400, seed=1, temperature=heat, sigma_temperature=heat).numpy()
        axes.plot(*y.T, ".", color=BLUE, alpha=0.4, ms=4)
        axes.set(xlabel="duration, minutes", ylabel="wait, minutes", title=f"both {heat:g}",
                 xlim=(0.5, 6.5), ylim=(30.0, 110.0))  # fmt: skip


def reduce(axes: Any) -> None:
    many = mdn.mixture_of([GEYSER, GEYSER.affine(shift=[0.02, 0.5])])
    axes.plot(MINUTES, prob(many.marginal(1)), color=GREY, alpha=0.4, lw=5, label="4 components")
    axes.set(xlabel="wait, minutes", ylabel="density, 1/minute", ylim=(0.0, None))
    for k, color in ((2, BLUE), (1, ORANGE)):
        merged, bound = many.reduce(k)
        axes.plot(MINUTES, prob(merged.marginal(1)), "--", color=color,
                  label=f"{k}: at most {bound.numpy():.2g} nats")  # fmt: skip
    axes.legend(frameon=False, fontsize=8, loc="upper left")


def cycle(axes: Any) -> None:
    curve(axes, WAIT, BLUE, "wait")
    curve(axes, GEYSER.linear([[1.0, 1.0]]), ORANGE, "duration + wait")
    axes.set_xlabel("minutes")
    axes.legend(frameon=False, loc="upper left")


PICTURES: dict[str, tuple[Callable[..., None], int]] = {
    drawn.__name__: (drawn, panels)
    for drawn, panels in (
        (tail, 1), (interval, 1), (region, 2), (condition, 2), (modes, 1), (gap, 1), (pit, 2),
        (crps, 1), (entropy, 1), (draws, 3), (reduce, 1), (cycle, 1),
    )
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the pictures of docs/density.md.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "density")
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    for name, (drawn, panels) in PICTURES.items():
        size = (3.2 * panels if panels > 1 else 4.6, 2.8)
        figure, axes = plt.subplots(1, panels, figsize=size, layout="constrained", squeeze=False)
        drawn(*axes[0])
        for one in axes[0]:
            one.spines[["top", "right"]].set_visible(False)
        figure.savefig(folder / f"{name}.png", dpi=100)
        plt.close(figure)


if __name__ == "__main__":
    main()
