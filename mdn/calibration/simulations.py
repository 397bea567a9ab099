"""Simulation-based calibration: does a model recover what a simulator was given?

Parameters are drawn from their prior and observations from the simulator, as often as one likes.
If the model's p(theta | x) is the posterior, the rank of each true theta among draws from it is
uniform, whatever the simulator.

Shape letters: N simulations, D event size, S draws.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from mdn.calibration.scores import region_levels
from mdn.calibration.uniformity import BINS, Uniformity, check_uniformity
from mdn.errors import ConfigError, DataError
from mdn.margins import take_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ROWS = 4096  # of densities at a time


@dataclasses.dataclass(frozen=True, repr=False)
class SBC:
    """Ranks of true parameters among draws from the model.

    Attributes:
        names: of the D parameters.
        ranks: [N, D] integers, how many of the draws are below the true value: 0 to S.
        region: [N] in [0, 1], where log p(theta | x) stands among the log densities of the
            draws: what the parameters' own ranks cannot see, such as a wrong correlation.
        draws: S.
    """

    names: tuple[str, ...]
    ranks: np.ndarray
    region: np.ndarray
    draws: int

    @property
    def region_name(self) -> str:
        """What `region` is called in text and pictures."""
        return "joint density" if len(self.names) > 1 else "log density"

    def test(self, name: int | str = 0) -> Uniformity:
        """Return the tests of one parameter's ranks, as numbers in [0, 1]."""
        d = self.names.index(name) if isinstance(name, str) else name
        return check_uniformity(self.uniform[:, d])

    def test_region(self) -> Uniformity:
        """Return the tests of the joint density."""
        return check_uniformity(self.region)

    @property
    def uniform(self) -> np.ndarray:
        """[N, D], the ranks as points of [0, 1], at a random place between two draws."""
        noise = np.random.default_rng(0).uniform(size=self.ranks.shape)
        return (self.ranks + noise) / (self.draws + 1)

    @property
    def p_value(self) -> float:
        """The smallest of all p-values, times their number (Bonferroni), at most one."""
        found = [self.test(d).p_value for d in range(len(self.names))]
        return min(1.0, (len(found) + 1) * min(*found, self.test_region().p_value))

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as JSON can hold them: the tests of each parameter, and of all."""
        return {
            "n": len(self.ranks),
            "draws": self.draws,
            "p_value": self.p_value,
            "parameters": {
                name: {**dataclasses.asdict(self.test(d)), "verdict": self.test(d).describe()}
                for d, name in enumerate(self.names)
            },
            "joint": dataclasses.asdict(self.test_region()),
        }

    def metrics(self) -> dict[str, float]:
        """Return flat keys for metrics.json: sbc/p/<parameter>, sbc/p_joint, sbc/n."""
        found = {f"sbc/p/{name}": self.test(d).p_value for d, name in enumerate(self.names)}
        return found | {"sbc/p_joint": self.test_region().p_value, "sbc/n": float(len(self.ranks))}

    def plot(self) -> Figure:
        """Return the histograms of the ranks, and how far their shares are from uniform ones."""
        from mdn.calibration.plots import sbc_figure

        return sbc_figure(self)

    def __repr__(self) -> str:
        lines = [f"SBC of {len(self.ranks):,} simulations, {self.draws} draws each"]
        width = max(len(self.region_name), *map(len, self.names))
        for d, name in enumerate(self.names):
            test = self.test(d)
            lines.append(f"  {name:{width}s}  p = {test.p_value:.2g}  {test.describe()}")
        p_value = self.test_region().p_value
        lines.append(f"  {self.region_name:{width}s}  p = {p_value:.2g}")
        return "\n".join(lines)


def sbc(
    model: Any,
    simulate: Any,
    n: int = 1000,
    *,
    draws: int = 99,
    seed: int = 0,
    posterior: bool = False,
    names: Sequence[str] | None = None,
) -> SBC:
    """Check a model of p(theta | x) against the simulator that its rows come from.

    Args:
        model: an `mdn.MDN`, or anything with its `predict_distribution`; or a function from x
            [N, F] to a density with batch [N].
        simulate: a simulator of `mdn.data.simulators`, or a function of (n, NumPy generator) that
            returns x [n, F] and theta [n, D], theta drawn from its prior.
        n: simulations, all new to the model.
        draws: S, for each simulation; S + 1 that is a multiple of 20 fills the bins evenly.
        seed: of the simulations and of the draws.
        posterior: the simulator returns theta first and then x, as those do whose features are
            named theta; the model answers theta given x.
        names: of the parameters.

    Raises:
        ConfigError: there are too few simulations or draws.
        DataError: the simulator does not return what the model answers.

    Source:
        Talts et al. (2018), Validating Bayesian inference algorithms with simulation-based
        calibration, arXiv:1804.06788; of the joint density, Modrak et al. (2023),
        Simulation-based calibration checking for Bayesian computation, Bayesian Analysis.
    """
    if n < 2 * BINS:
        raise ConfigError(f"n={n}: give at least {2 * BINS} simulations, better a thousand")
    if draws < 2:
        raise ConfigError(f"draws={draws}: ranks need some, such as 99")
    rng = np.random.default_rng([seed, 0x736263])
    pair = getattr(simulate, "draw", simulate)(n, rng)
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise DataError("simulate: must return two arrays, x and theta")
    first, second = pair
    x, theta = (second, first) if posterior else (first, second)
    theta = np.asarray(theta, np.float64)
    answer: Callable = getattr(model, "predict_distribution", model)
    if not callable(answer):
        raise DataError(f"{model!r} is neither a model nor a function of x")
    density = answer(x)
    d = density.event_shape[-1]
    if theta.shape != (n, d):
        raise DataError(
            f"the simulator returns parameters of shape {list(theta.shape)}, and the model "
            f"answers [{n}, {d}]: give them as they were learned"
            + ("" if posterior else ", or posterior=True if theta is what comes first")
        )
    if names is None:
        known = getattr(simulate, "features" if posterior else "targets", None)
        names = known or [f"theta_{i}" for i in range(1, d + 1)]
    if len(names) != d:
        raise DataError(f"names={list(names)}: there are {d} parameters; name each")
    ranks = np.empty((n, d), int)
    for start in range(0, n, _ROWS):
        rows = slice(start, min(start + _ROWS, n))
        part = take_rows(density, (n,), rows)
        sample = part.sample(draws, seed=int(rng.integers(2**31))).numpy()  # [S, n, D]
        ranks[rows] = (sample < theta[rows]).sum(axis=0)
    region = region_levels(density, theta, draws, seed)
    return SBC(tuple(names), ranks, region, draws)


def ecdf_band(n: int, share: float = 0.95) -> float:
    """Return how far the distribution function of n uniform ranks strays at most (Kolmogorov)."""
    return float(stats.kstwo.ppf(share, n))
