"""Embeddings: encoded features [.., F] to wider ones that a network bends more easily.

An embedding stands between the encoder and the backbone. It is fitted to train rows, has no
trainable weights, and travels in `.keras` files and SavedModels with the model.

Shape letters: B batch, T time, F features, N rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

from mdn.errors import ConfigError, DataError, RunError

register = tf_keras.saving.register_keras_serializable(package="mdn")


@register
class PiecewiseLinear(tf_keras.layers.Layer):
    """The features, and beside each of them its piecewise-linear encoding.

    A feature's range is cut into bins at quantiles of the train rows. In each bin stands how far
    the feature has come through it: 0 below, 1 above, linear inside. A linear map of these is any
    piecewise-linear function with those knots, so that steps and bends cost the network nothing.

    A feature of few values has as many bins as gaps between them; of two values or one (flags,
    one-hot columns, constants) the encoding would be the feature itself, and is left out. Beyond
    the train rows the encoding stays where it is at their end, and the feature itself goes on.

    Args:
        bins: at most so many for each feature.
        **kwargs: as for any Keras layer.

    Raises:
        ConfigError: there are less than two bins.

    Source:
        Gorishniy et al. (2022), On embeddings for numerical features in tabular deep learning,
        NeurIPS.
    """

    def __init__(self, bins: int = 16, **kwargs: Any) -> None:
        kwargs.setdefault("dtype", "float32")  # whatever the policy, as the encoder
        super().__init__(**kwargs)
        if bins < 2:
            raise ConfigError(f"embedding.bins={bins}: a bin alone is the feature; give 2 or more")
        self.bins = int(bins)
        self.supports_masking = True
        self.columns: list[int] = []  # the feature of each number that is encoded
        self.features: int | None = None  # F, known from `adapt` on

    def _lay_out(self, columns: list[int], features: int) -> None:
        """Make the variables of these numbers, unless they are there."""
        if self.features is not None:
            if (columns, features) != (self.columns, self.features):
                raise DataError(
                    "the features have other values than those that the bins were made for: "
                    "make a new model to adapt"
                )
            return
        self.columns, self.features = columns, features
        self.edge, self.inverse_width = (
            self.add_weight(name, [len(columns)], initializer=start, trainable=False)
            for name, start in (("edge", "zeros"), ("inverse_width", "ones"))
        )

    @property
    def output_size(self) -> int:
        """F', the number of columns that come out."""
        if self.features is None:
            raise RunError("the embedding has no bins yet: call adapt first")
        return self.features + len(self.columns)

    def adapt(self, x: np.ndarray) -> None:
        """Fit the bins to encoded train rows, [N, F] or [N, T, F].

        Raises:
            DataError: it has been adapted to features that have other numbers of bins.
        """
        rows = np.asarray(x, np.float32)
        rows = rows.reshape(-1, rows.shape[-1])
        edges = [bin_edges(column, self.bins) for column in rows.T]
        columns = [i for i, e in enumerate(edges) for _ in range(len(e) - 1) if len(e) > 2]
        self._lay_out(columns, rows.shape[1])
        kept = [e for e in edges if len(e) > 2] or [np.zeros(1)]
        width = np.concatenate([np.diff(e) for e in kept])
        self.edge.assign(np.concatenate([e[:-1] for e in kept]))
        # Two edges fall together where a value fills a bin: that bin stays at zero.
        self.inverse_width.assign(np.divide(1.0, width, out=np.zeros_like(width), where=width > 0))

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Map [.., F] to [.., F'] float32."""
        inputs = tf.cast(inputs, tf.float32)
        if not self.columns:
            return inputs
        share = (tf.gather(inputs, self.columns, axis=-1) - self.edge) * self.inverse_width
        return tf.concat([inputs, tf.clip_by_value(share, 0.0, 1.0)], axis=-1)

    def compute_output_shape(self, input_shape: Any) -> tf.TensorShape:
        return tf.TensorShape([*input_shape[:-1], self.output_size])

    def get_config(self) -> dict[str, Any]:
        own = {"bins": self.bins, "columns": list(self.columns), "features": self.features}
        return {**super().get_config(), **own}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PiecewiseLinear:
        own = {name: config[name] for name in config if name not in ("columns", "features")}
        layer = cls(**own)
        if config["features"] is not None:
            layer._lay_out(list(config["columns"]), config["features"])
        return layer


def bin_edges(values: np.ndarray, bins: int) -> np.ndarray:
    """Return the edges of at most so many bins, of like numbers of rows where they can be.

    Args:
        values: [N].
        bins: at most.

    Returns:
        [n + 1] in ascending order, of n bins: the values themselves where these are few, and else
        quantiles, which are equal where a value fills a bin or more.
    """
    distinct = np.unique(values)
    if len(distinct) <= bins + 1:
        return distinct
    return np.quantile(values, np.linspace(0.0, 1.0, bins + 1), method="nearest")
