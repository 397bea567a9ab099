"""Mixtures made of mixtures: each against the chain rule, moments, closed forms or draws."""

import itertools

import numpy as np
import pytest
import tensorflow as tf
from test_density import all_densities, random_mixture

import mdn
from mdn.density import DiagGaussianMixture, GaussianMixture
from mdn.density.factors import lower_factor, pivot


@pytest.fixture(scope="module")
def densities():
    """All types, batch [6], four targets."""
    return all_densities(np.random.default_rng(0), [6], 3, 4)


@pytest.fixture(scope="module")
def y():
    return np.random.default_rng(1).normal(size=[6, 4])


# ---------------------------------------------------------------------- factors


@pytest.mark.parametrize("dim", range(4))
def test_pivot_is_a_cholesky_factor_of_what_is_left(dim):
    scale_tril = random_mixture(np.random.default_rng(2), [5], 1, 4).scale_tril[:, 0]
    covariance = (scale_tril @ tf.linalg.matrix_transpose(scale_tril)).numpy()
    scale, column, rest = (t.numpy() for t in pivot(scale_tril, dim))
    others = [i for i in range(4) if i != dim]
    np.testing.assert_allclose(scale**2, covariance[:, dim, dim])
    np.testing.assert_allclose(column * scale[:, None], covariance[:, others, dim], atol=1e-14)
    block = covariance[:, others][:, :, others]
    np.testing.assert_allclose(
        np.einsum("ni,nj->nij", column, column) + rest @ np.swapaxes(rest, -1, -2),
        block,
        atol=1e-13,
    )
    assert (rest == np.tril(rest)).all()
    assert (np.einsum("nii->ni", rest) > 0.0).all()


def test_pivot_keeps_the_smallest_scale_beside_the_largest():
    # y_2 = 1e6 y_1 + 1e-6 noise: y_1 given y_2 has a standard deviation of 1e-12.
    scale_tril = tf.constant([[1.0, 0.0], [1e6, 1e-6]])  # float32
    np.testing.assert_allclose(pivot(scale_tril, 1)[2], [[1e-12]], rtol=1e-6)


def test_lower_factor_of_unequal_rows():
    rows = np.random.default_rng(3).normal(size=[4, 7, 3]) * [1e-3, 1.0, 1e3]
    factor = lower_factor(tf.constant(rows)).numpy()
    np.testing.assert_allclose(
        factor @ np.swapaxes(factor, -1, -2), np.swapaxes(rows, -1, -2) @ rows, rtol=1e-9
    )


# ---------------------------------------------------------------------- margins, conditionals


@pytest.mark.parametrize("dims", [[0], [2], [0, 1], [3, 1], [2, 0, 3], [3, 2, 1, 0], [-1, 1]])
def test_marginal_is_the_density_of_those_targets(densities, y, dims):
    observed = np.full_like(y, np.nan)
    observed[:, dims] = y[:, dims]
    for density in densities:
        margin = density.marginal(dims)
        assert isinstance(margin, mdn.GaussianMixture)
        assert margin.event_shape == [len(dims)]
        np.testing.assert_allclose(
            margin.log_prob(y[:, dims]), density.log_prob(observed), rtol=1e-9
        )
        np.testing.assert_allclose(margin.mean(), density.mean().numpy()[:, dims], rtol=1e-12)


@pytest.mark.parametrize(
    "given", [given for n in (1, 2, 3) for given in itertools.permutations(range(4), n)][::3]
)
def test_conditional_times_marginal_is_the_joint(densities, y, given):
    free = [i for i in range(4) if i not in given]
    for density in densities:
        conditional = density.condition({i: y[:, i] for i in given})
        assert isinstance(conditional, mdn.GaussianMixture)
        assert conditional.event_shape == [len(free)]
        np.testing.assert_allclose(
            conditional.log_prob(y[:, free]) + density.marginal(given).log_prob(y[:, given]),
            density.log_prob(y),
            rtol=1e-9,
        )


