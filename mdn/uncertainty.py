"""What an ensemble does not know, in two parts: the noise in y, and where its members differ.

Shape letters: T time, D event size, M ensemble members, N rows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from mdn.density.queries import Queries


class Uncertainty(NamedTuple):
    """The covariance of an ensemble's predictive density in two parts, which sum to it.

    Attributes:
        aleatoric: [N, D, D] or [N, T, D, D], the mean of the members' covariances in their
            shares: the noise in y that they agree on.
        epistemic: of the same shape, the covariance of the members' means: where they differ.
    """

    aleatoric: np.ndarray
    epistemic: np.ndarray


def split_covariance(
    members: Queries, weight: tf.Tensor | None = None
) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the mean of the covariances and the covariance of the means, over members.

    Args:
        members: batch [M, ..], event [D].
        weight: [M, ..], sums to one over the members; None: all have the same.

    Returns:
        [.., D, D] each; their sum is the covariance of the members' mixture.
    """
    mean = members.mean()  # [M, .., D]
    if weight is None:
        weight = tf.ones_like(mean[..., 0]) / tf.cast(tf.shape(mean)[0], mean.dtype)
    weight = weight[..., tf.newaxis, tf.newaxis]
    deviation = mean - tf.reduce_sum(weight[..., 0] * mean, axis=0)
    products = deviation[..., tf.newaxis] * deviation[..., tf.newaxis, :]
    covariance = members.covariance()
    return tf.reduce_sum(weight * covariance, axis=0), tf.reduce_sum(weight * products, axis=0)
