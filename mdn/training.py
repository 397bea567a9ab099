"""One run, from a checked config to a finished run directory."""

from __future__ import annotations

import copy
import dataclasses
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras
from omegaconf import DictConfig, OmegaConf

from mdn.base import TrainedModel
from mdn.budget import epoch_steps, member_rows, settle
from mdn.callbacks.averaging import AveragedWeights
from mdn.callbacks.checkpoint import Checkpoint, Progress
from mdn.callbacks.guard import DivergedError, NanGuard
from mdn.callbacks.interrupt import Interrupt
from mdn.callbacks.splitting import SplitComponents
from mdn.callbacks.tensorboard import write_summary
from mdn.config import make
from mdn.data.checks import check_batch_size
from mdn.data.rows import Data
from mdn.errors import DataError, RunError
from mdn.evaluation import finite, print_table
from mdn.export import directory_size
from mdn.options import AUTO, GENERATIVE
from mdn.plots import write_figures
from mdn.preparation import compile_model, make_batches, member_folds
from mdn.recipes import variants, weigh
from mdn.runs import RunDirectory, place_of_candidate, place_of_variant, provenance
from mdn.selection import choose, held_out_nll, held_out_weight
from mdn.stacking import stack
from mdn.strategy import is_chief
from mdn.tasks import build_model, get_task
from mdn.warm_start import check_start

log = logging.getLogger(__name__)

EARLY_STOPPING = "mdn.callbacks.stopping.EarlyStopping"
MEMBER_STOPPING = "mdn.callbacks.stopping.MemberStopping"  # in its place, of an ensemble


