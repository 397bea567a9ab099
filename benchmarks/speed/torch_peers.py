"""PyTorch: `torch.distributions`, and densities written by hand, also under `torch.compile`.

Rows are permuted once an epoch and indexed a batch at a time, which is faster than a DataLoader;
Adam is the fused one.

Shape letters: N rows, B batch, D event size, K components, P parameters.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn.functional import softplus

from benchmarks.speed.workloads import (
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


class Torch:
    """The loop, whatever the density.

    Args:
        problem: rows and weights.
        way: "distributions", "solve", "rows", or "precision".
        compiled: whether `torch.compile` takes the network and its loss.
    """

    def __init__(self, problem: Problem, way: str, compiled: bool = False) -> None:
        torch.set_num_threads(os.cpu_count() or 1)
        self.problem = problem
        w = problem.workload
        if way == "rows":
            density = _rows_nll(w)
            weights = problem.start(column_order(w.targets), components_last=True)
        else:
            density = _nll(w, way)
            weights = problem.start(row_order(w.targets))
        network = _network(weights)

        def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return density(network(x), y)

        self._loss = loss
        self._step_loss = torch.compile(loss) if compiled else loss
        self._adam = torch.optim.Adam(
            network.parameters(), lr=LEARNING_RATE, eps=EPSILON, fused=True
        )
        self._x, self._y = torch.from_numpy(problem.x), torch.from_numpy(problem.y)

    def train(self, epochs: int, shuffle: bool = True) -> None:
        w = self.problem.workload
        for _ in range(epochs):
            order = torch.randperm(w.rows) if shuffle else torch.arange(w.rows)
            for rows in order[: w.steps * w.batch].view(w.steps, w.batch):
                self._adam.zero_grad(set_to_none=True)
                self._step_loss(self._x[rows], self._y[rows]).backward()
                self._adam.step()

    def loss(self, rows: int) -> float:
        with torch.no_grad():
            return self.problem.mean(
                lambda x, y: self._loss(torch.from_numpy(x), torch.from_numpy(y)), rows
            )


def _network(weights: list[np.ndarray]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for kernel, bias in zip(weights[::2], weights[1::2], strict=True):
        layer = nn.Linear(*kernel.shape)
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(kernel.T.copy()))
            layer.bias.copy_(torch.from_numpy(bias))
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def _nll(w: Workload, way: str) -> Callable:
    k, d = w.components, w.targets
    entries = d * (d + 1) // 2
    rows, columns = torch.tril_indices(d, d)
    eye = torch.eye(d, dtype=torch.bool)

    def nll(raw: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        logits, loc, triangle = raw.split([k, k * d, k * entries], dim=-1)
        loc = loc.reshape(-1, k, d)
        factor = raw.new_zeros([len(raw), k, d, d])
        factor[..., rows, columns] = triangle.reshape(-1, k, entries)
        diagonal = MIN_SCALE + softplus(torch.diagonal(factor, dim1=-2, dim2=-1))
        factor = torch.where(eye, diagonal[..., None], factor)  # [B, K, D, D]
        if way == "distributions":
            mixture = torch.distributions.MixtureSameFamily(
                torch.distributions.Categorical(logits=logits),
                torch.distributions.MultivariateNormal(loc, scale_tril=factor),
            )
            return -mixture.log_prob(y).mean()
        residual = y[:, None] - loc  # [B, K, D]
        log_det = diagonal.log().sum(dim=-1)
        if way == "precision":  # z = P^T (y - loc)
            z, log_det = (factor * residual[..., None]).sum(dim=-2), -log_det
        else:
            z = torch.linalg.solve_triangular(factor, residual[..., None], upper=False)[..., 0]
        return _mixture_nll(logits, z.square().sum(dim=-1), log_det, d, dim=-1)

    return nll


def _rows_nll(w: Workload) -> Callable:
    """Return the loss whose substitution is unrolled over rows [D, K, B]."""
    k, d = w.components, w.targets
    sizes = [k, d * k, *(size * k for size in column_sizes(d))]

    def nll(raw: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        logits, *flat = raw.t().split(sizes)
        loc, diagonal, *columns = (part.reshape(-1, k, len(raw)) for part in flat)
        diagonal = MIN_SCALE + softplus(diagonal)  # [D, K, B]
        inverse = (1.0 / diagonal).unbind()
        residual = y.t()[:, None] - loc
        z = []
        for j in range(d):
            z.append(residual[0] * inverse[j])
            if j < d - 1:
                residual = residual[1:] - columns[j] * z[j]  # [D - j - 1, K, B]
        squares = torch.stack(z).square().sum(dim=0)
        return _mixture_nll(logits, squares, diagonal.log().sum(dim=0), d, dim=0)

    return nll


def _mixture_nll(
    logits: torch.Tensor, squares: torch.Tensor, log_det: torch.Tensor, d: int, dim: int
) -> torch.Tensor:
    """Return the mean NLL of squared residuals and log det of the scales, [B, K] or [K, B]."""
    joint = logits - 0.5 * squares - log_det
    log_prob = joint.logsumexp(dim) - logits.logsumexp(dim)
    return 0.5 * d * LOG_2_PI - log_prob.mean()
