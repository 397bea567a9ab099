"""`VAE`: a variational autoencoder of binary images whose prior is a trainable mixture.

Shape letters: B batch, D pixels, L latent size, K components, S draws, N rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
import tf_keras
from tf_keras import layers

from mdn.backbones import MLP, add_seed_state, next_seed
from mdn.base import TrainedModel
from mdn.data.checks import check_images
from mdn.data.rows import Rows
from mdn.density import GaussianMixture, MultivariateNormalDiag
from mdn.density.draws import draw
from mdn.density.gaussian import LOG_2_PI
from mdn.errors import ConfigError, DataError
from mdn.heads import Diag, Mixture

register = tf_keras.saving.register_keras_serializable(package="mdn")

PRIORS = ("mixture", "normal")
LIKELIHOODS = ("bernoulli",)
# Of each image when rows are judged in `fit`; the same ones in every epoch.
VALIDATION_DRAWS = 16


class Terms(NamedTuple):
    """The evidence lower bound of each image in two parts: reconstruction - kl.

    Attributes:
        reconstruction: [B], E_q log p(x | z), nats.
        kl: [B], KL(q(z | x) || p(z)) in nats; an estimate, which may be negative, where the prior
            is a mixture.
    """

    reconstruction: tf.Tensor
    kl: tf.Tensor

    @property
    def elbo(self) -> tf.Tensor:
        """[B], nats per image."""
        return self.reconstruction - self.kl


@register
class VAE(TrainedModel):
    """A variational autoencoder p(z) p(x | z) of images of zeros and ones.

    The posterior q(z | x) is a normal with a diagonal covariance. The prior p(z) is a mixture of K
    multivariate normals with full covariances, all of whose parameters are trained with the rest,
    or a standard normal.

    Args:
        event_size: D, the number of pixels.
        latent_size: L, the length of z.
        prior: "mixture", or "normal" for N(0, I).
        components: K, where the prior is a mixture.
        spread: standard deviation of the first means of the components; the first covariances
            are the identity.
        decoder_widths: units of the decoder's hidden layers.
        activation: name of the Keras activation of the decoder.
        dropout: share of the decoder's units to drop while training.
        likelihood: of the pixels given z: "bernoulli", independent.
        kl_warmup: train steps over which the weight of the KL in the loss rises from zero to one,
            so that the posterior spreads out before the prior holds it together.
        min_scale: the floor of the standard deviations of posterior and prior.
        backbone: the encoder's hidden layers, a Keras model or layer [B, D] -> [B, H]; default
            `mdn.backbones.MLP()`.
        **kwargs: as for any Keras model.

    Called on images [B, D] it returns their reconstruction, [B, D]: the probabilities of the
    pixels at the posterior mean. What is random takes a `seed`, and is a function of it.

    Raises:
        ConfigError: an argument is out of its range.

    Source:
        Kingma and Welling (2014), Auto-Encoding Variational Bayes, arXiv 1312.6114; the mixture
        prior as in Tomczak and Welling (2018), VAE with a VampPrior, arXiv 1705.07120.
    """

    tracked = ("loss", "elbo", "reconstruction", "kl", "gradient_norm")

    def __init__(
        self,
        event_size: int,
        latent_size: int = 2,
        *,
        prior: str = "mixture",
        components: int = 10,
        spread: float = 1.0,
        decoder_widths: Sequence[int] = (64, 64),
        activation: str = "gelu",
        dropout: float = 0.0,
        likelihood: str = "bernoulli",
        kl_warmup: int = 0,
        min_scale: float = 1e-3,
        backbone: layers.Layer | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, value, least in [
            ("event_size", event_size, 1),
            ("latent_size", latent_size, 1),
            ("kl_warmup", kl_warmup, 0),
        ]:
            if value < least:
                raise ConfigError(f"{name}={value}: must be at least {least}")
        for name, choice, known in [
            ("prior", prior, PRIORS),
            ("likelihood", likelihood, LIKELIHOODS),
        ]:
            if choice not in known:
                raise ConfigError(
                    f"{name}={choice!r} is unknown: choose one of {', '.join(known)}"
                )
        self._config: dict[str, Any] = {
            "event_size": int(event_size),
            "latent_size": int(latent_size),
            "prior": prior,
            "components": int(components),
            "spread": float(spread),
            "decoder_widths": list(decoder_widths),
            "activation": activation,
            "dropout": float(dropout),
            "likelihood": likelihood,
            "kl_warmup": int(kl_warmup),
            "min_scale": float(min_scale),
        }
        self.event_size, self.latent_size = int(event_size), int(latent_size)
        self.backbone = MLP() if backbone is None else backbone
        scale = {"min_scale": min_scale, "dtype": tf_keras.backend.floatx()}
        self.posterior_head = Diag(latent_size, kernel_scale=1.0, name="posterior", **scale)
        unit = MultivariateNormalDiag(tf.zeros([latent_size]), tf.ones([latent_size]))
        self.posterior_head.bias.assign(self.posterior_head.parameters(unit))
        # A head without features: its bias alone is what makes the density.
        self.prior_head: Mixture | None = None
        if prior == "mixture":
            self.prior_head = Mixture(latent_size, components, name="prior", **scale)
            self.prior_head.bias.assign(self.prior_head.parameters(self._start()))
        self.decoder = MLP(decoder_widths, activation, dropout, name="decoder")
        self.pixels = layers.Dense(event_size, dtype=tf_keras.backend.floatx(), name="pixels")
        self.noise = add_seed_state(self)
        self(tf.zeros([1, event_size]))  # makes every weight

    def _start(self) -> GaussianMixture:
        """Return K components with random means, drawn from NumPy's global stream."""
        k, size = self._config["components"], self.latent_size
        loc = np.random.normal(scale=self._config["spread"], size=[k, size])
        loc = tf.constant(loc, tf.float32)
        return GaussianMixture(tf.zeros([k]), loc, tf.eye(size, batch_shape=[k]))

    def adapt(self, images: np.ndarray) -> None:
        """Start the decoder at the share of ones of each pixel; give it train images only.

        Args:
            images: [N, D] of zeros and ones.

        Raises:
            DataError: other values, or another shape.
        """
        images = check_images(images, self.event_size)
        share = (images.sum(axis=0) + 0.5) / (len(images) + 1.0)
        self.pixels.bias.assign(np.log(share) - np.log1p(-share))

    # ------------------------------------------------------------------ the model

    @property
    def prior(self) -> GaussianMixture | MultivariateNormalDiag:
        """p(z), event [L]: as trained so far."""
        if self.prior_head is None:
            return MultivariateNormalDiag(
                tf.zeros([self.latent_size]), tf.ones([self.latent_size])
            )
        return self.prior_head.distribution(self.prior_head.bias)

    def posterior(self, images: Any, training: bool | None = None) -> MultivariateNormalDiag:
        """Return q(z | x) of images [B, D]: batch [B], event [L]."""
        images = tf.cast(images, tf_keras.backend.floatx())
        return self.posterior_head(self.backbone(images, training=training))

    def logits(self, z: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        """Return the log odds of the pixels, [.., D], given z [.., L]."""
        return self.pixels(self.decoder(z, training=training))

    def decode(self, z: Any) -> tf.Tensor:
        """Return the probabilities of the pixels, [.., D], given z [.., L]."""
        return tf.sigmoid(self.logits(tf.cast(z, tf_keras.backend.floatx())))

    def sample(self, n: Any, seed: Any) -> tuple[tf.Tensor, tf.Tensor]:
        """Draw images: z from the prior, and pixels from the likelihood.

        Args:
            n: number of images.
            seed: int32 [2]; the same draws again on every device.

        Returns:
            The probabilities of the pixels and the zeros and ones drawn from them, both [n, D].
        """
        seeds = tf.random.split(seed, 2, "philox")
        probabilities = self.decode(draw(self.prior.mixture_parameters(), n, seeds[0]))
        level = tf.random.stateless_uniform(tf.shape(probabilities), seeds[1], alg="philox")
        return probabilities, tf.cast(level < probabilities, probabilities.dtype)

    # ------------------------------------------------------------------ its bounds

    def terms(self, images: Any, n: Any, seed: Any, training: bool | None = None) -> Terms:
        """Return the terms of each image's ELBO, from n draws of z.

        The entropy of the posterior, and its cross entropy to a standard normal, are closed forms;
        the rest is a mean over the draws.

        Args:
            images: [B, D].
            n: S, draws of z for each image.
            seed: int32 [2].
            training: whether dropout is on.
        """
        posterior = self.posterior(images, training)
        z = self._draw_posterior(posterior, n, seed)  # [S, B, L]
        reconstruction = tf.reduce_mean(self._log_likelihood(images, z, training), axis=0)
        log_scale = tf.math.log(posterior.scale_diag)
        entropy = tf.reduce_sum(log_scale + 0.5 * (1.0 + LOG_2_PI), axis=-1)  # [B]
        if self.prior_head is None:
            square = tf.square(posterior.loc) + tf.square(posterior.scale_diag)
            log_prior = -0.5 * tf.reduce_sum(square + LOG_2_PI, axis=-1)  # [B]
        else:
            log_prior = tf.reduce_mean(self._log_prior(z), axis=0)
        return Terms(reconstruction, -entropy - log_prior)

    def elbo(self, images: Any, n: Any, seed: Any) -> tf.Tensor:
        """Return the evidence lower bound of each image from n draws of z: [B] nats."""
        return self.terms(images, n, seed).elbo

    def log_prob(self, images: Any, n: Any, seed: Any) -> tf.Tensor:
        """Return the importance-weighted bound on log p(x) from n draws of z: [B] nats.

        On average it is between the ELBO and log p(x), the nearer to it the more draws.

        Args:
            images: [B, D].
            n: S, draws of z for each image.
            seed: int32 [2].

        Source:
            Burda et al. (2016), Importance Weighted Autoencoders, arXiv 1509.00519.
        """
        log_weight = self.log_weights(images, n, seed)
        return tf.reduce_logsumexp(log_weight, axis=0) - tf.math.log(tf.cast(n, log_weight.dtype))

    def log_weights(self, images: Any, n: Any, seed: Any) -> tf.Tensor:
        """Return log p(x | z) + log p(z) - log q(z | x) of n draws of z, [n, B] nats.

        Their mean over the draws is the ELBO.
        """
        posterior = self.posterior(images)
        z = self._draw_posterior(posterior, n, seed)
        return self._log_likelihood(images, z) + self._log_prior(z) - posterior.log_prob(z)

    def _draw_posterior(self, posterior: MultivariateNormalDiag, n: Any, seed: Any) -> tf.Tensor:
        shape = tf.concat([[n], tf.shape(posterior.loc)], axis=0)
        noise = tf.random.stateless_normal(shape, seed, alg="philox")
        return posterior.loc + posterior.scale_diag * noise  # [S, B, L]

    def _log_likelihood(
        self, images: Any, z: tf.Tensor, training: bool | None = None
    ) -> tf.Tensor:
        logits = self.logits(z, training)  # [S, B, D]
        images = tf.cast(images, logits.dtype)
        return tf.reduce_sum(images * logits - tf.math.softplus(logits), axis=-1)  # [S, B]

    def _log_prior(self, z: tf.Tensor) -> tf.Tensor:
        """Return log p(z), [..], of z [.., L].

        Equal to `prior.log_prob`, which solves a triangular system for every pair of a draw and a
        component; these share K factors, and are solved for all draws at once.
        """
        logits, loc, scale_tril = self.prior.mixture_parameters()
        flat = tf.reshape(z, [-1, self.latent_size])
        residual = tf.transpose(flat) - loc[..., tf.newaxis]  # [K, L, S B]
        white = tf.linalg.triangular_solve(scale_tril, residual)
        log_diag = tf.math.log(tf.linalg.diag_part(scale_tril))  # [K, L]
        log_scale = tf.reduce_sum(log_diag + 0.5 * LOG_2_PI, axis=-1)  # [K]
        component = -0.5 * tf.reduce_sum(tf.square(white), axis=1) - log_scale[:, tf.newaxis]
        weighted = component + tf.nn.log_softmax(logits)[:, tf.newaxis]  # [K, S B]
        return tf.reshape(tf.reduce_logsumexp(weighted, axis=0), tf.shape(z)[:-1])

    # ------------------------------------------------------------------ Keras

    @property
    def xla(self) -> bool:
        return getattr(self.backbone, "xla", True)

    def compile(self, optimizer: Any = "adam", loss: Any = None, **kwargs: Any) -> None:
        """Configure training as in Keras; what is minimised is minus the ELBO.

        Args:
            optimizer: a Keras optimizer or its name.
            loss: None, or "nll", which minus the ELBO bounds from above.
            **kwargs: as for `MDN.compile`.

        Raises:
            ConfigError: another loss.
        """
        if loss not in (None, "nll"):
            raise ConfigError(f"loss={loss!r}: a VAE minimises minus the ELBO; leave loss out")
        super().compile(optimizer, **kwargs)

    def call(self, inputs: Any, training: bool | None = None) -> tf.Tensor:
        return tf.sigmoid(self.logits(self.posterior(inputs, training).loc, training))

    def forward(self, x: Any, y: Any, sample_weight: Any, training: bool) -> tuple[tf.Tensor, Any]:
        # Rows of NaN fill up the last batch of an epoch.
        counted = tf.logical_not(tf.reduce_any(tf.math.is_nan(x if y is None else y), axis=-1))
        x = tf.where(counted[:, tf.newaxis], x, tf.zeros_like(x))
        if training:
            step = tf.cast(self.noise[1], tf.float32)
            terms = self.terms(x, 1, next_seed(self.noise), training=True)
            # Of a step without warm-up, or after it, exactly one.
            kl_weight = tf.minimum((step + 1.0) / (self._config["kl_warmup"] + 1.0), 1.0)
        else:
            terms = self.terms(x, VALIDATION_DRAWS, tf.constant([0, 0]))
            kl_weight = tf.constant(1.0)
        weight = tf.cast(counted, terms.kl.dtype)
        count = tf.maximum(tf.reduce_sum(weight), 1.0)
        if sample_weight is not None:
            weight *= tf.cast(sample_weight, weight.dtype)
        total = tf.reduce_sum(weight * (kl_weight * terms.kl - terms.reconstruction))
        penalty = tf.add_n(
            [tf.cast(term, total.dtype) for term in self.losses] or [tf.zeros_like(total)]
        )
        values = {
            "loss": total / count + penalty,
            "elbo": tf.reduce_sum(weight * terms.elbo) / count,
            "reconstruction": tf.reduce_sum(weight * terms.reconstruction) / count,
            "kl": tf.reduce_sum(weight * terms.kl) / count,
        }
        for name, value in values.items():
            getattr(self._trackers, name).update_state(value, sample_weight=count)
        return total / self._per_replica(count) + penalty, None

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any) -> dict[str, Any]:
        return {metric.name: metric.result() for metric in self.metrics}

    def as_arrays(
        self, x: Any, y: Any = None, sample_weight: Any = None
    ) -> tuple[np.ndarray, ...]:
        images = check_images(x, self.event_size)
        return (images,) if sample_weight is None else (images, images, np.asarray(sample_weight))

    def arrays(self, rows: Rows) -> tuple[Any, ...]:
        """Return the targets of rows as images; a VAE reads no features."""
        return self.as_arrays(rows.y, None, rows.weight)

    def row_losses(self, rows: Rows) -> np.ndarray:
        return -self.map(lambda images: self.elbo(images, 1, [0, 0]), rows.y)

    def map(self, function: Callable, images: Any, batch_size: int = 256) -> np.ndarray:
        """Return a function of images, [b, D] -> [b, ..], of any number of them: [N, ..].

        Args:
            function: of images, which is compiled.
            images: [N, D] of zeros and ones.
            batch_size: b at most.

        Raises:
            DataError: there are no images, or they are not of zeros and ones.
        """
        compiled = tf.function(function, reduce_retracing=True, autograph=False)
        images = check_images(images, self.event_size)
        if not len(images):
            raise DataError("there are no images: give at least one")
        parts = [
            compiled(tf.constant(images[start : start + batch_size])).numpy()
            for start in range(0, len(images), batch_size)
        ]
        return np.concatenate(parts)

    # ------------------------------------------------------------------ saving

    def get_config(self) -> dict[str, Any]:
        backbone = tf_keras.saving.serialize_keras_object(self.backbone)
        precision = self.decoder.dtype_policy.name
        own = {"name": self.name, **self._config, **self.names_config()}
        return {**own, "backbone": backbone, "precision": precision}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> VAE:
        config = dict(config)
        backbone = tf_keras.saving.deserialize_keras_object(config["backbone"], custom_objects)
        now = tf_keras.mixed_precision.global_policy()
        # The decoder takes the policy that is in force when it is made, as a backbone does.
        tf_keras.mixed_precision.set_global_policy(config.pop("precision"))
        names = {"column_names": config.pop("column_names", {})}
        try:
            model = cls(**{**config, "backbone": backbone})
        finally:
            tf_keras.mixed_precision.set_global_policy(now)
        model.restore_names(names)
        return model

    def get_build_config(self) -> dict[str, Any]:
        return {}

    def build_from_config(self, config: dict[str, Any]) -> None:
        """Do nothing: the constructor has made every weight."""
