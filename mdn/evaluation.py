"""Evaluation: how good a fitted density is on rows it has not seen, and on a line by itself.

Everything after the network is float64 NumPy; nothing here imports TensorFlow.

Shape letters: N rows, T time, D event size, K components, P patterns of missing entries.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy import linalg, special

from mdn.data.rows import Data, Rows
from mdn.errors import RunError
from mdn.fitting.em import fit_mixture, group_by_pattern

if TYPE_CHECKING:
    from mdn.density.queries import Queries
    from mdn.ensembles import Ensemble
    from mdn.model import MDN

_EM_TOLERANCE = 1e-14


# ---------------------------------------------------------------------- margins


@dataclasses.dataclass(frozen=True)
class Units:
    """The way between targets and transformed targets, in NumPy.

    Attributes:
        bijector: from transformed targets [.., size] to targets, elementwise.
        size: the number of targets of the bijector.
        dtype: that the bijector computes in.
        targets: those that are meant here, D of them.
    """

    bijector: Any
    size: int
    dtype: Any
    targets: tuple[int, ...]

    def forward(self, u: np.ndarray) -> np.ndarray:
        """Return the targets [.., D] of transformed ones."""
        return self._apply(self.bijector.forward, u, np.zeros(self.size))

    def inverse(self, y: np.ndarray) -> np.ndarray:
        """Return transformed targets [.., D]; infinite outside of the domain, NaN where y is."""
        inner = self._inner()
        with np.errstate(all="ignore"):
            u = self._apply(self.bijector.inverse, y, inner)
        beyond = np.where(y < inner[list(self.targets)], -np.inf, np.inf)
        return np.where(np.isnan(u) & ~np.isnan(y), beyond, u)

    def slope(self, y: np.ndarray) -> np.ndarray:
        """Return du/dy, [.., D]; zero outside of the domain."""

        def log_slope(y: np.ndarray) -> Any:
            return self.bijector.inverse_log_det_jacobian(y, event_ndims=0) + np.zeros_like(y)

        slope = np.exp(self._apply(log_slope, y, self._inner()))
        return np.where(np.isfinite(self.inverse(y)), np.nan_to_num(slope, nan=0.0), 0.0)

    def take(self, targets: Sequence[int]) -> Units:
        """Return the same for some of the D targets."""
        return dataclasses.replace(self, targets=tuple(self.targets[i] for i in targets))

    def _inner(self) -> np.ndarray:
        """Return values inside of the domain, [size]."""
        return np.asarray(self._apply(self.bijector.forward, np.zeros(0), np.zeros(self.size), ()))

    def _apply(
        self,
        function: Callable[[np.ndarray], Any],
        values: np.ndarray,
        others: np.ndarray,
        targets: tuple[int, ...] | None = None,
    ) -> np.ndarray:
        targets = self.targets if targets is None else targets
        full = np.broadcast_to(others, [*values.shape[:-1], self.size]).copy()
        full[..., list(targets)] = values
        found = np.asarray(function(full.astype(self.dtype)), np.float64)
        found = np.broadcast_to(found, full.shape)
        return found[..., list(targets)] if targets else found


@dataclasses.dataclass(frozen=True)
class Margins:
    """The one-dimensional margins of a density: for each target a mixture of K normals.

    Attributes:
        weight: [.., K], sums to one.
        loc: [.., K, D].
        scale: [.., K, D], standard deviations.
        units: of transformed targets, which weight, loc and scale then describe.
    """

    weight: np.ndarray
    loc: np.ndarray
    scale: np.ndarray
    units: Units | None = None

    @classmethod
    def of(cls, density: Queries) -> Margins:
        """Return the margins of a density."""
        logits, loc, scale_tril, units = as_mixture(density)
        scale = np.linalg.norm(scale_tril, axis=-1)
        return cls(special.softmax(logits, axis=-1), loc, scale, units)

    def first(self) -> Margins:
        """Return the margin of the first target."""
        units = None if self.units is None else self.units.take([0])
        return Margins(self.weight, self.loc[..., :1], self.scale[..., :1], units)

    def mean(self) -> np.ndarray:
        """Return the mean, [.., D]; of transformed targets by Gauss-Hermite quadrature."""
        if self.units is None:
            return self._mix(self.loc)
        nodes, weights = np.polynomial.hermite_e.hermegauss(64)
        total = np.zeros(self.loc.shape)
        for node, weight in zip(nodes, weights / weights.sum(), strict=True):
            total += weight * self.units.forward(self.loc + node * self.scale)
        return self._mix(total)

    def cdf(self, y: np.ndarray) -> np.ndarray:
        """Return P(Y_d <= y_d) for each d, [.., D], of y [.., D]; NaN where y is."""
        u = y if self.units is None else self.units.inverse(y)
        return self._mix(special.ndtr((u[..., np.newaxis, :] - self.loc) / self.scale))

    def quantile(self, probability: float) -> np.ndarray:
        """Return the y with cdf(y) = probability, [.., D]."""
        from mdn.density import univariate  # which imports TensorFlow

        with np.errstate(divide="ignore"):
            log_weight = np.log(self.weight)[..., np.newaxis, :]  # of no weight: -inf
        parts = log_weight, np.swapaxes(self.loc, -1, -2), np.swapaxes(self.scale, -1, -2)
        u = univariate.quantile(univariate.Margins(*parts), probability).numpy()
        return u if self.units is None else self.units.forward(u)

    def _mix(self, values: np.ndarray) -> np.ndarray:
        return np.einsum("...k,...kd->...d", self.weight, values)


def as_mixture(density: Queries) -> tuple[np.ndarray, np.ndarray, np.ndarray, Units | None]:
    """Return logits, loc and scale_tril in float64, and the units where targets are transformed.

    The parameters then describe the transformed targets.
    """
    from mdn.density.transformed import split_transform  # which imports TensorFlow

    base, bijector = split_transform(density)
    logits, loc, scale_tril = (np.asarray(p, np.float64) for p in base.mixture_parameters())
    size, dtype = loc.shape[-1], base.dtype.as_numpy_dtype
    units = None if bijector is None else Units(bijector, size, dtype, tuple(range(size)))
    return logits, loc, scale_tril, units


# ---------------------------------------------------------------------- baseline


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """One normal over all targets: what a density must beat to have learned anything from x.

    Attributes:
        loc: [D].
        covariance: [D, D].
    """

    loc: np.ndarray
    covariance: np.ndarray

    @classmethod
    def fit(cls, y: np.ndarray, weight: np.ndarray) -> Gaussian:
        """Return the maximum-likelihood fit to the entries that are there.

        Args:
            y: [N, D], NaN marks a missing entry; each row and each target has an observed one.
            weight: [N], positive.
        """
        found = fit_mixture(y, weight=weight, tolerance=_EM_TOLERANCE)
        return cls(found.loc[0], found.covariance[0])

    def log_prob(self, y: np.ndarray) -> np.ndarray:
        """Return the log density of the observed entries of y [N, D], [N] nats."""
        log_prob = np.zeros(len(y))
        for observed, rows in zip(*group_by_pattern(y), strict=True):
            scale_tril = np.linalg.cholesky(self.covariance[np.ix_(observed, observed)])
            residual = y[rows][:, observed] - self.loc[observed]  # [n, d]
            z = linalg.solve_triangular(scale_tril, residual.T, lower=True)  # [d, n]
            constant = np.log(np.diag(scale_tril)).sum() + 0.5 * len(z) * math.log(2 * math.pi)
            log_prob[rows] = -0.5 * (z**2).sum(axis=0) - constant
        return log_prob


# ---------------------------------------------------------------------- evaluation


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What the test rows say of a density.

    Attributes:
        metrics: flat keys for metrics.json.
        pit: [n, D], each observed test entry through the cdf of its margin, else NaN: uniform on
            [0, 1] where the density is calibrated.
    """

    metrics: dict[str, float]
    pit: np.ndarray


