"""Evaluation: how good a fitted density is on rows it has not seen.

Everything after the network is float64 NumPy; nothing here imports TensorFlow.

Shape letters: N rows, T time, D event size.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy import linalg

from mdn.calibration.judging import assemble
from mdn.calibration.scores import score_parts
from mdn.calibration.summary import Report
from mdn.data.resolution import grid_steps, spread_over_cells
from mdn.data.rows import Data, Rows, find_counted
from mdn.errors import RunError
from mdn.fitting.em import fit_mixture, group_by_pattern
from mdn.margins import take_rows

if TYPE_CHECKING:
    from mdn.density.queries import Queries
    from mdn.ensembles import Ensemble
    from mdn.model import MDN

log = logging.getLogger(__name__)

_EM_TOLERANCE = 1e-14


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
        calibration: of the same rows.
    """

    metrics: dict[str, float]
    calibration: Report


def evaluate(model: MDN, data: Data, batch_size: int | None = None) -> Evaluation:
    """Judge the density on the test rows, and the baseline and the truth on the same rows.

    A row is one with weight and with an observed target; of sequences, each such step that is
    not padding. Missing entries are marginalised; row weights weigh every mean.

    Args:
        model: adapted, and trained or not.
        data: where the rows come from.
        batch_size: rows that go through the network at a time; by default as many as are fast.

    Returns:
        The metrics, where they have a meaning for these data:

            test/nll, test/nll_se: nats per row, and the standard error of that mean.
            test/n: number of rows.
            test/nll_complete, test/n_complete: of the rows that miss no target, if others do.
            test/rmse/<target>, and test/rmse of a single target: of the mean, in its units.
            test/coverage50 and others: see `mdn.calibration.Report.metrics`.
            test/regret, test/regret_se: paired mean of log p_true - log q, nats per row.
            baseline/nll, baseline/nll_complete: of one Gaussian fitted to the train targets, if
                they vary.
            data/entropy: of the truth, nats per row.

    Raises:
        RunError: the density of a test row is not finite.
    """
    test, train = data.test, data.train
    counted = find_counted(test)  # [N] or [N, T]
    y, weight = _observed(test)  # [n, D], [n]
    known, train_weight = _observed(train)
    step = grid_steps(known)
    log_prob = np.empty(test.y.shape[:-1])

    def densities() -> Iterator[tuple[slice, Queries]]:
        start = 0
        for rows, density in model.densities(test.x, batch_size):
            log_prob[rows] = density.log_prob(test.y[rows].astype(np.float32))
            here = counted[rows]
            if not np.isfinite(log_prob[rows][here]).all():
                row = rows.start + int(np.argwhere(here & ~np.isfinite(log_prob[rows]))[0][0])
                raise RunError(
                    f"the density of test row {row} is not finite: look at its features and "
                    "targets, or train with a lower optimizer.learning_rate"
                )
            stop = start + np.count_nonzero(here)
            yield slice(start, stop), take_rows(density, here.shape, here)
            start = stop

    scores = score_parts(densities(), spread_over_cells(y, step))
    report = assemble(
        scores,
        test,
        data.targets,
        data.features,
        step=step,
        reference=known,
        reference_weight=train_weight,
    )
    log_prob, error = log_prob[counted], y - scores.mean
    varies = all(len(np.unique(column[~np.isnan(column)])) > 1 for column in known.T)
    baseline = Gaussian.fit(known, train_weight).log_prob(y) if varies else None  # [n]

    metrics = {"test/n": float(len(y))}
    metrics["test/nll"], metrics["test/nll_se"] = mean_and_error(-log_prob, weight)
    if baseline is not None:
        metrics["baseline/nll"], _ = mean_and_error(-baseline, weight)
    complete = ~np.isnan(y).any(axis=1)
    if complete.any() and not complete.all():
        metrics["test/n_complete"] = float(complete.sum())
        metrics["test/nll_complete"], _ = mean_and_error(-log_prob[complete], weight[complete])
        if baseline is not None:
            metrics["baseline/nll_complete"], _ = mean_and_error(
                -baseline[complete], weight[complete]
            )
    for name, column in zip(data.targets, error.T, strict=True):
        if not np.isnan(column).all():
            metrics[f"test/rmse/{name}"] = math.sqrt(mean_and_error(column**2, weight)[0])
    if len(data.targets) == 1:
        metrics["test/rmse"] = metrics[f"test/rmse/{data.targets[0]}"]
    metrics |= report.metrics()
    if data.truth is not None:
        truth = data.truth.log_prob(test.y, np.asarray(test.x))[counted]
        metrics["test/regret"], metrics["test/regret_se"] = mean_and_error(
            truth - log_prob, weight
        )
        metrics["data/entropy"] = float(data.truth.entropy())
    return Evaluation(metrics, report)


def evaluate_members(
    model: Ensemble, data: Data, batch_size: int | None = None
) -> dict[str, float]:
    """Judge what the members of an ensemble agree on, on the test rows that `evaluate` counts.

    Args:
        model: as for `evaluate`.
        data: where the rows come from.
        batch_size: rows that go through the networks at a time; by default as many as are fast.

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


def finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics that are numbers, as JSON has no others; the log names the rest.

    Such as the RMSE, where the mean of transformed targets is beyond what their dtype holds.
    """
    left_out = [name for name, value in metrics.items() if not math.isfinite(value)]
    if left_out:
        log.warning("not finite, and left out of the metrics: %s", ", ".join(left_out))
    return {name: value for name, value in metrics.items() if name not in left_out}


def mean_gain(gain: np.ndarray, rows: Rows) -> dict[str, float]:
    """Return the mean over the rows that count of [N] or [N, T] gains in nats, as `test_gain`."""
    _, weight = _observed(rows)
    mean, error = mean_and_error(gain[find_counted(rows)], weight)
    return {"test_gain": mean, "test_gain_se": error}


# ---------------------------------------------------------------------- table


def print_table(metrics: dict[str, float], console: Console | None = None) -> None:
    """Print the metrics of `evaluate` as a small table, at most 80 columns wide."""
    console = console or Console(markup=False, emoji=False)  # names are shown as they are
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
    add("coverage of the 90 % region", "test/region_coverage90", ".3f")
    add("CRPS skill over the marginal of y", "test/crps_skill", ".3f")
    add("gain by recalibration, nats per row", "recalibration/test_gain")
    console.print(table, width=min(80, console.width))
