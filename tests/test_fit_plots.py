"""Plots of a fitted distribution."""

import numpy as np
import pytest

import mdn
from mdn.fit_plots import fit_figure


def points_of(figure):
    (points,) = [line for axes in figure.axes for line in axes.lines if line.get_marker() == "."]
    return points


@pytest.mark.parametrize(("rows", "large"), [(3, True), (1000, False)])
def test_a_few_rows_are_not_overlooked(rows, large):
    y = np.random.default_rng(0).normal(size=(rows, 2))
    fit = mdn.fit_distribution("MultivariateNormalDiag", y, method="exact")
    figure = fit_figure(fit.distribution, y, ["first", "second"])
    points = points_of(figure)
    assert len(points.get_xdata()) == rows
    assert (points.get_markersize() > 5) == large


def test_many_rows_are_shown_from_first_to_last():
    y = np.stack([np.arange(9000.0), np.random.default_rng(0).normal(size=9000)], axis=1)
    fit = mdn.fit_distribution("MultivariateNormalDiag", y, method="exact")
    shown = points_of(fit_figure(fit.distribution, y, ["first", "second"])).get_xdata()
    assert len(shown) <= 4000
    assert shown.min() < 10
    assert shown.max() > 8990
