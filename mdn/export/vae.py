"""A VAE as a SavedModel that plain TensorFlow loads: no tf_keras, no TFP, no mdn.

Shape letters: B batch, D pixels, L latent size.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf

from mdn.errors import ConfigError
from mdn.export.saved_model import as_plain, check_path, write_saved_model
from mdn.vae import VAE


def export_vae(
    model: VAE,
    path: str | os.PathLike[str],
    overwrite: bool = False,
    targets: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write a SavedModel of a VAE.

    Its signatures take any number of rows and return named tensors. What is random takes `seed`
    int32 [2], and is a function of it:

    - `encode`: `images` [B, D] to `mean` [B, L] and `stddev` [B, L] of the posterior.
    - `decode`: `z` [B, L] to `probabilities` [B, D] of the pixels.
    - `sample`: `n` int32 and `seed` to `probabilities` [n, D] and `images` [n, D], the zeros and
      ones drawn from them.
    - `elbo`: `images`, `n` draws of z for each of them, and `seed` to `elbo` [B], nats per image.
    - `log_prob`: the same to `log_prob` [B], the importance-weighted bound on log p(x) in nats.

    `mdn.json`, beside `saved_model.pb`, states every name, dtype and shape.

    The arguments and errors are those of `mdn.export.export_saved_model`, with a name in `targets`
    for each pixel.
    """
    check_path(path, overwrite)
    if len(targets) not in (0, model.event_size):
        raise ConfigError(f"targets={list(targets)}: give {model.event_size}, one for each pixel")
    parts = [model.backbone, model.posterior_head, model.decoder, model.pixels]
    parts += [] if model.prior_head is None else [model.prior_head]
    description = {
        "features": [],
        "targets": list(targets or model.column_names.targets),
        "model": model.get_config(),
        "config": as_plain(config),
    }
    return write_saved_model(path, overwrite, parts, _trace(model), description)


def _trace(model: VAE) -> dict[str, Any]:
    """Return the signatures as concrete functions."""
    images = tf.TensorSpec([None, model.event_size], tf.float32, "images")
    latent = tf.TensorSpec([None, model.latent_size], tf.float32, "z")
    draws = tf.TensorSpec([], tf.int32, "n"), tf.TensorSpec([2], tf.int32, "seed")

    @tf.function(autograph=False)
    def encode(images: tf.Tensor) -> dict[str, tf.Tensor]:
        posterior = model.posterior(images)
        return {"mean": posterior.loc, "stddev": posterior.scale_diag}

    @tf.function(autograph=False)
    def decode(z: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"probabilities": model.decode(z)}

    @tf.function(autograph=False)
    def sample(n: tf.Tensor, seed: tf.Tensor) -> dict[str, tf.Tensor]:
        probabilities, drawn = model.sample(n, seed)
        return {"probabilities": probabilities, "images": drawn}

    @tf.function(autograph=False)
    def elbo(images: tf.Tensor, n: tf.Tensor, seed: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"elbo": model.elbo(images, n, seed)}

    @tf.function(autograph=False)
    def log_prob(images: tf.Tensor, n: tf.Tensor, seed: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"log_prob": model.log_prob(images, n, seed)}

    return {
        "encode": encode.get_concrete_function(images),
        "decode": decode.get_concrete_function(latent),
        "sample": sample.get_concrete_function(*draws),
        "elbo": elbo.get_concrete_function(images, *draws),
        "log_prob": log_prob.get_concrete_function(images, *draws),
    }
