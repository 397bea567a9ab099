"""model=distribution: each question of `configs/experiment` reaches its known answer."""

import json

import numpy as np
import pytest
import tensorflow as tf
from forks import run_plain
from scipy import stats

import mdn
from mdn.config import compose_config, config_dir, make
from mdn.data.rows import Data, Rows
from mdn.errors import DataError, RunError
from mdn.estimation import estimate, judge
from mdn.export.distribution import export_distribution
from mdn.options import FITTED

TEN = [4.57, 6.37, 5.93, 7.98, 2.03, 3.59, 8.55, 3.45, 5.06, 6.44]


@pytest.fixture
def run(tmp_path):
    def estimate_(*overrides):
        return estimate(compose_config([f"output_dir={tmp_path}/run", *overrides]))

    return estimate_


def answer(*overrides):
    """Return the metrics of a run, without its files.

    XLA compiles for longer than the small ones take, and is asked for where that is the question.
    """
    config = compose_config(["model.compiled=false", *overrides])
    data = make(config, "data").load()
    return judge(make(config, "model", y=data.train.y, weight=None), config, data)


def experiments():
    """Return the experiments that fit a distribution."""
    names = [path.stem for path in (config_dir() / "experiment").glob("*.yaml")]
    configs = {name: compose_config([f"experiment={name}"]) for name in names}
    return {name for name, config in configs.items() if config.model._target_ == FITTED}


def test_every_question_has_a_test():
    assert experiments() == {
        *("mvn_diag_mle", "mvn_diag_mle_batches", "mle_univariate", "mle_bivariate"),
        *("make_trainable_normal", "points_3d", "bivariate_mixture", "mixture_10d"),
    }


# ---------------------------------------------------------------------- the questions


def test_mvn_diag_mle():
    metrics = answer("experiment=mvn_diag_mle")
    y = np.array([[1, 2], [1.5, 2.5], [2, 3]])
    for d, name in enumerate(("y_1", "y_2")):
        assert metrics[f"answer/mean/{name}"] == pytest.approx(y[:, d].mean())
        assert metrics[f"answer/stddev/{name}"] == pytest.approx(y[:, d].std())
    assert metrics["fit/converged"] == 1.0
    assert metrics["fit/steps"] > 1
    assert metrics["error/mean"] < 1e-3
    assert metrics["error/stddev"] < 1e-3


def test_mvn_diag_mle_in_mini_batches():
    batches = ("experiment=mvn_diag_mle_batches", "model.compiled=true")
    metrics = answer(*batches, "data.test_rows=100")
    assert metrics["fit/converged"] == 1.0
    assert metrics["error/mean_in_se"] < 3.0
    assert metrics["error/stddev"] * (2 * 10_000) ** 0.5 < 3.0  # its standard error


@pytest.mark.parametrize("fixed", [False, True])
def test_mle_univariate(fixed):
    metrics = answer("experiment=mle_univariate", *(["fixed=[scale]"] if fixed else []))
    assert metrics["error/mean"] < 1e-3
    assert metrics["error/stddev"] < 1e-3
    assert abs(metrics["answer/mean/y"]) < 5 / 100  # the rows are N(0, 1)
    assert (metrics["fit/stddev/y"] == 1.0) == fixed


@pytest.mark.parametrize("fixed", [False, True])
def test_mle_bivariate(fixed):
    metrics = answer("experiment=mle_bivariate", *(["fixed=[scale]"] if fixed else []))
    assert metrics["error/mean"] < 1e-3
    assert metrics["error/covariance"] < 1e-3
    held = [metrics[f"fit/covariance/{pair}"] for pair in ("y_1/y_1", "y_1/y_2", "y_2/y_2")]
    assert (np.abs(np.array(held) - [1.0, 0.5, 2.0]).max() < 1e-9) == fixed


@pytest.mark.parametrize("method", ["gradient", "exact"])
def test_make_trainable_normal(method):
    how = (f"model.method={method}", "model.compiled=true")
    metrics = answer("experiment=make_trainable_normal", *how)
    assert metrics["fit/mean/y"] == pytest.approx(5.40, abs=0.005)
    assert metrics["fit/stddev/y"] == pytest.approx(1.95, abs=0.005)
    assert metrics["fit/stddev/y"] == pytest.approx(np.std(TEN), abs=1e-5)


@pytest.mark.parametrize("positivity", ["softplus", "exp", "elu"])
def test_points_3d(positivity):
    metrics = answer("experiment=points_3d", f"model.positivity={positivity}")
    assert metrics["fit/starts"] == metrics["fit/starts_converged"] == 100
    assert metrics["error/worst_start/covariance"] < 1e-3
    assert metrics["answer/covariance/y_3/y_3"] / metrics["answer/covariance/y_1/y_1"] > 50


