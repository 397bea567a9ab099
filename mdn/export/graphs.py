"""The parameters and the log density of a model as graphs of plain operations.

Converters know no matrix decompositions, triangular solves or hash tables. Here the forward
substitution is unrolled, an ensemble is its members side by side, and what a runtime computes
worse than TensorFlow does is spelled out.

Shape letters: B batch, F features, D event size, K components, R rank, M ensemble members.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import graph_pb2
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

from mdn.density.agreement import in_blocks, reweigh
from mdn.density.gaussian import LOG_2_PI
from mdn.density.transformed import to_base
from mdn.ensembles import Ensemble
from mdn.export.saved_model import feature_specs
from mdn.export.signatures import where_rows
from mdn.features import Columns
from mdn.model import MDN
from mdn.stacking import Stack


class Group(NamedTuple):
    """Networks of one shape, which take the same features.

    Attributes:
        model: what makes the features.
        members: of an ensemble, as models of their own; else the model alone.
        share: of all of them together in the density.
    """

    model: MDN
    members: list[MDN]
    share: float


def groups_of(model: MDN) -> list[Group]:
    """Return the networks whose mixture is the density of a model."""
    if not isinstance(model, Ensemble):
        return [Group(model, [model], 1.0)]
    ensembles, shares = [model], [1.0]
    if isinstance(model, Stack):
        ensembles, shares = model.models, model.shares
    members = [[one.member(m) for m in range(one.members)] for one in ensembles]
    return [Group(*group) for group in zip(ensembles, members, shares, strict=True)]


def portable_functions(model: MDN, groups: Sequence[Group]) -> dict[str, Any]:
    """Return the graphs of a model that `check_portable` passes: name -> concrete function.

    - `params`: the features, raw, to `logits` [B, K], `loc` [B, K, D] and `scale_tril`
      [B, K, D, D]. In place of the last, where only a matrix decomposition would give it, stands
      what the head states: `scale_diag` [B, K, D] and `factor` [B, K, D, R], or `precision_tril`
      [B, K, D, D]. K = 1 of a single normal.
    - `log_prob`: the features and `y` [B, D], nothing missing, to `log_prob` [B], nats.

    The features are `x` [B, F], or one [B] for each raw column. Where targets are transformed, the
    parameters are in units of the transformed ones. A row that lacks a number which no train row
    lacked has NaN for answers.

    Args:
        model: what is asked.
        groups: of `groups_of`; as long as the functions live, as they hold no variables.
    """

    members = len(groups[0].members)
    # Of the head's own its densities know already.
    recalibration = model.recalibration if isinstance(model, Stack) else None
    agreement = model.agreement if isinstance(model, Stack) else 0.0

    def tensors(x: Any) -> dict[str, tf.Tensor]:
        codes = _codes(model, x)
        features = [group.model.features(codes) for group in groups]
        mixture = _beside([member(m, features) for m in range(members)])
        if agreement:
            mixture["logits"] = reweigh(
                mixture["logits"], _support(mixture), agreement, model.kept_components
            )
            if recalibration is not None:
                mixture = recalibration.apply_to(mixture, mixture["loc"].dtype)
        return mixture

    def member(m: int, features: list[tf.Tensor]) -> dict[str, tf.Tensor]:
        parts = []
        for group, own in zip(groups, features, strict=True):
            part = _stated(group.members[m], own)
            if isinstance(model, Ensemble):
                share = math.log(group.share / members)
                part["logits"] = tf.nn.log_softmax(part["logits"]) + share
            parts.append(part)
        mixture = _beside(parts)
        if recalibration is not None and not agreement:
            mixture = recalibration.apply_to(mixture, mixture["loc"].dtype)
            mixture["logits"] = tf.nn.log_softmax(mixture["logits"]) - math.log(members)
        return mixture

    def params(x: Any) -> dict[str, tf.Tensor]:
        found = _with_triangle(tensors(x))
        lacking = model.lacking(x)
        if lacking is None:
            return found
        return {name: where_rows(lacking, np.nan, value) for name, value in found.items()}

    def log_prob(x: Any, y: tf.Tensor) -> dict[str, tf.Tensor]:
        if (bijector := model.head.bijector) is None:
            value = mixture_log_prob(tensors(x), y)
        else:
            u, log_slope, inside = to_base(bijector, y)
            value = mixture_log_prob(tensors(x), u) + log_slope
            value = tf.where(inside, value, -np.inf)
        # Runtimes differ in what the maximum of NaN is.
        missing = tf.reduce_any(tf.math.is_nan(y), axis=-1)
        if (lacking := model.lacking(x)) is not None:
            missing |= lacking
        return {"log_prob": tf.where(missing, np.nan, value)}

    x = feature_specs(model)
    y = tf.TensorSpec([None, model.head.event_size], tf.float32, "y")
    return {
        "params": tf.function(params, autograph=False).get_concrete_function(x),
        "log_prob": tf.function(log_prob, autograph=False).get_concrete_function(x, y),
    }


def _codes(model: MDN, x: Any) -> tf.Tensor:
    """Return what the encoder takes of raw numbers: `Columns` scales them in float64."""
    if not isinstance(model.encoder, Columns):
        return x
    mean = np.array([column.mean for column in model.encoder.columns])
    scale = np.array([column.scale for column in model.encoder.columns])
    rounded = mean.astype(np.float32)
    # The mean in two parts, as one float32 would lose digits of it; and not in a form that an
    # optimiser of graphs would put together again.
    rest = ((mean - rounded) / scale).astype(np.float32)
    matrix = tf.stack([x[name] for name in model.encoder.names], axis=-1)  # [B, F]
    return (matrix - rounded) * (1.0 / scale).astype(np.float32) - rest


def _stated(model: MDN, features: tf.Tensor) -> dict[str, tf.Tensor]:
    """Return the tensors of a density, with the axis of K that a single normal has not."""
    tensors = model.head(model.backbone(features, training=False)).tensors()  # before transforms
    if "logits" in tensors:
        return tensors
    parts = {name: tf.expand_dims(tensor, 1) for name, tensor in tensors.items()}
    return {"logits": tf.zeros_like(parts["loc"][..., 0]), **parts}


def _beside(parts: list[dict[str, tf.Tensor]]) -> dict[str, tf.Tensor]:
    """Return the tensors of mixtures with the components of all, in their order."""
    if len(parts) == 1:
        return parts[0]
    return {name: tf.concat([part[name] for part in parts], axis=1) for name in parts[0]}


def _support(tensors: dict[str, tf.Tensor]) -> tf.Tensor:
    """Return the log density of a mixture at the means of its components, [B, K]."""
    one = {name: tf.expand_dims(tensor, 1) for name, tensor in tensors.items()}
    return in_blocks(lambda points: mixture_log_prob(one, points), tensors["loc"])


def _with_triangle(tensors: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """Return the tensors with `scale_tril` in place of a diagonal that stands alone."""
    if "scale_diag" not in tensors or "factor" in tensors:
        return tensors
    scale = tensors.pop("scale_diag")
    eye = np.eye(scale.shape[-1], dtype=np.float32)
    return {**tensors, "scale_tril": tf.expand_dims(scale, -1) * eye}


# ---------------------------------------------------------------------- log density


def mixture_log_prob(tensors: Mapping[str, tf.Tensor], y: tf.Tensor) -> tf.Tensor:
    """Return the log density of a mixture, [B] nats, by operations that every runtime has.

    Args:
        tensors: `logits` [B, K], `loc` [B, K, D] and a scale: `scale_tril` [B, K, D, D],
            `scale_diag` [B, K, D], with `factor` [B, K, D, R] or without, or `precision_tril`
            [B, K, D, D].
        y: [B, D], nothing missing.
    """
    residual = tf.expand_dims(y, -2) - tensors["loc"]  # [B, K, D]
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
        column = tf.concat([column + tf.zeros_like(u), *unit], axis=-1)  # of one shape
        for direction in basis:
            column -= tf.reduce_sum(column * direction, axis=-1, keepdims=True) * direction
        length = tf.sqrt(tf.reduce_sum(tf.square(column), axis=-1, keepdims=True))
        basis.append(column / length)
        rest -= tf.reduce_sum(rest * basis[-1], axis=-1, keepdims=True) * basis[-1]
        log_volume += tf.math.log(length[..., 0])
    return tf.reduce_sum(tf.square(rest), axis=-1), log_volume


# ---------------------------------------------------------------------- graphs


class Frozen(NamedTuple):
    """A graph whose variables are constants.

    Attributes:
        graph: its nodes.
        inputs: the tensor of each input: name -> "node:0".
        outputs: likewise.
    """

    graph: graph_pb2.GraphDef
    inputs: dict[str, str]
    outputs: dict[str, str]


def freeze(function: Any, substitutes: Mapping[str, Callable]) -> Frozen:
    """Return the graph of a concrete function.

    Args:
        function: of tensors to a mapping of tensors.
        substitutes: operation of one input -> function of it that is traced in its place.
    """
    frozen = convert_variables_to_constants_v2(function)
    whole = frozen.graph.as_graph_def()
    graph = graph_pb2.GraphDef(versions=whole.versions, library=whole.library)
    for node in whole.node:
        node.attr.pop("_gradient_op_type", None)  # of a function that is in this process alone
        if node.op in substitutes:
            graph.node.extend(_expand(node, substitutes[node.op]))
        else:
            graph.node.append(node)
    given = tf.nest.flatten(function.structured_input_signature)
    return Frozen(
        graph,
        {spec.name: tensor.name for spec, tensor in zip(given, frozen.inputs, strict=True)},
        # Which are in the order of their names.
        {
            name: tensor.name
            for name, tensor in zip(
                sorted(function.structured_outputs), frozen.outputs, strict=True
            )
        },
    )


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


def softplus(x: tf.Tensor) -> tf.Tensor:
    """Return log(1 + e^x) to the last digits: LiteRT overflows at 89, and small values round.

    With s = e / (2 + e), log(1 + e) is 2 artanh(s), and e = e^-|x| at most one.
    """
    e = tf.exp(-tf.abs(x))
    s = e / (2.0 + e)  # at most 1/3
    series = tf.zeros_like(s)
    for power in range(15, 0, -2):
        series = series * tf.square(s) + 1.0 / power
    return tf.maximum(x, 0.0) + 2.0 * s * series
