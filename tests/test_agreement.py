"""Components that count by what the whole mixture says of them: `mdn.density.agreement`."""

import numpy as np
import pytest
import tensorflow as tf
from scipy import special, stats
from tensorflow_probability import bijectors as tfb

import mdn
from mdn.density import agreement
from mdn.density.agreement import BLOCK, agree, support
from mdn.density.transformed import Transformed

RNG = np.random.default_rng(0)
B, K, D = 3, BLOCK + 3, 2  # a block, and a part of one
LOGITS, LOC = RNG.normal(size=[B, K]), RNG.normal(size=[B, K, D])
DIAG = np.exp(RNG.normal(size=[B, K, D]))
FACTOR = RNG.normal(size=[B, K, D, 1])
TRIL = np.tril(0.3 * RNG.normal(size=[B, K, D, D]), -1) + tf.linalg.diag(DIAG).numpy()
KEPT = np.arange(K) == 4


DENSITIES = {
    "full": mdn.GaussianMixture(LOGITS, LOC, TRIL),
    "diag": mdn.GaussianMixture.from_diag(LOGITS, LOC, DIAG),
    "low_rank": mdn.GaussianMixture.from_low_rank(LOGITS, LOC, DIAG, FACTOR),
    "precision": mdn.GaussianMixture.from_precision_tril(LOGITS, LOC, TRIL),
}


def log_density(density, row, points):
    """Return the log density of one row of a mixture by SciPy, [n]."""
    weight = special.log_softmax(density.logits[row])
    covariance = density.components_distribution.covariance().numpy()[row]
    each = [
        w + stats.multivariate_normal.logpdf(points, loc, cov)
        for w, loc, cov in zip(weight, density.loc.numpy()[row], covariance, strict=True)
    ]
    return special.logsumexp(each, axis=0)


@pytest.mark.parametrize("unrolled", [0, 8])
@pytest.mark.parametrize("name", DENSITIES)
def test_weights_grow_by_the_density_at_the_means(name, unrolled, monkeypatch):
    monkeypatch.setattr(agreement, "MOST_UNROLLED", unrolled)
    density = DENSITIES[name]
    found = agree(density, 0.7, KEPT)
    assert type(found) is type(density)
    for row in range(B):
        at_means = log_density(density, row, LOC[row])
        np.testing.assert_allclose(support(density)[row], at_means, rtol=1e-9)
        before = special.softmax(LOGITS[row])
        expected = np.where(KEPT, 0.0, before * np.exp(0.7 * at_means))
        expected *= before[~KEPT].sum() / expected.sum()
        expected[KEPT] = before[KEPT]
        np.testing.assert_allclose(special.softmax(found.logits[row]), expected, rtol=1e-9)
    for tensor, other in density.tensors().items():
        if tensor != "logits":
            np.testing.assert_array_equal(found.tensors()[tensor], other)


def test_no_power_leaves_the_density():
    density = DENSITIES["full"]
    y = RNG.normal(size=[B, D])
    np.testing.assert_allclose(agree(density, 0.0, KEPT).log_prob(y), density.log_prob(y))


def test_transformed_targets_are_weighed_in_their_own_units():
    density = DENSITIES["full"]
    exp = tfb.Exp()
    found, y = agree(Transformed(density, exp), 0.7, KEPT), np.exp(RNG.normal(size=[B, D]))
    expected = Transformed(agree(density, 0.7, KEPT), exp)
    np.testing.assert_allclose(found.log_prob(y), expected.log_prob(y))


def test_hopeless_components_stay_numbers():
    """In float32 the density at a mean far from all others, of hardly any weight, is nothing."""
    loc = np.array([0.0, 1.0, 900.0, -3000.0])[:, np.newaxis]
    logits = np.array([0.0, 0.0, -300.0, -150.0])
    scale = np.array([1.0, 1.0, 1.0, 1e4])[:, np.newaxis]
    for dtype in (np.float32, np.float64):
        pool = mdn.GaussianMixture.from_diag(*(a.astype(dtype) for a in (logits, loc, scale)))
        at_means = [
            special.logsumexp(
                special.log_softmax(logits) + stats.norm.logpdf(m, loc[:, 0], scale[:, 0])
            )
            for m in loc[:, 0]
        ]
        floor = max(at_means) - agreement.FLOOR
        assert sum(value < floor for value in at_means) == 2
        found = np.maximum(support(pool), floor)
        np.testing.assert_allclose(found, np.maximum(at_means, floor), rtol=1e-5)
        weight = special.log_softmax(logits) + 2.0 * np.maximum(at_means, floor)
        np.testing.assert_allclose(
            tf.nn.log_softmax(agree(pool, 2.0, np.zeros(4, bool)).logits),
            special.log_softmax(weight),
            rtol=1e-4,
        )


def test_the_mode_that_two_share_wins():
    """One of two modes is in both densities, the others in one each: as of a product."""
    loc = np.array([0.0, -5.0, 0.1, 5.0])[:, np.newaxis]
    pool = mdn.GaussianMixture.from_diag(np.zeros(4), loc, np.full([4, 1], 0.5))
    weight = special.softmax(agree(pool, 6.0, np.zeros(4, bool)).logits)
    assert weight[[0, 2]].sum() > 0.98
    assert weight[0] == pytest.approx(weight[2])


def test_it_has_a_gradient():
    logits = tf.constant(LOGITS)
    with tf.GradientTape() as tape:
        tape.watch(logits)
        pool = mdn.GaussianMixture(logits, LOC, TRIL)
        score = tf.reduce_sum(agree(pool, 0.7, KEPT).log_prob(tf.zeros([B, D], tf.float64)))
    assert np.isfinite(tape.gradient(score, logits)).all()