@pytest.mark.parametrize("method", ["gradient", "em"])
def test_bivariate_mixture(method):
    metrics = answer("experiment=bivariate_mixture", f"model.method={method}")
    assert metrics["fit/converged"] == 1.0
    assert metrics["error/loc"] < 0.1
    assert metrics["error/weight"] < 0.05
    assert metrics["error/kl"] < 0.02
    assert metrics["test/nll"] < metrics["baseline/nll"] - 0.3


@pytest.mark.parametrize("method", [pytest.param("gradient", marks=pytest.mark.slow), "em"])
def test_mixture_10d(method):
    metrics = answer("experiment=mixture_10d", f"model.method={method}", "model.compiled=true")
    assert metrics["test/n"] == 10_000
    assert -3 * metrics["test/regret_se"] < metrics["test/regret"] < 0.05


def test_the_main_path_fits_the_same_mixture():
    """An MDN whose backbone reads nothing, trained as any other."""
    rows = make(compose_config(["data=bivariate_mixture"]), "data", test_rows=4000).load()
    model = mdn.MDN(mdn.heads.Mixture(2, 2), mdn.backbones.Constant())
    model.adapt(rows.train.x, rows.train.y)
    model.compile("adam")
    model.fit(rows.train.x, rows.train.y, epochs=20, batch_size=250, verbose=0)
    fit = mdn.fit_distribution("GaussianMixture", rows.train.y, components=2, method="em")
    network = model.predict_distribution(rows.test.x).log_prob(rows.test.y.astype(np.float32))
    direct = fit.distribution.log_prob(rows.test.y)
    assert abs(float(np.mean(network)) - float(np.mean(direct))) < 0.01


# ---------------------------------------------------------------------- the run


def test_run_directory(run, tmp_path):
    metrics = run("experiment=make_trainable_normal")
    directory = tmp_path / "run"
    assert {path.name for path in directory.iterdir()} == {
        *(".hydra", "metrics.json", "plots", "provenance.json", "saved_model"),
        *("tensorboard", "train.log"),
    }
    assert json.loads((directory / "metrics.json").read_text()) == metrics
    assert all(np.isfinite(value) for value in metrics.values())
    assert {path.name for path in (directory / "plots").iterdir()} == {
        "density.png",
        "history.png",
    }
    assert "converged after" in (directory / "train.log").read_text()
    tags = set()
    for path in (directory / "tensorboard" / "train").iterdir():
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            tags |= {value.tag for value in event.summary.value}
    assert tags == {"config", "density", "nll"}
    with pytest.raises(RunError, match="overwrite=true"):
        run("experiment=make_trainable_normal")


def test_rows_of_a_table_with_missing_entries(run, tmp_path):
    rng = np.random.default_rng(0)
    y = rng.normal([1.0, 5.0], [1.0, 2.0], (300, 2))
    text = [f"{a:.6f},{'' if i % 3 == 0 else f'{b:.6f}'}" for i, (a, b) in enumerate(y)]
    (tmp_path / "rows.csv").write_text("\n".join(["a,b", *text]) + "\n")
    options = ["data=csv", f"data.path={tmp_path}/rows.csv", "data.targets=[a,b]"]
    metrics = run("model=distribution", "model.compiled=false", *options)
    assert metrics["error/mean"] < 1e-3  # of EM
    assert metrics["error/covariance"] < 1e-3
    assert metrics["fit/mean/b"] == pytest.approx(5.0, abs=0.6)


def test_sequences_are_refused(run, tmp_path):
    np.savez(tmp_path / "s.npz", x=np.zeros((30, 4, 1)), y=np.random.rand(30, 4, 1))
    with pytest.raises(DataError, match="not for sequences"):
        run("model=distribution", "data=npz", f"data.path={tmp_path}/s.npz")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["Cauchy", "Laplace"])
def test_moments_that_do_not_exist_are_left_out(run, tmp_path, name):
    metrics = run(
        "experiment=make_trainable_normal", f"model.distribution={name}", "model.initial=null"
    )
    assert ("fit/mean/y" in metrics) == (name == "Laplace")
    assert (tmp_path / "run" / "metrics.json").is_file()


