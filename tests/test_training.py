"""Whole runs: what they write, every option by name, kills, resumption, wrong inputs."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
import typing

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
import tf_keras
from forks import ROOT, Fork, bare_main
from omegaconf import OmegaConf

import mdn
from mdn.cli.train import main
from mdn.config import compose_config, config_dir
from mdn.options import TrainerOptions
from mdn.runs import CONTENTS
from mdn.training import EpochLog, InterruptedRunError, train

TINY = (
    "trainer.epochs=2",
    "trainer.batch_size=32",
    "trainer.verbose=0",
    "trainer.compiled=false",
    "callbacks.tensorboard.image_every=0",
    "backbone.widths=[8]",
)
TINY_DATA = ("data.rows=200", "data.validation_rows=64", "data.test_rows=64")


def run(directory, *overrides, tiny=(*TINY, *TINY_DATA)):
    return train(compose_config([f"output_dir={directory}", *tiny, *overrides]))


def command(directory, *overrides, main=main, **environment):
    """Start `train.py` in a process of its own."""
    words = ["train.py", f"output_dir={directory}", *overrides]
    return Fork(main, words, log=directory, **environment)


def choices(group):
    return sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))


# On one worker, which trains once.
one_worker = pytest.mark.xdist_group("run")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "run"
    return directory, run(directory)


@one_worker
def test_run_directory_is_as_documented(finished):
    directory, _ = finished
    assert {path.name for path in directory.iterdir()} == {*CONTENTS} - {"recipe.json"}
    assert (directory / ".hydra" / "config.yaml").is_file()
    assert list((directory / "checkpoints").glob("epoch-00002.npz"))
    assert list((directory / "tensorboard" / "test").glob("events.out.tfevents.*"))
    for name in ("density", "history", "calibration", "sbc"):
        assert (directory / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "epoch 2: loss=" in (directory / "train.log").read_text()


@one_worker
def test_metrics_are_flat_finite_and_complete(finished):
    directory, metrics = finished
    assert json.loads((directory / "metrics.json").read_text()) == metrics
    assert all(isinstance(v, int | float) and np.isfinite(v) for v in metrics.values())
    assert metrics.keys() >= {
        *("test/nll", "test/nll_se", "test/n", "train/seconds", "train/rows_per_second"),
        "train/seconds_to_first_step",
        *("model/parameters", "baseline/nll", "data/entropy", "test/regret", "test/regret_se"),
        *("test/rmse", "test/coverage50", "test/coverage90", "test/pit_p", "test/crps_skill"),
        *("test/calibration_error", "test/width90", "sbc/p/t", "sbc/p_joint"),
    }
    assert metrics["test/n"] == 64
    record = json.loads((directory / "provenance.json").read_text())
    assert record["seed"] == 0
    assert len(record["data_sha256"]) == 64


@one_worker
def test_saved_model_is_the_one_that_was_scored(finished):
    directory, metrics = finished
    data = compose_config([*TINY_DATA]).data
    from hydra.utils import instantiate

    test = instantiate(data).load().test
    model = mdn.load(directory / "model.keras")
    log_prob = model.predict_distribution(test.x).log_prob(test.y.astype(np.float32))
    assert -np.mean(log_prob) == pytest.approx(metrics["test/nll"], rel=1e-5)


@one_worker
def test_finished_run_is_not_touched(finished):
    directory, _ = finished
    before = {p: p.stat().st_mtime_ns for p in directory.rglob("*") if p.is_file()}
    with pytest.raises(mdn.MDNError, match="finished run: set overwrite=true"):
        run(directory)
    assert before == {p: p.stat().st_mtime_ns for p in directory.rglob("*") if p.is_file()}


@one_worker
def test_seed_decides_the_run(finished, tmp_path, bare_runs):
    _, metrics = finished
    bare = ("callbacks.tensorboard=null", "callbacks.checkpoint=null")  # they change no run
    again, other = run(tmp_path / "0", *bare), run(tmp_path / "1", "seed=1", *bare)
    assert again["test/nll"] == metrics["test/nll"]
    assert other["test/nll"] != metrics["test/nll"]


@one_worker
def test_init_from_starts_at_the_weights_of_a_run(finished, tmp_path, bare_runs, eager_steps):
    directory, metrics = finished
    slow = ("optimizer.learning_rate=1e-12", "trainer.epochs=1")
    again = run(tmp_path / "again", f"init_from={directory}", *slow)
    assert again["test/nll"] == pytest.approx(metrics["test/nll"], abs=1e-4)
    with pytest.raises(mdn.MDNError, match=r"another head \(components: 3, not 5\)"):
        run(tmp_path / "k", f"init_from={directory}", "k=5")
    with pytest.raises(mdn.MDNError, match=r"none has no model\.keras: name a run"):
        run(tmp_path / "new", f"init_from={tmp_path}/none")
    np.savez(tmp_path / "wide.npz", x=np.random.rand(200, 3), y=np.random.rand(200))
    wide = ("data=npz", f"data.path={tmp_path}/wide.npz")
    with pytest.raises(mdn.MDNError, match="takes the features 1, and these data have 3"):
        run(tmp_path / "x", f"init_from={directory}", *wide, tiny=TINY)
    assert not (tmp_path / "k").exists()


# ---------------------------------------------------------------------- every option by name


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Return the overrides that give each source of files something to read."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    n = 300
    frame = pd.DataFrame({"size": rng.normal(size=n), "colour": rng.choice(["red", "blue"], n)})
    frame["price"] = frame["size"] + 3.0 * (frame["colour"] == "red") + rng.normal(size=n)
    frame["weight"] = rng.uniform(size=n)
    frame.to_csv(folder / "rows.csv", index=False)
    frame.to_parquet(folder / "rows.parquet")
    with tf.io.TFRecordWriter(str(folder / "rows.tfrecord")) as file:
        for size, price in zip(frame["size"], frame["price"], strict=True):
            lists = {"size": [size], "price": [price]}
            file.write(
                tf.train.Example(
                    features=tf.train.Features(
                        feature={
                            name: tf.train.Feature(float_list=tf.train.FloatList(value=value))
                            for name, value in lists.items()
                        }
                    )
                ).SerializeToString()
            )
    np.savez(folder / "rows.npz", x=rng.normal(size=[n, 3]), y=rng.normal(size=n))
    x, y = rng.normal(size=[n, 4, 3]), rng.normal(size=[n, 4, 1])
    x[:50, 2:] = np.nan
    np.savez(folder / "sequences.npz", x=x, y=y)
    np.savez(folder / "last.npz", x=x, y=y[:, 0])
    return {
        "csv": [f"data.path={folder}/rows.csv", "data.targets=[price]", "data.weight=weight"],
        "parquet": [f"data.path={folder}/rows.parquet", "data.targets=[price,size]"],
        "tfrecord": [f"data.path={folder}/rows.tfrecord", "data.targets=price"],
        "npz": [f"data.path={folder}/rows.npz"],
        "flights": ["data.max_rows=3000"],
        "points": [f"data.y={rng.normal(size=40).round(3).tolist()}"],
        "digits": ["model=vae"],  # no density has a value for zeros and ones
        "sequences": ["data=npz", f"data.path={folder}/sequences.npz"],
        "last": ["data=npz", f"data.path={folder}/last.npz"],
    }


# A run tries many choices at once: the rows of a simulator with known density, a head, and more.
SIMULATED = {
    "sinusoid": "model=diag backbone=mlp backbone.dropout=0.1 backbone.layer_norm=true "
    "trainer.compiled=true trainer.schedule=constant "
    "callbacks.tensorboard.image_every=1",
    "two_moons": "model=diag backbone=resnet backbone.width=8 backbone.dropout=0.1 "
    "optimizer=adamw optimizer.global_clipnorm=1.0",
    "econ_density": "model=tril optimizer=sgd optimizer.learning_rate=1e-3 trainer.warmup=0",
    "two_gaussians": "model=tril model.positivity=elu trainer.schedule=plateau strategy=cpu "
    "callbacks.tensorboard=null",
    "arma_jump": "model=mixture_diag trainer.precision=mixed_bfloat16 "
    "callbacks.early_stopping=null",
    "slcp": "model=mixture_diag k=2 ensemble=2 recalibrate=true",
    "skew_normal": "model=tril_precision",
    "bivariate_mixture": "model=tril_precision backbone=constant",
    "linear_gaussian": "model=low_rank recalibrate=true",
    "random_gaussians": "model=low_rank k=2",
    "gaussians": "model=mixture k=2 model.positivity=exp trainer.steps_per_execution=2 "
    "callbacks.early_stopping.patience=1 callbacks.checkpoint=null",
}
# The same of rows that are read, by the name of what `tables` gives.
READ = {
    "csv": "data=csv model=mixture",
    "parquet": "data=parquet model=mixture",
    "tfrecord": "data=tfrecord k=2",
    "npz": "data=npz k=2",
    "flights": "data=flights k=2",
    "points": "data=points k=2",
    "digits": "data=digits model=vae k=2",  # no density has a value for zeros and ones
    "sequences": "data=npz backbone=lstm backbone.units=[4]",
    "last": "data=npz backbone=lstm backbone.units=[4] backbone.return_sequences=false",
}
# These draw and export too: one target and several, of one member and of two, recalibrated,
# of categories with gaps in the targets, of no features, of sequences.
WHOLE = ("sinusoid", "slcp", "linear_gaussian", "flights", "points", "sequences")
# These train by graphs and XLA; the others step by step, as to trace a step takes longer.
TRACED = ("sinusoid", "arma_jump", "gaussians", "slcp", "flights", "digits", "last", "sequences")
HEADS = {*choices("model")} - {"vae", "distribution"}  # these have no head
SEVERAL_TARGETS = {
    *("two_moons", "two_gaussians", "slcp", "bivariate_mixture", "random_gaussians", "parquet")
}


def chosen(group, options):
    """Return what these overrides choose of a group, "" where they leave it as it is."""
    return next((o.split("=")[1] for o in options.split() if o.startswith(f"{group}=")), "")


@pytest.fixture
def run_of(request, tmp_path):
    """Return a function that trains on a source with these options, and what it is to do."""

    def run_of(source, options, *data):
        for fixture, exceptions in (("bare_runs", WHOLE), ("eager_steps", TRACED)):
            if source not in exceptions:
                request.getfixturevalue(fixture)
        return run_one(tmp_path / "run", options, *data)

    return run_of


def run_one(directory, options, *data):
    tiny = TINY if chosen("backbone", options) in ("", "mlp") else TINY[:-1]
    return run(directory, *options.split(), *data, tiny=tiny)


@pytest.mark.parametrize("source", SIMULATED)
def test_every_simulator_trains(source, run_of):
    metrics = run_of(source, f"data={source} {SIMULATED[source]}", *TINY_DATA)
    assert metrics["test/nll"] < metrics["baseline/nll"] + 1.0
    assert np.isfinite(metrics["test/regret"])
    recalibrated = "recalibrate=true" in SIMULATED[source]
    assert ("recalibration/gain" in metrics) == recalibrated


@pytest.mark.parametrize("source", READ)
def test_every_source_of_rows_trains(source, tables, run_of):
    metrics = run_of(source, READ[source], *tables[source])
    assert np.isfinite(metrics["test/nll"])
    assert "test/regret" not in metrics


def test_every_choice_is_in_some_run():
    runs = {source: f"data={source} {options}" for source, options in SIMULATED.items()} | READ
    for group in ("data", "backbone", "optimizer"):
        default = {"optimizer": "adam"}.get(group, "")
        tried = {chosen(group, options) or default for options in runs.values()} - {""}
        assert tried == set(choices(group)), group
    for several in (False, True):
        names = [name for name in runs if (name in SEVERAL_TARGETS) == several]
        assert {chosen("model", runs[name]) for name in names} >= HEADS
    schedules = {chosen("trainer.schedule", options) or "cosine" for options in runs.values()}
    assert schedules == set(typing.get_args(TrainerOptions.model_fields["schedule"].annotation))


@tf_keras.saving.register_keras_serializable(package="tests")
class OwnBackbone(tf_keras.Model):
    """A Keras model of the user's own."""

    def __init__(self, units=4, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.dense = tf_keras.layers.Dense(units, "tanh")

    def call(self, inputs):
        return self.dense(inputs)

    def get_config(self):
        return {"units": self.units}


def test_backbone_of_the_users_own(tmp_path, bare_runs):
    config = compose_config([f"output_dir={tmp_path}/run", *TINY[:-1], *TINY_DATA])
    OmegaConf.set_struct(config, False)
    config.backbone = {"_target_": f"{OwnBackbone.__module__}.OwnBackbone", "units": 6}
    train(config)
    assert mdn.load(tmp_path / "run" / "model.keras").backbone.units == 6


# ---------------------------------------------------------------------- wrong inputs


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data=csv"], "data.path is not set"),
        (["data=csv", "data.path=none.csv", "data.targets=[a]"], "none.csv"),
        (["data.rows=10"], "10 train rows are fewer than one batch of 32"),
        (["model.event_size=2"], r"model.event_size=2 but the data have 1 targets \(t\)"),
        (["backbone=lstm"], r"needs sequences \[N, T, F\]"),
        (["backbone._target_=no.such.Thing"], "no.such.Thing"),
        (["backbone.activation=gelo"], "gelo"),
        (["strategy=gpu"], "strategy=gpu needs 1 GPU and TensorFlow sees 0"),
        (["strategy=mirrored"], "strategy=mirrored needs 2 GPUs and TensorFlow sees 0"),
        (["strategy=multi_worker"], "strategy=multi_worker cannot use TF_CONFIG"),
        (["strategy=tpu"], "strategy=tpu finds no TPU called 'local'"),
    ],
)
def test_wrong_inputs_are_one_line_and_leave_nothing(overrides, message, tmp_path):
    tiny = TINY[:-1] if any(o.startswith("backbone=") for o in overrides) else TINY
    if "data=csv" not in overrides:
        tiny = (*tiny, *TINY_DATA)
    with pytest.raises(mdn.MDNError, match=message) as error:
        run(tmp_path / "run", *overrides, tiny=tiny)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("directory", ["/proc/mdn", "/dev/null/run"])
