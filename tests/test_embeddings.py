"""The piecewise-linear encoding: its numbers, its bins, and its way into what is saved."""

import numpy as np
import pytest
import tensorflow as tf

import mdn
from mdn.embeddings import PiecewiseLinear, bin_edges
from mdn.errors import ConfigError, DataError

RNG = np.random.default_rng(0)
FLAT = np.r_[np.zeros(80), np.arange(20.0)]  # most of whose rows are one value
X = np.column_stack(
    [RNG.normal(size=100), np.ones(100), np.arange(100) % 2, np.arange(100) % 3, FLAT]
)


def adapted(bins=4):
    layer = PiecewiseLinear(bins)
    layer.adapt(X)
    return layer


def test_encoding_is_the_share_of_each_bin_that_lies_behind():
    layer = adapted()
    out = layer(X).numpy()
    np.testing.assert_allclose(out[:, :5], X, rtol=1e-6)
    assert layer.output_size == out.shape[1]
    assert list(layer.columns) == [0] * 4 + [3] * 2 + [4] * 4  # not of flags and constants
    edges = np.quantile(X[:, 0], [0, 0.25, 0.5, 0.75, 1], method="nearest")
    for t in range(4):  # by interpolation, which knows nothing of clipping
        expected = np.interp(X[:, 0], edges[t : t + 2], [0.0, 1.0])
        np.testing.assert_allclose(out[:, 5 + t], expected, atol=1e-5)
    np.testing.assert_allclose(out[:, 9:11], np.stack([X[:, 3] >= 1, X[:, 3] >= 2], 1))
    assert np.isfinite(out).all()
    assert not out[:, 11:14].any()  # bins between equal quantiles


def test_any_function_with_those_knots_is_linear_in_the_encoding():
    layer = adapted()
    knots = bin_edges(X[:, 0].astype(np.float32), 4)
    y = np.interp(X[:, 0], knots, [3.0, -1.0, 2.0, 2.0, 0.0])
    design = np.column_stack([np.ones(100), layer(X).numpy()[:, 5:9]])
    residual = y - design @ np.linalg.lstsq(design, y, rcond=None)[0]
    np.testing.assert_allclose(residual, 0.0, atol=1e-5)


def test_beyond_the_train_rows_the_encoding_stays():
    layer = adapted()
    far = np.repeat(X[:1], 2, axis=0)
    far[:, 0] = [-50.0, 50.0]
    np.testing.assert_array_equal(layer(far).numpy()[:, 5:9], [[0] * 4, [1] * 4])


def test_few_values_are_the_edges():
    np.testing.assert_array_equal(bin_edges(np.array([2.0, 1.0, 1.0, 5.0]), 16), [1.0, 2.0, 5.0])
    assert len(bin_edges(RNG.normal(size=1000), 16)) == 17


def test_padded_steps_are_no_rows():
    x = RNG.normal(size=[40, 5, 1])
    padded = np.concatenate([x, np.full([40, 9, 1], np.nan)], axis=1)
    edges = []
    for rows in (x, padded):
        head, backbone = mdn.heads.TriL(1), mdn.backbones.LSTM([4])
        model = mdn.MDN(head, backbone, embedding=PiecewiseLinear(4))
        model.adapt(rows, np.nan_to_num(rows) + RNG.normal(size=rows.shape))
        edges.append(model.embedding.edge.numpy())
    np.testing.assert_allclose(edges[1], edges[0], rtol=1e-5)


def test_adapting_again_keeps_the_layout_or_refuses():
    layer = adapted()
    layer.adapt(X[::-1] * 2.0)
    np.testing.assert_allclose(
        layer(2.0 * X).numpy()[:, 5:], adapted()(X).numpy()[:, 5:], atol=1e-5
    )
    with pytest.raises(DataError, match="make a new model"):
        layer.adapt(X[:, :4])
    with pytest.raises(ConfigError, match="bins=1"):
        PiecewiseLinear(1)


def make_model(**kwargs):
    head = mdn.heads.Mixture(1, 2)
    return mdn.MDN(head, mdn.backbones.MLP([8]), embedding=PiecewiseLinear(4), **kwargs)


@pytest.mark.parametrize("columns", [False, True])
def test_the_embedding_is_saved_with_the_model(tmp_path, columns):
    y = X[:, :1] + RNG.normal(size=[100, 1])
    x = X
    if columns:
        x = {"a": X[:, 0], "b": np.array(["u", "v"] * 50, object)}
    model = make_model()
    model.adapt(x, y)
    assert model.backbone.weights[0].shape[0] == model.embedding.output_size
    model.save(tmp_path / "model.keras")
    loaded = mdn.load(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded.log_prob(x, y), model.log_prob(x, y), rtol=1e-6)


def test_an_ensemble_embeds_once_for_all(tmp_path):
    y = X[:, :1] + RNG.normal(size=[100, 1])
    ensemble = mdn.Ensemble(make_model(), members=2)
    ensemble.adapt(X, y)
    density = mdn.mixture_of([ensemble.member(m)(X.astype(np.float32)) for m in range(2)])
    expected = density.log_prob(y.astype(np.float32))
    np.testing.assert_allclose(ensemble.log_prob(X, y), expected, rtol=1e-4, atol=1e-4)
    ensemble.save(tmp_path / "ensemble.keras")
    loaded = mdn.load(tmp_path / "ensemble.keras")
    np.testing.assert_allclose(loaded.log_prob(X, y), expected, rtol=1e-4, atol=1e-4)


def test_the_export_embeds(tmp_path):
    from mdn.export import export_saved_model

    model = make_model()
    model.adapt(X, X[:, :1])
    export_saved_model(model, tmp_path / "saved")
    loaded = tf.saved_model.load(str(tmp_path / "saved"))
    found = loaded.signatures["log_prob"](
        x=tf.constant(X, tf.float32), y=tf.constant(X[:, :1], tf.float32)
    )["log_prob"]
    np.testing.assert_allclose(found, model.log_prob(X, X[:, :1]), rtol=1e-4, atol=1e-4)
