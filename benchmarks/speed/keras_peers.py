"""Keras with TensorFlow Probability's own layers: as documented, and tuned.

Shape letters: B batch, D event size, K components, P parameters.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_probability as tfp
import tf_keras

from benchmarks.speed.workloads import EPSILON, LEARNING_RATE, MIN_SCALE, Problem, Workload

tfb, tfd = tfp.bijectors, tfp.distributions


def density(params: tf.Tensor, components: int, targets: int) -> Any:
    """Return the mixture of params [B, P]."""
    k, d = components, targets
    logits, loc, triangle = tf.split(params, [k, k * d, k * d * (d + 1) // 2], axis=-1)
    fill = tfb.FillScaleTriL(diag_bijector=tfb.Softplus(), diag_shift=MIN_SCALE)
    return tfd.MixtureSameFamily(
        tfd.Categorical(logits=logits),
        tfd.MultivariateNormalTriL(
            loc=tf.reshape(loc, [-1, k, d]),
            scale_tril=fill(tf.reshape(triangle, [-1, k, d * (d + 1) // 2])),  # [B, K, D, D]
        ),
    )


def nll(y: tf.Tensor, distribution: Any) -> tf.Tensor:
    return -distribution.log_prob(y)


def network(workload: Workload) -> tf_keras.Model:
    layers: list[Any] = [
        tf_keras.layers.Dense(width, activation="tanh") for width in workload.widths
    ]
    layers.append(tf_keras.layers.Dense(workload.outputs))
    layers.append(
        tfp.layers.DistributionLambda(
            lambda params: density(params, workload.components, workload.targets),
            convert_to_tensor_fn=tfd.Distribution.mean,
        )
    )
    return tf_keras.Sequential(layers)


class Documented:
    """Dense layers, a DistributionLambda, and `fit` on arrays."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.model = network(problem.workload)
        self.model(problem.x[:1])
        self.model.set_weights(problem.start())
        self.compile()

    def compile(self) -> None:
        self.model.compile(tf_keras.optimizers.Adam(LEARNING_RATE, epsilon=EPSILON), loss=nll)

    def train(self, epochs: int, shuffle: bool = True) -> None:
        p, batch = self.problem, self.problem.workload.batch
        self.model.fit(p.x, p.y, batch, epochs, verbose=0, shuffle=shuffle)

    def loss(self, rows: int) -> float:
        return self.problem.mean(lambda x, y: np.mean(nll(y, self.model(x))), rows)


class Tuned(Documented):
    """The same fed by tf.data, a whole epoch in each call, each step compiled by XLA."""

    def compile(self) -> None:
        w = self.problem.workload
        self.model.compile(
            tf_keras.optimizers.Adam(LEARNING_RATE, epsilon=EPSILON),
            loss=nll,
            jit_compile=True,
            steps_per_execution=w.steps,
        )
        self.batches = {shuffle: self.dataset(shuffle) for shuffle in (True, False)}

    def dataset(self, shuffle: bool) -> tf.data.Dataset:
        w = self.problem.workload
        rows = tf.data.Dataset.from_tensor_slices((self.problem.x, self.problem.y)).cache()
        if shuffle:
            rows = rows.shuffle(w.rows)
        return rows.batch(w.batch, drop_remainder=True).prefetch(tf.data.AUTOTUNE)

    def train(self, epochs: int, shuffle: bool = True) -> None:
        self.model.fit(self.batches[shuffle], epochs=epochs, verbose=0)
