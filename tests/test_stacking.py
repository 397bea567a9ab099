"""Shares of a mixture by held-out rows, and the mixture as a model."""

import types
import warnings

import numpy as np
import pytest
import tensorflow as tf
from scipy import optimize

import mdn
from mdn import backbones, heads, losses
from mdn.data.rows import Data, Rows
from mdn.density import mixture_of
from mdn.density.agreement import agree
from mdn.ensembles import Ensemble
from mdn.errors import ConfigError, DataError, RunError
from mdn.export import export_saved_model
from mdn.stacking import Stack, compare, stack, stacking_shares
from mdn.uncertainty import split_covariance

RNG = np.random.default_rng(0)
X = RNG.normal(size=[90, 2])
Y = np.round(X[:, :1] + RNG.normal(size=[90, 2]) * [1.0, 3.0], 1)
SHARES = [0.7, 0.3]


@pytest.fixture(scope="module")
def ensembles():
    """Two that differ in head, depth and weights, adapted to the same rows."""
    made = {}
    for name, head, widths in (
        ("wide", heads.Mixture(2, 3), [8]),
        ("deep", heads.Mixture(2, 2), [4, 4]),
    ):
        model = Ensemble(mdn.MDN(head, backbones.MLP(widths)), members=2)
        model.adapt(X, Y, seed=len(made))
        made[name] = model
    return made


@pytest.fixture(scope="module")
def both(ensembles):
    return stack(ensembles, dict(zip(ensembles, SHARES, strict=True)))


def test_shares_are_the_most_likely_ones():
    log_prob = RNG.normal([0.3, 0.0, 0.2], size=[200, 3])
    weight = RNG.uniform(0.1, 2.0, size=200)

    def nll(free):
        shares = np.exp(free - np.logaddexp.reduce(free))
        return -np.average(np.logaddexp.reduce(log_prob + np.log(shares), axis=1), weights=weight)

    best = optimize.minimize(nll, np.zeros(3), tol=1e-12)
    shares = stacking_shares(log_prob, weight)
    assert shares.sum() == pytest.approx(1.0)
    assert nll(np.log(shares)) == pytest.approx(best.fun, abs=1e-6)


def test_shares_follow_a_constant_advantage():
    log_prob = RNG.normal(size=[200, 1]) + np.array([0.0, -0.5])
    assert stacking_shares(log_prob) == pytest.approx([1.0, 0.0], abs=1e-6)


def test_ensembles_that_fail_or_add_nothing_are_left_out(monkeypatch):
    truth = RNG.normal(size=100)
    nll = {"good": truth, "bad": truth + 2.0, "broken": np.where(truth > 2.0, np.nan, truth)}
    nll["broken"][0] = np.inf
    weight = np.ones(100)
    monkeypatch.setattr("mdn.stacking.held_out_nll", lambda model, *_: (nll[model], weight))
    found = compare({name: name for name in nll}, None, None)
    assert found.shares == {"good": pytest.approx(1.0)}
    assert found.stacked == pytest.approx(truth.mean())
    assert found.nll == {"good": truth.mean(), "bad": pytest.approx(truth.mean() + 2.0)}
    assert found.failed == ["broken"]
    assert "100% 'good'" in str(found)
    with pytest.raises(RunError, match="no variant could be trained"):
        compare({"broken": "broken"}, None, None)


def test_rows_are_judged_by_members_that_held_them_out(ensembles):
    folds = np.array([np.arange(0, 20), np.arange(70, 90)])
    data = Data(Rows(X[:70], Y[:70]), Rows(X[70:], Y[70:]), Rows(X, Y), (), ())
    found = compare(ensembles, data, folds)
    for name, model in ensembles.items():
        log_prob = model.member_log_prob(X, Y)
        own = np.concatenate([log_prob[rows, m] for m, rows in enumerate(folds)])
        assert found.nll[name] == pytest.approx(-own.mean(), rel=1e-5)
    assert found.stacked <= min(found.nll.values()) + 1e-9


def test_cells_of_targets_on_a_grid_are_judged(ensembles):
    model = ensembles["wide"]
    by_point = model.member_log_prob(X, Y, cells=True)
    np.testing.assert_array_equal(by_point, model.member_log_prob(X, Y))
    model._jitter = types.SimpleNamespace(step=[0.1, 0.1])
    by_cell = model.member_log_prob(X, Y, cells=True)
    model._jitter = None
    nll = losses.CellNLL([0.1, 0.1])
    expected = [-nll(Y, model.member(m).predict_distribution(X)) for m in range(2)]
    np.testing.assert_allclose(by_cell, np.transpose(expected), rtol=1e-4)
    assert np.abs(by_cell - by_point).max() > 1e-3


