"""Plots of a VAE: images drawn from it, images beside their reconstruction, its latent space.

Every function returns a `matplotlib.figure.Figure` and leaves matplotlib's global state alone.

Shape letters: N rows, D pixels, L latent size, K components.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import special

from mdn.data.rows import Data, Rows
from mdn.data.splits import thin
from mdn.figures import GREY, INK, style_axes, write_figures
from mdn.plots import history_figure
from mdn.vae import VAE

_CELLS = 200
_SHARES = (0.99, 0.9, 0.5)  # of the prior's mass inside its contours


def save_vae_plots(
    model: VAE, data: Data, history: Mapping[str, Sequence[float]], directory: str | Path
) -> list[Path]:
    """Write samples.png, reconstructions.png, latent.png (if L > 1) and history.png.

    Args:
        model: trained.
        data: where the test images come from.
        history: metric name -> its value after each epoch; without one there is no history.png.
        directory: made if it is not there.

    Returns:
        The files.

    Raises:
        RunError: a file cannot be written.
    """
    figures = {
        "samples": samples_figure(model, data.image_shape),
        "reconstructions": reconstructions_figure(model, data.test, data.image_shape),
    }
    if model.latent_size > 1:
        figures["latent"] = latent_figure(model, data.test)
    if any(history.values()):
        figures["history"] = history_figure(history)
    return write_figures(figures, directory)


def samples_figure(model: VAE, shape: tuple[int, int] | None = None, seed: int = 0) -> Figure:
    """Draw 80 images from the model: the probabilities of their pixels.

    Args:
        model: trained or not.
        shape: height and width of an image; by default a square, or a line of pixels.
        seed: of the draws.
    """
    rows, columns = 5, 16
    probabilities, _ = model.sample(rows * columns, [seed, 0])
    figure = Figure(figsize=(8, 2.8), dpi=100, layout="constrained")
    axes = figure.subplots()
    _draw_grid(axes, np.asarray(probabilities), columns, _image_shape(model, shape))
    axes.set_title("drawn from the prior: probabilities of the pixels", fontsize=10, color=INK)
    return figure


def reconstructions_figure(model: VAE, rows: Rows, shape: tuple[int, int] | None = None) -> Figure:
    """Draw 16 images above their reconstructions: the pixels' probabilities at the posterior mean.

    Args:
        model: trained or not.
        rows: their targets are the images, of which evenly spaced ones are shown.
        shape: height and width of an image.
    """
    images = rows.y[thin(len(rows), 16)]
    pairs = np.concatenate([images, np.asarray(model(images.astype(np.float32)))])
    figure = Figure(figsize=(8, 1.5), dpi=100, layout="constrained")
    axes = figure.subplots()
    _draw_grid(axes, pairs, len(images), _image_shape(model, shape))
    axes.set_title("images, and below them their reconstructions", fontsize=10, color=INK)
    return figure


def latent_figure(model: VAE, rows: Rows, size: tuple[float, float] = (6.4, 5.2)) -> Figure:
    """Draw the posterior means of images over the contours of the prior.

    Where L > 2 both are projected on the two directions in which the means vary most; the
    projection of a mixture of normals is one too.

    Args:
        model: with L > 1.
        rows: their targets are the images, and their labels the colours.
        size: width and height in inches, at 100 dots each.
    """
    means = np.asarray(model.posterior(rows.y.astype(np.float32)).loc, np.float64)  # [N, L]
    plane = np.eye(2)
    names = ["z1", "z2"]
    if model.latent_size > 2:
        plane = np.linalg.svd(means - means.mean(axis=0), full_matrices=False)[2][:2].T  # [L, 2]
        names = ["first principal direction of z", "second"]
    points = means @ plane  # [N, 2]
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    axes = figure.subplots()
    style_axes(axes, *names)
    _draw_prior(axes, model, plane, points)
    if rows.label is None:
        axes.plot(*points.T, ".", markersize=4, color="#31688e", alpha=0.7)
    else:
        colors = matplotlib.colormaps["tab10"](range(10))
        for i, value in enumerate(np.unique(rows.label)):
            chosen = points[rows.label == value].T
            color = colors[i % len(colors)]
            axes.plot(*chosen, ".", markersize=5, color=color, alpha=0.8, label=value)
        axes.legend(
            frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), markerscale=2, title="label"
        )
    share = ", ".join(f"{share:.0%}" for share in reversed(_SHARES))
    axes.set_title(f"posterior means; contours: {share} of the prior", fontsize=10, color=INK)
    return figure


def _draw_prior(axes: Axes, model: VAE, plane: np.ndarray, points: np.ndarray) -> None:
    """Draw the contours that hold shares of the prior's mass in a plane, [L, 2], of z."""
    parameters = (np.asarray(p, np.float64) for p in model.prior.mixture_parameters())
    logits, loc, scale_tril = parameters
    weight, loc = special.softmax(logits), loc @ plane  # [K], [K, 2]
    factor = np.einsum("li,klm->kim", plane, scale_tril)  # [K, 2, L]
    covariance = factor @ factor.swapaxes(1, 2)
    reach = 3.0 * np.sqrt(np.einsum("kii->ki", covariance))  # [K, 2]
    heavy = weight > 0.01
    low = np.minimum((loc - reach)[heavy].min(axis=0), points.min(axis=0))
    high = np.maximum((loc + reach)[heavy].max(axis=0), points.max(axis=0))
    first, second = (np.linspace(low[i], high[i], _CELLS) for i in range(2))
    grid = np.stack(np.meshgrid(first, second), axis=-1)  # [Y, X, 2]
    density = np.zeros(grid.shape[:2])
    for w, mean, spread in zip(weight, loc, covariance, strict=True):
        residual = grid - mean
        square = np.einsum("yxi,ij,yxj->yx", residual, np.linalg.inv(spread), residual)
        density += w * np.exp(-0.5 * square) / (2.0 * np.pi * math.sqrt(np.linalg.det(spread)))
    ordered = np.sort(density, axis=None)[::-1]
    mass = np.cumsum(ordered) / ordered.sum()
    levels = [ordered[np.searchsorted(mass, share)] for share in _SHARES]
    axes.contourf(
        first, second, density, [*levels, np.inf], colors=["#f4f4f4", "#e6e6e6", "#d2d2d2"]
    )
    axes.contour(first, second, density, levels, colors=GREY, linewidths=0.7)


def _image_shape(model: VAE, shape: tuple[int, int] | None) -> tuple[int, int]:
    if shape is not None:
        return shape
    side = math.isqrt(model.event_size)
    return (side, side) if side**2 == model.event_size else (1, model.event_size)


def _draw_grid(axes: Axes, images: np.ndarray, columns: int, shape: tuple[int, int]) -> None:
    """Draw images, [n, D] of numbers from 0 to 1, in rows of `columns`, ink on white."""
    height, width = shape
    rows = math.ceil(len(images) / columns)
    canvas = np.full([rows, height + 1, columns, width + 1], np.nan)
    tiles = np.full([rows * columns, height, width], np.nan)
    tiles[: len(images)] = images.reshape(-1, height, width)
    canvas[:, :-1, :, :-1] = tiles.reshape(rows, columns, height, width).swapaxes(1, 2)
    axes.imshow(
        canvas.reshape(rows * (height + 1), columns * (width + 1))[:-1, :-1],
        cmap="Greys",
        vmin=0,
        vmax=1,
        interpolation="nearest",
    )
    axes.set_axis_off()
