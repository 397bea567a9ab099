"""A folder of graphs for another runtime: `params`, `log_prob` and what they mean.

Each graph is a file of its own, so that a device need hold only what it asks. Before the folder
takes its name, its files are loaded in their runtime and answer for rows as the model does.

Shape letters: N rows, F features, D event size.
"""

from __future__ import annotations

import abc
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from scipy import special

from mdn.density.agreement import support
from mdn.density.transformed import split_transform
from mdn.errors import ConfigError, RunError
from mdn.export.graphs import groups_of, portable_functions
from mdn.export.saved_model import (
    as_plain,
    check_path,
    check_targets,
    describe_features,
    input_names,
    new_folder,
    write_description,
)
from mdn.features import Columns
from mdn.model import MDN
from mdn.stacking import Stack

log = logging.getLogger(__name__)

TOLERANCE = 1e-5
ROWS = 1000  # that the files and the model are compared on
ABSENT = 0.05  # of the features of these rows, where the model takes missing ones

Answers = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]


class Format(abc.ABC):
    """A file format with a runtime of its own.

    Attributes:
        name: of the format, and of the extra of this package that brings its packages.
        suffix: of its files.
        runtime: the module that loads them.
        converters: modules without which no file can be written.
    """

    name: str
    suffix: str
    runtime: str
    converters: tuple[str, ...] = ()

    @abc.abstractmethod
    def convert(self, function: Any) -> bytes:
        """Return the file of a concrete function.

        Raises:
            Exception: whatever the converter raises where it cannot do a part.
        """

    @abc.abstractmethod
    def load(self, path: str | os.PathLike[str]) -> Answers:
        """Return what answers for arrays by name, read from a file."""


def check_portable(model: Any, form: str) -> None:
    """Check, before any work, that a model can be written as graphs of plain operations.

    Args:
        model: of a run.
        form: the format's name, for the message.

    Raises:
        ConfigError: it cannot; the message says why, and what can.
    """
    if (reason := _why_not(model)) is not None:
        raise ConfigError(f"format={form}: {reason}; export format=saved_model")


def _why_not(model: Any) -> str | None:
    if not isinstance(model, MDN):
        return f"a {type(model).__name__} has no p(y | x)"
    rank = model.get_build_config()["feature_rank"]
    if rank is None:
        return "the model has no scaling yet: call model.adapt(x, y) on train rows first"
    if rank != 2:
        return "the features are sequences [B, T, F], and the converters take rows [B, F]"
    for dtype in (model.backbone.compute_dtype or model.dtype, model.head.dtype):
        if dtype != "float32":
            return f"the model computes in {dtype}, and the runtimes in float32"
    if isinstance(model.encoder, Columns):
        for column in model.encoder.columns:
            if column.vocabulary is not None:
                return (
                    f"the feature {column.name!r} is text, and the converters have no tables to "
                    "look categories up in"
                )
            if column.dtype == "float64":
                return (
                    f"the feature {column.name!r} needs float64 (its values differ by less than "
                    "float32 rounds), and the runtimes take float32"
                )
    elif model.encoder.features == 0:
        return "the model has no features"
    return None


