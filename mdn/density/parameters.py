"""The form that all densities can be seen in.

Shape letters: D event size, K components.
"""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf


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
