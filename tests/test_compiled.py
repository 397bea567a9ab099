"""The compiled loop does what Keras's own does, step by step."""

import itertools

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import mdn
from mdn.data.pipeline import evaluation_batches, training_batches
from mdn.errors import ConfigError
from mdn.updates import FusedAdam

ROWS, BATCH = 50, 8  # six batches and two rows


def rows(n=ROWS, f=3, d=2):
    rng = np.random.default_rng(0)
    x = rng.standard_normal([n, f])
    return x, x @ rng.standard_normal([f, d]) + 0.3 * rng.standard_normal([n, d])


def make(optimizer=None, *, backbone=None, head=None, jit_compile=True, **kwargs):
    """Return a model that trains in XLA, or in Keras's own loop: there step by step.

    To trace a step takes longer than all of these tests' steps do.
    """
    tf_keras.utils.set_random_seed(0)
    head = mdn.heads.Diag(2) if head is None else head  # the loop is the same, and traced sooner
    model = mdn.MDN(head, mdn.backbones.MLP([8]) if backbone is None else backbone())
    model.adapt(*rows())
    kwargs = {"jit_compile": jit_compile, "run_eagerly": not jit_compile} | kwargs
    model.compile(optimizer or tf_keras.optimizers.Adam(0.01), **kwargs)
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
NOT_FUSED = ["adam, clipped by norm", "amsgrad", "sgd"]


