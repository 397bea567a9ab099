"""The parameters and the log density of a model as graphs of plain operations.

Converters know no matrix decompositions, triangular solves or hash tables. Here the forward
substitution is unrolled, triangles are filled through constant masks, and what a runtime computes
worse than TensorFlow does is spelled out.

Shape letters: B batch, F features, D event size, K components, R rank, M ensemble members.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import graph_pb2
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

from mdn.density.gaussian import LOG_2_PI
from mdn.ensembles import Ensemble
from mdn.features import Columns
from mdn.model import MDN


def feature_count(model: MDN) -> int:
    """Return F, the columns of the matrix that the graphs take."""
    encoder = model.encoder
    return len(encoder.columns) if isinstance(encoder, Columns) else encoder.features


def portable_functions(model: MDN) -> dict[str, Any]:
    """Return the graphs of a model that `check_portable` passes: name -> concrete function.

    - `params`: `x` [B, F], raw features in their order, to `logits` [B, K], `loc` [B, K, D] and
      the scale in the form that the head states it in: `scale_tril` [B, K, D, D], or `scale_diag`
      [B, K, D], with `factor` [B, K, D, R] where there is one, or `precision_tril` [B, K, D, D].
      K = 1 of a single normal.
    - `log_prob`: `x` and `y` [B, D], nothing missing, to `log_prob` [B], nats.
    """

    def tensors(x: tf.Tensor) -> dict[str, tf.Tensor]:
        codes = _codes(model, x)
        if not isinstance(model, Ensemble):
            return _as_mixture(model(codes, training=False).tensors())
        stacked = model.member_densities(codes, training=False).tensors()  # [M, B, ..] each
        members = [
            _as_mixture({name: tf.gather(t, m, axis=0) for name, t in stacked.items()})
            for m in range(model.members)
        ]
        share = tf.constant(-math.log(model.members), tf.float32)
        for member in members:
            member["logits"] = tf.nn.log_softmax(member["logits"]) + share
        return {name: tf.concat([one[name] for one in members], axis=1) for name in members[0]}

    def log_prob(x: tf.Tensor, y: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"log_prob": mixture_log_prob(tensors(x), y)}

    x = tf.TensorSpec([None, feature_count(model)], tf.float32, "x")
    y = tf.TensorSpec([None, model.head.event_size], tf.float32, "y")
    return {
        "params": tf.function(tensors, autograph=False).get_concrete_function(x),
        "log_prob": tf.function(log_prob, autograph=False).get_concrete_function(x, y),
    }


def _as_mixture(tensors: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """Return the tensors of a density with the axis of K, which a single normal has not."""
    if "logits" in tensors:
        return tensors
    parts = {name: tf.expand_dims(tensor, 1) for name, tensor in tensors.items()}
    return {"logits": tf.zeros_like(parts["loc"][..., 0]), **parts}


def _codes(model: MDN, x: tf.Tensor) -> tf.Tensor:
    """Return what the encoder takes of a matrix of raw numbers; `Columns` scales in float64."""
    if not isinstance(model.encoder, Columns):
        return x
    mean = np.array([column.mean for column in model.encoder.columns])
    scale = np.array([column.scale for column in model.encoder.columns])
    rounded = mean.astype(np.float32)
    # The mean in two parts, as one float32 would lose digits of it; and not in a form that an
    # optimiser of graphs would put together again.
    rest = ((mean - rounded) / scale).astype(np.float32)
    return (x - rounded) * (1.0 / scale).astype(np.float32) - rest


# ---------------------------------------------------------------------- log density


def mixture_log_prob(tensors: Mapping[str, tf.Tensor], y: tf.Tensor) -> tf.Tensor:
    """Return the log density of a mixture, [B] nats, by operations that every runtime has.

    Args:
        tensors: as `params` of `portable_functions` returns them.
        y: [B, D], nothing missing.
    """
    residual = tf.expand_dims(y, 1) - tensors["loc"]  # [B, K, D]
    if "precision_tril" in tensors:
        z, log_volume = _white_by_precision(residual, tensors["precision_tril"])
    elif "scale_tril" in tensors:
        z, log_volume = _white(residual, tensors["scale_tril"])
    else:
        z = residual / tensors["scale_diag"]
        log_volume = tf.reduce_sum(tf.math.log(tensors["scale_diag"]), axis=-1)
    if "factor" in tensors:
        white = tensors["factor"] / tf.expand_dims(tensors["scale_diag"], -1)  # [B, K, D, R]
        square, log_stretch = _outside(z, tf.unstack(white, axis=-1))
        log_volume += log_stretch
    else:
        square = tf.reduce_sum(tf.square(z), axis=-1)  # [B, K]
    joint = -0.5 * (square + residual.shape[-1] * LOG_2_PI) - log_volume
    return tf.reduce_logsumexp(joint + tf.nn.log_softmax(tensors["logits"]), axis=-1)


def _white(residual: tf.Tensor, factor: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Return L^-1 r, [B, K, D], and log det L, [B, K]: by columns, each of which is a step."""
    found, log_volume = [], tf.zeros_like(residual[..., 0])
    for i in range(residual.shape[-1]):
        column = factor[..., i:, i]  # [B, K, D - i]
        found.append(residual[..., 0] / column[..., 0])
        log_volume += tf.math.log(column[..., 0])
        residual = residual[..., 1:] - column[..., 1:] * tf.expand_dims(found[-1], -1)
    return tf.stack(found, axis=-1), log_volume


