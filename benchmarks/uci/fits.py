"""Fits of the splits of one set, one after the other, by the same compiled programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tf_keras
from omegaconf import DictConfig

from mdn.budget import epoch_steps, settle
from mdn.config import compose_config, make
from mdn.data.rows import Data
from mdn.density.agreement import agree
from mdn.density.mixing import mixture_of
from mdn.errors import DataError
from mdn.preparation import compile_model
from mdn.recipes import fit_quietly, variants, weigh
from mdn.stacking import Stacking
from mdn.tasks import build_model
from mdn.training import seed_everything


@dataclasses.dataclass
class _Built:
    """A compiled model, and how to make it as good as new for the next split.

    Attributes:
        model: an ensemble.
        shape: of the rows that its program is for.
        optimizer: the variables of the optimizer before the first step.
    """

    model: Any
    shape: tuple[int, ...]
    optimizer: list[np.ndarray]

    def adapt(self, config: DictConfig, data: Data) -> None:
        """Start anew on other rows, with the program that is there.

        Raises:
            DataError: the rows need another embedding.
        """
        self.model.adapt(data.train.x, data.train.y, seed=config.seed)
        optimizer, weights = self.model.optimizer, self.model.trainable_variables
        for variable, value in zip(optimizer.variables, self.optimizer, strict=True):
            variable.assign(value)
        if optimizer.use_ema:
            averages = optimizer._model_variables_moving_average
            for average, weight in zip(averages, weights, strict=True):
                average.assign(weight)


class Fitter:
    """Trains the model of a config on one split of a set after the other.

    Args:
        path: of the set.
        overrides: of `experiment=tabular`.
    """

    def __init__(self, path: Path, overrides: list[str]) -> None:
        self.path, self.overrides = path, overrides
        self._built: dict[str, _Built] = {}

    def fit(
        self, split: int, progress: Callable[[float], None]
    ) -> tuple[Any, Data, dict[str, float]]:
        """Train on a split.

        Args:
            split: its number.
            progress: called with the share of the training that is done.

        Returns:
            The density of the test rows; the rows of the split; and the shares of the recipe's
            variants in it.
        """
        rows = ["data=npz", f"data.path='{self.path}'", f"data.fold={split}"]
        config = compose_config(["experiment=tabular", *rows, *self.overrides])
        data: Data = make(config, "data").load()
        models = {}
        configs = variants(config)
        for i, (name, variant) in enumerate(configs.items()):
            settled = settle(variant, data)
            seed_everything(settled)
            models[name] = self._adapted(name, settled, data)
            report = _Progress(progress, i, len(configs), settled.trainer.epochs)
            fit_quietly(models[name], settled, data, [report])
        found = Stacking(dict.fromkeys(models, 1.0))
        if len(models) > 1:
            found = weigh(models, config, data)
        return _stacked(models, found, data), data, found.shares

    def _adapted(self, name: str, config: DictConfig, data: Data) -> Any:
        """Return the model as `build_model` and `compile_model` leave it."""
        steps = epoch_steps(config, data)
        shape = len(data.train), len(data.validation), len(data.test), steps
        built = self._built.get(name)
        if built is not None and built.shape == shape:
            try:
                built.adapt(config, data)
                return built.model
            except DataError:  # a split whose features have other values
                pass
        model = build_model(config, data)
        compile_model(model, config, steps)
        model.optimizer.build(model.trainable_variables)
        start = [variable.numpy() for variable in model.optimizer.variables]
        self._built[name] = _Built(model, shape, start)
        return model


def _stacked(models: dict[str, Any], found: Stacking, data: Data) -> Any:
    """Return the density of the test rows.

    As `mdn.stacking.stack` does, by the programs that the models have already.
    """
    parts, weights, kept = [], [], []
    for name, share in found.shares.items():
        fixed = models[name].fixed_components
        for _, density in models[name].member_answers(data.test.x):
            parts.append(density if found.spread is None else found.spread.apply(density))
            weights.append(share)
            own = mixture_of(parts[-1:]).logits.shape[-1]
            kept.append(np.arange(own) >= own - fixed)
    mixture = mixture_of(parts, weights)
    if found.agreement == 0.0:
        return mixture
    return agree(mixture, found.agreement, np.concatenate(kept))


class _Progress(tf_keras.callbacks.Callback):
    """Reports the share of the training that is done: of recipe i of so many."""

    def __init__(self, report: Callable[[float], None], i: int, count: int, epochs: int) -> None:
        super().__init__()
        self.report, self.i, self.count, self.epochs = report, i, count, epochs

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.report((self.i + (epoch + 1) / self.epochs) / self.count)
