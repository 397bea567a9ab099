"""LiteRT and ONNX files answer, each in its own runtime, as the Keras model does."""

from __future__ import annotations

import functools
import importlib.util
import json

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
import tf_keras
from scipy import stats

from mdn import MDN, VAE, Ensemble, backbones, heads
from mdn.data.rows import ColumnNames
from mdn.density.recalibration import Recalibration
from mdn.density.transformed import split_transform
from mdn.embeddings import PiecewiseLinear
from mdn.errors import ConfigError, RunError
from mdn.export import export_litert, export_onnx, export_saved_model
from mdn.export.graphs import mixture_log_prob, softplus
from mdn.export.portable import Format, check_portable, export_portable
from mdn.prediction import predict_file
from mdn.stacking import stack

RNG = np.random.default_rng(0)
X = RNG.normal(5.0, 3.0, [64, 3]).astype(np.float32)
Y = RNG.normal(1.0, 2.0, [64, 3]) * [1.0, 10.0, 0.1] + X[:, :1]
MISSING = np.where(RNG.random(X.shape) < 0.1, np.float32(np.nan), X)
COLUMNS = {"Größe": X[:, 0] + 100.0, "y": MISSING[:, 1], "class": X[:, 2]}
INPUTS = {"Größe": "Gr_e", "y": "y_2", "class": "class_"}

TRANSFORMS = ["log", None, {"name": "logit", "low": 0.0, "high": 99.0}]

EXPORTS = {"litert": (export_litert, ".tflite"), "onnx": (export_onnx, ".onnx")}


def adapted(head, backbone=None, x=X, missing="error", embedding=None, members=0, y=Y):
    model = MDN(head, backbone or backbones.MLP([8]), embedding=embedding)
    if members:
        model = Ensemble(model, members)
    model.adapt(x, y[:, : head.event_size], missing=missing)
    return model, x


def tabular():
    """Return what `experiment=tabular` is, smaller: members, embedding, background."""
    head = heads.Mixture(2, 3, background="auto", start="centre", positivity="exp")
    backbone = backbones.MLP([8], layer_norm=True)
    model, x = adapted(head, backbone, COLUMNS, "indicator", PiecewiseLinear(4), members=2)
    model.set_recalibration(Recalibration((0.1, -0.2), (1.1, 0.9), 0.9))
    return model, x


def stacked():
    """Return what its recipe makes: ensembles of unequal depth, with an embedding and without."""
    made = {}
    for name, widths, embedding in (("steps", [8], PiecewiseLinear(4)), ("smooth", [4, 4], None)):
        head = heads.Mixture(2, 2, background=0.01)
        made[name], x = adapted(head, backbones.MLP(widths), X, "error", embedding, members=2)
    spread = Recalibration((0.0, 0.0), (0.8, 1.2), kept=1)
    return stack(made, {"steps": 0.7, "smooth": 0.3}, spread, agreement=1.5), x


def mapped():
    """Return a stack of densities without a matrix that agree, with a map of the whole."""
    made = {}
    for name in ("a", "b"):
        head = heads.MixtureLowRank(3, 9, rank=1, background=0.01)
        made[name], x = adapted(head, backbones.MLP([4]), members=2)
    model = stack(made, {"a": 0.4, "b": 0.6}, agreement=0.7)
    model.set_recalibration(Recalibration((0.1, -0.2, 0.0), (1.1, 0.9, 1.2), 0.9))
    return model, x


def wide():
    """Return a density whose scale comes of a raw 100, where a plain softplus overflows."""
    model, x = adapted(heads.Diag(2), members=2)
    bias = model.stacked_weights[-1]
    bias.assign(np.where(np.arange(4) == 3, 100.0, bias.numpy()))
    return model, x


