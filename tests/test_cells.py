"""Probabilities of cells of correlated or transformed targets, by quadrature and by scipy."""

import numpy as np
import pytest
import tensorflow as tf
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from tensorflow_probability import bijectors as tfb
from test_density import random_mixture

import mdn
from mdn.density.cells import log_cell
from mdn.density.interval import log_interval
from mdn.density.mixing import mixture_of
from mdn.density.rectangle import log_rectangle
from mdn.density.transformed import Transformed
from mdn.density.transforms import PerTarget

RULE, WEIGHT = np.polynomial.legendre.leggauss(20)


def brute(low, high, slope):
    """Return the log probability of one rectangle, by hundreds of panels of 20 nodes."""
    (a, c), (b, d) = low, high
    wide = np.linspace(-40.0, 40.0, 161)
    fine = np.concatenate([-np.logspace(-6, 2, 120), [0.0], np.logspace(-6, 2, 120)])
    nearest = np.clip(slope / (1.0 + slope**2) * np.clip(0.0, c, d), a, b)
    edges = [wide, nearest + fine, a + fine, b + fine]
    if slope:
        edges += [(c + wide) / slope, (d + wide) / slope]
    points = np.concatenate([[max(a, -150.0), min(b, 150.0)], *edges])
    points = np.unique(np.clip(points, max(a, -150.0), min(b, 150.0)))
    half = 0.5 * np.diff(points)[:, None]
    x = points[:-1, None] + half * (1.0 + RULE)
    ends = (tf.constant(end - slope * x) for end in (c, d))
    terms = log_interval(*ends, tf.fill(x.shape, tf.constant(d - c, tf.float64))).numpy()
    terms += np.log(half * WEIGHT) - 0.5 * x**2 - 0.5 * np.log(2 * np.pi)
    return logsumexp(terms)


def rectangles(n=60):
    """Return low and high [N, 2] and slopes [N]: tiny and wide, near and far, steep and flat."""
    rng = np.random.default_rng(0)
    width = 10.0 ** rng.uniform(-3, 2, size=[n, 2])
    centre = rng.normal(size=[n, 2]) * 10.0 ** rng.uniform(-1, 1.5, size=[n, 1])
    slope = rng.choice([-1.0, 1.0], size=n) * 10.0 ** rng.uniform(-3, 2.5, size=n)
    slope[:10] = 0.0
    centre[:, 1] += slope * centre[:, 0] * rng.integers(0, 2, size=n)  # half on the ridge
    # On a grid, so that float32 holds them and their widths as they are.
    low = np.round((centre - 0.5 * width) * 1024.0) / 1024.0
    high = low + np.maximum(np.round(width * 1024.0), 1.0) / 1024.0
    low[5:20, 0], high[15:30, 1] = -1e18, 1e18
    return low, high, slope


@pytest.mark.parametrize("dtype", [tf.float32, tf.float64])
def test_rectangles_are_those_of_brute_quadrature(dtype):
    low, high, slope = rectangles()
    given = [tf.constant(part, dtype) for part in (low, high, high - low, slope)]
    slope = given[-1].numpy().astype(np.float64)
    expected = [brute(*row) for row in zip(low, high, slope, strict=True)]
    found = tf.function(log_rectangle, jit_compile=True)(*given).numpy()
    if dtype == tf.float64:
        np.testing.assert_allclose(found, expected, rtol=1e-13, atol=1e-9)
    else:
        np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)


def test_cells_are_scipys_rectangles():
    density = random_mixture(np.random.default_rng(1), [6], 3, 2)
    y = np.random.default_rng(2).normal(size=[6, 2])
    step = np.array([1.0, 0.6])
    found = np.exp(log_cell(density, tf.constant(y), tf.constant(step)))
    weight = tf.nn.softmax(density.logits).numpy()
    covariance = density.components_distribution.covariance().numpy()
    for row in range(6):
        parts = [
            multivariate_normal.cdf(
                y[row] + step / 2,
                density.loc[row, k].numpy(),
                covariance[row, k],
                lower_limit=y[row] - step / 2,
                abseps=1e-12,
                releps=1e-12,
            )
            for k in range(3)
        ]
        assert found[row] == pytest.approx(weight[row] @ parts, rel=1e-7)


