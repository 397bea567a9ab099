"""Options that have no meaning together: each combination is told with its remedy.

`values` are the options at the top of a config, `groups` name -> the node of a group.
"""

from __future__ import annotations

import re
from typing import Any

from mdn.errors import ConfigError
from mdn.options import (
    AUTO,
    FITTED,
    GENERATIVE,
    ONE_DEVICE,
    OPTIONS,
    SEQUENCES,
    SEQUENTIAL,
    SEVERAL_WORKERS,
    STACKED,
    STREAMED,
    TRANSFORMS,
)
from mdn.split_options import fractions_mistake, key_mistake, stream_mistake

# The models that are no density of y given x, and what `model=` calls them.
UNCONDITIONAL = {FITTED: "distribution", GENERATIVE: "vae"}

_TRANSFORM = re.compile("|".join([*TRANSFORMS, r"([\w.]+>)?[A-Z]\w+"]))


def check_comparison(comparison: Any, groups: dict[str, Any]) -> None:
    """Raise a ConfigError where the priors of a VAE cannot be compared, and are to be."""
    if comparison is None:
        return
    if groups["model"]["_target_"] != GENERATIVE:
        raise ConfigError(
            "experiment=vae_mixture compares the priors of a VAE: it needs model=vae"
        )
    if "seed" not in groups["data"]:
        raise ConfigError("comparison: needs data with a seed; comparison=null leaves it out")
    if groups["data"].get("weight") is not None:
        raise ConfigError("comparison: takes no row weights; comparison=null leaves it out")


def check_components(values: dict[str, Any], model: dict[str, Any]) -> None:
    """Raise a ConfigError where the model has no such number."""
    if "k" in values and "components" not in model:
        raise ConfigError(without_components(str(values["k"])))
    if values.get("rank") is not None and "rank" not in model:
        raise ConfigError(without_factors(str(values["rank"])))


def check_unconditional(values: dict[str, Any], groups: dict[str, Any], embedding: Any) -> None:
    """Raise a ConfigError for what a model without p(y | x) does not have."""
    data, name = groups["data"], UNCONDITIONAL.get(groups["model"]["_target_"])
    if name is None:
        return
    if data.get("stream"):
        raise ConfigError(
            f"data.stream=true: model={name} needs its rows in memory; set data.stream=false"
        )
    if data["_target_"] == STREAMED:
        raise ConfigError(
            f"data=tfrecord is a stream: model={name} needs its rows in memory; use data=npz, "
            "csv or parquet"
        )
    if embedding is not None:
        raise ConfigError(f"embedding: model={name} has none; leave it out")
    if values["trainer"]["jitter"]:
        raise ConfigError(f"trainer.jitter=true: model={name} has none; set it to false")
    if values["trainer"]["split_components"]:
        raise ConfigError(
            f"trainer.split_components=true: model={name} splits none; set it to false"
        )
    if values["ensemble"] > 1:
        raise ConfigError(
            f"ensemble={values['ensemble']}: model={name} has no ensemble; set ensemble=1"
        )
    if values.get("recalibrate"):
        raise ConfigError(f"recalibrate=true: model={name} has no p(y | x); leave it out")


def check_distribution(values: dict[str, Any], model: dict[str, Any]) -> None:
    """Raise a ConfigError where model=distribution has no such start or number of components."""
    if model["_target_"] != FITTED:
        return
    if values["init_from"] is not None:
        raise ConfigError("init_from: model=distribution starts from model.initial; leave it out")
    mixture = str(model["distribution"]).endswith("GaussianMixture")
    if mixture and model["components"] is None:
        raise ConfigError(
            f"model.distribution={model['distribution']}: k is not set; give k=3, or so"
        )
    if model["components"] is not None and not mixture:
        raise ConfigError(
            f"k={model['components']}: a {model['distribution']} has no components; use "
            "model.distribution=GaussianMixture"
        )


def check_data(data: dict[str, Any]) -> None:
    """Raise a ConfigError for what a source of mdn would refuse once it is asked for its rows."""
    if data["_target_"] not in OPTIONS:
        return
    mistakes = []
    if "stream" in data:
        mistakes.append(stream_mistake(data))
    if data.get("fold") is None:  # which says itself what is tested
        if "split_column" in data:
            mistakes.append(key_mistake(data["split"], data["split_column"] is not None))
        if "validation" in data and data.get("split") != "column":
            mistakes.append(fractions_mistake(data["validation"], data["test"]))
    for mistake in filter(None, mistakes):
        raise ConfigError(mistake)


def check_sequences(groups: dict[str, Any]) -> None:
    """Raise a ConfigError where the backbone takes sequences, and the source has none."""
    source = groups["data"]["_target_"]
    if groups["model"]["_target_"] == FITTED or source not in OPTIONS or source == SEQUENCES:
        return
    if groups["backbone"]["_target_"] == SEQUENTIAL:
        raise ConfigError(
            "backbone=lstm needs sequences [N, T, F], which only data=npz can hold; use it, or "
            "backbone=mlp"
        )


