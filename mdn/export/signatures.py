"""What an exported model can be asked: its signatures, one function each.

Shape letters: B batch, T time, F features, D event size, K components, P probabilities, S draws.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from mdn.density.given import condition_on_observed
from mdn.density.mixture import GaussianMixture
from mdn.density.queries import Queries
from mdn.density.transformed import Transformed, draw_from, rebuilder, split_transform
from mdn.model import MDN

# What the inputs and outputs mean, for `mdn.json`. "Units of y": of each target, its own.
MEANINGS = {
    "x": "features, a row each; NaN where missing",
    "y": "targets in their units; NaN where missing, or where asked for",
    "p": "probabilities in [0, 1]",
    "level": "probability of the interval, in (0, 1)",
    "n": "number of draws",
    "seed": "two integers; the same always give the same draws",
    "mean": "in the units of y",
    "stddev": "in the units of y",
    "logits": "unnormalised log weights of the components",
    "loc": "means of the components, in the units of y",
    "scale_tril": "Cholesky factors of the components' covariances, in the units of y",
    "scale_diag": "standard deviations, in the units of y; with a factor, of what is not shared",
    "factor": "W of the components' covariances diag(scale_diag^2) + W W^T, in the units of y",
    "precision_tril": "Cholesky factors of the components' precisions, in 1 / the units of y",
    "log_prob": "log density, in nats",
    "cdf": "P(Y_d <= y_d) of each target by itself, in [0, 1]; NaN where y is",
    "quantile": "of each target by itself, in the units of y",
    "lower": "end of the central interval of each target by itself, in the units of y",
    "upper": "end of the central interval of each target by itself, in the units of y",
    "sample": "draws, in the units of y",
}
# Of these, where targets are transformed: what the parameters describe.
_TRANSFORMED = ("logits", "loc", "scale_tril", "scale_diag", "factor", "precision_tril")


def signatures(model: MDN, features: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the signatures of a model, and why it has not the others.

    Args:
        model: an adapted model; dropout is off in what is traced.
        features: specs of what it takes, under the names of the inputs.

    Returns:
        Name -> concrete function, as `export_saved_model` lists them; and name -> reason.
    """

    rebuild: list[Callable[..., Queries]] = []

    def blank(x: Any, values: tf.Tensor) -> tf.Tensor:
        """Return values [B, ..] with NaN for the rows that have no answer."""
        lacking = model.lacking(x)
        return values if lacking is None else where_rows(lacking, np.nan, values)

    # The network and what several signatures ask are functions of their own: in the artefact each
    # stands once, and the signatures call them.

    @_function
    def network(x: Any) -> dict[str, tf.Tensor]:
        density = model(x, training=False)
        rebuild[:] = [rebuilder(density)]
        return {name: blank(x, value) for name, value in density.tensors().items()}

    def density(x: Any) -> Queries:
        tensors = network(x)
        return rebuild[0](**tensors)

    @_function
    def moments(x: Any) -> dict[str, tf.Tensor]:
        return _moments(density(x))

    @_function
    def answers(x: Any) -> dict[str, tf.Tensor]:
        plain = model.head.target_transform is None
        return {**moments(x), **(params(x) if plain else {})}

    # The signatures themselves.

    def serving_default(x: Any) -> dict[str, tf.Tensor]:
        return answers(x)

    def mean_stddev(x: Any) -> dict[str, tf.Tensor]:
        return moments(x)

    def params(x: Any) -> dict[str, tf.Tensor]:
        return split_transform(density(x))[0].mixture_parameters()._asdict()

    def log_prob(x: Any, y: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"log_prob": blank(x, model.log_density(x, y))}

    def cdf(x: Any, y: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"cdf": density(x).cdf(y)}

    def quantile(x: Any, p: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"quantile": density(x).quantile(p)}

    def interval(x: Any, level: tf.Tensor) -> dict[str, tf.Tensor]:
        tail = 0.5 * (1.0 - level)
        ends = found["quantile"](x, tf.stack([tail, 1.0 - tail]))["quantile"]
        lower, upper = tf.unstack(tf.ensure_shape(ends, [2, *ends.shape[1:]]))
        return {"lower": lower, "upper": upper}

    def sample(x: Any, n: tf.Tensor, seed: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"sample": draw_from(density(x), n, seed)}

    def condition(x: Any, y: tf.Tensor) -> dict[str, tf.Tensor]:
        return _given(density(x), y)

    serving = _trace(serving_default, features)
    mean = serving.structured_outputs["mean"]  # [B, D] or [B, T, D]
    dtype = mean.dtype
    y = tf.TensorSpec(mean.shape, dtype, "y")
    p, level = tf.TensorSpec([None], dtype, "p"), tf.TensorSpec([], dtype, "level")
    draws = tf.TensorSpec([], tf.int32, "n"), tf.TensorSpec([2], tf.int32, "seed")
    found = {
        "serving_default": serving,
        "mean_stddev": _trace(mean_stddev, features),
        "params": _trace(params, features),
        "log_prob": _trace(log_prob, features, y),
        "cdf": _trace(cdf, features, y),
        "quantile": _trace(quantile, features, p),
    }
    found |= {
        "interval": _trace(interval, features, level),  # which asks for quantiles
        "sample": _trace(sample, features, *draws),
    }
    left_out = {}
    if model.head.event_size == 1:
        left_out["condition"] = "there is one target, and so none to condition on"
    else:
        found["condition"] = _trace(condition, features, y)
    if (reason := _why_no_matrix(features)) is not None:
        left_out["serving_matrix"] = reason
    else:
        found["serving_matrix"] = _of_matrix(answers, features)
    return found, left_out


