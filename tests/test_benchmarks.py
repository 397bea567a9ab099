"""The benchmarks run, and print what the documents quote."""

import dataclasses
import functools
import importlib
import importlib.util
import itertools
import json
import math
import os
import re
import sys
import time
import types

import numpy as np
import pytest
import tensorflow as tf

from benchmarks import em, ensemble, exact, latency
from benchmarks.speed import __main__ as speed
from benchmarks.speed import floors, keras_peers, measure, ours, reference, sections, workers
from benchmarks.speed.contenders import KERAS, MDN
from benchmarks.speed.workloads import WORKLOADS, draw


def test_em(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["em", "--rows", "2000", "--repeats", "1"])
    em.main()
    table = capsys.readouterr().out
    nll = [float(value) for value in re.findall(r"\) \| (-?\d+\.\d+) \(", table)]
    assert len(nll) == 2  # scikit-learn's and ours
    assert nll[1] <= nll[0] + 0.01
    assert re.search(r"speed ratio: \d+\.\dx", table)


@pytest.mark.slow
def test_ensemble(monkeypatch, capsys):
    arguments = ["--rows", "256", "--members", "2", "--epochs", "2", "--repeats", "1"]
    arguments += ["--workloads", "S"]
    monkeypatch.setattr(sys, "argv", ["ensemble", *arguments])
    ensemble.main()
    found = re.search(r"\| S \| ensemble \| .* \| (\d\.\d\d) \|", capsys.readouterr().out)
    assert float(found[1]) > 0


def test_exact(monkeypatch, capsys, tmp_path):
    """Step by step: that XLA compiles these queries is shown in `test_queries.py`."""
    page = tmp_path / "pages" / "exact.md"
    monkeypatch.setattr(sys, "argv", ["exact", "--rows=200", "--repeats=1", f"--output={page}"])
    tf.config.run_functions_eagerly(True)
    try:
        exact.main()
    finally:
        tf.config.run_functions_eagerly(False)
    assert capsys.readouterr().out.strip() == page.read_text().strip()
    rows = [line for line in page.read_text().splitlines() if line.startswith("| `")]
    assert len(rows) == len(exact.QUERIES)
    assert sum(bool(re.search(r"\d\.\d\d \(", row)) for row in rows) == 3  # ratios to TFP


def test_latency(monkeypatch, capsys, tmp_path):
    page, numbers = tmp_path / "latency.md", tmp_path / "latency.json"
    arguments = ["--calls=3", "--models=mixture", f"--output={page}", f"--json={numbers}"]
    monkeypatch.setattr(sys, "argv", ["latency", *arguments])
    latency.main()
    assert capsys.readouterr().out.strip() == page.read_text().strip()
    found = json.loads(numbers.read_text())["mixture"]
    assert len(found) == 6
    for name, one in found.items():
        assert 0.0 < one["median"] <= one["p99"]
        assert f"| {name} | {one['median']:.3g} | {one['p99']:.3g} |" in page.read_text()


class Here:
    """A worker without a process of its own, which is what half of a small race would be."""

    def __init__(self, make):
        try:
            self.runner = make()
        except ModuleNotFoundError as error:  # such as JAX, which no test needs
            raise workers.WorkerError(workers.not_installed(error)) from error

    def train(self, epochs):
        return workers._answer(self.runner, "train", epochs)

    def train_in_order(self):
        return workers._answer(self.runner, "train in order", None)

    def loss(self, rows):
        return workers._answer(self.runner, "loss", rows)

    def steps(self, default):
        return workers._answer(self.runner, "steps", default)

    def close(self):
        pass


SMALL = ["--rows", "512", "--repeats", "1", "--workloads", "S"]