# Of those that are not fused one is enough: in the loop all are the optimizer's own update.
@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n not in NOT_FUSED[:2]])
def test_losses_and_weights_equal_those_of_the_plain_loop(name, monkeypatch):
    if name != "adam":
        monkeypatch.setattr(mdn.updates, "LARGE", 20)  # the kernels have vectors of their own
    x, y = rows()
    weight = np.random.default_rng(1).uniform(0.5, 1.5, size=len(x))
    whole = name == "adam"  # a mixture, and validated; of the others the updates are the question
    options = {"validation_data": (x[:21], y[:21])} if whole else {}
    runs = []
    for jit_compile in (True, False):
        head = mdn.heads.Mixture(2, 2) if whole else None
        model = make(OPTIMIZERS[name](), head=head, jit_compile=jit_compile)
        history = train(model, x, y, batch_size=BATCH, sample_weight=weight, **options)
        runs.append((history, model))
        assert model.optimizer.iterations.numpy() == 14
    for metric, values in runs[0][0].items():
        np.testing.assert_allclose(values, runs[1][0][metric], rtol=1e-5, err_msg=metric)
    for a, b in zip(*(m.get_weights() + m.optimizer.variables for _, m in runs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


def test_adam_is_fused_where_that_is_the_same():
    variables = make().trainable_variables
    fused = {
        name: FusedAdam.supports(optimizer(), variables) for name, optimizer in OPTIMIZERS.items()
    }
    assert [name for name in fused if not fused[name]] == NOT_FUSED


@pytest.mark.parametrize("chunk", [1, 4, None])
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
    for batch_size in (None, 7):
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


@pytest.mark.parametrize("jit_compile", [True, False])
def test_targets_that_lack_entries_take_the_marginal(jit_compile):
    x, y = rows()
    head = mdn.heads.Mixture(2, 2)
    model = make(
        tf_keras.optimizers.SGD(0.0), head=head, jit_compile=jit_compile, run_eagerly=False
    )
    train(model, x, y, batch_size=BATCH, epochs=1)  # traced for complete rows
    y[::3, 1] = np.nan
    y[5] = np.nan
    history = train(model, x, y, batch_size=BATCH, epochs=1, validation_data=(x, y))
    there = np.arange(len(y)) != 5
    expected = -model.predict_distribution(x).log_prob(y.astype(np.float32)).numpy()[there].mean()
    assert history["nll"][0] == pytest.approx(expected, rel=1e-5)
    assert history["val_nll"][0] == pytest.approx(expected, rel=1e-5)


def test_dropout_is_fresh_in_each_step_and_reproducible():
    """In Keras's own loop, whose masks the compiled one has."""
    x, y = rows()
    losses = []
    for seed in (0, 0, 1):
        tf_keras.utils.set_random_seed(seed)
        model = mdn.MDN(mdn.heads.Diag(2), mdn.backbones.MLP([8], dropout=0.5))
        model.adapt(x, y)
        model.compile(tf_keras.optimizers.SGD(0.0), run_eagerly=True)
        steps = Steps()
        train(model, x, y, batch_size=len(x), epochs=3, callbacks=[steps])
        losses.append(steps.losses)
    assert losses[0] == losses[1] != losses[2]
    assert len(set(losses[0])) == 3


def test_dropout_has_the_masks_of_the_plain_loop():
    runs = {}
    for name, jit_compile in (("compiled", True), ("again", True), ("plain", False)):
        model = make(
            backbone=lambda: mdn.backbones.MLP([8, 8], dropout=0.4), jit_compile=jit_compile
        )
        losses = train(model, *rows(), batch_size=BATCH, epochs=3)["loss"]
        runs[name] = losses, model.get_weights()
    assert runs["compiled"][0] == runs["again"][0]
    np.testing.assert_allclose(runs["compiled"][0], runs["plain"][0], rtol=1e-5)
    for a, b in zip(runs["compiled"][1], runs["plain"][1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


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


def test_steps_of_keras_own_loop_are_traced_once():
    x, y = rows()
    model = make(jit_compile=False, run_eagerly=False, steps_per_execution=4)
    seen, forward, steps = [], model.forward, Steps()
    model.forward = lambda *args, training: seen.append(training) or forward(*args, training)
    train(model, x, y, batch_size=BATCH, validation_data=(x, y), callbacks=[steps])
    assert sorted(seen) == [False, True]
    assert steps.ends == [3, 6] * 2
    assert model.optimizer.iterations.numpy() == 14


def test_stream_of_unknown_length_trains_in_keras_own_loop(caplog):
    x, y = (a.astype(np.float32) for a in rows())
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH).filter(lambda *_: True)
    with caplog.at_level("INFO", logger="mdn"):
        train(make(jit_compile=False), batches)
        train(make(jit_compile=False), batches, steps_per_epoch=3)
    assert [r.getMessage() for r in caplog.records] == [
        "training in Keras's own loop: the dataset does not know its length: give steps_per_epoch"
    ]


@pytest.mark.parametrize(("n", "chunk"), [(20, None), (ROWS, 4)])
def test_validation_batches_of_unknown_length_are_all_judged_in_every_epoch(n, chunk):
    x, y = (a.astype(np.float32) for a in rows())
    batches = tf.data.Dataset.from_tensor_slices((x[:n], y[:n])).batch(BATCH)
    model = make(tf_keras.optimizers.SGD(0.0), steps_per_execution=chunk)
    history = train(model, x, y, validation_data=batches.filter(lambda *_: True), epochs=3)
    expected = model.evaluate(x[:n], y[:n], verbose=0, return_dict=True)["nll"]
    np.testing.assert_allclose(history["val_nll"], [expected] * 3, rtol=1e-5)


def test_chunks_of_another_size_are_refused():
    arrays = tuple(a.astype(np.float32) for a in rows())
    train_batches = training_batches(arrays, BATCH, seed=0, chunk=4)
    held_out = evaluation_batches(arrays, BATCH, chunk=3)
    with pytest.raises(ConfigError, match=r"chunks of 3 batches, .* 4: make it with chunk=4"):
        train(make(), train_batches, validation_data=held_out)


@pytest.mark.parametrize("jit_compile", [True, False])
def test_counts_train_wherever_rows_do(jit_compile):
    x, y = rows()
    x, y = x.astype(np.float32), np.round(y).astype(np.int64)
    expected = train(make(jit_compile=jit_compile), x, y, batch_size=BATCH, shuffle=False)
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH)
    model = make(jit_compile=jit_compile)
    history = train(model, batches.filter(lambda *_: True))
    np.testing.assert_allclose(history["loss"], expected["loss"], rtol=1e-5)
    assert np.isfinite(model.train_on_batch(x, y, return_dict=True)["loss"])
    one, two = model.evaluate(iter([(x, y)]), verbose=0), model.evaluate(x, y, verbose=0)
    np.testing.assert_allclose(one, two, rtol=1e-5)


class Interrupted(tf_keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        raise KeyboardInterrupt


def test_fit_after_an_interrupted_one_validates_on_its_own_rows():
    x, y = rows()
    model = make(tf_keras.optimizers.SGD(0.0), jit_compile=False)
    with pytest.raises(KeyboardInterrupt):
        train(model, x, y, validation_data=(x, y), callbacks=[Interrupted()])
    history = train(model, x, y, validation_data=(x, y + 3.0), epochs=1)
    expected = model.evaluate(x, y + 3.0, verbose=0, return_dict=True)["nll"]
    assert history["val_nll"] == [pytest.approx(expected, rel=1e-5)]


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
        model = make(head=mdn.heads.Mixture(2, 2))
    finally:
        tf_keras.mixed_precision.set_global_policy("float32")
    losses = train(model, *rows(), batch_size=BATCH, epochs=4)["loss"]
    plain = make(head=mdn.heads.Mixture(2, 2), jit_compile=False)
    plain = train(plain, *rows(), batch_size=BATCH, epochs=4)["loss"]
    np.testing.assert_allclose(losses, plain, rtol=0.05)


def test_validation_data_wins_over_validation_split():
    x, y = rows()
    columns = {"a": x[:, 0], "b": np.where(x[:, 1] > 0, "up", "down").astype(object)}
    model = mdn.MDN(mdn.heads.Diag(2), mdn.backbones.MLP([4]))
    model.adapt(columns, y)
    model.compile(tf_keras.optimizers.SGD(0.0), run_eagerly=True)
    history = train(
        *(model, columns, y), epochs=1, validation_split=0.5, validation_data=(columns, y)
    )
    assert history["val_nll"] == [pytest.approx(history["nll"][0], rel=1e-5)]


def test_what_cannot_be_stacked_trains_in_keras_own_loop():
    x, y = (a.astype(np.float32) for a in rows())
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH)
    unknown = batches.map(lambda x, y: (tf.reshape(x, [-1, tf.size(x) // tf.shape(x)[0]]), y))
    assert unknown.element_spec[0].shape[1] is None

    def endless():
        while True:
            yield from zip(np.split(x[:48], 6), np.split(y[:48], 6), strict=True)

    expected = train(make(jit_compile=False), batches.take(6))["loss"]
    for given, steps in ((unknown.take(6), None), (endless(), 6)):
        history = train(make(), given, steps_per_epoch=steps)
        np.testing.assert_allclose(history["loss"], expected, rtol=1e-5)


def test_batch_larger_than_the_first_is_named():
    x, y = (a.astype(np.float32) for a in rows())
    parts = [tf.data.Dataset.from_tensors((x[:n], y[:n])) for n in (4, 8)]
    with pytest.raises(tf.errors.InvalidArgumentError, match="more than the 4 rows of the first"):
        train(make(), parts[0].concatenate(parts[1]))


def test_float64_trains():
    policy = tf_keras.mixed_precision.global_policy()
    tf_keras.backend.set_floatx("float64")
    tf_keras.mixed_precision.set_global_policy("float64")  # a policy set once outlives set_floatx
    try:
        model = make()
        start = model.get_weights()
        history = train(model, *rows(), batch_size=BATCH, epochs=1)
        assert model.head.kernel.dtype == tf.float64
    finally:
        tf_keras.backend.set_floatx("float32")
        tf_keras.mixed_precision.set_global_policy(policy)
    plain = make(jit_compile=False)
    plain.set_weights(start)
    expected = train(plain, *rows(), batch_size=BATCH, epochs=1)
    np.testing.assert_allclose(history["loss"], expected["loss"], rtol=1e-4)


def test_penalties_of_the_backbone_count():
    def backbone():
        return tf_keras.Sequential(
            [tf_keras.layers.Dense(8, kernel_regularizer="l2", activity_regularizer="l2")]
        )

    losses = []
    for jit_compile in (True, False):
        history = train(
            make(backbone=backbone, jit_compile=jit_compile), *rows(), batch_size=BATCH
        )
        assert history["loss"][0] > history["nll"][0] + 0.01
        losses.append(history["loss"])
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"class_weight": {0: 1.0}}, "class_weight"),
        ({"validation_split": 1.0}, "validation_split"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"epochs": 0}, "epochs=0"),
    ],
)
def test_arguments_without_meaning_are_refused(options, reason):
    with pytest.raises(mdn.MDNError, match=reason):
        make().fit(*rows(), **options)


@pytest.mark.parametrize("options", [{"sample_weight": np.ones(ROWS)}, {"validation_split": 0.5}])
def test_arguments_for_arrays_are_refused_with_a_dataset(options):
    batches = tf.data.Dataset.from_tensor_slices(rows()).batch(BATCH)
    with pytest.raises(mdn.MDNError, match=next(iter(options))):
        make().fit(batches, **options)


def test_steps_per_execution_is_positive():
    with pytest.raises(mdn.MDNError, match="steps_per_execution=0"):
        make(steps_per_execution=0)


def test_nothing_to_evaluate_is_told():
    x, y = rows()
    model = make()
    for call in (
        lambda: model.evaluate(x[:0], y[:0]),
        lambda: model.fit(x, y, validation_data=(x[:0], y[:0])),
    ):
        with pytest.raises(mdn.MDNError, match="no rows to evaluate"):
            call()
    for call in (
        lambda: model.evaluate(x, y, batch_size=-1),
        lambda: model.fit(x, y, validation_data=(x, y), validation_batch_size=-1),
    ):
        with pytest.raises(mdn.MDNError, match="batch_size=-1"):
            call()


class Evaluate(tf_keras.callbacks.Callback):
    def __init__(self, *data):
        super().__init__()
        self.data, self.found = data, []

    def on_epoch_end(self, epoch, logs=None):
        self.found.append(self.model.evaluate(*self.data, verbose=0))


@pytest.mark.parametrize("jit_compile", [True, False])
def test_a_callback_may_evaluate_and_fit_goes_on(jit_compile):
    x, y = rows()
    held_out = x[:21], y[:21]
    asked, runs = Evaluate(*held_out), []
    for callbacks in ([], [asked]):
        model = make(jit_compile=jit_compile, steps_per_execution=3)
        options = {"validation_data": held_out, "callbacks": callbacks, "epochs": 3}
        runs.append((train(model, x, y, batch_size=BATCH, **options), model.get_weights()))
    assert runs[0][0] == runs[1][0]
    for a, b in zip(*(weights for _, weights in runs), strict=True):
        np.testing.assert_array_equal(a, b)
    assert [loss for loss, _ in asked.found] == runs[0][0]["val_loss"]


class MakeAnew(tf_keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        self.model.train_function = self.model.make_train_function(force=True)


def test_a_train_function_that_is_made_anew_goes_on_with_the_order():
    x, y = rows()
    plain, anew = (
        train(make(), x, y, batch_size=BATCH, epochs=3, callbacks=callbacks)
        for callbacks in ([], [MakeAnew()])
    )
    assert plain == anew


@pytest.mark.parametrize("which", ["train", "validation"])
def test_metrics_of_chunks_and_of_keras_own_loop_do_not_mix(which):
    """Where one of train and validation rows cannot be stacked, the other still runs in chunks."""
    x, y = (array.astype(np.float32) for array in rows())
    found = []
    for jit_compile in (True, False):
        model = make(jit_compile=jit_compile)
        if which == "train":
            data = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH)
            given = (data.filter(lambda *_: True),)  # its length is not known
            options = {"validation_data": (x[:21], y[:21])}
        else:
            given = x, y
            options = {
                "validation_data": itertools.cycle([(x[:8], y[:8]), (x[8:21], y[8:21])]),
                "validation_steps": 2,
            }
        found.append(train(model, *given, epochs=3, **options))
    assert found[0].keys() == found[1].keys()
    for name, values in found[0].items():
        np.testing.assert_allclose(values, found[1][name], rtol=1e-5, err_msg=name)
