"""What a density says of itself: against scipy, quadrature, and draws with standard errors."""

import json

import numpy as np
import pytest
import tensorflow as tf
from scipy import integrate, optimize, stats
from test_density import all_densities, random_mixture

import mdn
from mdn.density import DiagGaussianMixture, MultivariateNormalDiag, MultivariateNormalTriL


def line(rng, shape, k, dtype=np.float64, spread=2.0):
    """Return a mixture of k normals on a line."""
    loc = spread * rng.normal(size=[*shape, k, 1])
    scale = rng.uniform(0.2, 1.5, size=[*shape, k, 1, 1])
    parameters = rng.normal(size=[*shape, k]), loc, scale
    return mdn.GaussianMixture(*(p.astype(dtype) for p in parameters))


def grid_of(density, size=200_001):
    """Return points on a line far beyond the density, and its values there."""
    reach = 12.0 * density.scale_tril.numpy().max() + np.abs(density.loc.numpy()).max()
    y = np.linspace(-reach, reach, size)
    return y, density.prob(y[:, np.newaxis]).numpy()


@pytest.fixture(scope="module")
def densities():
    """All types, batch [4], three targets."""
    return all_densities(np.random.default_rng(0), [4], 3, 3)


# ---------------------------------------------------------------------- moments


def test_higher_moments_are_those_of_quadrature():
    for seed in range(3):
        density = line(np.random.default_rng(seed), [], 3)
        y, p = grid_of(density)
        assert integrate.simpson(p, x=y) == pytest.approx(1.0, rel=1e-9)
        mean = integrate.simpson(p * y, x=y)
        moments = [integrate.simpson(p * (y - mean) ** n, x=y) for n in range(5)]
        assert density.skewness()[0].numpy() == pytest.approx(moments[3] / moments[2] ** 1.5)
        assert density.kurtosis()[0].numpy() == pytest.approx(moments[4] / moments[2] ** 2 - 3.0)


def test_moments_of_the_margins(densities):
    for density in densities:
        correlation = density.correlation().numpy()
        covariance, stddev = density.covariance().numpy(), density.stddev().numpy()
        np.testing.assert_allclose(
            correlation * stddev[:, :, None] * stddev[:, None], covariance, atol=1e-12
        )
        np.testing.assert_array_equal(np.einsum("nii->ni", correlation), 1.0)
        for moment in ("skewness", "kurtosis"):
            each = [getattr(density.marginal(d), moment)()[:, 0] for d in range(3)]
            np.testing.assert_allclose(
                getattr(density, moment)(), np.stack(each, -1), rtol=1e-9, atol=1e-12
            )
    for normal in densities[2:]:
        np.testing.assert_allclose(normal.skewness(), np.zeros([4, 3]), atol=1e-14)
        np.testing.assert_allclose(normal.kurtosis(), np.zeros([4, 3]), atol=1e-13)


# ---------------------------------------------------------------------- components


def test_responsibilities_are_bayes_rule(densities):
    y = np.random.default_rng(1).normal(size=[4, 3])
    y[1, 0], y[2] = np.nan, np.nan
    for density in densities[:2]:
        joint = tf.nn.log_softmax(density.logits) + density.components_distribution.log_prob(
            y[:, np.newaxis]
        )
        found = density.responsibilities(y).numpy()
        np.testing.assert_allclose(found, np.exp(joint - density.log_prob(y)[:, None]), rtol=1e-9)
        np.testing.assert_allclose(found[2], tf.nn.softmax(density.logits[2]))
    np.testing.assert_array_equal(densities[2].responsibilities(y), np.ones([4, 1]))


# ---------------------------------------------------------------------- modes


