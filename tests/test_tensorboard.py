"""The dashboard: its exact tags, steps and values, read back from the event files."""

from __future__ import annotations

import io
from collections import defaultdict

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from PIL import Image
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

import mdn
from mdn.callbacks.tensorboard import TensorBoard
from mdn.data.rows import Data, Rows
from mdn.data.simulators import Sinusoid

# On one worker, which makes the fixtures once.
pytestmark = pytest.mark.xdist_group("tensorboard")

ALWAYS = {"loss", "nll"}
TRAIN = ALWAYS | {"learning_rate", "gradient_norm"}
STATISTICS = {"components/effective", "components/weights", "components/scales"}
GRAPH = "__run_graph__"  # as TensorBoard calls it
ONCE = {"config", GRAPH}


def component_tags(k):
    return {f"components/{name}_{i}" for name in ("weight", "scale") for i in range(k)}


def read(directory):
    """Return tag -> {step: value} of all event files, as TensorBoard finds them."""
    series = defaultdict(dict)
    for path in sorted(directory.glob("events.out.tfevents.*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                series[value.tag][event.step] = tf.make_ndarray(value.tensor)
    return dict(series)


def make_model(data, head=None, backbone=None):
    model = mdn.MDN(head or mdn.heads.Mixture(1, 3), backbone or mdn.backbones.MLP([8]))
    model.adapt(data.train.x, data.train.y)
    schedule = tf_keras.optimizers.schedules.PolynomialDecay(0.01, 100, 0.0)
    # To trace a step takes longer than all of these.
    model.compile(tf_keras.optimizers.Adam(schedule), run_eagerly=True)
    return model


def fit(model, data, *callbacks, validation=True, **options):
    held = (data.validation.x, data.validation.y) if validation else None
    return model.fit(
        data.train.x,
        data.train.y,
        batch_size=50,
        validation_data=held,
        callbacks=list(callbacks),
        verbose=0,
        **options,
    ).history


def drive(model, board, epochs):
    """Call the callback as `fit` would, without the cost of training."""
    board.set_model(model)
    board.on_train_begin()
    for epoch in range(epochs):
        board.on_epoch_begin(epoch)
        board.on_epoch_end(epoch, {"loss": 1.0, "nll": 1.0, "gradient_norm": 1.0})
    board.on_train_end()


@pytest.fixture(scope="module")
def data():
    return Sinusoid(rows=200, validation_rows=60, test_rows=60).load()


@pytest.fixture(scope="module")
def model(data):
    return make_model(data)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """Two epochs of the default kind of run: (log directory, model, history)."""
    directory, model = tmp_path_factory.mktemp("run"), make_model(data)
    board = TensorBoard(directory, data, "k: 3\nseed: 0\n")
    return directory, model, fit(model, data, board, epochs=2)


def test_tags_are_exactly_these(run):
    directory, _, _ = run
    assert {path.name for path in directory.iterdir()} == {"train", "validation"}
    train = read(directory / "train")
    assert set(train) == TRAIN | STATISTICS | component_tags(3) | ONCE | {"density"}
    assert set(read(directory / "validation")) == ALWAYS
    for tag, values in train.items():
        assert list(values) == ([0] if tag in ONCE else [1, 2]), tag


def test_scalars_are_those_of_fit(run):
    directory, _, history = run
    train, validation = (read(directory / name) for name in ("train", "validation"))
    for series, prefix, names in (
        (train, "", ("loss", "nll", "gradient_norm")),
        (validation, "val_", ("loss", "nll")),
    ):
        for name in names:
            np.testing.assert_allclose(list(series[name].values()), history[prefix + name])
    # Four steps an epoch; the last of them used the rate of the step before.
    np.testing.assert_allclose(list(train["learning_rate"].values()), [0.0097, 0.0093], rtol=1e-5)


def test_components_are_those_of_the_validation_rows(run, data):
    directory, model, _ = run
    last = {tag: values[max(values)] for tag, values in read(directory / "train").items()}
    density = model(data.validation.x)
    weights, scales = tf.nn.softmax(density.logits), density.scale_tril[:, :, 0, 0]
    for k in range(3):
        assert last[f"components/weight_{k}"] == pytest.approx(np.mean(weights[:, k]), rel=1e-4)
        assert last[f"components/scale_{k}"] == pytest.approx(np.mean(scales[:, k]), rel=1e-4)
    effective = np.exp(density.mixture_distribution.entropy()).mean()
    assert last["components/effective"] == pytest.approx(effective, rel=1e-4)
    assert 1 <= effective <= 3
    histogram = last["components/weights"]  # rows of (left, right, count)
    assert histogram[:, 2].sum() == 60 * 3


def test_image_config_and_graph(run):
    train = read(run[0] / "train")
    for width, height, png in train["density"].values():
        image = Image.open(io.BytesIO(png))
        assert image.format == "PNG"
        assert image.size == (int(width), int(height)) == (640, 400)
        assert len(np.unique(np.asarray(image.convert("L")))) > 50
    assert train["config"][0].item().decode() == "```yaml\nk: 3\nseed: 0\n\n```"
    graph = tf.compat.v1.GraphDef.FromString(train[GRAPH][0].item())
    assert {"Placeholder", "MatMul"} <= {node.op for node in graph.node}


@pytest.mark.parametrize(("every", "steps"), [(0, []), (1, [1, 2, 3]), (2, [2, 3]), (9, [3])])
def test_images_every_so_often_and_last(model, data, tmp_path, every, steps):
    drive(model, TensorBoard(tmp_path, data, image_every=every), epochs=3)
    assert list(read(tmp_path / "train").get("density", {})) == steps


def test_without_data_and_validation(model, data, tmp_path):
    fit(model, data, TensorBoard(tmp_path), validation=False)
    assert [path.name for path in tmp_path.iterdir()] == ["train"]
    assert set(read(tmp_path / "train")) == TRAIN


def test_resumed_run_goes_on_at_its_step(model, data, tmp_path):
    fit(model, data, TensorBoard(tmp_path, data, "a: 1"), epochs=1)
    fit(model, data, TensorBoard(tmp_path, data, "a: 1"), epochs=3, initial_epoch=1)
    train = read(tmp_path / "train")
    assert list(train["loss"]) == list(train["density"]) == [1, 2, 3]
    assert list(train["config"]) == list(train[GRAPH]) == [0]
    fit(model, data, TensorBoard(tmp_path, data), epochs=3, initial_epoch=3)  # nothing is left
    assert list(read(tmp_path / "train")["loss"]) == [1, 2, 3]


class Kill(tf_keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 1:
            raise KeyboardInterrupt


def test_kill_loses_no_epoch(model, data, tmp_path):
    board = TensorBoard(tmp_path, data)
    with pytest.raises(KeyboardInterrupt):
        fit(model, data, board, Kill(), epochs=2)
    assert list(read(tmp_path / "train")["density"]) == [1]  # while the writers are still open
    board.on_train_end()


@pytest.mark.parametrize("head", [mdn.heads.Diag, mdn.heads.TriL])
def test_one_normal_is_one_component(tmp_path, head):
    rng = np.random.default_rng(0)
    rows = Rows(rng.normal(size=(100, 2)), rng.normal(size=(100, 2)) * [1.0, 100.0])
    rows.y[::4, 1] = np.nan
    data = Data(rows, rows, rows, ("a", "b"), ("c", "d"))
    model = make_model(data, head(2))
    drive(model, TensorBoard(tmp_path, data, rows=40), epochs=1)
    train = read(tmp_path / "train")
    assert set(train) == TRAIN | STATISTICS | component_tags(1) | {GRAPH, "density"}
    assert train["components/weight_0"][1] == train["components/effective"][1] == 1
    assert train["components/weights"][1][:, 2].sum() == 40
    sample = model(rows.x[np.arange(40) * 100 // 40]).mixture_parameters().scale_tril
    diagonal = np.diagonal(sample.numpy()[:, 0], axis1=1, axis2=2)
    scale = np.sqrt(diagonal.prod(axis=1)).mean()
    assert train["components/scale_0"][1] == pytest.approx(scale, rel=1e-4)


def test_steps_of_sequences_without_padding(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(50, 4, 2)), rng.normal(size=(50, 4, 1))
    x[:, 3:] = np.nan
    rows = Rows(x, y)
    data = Data(rows, rows, rows, ("a", "b"), ("c",))
    model = make_model(data, backbone=mdn.backbones.LSTM([3]))
    drive(model, TensorBoard(tmp_path, data), epochs=1)
    train = read(tmp_path / "train")
    assert train["components/weights"][1][:, 2].sum() == 50 * 3 * 3  # N, real steps, K
    assert "density" in train


def test_mirrored_variables(data, tmp_path):
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        model = make_model(data)
    drive(model, TensorBoard(tmp_path, data), epochs=1)
    expected = TRAIN | STATISTICS | component_tags(3) | {GRAPH, "density"}
    assert set(read(tmp_path / "train")) == expected


def test_pictures_of_a_finished_run(tmp_path):
    from mdn.callbacks.tensorboard import write_summary

    paths = [tmp_path / f"{name}.png" for name in ("calibration", "sbc")]
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(paths[0])  # the other is not there
    write_summary(tmp_path / "test", paths, step=7)
    series = read(tmp_path / "test")
    assert {tag: list(steps) for tag, steps in series.items()} == {"calibration": [7]}
    encoded = series["calibration"][7][2]  # after width and height
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(encoded))), pixels)
    write_summary(tmp_path / "none", paths[1:], step=7)
    assert not (tmp_path / "none").exists()
