"""What `init_from` names: told without TensorFlow, before any rows are read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from mdn.errors import RunError
from mdn.runs import read_config


def check_start(config: DictConfig) -> None:
    """Check that the run `init_from` has a model, which has learned from none of the test rows.

    Args:
        config: of the run that is to start there.

    Raises:
        RunError: it has none, or has split the same rows in another way.
    """
    if config.init_from is None:
        return
    start = Path(config.init_from)
    if not (start / "model.keras").is_file():
        raise RunError(f"init_from={start} has no model.keras: name a run that mdn train wrote")
    if not (start / ".hydra" / "config.yaml").is_file():
        return  # a model alone, of which nothing else is known
    before, now = (c.get("data") or {} for c in (read_config(start), config))
    if _origin(before) is None or _origin(before) != _origin(now):
        return
    names = [n for n in (*_deciding(before), *_deciding(now)) if n in before and n in now]
    changed = [name for name in dict.fromkeys(names) if before[name] != now[name]]
    if changed:
        remedy = " ".join(f"data.{name}={_word(before[name])}" for name in changed)
        raise RunError(
            f"init_from={start} has another split of the same rows, and has learned from those "
            f"that would test it: set {remedy}, or give other data"
        )


def _origin(data: Any) -> tuple[str, str] | None:
    """Return where rows come from that are split by fractions; None of those that are drawn."""
    if data.get("_target_") is None or not {"validation", "test"} <= set(data):
        return None
    return data["_target_"], os.path.abspath(os.path.expanduser(data.get("path") or ""))


def _deciding(data: Any) -> list[str]:
    """Return the names of the options that decide which rows are tested."""
    if data.get("stream"):
        return ["stream", "held_out_rows", "validation", "test", "seed"]
    if "split" not in data:
        return ["held_out_rows", "validation", "test", "seed"]
    if data.get("fold") is not None:
        return ["fold", "validation", "seed"]
    names = ["fold", "stream", "split", "split_column", "max_rows"]
    if data["split"] != "column":
        names += ["validation", "test"]
    return [*names, "seed"] if data["split"] in ("random", "group") else names


def _word(value: Any) -> str:
    """Return a value as the command line takes it."""
    return json.dumps(value).strip('"')