def test_directory_that_cannot_be_written(directory):
    with pytest.raises(mdn.MDNError, match=f"output_dir={directory}"):
        run(directory)


# ---------------------------------------------------------------------- kills


def weights(directory):
    return mdn.load(directory / "model.keras").get_weights()


@pytest.mark.slow
def test_killed_run_ends_bit_for_bit_as_the_uninterrupted_one(tmp_path):
    options = (
        "trainer.deterministic=true",
        "trainer.epochs=12",
        "trainer.schedule=plateau",
        "backbone.dropout=0.2",
        "callbacks.early_stopping.patience=3",
        *("data.rows=4000", "data.test_rows=500"),
        "callbacks.tensorboard.image_every=0",
    )
    whole = command(tmp_path / "whole", *options, main=bare_main)
    killed = command(tmp_path / "killed", *options, main=bare_main)
    checkpoints = tmp_path / "killed" / "checkpoints"
    while killed.poll() is None and not (
        any(path.stem >= "epoch-00003" for path in checkpoints.glob("epoch-*.npz"))
    ):
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, killed.communicate()
    assert not (tmp_path / "killed" / "metrics.json").exists()
    assert whole.wait() == 0, whole.communicate()
    resumed = command(tmp_path / "killed", *options, main=bare_main)
    out, err = resumed.communicate()
    assert resumed.returncode == 0, err
    assert "going on from" in out
    for a, b in zip(weights(tmp_path / "whole"), weights(tmp_path / "killed"), strict=True):
        np.testing.assert_array_equal(a, b)
    one, two = (
        json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "killed")
    )
    assert one["test/nll"] == two["test/nll"]
    assert one["train/epochs"] == two["train/epochs"]