CASES = {
    "tabular": tabular,
    "stacked": stacked,
    "mapped": mapped,
    "diag": wide,
    "tril": lambda: adapted(heads.TriL(3), backbones.ResNet(8, 1), MISSING, "indicator"),
    "one_target": lambda: adapted(heads.Mixture(1, 2), backbones.MLP([8], activation="selu")),
    "mixture_diag": lambda: adapted(
        heads.MixtureDiag(3, 2, background="learned", target_transform=TRANSFORMS),
        y=np.abs(Y) + 1.0,
    ),
    "precision": lambda: adapted(heads.MixturePrecision(3, 2, background=0.01)),
    "low_rank": lambda: adapted(
        heads.MixtureLowRank(3, 2, rank=2, positivity="elu"), backbones.Constant(), members=2
    ),
}


@functools.lru_cache
def make(case):
    tf_keras.utils.set_random_seed(0)
    return CASES[case]()


# Each on one worker, which makes its model once.
NAMES = [pytest.param(name, marks=pytest.mark.xdist_group(f"portable-{name}")) for name in CASES]


def rows(x, n):
    """Return n rows with entries of x in new places, a column at a time."""
    rng = np.random.default_rng(1)
    if isinstance(x, dict):
        return {key: rng.choice(values, n) for key, values in x.items()}
    return np.stack([rng.choice(values, n) for values in x.T], axis=-1)


def as_inputs(x):
    return {INPUTS[k]: v for k, v in x.items()} if isinstance(x, dict) else {"x": x}


def answer(form, file, inputs):
    """Return what the runtime alone makes of a file."""
    if form == "litert":
        from ai_edge_litert.interpreter import Interpreter

        return Interpreter(model_path=str(file)).get_signature_runner()(**inputs)
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file))
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, inputs), strict=True))


def assert_close(found, expected):
    """Compare to 1e-5 of each value, or of a usual one where it is near zero."""
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    usual = 1e-5 * np.abs(expected).mean()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=usual)


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize("form", EXPORTS)
@pytest.mark.parametrize("case", NAMES)
def test_files_answer_as_the_model_does(case, form, tmp_path):
    model, x = make(case)
    export, suffix = EXPORTS[form]
    folder = export(model, tmp_path / "model")
    assert {file.name for file in folder.iterdir()} == {
        "mdn.json",
        f"params{suffix}",
        f"log_prob{suffix}",
    }
    x = rows(x, 1000)
    density = model(tf.nest.map_structure(tf.constant, x), training=False)
    y = density.sample(seed=(1, 2)).numpy()
    mixture = split_transform(density)[0].as_mixture()
    expected = mixture.tensors()
    if case in ("diag", "mixture_diag"):
        expected = mixture.mixture_parameters()._asdict()
    inputs = as_inputs(x)
    params = answer(form, folder / f"params{suffix}", inputs)
    assert params.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(params[name], np.asarray(value))
    log_prob = answer(form, folder / f"log_prob{suffix}", inputs | {"y": y})["log_prob"]
    assert_close(log_prob, density.log_prob(y).numpy())

    first = {name: values[:1] for name, values in inputs.items()}
    for name, value in answer(form, folder / f"params{suffix}", first).items():
        assert_close(value, np.asarray(expected[name])[:1])
    alone = answer(form, folder / f"log_prob{suffix}", first | {"y": y[:1]})["log_prob"]
    np.testing.assert_allclose(alone, log_prob[:1], rtol=1e-5)
    absent = answer(form, folder / f"log_prob{suffix}", first | {"y": y[:1] * np.nan})
    assert np.isnan(absent["log_prob"]).all()

    signatures = json.loads((folder / "mdn.json").read_text("utf-8"))["signatures"]
    assert signatures["params"]["inputs"].keys() == inputs.keys()
    assert signatures["log_prob"]["inputs"].keys() == {*inputs, "y"}
    for name, stated in signatures["params"]["outputs"].items():
        assert stated["shape"][1:] == list(params[name].shape[1:])
        assert stated["meaning"]
    if case == "diag":
        assert params["scale_tril"][0, 0, 1, 1] > 90.0 * Y[:, 1].std()


