"""The benchmarks run, and print what the documents quote."""

import dataclasses
import functools
import importlib
import json
import math
import os
import re
import sys
import time
import types

import pytest

from benchmarks import em, ensemble, exact, latency
from benchmarks.speed import __main__ as speed
from benchmarks.speed import measure, workers
from benchmarks.speed.workloads import WORKLOADS


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


@pytest.mark.slow
def test_exact(monkeypatch, capsys, tmp_path):
    page = tmp_path / "pages" / "exact.md"
    monkeypatch.setattr(sys, "argv", ["exact", "--rows=200", "--repeats=1", f"--output={page}"])
    exact.main()
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
        self.runner, self.make_seconds = make(), 0.0

    def train(self, epochs):
        return workers._answer(self.runner, "train", epochs)

    def loss(self, rows):
        return workers._answer(self.runner, "loss", rows)

    def steps(self, default):
        return workers._answer(self.runner, "steps", default)

    def close(self):
        pass


SMALL = ["--rows", "512", "--repeats", "1", "--workloads", "S"]


@pytest.mark.slow
def test_speed(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "Worker", Here)
    where = ["--contenders", "mdn,keras", "--json", str(tmp_path / "speed.json")]
    sections = ["--sections", "race,profile,streaming,inference"]
    assert speed.main([*SMALL, *where, *sections, "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for title in ("A training step", "All agree", "time goes", "Parquet", "Answers"):
        assert title in printed
    assert "Not measured" not in printed
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "speed.json").read_text())
    assert [e["key"] for e in found["race"]["S"]] == ["mdn", "keras", "network"]
    assert all(e["microseconds"][0] > 0 for e in found["streaming"])
    # The same command has nothing left to measure; what did not agree is measured again.
    monkeypatch.setattr(measure, "Worker", None)
    assert speed.main([*SMALL, *where, *sections]) == 0
    assert capsys.readouterr().out == printed
    found["disagreements"] = ["S, Keras as documented: .."]
    (tmp_path / "speed.json").write_text(json.dumps(found))
    with pytest.raises(TypeError):
        speed.main([*SMALL, *where, *sections])
    assert speed.main([*SMALL[:2], "--repeats", "2", *SMALL[4:], *where, *sections]) == 2
    assert "of another machine, of other versions or of 1 rounds" in capsys.readouterr().err
    spent = found["profile"]["S"]
    assert spent["products"] > 0 < spent["others"]
    assert spent["operations"] > 20


def test_a_process_for_each_entrant():
    workload = dataclasses.replace(WORKLOADS["S"], rows=512, epochs=2)
    made = {
        "good": functools.partial(types.SimpleNamespace, train=time.sleep, loss=math.sqrt),
        "raises": functools.partial(int, "x"),
        "missing": functools.partial(importlib.import_module, "nowhere"),
        "dies": functools.partial(os._exit, 3),
    }
    entrants = {key: measure.Entrant(key, key, workload, make) for key, make in made.items()}
    measure.race([*entrants.values()], repeats=1)
    good = entrants.pop("good")
    assert good.failure is None
    assert good.microseconds[0] >= 1e6 / workload.steps  # two epochs of one second each
    assert good.start_loss == good.final_loss == math.sqrt(512)
    assert entrants["raises"].failure.startswith("ValueError: invalid literal")
    assert entrants["missing"].failure == "nowhere is not installed: pip install -e '.[speed]'"
    assert entrants["dies"].failure == "ended with exit code 3"
