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

from mdn.errors import ConfigError, RunError

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
        columns: for each number that is encoded, its feature; `adapt` finds them.
        edges: the lower edge of each bin, likewise.
        widths: of the bins, likewise.
        features: F, likewise.
        **kwargs: as for any Keras layer.

    Raises:
        ConfigError: there are less than two bins.

    Source:
        Gorishniy et al. (2022), On embeddings for numerical features in tabular deep learning,
        NeurIPS.
    """

    def __init__(
        self,
        bins: int = 16,
        columns: Any = (),
        edges: Any = (),
        widths: Any = (),
        features: int | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("dtype", "float32")  # whatever the policy, as the encoder
        super().__init__(**kwargs)
        if bins < 2:
            raise ConfigError(f"embedding.bins={bins}: a bin alone is the feature; give 2 or more")
        self.bins = int(bins)
        self.columns = [int(column) for column in columns]
        self.edges, self.widths = [float(e) for e in edges], [float(w) for w in widths]
        self.features = features
        self.supports_masking = True

    @property
    def output_size(self) -> int:
        """F', the number of columns that come out."""
        if self.features is None:
            raise RunError("the embedding has no bins yet: call adapt first")
        return self.features + len(self.columns)

    def adapt(self, x: np.ndarray) -> None:
        """Fit the bins to encoded train rows, [N, F] or [N, T, F]."""
        rows = np.asarray(x, np.float32)
        rows = rows.reshape(-1, rows.shape[-1])
        self.features = rows.shape[1]
        self.columns, self.edges, self.widths = [], [], []
        for i, column in enumerate(rows.T):
            edges = bin_edges(column, self.bins)
            if len(edges) > 2:
                self.columns += [i] * (len(edges) - 1)
                self.edges += edges[:-1].tolist()
                self.widths += np.diff(edges).tolist()

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Map [.., F] to [.., F'] float32."""
        inputs = tf.cast(inputs, tf.float32)
        if inputs.shape[-1] != self.features:
            raise RunError(f"the embedding is of {self.features} features: call adapt again")
        if not self.columns:
            return inputs
        share = tf.gather(inputs, self.columns, axis=-1) - tf.constant(self.edges)
        share *= tf.constant(1.0 / np.asarray(self.widths), tf.float32)
        return tf.concat([inputs, tf.clip_by_value(share, 0.0, 1.0)], axis=-1)

    def compute_output_shape(self, input_shape: Any) -> tf.TensorShape:
        return tf.TensorShape([*input_shape[:-1], self.output_size])

    def get_config(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("bins", "columns", "edges", "widths")}
        return {**super().get_config(), **own, "features": self.features}


def bin_edges(values: np.ndarray, bins: int) -> np.ndarray:
    """Return the distinct edges of at most so many bins, of like numbers of rows where they can be.

    Args:
        values: [N].
        bins: at most.

    Returns:
        [n + 1] in ascending order, of n bins; the values themselves where these are few.
    """
    distinct = np.unique(values)
    if len(distinct) <= bins + 1:
        return distinct
    quantiles = np.quantile(values, np.linspace(0.0, 1.0, bins + 1), method="nearest")
    return np.unique(quantiles)
