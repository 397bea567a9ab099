"""Rows without features: points given one by one, and draws from known Gaussian mixtures.

Shape letters: N rows, D event size, K components.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import linalg, special

from mdn.data.rows import Data, Rows
from mdn.data.simulators import Simulator
from mdn.errors import ConfigError, DataError

# For the entropy of a mixture: nodes of the quadrature in each dimension, or else draws.
_NODES, _DRAWS = 60, 400_000


class Points:
    """Rows that stand in the config: the same ones to learn from and to be judged by.

    Args:
        y: [N, D], or [N] for D = 1; None marks a missing entry.

    Raises:
        ConfigError: there are none.
        DataError: they are not rows of numbers of one length.
    """

    def __init__(self, y: Sequence[Any] | None = None) -> None:
        if y is None:
            raise ConfigError("data.y is not set: give rows, such as data.y=[[1,2],[3,4]]")
        try:
            values = np.array(y, np.float64)  # None becomes NaN
        except (TypeError, ValueError) as error:
            raise DataError(f"data.y={y}: must be rows of numbers, all as long") from error
        if not values.size or values.ndim > 2:
            raise DataError(f"data.y has shape {list(values.shape)}: give [N, D] or [N]")
        self.y = values.reshape(len(values), -1)

    def load(self) -> Data:
        rows = Rows(np.zeros([len(self.y), 0]), self.y)
        return Data(rows, rows, rows, (), _names(self.y.shape[1]))


class Gaussians(Simulator):
    """Draws from a mixture of K normals; with K = 1 from a normal.

    Args:
        weights: [K], positive; they are divided by their sum.
        loc: [K, D].
        covariance: [K, D, D].
        **kwargs: as for any simulator.

    Raises:
        ConfigError: the shapes do not agree, or a covariance is not positive definite.
    """

    features = ()

    def __init__(
        self,
        weights: Sequence[float] = (1.0,),
        loc: Sequence[Sequence[float]] = ((0.0,),),
        covariance: Sequence[Sequence[Sequence[float]]] = (((1.0,),),),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        try:
            share, self.loc = np.array(weights, np.float64), np.array(loc, np.float64)
            self.covariance = np.array(covariance, np.float64)
            k, d = self.loc.shape
            if share.shape != (k,) or self.covariance.shape != (k, d, d) or (share <= 0).any():
                raise ValueError
            self.scale_tril = np.linalg.cholesky(self.covariance)
        except (ValueError, TypeError, np.linalg.LinAlgError) as error:
            raise ConfigError(
                "data: weights [K], loc [K, D] and covariance [K, D, D] must agree, with positive "
                "weights and positive definite covariances"
            ) from error
        self.weights = share / share.sum()
        self.targets = _names(d)  # type: ignore[misc]

    def draw(self, rows: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        component = rng.choice(len(self.weights), size=rows, p=self.weights)
        noise = rng.standard_normal((rows, self.loc.shape[1]))
        y = self.loc[component] + np.einsum("nij,nj->ni", self.scale_tril[component], noise)
        return np.zeros([rows, 0]), y

    def log_prob(self, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        d = self.loc.shape[1]
        joint = []
        for weight, loc, scale in zip(self.weights, self.loc, self.scale_tril, strict=True):
            z = linalg.solve_triangular(scale, (y - loc).T, lower=True)  # [D, N]
            constant = np.log(np.diag(scale)).sum() + 0.5 * d * math.log(2 * math.pi)
            joint.append(np.log(weight) - 0.5 * (z**2).sum(axis=0) - constant)
        return special.logsumexp(joint, axis=0)

    def _integrate_entropy(self) -> float:
        k, d = self.loc.shape
        if k == 1:
            log_diag = np.log(np.diagonal(self.scale_tril[0])).sum()
            return float(log_diag + 0.5 * d * (1 + math.log(2 * math.pi)))
        if d > 2:  # Monte Carlo: its standard error is the spread of log p, about sqrt(D / 2N)
            _, y = self.draw(_DRAWS, np.random.default_rng([0, 0x48]))
            return -float(self.log_prob(y, np.zeros([1, 0])).mean())
        node, weight = np.polynomial.hermite_e.hermegauss(_NODES)
        nodes = np.stack(np.meshgrid(*[node] * d, indexing="ij"), -1).reshape(-1, d)
        weights = np.prod(np.stack(np.meshgrid(*[weight] * d, indexing="ij"), -1), axis=-1)
        weights = weights.ravel() / weights.sum()
        entropy = [
            -weights @ self.log_prob(loc + nodes @ scale.T, np.zeros([1, 0]))
            for loc, scale in zip(self.loc, self.scale_tril, strict=True)
        ]
        return float(self.weights @ np.array(entropy))


def random_gaussians(
    dimensions: int = 10,
    components: int = 3,
    separation: float = 2.0,
    truth_seed: int = 0,
    rows: int = 20_000,
    validation_rows: int = 2_000,
    test_rows: int = 10_000,
    seed: int = 0,
) -> Gaussians:
    """Return draws from a mixture of K normals in D dimensions that a seed makes up.

    Means are N(0, separation^2 I), covariances A A^T / D + I / 10 with standard normal A, and
    weights are between 1 / 2K and 2 / K before they are divided by their sum.

    Args:
        dimensions: D.
        components: K.
        separation: standard deviation of the means.
        truth_seed: of the mixture.
        rows: number of train rows.
        validation_rows: number of validation rows.
        test_rows: number of test rows.
        seed: of the rows.
    """
    rng = np.random.default_rng([truth_seed, 0x4D49])
    k, d = components, dimensions
    factor = rng.standard_normal((k, d, d))
    covariance = factor @ factor.swapaxes(1, 2) / d + 0.1 * np.eye(d)
    return Gaussians(
        (rng.uniform(0.5, 2.0, k) / k).tolist(),
        (separation * rng.standard_normal((k, d))).tolist(),
        covariance.tolist(),
        rows=rows,
        validation_rows=validation_rows,
        test_rows=test_rows,
        seed=seed,
    )


def _names(dimensions: int) -> tuple[str, ...]:
    return ("y",) if dimensions == 1 else tuple(f"y_{d + 1}" for d in range(dimensions))
