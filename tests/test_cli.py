"""The command `mdn`, as a user types it."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
import zipfile
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from forks import ROOT, Fork

from mdn.callbacks.checkpoint import Progress
from mdn.cli.main import command, main
from mdn.cli.progress import progress_bar
from mdn.config import compose_config
from mdn.errors import ConfigError, MDNError, RunError
from mdn.export import directory_size
from mdn.finished import (
    _history,
    data_of,
    describe_artefact,
    evaluate_run,
    export_run,
    load_run,
    plot_run,
)
from mdn.listing import find_runs, print_runs

# On one worker, which makes the fixtures once.
pytestmark = pytest.mark.xdist_group("cli")

MAIN = "import sys; sys.argv[0] = 'mdn'; from mdn.cli.main import main; main()"


def mdn(*words, **options):
    command = [sys.executable, "-c", MAIN, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, **options)


def rows(n, seed=0):
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame({"size": rng.normal(size=n), "kind": rng.choice(["a", "b"], n)})
    frame["price"] = frame["size"] + 2.0 * (frame["kind"] == "a") + rng.normal(0.0, 0.5, n)
    return frame


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the directory of a small run."""
    from mdn.training import train

    folder = tmp_path_factory.mktemp("cli")
    rows(300).to_csv(folder / "rows.csv", index=False)
    train(
        compose_config(
            [
                f"output_dir={folder}/runs/first",
                *("data=csv", f"data.path={folder}/rows.csv", "data.targets=[price]", "k=2"),
                *("trainer.epochs=2", "trainer.batch_size=32", "trainer.verbose=0"),
                *("trainer.compiled=false", "backbone.widths=[8]"),
                "callbacks.tensorboard.image_every=0",
            ]
        ),
        ["k=2", "output_dir=x"],
    )
    return folder / "runs" / "first"


# ---------------------------------------------------------------------- words


