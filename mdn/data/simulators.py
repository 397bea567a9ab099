"""Simulators: tasks whose conditional density is known exactly, to judge a fit by.

Shape letters: N rows, F features, D targets.
"""

from __future__ import annotations

import abc
import functools
import numbers
from typing import ClassVar

import numpy as np
from scipy import special

from mdn.data.rows import Data, Rows
from mdn.errors import ConfigError

_LOG_2PI = float(np.log(2 * np.pi))
_Reals = np.ndarray | float


class Simulator(abc.ABC):
    """A source that draws its rows from a known density, and is the truth that judges a fit.

    Args:
        rows: number of train rows.
        validation_rows: number of validation rows.
        test_rows: number of test rows.
        seed: of the rows. The splits have independent streams: the size of one does not change
            another.

    Raises:
        ConfigError: a number of rows is not an integer >= 1, or the seed not an integer >= 0.
    """

    features: ClassVar[tuple[str, ...]]
    targets: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        rows: int = 20_000,
        validation_rows: int = 2_000,
        test_rows: int = 10_000,
        seed: int = 0,
    ) -> None:
        sizes = {"rows": rows, "validation_rows": validation_rows, "test_rows": test_rows}
        for name, value in sizes.items():
            _check_integer(f"data.{name}", value, least=1)
        _check_integer("seed", seed, least=0)
        self.sizes = tuple(sizes.values())
        self.seed = seed

    def load(self) -> Data:
        """Draw the three splits."""
        train, validation, test = (
            Rows(*self.draw(size, np.random.default_rng([self.seed, stream])))
            for stream, size in enumerate(self.sizes)
        )
        return Data(train, validation, test, self.features, self.targets, truth=self)

    def entropy(self) -> float:
        """Return the conditional entropy E[-log p(y | x)] in nats: no model can do better."""
        return self._entropy

    @functools.cached_property
    def _entropy(self) -> float:
        return float(self._integrate_entropy())

    @abc.abstractmethod
    def draw(self, rows: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draw x [N, F] and y [N, D]."""

    @abc.abstractmethod
    def log_prob(self, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Return log p(y | x), [N] nats, of y [N, D] given x [N, F]; either may have N = 1."""

    @abc.abstractmethod
    def _integrate_entropy(self) -> float:
        """Compute the conditional entropy in nats, by closed form or quadrature."""


class Sinusoid(Simulator):
    """The inverse of a wave, with up to three modes: x = t + .3 sin(2 pi t) + noise, t given x.

    Source:
        Bishop (1994), Mixture Density Networks, NCRG/94/004; here with Gaussian noise, sd .05.
    """

    features = ("x",)
    targets = ("t",)
    noise = 0.05

    def draw(self, rows: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        t = rng.uniform(size=(rows, 1))
        return self._wave(t) + self.noise * rng.standard_normal((rows, 1)), t

    def log_prob(self, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        t, x = y[:, 0], x[:, 0]
        posterior = _log_normal(x, self._wave(t), self.noise) - self._log_evidence(x)
        return np.where((t >= 0) & (t <= 1), posterior, -np.inf)

    def _integrate_entropy(self) -> float:
        # Bayes: H(t | x) = H(t) + H(x | t) - H(x), and t ~ U(0, 1) has H(t) = 0. The wave stays
        # in [0, 1]; twelve sds of noise on either side hold all of x.
        x, weight = _legendre(-12 * self.noise, 1 + 12 * self.noise, 200)
        return float(_gaussian_entropy(self.noise)) - _entropy(self._log_evidence(x), weight)

    @staticmethod
    def _wave(t: np.ndarray) -> np.ndarray:
        return t + 0.3 * np.sin(2 * np.pi * t)

    def _log_evidence(self, x: np.ndarray) -> np.ndarray:
        """Return log p(x), [N], the integral over t of the joint density."""
        t, weight = _legendre(0, 1, 256)
        wave = self._wave(t)
        # Blocks of rows, since all at once would hold [N, 256].
        return np.concatenate(
            [
                special.logsumexp(_log_normal(block[:, None], wave, self.noise), b=weight, axis=1)
                for block in np.array_split(x, len(x) // 4096 + 1)
            ]
        )


class EconDensity(Simulator):
    """Noise that grows with x: x = |N(0, 1)|, y = x^2 + (1 + x) N(0, 1).

    Source:
        Rothfuss et al. (2019), Conditional Density Estimation with Neural Networks,
        arXiv:1903.00954.
    """

    features = ("x",)
    targets = ("y",)

    def draw(self, rows: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        x = np.abs(rng.standard_normal((rows, 1)))
        return x, x**2 + (1 + x) * rng.standard_normal((rows, 1))

    def log_prob(self, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        return _log_normal(y, x**2, 1 + x)[:, 0]

    def _integrate_entropy(self) -> float:
        x, weight = _legendre(0, 12, 200)
        density = 2 * np.exp(_log_normal(x, 0, 1))
        return weight @ (density * _gaussian_entropy(1 + x))


class ArmaJump(Simulator):
    """An autoregressive path that jumps down now and then; the next value given the previous.

    The rows are consecutive steps of one path: y = .01 + .9 x + e, where e is N(0, .05^2) with
    probability .95, and N(-.3, .1^2) otherwise.

    Source:
        Rothfuss et al. (2019), arXiv:1903.00954.
    """

    features = ("previous",)
    targets = ("next",)

    def draw(self, rows: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        from scipy import signal  # takes most of a second to import, and only this task needs it

        burn_in = 200  # .9^200 < 1e-9: the path forgets that it started at zero
        steps = burn_in + rows + 1
        jumps = rng.uniform(size=steps) < 0.05
        noise = np.where(jumps, -0.3, 0.0)
        noise += np.where(jumps, 0.1, 0.05) * rng.standard_normal(steps)
        path = signal.lfilter([1.0], [1.0, -0.9], 0.01 + noise)[burn_in:, None]
        return path[:-1], path[1:]

    def log_prob(self, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        return self._log_noise((y - 0.01 - 0.9 * x)[:, 0])

    def _integrate_entropy(self) -> float:
        noise, weight = _legendre(-1.5, 0.9, 400)  # twelve sds of either component, at least
        return _entropy(self._log_noise(noise), weight)

    @staticmethod
    def _log_noise(noise: np.ndarray) -> np.ndarray:
        return np.logaddexp(
            np.log(0.95) + _log_normal(noise, 0, 0.05),
            np.log(0.05) + _log_normal(noise, -0.3, 0.1),
        )


class SkewNormal(Simulator):
    """A skew-normal y whose location, scale and skewness all follow x ~ N(0, .5^2).

    Source:
        Rothfuss et al. (2019), arXiv:1903.00954; Azzalini (1985), A class of distributions which
        includes the normal ones.
    """

    features = ("x",)
    targets = ("y",)

    def draw(self, rows: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        x = 0.5 * rng.standard_normal((rows, 1))
        loc, scale, skew = self._parameters(x)
        half, whole = np.abs(rng.standard_normal((rows, 1))), rng.standard_normal((rows, 1))
        return x, loc + scale * (skew * half + whole) / np.hypot(1, skew)

    def log_prob(self, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        loc, scale, skew = self._parameters(x)
        tilt = special.log_ndtr(skew * (y - loc) / scale)
        return (np.log(2) + _log_normal(y, loc, scale) + tilt)[:, 0]

    def _integrate_entropy(self) -> float:
        x, x_weight = _legendre(-6, 6, 200)  # twelve sds of x
        loc, scale, _ = self._parameters(x)
        z, z_weight = _legendre(-12, 12, 400)
        entropy = [
            _entropy(self.log_prob((m + s * z)[:, None], np.full((1, 1), given)), s * z_weight)
            for given, m, s in zip(x, loc, scale, strict=True)
        ]
        return x_weight @ (np.exp(_log_normal(x, 0, 0.5)) * entropy)

    @staticmethod
    def _parameters(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return 0.1 * x, 0.05 + 0.1 * x**2, -4 + 4 * special.expit(x)


class LinearGaussian(Simulator):
    """A narrow Gaussian about a line: x ~ U(-1, 1), y ~ N(.005 x, (.01 + .002 x)^2).

    Source:
        Rothfuss et al. (2019), arXiv:1903.00954.
    """

    features = ("x",)
    targets = ("y",)

    def draw(self, rows: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        x = rng.uniform(-1, 1, (rows, 1))
        return x, 0.005 * x + self._scale(x) * rng.standard_normal((rows, 1))

    def log_prob(self, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        return _log_normal(y, 0.005 * x, self._scale(x))[:, 0]

    def _integrate_entropy(self) -> float:
        x, weight = _legendre(-1, 1, 50)
        return weight @ _gaussian_entropy(self._scale(x)) / 2

    @staticmethod
    def _scale(x: np.ndarray) -> np.ndarray:
        return 0.01 + 0.002 * x


class TwoMoons(Simulator):
    """A crescent whose place depends on theta ~ U(-1, 1)^2.

    The crescent is r (cos a, sin a) with r ~ N(.1, .01^2) and a ~ U(-pi/2, pi/2).

    Source:
        Greenberg et al. (2019), Automatic Posterior Transformation, arXiv:1905.07488.
    """

    features = ("theta_1", "theta_2")
    targets = ("x_1", "x_2")

    def draw(self, rows: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        theta = rng.uniform(-1, 1, (rows, 2))
        radius = 0.1 + 0.01 * rng.standard_normal(rows)
        angle = rng.uniform(-np.pi / 2, np.pi / 2, rows)
        crescent = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1)  # [N, 2]
        return theta, self._centre(theta) + crescent

    def log_prob(self, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        u, v = (y - self._centre(x)).T
        distance = np.hypot(u, v)
        # cos(a) > 0, so that a (very rare) negative radius is what lies on the left.
        log_radius = _log_normal(np.copysign(distance, u), 0.1, 0.01)
        return log_radius - np.log(np.pi) - np.log(distance)  # |d(u, v) / d(r, a)| = |r|

    def _integrate_entropy(self) -> float:
        radius, weight = _legendre(0, 0.2, 200)  # ten sds
        density = np.exp(_log_normal(radius, 0.1, 0.01))
        return _gaussian_entropy(0.01) + np.log(np.pi) + weight @ (density * np.log(radius))

    @staticmethod
    def _centre(theta: np.ndarray) -> np.ndarray:
        t1, t2 = theta.T
        return np.stack([0.25 - np.abs(t1 + t2) / np.sqrt(2), (t2 - t1) / np.sqrt(2)], -1)


class TwoGaussians(Simulator):
    """A wide and a narrow Gaussian, .5 N(theta, I) + .5 N(theta, .01 I), theta ~ U(-10, 10)^2.

    Source:
        Sisson et al. (2007), Sequential Monte Carlo without likelihoods; Lueckmann et al. (2021),
        Benchmarking Simulation-Based Inference, arXiv:2101.04653.
    """

    features = ("theta_1", "theta_2")
    targets = ("x_1", "x_2")

    def draw(self, rows: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        theta = rng.uniform(-10, 10, (rows, 2))
        scale = np.where(rng.uniform(size=(rows, 1)) < 0.5, 1.0, 0.1)
        return theta, theta + scale * rng.standard_normal((rows, 2))

    def log_prob(self, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        return self._log_radial(np.hypot(*(y - x).T))

    def _integrate_entropy(self) -> float:
        radius, weight = _legendre(0, 12, 400)
        return _entropy(self._log_radial(radius), 2 * np.pi * radius * weight)

    @staticmethod
    def _log_radial(radius: np.ndarray) -> np.ndarray:
        """Return the log density of a point at this distance from theta."""
        wide, narrow = (
            _log_normal(radius, 0, scale) + _log_normal(0, 0, scale) for scale in (1, 0.1)
        )
        return np.logaddexp(wide, narrow) - np.log(2)


class SLCP(Simulator):
    """Simple likelihood, complex posterior: four points of one Gaussian with five parameters.

    Given theta ~ U(-3, 3)^5 the points are N((theta_1, theta_2), S), where S has standard
    deviations theta_3^2 and theta_4^2, correlation tanh(theta_5), and 1e-6 on its diagonal.

    Source:
        Papamakarios et al. (2019), Sequential Neural Likelihood, arXiv:1805.07226; the diagonal
        as in Lueckmann et al. (2021), arXiv:2101.04653.
    """

    features = tuple(f"theta_{i}" for i in range(1, 6))
    targets = tuple(f"{axis}_{point}" for point in range(1, 5) for axis in "uv")

    def draw(self, rows: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        theta = rng.uniform(-3, 3, (rows, 5))
        l11, l21, l22 = self._scale_tril(theta[:, 2:])
        a, b = rng.standard_normal((2, 4, rows))
        points = np.stack([theta[:, 0] + l11 * a, theta[:, 1] + l21 * a + l22 * b])  # [2, 4, N]
        return theta, points.transpose(2, 1, 0).reshape(rows, 8)

    def log_prob(self, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        l11, l21, l22 = self._scale_tril(x[:, 2:])
        points = y.reshape(-1, 4, 2).transpose(2, 1, 0)  # [2, 4, N]
        a = (points[0] - x[:, 0]) / l11
        b = (points[1] - x[:, 1] - l21 * a) / l22
        return (_log_normal(a, 0, 1) + _log_normal(b, 0, 1) - np.log(l11 * l22)).sum(0)

    def _integrate_entropy(self) -> float:
        # S is even in each theta, so [0, 3] is enough; theta = 3 u^3 puts the nodes where the
        # logarithm of a vanishing scale bends.
        u, weight = _legendre(0, 1, 64)
        theta = np.stack(np.meshgrid(3 * u**3, 3 * u**3, 3 * u, indexing="ij"), -1)
        weights = np.einsum("i,j,k->ijk", 3 * u**2 * weight, 3 * u**2 * weight, weight)
        l11, _, l22 = self._scale_tril(theta.reshape(-1, 3))
        return 4 * weights.ravel() @ (_gaussian_entropy(l11) + _gaussian_entropy(l22))

    @staticmethod
    def _scale_tril(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the entries (1, 1), (2, 1), (2, 2) of S's Cholesky factor from theta_3 to 5."""
        s1, s2, correlation = theta[:, 0] ** 2, theta[:, 1] ** 2, np.tanh(theta[:, 2])
        l11 = np.sqrt(s1**2 + 1e-6)
        l21 = correlation * s1 * s2 / l11
        return l11, l21, np.sqrt(s2**2 + 1e-6 - l21**2)


def _check_integer(key: str, value: int, least: int) -> None:
    if not isinstance(value, numbers.Integral) or value < least:
        raise ConfigError(f"{key}={value}: must be an integer >= {least}; set e.g. {key}=1000")


def _log_normal(y: _Reals, loc: _Reals, scale: _Reals) -> np.ndarray:
    """Return the log density of N(loc, scale^2) at y; all three broadcast."""
    return -0.5 * ((y - loc) / scale) ** 2 - np.log(scale) - 0.5 * _LOG_2PI


def _gaussian_entropy(scale: _Reals) -> np.ndarray:
    """Return the entropy in nats of a Gaussian with this standard deviation."""
    return 0.5 * (1 + _LOG_2PI) + np.log(scale)


def _entropy(log_prob: np.ndarray, weight: np.ndarray) -> float:
    """Return -integral p log p from the values [n] at quadrature nodes and their weights [n]."""
    return -weight @ (np.exp(log_prob) * log_prob)


def _legendre(low: float, high: float, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the n Gauss-Legendre nodes and weights on [low, high]."""
    node, weight = np.polynomial.legendre.leggauss(n)
    return low + (high - low) * (node + 1) / 2, weight * (high - low) / 2
