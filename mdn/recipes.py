"""`recipe=auto`: a few variants of a config, in the shares that the rows give them.

No single setting is best for every table: smooth functions want more depth and no steps to bend
at, few and noisy rows a strong decay, nearly noiseless ones hardly any. Each variant is trained as
it would be alone; the shares are what predicts best the rows that its members held out, and no
test row has a part in them.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import tf_keras
from omegaconf import DictConfig, OmegaConf, open_dict

from mdn.callbacks.averaging import AveragedWeights
from mdn.callbacks.splitting import SplitComponents
from mdn.callbacks.stopping import EarlyStopping, MemberStopping
from mdn.data.rows import Data
from mdn.preparation import make_batches, member_folds
from mdn.spread import pooled_spread
from mdn.stacking import Stacking, compare


def _twice(components: int) -> int:
    return 2 * components


# What differs from the config as it is given, which is the first: a value, or what makes it of the
# given one.
VARIANTS: dict[str, dict[str, Any]] = {
    "as given": {},
    "light decay": {"optimizer.weight_decay": 0.01},
    "smooth": {
        "embedding": None,
        "backbone.widths": [128, 128, 128],
        "optimizer.weight_decay": "auto",
        "model.components": _twice,
    },
    "smoothest": {
        "embedding": None,
        "backbone.widths": [128, 128, 128],
        "optimizer.weight_decay": 3.0,
    },
}


def variants(config: DictConfig) -> dict[str, DictConfig]:
    """Return the configs to train by name: with recipe=auto the variants, else the one given."""
    if config.recipe is None:
        return {"as given": config}
    return {name: _changed(config, changes) for name, changes in VARIANTS.items()}


def _changed(config: DictConfig, changes: dict[str, Any]) -> DictConfig:
    config = copy.deepcopy(config)
    with open_dict(config):
        for key, value in changes.items():
            if callable(value):
                if (given := OmegaConf.select(config, key)) is None:  # as a normal has no number
                    continue
                value = value(given)
            OmegaConf.update(config, key, value, merge=False)
        config.recipe = None
    return config


def weigh(models: Mapping[str, Any], config: DictConfig, data: Data) -> Stacking:
    """Return the shares of trained variants, and the spread and agreement of their mixture.

    Args:
        models: ensembles, by name.
        config: of the run; with `recalibrate` given both stay as they are.
        data: the rows.

    Raises:
        RunError: as `mdn.stacking.compare` does.
    """
    folds = member_folds(config, data)
    held_out = None if folds is None else folds[1]
    found = compare(models, data, held_out)
    if config.recalibrate is not None:
        return found
    spread, agreement = pooled_spread(models, found.shares, data, held_out, config.seed)
    return dataclasses.replace(found, spread=spread, agreement=agreement)


def fit_quietly(
    model: Any,
    config: DictConfig,
    data: Data,
    callbacks: Iterable[tf_keras.callbacks.Callback] = (),
) -> None:
    """Train a model of a run, without a word or a file; it ends with its best weights.

    Args:
        model: compiled.
        config: settled.
        data: the rows.
        callbacks: to call besides.
    """
    batches, held_out = make_batches(model, config, data, 0)
    given = config.callbacks.early_stopping
    patience = config.trainer.epochs if given is None else given.patience
    stopping = (MemberStopping if config.ensemble > 1 else EarlyStopping)(patience=patience)
    averages = [] if config.trainer.ema is None else [AveragedWeights()]
    splitting = [SplitComponents(data.train)] if config.trainer.split_components else []
    model.fit(
        batches,
        epochs=config.trainer.epochs,
        validation_data=held_out,
        callbacks=[stopping, *splitting, *averages, *callbacks],
        verbose=0,
    )
