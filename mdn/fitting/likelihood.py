"""The negative log likelihood of rows, as a function of unconstrained numbers.

Shape letters: N rows, B batch, S starts, P unconstrained numbers, D event size, K components.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow_probability import distributions as tfd

from mdn.data.resolution import resolution
from mdn.density import MultivariateNormalDiag, MultivariateNormalTriL
from mdn.density.queries import Queries
from mdn.errors import ConfigError
from mdn.fitting.checks import example
from mdn.fitting.start import cluster
from mdn.fitting.trainable import LOCATION_SCALE, SCALE, Parameter, Trainable, as_array

# Whose likelihood knows of its rows nothing but their mean and covariance.
_NORMAL = (tfd.Normal, MultivariateNormalDiag, MultivariateNormalTriL)
# Rows whose log densities are computed at a time.
_ROWS = 100_000


class Likelihood:
    """The NLL of rows under a class of distributions, and where its minimisation may start.

    Location-scale families are learned in units of the columns' means and standard deviations,
    scale families in those of the latter.

    Args:
        kind: the class.
        y: [N, *batch, *event]; NaN marks a missing entry.
        weight: [N].
        layout: of the parameters.
        fixed: name -> array, in the units of y.
        components: K, of a mixture.
        dtype: of the computation.
        floor: [D], the smallest scales of a mixture, in standardised units.
        whole: the NLL is of all rows at once, never of a batch of them.

    Attributes:
        jacobian: the NLL in the units of y minus what `nll` returns.
    """

    def __init__(
        self,
        kind: type[tfd.Distribution],
        y: np.ndarray,
        weight: np.ndarray,
        layout: Mapping[str, Parameter],
        fixed: Mapping[str, np.ndarray],
        components: int | None,
        dtype: tf.DType,
        floor: Any = 0.0,
        whole: bool = True,
    ) -> None:
        self.components, self.dtype, self.layout = components, dtype, layout
        self.origin, self.unit = np.zeros(y.shape[1:]), np.ones(y.shape[1:])
        self.floor = floor
        self.affine = issubclass(kind, (*LOCATION_SCALE, *SCALE))
        if self.affine:
            spread = np.nanstd(y, axis=0)
            self.unit = np.where(spread > 0.0, spread, 1.0)
        if issubclass(kind, LOCATION_SCALE):
            self.origin = np.nanmean(y, axis=0)
        held = {name: self._standardise(name, value) for name, value in fixed.items()}
        self.trainable = Trainable(kind, layout, held, dtype)
        self.z = (y - self.origin) / self.unit
        weight = weight / weight.mean()
        missing = np.isnan(y)
        jacobian = (~missing * np.log(self.unit)).reshape(len(y), -1).sum(axis=1)
        self.jacobian = float(weight @ jacobian / len(y))
        rows = self.z
        if whole and kind in _NORMAL and not missing.any():
            rows, weight = _with_equal_moments(rows, weight), np.ones(2 * max(1, y[0].size))
        self._size = len(rows)
        # One row more, of no weight, fills up the last mini-batch.
        rows = np.concatenate([rows, rows[:1]])
        event_rank = len(example(kind, layout, dtype).event_shape)
        counted = ~find_absent(rows, event_rank)  # [N + 1, *batch]
        counted = counted * np.append(weight, 0.0).reshape(-1, *[1] * (counted.ndim - 1))
        rows = rows if issubclass(kind, Queries) else fill(rows)
        zeros = self.trainable.distribution(tf.zeros([self.trainable.size], dtype))
        self._rows = tf.cast(tf.constant(rows), zeros.dtype)
        self._counted = tf.constant(counted, dtype)
        own = issubclass(kind, Queries)
        self._options = {"complete": not missing.any()} if own else {}

    def nll(self, position: tf.Tensor, batch: tf.Tensor | None = None) -> tf.Tensor:
        """Return the NLL [S] of positions [S, P], in nats per row.

        Args:
            position: [S, P].
            batch: [B], row numbers; the sum over them is divided by B. None: all rows.
        """
        if batch is None:
            rows, counted, size = self._rows[:-1], self._counted[:-1], self._size
        else:
            rows, counted = tf.gather(self._rows, batch), tf.gather(self._counted, batch)
            size = batch.shape[0]
        distribution = self.trainable.distribution(position)
        log_prob = distribution.log_prob(rows[:, tf.newaxis], **self._options)  # [n, S, *batch]
        counted = counted[:, tf.newaxis]
        terms = tf.where(counted > 0.0, counted * log_prob, tf.zeros_like(log_prob))
        axes = [axis for axis in range(terms.shape.rank) if axis != 1]
        return -tf.reduce_sum(terms, axis=axes) / size

    def parameters(self, position: np.ndarray) -> dict[str, np.ndarray]:
        """Return the parameters of positions [S, P] in the units of y: name -> [S, *shape]."""
        values = self.trainable.parameters(tf.constant(position))
        return {name: self._restore(name, value.numpy()) for name, value in values.items()}

    def starts(
        self, initial: Any, given: Mapping[str, Any], restarts: int, seed: int
    ) -> np.ndarray:
        """Return positions [S, P] to start from.

        Args:
            initial: as for `fit_distribution`.
            given: name -> value or callable, where `initial` is by name.
            restarts: S.
            seed: of clusters, random numbers, and what the callables are given.
        """
        rng = np.random.default_rng([seed, 0x53])
        positions = []
        for i in range(restarts):
            default = np.zeros(self.trainable.size)
            if isinstance(initial, str):
                default = rng.standard_normal(self.trainable.size)
            elif self.components is not None:
                default = self.trainable.position(self._clusters(rng), default)
            elif i > 0:
                default = rng.standard_normal(self.trainable.size)
            elif issubclass(self.trainable.kind, LOCATION_SCALE):
                scales = [name for name in self.trainable.free if name.startswith("scale")]
                ones = {name: as_array(name, 1.0, self.layout[name]) for name in scales}
                default = self.trainable.position(ones, default)
            values: dict[str, np.ndarray] = {}
            for name in self.trainable.free:
                shape = self.layout[name].shape
                value = initial(name, shape, seed + i) if callable(initial) else given.get(name)
                if callable(value):
                    value = value(shape, seed + i)
                if value is not None:
                    value = as_array(name, value, self.layout[name])
                    values[name] = self._standardise(name, value)
            positions.append(self.trainable.position(values, default))
        return np.stack(positions).astype(self.dtype.as_numpy_dtype)

    def _clusters(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        start = cluster(self.z, self.components or 1, rng)
        values = {"logits": np.log(start.weights), "loc": start.loc}
        above = 1.5 * np.asarray(self.floor)  # the floor itself has no unconstrained number
        if "scale_diag" in self.layout:
            stddev = np.linalg.norm(start.scale_tril, axis=-1)
            values["scale_diag"] = np.maximum(stddev, above)
        else:
            scale_tril = start.scale_tril.copy()
            diagonal = np.einsum("kdd->kd", scale_tril)
            diagonal[:] = np.maximum(diagonal, above)
            values["scale_tril"] = scale_tril
        return values

    def _standardise(self, name: str, value: np.ndarray) -> np.ndarray:
        if name == "loc" and self.affine:
            return (value - self.origin) / self.unit
        return value / self._unit_of(name)

    def _restore(self, name: str, value: np.ndarray) -> np.ndarray:
        value = value * self._unit_of(name)
        return self.origin + value if name == "loc" and self.affine else value

    def _unit_of(self, name: str) -> np.ndarray | float:
        if not self.affine or not (name == "loc" or name.startswith("scale")):
            return 1.0
        return self.unit[..., np.newaxis] if name == "scale_tril" else self.unit


def _with_equal_moments(y: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return 2 D points with the weighted mean and covariance of y [N, ..], D its columns."""
    columns = y.reshape(len(y), -1)  # [N, D]
    mean = np.average(columns, axis=0, weights=weight)
    covariance = np.atleast_2d(np.cov(columns.T, aweights=weight, ddof=0))
    values, vectors = np.linalg.eigh(covariance)
    steps = np.sqrt(len(mean) * np.maximum(values, 0.0)) * vectors  # [D, D]
    return np.concatenate([mean + steps.T, mean - steps.T]).reshape(-1, *y.shape[1:])