def test_values_broadcast_with_the_batch(densities, y):
    density = densities[0]
    grid = np.linspace(-1.0, 1.0, 5)[:, np.newaxis]  # [5, 1]
    both = density.condition({-1: grid, 0: 0.3})
    assert both.batch_shape == [5, 6]
    for tensor, rank in zip(both.mixture_parameters(), (1, 2, 3), strict=True):
        assert tensor.shape[:-rank] == [5, 6]
    one = density.condition({3: np.full([6], grid[2, 0]), 0: np.full([6], 0.3)})
    np.testing.assert_allclose(both[2].log_prob(y[:, 1:3]), one.log_prob(y[:, 1:3]), rtol=1e-12)
    assert density[0].condition({1: grid[:, 0]}).batch_shape == [5]
    same = density.condition({})
    np.testing.assert_allclose(same.log_prob(y), density.log_prob(y), rtol=1e-12)


def test_diagonal_stays_diagonal(densities):
    for density in (densities[1], densities[3]):
        for one in (
            density.marginal([2, 0]),
            density.condition({1: 0.0}),
            density.affine(1.0, -2.0),
            density.prune(0.1),
        ):
            assert isinstance(one, DiagGaussianMixture)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_conditionals_of_extreme_scales(dtype):
    """Scales from 1e-6 to 1e6 in one mixture, weights of nothing, values 100 deviations away."""
    rng = np.random.default_rng(4)
    stddev = 10.0 ** rng.uniform(-6, 6, size=[30, 4, 3])
    factor = np.tril(rng.normal(size=[30, 4, 3, 3]), -1) * stddev[..., np.newaxis]
    factor[..., range(3), range(3)] = stddev
    logits, loc = rng.normal(size=[30, 4]), 1e3 * rng.normal(size=[30, 4, 3])
    logits[:, 0] = -1e9
    density = mdn.GaussianMixture(*(p.astype(dtype) for p in (logits, loc, factor)))
    y = (density.mean() + 100.0 * density.stddev()).numpy()
    margin, conditional = density.marginal([2, 0]), density.condition({2: y[:, 2], 0: y[:, 0]})
    for one in (margin, conditional):
        for tensor in one.mixture_parameters():
            assert np.isfinite(tensor).all()
    together = conditional.log_prob(y[:, 1:2]) + margin.log_prob(y[:, [2, 0]])
    tolerance = 1e-5 if dtype == np.float32 else 1e-12
    np.testing.assert_allclose(together, density.log_prob(y), rtol=tolerance)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (lambda d: d.marginal([0, 4]), "dim 4 of a density with 4 targets: give -4 to 3"),
        (lambda d: d.marginal([1, -3]), "name a target twice"),
        (lambda d: d.marginal([]), "give one dim at least"),
        (lambda d: d.condition({"price": 1.0}), "'price' is no whole number"),
        (lambda d: d.condition(dict.fromkeys(range(4), 0.0)), "all 4 targets are given"),
        (lambda d: d.linear(np.ones([5, 4])), "M <= 4 rows"),
        (lambda d: d.affine(np.zeros([3])), "for 4 targets"),
        (lambda d: d.reduce(0), "k=0: a mixture has at least one"),
        (lambda d: d.prune(2.0), "min_weight=2.0"),
        (lambda d: mdn.mixture_of([]), "of no densities"),
        (lambda d: mdn.mixture_of([d, d.marginal([0])]), "make them equal"),
        (lambda d: mdn.mixture_of([d, d], weights=[1.0]), "for 2 densities"),
    ],
)
def test_mistakes_are_named_in_one_line(densities, query, message):
    with pytest.raises(mdn.MDNError, match=message) as error:
        query(densities[0])
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------- linear maps


def test_affine_is_the_change_of_variables(densities, y):
    shift, scale = np.array([1.0, -2.0, 0.0, 5.0]), np.array([2.0, -0.5, 1.0, -3.0])
    for density in densities:
        mapped = density.affine(shift, scale)
        np.testing.assert_allclose(
            mapped.log_prob(y * scale + shift),
            density.log_prob(y) - np.log(np.abs(scale)).sum(),
            rtol=1e-12,
        )
    rows = np.arange(24.0).reshape(6, 4)
    shifted = densities[0].affine(rows, 2.0)
    np.testing.assert_allclose(shifted.mean(), 2.0 * densities[0].mean() + rows, rtol=1e-12)


