"""What is done with a run once it is trained: load it, judge it on other rows, draw, export.

Shape letters: N rows, D targets.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from mdn.callbacks.checkpoint import read_history
from mdn.config import make
from mdn.constructors import check_constructors
from mdn.data.checks import check_rows, check_weight
from mdn.data.rows import Data, Rows
from mdn.data.schema import column_of
from mdn.errors import ConfigError, DataError, RunError
from mdn.evaluation import finite
from mdn.export import directory_size, export_litert, export_onnx
from mdn.inputs import open_rows
from mdn.model import load
from mdn.options import FITTED, GENERATIVE
from mdn.prediction import QUANTILES, Prediction, file_identity, predict_file
from mdn.runs import (
    check_output,
    check_run,
    place_of_candidate,
    place_of_variant,
    read_config,
    read_fingerprint,
    write_json,
)
from mdn.tasks import get_task

FORMATS = ("saved_model", "litert", "onnx")


def load_run(run: str | os.PathLike[str], *, trust: Sequence[str] = ()) -> tuple[Any, DictConfig]:
    """Return the model and the config of a run; nothing in the run can run code.

    Args:
        run: the run directory.
        trust: as for `mdn.load`.

    Raises:
        ConfigError: there is no class of a name in `trust`.
        RunError: there is no run, it has no model, or that names a class that may not be loaded.
    """
    folder = check_run(run)
    config: Any = read_config(folder)
    try:
        fitted = config.model._target_ == FITTED
    except (AttributeError, OmegaConfBaseException) as error:
        raise RunError(f"{run} cannot be read: {' '.join(str(error).split())}") from error
    if fitted:
        raise RunError(
            f"{run} is a fit without features (model=distribution): its saved_model/ answers, "
            "and there is nothing to predict from"
        )
    return load(folder / "model.keras", compile=False, trust=trust), config


def data_of(
    model: Any, config: DictConfig, table: str | None, *, trust: Sequence[str] = ()
) -> Data:
    """Return the rows to judge a model on.

    Args:
        model: of the run.
        config: of the run.
        table: a CSV or Parquet file with targets, or an `.npz` file of arrays, a folder or a glob:
            all of its rows then are test rows, and the baseline is fitted to them too. None: the
            data of the run itself.
        trust: "module.Class" of a source of the user's own.

    Raises:
        DataError: they cannot be used.
        RunError: the run's own source is neither of mdn nor in `trust`.
    """
    if table is None:
        check_constructors(config, "data", trust)
        ignored = config.model._target_ == GENERATIVE and "missing" in config.data
        return make(config, "data", **({"missing": "indicator"} if ignored else {})).load()
    name = config.data.get("weight")
    weighted = isinstance(name, str)
    keep = [name] if weighted else []
    reader = open_rows(model, table, keep, known=True, keys=_keys(config))
    blocks = list(reader.blocks())
    if not blocks:
        raise DataError(f"{table} {reader.empty}: give a file with rows")
    parts: list[Any] = [block.x for block in blocks]
    if len({np.shape(part)[1:] for part in parts}) > 1:
        raise DataError(f"{table} has sequences of several lengths: judge them file by file")
    if isinstance(parts[0], dict):
        x: Any = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    else:
        x = np.concatenate(parts)
    y = np.concatenate([block.y for block in blocks])
    weight = None
    if weighted:
        weight = np.concatenate([column_of(block.kept, name) for block in blocks])
        check_weight(weight, f"weight column {name!r}")
        weight = weight / weight.mean()
    names = model.column_names
    check_rows(x, y, model.missing, features=names.features, targets=names.targets, fitted=False)
    rows = Rows(x, y, weight)
    return Data(rows, rows, rows, names.features, names.targets, missing=model.missing)


def predict_run(
    run: str | os.PathLike[str],
    table: str,
    output: str | os.PathLike[str],
    *,
    quantiles: Sequence[float] | None = None,
    trust: Sequence[str] = (),
    **options: Any,
) -> Prediction:
    """Write the answers of a run for each row of a table; see `mdn.prediction.predict_file`."""
    model, config = load_run(run, trust=trust)
    identity = file_identity(Path(run) / "model.keras")
    quantiles = QUANTILES if quantiles is None else quantiles
    options = {"quantiles": quantiles, "identity": identity, "keys": _keys(config), **options}
    return predict_file(model, table, output, **options)


def _keys(config: DictConfig) -> tuple[str, str]:
    """Return what x and y are called in the arrays of a run."""
    return config.data.get("x_key", "x"), config.data.get("y_key", "y")


def evaluate_run(
    run: str | os.PathLike[str],
    table: str | None = None,
    output: str | os.PathLike[str] | None = None,
    *,
    overwrite: bool = False,
    trust: Sequence[str] = (),
) -> dict[str, float]:
    """Return the metrics of a run on its own test rows, or on those of a table; see `data_of`.

    Args:
        run: the run directory.
        table: as for `data_of`.
        output: a JSON file for the metrics.
        overwrite: replace `output`, once the new one is whole.
        trust: as for `load_run` and `data_of`.

    Raises:
        RunError: the rows of the run are not those that it was trained on; or `output` exists, or
            cannot be written.
    """
    if output is not None:
        check_output(Path(output), overwrite)
    model, config = load_run(run, trust=trust)
    data = data_of(model, config, table, trust=trust)
    if table is None:
        _check_unchanged(Path(run), data)
    metrics = finite(get_task(config).score(model, data))
    if output is not None:
        write_json(Path(output), metrics)
    return metrics


def plot_run(
    run: str | os.PathLike[str],
    table: str | None = None,
    output: str | os.PathLike[str] | None = None,
    *,
    trust: Sequence[str] = (),
) -> list[Path]:
    """Draw the pictures of a run anew, of its own test rows or of those of a table.

    Args:
        run: the run directory.
        table: as for `data_of`.
        output: a folder; by default `plots/` of the run.
        trust: as for `load_run` and `data_of`.

    Returns:
        The files.

    Raises:
        RunError: the rows of the run are not those that it was trained on.
    """
    model, config = load_run(run, trust=trust)
    folder = Path(run) / "plots" if output is None else Path(output)
    data = data_of(model, config, table, trust=trust)
    if table is None:
        _check_unchanged(Path(run), data)
    get_task(config).judge(model, data, _history(Path(run)), folder)
    return sorted(folder.glob("*.png"))


def _check_unchanged(run: Path, data: Data) -> None:
    """Raise a RunError where rows that the run learned from may now be among its test rows."""
    if data.truth is not None:
        return  # of a simulator, whose draws another machine may round in another way
    if (before := read_fingerprint(run)) is not None and before != data.fingerprint():
        raise RunError(
            f"the data of {run} are not those that it was trained on, and it may have learned "
            "from what now are test rows: give a file of new rows"
        )


def _history(run: Path) -> dict[str, list[float]]:
    """Return the history of a run; of several models, of the one that it chose or counts most."""
    folder = run / "checkpoints"
    try:
        if (recipe := run / "recipe.json").is_file():
            shares = json.loads(recipe.read_text("utf-8"))["shares"]
            folder /= place_of_variant(max(shares, key=shares.__getitem__))
        elif (metrics := run / "metrics.json").is_file():
            k = json.loads(metrics.read_text("utf-8")).get("selection/k")
            folder /= "" if k is None else place_of_candidate(int(k))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}  # as of checkpoints that are damaged
    return read_history(folder)


def export_run(
    run: str | os.PathLike[str],
    form: str = "saved_model",
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    *,
    trust: Sequence[str] = (),
) -> Path:
    """Write an artefact of a run, and return its path.

    Args:
        run: the run directory.
        form: one of `FORMATS`.
        output: where to; by default the format's name in the run directory.
        overwrite: replace what is there, once the new artefact is whole.
        trust: as for `load_run`.

    Raises:
        ConfigError: the format is unknown, or cannot hold the model.
        RunError: something is there already, or there is no model.
    """
    if form not in FORMATS:
        raise ConfigError(f"format={form} is unknown: choose one of {', '.join(FORMATS)}")
    path = Path(run) / form if output is None else Path(output)
    check_run(run)
    if path.exists() and not overwrite:
        raise RunError(f"{path} exists: give another --output, or --overwrite")
    model, config = load_run(run, trust=trust)
    if form == "saved_model":
        get_task(config).export(model, path, config, overwrite)
        return path
    write = {"litert": export_litert, "onnx": export_onnx}[form]
    return write(model, path, overwrite=overwrite, config=config)


def describe_artefact(path: Path) -> list[str]:
    """Return lines on an artefact: its size, and each signature with its inputs and outputs."""
    about: Mapping[str, Any] = json.loads((path / "mdn.json").read_text("utf-8"))
    lines = [f"{path}: {directory_size(path) / 1e6:.1f} MB, {len(about['signatures'])} signatures"]
    for name, signature in about["signatures"].items():
        inputs, outputs = (", ".join(signature[side]) for side in ("inputs", "outputs"))
        lines.append(f"  {name}({inputs}) -> {outputs}")
    return lines + [f"  no {name}: {why}" for name, why in about.get("left_out", {}).items()]
