"""What every density of `mdn` answers, whatever its type: the interface shared by all three.

Shape letters: B batch, D event size, K components.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from mdn.errors import DataError


class MixtureParameters(NamedTuple):
    """A density seen as a Gaussian mixture; a normal is a mixture with K = 1.

    Attributes:
        logits: [.., K], unnormalised log weights.
        loc: [.., K, D], component means.
        scale_tril: [.., K, D, D], Cholesky factors of the component covariances.
    """

    logits: tf.Tensor
    loc: tf.Tensor
    scale_tril: tf.Tensor


def draw(parameters: MixtureParameters, n: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Return n draws from a mixture: [n, .., D].

    TFP's own sampling fails where there are no rows, and makes K draws to keep one.

    Args:
        parameters: batch [..], K components.
        n: int32 scalar.
        seed: int32 [2]; the draws are the same on every device.
    """
    logits, loc, scale_tril = parameters
    seeds = tf.random.split(seed, 2, "philox")

    def shape(like: tf.Tensor) -> tf.Tensor:
        return tf.concat([[n], tf.shape(like)], axis=0)

    level = tf.random.stateless_uniform(
        shape(logits[..., :1]), seeds[0], dtype=loc.dtype, alg="philox"
    )  # [n, .., 1]
    noise = tf.random.stateless_normal(
        shape(loc[..., 0, :]), seeds[1], dtype=loc.dtype, alg="philox"
    )  # [n, .., D]
    below = level >= tf.cumsum(tf.nn.softmax(logits), axis=-1)[..., :-1]  # [n, .., K - 1]
    component = tf.one_hot(tf.math.count_nonzero(below, -1), logits.shape[-1], dtype=loc.dtype)
    return tf.einsum("n...k,...ki->n...i", component, loc) + tf.einsum(
        "n...k,...kij,n...j->n...i", component, scale_tril, noise
    )


def check_event(y: tf.Tensor, event_size: int) -> None:
    """Raise a DataError unless the last axis of y is D; anything else would broadcast."""
    if y.shape.rank == 0 or (y.shape.rank is not None and y.shape[-1] not in (event_size, None)):
        raise DataError(
            f"y has shape {y.shape} but the density has {event_size} targets: give "
            f"[.., {event_size}]; a single target is [N, 1]"
        )


class Queries:
    """Mixed into a TFP distribution; as a tensor the distribution is its mean."""

    log_prob: Any
    mean: Any
    covariance: Any
    dtype: Any
    batch_shape: Any
    event_shape: Any
    parameters: dict[str, Any]
    parameter_properties: Any

    def mixture_parameters(self) -> MixtureParameters:
        """Return the density as the parameters of a Gaussian mixture, in the units of y."""
        raise NotImplementedError

    def tensors(self) -> dict[str, tf.Tensor]:
        """Return the tensors that the constructor takes, by name: `type(d)(**d.tensors())`."""
        return {name: getattr(self, name) for name in self.parameter_properties()}

    # A deterministic answer wherever TensorFlow or NumPy wants a tensor, never a random draw.
    def __tf_tensor__(self, dtype: tf.DType | None = None, name: str | None = None) -> tf.Tensor:
        return tf.convert_to_tensor(self.mean(), dtype, name=name)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.mean(), dtype)