def test_linear_maps_are_exact(densities, y):
    rng = np.random.default_rng(5)
    square, shift = rng.normal(size=[4, 4]), rng.normal(size=[4])
    log_volume = np.linalg.slogdet(square)[1]
    for density in densities:
        mapped = density.linear(square, shift)
        np.testing.assert_allclose(
            mapped.log_prob(y @ square.T + shift), density.log_prob(y) - log_volume, rtol=1e-9
        )
        fewer = density.linear(square[:2])
        np.testing.assert_allclose(fewer.mean(), density.mean() @ square[:2].T, rtol=1e-10)
        np.testing.assert_allclose(
            fewer.covariance(), square[:2] @ density.covariance() @ square[:2].T, rtol=1e-9
        )
        # A selection is a margin.
        np.testing.assert_allclose(
            density.linear(np.eye(4)[[2, 0]]).log_prob(y[:, [2, 0]]),
            density.marginal([2, 0]).log_prob(y[:, [2, 0]]),
            rtol=1e-9,
        )
    batched = densities[0].linear(rng.normal(size=[6, 1, 4]))
    assert (batched.batch_shape, batched.event_shape) == ([6], [1])


# ---------------------------------------------------------------------- mixtures of mixtures


def test_mixture_of_any_types_is_the_weighted_sum(densities, y):
    for weights in (None, [1.0, 2.0, 3.0, 4.0]):
        mixture = mdn.mixture_of(densities, weights)
        share = np.full(4, 0.25) if weights is None else np.array(weights) / 10.0
        each = np.stack([density.prob(y) for density in densities])
        np.testing.assert_allclose(mixture.prob(y), share @ each, rtol=1e-10)
        assert mixture.logits.shape == [6, 3 + 3 + 1 + 1]
    one = mdn.mixture_of([densities[0], densities[0][0]])  # batches broadcast
    assert one.batch_shape == [6]
    assert isinstance(mdn.mixture_of([densities[1], densities[3]]), DiagGaussianMixture)


def test_mixture_of_a_batch_takes_weights(y):
    density = random_mixture(np.random.default_rng(6), [2, 6], 3, 4)
    weights = np.random.default_rng(7).uniform(size=[2, 6])
    mixture = mdn.mixture_of(density, weights)
    expected = (weights / weights.sum(0) * density.prob(y)).numpy().sum(0)
    np.testing.assert_allclose(mixture.prob(y), expected, rtol=1e-10)


def test_concat_weighs_as_the_logits_say(densities, y):
    one, other = densities[0], densities[1]
    mass = [np.exp(d.logits.numpy()).sum(-1) for d in (one, other)]
    expected = (mass[0] * one.prob(y) + mass[1] * other.prob(y)) / (mass[0] + mass[1])
    np.testing.assert_allclose(one.concat(other).prob(y), expected, rtol=1e-10)


# ---------------------------------------------------------------------- fewer components