def find_absent(y: np.ndarray, event_rank: int) -> np.ndarray:
    """Return [N, *batch], where nothing of an event in y [N, *batch, *event] is observed."""
    return np.isnan(y).reshape(*y.shape[: y.ndim - event_rank], -1).all(axis=-1)


def fill(y: np.ndarray) -> np.ndarray:
    """Return y [N, ..] with an observed entry of the same column wherever one is missing.

    For densities that take no NaN: it is in their domain, and its term can be left out.
    """
    columns = y.reshape(len(y), -1).T
    observed = [column[~np.isnan(column)][0] for column in columns]
    return np.where(np.isnan(y), np.reshape(observed, y.shape[1:]), y)


def find_floor(y: np.ndarray, min_scale: float) -> np.ndarray:
    """Return the floor of a mixture's scales [D], as shares of the standard deviations of y.

    Args:
        y: [N, D].
        min_scale: the floor, where the values of a column do not repeat on a grid.

    Raises:
        ConfigError: y is not [N, D], or the floor not positive.
    """
    if y.ndim != 2:
        raise ConfigError(f"y has shape {list(y.shape)}: a mixture needs [N, D]; [N, 1] for D = 1")
    if not min_scale > 0.0:
        raise ConfigError(f"min_scale={min_scale}: the floor of the scales must be positive")
    grid = np.array([resolution(column) for column in y.T]) / math.sqrt(12.0)
    return np.maximum(min_scale, grid / np.maximum(np.nanstd(y, axis=0), np.finfo(float).tiny))


def row_log_prob(distribution: tfd.Distribution, y: np.ndarray) -> np.ndarray:
    """Return the log density of each row, [N] nats: summed over a batch, marginalised over NaN.

    Args:
        distribution: batch [*batch], event [*event].
        y: [N, *batch, *event].
    """
    absent = find_absent(y, len(distribution.event_shape))
    rows = y if isinstance(distribution, Queries) else fill(y)
    log_prob = np.concatenate(
        [
            distribution.log_prob(tf.cast(rows[i : i + _ROWS], distribution.dtype)).numpy()
            for i in range(0, len(rows), _ROWS)
        ]
    )
    log_prob = np.where(absent, 0.0, log_prob.astype(np.float64))
    return log_prob.reshape(len(y), -1).sum(axis=1)