def check_monitors(callbacks: dict[str, Any], model: dict[str, Any]) -> None:
    """Raise a ConfigError where a callback watches what model=vae does not measure."""
    if model["_target_"] != GENERATIVE:
        return
    for name, node in callbacks.items():
        if node and str(node.get("monitor", "")).endswith("nll"):
            raise ConfigError(
                f"callbacks.{name}.monitor={node['monitor']}: model=vae has no nll while it "
                "trains; monitor loss or val_loss"
            )


def check_auto(values: dict[str, Any], groups: dict[str, Any]) -> None:
    """Raise a ConfigError where the number of components cannot be chosen."""
    model = groups["model"]
    if "components" not in model:
        raise ConfigError(without_components(AUTO))
    if (name := UNCONDITIONAL.get(model["_target_"])) is not None:
        raise ConfigError(
            f"k=auto: model={name} has no validation NLL to choose by; give k=3, or so"
        )
    if values["recipe"] is not None:
        raise ConfigError(
            f"k=auto: recipe={values['recipe']} compares variants of one k; set recipe=null, or "
            "k=10"
        )
    if values["init_from"] is not None:
        raise ConfigError(
            f"k=auto: init_from={values['init_from']} has its number of components; give that one"
        )
    if groups["strategy"]["_target_"] == SEVERAL_WORKERS:
        raise ConfigError("k=auto: choose it on one machine, and give several workers that number")


def check_transform(transform: Any, model: dict[str, Any]) -> None:
    """Raise a ConfigError where `target_transform` cannot be one, or has no meaning."""
    if transform is None:
        return
    if "target_transform" not in model:
        raise ConfigError(
            f"target_transform={transform}: this model has none; use model=mixture, or so"
        )
    for one in transform if isinstance(transform, list) else [transform]:
        name = one.get("name") if isinstance(one, dict) else one
        # Whether there is such a class is for TFP to say.
        if one is not None and not re.fullmatch(_TRANSFORM, str(name)):
            raise ConfigError(
                f"target_transform={name}: is unknown; choose one of {', '.join(TRANSFORMS)}, or "
                "a class of tfp.bijectors such as Softplus"
            )


def check_recipe(values: dict[str, Any], groups: dict[str, Any]) -> None:
    """Raise a ConfigError where an ingredient of a recipe has no meaning."""
    trainer, data = values["trainer"], groups["data"]
    if trainer["jitter"] and values["target_transform"] is not None:
        raise ConfigError(
            "trainer.jitter=true: noise could leave the domain of target_transform; set "
            "trainer.jitter=false"
        )
    if trainer["split_components"] and "components" not in groups["model"]:
        raise ConfigError(
            "trainer.split_components=true: the model has one component; set it to false, or use "
            "model=mixture"
        )
    if trainer["steps"] is not None and (data.get("stream") or data["_target_"] == STREAMED):
        raise ConfigError(
            f"trainer.steps={trainer['steps']}: an epoch of a stream is a pass over it; set "
            "trainer.steps=null"
        )
    if isinstance(trainer["steps"], int) and trainer["steps"] < trainer["epochs"]:
        raise ConfigError(
            f"trainer.steps={trainer['steps']}: is cut into trainer.epochs={trainer['epochs']} "
            "parts; give as many steps at least, or fewer epochs"
        )
    if values["ensemble"] == 1:
        for name in ("folds", "recipe"):
            if values[name] is not None:
                raise ConfigError(
                    f"{name}={values[name]}: needs members that hold out rows; set ensemble=5, or "
                    f"{name}=null"
                )
    if values["recipe"] is not None:
        if values["init_from"] is not None:
            raise ConfigError(
                f"recipe={values['recipe']}: starts anew, and init_from does not; "
                "set one of them to null"
            )
        if groups["backbone"]["_target_"] != STACKED[0]:
            raise ConfigError(
                f"recipe={values['recipe']}: tries depths of backbone=mlp; use it, or recipe=null"
            )
        if "weight_decay" not in groups["optimizer"]:
            raise ConfigError(
                f"recipe={values['recipe']}: tries decays; use optimizer=adamw, or recipe=null"
            )


def check_ensemble(members: int, groups: dict[str, Any]) -> None:
    """Raise a ConfigError where these groups have no ensemble."""
    if members == 1:
        return
    target = {name: group["_target_"] for name, group in groups.items()}
    asked = f"ensemble={members}"
    if target["backbone"] not in STACKED:
        raise ConfigError(
            f"{asked}: a {target['backbone']} cannot be stacked; use backbone=mlp, resnet or "
            "constant, or ensemble=1"
        )
    if target["strategy"] not in ONE_DEVICE:
        raise ConfigError(f"{asked}: trains on one device; use strategy=auto, cpu or gpu")
    if groups["data"].get("stream") or target["data"] == STREAMED:
        raise ConfigError(
            f"{asked}: a stream gives all members the same rows; read them into memory, or set "
            "ensemble=1"
        )


def without_components(value: str) -> str:
    """Return what a user reads who gives k to a model that has no components."""
    return f"k={value}: this model has no components; use model=mixture or model=mixture_diag"


def without_factors(value: str) -> str:
    """Return what a user reads who gives a rank to a model that has none."""
    return f"rank={value}: this model has no factors of low rank; use model=low_rank"
