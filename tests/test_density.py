"""The densities against scipy: log densities, missing entries, moments, TFP idioms."""

import numpy as np
import pytest
import tensorflow as tf
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from tensorflow_probability import distributions as tfd

import mdn
from mdn.density import DiagGaussianMixture, MultivariateNormalDiag, MultivariateNormalTriL
from mdn.density.positivity import (
    POSITIVITY,
    scale_diag,
    scale_diag_inverse,
    scale_tril,
    scale_tril_inverse,
)


def random_tril(rng, shape, d):
    scale = np.tril(rng.normal(size=[*shape, d, d]))
    scale[..., np.arange(d), np.arange(d)] = rng.uniform(0.3, 2.0, size=[*shape, d])
    return scale


def random_mixture(rng, shape, k, d, dtype=np.float64):
    parameters = (
        rng.normal(size=[*shape, k]),
        rng.normal(size=[*shape, k, d]),
        random_tril(rng, [*shape, k], d),
    )
    return mdn.GaussianMixture(*(p.astype(dtype) for p in parameters))


def scipy_log_prob(logits, loc, scale_tril, y):
    """Return the log density of the observed entries of one row, y [D], of one mixture."""
    observed = ~np.isnan(y)
    if not observed.any():
        return 0.0
    log_weights = logits - logsumexp(logits)
    terms = []
    for weight, mean, factor in zip(log_weights, loc, scale_tril, strict=True):
        # In units of the standard deviations: scipy takes very unequal variances for singular.
        stddev = np.linalg.norm(factor, axis=-1)[observed]
        covariance = (factor @ factor.T)[np.ix_(observed, observed)] / np.outer(stddev, stddev)
        z = (y - mean)[observed] / stddev
        terms.append(weight + multivariate_normal(cov=covariance).logpdf(z) - np.log(stddev).sum())
    return logsumexp(terms)


def oracle(density, y):
    """Return scipy's log densities [N] of y [N, D] under a density of batch [N]."""
    logits, loc, scale = (np.asarray(p, np.float64) for p in density.mixture_parameters())
    return np.array([scipy_log_prob(*row) for row in zip(logits, loc, scale, y, strict=True)])


def all_densities(rng, shape, k, d, dtype=np.float64):
    mixture = random_mixture(rng, shape, k, d, dtype)
    loc, scale = mixture.loc.numpy(), mixture.scale_tril.numpy()
    stddev = np.linalg.norm(scale, axis=-1)
    return [
        mixture,
        mdn.GaussianMixture.from_diag(mixture.logits.numpy(), loc, stddev),
        MultivariateNormalTriL(loc[..., 0, :], scale[..., 0, :, :]),
        MultivariateNormalDiag(loc[..., 0, :], stddev[..., 0, :]),
    ]


@pytest.mark.parametrize(("k", "d"), [(1, 1), (3, 1), (1, 3), (4, 2), (3, 5)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-10), (np.float32, 2e-4)])
def test_log_prob_is_that_of_scipy(k, d, dtype, tolerance):
    rng = np.random.default_rng([k, d])
    y = rng.normal(size=[7, d]) * 2.0
    for density in all_densities(rng, [7], k, d, dtype):
        np.testing.assert_allclose(
            density.log_prob(y.astype(dtype)), oracle(density, y), rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize(("k", "d"), [(1, 1), (3, 1), (1, 4), (3, 2), (3, 5)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-10), (np.float32, 2e-4)])
def test_log_prob_marginalises_missing_entries(k, d, dtype, tolerance):
    rng = np.random.default_rng([k, d, 1])
    y = np.where(rng.random(size=[40, d]) < 0.4, np.nan, rng.normal(size=[40, d]))
    y[0], y[1] = np.nan, 0.5
    for density in all_densities(rng, [40], k, d, dtype):
        log_prob = density.log_prob(y.astype(dtype)).numpy()
        np.testing.assert_allclose(log_prob, oracle(density, y), rtol=tolerance, atol=tolerance)
        assert log_prob[0] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("missing", [False, True])
