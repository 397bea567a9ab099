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

from mdn.combinations import (
    check_auto,
    check_comparison,
    check_components,
    check_data,
    check_distribution,
    check_ensemble,
    check_monitors,
    check_recipe,
    check_sequences,
    check_transform,
    check_unconditional,
    without_components,
    without_factors,
)
from mdn.errors import ConfigError, MDNError
from mdn.options import AUTO, LOSSES, OPTIONS, Section, TopOptions

# Of an option of several types, pydantic also names the type that it tried.
_UNION_TAG = re.compile(r"\[|^(literal.*|constrained-.*|str|int|float|bool)$")

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
                f"{name}={group!r}: needs a _target_; choose one of {', '.join(_choices(name))}"
            )
    model = groups["model"]
    check_comparison(comparison, groups)
    if AUTO in (values.get("k"), model.get("components")):
        check_auto(values, groups)
    nodes = groups | {f"callbacks.{name}": node for name, node in callbacks.items()}
    nodes |= {"comparison": comparison, "embedding": embedding}
    for name, group in nodes.items():
        if group is not None and group.get("_target_") in OPTIONS:
            _check(OPTIONS[group["_target_"]], group, f"{name}.")
    check_components(values, model)
    check_data(groups["data"])
    check_sequences(groups)
    _check_loss(values["loss"])
    check_transform(values["target_transform"], model)
    check_unconditional(values, groups, embedding)
    check_recipe(values, groups)
    check_ensemble(values["ensemble"], groups)
    check_distribution(values, model)
    check_monitors(callbacks, model)


def _check_loss(loss: Any) -> None:
    """Raise a ConfigError unless this is a loss, by its name or with its options."""
    options = dict(loss) if isinstance(loss, dict) else {"name": loss}
    name = options.pop("name", None)
    if name not in LOSSES:
        raise ConfigError(f"loss={name}: must be one of {', '.join(LOSSES)}")
    _check(LOSSES[name], options, "loss.")


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
            return without_components(given.split("=")[-1])
        if key == "rank":
            return without_factors(given.split("=")[-1])
        return f"{given}: {key} is no option{_suggest(key, _known_keys())}"
    for override in overrides:
        group, _, name = override.lstrip("+").partition("=")
        # Of null, or a number, Hydra does not say whose choice it is.
        if group in _known_groups() and name not in _choices(group):
            choices = ", ".join(_choices(group))
            return f"{group}={name}: there is no such {group}; choose one of {choices}"
    no_group = re.search(
        r"Could not override '([^']+)'.*No match in the defaults list", text, re.S
    )
    if no_group:
        group = no_group.group(1)
        return f"{group} is no group{_suggest(group, _known_groups())}"
    return f"{' '.join(overrides)}: {_one_line(error)}"


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


def _choices(group: str) -> list[str]:
    return sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))


def _suggest(name: str, known: Sequence[str]) -> str:
    # Not itself, which is an option beside another choice of its group.
    others = [other for other in dict.fromkeys(known) if other != name]
    close = difflib.get_close_matches(name, others, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else "; see python train.py --help"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
