"""How much narrower the members of a pool are to be: `mdn.spread`."""

import dataclasses
import math
import types

import numpy as np
import pytest
import tensorflow as tf
from scipy import optimize, special, stats

import mdn
from mdn import backbones, heads
from mdn.data.rows import Data, Rows
from mdn.density import mixture_of
from mdn.density.recalibration import Recalibration
from mdn.ensembles import Ensemble
from mdn.export import export_saved_model
from mdn.held_out import HeldOut
from mdn.spread import (
    MOST_AGREEMENT,
    _held_out_rows,
    extrapolate,
    fit_spread,
    growth,
    pooled_spread,
    shrink,
)
from mdn.stacking import stack

RNG = np.random.default_rng(0)
X = RNG.normal(size=[400, 2])
Y = X @ [[1.0, 0.0], [0.5, -1.0]] + RNG.normal(size=[400, 2]) * [0.3, 2.0]
WEIGHT = RNG.integers(0, 3, 400).astype(float)
FOLDS = np.stack([np.arange(0, 150), np.arange(200, 350)])  # row 150 is held out by none


@pytest.fixture(scope="module")
def ensembles():
    """Two with other heads and weights, adapted to the same rows; they have learned nothing."""
    made = {}
    for name, head in (("few", heads.Mixture(2, 2)), ("many", heads.Mixture(2, 4))):
        made[name] = Ensemble(mdn.MDN(head, backbones.MLP([8])), members=2)
        made[name].adapt(X, Y, seed=len(made))
    return made


@pytest.fixture
def data():
    """Targets are missing in one row, one has no weight."""
    y = Y.copy()
    y[3] = np.nan
    y[5, 0] = np.nan
    train, validation = Rows(X[:300], y[:300], WEIGHT[:300]), Rows(X[300:], y[300:], WEIGHT[300:])
    return Data(train, validation, validation, (), ())


def normals(loc, scale):
    loc, scale = np.broadcast_arrays(np.asarray(loc, float), np.asarray(scale, float))
    return mdn.MultivariateNormalDiag(loc[:, np.newaxis], scale[:, np.newaxis])


def test_pool_of_calibrated_normals_becomes_narrower():
    """Where the truth is N(0, 1 + s^2), of which each member sees a part of variance s^2."""
    n, members, spread = 4000, 8, 0.8
    seen = spread * RNG.normal(size=[members, n])  # what each member errs by
    y = RNG.normal(size=n)
    rows = np.arange(n)
    parts = [(rows, normals(one, math.hypot(1.0, spread))) for one in seen]  # calibrated, each
    held_out = HeldOut(parts, y[:, None], y[:, None], np.ones(1), np.ones(n))
    (log_scale, power), variance = fit_spread(held_out, agreement=False)
    assert power == 0.0

    def log_prob(log):
        sd = np.exp(log) * math.hypot(1.0, spread)
        return special.logsumexp(stats.norm.logpdf(y, seen, sd), axis=0) - math.log(members)

    def nll(log):
        return -log_prob(log).mean()

    expected = optimize.minimize_scalar(nll, bounds=(-1.0, 0.5), method="bounded").x
    assert log_scale == pytest.approx(expected, abs=1e-3)
    assert log_scale < -0.2
    step = 1e-2
    curvature = (nll(expected + step) + nll(expected - step) - 2.0 * nll(expected)) / step**2
    scores = (log_prob(expected + step) - log_prob(expected - step)) / (2.0 * step)
    assert variance[0] == pytest.approx(np.square(scores).mean() / (n * curvature**2), rel=0.02)


def test_what_rows_say_nothing_about_stays():
    """A normal alone has nobody to agree with."""
    y = RNG.normal(size=[3000, 1])
    one = normals(np.zeros(3000), np.ones(3000))
    log, variance = fit_spread(HeldOut([(np.arange(3000), one)], y, y, np.ones(1), np.ones(3000)))
    assert np.isinf(variance[1])
    assert variance[0] == pytest.approx(1.0 / 6000.0, rel=0.2)  # of a log scale: 1 / 2n
    assert shrink(log, variance)[1] == 0.0


def test_estimates_lose_what_is_in_doubt():
    rng = np.random.default_rng(1)
    truth = 0.1
    found = truth + 0.05 * rng.normal(size=20_000)
    smaller = shrink(found, np.full_like(found, 0.05**2))
    assert (np.abs(smaller) <= np.abs(found)).all()
    assert (smaller * found >= 0.0).all()
    assert smaller[np.abs(found) < 0.05] == pytest.approx(0.0)
    assert shrink(np.array([3.0]), np.array([0.01])) == pytest.approx(3.0, rel=2e-3)
    none = 0.05 * rng.normal(size=20_000)  # where there is nothing to find
    assert np.mean(shrink(none, np.full_like(none, 0.05**2)) ** 2) < 0.6 * np.mean(none**2)


