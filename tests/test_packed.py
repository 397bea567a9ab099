"""The log density that training uses: equal to that of the distribution, and so its gradient."""

import numpy as np
import pytest
import tensorflow as tf

from mdn.density.packed import _rows, lane_sums, packed_order
from mdn.density.positivity import POSITIVITY
from mdn.heads import Diag, Mixture, MixtureDiag, MixtureLowRank, MixturePrecision, TriL

HEADS = {
    Diag: {},
    TriL: {},
    Mixture: {"components": 3},
    MixtureDiag: {"components": 3},
    MixturePrecision: {"components": 3},
    MixtureLowRank: {"components": 3, "rank": 2},
}


@pytest.mark.parametrize("d", [1, 2, 3, 5, 8, 11])
def test_packed_order_is_the_diagonal_and_then_the_rows_below(d):
    import tensorflow_probability as tfp

    packed = np.random.default_rng(0).standard_normal([4, d * (d + 1) // 2])
    triangle = tfp.math.fill_triangular(packed).numpy()  # [4, D, D]
    found = packed[:, packed_order(d)]
    np.testing.assert_array_equal(found[:, :d], np.einsum("bii->bi", triangle))
    rows = _rows(tf.constant(found[:, d:, np.newaxis, np.newaxis]))
    assert len(rows) == d
    for i, row in enumerate(rows):
        np.testing.assert_array_equal(row[..., 0, 0], triangle[:, i, :i])


@pytest.mark.parametrize("n", [1, 7, 8, 61, None])
def test_sums_in_lanes_are_sums(n):
    rows = np.random.default_rng(0).standard_normal([2, 3, n or 20])
    function = tf.function(lane_sums, input_signature=[tf.TensorSpec([2, 3, n], tf.float64)])
    np.testing.assert_allclose(function(rows), rows.sum(axis=-1), rtol=0, atol=1e-14)


@pytest.mark.parametrize("positivity", POSITIVITY)
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("leading", [[7], [3, 4]])
@pytest.mark.parametrize("d", [1, 2, 10])
def test_log_prob_and_gradient_equal_those_of_the_distribution(kind, leading, d, positivity):
    rng = np.random.default_rng(0)
    head = kind(d, positivity=positivity, dtype="float64", **HEADS[kind])
    head.adapt(rng.normal(50.0, 3.0, size=[64, d]) * np.linspace(1.0, 9.0, d))
    hidden = tf.constant(rng.standard_normal([*leading, 6]))
    head(hidden)
    head.kernel.assign(0.3 * rng.standard_normal(head.kernel.shape))
    y = tf.constant(rng.normal(50.0, 3.0, size=[*leading, d]))
    upstream = rng.standard_normal(leading)
    variables = [head.kernel, head.bias]
    results = []
    for log_prob in (lambda: head.log_prob(hidden, y), lambda: head(hidden).log_prob(y)):
        with tf.GradientTape() as tape:
            tape.watch(hidden)
            value = log_prob()
            total = tf.reduce_sum(upstream * value)
        results.append([value, *tape.gradient(total, [hidden, *variables])])
    for packed, plain in zip(*results, strict=True):
        assert packed.shape == plain.shape
        np.testing.assert_allclose(packed, plain, rtol=0, atol=1e-11 * np.abs(plain).max())
