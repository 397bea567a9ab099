"""The form that all densities can be seen in.

Shape letters: D event size, K components.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import tensorflow as tf


class MixtureParameters(NamedTuple):
    """A density seen as a Gaussian mixture; a normal is a mixture with K = 1.

    Attributes:
        logits: [.., K], unnormalised log weights.
        loc: [.., K, D], component means.
        scale_tril: [.., K, D, D], Cholesky factors of the component covariances.
    """

    logits: tf.Tensor
    loc: tf.Tensor
    scale_tril: tf.Tensor


def broadcast(parameters: MixtureParameters) -> MixtureParameters:
    """Return the parameters with one batch shape, that of all three together."""
    return MixtureParameters(*broadcast_batch(parameters, (1, 2, 3)))


def broadcast_batch(tensors: Sequence[tf.Tensor], event_ranks: Sequence[int]) -> list[tf.Tensor]:
    """Return tensors [.., *event] with one batch shape, that of all together.

    Args:
        tensors: of batch shapes that broadcast.
        event_ranks: the rank of each without its batch.
    """
    pairs = list(zip(tensors, event_ranks, strict=True))
    static = [tensor.shape[:-rank] for tensor, rank in pairs]
    if all(shape.is_fully_defined() and shape == static[0] for shape in static):
        return list(tensors)
    shape = functools.reduce(tf.broadcast_static_shape, static)
    batch = functools.reduce(
        tf.broadcast_dynamic_shape, [tf.shape(tensor)[:-rank] for tensor, rank in pairs]
    )
    parts = []
    for tensor, rank in pairs:
        part = tf.broadcast_to(tensor, tf.concat([batch, tf.shape(tensor)[-rank:]], axis=0))
        parts.append(tf.ensure_shape(part, shape.concatenate(tensor.shape[-rank:])))
    return parts
