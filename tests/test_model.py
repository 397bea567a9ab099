"""MDN as a Keras model: training, weights, masks, missing targets, saving, wrong inputs."""

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
import tf_keras

import mdn
from mdn.backbones import LSTM, MLP


def rows(n=256, d=2, seed=0):
    """Return x [N, 3] and y [N, D] = linear in x plus noise, in units of their own."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=[n, 3]) * [1.0, 10.0, 0.1] + [0.0, 50.0, 3.0]
    y = (x - [0.0, 50.0, 3.0]) @ rng.normal(size=[3, d]) + 0.1 * rng.normal(size=[n, d])
    return x, 30.0 * y - 7.0


def make(x, y, head=None, backbone=None, jit_compile=False, **kwargs):
    tf_keras.utils.set_random_seed(0)
    model = mdn.MDN(head or mdn.heads.Mixture(y.shape[-1], 2), backbone or MLP([16]))
    model.adapt(x, y)
    if not jit_compile:  # to trace a step takes as long as dozens do
        kwargs = {"run_eagerly": True} | kwargs
    model.compile(tf_keras.optimizers.Adam(0.01), jit_compile=jit_compile, **kwargs)
    return model


def mean_nll(model, x, y):
    return -float(tf.reduce_mean(model(tf.constant(x, tf.float32)).log_prob(y.astype(np.float32))))


@pytest.mark.parametrize("jit_compile", [False, True])
def test_fit_lowers_the_nll_and_reports_it_exactly(jit_compile):
    x, y = rows()
    model = make(x, y, jit_compile=jit_compile, run_eagerly=False)
    before = mean_nll(model, x, y)
    history = model.fit(x, y, batch_size=64, epochs=15, verbose=0).history
    assert history["loss"][-1] < before - 1.0
    loss = model.evaluate(x, y, batch_size=100, verbose=0, return_dict=True)["loss"]
    assert loss == pytest.approx(mean_nll(model, x, y), rel=1e-5)


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize(
    "kind", [mdn.heads.Mixture, mdn.heads.MixturePrecision, mdn.heads.MixtureLowRank]
)
def test_xla_takes_a_batch_size_that_is_not_static(kind, missing):
    x, y = rows(100)
    if missing:
        y[::3, 0] = np.nan
    model = make(x, y, kind(2), jit_compile=True)
    history = model.fit(x, y, batch_size=64, epochs=2, verbose=0).history  # 64 rows and 36
    assert history["loss"][1] < history["loss"][0]


def test_xla_trains_as_the_plain_loop_does():
    x, y = rows()
    losses = [
        make(x, y, jit_compile=jit, run_eagerly=False)
        .fit(x, y, shuffle=False, epochs=3, verbose=0)
        .history["loss"]
        for jit in (False, True)
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


def test_answers_for_many_rows():
    x, y = rows()
    model = make(x, y)
    density = model.predict_distribution(x, batch_size=100)
    assert isinstance(density, mdn.GaussianMixture)
    assert all(
        isinstance(v, np.ndarray) for k, v in density.parameters.items() if k in density.tensors()
    )
    direct = model(tf.constant(x, tf.float32))
    np.testing.assert_allclose(
        density.log_prob(y.astype("f")), direct.log_prob(y.astype("f")), rtol=1e-4
    )
    np.testing.assert_allclose(model.predict(x, verbose=0), direct.mean(), rtol=1e-4)
    np.testing.assert_array_equal(model.predict(x, verbose=0), model.predict(x, verbose=0))


def test_batch_and_event_shapes():
    x, y = rows()
    density = make(x, y)(np.zeros([4, 3], np.float32))
    assert density.batch_shape == [4]
    assert density.event_shape == [2]


def test_row_weights_act_as_repetition():
    x, y = rows(64)
    weight = np.random.default_rng(1).integers(0, 3, size=64).astype(np.float64)
    repeated = np.repeat(np.arange(64), weight.astype(int))

    def gradient_step(x, y, weight):
        model = make(*rows(64))
        model.compile(tf_keras.optimizers.SGD(1e-3), run_eagerly=True)
        model.fit(x, y, sample_weight=weight, batch_size=len(x), epochs=1, verbose=0)
        return np.concatenate([w.ravel() for w in model.get_weights()])

    # Weights of mean one leave the learning rate as it is.
    one = gradient_step(x, y, weight / weight.mean())
    two = gradient_step(x[repeated], y[repeated], None)
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6)


def test_rows_without_a_target_and_missing_entries_count_as_they_should():
    x, y = rows(64)
    y[::4] = np.nan
    y[1::4, 0] = np.nan
    model = make(x, y)
    loss = model.evaluate(x, y, batch_size=64, verbose=0, return_dict=True)["loss"]
    seen = ~np.isnan(y).all(axis=1)
    assert loss == pytest.approx(mean_nll(model, x[seen], y[seen]), rel=1e-5)
    model.fit(x, y, epochs=1, verbose=0)
    assert all(np.isfinite(w).all() for w in model.get_weights())


@pytest.mark.parametrize("return_sequences", [True, False])
def test_padding_counts_nothing(return_sequences):
    rng = np.random.default_rng(0)
    x = rng.normal(size=[32, 6, 3]).astype(np.float32)
    y = rng.normal(size=[32, 6, 2])
    short = rng.integers(2, 7, size=32)
    padded = np.arange(6) >= short[:, None]
    x[padded] = np.nan
    y = y if return_sequences else y[:, 0]
    # whatever stands in the targets of padded steps
    garbage = np.where(padded[..., None], 1e3, y) if return_sequences else y
    model = make(x, garbage, backbone=LSTM([8], return_sequences=return_sequences))
    seen = y[~padded] if return_sequences else y
    np.testing.assert_allclose(model.head.y_scale, seen.std(axis=0), rtol=1e-5)

    def scores(x, y):
        return model.evaluate(x, y, batch_size=32, verbose=0, return_dict=True)["loss"]

    assert scores(x, garbage) == pytest.approx(scores(x, y), rel=1e-6)
    # nor does it matter how long the padding is
    longer = np.concatenate([x, np.full([32, 2, 3], np.nan, np.float32)], axis=1)
    longer_y = np.concatenate([y, np.full([32, 2, 2], np.nan)], axis=1) if return_sequences else y
    assert scores(longer, longer_y) == pytest.approx(scores(x, y), rel=1e-5)
    # and the loss is the mean over the real steps
    log_prob = model(x).log_prob(y.astype(np.float32)).numpy()
    expected = -(log_prob[~padded] if return_sequences else log_prob).mean()
    assert scores(x, y) == pytest.approx(expected, rel=1e-5)
    history = model.fit(x, garbage, epochs=2, verbose=0).history
    assert np.isfinite(history["loss"]).all()


def test_columns_train_and_predict(tmp_path):
    rng = np.random.default_rng(0)
    columns = {
        "size": rng.normal(size=200),
        "colour": rng.choice(np.array(["red", "blue"], object), size=200),
    }
    y = np.where(columns["colour"] == "red", 5.0, -5.0)[:, None] + 0.1 * rng.normal(size=[200, 1])
    model = make(columns, y, mdn.heads.Diag(1), run_eagerly=False)
    model.fit(columns, y, epochs=40, verbose=0, validation_data=(columns, y))
    prediction = model.predict(
        {"size": np.zeros(2), "colour": np.array(["red", "blue"], object)}, verbose=0
    )
    np.testing.assert_allclose(prediction[:, 0], [5.0, -5.0], atol=1.0)
    model.save(tmp_path / "m.keras")
    np.testing.assert_allclose(
        mdn.load(tmp_path / "m.keras").predict(columns, verbose=0),
        model.predict(columns, verbose=0),
    )


def test_bfloat16_backbone_keeps_a_float32_density():
    x, y = rows()
    tf_keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        backbone = MLP([16], dropout=0.1, layer_norm=True)
        model = make(x, y, backbone=backbone, run_eagerly=False)
    finally:
        tf_keras.mixed_precision.set_global_policy("float32")
    before = mean_nll(model, x, y)
    model.fit(x, y, epochs=15, verbose=0)
    density = model(tf.constant(x, tf.float32))
    assert density.dtype == tf.float32
    assert model.backbone(tf.ones([1, 3])).dtype == tf.bfloat16
    assert mean_nll(model, x, y) < before - 0.5


def test_bfloat16_backbone_survives_saving(tmp_path):
    x, y = rows()
    tf_keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        model = make(x, y)
    finally:
        tf_keras.mixed_precision.set_global_policy("float32")
    model.save(tmp_path / "model.keras")
    again = mdn.load(tmp_path / "model.keras")
    assert again.backbone(tf.ones([1, 3])).dtype == tf.bfloat16
    np.testing.assert_array_equal(again.predict(x, verbose=0), model.predict(x, verbose=0))


def test_whole_numbers_frames_and_lists_are_taken():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 9, size=[64, 3]), rng.integers(0, 9, size=[64, 2])
    model = make(x, y)
    model.fit(x, y, epochs=1, verbose=0, validation_data=(x, y))
    assert np.isfinite(model.evaluate(x.tolist(), y.tolist(), verbose=0, return_dict=True)["loss"])
    frame = pd.DataFrame({"a": x[:, 0], "b": np.where(x[:, 1] > 4, "high", "low")})
    model = make(frame, pd.DataFrame(y))
    model.fit(frame, pd.DataFrame(y), epochs=1, verbose=0)
    assert model.predict(frame, verbose=0).shape == (64, 2)


def test_features_may_be_none():
    y = np.random.default_rng(0).normal(size=[64, 2])
    model = make(np.zeros([64, 0]), y)
    history = model.fit(np.zeros([64, 0]), y, epochs=2, verbose=0).history
    assert np.isfinite(history["loss"]).all()


def test_metrics_see_the_mean():
    x, y = rows()
    model = make(x, y, metrics=["mae"])
    result = model.evaluate(x, y, batch_size=256, verbose=0, return_dict=True)
    assert result["mae"] == pytest.approx(np.abs(model.predict(x, verbose=0) - y).mean(), rel=1e-4)


def test_saved_model_goes_on_training_where_it_was(tmp_path):
    x, y = rows()
    model = make(x, y)
    model.fit(x, y, epochs=2, shuffle=False, verbose=0)
    model.save(tmp_path / "model.keras")
    again = mdn.load(tmp_path / "model.keras")
    losses = [
        m.fit(x, y, epochs=1, shuffle=False, verbose=0).history["loss"] for m in (model, again)
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    assert not list(tmp_path.glob(".*"))


def test_loading_names_what_is_wrong(tmp_path):
    with pytest.raises(mdn.MDNError, match="does not exist"):
        mdn.load(tmp_path / "none.keras")
    (tmp_path / "text.keras").write_text("not a model")
    with pytest.raises(mdn.MDNError, match="cannot be loaded"):
        mdn.load(tmp_path / "text.keras")
    other = tf_keras.Sequential([tf_keras.layers.Dense(1, input_shape=[1])])
    other.save(tmp_path / "other.keras")
    with pytest.raises(mdn.MDNError, match="holds a Sequential, not an MDN"):
        mdn.load(tmp_path / "other.keras")


def test_saving_names_what_is_wrong(tmp_path):
    x, y = rows()
    model = make(x, y)
    with pytest.raises(mdn.MDNError, match=r"must end in \.keras"):
        model.save(tmp_path / "model.h5")
    with pytest.raises(mdn.MDNError, match="cannot write"):
        model.save(tmp_path / "no" / "model.keras")
    with pytest.raises(mdn.MDNError, match=r"call model\.adapt"):
        mdn.MDN(mdn.heads.Diag(1)).save(tmp_path / "model.keras")


def test_wrong_inputs_are_named():
    x, y = rows()
    model = make(x, y)
    with pytest.raises(mdn.MDNError, match=r"reshape it to \[N, 1\]"):
        model.fit(x, y[:, 0])
    with pytest.raises(mdn.MDNError, match="float32 cannot hold"):
        model.fit(np.where(x > 60.0, np.inf, x), y)
    with pytest.raises(mdn.MDNError, match=r"data\.missing=indicator"):
        model.fit(np.where(x > 60.0, np.nan, x), y)
    with pytest.raises(mdn.MDNError, match=r"y has shape \[256, 1\] but .* event_size=2"):
        model.evaluate(x, y[:, :1])
    fresh = mdn.MDN(mdn.heads.Mixture(2, 3))
    fresh.compile()
    with pytest.raises(mdn.MDNError, match=r"call model\.adapt"):
        fresh.fit(x, y)
    with pytest.raises(mdn.MDNError, match="y has 2 targets and the head event_size=3"):
        mdn.MDN(mdn.heads.Mixture(3, 3)).adapt(x, y)
    with pytest.raises(mdn.MDNError, match="loss='mse' is unknown"):
        model.compile(loss="mse")
    with pytest.raises(mdn.MDNError, match="constant"):
        model.adapt(x, np.ones_like(y))


def test_a_stray_batch_of_targets_never_broadcasts():
    # also in a tf.data pipeline, which the check of arrays does not see
    x, y = rows()
    model = make(x, y[:, :1], mdn.heads.Diag(1))
    dataset = tf.data.Dataset.from_tensor_slices((x, y[:, 0])).batch(32)
    with pytest.raises(ValueError, match="reshape a single target"):
        model.fit(dataset, verbose=0)


def test_features_of_another_width_never_broadcast():
    x, y = rows()
    model = make(x, y)
    for answer in (model.predict, model.predict_distribution):
        with pytest.raises(mdn.MDNError, match="the model has 3 features"):
            answer(x[:, :1])
    with pytest.raises(mdn.MDNError, match="the model has 3"):
        model(x[:, :1])
    columns = make({"a": x[:, 0]}, y)
    with pytest.raises(mdn.MDNError, match="x is a matrix: give the columns a"):
        columns.predict(x[:, :1])


def test_bad_row_weights_are_named():
    x, y = rows()
    model = make(x, y)
    for weight in (np.full(256, np.nan), np.full(256, -1.0), np.ones([256, 2])):
        with pytest.raises(mdn.MDNError, match="sample_weight"):
            model.fit(x, y, sample_weight=weight)
