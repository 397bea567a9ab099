"""Calibration against densities that are right, and against ones whose error is known."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import tensorflow as tf
from scipy import integrate, stats

import mdn
from mdn.calibration import check_uniformity, report, sbc
from mdn.calibration.plots import calibration_figure, sbc_figure
from mdn.calibration.scores import marginal_crps, region_levels, score
from mdn.calibration.slices import find_slices, split
from mdn.calibration.uniformity import (
    histogram_band,
    relative_histogram,
    share_band,
    share_below,
)
from mdn.data.simulators import TwoGaussians
from mdn.density.transformed import Transformed
from mdn.errors import ConfigError, DataError

N = 4000


def normal(scale=1.0, loc=0.0, d=1):
    return mdn.MultivariateNormalDiag(np.full(d, loc), np.full(d, scale))


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def binomial_error(share, n):
    return math.sqrt(share * (1.0 - share) / n)


# ---------------------------------------------------------------------- uniform ranks


def test_p_values_of_uniform_ranks_are_uniform():
    rng = np.random.default_rng(0)
    found = [check_uniformity(rng.uniform(size=400)) for _ in range(250)]
    for name in ("p_value", "chi_square_p"):
        p = np.array([getattr(each, name) for each in found])
        assert abs((p < 0.1).mean() - 0.1) < 4 * binomial_error(0.1, len(p))
        assert stats.kstest(p, "uniform").pvalue > 1e-3
    verdicts = [each.describe() for each in found]
    assert verdicts.count("calibrated") >= 240  # at the 1 % level


@pytest.mark.parametrize(
    ("density", "verdict"),
    [
        (normal(), "calibrated"),
        (normal(1.5), "too wide"),
        (normal(1 / 1.5), "too narrow"),
        (normal(loc=-0.3), "too low"),
        (normal(loc=0.3), "too high"),
        (normal(1.5, loc=0.3), "too wide, too high"),
    ],
)
def test_verdict_has_the_direction(density, verdict):
    found = report(density, y=draw(N, 1))
    assert found.test().describe() == verdict
    assert (found.test().p_value < 1e-6) == (verdict != "calibrated")


def test_weighted_ranks_are_worth_fewer_rows():
    ranks, weight = np.random.default_rng(0).uniform(size=1000), np.repeat([0.0, 1.0, 3.0], 1000)
    ranks = np.tile(ranks, 3)
    found = check_uniformity(ranks, weight)
    assert found.n == pytest.approx(4000**2 / 10_000)  # Kish
    shown = relative_histogram(ranks, 4, weight)
    np.testing.assert_allclose(shown, relative_histogram(ranks[:1000], 4))
    assert share_below(ranks, 0.3, weight) == pytest.approx((ranks[:1000] <= 0.3).mean())


def test_bands_hold_what_they_say():
    rng = np.random.default_rng(0)
    ranks = rng.uniform(size=(400, 300))
    low, high = share_band(300, np.array(0.3))
    shares = [share_below(row, 0.3) for row in ranks]
    inside = np.mean([low <= share <= high for share in shares])
    # The distribution is discrete: of at least 95 %.
    assert 0.95 - 4 * binomial_error(0.95, 400) < inside < 0.99
    low, high = histogram_band(300, 10)
    heights = np.concatenate([relative_histogram(row, 10) for row in ranks])
    assert 0.94 < np.mean((heights >= low - 1e-9) & (heights <= high + 1e-9)) < 0.985


# ---------------------------------------------------------------------- ranks and scores


@pytest.mark.parametrize("d", [2, 3])
def test_regions_of_a_mixture_hold_their_share(d):
    rng = np.random.default_rng(d)
    scale_tril = np.tril(rng.normal(size=(3, d, d)), -1) + np.eye(d)
    mixture = mdn.GaussianMixture(rng.normal(size=3), 3 * rng.normal(size=(3, d)), scale_tril)
    y = mixture.sample(3000, seed=1).numpy()
    levels = region_levels(mixture, y, draws=9)  # uniform however few draws there are
    assert check_uniformity(levels).p_value > 1e-3
    many = region_levels(mixture, y[:300], draws=4000, seed=1)
    for level in (0.5, 0.9):
        threshold = mixture.hdr(level, n=40_000, seed=3).log_threshold.numpy()
        inside = mixture.log_prob(y[:300]).numpy() >= threshold
        assert (inside == (many <= level)).mean() > 0.96  # but for those at the edge


def test_regions_of_a_normal_in_closed_form():
    y = draw(200, 3)
    expected = stats.chi2(3).cdf((y**2).sum(axis=1))
    found = region_levels(normal(d=3), y, draws=4000)
    assert np.abs(found - expected).max() < 5 * 0.5 / math.sqrt(4000)


def test_regions_of_rows_with_missing_entries_are_of_the_others():
    y = draw(200, 3)
    y[:, 1] = np.nan
    expected = stats.chi2(2).cdf((y[:, [0, 2]] ** 2).sum(axis=1))
    found = region_levels(normal(d=3), y, draws=4000)
    assert np.abs(found - expected).max() < 5 * 0.5 / math.sqrt(4000)


def test_scores_are_those_of_the_density():
    rng = np.random.default_rng(0)
    mixture = mdn.GaussianMixture(
        rng.normal(size=(50, 3)),
        rng.normal(size=(50, 3, 2)),
        np.tril(rng.normal(size=(50, 3, 2, 2)), -1) + np.eye(2),
    )
    y = draw(50, 2)
    y[3, 1] = np.nan
    found = score(mixture, y)
    np.testing.assert_allclose(found.pit, mixture.cdf(y), atol=1e-12)
    np.testing.assert_allclose(found.crps, mixture.crps(y), rtol=1e-9)
    observed = np.where(np.isnan(y), np.nan, mixture.mean())
    np.testing.assert_allclose(found.mean, observed, rtol=1e-9)
    width = np.diff(mixture.interval(0.9).numpy(), axis=-1)[..., 0]
    np.testing.assert_allclose(found.width90[:3], width[:3], rtol=1e-9)
    assert np.isnan(found.width50[3, 1])


def test_crps_of_transformed_targets_is_unbiased():
    from tensorflow_probability import bijectors as tfb

    y = np.exp(draw(80, 1))
    density = Transformed(normal(), tfb.Exp())
    found = score(density, y, draws=500).crps[:, 0]

    def quadrature(given):
        law = stats.lognorm(1.0)
        below = integrate.quad(lambda t: law.cdf(t) ** 2, 0, given)[0]
        return below + integrate.quad(lambda t: law.sf(t) ** 2, given, np.inf)[0]

    difference = found - [quadrature(given) for given in y[:, 0]]
    assert abs(difference.mean()) < 4 * difference.std() / math.sqrt(80)
    assert difference.std() < 0.15


def test_crps_of_the_marginal_is_that_of_all_pairs():
    y, reference, weight = draw(7, 1), draw(9, 1, seed=1), np.arange(9.0)
    y[2], reference[4] = np.nan, np.nan
    kept = ~np.isnan(reference[:, 0])
    values, share = reference[kept, 0], weight[kept] / weight[kept].sum()
    between = share @ np.abs(values[:, None] - values) @ share
    expected = np.abs(y - values) @ share - 0.5 * between
    np.testing.assert_allclose(marginal_crps(y, reference, weight)[:, 0], expected)


# ---------------------------------------------------------------------- the report


def test_coverage_of_a_density_that_is_too_wide():
    found = report(normal(1.5), y=draw(N, 1))
    for level in (0.5, 0.9):
        expected = 2 * stats.norm.cdf(1.5 * stats.norm.ppf(0.5 + level / 2)) - 1
        assert abs(found.coverage(level) - expected) < 4 * binomial_error(expected, N)
        low, high = found.coverage_band(level)
        assert low < level < high < found.coverage(level)
    # E|Y - Y'| / 2 and E|Y - y| in closed form
    crps = math.sqrt(2 * (1 + 1.5**2) / math.pi) - 1.5 / math.sqrt(math.pi)
    numbers = found.to_dict()["targets"]["y"]
    assert numbers["crps"] == pytest.approx(crps, abs=0.03)
    assert numbers["crps_skill"] == pytest.approx(1 - crps * math.sqrt(math.pi), abs=0.03)
    assert numbers["width90"] == pytest.approx(2 * 1.5 * stats.norm.ppf(0.95))
    assert numbers["spread"] == pytest.approx(1 / 1.5, abs=0.03)
    assert report(normal(loc=0.5), y=draw(N, 1)).test().shift == pytest.approx(-0.5, abs=0.06)


def test_joint_errors_that_no_margin_shows():
    y = draw(N, 2)
    y[:, 1] = 0.9 * y[:, 0] + math.sqrt(1 - 0.9**2) * y[:, 1]
    found = report(normal(d=2), y=y, targets=["a", "b"])
    assert found.test("a").describe() == found.test("b").describe() == "calibrated"
    assert found.test_regions().p_value < 1e-6
    assert found.region_coverage(0.5) > 0.55
    assert "too large" in repr(found) or "too small" in repr(found)
    metrics = found.metrics()
    assert metrics["test/region_p"] == found.test_regions().p_value
    assert "test/crps" not in metrics
    assert metrics["test/crps/a"] == pytest.approx(1 / math.sqrt(math.pi), abs=0.03)


@pytest.mark.parametrize("step", [0.5, 1.0])
def test_targets_on_a_grid_are_judged_on_their_cells(step):
    y = step * np.round(np.random.default_rng(0).uniform(-3.5 * step, 3.5 * step, (800, 1)) / step)
    # Uniform on [-3.5 step, 3.5 step], as equal weights of narrow normals.
    loc = np.linspace(-3.5, 3.5, 36)[:, None] * step
    density = mdn.GaussianMixture(np.zeros(36), loc, np.full((36, 1, 1), 0.2 * step))
    found = report(density, y=y)
    assert found.to_dict()["targets"]["y"]["step"] == pytest.approx(step)
    assert found.test().p_value > 1e-3
    ties = check_uniformity(score(density, y).pit[:, 0])
    assert ties.chi_square_p < 1e-6
    assert report(density, y=y).pit == pytest.approx(found.pit)  # seeded


def test_a_model_and_its_densities_have_the_same_report():
    x, y = draw(300, 2), draw(300, 2, seed=1)
    y[::7, 0] = np.nan
    model = mdn.MDN(mdn.heads.Mixture(2, 2), mdn.backbones.MLP([4]))
    model.adapt(x, y)
    names = {"targets": ["a", "b"], "features": ["u", "v"]}
    one = report(model, x, y, **names)
    two = report(model.predict_distribution(x), x, y, **names)
    assert one.to_dict() == two.to_dict()
    assert {each.by for each in one.slices} <= {"u", "v", "predicted mean", "predicted width"}
    np.testing.assert_array_equal(np.isnan(one.pit), np.isnan(y))
    again = json.loads(json.dumps(one.to_dict()))
    assert again["n"] == 300
    text = repr(one)
    assert max(map(len, text.splitlines())) <= 96
    assert "calibrated" in text or "too" in text


def test_steps_of_sequences_and_padding():
    x, y = draw(50, 6, 2), draw(50, 6, 1, seed=1)
    x[:, 4:] = np.nan
    density = mdn.MultivariateNormalDiag(np.zeros((50, 6, 1)), np.ones((50, 6, 1)))
    found = report(density, x, y)
    assert len(found) == 200
    np.testing.assert_allclose(found.pit, stats.norm.cdf(y[:, :4].reshape(-1, 1)))
    assert {"x0", "x1"} <= {each.by for each in found.slices}


def test_one_target_may_come_without_its_axis_and_rows_with_weights():
    y = draw(500)
    weight = np.random.default_rng(1).integers(0, 3, 500).astype(float)
    one = report(normal(), y=y, weight=weight)
    assert len(one) == (weight > 0).sum()
    inside = np.abs(y) < stats.norm.ppf(0.95)
    assert one.coverage(0.9) == pytest.approx(np.average(inside, weights=weight))
    assert one.metrics()["test/coverage90"] == one.coverage(0.9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "y is missing"),
        ({"y": draw(9, 2)}, r"give y as \['N', 1\]"),
        ({"y": np.full((9, 1), np.nan)}, "no observed entry"),
        ({"y": draw(9, 1), "targets": ["a", "b"]}, "y has 1 columns"),
        ({"x": draw(9, 2), "y": draw(9, 1), "features": ["a"]}, "names of the columns"),
        ({"y": draw(9, 1), "by": {"a": np.zeros(8)}}, r"a has shape \[8\]"),
        ({"x": {"a": np.zeros(8)}, "y": draw(9, 1)}, "x a has 8 rows, and y 9"),
        ({"x": draw(8, 2), "y": draw(9, 1)}, "x has 8 rows, and y 9"),
        ({"y": draw(9, 1), "weight": np.ones(8)}, "weight has 8 rows, and y 9"),
        ({"y": [["a"]]}, "y is no array of numbers"),
        ({"y": np.full((9, 1), np.inf)}, "y has infinite values"),
        ({"y": draw(9, 1), "reference": draw(9, 2)}, r"reference has shape \[9, 2\]"),
    ],
)
def test_wrong_rows_are_told(arguments, message):
    with pytest.raises(DataError, match=message):
        report(normal(), **arguments)


def test_wrong_models_and_targets_are_told():
    with pytest.raises(DataError, match="neither a model nor a density"):
        report("model.keras", y=draw(9, 1))
    with pytest.raises(ConfigError, match="draws=1"):
        report(normal(), y=draw(9, 1), draws=1)
    with pytest.raises(DataError, match="target=b: choose one of y"):
        report(normal(), y=draw(9, 1)).test("b")
    with pytest.raises(DataError, match="there are 1"):
        report(normal(), y=draw(9, 1)).coverage(0.5, 3)


# ---------------------------------------------------------------------- slices


def test_slices_find_errors_that_make_up_for_each_other():
    kind, rng = np.repeat(["calm", "wild"], N // 2), np.random.default_rng(0)
    scale = np.where(kind == "calm", 0.6, 1.6)
    x = rng.uniform(size=N)
    # One density for both, whose coverage over all rows is right.
    y = scale * rng.standard_normal(N)
    whole = np.quantile(np.abs(y), 0.9) / stats.norm.ppf(0.95)
    found = report(normal(whole), {"kind": kind.astype(object), "x": x}, y)
    assert found.coverage(0.9) == pytest.approx(0.9, abs=0.005)
    slices = {(each.by, each.label): each for each in found.slices}
    calm, wild = slices["kind", "calm"], slices["kind", "wild"]
    assert wild.coverage90 < 0.85 < 0.95 < calm.coverage90
    assert max(calm.adjusted_p, wild.adjusted_p) < 1e-6
    assert calm.n == wild.n == N / 2
    by_x = [each for each in found.slices if each.by == "x"]
    assert [round(each.n) for each in by_x] == [800] * 5
    assert min(abs(each.coverage90 - 0.9) for each in by_x) < 0.05


@pytest.mark.parametrize(
    ("column", "labels"),
    [
        (np.repeat([2015.0, 2016.0, 2017.0], 10), ["2015", "2016", "2017"]),
        (np.repeat([0.12345, 0.12346], 10), ["0.12345", "0.12346"]),
        (np.repeat(np.arange(2014.0, 2019.0), 10), ["2014", "2015", "2016", "2017", "2018"]),
        (
            np.arange(2000.0, 2051.0),
            ["2000 to 2010", "2010 to 2020", "2020 to 2030", "2030 to 2040", "2040 to 2050"],
        ),
    ],
)
def test_labels_of_slices_tell_them_apart(column, labels):
    assert [label for label, _ in split(column)] == labels


def test_no_rank_is_above_one():
    weights = np.random.default_rng(0).normal(size=[500, 5]).astype(np.float32)
    density = mdn.GaussianMixture(
        weights, np.zeros([500, 5, 1], np.float32), np.ones([500, 5, 1, 1], np.float32)
    )
    y = np.full([500, 1], 20.0, np.float32)
    assert density.cdf(y).numpy().max() == density.survival_function(-y).numpy().max() == 1.0
    found = report(density, y=y.astype(np.float64))
    assert found.pit.max() == found.coverage(1.0) == 1.0


def test_weights_may_be_lists_and_are_checked():
    y, weight = draw(50, 1), [1.0] * 25 + [2.0] * 25
    found, expected = (report(normal(), y=y, weight=w) for w in (weight, np.array(weight)))
    assert found.coverage(0.9) == expected.coverage(0.9)
    with pytest.raises(
        DataError, match=r"weight is -1\.0 in row 3: weights are finite and not neg"
    ):
        report(normal(), y=y, weight=np.where(np.arange(50) == 3, -1.0, 1.0))


def test_few_slices_of_a_calibrated_density_are_off():
    rng = np.random.default_rng(0)
    pit, columns = rng.uniform(size=(2000, 1)), {str(i): rng.normal(size=2000) for i in range(40)}
    slices = find_slices(pit, ("y",), columns)
    assert len(slices) == 200
    assert sum(each.adjusted_p < 0.05 for each in slices) <= 2
    expected = stats.false_discovery_control([each.p_value for each in slices])
    np.testing.assert_allclose([each.adjusted_p for each in slices], expected)


@pytest.mark.parametrize(
    ("column", "sizes"),
    [
        (np.arange(100.0), {"0 to 19.8": 20, "79.2 to 99": 20}),
        (np.append(np.repeat([0.0, 1.0], 30), np.nan), {"0": 30, "1": 30, "missing": 1}),
        (np.array(["a", "b", None, "a"], object), {"a": 2, "b": 1, "missing": 1}),
        (np.repeat(list("abcdefghijk"), 11 - np.arange(11)), {"a": 11, "h": 4, "3 others": 6}),
        (np.full(5, 2.0) + 1e-9 * np.arange(5), {"2": 5}),
        (np.array([True, False, True]), {"0": 1, "1": 2}),
    ],
)
def test_columns_are_split_whole(column, sizes):
    parts = dict(split(column))
    assert {label: parts[label].sum() for label in sizes} == sizes
    assert (np.sum(list(parts.values()), axis=0) == 1).all()  # each row is in one of them


# ---------------------------------------------------------------------- SBC


def posterior(scale=1.0, noise=0.5):
    """Return the posterior of theta ~ N(0, 1) given x ~ N(theta, noise^2), its sd off by scale."""
    variance = noise**2 / (1 + noise**2)

    def density(x):
        return mdn.MultivariateNormalDiag(
            x / (1 + noise**2), scale * math.sqrt(variance) * np.ones_like(x)
        )

    return density


def simulate(n, rng, noise=0.5):
    theta = rng.standard_normal((n, 1))
    return theta + noise * rng.standard_normal((n, 1)), theta


def test_sbc_of_a_conjugate_posterior():
    found = [sbc(posterior(), simulate, n=200, draws=19, seed=s) for s in range(40)]
    p = np.array([(each.test().p_value, each.test_region().p_value) for each in found])
    for column in p.T:
        assert (column < 0.05).mean() < 0.05 + 4 * binomial_error(0.05, 40)
        assert stats.kstest(column, "uniform").pvalue > 1e-3
    assert set(np.unique(found[0].ranks)) <= set(range(20))


@pytest.mark.parametrize(("scale", "verdict"), [(1.5, "too wide"), (0.6, "too narrow")])
def test_sbc_tells_the_direction(scale, verdict):
    found = sbc(posterior(scale), simulate)
    assert found.test("theta_1").describe() == verdict
    assert found.p_value < 1e-6
    assert f"theta_1        p = {found.test().p_value:.2g}  {verdict}".split() == (
        repr(found).splitlines()[1].split()
    )
    assert found.metrics()["sbc/p/theta_1"] == found.test().p_value
    assert json.loads(json.dumps(found.to_dict()))["parameters"]["theta_1"]["verdict"] == verdict


def test_sbc_sees_a_wrong_correlation_in_the_joint_density():
    def correlated(n, rng):
        theta = rng.standard_normal((n, 2)) @ np.array([[1.0, 0.9], [0.0, math.sqrt(0.19)]])
        return np.zeros((n, 1)), theta

    found = sbc(lambda x: normal(d=2), correlated)
    assert min(found.test(d).p_value for d in range(2)) > 1e-3
    assert found.test_region().p_value < 1e-6


def test_sbc_of_a_simulator():
    def likelihood(x):
        loc = np.stack([x, x], axis=1)
        scale = np.broadcast_to(np.array([1.0, 0.1])[:, None], loc.shape)
        return mdn.GaussianMixture.from_diag(np.zeros(2), loc, scale)

    found = sbc(likelihood, TwoGaussians(), n=400)
    assert found.names == ("x_1", "x_2")
    assert found.p_value > 1e-3
    # theta given x: the prior is flat, and wide.
    assert sbc(likelihood, TwoGaussians(), n=400, posterior=True).names == ("theta_1", "theta_2")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n": 5}, ConfigError, "n=5: give at least 40"),
        ({"draws": 1}, ConfigError, "draws=1"),
        ({"names": ["a", "b"]}, DataError, "there are 1 parameters"),
    ],
)
def test_sbc_refuses(options, error, message):
    with pytest.raises(error, match=message):
        sbc(posterior(), simulate, **options)


def test_sbc_refuses_a_simulator_of_something_else():
    with pytest.raises(DataError, match=r"shape \[1000, 2\], and the model answers \[1000, 1\]"):
        sbc(lambda x: normal(), TwoGaussians())
    with pytest.raises(DataError, match="must return two arrays"):
        sbc(lambda x: normal(), lambda n, rng: rng.normal(size=n))
    with pytest.raises(DataError, match="neither a model nor a function"):
        sbc("model.keras", simulate)


# ---------------------------------------------------------------------- figures


def drawn(figure):
    figure.canvas.draw()
    return figure.axes if figure.axes else [a for f in figure.subfigs for a in f.axes]


def test_page_shows_the_report():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(N, 1)), rng.normal(size=(N, 2))
    found = report(normal(1.5, d=2), x, y, targets=["price", "rate"], features=["rooms"])
    figure = calibration_figure(found)
    histogram, quantiles, coverage, *slices = drawn(figure)
    lines = {line.get_label(): line for line in coverage.lines}
    levels, shares = lines["rate"].get_data()
    np.testing.assert_allclose(shares, found.coverage(levels, "rate"))
    np.testing.assert_allclose(lines["all together"].get_ydata(), found.region_coverage(levels))
    np.testing.assert_allclose(
        quantiles.lines[0].get_ydata(), found.below(levels, "price") - levels
    )
    heights, edges, _ = histogram.patches[1].get_data()
    np.testing.assert_allclose(heights, relative_histogram(found.pit[:, 0], len(edges) - 1))
    assert len(slices) == 3
    assert len(slices[0].get_yticks()) == len(found.slices) == 10
    assert any(
        label.get_text().startswith("price: rooms") for label in slices[0].get_yticklabels()
    )


@pytest.mark.parametrize("n", [1, 3, 60])
def test_page_of_few_rows(n):
    figure = report(normal(d=7), draw(n, 1), draw(n, 7)).plot()
    assert len(drawn(figure)[2].lines) == 5 + 1 + 1  # targets, together, the diagonal


def test_page_of_a_target_that_was_never_observed():
    y = draw(50, 2)
    y[:, 1] = np.nan
    found = report(normal(d=2), y=y)
    drawn(found.plot())
    assert "nothing observed" in repr(found)
    assert "test/crps/y1" not in found.metrics()
    assert all(math.isfinite(value) for value in found.metrics().values())


def test_figure_of_sbc():
    found = sbc(posterior(1.5), simulate, n=100)
    above, _, below, _ = drawn(sbc_figure(found))
    assert above.get_title().startswith("theta_1")
    ranks, off = below.lines[1].get_data()
    np.testing.assert_allclose(ranks, np.sort(found.uniform[:, 0]))
    np.testing.assert_allclose(off + ranks, np.arange(1, 101) / 100)


def test_tensor_inputs_are_welcome():
    found = report(normal(), y=tf.constant(draw(100, 1), tf.float32))
    assert len(found) == 100
