"""Margins against scipy, quadrature and finite differences, in both tails and both precisions."""

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp
from scipy import integrate, stats
from scipy.special import logsumexp

import mdn
from mdn import heads
from mdn.density import DiagGaussianMixture, MultivariateNormalDiag, MultivariateNormalTriL

LEVELS = np.array([1e-6, 1e-3, 0.1, 0.5, 0.77, 0.999, 1.0 - 1e-6])


def mixture(rows=20, k=5, d=1, spread=1.0, scales=(0.3, 3.0), dtype=np.float64, seed=0):
    """Return a random mixture with batch [rows] whose scales are log-uniform."""
    rng = np.random.default_rng(seed)
    sd = np.exp(rng.uniform(*np.log(scales), size=[rows, k, d]))
    factor = np.tril(rng.normal(size=[rows, k, d, d]), -1) * sd[..., np.newaxis]
    factor[..., np.arange(d), np.arange(d)] = sd
    logits, loc = rng.normal(size=[rows, k]), spread * rng.normal(size=[rows, k, d])
    return mdn.GaussianMixture(*(p.astype(dtype) for p in (logits, loc, factor)))


def margins(density):
    """Return log weights [.., 1, K], means and standard deviations [.., D, K]."""
    logits, loc, factor = (np.asarray(p, np.float64) for p in density.mixture_parameters())
    log_weight = logits - logsumexp(logits, axis=-1, keepdims=True)
    scale = np.sqrt((factor**2).sum(-1))
    return log_weight[..., np.newaxis, :], np.swapaxes(loc, -1, -2), np.swapaxes(scale, -1, -2)


def test_one_component_is_scipys_normal_in_both_tails():
    y = np.array([-40.0, -5.0, 0.0, 3.0, 12.0, 40.0])[:, np.newaxis]
    density = MultivariateNormalTriL(np.array([1.0]), np.array([[2.0]]))
    normal = stats.norm(1.0, 2.0)
    np.testing.assert_allclose(density.cdf(y), normal.cdf(y), rtol=1e-12)
    np.testing.assert_allclose(density.survival_function(y), normal.sf(y), rtol=1e-12)
    np.testing.assert_allclose(density.log_cdf(y), normal.logcdf(y), rtol=1e-12)
    np.testing.assert_allclose(density.log_survival_function(y), normal.logsf(y), rtol=1e-12)
    np.testing.assert_allclose(density.quantile(LEVELS)[:, 0], normal.ppf(LEVELS), rtol=1e-9)


def test_margins_of_mixtures_are_sums_of_scipys():
    density = mixture(d=3)
    log_weight, loc, scale = margins(density)
    y = np.random.default_rng(1).normal(size=[7, 20, 3]) * 4.0  # sample shape [7]
    terms = log_weight + stats.norm.logcdf(y[..., np.newaxis], loc, scale)
    np.testing.assert_allclose(
        density.log_cdf(y), logsumexp(terms, axis=-1), rtol=1e-9, atol=1e-14
    )
    np.testing.assert_allclose(density.cdf(y), np.exp(logsumexp(terms, axis=-1)), rtol=1e-10)
    terms = log_weight + stats.norm.logsf(y[..., np.newaxis], loc, scale)
    expected = logsumexp(terms, axis=-1)
    np.testing.assert_allclose(density.log_survival_function(y), expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("spread", "scales"),
    [(1.0, (0.3, 3.0)), (1e3, (0.3, 3.0)), (0.0, (1e-6, 1e6)), (1e6, (1e-6, 1e6))],
    ids=["near", "far", "scales", "both"],
)
def test_quantile_is_the_number_where_the_cdf_passes(dtype, spread, scales):
    density = mixture(200, spread=spread, scales=scales, dtype=dtype)
    levels = LEVELS.astype(dtype)
    y = density.quantile(levels).numpy()
    assert y.dtype == dtype
    assert np.isfinite(y).all()
    # In float64, so that the rounding of the cdf itself is no part of the answer: a few of the
    # dtype's numbers below it is too little, a few above too much.
    log_weight, loc, scale = margins(density)
    step = 16.0 * np.spacing(np.abs(y)).astype(np.float64)
    # The cdf of a float32 is known to its rounding only, some parts in ten million.
    slack = 64.0 * np.finfo(dtype).eps * np.minimum(levels, 1.0 - levels.astype(np.float64))
    slack = np.maximum(slack, 1e-14)[:, np.newaxis, np.newaxis]
    target = levels.astype(np.float64)[:, np.newaxis, np.newaxis]

    def cdf(y):
        terms = np.exp(log_weight) * stats.norm.cdf(y[..., np.newaxis], loc, scale)
        return terms.sum(-1)

    assert (cdf(y - step) <= target + slack).all()
    assert (cdf(y + step) >= target - slack).all()


