"""Each simulator's draws and density against scipy, quadrature and its own entropy."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import integrate, special, stats

from mdn.data import simulators
from mdn.data.simulators import Simulator
from mdn.errors import ConfigError

CONFIGS = Path(__file__).parents[1] / "configs" / "data"


@dataclasses.dataclass(frozen=True)
class Case:
    """What scipy says of one simulator.

    Attributes:
        entropy: conditional entropy in nats, to 2e-3.
        log_prob: (y [N, D], x [N, F]) -> [N] nats.
        uniforms: (y [N, D], x [N, F]) -> [N, D], y through its conditional cdfs: each column is
            U(0, 1) if y follows the density.
        box: x [F] -> D pairs (low, high) that hold all of y, or None where D is too large for a
            grid.
    """

    entropy: float
    log_prob: Callable
    uniforms: Callable
    box: Callable | None


def location_scale(entropy: float, parameters: Callable, family=stats.norm) -> Case:
    """Return the case of one y from `family`, where `parameters(x)` ends with loc and scale."""

    def box(x):
        loc, scale = parameters(x)[-2:]
        return [(loc[0] - 10 * scale[0], loc[0] + 10 * scale[0])]

    return Case(
        entropy,
        lambda y, x: family.logpdf(y, *parameters(x))[:, 0],
        lambda y, x: family.cdf(y, *parameters(x)),
        box,
    )


def join_wave(x):
    """Return a grid of t [G], and p(x, t) there [N, G]."""
    t = np.linspace(0, 1, 4001)
    return t, stats.norm.pdf(x, t + 0.3 * np.sin(2 * np.pi * t), 0.05)


def log_prob_sinusoid(y, x):
    t, joint = join_wave(x)
    likelihood = stats.norm.logpdf(x, y + 0.3 * np.sin(2 * np.pi * y), 0.05)
    return likelihood[:, 0] - np.log(integrate.simpson(joint, x=t))


def uniforms_sinusoid(y, x):
    t, joint = join_wave(x)
    below = integrate.cumulative_trapezoid(joint, x=t, initial=0)  # [N, G]
    return np.stack([np.interp(v, t, row) / row[-1] for v, row in zip(y, below, strict=True)])


def log_prob_jump(y, x):
    e = (y - 0.01 - 0.9 * x)[:, 0]
    return np.log(0.95 * stats.norm.pdf(e, 0, 0.05) + 0.05 * stats.norm.pdf(e, -0.3, 0.1))


def uniforms_jump(y, x):
    e = y - 0.01 - 0.9 * x
    return 0.95 * stats.norm.cdf(e, 0, 0.05) + 0.05 * stats.norm.cdf(e, -0.3, 0.1)


def invert_moons(y, x):
    """Return the radius and angle that made each y, [N] and [N]."""
    t1, t2 = x.T
    crescent = y[:, 0] - 0.25 + np.abs(t1 + t2) / 2**0.5 + 1j * (y[:, 1] + (t1 - t2) / 2**0.5)
    return np.abs(crescent), np.angle(crescent)


def log_prob_moons(y, x):
    radius, angle = invert_moons(y, x)
    prior = stats.norm.logpdf(radius, 0.1, 0.01) + stats.uniform.logpdf(angle, -np.pi / 2, np.pi)
    return prior - np.log(radius)


def uniforms_moons(y, x):
    radius, angle = invert_moons(y, x)
    return np.stack([stats.norm.cdf(radius, 0.1, 0.01), angle / np.pi + 0.5], -1)


def box_moons(x):
    centre = 0.25 - np.abs(x[0] + x[1]) / 2**0.5, (x[1] - x[0]) / 2**0.5
    return [(c - 0.2, c + 0.2) for c in centre]


def log_prob_two_gaussians(y, x):
    wide, narrow = (stats.multivariate_normal(np.zeros(2), v).pdf(y - x) for v in (1, 0.01))
    return np.log((wide + narrow) / 2)


def uniforms_two_gaussians(y, x):
    def cdf(z, weight):
        return weight * stats.norm.cdf(z) + (1 - weight) * stats.norm.cdf(z, 0, 0.1)

    first, second = (y - x).T
    wide, narrow = stats.norm.pdf(first), stats.norm.pdf(first, 0, 0.1)
    return np.stack([cdf(first, 0.5), cdf(second, wide / (wide + narrow))], -1)


def covariance_slcp(x):
    """Return the covariance of one point, [N, 2, 2]."""
    s1, s2, rho = x[:, 2] ** 2, x[:, 3] ** 2, np.tanh(x[:, 4])
    covariance = np.stack([s1**2, rho * s1 * s2, rho * s1 * s2, s2**2], -1).reshape(-1, 2, 2)
    return covariance + 1e-6 * np.eye(2)


def log_prob_slcp(y, x):
    rows = zip(y.reshape(-1, 4, 2), x[:, :2], covariance_slcp(x), strict=True)
    return np.array([stats.multivariate_normal(m, c).logpdf(p).sum() for p, m, c in rows])


def uniforms_slcp(y, x):
    centred = y.reshape(-1, 4, 2) - x[:, None, :2]
    scale_tril = np.linalg.cholesky(covariance_slcp(x))
    white = np.linalg.solve(scale_tril, centred.transpose(0, 2, 1))  # [N, 2, 4]
    return stats.norm.cdf(white).reshape(-1, 8)


CASES: dict[type[Simulator], Case] = {
    simulators.Sinusoid: Case(
        -1.2263, log_prob_sinusoid, uniforms_sinusoid, lambda x: [(0.0, 1.0)]
    ),
    simulators.EconDensity: location_scale(1.9538, lambda x: (x**2, 1 + x)),
    simulators.ArmaJump: Case(
        -1.3601, log_prob_jump, uniforms_jump, lambda x: [(0.9 * x[0] - 1.5, 0.9 * x[0] + 1)]
    ),
    simulators.SkewNormal: location_scale(
        -1.6094,
        lambda x: (-4 + 4 * special.expit(x), 0.1 * x, 0.05 + 0.1 * x**2),
        stats.skewnorm,
    ),
    simulators.LinearGaussian: location_scale(-3.1930, lambda x: (0.005 * x, 0.01 + 0.002 * x)),
    simulators.TwoMoons: Case(-4.3492, log_prob_moons, uniforms_moons, box_moons),
    simulators.TwoGaussians: Case(
        1.1404,
        log_prob_two_gaussians,
        uniforms_two_gaussians,
        lambda x: [(t - 8, t + 8) for t in x],
    ),
    simulators.SLCP: Case(9.4747, log_prob_slcp, uniforms_slcp, None),
}

each_simulator = pytest.mark.parametrize("cls", CASES, ids=lambda cls: cls.__name__)


def draw(cls: type[Simulator], rows: int) -> tuple[np.ndarray, np.ndarray]:
    return cls().draw(rows, np.random.default_rng(7))


def configs() -> dict[str, dict]:
    """Return the configs that target a simulator, by file name."""
    every = {path.stem: yaml.safe_load(path.read_text()) for path in CONFIGS.glob("*.yaml")}
    return {k: v for k, v in every.items() if simulators.__name__ in str(v.get("_target_"))}


def test_every_simulator_has_a_case_and_a_config():
    ours = [cls for cls in Simulator.__subclasses__() if cls.__module__ == simulators.__name__]
    assert set(CASES) == set(ours)
    targets = [config["_target_"] for config in configs().values()]
    assert sorted(targets) == sorted(f"{cls.__module__}.{cls.__name__}" for cls in CASES)


@pytest.mark.parametrize("name", sorted(configs()))
def test_config_states_the_defaults(name):
    config = configs()[name]
    cls = getattr(simulators, config.pop("_target_").rpartition(".")[2])
    assert name.replace("_", "") == cls.__name__.lower()
    assert config.pop("seed") == "${seed}"
    defaults = {k: v.default for k, v in inspect.signature(cls).parameters.items()}
    assert config == {k: v for k, v in defaults.items() if k != "seed"}


@each_simulator
def test_load_shapes_and_names(cls):
    simulator = cls(rows=30, validation_rows=20, test_rows=10, seed=0)
    data = simulator.load()
    assert data.truth is simulator
    for rows, size in ((data.train, 30), (data.validation, 20), (data.test, 10)):
        assert rows.x.shape == (size, len(data.features))
        assert rows.y.shape == (size, len(data.targets))
        assert rows.x.dtype == rows.y.dtype == np.float64
        assert simulator.log_prob(rows.y, rows.x).shape == (size,)
    names = data.features + data.targets
    assert len(set(names)) == len(names)


@each_simulator
def test_seed_decides_the_rows(cls):
    def load(rows=30, seed=0):
        return cls(rows=rows, validation_rows=30, test_rows=30, seed=seed).load()

    assert load().fingerprint() == load().fingerprint()
    splits = [s for d in (load(), load(seed=1)) for s in (d.train, d.validation, d.test)]
    assert len({rows.y.tobytes() for rows in splits}) == 6
    np.testing.assert_array_equal(load().test.y, load(rows=40).test.y)
    np.testing.assert_array_equal(load().test.x, load(rows=40).test.x)


@each_simulator
def test_log_prob_equals_scipy(cls):
    x, y = draw(cls, 100)
    log_prob = cls().log_prob(y, x)
    np.testing.assert_allclose(log_prob, CASES[cls].log_prob(y, x), rtol=1e-7, atol=1e-7)


@each_simulator
def test_log_prob_broadcasts_one_x(cls):
    x, y = draw(cls, 20)
    repeated = cls().log_prob(y, np.repeat(x[:1], 20, axis=0))
    np.testing.assert_allclose(cls().log_prob(y, x[:1]), repeated, rtol=1e-12)


BOXES = {cls: case.box for cls, case in CASES.items() if case.box}


@pytest.mark.parametrize("cls", BOXES, ids=lambda cls: cls.__name__)
def test_density_integrates_to_one(cls):
    x, _ = draw(cls, 4)
    for given in x:
        box = BOXES[cls](given)
        cells = {1: 4000, 2: 600}[len(box)]
        axes = [low + (high - low) * (np.arange(cells) + 0.5) / cells for low, high in box]
        y = np.stack(np.meshgrid(*axes), -1).reshape(-1, len(box))
        volume = np.prod([(high - low) / cells for low, high in box])
        density = np.exp(cls().log_prob(y, given[None]))
        assert density.sum() * volume == pytest.approx(1, abs=1e-5)


@each_simulator
def test_entropy_equals_monte_carlo(cls):
    x, y = draw(cls, 100_000)
    losses = -cls().log_prob(y, x)
    standard_error = losses.std() / len(losses) ** 0.5
    assert abs(cls().entropy() - losses.mean()) < 4 * standard_error
    assert cls().entropy() == pytest.approx(CASES[cls].entropy, abs=2e-3)


@each_simulator
def test_draws_follow_the_density(cls):
    x, y = draw(cls, 2000)
    for column in CASES[cls].uniforms(y, x).T:
        assert stats.kstest(column, "uniform").pvalue > 1e-3


def test_sinusoid_has_no_density_outside_its_interval():
    log_prob = simulators.Sinusoid().log_prob(
        np.array([[-0.01], [0.5], [1.01]]), np.full((3, 1), 0.5)
    )
    np.testing.assert_array_equal(np.isfinite(log_prob), [False, True, False])
    assert log_prob[0] == log_prob[2] == -np.inf


def test_sinusoid_far_from_the_wave():
    x, t = np.array([[-5.0], [6.0]]), np.array([[1e-4], [1 - 1e-4]])
    # There the joint density falls off from the end of the interval at this rate, in t.
    slope = 1 + 0.6 * np.pi
    rate = 5 * slope / 0.05**2
    expected = np.log(rate) - 1e-4 * rate
    np.testing.assert_allclose(simulators.Sinusoid().log_prob(t, x), expected, atol=1e-2)


def test_arma_rows_are_one_path():
    x, y = draw(simulators.ArmaJump, 50_000)
    np.testing.assert_array_equal(x[1:], y[:-1])
    variance = (0.95 * 0.05**2 + 0.05 * (0.1**2 + 0.3**2) - 0.015**2) / (1 - 0.9**2)
    assert x.mean() == pytest.approx(-0.05, abs=0.02)
    assert x.var() == pytest.approx(variance, rel=0.1)


@pytest.mark.parametrize(
    ("options", "start"),
    [
        ({"rows": 0}, "data.rows=0: "),
        ({"validation_rows": -1}, "data.validation_rows=-1: "),
        ({"test_rows": 2.5}, "data.test_rows=2.5: "),
        ({"seed": -1}, "seed=-1: "),
    ],
)
def test_bad_option_is_named(options, start):
    with pytest.raises(ConfigError) as error:
        simulators.Sinusoid(**options)
    message = str(error.value)
    assert message.startswith(start)
    assert "\n" not in message


def test_import_is_free_of_tensorflow():
    code = "import sys, mdn.data.simulators; assert 'tensorflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=CONFIGS.parents[1])
