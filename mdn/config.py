"""Composing and checking a config, without TensorFlow, so that a mistake is told at once.

The YAML files under `configs/` name every option; `mdn.options` says which types and ranges they
have. A constructor that is not ours (`_target_` of a user's own) is checked by Python itself when
it is called.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from mdn.errors import ConfigError, MDNError
from mdn.options import (
    AUTO,
    FITTED,
    GENERATIVE,
    LOSSES,
    ONE_DEVICE,
    OPTIONS,
    SEVERAL_WORKERS,
    STACKED,
    STREAMED,
    TRANSFORMS,
    Section,
    TopOptions,
)

# Of an option of several types, pydantic also names the type that it tried.
_UNION_TAG = re.compile(r"\[|^(literal.*|constrained-.*|str|int|float|bool)$")

_TRANSFORM = re.compile("|".join([*TRANSFORMS, r"([\w.]+>)?[A-Z]\w+"]))

GROUPS = ("model", "backbone", "data", "optimizer", "strategy")


def config_dir() -> Path:
    """Return the folder of the YAML files: in the wheel, or in a checkout beside the package."""
    package = Path(__file__).resolve().parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def compose_config(overrides: Sequence[str] = ()) -> DictConfig:
    """Return the checked config of these command-line overrides.

    Raises:
        ConfigError: a name, type, value or combination cannot work.
    """
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            config = compose("config", overrides=list(overrides))
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(_explain(error, overrides)) from error
    check_config(config)
    return config


def check_config(config: DictConfig) -> None:
    """Check names, types, ranges and combinations.

    Raises:
        ConfigError: the first mistake found.
    """
    try:
        values: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(_one_line(error)) from error
    groups: dict[str, Any] = {str(name): values.pop(name, None) for name in GROUPS}
    callbacks = values.pop("callbacks", None) or {}
    comparison = values.pop("comparison", None)
    embedding = values.pop("embedding", None)
    _check(TopOptions, values, "")
    for name, group in groups.items():
        if not isinstance(group, dict) or "_target_" not in group:
            raise ConfigError(
                f"{name}={group!r}: needs a _target_; choose one of {_choices(name)}"
            )
    model = groups["model"]
    if comparison is not None and model["_target_"] != GENERATIVE:
        raise ConfigError(
            "experiment=vae_mixture compares the priors of a VAE: it needs model=vae"
        )
    if comparison is not None and "seed" not in groups["data"]:
        raise ConfigError("comparison: needs data with a seed; comparison=null leaves it out")
    if comparison is not None and groups["data"].get("weight") is not None:
        raise ConfigError("comparison: takes no row weights; comparison=null leaves it out")
    if model["_target_"] == FITTED and values["init_from"] is not None:
        raise ConfigError("init_from: model=distribution starts from model.initial; leave it out")
    if AUTO in (values.get("k"), model.get("components")):
        _check_auto(values, groups)
    nodes = groups | {f"callbacks.{name}": node for name, node in callbacks.items()}
    nodes |= {"comparison": comparison, "embedding": embedding}
    for name, group in nodes.items():
        if group is not None and group.get("_target_") in OPTIONS:
            _check(OPTIONS[group["_target_"]], group, f"{name}.")
    if "k" in values and "components" not in model:
        raise ConfigError(_k_without_components(str(values["k"])))
    _check_loss(values["loss"])
    _check_transform(values["target_transform"], model)
    if values.get("rank") is not None and "rank" not in model:
        raise ConfigError(_rank_without_factors(str(values["rank"])))
    if model["_target_"] in (FITTED, GENERATIVE):
        name = "distribution" if model["_target_"] == FITTED else "vae"
        if groups["data"].get("stream"):
            raise ConfigError(
                f"data.stream=true: model={name} needs its rows in memory; set data.stream=false"
            )
        if groups["data"]["_target_"] == STREAMED:
            raise ConfigError(
                f"data=tfrecord is a stream: model={name} needs its rows in memory; use data=npz, "
                "csv or parquet"
            )
    _check_recipe(values, groups, embedding)
    if values["ensemble"] > 1:
        _check_ensemble(values["ensemble"], groups)
    if values.get("recalibrate") and model["_target_"] in (FITTED, GENERATIVE):
        name = "distribution" if model["_target_"] == FITTED else "vae"
        raise ConfigError(f"recalibrate=true: model={name} has no p(y | x); leave it out")
    if model["_target_"] == FITTED:
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
    if model["_target_"] == GENERATIVE:
        for name, node in callbacks.items():
            if node and str(node.get("monitor", "")).endswith("nll"):
                raise ConfigError(
                    f"callbacks.{name}.monitor={node['monitor']}: model=vae has no nll while it "
                    "trains; monitor loss or val_loss"
                )


def _check_auto(values: dict[str, Any], groups: dict[str, Any]) -> None:
    """Raise a ConfigError where the number of components cannot be chosen."""
    model = groups["model"]
    if "components" not in model:
        raise ConfigError(_k_without_components(AUTO))
    if model["_target_"] in (FITTED, GENERATIVE):
        name = "distribution" if model["_target_"] == FITTED else "vae"
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


def _check_loss(loss: Any) -> None:
    """Raise a ConfigError unless this is a loss, by its name or with its options."""
    options = dict(loss) if isinstance(loss, dict) else {"name": loss}
    name = options.pop("name", None)
    if name not in LOSSES:
        raise ConfigError(f"loss={name}: must be one of {', '.join(LOSSES)}")
    _check(LOSSES[name], options, "loss.")


def _check_transform(transform: Any, model: dict[str, Any]) -> None:
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


def _check_recipe(values: dict[str, Any], groups: dict[str, Any], embedding: Any) -> None:
    """Raise a ConfigError where an ingredient of a recipe has no meaning."""
    trainer, model, data = values["trainer"], groups["model"], groups["data"]
    if model["_target_"] in (FITTED, GENERATIVE):
        name = "distribution" if model["_target_"] == FITTED else "vae"
        if embedding is not None:
            raise ConfigError(f"embedding: model={name} has none; leave it out")
        if trainer["jitter"]:
            raise ConfigError(f"trainer.jitter=true: model={name} has none; set it to false")
    if trainer["jitter"] and values["target_transform"] is not None:
        raise ConfigError(
            "trainer.jitter=true: noise could leave the domain of target_transform; set "
            "trainer.jitter=false"
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


def _check_ensemble(members: int, groups: dict[str, Any]) -> None:
    """Raise a ConfigError where these groups have no ensemble."""
    target = {name: group["_target_"] for name, group in groups.items()}
    asked = f"ensemble={members}"
    if target["model"] in (FITTED, GENERATIVE):
        name = "distribution" if target["model"] == FITTED else "vae"
        raise ConfigError(f"{asked}: model={name} has no ensemble; set ensemble=1")
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


def make(config: DictConfig, key: str, **kwargs: Any) -> Any:
    """Call the constructor that `config[key]` points at.

    Raises:
        MDNError: as the constructor raises it.
        ConfigError: there is no such constructor, or it does not take these options.
    """
    try:
        # Partial, as a full call would turn the arguments given here into config nodes.
        constructor = instantiate(OmegaConf.select(config, key), _partial_=True, _convert_="all")
    except InstantiationException as error:
        raise ConfigError(f"{key}: {' '.join(str(error).split())}") from error
    try:
        return constructor(**kwargs)
    except (TypeError, ValueError) as error:
        if isinstance(error, MDNError):
            raise
        raise ConfigError(f"{key}: {' '.join(str(error).split())}") from error


def _check(schema: type[Section], values: dict[str, Any], prefix: str) -> None:
    try:
        schema.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        parts = [str(part) for part in first["loc"] if not _UNION_TAG.search(str(part))]
        key = prefix + ".".join(parts)
        # The model's `components` is `k` on the command line.
        key = {"model.components": "k", "model.rank": "rank"}.get(key, key)
        if first["type"] == "extra_forbidden":
            known = [f.alias or name for name, f in schema.model_fields.items()]
            near = [*(prefix + name for name in known), *_known_keys()]
            raise ConfigError(f"{key} is no option{_suggest(key, near)}") from error
        if first["type"] == "missing":
            raise ConfigError(f"{key} is not set: give it a value") from error
        expected = first["msg"].replace("Input should be ", "must be ")
        if first["type"] == "list_type":
            expected += f", such as {key}=[{first['input']}]"
        raise ConfigError(f"{key}={first['input']}: {expected}") from error


def _explain(error: Exception, overrides: Sequence[str]) -> str:
    """Say in one line what Hydra says in several, with the remedy."""
    text = str(error)
    unknown = re.search(r"Could not override '([^']+)'", text) or re.search(
        r"Key '([^']+)' is not in struct", text
    )
    if unknown and "No match in the defaults list" not in text:
        key = unknown.group(1)
        given = next((o for o in overrides if o.lstrip("+~").split("=")[0] == key), key)
        if key == "k":
            return _k_without_components(given.split("=")[-1])
        if key == "rank":
            return _rank_without_factors(given.split("=")[-1])
        return f"{given}: {key} is no option{_suggest(key, _known_keys())}"
    missing = re.search(r"Could not find '([^'/]+)/([^']+)'", text)
    if missing:
        group, name = missing.groups()
        return f"{group}={name}: there is no such {group}; choose one of {_choices(group)}"
    group = re.search(r"Could not override '([^']+)'.*No match in the defaults list", text, re.S)
    if group:
        return f"{group.group(1)} is no group{_suggest(group.group(1), _known_groups())}"
    return f"{' '.join(overrides)}: {_one_line(error)}"


def _k_without_components(value: str) -> str:
    return f"k={value}: this model has no components; use model=mixture or model=mixture_diag"


def _rank_without_factors(value: str) -> str:
    return f"rank={value}: this model has no factors of low rank; use model=low_rank"


def _known_keys() -> list[str]:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = compose("config")
    keys: list[str] = []

    def walk(node: DictConfig, prefix: str) -> None:
        for name in map(str, node):
            keys.append(f"{prefix}{name}")
            if OmegaConf.is_dict(node[name]):
                walk(node[name], f"{prefix}{name}.")

    walk(config, "")
    return keys


def _known_groups() -> list[str]:
    return sorted(path.name for path in config_dir().iterdir() if path.is_dir())


def _choices(group: str) -> str:
    return ", ".join(sorted(path.stem for path in (config_dir() / group).glob("*.yaml")))


def _suggest(name: str, known: Sequence[str]) -> str:
    # Not itself, which is an option beside another choice of its group.
    others = [other for other in dict.fromkeys(known) if other != name]
    close = difflib.get_close_matches(name, others, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else "; see python train.py --help"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
