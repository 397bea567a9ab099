"""The figures: one way to draw for each shape of data, on any rows, as files that open."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats

import mdn
from mdn.calibration import report
from mdn.data.rows import Data, Rows
from mdn.errors import RunError
from mdn.evaluation import Evaluation
from mdn.margins import Margins
from mdn.plots import (
    _draw_regions,
    _limits,
    _mean_density,
    density_figure,
    history_figure,
    save_plots,
)

N = 60


def make_data(features, d, steps=None, table=False, gaps=True):
    rng = np.random.default_rng(0)
    leading = (N,) if steps is None else (N, steps)
    x = rng.normal(size=(*leading, features))
    y = rng.standard_t(2, size=(*leading, d))
    if gaps:
        y[::5, ..., 0] = np.nan
    if steps:
        x[::2, steps // 2 :] = np.nan
    names = tuple(f"x{i}" for i in range(features))
    if table:
        rows = Rows({"kind": np.array(["a", None, "b"] * (N // 3), object), "x0": x[:, 0]}, y)
        names = ("kind", "x0")
    else:
        rows = Rows(x, y)
    return Data(rows, rows, rows, names, tuple(f"y{i}" for i in range(d)), missing="indicator")


def make_model(data, backbone=None):
    model = mdn.MDN(mdn.heads.Mixture(len(data.targets), 2), backbone or mdn.backbones.MLP([4]))
    model.adapt(data.train.x, data.train.y, missing=data.missing)
    return model


# name -> (data, backbone, its labels (horizontal, vertical) of the first panel, panels)
CASES = {
    "one number": (make_data(1, 1), None, ("x0", "y0"), 1),
    "columns": (
        make_data(1, 1, table=True),
        None,
        ("rows, in the order of their predicted mean", "y0"),
        1,
    ),
    "unconditional": (make_data(2, 1), mdn.backbones.Constant(), ("y0", "p(y0)"), 1),
    "two targets": (make_data(2, 2), None, ("y0", "y1"), 4),
    "four targets": (make_data(1, 4), None, ("y0", "y1"), 4),
    "unconditional plane": (make_data(2, 2), mdn.backbones.Constant(), ("y0", "y1"), 1),
    "sequences": (make_data(2, 1, steps=6), mdn.backbones.LSTM([3]), ("step", "y0"), 1),
    "sequences, two targets": (
        make_data(2, 2, steps=6),
        mdn.backbones.LSTM([3]),
        ("step", "y0"),
        1,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_density_figure_suits_the_shapes(name):
    data, backbone, labels, panels = CASES[name]
    figure = density_figure(make_model(data, backbone), data, size=(6, 4))
    drawn = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    assert len(drawn) == panels
    assert (drawn[0].get_xlabel(), drawn[0].get_ylabel()) == labels
    figure.canvas.draw()
    assert labels[1] == "p(y0)" or len(figure.axes) == panels + 1  # a colour bar
    for axes in drawn:
        (low, high), (bottom, top) = axes.get_xlim(), axes.get_ylim()
        assert low < high
        assert bottom < top


@pytest.mark.parametrize("d", [1, 2])
def test_names_are_neither_mathematics_nor_markup(d):
    data = make_data(1, d)
    names = {"features": ("size_$",), "targets": ("price_$[/m2]", "cost_$")[:d]}
    data = dataclasses.replace(data, **names)
    model = make_model(data)
    density_figure(model, data).canvas.draw()
    found = report(model, data.test.x, data.test.y, **names)
    found.plot().canvas.draw()
    assert "price_$[/m2]" in repr(found)


@pytest.mark.parametrize("y", [[[np.nan, 1.0]] * 3, [[1.0, np.nan]] * 3, [[2.0, 3.0]]])
def test_planes_of_few_or_incomplete_rows(y):
    data = make_data(2, 2)
    rows = Rows(np.arange(2.0 * len(y)).reshape(-1, 2), np.array(y))
    density_figure(make_model(data), data, rows).canvas.draw()


def test_other_rows_than_the_test_rows():
    data = make_data(1, 1, gaps=False)
    shifted = Rows(data.test.x + 100, data.test.y)
    figure = density_figure(make_model(data), data, shifted)
    low, high = figure.axes[0].get_xlim()
    assert 90 < low < high < 110
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_xdata(), shifted.x[:, 0])


def test_heat_is_the_density():
    data = make_data(1, 1, gaps=False)
    model = make_model(data)
    axes = density_figure(model, data).axes[0]
    (image,) = axes.images
    low, high, bottom, top = image.get_extent()
    cells = np.asarray(image.get_array())  # [Y, X]
    x = low + (high - low) * (100 + 0.5) / cells.shape[1]
    y = bottom + (top - bottom) * (np.arange(len(cells)) + 0.5) / len(cells)
    density = model(np.full((len(y), 1), x, "f")).prob(y[:, None].astype("f"))
    np.testing.assert_allclose(cells[:, 100], density, atol=0.02 * density.numpy().max())


def test_mean_density_keeps_a_peak_between_two_points():
    margins = Margins(np.ones((1, 1)), np.full((1, 1, 1), 0.123), np.full((1, 1, 1), 1e-6))
    edges = np.linspace(0, 1, 11)
    np.testing.assert_allclose(_mean_density(margins, edges)[:, 0], np.eye(10)[1] * 10, atol=1e-9)


def test_regions_hold_their_share_of_a_gaussian():
    axes = Figure().subplots()
    scale_tril = np.array([[2.0, 0.0], [-1.0, 0.5]])
    margins = Margins(np.ones(1), np.zeros((1, 2)), np.linalg.norm(scale_tril, axis=1)[None])
    image = _draw_regions(axes, margins, scale_tril[None], [(-9.0, 9.0), (-5.0, 5.0)])
    inside = np.asarray(image.get_array())
    x, y = (h * ((np.arange(150) + 0.5) / 75 - 1) for h in (9, 5))
    points = np.stack(np.meshgrid(x, y), -1)  # [Y, X, 2]
    square = (np.linalg.solve(scale_tril, points[..., None]) ** 2).sum((-2, -1))
    np.testing.assert_allclose(inside, stats.chi2(2).cdf(square), atol=0.01)


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        (np.linspace(0, 1, 1001), -0.04, 1.04),
        (np.append(np.linspace(0, 1, 1001), 1e6), -0.05, 1.3),
        (np.array([3.0, 3.0, np.nan]), 2.5, 3.5),
        (np.array([np.nan]), 0, 1),
    ],
)
def test_limits_leave_out_a_long_tail(values, low, high):
    np.testing.assert_allclose(_limits(values), (low, high), atol=0.03)


HISTORY = {"loss": [3.0, 2.0], "nll": [2.9, 1.9], "val_nll": [2.5, 2.7], "learning_rate": [0.1, 0]}


@pytest.mark.parametrize(
    ("keys", "labels"),
    [
        (["loss", "nll", "val_nll", "learning_rate"], ["NLL, nats per row", "learning rate"]),
        (["nll"], ["NLL, nats per row"]),
        (["loss"], ["loss"]),
    ],
)
def test_history_figure_draws_what_there_is(keys, labels):
    figure = history_figure({key: HISTORY[key] for key in keys})
    figure.canvas.draw()
    assert [axes.get_ylabel() for axes in figure.axes] == labels
    curves = {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines}
    assert curves["train"] == HISTORY["nll" if "nll" in keys else "loss"]
    if "val_nll" in keys:
        assert curves["validation"] == HISTORY["val_nll"]
        assert curves["best: 2.5"] == [2.5]


def test_history_of_one_epoch():
    history_figure({"nll": [1.0], "val_nll": [1.0]}).canvas.draw()


def test_save_plots_writes_pictures_that_open(tmp_path):
    data = make_data(1, 1)
    model = make_model(data)
    evaluation = Evaluation({}, report(model, data.test.x, data.test.y))
    paths = save_plots(model, data, HISTORY, evaluation, tmp_path / "new" / "plots")
    assert [path.name for path in paths] == ["density.png", "history.png", "calibration.png"]
    for path in paths:
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert min(image.size) >= 500
            assert len(np.unique(np.asarray(image.convert("L")))) > 50
    without = save_plots(model, data, {}, evaluation, tmp_path)
    assert [path.name for path in without] == ["density.png", "calibration.png"]


def test_directory_that_cannot_be_written(tmp_path):
    data = make_data(1, 1)
    (tmp_path / "plots").write_text("a file")
    model = make_model(data)
    evaluation = Evaluation({}, report(model, data.test.x, data.test.y))
    with pytest.raises(RunError, match=r"cannot write .*density\.png"):
        save_plots(model, data, {}, evaluation, tmp_path / "plots")