def peers_weights():
    """Return JAX's weights after its epoch as TensorFlow's XLA compiles it, and JAX's, [2, n]."""
    from benchmarks.speed.jax_peers import Jax

    problem = ours.with_start(draw(dataclasses.replace(WORKLOADS["S"], rows=512)))
    epoch, state, rows = Jax(problem, "rows").program()
    after = [run(epoch, state, rows)() for run in (floors._exported, floors._jitted)]
    return np.array([np.concatenate([np.ravel(leaf) for leaf in leaves]) for leaves in after])


@pytest.mark.slow
def test_speed(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "Worker", Here)
    where = ["--contenders", "mdn,keras", "--json", str(tmp_path / "speed.json")]
    sections = ["--sections", "race,profile,streaming,inference"]
    without_jax = importlib.util.find_spec("jax") is None
    assert speed.main([*SMALL, *where, *sections, "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for title in ("A training step", "All agree", "time goes", "Parquet", "Answers"):
        assert title in printed
    assert ("Not measured" in printed) == without_jax
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "speed.json").read_text())
    assert [e["key"] for e in found["race"]["S"]] == ["mdn", "keras", "network"]
    assert all(e["microseconds"][0] > 0 for e in found["streaming"])
    alone = {e["key"]: e["microseconds"] for e in found["parts"]["S"]}
    assert alone["Products-tensorflow"][0] > alone["Adam-tensorflow"][0] > 0
    assert without_jax or alone["Peer-tensorflow"][0] > 0
    assert without_jax or np.ptp(peers_weights(), axis=0).max() < 1e-5
    # The same command has nothing left to measure; what did not agree is measured again.
    monkeypatch.setattr(measure, "Worker", None)
    assert speed.main([*SMALL, *where, *sections]) == 0
    assert capsys.readouterr().out == printed
    found["race"]["S"][1]["found"][1] += 0.01
    (tmp_path / "speed.json").write_text(json.dumps(found))
    with pytest.raises(TypeError):
        speed.main([*SMALL, *where, *sections])
    assert speed.main([*SMALL[:2], "--repeats", "2", *SMALL[4:], *where, *sections]) == 2
    assert "of another machine, of other versions or of 1 rounds" in capsys.readouterr().err
    spent = found["profile"]["S"]
    assert spent["products"] > 0 < spent["others"]
    assert spent["operations"] > 20


def sleep(epochs, shuffle=True):
    time.sleep(epochs if shuffle else 0.0)


def test_a_process_for_each_entrant():
    workload = dataclasses.replace(WORKLOADS["S"], rows=512, epochs=2)
    made = {
        "good": functools.partial(types.SimpleNamespace, train=sleep, loss=math.sqrt),
        "raises": functools.partial(int, "x"),
        "missing": functools.partial(importlib.import_module, "nowhere"),
        "dies": functools.partial(os._exit, 3),
    }
    entrants = {key: measure.Entrant(key, key, workload, make) for key, make in made.items()}
    entrants["good"].expected = measure.Losses(0.0, 0.0)
    measure.race([*entrants.values()], repeats=1)
    good = entrants.pop("good")
    assert good.failure is None
    assert good.microseconds[0] >= 1e6 / workload.steps  # two epochs of one second each
    assert good.found == (math.sqrt(512), math.sqrt(512))
    assert good.final_loss == math.sqrt(512)
    assert entrants["raises"].failure.startswith("ValueError: invalid literal")
    assert entrants["missing"].failure == "nowhere is not installed: pip install -e '.[speed]'"
    assert entrants["dies"].failure == "ended with exit code 3"


def small_problem(rows=512, widths=(8, 8), **sizes):
    workload = dataclasses.replace(WORKLOADS["S"], rows=rows, widths=widths, **sizes)
    problem = draw(workload)
    shapes = itertools.pairwise([workload.features, *widths, workload.outputs])
    rng = np.random.default_rng(1)
    weights = [[rng.normal(size=[i, o]) / i, rng.normal(size=o) / 4] for i, o in shapes]
    flat = [w.astype(np.float32) for pair in weights for w in pair]
    return dataclasses.replace(problem, weights=tuple(flat))