@pytest.mark.parametrize("d", [1, 2, 3])
def test_modes_are_the_maxima_that_an_optimiser_finds(d):
    rng = np.random.default_rng(d)

    @tf.function(autograph=False)
    def program(y, *parameters):
        with tf.GradientTape() as tape:
            tape.watch(y)
            value = -mdn.GaussianMixture(*parameters).log_prob(y)
        return value, tape.gradient(value, y)

    def find_modes(*parameters):
        return mdn.GaussianMixture(*parameters).modes()

    find = tf.function(find_modes, autograph=False)
    for _ in range(4):
        density = random_mixture(rng, [], 4, d)
        modes = find(*density.mixture_parameters())
        mask = modes.mask.numpy()
        assert mask[0]
        assert (np.diff(modes.log_prob.numpy()) <= 1e-12).all()
        np.testing.assert_allclose(density.log_prob(modes.loc), modes.log_prob, rtol=1e-9)
        found = modes.loc.numpy()[mask]
        apart = np.linalg.norm(found[:, None] - found, axis=-1) + 1e9 * np.eye(len(found))
        assert apart.min() > 1e-3

        def loss(y, density=density):
            value, gradient = program(tf.constant(y), *density.mixture_parameters())
            return value.numpy(), gradient.numpy()

        for start in density.loc.numpy():
            end = optimize.minimize(loss, start, jac=True, tol=1e-10).x
            assert np.linalg.norm(found - end, axis=-1).min() < 1e-4
        for mode in found:  # a gradient of nothing, and no direction upwards
            assert np.abs(loss(mode)[1]).max() < 1e-8
            around = mode + 1e-3 * rng.normal(size=[200, d])
            assert (density.log_prob(around) < density.log_prob(mode)).numpy().all()


def test_modes_by_symmetry_and_of_weights_of_nothing():
    # The mean of the light one in the middle is a minimum by symmetry.
    loc = np.array([[-1.0], [0.0], [1.0]])
    density = mdn.GaussianMixture(np.log([0.48, 0.04, 0.48]), loc, np.full([3, 1, 1], 0.35))
    modes = density.modes()
    np.testing.assert_array_equal(modes.mask, [True, True, False])
    np.testing.assert_allclose(np.sort(modes.loc[:2, 0]), [-1.0, 1.0], atol=2e-2)
    density = mdn.GaussianMixture([0.0, -1e9], [[0.0], [50.0]], np.ones([2, 1, 1]))
    np.testing.assert_array_equal(density.modes().mask, [True, False])
    np.testing.assert_allclose(density.mode(), [0.0], atol=1e-5)
    together = mdn.GaussianMixture([0.3, 1.0], [[0.0], [1.9]], np.ones([2, 1, 1]))  # nearly two
    assert together.modes().mask.numpy().sum() == 1