def test_all_cells_of_two_correlated_targets_have_a_total_of_one():
    scale_tril = np.array([[[0.3, 0.0], [0.6, 0.02]], [[1.0, 0.0], [-0.5, 0.7]]])
    loc = np.array([[0.2, -0.4], [-1.0, 1.0]])
    density = mdn.GaussianMixture(np.zeros([2]), loc, scale_tril)
    axis = np.arange(-8.0, 8.5, 0.5)
    y = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    step = tf.constant([0.5, 0.5], tf.float64)
    cells = np.exp(log_cell(density, tf.constant(y), step)).reshape(len(axis), -1)
    assert cells.sum() == pytest.approx(1.0, abs=1e-9)
    gap = np.stack([axis, np.full(len(axis), np.nan)], axis=-1)  # the other target is missing
    margin = np.exp(log_cell(density, tf.constant(gap), step))
    np.testing.assert_allclose(margin, cells.sum(axis=0), atol=1e-9)
    nothing = log_cell(density, tf.fill([1, 2], tf.constant(np.nan, tf.float64)), step)
    np.testing.assert_allclose(nothing, 0.0, atol=1e-9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_tiny_cells_are_the_density_times_their_area(dtype):
    rng = np.random.default_rng(3)
    density = random_mixture(rng, [20], 3, 2)
    tensors = {name: tf.cast(t, dtype) for name, t in density.tensors().items()}
    density = mdn.GaussianMixture(**tensors)
    y = tf.constant(rng.normal(size=[20, 2]) * 3.0, dtype)
    step = tf.constant([1e-5, 2e-5], dtype)
    found = log_cell(density, y, step)
    expected = density.log_prob(y) + np.log(2e-10)
    tolerance = 1e-8 if dtype == np.float64 else 2e-4
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def test_gradients_of_cells_are_finite_differences_in_one_program():
    density = random_mixture(np.random.default_rng(4), [4], 2, 2)
    y = tf.constant([[0.3, -0.2], [2.0, 3.0], [np.nan, 0.5], [-30.0, 4.0]], tf.float64)
    step = tf.constant([0.5, 0.05], tf.float64)
    rng = np.random.default_rng(5)
    along = [tf.constant(rng.normal(size=t.shape)) for t in density.tensors().values()]
    along[2] = tf.linalg.band_part(along[2], -1, 0)

    def at(h):
        moved = [t + h * a for t, a in zip(density.tensors().values(), along, strict=True)]
        return log_cell(mdn.GaussianMixture(*moved), y, step)

    @tf.function(jit_compile=True)
    def slope():
        with tf.GradientTape() as tape:
            h = tf.zeros([4, 1, 1, 1], tf.float64)
            tape.watch(h)
            moved = [
                t + tf.reshape(h, [4] + [1] * (t.shape.rank - 1)) * a
                for t, a in zip(density.tensors().values(), along, strict=True)
            ]
            value = log_cell(mdn.GaussianMixture(*moved), y, step)
        return tape.gradient(value, h)[:, 0, 0, 0]

    h = 1e-5
    np.testing.assert_allclose(slope(), (at(h) - at(-h)) / (2 * h), rtol=1e-6, atol=1e-6)


def test_extremes_of_cells_are_finite_with_their_gradients():
    loc = tf.constant(np.zeros([4, 2, 2]), tf.float32)
    tril = [[[1e-6, 0.0], [1e-6, 1e6]], [[1e6, 0.0], [1e6, 1e-6]]]
    tril = tf.constant(np.tile([tril], [4, 1, 1, 1]), tf.float32)
    logits = tf.constant([[0.0, -1e9]] * 4, tf.float32)
    y = tf.constant([[0.0, 0.0], [1e-4, 1e8], [np.nan, 3.0], [1.0, 1.0]], tf.float32)
    with tf.GradientTape() as tape:
        tape.watch([logits, loc, tril])
        value = log_cell(mdn.GaussianMixture(logits, loc, tril), y, tf.constant([0.5, 1e-3]))
    assert np.isfinite(value).all()
    assert all(np.isfinite(g).all() for g in tape.gradient(value, [logits, loc, tril]))


# ---------------------------------------------------------------------- transformed targets


def test_cells_of_transformed_targets_end_where_their_domain_does():
    base = random_mixture(np.random.default_rng(6), [1], 3, 1)
    density = Transformed(base, tfb.Exp())
    y = np.arange(0.0, 6.0)[:, None]  # counts, of which zero is half out of the domain
    cells = np.exp(log_cell(density, tf.constant(y), tf.constant([1.0], tf.float64)))
    ends = np.append([0.0], np.arange(0.5, 6.0))
    np.testing.assert_allclose(cells, np.diff(density.cdf(ends[:, None]).numpy()[:, 0]))
    outside = log_cell(density, tf.constant([[-3.0]], tf.float64), tf.constant([1.0], tf.float64))
    assert np.exp(outside) < 1e-30


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_tiny_cells_of_transformed_targets_are_the_density_times_their_area(dtype):
    base = random_mixture(np.random.default_rng(7), [10], 2, 2)
    base = mdn.GaussianMixture(**{name: tf.cast(t, dtype) for name, t in base.tensors().items()})
    density = Transformed(base, PerTarget([tfb.Exp(), tfb.Softplus()]))
    y = tf.constant(np.random.default_rng(8).gamma(3.0, size=[10, 2]) * 5.0, dtype)
    step = tf.constant([1e-4, 1e-4], dtype)
    tolerance = 1e-7 if dtype == np.float64 else 2e-4
    expected = density.log_prob(y) + np.log(1e-8)
    np.testing.assert_allclose(log_cell(density, y, step), expected, tolerance, tolerance)
    boxes = np.exp(log_cell(density, y, tf.constant([2.0, 3.0], dtype)))
    draws = density.sample(100_000, seed=1).numpy()
    inside = (np.abs(draws - y) < [1.0, 1.5]).all(axis=-1).mean(axis=0)
    error = np.sqrt(boxes * (1.0 - boxes) / len(draws)) + 1e-5
    assert (np.abs(inside - boxes) < 5.0 * error).all()


def test_cells_of_an_ensemble_are_the_mean_of_the_members():
    members = [random_mixture(np.random.default_rng(seed), [5], 2, 2) for seed in (1, 2)]
    members = [Transformed(member, tfb.Exp()) for member in members]
    y = np.exp(np.random.default_rng(9).normal(size=[5, 2]))
    step = tf.constant([0.2, 0.1], tf.float64)
    found = np.exp(log_cell(mixture_of(members), tf.constant(y), step))
    parts = [np.exp(log_cell(member, tf.constant(y), step)) for member in members]
    np.testing.assert_allclose(found, np.mean(parts, axis=0))
