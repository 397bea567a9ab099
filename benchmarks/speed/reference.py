"""What every contender is to reach: the same training in NumPy and float64, by hand.

Shape letters: N rows, B batch, F features, H hidden, D event size, K components, P parameters.
"""

from __future__ import annotations

import numpy as np

from benchmarks.speed.workloads import (
    BETAS,
    EPSILON,
    LEARNING_RATE,
    LOG_2_PI,
    MIN_SCALE,
    Problem,
    fill_order,
)


class Reference:
    """The network, its density with their gradients, and Adam.

    Args:
        problem: rows and starting weights.
        precision: the triangles A are factors of the precision, A A^T, and not of the covariance.
        late_epsilon: Adam adds its epsilon to the root of the corrected second moment, as PyTorch
            has it from the paper (Kingma and Ba 2015, algorithm 1), and not of the moment as it
            is, as Keras has it from section 2 of the same.
    """

    def __init__(
        self, problem: Problem, precision: bool = False, late_epsilon: bool = False
    ) -> None:
        self.problem, self.precision, self.late_epsilon = problem, precision, late_epsilon
        self.weights = [weight.astype(np.float64) for weight in problem.weights]

    def loss(self, rows: int) -> float:
        """Return the mean NLL of the first rows, nats per row."""

        def loss(x: np.ndarray, y: np.ndarray) -> float:
            return self._density(self._hidden(x)[-1], y)[0]

        return self.problem.mean(loss, rows)

    def train(self) -> None:
        """Train for an epoch, the rows in their own order."""
        w = self.problem.workload
        moments = [(np.zeros_like(weight), np.zeros_like(weight)) for weight in self.weights]
        for step in range(1, w.steps + 1):
            rows = slice((step - 1) * w.batch, step * w.batch)
            gradients = self._gradients(self.problem.x[rows], self.problem.y[rows])
            bias = [1.0 - beta**step for beta in BETAS]
            rate = LEARNING_RATE * np.sqrt(bias[1]) / bias[0]
            epsilon = EPSILON * np.sqrt(bias[1]) if self.late_epsilon else EPSILON
            for weight, gradient, (mean, square) in zip(
                self.weights, gradients, moments, strict=True
            ):
                mean += (1.0 - BETAS[0]) * (gradient - mean)
                square += (1.0 - BETAS[1]) * (gradient**2 - square)
                weight -= rate * mean / (np.sqrt(square) + epsilon)

    def _hidden(self, x: np.ndarray) -> list[np.ndarray]:
        """Return x and what each layer puts out, the last one [B, P]."""
        hidden = [x.astype(np.float64)]
        for i in range(0, len(self.weights), 2):
            raw = hidden[-1] @ self.weights[i] + self.weights[i + 1]
            hidden.append(np.tanh(raw) if i < len(self.weights) - 2 else raw)
        return hidden

    def _gradients(self, x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
        """Return those of the mean loss with respect to the weights."""
        hidden = self._hidden(x)
        outgoing = self._density(hidden.pop(), y)[1]
        gradients: list[np.ndarray] = []
        for kernel, incoming in zip(self.weights[-2::-2], reversed(hidden), strict=True):
            gradients = [incoming.T @ outgoing, outgoing.sum(axis=0), *gradients]
            outgoing = (outgoing @ kernel.T) * (1.0 - incoming**2)
        return gradients

    def _density(self, raw: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the mean NLL of y [B, D], and its gradient with respect to raw [B, P]."""
        w = self.problem.workload
        b, k, d = len(raw), w.components, w.targets
        logits, loc, triangle = np.split(raw, [k, k + k * d], axis=1)
        place, on_diagonal = fill_order(d), np.eye(d, dtype=bool)
        entries = triangle.reshape(b, k, -1)[..., place]
        diagonal = MIN_SCALE + np.logaddexp(0.0, entries[..., on_diagonal])  # [B, K, D]
        factor = np.tril(entries, -1)  # [B, K, D, D]
        factor[..., on_diagonal] = diagonal
        residual = (y[:, np.newaxis] - loc.reshape(b, k, d))[..., np.newaxis]  # [B, K, D, 1]
        transposed = np.swapaxes(factor, -1, -2)
        if self.precision:
            z, sign = transposed @ residual, -1.0
            to_loc = factor @ z
            to_factor = -residual @ np.swapaxes(z, -1, -2)
        else:
            z, sign = np.linalg.solve(factor, residual), 1.0
            to_loc = np.linalg.solve(transposed, z)
            to_factor = to_loc @ np.swapaxes(z, -1, -2)
        log_det = sign * np.log(diagonal).sum(axis=-1)
        joint = logits - 0.5 * (z**2 + LOG_2_PI).sum(axis=(-2, -1)) - log_det  # [B, K]
        total, scale = _logsumexp(joint), _logsumexp(logits)
        share = np.exp(joint - total)[..., np.newaxis]  # of a component in a row, [B, K, 1]
        to_factor[..., on_diagonal] -= sign / diagonal
        # The derivative of softplus: 1 - exp(-softplus).
        to_factor[..., on_diagonal] *= -np.expm1(MIN_SCALE - diagonal)
        to_triangle = np.empty_like(triangle).reshape(b, k, -1)
        lower = np.tril_indices(d)
        to_triangle[..., place[lower]] = share * to_factor[..., lower[0], lower[1]]
        gradient = np.concatenate(
            [
                np.exp(joint - total) - np.exp(logits - scale),
                (share * to_loc[..., 0]).reshape(b, -1),
                to_triangle.reshape(b, -1),
            ],
            axis=1,
        )
        return float(np.mean(scale - total)), -gradient / b


def _logsumexp(values: np.ndarray) -> np.ndarray:
    return np.logaddexp.reduce(values, axis=1, keepdims=True)
