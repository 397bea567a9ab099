"""How a train step changes the variables: any Keras optimizer, or Adam as one fused update."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any, Protocol

import tensorflow as tf
import tf_keras

from mdn.density.packed import lane_sums
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
        gradients = [gradient for gradient, _ in pairs]
        norm = tf.linalg.global_norm(gradients)  # of any kind of gradients
        limit = getattr(self.optimizer, "global_clipnorm", None)
        if limit and self.members > 1:
            pairs = clip_members(pairs, member_norms(gradients, self.members), limit)
            self.optimizer.global_clipnorm = None  # which would clip all by their common norm
        self.optimizer.apply_gradients(pairs, skip_gradients_aggregation=True)
        if limit:
            self.optimizer.global_clipnorm = limit
        return norm, state

    def finish(self, state: State) -> None:
        pass


LARGE = 2**15  # elements


class FusedAdam:
    """The update of Keras's Adam or AdamW, with the moments of all small variables in two vectors.

    The step of a small net is a chain of operations that each take less time than it takes to
    start them: a vector for all needs a third of them. A variable of more than `LARGE` elements is
    a vector of its own, as laying it beside the others would copy it for nothing.

    Args:
        optimizer: one that `supports` says yes to.
        variables: all that it was built for.
        members: M of an ensemble, each of which is clipped by a norm of its own.
    """

    def __init__(
        self,
        optimizer: Any,
        variables: Sequence[tf.Variable],
        members: int = 1,
    ) -> None:
        self.optimizer = optimizer
        self.variables, self.members = variables, members
        small = [v for v in variables if v.shape.num_elements() <= LARGE]
        large = [v for v in variables if v.shape.num_elements() > LARGE]
        self.groups = [
            _Group(optimizer, group)
            for group in (small, *([variable] for variable in large))
            if group
        ]

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
        return [_flat(slots) for group in self.groups for slots in group.moments]

    def apply(self, pairs: Pairs, state: State) -> tuple[tf.Tensor, State]:
        optimizer = self.optimizer
        optimizer._compute_current_learning_rate()  # of a schedule
        gradients, limit = self._gradients(pairs), optimizer.global_clipnorm
        if self.members > 1:
            norms = member_norms([gradient for gradient, _ in pairs], self.members)
        else:
            norms = member_norms(gradients)
        if limit and self.members > 1:
            gradients = self._gradients(clip_members(pairs, norms, limit))
        elif limit:
            gradients = [
                gradient * (limit / tf.maximum(norms[0], limit)) for gradient in gradients
            ]
        elif optimizer.clipvalue:
            clip = optimizer.clipvalue
            gradients = [tf.clip_by_value(gradient, -clip, clip) for gradient in gradients]
        rates, found = self._rates(), {id(variable) for _, variable in pairs}
        new = []
        for i, (group, gradient) in enumerate(zip(self.groups, gradients, strict=True)):
            new += self._step(group, gradient, state[2 * i : 2 * i + 2], rates, found)
        optimizer.iterations.assign_add(1)
        return tf.norm(norms), new

    def _gradients(self, pairs: Pairs) -> list[tf.Tensor]:
        """Return the gradients of each group as one vector: zeros where a variable has none."""
        found = {id(variable): gradient for gradient, variable in pairs}
        return [
            _flat([found.get(id(v), tf.zeros(v.shape)) for v in group.variables])
            for group in self.groups
        ]

    def _rates(self) -> tuple[tf.Tensor, tf.Tensor]:
        """Return the learning rate, and that with the corrections of both moments' start."""
        optimizer = self.optimizer
        step = tf.cast(optimizer.iterations + 1, tf.float32)
        rate = tf.cast(optimizer.learning_rate, tf.float32)
        betas = (optimizer.beta_1, optimizer.beta_2)
        bias = [1.0 - tf.pow(tf.cast(beta, tf.float32), step) for beta in betas]
        return rate, rate * tf.sqrt(bias[1]) / bias[0]

    def _step(
        self,
        group: _Group,
        gradient: tf.Tensor,
        moments: State,
        rates: tuple[tf.Tensor, tf.Tensor],
        found: Container[int],
    ) -> State:
        """Change the group's variables; return its moments.

        Args:
            group: of P elements.
            gradient: [P].
            moments: mean and square, [P] each.
            rates: as `_rates` returns them.
            found: the ids of the variables that have a gradient.
        """
        optimizer = self.optimizer
        mean, square = moments
        mean += (gradient - mean) * (1.0 - optimizer.beta_1)
        square += (tf.square(gradient) - square) * (1.0 - optimizer.beta_2)
        rate, corrected = rates
        change = corrected * mean / (tf.sqrt(square) + optimizer.epsilon)
        parts = _split(change, group.variables)
        for variable, part, average in zip(group.variables, parts, group.averages, strict=True):
            if id(variable) not in found:
                continue  # its gradient is zeros, and it stays as it is
            if optimizer.weight_decay is not None and optimizer._use_weight_decay(variable):
                part += variable * optimizer.weight_decay * rate
            variable.assign_sub(part)
            if average is not None:
                average.assign_sub((1.0 - optimizer.ema_momentum) * (average - variable))
        return [mean, square]

    def finish(self, state: State) -> None:
        moments = [slots for group in self.groups for slots in group.moments]
        for tensors, vector in zip(moments, state, strict=True):
            for slot, part in zip(tensors, _split(vector, tensors), strict=True):
                slot.assign(part)


class _Group:
    """Variables whose moments are one vector, and the slots that Keras's Adam has for them."""

    def __init__(self, optimizer: Any, variables: Sequence[tf.Variable]):
        self.variables = variables
        index = [optimizer._index_dict[optimizer._var_key(v)] for v in variables]
        self.moments = [
            [slots[i] for i in index] for slots in (optimizer._momentums, optimizer._velocities)
        ]
        slots = optimizer._model_variables_moving_average if optimizer.use_ema else []
        self.averages = [slots[i] if slots else None for i in index]


def member_norms(gradients: Sequence[tf.Tensor], members: int = 1) -> tf.Tensor:
    """Return the norm of the gradient of each member, [M].

    Args:
        gradients: [M, ..] each; of one member also without the first axis.
        members: M.
    """
    rows = [tf.reshape(gradient, [members, -1]) for gradient in gradients]
    small = [row for row in rows if members * row.shape[1] <= LARGE]
    large = [row for row in rows if members * row.shape[1] > LARGE]
    rows = [*([tf.concat(small, axis=1)] if small else []), *large]
    return tf.sqrt(tf.add_n([lane_sums(tf.square(row)) for row in rows]))


def clip_members(pairs: Pairs, norms: tf.Tensor, limit: float) -> Pairs:
    """Return the pairs with the gradient of each member clipped to a norm of its own.

    Args:
        pairs: (gradient, variable), [M, ..] each.
        norms: [M], of their gradients.
        limit: the greatest norm of a member's gradient.
    """
    factor = limit / tf.maximum(norms, limit)  # [M]
    return [
        (gradient * tf.reshape(factor, [-1, *[1] * (gradient.shape.rank - 1)]), variable)
        for gradient, variable in pairs
    ]


def _flat(tensors: Sequence[Any]) -> tf.Tensor:
    return tf.concat([tf.reshape(tensor, [-1]) for tensor in tensors], axis=0)


def _split(vector: tf.Tensor, like: Sequence[tf.Variable]) -> list[tf.Tensor]:
    """Return the tensors of which `_flat` made the vector."""
    parts = tf.split(vector, [v.shape.num_elements() for v in like])
    return [tf.reshape(part, v.shape) for part, v in zip(parts, like, strict=True)]
