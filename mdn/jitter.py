"""Noise that fills the gaps between targets that stand on a grid.

Shape letters: B batch, D event size, M ensemble members.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

from mdn.errors import ConfigError


@tf_keras.saving.register_keras_serializable(package="mdn")
class Jitter:
    """Adds U(-step / 2, step / 2) to targets, anew in each train step.

    A recorded value stands for all that round to it. A density that learns from the values alone
    finds no limit in how sharply it can rise at each of them; one that learns from draws of what
    rounds to them has its least loss at the density of the quantity before it was rounded. The
    noise is a function of the seed and the step, so that a resumed run draws it again.

    Args:
        step: of the grid, in the units of y: [D], zero where a target is on none; or what
            broadcasts to [M, B, D].
        seed: of the noise.

    Raises:
        ConfigError: a step is negative or not finite.

    Source:
        Theis et al. (2016), A note on the evaluation of generative models, ICLR.
    """

    def __init__(self, step: Any, seed: int = 0) -> None:
        self.step, self.seed = np.asarray(step, np.float64).tolist(), int(seed)
        if not (np.isfinite(step).all() and np.min(step) >= 0.0):
            raise ConfigError(f"jitter={self.step}: steps are at least 0, and finite")

    def __call__(self, y: tf.Tensor, iteration: tf.Tensor) -> tf.Tensor:
        """Return y [.., D] with the noise of this train step; what is missing stays so."""
        seed = tf.stack([tf.constant(self.seed, tf.int64), tf.cast(iteration, tf.int64)])
        noise = tf.random.stateless_uniform(tf.shape(y), seed, -0.5, 0.5, y.dtype, "philox")
        return y + tf.constant(self.step, y.dtype) * noise

    def get_config(self) -> dict[str, Any]:
        return {"step": self.step, "seed": self.seed}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Jitter:
        return cls(**config)


def get(jitter: Any, grid: Sequence[float] | None) -> Jitter | None:
    """Return the jitter of a specification, or None where there is nothing to fill.

    Args:
        jitter: True, for the steps of `grid`; False or None; steps; or a `Jitter`.
        grid: [D], as `Head.adapt` finds it.

    Raises:
        ConfigError: `grid` is not known, or a step is negative.
    """
    if jitter is None or jitter is False:
        return None
    if jitter is True:
        if grid is None:
            raise ConfigError("jitter=True: adapt the model first, or give the steps of the grid")
        jitter = grid
    if not isinstance(jitter, Jitter):
        # Drawn from NumPy's global stream, which tf_keras.utils.set_random_seed seeds.
        jitter = Jitter(jitter, int(np.random.randint(2**31 - 1)))
    return jitter if np.any(np.asarray(jitter.step) > 0.0) else None