@pytest.mark.parametrize("form", EXPORTS)
def test_weights_are_known_as_well_as_the_means(form, tmp_path):
    """Members agree on narrow targets that are far from zero: of their last digit."""
    tf_keras.utils.set_random_seed(0)
    made = {}
    y = 0.02 * (Y - Y.mean(axis=0)) / Y.std(axis=0) + np.arange(len(Y))[:, np.newaxis] % 6 + 100.0
    for name in ("a", "b"):
        made[name], x = adapted(heads.Mixture(2, 9, background=0.01), members=2, y=y)
    model = stack(made, {"a": 0.4, "b": 0.6}, agreement=3.0)
    export, suffix = EXPORTS[form]
    folder = export(model, tmp_path / "model")
    x = rows(x, 1000)
    logits = answer(form, folder / f"params{suffix}", as_inputs(x))["logits"]
    np.testing.assert_allclose(logits, model(tf.constant(x)).logits, atol=1e-3)


def test_every_head_has_a_case():
    every = {getattr(heads, name) for name in heads.__all__} - {heads.Head, heads.MixtureHead}
    assert {type(make(case)[0].head) for case in CASES} == every


@pytest.mark.parametrize("form", EXPORTS)
def test_an_operation_that_the_runtime_has_not_is_one_line(form, tmp_path):
    layers = tf_keras.layers
    model, _ = adapted(
        heads.Diag(1), tf_keras.Sequential([layers.Dense(2), layers.Activation(tf.math.digamma)])
    )
    with pytest.raises((ConfigError, RunError), match=rf"format={form}: .*Digamma") as caught:
        EXPORTS[form][0](model, tmp_path / "model")
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("export format=saved_model")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- operations


def test_log_prob_equals_scipy():
    rng = np.random.default_rng(2)
    b, k, d, r = 4, 3, 3, 2
    logits, loc = rng.normal(size=[b, k]), rng.normal(size=[b, k, d])
    y = rng.normal(size=[b, d])
    lower = np.tril(rng.normal(size=[b, k, d, d]), -1)
    factor = lower + rng.uniform(0.5, 2.0, [b, k, d, 1]) * np.eye(d)
    diagonal = rng.uniform(0.5, 2.0, [b, k, d])
    shared = rng.normal(size=[b, k, d, r])
    squared = factor @ np.swapaxes(factor, -1, -2)
    variances = diagonal[..., None] ** 2 * np.eye(d)
    forms = {
        ("scale_tril",): ([factor], squared),
        ("scale_diag",): ([diagonal], variances),
        ("precision_tril",): ([factor], np.linalg.inv(squared)),
        ("scale_diag", "factor"): (
            [diagonal, shared],
            variances + shared @ np.swapaxes(shared, -1, -2),
        ),
    }
    weights = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    for names, (tensors, covariance) in forms.items():
        given = {"logits": logits, "loc": loc, **dict(zip(names, tensors, strict=True))}
        found = mixture_log_prob({name: tf.constant(t) for name, t in given.items()}, y)
        for i in range(b):
            components = [
                stats.multivariate_normal(loc[i, j], covariance[i, j]).pdf(y[i]) for j in range(k)
            ]
            np.testing.assert_allclose(found[i], np.log(weights[i] @ components), rtol=1e-12)


def test_softplus_to_the_last_digits():
    x = np.concatenate([np.linspace(-80.0, 120.0, 2001), [-1e-6, 0.0, 1e-6]]).astype(np.float32)
    exact = np.logaddexp(0.0, x.astype(np.float64))
    np.testing.assert_allclose(softplus(tf.constant(x)), exact, rtol=5e-7)


# ---------------------------------------------------------------------- folders


class Here(Format):
    """Files that stand for functions of this process: no converter, no runtime of its own."""

    name, suffix, runtime = "here", ".here", "json"

    def __init__(self, off=0.0):
        self.functions, self.off = [], off

    def convert(self, function):
        self.functions.append(function)
        return str(len(self.functions) - 1).encode()

    def load(self, path):
        function = self.functions[int(path.read_bytes())]

        def answer(arrays):
            outputs = function(**{name: tf.constant(array) for name, array in arrays.items()})
            return {name: value.numpy() + self.off for name, value in outputs.items()}

        return answer


