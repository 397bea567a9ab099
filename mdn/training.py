"""One run, from a checked config to a finished run directory.

Shape letters: D event size.
"""

from __future__ import annotations

import importlib
import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import tensorflow as tf
import tf_keras
from omegaconf import DictConfig, OmegaConf

from mdn.callbacks.checkpoint import Checkpoint, Progress
from mdn.callbacks.guard import NanGuard
from mdn.config import make
from mdn.data.checks import check_batch_size
from mdn.data.pipeline import evaluation_batches, training_batches
from mdn.data.rows import Data
from mdn.errors import ConfigError, RunError
from mdn.evaluation import evaluate, print_table
from mdn.export import export_saved_model
from mdn.features import Columns
from mdn.model import MDN, load
from mdn.plots import save_plots
from mdn.runs import RunDirectory, provenance
from mdn.strategy import is_chief

log = logging.getLogger(__name__)

EVALUATION_BATCH = 4096
# Python is visited at least this often, for the progress bar and the check for NaN.
MOST_STEPS_PER_EXECUTION = 500


class InterruptedRunError(RunError):
    """Ctrl-C: what was learned is kept, and the message says where."""


def train(config: DictConfig, overrides: list[str] | None = None) -> dict[str, float]:
    """Train, evaluate and export as the config says; return what metrics.json holds.

    Args:
        config: a config that `mdn.config` composed and checked.
        overrides: the command line it came from, for the record.

    Raises:
        MDNError: anything that the user can mend; nothing half-written stays behind.
    """
    directory = RunDirectory(config, overrides)
    strategy = make(config, "strategy")
    seed_everything(config)
    data: Data = make(config, "data").load()
    check_batch_size(len(data.train), config.trainer.batch_size)
    with strategy.scope():
        model = build_model(config, data)
        compile_model(model, config, len(data.train) // config.trainer.batch_size)
    chief = is_chief(strategy)
    callbacks, checkpoint = make_callbacks(config, data, directory, chief)
    if not chief:
        fit(model, config, data, directory, callbacks, checkpoint)
        with tempfile.TemporaryDirectory() as scratch:
            model.save(Path(scratch) / "model.keras")  # to save is a joint act of all workers
        return {}
    directory.create()
    with directory.logging():
        log.info("run directory: %s", directory.path)
        try:
            progress = fit(model, config, data, directory, callbacks, checkpoint)
            metrics = finish(model, config, data, directory, progress)
        except KeyboardInterrupt:
            raise InterruptedRunError(
                f"interrupted after the training, which is kept in {directory.path}: the same "
                f"command with output_dir={directory.path} goes on"
            ) from None
        except OSError as error:
            raise RunError(
                f"cannot write {error.filename or directory.path}: {error.strerror}"
            ) from error
        log.info("look at %s with: tensorboard --logdir %s", directory.path, directory.path)
    return metrics


def seed_everything(config: DictConfig) -> None:
    """Seed Python, NumPy and TensorFlow, and make the operations deterministic if asked to."""
    tf_keras.utils.set_random_seed(config.seed)
    if config.trainer.deterministic:
        tf.config.experimental.enable_op_determinism()


def build_model(config: DictConfig, data: Data) -> MDN:
    """Return the model with scaling and starting values from the train rows.

    Raises:
        ConfigError: `model.event_size` is not the number of targets.
        RunError: the run of `init_from` has no model, or one of another shape.
    """
    event_size = len(data.targets)
    if config.model.get("event_size") not in (None, event_size):
        raise ConfigError(
            f"model.event_size={config.model.event_size} but the data have {event_size} targets "
            f"({', '.join(data.targets)}): leave it out"
        )
    tf_keras.mixed_precision.set_global_policy(config.trainer.precision)
    try:
        model = MDN(make(config, "model", event_size=event_size), make(config, "backbone"))
        if config.init_from is None:
            return _adapt(model, config, data)
        return _load_start(config, data, model)
    finally:
        tf_keras.mixed_precision.set_global_policy("float32")


def _load_start(config: DictConfig, data: Data, fresh: MDN) -> MDN:
    """Return the model of the run `init_from`, if it is one that this config would build."""
    _import_home(config.backbone._target_)
    model = load(f"{config.init_from}/model.keras")
    for part in ("head", "backbone"):
        was, now = (_options(getattr(m, part)) for m in (model, fresh))
        if was != now:
            changed = sorted(k for k in {*was, *now} if was.get(k) != now.get(k))
            raise RunError(
                f"init_from={config.init_from} has another {part} "
                f"({', '.join(f'{k}: {was.get(k)}, not {now.get(k)}' for k in changed)}): "
                "use the same model and backbone"
            )
    sizes = [_encoder_input(m.encoder) for m in (model, _adapt(fresh, config, data))]
    if sizes[0] != sizes[1]:
        raise RunError(
            f"init_from={config.init_from} takes the features {sizes[0]}, and these data have "
            f"{sizes[1]}: use the same features"
        )
    if data.missing == "indicator" and getattr(model.encoder, "missing", "indicator") == "error":
        raise RunError(
            f"init_from={config.init_from} was trained without missing features: "
            "use data.missing=error"
        )
    model.missing = data.missing
    return model


def _adapt(model: MDN, config: DictConfig, data: Data) -> MDN:
    model.adapt(data.train.x, data.train.y, missing=data.missing, seed=config.seed)
    return model


def _encoder_input(encoder: Any) -> list[str] | int:
    """Return the names of the raw columns, or the number of features of a matrix."""
    return encoder.names if isinstance(encoder, Columns) else encoder.features


def _options(layer: tf_keras.layers.Layer) -> dict[str, Any]:
    config = {"class": type(layer).__name__, **layer.get_config()}
    return {key: value for key, value in config.items() if key not in ("name", "dtype")}


def _import_home(target: str) -> None:
    # A registered class of the user's own can be loaded once its module is imported.
    importlib.import_module(target.rpartition(".")[0])


def compile_model(model: MDN, config: DictConfig, steps: int) -> None:
    """Compile the model with the optimizer and schedule of the config.

    Args:
        model: the model.
        config: the config.
        steps: train steps an epoch.
    """
    trainer = config.trainer
    options = {}
    if trainer.schedule == "cosine":
        total, peak = steps * trainer.epochs, config.optimizer.learning_rate
        warmup = round(trainer.warmup * total)
        options["learning_rate"] = tf_keras.optimizers.schedules.CosineDecay(
            initial_learning_rate=0.0 if warmup else peak,
            decay_steps=total - warmup,
            warmup_target=peak if warmup else None,
            warmup_steps=warmup,
        )
    optimizer = make(config, "optimizer", **options)
    model.compile(
        optimizer,
        loss=config.loss,
        jit_compile=None if trainer.compiled else False,
        steps_per_execution=trainer.steps_per_execution or min(steps, MOST_STEPS_PER_EXECUTION),
    )


def make_callbacks(
    config: DictConfig, data: Data, directory: RunDirectory, chief: bool = True
) -> tuple[list[tf_keras.callbacks.Callback], Checkpoint]:
    """Return the callbacks of the config, those set to null left out, and the checkpoints.

    Args:
        config: the config.
        data: for the dashboard's pictures, and to name the row that leads to NaN.
        directory: where the dashboard and the checkpoints go.
        chief: whether this process writes.
    """
    nodes = {name: node for name, node in config.callbacks.items() if node is not None}
    if config.trainer.schedule != "plateau":
        nodes.pop("plateau", None)
    if not chief:
        nodes.pop("tensorboard", None)
    options: dict[str, dict[str, Any]] = {
        "tensorboard": {
            "log_dir": str(directory / "tensorboard"),
            "data": data,
            "config_text": OmegaConf.to_yaml(config, resolve=True),
        },
    }
    callbacks = [
        make(config, f"callbacks.{name}", **options.get(str(name), {}))
        for name in nodes
        if name != "checkpoint"
    ]
    callbacks += [NanGuard(data.train, data.features, data.targets), EpochLog()]
    folder = str(directory / "checkpoints")
    if "checkpoint" in nodes:
        checkpoint = make(
            config,
            "callbacks.checkpoint",
            directory=folder,
            write=chief,
            data=data.fingerprint(),
        )
    else:
        checkpoint = Checkpoint(folder, write=False)  # keeps count all the same
    checkpoint.watch(callbacks)
    return callbacks, checkpoint


def fit(
    model: MDN,
    config: DictConfig,
    data: Data,
    directory: RunDirectory,
    callbacks: list[tf_keras.callbacks.Callback],
    checkpoint: Checkpoint,
) -> Progress:
    """Train, from the newest checkpoint where there is one; the model ends with its best weights.

    Raises:
        InterruptedRunError: Ctrl-C; the best weights so far are in `model.keras`.
    """
    trainer = config.trainer
    first_epoch = checkpoint.restore(model)
    if checkpoint.progress.stopped:
        first_epoch = trainer.epochs  # nothing is left but to take the best weights
    train_arrays = model.arrays(data.train)
    batch_size = trainer.batch_size
    verbose = trainer.verbose
    if verbose is None:
        verbose = 1 if sys.stdout.isatty() else 2
    try:
        model.fit(
            training_batches(train_arrays, batch_size, seed=config.seed, first_epoch=first_epoch),
            epochs=trainer.epochs,
            initial_epoch=first_epoch,
            steps_per_epoch=len(data.train) // batch_size,
            validation_data=evaluation_batches(model.arrays(data.validation), EVALUATION_BATCH),
            callbacks=[*callbacks, checkpoint],
            verbose=verbose,
        )
    except KeyboardInterrupt:
        done = checkpoint.progress.epoch
        for callback in callbacks:
            callback.on_train_end()
        model.save(directory / "model.keras")
        raise InterruptedRunError(
            f"interrupted after {done} whole epochs: {directory / 'model.keras'} holds the best "
            f"weights so far; the same command with output_dir={directory.path} goes on"
        ) from None
    return checkpoint.progress


def finish(
    model: MDN, config: DictConfig, data: Data, directory: RunDirectory, progress: Progress
) -> dict[str, float]:
    """Evaluate and export; `metrics.json` comes last and marks the run as finished."""
    model.save(directory / "model.keras")
    evaluation = evaluate(model, data)
    rows = len(data.train) // config.trainer.batch_size * config.trainer.batch_size
    metrics = {
        **evaluation.metrics,
        **data.notes,
        "train/seconds": progress.seconds,
        "train/epochs": progress.epoch,
        "train/rows_per_second": rows * progress.epoch / max(progress.seconds, 1e-9),
        "model/parameters": model.count_params(),
    }
    export_saved_model(model, directory / "saved_model", overwrite=True, targets=data.targets)
    save_plots(model, data, progress.history, evaluation, directory / "plots")
    directory.write_json("provenance.json", provenance(config, data.fingerprint()))
    directory.write_json("metrics.json", metrics)
    print_table(metrics)
    return metrics


class EpochLog(tf_keras.callbacks.Callback):
    """Writes a line per epoch to the log."""

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._start = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        values = " ".join(f"{name}={value:.5g}" for name, value in (logs or {}).items())
        log.debug("epoch %d: %s (%.2f s)", epoch + 1, values, time.perf_counter() - self._start)
