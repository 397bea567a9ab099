"""`StackedNetwork`: the networks of all members of an ensemble as one, layer by layer.

Each weight of a member is a slice of a variable [M, ..], so that a step of all members is a step
of one network whose products are batched. No operation mixes two slices, so that member m computes
what it would alone.

Shape letters: B batch, T time, n stands for B or B T, H hidden, P parameters, D event size,
M ensemble members, N rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras
from tf_keras import layers

from mdn import backbones
from mdn.data.rows import Features
from mdn.errors import ConfigError
from mdn.model import MDN
from mdn.options import STACKED

# What `StackedNetwork.apply` knows.
BACKBONES = tuple(getattr(backbones, path.rpartition(".")[2]) for path in STACKED)


class StackedNetwork:
    """The weights of M copies of a backbone and a head, and what these make of features.

    A plain object in the attribute of a model, which Keras does not look into: the template's own
    weights are none of the ensemble's.

    Args:
        model: of the head and backbone to copy.
        members: M.

    Attributes:
        template: a copy of the model, whose layers say what to compute; its weights are unused.

    Raises:
        ConfigError: the backbone cannot be stacked, or there are no members.
    """

    def __init__(self, model: MDN, members: int) -> None:
        if members < 1:
            raise ConfigError(f"members={members}: an ensemble needs at least one")
        if type(model.backbone) not in BACKBONES:
            raise ConfigError(
                f"the backbone {type(model.backbone).__name__} cannot be stacked: use one of "
                f"{', '.join(b.__name__ for b in BACKBONES)}, or train the members one by one"
            )
        self.template = copy_network(model)
        self.members = int(members)
        self._variables: dict[Any, tf.Variable] = {}  # by the weight of the template

    @property
    def weights(self) -> list[tf.Variable]:
        """The weights of the members, [M, ..] each, in the order of `own_weights`."""
        return list(self._variables.values())

    def variable(self, weight: tf.Variable) -> tf.Variable:
        """Return the variable [M, ..] that stands for a weight of the template."""
        return self._variables[weight.ref()]

    def build(self, rank: int, add_weight: Callable[..., tf.Variable]) -> None:
        """Make the variables, with zeros, where there are none yet.

        Args:
            rank: of the features: 2, or 3 of sequences.
            add_weight: of the model that they belong to, as Keras's.
        """
        self.template.build_from_config({"feature_rank": rank})
        if self._variables:
            return
        for weight in own_weights(self.template):
            self._variables[weight.ref()] = add_weight(
                name=weight.name.partition(":")[0].replace("/", "_"),
                shape=[self.members, *weight.shape],
                dtype=weight.dtype,
                trainable=weight.trainable,
                initializer="zeros",
                experimental_autocast=False,
            )

    def start(self, x: Features, y: np.ndarray, rank: int, seed: int) -> None:
        """Give member m the weights with which a network of its own would start from seed + m.

        Args:
            x: features of the train rows, as for `MDN.adapt`.
            y: [N, D] or [N, T, D], their targets.
            rank: as for `build`.
            seed: of the first member; it seeds the global streams.
        """
        template = self.template
        starts = []
        for m in range(self.members):
            tf_keras.utils.set_random_seed(seed + m)
            member = copy_network(template)
            member.head.adapt(template.known_targets(x, y), seed=seed + m)
            member.build_from_config({"feature_rank": rank})
            starts.append([weight.numpy() for weight in own_weights(member)])
        for variable, values in zip(self.weights, zip(*starts, strict=True), strict=True):
            variable.assign(np.stack(values))

    def apply(self, layer: Any, hidden: tf.Tensor, training: bool | None) -> tf.Tensor:
        """Return what the members' copies of a layer of the template make of [M, n, H].

        Raises:
            ConfigError: it is a layer that is not known here.
        """
        if isinstance(layer, backbones.Constant):
            return tf.zeros_like(hidden[..., :1])
        if isinstance(layer, backbones.Backbone):
            for inner in layer.chain:
                hidden = self.apply(inner, hidden, training)
            return hidden
        if isinstance(layer, backbones.ResidualBlock):
            before = hidden
            for inner in layer.chain:
                hidden = self.apply(inner, hidden, training)
            return before + hidden
        hidden = tf.cast(hidden, layer.compute_dtype)
        if isinstance(layer, layers.Dense):
            kernel, bias = (
                tf.cast(self.variable(w), layer.compute_dtype) for w in (layer.kernel, layer.bias)
            )
            return layer.activation(tf.matmul(hidden, kernel) + bias[:, tf.newaxis])
        if isinstance(layer, layers.Activation):
            return layer.activation(hidden)
        if isinstance(layer, layers.LayerNormalization):
            exact = tf.cast(hidden, tf.float32)  # as Keras does, whatever the policy
            mean, variance = tf.nn.moments(exact, axes=[-1], keepdims=True)
            gamma, beta = (self.variable(w)[:, tf.newaxis] for w in (layer.gamma, layer.beta))
            scaled = gamma * (exact - mean) * tf.math.rsqrt(variance + layer.epsilon) + beta
            return tf.cast(scaled, layer.compute_dtype)
        if isinstance(layer, backbones.Dropout):
            return self._drop(layer, hidden) if training and layer.rate else hidden
        raise ConfigError(f"a layer {type(layer).__name__} cannot be stacked: leave it out")

    def params(self, hidden: tf.Tensor) -> tf.Tensor:
        """Return what the members' heads make of [M, n, H]: parameters of densities, [M, n, P]."""
        head = self.template.head
        params = tf.matmul(hidden, self.variable(head.kernel), transpose_b=True)
        return params + self.variable(head.bias)[:, tf.newaxis]

    def packed_params(self, hidden: tf.Tensor) -> tf.Tensor:
        """Return the parameters as `Head.params_log_prob` takes them, [M, P, n]."""
        head = self.template.head
        return head.packed_params(hidden, self.variable(head.kernel), self.variable(head.bias))

    def _drop(self, layer: backbones.Dropout, hidden: tf.Tensor) -> tf.Tensor:
        """Drop units of each member as its own seed says: the masks that it would have alone."""
        state = self.variable(layer.state)  # [M, 2]
        now = tf.identity(state)
        state.assign_add(tf.tile([[0, 1]], [self.members, 1]))
        seeds = tf.unstack(now * [[1, 1024]])
        return tf.stack(
            [
                backbones.drop(one, layer.rate, seed)
                for one, seed in zip(tf.unstack(hidden), seeds, strict=True)
            ]
        )


def copy_network(model: MDN) -> MDN:
    """Return a model with a head and a backbone of the same options, and weights of its own.

    What encodes the features is that of the model itself.
    """
    head, backbone = (
        type(part).from_config(part.get_config()) for part in (model.head, model.backbone)
    )
    return MDN(head, backbone, model.encoder, model.embedding)


def own_weights(model: MDN) -> list[tf.Variable]:
    """Return the weights of which each member has its own."""
    return [*model.backbone.weights, model.head.kernel, model.head.bias]
