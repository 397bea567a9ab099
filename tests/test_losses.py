"""The losses against quadrature, Monte Carlo and closed forms; each trains, saves and loads."""

import math

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from scipy.integrate import quad, trapezoid
from scipy.special import log_ndtr
from scipy.stats import norm
from test_density import random_mixture

import mdn
from mdn import losses
from mdn.data.rows import ColumnNames
from mdn.density.cells import log_cell
from mdn.density.interval import log_interval
from mdn.losses import LOSSES, BetaNLL, Energy, IntervalNLL, crps


def parameters_of(density):
    logits, loc, scale = (np.asarray(p, np.float64) for p in density.mixture_parameters())
    weight = np.exp(logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True))
    return weight, loc, scale


def numeric_crps(density, y):
    """Return the integral of (F - 1{y <= t})^2 for each row of a density with D = 1."""
    weight, loc, scale = parameters_of(density)
    answers = []
    for row in range(len(y)):
        t = np.sort(np.append(np.linspace(-30.0, 30.0, 120_001), [y[row, 0]] * 2))
        z = (t[:, None] - loc[row, :, 0]) / scale[row, :, 0, 0]
        cdf = norm.cdf(z) @ weight[row]
        after = np.arange(len(t)) > np.searchsorted(t, y[row, 0])
        answers.append(trapezoid((cdf - after) ** 2, t))
    return np.array(answers)


def test_every_name_has_a_case():
    assert set(LOSSES) == set(CASES)


def test_crps_is_its_integral():
    rng = np.random.default_rng(0)
    density = random_mixture(rng, [6], 3, 1)
    y = rng.normal(scale=2.0, size=[6, 1])
    np.testing.assert_allclose(crps(y, density), numeric_crps(density, y), atol=1e-6)
    # of one normal: Gneiting and Raftery (2007), equation 21
    one = mdn.MultivariateNormalDiag(np.array([[1.0]]), np.array([[2.0]]))
    z = (3.0 - 1.0) / 2.0
    known = 2.0 * (z * (2.0 * norm.cdf(z) - 1.0) + 2.0 * norm.pdf(z) - 1.0 / math.sqrt(math.pi))
    np.testing.assert_allclose(crps(np.array([[3.0]]), one), [known])


def test_crps_of_several_targets_is_the_mean_of_the_margins_that_are_there():
    rng = np.random.default_rng(1)
    density = random_mixture(rng, [4], 2, 3)
    y = rng.normal(size=[4, 3])
    weight, loc, scale = parameters_of(density)
    margins = [
        mdn.GaussianMixture.from_diag(
            np.log(weight), loc[..., [d]], np.linalg.norm(scale, axis=-1)[..., [d]]
        )
        for d in range(3)
    ]
    each = np.stack([crps(y[:, [d]], m) for d, m in enumerate(margins)], axis=1)
    np.testing.assert_allclose(crps(y, density), each.mean(axis=1))
    y[0, 1], y[1] = np.nan, np.nan
    found = crps(y, density).numpy()
    np.testing.assert_allclose(found[0], each[0, [0, 2]].mean())
    assert found[1] == 0.0


def test_energy_of_one_target_is_the_crps():
    rng = np.random.default_rng(2)
    density = random_mixture(rng, [5], 3, 1)
    y = rng.normal(size=[5, 1])
    np.testing.assert_allclose(Energy()(y, density), crps(y, density), rtol=1e-12)


@pytest.mark.parametrize("missing", [False, True])
def test_energy_is_that_of_samples(missing):
    rng = np.random.default_rng(3)
    density = random_mixture(rng, [], 3, 3)
    y = rng.normal(size=3)
    seen = [0, 2] if missing else [0, 1, 2]
    if missing:
        y[1] = np.nan
    draws = density.sample(200_000, seed=4).numpy()[:, seen]
    near = np.linalg.norm(draws - y[seen], axis=1)
    apart = np.linalg.norm(draws[::2] - draws[1::2], axis=1)
    expected = near.mean() - 0.5 * apart.mean()
    error = np.hypot(near.std() / np.sqrt(len(near)), 0.5 * apart.std() / np.sqrt(len(apart)))
    found = Energy(directions=4_000)(tf.constant(y), density).numpy()
    parts = [Energy(directions=400, seed=s)(tf.constant(y), density).numpy() for s in range(10)]
    own = np.std(parts) / np.sqrt(10)
    assert found == pytest.approx(expected, abs=5.0 * math.hypot(error, own))


