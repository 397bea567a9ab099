"""The evaluation against closed forms, scipy and the simulators' own densities."""

from __future__ import annotations

import dataclasses
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from scipy import stats
from tensorflow_probability import bijectors as tfb

import mdn
from mdn.data.rows import Data, Rows
from mdn.data.simulators import LinearGaussian
from mdn.density.transformed import Transformed
from mdn.errors import RunError
from mdn.evaluation import Gaussian, evaluate, find_counted, finite, print_table
from mdn.margins import Margins

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class FixedModel:
    """Answers every row, or every step, with one density: all that `evaluate` asks of a model.

    Args:
        density: batch [], event [D].
    """

    def __init__(self, density):
        self.density = density
        self.batches = []

    def densities(self, x, batch_size):
        batch_size = batch_size or len(x)
        for start in range(0, len(x), batch_size):
            rows = slice(start, min(start + batch_size, len(x)))
            self.batches.append(rows)
            batch = x[rows].shape[:-1]
            tensors = {
                name: tf.broadcast_to(t, [*batch, *t.shape])
                for name, t in self.density.tensors().items()
            }
            yield rows, type(self.density)(**tensors)


class GaussianTruth:
    """The truth of rows drawn from N(0, I)."""

    def log_prob(self, y, x):
        return stats.norm.logpdf(y).sum(axis=1)

    def entropy(self):
        return HALF_LOG_2PI + 0.5


def normal(d=1, scale=1.0):
    return mdn.MultivariateNormalDiag(tf.zeros(d), tf.fill([d], scale))


def make_data(train_y, test_y, test_weight=None, x=None, truth=None, train_weight=None):
    def rows(y, weight):
        return Rows(np.zeros((*y.shape[:-1], 1)) if x is None else x, y, weight)

    targets = tuple("abcdefgh"[: test_y.shape[-1]])
    train, test = rows(train_y, train_weight), rows(test_y, test_weight)
    return Data(train, test, test, ("x",), targets, truth=truth)


def draw(n, d=1, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d))


# ---------------------------------------------------------------------- evaluate


def test_standard_normal_in_closed_form():
    y = draw(5000)
    model = FixedModel(normal())
    metrics = evaluate(model, make_data(y, y, truth=GaussianTruth()), batch_size=777).metrics
    half_square = 0.5 * y**2
    assert set(metrics) == {
        "test/n",
        "test/nll",
        "test/nll_se",
        "test/rmse",
        "test/rmse/a",
        "test/coverage50",
        "test/coverage90",
        *(
            f"test/{key}{suffix}"
            for key in ("calibration_error", "pit_p", "crps", "crps_skill", "width90")
            for suffix in ("", "/a")
        ),
        "test/regret",
        "test/regret_se",
        "baseline/nll",
        "data/entropy",
    }
    assert metrics["test/n"] == 5000
    assert metrics["test/nll"] == pytest.approx(HALF_LOG_2PI + half_square.mean(), rel=1e-6)
    assert metrics["test/nll_se"] == pytest.approx(half_square.std() / 5000**0.5, rel=1e-5)
    assert metrics["test/rmse"] == metrics["test/rmse/a"] == pytest.approx((y**2).mean() ** 0.5)
    assert metrics["test/coverage50"] == (abs(y) <= stats.norm.ppf(0.75)).mean()
    assert metrics["test/coverage90"] == (abs(y) <= stats.norm.ppf(0.95)).mean()
    assert metrics["test/regret"] == pytest.approx(0, abs=1e-6)
    assert metrics["baseline/nll"] == pytest.approx(
        -stats.norm(*stats.norm.fit(y)).logpdf(y).mean()
    )
    assert metrics["data/entropy"] == pytest.approx(1.418939, abs=1e-6)
    assert all(type(value) is float and math.isfinite(value) for value in metrics.values())
    assert [rows.stop for rows in model.batches] == [777 * i for i in range(1, 7)] + [5000]


