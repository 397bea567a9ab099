"""fit_distribution against closed forms and scipy: gradient, exact and EM side by side."""

import functools

import numpy as np
import pytest
import tensorflow as tf
from scipy import stats
from tensorflow_probability import distributions as tfd

import mdn
from mdn.density import DiagGaussianMixture
from mdn.errors import ConfigError, DataError
from mdn.fitting.exact import CLOSED_FORMS
from mdn.fitting.likelihood import row_log_prob

# XLA compiles for seconds, and is tested where it matters.
fit_distribution = functools.partial(mdn.fit_distribution, compiled=False)

TEN = np.array([4.57, 6.37, 5.93, 7.98, 2.03, 3.59, 8.55, 3.45, 5.06, 6.44])


def normal_rows(n=300, d=2, seed=0):
    rng = np.random.default_rng(seed)
    factor = np.tril(rng.standard_normal((d, d))) + 2 * np.eye(d)
    return rng.standard_normal((n, d)) @ factor.T


def blobs(n=600, seed=0):
    rng = np.random.default_rng(seed)
    centre = np.array([[-2.0, -2.0], [2.0, 2.0]])[(rng.random(n) < 0.6).astype(int)]
    return centre + rng.standard_normal((n, 2))


def gaussian(y, loc, covariance):
    return stats.multivariate_normal(loc, covariance).logpdf(y)


# Rows for each closed form, and scipy's log density of them.
EXACT = {
    tfd.Normal: (
        lambda r: r.normal(3.0, 2.0, 200),
        lambda y, loc, scale: stats.norm(loc, scale).logpdf(y),
    ),
    tfd.LogNormal: (
        lambda r: r.lognormal(0.5, 0.7, 200),
        lambda y, loc, scale: stats.lognorm(scale, scale=np.exp(loc)).logpdf(y),
    ),
    tfd.Laplace: (
        lambda r: r.laplace(1.0, 2.0, 201),
        lambda y, loc, scale: stats.laplace(loc, scale).logpdf(y),
    ),
    tfd.Exponential: (
        lambda r: r.exponential(2.0, 200),
        lambda y, rate: stats.expon(scale=1 / rate).logpdf(y),
    ),
    tfd.Poisson: (
        lambda r: r.poisson(3.0, 200).astype(float),
        lambda y, rate: stats.poisson(rate).logpmf(y),
    ),
    tfd.Bernoulli: (
        lambda r: (r.random(200) < 0.3).astype(float),
        lambda y, probs: stats.bernoulli(probs).logpmf(y),
    ),
    mdn.MultivariateNormalDiag: (
        lambda r: r.normal([1.0, 2.0], [3.0, 0.1], (200, 2)),
        lambda y, loc, scale_diag: gaussian(y, loc, np.diag(scale_diag**2)),
    ),
    mdn.MultivariateNormalTriL: (
        lambda r: normal_rows(200),
        lambda y, loc, scale_tril: gaussian(y, loc, scale_tril @ scale_tril.T),
    ),
}
SMOOTH = sorted(set(EXACT) - {tfd.Laplace}, key=str)  # whose likelihood has kinks


def named(kind):
    return kind.__name__


def test_every_closed_form_has_a_case():
    assert set(EXACT) == set(CLOSED_FORMS)


@pytest.mark.parametrize("kind", EXACT, ids=named)
def test_exact_is_the_maximum_of_scipys_likelihood(kind):
    draw, log_density = EXACT[kind]
    y = draw(np.random.default_rng(0))
    fit = fit_distribution(kind, y, method="exact")
    found = fit.parameters()
    assert type(fit.distribution) is kind
    assert fit.nll == pytest.approx(-log_density(y, **found).mean(), rel=1e-6)
    for name, value in found.items():
        for index in np.ndindex(value.shape):
            for step in (1e-3, -1e-3):
                moved = value.copy()
                moved[index] += step
                worse = -log_density(y, **{**found, name: moved}).mean()
                assert worse >= fit.nll - 1e-12