@pytest.mark.parametrize("precision", [False, True])
def test_gradients_of_the_reference(precision):
    problem = small_problem(rows=64, targets=3, components=2)
    found = reference.Reference(problem, precision)
    gradients = found._gradients(problem.x, problem.y)
    rng = np.random.default_rng(0)
    for weight, gradient in zip(found.weights, gradients, strict=True):
        direction, start, losses = rng.normal(size=weight.shape), weight.copy(), []
        for step in (1e-5, -1e-5):
            weight[:] = start + step * direction
            losses.append(found.loss(64))
        weight[:] = start
        slope = (losses[0] - losses[1]) / 2e-5
        assert slope == pytest.approx(np.sum(gradient * direction), rel=1e-6, abs=1e-9)


def losses_of(problem, **options):
    trained = reference.Reference(problem, **options)
    start = trained.loss(512)
    trained.train()
    return measure.Losses(start, trained.loss(problem.workload.rows))


@pytest.mark.parametrize(
    ("name", "value", "lines"),
    [
        ("LEARNING_RATE", 1.01e-3, 1),
        ("BETAS", (0.9, 0.99), 1),
        ("EPSILON", 1e-5, 1),
        ("MIN_SCALE", 0.0, 2),
        ("LOG_2_PI", 0.0, 2),
        (None, None, 0),
    ],
)
def test_a_mistake_is_found(monkeypatch, name, value, lines):
    problem = small_problem(rows=4096)
    right = losses_of(problem)
    if name is not None:
        monkeypatch.setattr(reference, name, value)
    entrant = measure.Entrant(
        "x", "x", problem.workload, reference.Reference, right, losses_of(problem)
    )
    found = measure.disagreements([entrant])
    assert len(found) == lines
    assert all(line.startswith("S, x: the loss") for line in found)


def test_mistakes_of_contenders_are_found(monkeypatch):
    monkeypatch.setattr(measure, "Worker", Here)
    monkeypatch.setattr(ours, "LEARNING_RATE", 1.01e-3)
    monkeypatch.setattr(keras_peers, "MIN_SCALE", 0.0)
    problem = ours.with_start(draw(dataclasses.replace(WORKLOADS["S"], rows=512, epochs=1)))
    entrants = sections.checked(problem, [MDN, KERAS])
    measure.race(entrants, repeats=0)
    found = [line.rpartition(" is ")[0] for line in measure.disagreements(entrants)]
    assert found == [
        "S, mdn: the loss after an epoch",
        "S, Keras as documented: the loss before training",
        "S, Keras as documented: the loss after an epoch",
    ]


@pytest.mark.parametrize("hidden", ["bi", "ib"])
@pytest.mark.parametrize("kernel", ["io", "oi"])
def test_products_alone(hidden, kernel):
    rng = np.random.default_rng(0)
    x, *weights = (rng.normal(size=size) for size in ([5, 2], [2, 3], [3, 4]))
    out = x @ weights[0] @ weights[1]
    expected = [x.T @ out @ weights[1].T, (x @ weights[0]).T @ out]  # of half the sum of squares
    state = [x if hidden == "bi" else x.T, *(w if kernel == "io" else w.T for w in weights)]
    _, _, *new = floors._products_step(hidden, kernel)(np, 0.1, *state)
    for after, weight, gradient in zip(new, weights, expected, strict=True):
        after = after if kernel == "io" else after.T
        np.testing.assert_allclose(after, weight + 0.1 * gradient, rtol=1e-12)


def test_adam_alone():
    gradient, zeros = np.array([3.0, -0.2]), np.zeros(2)
    state = [1e-3, 0.0, gradient, zeros, zeros, zeros]
    for _ in range(3):  # by the same gradient, so that each step is one learning rate
        state = floors._adam_step(np, *state)
    np.testing.assert_allclose(state[3], -3e-3 * np.sign(gradient), rtol=1e-4)
