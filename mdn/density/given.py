"""Gaussian mixtures given some of their targets, where each row of a batch has others.

`mdn.density.algebra.condition` takes the targets that are given as an argument, and returns a
density of the rest. Here NaN in y says which are asked for, row by row, and all D targets stay.

Shape letters: B batch, D event size, K components.
"""

from __future__ import annotations

import tensorflow as tf

from mdn.density.parameters import MixtureParameters, broadcast

# Standard deviations beyond which the square is no float32.
_FARTHEST = 1e17


def condition_on_observed(parameters: MixtureParameters, y: tf.Tensor) -> MixtureParameters:
    """Return the mixture given the entries of y that are there.

    Args:
        parameters: batch [..], D targets.
        y: [.., D] of the same batch; NaN marks a target that is not given.

    Returns:
        Batch [..], D targets, K components whose weights are those given y. A target that is given
        has its value as the loc of every component, and a row and a column of zeros in
        scale_tril: the others are distributed as without it.
    """
    logits, loc, scale_tril = broadcast(parameters)
    logits = tf.nn.log_softmax(logits)
    y = y[..., tf.newaxis, :]  # [.., 1, D]
    given = ~tf.math.is_nan(y)
    event_size = loc.shape[-1]

    def step(
        dim: tf.Tensor, logits: tf.Tensor, loc: tf.Tensor, scale_tril: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        known = given[..., dim]  # [.., 1]
        value = tf.where(known, y[..., dim], loc[..., dim])  # [.., K]
        scale, column, rest = _take_out(scale_tril, dim)
        z = (value - loc[..., dim]) / scale
        near = tf.clip_by_value(z, -_FARTHEST, _FARTHEST)
        log_prob = -0.5 * tf.square(near) - tf.math.log(scale)
        moved = loc + column * z[..., tf.newaxis]
        moved = tf.where(tf.range(event_size) == dim, value[..., tf.newaxis], moved)
        return (
            dim + 1,
            tf.where(known, logits + log_prob, logits),
            tf.where(known[..., tf.newaxis], moved, loc),
            tf.where(known[..., tf.newaxis, tf.newaxis], rest, scale_tril),
        )

    # A loop of TensorFlow's, as D may be in the hundreds. The number of the target is a tensor in
    # it, and the shapes stay what they are.
    _, logits, loc, scale_tril = tf.while_loop(
        lambda dim, *_: dim < event_size,
        step,
        (tf.constant(0), logits, loc, scale_tril),
        shape_invariants=(tf.TensorShape([]), logits.shape, loc.shape, scale_tril.shape),
        maximum_iterations=event_size,
    )
    return MixtureParameters(tf.nn.log_softmax(logits), loc, scale_tril)


def _take_out(scale_tril: tf.Tensor, dim: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Return what `mdn.density.factors.pivot` does, without a change of shape.

    Args:
        scale_tril: [.., D, D], lower triangular. The targets taken out before have rows and
            columns of zeros; the others have a positive diagonal.
        dim: scalar, one of the others.

    Returns:
        The standard deviation of the target [..]; the covariances of all with it over that,
        [.., D]; and the factor [.., D, D] of the others given it, zero in its row and column.
    """
    size = scale_tril.shape[-1]
    row = scale_tril[..., dim, :]  # [.., D], zero beyond dim
    before = tf.range(size) < dim
    largest = tf.reduce_max(tf.abs(row), axis=-1, keepdims=True)  # squares may overflow
    row /= largest
    length = tf.sqrt(tf.cumsum(tf.square(row), axis=-1, reverse=True))  # of row[i:]
    direction = row / length[..., :1]
    remaining = length / length[..., :1]  # 1, .., and zero beyond dim
    following = tf.concat([remaining[..., 1:], tf.zeros_like(remaining[..., :1])], axis=-1)
    # Beyond dim nothing changes: ones keep what is computed there, and is not used, finite.
    remaining = tf.where(before, remaining, tf.ones_like(remaining))
    following = tf.where(before, following, tf.ones_like(following))
    products = scale_tril * direction[..., tf.newaxis, :]  # [.., D, D]
    below = tf.cumsum(products, axis=-1, exclusive=True, reverse=True)
    kept = scale_tril * (following / remaining)[..., tf.newaxis, :]
    kept -= below / following[..., tf.newaxis, :] * (direction / remaining)[..., tf.newaxis, :]
    rest = tf.where(before, kept, scale_tril)
    index = tf.range(size)
    gone = (index == dim)[:, tf.newaxis] | (index == dim)
    scale = largest[..., 0] * length[..., 0]
    rest = tf.where(gone, tf.zeros_like(rest), rest)
    return scale, tf.reduce_sum(products, axis=-1), rest
