"""Mixtures by precision factors and by low-rank covariances, against dense oracles."""

import numpy as np
import pytest
import tensorflow as tf
from scipy.linalg import solve_triangular
from test_density import oracle, random_tril

import mdn
from mdn.density import (
    LowRankGaussianMixture,
    MultivariateNormalLowRank,
    MultivariateNormalPrecision,
    PrecisionGaussianMixture,
)
from mdn.density.precision import invert_factor

KINDS = ("precision", "low_rank")


def arrays_of(kind, rng, shape, k, d, dtype=np.float64):
    """Return the constructor's arguments of a random mixture."""
    arrays = [rng.normal(size=[*shape, k]), rng.normal(size=[*shape, k, d])]
    if kind == "precision":
        arrays.append(random_tril(rng, [*shape, k], d))
    else:
        arrays += [rng.uniform(0.3, 2.0, size=[*shape, k, d]), rng.normal(size=[*shape, k, d, 2])]
    return [a.astype(dtype) for a in arrays]


def mixture(kind, arrays):
    make = {
        "precision": mdn.GaussianMixture.from_precision_tril,
        "low_rank": mdn.GaussianMixture.from_low_rank,
    }
    return make[kind](*arrays)


def dense(kind, arrays):
    """Return the same density as a `GaussianMixture` of factors that NumPy computes in float64."""
    logits, loc, first, *rest = (np.asarray(a, np.float64) for a in arrays)
    if kind == "precision":
        covariance = np.linalg.inv(first @ np.swapaxes(first, -1, -2))
    else:
        covariance = first[..., np.newaxis] * np.eye(loc.shape[-1]) * first[..., np.newaxis]
        covariance = covariance + rest[0] @ np.swapaxes(rest[0], -1, -2)
    return mdn.GaussianMixture(logits, loc, np.linalg.cholesky(covariance))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("k", "d"), [(1, 1), (3, 1), (1, 3), (4, 2), (3, 5)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-9), (np.float32, 5e-4)])