class Likelihood:
    """The likelihood of rows under those that held them out, by SciPy.

    Of two log scales, and of the power of agreement with given supports.
    """

    def __init__(self, ensembles, shares, rows, y):
        counted = np.flatnonzero((WEIGHT > 0.0) & ~np.isnan(y).all(axis=1))
        self.y, self.judges = y, []
        for name, share in shares.items():
            for m in range(2):
                own = np.intersect1d(rows[m], counted)
                tensors = ensembles[name].member(m).predict_distribution(X).tensors()
                logits, *rest = (
                    np.float64(tensors[k])[own] for k in ("logits", "loc", "scale_tril")
                )
                weight = special.log_softmax(logits, axis=-1) + np.log(share)
                self.judges.append((own, weight, *rest))

    @staticmethod
    def components(residual, scale_tril, log):
        """Return the log densities of components at residuals [.., 2]; NaN marks a missing one."""
        diag = np.exp(log[:2]) * np.diagonal(scale_tril, axis1=-2, axis2=-1)
        off = np.exp(log[1]) * scale_tril[..., 1, 0]
        first, second = np.moveaxis(residual, -1, 0)
        # The margin of the first target, and the second given the first; of a row without the
        # first, the margin of the second.
        normal = stats.norm.logpdf
        z = first / diag[..., 0]
        both = normal(z) + normal(second, off * z, diag[..., 1]) - np.log(diag[..., 0])
        second = normal(second, 0.0, np.hypot(off, diag[..., 1]))
        return np.where(np.isnan(first), second, both)

    def supports(self, log):
        """Return what all judges of a row say at the means of each one's components."""
        found = []
        for own, _, loc, _ in self.judges:
            total = np.full(loc.shape[:2], -np.inf)
            for other, weight, means, scale_tril in self.judges:
                _, here, there = np.intersect1d(own, other, return_indices=True)
                away = loc[here][:, :, np.newaxis] - means[there][:, np.newaxis]
                each = self.components(away, scale_tril[there][:, np.newaxis], log)
                value = special.logsumexp(weight[there][:, np.newaxis] + each, axis=-1)
                total[here] = np.logaddexp(total[here], value)
            found.append(total)
        return found

    def nll(self, log, supports=None):
        """Return the NLL by log scales, and by the power of these supports if there is one."""
        total, held = np.full([2, len(self.judges), 400], -np.inf)
        for i, (own, weight, loc, scale_tril) in enumerate(self.judges):
            if supports is not None:
                weight = weight + log[2] * supports[i]
            each = self.components(self.y[own][:, np.newaxis] - loc, scale_tril, log)
            total[i, own] = special.logsumexp(weight + each, axis=-1)
            held[i, own] = special.logsumexp(weight, axis=-1)
        own = np.flatnonzero(np.isfinite(held).any(axis=0))
        each = special.logsumexp(total[:, own], axis=0) - special.logsumexp(held[:, own], axis=0)
        return -np.average(each, weights=WEIGHT[own])

    def best(self, supports=None):
        """Return the most likely numbers: two, or three of supports."""
        bounds = [(-3.0, 3.0)] * 2 + [(0.0, 10.0)] * (supports is not None)
        tight = {"xtol": 1e-7, "ftol": 1e-12}
        found = optimize.minimize(
            self.nll,
            np.full(len(bounds), 0.1),
            (supports,),
            "Powell",
            bounds=bounds,
            options=tight,
        )
        return found.x


@pytest.mark.parametrize("folds", [FOLDS, None])
def test_scales_are_those_of_more_members_than_held_a_row_out(ensembles, data, folds, monkeypatch):
    monkeypatch.setattr("mdn.spread.shrink", lambda estimate, variance: estimate)
    shares = {"few": 0.4, "many": 0.6}
    train, validation = (
        dataclasses.replace(rows, y=0.3 * rows.y) for rows in (data.train, data.validation)
    )  # near to where all have components
    data = Data(train, validation, validation, (), ())
    found, agreement = pooled_spread(ensembles, shares, data, folds)
    y = np.concatenate([data.train.y, data.validation.y])
    rows = FOLDS if folds is not None else [np.arange(300, 400)] * 2
    few, many = (Likelihood(ensembles, {name: 1.0}, rows, y).best() for name in shares)
    pool = Likelihood(ensembles, shares, rows, y)
    together = pool.best()
    seen = 1 if folds is not None else 2
    pooled = 1.0 / (0.4**2 + 0.6**2)
    sizes = seen * pooled, 2 * pooled
    grown = extrapolate(0.4 * few + 0.6 * many, together, growth(seen, *sizes))
    assert (folds is None) == np.allclose(grown, together)
    # What is left is the pool's own, of supports by the same scales.
    power = agreement / growth(1.0, *sizes)
    log = np.append(np.log(found.scale) + together - grown, power)
    np.testing.assert_allclose(log, pool.best(pool.supports(log)), atol=5e-3)
    assert power > 0.05
    assert (found.shift, found.sharpness) == ((0.0, 0.0), 1.0)