def export_portable(
    form: Format,
    model: MDN,
    path: str | os.PathLike[str],
    overwrite: bool = False,
    targets: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write `params` and `log_prob` of a model, a file each, and `mdn.json`, which describes them.

    The arguments but `form`, of the files, and what is returned, are those of
    `mdn.export.export_saved_model`.

    Raises:
        ConfigError: also where the model or the converter cannot do a part, or a package is not
            installed.
        RunError: also where the files answer otherwise than the model.
    """
    check_path(path, overwrite, f"params{form.suffix}")
    check_portable(model, form.name)
    check_targets(model, targets)
    for module in form.converters:
        if importlib.util.find_spec(module) is None:
            raise ConfigError(
                f"format={form.name} needs {module}, which is not installed: "
                f"pip install 'mdn[{form.name}]'"
            )
    groups = groups_of(model)
    functions = portable_functions(model, groups)
    files = {name: f"{name}{form.suffix}" for name in functions}
    description = {
        "features": describe_features(model),
        "targets": list(targets or model.column_names.targets),
        "target_transform": model.head.target_transform,
        "model": model.get_config(),
        "config": as_plain(config),
    }
    with new_folder(path, overwrite) as folder:
        for name, function in functions.items():
            (folder / files[name]).write_bytes(_convert(form, name, function))
        write_description(folder, description, functions)
        if importlib.util.find_spec(form.runtime) is not None:
            _compare(form, model, {name: folder / file for name, file in files.items()})
        else:
            log.warning(
                "%s: not compared with the model, as its runtime is not installed: "
                "pip install 'mdn[%s]'",
                path,
                form.name,
            )
    return Path(path)


def _convert(form: Format, name: str, function: Any) -> bytes:
    try:
        return form.convert(function)
    except Exception as error:  # a converter raises whatever it likes
        raise ConfigError(
            f"format={form.name}: the converter cannot write {name} ({_line(error)}); "
            "export format=saved_model"
        ) from error


def _line(error: Exception) -> str:
    """Return what a foreign error says, as a part of a line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


# ---------------------------------------------------------------------- comparison


def _compare(form: Format, model: MDN, files: Mapping[str, Path]) -> None:
    """Raise a RunError where the files do not answer as the model does."""
    x, y = example_rows(model)
    inputs = as_inputs(model, x)
    for name, expected in expected_answers(model, x, y).items():
        try:
            answer = form.load(files[name])
            answers = answer(inputs | {"y": y} if name == "log_prob" else inputs)
        except Exception as error:  # of the runtime, whose errors have no type in common
            raise RunError(
                f"format={form.name}: its runtime cannot run {name} ({_line(error)}); "
                "export format=saved_model"
            ) from error
        for key, (value, tolerance) in expected.items():
            off = np.abs(answers[key] - value)
            if not (off <= tolerance).all():  # nor is NaN
                raise RunError(
                    f"format={form.name}: {key} of {name} differs from the model by "
                    f"{np.max(off):.2g}, and nothing is written; export format=saved_model"
                )


def example_rows(model: MDN, rows: int = ROWS) -> tuple[Any, np.ndarray]:
    """Return rows like those of the training: x as the model takes it, and y [N, D]."""
    rng = np.random.default_rng(0)
    encoder = model.encoder
    if isinstance(encoder, Columns):
        mean, scale = np.array([[column.mean, column.scale] for column in encoder.columns]).T
    else:
        mean, scale = encoder.mean.numpy(), 1.0 / encoder.inverse_scale.numpy()
    x: Any = (mean + scale * rng.normal(size=[rows, len(mean)])).astype(np.float32)  # [N, F]
    if model.missing == "indicator":
        x[rng.random(x.shape) < ABSENT] = np.nan
    if isinstance(encoder, Columns):
        x = dict(zip(encoder.names, x.T, strict=True))
    return x, model(_as_tensors(x), training=False).sample(seed=(0, 1)).numpy()


def as_inputs(model: MDN, x: Any) -> dict[str, np.ndarray]:
    """Return features as the files take them: by the name of the input."""
    if not isinstance(x, dict):
        return {"x": x}
    names = input_names(model.encoder.names)
    return {names[column]: values for column, values in x.items()}


def expected_answers(
    model: MDN, x: Any, y: np.ndarray
) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Return the model's answers, and how far off a file's may be: by file, then by output."""
    density = model(_as_tensors(x), training=False)
    mixture = split_transform(density)[0].as_mixture()
    params = mixture.tensors()
    if "scale_diag" in params and "factor" not in params:
        params = mixture.mixture_parameters()._asdict()
    log_prob = density.log_prob(y).numpy()
    # What the last digit of y is worth: more than the tolerance, where y is far from zero.
    last = np.abs(density.log_prob(np.nextafter(y, np.float32(np.inf))).numpy() - log_prob)
    expected = {
        name: (value, TOLERANCE * (np.abs(value) + np.abs(value).mean(axis=(0, 1))))
        for name, value in ((name, tensor.numpy()) for name, tensor in params.items())
    }
    if isinstance(model, Stack) and model.agreement:
        # Nor are weights by the density at means known better than the last digit of those.
        logits, tolerance = expected["logits"]
        known = model.agreement * _last_digit_of_support(mixture)
        expected["logits"] = logits, tolerance + 4.0 * known
        last += (special.softmax(logits, axis=-1) * known).sum(axis=-1)
    return {
        "params": expected,
        "log_prob": {
            "log_prob": (log_prob, TOLERANCE * (1.0 + np.abs(log_prob)) + 4.0 * last),
        },
    }


def _last_digit_of_support(mixture: Any) -> np.ndarray:
    """Return by how much `support` moves where every other component's mean does, [B, K]."""
    loc = mixture.loc.numpy()
    odd = np.arange(loc.shape[-2]) % 2 == 1
    moved = np.where(odd[:, np.newaxis], np.nextafter(loc, np.float32(np.inf)), loc)
    tensors = mixture.tensors() | {"loc": moved}
    return np.abs(support(type(mixture)(**tensors)) - support(mixture))


def _as_tensors(x: Any) -> Any:
    return tf.nest.map_structure(tf.constant, x)
