"""Densities as plain arrays, and as text that a person can read.

Shape letters: D event size, K components.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from mdn.errors import DataError

_MOST = 10  # components, and targets of a component, that are printed


def from_dict(base: type, plain: Mapping[str, Any]) -> Any:
    """Return the density that `to_dict` wrote down.

    Args:
        base: the type that all densities derive from.
        plain: "type" and "dtype", and name -> nested lists of numbers for each parameter.

    Raises:
        DataError: there is no such type.
    """
    types = {kind.__name__: kind for kind in _below(base)}
    name = plain.get("type")
    if name not in types:
        known = ", ".join(
            sorted(k for k, t in types.items() if hasattr(t, "_parameter_properties"))
        )
        raise DataError(f"type={name!r} is no density: give one of {known}")
    dtype = tf.as_dtype(plain.get("dtype", "float32"))
    tensors = {key: value for key, value in plain.items() if key not in ("type", "dtype")}
    return types[name](**{key: tf.constant(value, dtype) for key, value in tensors.items()})


def _below(base: type) -> list[type]:
    children: list[type] = base.__subclasses__()
    return [base, *(kind for child in children for kind in _below(child))]


def describe(density: Any) -> str:
    """Return one line on a density; below it its components, where it is one of few values."""
    logits = density.mixture_parameters().logits
    k, d = logits.shape[-1], density.event_shape[-1]
    head = (
        f"mdn {type(density).__name__}: batch {density.batch_shape}, {d} target{'s' * (d != 1)}, "
        f"{k} component{'s' * (k != 1)}, {density.dtype.name}"
    )
    if density.batch_shape.rank != 0 or not hasattr(logits, "numpy"):
        return head
    _, loc, scale_tril = (np.asarray(t) for t in density.mixture_parameters())
    weights = tf.nn.softmax(logits).numpy()
    stddev = np.sqrt(np.square(scale_tril).sum(axis=-1))
    lines = [head, "  weight  mean (standard deviation) of each target"]
    for weight, mean, sd in list(zip(weights, loc, stddev, strict=True))[:_MOST]:
        cells = [f"{m:.4g} ({s:.3g})" for m, s in zip(mean, sd, strict=True)]
        more = [".."] if d > _MOST else []
        lines.append(f"  {weight:6.3f}  {', '.join(cells[:_MOST] + more)}")
    return "\n".join(lines + ["  .."] * (k > _MOST))
