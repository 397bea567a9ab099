"""Backbones: encoded features [.., F] to hidden features [.., H].

Every backbone is a registered Keras model with a real config; a model of the user's own serves as
well, given as `backbone._target_`.

Shape letters: B batch, T time, F features, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras
from tf_keras import layers

from mdn.errors import ConfigError

register = tf_keras.saving.register_keras_serializable(package="mdn")


def add_seed_state(layer: layers.Layer | tf_keras.Model) -> tf.Variable:
    """Add a weight that holds a seed and a counter, for `next_seed`: int32 [2].

    Kept among the weights, it makes the noise of a resumed run that of the uninterrupted one.
    """
    # Drawn from NumPy's global stream, which tf_keras.utils.set_random_seed seeds.
    seed = int(np.random.randint(2**31 - 1))
    return layer.add_weight(  # (seed, training calls so far)
        name="state",
        shape=[2],
        dtype="int32",
        trainable=False,
        initializer=tf_keras.initializers.Constant([seed, 0]),
        synchronization=tf.VariableSynchronization.ON_READ,
        aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
    )


def next_seed(state: tf.Variable) -> tf.Tensor:
    """Return the seed of this training call, int32 [2], another in each replica; and count it."""
    replica = tf.distribute.get_replica_context().replica_id_in_sync_group
    now = tf.identity(state)
    state.assign_add([0, 1])
    return tf.stack([now[0], now[1] * 1024 + tf.cast(replica, tf.int32)])


def drop(x: tf.Tensor, rate: float, seed: tf.Tensor) -> tf.Tensor:
    """Return x with a share of its entries set to zero and the others scaled up, as the seed says.

    The mask is the same with XLA and without. That is so of random bits, of which TensorFlow's own
    dropout makes other floats under XLA.

    Args:
        x: floats.
        rate: share of the entries to drop, in [0, 1).
        seed: [2] integers.
    """
    bits = tf.random.stateless_uniform(
        tf.shape(x), seed, minval=None, maxval=None, dtype=tf.int32, alg="philox"
    )
    kept = bits >= int(rate * 2**32) - 2**31
    return tf.where(kept, x / (1.0 - rate), tf.zeros_like(x))


@register
class Dropout(layers.Layer):
    """Dropout whose masks are a function of a seed and of a counter kept among the weights.

    A checkpoint therefore holds all there is to know, and a resumed run draws the masks that the
    uninterrupted run would have drawn; XLA draws them too.

    Args:
        rate: share of the units to drop, in [0, 1).
        **kwargs: as for any Keras layer.

    Raises:
        ConfigError: the rate is outside of its range.
    """

    def __init__(self, rate: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0.0 <= rate < 1.0:
            raise ConfigError(f"dropout={rate}: must be at least 0 and below 1")
        self.rate = float(rate)
        self.supports_masking = True
        self.state = add_seed_state(self)

    def call(self, inputs: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        if not training or self.rate == 0.0:
            return inputs
        return drop(inputs, self.rate, next_seed(self.state))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "rate": self.rate}


class Backbone(tf_keras.Model):
    """A chain of layers [.., F] -> [.., H]; the mask of a sequence goes through to each."""

    xla = True  # whether a train step can be compiled once and for all

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.chain: list[layers.Layer] = []

    def call(self, inputs: tf.Tensor, training: bool | None = None, mask: Any = None) -> tf.Tensor:
        hidden = inputs
        for layer in self.chain:
            if isinstance(layer, layers.LSTM):
                hidden = layer(hidden, mask=mask, training=training)
            else:
                hidden = layer(hidden, training=training)
        return hidden

    def get_config(self) -> dict[str, Any]:
        return {"name": self.name, "dtype": self._dtype_policy.name}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Backbone:
        config = dict(config)
        now = tf_keras.mixed_precision.global_policy()
        # The layers of the chain take the policy that is in force when they are made.
        tf_keras.mixed_precision.set_global_policy(config.pop("dtype", now))
        try:
            return cls(**config)
        finally:
            tf_keras.mixed_precision.set_global_policy(now)


def _check_widths(key: str, widths: Sequence[int]) -> list[int]:
    widths = list(widths)
    if not widths or any(int(width) != width or width < 1 for width in widths):
        raise ConfigError(f"{key}={widths}: give positive whole numbers, e.g. {key}=[64,64]")
    return [int(width) for width in widths]


@register
class MLP(Backbone):
    """A multilayer perceptron: dense, layer norm, activation, dropout, for each width.

    Args:
        widths: units of each hidden layer.
        activation: name of a Keras activation.
        dropout: share of the units to drop while training.
        layer_norm: normalise each layer's units before the activation.
        **kwargs: as for any Keras model.
    """

    def __init__(
        self,
        widths: Sequence[int] = (64, 64),
        activation: str = "gelu",
        dropout: float = 0.0,
        layer_norm: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._config: dict[str, Any] = {
            "widths": _check_widths("widths", widths),
            "activation": activation,
            "dropout": dropout,
            "layer_norm": layer_norm,
        }
        for width in self._config["widths"]:
            self.chain.append(layers.Dense(width))
            if layer_norm:
                self.chain.append(layers.LayerNormalization())
            self.chain.append(layers.Activation(activation))
            if dropout:
                self.chain.append(Dropout(dropout))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **self._config}


@register
class ResidualBlock(layers.Layer):
    """x + W2 dropout(activation(W1 norm(x))): a pre-activation residual block of one width.

    Source:
        Gorishniy et al. (2021), Revisiting Deep Learning Models for Tabular Data,
        arXiv 2106.11959.
    """

    def __init__(
        self, width: int, activation: str, dropout: float, layer_norm: bool, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self._config: dict[str, Any] = {
            "width": width,
            "activation": activation,
            "dropout": dropout,
            "layer_norm": layer_norm,
        }
        self.chain = [layers.LayerNormalization()] if layer_norm else []
        self.chain += [layers.Dense(width), layers.Activation(activation)]
        self.chain += [Dropout(dropout)] if dropout else []
        self.chain += [layers.Dense(width)]

    def call(self, inputs: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        hidden = inputs
        for layer in self.chain:
            hidden = layer(hidden, training=training)
        return inputs + hidden

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **self._config}


@register
class ResNet(Backbone):
    """A dense layer, then residual blocks of one width.

    Args:
        width: H, units of every layer.
        blocks: number of residual blocks.
        activation: name of a Keras activation.
        dropout: share of the units to drop inside each block while training.
        layer_norm: normalise at the start of each block.
        **kwargs: as for any Keras model.
    """

    def __init__(
        self,
        width: int = 64,
        blocks: int = 2,
        activation: str = "gelu",
        dropout: float = 0.0,
        layer_norm: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._config: dict[str, Any] = {
            "width": _check_widths("width", [width])[0],
            "blocks": _check_widths("blocks", [blocks])[0],
            "activation": activation,
            "dropout": dropout,
            "layer_norm": layer_norm,
        }
        self.chain.append(layers.Dense(width))
        self.chain += [
            ResidualBlock(width, activation, dropout, layer_norm) for _ in range(blocks)
        ]
        self.chain.append(layers.Activation(activation))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **self._config}


@register
class Constant(Backbone):
    """No features at all: a zero for every row, so that only the head's bias learns.

    The density is then unconditional: the same for every x.
    """

    def call(self, inputs: tf.Tensor, training: bool | None = None, mask: Any = None) -> tf.Tensor:
        hidden = tf.zeros(tf.concat([tf.shape(inputs)[:-1], [1]], axis=0), inputs.dtype)
        hidden.set_shape([*inputs.shape[:-1], 1])
        return hidden


@register
class LSTM(Backbone):
    """Stacked LSTM layers over [B, T, F]; steps whose features are all NaN are padding.

    Args:
        units: units of each layer.
        return_sequences: a density for every step ([B, T, H]) or for the last step ([B, H]).
        dropout: share of the units to drop between layers while training.
        **kwargs: as for any Keras model.
    """

    xla = False  # Keras's LSTM makes a new function at each call, which XLA compiles each time

    def __init__(
        self,
        units: Sequence[int] = (64,),
        return_sequences: bool = True,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._config: dict[str, Any] = {
            "units": _check_widths("units", units),
            "return_sequences": return_sequences,
            "dropout": dropout,
        }
        for i, width in enumerate(self._config["units"]):
            last = i == len(self._config["units"]) - 1
            self.chain.append(layers.LSTM(width, return_sequences=return_sequences or not last))
            if dropout:
                self.chain.append(Dropout(dropout))

    def call(self, inputs: tf.Tensor, training: bool | None = None, mask: Any = None) -> tf.Tensor:
        if inputs.shape.rank != 3:
            raise ConfigError(
                f"backbone=lstm needs sequences [N, T, F] and the features are "
                f"{list(inputs.shape)}: use backbone=mlp for plain rows"
            )
        return super().call(inputs, training=training, mask=mask)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **self._config}
