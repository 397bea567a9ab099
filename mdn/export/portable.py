"""A folder of graphs for another runtime: `params`, `log_prob` and what they mean.

Each graph is a file of its own, so that a device need hold only what it asks. Before the folder
takes its name, its files are loaded in their runtime and answer for rows as the model does.

Shape letters: B batch, N rows, F features, D event size.
"""

from __future__ import annotations

import abc
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from mdn.errors import ConfigError, RunError
from mdn.export.graphs import feature_count, portable_functions
from mdn.export.saved_model import as_plain, check_path, new_folder, write_description
from mdn.features import Columns
from mdn.model import MDN

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
    if model.head.target_transform is not None:
        return (
            f"the converters have no operations for target_transform={model.head.target_transform}"
        )
    compute = model.backbone.compute_dtype or model.dtype
    if (compute, model.head.dtype) != ("float32", "float32"):
        return f"the model computes in {compute}, and the runtimes in float32"
    if isinstance(model.encoder, Columns):
        for column in model.encoder.columns:
            if column.vocabulary is not None:
                return f"the feature {column.name!r} is text, and the input is a matrix of numbers"
            if column.dtype == "float64":
                return (
                    f"the feature {column.name!r} needs float64 (its values differ by less than "
                    "float32 rounds), and the input is float32"
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

    Args:
        form: of the files.
        model: an adapted model; dropout is off in what is written.
        path: a directory that does not exist yet.
        overwrite: replace such a directory at `path`, once the new one is whole.
        targets: the D names of y, for `mdn.json`; by default those that the model knows.
        config: of the run, for `mdn.json`.

    Returns:
        The path.

    Raises:
        ConfigError: there are not D targets, the model or the converter cannot do a part, or a
            package is not installed.
        RunError: the files answer otherwise than the model, something else is at `path`, or
            nothing can be written there; what was there before is then untouched.
    """
    check_path(path, overwrite, f"params{form.suffix}")
    check_portable(model, form.name)
    if len(targets) not in (0, model.head.event_size):
        raise ConfigError(
            f"targets={list(targets)}: give {model.head.event_size} names, one for each target"
        )
    for module in form.converters:
        if importlib.util.find_spec(module) is None:
            raise ConfigError(
                f"format={form.name} needs {module}, which is not installed: "
                f"pip install 'mdn[{form.name}]'"
            )
    functions = portable_functions(model)
    description = {
        "features": list(model.column_names.features),
        "targets": list(targets or model.column_names.targets),
        "files": {name: f"{name}{form.suffix}" for name in functions},
        "model": model.get_config(),
        "config": as_plain(config),
    }
    with new_folder(path, overwrite) as folder:
        for name, function in functions.items():
            (folder / f"{name}{form.suffix}").write_bytes(_convert(form, name, function))
        write_description(folder, description, functions)
        if importlib.util.find_spec(form.runtime) is None:
            log.warning(
                "%s: not compared with the model, as its runtime is not installed: "
                "pip install 'mdn[%s]'",
                path,
                form.name,
            )
        else:
            _compare(form, model, folder)
    return Path(path)


def _convert(form: Format, name: str, function: Any) -> bytes:
    try:
        return form.convert(function)
    except Exception as error:  # a converter raises whatever it likes
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"format={form.name}: the converter cannot write {name} ({reason[:200]}); "
            "export format=saved_model"
        ) from error


# ---------------------------------------------------------------------- comparison


def _compare(form: Format, model: MDN, folder: Path) -> None:
    """Raise a RunError where the files do not answer as the model does."""
    x, y = example_rows(model)
    for name, expected, tolerance in _expected(model, x, y):
        given = {"x": x} if name == "params" else {"x": x, "y": y}
        try:
            answers = form.load(folder / f"{name}{form.suffix}")(given)
        except Exception as error:  # of the runtime, whose errors have no type in common
            reason = " ".join(str(error).split())
            raise RunError(
                f"format={form.name}: its runtime cannot load {name} ({reason[:200]}); "
                "export format=saved_model"
            ) from error
        for key, value in expected.items():
            # A comparison with NaN is false.
            if not (np.abs(answers[key] - value) <= tolerance[key]).all():
                worst = np.max(np.abs(answers[key] - value))
                raise RunError(
                    f"format={form.name}: {key} of {name} differs from the model by {worst:.2g}: "
                    "it is not written; export format=saved_model"
                )


def example_rows(model: MDN, rows: int = ROWS) -> tuple[np.ndarray, np.ndarray]:
    """Return rows as the model has seen in training: x [N, F], and y [N, D] from the density."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=[rows, feature_count(model)])
    encoder = model.encoder
    if isinstance(encoder, Columns):
        mean = np.array([column.mean for column in encoder.columns])
        scale = np.array([column.scale for column in encoder.columns])
        missing = True
    else:
        mean, scale = encoder.mean.numpy(), 1.0 / encoder.inverse_scale.numpy()
        missing = encoder.missing == "indicator"
    x = (mean + scale * z).astype(np.float32)
    if missing:
        x[rng.random(x.shape) < ABSENT] = np.nan
    density = model(as_features(model, x), training=False)
    noise = rng.normal(size=[rows, model.head.event_size])
    y = density.mean().numpy() + density.stddev().numpy() * noise
    return x, y.astype(np.float32)


def as_features(model: MDN, x: np.ndarray) -> Any:
    """Return a matrix [B, F] as what the model takes: a mapping, where it was given columns."""
    x = tf.constant(x)
    if not isinstance(model.encoder, Columns):
        return x
    return dict(zip(model.encoder.names, tf.unstack(x, axis=-1), strict=True))


def _expected(
    model: MDN, x: np.ndarray, y: np.ndarray
) -> list[tuple[str, dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """Return, for each file, its name, the model's answers, and how far off they may be."""
    density = model(as_features(model, x), training=False).as_mixture()
    params = {name: tensor.numpy() for name, tensor in density.tensors().items()}
    log_prob = density.log_prob(y).numpy()
    # What the last digit of y is worth: more than the tolerance, where y is far from zero.
    last = np.abs(density.log_prob(np.nextafter(y, np.float32(np.inf))).numpy() - log_prob)
    return [
        (
            "params",
            params,
            {k: TOLERANCE * (np.abs(v) + np.abs(v).mean(axis=(0, 1))) for k, v in params.items()},
        ),
        (
            "log_prob",
            {"log_prob": log_prob},
            {"log_prob": TOLERANCE * (1.0 + np.abs(log_prob)) + 4.0 * last},
        ),
    ]
