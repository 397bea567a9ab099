"""Averages of the weights over the last steps, where the weights are judged."""

from __future__ import annotations

from typing import Any

import tensorflow as tf
import tf_keras


class AveragedWeights(tf_keras.callbacks.Callback):
    """Validates the average of the weights that an optimizer with `use_ema` keeps.

    From the start of a validation to the end of its epoch the model has the averaged weights, and
    the optimizer those that training goes on from. So what early stopping keeps is an average.
    Must stand behind all callbacks that read the weights at the end of an epoch, and before the
    checkpoint. Once training ends, Keras leaves the average in the model.
    """

    def __init__(self) -> None:
        super().__init__()
        self._swapped = False
        self._exchange: Any = None

    def on_train_begin(self, logs: Any = None) -> None:
        weights = self.model.trainable_variables
        averages = self.model.optimizer._model_variables_moving_average

        @tf.function(autograph=False)  # one call of TensorFlow, not three of each weight
        def exchange() -> None:
            for weight, average in zip(weights, averages, strict=True):
                now = tf.identity(weight)
                weight.assign(average)
                average.assign(now)

        self._exchange = exchange

    def on_test_begin(self, logs: Any = None) -> None:
        if not self._swapped:
            self._swap()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self._swapped:
            self._swap()

    def _swap(self) -> None:
        self._exchange()
        self._swapped = not self._swapped