def test_many_rows_under_one_density(batch, missing):
    """Rows [N, .., D] under a density with fewer axes are solved for all at once."""
    rng = np.random.default_rng(4)
    y = rng.normal(size=[30, *[1] * len(batch), 3])
    if missing:
        y[:10, ..., 1] = np.nan
    for density in all_densities(rng, batch, 2, 3):
        each = density if not batch else density[0]
        one = each[np.newaxis].mixture_parameters()
        parameters = [np.repeat(p.numpy(), 30, axis=0) for p in one]
        expected = [
            scipy_log_prob(*row) for row in zip(*parameters, y.reshape(30, 3), strict=True)
        ]
        found = density.log_prob(y).numpy()
        assert found.shape == (30, *batch)
        np.testing.assert_allclose(found.reshape(30, -1)[:, 0], expected, rtol=1e-9)
        if not missing:
            np.testing.assert_allclose(density.log_prob(y, complete=True), found, rtol=1e-9)


@pytest.mark.parametrize("complete", [False, True])
def test_gradient_of_many_rows_under_one_density(complete):
    rng = np.random.default_rng(5)
    y = rng.normal(size=[20, 1, 2])
    parameters = [tf.constant(p) for p in random_mixture(rng, [3], 2, 2).mixture_parameters()]

    def total(*parameters):
        return tf.reduce_sum(mdn.GaussianMixture(*parameters).log_prob(y, complete=complete))

    with tf.GradientTape() as tape:
        tape.watch(parameters)
        value = total(*parameters)
    gradients = tape.gradient(value, parameters)
    direction = [tf.constant(rng.normal(size=p.shape)) for p in parameters]
    direction[2] = tf.linalg.band_part(direction[2], -1, 0)
    up, down = (
        total(*(p + sign * 1e-6 * d for p, d in zip(parameters, direction, strict=True)))
        for sign in (1.0, -1.0)
    )
    along = sum(tf.reduce_sum(g * d) for g, d in zip(gradients, direction, strict=True))
    np.testing.assert_allclose(along, (up - down) / 2e-6, rtol=1e-6)


@pytest.mark.parametrize("below", [[1.0, 1e-2], [5.0, 1e-3], [300.0, 1e-2]])
def test_rows_do_not_depend_on_their_neighbours(below):
    # a nearly singular factor, whose covariance float32 cannot decompose
    scale = np.tile(np.array([[1.0, 0.0], below], np.float32), [3, 1, 1])
    y = np.array([[0.3, 0.3 * below[0] + 0.01], [np.nan, 0.2], [0.1, np.nan]], np.float32)
    density = MultivariateNormalTriL(np.zeros([3, 2], np.float32), scale)
    together = density.log_prob(y).numpy()
    alone = [density[i].log_prob(y[i]).numpy() for i in range(3)]
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    covariance = scale[0].astype(np.float64) @ scale[0].T
    for i, d in [(1, 1), (2, 0)]:
        margin = multivariate_normal(cov=covariance[d, d]).logpdf(y[i, d])
        assert together[i] == pytest.approx(margin, rel=1e-5)


def test_missing_entries_of_a_nearly_singular_density():
    # three of four entries observed, at the precision of float64's answer to the same factors
    rng = np.random.default_rng(0)
    scale = random_tril(rng, [200], 4) * 3.0
    scale[:, np.arange(4), np.arange(4)] *= 1e-2
    y = np.einsum("nij,nj->ni", scale, rng.normal(size=[200, 4]))
    y[np.arange(200), rng.integers(0, 4, size=200)] = np.nan
    exact, rounded = (
        MultivariateNormalTriL(np.zeros([200, 4], t), scale.astype(t))
        .log_prob(y.astype(t))
        .numpy()
        for t in (np.float64, np.float32)
    )
    assert np.median(np.abs(rounded - exact)) < 1e-4
    assert np.isfinite(rounded).all()


def test_kl_of_one_component_is_that_of_the_normals():
    rng = np.random.default_rng(9)
    a, b = (random_mixture(rng, [3], 1, 2) for _ in range(2))
    one, two = (MultivariateNormalTriL(m.loc[:, 0], m.scale_tril[:, 0]) for m in (a, b))
    np.testing.assert_allclose(a.kl_divergence(b), one.kl_divergence(two))
    with pytest.raises(NotImplementedError, match="K = 1"):
        random_mixture(rng, [3], 2, 2).kl_divergence(b)