@pytest.mark.parametrize("k", [1, 2, 4, 6, 9])
def test_reduce_keeps_moments_and_bounds_what_it_costs(k):
    density = random_mixture(np.random.default_rng(8), [5], 6, 2)
    mixture, bound = density.reduce(k)
    assert mixture.logits.shape[-1] == min(k, 6)
    np.testing.assert_allclose(mixture.mean(), density.mean(), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(mixture.covariance(), density.covariance(), rtol=1e-9)
    draws = density.sample(4000, seed=1)
    ratio = (density.log_prob(draws) - mixture.log_prob(draws)).numpy()
    kl, error = ratio.mean(0), ratio.std(0) / np.sqrt(4000)
    assert (kl <= bound.numpy() + 4.0 * error + 1e-12).all()
    if k >= 6:
        np.testing.assert_array_equal(bound, 0.0)


def test_reduce_to_one_is_the_normal_with_the_same_moments(densities, y):
    one = densities[0].reduce(1).mixture
    normal = mdn.MultivariateNormalTriL(
        densities[0].mean(), tf.linalg.cholesky(densities[0].covariance())
    )
    np.testing.assert_allclose(one.log_prob(y), normal.log_prob(y), rtol=1e-9)


def test_the_cost_of_a_merger_is_that_of_the_paper():
    density = random_mixture(np.random.default_rng(10), [], 2, 3)
    covariance = density.components_distribution.covariance().numpy()
    weights = tf.nn.softmax(density.logits).numpy()
    volume = np.linalg.slogdet(covariance)[1]
    cost = 0.5 * (np.linalg.slogdet(density.covariance())[1] - weights @ volume)
    np.testing.assert_allclose(density.reduce(1).kl_bound, cost)


def test_reduce_merges_what_is_equal_for_free(densities, y):
    twice = mdn.mixture_of([densities[0], densities[0]])
    mixture, bound = twice.reduce(3)
    np.testing.assert_allclose(bound, 0.0, atol=1e-12)
    np.testing.assert_allclose(mixture.log_prob(y), densities[0].log_prob(y), rtol=1e-9)


def test_prune_drops_the_light_and_keeps_the_heaviest():
    loc = np.arange(4.0)[:, np.newaxis]
    scale = np.ones([4, 1, 1])
    weights = np.array([[0.05, 0.6, 0.05, 0.3], [0.25, 0.25, 0.26, 0.24]])
    density = mdn.GaussianMixture(np.log(weights), np.stack([loc] * 2), np.stack([scale] * 2))
    pruned = density.prune(0.245)
    assert pruned.logits.shape == [2, 3]
    np.testing.assert_allclose(
        tf.nn.softmax(pruned.logits),
        [[2 / 3, 1 / 3, 0.0], [0.26 / 0.76, 0.25 / 0.76, 0.25 / 0.76]],
    )
    np.testing.assert_array_equal(pruned.loc[..., 0], [[1.0, 3.0, 0.0], [2.0, 0.0, 1.0]])
    assert density[1].prune(0.9).logits.shape == [1]
    inside = tf.function(lambda d: d.prune(0.245).mean(), autograph=False)(density)
    np.testing.assert_allclose(inside, pruned.mean())


def test_effective_components_counts_the_weights():
    one = random_mixture(np.random.default_rng(9), [], 5, 2)
    of = lambda logits: one.copy(logits=logits).effective_components().numpy()  # noqa: E731
    assert of(np.zeros(5)) == pytest.approx(5.0)
    assert of(np.array([0.0, -1e9, -1e9, -1e9, 0.0])) == pytest.approx(2.0)
    weights = np.array([0.1, 0.2, 0.3, 0.15, 0.25])
    assert of(np.log(weights)) == pytest.approx(np.exp(-(weights * np.log(weights)).sum()))


@pytest.mark.parametrize("kind", ["diag", "tril", "low_rank", "precision"])
def test_mixtures_of_one_type_keep_it(kind):
    rng = np.random.default_rng(0)
    loc = rng.normal(size=[3, 2, 4])
    tril = np.tril(0.3 * rng.normal(size=[3, 2, 4, 4])) + 1.5 * np.eye(4)
    make, scales = {
        "diag": (GaussianMixture.from_diag, [np.abs(tril[..., 0]) + 0.5]),
        "tril": (GaussianMixture, [tril]),
        "low_rank": (GaussianMixture.from_low_rank, [np.abs(loc) + 0.5, tril[..., :2]]),
        "precision": (GaussianMixture.from_precision_tril, [tril]),
    }[kind]
    batch = make(rng.normal(size=[3, 2]), loc, *scales)
    y = rng.normal(size=[4])
    parts = np.exp(batch.log_prob(y))
    found = mdn.mixture_of(batch), mdn.mixture_of([batch[0], batch[1], batch[2]])
    for mixture in found:
        assert type(mixture) is type(batch)
        np.testing.assert_allclose(np.exp(mixture.log_prob(y)), parts.mean())
    normal = batch.components_distribution[0, 0]
    both = mdn.mixture_of([normal, batch[1]], weights=[1.0, 3.0])
    assert type(both) is type(batch)
    expected = 0.25 * np.exp(normal.log_prob(y)) + 0.75 * parts[1]
    np.testing.assert_allclose(np.exp(both.log_prob(y)), expected)
    assert type(batch[0].concat(batch[1])) is type(batch)
    if kind == "low_rank":  # of different ranks
        wide = GaussianMixture.from_low_rank(batch[0].logits, loc[0], scales[0][0], tril[0])
        both = mdn.mixture_of([batch[0], wide])
        assert both.factor.shape == [4, 4, 4]
        expected = 0.5 * (parts[0] + np.exp(wide.log_prob(y)))
        np.testing.assert_allclose(np.exp(both.log_prob(y)), expected)
        dense = GaussianMixture(*both.mixture_parameters())
        np.testing.assert_allclose(both.quantile(0.3), dense.quantile(0.3))