@pytest.mark.parametrize("name", sorted(command.commands))
def test_every_command_has_help_with_an_example(name, monkeypatch, capsys):
    if name == "train":  # whose options, and whose help, are Hydra's
        monkeypatch.setattr(sys, "argv", ["mdn", "train", "--help"])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 0
        assert re.search(r"Example:\s+mdn train model=mixture", capsys.readouterr().out)
        return
    result = CliRunner().invoke(command, [name, "--help"], prog_name="mdn")
    assert result.exit_code == 0
    assert "Example:" in result.output
    assert f"mdn {name} runs" in result.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bogus"], "No such command 'bogus': see mdn --help"),
        (["predict", "a"], "Missing argument 'DATA': see mdn predict --help"),
        (["predict", "a", "b"], "Missing option '-o' / '--output': see mdn predict --help"),
        (["predict", "a", "b", "-o", "c.parquet", "-q", "2"], "2.0 is not in the range"),
        (["predict", "none", "b", "-o", "c.parquet"], "none is no run directory"),
        (["predict", ".", "b", "-o", "c.csv"], "end its name in .parquet"),
        (["export", "a", "--format", "pickle"], "'pickle' is not"),
        (["evaluate", "none"], "none is no run directory"),
        (["evaluate", ".", "-o", "none/a.json"], "none/a.json: there is no folder none"),
        (["evaluate", ".", "-o", "/dev/null"], "/dev/null exists: name another file, or give"),
        (["plot", "."], "it has no .hydra/config.yaml"),
        (["runs", "none"], "none is no folder"),
        (["train", "kk=3"], "kk=3: kk is no option"),
        (["train", "data=csv", "data.path=none.csv"], "data.path=none.csv matches no file"),
        (["train", "data=npz"], "data.path is not set"),
        (["train", "init_from=none"], "init_from=none has no model.keras: name a run"),
        (["train", "output_dir=/dev/null"], "output_dir=/dev/null is a file: name a directory"),
        (["train", "--bogus"], "unrecognized arguments: --bogus; see mdn train --help"),
        (["train", "--cfg", "job", "kk=3"], "kk=3: kk is no option"),
        (["train", "-m", "seed=0,1", "kk=1,2"], "kk=1: kk is no option"),
        (["train", "-m", "seed=0,1", "k=none"], "k=none"),
        (["train", "--experimental-rerun", "a.pickle"], "loads a pickle, which may run code"),
        (["serve", "none"], "none is no folder: give a run, or what mdn export wrote"),
        (["serve", "."], "is neither a run nor a SavedModel"),
        (["serve", ".", "--name", "a/b"], "name 'a/b': use letters and digits"),
        (["serve", ".", "--port", "70000"], "70000 is not in the range"),
        (["serve", ".", "--max-rows", "0"], "0 is not in the range x>=1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_words_are_one_line_without_tensorflow(
    words, message, tmp_path, monkeypatch, capsys
):
    """In this process, where an import of TensorFlow would be found out."""
    from mdn.cli import main as module
    from mdn.cli import quiet

    def fail():
        raise AssertionError("TensorFlow is imported")

    monkeypatch.setattr(quiet, "import_tensorflow", fail)
    monkeypatch.setattr("mdn.cli.train.import_tensorflow", fail)
    monkeypatch.setattr(sys, "argv", ["mdn", *words])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        module.main()
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize(
    "words", [["--help"], ["predict", "--help"], ["serve", "--help"], ["runs", "."]]
)
def test_light_commands_import_no_tensorflow(words, tmp_path):
    code = f"{MAIN.removesuffix('; main()')}\ntry:\n    main()\nfinally:\n    " + (
        "print('tensorflow' in sys.modules, 'hydra' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False False"


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown_where_somebody_looks(terminal, monkeypatch, capsys):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    with progress_bar() as progress:
        progress(65_536, 0.25)
    said = re.sub(r"\x1b\[[\d;?]*\w", "", capsys.readouterr().err)
    assert ("25 % 65,536 rows" in said) == terminal


# ---------------------------------------------------------------------- finished runs


def test_run_is_loaded_with_the_names_of_its_columns(run):
    model, config = load_run(run)
    assert model.column_names.features == ("size", "kind")
    assert model.column_names.targets == ("price",)
    assert config.k == 2


def test_evaluation_of_a_run_is_that_of_its_training(run, tmp_path):
    before = json.loads((run / "metrics.json").read_text())
    metrics = evaluate_run(run, output=tmp_path / "metrics.json")
    for name in ("test/nll", "test/n", "test/rmse", "baseline/nll"):
        assert metrics[name] == pytest.approx(before[name], rel=1e-5)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics


def test_metrics_replace_a_file_whole_and_only_when_asked(run, tmp_path, monkeypatch):
    path = tmp_path / "metrics.json"
    path.write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr("mdn.finished.load_run", None)  # told before any work
        with pytest.raises(RunError, match="exists: name another file, or give --overwrite"):
            evaluate_run(run, output=path)
    monkeypatch.setattr("os.replace", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(RunError, match=r"cannot write .*metrics.json: No space left on device"):
        evaluate_run(run, output=path, overwrite=True)
    assert path.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    metrics = evaluate_run(run, output=path, overwrite=True)
    assert json.loads(path.read_text()) == metrics


def test_rows_that_have_changed_are_no_test_rows(run, tmp_path):
    table = run.parent.parent / "rows.csv"
    before = table.read_text()
    pd.concat([rows(50, seed=9), pd.read_csv(table)]).to_csv(table, index=False)
    try:
        for judge in (evaluate_run, plot_run):
            with pytest.raises(
                RunError, match=r"are not those that it was trained on.*: give a file of new"
            ):
                judge(run)
        assert evaluate_run(run, str(table))["test/n"] == 350
        copy = tmp_path / "copy"
        shutil.copytree(run, copy)
        (copy / "provenance.json").write_text("{}")  # as of a run that was interrupted
        assert evaluate_run(copy)["test/n"] == 35
    finally:
        table.write_text(before)


def test_evaluation_on_a_table(run, tmp_path):
    frame = rows(80, seed=1)
    frame[["price", "kind", "size"]].to_parquet(tmp_path / "new.parquet", index=False)
    metrics = evaluate_run(run, str(tmp_path / "new.parquet"))
    model, _ = load_run(run)
    x = {"size": frame["size"].to_numpy(), "kind": frame["kind"].to_numpy(object)}
    log_prob = model.log_prob(x, frame[["price"]].to_numpy())
    assert metrics["test/n"] == 80
    assert metrics["test/nll"] == pytest.approx(-log_prob.mean(), rel=1e-5)
    frame.drop(columns="price").to_csv(tmp_path / "unknown.csv", index=False)
    with pytest.raises(MDNError, match="lacks the column 'price'"):
        evaluate_run(run, str(tmp_path / "unknown.csv"))


@pytest.mark.parametrize("n", [1, 3])
def test_rows_that_do_not_vary_are_judged_all_the_same(run, tmp_path, n):
    frame = rows(n, seed=1)
    frame["price"] = 2.5
    frame.to_csv(tmp_path / "new.csv", index=False)
    metrics = evaluate_run(run, str(tmp_path / "new.csv"), tmp_path / "metrics.json")
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    model, config = load_run(run)
    data = data_of(model, config, str(tmp_path / "new.csv")).test
    expected = -model.log_prob(data.x, data.y).mean()
    assert metrics["test/nll"] == pytest.approx(expected, rel=1e-6)
    assert metrics["test/n"] == n
    assert not {"baseline/nll", "test/crps_skill/price"} & set(metrics)
    assert plot_run(run, str(tmp_path / "new.csv"), tmp_path / "pictures")


def test_weights_of_a_table_weigh(run, tmp_path):
    frame = rows(60, seed=1)
    frame["w"] = np.arange(60.0)
    frame.to_csv(tmp_path / "new.csv", index=False)
    model, config = load_run(run)
    config.data.weight = "w"
    weight = data_of(model, config, str(tmp_path / "new.csv")).test.weight
    np.testing.assert_allclose(weight, frame["w"] / frame["w"].mean())


def test_pictures_are_drawn_anew(run, tmp_path):
    paths = plot_run(run, output=tmp_path / "pictures")
    assert {path.name for path in paths} == {path.name for path in (run / "plots").iterdir()}


@pytest.mark.parametrize(
    ("file", "content", "place"),
    [
        ("recipe.json", {"shares": {"as given": 0.3, "light decay": 0.7}}, "light-decay"),
        ("metrics.json", {"selection/k": 3}, "k=3"),
        ("metrics.json", {"test/nll": 1.0}, ""),
    ],
)
def test_history_is_that_of_the_model_that_counts_most(tmp_path, file, content, place):
    (tmp_path / file).write_text(json.dumps(content))
    folder = tmp_path / "checkpoints" / place
    folder.mkdir(parents=True)
    progress = Progress(history={"nll": [1.0, 0.5]})
    np.savez(folder / "epoch-00002.npz", progress=json.dumps(dataclasses.asdict(progress)))
    assert _history(tmp_path) == {"nll": [1.0, 0.5]}


def test_export_does_not_overwrite_unless_asked(run, tmp_path):
    with pytest.raises(RunError, match="saved_model exists: give another --output"):
        export_run(run)
    path = export_run(run, output=tmp_path / "models" / "1")
    description = json.loads((path / "mdn.json").read_text())
    assert description["config"]["k"] == 2
    assert description["targets"] == ["price"]
    export_run(run, output=path, overwrite=True)
    size, *lines = describe_artefact(path)
    assert size == f"{path}: {directory_size(path) / 1e6:.1f} MB, 8 signatures"
    assert "  quantile(kind, size, p) -> quantile" in lines
    assert "  no serving_matrix: feature 'kind' is a category, not a number" in lines
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["export/bytes"] == directory_size(run / "saved_model")


def test_export_says_what_a_format_cannot_hold(run, tmp_path):
    with pytest.raises(ConfigError, match="format=onnx: the feature 'kind' is text"):
        export_run(run, "onnx", tmp_path / "model")
    with pytest.raises(ConfigError, match="format=tflite is unknown: choose one of saved_model,"):
        export_run(run, "tflite", tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_fit_without_features_says_so(tmp_path):
    (tmp_path / ".hydra").mkdir()
    text = "model: {_target_: mdn.fit_distribution}\nbackbone: {_target_: mdn.backbones.MLP}\n"
    (tmp_path / ".hydra" / "config.yaml").write_text(text)
    with pytest.raises(RunError, match="is a fit without features"):
        load_run(tmp_path)


# ---------------------------------------------------------------------- list


def write_run(folder, data, overrides=(), **metrics):
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text("seed: 0\n")
    text = "".join(f"- {word}\n" for word in overrides)
    (folder / ".hydra" / "overrides.yaml").write_text(text or "[]\n")
    if metrics:
        found = {name.replace("__", "/"): value for name, value in metrics.items()}
        (folder / "metrics.json").write_text(json.dumps(found))
        record = {"data_sha256": data, "finished": "2025-01-01T00:00:00+00:00"}
        (folder / "provenance.json").write_text(json.dumps(record))


def test_runs_are_listed_best_first_by_their_rows(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    one = {"test__nll": 1.5, "test__nll_se": 0.25, "train__seconds": 3.0, "test__crps_skill": 0.2}
    write_run(tmp_path / "a" / "0", "x", ["k=3", "'data.targets=[y]'"], **one)
    two = {"test__nll": 0.5, "test__crps_skill": 0.6}
    write_run(tmp_path / "a" / "1", "x", ["k=5", "output_dir=o"], **two)
    write_run(tmp_path / "b", "x", ["k=7"], test__nll=-1.0)
    write_run(tmp_path / "c", "other", test__elbo=-3.0)
    write_run(tmp_path / "d", "other", test__elbo=-2.0)
    write_run(tmp_path / "e", "x")
    print_runs(find_runs(tmp_path))
    out = capsys.readouterr().out
    order = [out.index(word) for word in ("k=7", "k=5", "k=3", "/d", "/c", "unfinished: ")]
    assert order == sorted(order)
    assert "1.5000 ± 0.2500" in out
    assert "data.targets=[y]" in out
    assert "output_dir" not in out
    print_runs(find_runs(tmp_path), "train/seconds")
    out = capsys.readouterr().out
    assert out.index("k=3") < out.index("k=7")
    print_runs(find_runs(tmp_path), "test/crps_skill")
    out = capsys.readouterr().out
    assert out.index("k=5") < out.index("k=3")
    with pytest.raises(
        RunError, match="no run has the metric 'nope': choose one of test/crps_skill"
    ):
        print_runs(find_runs(tmp_path), "nope")


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("test/coverage90", [0.91, 0.87, 0.95, 0.2]),
        ("test/region_coverage50", [0.5, 0.4, 1.0]),
        ("test/crps", [0.1, 0.2]),
        ("test/crps_skill/price", [0.6, 0.2]),
        ("test/pit_p", [0.4, 0.001]),
        ("sbc/p/t", [0.4, 0.001]),
    ],
)
def test_the_best_run_is_first_whatever_the_metric(key, values, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    for i, value in enumerate(values):
        write_run(tmp_path / f"{i}", "x", [f"k={10 - i}"], **{key: value})
    print_runs(find_runs(tmp_path), key)
    out = capsys.readouterr().out
    order = [out.index(f"k={10 - i} ") for i in range(len(values))]
    assert order == sorted(order)


def test_a_folder_that_may_not_be_read_hides_no_other_run(tmp_path, monkeypatch):
    for name in ("a", "b/0", "c"):
        write_run(tmp_path / name, "x", test__nll=1.0)
    iterdir = Path.iterdir

    def refuse(self):
        if self.name == "b":
            raise PermissionError(13, "Permission denied")
        return iterdir(self)

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert [run.path.name for run in find_runs(tmp_path)] == ["a", "c"]


# ---------------------------------------------------------------------- whole commands


@pytest.mark.slow
def test_kill_and_go_on(run, tmp_path):
    frame = pd.concat([rows(70_000, seed=s) for s in range(2)])  # of three blocks
    frame.to_parquet(tmp_path / "big.parquet", index=False)
    words = ["predict", run, tmp_path / "big.parquet", "-o", tmp_path / "out.parquet", "-q", 0.5]
    process = Fork(main, ["mdn", *words], log=tmp_path / "killed")
    parts = tmp_path / ".out.parquet.partial"
    while process.poll() is None and not list(parts.glob("*.parquet")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "out.parquet").exists()
    again = Fork(main, ["mdn", *words], log=tmp_path / "again")
    out, err = again.communicate()
    assert again.returncode == 0, err
    assert err == ""
    assert "of them were there from a command that was stopped" in out
    assert "out.parquet: 140,000 rows" in out
    found = pd.read_parquet(tmp_path / "out.parquet")
    x = {"size": frame["size"].to_numpy(), "kind": frame["kind"].to_numpy(object)}
    expected = load_run(run)[0].predict(x)[:, 0]
    np.testing.assert_allclose(found["price_mean"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_wheel_in_an_empty_environment_trains_predicts_and_serves(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(tmp_path)]
    subprocess.run([*build, str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("mdn-*.whl")
    carried = {"mdn/configs/config.yaml", "mdn/serving/page.html", "mdn/py.typed"}
    assert carried <= set(zipfile.ZipFile(wheel).namelist())
    # Of this environment all but mdn itself, so that nothing has to be downloaded.
    home = tmp_path / "home"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(home / "bin" / "python")]
    subprocess.run([*pip, "install", "--no-deps", "-q", str(wheel)], check=True)
    (site,) = home.glob("lib/python*/site-packages")
    (site / "others.pth").write_text(str(Path(np.__file__).parent.parent) + "\n")
    rows(200).to_csv(tmp_path / "rows.csv", index=False)

    def start(*words, program="mdn"):
        return subprocess.Popen(
            [home / "bin" / program, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        )

    def call(*words, **options):
        process = start(*words, **options)
        out, err = process.communicate()
        assert process.returncode == 0, err
        return out

    assert call("-c", "import mdn; print(mdn.__file__)", program="python").startswith(str(site))
    call(
        *("train", "data=csv", "data.path=rows.csv", "data.targets=[price]", "k=2"),
        *("trainer.epochs=1", "trainer.batch_size=32", "backbone.widths=[8]"),
        *("output_dir=run", "trainer.compiled=false", "callbacks.tensorboard=null"),
    )
    service = start("serve", "run", "--port", "0")  # which is ready when the rows are answered
    try:
        assert "200 rows" in call("predict", "run", "rows.csv", "-o", "out.parquet")
        answers = pd.read_parquet(tmp_path / "out.parquet")
        assert len(answers) == 200
        said = service.stdout.readline()
        assert said.startswith("mdn serves run"), service.stderr.read()
        (url,) = re.findall(r"http://127\.0\.0\.1:\d+/", said)
        with urllib.request.urlopen(f"{url}healthz") as health:
            assert json.load(health) == {"status": "ok"}
        asked = pd.read_csv(tmp_path / "rows.csv")[["size", "kind"]].to_dict("records")
        body = json.dumps({"signature_name": "mean_stddev", "instances": asked}).encode()
        with urllib.request.urlopen(f"{url}v1/models/mdn:predict", body) as answer:
            served = pd.DataFrame(json.load(answer)["predictions"])
        for name in ("mean", "stddev"):
            expected = answers[f"price_{name}"]
            np.testing.assert_allclose(served[name].str[0], expected, rtol=1e-5, atol=1e-6)
        service.terminate()
        assert service.wait(60) == 0, service.stderr.read()
    finally:
        service.kill()
        service.communicate()
