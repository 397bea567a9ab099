"""Maximum likelihood for normals and their mixtures by EM, with missing entries, in NumPy.

The log density of a normal is linear in the moments (1, y, y y^T) of a row. So an E-step is one
matrix product of the rows' moments with the components' coefficients, and an M-step another one
with the responsibilities. Rows that miss the same entries are one pattern; what a pattern does
not observe is completed in the sums over its rows, never row by row.

Shape letters: N rows (n of a block), D event size (d observed), K components, Q moments.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence

import numpy as np

from mdn.errors import DataError
from mdn.fitting.start import Start, cluster

log = logging.getLogger(__name__)

# Rows of which the moments are made, multiplied and still in the cache when the sums are taken.
_BLOCK = 4096
# Moments beyond this many bytes are made anew in each step.
_MOST_BYTES = 2**30
# Restarts are compared on a sample, after a few steps; only the best one goes on.
_TRIAL_ROWS, _TRIAL_STEPS = 5_000, 100
# A component that explains less than this many rows has nothing to be estimated from.
_FEWEST_ROWS = 1e-3


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What EM found.

    Attributes:
        weights: [K], sums to one.
        loc: [K, D].
        covariance: [K, D, D].
        nll: after each step, the mean over the rows in nats, before that step.
        converged: the last step gained less than the tolerance.
    """

    weights: np.ndarray
    loc: np.ndarray
    covariance: np.ndarray
    nll: list[float]
    converged: bool


def fit_mixture(
    y: np.ndarray,
    components: int = 1,
    *,
    weight: np.ndarray | None = None,
    diagonal: bool = False,
    floor: np.ndarray | float = 0.0,
    tolerance: float = 1e-6,
    max_steps: int = 1000,
    restarts: int = 10,
    seed: int = 0,
    start: Start | None = None,
) -> Estimate:
    """Return the maximum-likelihood mixture of K normals for the observed entries of y.

    Args:
        y: [N, D], NaN marks a missing entry; each target has an observed one, and varies.
        components: K; with one the fit is a normal, exact after one step if nothing is missing.
        weight: [N], not negative.
        diagonal: covariances are diagonal.
        floor: [D] or a number, the smallest standard deviation as a share of each target's: the
            covariances are the likeliest ones C for which C - diag(floor)^2 has no negative
            eigenvalue. Without a floor a component can shrink onto one row, and the likelihood
            of a mixture has no bound. It is at least 1e-5, so that targets which determine each
            other leave a regular covariance.
        tolerance: EM ends when a step gains less than this, in nats per row.
        max_steps: it ends after this many steps in any case.
        restarts: clusterings to begin with. A few steps on a sample choose among them.
        seed: of the clusterings.
        start: where to begin instead, in units of the targets' means and standard deviations.

    Raises:
        DataError: no row has an observed entry.

    Source:
        Dempster, Laird and Rubin (1977), Maximum likelihood from incomplete data via the EM
        algorithm; Little and Rubin (2019), Statistical Analysis with Missing Data, section 8.2;
        the choice among starts: Biernacki, Celeux and Govaert (2003), Choosing starting values
        for the EM algorithm.
    """
    weight = np.ones(len(y)) if weight is None else np.asarray(weight, np.float64)
    counted = (weight > 0) & ~np.isnan(y).all(axis=1)
    if not counted.any():
        raise DataError("no row has an observed target: there is nothing to fit")
    y, weight = y[counted], weight[counted] / weight[counted].mean()
    origin, unit = np.nanmean(y, axis=0), np.nanstd(y, axis=0)
    z = (y - origin) / unit
    narrowest = np.broadcast_to(np.asarray(floor, np.float64), origin.shape)
    rng = np.random.default_rng([seed, 0x454D])

    def climb(rows: _Rows, start: Start, tolerance: float, steps: int) -> Estimate:
        return _climb(rows, start, diagonal, narrowest, tolerance, steps)

    rows = _Rows(z, weight)
    if start is None:
        sample = rng.permutation(len(z))[:_TRIAL_ROWS]
        if components == 1:
            start = Start(np.ones(1), np.zeros([1, len(unit)]), np.eye(len(unit))[np.newaxis])
        elif restarts == 1:
            start = cluster(z, components, rng)
        else:
            few = _Rows(z[sample], weight[sample])
            trials = [
                climb(few, cluster(z[sample], components, rng), 10 * tolerance, _TRIAL_STEPS)
                for _ in range(restarts)
            ]
            best = min(trials, key=lambda trial: trial.nll[-1])
            start = Start(best.weights, best.loc, np.linalg.cholesky(best.covariance))
    found = climb(rows, start, tolerance, max_steps)
    jacobian = rows.mean(np.log(unit))
    return Estimate(
        found.weights,
        origin + unit * found.loc,
        found.covariance * np.outer(unit, unit),
        [nll + jacobian for nll in found.nll],
        found.converged,
    )


