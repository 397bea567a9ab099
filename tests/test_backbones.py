"""The backbones: shapes, saving, dropout that can be resumed, padding that counts nothing."""

import inspect

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import mdn
from mdn import backbones
from mdn.backbones import LSTM, MLP, Backbone, Constant, Dropout, ResNet

CASES = {
    MLP: [{}, {"widths": [8], "activation": "tanh", "dropout": 0.3, "layer_norm": True}],
    ResNet: [{"width": 8}, {"width": 8, "blocks": 1, "dropout": 0.3, "layer_norm": False}],
    Constant: [{}],
    LSTM: [{"units": [4]}, {"units": [4, 3], "return_sequences": False, "dropout": 0.3}],
}
FLAT = [(kind, options) for kind, several in CASES.items() for options in several]


def all_backbones():
    return {
        value
        for value in vars(backbones).values()
        if inspect.isclass(value) and issubclass(value, Backbone) and value is not Backbone
    }


def inputs(kind, rows=5):
    shape = [rows, 7, 3] if kind is LSTM else [rows, 3]
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_every_backbone_has_a_case():
    assert set(CASES) == all_backbones()


@pytest.mark.parametrize(("kind", "options"), FLAT)
def test_config_and_weights_survive_saving(kind, options, tmp_path):
    x = inputs(kind)
    model = mdn.MDN(mdn.heads.Mixture(2, 3), kind(**options))
    y = np.random.default_rng(1).normal(size=[*x.shape[:-1], 2])
    if options.get("return_sequences") is False:
        y = y[:, 0]
    model.adapt(x, y)
    model.save(tmp_path / "model.keras")
    again = mdn.load(tmp_path / "model.keras")
    assert type(again.backbone) is kind
    assert again.backbone.get_config() == model.backbone.get_config()
    assert again.backbone.get_config().items() >= options.items()
    np.testing.assert_array_equal(again(x).log_prob(y), model(x).log_prob(y))


@pytest.mark.parametrize("leading", [(5,), (2, 4)])
@pytest.mark.parametrize("kind", [MLP, ResNet, Constant])
def test_any_leading_shape(kind, leading):
    assert kind()(tf.ones([*leading, 3])).shape[:-1] == leading


def test_lstm_gives_each_step_or_the_last():
    x = inputs(LSTM)
    assert LSTM([4])(x).shape == (5, 7, 4)
    assert LSTM([4], return_sequences=False)(x).shape == (5, 4)


def test_lstm_names_rows_that_are_no_sequences():
    with pytest.raises(mdn.MDNError, match=r"needs sequences \[N, T, F\].*use backbone=mlp"):
        LSTM([4])(tf.ones([5, 3]))


def test_constant_ignores_its_features():
    model = mdn.MDN(mdn.heads.Mixture(1, 2), Constant())
    x, y = inputs(Constant, 50), np.random.default_rng(1).normal(size=[50, 1])
    model.adapt(x, y)
    model.compile(tf_keras.optimizers.Adam(0.1), jit_compile=False)
    model.fit(x, y, epochs=2, verbose=0)
    loc = model(x).loc.numpy()
    assert (loc == loc[:1]).all()


@pytest.mark.parametrize("jit_compile", [False, True])
def test_dropout_drops_its_share_afresh_and_resumes(jit_compile):
    tf_keras.utils.set_random_seed(0)
    layer = Dropout(0.25)
    apply = tf.function(lambda: layer(tf.ones([400, 100]), training=True), jit_compile=jit_compile)
    first = apply().numpy()
    kept = (first != 0.0).mean()
    assert kept == pytest.approx(0.75, abs=5 * np.sqrt(0.75 * 0.25 / first.size))
    assert first.mean() == pytest.approx(1.0, abs=0.02)
    state = layer.get_weights()
    second, third = apply().numpy(), apply().numpy()
    assert not np.array_equal(first, second)
    layer.set_weights(state)
    np.testing.assert_array_equal(apply(), second)
    np.testing.assert_array_equal(apply(), third)
    np.testing.assert_array_equal(layer(tf.ones([3, 2])), np.ones([3, 2]))  # not in inference


def test_dropout_follows_the_global_seed():
    def masks(seed):
        tf_keras.utils.set_random_seed(seed)
        return [Dropout(0.5)(tf.ones([64]), training=True).numpy() for _ in range(2)]

    first, again, other = masks(0), masks(0), masks(1)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first[0], first[1])
    assert not np.array_equal(first[0], other[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MLP([]), r"widths=\[\]"),
        (lambda: MLP([8, 0]), r"widths=\[8, 0\]"),
        (lambda: MLP(dropout=1.0), "dropout=1.0"),
        (lambda: ResNet(width=0), r"width=\[0\]"),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises(mdn.MDNError, match=message):
        make()
