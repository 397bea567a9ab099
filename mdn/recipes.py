"""`recipe=auto`: a few variants of a config, in the shares that the rows give them.

No single setting is best for every table: smooth functions want more depth and no steps to bend
at, nearly noiseless ones little decay and a long training. Each variant is trained as it would be
alone; the shares are what predicts best the rows that its members held out, and no test row has a
part in them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import tf_keras
from omegaconf import DictConfig, OmegaConf, open_dict

from mdn.callbacks.averaging import AveragedWeights
from mdn.callbacks.stopping import MemberStopping
from mdn.data.rows import Data
from mdn.preparation import make_batches

# What differs from the config as it is given, which is the first.
VARIANTS: dict[str, dict[str, Any]] = {
    "as given": {},
    "light decay": {"optimizer.weight_decay": 0.01},
    "smooth": {
        "embedding": None,
        "backbone.widths": [128, 128, 128],
        "optimizer.weight_decay": 3.0,
    },
}


def variant(config: DictConfig, name: str) -> DictConfig:
    """Return the config of a variant."""
    config = copy.deepcopy(config)
    with open_dict(config):
        for key, value in VARIANTS[name].items():
            OmegaConf.update(config, key, value, merge=False)
        config.recipe = None
    return config


def fit_members(
    model: Any,
    config: DictConfig,
    data: Data,
    callbacks: Iterable[tf_keras.callbacks.Callback] = (),
) -> None:
    """Train an ensemble, without a word; it ends with the best weights of each member.

    Args:
        model: compiled.
        config: settled.
        data: the rows.
        callbacks: to call besides.
    """
    batches, held_out = make_batches(model, config, data, 0)
    given = config.callbacks.early_stopping
    stopping = MemberStopping(patience=config.trainer.epochs if given is None else given.patience)
    averages = [] if config.trainer.ema is None else [AveragedWeights()]
    model.fit(
        batches,
        epochs=config.trainer.epochs,
        validation_data=held_out,
        callbacks=[stopping, *averages, *callbacks],
        verbose=0,
    )