@pytest.mark.parametrize("kind", SMOOTH, ids=named)
def test_gradient_reaches_the_closed_form(kind):
    y = EXACT[kind][0](np.random.default_rng(0))
    exact = fit_distribution(kind, y, method="exact")
    fit = fit_distribution(kind, y, initial="random", seed=1)
    assert fit.converged, fit
    assert fit.gradient_norm <= 1e-7
    assert fit.nll == pytest.approx(exact.nll, abs=1e-9)
    assert fit.history[0] > fit.history[-1] == pytest.approx(fit.nll)
    np.testing.assert_allclose(fit.distribution.mean(), exact.distribution.mean(), rtol=1e-5)


def test_any_class_of_tfps_by_name_against_scipy():
    y = np.random.default_rng(0).gamma(3.0, 2.0, 500)
    shape, _, scale = stats.gamma.fit(y, floc=0)
    for initial in (None, {"rate": 1.0}):  # TFP would rather learn the logarithm of the rate
        fit = fit_distribution("Gamma", y, initial=initial)
        assert fit.converged
        assert fit.parameters()["concentration"] == pytest.approx(shape, rel=1e-4)
        assert float(fit.distribution.mean()) == pytest.approx(shape * scale, rel=1e-4)


def test_location_scale_families_are_fitted_in_any_unit():
    t = np.random.default_rng(0).standard_t(4, 1000)
    one = fit_distribution("StudentT", t)
    other = fit_distribution("StudentT", 1e9 + 1e5 * t)
    assert one.converged
    assert other.converged
    a, b = one.parameters(), other.parameters()
    assert b["df"] == pytest.approx(a["df"], rel=1e-3)
    assert (b["loc"] - 1e9) / 1e5 == pytest.approx(a["loc"], abs=1e-4)
    assert b["scale"] == pytest.approx(1e5 * a["scale"], rel=1e-4)
    assert other.nll == pytest.approx(one.nll + np.log(1e5), abs=1e-6)


def test_scale_families_are_fitted_in_any_unit():
    rng = np.random.default_rng(0)
    for name, y in (
        ("HalfNormal", np.abs(rng.standard_normal(500))),
        ("Weibull", rng.weibull(1.7, 500)),
    ):
        one = fit_distribution(name, y)
        for unit in (1e-6, 1e6):
            fit = fit_distribution(name, unit * y)
            assert fit.converged
            assert fit.nll == pytest.approx(one.nll + np.log(unit), abs=1e-6)


@pytest.mark.parametrize("initial", [{"scale": 1e8}, {"loc": 1e8, "scale": 1.0}, {"loc": 1e3}])
def test_far_starts_do_not_pass_for_optima(initial):
    """By a great scale the gradient vanishes, wherever it is."""
    y = np.random.default_rng(1).standard_normal(500)
    fit = fit_distribution("Normal", y, initial=initial)
    exact = fit_distribution("Normal", y, method="exact")
    assert fit.nll < exact.nll + 1e-6 or not fit.converged


def test_rows_of_no_weight_have_no_part():
    rng = np.random.default_rng(0)
    y = blobs(300)
    weight = np.concatenate([np.ones(300), np.zeros(60)])
    more = np.concatenate([y, rng.normal(1e6, 1.0, (30, 2)), np.full((30, 2), np.nan)])
    for options in ({"method": "em"}, {}):
        one, two = (
            fit_distribution("GaussianMixture", rows, components=2, weight=w, **options)
            for rows, w in ((y, None), (more, weight))
        )
        assert two.nll == pytest.approx(one.nll, abs=1e-12)


def test_a_fixed_parameter_needs_no_unconstrained_form():
    y = np.random.default_rng(0).binomial(5, 0.3, 400).astype(float)
    fit = fit_distribution("Binomial", y, fixed={"total_count": 5.0}, initial={"probs": 0.5})
    assert fit.parameters()["probs"] == pytest.approx(y.mean() / 5, rel=1e-5)


