"""The mean of each member of an ensemble, as Keras metrics.

Shape letters: M ensemble members.
"""

from __future__ import annotations

import tensorflow as tf
import tf_keras


class MemberMeans(tf_keras.metrics.Metric):
    """The NLL of each member, a mean over the rows so far; as the metrics nll_0, nll_1, ..

    Args:
        members: M.
    """

    def __init__(self, members: int) -> None:
        super().__init__(name="members")
        self.names = [f"nll_{m}" for m in range(members)]
        self.total, self.count = (
            self.add_weight(name, [members], initializer="zeros") for name in ("total", "count")
        )

    def update_state(self, values: tf.Tensor, sample_weight: tf.Tensor) -> None:
        """Count the mean [M] of so many rows, [M]."""
        self.total.assign_add(tf.cast(values * sample_weight, self.total.dtype))
        self.count.assign_add(tf.cast(sample_weight, self.count.dtype))

    def reset_state(self) -> None:
        for variable in (self.total, self.count):
            variable.assign(tf.zeros_like(variable))

    def result(self) -> dict[str, tf.Tensor]:
        means = tf.unstack(tf.math.divide_no_nan(self.total, self.count))
        return dict(zip(self.names, means, strict=True))
