"""How a train step changes the variables: any Keras optimizer, or Adam as one fused update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import tensorflow as tf
import tf_keras

Pairs = Sequence[tuple[tf.Tensor, tf.Variable]]
State = list[tf.Tensor]


class Update(Protocol):
    """How a train step changes the variables; the state is what it keeps outside of them."""

    def start(self) -> State:
        """Return the state at the start of a chunk."""

    def apply(self, pairs: Pairs, state: State) -> tuple[tf.Tensor, State]:
        """Take a step; return the global norm of the gradients as they came, and the state.

        Args:
            pairs: (gradient, variable), summed over the replicas.
            state: as `start` or the last step returned it.
        """

    def finish(self, state: State) -> None:
        """Write the state back at the end of a chunk."""


class KerasUpdate:
    """The update of any Keras optimizer.

    Args:
        optimizer: as compiled.
    """

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def start(self) -> State:
        return []

    def apply(self, pairs: Pairs, state: State) -> tuple[tf.Tensor, State]:
        norm = tf.linalg.global_norm([gradient for gradient, _ in pairs])
        self.optimizer.apply_gradients(pairs, skip_gradients_aggregation=True)
        return norm, state

    def finish(self, state: State) -> None:
        pass


class FusedAdam:
    """The update of Keras's Adam or AdamW, with the moments of all variables in two vectors.

    The step of a small net is a chain of operations that each take less time than it takes to
    start them: a vector for all needs a third of them.

    Args:
        optimizer: one that `supports` says yes to.
        variables: all that it was built for.
    """

    def __init__(self, optimizer: Any, variables: Sequence[tf.Variable]) -> None:
        self.optimizer = optimizer
        self.variables = variables
        index = [optimizer._index_dict[optimizer._var_key(v)] for v in variables]
        self.moments = [[slots[i] for i in index] for slots in _slots(optimizer)]

    @staticmethod
    def supports(optimizer: Any, variables: Sequence[tf.Variable]) -> bool:
        """Whether this class does what the optimizer does."""
        return (
            type(optimizer) in (tf_keras.optimizers.Adam, tf_keras.optimizers.AdamW)
            and not (optimizer.amsgrad or getattr(optimizer, "adaptive_epsilon", False))
            and not (optimizer.use_ema or optimizer.clipnorm)
            and all(v.dtype == tf.float32 and v.constraint is None for v in variables)
        )

    def start(self) -> State:
        return [_flat(slots) for slots in self.moments]

    def apply(self, pairs: Pairs, state: State) -> tuple[tf.Tensor, State]:
        optimizer = self.optimizer
        optimizer._compute_current_learning_rate()  # of a schedule
        mean, square = state
        # A variable without gradient has zeros, and stays as it is.
        found = {id(variable): gradient for gradient, variable in pairs}
        gradient = _flat([found.get(id(v), tf.zeros(v.shape)) for v in self.variables])
        norm = tf.norm(gradient)
        if optimizer.global_clipnorm:
            limit = tf.constant(optimizer.global_clipnorm, norm.dtype)
            gradient *= limit / tf.maximum(norm, limit)
        elif optimizer.clipvalue:
            gradient = tf.clip_by_value(gradient, -optimizer.clipvalue, optimizer.clipvalue)
        mean += (gradient - mean) * (1.0 - optimizer.beta_1)
        square += (tf.square(gradient) - square) * (1.0 - optimizer.beta_2)
        step = tf.cast(optimizer.iterations + 1, mean.dtype)
        rate = tf.cast(optimizer.learning_rate, mean.dtype)
        bias = [1.0 - tf.pow(tf.cast(b, mean.dtype), step) for b in _betas(optimizer)]
        change = rate * tf.sqrt(bias[1]) / bias[0] * mean / (tf.sqrt(square) + optimizer.epsilon)
        for variable, part in zip(self.variables, _split(change, self.variables), strict=True):
            if id(variable) not in found:
                continue
            if optimizer.weight_decay is not None and optimizer._use_weight_decay(variable):
                part += variable * optimizer.weight_decay * rate
            variable.assign_sub(part)
        optimizer.iterations.assign_add(1)
        return norm, [mean, square]

    def finish(self, state: State) -> None:
        for slots, vector in zip(self.moments, state, strict=True):
            for slot, part in zip(slots, _split(vector, slots), strict=True):
                slot.assign(part)


def _slots(optimizer: Any) -> tuple[list[tf.Variable], list[tf.Variable]]:
    return optimizer._momentums, optimizer._velocities


def _betas(optimizer: Any) -> tuple[float, float]:
    return optimizer.beta_1, optimizer.beta_2


def _flat(tensors: Sequence[Any]) -> tf.Tensor:
    return tf.concat([tf.reshape(tensor, [-1]) for tensor in tensors], axis=0)


def _split(vector: tf.Tensor, like: Sequence[tf.Variable]) -> list[tf.Tensor]:
    parts = tf.split(vector, [v.shape.num_elements() for v in like])
    return [tf.reshape(part, v.shape) for part, v in zip(parts, like, strict=True)]