def test_separate_normals_at_once():
    y = np.random.default_rng(0).normal([1.0, -2.0, 5.0], [1.0, 3.0, 0.1], (300, 3))
    y[:50, 1] = np.nan
    fit = fit_distribution("Normal", y, initial="random")
    assert fit.distribution.batch_shape == [3]
    np.testing.assert_allclose(fit.parameters()["loc"], np.nanmean(y, axis=0), rtol=1e-5)
    np.testing.assert_allclose(fit.parameters()["scale"], np.nanstd(y, axis=0), rtol=1e-5)


# ---------------------------------------------------------------------- starts and fixed values


def test_ten_values():
    fit = fit_distribution(tfd.Normal, TEN, initial={"loc": 0.0, "scale": 1.0})
    assert fit.parameters()["loc"] == pytest.approx(TEN.mean(), abs=1e-6)
    assert fit.parameters()["scale"] == pytest.approx(TEN.std(), abs=1e-6)


def test_initial_values_may_be_callables():
    asked = []

    def for_all(name, shape, seed):
        asked.append((name, shape, seed))
        return {"loc": -10.0}.get(name)

    fit = fit_distribution("Normal", TEN, initial=for_all, seed=7)
    assert sorted(asked) == [("loc", (), 7), ("scale", (), 7)]
    assert fit.history[0] > fit.nll + 1
    one = fit_distribution("Normal", TEN, initial={"loc": lambda shape, seed: np.full(shape, 3)})
    assert one.nll == pytest.approx(fit.nll, abs=1e-9)


@pytest.mark.parametrize("method", ["gradient", "exact"])
def test_fixed_scale_leaves_the_mean(method):
    fit = fit_distribution("Normal", TEN, fixed={"scale": 3.0}, method=method)
    assert fit.parameters()["scale"] == 3.0
    assert fit.parameters()["loc"] == pytest.approx(TEN.mean(), abs=1e-6)


@pytest.mark.parametrize("method", ["gradient", "exact"])
def test_fixed_loc_leaves_the_scatter_about_it(method):
    y, loc = normal_rows(), np.array([0.5, -1.0])
    fit = fit_distribution("MultivariateNormalTriL", y, fixed={"loc": loc}, method=method)
    expected = (y - loc).T @ (y - loc) / len(y)
    np.testing.assert_allclose(fit.distribution.covariance(), expected, rtol=1e-5)


def test_fixed_names_take_their_value_from_initial():
    covariance = [[1.0, 0.5], [0.5, 2.0]]
    fit = fit_distribution(
        "MultivariateNormalTriL",
        normal_rows(),
        initial={"loc": [-10.0, 5.0], "covariance": covariance},
        fixed=["scale"],
    )
    np.testing.assert_allclose(fit.distribution.covariance(), covariance, rtol=1e-12)
    np.testing.assert_allclose(fit.parameters()["loc"], normal_rows().mean(axis=0), atol=1e-6)


def test_every_random_start_reaches_the_covariance():
    """By softplus; `test_points_3d` starts a hundred times by each positivity."""
    rng = np.random.default_rng(0)
    factor = np.array([[1.0, 0, 0], [1.6, 2.7, 0], [5.0, -6.0, 6.0]])
    y = rng.standard_normal((1000, 3)) @ factor.T
    fit = fit_distribution("MultivariateNormalTriL", y, initial="random", restarts=10)
    assert fit.starts_converged.all()
    ends = fit.starts_parameters["scale_tril"]  # [S, D, D]
    covariance = np.cov(y.T, bias=True)
    error = np.abs(ends @ ends.swapaxes(1, 2) - covariance).max() / covariance.max()
    assert error < 1e-5
    assert np.ptp(fit.starts) < 1e-9


# ---------------------------------------------------------------------- mini-batches


def test_mini_batches_end_near_the_optimum():
    y = np.random.default_rng(0).normal([4.0, 5.0], [1.0, 3.0], (4001, 2))  # a ragged last batch
    fit = mdn.fit_distribution("MultivariateNormalDiag", y, batch_size=32, initial="random")
    assert fit.converged, fit
    error = np.abs(fit.parameters()["loc"] - y.mean(axis=0)) / y.std(axis=0) * len(y) ** 0.5
    assert error.max() < 0.5  # standard errors
    error = fit.parameters()["scale_diag"] / y.std(axis=0) - 1
    assert np.abs(error).max() * (2 * len(y)) ** 0.5 < 0.5


