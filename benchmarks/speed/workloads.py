"""The problems that every contender trains on: rows, starting weights, and the loss in NumPy.

Nothing here imports a framework, so that a process can measure one of them alone.

Shape letters: N rows, B batch, F features, H hidden, D event size, K components, P parameters.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import numpy as np

ROWS = 16_384
LEARNING_RATE = 1e-3
BETAS, EPSILON = (0.9, 0.999), 1e-7  # Adam's, as Keras has them
MIN_SCALE = 1e-3
LOG_2_PI = float(np.log(2.0 * np.pi))


@dataclasses.dataclass(frozen=True)
class Workload:
    """A network, a density and a batch size.

    Attributes:
        name: S, M, L, H, or what a row of another table says.
        features: F.
        targets: D.
        components: K.
        widths: units of the hidden layers.
        batch: B.
        epochs: how many make one measurement, one call of `fit` where there is such a thing: a
            third of a second of the fastest, of which a call's own time is little.
        rows: N.
    """

    name: str
    features: int
    targets: int
    components: int
    widths: tuple[int, ...]
    batch: int
    epochs: int
    rows: int = ROWS

    @property
    def steps(self) -> int:
        """Train steps an epoch; the rows left over are dropped."""
        return self.rows // self.batch

    @property
    def outputs(self) -> int:
        """P, the numbers that the network puts out for one row."""
        d = self.targets
        return self.components * (1 + d + d * (d + 1) // 2)

    def __str__(self) -> str:
        layers = "x".join(str(width) for width in self.widths)
        return (
            f"x {self.features}, y {self.targets}, K {self.components}, {layers}, "
            f"batch {self.batch}, P {self.outputs}"
        )


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("S", 1, 1, 3, (64, 64), 64, epochs=40),
        Workload("M", 8, 2, 3, (64, 64), 128, epochs=20),
        Workload("L", 16, 10, 5, (128, 128), 256, epochs=10),
        Workload("H", 16, 32, 4, (128, 128), 256, epochs=5),
    )
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """Rows to train on and the weights to start from.

    Attributes:
        workload: its sizes.
        x: [N, F] float32, each feature of mean zero and standard deviation one.
        y: [N, D] float32, likewise.
        weights: kernel [in, out] and bias [out] of each layer in turn; the last one puts out
            logits [K], loc [K, D] and the triangles [K, D(D+1)/2] in the order of
            `tfp.math.fill_triangular`.
    """

    workload: Workload
    x: np.ndarray
    y: np.ndarray
    weights: tuple[np.ndarray, ...] = ()

    def start(
        self, order: np.ndarray | None = None, components_last: bool = False
    ) -> list[np.ndarray]:
        """Return copies of the weights, for a contender that may overwrite them.

        Args:
            order: entries of a triangle in the order in which the contender wants them, [D(D+1)/2]
                of `fill_order`; by default the order of `tfp.math.fill_triangular`.
            components_last: put out loc as [D, K] and the triangles as [D(D+1)/2, K].
        """
        k, d = self.workload.components, self.workload.targets
        logits, loc, triangle = np.split(np.arange(self.workload.outputs), [k, k + k * d])
        parts = [loc.reshape(k, d), triangle.reshape(k, -1)]
        if order is not None:
            parts[1] = parts[1][:, order]
        columns = np.concatenate(
            [logits, *((p.T if components_last else p).ravel() for p in parts)]
        )
        *layers, kernel, bias = (weight.copy() for weight in self.weights)
        return [*layers, np.ascontiguousarray(kernel[:, columns]), bias[columns]]

    def mean(self, loss: Callable[[np.ndarray, np.ndarray], Any], rows: int) -> float:
        """Return the mean over the first rows of `loss(x, y)`, itself a mean over a chunk."""
        chunks = [slice(i, min(i + 2048, rows)) for i in range(0, rows, 2048)]
        sums = [float(loss(self.x[c], self.y[c])) * (c.stop - c.start) for c in chunks]
        return sum(sums) / rows

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the arrays to an .npz file."""
        arrays: dict[str, Any] = {f"w{i:02}": w for i, w in enumerate(self.weights)}
        np.savez(path, x=self.x, y=self.y, **arrays)

    @classmethod
    def load(cls, workload: Workload, path: str | os.PathLike[str]) -> Problem:
        """Read what `save` wrote."""
        with np.load(path) as file:
            weights = [file[name] for name in sorted(file.files) if name.startswith("w")]
            return cls(workload, file["x"], file["y"], tuple(weights))


def draw(workload: Workload, seed: int = 0) -> Problem:
    """Return rows of a smooth conditional mixture of K normals, standardised."""
    rng = np.random.default_rng(seed)
    n, f, d, k = workload.rows, workload.features, workload.targets, workload.components
    x = _standardised(rng.standard_normal((n, f)))
    gate = x @ rng.standard_normal((f, k)) / np.sqrt(f)  # [N, K]
    component = np.argmax(gate + rng.gumbel(size=gate.shape), axis=1)  # [N]
    slope = 1.5 * rng.standard_normal((k, f, d)) / np.sqrt(f)
    shift = rng.uniform(-np.pi, np.pi, (k, d))
    factor = np.tril(rng.standard_normal((k, d, d))) / (2.0 * np.sqrt(d)) + 0.3 * np.eye(d)
    noise = rng.standard_normal((n, d))
    y = np.empty((n, d))
    for c in range(k):
        rows = component == c
        spread = np.exp(0.5 * np.tanh(gate[rows, c]))[:, np.newaxis]  # [n, 1]
        y[rows] = 1.5 * np.sin(x[rows] @ slope[c] + shift[c])
        y[rows] += spread * (noise[rows] @ factor[c].T)
    return Problem(workload, x.astype(np.float32), _standardised(y).astype(np.float32))


def _standardised(rows: np.ndarray) -> np.ndarray:
    return (rows - rows.mean(axis=0)) / rows.std(axis=0)


def fill_order(d: int) -> np.ndarray:
    """Return where `fill_triangular` takes each entry of the lower triangle from, [D, D]."""
    entries = np.arange(d * (d + 1) // 2)
    return np.concatenate([entries[d:], entries[::-1]]).reshape(d, d)


def row_order(d: int) -> np.ndarray:
    """Return the order [0, 0], [1, 0], [1, 1], ..: row by row, as `tril_indices` has it."""
    return fill_order(d)[np.tril_indices(d)]


def column_order(d: int) -> np.ndarray:
    """Return the order of the diagonal first, then column by column what stands below it."""
    fill = fill_order(d)
    return np.concatenate([np.diag(fill), *(fill[j + 1 :, j] for j in range(d))])


def column_sizes(d: int) -> list[int]:
    """Return the lengths of the parts of `column_order`: the diagonal and D - 1 columns."""
    return [d, *range(d - 1, 0, -1)]
