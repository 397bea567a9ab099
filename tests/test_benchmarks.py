"""The benchmarks run, and print what the documents quote."""

import re
import sys

import pytest

from benchmarks import em, ensemble


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
