"""Recalibration: the map of densities, its fit against closed forms, and that it is shipped."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tensorflow as tf
from scipy import stats

import mdn
from mdn.density.recalibration import Recalibration
from mdn.density.transformed import split_transform
from mdn.errors import DataError
from mdn.export import export_saved_model
from mdn.heads import Diag, Mixture, MixtureDiag, MixtureLowRank, MixturePrecision, TriL
from mdn.held_out import HeldOut
from mdn.recalibration import fit_recalibration

MAP = Recalibration((0.3, -0.2), (1.4, 0.8), 1.7)
HEADS = {
    "diag": lambda **o: Diag(2, **o),
    "tril": lambda **o: TriL(2, **o),
    "mixture": lambda **o: Mixture(2, 3, **o),
    "mixture_diag": lambda **o: MixtureDiag(2, 3, **o),
    "precision": lambda **o: MixturePrecision(2, 3, **o),
    "low_rank": lambda **o: MixtureLowRank(2, 3, rank=1, **o),
    "transformed": lambda **o: Mixture(2, 3, target_transform=["log", None], **o),
}


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def one(density):
    """Return the rows and the density of a single model."""
    tensors = {name: np.asarray(t, np.float64) for name, t in density.tensors().items()}
    return [(np.arange(density.batch_shape[0]), type(density)(**tensors))]


def held_out(members, y, exact=None, weight=None):
    """Return what is fitted to."""
    exact, weight = y if exact is None else exact, np.ones(len(y)) if weight is None else weight
    return HeldOut(members, y, exact, np.ones(y.shape[1]), weight)


def fit(density, y, weight=None, seed=0):
    return fit_recalibration(held_out(one(density), y, weight=weight), seed)


# ---------------------------------------------------------------------- the map


@pytest.mark.parametrize("name", HEADS)
def test_every_head_has_the_density_that_the_map_says(name):
    head = HEADS[name]()
    y = np.abs(draw(40, 2)) + 0.1
    head.adapt(y)
    hidden = tf.constant(draw(40, 5, seed=1), tf.float32)
    before, _ = split_transform(head(hidden))
    head.recalibration = MAP
    density = head(hidden)
    after, _ = split_transform(density)
    assert type(after) is type(before)
    logits, loc, scale_tril = before.mixture_parameters()
    expected = mdn.GaussianMixture(
        MAP.sharpness * tf.nn.log_softmax(logits),
        loc + MAP.shift,
        tf.constant(MAP.scale)[:, tf.newaxis] * scale_tril,
    )
    points = draw(40, 2, seed=2).astype("f")
    np.testing.assert_allclose(after.log_prob(points), expected.log_prob(points), rtol=1e-3)
    np.testing.assert_allclose(
        head.log_prob(hidden, y), density.log_prob(y.astype("f")), rtol=1e-3, atol=1e-4
    )  # the way that training takes
    params = tf.matmul(hidden, head.kernel, transpose_b=True) + head.bias
    again = head.distribution(head.parameters(head.distribution(params)))
    np.testing.assert_allclose(
        again.log_prob(y.astype("f")), density.log_prob(y.astype("f")), rtol=1e-3, atol=1e-3
    )
    copy = type(head).from_config(head.get_config())
    assert copy.recalibration == MAP
    head.adapt(y)
    assert head.recalibration is None  # it belonged to another density
    assert "recalibration" not in head.get_config()


# ---------------------------------------------------------------------- the fit


def test_fit_of_a_normal_is_its_closed_form():
    y = 0.4 + 1.5 * draw(2000, 1)
    y[::9] = np.nan
    loc = draw(2000, 1, seed=1)
    found = fit(mdn.MultivariateNormalDiag(loc, np.ones((2000, 1))), loc + y)
    observed = y[~np.isnan(y)]
    np.testing.assert_allclose(found.map.shift, observed.mean(), rtol=1e-3)
    np.testing.assert_allclose(found.map.scale, observed.std(), rtol=1e-3)
    # nats per row of N(0, 1) short of N(.4, 1.5^2)
    expected = np.mean(
        stats.norm(observed.mean(), observed.std()).logpdf(observed) - stats.norm.logpdf(observed)
    )
    assert found.gain == pytest.approx(expected * len(observed) / 2000, abs=3e-3)
    assert found.gain_se < found.gain / 5


def test_fit_finds_the_sharpness_of_the_weights():
    x = draw(20_000, seed=1)
    loc = np.broadcast_to([[-5.0], [5.0]], (20_000, 2, 1))
    first = np.random.default_rng(2).uniform(size=20_000) < 1 / (1 + np.exp(-2.0 * x))
    y = np.where(first, -5.0, 5.0)[:, None] + draw(20_000, 1)
    timid = mdn.GaussianMixture.from_diag(np.stack([x, 0 * x], 1), loc, np.ones((20_000, 2, 1)))
    found = fit(timid, y)
    assert found.map.sharpness == pytest.approx(2.0, abs=0.15)
    assert found.map.scale[0] == pytest.approx(1.0, abs=0.03)


def test_weights_count_as_copies():
    y, weight = draw(600, 1) * 2.0, np.arange(600) % 3
    density = mdn.MultivariateNormalDiag(np.zeros((600, 1)), np.ones((600, 1)))
    found = fit(density, y, weight=weight.astype(float))
    expected = math.sqrt(np.average((y[:, 0] - found.map.shift[0]) ** 2, weights=weight))
    assert found.map.scale[0] == pytest.approx(expected, rel=1e-3)


def test_calibrated_densities_stay_as_they_are():
    density = mdn.MultivariateNormalDiag(np.zeros((300, 1)), np.ones((300, 1)))
    found = [fit(density, draw(300, 1, seed=s), seed=s) for s in range(12)]
    assert sum(each.map is not None for each in found) <= 2
    assert np.mean([each.gain for each in found]) < 0.005  # two numbers of 240 rows cost 1 / 240
    assert str(found[0]).startswith("not recalibrated")


def test_rows_of_ensemble_members_are_judged_by_those_that_have_them():
    y = 2.0 * draw(400, 1)
    rows = [np.arange(0, 300), np.arange(100, 400)]
    normals = [mdn.MultivariateNormalDiag(np.zeros((300, 1)), np.ones((300, 1)))] * 2
    found = fit_recalibration(held_out(list(zip(rows, normals, strict=True)), y))
    assert found.map.scale[0] == pytest.approx(np.std(y), rel=2e-3)
    assert found.n == 400


def test_ties_are_no_reason_to_be_narrow():
    y = np.round(draw(2000, 1))
    cells = y + np.random.default_rng(1).uniform(-0.5, 0.5, y.shape)
    centres = np.broadcast_to(np.arange(-4.0, 5.0)[:, None], (2000, 9, 1))
    logits = stats.norm.logpdf(centres[..., 0])
    spikes = mdn.GaussianMixture.from_diag(logits, centres, np.full((2000, 9, 1), 0.29))
    on_ties = fit_recalibration(held_out(one(spikes), y))
    assert on_ties.map.scale[0] < 0.1  # what the plain likelihood of ties would have
    found = fit_recalibration(held_out(one(spikes), cells, y))
    assert found.map is None or found.map.scale[0] > 0.7


# ---------------------------------------------------------------------- models


@pytest.fixture(scope="module")
def rows():
    x = np.random.default_rng(0).uniform(-1, 1, (1200, 1))
    return x, 2.0 * x + 0.3 * draw(1200, 1)


def narrow_model(rows, components=2):
    """Return a model whose densities are half as wide as y."""
    x, y = rows
    model = mdn.MDN(Mixture(1, components), mdn.backbones.Constant())
    model.adapt(x, 0.4 * (y - y.mean()) + y.mean())
    return model


def test_recalibrated_model_is_saved_and_exported(rows, tmp_path):
    x, y = rows
    model = narrow_model(rows)
    before = model.log_prob(x, y)
    assert model.predict_distribution(x[:5]).stddev().shape == [5, 1]  # its program is made now
    found = model.recalibrate(x, y)
    assert found.map.scale[0] > 1.5
    assert str(found).startswith("recalibrated (scales")
    after = model.log_prob(x, y)
    gain = (after - before).mean()
    assert gain > 0.1
    assert abs(gain - found.gain) < 4 * found.gain_se
    assert isinstance(model(x[:3]), mdn.GaussianMixture)
    np.testing.assert_allclose(model.predict_distribution(x).log_prob(y.astype("f")), after, 1e-4)
    model.save(tmp_path / "model.keras")
    again = mdn.load(tmp_path / "model.keras")
    assert again.head.recalibration == found.map
    np.testing.assert_allclose(again.log_prob(x, y), after, rtol=1e-5)
    export_saved_model(model, tmp_path / "saved")
    served = tf.saved_model.load(tmp_path / "saved").signatures["log_prob"]
    answer = served(x=tf.constant(x, tf.float32), y=tf.constant(y, tf.float32))["log_prob"]
    np.testing.assert_allclose(answer, after, rtol=1e-4, atol=1e-5)
    assert abs(model.recalibrate(x, y).map.scale[0] - found.map.scale[0]) < 1e-3  # not on top
    model.set_recalibration(None)
    np.testing.assert_allclose(model.log_prob(x, y), before, rtol=1e-5)


def test_training_goes_on_with_the_map(rows):
    x, y = rows
    model = narrow_model(rows)
    model.compile("adam", jit_compile=False)
    model.recalibrate(x, y)
    loss = model.evaluate(x, y, verbose=0)
    nll = loss if np.isscalar(loss) else loss[0]
    assert nll == pytest.approx(-model.log_prob(x, y).mean(), rel=1e-4)
    first = model.fit(x, y, epochs=1, verbose=0, batch_size=400).history["nll"][0]
    assert first == pytest.approx(nll, abs=0.05)


def test_positive_targets_are_recalibrated_in_their_logs(rows):
    x, _ = rows
    u = 0.5 * draw(1200, 1)
    model = mdn.MDN(Mixture(1, 1, target_transform="log"), mdn.backbones.Constant())
    model.adapt(x, np.exp(0.5 * u))
    found = model.recalibrate(x, np.exp(u))
    assert found.map.scale[0] == pytest.approx(2.0, rel=0.03)
    law = stats.lognorm(u.std(), scale=math.exp(u.mean()))
    expected = law.logpdf(np.exp(u[:, 0])).mean()
    assert model.log_prob(x, np.exp(u)).mean() == pytest.approx(expected, abs=1e-3)


def test_ensemble_takes_a_map_only_if_the_mixture_gains(rows, tmp_path):
    x, y = rows
    template = mdn.MDN(Mixture(1, 1), mdn.backbones.Constant())
    ensemble = mdn.Ensemble(template, members=2)
    ensemble.adapt(x, 0.5 * y)
    folds = [np.arange(0, 600), np.arange(600, 1200)]
    found = ensemble.recalibrate(x, y, rows=folds)
    assert found.map.scale[0] > 1.5  # both are too narrow, and so is their mixture
    ensemble.save(tmp_path / "model.keras")
    again = mdn.load(tmp_path / "model.keras")
    np.testing.assert_allclose(again.log_prob(x, y), ensemble.log_prob(x, y), rtol=1e-5)
    assert ensemble.member(1).head.recalibration == found.map
    assert ensemble.recalibrate(x, y).n == 1200  # rows new to all


def test_ensemble_that_is_right_is_not_widened_because_its_members_are_narrow(rows):
    x, _ = rows
    y = np.random.default_rng(3).choice([-1.0, 1.0], (1200, 1)) + 0.5 * draw(1200, 1)
    ensemble = mdn.Ensemble(mdn.MDN(Mixture(1, 1), mdn.backbones.Constant()), members=2)
    ensemble.adapt(x, y)
    # Each member knows one half of the mixture that y has, and all of y seems too wide to it.
    loc, scale = np.array([-1.0, 1.0]).reshape(2, 1, 1), np.full((2, 1, 1, 1), 0.5)
    halves = mdn.GaussianMixture(*(a.astype("f") for a in (0 * loc[..., 0], loc, scale)))
    ensemble.stacked_weights[-1].assign(ensemble.head.parameters(halves))
    found = ensemble.recalibrate(x, y, rows=[np.arange(600), np.arange(600, 1200)])
    assert found.gain > 1.0  # of the members
    assert found.map is None
    assert ensemble.head.recalibration is None


def test_rows_that_say_nothing_are_refused(rows):
    x, y = rows
    model = narrow_model(rows)
    with pytest.raises(DataError):
        model.recalibrate(x, np.full_like(y, np.nan))
    with pytest.raises(DataError, match="9 rows with an observed target: give at least 20"):
        model.recalibrate(x[:9], y[:9])
    with pytest.raises(DataError):
        model.recalibrate(x[:30], y)
    assert model.head.recalibration is None