@pytest.mark.parametrize("batch_size", [6, 10])
def test_mini_batches_as_large_as_the_data(batch_size):
    fit = fit_distribution("Normal", TEN, batch_size=batch_size)
    assert fit.converged, fit
    assert fit.parameters()["loc"] == pytest.approx(TEN.mean(), abs=0.1 * TEN.std())


def test_mini_batches_of_sorted_rows():
    y = np.sort(np.random.default_rng(0).standard_normal(20_000))
    fit = fit_distribution("Normal", y, batch_size=2000, initial={"loc": 1.0, "scale": 2.0})
    assert fit.converged, fit
    assert abs(fit.parameters()["loc"] - y.mean()) * len(y) ** 0.5 < 0.5 * y.std()


def test_mini_batches_that_run_out_of_steps_say_so():
    fit = fit_distribution("Normal", TEN, batch_size=5, initial={"loc": -99.0}, max_steps=4)
    assert not fit.converged
    assert "max_steps=4" in fit.reason
    assert "NOT converged" in str(fit)


def test_steps_that_run_out_say_so():
    fit = fit_distribution("Normal", TEN, initial={"loc": -99.0}, max_steps=2)
    assert not fit.converged
    assert "max_steps=2" in fit.reason
    assert np.isfinite(fit.nll)


# ---------------------------------------------------------------------- mixtures


def test_gradient_and_em_agree_on_a_mixture():
    y = blobs()
    em = fit_distribution("GaussianMixture", y, components=2, method="em", tolerance=1e-9)
    gradient = mdn.fit_distribution("GaussianMixture", y, components=2, tolerance=1e-6)
    assert em.converged
    assert gradient.converged
    assert gradient.nll == pytest.approx(em.nll, abs=1e-7)
    order = [np.argsort(f.parameters()["loc"][:, 0]) for f in (em, gradient)]
    for name in ("loc", "scale_tril"):
        a, b = (f.parameters()[name][o] for f, o in zip((em, gradient), order, strict=True))
        np.testing.assert_allclose(a, b, atol=1e-3)


@pytest.mark.parametrize("method", ["gradient", "em"])
def test_missing_entries_of_a_mixture_are_marginalised(method):
    y = blobs()
    y[:100, 0] = np.nan
    y[50:200, 1] = np.nan
    fit = fit_distribution(DiagGaussianMixture, y, components=2, method=method, restarts=2)
    assert isinstance(fit.distribution, DiagGaussianMixture)
    assert fit.converged
    seen = ~np.isnan(y).all(axis=1)  # a row of which nothing is observed has no part in the mean
    assert 0 < seen.sum() < len(y)
    log_prob = fit.distribution.log_prob(y[seen]).numpy()
    assert fit.nll == pytest.approx(-log_prob.mean(), abs=1e-9)
    loc = np.sort(fit.parameters()["loc"][:, 0])
    np.testing.assert_allclose(loc, [-2.0, 2.0], atol=0.4)


def test_a_coarse_grid_is_fitted_by_gradient_too():
    y = np.random.default_rng(0).integers(0, 3, (300, 1)).astype(float)
    fit = fit_distribution("GaussianMixture", y, components=3)
    assert np.isfinite(fit.nll)
    assert fit.parameters()["scale_tril"].min() >= 0.999 / 12**0.5


def test_a_mixture_cannot_spike_on_tied_values():
    y = np.round(blobs(), 0)
    fit = fit_distribution("GaussianMixture", y, components=3, method="em")
    scale = np.linalg.svd(fit.parameters()["scale_tril"], compute_uv=False).min()
    assert scale >= 0.999 / 12**0.5  # the grid is 1


def test_em_of_a_normal_with_missing_entries_is_the_gradients_optimum():
    y = normal_rows()
    y[:80, 0] = np.nan
    em = fit_distribution("MultivariateNormalTriL", y, method="em")
    gradient = fit_distribution("MultivariateNormalTriL", y)
    assert gradient.nll == pytest.approx(em.nll, abs=1e-9)