@pytest.mark.parametrize("missing", [False, True])
def test_log_prob_is_that_of_scipy(kind, k, d, dtype, tolerance, missing):
    rng = np.random.default_rng(0)
    arrays = arrays_of(kind, rng, [40], k, d, dtype)
    y = rng.normal(scale=2.0, size=[40, d]).astype(dtype)
    if missing:
        y[rng.random(y.shape) < 0.4] = np.nan
    expected = oracle(dense(kind, arrays), y)
    found = mixture(kind, arrays).log_prob(y)
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)
    if not missing:
        found = mixture(kind, arrays).log_prob(y, complete=True)
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)
    else:
        nothing = np.isnan(y).all(axis=1)
        np.testing.assert_allclose(np.asarray(found)[nothing], 0.0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_moments_and_factors_are_those_of_the_dense_mixture(kind):
    arrays = arrays_of(kind, np.random.default_rng(1), [6], 3, 4)
    found, expected = mixture(kind, arrays), dense(kind, arrays)
    np.testing.assert_allclose(found.scale_tril, expected.scale_tril, atol=1e-10)
    for name in ("mean", "variance", "stddev", "covariance"):
        np.testing.assert_allclose(getattr(found, name)(), getattr(expected, name)(), rtol=1e-9)
    one, other = found.components_distribution, expected.components_distribution
    np.testing.assert_allclose(one.stddev(), other.stddev(), rtol=1e-9)
    np.testing.assert_allclose(one.covariance(), other.covariance(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_tfp_distributions(kind):
    rng = np.random.default_rng(6)
    arrays = arrays_of(kind, rng, [5], 3, 2)
    density = mixture(kind, arrays)
    component = density.components_distribution
    kinds = {
        "precision": (PrecisionGaussianMixture, MultivariateNormalPrecision),
        "low_rank": (LowRankGaussianMixture, MultivariateNormalLowRank),
    }
    assert (type(density), type(component)) == kinds[kind]
    assert isinstance(density, mdn.GaussianMixture)
    y = rng.normal(size=[5, 2])
    for one, value in ((density, y), (component[:, 0], y)):
        log_prob = one.log_prob(value).numpy()
        assert type(one.copy()) is type(one)
        np.testing.assert_allclose(one[1:3].log_prob(value[1:3]), log_prob[1:3])
        np.testing.assert_allclose(type(one)(**one.tensors()).log_prob(value), log_prob)
        assert one.log_prob(np.zeros([7, 1, 2])).shape == [7, 5]
        through = tf.function(lambda d, v: d.log_prob(v), autograph=False)
        np.testing.assert_allclose(through(one, value), log_prob)
        np.testing.assert_array_equal(tf.convert_to_tensor(one), one.mean())
        with pytest.raises(mdn.MDNError, match="but the density has 2 targets"):
            one.log_prob(np.zeros([5, 3]))


@pytest.mark.parametrize("kind", KINDS)
def test_samples_follow_the_density(kind):
    density = mixture(kind, arrays_of(kind, np.random.default_rng(8), [], 3, 2))
    n = 20_000
    draws = density.sample(n, seed=9).numpy()
    error = 5.0 * density.stddev().numpy() / np.sqrt(n)
    assert (np.abs(draws.mean(axis=0) - density.mean()) < error).all()
    np.testing.assert_allclose(np.cov(draws.T), density.covariance(), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("jit_compile", [False, True])
def test_gradient_is_that_of_finite_differences(kind, missing, jit_compile):
    rng = np.random.default_rng(2)
    parameters = [tf.constant(a) for a in arrays_of(kind, rng, [4], 2, 3)]
    y = rng.normal(size=[4, 3])
    if missing:
        y[0, 1], y[1], y[2, :2] = np.nan, np.nan, np.nan

    # The batch size is not static, as in a Keras step.
    @tf.function(
        jit_compile=jit_compile,
        autograph=False,
        input_signature=[tf.TensorSpec([None, *p.shape[1:]], p.dtype) for p in parameters],
    )
    def value_and_gradients(*parameters):
        with tf.GradientTape() as tape:
            tape.watch(parameters)
            total = tf.reduce_sum(mixture(kind, parameters).log_prob(tf.constant(y)))
        return total, tape.gradient(total, parameters)

    _, gradients = value_and_gradients(*parameters)
    for _ in range(3):
        direction = [rng.normal(size=p.shape) for p in parameters]
        if kind == "precision":
            direction[2] = np.tril(direction[2])
        up, down = (
            value_and_gradients(
                *(p + sign * 1e-6 * v for p, v in zip(parameters, direction, strict=True))
            )[0]
            for sign in (1.0, -1.0)
        )
        along = sum(tf.reduce_sum(g * v) for g, v in zip(gradients, direction, strict=True))
        np.testing.assert_allclose(along, (up - down) / 2e-6, rtol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_low_rank_in_two_hundred_dimensions(share):
    rng = np.random.default_rng(3)
    d, rank = 200, 5
    arrays = [
        rng.normal(size=[8, 3]),
        rng.normal(size=[8, 3, d]),
        rng.uniform(0.1, 1.0, size=[8, 3, d]),
        rng.normal(size=[8, 3, d, rank]),
    ]
    y = rng.normal(scale=2.0, size=[8, d])
    y[rng.random(y.shape) < share] = np.nan
    expected = oracle(dense("low_rank", arrays), y)
    np.testing.assert_allclose(mixture("low_rank", arrays).log_prob(y), expected, rtol=1e-10)
    rounded = [a.astype(np.float32) for a in (*arrays, y)]
    found = mixture("low_rank", rounded[:-1]).log_prob(rounded[-1])
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_low_rank_stays_exact_where_noise_is_small_and_columns_are_parallel():
    # I + A^T A has a condition number of 1e12 here, which float32 cannot decompose.
    rng = np.random.default_rng(4)
    column = rng.normal(size=[20, 1])
    factor = np.concatenate([column, column + 1e-3 * rng.normal(size=[20, 1])], axis=1)
    y = (factor @ [0.7, -1.2] + 1e-4 * rng.normal(size=20)).astype(np.float32)
    arrays = [np.zeros([1]), np.zeros([1, 20]), np.full([1, 20], 1e-4), factor[np.newaxis]]
    arrays = [a.astype(np.float32) for a in arrays]
    exact = mixture("low_rank", [a.astype(np.float64) for a in arrays]).log_prob(
        y.astype(np.float64)
    )
    covariance = 1e-8 * np.eye(20) + np.float64(arrays[3][0]) @ np.float64(arrays[3][0]).T
    sign, log_det = np.linalg.slogdet(covariance)
    assert sign == 1.0
    quadratic = y.astype(np.float64) @ np.linalg.solve(covariance, y.astype(np.float64))
    dense_value = -0.5 * (quadratic + log_det + 20 * np.log(2 * np.pi))
    np.testing.assert_allclose(exact, dense_value, rtol=1e-4)  # what the dense solve leaves
    np.testing.assert_allclose(mixture("low_rank", arrays).log_prob(y), exact, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_extremes_stay_finite_and_right(kind):
    scale = np.array([1e-6, 1.0, 1e6])
    logits, loc = np.array([0.0, -1e9]), np.zeros([2, 3])
    if kind == "precision":
        arrays = [logits, loc, np.tile(np.diag(1.0 / scale), [2, 1, 1])]
    else:
        arrays = [logits, loc, np.tile(scale, [2, 1]), np.zeros([2, 3, 1])]
    y = np.array([100.0, -100.0, 100.0]) * scale
    expected = -1.5 * np.log(2 * np.pi) - 0.5 * 3e4 - np.log(scale).sum()
    for dtype in (np.float32, np.float64):
        parameters = [tf.constant(a.astype(dtype)) for a in arrays]
        with tf.GradientTape() as tape:
            tape.watch(parameters)
            density = mixture(kind, parameters)
            value = density.log_prob(y.astype(dtype))
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        assert all(np.isfinite(g).all() for g in tape.gradient(value, parameters))
        np.testing.assert_allclose(density.scale_tril[0], np.diag(scale), rtol=1e-5)
        y_missing = np.array([100.0e-6, np.nan, np.nan], dtype)
        expected_one = -0.5 * np.log(2 * np.pi) - 0.5e4 - np.log(1e-6)
        np.testing.assert_allclose(density.log_prob(y_missing), expected_one, rtol=1e-5)


def test_inverting_a_factor_is_its_own_inverse():
    factor = random_tril(np.random.default_rng(5), [3, 2], 4)
    found = invert_factor(tf.constant(factor)).numpy()
    np.testing.assert_allclose(invert_factor(tf.constant(found)), factor, atol=1e-10)
    eye = factor @ np.swapaxes(factor, -1, -2) @ found @ np.swapaxes(found, -1, -2)
    np.testing.assert_allclose(eye, np.tile(np.eye(4), [3, 2, 1, 1]), atol=1e-9)
    # as NumPy and scipy have it, of one of them
    covariance = factor[0, 0] @ factor[0, 0].T
    root = solve_triangular(np.linalg.cholesky(covariance), np.eye(4), lower=True)
    np.testing.assert_allclose(found[0, 0], np.linalg.cholesky(root.T @ root), atol=1e-9)