def evaluate(model: MDN, data: Data, batch_size: int = 4096) -> Evaluation:
    """Judge the density on the test rows, and the baseline and the truth on the same rows.

    A row is one with weight and with an observed target; of sequences, each such step that is
    not padding. Missing entries are marginalised; row weights weigh every mean.

    Args:
        model: adapted, and trained or not.
        data: where the rows come from.
        batch_size: rows that go through the network at a time.

    Returns:
        The metrics, where they have a meaning for these data:

            test/nll, test/nll_se: nats per row, and the standard error of that mean.
            test/n: number of rows.
            test/nll_complete, test/n_complete: of the rows that miss no target, if others do.
            test/rmse/<target>, and test/rmse of a single target: of the mean, in its units.
            test/coverage50, test/coverage90: share of the observed entries inside the central
                50 and 90 % intervals of their margins.
            test/regret, test/regret_se: paired mean of log p_true - log q, nats per row.
            baseline/nll, baseline/nll_complete: of one Gaussian fitted to the train targets.
            data/entropy: of the truth, nats per row.

    Raises:
        RunError: the density of a test row is not finite.
    """
    test, train = data.test, data.train
    log_prob = np.empty(test.y.shape[:-1])  # [N] or [N, T]
    pit, error = np.empty(test.y.shape), np.empty(test.y.shape)
    for rows, density in model.densities(test.x, batch_size):
        margins = Margins.of(density)
        log_prob[rows] = density.log_prob(test.y[rows].astype(np.float32))
        pit[rows] = margins.cdf(test.y[rows])
        error[rows] = test.y[rows] - margins.mean()
    counted = find_counted(test)
    if not np.isfinite(log_prob[counted]).all():
        row = int(np.argwhere(counted & ~np.isfinite(log_prob))[0][0])
        raise RunError(
            f"the density of test row {row} is not finite: look at its features and targets, or "
            "train with a lower optimizer.learning_rate"
        )
    y, weight = _observed(test)  # [n, D], [n]
    log_prob, pit, error = log_prob[counted], pit[counted], error[counted]
    baseline = Gaussian.fit(*_observed(train)).log_prob(y)  # [n]

    metrics = {"test/n": float(len(y))}
    metrics["test/nll"], metrics["test/nll_se"] = mean_and_error(-log_prob, weight)
    metrics["baseline/nll"], _ = mean_and_error(-baseline, weight)
    complete = ~np.isnan(y).any(axis=1)
    if complete.any() and not complete.all():
        metrics["test/n_complete"] = float(complete.sum())
        metrics["test/nll_complete"], _ = mean_and_error(-log_prob[complete], weight[complete])
        metrics["baseline/nll_complete"], _ = mean_and_error(-baseline[complete], weight[complete])
    for name, column in zip(data.targets, error.T, strict=True):
        if not np.isnan(column).all():
            metrics[f"test/rmse/{name}"] = math.sqrt(mean_and_error(column**2, weight)[0])
    if len(data.targets) == 1:
        metrics["test/rmse"] = metrics[f"test/rmse/{data.targets[0]}"]
    for percent in (50, 90):
        inside = np.where(np.isnan(pit), np.nan, np.abs(pit - 0.5) <= percent / 200)
        metrics[f"test/coverage{percent}"], _ = mean_and_error(inside, weight)
    if data.truth is not None:
        truth = data.truth.log_prob(test.y, np.asarray(test.x))[counted]
        metrics["test/regret"], metrics["test/regret_se"] = mean_and_error(
            truth - log_prob, weight
        )
        metrics["data/entropy"] = float(data.truth.entropy())
    return Evaluation(metrics, pit)


