"""Plots of a fitted distribution."""

import numpy as np
import pytest

import mdn
from mdn.fit_plots import fit_figure


@pytest.mark.parametrize(("rows", "large"), [(3, True), (1000, False)])
def test_a_few_rows_are_not_overlooked(rows, large):
    y = np.random.default_rng(0).normal(size=(rows, 2))
    fit = mdn.fit_distribution("MultivariateNormalDiag", y, method="exact")
    figure = fit_figure(fit.distribution, y, ["first", "second"])
    (points,) = [line for axes in figure.axes for line in axes.lines if line.get_marker() == "."]
    assert len(points.get_xdata()) == rows
    assert (points.get_markersize() > 5) == large
