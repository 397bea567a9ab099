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

    def on_test_begin(self, logs: Any = None) -> None:
        if not self._swapped:
            self._swap()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self._swapped:
            self._swap()

    def _swap(self) -> None:
        averages = self.model.optimizer._model_variables_moving_average
        for weight, average in zip(self.model.trainable_variables, averages, strict=True):
            now = tf.identity(weight)
            weight.assign(average)
            average.assign(now)
        self._swapped = not self._swapped