def test_scale_of_a_pool_follows_from_those_of_smaller_ones():
    """Members N(truth + b e, w^2) of a target of variance 1: the oracle is a pool of twelve."""
    rng = np.random.default_rng(3)
    n, width, apart = 40_000, 0.8, 0.6
    y, errors = rng.normal(size=n), apart * rng.normal(size=[12, n])

    def best(members):
        def nll(log):
            each = stats.norm.logpdf(y, errors[:members], np.exp(log) * width)
            return -(special.logsumexp(each, axis=0) - np.log(members)).mean()

        return optimize.minimize_scalar(nll, bounds=(-1.5, 1.5), method="bounded").x

    alone, together, truth = (np.array([best(m)]) for m in (1, 4, 12))
    assert extrapolate(alone, together, growth(1.0, 4.0, 12.0)) == pytest.approx(truth, abs=0.03)
    assert abs(together - truth) > 0.05
    assert growth(1.0, 1.1, 12.0) == 2.0
    capped = extrapolate(alone, together, 2.0)
    assert np.exp(2 * capped) == pytest.approx(
        np.maximum(2.0 * np.exp(2 * together) - np.exp(2 * alone), 0.09 * np.exp(2 * alone))
    )


def test_what_cannot_be_seen_is_left(ensembles, data):
    both = {"few": 0.5, "many": 0.5}
    assert pooled_spread(ensembles, {"few": 1.0}, data, FOLDS) == (None, 0.0)
    assert pooled_spread(ensembles, {"few": 0.95, "many": 0.05}, data, FOLDS) == (None, 0.0)
    few = Data(data.train, data.validation.take(np.arange(9)), data.validation, (), ())
    assert pooled_spread(ensembles, both, few, None) == (None, 0.0)
    learned = Data(data.train, data.train, data.train, (), ())
    assert pooled_spread(ensembles, both, learned, None) == (None, 0.0)
    # A window in which a target does not move is no reason to fail.
    still = Rows(X[:60], np.stack([np.zeros(60), Y[:60, 1]], axis=1))
    still_data = Data(still, still.take(np.arange(50)), still, (), ())
    spread, agreement = pooled_spread(ensembles, both, still_data, None)
    assert spread is not None
    assert np.isfinite([*spread.scale, agreement]).all()


def test_many_large_members_are_judged_by_few_rows(data):
    large = types.SimpleNamespace(members=30, head=types.SimpleNamespace(params_size=10**6))
    folds = np.tile(np.arange(300, 400), [30, 1])
    for known in (None, folds):
        rows, own = _held_out_rows([large, large], data, known)
        assert len(rows) == 20
        assert own is None or all(len(rows) == 20 for rows in own)


def test_agreement_on_one_of_two_modes(monkeypatch):
    """Both members have the right mode, and each a wrong one of its own of the same weight."""
    n, sd = 600, 0.1
    y = sd * RNG.normal(size=n)
    rows = np.arange(n)

    def member(wrong):
        loc = np.stack([np.zeros(n), wrong], axis=1)[..., np.newaxis]
        return mdn.GaussianMixture.from_diag(np.zeros([n, 2]), loc, np.full([n, 2, 1], sd))

    parts = [(rows, member(RNG.normal(size=n) + sign * 6.0)) for sign in (-1.0, 1.0)]
    held_out = HeldOut(parts, y[:, None], y[:, None], np.ones(1), np.ones(n))
    (_, power), variance = fit_spread(held_out)
    # The right mode has twice the density of a wrong one, so that 2^(1 + power) : 1 are the odds:
    # the more, the better, up to the end of the search.
    assert power == MOST_AGREEMENT
    assert shrink(np.array([power]), variance[-1:])[0] > 0.9 * power
    monkeypatch.setattr("mdn.spread.MOST_UNROLLED", 0)  # as of many targets
    monkeypatch.setattr(
        "mdn.spread._held_out_rows", lambda *_: (types.SimpleNamespace(x=0, y=0, weight=0), None)
    )
    monkeypatch.setattr("mdn.spread.hold_out", lambda *_: held_out)
    ensemble = types.SimpleNamespace(members=5)
    data = types.SimpleNamespace(train=0, validation=1)
    assert (
        pooled_spread({"a": ensemble, "b": ensemble}, {"a": 0.5, "b": 0.5}, data, None)[1] == 0.0
    )


