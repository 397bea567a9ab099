"""What uniform ranks look like: tests, histograms, shares below a level, and their bands.

A density is calibrated where the ranks of what happens are uniform on [0, 1]. Rows may have
weights; a test or a band then counts as many rows as would say as much without them.

Shape letters: N rows.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from scipy import special, stats

BINS = 20
# Of a chi-square test, so that its p-value is one.
_LEAST_EXPECTED = 5
_EDGE = 1e-9  # a rank of zero or one is six standard deviations off


@dataclasses.dataclass(frozen=True)
class Uniformity:
    """What two tests of uniform ranks say, and in which direction ranks are off.

    Attributes:
        n: ranks, or as many as the weighted ones are worth.
        p_value: of the Cramer-von Mises test; of weighted ranks, of the chi-square test.
        chi_square_p: of the chi-square test of the histogram.
        shift: mean of the ranks as quantiles of N(0, 1): how far y is above the density, in about
            its standard deviations; zero where ranks are uniform.
        spread: their standard deviation: about how often the density would have to be as wide;
            one where ranks are uniform.
    """

    n: float
    p_value: float
    chi_square_p: float
    shift: float
    spread: float

    def describe(self, significance: float = 0.01) -> str:
        """Say in which way the density is off, where the test finds that it is."""
        if not self.n:
            return "nothing observed"
        if self.p_value >= significance:
            return "calibrated"
        most = stats.norm.isf(significance / 2)
        spread = max(self.spread, 1e-9)
        low = self.shift / spread * math.sqrt(self.n)
        narrow = math.log(spread) * math.sqrt(2.0 * self.n)
        found = []
        if abs(narrow) > most:
            found.append("too narrow" if narrow > 0 else "too wide")
        if abs(low) > most:
            found.append("too low" if low > 0 else "too high")
        return ", ".join(found) or "wrong shape"


def check_uniformity(ranks: np.ndarray, weight: np.ndarray | None = None) -> Uniformity:
    """Test whether ranks are uniform on [0, 1].

    Args:
        ranks: [N], NaN is left out.
        weight: [N], or None.

    Source:
        Dawid (1984), Statistical theory: the prequential approach, JRSS A 147; Gneiting et al.
        (2007), Probabilistic forecasts, calibration and sharpness, JRSS B 69.
    """
    present = ~np.isnan(ranks)
    ranks = ranks[present]
    weight = None if weight is None else weight[present]
    if len(ranks) < 2:
        return Uniformity(float(len(ranks)), 1.0, 1.0, 0.0, 1.0)
    n = effective_size(len(ranks), weight)
    chi_square = chi_square_p(ranks, weight)
    equal = weight is None or np.ptp(weight) == 0.0
    p_value = stats.cramervonmises(ranks, "uniform").pvalue if equal else chi_square
    scores = special.ndtri(np.clip(ranks, _EDGE, 1.0 - _EDGE))
    shift = np.average(scores, weights=weight)
    spread = math.sqrt(np.average((scores - shift) ** 2, weights=weight))
    return Uniformity(n, float(p_value), chi_square, float(shift), spread)


def chi_square_p(ranks: np.ndarray, weight: np.ndarray | None = None) -> float:
    """Return the p-value of the chi-square test of the histogram of ranks [N], without NaN."""
    n = effective_size(len(ranks), weight)
    bins = int(min(BINS, n // _LEAST_EXPECTED))
    if bins < 2:
        return 1.0
    observed = relative_histogram(ranks, bins, weight) * n / bins
    return float(stats.chisquare(observed).pvalue)


def effective_size(n: int, weight: np.ndarray | None) -> float:
    """Return how many rows of equal weight have a mean as exact as these n (Kish's)."""
    if weight is None or not n:
        return float(n)
    return float(weight.sum() ** 2 / np.square(weight).sum())


def relative_histogram(
    ranks: np.ndarray, bins: int = BINS, weight: np.ndarray | None = None
) -> np.ndarray:
    """Return the share of each bin of [0, 1] over that of uniform ranks, [bins]."""
    ranks, weight = _present(ranks, weight)
    count, _ = np.histogram(ranks, bins, (0.0, 1.0), weights=weight)
    return count * bins / max(float(count.sum()), 1e-300)


def histogram_band(n: float, bins: int = BINS, share: float = 0.95) -> tuple[float, float]:
    """Return between what `share` of the bins of a histogram of n uniform ranks lie."""
    low, high = stats.binom.interval(share, max(round(n), 1), 1.0 / bins)
    return low * bins / max(n, 1.0), high * bins / max(n, 1.0)


def share_below(
    ranks: np.ndarray, levels: np.ndarray, weight: np.ndarray | None = None
) -> np.ndarray:
    """Return the share of ranks [N] that are not above each level, of the shape of levels."""
    ranks, weight = _present(ranks, weight)
    order = np.argsort(ranks)
    weight = np.ones(len(ranks)) if weight is None else weight[order]
    total = np.concatenate([[0.0], np.cumsum(weight)])
    below = np.searchsorted(ranks[order], levels, side="right")
    return total[below] / max(total[-1], 1e-300)


def share_band(n: float, levels: np.ndarray, share: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Return between what the share below each level lies, of n uniform ranks (binomial)."""
    n = max(n, 1.0)
    low, high = stats.binom.interval(share, max(round(n), 1), levels)
    return low / n, np.minimum(high / n, 1.0)


def central(ranks: np.ndarray) -> np.ndarray:
    """Return the probability of the smallest central interval that holds each rank."""
    return np.abs(2.0 * ranks - 1.0)


def _present(ranks: np.ndarray, weight: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
    present = ~np.isnan(ranks)
    return ranks[present], None if weight is None else weight[present]
