"""Every query for any batch, any number of targets and components, and at the extremes."""

import unittest

import numpy as np
import pytest
import tensorflow as tf
from absl import flags
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorflow_probability.python.internal import test_util
from test_density import all_densities

import mdn

TYPES = ("tril", "diag", "low_rank", "precision_tril")
PROPERTY = settings(max_examples=10, deadline=None, derandomize=True)


@st.composite
def densities(draw, types=TYPES, extreme=False):
    """Draw a mixture: batch [], [B] or [B, T], D from 1 to 6, K from 1 to 7.

    Not each of these numbers, as each K has a program of its own.
    """
    batch = draw(st.sampled_from([(), (3,), (2, 3)]))
    d, k = draw(st.sampled_from([1, 2, 3, 6])), draw(st.sampled_from([1, 2, 7]))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    kind = draw(st.sampled_from(types))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits, loc = rng.normal(size=[*batch, k]), rng.normal(size=[*batch, k, d])
    scale = np.exp(0.5 * rng.normal(size=[*batch, k, d]))
    if extreme:
        scale = 10.0 ** rng.uniform(-6.0, 6.0, size=[*batch, k, d])
        loc *= 1e3
        logits[..., 1:] = np.where(rng.random([*batch, k - 1]) < 0.5, -1e9, logits[..., 1:])
    factor = np.tril(rng.normal(size=[*batch, k, d, d]), -1) * scale[..., np.newaxis]
    factor[..., range(d), range(d)] = scale
    tensors = {
        "tril": (mdn.GaussianMixture, factor),
        "diag": (mdn.GaussianMixture.from_diag, scale),
        "precision_tril": (mdn.GaussianMixture.from_precision_tril, factor),
        "low_rank": (mdn.GaussianMixture.from_low_rank, scale, rng.normal(size=[*batch, k, d, 2])),
    }
    make, *scales = tensors[kind]
    return make(*(part.astype(dtype) for part in (logits, loc, *scales)))


@pytest.mark.slow
@PROPERTY
@given(density=densities(), seed=st.integers(0, 100))
def test_answers_have_the_shapes_that_they_state(density, seed):
    batch, (d,) = density.batch_shape, density.event_shape
    k = density.logits.shape[-1]
    y = density.sample(seed=seed)
    assert y.shape == [*batch, d]
    assert density.sample([4, 2], seed=seed).shape == [4, 2, *batch, d]
    by_row = (
        density.log_prob(y),
        density.entropy(n=2),
        density.energy_score(y, 2),
        density.effective_components(),
        density.reduce(2).kl_bound,
        density.hdr(0.5, n=9).log_threshold,
        *density.entropy_estimate(2),
    )
    by_target = (
        *(f(y) for f in (density.cdf, density.log_cdf, density.crps, density.pit)),
        *(f(y) for f in (density.survival_function, density.log_survival_function)),
        *(f() for f in (density.mean, density.variance, density.stddev, density.mode)),
        *(f() for f in (density.skewness, density.kurtosis)),
    )
    for answer in by_row:
        assert answer.shape == batch
    for answer in by_target:
        assert answer.shape == [*batch, d]
    for answer in (*by_row, *by_target):
        assert answer.dtype == density.dtype
        assert np.isfinite(answer).all()
    assert density.quantile([[0.1, 0.5, 0.9]]).shape == [1, 3, *batch, d]
    assert density.interval(0.9).shape == [*batch, d, 2]
    assert density.correlation().shape == [*batch, d, d]
    assert density.responsibilities(y).shape == [*batch, k]
    modes = density.modes()
    assert modes.loc.shape == [*batch, k, d]
    assert modes.log_prob.shape == modes.mask.shape == [*batch, k]
    region = density.marginal(d - 1).hdr(0.5)
    assert region.intervals.shape == [*batch, k, 2]
    for other, targets, components in (
        (density.marginal([d - 1]), 1, k),
        (density.affine(1.0, -2.0), d, k),
        (density.linear(np.ones([1, d])), 1, k),
        (density.concat(density), d, 2 * k),
        (mdn.mixture_of([density, density]), d, 2 * k),
        (density.reduce(2).mixture, d, min(k, 2)),
        *([(density.condition({0: 0.3}), d - 1, k)] if d > 1 else []),
    ):
        assert isinstance(other, mdn.GaussianMixture)
        assert (other.batch_shape, other.event_shape) == (batch, [targets])
        assert other.logits.shape[-1] == components
    assert 1 <= density.prune(0.5).logits.shape[-1] <= k
    again = mdn.GaussianMixture.from_dict(density.to_dict())
    np.testing.assert_array_equal(again.log_prob(y), density.log_prob(y))