def test_one_wild_row_is_in_doubt():
    y = RNG.normal(size=[1000, 1])
    y[0] = 60.0
    one = normals(np.zeros(1000), np.ones(1000))
    log, variance = fit_spread(HeldOut([(np.arange(1000), one)], y, y, np.ones(1), np.ones(1000)))
    assert log[0] > 0.5
    assert variance[0] > 0.1  # a sandwich: of the curvature alone it would be .0005
    assert shrink(log, variance)[0] < 0.8 * log[0]


@pytest.mark.parametrize("kind", [heads.Mixture, heads.MixtureDiag, heads.MixturePrecision])
@pytest.mark.parametrize("background", [0.0, 0.01, "learned"])
def test_the_way_of_training_has_the_map_too(kind, background):
    head = kind(2, 3, background=background, target_transform=[None, "log"])
    y = np.stack([Y[:20, 0], np.exp(Y[:20, 1])], axis=1).astype(np.float32)
    head.adapt(y)
    hidden = tf.constant(RNG.normal(size=[20, 5]), tf.float32)
    plain = head(hidden).log_prob(y)
    for kept in {0, head.fixed_components}:
        head.recalibration = Recalibration((0.3, -0.1), (0.5, 2.0), 3.0, kept)
        density = head(hidden)
        expected = density.log_prob(y)
        assert np.abs(expected - plain).max() > 0.1
        np.testing.assert_allclose(head.log_prob(hidden, y), expected, rtol=1e-4, atol=1e-5)
        any_rows = tf.TensorSpec([None, 5]), tf.TensorSpec([None, 2])
        exported = tf.function(head.log_prob, autograph=False).get_concrete_function(*any_rows)
        np.testing.assert_allclose(exported(hidden, y), expected, rtol=1e-4, atol=1e-5)


def test_a_background_stays_as_it_is():
    head = heads.Mixture(2, 3, background=0.01)
    head.adapt(Y)
    hidden = tf.constant(RNG.normal(size=[20, 5]), tf.float32)
    before = head(hidden)
    head.recalibration = Recalibration((0.0, 0.0), (0.5, 2.0), 3.0, kept=1)
    after = head(hidden)
    for name in ("logits", "loc", "scale_tril"):
        was, now = (np.asarray(d.tensors()[name]) for d in (before, after))
        if name == "logits":
            was, now = special.softmax(was, axis=-1), special.softmax(now, axis=-1)
            others = was[:, :3] ** 3.0
            expected = 0.99 * others / others.sum(axis=-1, keepdims=True)
            np.testing.assert_allclose(now[:, :3], expected, rtol=1e-4)
        np.testing.assert_allclose(now[:, 3], was[:, 3], rtol=1e-5)
    rows = np.array([[0.5], [2.0]])
    scale_tril = before.scale_tril[:, :3] * rows
    np.testing.assert_allclose(after.scale_tril[:, :3], scale_tril, rtol=1e-6)
    params = head.parameters(after)
    np.testing.assert_allclose(
        head.distribution(params).log_prob(Y[:20].astype(np.float32)),
        after.log_prob(Y[:20].astype(np.float32)),
        rtol=1e-4,
    )


def test_members_of_a_stack_keep_their_spread(ensembles, tmp_path):
    members = [e.member(m).predict_distribution(X) for e in ensembles.values() for m in range(2)]
    shares = [0.2, 0.2, 0.3, 0.3]
    weights = {"few": 0.4, "many": 0.6}
    spread = Recalibration((0.0, 0.0), (0.8, 1.1), 1.5)
    model = stack(ensembles, weights, spread)
    y = Y.astype(np.float32)
    expected = mixture_of([spread.apply(member) for member in members], shares).log_prob(y)
    np.testing.assert_allclose(model.log_prob(X, Y), expected, rtol=1e-4, atol=1e-5)
    wide = mixture_of(members, shares).log_prob(y)
    assert np.abs(wide - expected).max() > 0.05

    model.save(tmp_path / "model.keras")
    again = mdn.load(tmp_path / "model.keras")
    np.testing.assert_allclose(again.log_prob(X, Y), expected, rtol=1e-4, atol=1e-5)
    export_saved_model(model, tmp_path / "saved")
    serving = tf.saved_model.load(str(tmp_path / "saved")).signatures["log_prob"]
    x, y = (tf.constant(v, tf.float32) for v in (X, Y))
    np.testing.assert_allclose(serving(x=x, y=y)["log_prob"], expected, rtol=1e-4, atol=1e-5)

    # A map of the whole comes on top, and goes without taking theirs.
    model.recalibrate(X, Y)
    model.set_recalibration(None)
    np.testing.assert_allclose(model.log_prob(X, Y), expected, rtol=1e-4, atol=1e-5)
    alone = stack(ensembles, {"few": 1.0}, spread)
    assert alone is ensembles["few"]
    assert alone.head.recalibration == spread
    for one in ensembles.values():
        one.set_recalibration(None)
