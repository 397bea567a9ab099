"""What a fit needs besides a model: its optimizer and schedule, and its batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import tf_keras
from omegaconf import DictConfig, OmegaConf

from mdn.arguments import EVALUATION_BATCH
from mdn.base import TrainedModel
from mdn.budget import epoch_steps, fold_size, is_random
from mdn.config import make
from mdn.data.chunks import Batches
from mdn.data.pipeline import evaluation_batches, training_batches
from mdn.data.rows import Data
from mdn.data.splits import draw_folds
from mdn.errors import ConfigError


def compile_model(model: TrainedModel, config: DictConfig, steps: int) -> None:
    """Compile the model with the optimizer and schedule of the config.

    Args:
        model: the model.
        config: the config.
        steps: train steps an epoch.

    Raises:
        ConfigError: the warm-up takes all steps, or the model refuses an option.
    """
    trainer = config.trainer
    options: dict[str, Any] = {}
    if trainer.ema is not None:
        options |= {"use_ema": True, "ema_momentum": trainer.ema}
    if trainer.schedule == "cosine":
        total, peak = steps * trainer.epochs, config.optimizer.learning_rate
        warmup = round(trainer.warmup * (total if trainer.warmup < 1 else 1))
        if warmup >= total:
            raise ConfigError(
                f"trainer.warmup={trainer.warmup:g} steps leave none of {total}: train longer, "
                "or give a share below 1"
            )
        options["learning_rate"] = tf_keras.optimizers.schedules.CosineDecay(
            initial_learning_rate=0.0 if warmup else peak,
            decay_steps=total - warmup,
            warmup_target=peak if warmup else None,
            warmup_steps=warmup,
        )
    optimizer = make(config, "optimizer", **options)
    jitter = {"jitter": True} if trainer.jitter else {}
    model.compile(
        optimizer,
        **jitter,
        loss=config.loss if isinstance(config.loss, str) else OmegaConf.to_container(config.loss),
        jit_compile=None if trainer.compiled else False,
        steps_per_execution=trainer.steps_per_execution,
    )


def make_batches(
    model: TrainedModel, config: DictConfig, data: Data, first_epoch: int
) -> tuple[Batches, Batches]:
    """Return what a model learns from and what it is validated on.

    Member 0 of an ensemble has the rows of a single run. Of a random split, the other members hold
    out as many rows, but others; with `folds`, each holds out one of so many parts of train and
    validation rows together. Any other split stays as it is for all.
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
        if (folds := member_folds(config, data)) is not None:
            arrays = tuple(map(np.concatenate, zip(arrays, held_out, strict=True)))
            held_out, (order["members"], validation["members"]) = arrays, folds
            validation["complete"] = model.is_complete(arrays)
        order["complete"] = model.is_complete(arrays)
        if config.trainer.steps is not None:
            order["steps"] = epoch_steps(config, data)
        batches = training_batches(arrays, size, **order)
    return batches, evaluation_batches(
        held_out, EVALUATION_BATCH, chunk=batches.chunk, **validation
    )


def member_folds(config: DictConfig, data: Data) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the rows that each member of an ensemble learns from and validates on, [M, n] each.

    Train rows are counted through from zero, and validation rows go on from there.
    """
    if config.ensemble == 1:
        return None
    n, kept = len(data.train), len(data.validation)
    rows = np.arange(n + kept)
    if not is_random(config, data):
        learned, folds = (np.tile(part, [config.ensemble, 1]) for part in (rows[:n], rows[n:]))
        return learned, folds
    if config.folds is not None:
        kept = fold_size(config, data)
    rest = np.random.default_rng([config.seed, 0x656E73]).permutation(n)
    return draw_folds(np.append(rows[n:], rest), kept, config.ensemble)