# ---------------------------------------------------------------------- weights, dtype, XLA


@pytest.mark.parametrize("method", ["gradient", "exact", "em"])
def test_weights_are_repetitions(method):
    y, weight = normal_rows(60), np.arange(60) % 4
    weighted = fit_distribution("MultivariateNormalTriL", y, weight=weight, method=method)
    repeated = np.repeat(y, weight, axis=0)
    np.testing.assert_allclose(weighted.parameters()["loc"], repeated.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(
        weighted.distribution.covariance(), np.cov(repeated.T, bias=True), rtol=1e-5
    )


def test_dtype_is_that_of_the_rows_unless_given():
    y, exact = normal_rows(100), {"method": "exact"}
    for rows, dtype, expected, options in (
        (y.astype(np.float32), None, tf.float32, exact),
        (y, None, tf.float64, exact),
        (y.tolist(), "float32", tf.float32, exact),
        (y.astype(np.float32), None, tf.float32, {}),
        (y.astype(np.float32), None, tf.float32, {"batch_size": 50}),
    ):
        fit = fit_distribution("MultivariateNormalDiag", rows, dtype=dtype, **options)
        assert fit.distribution.dtype == expected


def test_without_xla_the_answer_is_the_same():
    one, two = (
        mdn.fit_distribution("MultivariateNormalTriL", normal_rows(), initial="random", compiled=c)
        for c in (True, False)
    )
    assert one.nll == pytest.approx(two.nll, abs=1e-10)


def test_row_log_prob_leaves_out_what_is_missing():
    y = np.array([1.0, np.nan, 2.0])
    expected = stats.norm(0, 2).logpdf(y)
    found = row_log_prob(tfd.Normal(tf.zeros([], tf.float64), 2.0), y)
    np.testing.assert_allclose(found, np.nan_to_num(expected), rtol=1e-12)


# ---------------------------------------------------------------------- mistakes

Y = normal_rows(20)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("Nomal", TEN), {}, "Nomal: is no distribution"),
        ((int, TEN), {}, "is no distribution"),
        ((tfd.MixtureSameFamily, Y), {}, "use GaussianMixture"),
        (("GaussianMixture", Y), {}, "needs its number of components"),
        (("Normal", TEN), {"components": 2}, "Normal has no components"),
        (("GaussianMixture", TEN), {"components": 2}, r"a mixture needs \[N, D\]"),
        (("MultivariateNormalTriL", TEN), {}, r"needs \[N, D\]"),
        (("Normal", TEN), {"method": "mle"}, "method=mle: must be one of"),
        (("Gamma", TEN), {"method": "exact"}, "Gamma has no closed form"),
        (("GaussianMixture", Y), {"components": 2, "method": "exact"}, "use method=em"),
        (("Normal", TEN), {"method": "em"}, "method=em is for normals"),
        (("Normal", TEN), {"method": "exact", "batch_size": 2}, "exact takes no batch_size"),
        (("Normal", TEN), {"initial": {"lok": 1.0}}, "lok is no parameter of Normal"),
        (("Normal", TEN), {"initial": "zeros"}, "initial=zeros"),
        (("Normal", TEN), {"initial": {"scale": -1.0}}, "scale=-1.0: must be positive"),
        (("Normal", TEN), {"initial": {"loc": [1.0, 2.0]}}, r"must be numbers of shape \[\]"),
        (("Normal", TEN), {"initial": {"loc": np.inf}}, "must be finite"),
        (("Normal", TEN), {"fixed": ["scale"]}, "its value is not known"),
        (("Normal", TEN), {"fixed": {"loc": 0.0, "scale": 1.0}}, "leaves no parameter"),
        (("Normal", TEN), {"dtype": "float16"}, "must be float32 or float64"),
        (("Normal", TEN), {"batch_size": 11}, "there are only 10 rows"),
        (("Normal", TEN), {"restarts": 0}, "restarts=0"),
        (("MultivariateNormalTriL", Y), {"positivity": "abs"}, "positivity='abs' is unknown"),
        (
            ("MultivariateNormalTriL", Y),
            {"initial": {"covariance": [[1.0, 2.0], [2.0, 1.0]]}},
            "not positive definite",
        ),
        (
            ("MultivariateNormalTriL", Y),
            {"initial": {"covariance": [[1.0, 0.5], [0.2, 1.0]]}},
            "not symmetric",
        ),
        (("MultivariateNormalTriL", Y), {"initial": {"scale_tril": np.ones((2, 2))}}, "triang"),
        (("Gamma", TEN), {"initial": {"concentration": -1.0}}, "outside of its domain"),
        (("Normal", TEN), {"initial": [1.0]}, "values by name, a callable, or random"),
        (("Normal", TEN), {"fixed": 3}, "values by name, or names"),
        (("Normal", TEN), {"restarts": 2.5}, "restarts=2.5: must be an integer"),
        (("Normal", TEN), {"seed": -1}, "seed=-1: must be an integer, and at least 0"),
        (("Normal", TEN), {"tolerance": 0.0}, "tolerance=0.0: must be a positive number"),
        (("Normal", TEN), {"learning_rate": np.nan}, "learning_rate=nan: must be a positive"),
        (("Uniform", TEN), {}, "Uniform cannot be learned.* high; give its value as fixed"),
        (("Deterministic", TEN), {}, "Deterministic|no gradient"),
        (("Categorical", TEN), {}, "Categorical cannot be learned"),
        (("MultivariateNormalLinearOperator", Y), {}, "cannot be learned"),
        (("JointDistributionNamed", Y), {}, "cannot be learned"),
    ],
)
def test_options_that_cannot_work_are_one_line(arguments, options, message):
    with pytest.raises(ConfigError, match=message) as error:
        fit_distribution(*arguments, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("Normal", ["a"]), {}, "not numeric"),
        (("Normal", []), {}, "give .* with rows"),
        (("Normal", [[1.0], [2.0, 3.0]]), {}, "unequal length"),
        (("Normal", [1.0, 1.0, 5.0]), {"weight": [1.0, 1.0, 0.0]}, "y is constant"),
        (("Normal", [np.nan, np.nan]), {}, "missing in every row"),
        (("Bernoulli", [0.7, 0.0]), {}, "y is 0.7 in row 0, which no Bernoulli can be"),
        (("Bernoulli", [0.0, 2.0]), {}, "y is 2 in row 1"),
        (("Poisson", [1.0, 0.5]), {"method": "exact"}, "y is 0.5 in row 1"),
        (("Geometric", [1.0, -1.0]), {}, "y is -1 in row 1"),
        (("Normal", [1.0, np.inf]), {}, "infinite in row 1"),
        (("Normal", [2.0, 2.0]), {}, "y is constant"),
        (("Normal", [[1.0, 2.0], [3.0, 2.0]]), {}, r"constant in column \[1\]"),
        (("Normal", [[1.0, np.nan], [3.0, np.nan]]), {}, r"every row in column \[1\]"),
        (("Normal", TEN), {"weight": np.ones(3)}, "weight has 3 entries but y 10 rows"),
        (("Normal", TEN), {"weight": -np.ones(10)}, "weights are finite and not negative"),
        (("MultivariateNormalTriL", [[1.0, 2.0], [1.5, 2.5], [2.0, 3.0]]), {}, "singular"),
        (("Gamma", [-1.0, 2.0]), {}, "Gamma gives no start a finite NLL|outside of the domain"),
        (("LogNormal", [-1.0, 2.0]), {"method": "exact"}, "LogNormal|undetermined"),
        (("Dirichlet", [[0.5, np.nan], [0.2, 0.8]]), {}, "misses parts of rows"),
    ],
)
def test_rows_that_cannot_be_fitted_are_one_line(arguments, options, message):
    with pytest.raises(DataError, match=message) as error:
        fit_distribution(*arguments, **options)
    assert "\n" not in str(error.value)