def test_regret_of_a_wrong_scale_is_the_divergence():
    y = draw(50_000, 2)
    data = make_data(y, y, truth=GaussianTruth())
    metrics = evaluate(FixedModel(normal(2, scale=2.0)), data).metrics
    divergence = 2 * (math.log(2) + 1 / 8 - 1 / 2)
    assert abs(metrics["test/regret"] - divergence) < 4 * metrics["test/regret_se"]
    assert metrics["test/regret_se"] < 0.01
    assert "test/rmse" not in metrics
    assert metrics["test/coverage50"] == pytest.approx(
        2 * stats.norm.cdf(2 * 0.67449) - 1, abs=0.01
    )


def test_missing_entries_are_marginalised():
    y = draw(400, 2)
    y[:100, 0], y[100:150, 1], y[150:160] = np.nan, np.nan, np.nan
    evaluation = evaluate(FixedModel(normal(2)), make_data(draw(50, 2), y))
    metrics, complete = evaluation.metrics, y[160:]
    assert metrics["test/n"] == 390
    assert metrics["test/n_complete"] == 240
    log_prob = stats.norm.logpdf(y)
    assert metrics["test/nll"] == pytest.approx(-np.nansum(log_prob) / 390, rel=1e-6)
    assert metrics["test/nll_complete"] == pytest.approx(
        -stats.norm.logpdf(complete).sum(axis=1).mean(), rel=1e-6
    )
    baseline = stats.multivariate_normal(draw(50, 2).mean(0), np.cov(draw(50, 2).T, ddof=0))
    assert metrics["baseline/nll_complete"] == pytest.approx(-baseline.logpdf(complete).mean())
    assert metrics["test/rmse/a"] == pytest.approx(np.nanmean(y[:, 0] ** 2) ** 0.5)
    inside = abs(y[~np.isnan(y)]) <= stats.norm.ppf(0.95)
    assert metrics["test/coverage90"] == pytest.approx(inside.mean())
    assert evaluation.calibration.pit.shape == (390, 2)
    np.testing.assert_array_equal(
        np.isnan(evaluation.calibration.pit), np.isnan(np.delete(y, range(150, 160), 0))
    )


@pytest.mark.parametrize("missing", ["none", "every row"])
def test_complete_rows_are_reported_only_beside_others(missing):
    y = draw(100, 2)
    if missing == "every row":
        y[:, 0] = np.nan
    metrics = evaluate(FixedModel(normal(2)), make_data(draw(50, 2), y)).metrics
    assert not [key for key in metrics if "complete" in key]
    assert ("test/rmse/a" in metrics) == (missing == "none")


def test_a_weight_counts_as_copies_of_the_row(monkeypatch):
    monkeypatch.setattr("mdn.evaluation.grid_steps", lambda y: np.zeros(2))  # copies are no ties
    y, copies = draw(60, 2), np.arange(60) % 4
    y[::7, 1] = np.nan
    weighted = make_data(y, y, copies.astype(float), train_weight=copies.astype(float))
    repeated = make_data(*[np.repeat(y, copies, axis=0)] * 2)
    one, two = (evaluate(FixedModel(normal(2)), data).metrics for data in (weighted, repeated))
    assert one.pop("test/n") == 45
    assert one.pop("test/n_complete") < two.pop("test/n_complete")
    del two["test/n"]
    for key in [key for key in one if re.search("_se$|_p|region|_off", key)]:
        del one[key], two[key]  # which are drawn, or know that copies are no rows of their own
    assert one == pytest.approx(two, rel=1e-6)