def test_marginal_keeps_precision_where_scales_differ_a_millionfold():
    scale = np.array([[[1e-3, 0.0, 0.0], [5e-4, 1.0, 0.0], [300.0, 200.0, 1e3]]], np.float32)
    density = MultivariateNormalTriL(np.zeros([1, 3], np.float32), scale)
    y = np.array([[1e-3, np.nan, 500.0]], np.float32)
    np.testing.assert_allclose(density.log_prob(y), oracle(density, y), rtol=1e-5)


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("jit_compile", [False, True])
def test_gradient_is_that_of_finite_differences(missing, jit_compile):
    rng = np.random.default_rng(2)
    logits, loc, scale = (p.numpy() for p in random_mixture(rng, [3], 2, 3).mixture_parameters())
    y = rng.normal(size=[3, 3])
    if missing:
        y[0, 1], y[1] = np.nan, np.nan

    # The batch size is not static, as in a Keras step.
    @tf.function(
        jit_compile=jit_compile,
        autograph=False,
        input_signature=[
            tf.TensorSpec([None, *p.shape[1:]], p.dtype) for p in (logits, loc, scale)
        ],
    )
    def value_and_gradients(*parameters):
        with tf.GradientTape() as tape:
            tape.watch(parameters)
            density = mdn.GaussianMixture(*parameters)
            total = tf.reduce_sum(density.log_prob(tf.cast(y, density.dtype)))
        return total, tape.gradient(total, parameters)

    parameters = [tf.constant(p) for p in (logits, loc, scale)]
    _, gradients = value_and_gradients(*parameters)
    step = 1e-6
    for i, index in [
        (0, (0, 1)),
        (1, (0, 1, 2)),
        (1, (2, 0, 0)),
        (2, (0, 1, 2, 1)),
        (2, (2, 0, 1, 1)),
    ]:
        up, down = ([p.numpy().copy() for p in parameters] for _ in range(2))
        up[i][index] += step
        down[i][index] -= step
        difference = (value_and_gradients(*up)[0] - value_and_gradients(*down)[0]) / (2.0 * step)
        np.testing.assert_allclose(gradients[i].numpy()[index], difference, rtol=1e-5, atol=1e-7)
        assert np.isfinite(gradients[i]).all()


def test_gradient_of_a_component_without_weight_is_nothing_however_far_it_is():
    y = tf.constant([1e8, 2e8])
    scale_tril = tf.constant([[1e6, 1e-10]])[..., tf.newaxis, tf.newaxis] * tf.eye(2)
    logits, loc = tf.constant([[0.0, -1e9]]), tf.zeros([1, 2, 2])
    with tf.GradientTape() as tape:
        tape.watch([loc, scale_tril])
        value = mdn.GaussianMixture(logits, loc, scale_tril).log_prob(y)
    by_loc, by_scale = tape.gradient(value, [loc, scale_tril])
    z = np.array([100.0, 200.0])
    np.testing.assert_allclose(by_loc[0], [z / 1e6, [0.0, 0.0]], rtol=1e-5)
    expected = (np.tril(np.outer(z, z)) - np.eye(2)) / 1e6  # of the one that is there
    np.testing.assert_allclose(by_scale[0], [expected, np.zeros([2, 2])], rtol=1e-5)


def test_identical_components_equal_one_and_k_of_one_ignores_its_logit():
    loc, scale = np.zeros([5, 4, 2]), np.tile(np.eye(2), [5, 4, 1, 1])
    y = np.random.default_rng(3).normal(size=[5, 2])
    one = multivariate_normal(np.zeros(2), np.eye(2)).logpdf(y)
    logits = np.random.default_rng(4).normal(size=[5, 4])
    np.testing.assert_allclose(mdn.GaussianMixture(logits, loc, scale).log_prob(y), one)
    single = mdn.GaussianMixture(np.full([5, 1], 17.0), loc[:, :1], scale[:, :1])
    np.testing.assert_allclose(single.log_prob(y), one)


def test_moments_are_those_of_the_components():
    rng = np.random.default_rng(5)
    density = random_mixture(rng, [], 3, 2)
    logits, loc, scale = (p.numpy() for p in density.mixture_parameters())
    weights = np.exp(logits - logsumexp(logits))
    mean = weights @ loc
    second = np.einsum("k,kij->ij", weights, scale @ np.swapaxes(scale, -1, -2))
    second += np.einsum("k,ki,kj->ij", weights, loc, loc)
    np.testing.assert_allclose(density.mean(), mean)
    np.testing.assert_allclose(density.covariance(), second - np.outer(mean, mean))
    np.testing.assert_allclose(density.stddev(), np.sqrt(np.diag(second - np.outer(mean, mean))))


