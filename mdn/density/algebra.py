"""What of a Gaussian mixture is a Gaussian mixture again: margins, conditionals, linear maps.

Shape letters: D event size, K components, M targets that are kept.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from mdn.density.factors import lower_factor, pivot
from mdn.density.parameters import MixtureParameters, broadcast
from mdn.errors import DataError

# Standard deviations beyond which the square is no float32.
_FARTHEST = 1e17


def check_dims(dims: Sequence[int], event_size: int) -> list[int]:
    """Return the dims as numbers from 0 to D - 1.

    Raises:
        DataError: a dim is not a whole number from -D to D - 1, or is named twice.
    """
    found = []
    for dim in dims:
        try:
            index = operator.index(dim)
        except TypeError:
            raise DataError(f"dim {dim!r} is no whole number: name targets by number") from None
        if not -event_size <= index < event_size:
            raise DataError(
                f"dim {index} of a density with {event_size} targets: "
                f"give {-event_size} to {event_size - 1}"
            )
        found.append(index % event_size)
    if len(set(found)) < len(found):
        raise DataError(f"dims {list(dims)} name a target twice: name each once")
    return found


def marginal(parameters: MixtureParameters, dims: Sequence[int]) -> MixtureParameters:
    """Return the mixture of some targets, [.., K, M], in the order of `dims`.

    Raises:
        DataError: `dims` is empty, or not as `check_dims` has it.
    """
    logits, loc, scale_tril = parameters
    chosen = check_dims(dims, loc.shape[-1])
    if not chosen:
        raise DataError("the margin of no target: give one dim at least")
    loc = tf.gather(loc, chosen, axis=-1)
    m = len(chosen)
    if chosen == list(range(m)):
        return MixtureParameters(logits, loc, scale_tril[..., :m, :m])
    remaining = list(range(scale_tril.shape[-1]))
    columns = []
    for i, dim in enumerate(chosen):
        at = remaining.index(dim)
        scale, column, scale_tril = pivot(scale_tril, at)
        remaining.pop(at)
        zeros = [tf.zeros_like(scale)] * i
        later = [column[..., remaining.index(other)] for other in chosen[i + 1 :]]
        columns.append(tf.stack([*zeros, scale, *later], axis=-1))
    return MixtureParameters(logits, loc, tf.stack(columns, axis=-1))


def condition(parameters: MixtureParameters, given: Mapping[int, Any]) -> MixtureParameters:
    """Return the mixture of the targets that are not given, in their order.

    Args:
        parameters: batch [..].
        given: values of targets, each of a shape that broadcasts with the batch.

    Returns:
        The batch broadcast with the values, D - len(given) targets. The weights are those of the
        components given the values.

    Raises:
        DataError: all targets are given, or the dims are not as `check_dims` has them.
    """
    logits, loc, scale_tril = parameters
    chosen = check_dims(list(given), loc.shape[-1])
    if len(chosen) == loc.shape[-1]:
        raise DataError(f"all {len(chosen)} targets are given: leave one to ask for")
    values = dict(zip(chosen, given.values(), strict=True))
    remaining = list(range(loc.shape[-1]))
    logits = tf.nn.log_softmax(logits)
    for dim in sorted(values):
        value = tf.convert_to_tensor(values[dim], loc.dtype)[..., tf.newaxis]  # [.., 1]
        at = remaining.index(dim)
        remaining.pop(at)
        scale, column, scale_tril = pivot(scale_tril, at)
        z = (value - loc[..., at]) / scale  # [.., K]
        loc = tf.concat([loc[..., :at], loc[..., at + 1 :]], axis=-1)
        loc += column * z[..., tf.newaxis]
        near = tf.clip_by_value(z, -_FARTHEST, _FARTHEST)
        logits += -0.5 * tf.square(near) - tf.math.log(scale)
    return broadcast(MixtureParameters(tf.nn.log_softmax(logits), loc, scale_tril))


def affine(parameters: MixtureParameters, shift: Any, scale: Any) -> MixtureParameters:
    """Return the mixture of scale * y + shift, each [.., D] or a number; no scale is zero."""
    logits, loc, scale_tril = parameters
    # Beside D: of the components, which the batch of shift and scale does not have.
    shift = _event(shift, loc)[..., tf.newaxis, :]
    scale = _event(scale, loc)[..., tf.newaxis, :]
    # Signs on both sides keep the diagonal positive.
    scale_tril = scale[..., tf.newaxis] * scale_tril * tf.sign(scale)[..., tf.newaxis, :]
    return broadcast(MixtureParameters(logits, loc * scale + shift, scale_tril))


def _event(value: Any, loc: tf.Tensor) -> tf.Tensor:
    value = tf.convert_to_tensor(value, loc.dtype)
    d = loc.shape[-1]
    if value.shape.rank == 0:
        value = tf.fill([d], value)
    if value.shape[-1] not in (1, d):
        raise DataError(f"shape {value.shape} for {d} targets: give [.., {d}] or a number")
    return value


def linear(parameters: MixtureParameters, matrix: Any, shift: Any = None) -> MixtureParameters:
    """Return the mixture of matrix y + shift: [.., M, D] of rank M, and [.., M] or nothing.

    Raises:
        DataError: the matrix has not D columns, or more rows.
    """
    logits, loc, scale_tril = parameters
    matrix = tf.convert_to_tensor(matrix, loc.dtype)
    d = loc.shape[-1]
    if matrix.shape.rank is not None and (
        matrix.shape.rank < 2 or matrix.shape[-1] != d or matrix.shape[-2] > d
    ):
        raise DataError(
            f"a matrix {matrix.shape} for {d} targets: give [.., M, {d}] with M <= {d} rows, as "
            "more have no density"
        )
    matrix = matrix[..., tf.newaxis, :, :]  # [.., 1, M, D]
    loc = tf.linalg.matvec(matrix, loc)  # [.., K, M]
    if shift is not None:
        loc += _event(shift, loc)[..., tf.newaxis, :]
    factor = lower_factor(tf.linalg.matrix_transpose(matrix @ scale_tril))
    return broadcast(MixtureParameters(logits, loc, factor))
