"""The known answer of a VAE: how much a mixture prior gains over a standard normal one.

Shape letters: B batch, N rows.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras
from omegaconf import DictConfig
from scipy import stats

from mdn.config import make
from mdn.data.pipeline import epoch_order
from mdn.data.rows import Data
from mdn.preparation import compile_model
from mdn.tasks import get_task
from mdn.vae import PRIORS, VAE

log = logging.getLogger(__name__)

# Of each image; fewer than for one fit, as their noise averages out over images and seeds.
DRAWS = 128


class PriorComparison:
    """Trains the VAE of a config with either prior, otherwise the same, and compares the ELBOs.

    Each seed has its own split, weights and noise, which the two priors share as far as they can.
    Each fit has all epochs of the config, without early stopping. One XLA program, which trains
    for a whole fit, serves the seeds one after the other; one for each prior runs at a time.

    Args:
        latent_sizes: to compare at.
        seeds: how many, at each of them; the first is that of the config.
    """

    def __init__(self, latent_sizes: Sequence[int] = (2, 8), seeds: int = 5) -> None:
        self.latent_sizes = list(latent_sizes)
        self.seeds = seeds

    def __call__(self, config: DictConfig) -> dict[str, float]:
        """Return metrics, where <n> is a latent size.

        comparison/elbo_mixture_<n>, comparison/elbo_normal_<n>: test ELBO in nats per image, the
            mean over the seeds.
        comparison/elbo_gain_<n>, comparison/elbo_gain_se_<n>: the mean over the seeds of their
            paired difference, and its standard error.
        comparison/p_value_<n>: of a paired one-sided t-test that there is no gain.
        comparison/seeds, comparison/seconds.
        """
        start = time.perf_counter()
        seeds = [config.seed + i for i in range(self.seeds)]
        sources: list[Data] = [make(config, "data", seed=seed).load() for seed in seeds]
        fits = {
            (size, prior): Fit(config, sources, seeds, latent_size=size, prior=prior)
            for size in self.latent_sizes
            for prior in PRIORS
        }
        # XLA uses one core for nets as small as these, and holds no lock while it runs.
        with ThreadPoolExecutor(max_workers=2) as pool:
            elbo = dict(zip(fits, pool.map(Fit.run, fits.values()), strict=True))
        metrics: dict[str, float] = {}
        for size in self.latent_sizes:
            mixture, normal = elbo[size, "mixture"], elbo[size, "normal"]
            gain = mixture - normal  # [seeds]
            test = stats.ttest_rel(mixture, normal, alternative="greater")
            metrics |= {
                f"comparison/elbo_mixture_{size}": float(mixture.mean()),
                f"comparison/elbo_normal_{size}": float(normal.mean()),
                f"comparison/elbo_gain_{size}": float(gain.mean()),
                f"comparison/elbo_gain_se_{size}": float(stats.sem(gain)),
                f"comparison/p_value_{size}": float(test.pvalue),
            }
            log.info(
                "latent size %d: the mixture prior gains %.3f nats per image (p = %.2g, %d seeds)",
                *(size, gain.mean(), test.pvalue, self.seeds),
            )
        metrics["comparison/seeds"] = float(self.seeds)
        metrics["comparison/seconds"] = time.perf_counter() - start
        return metrics


class Fit:
    """One VAE to train from several seeds; the variables and the program are made once.

    Args:
        config: the config of the run.
        sources: the rows of each seed, equally many of them.
        seeds: of the weights and the order of the rows.
        **options: in place of those of `config.model`.
    """

    def __init__(
        self, config: DictConfig, sources: list[Data], seeds: list[int], **options: Any
    ) -> None:
        self.config, self.sources, self.seeds = config, sources, seeds
        self.starts = []
        task = get_task(config)
        for data, seed in zip(sources, seeds, strict=True):
            tf_keras.utils.set_random_seed(seed)
            tf_keras.mixed_precision.set_global_policy(config.trainer.precision)
            try:
                self.model: VAE = task.build(config, data, **options)
            finally:
                tf_keras.mixed_precision.set_global_policy("float32")
            self.starts.append(self.model.get_weights())
        steps = len(sources[0].train) // config.trainer.batch_size
        compile_model(self.model, config, steps)
        self.model.optimizer.build(self.model.trainable_variables)
        self.program = tf.function(self._train, jit_compile=True, autograph=False)
        self.elbo = tf.function(self._mean_elbo, autograph=False)

    def run(self) -> np.ndarray:
        """Return the test ELBO of each seed, nats per image."""
        optimizer = self.model.optimizer
        fresh = [variable.numpy() for variable in optimizer.variables]
        values = []
        for data, seed, start in zip(self.sources, self.seeds, self.starts, strict=True):
            self.model.set_weights(start)
            for variable, value in zip(optimizer.variables, fresh, strict=True):
                variable.assign(value)
            (images,) = self.model.arrays(data.train)
            self.program(tf.constant(images), self._order(len(images), seed))
            (held_out,) = self.model.arrays(data.test)
            values.append(float(self.elbo(tf.constant(held_out))))
        return np.array(values)

    def _mean_elbo(self, images: tf.Tensor) -> tf.Tensor:
        return tf.reduce_mean(self.model.elbo(images, DRAWS, tf.constant([0, 1])))

    def _order(self, n: int, seed: int) -> tf.Tensor:
        """Return the rows of every batch, those of the run with this seed: [steps, B]."""
        trainer = self.config.trainer
        epochs = [epoch_order(n, trainer.batch_size, seed, e) for e in range(trainer.epochs)]
        return tf.concat(epochs, axis=0)

    def _train(self, images: tf.Tensor, order: tf.Tensor) -> None:
        def step(i: tf.Tensor) -> tuple[tf.Tensor]:
            self.model.train_step((tf.gather(images, order[i]),))
            return (i + 1,)

        tf.while_loop(lambda i: i < order.shape[0], step, [tf.constant(0)])
