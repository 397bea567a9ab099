"""A model as a SavedModel that plain TensorFlow loads: no tf_keras, no TFP, no mdn.

Shape letters: B batch, T time, F features, D event size, K components.
"""

from __future__ import annotations

import contextlib
import json
import keyword
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf
from omegaconf import OmegaConf
from tensorflow.core.protobuf import saved_model_pb2

import mdn
from mdn.errors import ConfigError, RunError
from mdn.export.signatures import meaning, signatures
from mdn.features import Columns
from mdn.model import MDN
from mdn.trust import DESCRIPTION, FORMAT, file_digests

# The inputs that the signatures add to the features.
RESERVED = ("y", "p", "level", "n", "seed")
# What the input of a raw column holds: of a number, and of text.
_KINDS = (
    "a number as it stands in the table, NaN where missing; a date in days since 1970-01-01 UTC",
    'text, "" where missing',
)


def export_saved_model(
    model: MDN,
    path: str | os.PathLike[str],
    overwrite: bool = False,
    targets: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write a SavedModel with the scaling and the feature encoding inside.

    Its signatures take any number of rows and return named tensors, in the units of y:

    - `serving_default`: features to `mean` [B, D], `stddev` [B, D], and the mixture's `logits`
      [B, K], `loc` [B, K, D] and `scale_tril` [B, K, D, D]; K = 1 for a single normal. Where
      targets are transformed there is no mixture in the units of y, and these three are left out.
    - `mean_stddev`: features to `mean` and `stddev` alone.
    - `params`: features to `logits`, `loc` and `scale_tril` alone; where targets are transformed,
      in units of the transformed targets.
    - `log_prob`: features and `y` [B, D] (NaN where an entry is missing) to `log_prob` [B], nats.
    - `cdf`: features and `y` to `cdf` [B, D], of each target by itself.
    - `quantile`: features and probabilities `p` [P] to `quantile` [P, B, D], of each target by
      itself: infinite for 0 and 1, NaN outside of [0, 1].
    - `interval`: features and `level`, a number in (0, 1), to `lower` and `upper` [B, D], the ends
      of the central interval of each target by itself.
    - `sample`: features, `n` int32 and `seed` int32 [2] to `sample` [n, B, D]; a function of the
      seed: the same draws again.
    - `condition`, of several targets: features and `y` [B, D], NaN where a target is asked for, to
      what `serving_default` returns, given the other targets. Rows may ask for different ones. A
      target that is given has its value as its mean, and a standard deviation of zero.
    - `serving_matrix`, where all features are numbers: `x` [B, F], the features in their order, to
      what `serving_default` returns.

    The features are `x` ([B, F], or [B, T, F] for sequences), or one [B] for each raw column: a
    string ("" where missing) or a number (NaN where missing). A row that lacks a number which no
    train row lacked has NaN for answers, unless the model was adapted with missing="indicator". A
    density for each step has batch [B, T] in place of [B].

    `mdn.json`, beside `saved_model.pb`, states every name, dtype, shape and unit, and the column
    of each input: `input_names` says where the two differ. It also holds the versions, the
    configs, why a signature is left out, what the train rows said of each input (its categories,
    or mean and scale), and the SHA-256 of each file.

    Args:
        model: an adapted model; dropout is off in what is written.
        path: a directory that does not exist yet.
        overwrite: replace a SavedModel at `path`, once the new one is whole.
        targets: the D names of y, for `mdn.json`; by default those that the model knows.
        config: of the run, for `mdn.json`.

    Returns:
        The path.

    Raises:
        ConfigError: there are not D targets.
        RunError: the model is not adapted, something else is at `path`, or nothing can be written
            there; what was there before is then untouched.
    """
    check_path(path, overwrite)
    check_targets(model, targets)
    traced, left_out = signatures(model, feature_specs(model))
    description = {
        "features": describe_features(model),
        "feature_names": list(model.column_names.features),
        "targets": list(targets or model.column_names.targets),
        "target_transform": model.head.target_transform,
        "left_out": left_out,
        "model": model.get_config(),
        "config": as_plain(config),
    }
    return write_saved_model(path, overwrite, model.parts, traced, description)


def check_path(
    path: str | os.PathLike[str], overwrite: bool, mark: str = "saved_model.pb"
) -> None:
    """Check, before any work, that an artefact can go to `path`.

    Args:
        path: a directory, or nothing yet.
        overwrite: replace an artefact of the same kind.
        mark: the file that all artefacts of this kind have.

    Raises:
        RunError: something else is there, or an artefact that is not to be replaced.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise RunError(f"{path} exists: remove it, or export with overwrite=True")
    if path.exists() and not (path / mark).is_file():
        kind = "a SavedModel" if mark == "saved_model.pb" else f"a folder with {mark}"
        raise RunError(f"{path} is not {kind}, so it stays: give another path")


def check_targets(model: MDN, targets: Sequence[str]) -> None:
    """Raise a ConfigError where names are given, but not one for each target."""
    if len(targets) not in (0, model.head.event_size):
        raise ConfigError(
            f"targets={list(targets)}: give {model.head.event_size} names, one for each target"
        )


def write_saved_model(
    path: str | os.PathLike[str],
    overwrite: bool,
    parts: Iterable[Any],
    signatures: dict[str, Any],
    description: dict[str, Any],
) -> Path:
    """Write signatures and `mdn.json`: all of it, or nothing.

    Args:
        path: where `check_path` passes.
        overwrite: replace a SavedModel at `path`, once the new one is whole.
        parts: the layers and variables that the signatures read.
        signatures: name -> concrete function.
        description: what `mdn.json` says besides the versions and the signatures.

    Raises:
        RunError: nothing can be written there; what was there before is then untouched.
    """
    with new_folder(path, overwrite) as folder:
        with _quiet():
            options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
            tf.saved_model.save(_resources(parts), str(folder), signatures, options)
            _drop_gradients(folder)
        write_description(folder, description, signatures)
    return Path(path)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str], overwrite: bool) -> Iterator[Path]:
    """Yield a folder under a temporary name, which becomes `path` once the block is done.

    Args:
        path: where `check_path` passes; the folders above it are made.
        overwrite: replace what is at `path`.

    Raises:
        RunError: nothing can be written there; what was there before is then untouched.
    """
    home = Path(path).resolve()
    partial = home.with_name(f".{home.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        _move(partial, home, overwrite)
    except (OSError, tf.errors.OpError) as error:
        raise RunError(f"cannot write {path}: {_reason(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_description(
    folder: Path, description: dict[str, Any], signatures: dict[str, Any]
) -> None:
    """Write `mdn.json`: the versions, the description, and the signatures' inputs and outputs."""
    description = {**description, "files": file_digests(folder)}
    text = json.dumps(_describe(description, signatures), indent=2)
    (folder / DESCRIPTION).write_text(text + "\n", "utf-8")


def as_plain(config: Mapping[str, Any] | None) -> Any:
    """Return a config as `mdn.json` holds it, with every interpolation resolved."""
    return OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config


def directory_size(path: str | os.PathLike[str]) -> int:
    """Return the bytes of all files below a directory."""
    return sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file())