def test_steps_of_sequences_are_rows_and_padding_is_not():
    y, x = draw(40 * 7).reshape(40, 7, 1), np.zeros((40, 7, 2))
    x[:, 5:] = np.nan  # padding, whatever the targets say
    y[0, :2] = np.nan
    data = make_data(y, y, x=x, test_weight=np.where(np.arange(40) < 39, 1.0, 0.0))
    counted = find_counted(data.test)
    assert counted.sum() == 39 * 5 - 2
    assert not counted[:, 5:].any()
    evaluation = evaluate(FixedModel(normal()), data, batch_size=16)
    assert evaluation.metrics["test/n"] == counted.sum()
    assert evaluation.metrics["test/nll"] == pytest.approx(
        -stats.norm.logpdf(y[counted]).mean(), rel=1e-6
    )
    np.testing.assert_allclose(evaluation.calibration.pit, stats.norm.cdf(y[counted]))


def test_row_without_a_finite_density_is_named():
    y = draw(10)
    y[6] = 1e30  # its square overflows float32
    with pytest.raises(RunError, match="test row 6 "):
        evaluate(FixedModel(normal()), make_data(draw(10), y))


def test_model_against_its_simulator():
    data = LinearGaussian(rows=500, validation_rows=10, test_rows=2000).load()
    model = mdn.MDN(mdn.heads.Mixture(1, 2), mdn.backbones.MLP([8]))
    model.adapt(data.train.x, data.train.y)
    one, two = (evaluate(model, data, size).metrics for size in (4096, 600))
    assert one == pytest.approx(two, rel=1e-5)
    truth = -data.truth.log_prob(data.test.y, data.test.x).mean()
    assert one["test/nll"] - truth == pytest.approx(one["test/regret"], abs=1e-6)


# ---------------------------------------------------------------------- margins


@pytest.fixture(scope="module")
def mixture():
    rng = np.random.default_rng(0)
    scale_tril = np.tril(rng.normal(size=(5, 3, 2, 2))) + 2 * np.eye(2)
    return mdn.GaussianMixture(
        *(a.astype("f") for a in (rng.normal(size=(5, 3)), rng.normal(size=(5, 3, 2)), scale_tril))
    )


def test_margins_against_scipy(mixture):
    margins = Margins.of(mixture)
    y = draw(5, 2)
    covariance = mixture.scale_tril.numpy() @ mixture.scale_tril.numpy().swapaxes(-1, -2)
    sd = np.sqrt(np.diagonal(covariance, axis1=-2, axis2=-1))  # [5, K, 2]
    cdf = stats.norm.cdf(y[:, None], mixture.loc.numpy(), sd)
    weight = tf.nn.softmax(mixture.logits).numpy()[..., None]
    np.testing.assert_allclose(margins.cdf(y), (weight * cdf).sum(1), rtol=1e-5)
    np.testing.assert_allclose(margins.mean(), mixture.mean(), rtol=1e-5)


def test_mean_of_a_heavy_tail_does_not_overflow_at_nodes_that_weigh_nothing():
    normal = mdn.MultivariateNormalDiag(np.zeros([1], "f"), np.full([1], 6.5, "f"))
    found = Margins.of(Transformed(normal, tfb.Exp())).mean()
    np.testing.assert_allclose(found, [math.exp(6.5**2 / 2)], rtol=1e-4)


def test_metrics_that_json_cannot_hold_are_named(caplog):
    metrics = {"test/nll": 1.5, "test/rmse": math.inf, "test/crps": math.nan}
    assert finite(metrics) == {"test/nll": 1.5}
    assert "left out of the metrics: test/rmse, test/crps" in caplog.text


@pytest.mark.parametrize("probability", [1e-6, 0.05, 0.5, 0.999])
def test_quantile_inverts_the_cdf(mixture, probability):
    margins = Margins.of(mixture)
    quantile = margins.quantile(probability)
    assert quantile.shape == (5, 2)
    np.testing.assert_allclose(margins.cdf(quantile), probability, rtol=1e-9)


# ---------------------------------------------------------------------- baseline


