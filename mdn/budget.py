"""How long to train, on how many rows at a time and with what decay, where `auto` says so."""

from __future__ import annotations

import copy
import math

from omegaconf import DictConfig

from mdn.data.rows import Data
from mdn.errors import DataError

SMALLEST_BATCH, LARGEST_BATCH = 32, 1024
LEAST_STEPS, MOST_STEPS = 2500, 12_000
PASSES = 60
MOST_DECAY, DECAY_ROWS = 0.3, 10_000


def batch_size(rows: int) -> int:
    """Return the power of two nearest to a share of the rows, between 32 and 1,024.

    The share is a sixteenth up to batches of 256, and a two-hundred-and-fifty-sixth beyond.
    """

    def nearest(share: float) -> int:
        return 2 ** round(math.log2(max(rows, 1) * share))

    size = max(min(nearest(1 / 16), 256), nearest(1 / 256))
    return min(max(size, SMALLEST_BATCH), LARGEST_BATCH)


def train_steps(rows: int, batch: int) -> int:
    """Return the steps of 60 passes over the rows, between 2,500 and 12,000."""
    return min(max(PASSES * rows // batch, LEAST_STEPS), MOST_STEPS)


def weight_decay(rows: int) -> float:
    """Return .3 up to 10,000 rows, and less in proportion the more there are.

    The decay stands beside the mean over rows: a prior that is to be worth a fixed number of rows
    has to fall as they grow.
    """
    return MOST_DECAY / max(rows / DECAY_ROWS, 1.0)


def settle(config: DictConfig, data: Data) -> DictConfig:
    """Return the config with numbers in place of each `auto` of the trainer and the optimizer.

    Raises:
        DataError: there are fewer rows than folds.
    """
    config = copy.deepcopy(config)
    trainer = config.trainer
    rows = data.train_rows + (len(data.validation) if config.ensemble > 1 else 0)
    if trainer.batch_size == "auto":
        trainer.batch_size = min(batch_size(rows), member_rows(config, data))
    if trainer.steps == "auto":
        trainer.steps = train_steps(rows, trainer.batch_size)
    if config.optimizer.get("weight_decay") == "auto":
        config.optimizer.weight_decay = weight_decay(member_rows(config, data))
    return config


def member_rows(config: DictConfig, data: Data) -> int:
    """Return the number of rows that each network learns from.

    Raises:
        DataError: there are fewer rows than folds.
    """
    if config.folds is None or not is_random(config, data):
        return data.train_rows
    return data.train_rows + len(data.validation) - fold_size(config, data)


def fold_size(config: DictConfig, data: Data) -> int:
    """Return how many of the train and validation rows each of `config.folds` holds out.

    Raises:
        DataError: none, as there are more folds than rows.
    """
    rows = data.train_rows + len(data.validation)
    if rows < config.folds:
        raise DataError(
            f"folds={config.folds}: {rows} train and validation rows cannot be cut into so many "
            f"parts; set folds={rows}, or give more rows"
        )
    return rows // config.folds


def is_random(config: DictConfig, data: Data) -> bool:
    """Whether any row of train and validation rows could be a validation row as well."""
    random = config.data.get("split", "random") == "random"
    return random and data.validation is not data.train and data.stream is None


def epoch_steps(config: DictConfig, data: Data) -> int:
    """Return the train steps of an epoch, of a config that is settled."""
    trainer = config.trainer
    if trainer.steps is not None:
        return math.ceil(trainer.steps / trainer.epochs)
    return member_rows(config, data) // trainer.batch_size