def input_names(columns: Iterable[str]) -> dict[str, str]:
    """Return the signature input of each raw column: column -> input.

    TensorFlow takes names of letters, digits and underscores that start with a letter, are not
    words of Python, and differ in more than case. A column named so keeps its name. In others
    `_` stands for what is not allowed, "column_" goes before what does not start with a letter,
    and a number after what is taken already (as are the inputs in `RESERVED`).
    """
    columns = list(columns)
    inputs: dict[str, str] = {}
    taken = set(RESERVED)
    for column in columns:
        if _identifier(column) == column and column.lower() not in taken:
            inputs[column] = column
            taken.add(column.lower())
    for column in columns:
        if column in inputs:
            continue
        stem = name = _identifier(column)
        number = 1
        while name.lower() in taken:
            number += 1
            name = f"{stem}_{number}"
        inputs[column] = name
        taken.add(name.lower())
    return inputs


def _identifier(column: str) -> str:
    name = re.sub(r"[^A-Za-z0-9_]+", "_", column)
    if not name[:1].isalpha():
        name = f"column_{name.lstrip('_')}"
    # `self` is an argument of TensorFlow's own.
    return f"{name}_" if keyword.iskeyword(name) or name == "self" else name


def feature_specs(model: MDN) -> tf.TensorSpec | dict[str, tf.TensorSpec]:
    """Return what the model takes, under the names of the signatures' inputs."""
    rank = model.get_build_config()["feature_rank"]
    if rank is None:
        raise RunError("the model has no scaling yet: call model.adapt(x, y) on train rows")
    if isinstance(model.encoder, Columns):
        names = input_names(model.encoder.names)
        return {
            column: tf.TensorSpec(spec.shape, spec.dtype, names[column])
            for column, spec in model.encoder.signature().items()
        }
    return tf.TensorSpec([None] * (rank - 1) + [model.encoder.features], tf.float32, "x")