def test_a_recalibrated_stack_is_written(tmp_path):
    """What is written is compared with the model; here without a converter."""
    model, x = make("stacked")
    x, form = rows(x, 50), Here()
    before = model.predict_distribution(x).log_prob(Y[:50, :2].astype(np.float32))
    model.set_recalibration(Recalibration((0.2, -0.1), (1.2, 0.8), 0.7))
    try:
        folder = export_portable(form, model, tmp_path / "model")
        expected = model.predict_distribution(x).log_prob(Y[:50, :2].astype(np.float32))
    finally:
        model.set_recalibration(None)
    answer = form.load(folder / "log_prob.here")
    found = answer({"x": x, "y": Y[:50, :2].astype(np.float32)})["log_prob"]
    assert_close(found, expected.numpy())
    assert np.abs(found - before).min() > 1e-3


@pytest.mark.parametrize("missing", ["error", "indicator"])
def test_a_missing_number_that_no_train_row_lacked_is_the_same_everywhere(
    missing, tmp_path, graph_answers
):
    """Without indicators its row has no answer, with them it has that of the mean."""
    columns = {"a": (X if missing == "error" else MISSING)[:, 0], "b": X[:, 1]}
    head, backbone = heads.Mixture(2, 2, background=0.01), backbones.MLP([8], activation="relu")
    model, _ = adapted(head, backbone, columns, missing, PiecewiseLinear(4))
    model.column_names = ColumnNames(("a", "b"), ("u", "v"))
    asked = {"a": X[:3, 0], "b": X[:3, 1].copy()}
    asked["b"][1] = np.nan
    y = Y[:3, :2].astype(np.float32)
    density = model.predict_distribution(asked)
    mean, log_prob = density.mean().numpy(), density.log_prob(y).numpy()
    answered = np.array([True, missing == "indicator", True])
    np.testing.assert_array_equal(np.isfinite(mean).all(axis=1), answered)
    np.testing.assert_array_equal(np.isfinite(log_prob), answered)
    np.testing.assert_allclose(model.predict(asked), mean, rtol=1e-5)
    if missing == "indicator":
        filled = {**asked, "b": np.where(np.isnan(asked["b"]), X[:, 1].mean(), asked["b"])}
        np.testing.assert_allclose(model.predict(filled), mean, rtol=1e-5)

    pd.DataFrame({**asked, "u": y[:, 0], "v": y[:, 1]}).to_csv(tmp_path / "x.csv", index=False)
    predict_file(model, str(tmp_path / "x.csv"), tmp_path / "out.parquet")
    table = pd.read_parquet(tmp_path / "out.parquet")
    np.testing.assert_allclose(table[["u_mean", "v_mean"]], mean, rtol=1e-5)
    np.testing.assert_allclose(table["log_prob"], log_prob, rtol=1e-5)
    assert (table.notna().all(axis=1) == answered).all()

    if missing == "indicator":  # of which the converters see nothing new
        form = Here()
        folder = export_portable(form, model, tmp_path / "here")
        found = form.load(folder / "log_prob.here")({**asked, "y": y})["log_prob"]
        np.testing.assert_allclose(found, log_prob, rtol=1e-4)
        return
    path = export_saved_model(model, tmp_path / "saved_model")
    given = {"y": y, "p": np.float32([0.5]), "level": np.float32(0.5), "n": 2, "seed": [1, 2]}
    given |= {**asked, "x": np.stack([asked["a"], asked["b"]], axis=1)}
    for name, function in tf.saved_model.load(path).signatures.items():
        if name == "condition":
            given["y"] = np.where([[True, False]], np.nan, y)
        inputs = {
            key: tf.constant(given[key], spec.dtype)
            for key, spec in function.structured_input_signature[1].items()
        }
        for key, value in function(**inputs).items():
            if name == "condition" and key not in ("mean", "stddev"):
                continue
            value = value.numpy()[..., 0] if name == "condition" else value.numpy()
            value = np.moveaxis(value, int(key in ("quantile", "sample")), 0).reshape(3, -1)
            wrong = f"{key} of {name}"
            np.testing.assert_array_equal(np.isfinite(value).all(axis=1), answered, wrong)
            np.testing.assert_array_equal(np.isnan(value).all(axis=1), ~answered, wrong)
            if name == "mean_stddev" and key == "mean":
                np.testing.assert_allclose(value, mean, rtol=1e-5)

    for form, (export, suffix) in EXPORTS.items():
        folder = export(model, tmp_path / form)
        for name, value in answer(form, folder / f"params{suffix}", asked).items():
            found = np.isfinite(value).reshape(3, -1)
            np.testing.assert_array_equal(found.all(axis=1), answered, f"{name} of {form}")
            np.testing.assert_array_equal(found.any(axis=1), answered, f"{name} of {form}")
        found = answer(form, folder / f"log_prob{suffix}", asked | {"y": y})["log_prob"]
        np.testing.assert_allclose(found, log_prob, rtol=1e-4)


