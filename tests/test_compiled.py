"""The compiled loop does what Keras's own does, step by step."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import mdn
from mdn.updates import FusedAdam

ROWS, BATCH = 50, 8  # six batches and two rows


def rows(n=ROWS, f=3, d=2):
    rng = np.random.default_rng(0)
    x = rng.standard_normal([n, f])
    return x, x @ rng.standard_normal([f, d]) + 0.3 * rng.standard_normal([n, d])


def make(optimizer=None, *, loss="nll", backbone=None, head=None, **kwargs):
    tf_keras.utils.set_random_seed(0)
    head = mdn.heads.Mixture(2, 2) if head is None else head
    model = mdn.MDN(head, mdn.backbones.MLP([8]) if backbone is None else backbone())
    model.adapt(*rows())
    model.compile(optimizer or tf_keras.optimizers.Adam(0.01), loss=loss, **kwargs)
    return model


class Steps(tf_keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.ends, self.losses = [], []

    def on_train_batch_end(self, batch, logs=None):
        self.ends.append(batch)
        self.losses.append(float(logs["loss"]))


def train(model, *args, epochs=2, **kwargs):
    np.random.seed(1)  # of the order
    return model.fit(*args, epochs=epochs, verbose=0, **kwargs).history


OPTIMIZERS = {
    "adam": lambda: tf_keras.optimizers.Adam(0.01),
    "adam, clipped by the global norm": lambda: tf_keras.optimizers.Adam(
        0.01, global_clipnorm=0.1
    ),
    "adam, clipped by value": lambda: tf_keras.optimizers.Adam(0.01, clipvalue=0.01),
    "adam, clipped by norm": lambda: tf_keras.optimizers.Adam(0.01, clipnorm=0.1),
    "adamw": lambda: tf_keras.optimizers.AdamW(0.01, weight_decay=0.1),
    "amsgrad": lambda: tf_keras.optimizers.Adam(0.01, amsgrad=True),
    "schedule": lambda: tf_keras.optimizers.Adam(
        tf_keras.optimizers.schedules.CosineDecay(0.02, 14)
    ),
    "sgd": lambda: tf_keras.optimizers.SGD(0.01, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_losses_and_weights_equal_those_of_the_plain_loop(name):
    x, y = rows()
    weight = np.random.default_rng(1).uniform(0.5, 1.5, size=len(x))
    runs = []
    for jit_compile in (True, False):
        model = make(OPTIMIZERS[name](), jit_compile=jit_compile)
        history = train(
            *(model, x, y),
            batch_size=BATCH,
            sample_weight=weight,
            validation_data=(x[:21], y[:21]),
        )
        runs.append((history, model))
        assert model.optimizer.iterations.numpy() == 14
    for metric, values in runs[0][0].items():
        np.testing.assert_allclose(values, runs[1][0][metric], rtol=1e-5, err_msg=metric)
    for a, b in zip(*(m.get_weights() + m.optimizer.variables for _, m in runs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


def test_adam_is_fused_where_that_is_the_same():
    fused = {
        name: FusedAdam.supports(optimizer(), make().trainable_variables)
        for name, optimizer in OPTIMIZERS.items()
    }
    assert [name for name in fused if not fused[name]] == [
        "adam, clipped by norm",
        "amsgrad",
        "sgd",
    ]


@pytest.mark.parametrize("chunk", [1, 2, 4, None])
def test_callbacks_see_steps_as_with_steps_per_execution(chunk):
    x, y = rows()
    steps = Steps()
    history = train(
        make(steps_per_execution=chunk), x, y, batch_size=BATCH, epochs=1, callbacks=[steps]
    )
    chunk = chunk or 7
    assert steps.ends == [min(chunk * (i + 1), 7) - 1 for i in range(-(-7 // chunk))]
    assert history["loss"] == [pytest.approx(steps.losses[-1])]


def test_loss_is_the_mean_over_rows_of_a_ragged_epoch():
    x, y = rows()
    model = make(tf_keras.optimizers.SGD(0.0))
    history = train(model, x, y, batch_size=BATCH, validation_data=(x, y), epochs=1)
    expected = -model.predict_distribution(x).log_prob(y.astype(np.float32)).numpy().mean()
    assert history["nll"][0] == pytest.approx(expected, rel=1e-5)
    assert history["val_nll"][0] == pytest.approx(expected, rel=1e-5)
    for batch_size in (None, 7, 50, 100):
        found = model.evaluate(x, y, batch_size=batch_size, verbose=0, return_dict=True)
        assert found["nll"] == pytest.approx(expected, rel=1e-5)


def test_metrics_leave_out_what_fills_the_last_batch_up():
    x, y = rows()
    model = make(tf_keras.optimizers.SGD(0.0), metrics=["mae"], weighted_metrics=["mse"])
    history = train(model, x, y, batch_size=BATCH, epochs=1)
    mean = model.predict(x, verbose=0)
    assert history["mae"][0] == pytest.approx(np.abs(mean - y).mean(), rel=1e-5)
    assert history["mse"][0] == pytest.approx(np.square(mean - y).mean(), rel=1e-5)


def test_one_program_serves_every_epoch_and_fit():
    x, y = rows()
    model = make(steps_per_execution=4)  # two chunks, the last one of three steps
    traces = []
    forward = model.forward
    model.forward = lambda *args, **kwargs: traces.append(0) or forward(*args, **kwargs)
    train(model, x, y, batch_size=BATCH)
    traced = len(traces)
    train(model, x, y, batch_size=BATCH, epochs=3)
    assert len(traces) == traced


def test_targets_that_lack_entries_take_the_marginal():
    x, y = rows()
    model = make(tf_keras.optimizers.SGD(0.0))
    train(model, x, y, batch_size=BATCH, epochs=1)  # compiled for complete rows
    y[::3, 1] = np.nan
    y[5] = np.nan
    history = train(model, x, y, batch_size=BATCH, epochs=1, validation_data=(x, y))
    there = np.arange(len(y)) != 5
    expected = -model.predict_distribution(x).log_prob(y.astype(np.float32)).numpy()[there].mean()
    assert history["nll"][0] == pytest.approx(expected, rel=1e-5)
    assert history["val_nll"][0] == pytest.approx(expected, rel=1e-5)


def test_dropout_is_fresh_in_each_step_and_reproducible():
    x, y = rows()
    losses = []
    for seed in (0, 0, 1):
        tf_keras.utils.set_random_seed(seed)
        model = mdn.MDN(mdn.heads.Diag(2), mdn.backbones.MLP([8], dropout=0.5))
        model.adapt(x, y)
        model.compile(tf_keras.optimizers.SGD(0.0), steps_per_execution=1)
        steps = Steps()
        train(model, x, y, batch_size=len(x), epochs=3, callbacks=[steps])
        losses.append(steps.losses)
    assert losses[0] == losses[1] != losses[2]
    assert len(set(losses[0])) == 3


@pytest.mark.parametrize("jit_compile", [True, False])
def test_datasets_are_stacked(jit_compile):
    x, y = (a.astype(np.float32) for a in rows())
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH)
    expected = train(make(jit_compile=jit_compile), x, y, batch_size=BATCH, shuffle=False)
    for dataset, steps in ((batches, None), (batches.repeat(), 7)):
        history = train(make(jit_compile=jit_compile), dataset, steps_per_epoch=steps)
        np.testing.assert_allclose(history["loss"], expected["loss"], rtol=1e-5)
    fours = make(jit_compile=jit_compile, steps_per_execution=4)
    history = train(fours, batches, validation_data=batches)
    np.testing.assert_allclose(history["loss"], expected["loss"], rtol=1e-5)
    loss = fours.evaluate(batches, verbose=0, return_dict=True)["loss"]
    assert history["val_loss"][-1] == pytest.approx(loss, rel=1e-5)


def test_stream_of_unknown_length_trains_in_keras_own_loop(caplog):
    x, y = (a.astype(np.float32) for a in rows())
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH).filter(lambda *_: True)
    with caplog.at_level("INFO", logger="mdn"):
        train(make(), batches)
        train(make(), batches, steps_per_epoch=3)
    assert [r.getMessage() for r in caplog.records] == [
        "training in Keras's own loop: the dataset does not know its length: give steps_per_epoch"
    ]


def test_single_batches_still_train():
    x, y = (a.astype(np.float32) for a in rows())
    model = make()
    train(model, x, y, batch_size=BATCH, epochs=1)
    loss = model.train_on_batch(x, y, return_dict=True)["loss"]
    assert np.isfinite(loss)
    assert model.test_on_batch(x, y, return_dict=True)["loss"] < loss
    train(model, x, y, batch_size=BATCH, epochs=1)
    assert model.optimizer.iterations.numpy() == 15


def test_bfloat16_backbone_trains_with_a_float32_density():
    tf_keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        model = make()
    finally:
        tf_keras.mixed_precision.set_global_policy("float32")
    losses = train(model, *rows(), batch_size=BATCH, epochs=8)["loss"]
    plain = train(make(), *rows(), batch_size=BATCH, epochs=8)["loss"]
    np.testing.assert_allclose(losses, plain, rtol=0.05)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"class_weight": {0: 1.0}}, "class_weight"),
        ({"validation_split": 1.0}, "validation_split"),
    ],
)
def test_arguments_without_meaning_are_refused(options, reason):
    with pytest.raises(mdn.MDNError, match=reason):
        make().fit(*rows(), **options)
