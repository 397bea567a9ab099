"""One run, from a checked config to a finished run directory."""

from __future__ import annotations

import copy
import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras
from omegaconf import DictConfig, OmegaConf

from mdn.base import TrainedModel
from mdn.callbacks.checkpoint import Checkpoint, Progress
from mdn.callbacks.guard import NanGuard
from mdn.callbacks.interrupt import Interrupt
from mdn.compiled import EVALUATION_BATCH
from mdn.config import make
from mdn.data.checks import check_batch_size
from mdn.data.pipeline import Batches, evaluation_batches, training_batches
from mdn.data.rows import Data
from mdn.data.splits import draw_folds
from mdn.errors import RunError
from mdn.evaluation import print_table
from mdn.export import directory_size
from mdn.options import GENERATIVE
from mdn.runs import RunDirectory, provenance
from mdn.strategy import is_chief
from mdn.tasks import build_model, get_task

log = logging.getLogger(__name__)

EARLY_STOPPING = "mdn.callbacks.stopping.EarlyStopping"
MEMBER_STOPPING = "mdn.callbacks.stopping.MemberStopping"  # in its place, of an ensemble


class InterruptedRunError(RunError):
    """Ctrl-C: what was learned is kept, and the message says where."""


def train(
    config: DictConfig, overrides: list[str] | None = None, launched: float | None = None
) -> dict[str, float]:
    """Train, evaluate and export as the config says; return what metrics.json holds.

    Args:
        config: a config that `mdn.config` composed and checked.
        overrides: the command line it came from, for the record.
        launched: `time.monotonic()` when the command began, by default now.

    Raises:
        MDNError: anything that the user can mend; nothing half-written stays behind.
    """
    first_step = FirstStep(time.monotonic() if launched is None else launched)
    directory = RunDirectory(config, overrides)
    strategy = make(config, "strategy")
    seed_everything(config)
    ignored = config.model._target_ == GENERATIVE and "missing" in config.data
    data: Data = make(config, "data", **({"missing": "indicator"} if ignored else {})).load()
    check_batch_size(data.train_rows, config.trainer.batch_size)
    with strategy.scope():
        model = build_model(config, data)
        compile_model(model, config, data.train_rows // config.trainer.batch_size)
    chief = is_chief(strategy)
    callbacks, checkpoint = make_callbacks(config, data, directory, chief)
    callbacks.append(first_step)
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
            metrics = finish(model, config, data, directory, progress, first_step.seconds)
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


def compile_model(model: TrainedModel, config: DictConfig, steps: int) -> None:
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
        loss=config.loss if isinstance(config.loss, str) else OmegaConf.to_container(config.loss),
        jit_compile=None if trainer.compiled else False,
        steps_per_execution=trainer.steps_per_execution,
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
            "panels": get_task(config).panels,
            "config_text": OmegaConf.to_yaml(config, resolve=True),
        },
    }
    stopping = nodes.get("early_stopping")
    if config.ensemble > 1 and stopping is not None and stopping._target_ == EARLY_STOPPING:
        config = copy.deepcopy(config)
        config.callbacks.early_stopping._target_ = MEMBER_STOPPING
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
    model: TrainedModel,
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
    verbose = trainer.verbose
    if verbose is None:
        verbose = 1 if sys.stdout.isatty() else 2
    batches, held_out = make_batches(model, config, data, first_epoch)
    try:
        with Interrupt() as interrupt:
            model.fit(
                batches,
                epochs=trainer.epochs,
                initial_epoch=first_epoch,
                validation_data=held_out,
                callbacks=[*callbacks, checkpoint, interrupt],
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
    model: TrainedModel,
    config: DictConfig,
    data: Data,
    directory: RunDirectory,
    progress: Progress,
    to_first_step: float | None = None,
) -> dict[str, float]:
    """Evaluate and export; `metrics.json` comes last and marks the run as finished."""
    model.save(directory / "model.keras")
    task = get_task(config)
    rows = data.train_rows // config.trainer.batch_size * config.trainer.batch_size
    metrics = {
        **task.judge(model, data, progress.history, directory / "plots"),
        **data.notes,
        "train/seconds": progress.seconds,
        "train/epochs": progress.epoch,
        "train/rows_per_second": rows * progress.epoch / max(progress.seconds, 1e-9),
        "model/parameters": model.count_params(),
    }
    if to_first_step is not None:  # else nothing was left to train
        metrics["train/seconds_to_first_step"] = to_first_step
    task.export(model, directory / "saved_model", config)
    metrics["export/bytes"] = directory_size(directory / "saved_model")
    if config.get("comparison") is not None:
        metrics |= make(config, "comparison")(config)
    directory.write_json("provenance.json", provenance(config, data.fingerprint()))
    directory.write_json("metrics.json", metrics)
    print_table(metrics)
    return metrics


def make_batches(
    model: TrainedModel, config: DictConfig, data: Data, first_epoch: int
) -> tuple[Batches, Batches]:
    """Return what a model learns from and what it is validated on.

    Member 0 of an ensemble has the rows of a single run. Of a random split, the other members hold
    out as many rows, but others. Any other split stays as it is for all.
    """
    order = {
        "seed": config.seed,
        "first_epoch": first_epoch,
        "chunk": config.trainer.steps_per_execution,
    }
    size = config.trainer.batch_size
    held_out = model.arrays(data.validation)
    validation: dict[str, Any] = {"complete": model.is_complete(held_out)}
    if data.stream is not None:
        batches = data.stream.batches(model, size, **order)
    else:
        arrays = model.arrays(data.train)
        if config.ensemble > 1:
            n, kept = len(data.train), len(data.validation)
            arrays = tuple(map(np.concatenate, zip(arrays, held_out, strict=True)))
            rows = np.arange(n + kept)
            one_set = data.validation is data.train  # so few that all rows do both
            if config.data.get("split", "random") == "random" and not one_set:
                rest = np.random.default_rng([config.seed, 0x656E73]).permutation(n)
                learned, folds = draw_folds(np.append(rows[n:], rest), kept, config.ensemble)
            else:
                learned, folds = (
                    np.tile(part, [config.ensemble, 1]) for part in (rows[:n], rows[n:])
                )
            held_out, order["members"], validation["members"] = arrays, learned, folds
            validation["complete"] = model.is_complete(arrays)
        order["complete"] = model.is_complete(arrays)
        batches = training_batches(arrays, size, **order)
    return batches, evaluation_batches(
        held_out, EVALUATION_BATCH, chunk=batches.chunk, **validation
    )


class FirstStep(tf_keras.callbacks.Callback):
    """Takes the time from a launch to the end of the first train step, or chunk of them.

    Args:
        launched: `time.monotonic()` at the launch.
    """

    def __init__(self, launched: float) -> None:
        super().__init__()
        self.launched = launched
        self.seconds: float | None = None

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self.seconds is None:
            self.seconds = time.monotonic() - self.launched


class EpochLog(tf_keras.callbacks.Callback):
    """Writes a line per epoch to the log."""

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._start = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        values = " ".join(f"{name}={value:.5g}" for name, value in (logs or {}).items())
        log.debug("epoch %d: %s (%.2f s)", epoch + 1, values, time.perf_counter() - self._start)
