"""Scores to minimise: [.., D] targets and a density to one number per example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf
import tf_keras

from mdn.errors import ConfigError, DataError

Loss = Callable[[tf.Tensor, Any], tf.Tensor]


@tf_keras.saving.register_keras_serializable(package="mdn")
def nll(y: tf.Tensor, density: Any) -> tf.Tensor:
    """Return each example's negative log likelihood, -log p(y | x).

    Args:
        y: [.., D], targets in their original units; NaN marks a missing entry.
        density: batch [..], event [D].

    Returns:
        [..], nats per example (not per dimension).

    Raises:
        DataError: y does not have the shape of the density's event; a stray [B] would broadcast
            and train wrongly.

    Source:
        Bishop (1994), Mixture Density Networks, NCRG/94/004.
    """
    batch = density.batch_shape.rank
    if None not in (batch, y.shape.rank) and y.shape.rank != batch + 1:
        raise DataError(
            f"y has shape {y.shape} for densities of batch {density.batch_shape}: "
            "reshape a single target to [N, 1]"
        )
    return -density.log_prob(tf.cast(y, density.dtype))


LOSSES: dict[str, Loss] = {"nll": nll}


def get(loss: str | Loss) -> Loss:
    """Return the loss of a name, or a callable as it is.

    Raises:
        ConfigError: the name is unknown.
    """
    if callable(loss):
        return loss
    if loss not in LOSSES:
        raise ConfigError(f"loss={loss!r} is unknown: choose one of {', '.join(LOSSES)}")
    return LOSSES[loss]