def test_a_test_row_that_cannot_be_is_named():
    train, test = (Rows(np.zeros([2, 0]), np.array(y)) for y in ([[1.0], [2.0]], [[1.0], [-1.0]]))
    data = Data(train, train, test, (), ("y",))
    fit = mdn.fit_distribution("LogNormal", train.y, method="exact")
    with pytest.raises(DataError, match="test row 1 has probability zero under the LogNormal"):
        judge(fit, compose_config(["model=distribution"]), data)


def test_missing_features_do_not_matter(run, tmp_path):
    rows = [f"{'' if i % 7 == 0 else i},{i % 5}" for i in range(60)]
    (tmp_path / "a.csv").write_text("\n".join(["x,y", *rows]) + "\n")
    options = ["data=csv", f"data.path={tmp_path}/a.csv", "data.targets=[y]"]
    assert run("model=distribution", "model.distribution=Poisson", *options)["test/n"] > 0


def test_fixed_in_the_model_is_fixed_in_the_answer():
    metrics = answer("experiment=mle_univariate", "model.fixed=[loc]")
    assert metrics["fit/mean/y"] == metrics["answer/mean/y"] == -10.0
    assert metrics["error/stddev"] < 1e-3


def test_a_fit_that_fails_leaves_nothing_behind(run, tmp_path):
    with pytest.raises(DataError, match="Gamma"):
        run("experiment=mle_univariate", "model.distribution=Gamma", "model.initial=null")
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------- export


@pytest.fixture(scope="module")
def mixture():
    rng = np.random.default_rng(0)
    y = rng.normal(size=(200, 2)) + np.where(rng.random((200, 1)) < 0.5, 3.0, -3.0)
    return mdn.fit_distribution("GaussianMixture", y, components=2, method="em").distribution


def test_export_answers_in_plain_tensorflow(mixture, tmp_path):
    export_distribution(mixture, tmp_path / "saved", targets=("a", "b"))
    y = np.array([[0.0, 1.0], [np.nan, 2.0], [3.0, 3.0]])
    np.save(tmp_path / "y.npy", y)
    program = """
import sys
import numpy as np, tensorflow as tf
answers = tf.saved_model.load("saved").signatures
y = tf.constant(np.load("y.npy"))
draws = [answers["sample"](n=tf.constant(5000), seed=tf.constant([0, 1]))["sample"]] * 2
moments = answers["serving_default"]()
assert not {"mdn", "tensorflow_probability", "tf_keras"} & set(sys.modules)
np.savez("answers.npz", log_prob=answers["log_prob"](y=y)["log_prob"], draws=draws[0],
         mean=moments["mean"], stddev=moments["stddev"], loc=moments["loc"])
"""
    done = run_plain(program, [], tmp_path)
    assert done.returncode == 0, done.stderr
    answers = np.load(tmp_path / "answers.npz")
    np.testing.assert_allclose(answers["log_prob"], mixture.log_prob(y), atol=1e-5)
    np.testing.assert_allclose(answers["mean"], mixture.mean(), atol=1e-5)
    np.testing.assert_allclose(answers["loc"], mixture.loc, atol=1e-5)
    error = answers["stddev"] / 5000**0.5
    assert (np.abs(answers["draws"].mean(axis=0) - answers["mean"]) < 5 * error).all()
    description = json.loads((tmp_path / "saved" / "mdn.json").read_text())
    assert description["distribution"] == "GaussianMixture"
    assert description["targets"] == ["a", "b"]


@pytest.mark.parametrize("name", ["Gamma", "Poisson", "Normal", "StudentT"])
def test_any_distribution_is_exported(name, tmp_path):
    y = np.random.default_rng(0).poisson(5.0, (100, 2)) + 1.0
    fit = mdn.fit_distribution(name, y, compiled=False)
    export_distribution(fit.distribution, tmp_path / "saved", targets=("a", "b"))
    answers = tf.saved_model.load(str(tmp_path / "saved")).signatures
    log_prob = answers["log_prob"](y=tf.constant(y))["log_prob"]
    assert float(-np.mean(log_prob)) == pytest.approx(fit.nll, rel=1e-5)
    draws = answers["sample"](n=tf.constant(2000), seed=tf.constant([0, 1]))["sample"].numpy()
    assert draws.shape == (2000, 2)
    mean = answers["serving_default"]()["mean"].numpy()
    assert (np.abs(draws.mean(axis=0) - mean) < 5 * draws.std(axis=0) / 2000**0.5).all()


def test_known_answer_of_one_normal_is_scipys():
    loc, scale = stats.norm.fit(TEN)
    fit = mdn.fit_distribution("Normal", TEN, method="exact")
    assert fit.parameters()["loc"] == pytest.approx(loc)
    assert fit.parameters()["scale"] == pytest.approx(scale)