@pytest.mark.parametrize("i", range(4))
def test_densities_are_tfp_distributions(i):
    base = [
        tfd.MixtureSameFamily,
        tfd.MixtureSameFamily,
        tfd.MultivariateNormalTriL,
        tfd.MultivariateNormalDiag,
    ][i]
    density = all_densities(np.random.default_rng(6), [5], 3, 2)[i]
    y = np.random.default_rng(7).normal(size=[5, 2])
    log_prob = density.log_prob(y).numpy()
    assert isinstance(density, base)
    assert density.batch_shape == [5]
    assert density.event_shape == [2]
    # copy, slice, rebuild, broadcast, and through a tf.function as a composite tensor
    assert type(density.copy()) is type(density)
    np.testing.assert_allclose(density[1:3].log_prob(y[1:3]), log_prob[1:3])
    np.testing.assert_allclose(type(density)(**density.tensors()).log_prob(y), log_prob)
    assert density.log_prob(np.zeros([7, 1, 2])).shape == [7, 5]
    through = tf.function(lambda d, value: d.log_prob(value), autograph=False)
    np.testing.assert_allclose(through(density, y), log_prob)
    # as a tensor it is its mean, never a draw
    np.testing.assert_array_equal(tf.convert_to_tensor(density), density.mean())
    np.testing.assert_array_equal(np.asarray(density), density.mean())


@pytest.mark.parametrize("i", range(4))
def test_samples_follow_the_density(i):
    density = all_densities(np.random.default_rng(8), [2], 3, 2)[i]
    n = 20_000
    draws = density.sample(n, seed=9).numpy()
    error = 5.0 * density.stddev().numpy() / np.sqrt(n)
    assert (np.abs(draws.mean(axis=0) - density.mean()) < error).all()
    for b in range(2):
        np.testing.assert_allclose(
            np.cov(draws[:, b].T), density.covariance()[b], rtol=0.1, atol=0.1
        )


def test_diagonal_mixture_keeps_its_scales():
    density = mdn.GaussianMixture.from_diag(np.zeros([2]), np.zeros([2, 3]), np.full([2, 3], 0.5))
    assert isinstance(density, DiagGaussianMixture)
    assert isinstance(density, mdn.GaussianMixture)
    np.testing.assert_allclose(density.scale_tril, np.tile(0.5 * np.eye(3), [2, 1, 1]))


@pytest.mark.parametrize("positivity", POSITIVITY)
@pytest.mark.parametrize("d", [1, 2, 5])
@pytest.mark.parametrize("dtype", [tf.float32, tf.float64])
def test_scale_tril_is_fill_scale_tril(positivity, d, dtype):
    import tensorflow_probability as tfp

    tfb = tfp.bijectors
    bijectors = {
        "softplus": tfb.Softplus(),
        "exp": tfb.Exp(),
        "elu": tfb.Inline(lambda raw: 1.0 + tf.nn.elu(raw), forward_min_event_ndims=0),
    }
    floor = tf.constant(0.01, dtype)
    raw = tf.constant(np.random.default_rng(d).normal(size=[4, d * (d + 1) // 2]), dtype)
    bijector = tfb.FillScaleTriL(bijectors[positivity], diag_shift=floor)
    ours = scale_tril(raw, positivity, floor * tf.ones([d], dtype))
    np.testing.assert_allclose(ours, bijector.forward(raw), rtol=1e-6)
    np.testing.assert_allclose(
        scale_tril_inverse(ours, positivity, floor * tf.ones([d], dtype)),
        raw,
        rtol=2e-3,
        atol=2e-5,
    )


@pytest.mark.parametrize("positivity", POSITIVITY)
def test_scale_diag_round_trips_and_stays_above_its_floor(positivity):
    floor = tf.constant([1e-3, 2.0], tf.float64)
    raw = tf.constant([[-3.0, -0.5], [0.5, 3.0]], tf.float64)
    scale = scale_diag(raw, positivity, floor)
    np.testing.assert_allclose(scale_diag_inverse(scale, positivity, floor), raw, rtol=1e-6)
    assert (scale > floor).numpy().all()


def test_unknown_positivity_is_named():
    from mdn.density.positivity import check_positivity

    with pytest.raises(mdn.MDNError, match="positivity='relu' is unknown: choose one of softplus"):
        check_positivity("relu")


@pytest.mark.parametrize("i", range(4))
def test_targets_of_another_width_never_broadcast(i):
    density = all_densities(np.random.default_rng(6), [5], 3, 2)[i]
    for y in (np.zeros([5, 1]), np.zeros([5]), np.zeros([5, 3])):
        with pytest.raises(mdn.MDNError, match="but the density has 2 targets"):
            density.log_prob(y)
