"""The UCI benchmark: its scores by independent means, its files, its mistakes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import norm

import mdn
from benchmarks.uci import __main__ as uci
from benchmarks.uci import blocks
from benchmarks.uci.report import Results, markdown, summarise
from benchmarks.uci.scores import score
from benchmarks.uci.sets import parse_splits
from mdn.errors import ConfigError, RunError

TINY = ("ensemble=2", "folds=2", "k=2", "backbone.widths=[4]", "embedding.bins=2")
TINY += ("trainer.steps=20", "trainer.epochs=2", "trainer.batch_size=16", "trainer.warmup=2")
TINY += ("trainer.compiled=false", "recipe=null")


def write_set(folder, targets=1):
    rng = np.random.default_rng(0)
    x = rng.normal(size=[80, 2])
    y = np.round(x[:, :1] + 0.3 * rng.normal(size=[80, targets]), 1)
    splits = {}
    for i in range(2):
        order = rng.permutation(80).astype(np.int32)
        splits |= {f"train_{i:02d}": order[:60], f"test_{i:02d}": order[60:]}
    folder.mkdir(parents=True)
    np.savez(folder / "data.npz", x=x, y=y[:, 0] if targets == 1 else y, **splits)


def test_scores_of_a_normal():
    rng = np.random.default_rng(1)
    loc, sd, step = 2.0, 1.5, 0.5
    y = np.round(rng.normal(loc, sd, size=[4000, 1]) / step) * step
    normals = mdn.MultivariateNormalTriL(np.full_like(y, loc), np.full([4000, 1, 1], sd))
    found = score(normals, y, y)
    assert found["nll"] == pytest.approx(-norm.logpdf(y, loc, sd).mean(), rel=1e-5)
    cell = norm.cdf(y + step / 2, loc, sd) - norm.cdf(y - step / 2, loc, sd)
    assert found["nll_interval"] == pytest.approx(-np.log(cell / step).mean(), rel=1e-5)
    assert found["rmse"] == pytest.approx(np.sqrt(np.mean((y - loc) ** 2)), rel=1e-5)
    assert found["crps"] == pytest.approx(sd / np.sqrt(np.pi), rel=0.03)
    assert found["coverage90"] == pytest.approx(0.9, abs=4 * np.sqrt(0.09 / 4000))


def test_summary():
    splits = [
        dict.fromkeys(("nll", "nll_interval", "rmse", "crps", "coverage90"), v) for v in (1, 3)
    ]
    found = summarise([{**s, "seconds": 2.0, "nll_se": 0, "nll_interval_se": 0} for s in splits])
    assert (found["nll"], found["nll_se"], found["seconds"], found["splits"]) == (2, 1, 4, 2)


def test_parse_splits():
    assert parse_splits("0-2,7") == [0, 1, 2, 7]
    for text in ("", "a", "3-1"):
        with pytest.raises(ConfigError, match="--splits"):
            parse_splits(text)


@pytest.mark.slow
def test_run_resumes_and_reports(tmp_path, capsys):
    write_set(tmp_path / "data" / "one", targets=2)
    out = tmp_path / "out.json"
    arguments = ["--data", str(tmp_path / "data"), "--json", str(out), *TINY]
    assert uci.main([*arguments[:4], "--splits", "0", *TINY]) == 0
    first = json.loads(out.read_text())["one"]
    assert first["splits"] == 1
    assert uci.main(arguments) == 0
    found = json.loads(out.read_text())["one"]
    assert found["by_split"]["0"] == first["by_split"]["0"]  # not done again
    assert found["splits"] == 2
    assert np.isfinite([found[k] for k in ("nll", "nll_interval", "rmse", "crps")]).all()
    assert capsys.readouterr().out.endswith(markdown({"one": found}))
    assert out.with_suffix(".md").read_text() == markdown({"one": found})
    assert uci.main([*arguments, "--output", str(tmp_path / "pages")]) == 0
    text = (tmp_path / "pages/uci.md").read_text()
    assert f"python -m benchmarks.uci --data DIR {' '.join(TINY)}" in text
    assert markdown({"one": found}) in text
    assert (tmp_path / "pages/uci.png").read_bytes().startswith(b"\x89PNG")
    alone = tmp_path / "alone.json"  # by a program that no split went through before
    blocks._fitter.cache_clear()
    assert uci.main([*arguments[:2], "--json", str(alone), "--splits", "1", *TINY]) == 0
    again = json.loads(alone.read_text())["one"]["by_split"]["1"]
    assert again["nll"] == pytest.approx(found["by_split"]["1"]["nll"], rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "{empty}"], "has no <name>/data.npz"),
        (["--data", "{data}", "--sets", "three"], "--sets=three is not in"),
        (["--data", "{data}", "--splits", "7"], "none of --splits"),
        (["--data", "{data}", "k=three"], "k=three"),
        (["--data", "{data}", "--json", "{other}"], "another config: name another file"),
        (["--data", "{data}", "--json", "{data}/one/data.npz"], "cannot be gone on from"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, arguments, message):
    write_set(tmp_path / "data" / "one")
    (tmp_path / "empty").mkdir()
    other = tmp_path / "other.json"
    other.write_text('{"one": {"key": "of another", "by_split": {}}}')
    names = {"data": tmp_path / "data", "empty": tmp_path / "empty", "other": other}
    assert uci.main([a.format(**names) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_mistakes_are_told_without_tensorflow(tmp_path):
    code = "import sys; from benchmarks.uci.__main__ import main; "
    code += f"main(['--data', {str(tmp_path)!r}]); sys.exit('tensorflow' in sys.modules)"
    root = Path(__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_results_of_something_else_are_refused(tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"a": 1}')
    with pytest.raises(RunError, match="cannot be gone on from"):
        Results(path)