Fitted = tuple[TrainedModel, DictConfig, Progress]


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
    check_start(config)
    strategy = make(config, "strategy")
    seed_everything(config)
    ignored = config.model._target_ == GENERATIVE and "missing" in config.data
    data: Data = make(config, "data", **({"missing": "indicator"} if ignored else {})).load()
    if config.get("recalibrate") and data.validation is data.train:
        raise DataError(
            "recalibrate=true: all rows are learned from, so that none can judge; leave it out"
        )
    config = settle(config, data)
    check_batch_size(member_rows(config, data), config.trainer.batch_size)
    chief = is_chief(strategy)

    def prepare(config: DictConfig, place: str = "") -> tuple[TrainedModel, list, Checkpoint]:
        with strategy.scope():
            model = build_model(config, data)
            compile_model(model, config, epoch_steps(config, data))
        callbacks, checkpoint = make_callbacks(config, data, directory, chief, place)
        return model, [*callbacks, first_step], checkpoint

    fit_several: Callable | None = None
    first = config
    if config.model.get("components") == AUTO:
        fit_several, first = fit_candidates, _candidate(config, 1)
    elif config.recipe == "auto":
        fit_several, first = fit_variants, next(iter(variants(config).values()))
    # Of several too, what cannot be built is told before anything is written.
    model, callbacks, checkpoint = prepare(first)
    if not chief:
        fit(model, config, data, directory, callbacks, checkpoint)
        with tempfile.TemporaryDirectory() as scratch:
            model.save(Path(scratch) / "model.keras")  # to save is a joint act of all workers
        return {}
    directory.create()
    with directory.logging():
        log.info("run directory: %s", directory.path)
        try:
            notes: dict[str, float] = {}
            if fit_several is not None:
                model, config, progress, notes = fit_several(config, data, directory, prepare)
            else:
                progress = fit(model, config, data, directory, callbacks, checkpoint)
            metrics = finish(model, config, data, directory, progress, first_step.seconds, notes)
        except KeyboardInterrupt:
            raise InterruptedRunError(
                f"interrupted: what was trained is in {directory.path}; "
                f"{_what_follows(config, directory.path)}"
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


def make_callbacks(
    config: DictConfig,
    data: Data,
    directory: RunDirectory,
    chief: bool = True,
    place: str = "",
) -> tuple[list[tf_keras.callbacks.Callback], Checkpoint]:
    """Return the callbacks of the config, those set to null left out, and the checkpoints.

    Args:
        config: the config.
        data: for the dashboard's pictures, and to name the row that leads to NaN.
        directory: where the dashboard and the checkpoints go.
        chief: whether this process writes.
        place: a folder of their own within those of the run, for one of several candidates.
    """
    nodes = {name: node for name, node in config.callbacks.items() if node is not None}
    if config.trainer.schedule != "plateau":
        nodes.pop("plateau", None)
    if not chief:
        nodes.pop("tensorboard", None)
    options: dict[str, dict[str, Any]] = {
        "tensorboard": {
            "log_dir": str(directory / "tensorboard" / place),
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
    if config.trainer.split_components:
        callbacks.append(SplitComponents(data.train))  # before what remembers the weights
    callbacks += [NanGuard(data.train, data.features, data.targets), EpochLog()]
    if config.trainer.ema is not None:
        callbacks.append(AveragedWeights())  # behind those that read the weights
    folder = str(directory / "checkpoints" / place)
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
            f"weights so far; {_what_follows(config, directory.path)}"
        ) from None
    return checkpoint.progress


def _what_follows(config: DictConfig, path: Path) -> str:
    """Return what the options of an interrupted run do when they are given again."""
    again = f"the same options with output_dir={path}"
    if config.callbacks.get("checkpoint") is None:
        return f"{again} begin anew, as callbacks.checkpoint=null keeps no checkpoints"
    return f"{again} go on"


def _fit_one(
    config: DictConfig, data: Data, directory: RunDirectory, prepare: Callable, place: str
) -> Fitted:
    """Train one of several models, as it would be trained in a run of its own.

    It has checkpoints of its own in `place`, so that a killed run goes on with the model it was
    at; those that had finished take their best weights from there, and are not trained again.
    """
    seed_everything(config)
    model, callbacks, checkpoint = prepare(config, place)
    return model, config, fit(model, config, data, directory, callbacks, checkpoint)


def fit_variants(
    config: DictConfig, data: Data, directory: RunDirectory, prepare: Callable
) -> tuple[TrainedModel, DictConfig, Progress, dict[str, float]]:
    """Train the variants of a recipe, and stack them by the rows that their members held out.

    Args:
        config: the config, with recipe=auto.
        data: the rows.
        directory: of the run.
        prepare: of (config, folder): the model, its callbacks and its checkpoints.

    Returns:
        The stack; the config; the progress of the variant with the largest share; and metrics.

    Raises:
        DivergedError: in the training of every variant.
    """
    fitted: dict[str, Fitted] = {}
    diverged: dict[str, DivergedError] = {}
    for name, candidate in variants(config).items():
        candidate = settle(candidate, data)
        log.info("recipe: variant %r", name)
        try:
            place = place_of_variant(name)
            fitted[name] = _fit_one(candidate, data, directory, prepare, place)
        except DivergedError as error:
            log.warning("recipe: variant %r is left out: %s", name, error)
            diverged[name] = error
    if not fitted:
        raise next(iter(diverged.values()))
    models: dict[str, Any] = {name: model for name, (model, *_) in fitted.items()}
    found = weigh(models, config, data)
    found = dataclasses.replace(found, failed=[*diverged, *found.failed])
    log.info("%s", found)
    directory.write_json("recipe.json", dataclasses.asdict(found))
    notes = found.metrics(data.targets)
    notes["recipe/seconds"] = sum(progress.seconds for *_, progress in fitted.values())
    *_, progress = fitted[max(found.shares, key=found.shares.__getitem__)]
    return stack(models, found.shares, found.spread, found.agreement), config, progress, notes


def fit_candidates(
    config: DictConfig, data: Data, directory: RunDirectory, prepare: Callable
) -> tuple[TrainedModel, DictConfig, Progress, dict[str, float]]:
    """Train models with more and more components, and choose among them by held-out rows.

    Args:
        config: the config, with components=auto.
        data: the rows.
        directory: of the run.
        prepare: of (config, folder): the model, its callbacks and its checkpoints.

    Returns:
        The chosen model, its config and progress, and metrics of the choice.
    """
    folds = member_folds(config, data)
    held_out = None if folds is None else folds[1]
    fitted: dict[int, Fitted] = {}

    def score(k: int) -> tuple[np.ndarray, np.ndarray]:
        try:
            place = place_of_candidate(k)
            fitted[k] = _fit_one(_candidate(config, k), data, directory, prepare, place)
        except DivergedError as error:
            log.warning("k=%d is left out: %s", k, error)
            weight = held_out_weight(data, held_out)
            return np.full(len(weight), np.inf), weight
        model: Any = fitted[k][0]
        return held_out_nll(model, data, held_out)

    selection = choose(score)
    pictures = write_figures({"selection": selection.figure()}, directory / "plots")
    if config.callbacks.tensorboard is not None:
        curve = selection.curve()
        write_summary(directory / "tensorboard" / "selection", pictures, max(curve), curve)
    notes = selection.metrics()
    notes["selection/seconds"] = sum(progress.seconds for *_, progress in fitted.values())
    return *fitted[selection.k], notes


def _candidate(config: DictConfig, k: int) -> DictConfig:
    """Return the config of a candidate; of its pictures the last one is enough."""
    config = copy.deepcopy(config)
    config.model.components = k
    if config.callbacks.tensorboard is not None and config.callbacks.tensorboard.image_every:
        config.callbacks.tensorboard.image_every = config.trainer.epochs
    return config


def finish(
    model: TrainedModel,
    config: DictConfig,
    data: Data,
    directory: RunDirectory,
    progress: Progress,
    to_first_step: float | None = None,
    notes: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Evaluate and export; `metrics.json` comes last and marks the run as finished."""
    task = get_task(config)
    recalibration = task.recalibrate(model, config, data) if config.get("recalibrate") else {}
    model.save(directory / "model.keras")
    rows = epoch_steps(config, data) * config.trainer.batch_size
    metrics = {
        **task.judge(model, data, progress.history, directory / "plots"),
        **recalibration,
        **data.notes,
        **(notes or {}),
        "train/seconds": progress.seconds,
        "train/epochs": progress.epoch,
        "train/rows_per_second": rows * progress.epoch / max(progress.seconds, 1e-9),
        "model/parameters": model.count_params(),
    }
    if to_first_step is not None:  # else nothing was left to train
        metrics["train/seconds_to_first_step"] = to_first_step
    if config.callbacks.get("tensorboard") is not None:
        pictures = [directory / "plots" / f"{name}.png" for name in ("calibration", "sbc")]
        write_summary(directory / "tensorboard" / "test", pictures, progress.epoch)
    task.export(model, directory / "saved_model", config)
    metrics["export/bytes"] = directory_size(directory / "saved_model")
    if config.get("comparison") is not None:
        metrics |= make(config, "comparison")(config)
    metrics = finite(metrics)
    directory.write_json("provenance.json", provenance(config, data.fingerprint()))
    directory.write_json("metrics.json", metrics)
    print_table(metrics)
    return metrics


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
