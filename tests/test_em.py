"""EM against closed forms, direct maximisation, scikit-learn, and its own monotonicity."""

import numpy as np
import pytest
from scipy import optimize, stats
from sklearn import mixture

from mdn.errors import DataError
from mdn.fitting import em
from mdn.fitting.em import fit_mixture
from mdn.fitting.start import Start


def draw(n, seed=0, d=3, k=3):
    """Return rows of a mixture whose components overlap."""
    rng = np.random.default_rng(seed)
    loc = 2.0 * rng.standard_normal((k, d))
    factor = rng.standard_normal((k, d, d)) * 0.5 + 0.5 * np.eye(d)
    component = rng.integers(k, size=n)
    noise = rng.standard_normal((n, d))
    return 100.0 + 5.0 * (loc[component] + np.einsum("nij,nj->ni", factor[component], noise))


def log_prob(y, weights, loc, covariance):
    """Return the log density of rows [N, D] of which NaN entries are marginalised, by scipy."""
    out = []
    for row in y:
        seen = np.flatnonzero(~np.isnan(row))
        parts = [
            w * stats.multivariate_normal(m[seen], c[np.ix_(seen, seen)]).pdf(row[seen])
            for w, m, c in zip(weights, loc, covariance, strict=True)
        ]
        out.append(np.log(np.sum(parts)))
    return np.array(out)


def test_one_component_is_the_closed_form():
    y = draw(500)
    found = fit_mixture(y, tolerance=1e-14)
    np.testing.assert_allclose(found.loc[0], y.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance[0], np.cov(y.T, bias=True), rtol=1e-9)
    assert found.converged
    assert len(found.nll) <= 3


def test_one_component_with_missing_entries_is_a_stationary_point():
    y = draw(60, d=2)
    y[:20, 1] = np.nan
    y[20:30, 0] = np.nan
    found = fit_mixture(y, tolerance=1e-15)

    def nll(values):
        factor = np.array([[values[2], 0.0], [values[3], values[4]]])
        return -log_prob(y, [1.0], [values[:2]], [factor @ factor.T]).sum()

    factor = np.linalg.cholesky(found.covariance[0])
    start = np.array([*found.loc[0], factor[0, 0], factor[1, 0], factor[1, 1]])
    np.testing.assert_allclose(nll(start) / len(y), found.nll[-1], rtol=1e-9)
    best = optimize.minimize(nll, start + 0.1, method="BFGS")
    np.testing.assert_allclose(best.x, start, rtol=1e-4)


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("diagonal", [False, True])
def test_a_step_is_textbook_em(missing, diagonal):
    y = draw(40, d=2, k=2)
    if missing:
        y[:10, 0] = np.nan
        y[10:15, 1] = np.nan
    origin, unit = np.nanmean(y, axis=0), np.nanstd(y, axis=0)
    z = (y - origin) / unit
    loc = np.array([[-0.5, 0.0], [0.5, 0.3]])
    scale = np.array([[[1.0, 0.0], [0.0 if diagonal else 0.3, 0.8]], [[0.7, 0.0], [0.0, 0.9]]])
    start = Start(np.array([0.4, 0.6]), loc, scale)
    found = fit_mixture(y, 2, diagonal=diagonal, start=start, max_steps=1, tolerance=1e-12)
    weights, covariance = start.weights, scale @ scale.swapaxes(1, 2)
    share, first, second = np.zeros(2), np.zeros((2, 2)), np.zeros((2, 2, 2))
    for row in z:
        seen, gone = np.flatnonzero(~np.isnan(row)), np.flatnonzero(np.isnan(row))
        joint = np.array(
            [
                weights[k]
                * stats.multivariate_normal(loc[k][seen], covariance[k][np.ix_(seen, seen)]).pdf(
                    row[seen]
                )
                for k in range(2)
            ]
        )
        for k, r in enumerate(joint / joint.sum()):
            full, extra = row.copy(), np.zeros((2, 2))
            if len(gone):
                gain = covariance[k][np.ix_(gone, seen)] @ np.linalg.inv(
                    covariance[k][np.ix_(seen, seen)]
                )
                full[gone] = loc[k][gone] + gain @ (row[seen] - loc[k][seen])
                extra[np.ix_(gone, gone)] = (
                    covariance[k][np.ix_(gone, gone)] - gain @ covariance[k][np.ix_(seen, gone)]
                )
            share[k] += r
            first[k] += r * full
            second[k] += r * (np.outer(full, full) + extra)
    mean = first / share[:, None]
    expected = second / share[:, None, None] - mean[:, :, None] * mean[:, None]
    if diagonal:
        expected = expected * np.eye(2)
    np.testing.assert_allclose(found.weights, share / len(y), rtol=1e-9)
    np.testing.assert_allclose((found.loc - origin) / unit, mean, rtol=1e-8)
    np.testing.assert_allclose(
        found.covariance / np.outer(unit, unit), expected, rtol=1e-8, atol=1e-12
    )