def _white_by_precision(residual: tf.Tensor, factor: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Return P^T r, [B, K, D], and -log det P, [B, K]."""
    z = tf.reduce_sum(factor * tf.expand_dims(residual, -1), axis=-2)
    diagonal = tf.stack([factor[..., i, i] for i in range(residual.shape[-1])], axis=-1)
    return z, -tf.reduce_sum(tf.math.log(diagonal), axis=-1)


def _outside(u: tf.Tensor, columns: list[tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
    """Return u^T (I + A A^T)^-1 u and log det(I + A A^T) / 2, [B, K] each.

    As `mdn.density.low_rank` does: by modified Gram-Schmidt of [A; I].

    Args:
        u: [B, K, D].
        columns: R tensors [B, K, D], the columns of A.
    """
    zero, log_volume = tf.zeros_like(u[..., :1]), tf.zeros_like(u[..., 0])
    rest = tf.concat([u, *[zero] * len(columns)], axis=-1)  # [u; 0]
    basis: list[tf.Tensor] = []
    for i, column in enumerate(columns):
        unit = [zero + float(i == j) for j in range(len(columns))]
        column = tf.concat([column, *unit], axis=-1)
        for direction in basis:
            column -= tf.reduce_sum(column * direction, axis=-1, keepdims=True) * direction
        length = tf.sqrt(tf.reduce_sum(tf.square(column), axis=-1, keepdims=True))
        basis.append(column / length)
        rest -= tf.reduce_sum(rest * basis[-1], axis=-1, keepdims=True) * basis[-1]
        log_volume += tf.math.log(length[..., 0])
    return tf.reduce_sum(tf.square(rest), axis=-1), log_volume


# ---------------------------------------------------------------------- graphs


def softplus(x: tf.Tensor) -> tf.Tensor:
    """Return log(1 + e^x) to the last digits: LiteRT overflows at 89, both round small values.

    With s = e / (2 + e), log(1 + e) is 2 artanh(s), and e = e^-|x| at most one.
    """
    e = tf.exp(-tf.abs(x))
    s = e / (2.0 + e)  # at most 1/3
    series = tf.zeros_like(s)
    for power in range(15, 0, -2):
        series = series * tf.square(s) + 1.0 / power
    return tf.maximum(x, 0.0) + 2.0 * s * series


def freeze(function: Any, substitutes: Mapping[str, Callable]) -> graph_pb2.GraphDef:
    """Return the graph of a concrete function with its variables as constants.

    Args:
        function: the concrete function.
        substitutes: operation of one input -> function of it that is traced in its place.
    """
    graph = graph_pb2.GraphDef()
    for node in convert_variables_to_constants_v2(function).graph.as_graph_def().node:
        if node.op in substitutes:
            graph.node.extend(_expand(node, substitutes[node.op]))
        else:
            graph.node.append(node)
    return graph


def _expand(node: Any, function: Callable) -> list[Any]:
    """Return the nodes that stand for one, the last of them under its name."""
    with tf.Graph().as_default() as graph:
        x = tf.compat.v1.placeholder(tf.as_dtype(node.attr["T"].type), name="x")
        tf.identity(function(x), name="result")
    nodes = [inner for inner in graph.as_graph_def().node if inner.name != "x"]
    for inner in nodes:
        inputs = [node.input[0] if i == "x" else f"{node.name}/{i}" for i in inner.input]
        inner.input[:] = inputs
        inner.name = node.name if inner.name == "result" else f"{node.name}/{inner.name}"
    return nodes


def output_names(function: Any) -> dict[str, str]:
    """Return the tensor of each output of a concrete function: name -> "node:0".

    Freezing keeps the order of the outputs, which is that of their names.
    """
    frozen = convert_variables_to_constants_v2(function)
    names = sorted(function.structured_outputs)
    return dict(zip(names, (tensor.name for tensor in frozen.outputs), strict=True))