def test_density_is_the_mixture_of_all_members(ensembles, both):
    x = X[:7].astype(np.float32)
    parts = [m.member(i)(x) for m in ensembles.values() for i in range(2)]
    expected = mixture_of(parts, np.repeat(SHARES, 2))
    found = both(x)
    for question in ("mean", "covariance"):
        np.testing.assert_allclose(
            getattr(found, question)(), getattr(expected, question)(), rtol=1e-5, atol=1e-6
        )
    y = Y[:7].astype(np.float32)
    np.testing.assert_allclose(found.log_prob(y), expected.log_prob(y), rtol=1e-5)
    np.testing.assert_allclose(both.log_prob(X[:7], Y[:7]), expected.log_prob(y), rtol=1e-5)
    gaps = np.where(np.arange(14).reshape(7, 2) % 3, y, np.nan)
    np.testing.assert_allclose(both.log_prob(X[:7], gaps), expected.log_prob(gaps), rtol=1e-5)
    np.testing.assert_allclose(both.predict(X[:7]), expected.mean(), rtol=1e-5, atol=1e-6)
    assert found.event_shape == [2]
    assert found.logits.shape == [7, 2 * (3 + 2)]


def test_member_is_the_mixture_of_members(ensembles, both):
    parts = [m.member_log_prob(X, Y) for m in ensembles.values()]
    expected = np.logaddexp(*(p + np.log(s) for p, s in zip(parts, SHARES, strict=True)))
    for cells in (False, True):  # of no jitter cells are points
        np.testing.assert_allclose(both.member_log_prob(X, Y, cells=cells), expected, rtol=1e-4)
    aleatoric, epistemic = both.uncertainty(X)
    expected = split_covariance(both.member_densities(tf.constant(X, tf.float32)))
    np.testing.assert_allclose(aleatoric, expected[0], rtol=1e-4, atol=1e-5)
    total = both.predict_distribution(X).covariance()
    np.testing.assert_allclose(aleatoric + epistemic, total, rtol=1e-4, atol=1e-5)
    answers = dict(enumerate(both.member_answers(X, [np.arange(5), np.arange(5, 9)])))
    for m, (index, density) in answers.items():
        np.testing.assert_allclose(
            density.log_prob(Y[index].astype(np.float32)),
            both.member_log_prob(X[index], Y[index])[:, m],
            rtol=1e-4,
        )


@pytest.fixture(scope="module")
def agreeing(ensembles):
    return stack(ensembles, dict(zip(ensembles, SHARES, strict=True)), agreement=1.7)


def test_density_of_members_that_agree(ensembles, both, agreeing):
    x, y = X[:7].astype(np.float32), Y[:7].astype(np.float32)
    pool = both(x)
    expected = agree(pool, 1.7, np.zeros(pool.logits.shape[-1], bool)).log_prob(y)
    assert np.abs(expected - pool.log_prob(y)).max() > 0.05
    np.testing.assert_allclose(agreeing(x).log_prob(y), expected, rtol=1e-5)
    np.testing.assert_allclose(agreeing.log_prob(X[:7], Y[:7]), expected, rtol=1e-5)
    np.testing.assert_allclose(
        agreeing.predict_distribution(X[:7]).log_prob(y), expected, rtol=1e-5
    )


def test_members_that_agree_have_shares_of_a_row(agreeing):
    x = tf.constant(X, tf.float32)
    members, weight = agreeing.shared_members(x)
    assert weight.shape == [2, len(X)]
    np.testing.assert_allclose(tf.reduce_sum(weight, axis=0), 1.0, rtol=1e-5)
    assert np.ptp(weight[0]) > 0.01
    density = agreeing.predict_distribution(X)
    y = Y.astype(np.float32)
    mixed = np.logaddexp(*(members.log_prob(y) + np.log(weight)))
    np.testing.assert_allclose(mixed, density.log_prob(y), rtol=1e-4, atol=1e-5)
    aleatoric, epistemic = agreeing.uncertainty(X)
    np.testing.assert_allclose(aleatoric + epistemic, density.covariance(), rtol=1e-4, atol=1e-5)
    mean = np.einsum("mn,mnd->nd", weight, members.mean())
    away = members.mean() - mean
    np.testing.assert_allclose(
        epistemic, np.einsum("mn,mni,mnj->nij", weight, away, away), rtol=1e-3, atol=1e-4
    )
    with pytest.raises(RunError, match="have no answers alone: leave out `rows`"):
        next(agreeing.member_answers(X, [np.arange(5), np.arange(5, 9)]))