@pytest.mark.slow
@PROPERTY
@given(density=densities(), seed=st.integers(0, 100), data=st.data())
def test_identities(density, seed, data):
    d = density.event_shape[0]
    tolerance = 2e-3 if density.dtype == tf.float32 else 1e-9
    y = density.sample(seed=seed)
    p = np.array([1e-6, 0.2, 0.5, 0.9, 1.0 - 1e-6], density.dtype.as_numpy_dtype)
    levels = np.broadcast_to(p.reshape([5] + [1] * len(y.shape)), [5, *y.shape])
    np.testing.assert_allclose(density.cdf(density.quantile(p)), levels, rtol=tolerance)
    order = data.draw(st.permutations(range(d)))
    np.testing.assert_allclose(
        density.marginal(order).log_prob(tf.gather(y, order, axis=-1)),
        density.log_prob(y), rtol=tolerance, atol=tolerance * d,
    )  # fmt: skip
    if d > 1:
        given_dims = order[: data.draw(st.integers(1, d - 1))]
        free = [i for i in range(d) if i not in given_dims]
        rest = density.condition({i: y[..., i] for i in given_dims})
        margin = density.marginal(given_dims).log_prob(tf.gather(y, given_dims, axis=-1))
        np.testing.assert_allclose(
            rest.log_prob(tf.gather(y, free, axis=-1)) + margin,
            density.log_prob(y), rtol=tolerance, atol=tolerance * d,
        )  # fmt: skip


@pytest.mark.slow
@PROPERTY
@given(density=densities(types=("tril", "diag"), extreme=True))
def test_extremes_are_finite(density):
    """Scales from 1e-6 to 1e6, weights of nothing, y 100 standard deviations away."""
    y = density.mean() + 100.0 * density.stddev()
    missing = tf.where(tf.range(y.shape[-1]) == 0, np.nan, tf.ones_like(y)) * y
    tensors = list(density.tensors().values())
    answers = {
        "log_prob": density.log_prob(y),
        "log_prob with a gap": density.log_prob(missing),
        "moments": tf.stack([density.skewness(), density.kurtosis(), density.stddev()]),
        "correlation": density.correlation(),
        "responsibilities": density.responsibilities(y),
        "pit": density.pit(y),
        "crps": density.crps(y),
        "energy": density.energy_score(y, 10),
        "entropy": tf.stack(density.entropy_estimate(10)),
        "modes": density.modes().loc,
        "log_prob of modes": density.modes().log_prob,
        "bound": density.reduce(2).kl_bound,
        "region": density.hdr(0.9, n=50).log_threshold,
        "quantile": density.quantile([1e-6, 0.5, 1.0 - 1e-6]),
        "log_cdf": density.log_cdf(-y),
    }
    for name, value in answers.items():
        assert np.isfinite(value).all(), name
    ranks = answers["pit"].numpy()
    assert ((ranks >= 0.0) & (ranks <= 1.0)).all()
    for at in (y, missing):
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            total = tf.reduce_sum(type(density)(*tensors).log_prob(at))
        assert all(np.isfinite(g).all() for g in tape.gradient(total, tensors))


class SampleConsistency(test_util.VectorDistributionTestHelpers, unittest.TestCase):
    """The helpers of TFP ask for these two of a test case."""

    def assertAllClose(self, a, b, rtol, atol):  # noqa: N802
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)

    @staticmethod
    def run_eagerly(tensors):
        return tf.nest.map_structure(lambda t: None if t is None else np.asarray(t), tensors)


@pytest.mark.parametrize("i", range(4))
def test_draws_are_consistent_as_tfp_tests_it(i):
    density = all_densities(np.random.default_rng(i), [2], 3, 2)[i][0]
    helper = SampleConsistency()
    shared = {"num_samples": 200_000, "seed": 7}
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["pytest"])  # TFP's seeds ask the command line
    helper.run_test_sample_consistent_mean_covariance(helper.run_eagerly, density, **shared)
    centre = density.mean().numpy()
    for radius in (0.5, 1.0):
        helper.run_test_sample_consistent_log_prob(
            helper.run_eagerly, density, radius=radius, center=centre, rtol=0.1, **shared
        )
