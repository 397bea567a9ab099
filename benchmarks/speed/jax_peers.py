"""JAX: a whole epoch as one jitted `lax.scan` over stacked batches, with Adam written out.

The rows are permuted by NumPy, as XLA's sort on a CPU would take a fifth of the epoch of a small
network, and gathered once an epoch inside the program. The density comes in three ways, of which
the last is as far as we know the fastest there is:

- `solve`: triangles [B, K, D, D] and `jax.scipy.linalg.solve_triangular`;
- `columns`: the substitution unrolled, a column of all triangles at a time;
- `rows`: the same with the batch innermost, [D, K, B], from the first layer on, so that each step
  of the substitution is one long loop. Parts are taken with `split`, whose gradient is a
  concatenation, and not by slices, whose gradients are as many padded sums.

Shape letters: N rows, B batch, F features, H hidden, D event size, K components, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.speed.workloads import (
    BETAS,
    EPSILON,
    LEARNING_RATE,
    LOG_2_PI,
    MIN_SCALE,
    Problem,
    Workload,
    column_order,
    column_sizes,
    row_order,
)

BETA_1, BETA_2 = BETAS


class Jax:
    """The epoch, whatever the density.

    Args:
        problem: rows and weights.
        way: "solve", "columns" or "rows".
        precision: the triangles are factors of the precision; with "rows" alone.
    """

    def __init__(self, problem: Problem, way: str, precision: bool = False) -> None:
        self.problem = problem
        w = problem.workload
        if way == "rows":
            self._loss = _rows_loss(w, precision)
            weights = problem.start(column_order(w.targets), components_last=True)
        elif way == "columns":
            self._loss = _columns_loss(w)
            weights = problem.start(column_order(w.targets))
        else:
            self._loss = _solve_loss(w)
            weights = problem.start(row_order(w.targets))
        self._weights = [jnp.asarray(weight) for weight in weights]
        zeros = [jnp.zeros_like(weight) for weight in self._weights]
        self._state = (self._weights, zeros, [*map(jnp.copy, zeros)], jnp.zeros((), jnp.int32))
        self._x, self._y = jnp.asarray(problem.x), jnp.asarray(problem.y)
        self._epoch = jax.jit(_epoch(self._loss, w), donate_argnums=0)
        self._mean = jax.jit(self._loss)
        self._rng = np.random.default_rng(1)

    def train(self, epochs: int, shuffle: bool = True) -> None:
        w = self.problem.workload
        for _ in range(epochs):
            order = self._rng.permutation(w.rows) if shuffle else np.arange(w.rows)
            order = order[: w.steps * w.batch].astype(np.int32)
            self._state = self._epoch(
                self._state, order.reshape(w.steps, w.batch), self._x, self._y
            )
        jax.block_until_ready(self._state)

    def program(self) -> tuple[Callable, Any, tuple]:
        """Return the epoch, a function of the state and the rows; both; the rows in order."""
        w = self.problem.workload
        order = np.arange(w.steps * w.batch, dtype=np.int32).reshape(w.steps, w.batch)
        return _epoch(self._loss, w), self._state, (order, self._x, self._y)

    def loss(self, rows: int) -> float:
        return self.problem.mean(lambda x, y: self._mean(self._state[0], x, y), rows)


def _epoch(loss: Callable, w: Workload) -> Callable:
    def step(state: Any, batch: Any) -> Any:
        weights, first, second, count = state
        gradients = jax.grad(loss)(weights, *batch)
        count += 1
        power = count.astype(jnp.float32)
        rate = LEARNING_RATE * jnp.sqrt(1.0 - BETA_2**power) / (1.0 - BETA_1**power)
        first = jax.tree.map(lambda m, g: m + (1.0 - BETA_1) * (g - m), first, gradients)
        second = jax.tree.map(lambda v, g: v + (1.0 - BETA_2) * (g * g - v), second, gradients)
        weights = jax.tree.map(
            lambda p, m, v: p - rate * m / (jnp.sqrt(v) + EPSILON), weights, first, second
        )
        return (weights, first, second, count), None

    def epoch(state: Any, order: Any, x: Any, y: Any) -> Any:
        return lax.scan(step, state, (x[order], y[order]))[0]

    return epoch


def _network(weights: list, x: Any) -> Any:
    """Return [B, P] of x [B, F]."""
    *layers, kernel, bias = weights
    hidden = x
    for i in range(0, len(layers), 2):
        hidden = jnp.tanh(hidden @ layers[i] + layers[i + 1])
    return hidden @ kernel + bias


def _network_batch_last(weights: list, x: Any) -> Any:
    """Return [P, B] of x [B, F]."""
    *layers, kernel, bias = weights
    hidden = x.T
    for i in range(0, len(layers), 2):
        hidden = jnp.tanh(layers[i].T @ hidden + layers[i + 1][:, jnp.newaxis])
    return kernel.T @ hidden + bias[:, jnp.newaxis]


def _split(values: Any, sizes: list[int], axis: int) -> list:
    return jnp.split(values, np.cumsum(sizes)[:-1].tolist(), axis=axis)


def _mixture_loss(logits: Any, squares: Any, log_det: Any, d: int, axis: int) -> Any:
    """Return the mean NLL of squared residuals and log det of the scales, [B, K] or [K, B]."""
    joint = logits - 0.5 * squares - log_det
    log_prob = jax.nn.logsumexp(joint, axis) - jax.nn.logsumexp(logits, axis)
    return 0.5 * d * LOG_2_PI - log_prob.mean()


def _solve_loss(w: Workload) -> Callable:
    k, d = w.components, w.targets
    rows, columns = np.tril_indices(d)

    def loss(weights: list, x: Any, y: Any) -> Any:
        raw = _network(weights, x)
        logits, loc, triangle = _split(raw, [k, k * d, k * len(rows)], axis=1)
        triangle = triangle.reshape(-1, k, len(rows))
        factor = jnp.zeros([len(x), k, d, d]).at[..., rows, columns].set(triangle)
        diagonal = MIN_SCALE + jax.nn.softplus(jnp.diagonal(factor, axis1=-2, axis2=-1))
        factor = jnp.where(jnp.eye(d, dtype=bool), diagonal[..., jnp.newaxis], factor)
        residual = y[:, jnp.newaxis] - loc.reshape(-1, k, d)  # [B, K, D]
        z = jax.scipy.linalg.solve_triangular(factor, residual[..., jnp.newaxis], lower=True)
        squares = jnp.square(z[..., 0]).sum(axis=-1)
        return _mixture_loss(logits, squares, jnp.log(diagonal).sum(axis=-1), d, axis=1)

    return loss


def _columns_loss(w: Workload) -> Callable:
    k, d = w.components, w.targets

    def loss(weights: list, x: Any, y: Any) -> Any:
        raw = _network(weights, x)
        logits, loc, triangle = _split(raw, [k, k * d, k * d * (d + 1) // 2], axis=1)
        parts = _split(triangle.reshape(len(x), k, -1), column_sizes(d), axis=2)
        diagonal = MIN_SCALE + jax.nn.softplus(parts[0])  # [B, K, D]
        inverse = _split(1.0 / diagonal, [1] * d, axis=2)
        residual = y[:, jnp.newaxis] - loc.reshape(-1, k, d)
        z = []
        for j in range(d):
            z.append(residual[..., :1] * inverse[j])
            if j < d - 1:
                residual = residual[..., 1:] - parts[j + 1] * z[j]  # [B, K, D - j - 1]
        squares = jnp.square(jnp.concatenate(z, axis=2)).sum(axis=2)
        return _mixture_loss(logits, squares, jnp.log(diagonal).sum(axis=2), d, axis=1)

    return loss


def _rows_loss(w: Workload, precision: bool) -> Callable:
    k, d = w.components, w.targets
    sizes = [k, d * k, *(size * k for size in column_sizes(d))]

    def loss(weights: list, x: Any, y: Any) -> Any:
        raw = _network_batch_last(weights, x)
        logits, *flat = _split(raw, sizes, axis=0)
        loc, diagonal, *columns = (part.reshape(-1, k, len(x)) for part in flat)
        diagonal = MIN_SCALE + jax.nn.softplus(diagonal)  # [D, K, B]
        residual = y.T[:, jnp.newaxis] - loc
        log_det = jnp.log(diagonal).sum(axis=0)
        if precision:  # z = P^T (y - loc)
            log_det = -log_det
            z = list(_split(diagonal * residual, [1] * d, axis=0))
            for j in range(d - 1):
                z[j] += (columns[j] * residual[j + 1 :]).sum(axis=0, keepdims=True)
        else:
            inverse = _split(1.0 / diagonal, [1] * d, axis=0)
            z = []
            for j in range(d):
                z.append(residual[:1] * inverse[j])
                if j < d - 1:
                    residual = residual[1:] - columns[j] * z[j]  # [D - j - 1, K, B]
        squares = jnp.square(jnp.concatenate(z)).sum(axis=0)
        return _mixture_loss(logits, squares, log_det, d, axis=0)

    return loss
