"""How a train step changes the variables: any Keras optimizer, or Adam as one fused update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import tensorflow as tf
import tf_keras

from mdn.optimizers import AdamW

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
        members: M of an ensemble, each of which is clipped by a norm of its own.
    """

    def __init__(self, optimizer: Any, members: int = 1) -> None:
        self.optimizer, self.members = optimizer, members

    def start(self) -> State:
        return []

    def apply(self, pairs: Pairs, state: State) -> tuple[tf.Tensor, State]:
        norm = tf.linalg.global_norm([gradient for gradient, _ in pairs])
        limit = getattr(self.optimizer, "global_clipnorm", None)
        if limit and self.members > 1:
            pairs = clip_members(pairs, limit)
            self.optimizer.global_clipnorm = None  # which would clip all by their common norm
        self.optimizer.apply_gradients(pairs, skip_gradients_aggregation=True)
        if limit:
            self.optimizer.global_clipnorm = limit
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
        members: M of an ensemble, each of which is clipped by a norm of its own.
        turned: those of the variables, [.., H, P], whose gradient is a faster product transposed.
    """

    def __init__(
        self,
        optimizer: Any,
        variables: Sequence[tf.Variable],
        members: int = 1,
        turned: Sequence[tf.Variable] = (),
    ) -> None:
        self.optimizer = optimizer
        self.variables, self.members = variables, members
        known = {variable.ref() for variable in turned}
        self.turned = [variable.ref() in known for variable in variables]
        index = [optimizer._index_dict[optimizer._var_key(v)] for v in variables]
        self.moments = [
            [slots[i] for i in index] for slots in (optimizer._momentums, optimizer._velocities)
        ]
        slots = optimizer._model_variables_moving_average if optimizer.use_ema else []
        self.averages = [slots[i] if slots else None for i in index]

    @staticmethod
    def supports(optimizer: Any, variables: Sequence[tf.Variable]) -> bool:
        """Whether this class does what the optimizer does."""
        return (
            type(optimizer) in (tf_keras.optimizers.Adam, tf_keras.optimizers.AdamW, AdamW)
            and not (optimizer.amsgrad or getattr(optimizer, "adaptive_epsilon", False))
            and not (optimizer.ema_overwrite_frequency or optimizer.clipnorm)
            and all(v.dtype == tf.float32 and v.constraint is None for v in variables)
        )

    def start(self) -> State:
        return [_flat(slots, self.turned) for slots in self.moments]

    def apply(self, pairs: Pairs, state: State) -> tuple[tf.Tensor, State]:
        optimizer = self.optimizer
        optimizer._compute_current_learning_rate()  # of a schedule
        mean, square = state
        gradient, found = self._gradient(pairs)
        norm, limit = tf.norm(gradient), optimizer.global_clipnorm
        if limit and self.members > 1:
            gradient, _ = self._gradient(clip_members(pairs, limit))
        elif limit:
            limit = tf.constant(limit, norm.dtype)
            gradient *= limit / tf.maximum(norm, limit)
        elif optimizer.clipvalue:
            gradient = tf.clip_by_value(gradient, -optimizer.clipvalue, optimizer.clipvalue)
        mean += (gradient - mean) * (1.0 - optimizer.beta_1)
        square += (tf.square(gradient) - square) * (1.0 - optimizer.beta_2)
        step = tf.cast(optimizer.iterations + 1, mean.dtype)
        rate = tf.cast(optimizer.learning_rate, mean.dtype)
        betas = (optimizer.beta_1, optimizer.beta_2)
        bias = [1.0 - tf.pow(tf.cast(beta, mean.dtype), step) for beta in betas]
        change = rate * tf.sqrt(bias[1]) / bias[0] * mean / (tf.sqrt(square) + optimizer.epsilon)
        parts = _split(change, self.variables, self.turned)
        for variable, part, average in zip(self.variables, parts, self.averages, strict=True):
            if id(variable) not in found:
                continue  # its gradient is zeros, and it stays as it is
            if optimizer.weight_decay is not None and optimizer._use_weight_decay(variable):
                part += variable * optimizer.weight_decay * rate
            variable.assign_sub(part)
            if average is not None:
                average.assign_sub((1.0 - optimizer.ema_momentum) * (average - variable))
        optimizer.iterations.assign_add(1)
        return norm, [mean, square]

    def _gradient(self, pairs: Pairs) -> tuple[tf.Tensor, set[int]]:
        """Return the gradients as one vector, and the ids of the variables that have one."""
        found = {id(variable): gradient for gradient, variable in pairs}
        parts = [found.get(id(v), tf.zeros(v.shape)) for v in self.variables]
        return _flat(parts, self.turned), set(found)

    def finish(self, state: State) -> None:
        for slots, vector in zip(self.moments, state, strict=True):
            for slot, part in zip(slots, _split(vector, slots, self.turned), strict=True):
                slot.assign(part)


def clip_members(pairs: Pairs, limit: float) -> Pairs:
    """Return the pairs with the gradient of each member clipped to a norm of its own.

    Args:
        pairs: (gradient, variable), [M, ..] each.
        limit: the greatest norm of a member's gradient.
    """
    squares = [
        tf.reduce_sum(tf.square(gradient), axis=list(range(1, gradient.shape.rank)))
        for gradient, _ in pairs
    ]
    norm = tf.sqrt(tf.add_n(squares))  # [M]
    factor = limit / tf.maximum(norm, limit)
    return [
        (gradient * tf.reshape(factor, [-1, *[1] * (gradient.shape.rank - 1)]), variable)
        for gradient, variable in pairs
    ]


def _turn(tensors: Sequence[Any], turned: Sequence[bool]) -> list[Any]:
    return [
        tf.linalg.matrix_transpose(tensor) if turn else tensor
        for tensor, turn in zip(tensors, turned, strict=True)
    ]


def _flat(tensors: Sequence[Any], turned: Sequence[bool]) -> tf.Tensor:
    return tf.concat([tf.reshape(tensor, [-1]) for tensor in _turn(tensors, turned)], axis=0)


def _split(
    vector: tf.Tensor, like: Sequence[tf.Variable], turned: Sequence[bool]
) -> list[tf.Tensor]:
    """Return the tensors of which `_flat` made the vector."""
    parts = tf.split(vector, [v.shape.num_elements() for v in like])
    shapes = [
        [*v.shape[:-2], v.shape[-1], v.shape[-2]] if turn else v.shape
        for v, turn in zip(like, turned, strict=True)
    ]
    return _turn([tf.reshape(p, s) for p, s in zip(parts, shapes, strict=True)], turned)
