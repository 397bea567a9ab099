"""Evaluation of a VAE: the bounds on the log evidence of images that it has not seen.

Shape letters: N rows, D pixels.
"""

from __future__ import annotations

import math

import numpy as np
import tensorflow as tf
from scipy import special

from mdn.data.rows import Data
from mdn.errors import RunError
from mdn.evaluation import mean_and_error
from mdn.vae import VAE

DRAWS = 512
# Draws times images that go through the decoder at a time.
_CELLS = 2**15
_SEED = (0, 1)


def evaluate_vae(model: VAE, data: Data, draws: int = DRAWS) -> dict[str, float]:
    """Judge a VAE on the test images, and independent pixels on the same images.

    Args:
        model: trained or not.
        data: where the images come from.
        draws: of z for each image.

    Returns:
        Metrics, in nats per image:

            test/elbo, test/elbo_se: the evidence lower bound, and the standard error of that mean
                over the images.
            test/nll, test/nll_se: minus the importance-weighted bound on the log evidence from
                the same draws: an upper bound on the negative log likelihood.
            test/kl: of the posterior from the prior, an average over the images.
            test/n: number of images.
            baseline/nll: of independent pixels, each with its share of ones in the train images.

    Raises:
        RunError: the bound of a test image is not finite.
    """

    def bounds(images: tf.Tensor) -> tf.Tensor:
        log_weight = model.log_weights(images, draws, _SEED)  # [draws, b]
        iw = tf.reduce_logsumexp(log_weight, axis=0) - math.log(draws)
        terms = model.terms(images, draws, _SEED)
        return tf.stack([terms.elbo, terms.kl, iw], axis=-1)

    test = data.test
    values = model.map(bounds, test.y, max(1, _CELLS // draws))  # [N, 3]
    if not np.isfinite(values).all():
        row = int(np.argwhere(~np.isfinite(values))[0][0])
        raise RunError(
            f"the bound of test image {row} is not finite: train with a lower "
            "optimizer.learning_rate"
        )
    weight = np.ones(len(test)) if test.weight is None else test.weight
    counted = weight > 0
    columns = (*values.T.astype(np.float64), _independent_pixels(data))
    elbo, kl, iw, baseline = (mean_and_error(c[counted], weight[counted]) for c in columns)
    return {
        "test/n": float(counted.sum()),
        "test/elbo": elbo[0],
        "test/elbo_se": elbo[1],
        "test/nll": -iw[0],
        "test/nll_se": iw[1],
        "test/kl": kl[0],
        "baseline/nll": -baseline[0],
    }


def _independent_pixels(data: Data) -> np.ndarray:
    """Return the log probability of the test images, [N], if pixels were independent."""
    train = data.train
    share = np.average(train.y, axis=0, weights=train.weight)
    share = (share * len(train) + 0.5) / (len(train) + 1.0)  # a pixel may be zero in all of them
    return special.xlogy(data.test.y, share).sum(-1) + special.xlog1py(
        1.0 - data.test.y, -share
    ).sum(-1)