def meaning(name: str, transformed: bool) -> str | None:
    """Return what an input or output of a signature means, if it is not a raw column.

    Args:
        name: of the input or output.
        transformed: whether the model's targets are transformed.
    """
    text = MEANINGS.get(name)
    if text is not None and transformed and name in _TRANSFORMED:
        return text.replace("the units of y", "units of the transformed targets")
    return text


def where_rows(chosen: tf.Tensor, value: float, tensor: tf.Tensor) -> tf.Tensor:
    """Return a tensor [B, ..] with one value in the rows that are chosen, [B]."""
    chosen = tf.reshape(chosen, [-1, *[1] * (tensor.shape.rank - 1)])
    return tf.where(chosen, tf.constant(value, tensor.dtype), tensor)


def _function(function: Callable) -> Any:
    return tf.function(function, autograph=False)


def _trace(function: Callable, *specs: Any) -> Any:
    return _function(function).get_concrete_function(*specs)


def _moments(density: Any) -> dict[str, tf.Tensor]:
    return {"mean": density.mean(), "stddev": density.stddev()}


def _given(density: Queries, y: tf.Tensor) -> dict[str, tf.Tensor]:
    """Return what `serving_default` does, given the entries of y that are there."""
    base, bijector = split_transform(density)
    known = ~tf.math.is_nan(y)
    u = y if bijector is None else tf.where(known, bijector.inverse(y), y)
    parameters = condition_on_observed(base.mixture_parameters(), u)
    mixture = GaussianMixture(*parameters)
    moments = _moments(mixture if bijector is None else Transformed(mixture, bijector))
    # To the last digit: the sum of weights, or a transform and its inverse, may round.
    mean = tf.where(known, y, moments["mean"])
    stddev = tf.where(known, tf.zeros_like(y), moments["stddev"])
    rest = parameters._asdict() if bijector is None else {}
    return {"mean": mean, "stddev": stddev, **rest}


def _why_no_matrix(features: Any) -> str | None:
    """Return why the features are no matrix [B, F] of numbers, or None if they are."""
    if not isinstance(features, dict):
        return None if features.shape.rank == 2 else "the features are sequences [B, T, F]"
    for column, spec in features.items():
        if not spec.dtype.is_floating:
            return f"feature {column!r} is a category, not a number"
    return None


def _of_matrix(answers: Callable, features: Any) -> Any:
    """Return `answers` of one matrix, whose columns are the features in their order."""
    if not isinstance(features, dict):
        return _trace(lambda x: answers(x), features)
    wide = any(spec.dtype == tf.float64 for spec in features.values())

    def serving_matrix(x: tf.Tensor) -> dict[str, tf.Tensor]:
        columns = zip(features.items(), tf.unstack(x, axis=-1), strict=True)
        return answers({name: tf.cast(column, spec.dtype) for (name, spec), column in columns})

    dtype = tf.float64 if wide else tf.float32
    return _trace(serving_matrix, tf.TensorSpec([None, len(features)], dtype, "x"))
