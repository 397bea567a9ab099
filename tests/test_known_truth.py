"""The benchmark of regrets: slopes, resumption, what it writes, wrong inputs, one real cell."""

import json
import os

import numpy as np
import pytest
from scipy import stats

from benchmarks import known_truth
from mdn.budget import settle
from mdn.config import compose_config, make
from mdn.data import simulators
from mdn.evaluation import evaluate
from mdn.tasks import build_model


def cell(regret, error=1e-4):
    return {
        "regret": regret,
        "regret_se": error,
        "nll": regret + 1.0,
        "nll_se": 0.01,
        "coverage90": 0.9,
        "entropy": 1.0,
    }


@pytest.fixture
def fake(monkeypatch):
    """Let every cell have the regret 10 / n, and note which are trained."""
    trained = []

    def train(task, n, seed):
        trained.append((task, n))
        return cell(10 / n)

    monkeypatch.setattr(known_truth, "train", train)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # another process would not see the fake
    return trained


def test_tasks_are_all_the_simulators():
    targets = {compose_config([f"data={task}"]).data._target_ for task in known_truth.TASKS}
    kinds = simulators.Simulator.__subclasses__()
    ours = [kind for kind in kinds if kind.__module__ == simulators.__name__]
    assert targets == {f"{kind.__module__}.{kind.__name__}" for kind in ours}


def test_recipe_is_a_config():
    for n in known_truth.SIZES:
        compose_config(known_truth.recipe(n))


def test_slope_of_a_power_law():
    row = {n: cell(3.0 * n**-0.75) for n in (100, 400, 1600, 6400)}
    assert known_truth.slope(row) == pytest.approx([-0.75, 0.0], abs=1e-9)
    # What is not told from zero has no say.
    assert known_truth.slope(row | {100_000: cell(-1e-5)}) == known_truth.slope(row)
    assert known_truth.slope({100: cell(0.1), 200: cell(0.05)}) is None


def test_slope_and_its_error_are_those_of_scipy():
    rng = np.random.default_rng(0)
    row = {n: cell(n**-0.5 * np.exp(0.3 * rng.normal())) for n in (100, 200, 800, 1600, 3200)}
    x, y = np.log([(n, c["regret"]) for n, c in row.items()]).T
    found = stats.linregress(x, y)
    assert known_truth.slope(row) == pytest.approx([found.slope, found.stderr])


def test_command_goes_on_where_it_was(fake, tmp_path, capsys):
    path = tmp_path / "found.json"
    options = ["--tasks", "two_moons,slcp", "--json", str(path), "--n"]
    assert known_truth.main([*options, "100,200"]) == 0
    assert len(fake) == 4
    first = json.loads(path.read_text())
    assert first["tasks"]["slcp"]["200"]["regret"] == 0.05
    assert known_truth.main([*options, "100,200"]) == 0
    assert len(fake) == 4
    capsys.readouterr()
    assert known_truth.main([*options, "100,200,400"]) == 0
    assert fake[4:] == [("two_moons", 400), ("slcp", 400)]
    printed = capsys.readouterr().out
    assert "| n | TwoMoons | SLCP |" in printed
    assert "| 400 | 0.0250 ± 0.0001 | 0.0250 ± 0.0001 |" in printed
    assert "| slope | -1.00 ± 0.00 | -1.00 ± 0.00 |" in printed


def test_page_and_picture(fake, tmp_path):
    where = ["--json", str(tmp_path / "found.json"), "--output", str(tmp_path / "pages")]
    assert known_truth.main(["--n", "100,200,400", *where]) == 0
    text = (tmp_path / "pages/known_truth.md").read_text()
    assert "    python -m benchmarks.known_truth --n 100,200,400\n" in text
    assert "| H | 1.0000 |" in text
    assert (tmp_path / "pages/known_truth.png").read_bytes().startswith(b"\x89PNG")


def test_interruption_says_how_to_go_on(fake, tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(known_truth, "train", interrupt)
    path = tmp_path / "found.json"
    assert known_truth.main(["--n", "100", "--json", str(path)]) == 130
    assert capsys.readouterr().err == f"interrupted: the same command goes on from {path}\n"


def test_file_of_another_kind_is_refused(fake, tmp_path, capsys):
    path = tmp_path / "found.json"
    options = ["--tasks", "slcp", "--n", "100", "--json", str(path)]
    assert known_truth.main(options) == 0
    assert known_truth.main([*options, "--seed", "1"]) == 2
    assert (
        f"error: --json {path} holds numbers of another seed: remove it" in capsys.readouterr().err
    )
    for content in ("", "[]", "{}", '{"settings": {}, "tasks": {"slcp": 3}}'):
        path.write_text(content)
        assert known_truth.main(options) == 2
        assert "is not a file of this benchmark" in capsys.readouterr().err
    assert len(fake) == 1


def test_file_that_cannot_be_written_is_told_first(fake, tmp_path, capsys):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "found.json"
    assert known_truth.main(["--n", "100", "--json", str(path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: cannot write {path}: ")
    assert not fake


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "moons"], "'moons' is not one of econ_density,"),
        (["--n", "many"], "'many' is no list of numbers of rows"),
        (["--n", "20"], "20 rows are too few: at least 50"),
        (["--seed", "-1"], "'-1' is no seed"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        known_truth.main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_judging_agrees_with_evaluate():
    config = compose_config(
        ["data=two_moons", "data.rows=100", "data.validation_rows=20", "data.test_rows=500", "k=3"]
    )
    data = make(config, "data").load()
    model = build_model(settle(config, data), data)
    found, metrics = known_truth.judge(model, data), evaluate(model, data).metrics
    assert found.pop("entropy") == metrics["data/entropy"]
    assert found == pytest.approx({name: metrics[f"test/{name}"] for name in found}, rel=1e-5)


@pytest.mark.slow
def test_a_cell_is_what_it_says(monkeypatch):
    tiny = ["k=1", "ensemble=1", "trainer.epochs=60", "trainer.batch_size=32", "trainer.verbose=0"]
    monkeypatch.setattr(known_truth, "recipe", lambda n: tiny)
    monkeypatch.setattr(known_truth, "TEST_ROWS", 5_000)
    found = known_truth.train("linear_gaussian", 1000, 0)
    assert found["entropy"] == pytest.approx(-3.1930, abs=1e-3)
    # The paired mean, and the difference of two means, agree up to the error of the latter.
    assert found["nll"] - found["entropy"] == pytest.approx(found["regret"], abs=0.04)
    assert -4 * found["regret_se"] < found["regret"] < 0.1
    assert found["nll_se"] == pytest.approx(np.sqrt(0.5 / known_truth.TEST_ROWS), rel=0.2)
