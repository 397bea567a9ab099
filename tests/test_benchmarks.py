"""The benchmarks run, and print what the documents quote."""

import json
import re
import sys

import pytest

from benchmarks import em, ensemble, exact
from benchmarks.speed import __main__ as speed


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


@pytest.mark.slow
def test_speed(capsys, tmp_path):
    sizes = ["--rows", "512", "--repeats", "1", "--workloads", "S"]
    where = ["--contenders", "mdn,keras", "--json", str(tmp_path / "speed.json")]
    sections = ["--sections", "race,streaming,inference"]
    assert speed.main([*sizes, *where, *sections, "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for title in ("A training step", "All agree", "Parquet", "Answers"):
        assert title in printed
    assert "Not measured" not in printed
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "speed.json").read_text())
    assert [e["key"] for e in found["race"]["S"]] == ["mdn", "keras", "network"]
    assert all(e["microseconds"][0] > 0 for e in found["streaming"])