def test_agreement_is_saved_and_exported_below_a_map(ensembles, agreeing, tmp_path):
    model = stack(ensembles, dict(zip(ensembles, SHARES, strict=True)), agreement=1.7)
    x = RNG.normal(size=[600, 2])
    y = 4.0 + x @ np.eye(2) + 0.2 * RNG.normal(size=[600, 2])
    fit = model.recalibrate(x, y)
    gain = model.log_prob(x, y) - agreeing.log_prob(x, y)
    assert gain.mean() == pytest.approx(fit.gain, abs=5 * fit.gain_se + 0.05)
    x, y = x.astype(np.float32), y.astype(np.float32)
    expected = fit.map.apply(agreeing(x)).log_prob(y)
    np.testing.assert_allclose(model.log_prob(x, y), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(RunError, match="leave out `rows`"):
        model.recalibrate(x, y, rows=[np.arange(300), np.arange(300, 600)])
    assert model.recalibration == fit.map  # it is not lost
    model.save(tmp_path / "model.keras")
    again = mdn.load(tmp_path / "model.keras")
    assert again.agreement == 1.7
    np.testing.assert_allclose(again.log_prob(x, y), expected, rtol=1e-4, atol=1e-4)
    export_saved_model(model, tmp_path / "saved")
    exported = tf.saved_model.load(str(tmp_path / "saved")).signatures["log_prob"]
    found = exported(x=tf.constant(x), y=tf.constant(y))["log_prob"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_recalibration_is_saved_and_exported(tmp_path, ensembles, both):
    model = stack(ensembles, dict(zip(ensembles, SHARES, strict=True)))
    rng = np.random.default_rng(1)
    x = rng.normal(size=[600, 2])
    y = 4.0 + x @ np.eye(2) + 0.2 * rng.normal(size=[600, 2])  # far from what they were made for
    fit = model.recalibrate(x, y)
    assert fit.map is not None
    gain = model.log_prob(x, y) - both.log_prob(x, y)
    assert gain.mean() == pytest.approx(fit.gain, abs=5 * fit.gain_se + 0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save(tmp_path / "model.keras")
    again = mdn.load(tmp_path / "model.keras")
    np.testing.assert_allclose(again.log_prob(x, y), model.log_prob(x, y), rtol=1e-5)
    export_saved_model(model, tmp_path / "saved")
    exported = tf.saved_model.load(str(tmp_path / "saved")).signatures["log_prob"]
    x, y = (tf.constant(v, tf.float32) for v in (x, y))
    np.testing.assert_allclose(
        exported(x=x, y=y)["log_prob"], model.log_prob(x, y), rtol=1e-4, atol=1e-4
    )


def test_ensembles_with_a_fitted_transform():
    """Each has the power of the Box-Cox transform in a variable of its own."""
    y = np.exp(0.3 * Y)
    made = {}
    for name, components in (("a", 2), ("b", 3)):
        head = heads.Mixture(2, components, target_transform=["box_cox", None])
        made[name] = Ensemble(mdn.MDN(head, backbones.MLP([4])), members=2)
        made[name].adapt(X, y)
    both = stack(made, dict(zip(made, SHARES, strict=True)))
    parts = [
        model.log_prob(X, y) + np.log(share)
        for model, share in zip(made.values(), SHARES, strict=True)
    ]
    np.testing.assert_allclose(both.log_prob(X, y), np.logaddexp(*parts), rtol=1e-4, atol=1e-4)
    made["b"].adapt(X, np.square(y))  # another power
    with pytest.raises(DataError, match="different target transforms"):
        mixture_of([model(X.astype(np.float32)) for model in made.values()])


def test_stack_of_one_is_that_one(ensembles):
    assert stack(ensembles, {"deep": 1.0}) is ensembles["deep"]


def test_mistakes(ensembles, both):
    with pytest.raises(ConfigError, match="for 1 ensembles: give each a positive one"):
        Stack([ensembles["wide"]], [0.5, 0.5])
    three = Ensemble(mdn.MDN(heads.Diag(2), backbones.Constant()), members=3)
    with pytest.raises(ConfigError, match="all need the same number"):
        Stack([ensembles["wide"], three], SHARES)
    for power in (-1.0, np.nan, np.inf):
        with pytest.raises(ConfigError, match=r"agreement=.*: is a power, at least 0"):
            Stack(list(ensembles.values()), SHARES, agreement=power)
    for attempt in (lambda: both.adapt(X, Y), both.compile, lambda: both.member(0)):
        with pytest.raises(RunError, match="stack"):
            attempt()
