"""`recipe=auto`: which of a few variants of a config the rows prefer.

No single setting is best for every table: smooth functions want more depth and no steps to bend
at, nearly noiseless ones little decay and a long training. Each variant is trained as it would be
in the end; what an ensemble says of the rows that its members held out is compared, and nothing
else: no test row has a part in it.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterable
from typing import Any

import tf_keras
from omegaconf import DictConfig, OmegaConf, open_dict

from mdn.budget import epoch_steps, settle
from mdn.callbacks.averaging import AveragedWeights
from mdn.callbacks.stopping import MemberStopping
from mdn.data.rows import Data
from mdn.errors import RunError
from mdn.preparation import compile_model, make_batches
from mdn.tasks import build_model

log = logging.getLogger(__name__)

# What differs from the config as it is given, which is the first to be tried.
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


def choose_recipe(
    config: DictConfig, data: Data, known: dict[str, Any]
) -> tuple[DictConfig, dict[str, Any]]:
    """Return the config of the best variant, and what was tried.

    Args:
        config: of an ensemble.
        data: the rows.
        known: what was tried before, of a run that is gone on with; then nothing is tried.

    Returns:
        The config; and {"chosen": name, "out_of_fold_nll": {name: nats}}.

    Raises:
        RunError: no variant could be trained.
    """
    if not known:
        scores = {}
        for name in VARIANTS:
            settled = settle(variant(config, name), data)
            # As a run of this variant would be seeded.
            tf_keras.utils.set_random_seed(settled.seed)
            model = build_model(settled, data)
            compile_model(model, settled, epoch_steps(settled, data))
            scores[name] = fit_members(model, settled, data)
            log.info("recipe %s: out-of-fold NLL %.4f nats", name, scores[name])
        known = {"chosen": best_of(scores), "out_of_fold_nll": scores}
    return variant(config, known["chosen"]), known


def describe(tried: dict[str, Any]) -> str:
    """Return in one line what `choose_recipe` tried, and by how much one of them won."""
    scores, chosen = tried["out_of_fold_nll"], tried["chosen"]
    others = [f"{name} {score - scores[chosen]:+.4f}" for name, score in scores.items()]
    return (
        f"recipe {chosen!r} is taken: its NLL of the rows that members hold out is "
        f"{scores[chosen]:.4f} nats; the others: "
        + ", ".join(text for text, name in zip(others, scores, strict=True) if name != chosen)
    )


def best_of(scores: dict[str, float]) -> str:
    """Return the name of the least score.

    Raises:
        RunError: none of them is finite.
    """
    finite = {name: score for name, score in scores.items() if math.isfinite(score)}
    if not finite:
        raise RunError("recipe=auto: no variant could be trained; use a lower learning rate")
    return min(finite, key=finite.__getitem__)


def fit_members(
    model: Any,
    config: DictConfig,
    data: Data,
    callbacks: Iterable[tf_keras.callbacks.Callback] = (),
) -> float:
    """Train an ensemble, without a word; return its out-of-fold NLL.

    Args:
        model: compiled; it ends with the best weights of each member.
        config: settled.
        data: the rows.
        callbacks: to call besides.

    Returns:
        The mean over the members of their least NLL on the rows that they held out, in nats.
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
    return sum(stopping.bests) / len(stopping.bests)
