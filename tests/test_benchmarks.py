"""The benchmarks run, and print what the documents quote."""

import re
import sys

from benchmarks import em


def test_em(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["em", "--rows", "2000", "--repeats", "1"])
    em.main()
    table = capsys.readouterr().out
    nll = [float(value) for value in re.findall(r"\) \| (-?\d+\.\d+) \(", table)]
    assert len(nll) == 2  # scikit-learn's and ours
    assert nll[1] <= nll[0] + 0.01
    assert re.search(r"speed ratio: \d+\.\dx", table)
