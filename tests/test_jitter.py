"""Jitter of tied targets, and the NLL of cells that validation rows are judged by."""

import numpy as np
import pytest
import tensorflow as tf
from scipy import integrate
from scipy.stats import kstest, multivariate_normal, norm

import mdn
from mdn import jitter as jitters
from mdn import losses
from mdn.errors import ConfigError
from mdn.jitter import Jitter

RNG = np.random.default_rng(0)


def test_noise_is_uniform_in_the_cell_and_a_function_of_seed_and_step():
    jitter = Jitter([0.5, 0.0], seed=3)
    y = tf.constant(RNG.normal(size=[2000, 2]), tf.float32)
    noise = (jitter(y, tf.constant(7)) - y).numpy()
    assert kstest(noise[:, 0] / 0.5 + 0.5, "uniform").pvalue > 0.001
    assert not noise[:, 1].any()
    np.testing.assert_array_equal(jitter(y, tf.constant(7)), jitter(y, tf.constant(7)))
    assert np.abs(jitter(y, tf.constant(8)) - jitter(y, tf.constant(7))).max() > 0.1
    assert np.isnan(jitter(tf.constant([[np.nan, 1.0]]), tf.constant(0)).numpy()[0, 0])


def test_what_can_be_given():
    assert jitters.get(None, [1.0]) is None
    assert jitters.get(True, [0.0]) is None  # there is no grid to fill
    assert jitters.get(True, [0.5]).step == [0.5]
    assert jitters.get([2.0], None).step == [2.0]
    with pytest.raises(ConfigError, match="adapt the model first"):
        jitters.get(True, None)
    with pytest.raises(ConfigError, match="at least 0"):
        jitters.get([-1.0], None)


def mixture(d):
    loc = tf.constant([[0.0] * d, [1.0] * d])
    scale = tf.constant(np.tril(np.full([d, d], 0.3)) + 0.5 * np.eye(d), tf.float32)
    return mdn.GaussianMixture(tf.math.log([0.3, 0.7]), loc, tf.stack([scale, 2.0 * scale]))


@pytest.mark.parametrize("step", [0.05, 1.0, 4.0])
def test_nll_of_a_cell_is_that_of_the_mean_density_over_it(step):
    density = mixture(1)
    found = losses.CellNLL([step])(tf.constant([0.4]), density).numpy()
    high, low = (density.cdf(tf.constant([0.4 + s * step / 2])).numpy() for s in (1, -1))
    assert found == pytest.approx(-np.log((high - low) / step), abs=1e-4)
    on_no_grid = losses.CellNLL([0.0])(tf.constant([0.4]), density)
    np.testing.assert_allclose(on_no_grid, -density.log_prob([0.4]), rtol=1e-5)


def test_one_step_is_that_of_all_targets():
    y = tf.constant([np.nan, 1.0])
    for density in (mixture(2), mdn.MultivariateNormalDiag([0.0, 1.0], [1.0, 2.0])):
        one, each = (losses.CellNLL(step)(y, density) for step in (0.5, [0.5, 0.5]))
        np.testing.assert_array_equal(one, each)
    model = mdn.MDN(mdn.heads.Mixture(2, 2))
    model.compile(jitter=0.5)
    with pytest.raises(ConfigError, match="jitter: 3 steps for 2 targets; give one for all, or"):
        model.compile(jitter=[0.5, 0.5, 0.5])


def test_nll_of_a_box_under_full_covariances():
    density = mixture(2)
    parts = [
        (w, multivariate_normal(np.asarray(m), np.asarray(s) @ np.asarray(s).T))
        for w, m, s in zip(
            [0.3, 0.7], density.loc.numpy(), density.scale_tril.numpy(), strict=True
        )
    ]
    corners = [[0.2, 0.9], [0.1, 0.5]]
    total, _ = integrate.dblquad(
        lambda b, a: sum(w * part.pdf([a, b]) for w, part in parts), *corners[0], *corners[1]
    )
    middle, step = np.mean(corners, axis=1), np.ptp(corners, axis=1)
    errors = [
        float(losses.CellNLL(step, n)(tf.constant(middle, tf.float32), density))
        + np.log(total / step.prod())
        for n in (16, 512)
    ]
    np.testing.assert_allclose(errors, 0.0, atol=0.03)
    assert abs(errors[1]) < 1e-3


def test_a_box_of_diagonal_covariances_is_a_product():
    density = mdn.GaussianMixture.from_diag([[0.0]], [[[0.0, 1.0]]], [[[1.0, 2.0]]])
    found = losses.CellNLL([0.5, 0.0])(tf.constant([[0.3, np.nan], [0.3, 2.0]]), density).numpy()
    cell = np.log((norm.cdf(0.55) - norm.cdf(0.05)) / 0.5)
    np.testing.assert_allclose(found, [-cell, -cell - norm.logpdf(2.0, 1.0, 2.0)], rtol=1e-4)


@pytest.mark.parametrize("members", [1, 2])
def test_training_on_jittered_targets_and_judging_cells(members, tmp_path):
    x = RNG.normal(size=[300, 1])
    y = np.round(x + RNG.normal(size=[300, 1]))
    model = mdn.MDN(mdn.heads.Mixture(1, 2, grid_floor=False), mdn.backbones.MLP([4]))
    model = model if members == 1 else mdn.Ensemble(model, members)
    model.adapt(x, y)
    model.compile(tf_adam(), jitter=True, run_eagerly=members == 2)
    history = model.fit(x, y, batch_size=100, epochs=2, verbose=0, validation_data=(x, y)).history
    density = model.predict_distribution(x)
    cells = float(np.mean(losses.CellNLL([1.0])(y, density)))
    assert history["val_loss"][-1] == pytest.approx(cells, rel=1e-4)
    exact = float(-np.mean(model.log_prob(x, y)))
    assert abs(history["loss"][-1] - exact) > 1e-6  # it is of other numbers than y
    if members == 1:
        model.save(tmp_path / "model.keras")
        loaded = mdn.load(tmp_path / "model.keras")
        assert loaded.evaluate(x, y, verbose=0)[0] == pytest.approx(cells, rel=1e-4)


def tf_adam():  # whose steps change nothing
    import tf_keras

    return tf_keras.optimizers.Adam(0.0)


def test_transformed_targets_have_no_jitter():
    model = mdn.MDN(mdn.heads.Mixture(1, 2, target_transform="log"))
    model.adapt(np.ones([50, 1]), np.arange(1.0, 51.0)[:, None] // 2 + 1)
    with pytest.raises(ConfigError, match="train without jitter"):
        model.compile("adam", jitter=True)