def test_each_step_gains_and_the_nll_is_that_of_scipy():
    y = draw(300)
    y[:50, 1] = np.nan
    found = fit_mixture(y, 3, restarts=2, floor=1e-3)
    assert (np.diff(found.nll) <= 1e-10).all()
    again = -log_prob(y, found.weights, found.loc, found.covariance).mean()
    assert found.nll[-1] == pytest.approx(again, abs=1e-5)


def test_reaches_the_optimum_of_scikit_learn():
    y = draw(4000)
    ours = fit_mixture(y, 3, floor=1e-3, tolerance=1e-8)
    peer = mixture.GaussianMixture(3, n_init=5, tol=1e-8, max_iter=2000, random_state=0).fit(y)
    assert ours.nll[-1] <= -peer.score(y) + 1e-5


def test_weights_are_repetitions():
    y = draw(200, d=2)
    weight = np.arange(200) % 3
    start = Start(np.full(2, 0.5), np.array([[-1.0, 0.0], [1.0, 0.0]]), np.stack([np.eye(2)] * 2))
    repeated = np.repeat(y, weight, axis=0)
    options = {"start": start, "tolerance": 1e-12, "max_steps": 5000}
    weighted, plain = (
        fit_mixture(y, 2, weight=weight, **options),
        fit_mixture(repeated, 2, **options),
    )
    assert weighted.nll[-1] == pytest.approx(plain.nll[-1], abs=1e-8)
    np.testing.assert_allclose(weighted.loc, plain.loc, rtol=1e-4)


@pytest.mark.parametrize("floor", [0.01, 0.1])
def test_no_component_shrinks_onto_a_row(floor):
    rng = np.random.default_rng(0)
    y = np.concatenate([rng.standard_normal((200, 2)), np.tile([[3.0, 3.0]], (40, 1))])
    found = fit_mixture(y, 4, floor=floor)
    unit = y.std(axis=0)
    smallest = np.linalg.eigvalsh(found.covariance / np.outer(unit, unit)).min()
    assert smallest == pytest.approx(floor**2, rel=1e-6)  # it wanted to
    assert np.isfinite(found.nll).all()


def test_columns_that_determine_each_other_are_fitted():
    y = draw(200, d=2)
    found = fit_mixture(np.column_stack([y, y.sum(axis=1)]))
    assert np.isfinite(found.nll[-1])
    np.linalg.cholesky(found.covariance[0])


def test_many_rows_are_summed_in_blocks(monkeypatch):
    y = draw(500)
    whole = fit_mixture(y, 2, restarts=1)
    monkeypatch.setattr(em, "_BLOCK", 64)
    monkeypatch.setattr(em, "_MOST_BYTES", 0)
    blocks = fit_mixture(y, 2, restarts=1)
    np.testing.assert_allclose(blocks.nll, whole.nll, rtol=1e-10)


def test_nothing_observed_is_refused():
    with pytest.raises(DataError, match="no row has an observed target"):
        fit_mixture(np.full((3, 2), np.nan))