def test_mode_of_a_normal_is_its_mean_and_its_gradient_the_implicit_one(densities):
    for normal in densities[2:]:
        np.testing.assert_array_equal(normal.mode(), normal.loc)
    one = random_mixture(np.random.default_rng(3), [], 3, 2)
    parameters = list(one.mixture_parameters())

    @tf.function(autograph=False)
    def mode(*parameters):
        return mdn.GaussianMixture(*parameters).mode()

    theory, numeric = map(list, tf.test.compute_gradient(mode, parameters, delta=1e-5))
    lower = np.tile(np.tril(np.ones([2, 2], bool)).reshape(-1), 3)
    numeric[2], theory[2] = numeric[2][:, lower], theory[2][:, lower]
    for a, b in zip(theory, numeric, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


# ---------------------------------------------------------------------- regions


@pytest.mark.parametrize("level", [0.01, 0.5, 0.9, 0.999])
def test_intervals_hold_the_level_at_one_density(level):
    density = line(np.random.default_rng(4), [30], 4, spread=4.0)
    region = density.hdr(level)
    ends, mask = region.intervals.numpy(), region.mask.numpy()
    assert level < 0.5 or (mask.sum(-1) > 1).any()  # some are unions
    assert np.isnan(ends[~mask]).all()
    flat = np.moveaxis(np.where(mask[..., None], ends, 0.0), 0, -1)[..., None]  # [K, 2, 30, 1]
    cdf, log_prob = density.cdf(flat).numpy()[..., 0], density.log_prob(flat).numpy()
    inside = np.where(mask.T, cdf[:, 1] - cdf[:, 0], 0.0).sum(0)
    np.testing.assert_allclose(inside, level, rtol=1e-9)
    for side in (0, 1):
        at = np.where(mask.T, log_prob[:, side], region.log_threshold)
        np.testing.assert_allclose(at, np.tile(region.log_threshold, [4, 1]), atol=1e-8)
    row = ends[0][mask[0]].reshape(-1)
    assert (np.diff(row) > 0.0).all()  # from left to right, without overlap
    # No point outside is denser than the threshold: none of the intervals is missing.
    y = np.linspace(-15.0, 15.0, 2001)
    dense = density.log_prob(y[:, None, None]).numpy() > region.log_threshold.numpy() + 1e-9
    within = ((y[:, None, None] > ends[..., 0]) & (y[:, None, None] < ends[..., 1])).any(-1)
    assert not (dense & ~within).any()


def test_region_of_a_normal_is_its_central_interval():
    normal = MultivariateNormalTriL(np.array([2.0]), np.array([[3.0]]))
    region = normal.hdr(0.8)
    np.testing.assert_allclose(region.intervals[0], stats.norm(2.0, 3.0).interval(0.8))
    np.testing.assert_allclose(normal.interval(0.8)[0], stats.norm(2.0, 3.0).interval(0.8))
    edge = stats.norm(2.0, 3.0).logpdf(region.intervals[0, 0])
    np.testing.assert_allclose(region.log_threshold, edge)


def test_region_of_far_components_of_unequal_scales():
    """Each of two bells that do not meet has a threshold that both share."""
    loc, scale = np.array([[0.0], [1e3]]), np.array([[[1e-4]], [[10.0]]])
    density = mdn.GaussianMixture(np.log([0.5, 0.5]), loc, scale)
    for level in (0.3, 0.6, 0.95):
        region = density.hdr(level)
        ends = region.intervals.numpy()[region.mask.numpy()]
        cdf = density.cdf(ends[..., np.newaxis]).numpy()[..., 0]
        assert (cdf[:, 1] - cdf[:, 0]).sum() == pytest.approx(level, rel=1e-9)
        assert len(ends) == (1 if level < 0.5 else 2)


def test_gradient_of_a_region_is_that_of_finite_differences():
    density = line(np.random.default_rng(5), [2], 3, spread=4.0)
    parameters = [*density.mixture_parameters(), tf.constant(0.7, tf.float64)]

    @tf.function(autograph=False)
    def ends(logits, loc, scale, level):
        region = mdn.GaussianMixture(logits, loc, scale).hdr(level)
        ends = tf.where(region.mask[..., None], region.intervals, tf.zeros_like(region.intervals))
        return tf.concat([tf.reshape(ends, [-1]), region.log_threshold], axis=0)

    theory, numeric = tf.test.compute_gradient(ends, parameters, delta=1e-5)
    for a, b in zip(theory, numeric, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_sampled_threshold_holds_the_level(densities):
    n = 20_000
    for density in densities:
        region = density.hdr(0.8, n=n, seed=1)
        assert region.intervals is None
        inside = density.log_prob(density.sample(n, seed=2)) >= region.log_threshold
        error = np.sqrt(2.0 * 0.8 * 0.2 / n)  # of the threshold, and of this check
        assert np.abs(inside.numpy().mean(0) - 0.8).max() < 5.0 * error
    # Of a normal: the squared radius is chi squared.
    radius = stats.chi2(3).ppf(0.8)
    peak = densities[2].log_prob(densities[2].mode()).numpy()
    region = densities[2].hdr(0.8, n=n)
    np.testing.assert_allclose(region.log_threshold, peak - 0.5 * radius, atol=0.1)


# ---------------------------------------------------------------------- PIT


def test_pit_is_the_product_of_the_conditional_distribution_functions(densities):
    y = np.random.default_rng(6).normal(size=[4, 3])
    for density in densities:
        found = density.pit(y).numpy()
        expected = [density.marginal(0).cdf(y[:, :1])]
        expected += [density.condition({0: y[:, 0]}).marginal(0).cdf(y[:, 1:2])]
        expected += [density.condition({0: y[:, 0], 1: y[:, 1]}).cdf(y[:, 2:])]
        np.testing.assert_allclose(found, np.concatenate(expected, -1), rtol=1e-9)


def test_pit_leaves_out_what_is_missing(densities):
    y = np.random.default_rng(7).normal(size=[4, 3])
    y[:2, 1], y[3, 0] = np.nan, np.nan
    for density in densities:
        found = density.pit(y).numpy()
        np.testing.assert_array_equal(np.isnan(found), np.isnan(y))
        without = density.marginal([0, 2]).pit(y[:, [0, 2]]).numpy()
        np.testing.assert_allclose(found[:2][:, [0, 2]], without[:2], rtol=1e-9)
        whole = density.marginal([1, 2]).pit(y[:, 1:]).numpy()
        np.testing.assert_allclose(found[3, 1:], whole[3], rtol=1e-9)


def test_pit_of_draws_is_uniform_and_independent(densities):
    n = 4000
    for density in densities:
        ranks = density.pit(density.sample(n, seed=3)).numpy()[:, 0]  # [n, 3]
        for column in ranks.T:
            assert stats.kstest(column, "uniform").pvalue > 1e-4
        correlation = np.corrcoef(ranks.T) - np.eye(3)
        assert np.abs(correlation).max() < 5.0 / np.sqrt(n)


# ---------------------------------------------------------------------- draws


def test_draws_are_functions_of_the_seed(densities):
    for density in densities:
        one = density.sample([3, 2], seed=5).numpy()
        assert one.shape == (3, 2, 4, 3)
        np.testing.assert_array_equal(one, density.sample([3, 2], seed=5))
        np.testing.assert_array_equal(one, density.sample([3, 2], seed=tf.constant([0, 5])))
        assert not np.isclose(one, density.sample([3, 2], seed=6)).any()
        assert not np.isclose(density.sample(seed=None), density.sample(seed=None)).any()
        inside = tf.function(lambda d: d.sample([3, 2], seed=5), autograph=False)(density)
        np.testing.assert_allclose(inside, one, rtol=1e-12)


def test_draws_have_the_distribution_of_the_density():
    density = line(np.random.default_rng(8), [], 4, spread=4.0)
    draws = density.sample(20_000, seed=1).numpy()[:, 0]
    assert stats.kstest(draws, lambda y: density.cdf(y[:, None]).numpy()[:, 0]).pvalue > 1e-4


def test_temperatures_are_powers_of_the_weights_and_factors_of_the_covariances():
    weights = np.array([0.2, 0.8])
    density = mdn.GaussianMixture(
        np.log(weights) + 7.0, [[-100.0], [100.0]], np.array([[[1.0]], [[3.0]]])
    )
    n = 20_000
    for temperature in (0.5, 1.0, 3.0):
        draws = density.sample(n, seed=1, temperature=temperature).numpy()[:, 0]
        share = weights ** (1.0 / temperature)
        share /= share.sum()
        assert abs((draws > 0.0).mean() - share[1]) < 5.0 * np.sqrt(share[0] * share[1] / n)
    for heat in (1e-6, 0.25, 4.0):
        draws = density.sample(n, seed=1, sigma_temperature=heat).numpy()[:, 0]
        right = draws[draws > 0.0]
        assert right.std() == pytest.approx(3.0 * np.sqrt(heat), rel=5.0 / np.sqrt(2 * len(right)))
    normal = MultivariateNormalDiag(np.zeros([2]), np.ones([2]))
    assert normal.sample(n, seed=1, sigma_temperature=4.0).numpy().std() == pytest.approx(
        2.0, 0.05
    )
    with pytest.raises(mdn.MDNError, match=r"temperature=0\.0: give a positive number"):
        density.sample(1, temperature=0.0)


def test_components_without_weight_are_never_drawn():
    density = mdn.GaussianMixture([-1e9, 0.1, 0.7, -1e9], [[9e9], [0.0], [1.0], [9e9]],
                                  np.ones([4, 1, 1], np.float32))  # fmt: skip
    assert density.sample(200_000, seed=1).numpy().max() < 100.0


# ---------------------------------------------------------------------- information, scores


def test_entropy_is_that_of_quadrature_within_its_error_and_bounds():
    densities = line(np.random.default_rng(9), [8], 4, spread=2.0)
    found = densities.entropy_estimate(2000, seed=1)
    for i in range(8):
        y, p = grid_of(densities[i], 20_001)
        exact = integrate.simpson(-p * np.log(np.maximum(p, 1e-300)), x=y)
        assert abs(found.estimate[i] - exact) < 4.0 * found.standard_error[i]
        assert found.lower[i] <= exact <= found.upper[i]
    assert (found.standard_error > 0.0).numpy().all()
    np.testing.assert_array_equal(densities.entropy(n=2000, seed=1), found.estimate)
    estimates = [densities.entropy_estimate(100, seed=seed) for seed in range(60)]
    spread = np.std([e.estimate for e in estimates], axis=0)
    stated = np.sqrt(np.mean([np.square(e.standard_error) for e in estimates], axis=0))
    np.testing.assert_allclose(spread, stated, rtol=0.4)


def test_entropy_of_a_normal_is_exact(densities):
    for normal in densities[2:]:
        found = normal.entropy_estimate()
        covariance = normal.covariance().numpy()
        exact = 0.5 * np.linalg.slogdet(2.0 * np.pi * np.e * covariance)[1]
        for value in (found.estimate, found.upper, normal.entropy()):
            np.testing.assert_allclose(value, exact, rtol=1e-12)
        np.testing.assert_allclose(found.standard_error, np.zeros([4]), atol=1e-15)


@pytest.mark.parametrize("logits", [[0.0], [0.0, -1e9]])
def test_entropy_of_one_component_has_the_gradient_of_its_closed_form(logits):
    logits = tf.constant(logits)
    scale_tril = tf.constant([[[2.0, 0.0], [1.0, 3.0]]] * len(logits))
    with tf.GradientTape() as tape:
        tape.watch([logits, scale_tril])
        density = mdn.GaussianMixture(logits, tf.zeros([len(logits), 2]), scale_tril)
        found = density.entropy_estimate(10)
        total = found.estimate + found.standard_error
    by_logits, by_scale = tape.gradient(total, [logits, scale_tril])
    np.testing.assert_allclose(by_logits, 0.0, atol=1e-6)
    # Of sum log L_ii.
    np.testing.assert_allclose(by_scale[0], [[0.5, 0.0], [0.0, 1.0 / 3.0]], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(by_scale[1:], 0.0, atol=1e-6)
    assert found.standard_error == 0.0


def test_entropy_of_components_far_apart_has_bounds_that_meet():
    rng = np.random.default_rng(10)
    density = random_mixture(rng, [], 3, 2)
    density = density.copy(loc=density.loc + 1e3 * np.arange(3.0)[:, None])
    found = density.entropy_estimate(10)
    np.testing.assert_allclose(found.lower, found.upper, rtol=1e-12)
    np.testing.assert_allclose(found.estimate, found.upper, rtol=1e-12)
    draws = density.log_prob(density.sample(20_000, seed=1)).numpy()
    assert abs(found.estimate + draws.mean()) < 5.0 * draws.std() / np.sqrt(20_000)


def test_energy_score_is_the_crps_of_one_target():
    density = line(np.random.default_rng(11), [3], 3)
    y = np.array([[-1.0], [0.5], [4.0]])
    exact = density.crps(y).numpy()[:, 0]
    estimates = np.stack([density.energy_score(y, 400, seed=s).numpy() for s in range(30)])
    error = estimates.std(0) / np.sqrt(30)
    assert (np.abs(estimates.mean(0) - exact) < 5.0 * error).all()


def test_energy_score_leaves_out_what_is_missing(densities):
    y = np.random.default_rng(12).normal(size=[4, 3])
    y[:, 1] = np.nan
    for density in densities:
        estimates = [density.energy_score(y, 400, seed=s).numpy() for s in range(20)]
        margin = density.marginal([0, 2])
        others = [margin.energy_score(y[:, [0, 2]], 400, seed=s).numpy() for s in range(20)]
        error = np.sqrt((np.var(estimates, 0) + np.var(others, 0)) / 20)
        assert (np.abs(np.mean(estimates, 0) - np.mean(others, 0)) < 5.0 * error).all()
        np.testing.assert_array_equal(density.energy_score(np.full([4, 3], np.nan)), np.zeros(4))


@pytest.mark.parametrize(
    "query",
    [lambda d: d.entropy(n=1), lambda d: d.energy_score(np.zeros([4, 3]), n=1)],
    ids=["entropy", "energy_score"],
)
def test_one_draw_is_too_few(densities, query):
    with pytest.raises(mdn.MDNError, match="n=1: at least two draws"):
        query(densities[0])


def test_a_level_that_is_no_probability_is_named(densities):
    with pytest.raises(mdn.MDNError, match=r"level=90\.0: must be between 0 and 1"):
        densities[0].hdr(90.0)


# ---------------------------------------------------------------------- plain arrays, text


def test_plain_arrays_are_the_density_again(densities):
    y = np.random.default_rng(13).normal(size=[4, 3])
    for density in densities:
        plain = density.to_dict()
        assert all(isinstance(value, str | np.ndarray) for value in plain.values())
        again = mdn.GaussianMixture.from_dict(plain)
        assert type(again) is type(density)
        assert again.dtype == density.dtype
        np.testing.assert_array_equal(again.log_prob(y), density.log_prob(y))
        lists = {k: v if isinstance(v, str) else v.tolist() for k, v in plain.items()}
        other = mdn.GaussianMixture.from_dict(json.loads(json.dumps(lists)))
        np.testing.assert_array_equal(other.log_prob(y), density.log_prob(y))
    with pytest.raises(mdn.MDNError, match=r"type='os\.system' is no density: give one of"):
        mdn.GaussianMixture.from_dict({"type": "os.system"})


def test_a_person_can_read_it(densities):
    text = repr(densities[0])
    assert text == "mdn GaussianMixture: batch (4,), 3 targets, 3 components, float64"
    assert "\n" not in repr(densities[1])
    one = mdn.GaussianMixture(np.log([0.25, 0.75]), [[1.0, 2.0], [3.0, 1e6]],
                              np.stack([np.eye(2), 2.0 * np.eye(2)]))  # fmt: skip
    lines = str(one).splitlines()
    assert lines[2].split() == ["0.250", "1", "(1),", "2", "(1)"]
    assert lines[3].split() == ["0.750", "3", "(2),", "1e+06", "(2)"]
    traced = []
    tf.function(lambda d: traced.append(repr(d)), autograph=False)(one)
    assert traced == ["mdn GaussianMixture: batch (), 2 targets, 2 components, float64"]


# ---------------------------------------------------------------------- everything, everywhere

ANSWERS = {
    "log_prob": lambda d, y: d.log_prob(y),
    "correlation": lambda d, y: d.correlation(),
    "kurtosis": lambda d, y: d.kurtosis(),
    "marginal": lambda d, y: d.marginal([2, 0]).log_prob(y[..., :2]),
    "condition": lambda d, y: d.condition({1: y[..., 1]}).mean(),
    "linear": lambda d, y: d.linear(np.ones([1, 3])).stddev(),
    "cdf": lambda d, y: d.cdf(y),
    "quantile": lambda d, y: d.quantile(0.3),
    "hdr": lambda d, y: d.marginal(0).hdr(0.5).log_threshold,
    "pit": lambda d, y: d.pit(y),
    "mode": lambda d, y: d.mode(),
    "entropy": lambda d, y: d.entropy(n=5),
    "upper": lambda d, y: d.entropy_estimate(2).upper,
    "crps": lambda d, y: d.crps(y),
    "energy_score": lambda d, y: d.energy_score(y, 5),
    "responsibilities": lambda d, y: d.responsibilities(y),
    "sample": lambda d, y: d.sample(2, seed=1),
    "reduce": lambda d, y: d.reduce(2).kl_bound,
    "effective": lambda d, y: d.effective_components(),
}


# What the other types do by themselves; the rest is that of their `mixture_parameters`.
OWN = ("log_prob", "correlation", "marginal", "condition", "sample", "responsibilities")


@pytest.mark.slow
@pytest.mark.parametrize("i", range(4))
def test_all_in_one_program_of_xla_with_gradients(i):
    """The batch size is not known to the program, and float32 is near float64."""
    chosen = {name: ANSWERS[name] for name in (ANSWERS if i == 0 else OWN)}
    density = all_densities(np.random.default_rng(14), [4], 3, 3)[i]
    y = np.random.default_rng(15).normal(size=[4, 3])
    kind, names = type(density), list(density.tensors())

    @tf.function(jit_compile=True, autograph=False, reduce_retracing=True)
    def answers(y, *tensors):
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            density = kind(**dict(zip(names, tensors, strict=True)))
            found = {name: answer(density, y) for name, answer in chosen.items()}
            total = tf.add_n([tf.reduce_sum(value) for value in found.values()])
        return found, tape.gradient(total, tensors)  # of a sum, which NaN or inf in any one is

    signature = [
        tf.TensorSpec([None, *t.shape[1:]], tf.float32) for t in density.tensors().values()
    ]
    program = answers.get_concrete_function(tf.TensorSpec([None, 3], tf.float32), *signature)
    single = [tf.cast(t, tf.float32) for t in (y, *density.tensors().values())]
    found, gradients = program(*single)
    for name, answer in chosen.items():
        expected = answer(density, y).numpy()
        assert found[name].shape == expected.shape, name
        if name not in ("sample", "energy_score", "entropy"):  # draws depend on the dtype
            scale = np.abs(expected).max()
            np.testing.assert_allclose(
                found[name], expected, rtol=2e-4, atol=2e-4 * scale, err_msg=name
            )
    assert all(np.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("kind", [mdn.GaussianMixture, DiagGaussianMixture])
def test_parameters_of_unequal_batches_broadcast(kind):
    rng = np.random.default_rng(17)
    full = random_mixture(rng, [4], 3, 2)
    scale = (
        full.scale_tril[0] if kind is mdn.GaussianMixture else full.scale_tril[0, :, 0, :1] ** 2
    )
    scale = scale if kind is mdn.GaussianMixture else np.ones([3, 2]) * scale + 0.1
    some = kind(full.logits[0], full.loc, scale)
    each = kind(*(np.stack([t] * 4) if i != 1 else t for i, t in
                  enumerate((full.logits[0], full.loc, scale))))  # fmt: skip
    y = rng.normal(size=[4, 2])
    for answer in (
        lambda d: d.sample(3, seed=1),
        lambda d: d.modes().loc,
        lambda d: d.pit(y),
        lambda d: d.hdr(0.5, n=20).log_threshold,
        lambda d: d.reduce(1).mixture.stddev(),
        lambda d: d.entropy(n=4),
        lambda d: d.marginal([1]).quantile(0.2),
        lambda d: d.condition({0: 0.5}).mean(),
        lambda d: d.responsibilities(y),
        lambda d: d.prune(0.2).mean(),
    ):
        np.testing.assert_allclose(answer(some), answer(each), rtol=1e-9)