def test_a_folder_is_replaced_only_when_told(tmp_path):
    model, _ = make("precision")
    path = tmp_path / "model"
    assert export_portable(Here(), model, path, targets=["a", "b", "c"]) == path
    with pytest.raises(RunError, match=r"model exists: .* overwrite=True"):
        export_portable(Here(), model, path)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    assert json.loads(before["mdn.json"])["targets"] == ["a", "b", "c"]
    with pytest.raises(RunError, match="differs from the model by 1, and nothing is written"):
        export_portable(Here(1.0), model, path, overwrite=True)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    export_portable(Here(), model, path, overwrite=True)
    assert json.loads((path / "mdn.json").read_text())["targets"] != ["a", "b", "c"]
    (path / "params.here").unlink()
    with pytest.raises(RunError, match=r"not a folder with params\.here, so it stays"):
        export_portable(Here(), model, path, overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_an_answer_of_nan_is_none(tmp_path):
    with pytest.raises(RunError, match="differs from the model"):
        export_portable(Here(np.float32(np.nan)), make("precision")[0], tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_package_that_is_not_there(tmp_path, monkeypatch, caplog):
    found = importlib.util.find_spec
    absent = ["onnx"]
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in absent else found(name)
    )
    model, _ = make("precision")
    with pytest.raises(ConfigError, match=r"needs onnx, .* pip install 'mdn\[onnx\]'"):
        export_onnx(model, tmp_path / "model")
    absent[:] = ["json"]
    export_portable(Here(1.0), model, tmp_path / "model")
    assert "not compared with the model" in caplog.text


WORDS = np.array(["a", "b"] * 32, object)
REFUSED = {
    "'kind' is text": lambda: adapted(heads.Diag(1), x={"size": X[:, 0], "kind": WORDS})[0],
    "'at' needs float64": lambda: adapted(heads.Diag(1), x={"at": 1.7e9 + X[:, 0].astype(float)})[
        0
    ],
    r"sequences \[B, T, F\]": lambda: adapted(heads.Diag(1), x=X[:, None])[0],
    "computes in float64": lambda: adapted(heads.Diag(1, dtype="float64"))[0],
    "has no scaling yet": lambda: MDN(heads.Diag(1)),
    "a VAE has no": lambda: VAE.__new__(VAE),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_written_says_why(reason):
    with pytest.raises(ConfigError, match=f"^format=onnx: .*{reason}.*; export format=") as caught:
        check_portable(REFUSED[reason](), "onnx")
    assert "\n" not in str(caught.value)


def test_there_is_a_name_for_each_target(tmp_path):
    with pytest.raises(ConfigError, match=r"targets=\['a'\]: give 3 names"):
        export_onnx(make("precision")[0], tmp_path / "model", targets=["a"])