def test_energy_draws_afresh_for_another_batch_and_the_same_again_for_the_same():
    rng = np.random.default_rng(5)
    density = random_mixture(rng, [2], 2, 2)
    y = rng.normal(size=[2, 2])
    y[1], loc = y[0], density.loc.numpy()
    loc[1] = loc[0]
    same = mdn.GaussianMixture(density.logits, loc, density.scale_tril)
    energy = Energy(directions=2)
    first, again = energy(y, same), energy(y, same)
    np.testing.assert_array_equal(first, again)
    moved = mdn.GaussianMixture(density.logits, loc + 1e-3, density.scale_tril)
    assert np.abs(energy(y + 1e-3, moved) - first).max() > 1e-3  # the score itself stays
    assert np.abs(Energy(directions=2, seed=1)(y, same) - first).max() > 1e-3
    np.testing.assert_allclose(
        Energy(directions=5_000)(y, same), Energy(directions=5_000)(y + 1e-3, moved), rtol=0.05
    )


def test_scores_are_least_where_the_density_is_the_truth():
    rng = np.random.default_rng(6)
    truth = random_mixture(rng, [], 2, 2)
    y = truth.sample(4_000, seed=7)
    for score in (losses.nll, crps, Energy(directions=64)):

        def mean(factor, shift, score=score):
            scale = truth.scale_tril * factor
            other = mdn.GaussianMixture(truth.logits, truth.loc + shift, scale)
            return tf.reduce_mean(
                score(y, tf.nest.map_structure(lambda d: d, other[tf.newaxis]))
            ).numpy()

        best = mean(1.0, 0.0)
        assert all(mean(f, s) > best for f, s in [(1.6, 0.0), (0.6, 0.0), (1.0, 0.7), (1.0, -0.7)])


def test_beta_nll_is_that_of_the_paper():
    rng = np.random.default_rng(8)
    loc, scale, y = rng.normal(size=[5, 2]), rng.uniform(0.5, 2.0, [5, 2]), rng.normal(size=[5, 2])
    variable = [tf.Variable(loc), tf.Variable(scale)]
    for beta in (0.0, 0.5, 1.0):
        with tf.GradientTape() as tape:
            score = BetaNLL(beta)(tf.constant(y), mdn.MultivariateNormalDiag(*variable))
            total = tf.reduce_sum(score)
        expected = -(scale ** (2 * beta) * norm.logpdf(y, loc, scale)).sum(axis=1)
        np.testing.assert_allclose(score, expected)
        by_loc, _ = tape.gradient(total, variable)
        np.testing.assert_allclose(by_loc, scale ** (2 * beta - 2) * (loc - y))
    mixture = random_mixture(rng, [5], 2, 2)
    np.testing.assert_allclose(BetaNLL(0.0)(y, mixture), losses.nll(tf.constant(y), mixture))
    y[0, 0], y[1] = np.nan, np.nan
    assert np.isfinite(BetaNLL()(tf.constant(y), mixture)).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_log_interval_is_exact_in_both_tails(dtype):
    middle = np.array([0.0, 0.3, 1.0, 5.0, 12.0, 40.0, 100.0])
    width = np.array([1e-6, 1e-3, 0.02, 0.5, 1.0, 3.0, 20.0])
    m, w = (a.ravel().astype(dtype) for a in np.meshgrid(middle, width))
    m = np.concatenate([m, -m])
    w = np.concatenate([w, w])
    variables = [tf.constant(m), tf.constant(w)]
    with tf.GradientTape() as tape:
        tape.watch(variables)
        centre, size = variables
        found = log_interval(centre - 0.5 * size, centre + 0.5 * size, size)
    gradients = tape.gradient(found, variables)
    expected, slopes = [], []
    for centre, width in zip(np.abs(m).tolist(), w.tolist(), strict=True):
        near, far = 0.5 * width - centre, -0.5 * width - centre
        if width * max(centre, 1.0) < 1.0:  # the density itself, in units of its middle
            integral, _ = quad(
                lambda t, c=centre: math.exp(-t * c - 0.5 * t * t),
                -width / 2,
                width / 2,
                epsabs=0.0,
                epsrel=1e-13,
            )
            value = norm.logpdf(centre) + math.log(integral)
        else:
            value = log_ndtr(near) + math.log(-math.expm1(log_ndtr(far) - log_ndtr(near)))
        expected.append(value)
        slopes.append(0.5 * sum(math.exp(norm.logpdf(x) - value) for x in (near, far)))
    tolerance = 2e-5 if dtype == np.float32 else 1e-11
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)
    rtol = 2e-3 if dtype == np.float32 else 1e-8
    np.testing.assert_allclose(gradients[1], slopes, rtol=rtol, atol=1e-6)
    assert np.isfinite(gradients[0]).all()