@pytest.mark.slow
def test_interrupted_run_keeps_what_it_learned(tmp_path):
    process = command(tmp_path / "run", "trainer.epochs=1000", "data.rows=2000")
    while process.poll() is None and not list(tmp_path.glob("run/checkpoints/epoch-*.npz")):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130, err
    assert "model.keras holds the best weights so far" in err
    assert f"output_dir={tmp_path}/run go on" in err
    assert "Traceback" not in err
    assert mdn.load(tmp_path / "run" / "model.keras").head.components == 3


@pytest.mark.parametrize(
    ("extra", "follows"),
    [((), r"run go on$"), (("callbacks.checkpoint=null",), "begin anew, as callbacks.checkpoint")],
)
def test_interrupted_run_says_what_the_same_options_do(
    extra, follows, tmp_path, monkeypatch, bare_runs, eager_steps
):
    def press(self, epoch, logs=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(EpochLog, "on_epoch_end", press)
    with pytest.raises(InterruptedRunError, match=follows):
        run(tmp_path / "run", "callbacks.tensorboard=null", *extra)


def main_on_a_full_disk():
    # A file-size limit of the process is met as a full disk is: by a write that fails.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    main()


def test_full_disk_while_the_model_is_saved(tmp_path):
    process = command(tmp_path / "run", *TINY, *TINY_DATA, main=main_on_a_full_disk)
    _, err = process.communicate()
    assert process.returncode == 2, err
    assert err.startswith("error: cannot write")
    assert err.count("\n") == 1
    assert not list(tmp_path.rglob("*partial*"))
    assert not (tmp_path / "run" / "metrics.json").exists()


# ---------------------------------------------------------------------- quality


@pytest.mark.slow
def test_main_job_comes_near_the_entropy(tmp_path):
    """The command as a user types it."""
    process = subprocess.run(
        [sys.executable, "train.py", "model=mixture", "k=3", f"output_dir={tmp_path}/run"],
        cwd=ROOT,
        env={name: v for name, v in os.environ.items() if name != "XLA_FLAGS"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["test/n"] == 10_000
    assert metrics["test/regret"] < 0.05
    assert metrics["test/regret"] > -4.0 * metrics["test/regret_se"]
    assert metrics["data/entropy"] == pytest.approx(-1.2263, abs=1e-3)
    last = process.stdout.splitlines()[-1]
    assert last.endswith(f"tensorboard --logdir {tmp_path}/run")


@pytest.mark.slow
def test_no_component_dies(tmp_path, bare_runs):
    run(  # of three members, each as a run of its own seed; how good they are is not asked
        tmp_path / "run",
        *("k=8", "ensemble=3", "callbacks.tensorboard=null", "data.test_rows=200"),
        tiny=("trainer.verbose=0",),
    )
    model = mdn.load(tmp_path / "run" / "model.keras")
    x = np.linspace(-0.1, 1.1, 500)[:, None]
    for member in map(model.member, range(3)):
        logits = member.predict_distribution(x).logits.numpy()
        weights = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
        # A dead component has no weight to speak of at any x; the density needs three or four of
        # the eight, and the others are to share in the work.
        assert weights.max(axis=0).min() > 0.01
        assert weights.mean(axis=0).min() > 0.001


@pytest.mark.slow
def test_flights_beat_one_gaussian_by_far(tmp_path, bare_runs):
    metrics = run(
        tmp_path / "run",
        *("data=flights", "model=mixture", "k=5", "callbacks.tensorboard=null"),
        *("trainer.epochs=2", "trainer.batch_size=512"),
        tiny=("trainer.verbose=0",),
    )
    assert metrics["data/rows"] + metrics["data/rows_without_target"] == 336_776
    gain = metrics["baseline/nll_complete"] - metrics["test/nll_complete"]
    assert gain > 1.3