def evaluate_members(model: Ensemble, data: Data, batch_size: int = 4096) -> dict[str, float]:
    """Judge what the members of an ensemble agree on, on the test rows that `evaluate` counts.

    Args:
        model: as for `evaluate`.
        data: where the rows come from.
        batch_size: rows that go through the networks at a time.

    Returns:
        The metrics:

            test/aleatoric_stddev/<target>: root mean square over the rows of the standard
                deviation that the members state, in the target's units.
            test/epistemic_stddev/<target>: of the standard deviation of their means.
            Both also without the name of a single target. The sum of their squares is the mean
            variance of the predictive density.
    """
    counted = find_counted(data.test)
    _, weight = _observed(data.test)
    metrics = {}
    for part, covariance in model.uncertainty(data.test.x, batch_size)._asdict().items():
        variance = np.diagonal(covariance, axis1=-2, axis2=-1)[counted]  # [n, D]
        for name, column in zip(data.targets, variance.T, strict=True):
            key = f"test/{part}_stddev"
            metrics[f"{key}/{name}"] = math.sqrt(mean_and_error(column, weight)[0])
            if len(data.targets) == 1:
                metrics[key] = metrics[f"{key}/{name}"]
    return metrics


def find_counted(rows: Rows) -> np.ndarray:
    """Return which rows, [N], or which steps, [N, T], have a weight and an observed target."""
    counted = ~np.isnan(rows.y).all(axis=-1)
    if rows.y.ndim == 3:
        counted &= ~np.isnan(np.asarray(rows.x)).all(axis=-1)  # a step without features is padding
    if rows.weight is not None:
        counted &= rows.weight.reshape(-1, *[1] * (counted.ndim - 1)) > 0
    return counted


