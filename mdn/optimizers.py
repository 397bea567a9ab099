"""Optimizers: Keras's, with what a density network asks of them besides."""

from __future__ import annotations

import re
from typing import Any

import tensorflow as tf
import tf_keras

from mdn.errors import ConfigError

register = tf_keras.saving.register_keras_serializable(package="mdn")

DECAYS = ("all", "kernels")


@register
class AdamW(tf_keras.optimizers.AdamW):
    """Keras's AdamW, which may leave biases and normalisations out of the decay.

    A large decay, such as 1, is a strong prior that a function is smooth. It must not pull the
    biases of a head to zero, where the density begins, or the scales of a normalisation.

    Args:
        learning_rate: as in Keras.
        weight_decay: decoupled, times the learning rate.
        decay: what decays: "all" weights, or "kernels", those that multiply features.
        global_clipnorm: as in Keras; of an ensemble, the norm of each member.
        **kwargs: as in Keras.

    Raises:
        ConfigError: `decay` is none of these.

    Source:
        Loshchilov and Hutter (2019), Decoupled weight decay regularization, ICLR.
    """

    def __init__(
        self,
        learning_rate: Any = 0.001,
        weight_decay: float = 0.004,
        decay: str = "all",
        global_clipnorm: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate, weight_decay, global_clipnorm=global_clipnorm, **kwargs)
        if decay not in DECAYS:
            raise ConfigError(f"optimizer.decay={decay}: must be one of {', '.join(DECAYS)}")
        self.decay = decay

    def _use_weight_decay(self, variable: tf.Variable) -> bool:
        kernel = re.search(r"kernel(:\d+)?$", variable.name) is not None
        return super()._use_weight_decay(variable) and (kernel or self.decay == "all")

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "decay": self.decay}
