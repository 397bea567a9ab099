"""Features: statistics against NumPy, and the same numbers after every kind of saving."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from mdn.errors import DataError
from mdn.features import Column, Columns, Standardize, as_tensors

NAN = np.nan
RAW = {
    "city": np.array(["b", "a", "b", None, "c", "b"], object),
    "size": np.array([1.0, 2.0, NAN, 4.0, 5.0, 6.0]),
    "time": 1.7e9 + np.arange(6.0),
    "flag": np.ones(6),
}


def adapted_columns() -> Columns:
    layer = Columns()
    layer.adapt(RAW)
    return layer


@pytest.mark.parametrize("shape", [(50, 3), (10, 5, 3)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_standardize_against_numpy(shape, dtype):
    x = np.random.default_rng(0).normal([1, -50, 1e4], [2, 0.1, 30], shape).astype(dtype)
    layer = Standardize()
    layer.adapt(x)
    flat = x.astype(np.float64).reshape(-1, 3)
    expected = (x - flat.mean(0)) / flat.std(0)
    np.testing.assert_allclose(layer(x), expected, atol=2e-3)  # float32 at 1e4 +- 30
    np.testing.assert_allclose(layer(x)[..., :2], expected[..., :2], atol=1e-4)
    assert layer(x).dtype == tf.float32
    assert layer.output_size == 3


@pytest.mark.parametrize("value", [0.0, 0.1, 1e9, -1e30, 1e-40])
def test_a_constant_feature_becomes_zero(value):
    layer = Standardize()
    layer.adapt(np.full((7, 1), value))
    np.testing.assert_array_equal(layer(np.full((7, 1), value)), 0)


def test_a_feature_that_float32_flattens_counts_as_constant():
    x = 1e9 + np.random.default_rng(0).uniform(0, 1, (100, 1))
    layer = Standardize()
    layer.adapt(x)
    np.testing.assert_array_equal(layer(x), 0)


def test_indicators_of_a_matrix():
    x = np.array([[1.0, 5.0], [NAN, 6.0], [3.0, 10.0]])
    layer = Standardize("indicator")
    layer.adapt(x)
    out = layer(x).numpy()
    assert layer.output_size == 3
    assert out.shape == layer.compute_output_shape([3, 2])
    np.testing.assert_array_equal(out[:, 0], [-1, 0, 1])
    np.testing.assert_array_equal(out[:, 2], [0, 1, 0])
    # Missing only after training: the mean, with no flag.
    np.testing.assert_array_equal(layer(np.array([[1.0, NAN]]))[0, 1:], [0, 0])
    assert layer.compute_mask(tf.constant(x)) is None


def test_without_indicators_missing_stays_visible():
    layer = Standardize()
    layer.adapt(np.array([[1.0], [2.0]]))
    assert np.isnan(layer(np.array([[NAN]]))).all()


@pytest.mark.parametrize("missing", ["error", "indicator"])
def test_padding_is_zero_masked_and_not_counted(missing):
    x = np.random.default_rng(0).normal(3, 2, (4, 5, 2))
    real = x.copy()
    x[0, 3:] = NAN
    if missing == "indicator":
        x[2, 1, 0] = NAN
    layer = Standardize(missing)
    layer.adapt(x)
    assert layer.indicator == ([0] if missing == "indicator" else [])
    out = layer(x)
    np.testing.assert_array_equal(out[0, 3:], 0)
    expected = np.ones((4, 5), bool)
    expected[0, 3:] = False
    np.testing.assert_array_equal(layer.compute_mask(tf.constant(x)), expected)
    np.testing.assert_allclose(layer.mean, np.nanmean(x, axis=(0, 1)), rtol=1e-6)
    # A Keras LSTM downstream gets the mask: padded steps repeat the last real state.
    states = tf_keras.layers.LSTM(3, return_sequences=True)(out)
    np.testing.assert_array_equal(states[0, 3], states[0, 2])
    assert np.isfinite(layer(real)).all()


def test_standardize_refuses_another_width_and_option():
    layer = Standardize()
    layer.adapt(np.eye(3))
    with pytest.raises(DataError, match="x has 2 features but the model was built for 3"):
        layer.adapt(np.eye(2))
    with pytest.raises(ValueError, match="missing='mean'"):
        Standardize("mean")
    with pytest.raises(ValueError, match="call adapt"):
        _ = Standardize().output_size


def test_columns_come_as_they_were_learned():
    layer = Columns()
    layer.adapt({"zip": np.array(["1", "2", "2"]), "size": np.array([1.0, 2.0, 3.0])})
    empty = layer.as_learned({"zip": np.full(2, NAN), "size": np.array([2, None], object)})
    assert empty["zip"].tolist() == ["", ""]
    np.testing.assert_array_equal(empty["size"], [2.0, NAN])
    with pytest.raises(DataError, match="'zip' is of type int64, and the model has learned categ"):
        layer.as_learned({"zip": np.array([1, 2]), "size": np.zeros(2)})
    with pytest.raises(DataError, match="'size' holds text, and the model has learned numbers"):
        layer.as_learned({"zip": np.array(["1"]), "size": np.array(["2"])})


def test_statistics_do_not_train():
    layer = Standardize()
    layer.adapt(np.eye(3))
    assert len(layer.non_trainable_weights) == 2
    assert not layer.trainable_weights


def test_columns_against_hand_computed_values():
    layer = adapted_columns()
    size = RAW["size"]
    out = layer(as_tensors(RAW)).numpy()
    assert layer.names == list(RAW)
    assert layer.output_size == out.shape[1] == 3 + 1 + 4
    scaled = np.where(np.isnan(size), 0, (size - np.nanmean(size)) / np.nanstd(size))
    np.testing.assert_allclose(out[:, 0], scaled, atol=1e-6)
    steps = np.arange(6.0)
    np.testing.assert_allclose(out[:, 1], (steps - 2.5) / steps.std(), atol=1e-6)
    np.testing.assert_array_equal(out[:, 2], 0)  # a constant
    np.testing.assert_array_equal(out[:, 3], np.isnan(size))
    # b is the most frequent; slot 0 is missing or unknown.
    np.testing.assert_array_equal(out[:, 4:].argmax(1), [1, 2, 1, 0, 3, 1])
    np.testing.assert_array_equal(out[:, 4:].sum(1), 1)


def test_the_two_stages_agree_and_the_second_compiles():
    layer = adapted_columns()
    codes = layer.codes(as_tensors(RAW))
    assert codes.shape == (6, 4)
    assert codes.dtype == tf.float32
    assert np.isnan(codes[2, 1])
    compiled = tf.function(layer, jit_compile=True)
    np.testing.assert_allclose(compiled(codes), layer(as_tensors(RAW)), atol=1e-6)


def test_new_values_at_inference():
    layer = adapted_columns()
    new = {
        "city": tf.constant([["zzz"], [""]]),  # [B, 1] does as well as [B]
        "size": tf.constant([3, 4], tf.int32),
        "time": tf.constant([NAN, 1.7e9], tf.float64),
        "flag": tf.constant([NAN, 1.0], tf.float32),
        "extra": tf.constant([1.0, 2.0]),
    }
    out = layer(new).numpy()
    np.testing.assert_array_equal(out[:, 4:], [[1, 0, 0, 0]] * 2)
    np.testing.assert_array_equal(out[0, 1:4], 0)
    del new["flag"]
    with pytest.raises(DataError, match="column 'flag' is missing: give city, size"):
        layer(new)


def test_a_missing_number_stays_visible_where_it_is_an_error():
    layer = Columns.from_config({**adapted_columns().get_config(), "missing": "error"})
    np.testing.assert_array_equal(np.isnan(layer(as_tensors(RAW))[:, 0]), np.isnan(RAW["size"]))
    with pytest.raises(ValueError, match="missing='mean'"):
        Columns(missing="mean")


def test_rare_categories_share_the_unknown_slot():
    layer = Columns(max_categories=2)
    layer.adapt({"c": np.array(list("aabbbcd"), object)})
    assert layer.columns == [Column("c", ["b", "a"], dtype="string")]
    np.testing.assert_array_equal(
        layer.codes({"c": tf.constant(list("abcd"))})[:, 0], [2, 1, 0, 0]
    )


def test_signature_keeps_float32_where_it_can():
    dtypes = {name: spec.dtype.name for name, spec in adapted_columns().signature().items()}
    assert dtypes == {"city": "string", "size": "float32", "time": "float64", "flag": "float32"}


def test_policy_does_not_round_features():
    tf_keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        np.testing.assert_array_equal(adapted_columns()(as_tensors(RAW)).dtype, tf.float32)
        layer = Standardize()
        layer.adapt(np.array([[1000.0], [1001.0]]))
        np.testing.assert_array_equal(layer(np.array([[1000.0], [1001.0]])), [[-1], [1]])
    finally:
        tf_keras.mixed_precision.set_global_policy("float32")


def make_standardize(missing: str, x: np.ndarray) -> Standardize:
    layer = Standardize(missing)
    layer.adapt(x)
    return layer


MATRIX = np.array([[1.0, 5.0], [NAN, 6.0], [3.0, 10.0]])
CASES = {
    "columns": (adapted_columns, as_tensors(RAW)),
    "matrix": (lambda: make_standardize("indicator", MATRIX), tf.constant(MATRIX, tf.float32)),
    "sequences": (
        lambda: make_standardize("error", np.ones((2, 3, 2)) * [[[1.0]], [[2.0]]]),
        tf.random.stateless_normal([4, 3, 2], [0, 1]),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_keras_file_round_trip(case, tmp_path):
    make, inputs = CASES[case]
    layer = make()
    placeholders = tf.nest.map_structure(
        lambda tensor: tf_keras.Input(tensor.shape[1:], dtype=tensor.dtype), inputs
    )
    model = tf_keras.Model(placeholders, tf_keras.layers.Dense(2)(layer(placeholders)))
    model.save(tmp_path / "model.keras")
    loaded = tf_keras.models.load_model(tmp_path / "model.keras", safe_mode=True)
    np.testing.assert_array_equal(loaded(inputs), model(inputs))
    assert loaded.get_layer(layer.name).get_config() == layer.get_config()


@pytest.mark.parametrize("case", CASES)
def test_config_round_trip(case):
    make, inputs = CASES[case]
    layer = make()
    copy = type(layer).from_config(layer.get_config())
    copy.set_weights(layer.get_weights())  # no call was needed to make them
    np.testing.assert_array_equal(copy(inputs), layer(inputs))


def test_saved_model_with_raw_columns(tmp_path):
    layer = adapted_columns()

    class Service(tf.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        @tf.function
        def serve(self, **columns):
            return {"encoded": self.layer(columns)}

    service = Service()
    signature = service.serve.get_concrete_function(**layer.signature())
    tf.saved_model.save(service, str(tmp_path), signatures=signature)
    loaded = tf.saved_model.load(str(tmp_path)).signatures["serving_default"]
    inputs = {
        name: tf.cast(values, layer.signature()[name].dtype)
        for name, values in as_tensors(RAW).items()
    }
    np.testing.assert_allclose(loaded(**inputs)["encoded"], layer(as_tensors(RAW)), atol=1e-6)


def test_columns_in_a_pipeline():
    layer = adapted_columns()
    pipeline = tf.data.Dataset.from_tensor_slices(as_tensors(RAW)).batch(4).map(layer.codes)
    codes = tf.concat(list(pipeline), axis=0)
    np.testing.assert_array_equal(codes, layer.codes(as_tensors(RAW)))
