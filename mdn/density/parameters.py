"""The form that all densities can be seen in.

Shape letters: D event size, K components.
"""

from __future__ import annotations

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


def broadcast(parameters: MixtureParameters, scale_rank: int = 3) -> MixtureParameters:
    """Return the parameters with one batch shape, that of all three together.

    Args:
        parameters: of batch shapes that broadcast.
        scale_rank: of a scale without its batch: 3, or 2 where they are diagonals [.., K, D].
    """
    logits, loc, scale_tril = parameters
    static = [logits.shape[:-1], loc.shape[:-2], scale_tril.shape[:-scale_rank]]
    if static[0].is_fully_defined() and static[0] == static[1] == static[2]:
        return parameters
    shape = tf.broadcast_static_shape(tf.broadcast_static_shape(static[0], static[1]), static[2])
    batch = tf.broadcast_dynamic_shape(
        tf.broadcast_dynamic_shape(tf.shape(logits)[:-1], tf.shape(loc)[:-2]),
        tf.shape(scale_tril)[:-scale_rank],
    )
    parts = []
    for tensor, rank in ((logits, 1), (loc, 2), (scale_tril, scale_rank)):
        event = tensor.shape[-rank:]
        part = tf.broadcast_to(tensor, tf.concat([batch, tf.shape(tensor)[-rank:]], axis=0))
        parts.append(tf.ensure_shape(part, shape.concatenate(event)))
    return MixtureParameters(*parts)