def _observed(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Return the targets [n, D] and the weights [n] of the rows or steps that count."""
    counted = find_counted(rows)
    weight = np.ones(len(rows)) if rows.weight is None else rows.weight
    return rows.y[counted], weight[np.nonzero(counted)[0]]


def mean_and_error(values: np.ndarray, weight: np.ndarray) -> tuple[float, float]:
    """Return the weighted mean of [n] or [n, D] values, NaN left out, and its standard error."""
    weight = np.broadcast_to(weight.reshape(-1, *[1] * (values.ndim - 1)), values.shape)
    present = ~np.isnan(values)
    values, weight = values[present], weight[present]
    mean = np.average(values, weights=weight)
    error = np.sqrt(np.sum((weight * (values - mean)) ** 2)) / weight.sum()
    return float(mean), float(error)


# ---------------------------------------------------------------------- table


def print_table(metrics: dict[str, float], console: Console | None = None) -> None:
    """Print the metrics of `evaluate` as a small table, at most 80 columns wide."""
    console = console or Console()
    title = f"{metrics['test/n']:,.0f} test rows"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("metric", overflow="ellipsis", no_wrap=True, max_width=40)
    for heading in ("value", "± se", "baseline"):
        table.add_column(heading, justify="right", no_wrap=True)

    def add(label: str, key: str, form: str = ".4f") -> None:
        keys = (key, f"{key}_se", f"baseline/{key.partition('/')[2]}")
        cells = [format(metrics[k], form) if k in metrics else "" for k in keys]
        if cells[0]:
            table.add_row(label, *cells)

    add("ELBO, nats per row", "test/elbo")
    add("NLL, nats per row", "test/nll")
    add("NLL, rows with all targets", "test/nll_complete")
    add("regret, nats per row", "test/regret")
    add("entropy of the truth", "data/entropy")
    for key in metrics:
        if key.startswith("test/rmse/"):
            add(f"RMSE of {key.removeprefix('test/rmse/')}", key, ".4g")
        if key.startswith(("test/aleatoric_stddev/", "test/epistemic_stddev/")):
            part, _, target = key.removeprefix("test/").partition("_stddev/")
            add(f"{part} sd of {target}", key, ".4g")
    add("coverage of the 50 % interval", "test/coverage50", ".3f")
    add("coverage of the 90 % interval", "test/coverage90", ".3f")
    console.print(table, width=min(80, console.width))