def _climb(
    rows: _Rows,
    start: Start,
    diagonal: bool,
    floor: np.ndarray,
    tolerance: float,
    max_steps: int,
) -> Estimate:
    """Run EM from a start, in standardised units."""
    weights, loc = start.weights, start.loc
    covariance = start.scale_tril @ start.scale_tril.swapaxes(1, 2)
    if diagonal:
        covariance = covariance * np.eye(loc.shape[1])
    nll: list[float] = []
    for _ in range(max_steps):
        value, count, first, second = rows.expect(weights, loc, covariance)
        nll.append(value)
        if len(nll) > 1 and abs(nll[-2] - value) < tolerance:
            return Estimate(weights, loc, covariance, nll, True)
        # A component without rows stays where it was, with next to no weight.
        alive = count > _FEWEST_ROWS
        share = np.where(alive, count, 1.0)[:, np.newaxis]
        weights = count / count.sum()
        loc = np.where(alive[:, np.newaxis], first / share, loc)  # [K, D]
        scatter = second / share[..., np.newaxis] - loc[:, :, np.newaxis] * loc[:, np.newaxis]
        if diagonal:
            scatter = scatter * np.eye(loc.shape[1])
        covariance = np.where(alive[:, np.newaxis, np.newaxis], scatter, covariance)
        covariance = _raise_to_floor(covariance, floor)
    nll.append(rows.expect(weights, loc, covariance)[0])
    return Estimate(weights, loc, covariance, nll, False)


def _raise_to_floor(covariance: np.ndarray, floor: np.ndarray) -> np.ndarray:
    """Return the likeliest covariances [K, D, D] with C >= diag(floor)^2, given the scatter.

    In units of the floor that is the scatter with its eigenvalues raised to one.
    """
    # Targets that determine each other leave a scatter that is singular up to rounding.
    unit = np.maximum(floor, 1e-5)
    unit = np.outer(unit, unit)
    values, vectors = np.linalg.eigh(covariance / unit)
    if (values >= 1.0).all():
        return covariance
    raised = np.einsum("kij,kj,klj->kil", vectors, np.maximum(values, 1.0), vectors)
    return raised * unit


class _Rows:
    """Standardised rows, by pattern of observed entries, ready for the sums of EM.

    Args:
        z: [N, D], NaN where missing.
        weight: [N], positive, with mean one.
    """

    def __init__(self, z: np.ndarray, weight: np.ndarray) -> None:
        self.total = weight.sum()
        self.patterns: list[_Pattern] = []
        self._observed_weight = weight @ ~np.isnan(z)  # [D]
        for observed, rows in zip(*group_by_pattern(z), strict=True):
            self.patterns.append(_Pattern(np.flatnonzero(observed), z[rows], weight[rows]))

    def mean(self, values: np.ndarray) -> float:
        """Return the mean over the rows of the sum of [D] values over the observed entries."""
        return float(self._observed_weight @ values / self.total)

    def expect(
        self, weights: np.ndarray, loc: np.ndarray, covariance: np.ndarray
    ) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
        """Return the NLL, and the expected sums of 1, z, z z^T over each component's rows.

        Args:
            weights: [K].
            loc: [K, D].
            covariance: [K, D, D].

        Returns:
            nats per row, [K], [K, D], [K, D, D].
        """
        k, d = loc.shape
        log_prob, count = 0.0, np.zeros(k)
        first, second = np.zeros([k, d]), np.zeros([k, d, d])
        with np.errstate(divide="ignore"):
            log_weights = np.log(weights)
        for pattern in self.patterns:
            seen = pattern.observed
            inverse = np.linalg.inv(covariance[:, seen[:, np.newaxis], seen])  # [K, d, d]
            value, c, s, ss = pattern.sums(log_weights, loc[:, seen], inverse)
            log_prob += value
            count += c
            if len(seen) < d:
                # A missing entry is the regression on the observed ones plus what that leaves.
                regression = covariance[:, :, seen] @ inverse  # [K, D, d]
                offset = loc - np.einsum("kij,kj->ki", regression, loc[:, seen])  # [K, D]
                cross = offset[:, :, np.newaxis] * np.einsum("kij,kj->ki", regression, s)[:, None]
                left = covariance - regression @ covariance[:, seen]
                left += offset[:, :, np.newaxis] * offset[:, np.newaxis]
                ss = regression @ ss @ regression.swapaxes(1, 2) + cross + cross.swapaxes(1, 2)
                ss += c[:, np.newaxis, np.newaxis] * left
                s = np.einsum("kij,kj->ki", regression, s) + c[:, np.newaxis] * offset
            first += s
            second += ss
        return -log_prob / self.total, count, first, second