def test_log_interval_stays_finite_far_out():
    middle = tf.constant([1e8, -1e8, 1e4, 0.0, 1e15, 1e8], tf.float32)
    width = tf.constant([1e7, 0.5, 1.0, 1e30, 1e16, 1e-9], tf.float32)
    with tf.GradientTape() as tape:
        tape.watch([middle, width])
        value = log_interval(middle - 0.5 * width, middle + 0.5 * width, width)
    assert np.isfinite(value).all()
    assert all(np.isfinite(g).all() for g in tape.gradient(value, [middle, width]))
    assert value[3] == value[4] == 0.0


@pytest.mark.parametrize("d", [1, 3])
def test_cells_of_a_grid_have_a_total_of_one(d):
    rng = np.random.default_rng(9)
    density = mdn.GaussianMixture.from_diag(
        rng.normal(size=[2]), rng.normal(size=[2, d]), rng.uniform(0.05, 1.5, size=[2, d])
    )
    axis = np.arange(-9.0, 9.5, 0.5 if d == 1 else 1.5)
    y = np.stack(np.meshgrid(*[axis] * d), axis=-1).reshape(-1, 1, d)
    step = np.full(d, axis[1] - axis[0])
    mass = np.exp(log_cell(density[tf.newaxis], tf.constant(y), tf.constant(step)))
    assert mass.sum() == pytest.approx(1.0, abs=1e-6)
    y = np.array([[0.5] + [np.nan] * (d - 1)])
    one = mdn.GaussianMixture.from_diag(
        density.logits, density.loc[:, :1], density.scale_diag[:, :1]
    )
    step = tf.constant(step)
    np.testing.assert_allclose(
        log_cell(density[tf.newaxis], tf.constant(y), step),
        log_cell(one[tf.newaxis], tf.constant(y[:, :1]), step[:1]),
    )


def test_interval_nll_is_the_density_times_the_cell_where_cells_are_small():
    rng = np.random.default_rng(10)
    density = random_mixture(rng, [20], 3, 1)
    y = tf.constant(rng.normal(size=[20, 1]))
    found = IntervalNLL(1e-4)(y, density)
    np.testing.assert_allclose(found, losses.nll(y, density) - math.log(1e-4), atol=1e-6)


# ---------------------------------------------------------------------- training

CASES = {
    "nll": {},
    "crps": {},
    "energy": {"directions": 8},
    "beta_nll": {"beta": 0.3},
    "interval_nll": {"step": [1.0, 0.5]},
}


def gridded(n=256):
    rng = np.random.default_rng(11)
    x = rng.normal(size=[n, 2])
    y = np.stack([3.0 * x[:, 0], x[:, 1]], axis=1) + rng.normal(size=[n, 2]) * [1.0, 0.5]
    y = np.round(y / [1.0, 0.5]) * [1.0, 0.5]
    y[::5, 0], y[7] = np.nan, np.nan
    return x, y


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("jit_compile", [False, True])
def test_each_trains_saves_and_loads(name, jit_compile, tmp_path):
    x, y = gridded()
    tf_keras.utils.set_random_seed(0)
    model = mdn.MDN(mdn.heads.MixtureDiag(2, 2), mdn.backbones.MLP([16]))
    model.adapt(x, y)
    loss = {"name": name, **CASES[name]}
    how = {"jit_compile": True} if jit_compile else {"run_eagerly": True}
    model.compile(tf_keras.optimizers.Adam(0.02), loss=loss, **how)
    history = model.fit(x, y, batch_size=64, epochs=4, verbose=0).history
    assert history["loss"][-1] < history["loss"][0]
    metrics = model.evaluate(x, y, verbose=0, return_dict=True)
    counted = ~np.isnan(y).all(axis=1)
    density, y_counted = model(x[counted]), tf.constant(y[counted], tf.float32)
    nll = -tf.reduce_mean(density.log_prob(y_counted))
    assert metrics["nll"] == pytest.approx(float(nll), rel=1e-4)
    if name != "energy":  # whose directions follow the batch
        score = losses.get(loss)(y_counted, density)
        assert metrics["loss"] == pytest.approx(float(tf.reduce_mean(score)), rel=1e-4)
    if not jit_compile:  # what is saved does not know of it
        model.save(tmp_path / "model.keras")
        again = mdn.load(tmp_path / "model.keras").evaluate(x, y, verbose=0, return_dict=True)
        assert again == pytest.approx(metrics, rel=1e-5)