@pytest.mark.parametrize("d", [1, 3])
def test_complete_baseline_has_the_sample_moments(d):
    y = draw(200, d) @ np.tril(draw(d, d, seed=1) + 2 * np.eye(d)) * 1e3 + 1e5
    weight = np.random.default_rng(2).uniform(0.1, 2, 200)
    baseline = Gaussian.fit(y, weight)
    np.testing.assert_allclose(baseline.loc, np.average(y, axis=0, weights=weight))
    covariance = np.atleast_2d(np.cov(y.T, aweights=weight, ddof=0))
    np.testing.assert_allclose(baseline.covariance, covariance, rtol=1e-6)
    oracle = stats.multivariate_normal(baseline.loc, baseline.covariance)
    np.testing.assert_allclose(baseline.log_prob(y), oracle.logpdf(y))


def test_baseline_log_prob_marginalises():
    baseline = Gaussian(np.array([1.0, 2.0, 3.0]), np.cov(draw(20, 3).T))
    y = draw(8, 3)
    y[np.arange(8)[:, None] >> np.arange(3) & 1 == 1] = np.nan  # every pattern once
    expected = []
    for row in y:
        there = ~np.isnan(row)
        block = baseline.covariance[np.ix_(there, there)]
        oracle = stats.multivariate_normal(baseline.loc[there], block) if there.any() else None
        expected.append(oracle.logpdf(row[there]) if oracle else 0.0)
    np.testing.assert_allclose(baseline.log_prob(y), expected)


def gappy(n=20_000):
    """Return y whose second entry is missing where the first is high: at random, given it."""
    first = draw(n)[:, 0]
    second = 0.8 * first + 0.6 * draw(n, seed=1)[:, 0]
    return np.stack([first, np.where(first > 0.5, np.nan, second)], axis=1)


def test_em_undoes_the_bias_of_dropping_rows():
    y = gappy()
    baseline = Gaussian.fit(y, np.ones(len(y)))
    np.testing.assert_allclose(baseline.loc, [0, 0], atol=0.03)
    np.testing.assert_allclose(baseline.covariance, [[1, 0.8], [0.8, 1]], atol=0.03)
    assert np.nanmean(y[:, 1]) < -0.3  # what the rows at hand say


def test_em_of_a_monotone_pattern_is_the_regression():
    y = gappy(500)
    baseline = Gaussian.fit(y, np.ones(len(y)))
    both = y[~np.isnan(y).any(axis=1)]
    slope, intercept = np.polyfit(*both.T, 1)
    variance = y[:, 0].var()
    assert baseline.loc[1] == pytest.approx(intercept + slope * y[:, 0].mean(), abs=1e-6)
    assert baseline.covariance[0, 1] == pytest.approx(slope * variance, abs=1e-6)
    residual = np.var(both[:, 1] - slope * both[:, 0])
    assert baseline.covariance[1, 1] == pytest.approx(residual + slope**2 * variance, abs=1e-6)


def test_targets_that_determine_each_other_have_a_finite_baseline():
    y = draw(100) * [1.0, -2.0]
    assert np.isfinite(Gaussian.fit(y, np.ones(100)).log_prob(y)).all()


# ---------------------------------------------------------------------- table


def test_table_shows_the_metrics_in_eighty_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    y = draw(1000, 2)
    y[0, 0] = np.nan
    targets = ("price " * 20, "rate :x:[/m]")  # which rich would take for an icon and for markup
    data = dataclasses.replace(make_data(y, y, truth=None), targets=targets)
    metrics = evaluate(FixedModel(normal(2)), data).metrics
    print_table({**metrics, "train/seconds": 3.0})
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    for shown in ("1,000 test rows", "RMSE of rate :x:[/m]", "all targets"):
        assert shown in text
    for key in ("test/nll", "test/nll_se", "baseline/nll", "baseline/nll_complete"):
        assert f"{metrics[key]:.4f}" in text
    assert "3.0" not in text


def test_import_is_free_of_tensorflow():
    code = "import sys, mdn.plots; assert not {'tensorflow', 'matplotlib.pyplot'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