class _Pattern:
    """The rows that observe the same entries.

    Args:
        observed: [d], their columns.
        z: [n, D].
        weight: [n].
    """

    def __init__(self, observed: np.ndarray, z: np.ndarray, weight: np.ndarray) -> None:
        self.observed = observed
        self.pairs = np.triu_indices(len(observed))
        # [d, n]: sums over components and over moments run along contiguous rows.
        columns = np.ascontiguousarray(z[:, observed].T)
        slices = [slice(i, i + _BLOCK) for i in range(0, len(z), _BLOCK)]
        self.blocks = [(np.ascontiguousarray(columns[:, s]), weight[s]) for s in slices]
        self.cached: Sequence[np.ndarray] | None = None
        size = 1 + len(observed) + len(self.pairs[0])
        if size * columns[0].nbytes <= _MOST_BYTES:
            self.cached = [self._moments(block) for block, _ in self.blocks]

    def _moments(self, z: np.ndarray) -> np.ndarray:
        """Return the moments [Q, n] of columns [d, n]: pairs, then the entries, then one."""
        i, j = self.pairs
        return np.concatenate([z[i] * z[j], z, np.ones([1, z.shape[1]])])

    def sums(
        self, log_weights: np.ndarray, loc: np.ndarray, inverse: np.ndarray
    ) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
        """Return the log likelihood, and each component's sums of 1, z and z z^T.

        Args:
            log_weights: [K].
            loc: [K, d].
            inverse: [K, d, d], of the covariances.

        Returns:
            nats in total, [K], [K, d], [K, d, d].
        """
        k, d = loc.shape
        i, j = self.pairs
        linear = np.einsum("kij,kj->ki", inverse, loc)  # [K, d]
        constant = log_weights - 0.5 * (linear * loc).sum(axis=1) - 0.5 * d * math.log(2 * math.pi)
        constant += 0.5 * np.linalg.slogdet(inverse)[1]
        quadratic = np.where(i == j, -0.5, -1.0) * inverse[:, i, j]  # [K, d (d + 1) / 2]
        coefficients = np.concatenate([quadratic, linear, constant[:, np.newaxis]], axis=1)
        log_prob, total = 0.0, np.zeros([k, coefficients.shape[1]])
        for b, (block, weight) in enumerate(self.blocks):
            moments = self._moments(block) if self.cached is None else self.cached[b]
            joint = coefficients @ moments  # [K, n]
            top = joint.max(axis=0)
            joint -= top
            np.exp(joint, out=joint)
            evidence = joint.sum(axis=0)
            log_prob += weight @ (top + np.log(evidence))
            joint *= weight / evidence  # the responsibilities
            total += joint @ moments.T
        second = np.empty([k, d, d])
        second[:, i, j] = second[:, j, i] = total[:, : len(i)]
        return float(log_prob), total[:, -1], total[:, len(i) : -1], second


def group_by_pattern(y: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return the patterns of observed entries of y [N, D], one a row, and the rows of each."""
    patterns, group = np.unique(~np.isnan(y), axis=0, return_inverse=True)
    group = group.reshape(-1)  # NumPy 2.0 gives [N, 1]
    order = np.argsort(group, kind="stable")
    return patterns, np.split(order, np.cumsum(np.bincount(group))[:-1])