@pytest.mark.parametrize("loss", ["crps", "energy", {"name": "beta_nll", "beta": 1.0}])
@pytest.mark.parametrize("transform", [None, "log"])
def test_what_is_learned_does_not_depend_on_the_unit(loss, transform):
    rng = np.random.default_rng(3)
    x = rng.normal(size=[64, 1])
    y = np.exp(0.3 * x + 0.2 * rng.normal(size=[64, 1]))
    learned = []
    for unit in (1.0, 2.0**-24):  # below what Adam adds to the length of a gradient
        tf_keras.utils.set_random_seed(0)
        head = mdn.heads.Mixture(1, 2, target_transform=transform)
        model = mdn.MDN(head, mdn.backbones.MLP([8]))
        model.adapt(x, y * unit)
        model.compile(tf_keras.optimizers.Adam(0.01), loss=loss, run_eagerly=True)
        model.fit(x, y * unit, batch_size=16, epochs=2, verbose=0)
        learned.append(model.head_weights[0].numpy())
    np.testing.assert_allclose(learned[1], learned[0], atol=1e-3)


def test_interval_nll_takes_the_steps_from_the_targets():
    x, y = gridded()
    model = mdn.MDN(mdn.heads.MixtureDiag(2, 2))
    model.adapt(x, y)
    model.compile(loss="interval_nll")
    assert model._score.step == [1.0, 0.5]
    with pytest.raises(mdn.MDNError, match="adapt the model first, or give loss="):
        mdn.MDN(mdn.heads.MixtureDiag(2, 2)).compile(loss="interval_nll")
    model.adapt(x, np.random.default_rng(0).normal(size=[256, 2]))
    with pytest.raises(mdn.MDNError, match="target 0 is on no grid; give loss="):
        model.compile(loss="interval_nll")
    model.column_names = ColumnNames(targets=("tide", "wind"))
    with pytest.raises(mdn.MDNError, match="target 'tide' is on no grid; give loss="):
        model.compile(loss="interval_nll")


def test_boxes_of_three_targets_with_full_covariances_are_refused_before_training():
    model = mdn.MDN(mdn.heads.Mixture(3, 2))
    loss = IntervalNLL(1.0)
    with pytest.raises(mdn.MDNError, match="3 targets need diagonal covariances; use model=mix"):
        model.compile(loss=loss)
    density = random_mixture(np.random.default_rng(0), [2], 2, 3)
    with pytest.raises(mdn.MDNError, match="no closed form under full covariances"):
        loss(np.zeros([2, 3]), density)
    with pytest.raises(mdn.MDNError, match="2 steps for 3 targets; give one for all"):
        mdn.MDN(mdn.heads.Diag(3)).compile(loss={"name": "interval_nll", "step": [1.0, 2.0]})


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("mse", "loss='mse' is unknown: choose one of nll, crps, energy"),
        ({"name": "energy", "directions": 0}, "loss=energy: directions=0 must be at least 1"),
        ({"name": "beta_nll", "beta": 2.0}, "loss=beta_nll: beta=2.0 must be between 0 and 1"),
        ({"name": "interval_nll", "step": 0.0}, "loss=interval_nll: step=0.0 must be positive"),
        ({"name": "crps", "beta": 1.0}, "loss=crps: .*beta"),
    ],
)
def test_a_wrong_loss_is_named(loss, message):
    with pytest.raises(mdn.MDNError, match=message):
        losses.get(loss)


@pytest.mark.parametrize("score", [crps, Energy(directions=4), BetaNLL(), IntervalNLL(0.5)])
def test_gradients_are_finite_at_extremes(score):
    loc = tf.constant(np.zeros([3, 2, 2]), tf.float32)
    scale = tf.constant(np.tile([[1e-6, 1e6], [1.0, 1.0]], [3, 1, 1]), tf.float32)
    logits = tf.constant([[0.0, -1e9]] * 3, tf.float32)
    y = tf.constant([[0.0, 0.0], [1e-4, 1e8], [np.nan, 3.0]], tf.float32)
    with tf.GradientTape() as tape:
        tape.watch([logits, loc, scale])
        value = score(y, mdn.GaussianMixture.from_diag(logits, loc, scale))
    assert np.isfinite(value).all()
    assert all(np.isfinite(g).all() for g in tape.gradient(value, [logits, loc, scale]))
