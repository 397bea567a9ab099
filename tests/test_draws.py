"""Draws from known mixtures: density and entropy against scipy."""

import numpy as np
import pytest
from scipy import stats

from mdn.data.draws import Gaussians, Points, random_gaussians
from mdn.errors import ConfigError, DataError

PLANE = {
    "weights": [1.0, 3.0],
    "loc": [[-2.0, 0.0], [1.0, 1.0]],
    "covariance": [[[1.0, 0.5], [0.5, 2.0]], [[0.5, 0.0], [0.0, 0.5]]],
}


def density(source, y):
    parts = [
        w * stats.multivariate_normal(m, c).pdf(y)
        for w, m, c in zip(source.weights, source.loc, source.covariance, strict=True)
    ]
    return np.sum(parts, axis=0)


@pytest.mark.parametrize("source", [Gaussians(), Gaussians(**PLANE), random_gaussians(4, 3)])
def test_density_moments_and_entropy(source):
    x, y = source.draw(100_000, np.random.default_rng(1))
    assert x.shape == (100_000, 0)
    log_prob = source.log_prob(y, x)
    np.testing.assert_allclose(log_prob[:100], np.log(density(source, y[:100])), rtol=1e-8)
    mean = source.weights @ source.loc
    assert (np.abs(y.mean(axis=0) - mean) < 5 * y.std(axis=0) / len(y) ** 0.5).all()
    error = log_prob.std() / len(y) ** 0.5
    assert abs(source.entropy() + log_prob.mean()) < 5 * error


def test_load_has_no_features():
    data = Gaussians(**PLANE, rows=30, validation_rows=20, test_rows=10).load()
    assert data.features == ()
    assert data.targets == ("y_1", "y_2")
    assert data.train.x.shape == (30, 0)
    assert data.test.y.shape == (10, 2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"weights": [1.0]},
        {"weights": [1.0, -1.0]},
        {"loc": [[0.0, 0.0]]},
        {"loc": [[0.0], [0.0]]},
        {"covariance": [[[1.0, 2.0], [2.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]]]},
        {"covariance": [[[1.0]], [[1.0]]]},
    ],
)
def test_parameters_that_do_not_agree_are_refused(wrong):
    with pytest.raises(ConfigError, match="must agree"):
        Gaussians(**{**PLANE, **wrong})


def test_points():
    data = Points([[1.0, 2.0], [3.0, None]]).load()
    assert data.targets == ("y_1", "y_2")
    np.testing.assert_array_equal(data.train.y, [[1.0, 2.0], [3.0, np.nan]])
    assert Points([1.0, 2.0]).load().train.y.shape == (2, 1)
    with pytest.raises(DataError, match="rows of numbers"):
        Points([[1.0, 2.0], [3.0]])
    with pytest.raises(DataError, match="rows of numbers"):
        Points(["a"])
    with pytest.raises(DataError, match="has shape"):
        Points([])
    with pytest.raises(ConfigError, match="not set"):
        Points()
