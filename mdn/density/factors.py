"""Cholesky factors of covariances of some targets, of others given those, and of linear maps.

Everything is computed from the factor itself. A covariance, whose condition number is the square
of its factor's, is never formed.

Shape letters: D event size, N rows.
"""

from __future__ import annotations

import tensorflow as tf


def lower_factor(rows: tf.Tensor) -> tf.Tensor:
    """Return the lower triangular L with L L^T = A^T A, by a QR decomposition of A.

    Args:
        rows: [.., N, D], A: of full rank, N >= D.

    Returns:
        [.., D, D], with a positive diagonal.
    """
    upper = tf.linalg.qr(rows).r  # [.., D, D]
    sign = tf.where(tf.linalg.diag_part(upper) < 0.0, -tf.ones_like(upper[..., 0]), 1.0)
    return tf.linalg.matrix_transpose(sign[..., tf.newaxis] * upper)


def pivot(scale_tril: tf.Tensor, dim: int) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Take one target out of a Cholesky factor: its scale, its part in the others, and the rest.

    With q the row of the target in units of its length, the others given it have the covariance
    L (I - q q^T) L^T, and I - q q^T has a Cholesky factor in closed form. Nothing is subtracted
    but what a rotation would, so that the smallest scale keeps its digits beside the largest.

    Args:
        scale_tril: [.., D, D], L: lower triangular with a positive diagonal.
        dim: of the target, 0 <= dim < D.

    Returns:
        Its standard deviation [..]; the covariances of the others with it over that, [.., D - 1];
        and the Cholesky factor of the others' covariance given it, [.., D - 1, D - 1].

    Source:
        Gill, Golub, Murray and Saunders (1974), Methods for modifying matrix factorizations,
        Mathematics of Computation 28.
    """
    others = tf.concat([scale_tril[..., :dim, :], scale_tril[..., dim + 1 :, :]], axis=-2)
    if dim == 0:
        return scale_tril[..., 0, 0], others[..., 0], others[..., 1:]
    row = scale_tril[..., dim, : dim + 1]
    largest = tf.reduce_max(tf.abs(row), axis=-1, keepdims=True)  # squares may overflow
    row /= largest
    length = tf.sqrt(tf.cumsum(tf.square(row), axis=-1, reverse=True))  # of row[i:]
    direction = row / length[..., :1]  # [.., dim + 1]
    remaining = length / length[..., :1]
    products = others[..., : dim + 1] * direction[..., tf.newaxis, :]  # [.., D - 1, dim + 1]
    below = tf.cumsum(products, axis=-1, exclusive=True, reverse=True)[..., :dim]
    following = remaining[..., 1:]
    kept = others[..., :dim] * (following / remaining[..., :-1])[..., tf.newaxis, :]
    taken = direction[..., :dim] / remaining[..., :-1]
    kept -= below / following[..., tf.newaxis, :] * taken[..., tf.newaxis, :]
    scale = largest[..., 0] * length[..., 0]
    rest = tf.concat([kept, others[..., dim + 1 :]], axis=-1)
    return scale, tf.reduce_sum(products, axis=-1), rest