def test_quantile_gradients_are_those_of_finite_differences():
    density = mixture(2, k=2)
    values = [density.logits, density.loc, density.scale_tril[..., 0, 0]]
    levels = tf.constant([0.01, 0.3, 0.97], tf.float64)

    @tf.function(autograph=False)
    def quantile(logits, loc, scale, levels):
        scale = scale[..., tf.newaxis, tf.newaxis]
        return mdn.GaussianMixture(logits, loc, scale).quantile(levels)

    theory, numeric = tf.test.compute_gradient(quantile, [*values, levels], delta=1e-6)
    for one, other in zip(theory, numeric, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_quantile_at_the_edges():
    density = mixture(2)
    y = density.quantile(np.array([0.0, 1.0, -0.1, 1.1])).numpy()
    assert (y[0] == -np.inf).all()
    assert (y[1] == np.inf).all()
    assert np.isnan(y[2:]).all()


def test_absent_components_do_not_matter():
    density = mdn.GaussianMixture(
        [0.0, -1e9], [[0.0], [1e6]], [[[1.0]], [[1e-6]]]
    )  # float32; the second has no weight
    np.testing.assert_allclose(density.quantile(0.9)[0], stats.norm.ppf(0.9), rtol=1e-6)
    assert density.log_cdf([[-100.0]]).numpy() == pytest.approx(stats.norm.logcdf(-100.0))


def test_compiled_answers_are_the_same():
    density = mixture(4, d=2)
    compiled = tf.function(lambda p: density.quantile(p), jit_compile=True)
    levels = tf.constant(LEVELS)
    np.testing.assert_allclose(compiled(levels), density.quantile(levels), rtol=1e-9)


def test_interval_holds_its_level():
    density = mixture(10, d=2)
    ends = density.interval(0.9)
    assert ends.shape == [10, 2, 2]
    inside = density.cdf(ends[..., 1]) - density.cdf(ends[..., 0])
    np.testing.assert_allclose(inside, 0.9, rtol=1e-9)
    np.testing.assert_allclose(density.cdf(ends[..., 0]), 0.05, rtol=1e-9)


@pytest.mark.parametrize("level", [0.0, 1.0, 90, float("nan")])
def test_a_level_that_is_no_probability_is_named(level):
    with pytest.raises(mdn.MDNError, match=r"level=.*: must be between 0 and 1, such as 0\.9"):
        mixture(1).interval(level)


def test_float32_logs_keep_their_digits():
    density = MultivariateNormalTriL(tf.zeros([1]), tf.eye(1))
    y = np.concatenate([-np.logspace(-3, 15, 50), np.logspace(-3, 1, 50)])[:, np.newaxis]
    found = density.log_cdf(y).numpy()
    np.testing.assert_allclose(found, stats.norm.logcdf(y.astype(np.float32)), rtol=1e-5)


def test_crps_is_the_integral_of_the_squared_error_of_the_cdf():
    density = mixture(3, k=3)
    y = np.array([[-2.0], [0.4], [5.0]])
    found = density.crps(y).numpy()
    log_weight, loc, scale = margins(density)
    for i in range(3):

        def error(t, i=i):
            cdf = np.exp(log_weight[i, 0]) @ stats.norm.cdf(t, loc[i, 0], scale[i, 0])
            return (cdf - (t >= y[i, 0])) ** 2

        expected = (
            integrate.quad(error, -40.0, y[i, 0])[0] + integrate.quad(error, y[i, 0], 40.0)[0]
        )
        assert found[i, 0] == pytest.approx(expected, rel=1e-6)
    assert np.isnan(density.crps(np.full([3, 1], np.nan))).all()


@pytest.mark.parametrize(
    "density",
    [
        MultivariateNormalDiag(tf.zeros([3, 2]), tf.ones([3, 2])),
        MultivariateNormalTriL(tf.zeros([3, 2]), tf.eye(2)),
        DiagGaussianMixture(tf.zeros([3, 2]), tf.zeros([3, 2, 2]), tf.ones([3, 2, 2])),
    ],
    ids=lambda d: type(d).__name__,
)
def test_every_density_answers(density):
    y = tf.zeros([3, 2])
    np.testing.assert_allclose(density.cdf(y), np.full([3, 2], 0.5), rtol=1e-6)
    np.testing.assert_allclose(density.quantile(0.5), np.zeros([3, 2]), atol=1e-6)
    assert density.interval(0.5).shape == [3, 2, 2]


def test_transformed_targets_have_the_quantiles_of_the_lognormal():
    base = MultivariateNormalTriL(np.array([0.3]), np.array([[0.7]]))
    density = mdn.density.Transformed(base, tfp.bijectors.Exp())
    lognormal = stats.lognorm(0.7, scale=np.exp(0.3))
    np.testing.assert_allclose(density.quantile(LEVELS)[:, 0], lognormal.ppf(LEVELS), rtol=1e-9)
    y = np.array([[0.01], [1.0], [30.0]])
    np.testing.assert_allclose(density.cdf(y), lognormal.cdf(y), rtol=1e-12)
    np.testing.assert_allclose(density.survival_function(y), lognormal.sf(y), rtol=1e-12)
    np.testing.assert_allclose(density.interval(0.9)[0], lognormal.interval(0.9), rtol=1e-9)


@pytest.mark.parametrize(
    ("transform", "low", "high"),
    [("log", 0.0, None), ({"name": "logit", "low": 2.0, "high": 5.0}, 2.0, 5.0)],
    ids=["log", "logit"],
)
def test_nothing_is_outside_of_the_domain(transform, low, high):
    head = heads.Diag(1, target_transform=transform)
    density = head.distribution(tf.zeros([head.params_size]))
    for y in (low - 1.0, low):
        assert density.cdf([y]).numpy() == 0.0
        assert density.log_cdf([y]).numpy() == -np.inf
        assert density.survival_function([y]).numpy() == 1.0
    if high is not None:
        for y in (high, high + 1.0):
            assert density.cdf([y]).numpy() == 1.0
            assert density.log_survival_function([y]).numpy() == -np.inf
    assert np.isnan(density.cdf([np.nan]))