def describe_features(model: MDN) -> list[dict[str, Any]]:
    """Return, for `mdn.json`, each input and the raw column that it takes, if there are any."""
    features = feature_specs(model)
    columns = features if isinstance(features, dict) else {None: features}
    return [
        {"input": spec.name, "column": column, **_state(spec), **_known(model, column)}
        for column, spec in columns.items()
    ]


def _known(model: MDN, column: str | None) -> dict[str, Any]:
    """Return what the train rows said of an input, for who has to choose values for it.

    That is its categories, most frequent first; or its mean and standard deviation, of a matrix
    one of each feature.
    """
    encoder = model.encoder
    if isinstance(encoder, Columns):
        (known,) = (c for c in encoder.columns if c.name == column)
        if known.vocabulary is not None:
            return {"vocabulary": known.vocabulary}
        return {"mean": known.mean, "scale": known.scale}
    return {
        "mean": encoder.mean.numpy().tolist(),
        "scale": (1.0 / encoder.inverse_scale.numpy()).tolist(),
    }


def _resources(parts: Iterable[Any]) -> tf.Module:
    """Return a module of the variables and tables that the signatures read.

    The layers themselves would bring their Keras functions, the optimizer, and warnings.
    """
    module = tf.Module()
    module.resources = [
        leaf
        for part in parts
        for leaf in tf.train.TrackableView(part).descendants()
        if isinstance(leaf, (tf.Variable, tf.saved_model.experimental.TrackableResource))
    ]
    return module


def _drop_gradients(folder: Path) -> None:
    """Take the names of gradients, which are not saved, out of the graph: a loader warns of them.

    TensorFlow's fingerprint of the graph as it was goes too; it is optional.
    """
    path, saved = folder / "saved_model.pb", saved_model_pb2.SavedModel()
    saved.ParseFromString(path.read_bytes())
    for graph in saved.meta_graphs:
        for function in graph.graph_def.library.function:
            for node in function.node_def:
                node.attr.pop("_gradient_op_type", None)
    path.write_bytes(saved.SerializeToString(deterministic=True))
    (folder / "fingerprint.pb").unlink(missing_ok=True)


def _state(spec: Any) -> dict[str, Any]:
    return {"dtype": spec.dtype.name, "shape": spec.shape.as_list()}


def _describe(description: dict[str, Any], signatures: dict[str, Any]) -> dict[str, Any]:
    """Return what `mdn.json` says of the artefact."""
    transformed = description.get("target_transform") is not None

    columns = {
        feature["input"]: feature["column"]
        for feature in description["features"]
        if feature["column"] is not None
    }

    def state(name: str, spec: Any) -> dict[str, Any]:
        text = meaning(name, transformed)
        return _state(spec) | ({} if text is None else {"meaning": text})

    def state_input(spec: Any) -> dict[str, Any]:
        # A column may be called as an output is, or as the matrix of `serving_matrix`.
        if spec.name not in columns or spec.shape.rank != 1:
            return state(spec.name, spec)
        column, kind = columns[spec.name], _KINDS[spec.dtype == tf.string]
        return {**_state(spec), "meaning": f"the column {column!r}: {kind}"}

    return {
        "format": FORMAT,
        "mdn": mdn.__version__,
        "tensorflow": tf.__version__,
        **description,
        "signatures": {
            name: {
                "inputs": {
                    spec.name: state_input(spec)
                    for spec in tf.nest.flatten(function.structured_input_signature)
                },
                "outputs": {
                    output: state(output, spec)
                    for output, spec in function.structured_outputs.items()
                },
            }
            for name, function in signatures.items()
        },
    }


def _reason(error: OSError | tf.errors.OpError) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # TensorFlow's "{{node ..}} file; reason [Op:..]", of which only the reason is of use.
    return error.message.partition("\n")[0].rpartition("; ")[2].partition(" [Op:")[0]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep TensorFlow from announcing where it writes: a partial directory."""
    logger = tf.get_logger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _move(new: Path, path: Path, overwrite: bool) -> None:
    """Rename `new` to `path`; the SavedModel that stands there goes only when it is replaced."""
    old = path.with_name(f".{path.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    if overwrite and path.exists():
        os.replace(path, old)
    try:
        os.replace(new, path)
    except OSError:
        if old.exists():
            os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)
