"""A fitted distribution as a SavedModel that plain TensorFlow loads: no TFP, no mdn.

Shape letters: B batch, D event size.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf
from tensorflow_probability import distributions as tfd

from mdn.density.draws import draw
from mdn.density.queries import Queries
from mdn.errors import ConfigError
from mdn.export.saved_model import as_plain, check_path, write_saved_model


def export_distribution(
    distribution: tfd.Distribution,
    path: str | os.PathLike[str],
    overwrite: bool = False,
    targets: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write a SavedModel of a distribution without features.

    Its signatures return named tensors, in the units of y:

    - `serving_default`: nothing to `mean` and `stddev`, where they exist, and to the parameters,
      each by its name.
    - `log_prob`: `y` [B, D] (normals and their mixtures: NaN where an entry is missing) to
      `log_prob` [B], nats.
    - `sample`: `n` int32 and `seed` int32 [2] to `sample` [n, D]; a function of the seed.

    D is the batch and the event shape together: independent targets are one row.

    The arguments and errors are those of `mdn.export.export_saved_model`, but that the model is a
    distribution as `fit_distribution` returns it, which knows no names of targets.
    """
    check_path(path, overwrite)
    shape = [*distribution.batch_shape, *distribution.event_shape]
    if len(targets) not in (0, *shape[-1:]):
        raise ConfigError(f"targets={list(targets)}: give {shape[-1]} names, one for each target")
    description = {
        "distribution": type(distribution).__name__,
        "features": [],
        "targets": list(targets),
        "config": as_plain(config),
    }
    return write_saved_model(path, overwrite, [], _trace(distribution, shape), description)


def _trace(distribution: tfd.Distribution, shape: list[int]) -> dict[str, Any]:
    moments = {name: getattr(distribution, name) for name in ("mean", "stddev")}

    @tf.function(autograph=False)
    def serving_default() -> dict[str, tf.Tensor]:
        answers = {name: _or_none(moment) for name, moment in moments.items()}
        if isinstance(distribution, Queries):
            answers |= distribution.tensors()
        else:
            names = distribution.parameter_properties(dtype=distribution.dtype)
            answers |= {name: distribution.parameters.get(name) for name in names}
        return {k: tf.convert_to_tensor(v) for k, v in answers.items() if v is not None}

    @tf.function(autograph=False)
    def log_prob(y: tf.Tensor) -> dict[str, tf.Tensor]:
        value = distribution.log_prob(tf.cast(y, distribution.dtype))
        return {"log_prob": tf.reduce_sum(tf.reshape(value, [tf.shape(value)[0], -1]), axis=-1)}

    @tf.function(autograph=False)
    def sample(n: tf.Tensor, seed: tf.Tensor) -> dict[str, tf.Tensor]:
        if isinstance(distribution, Queries):
            return {"sample": draw(distribution.mixture_parameters(), n, seed)}
        return {"sample": distribution.sample(n, seed=seed)}

    floating = distribution.dtype if distribution.dtype.is_floating else tf.float32
    return {
        "serving_default": serving_default.get_concrete_function(),
        "log_prob": log_prob.get_concrete_function(tf.TensorSpec([None, *shape], floating, "y")),
        "sample": sample.get_concrete_function(
            tf.TensorSpec([], tf.int32, "n"), tf.TensorSpec([2], tf.int32, "seed")
        ),
    }


def _or_none(moment: Callable[[], tf.Tensor]) -> tf.Tensor | None:
    try:
        return moment()
    except NotImplementedError:
        return None
