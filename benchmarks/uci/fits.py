"""Fits of the splits of one set, one after the other, by the same compiled program.

Shape letters: D event size, N rows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tf_keras
from omegaconf import DictConfig

from mdn.budget import epoch_steps, settle
from mdn.callbacks.averaging import AveragedWeights
from mdn.callbacks.stopping import MemberStopping
from mdn.config import compose_config, make
from mdn.data.rows import Data
from mdn.errors import DataError
from mdn.tasks import build_model
from mdn.training import compile_model, make_batches, seed_everything


class Fitter:
    """Trains the model of a config on one split of a set after the other.

    Args:
        path: of the set.
        overrides: of `experiment=tabular`.
    """

    def __init__(self, path: Path, overrides: list[str]) -> None:
        self.path, self.overrides = path, overrides
        self._model: Any = None
        self._start: list[np.ndarray] = []
        self._shape: Any = None

    def config(self, split: int) -> DictConfig:
        """Return the config of a run on this split."""
        data = ["data=npz", f"data.path='{self.path}'", f"data.fold={split}"]
        return compose_config(["experiment=tabular", *data, *self.overrides])

    def fit(self, split: int, progress: Callable[[float], None]) -> tuple[Any, Data]:
        """Return the model, trained on a split, and the rows of that split.

        Args:
            split: its number.
            progress: called with the share of the training that is done.
        """
        config = self.config(split)
        seed_everything(config)
        data: Data = make(config, "data").load()
        config = settle(config, data)
        model = self._adapted(config, data)
        batches, held_out = make_batches(model, config, data, 0)
        stopping = MemberStopping(patience=config.callbacks.early_stopping.patience)
        callbacks = [stopping, AveragedWeights(), _Progress(progress, config.trainer.epochs)]
        model.fit(
            batches,
            epochs=config.trainer.epochs,
            validation_data=held_out,
            callbacks=callbacks,
            verbose=0,
        )
        return model, data

    def _adapted(self, config: DictConfig, data: Data) -> Any:
        """Return the model as `build_model` does: that of the last split, made as good as new."""
        steps = epoch_steps(config, data)
        shape = len(data.train), len(data.validation), len(data.test), steps
        if self._model is not None and shape == self._shape:
            try:
                self._model.adapt(data.train.x, data.train.y, seed=config.seed)
                self._restart()
                return self._model
            except DataError:  # a split whose features have other values
                pass
        self._shape = shape
        self._model = build_model(config, data)
        compile_model(self._model, config, steps)
        self._model.optimizer.build(self._model.trainable_variables)
        self._start = [variable.numpy() for variable in self._model.optimizer.variables]
        return self._model

    def _restart(self) -> None:
        optimizer, weights = self._model.optimizer, self._model.trainable_variables
        for variable, value in zip(optimizer.variables, self._start, strict=True):
            variable.assign(value)
        if optimizer.use_ema:
            averages = optimizer._model_variables_moving_average
            for average, weight in zip(averages, weights, strict=True):
                average.assign(weight)


class _Progress(tf_keras.callbacks.Callback):
    def __init__(self, report: Callable[[float], None], epochs: int) -> None:
        super().__init__()
        self.report, self.epochs = report, epochs

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.report((epoch + 1) / self.epochs)
