"""What a dashboard shows of a model of one kind, besides the scalars that every training has.

Shape letters: N rows, D event size, K components.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import tensorflow as tf
import tf_keras
from matplotlib.figure import Figure
from scipy import special

from mdn.data.rows import Data
from mdn.data.splits import thin
from mdn.density.transformed import split_transform
from mdn.evaluation import find_counted
from mdn.model import MDN
from mdn.plots import density_figure
from mdn.vae import VAE
from mdn.vae_plots import latent_figure, reconstructions_figure, samples_figure


class Panels(Protocol):
    """The part of a dashboard that depends on the kind of the model."""

    def graph(self, model: Any) -> Any:
        """Return the GraphDef to show."""

    def write(self, model: Any) -> None:
        """Write scalars and histograms to the default summary writer."""

    def figures(self, model: Any) -> dict[str, Figure]:
        """Return pictures by tag."""


class DensityPanels:
    """The components and a picture of a conditional density, on a sample of validation rows.

    Args:
        data: for the sample, and the names in the picture.
        rows: the most rows of the sample.
    """

    def __init__(self, data: Data, rows: int = 2048) -> None:
        self.data = data
        self.sample = data.validation.take(thin(len(data.validation), rows))

    def graph(self, model: MDN) -> Any:
        @tf.function
        def density(x: tf.Tensor) -> Any:
            return tuple(split_transform(model(x, training=False))[0].mixture_parameters())

        x = np.asarray(model.encode(self.sample.x))
        spec = tf.TensorSpec([None, *x.shape[1:]], tf_keras.backend.floatx(), name="x")
        return density.get_concrete_function(spec).graph.as_graph_def()

    def write(self, model: MDN) -> None:
        base, _ = split_transform(model.predict_distribution(self.sample.x))
        counted = find_counted(self.sample)  # [N] or [N, T]: a density per step, or for the last
        logits, _, scale_tril = (p.numpy()[counted] for p in base.mixture_parameters())
        _write_components(logits, scale_tril)

    def figures(self, model: MDN) -> dict[str, Figure]:
        return {"density": density_figure(model, self.data, self.sample, size=(6.4, 4.0))}


class VAEPanels:
    """The components of a prior; samples, reconstructions and the latent space as pictures.

    Args:
        data: for the validation images, their labels and their shape.
        rows: the most images in the picture of the latent space.
    """

    def __init__(self, data: Data, rows: int = 2048) -> None:
        self.data = data
        self.sample = data.validation.take(thin(len(data.validation), rows))

    def graph(self, model: VAE) -> Any:
        @tf.function
        def reconstruct(images: tf.Tensor) -> tf.Tensor:
            return model(images, training=False)

        spec = tf.TensorSpec([None, model.event_size], tf_keras.backend.floatx(), name="images")
        return reconstruct.get_concrete_function(spec).graph.as_graph_def()

    def write(self, model: VAE) -> None:
        logits, _, scale_tril = (p.numpy() for p in model.prior.mixture_parameters())
        _write_components(logits[np.newaxis], scale_tril[np.newaxis])

    def figures(self, model: VAE) -> dict[str, Figure]:
        figures = {
            "samples": samples_figure(model, self.data.image_shape),
            "reconstructions": reconstructions_figure(model, self.sample, self.data.image_shape),
        }
        if model.latent_size > 1:
            figures["latent"] = latent_figure(model, self.sample)
        return figures


def _write_components(logits: np.ndarray, scale_tril: np.ndarray) -> None:
    """Write the weights, [n, K] logits, and the scales, [n, K, D, D] factors, of n mixtures."""
    weights = special.softmax(logits, axis=-1)  # [n, K]
    diagonal = np.diagonal(scale_tril, axis1=-2, axis2=-1)  # [n, K, D]
    scales = np.exp(np.log(diagonal).mean(axis=-1))  # [n, K]
    effective = np.exp(special.entr(weights).sum(axis=-1))  # [n]
    tf.summary.scalar("components/effective", effective.mean())
    for name, values in (("weight", weights), ("scale", scales)):
        for k, mean in enumerate(values.mean(axis=0)):
            tf.summary.scalar(f"components/{name}_{k}", mean)
        tf.summary.histogram(f"components/{name}s", values)
