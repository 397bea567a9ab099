"""What is exported answers, where only TensorFlow is, as the Keras model does."""

from __future__ import annotations

import functools
import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from forks import run_plain

from mdn import MDN, Ensemble, backbones, heads
from mdn.density import GaussianMixture
from mdn.density.draws import draw
from mdn.density.given import condition_on_observed
from mdn.errors import ConfigError, RunError
from mdn.export import export_saved_model
from mdn.export.saved_model import feature_specs, input_names
from mdn.export.signatures import signatures as trace

# On one worker, which makes the fixtures once.
pytestmark = pytest.mark.xdist_group("export")

RNG = np.random.default_rng(0)
X = RNG.normal(5, 3, [64, 3])
Y = RNG.normal(1, 2, [64, 3]) * [1, 10, 0.1] + X[:, :1]
Y[1, 0] = Y[2, 1] = np.nan
Y[3] = np.nan
STEPS = RNG.normal(size=[64, 6, 3])
STEPS[4, 4:] = np.nan  # the padding of a shorter sequence
STEPS_Y = RNG.normal(size=[64, 6, 2])
MISSING = np.where(RNG.random(X.shape) < 0.1, np.nan, X)
COLUMNS = {
    "class": np.array([None, "a", "b", "never seen twice", *"abba" * 15], object),
    "seen at": 1.7e9 + RNG.uniform(0, 1e4, 64),
    "Größe": np.array(["ß", None, *["groß", "klein"] * 31], object),
    "y": MISSING[:, 0],
    "Pay": X[:, 1],
    "pay": MISSING[:, 2],
}
INPUTS = {
    "class": "class_",
    "seen at": "seen_at",
    "Größe": "Gr_e",
    "y": "y_2",
    "Pay": "Pay",
    "pay": "pay_2",
}

TARGETS = ["dep", "arr", "air"]
COUNT, SEED = np.int32(3), np.array([1, 2], np.int32)
LEVELS, LEVEL = np.array([0.05, 0.5, 0.9], np.float32), np.float32(0.8)

# Runs with TensorFlow alone: every signature of every folder on every in_*.npz.
READER = """
import sys
from pathlib import Path
import numpy as np
import tensorflow as tf

for folder in sys.argv[1:]:
    signatures = tf.saved_model.load(folder + "/saved_model").signatures
    for path in Path(folder).glob("in_*.npz"):
        given, answers = np.load(path), {}
        for name, function in signatures.items():
            inputs = function.structured_input_signature[1]
            outputs = function(**{key: tf.constant(given[key]) for key in inputs})
            answers |= {f"{name}/{key}": value.numpy() for key, value in outputs.items()}
        np.savez(path.with_name(path.name.replace("in", "out")), **answers)
print(*{"mdn", "tf_keras", "tensorflow_probability"} & set(sys.modules))
"""


def adapted(head, backbone=None, x=X, y=Y, missing="error"):
    model = MDN(head, backbone)
    y = y[..., : head.event_size]
    model.adapt(x, y, missing=missing)
    return model, x, y


def own_backbone():
    chain = [tf_keras.layers.Dense(8), tf_keras.layers.BatchNormalization()]
    model, x, y = adapted(heads.MixturePrecision(2, 3), tf_keras.Sequential(chain))
    model.compile(jit_compile=True)
    model.fit(x, y, verbose=0)
    return model, x, y


def low_precision():
    tf_keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        return adapted(heads.MixtureDiag(2, 2), x=COLUMNS, missing="indicator")
    finally:
        tf_keras.mixed_precision.set_global_policy("float32")


def ensemble():
    model = Ensemble(MDN(heads.TriL(2), backbones.MLP([8], dropout=0.5)), members=3)
    model.adapt(COLUMNS, Y[:, :2], missing="indicator")
    return model, COLUMNS, Y[:, :2]


CASES: dict[str, Callable] = {
    "ensemble": ensemble,
    "diag": lambda: adapted(heads.Diag(2), backbones.MLP([8], dropout=0.5, layer_norm=True)),
    "tril": lambda: adapted(heads.TriL(3), backbones.ResNet(8, 1), MISSING, missing="indicator"),
    "mixture": lambda: adapted(heads.Mixture(2, 3)),
    "mixture_one_target": lambda: adapted(heads.Mixture(1, 3), backbones.Constant()),
    "precision_own_backbone_trained": own_backbone,
    "columns_bfloat16": low_precision,
    "lstm": lambda: adapted(heads.Mixture(2, 3), backbones.LSTM([4]), STEPS, STEPS_Y),
    "low_rank_lstm_last_step": lambda: adapted(
        heads.MixtureLowRank(3, 2, rank=2), backbones.LSTM([4], return_sequences=False), STEPS
    ),
}


def take(x, size):
    return {k: v[:size] for k, v in x.items()} if isinstance(x, dict) else x[:size]


def as_inputs(x, y) -> dict[str, Any]:
    """Return what the signatures take, by input name."""
    columns = {INPUTS[k]: v for k, v in x.items()} if isinstance(x, dict) else {"x": x}
    columns = {
        key: np.array([value or "" for value in values], str)
        if values.dtype == object
        else values.astype(np.float64 if key == "seen_at" else np.float32)
        for key, values in columns.items()
    }
    y = y.astype(np.float32)
    return {**columns, "y": y, "n": COUNT, "seed": SEED, "p": LEVELS, "level": LEVEL}


@functools.cache
def traced(model):
    return trace(model, feature_specs(model))


@pytest.fixture(scope="module")
def traced_once():
    """Let each model be traced once for all tests of what is written where."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mdn.export.saved_model.signatures", lambda model, _: traced(model))
        yield


@pytest.fixture(scope="module")
def exported(tmp_path_factory, traced_once):
    """Return (model, x, y, folder of its SavedModel and of its answers) by case."""
    folder = tmp_path_factory.mktemp("exported")
    tf_keras.utils.set_random_seed(0)
    cases = {}
    for name, make in CASES.items():
        model, x, y = make()
        cases[name] = model, x, y, folder / name
        (folder / name).mkdir()
        export_saved_model(model, folder / name / "saved_model", targets=TARGETS[: y.shape[-1]])
        for size in (0, 1, 5):
            np.savez(folder / name / f"in_{size}.npz", **as_inputs(take(x, size), y[:size]))
    reader = run_plain(READER, [case[-1] for case in cases.values()], folder)
    assert reader.returncode == 0, reader.stderr[-2000:]
    assert reader.stdout.split() == [], "the artefact pulls in more than TensorFlow"
    assert "Importing a function" not in reader.stderr, "TensorFlow warns of the artefact"
    return cases


@pytest.fixture(scope="module")
def mixture(exported):
    """Return the signatures of the mixture, and its model."""
    model, _, _, folder = exported["mixture"]
    return tf.saved_model.load(folder / "saved_model").signatures, model


def expected_answers(model, x, y) -> dict[str, np.ndarray]:
    density, y = model.predict_distribution(x), y.astype(np.float32)
    moments = {"mean": density.mean(), "stddev": density.stddev()}
    parameters = density.mixture_parameters()._asdict()
    lower, upper = np.moveaxis(density.interval(LEVEL).numpy(), -1, 0)
    signatures = {
        "serving_default": moments | parameters,
        "mean_stddev": moments,
        "params": parameters,
        "log_prob": {"log_prob": density.log_prob(y)},
        "cdf": {"cdf": density.cdf(y)},
        "quantile": {"quantile": density.quantile(LEVELS)},
        "interval": {"lower": lower, "upper": upper},
        "sample": {"sample": draw(density.mixture_parameters(), COUNT, SEED)},
    }
    if y.shape[-1] > 1:
        given = GaussianMixture(*condition_on_observed(density.mixture_parameters(), y))
        signatures["condition"] = {"mean": given.mean(), "stddev": given.stddev()}
        signatures["condition"] |= given.mixture_parameters()._asdict()
    if isinstance(x, np.ndarray) and x.ndim == 2:
        signatures["serving_matrix"] = signatures["serving_default"]
    return {
        f"{signature}/{name}": np.asarray(value)
        for signature, outputs in signatures.items()
        for name, value in outputs.items()
    }


def test_every_head_and_backbone_has_a_case(exported):
    def leaves(module, base):
        found = [v for v in vars(module).values() if isinstance(v, type) and issubclass(v, base)]
        return {cls for cls in found if not cls.__subclasses__()}

    models = [model for model, *_ in exported.values()]
    assert {type(model.head) for model in models} == leaves(heads, heads.Head)
    own = leaves(backbones, backbones.Backbone)
    assert {type(model.backbone) for model in models} - {tf_keras.Sequential} == own


@pytest.mark.parametrize("name", CASES)
def test_fresh_process_equals_keras(exported, name):
    model, x, y, folder = exported[name]
    for size in (1, 5):
        expected = expected_answers(model, take(x, size), y[:size])
        answers = np.load(folder / f"out_{size}.npz")
        assert set(answers) == set(expected)
        for key in expected:
            np.testing.assert_allclose(answers[key], expected[key], 1e-5, 1e-5, err_msg=key)


@pytest.mark.parametrize("name", CASES)
def test_no_rows(exported, name):
    some, none = (np.load(exported[name][-1] / f"out_{size}.npz") for size in (5, 0))
    for key in some:
        batch = 1 if key in ("sample/sample", "quantile/quantile") else 0
        shape = list(some[key].shape)
        assert shape[batch] == 5
        shape[batch] = 0
        assert list(none[key].shape) == shape


def test_missing_targets_are_marginalised(mixture):
    signatures, model = mixture
    x, y = tf.constant(X[:4], tf.float32), tf.constant(Y[:4, :2], tf.float32)
    log_prob = signatures["log_prob"](x=x, y=y)["log_prob"].numpy()
    assert log_prob[3] == pytest.approx(0.0, abs=1e-6)
    logits, loc, scale_tril = model(X[:4]).mixture_parameters()
    stddev = tf.norm(scale_tril, axis=-1)
    for row, seen in ((1, 1), (2, 0)):
        z = (Y[row, seen] - loc[row, :, seen]) / stddev[row, :, seen]
        terms = -0.5 * z**2 - 0.5 * np.log(2 * np.pi) - tf.math.log(stddev[row, :, seen])
        marginal = tf.reduce_logsumexp(tf.nn.log_softmax(logits[row]) + terms)
        assert log_prob[row] == pytest.approx(float(marginal), abs=1e-5)


def test_samples_follow_the_density(mixture):
    signatures, model = mixture
    n = 20_000
    x = tf.constant(X[:2], tf.float32)
    draws = signatures["sample"](x=x, n=tf.constant(n), seed=tf.constant([3, 4]))["sample"]
    centred = draws.numpy() - model(x).mean().numpy()  # [n, B, D]
    assert (np.abs(centred.mean(0)) < 5 * centred.std(0) / n**0.5).all()
    products = centred[..., None] * centred[..., None, :]  # [n, B, D, D]
    error = products.mean(0) - model(x).covariance().numpy()
    assert (np.abs(error) < 5 * products.std(0) / n**0.5).all()


def test_seed_decides_the_draws(mixture):
    signatures, _ = mixture

    def draw(*seed):
        x = tf.constant(X[:5], tf.float32)
        return signatures["sample"](x=x, n=tf.constant(4), seed=tf.constant(seed))["sample"]

    assert draw(0, 1).shape == [4, 5, 2]
    np.testing.assert_array_equal(draw(0, 1), draw(0, 1))
    assert not np.isin(draw(0, 1), draw(1, 1)).any()


# ---------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("columns", "inputs"),
    [
        (["age", "Total_Pay", "x", "x_1"], ["age", "Total_Pay", "x", "x_1"]),
        (["net pay ($)", "a.b", "dep/arr"], ["net_pay_", "a_b", "dep_arr"]),
        (["2nd", "_a", "ß", ""], ["column_2nd", "column_a", "column_", "column__2"]),
        (["class", "None", "self", "match"], ["class_", "None_", "self_", "match"]),
        (["y", "n", "Seed"], ["y_2", "n_2", "Seed_2"]),
        (["a b", "a.b", "a_b", "A_B", "a_b_2"], ["a_b_3", "a_b_4", "a_b", "A_B_5", "a_b_2"]),
    ],
)
def test_input_names(columns, inputs):
    names = input_names(columns)
    assert [names[column] for column in columns] == inputs


def test_description_names_inputs_outputs_and_targets(exported):
    path = exported["columns_bfloat16"][-1] / "saved_model"
    description = json.loads((path / "mdn.json").read_text())
    assert description["targets"] == ["dep", "arr"]
    features = {f["column"]: (f["input"], f["dtype"], f["shape"]) for f in description["features"]}
    dtypes = {"class": "string", "Größe": "string", "seen at": "float64"}
    assert features == {
        column: (name, dtypes.get(column, "float32"), [None]) for column, name in INPUTS.items()
    }
    signatures = tf.saved_model.load(path).signatures
    assert set(description["signatures"]) == set(signatures)
    for name, stated in description["signatures"].items():
        for key, specs in (
            ("inputs", signatures[name].structured_input_signature[1]),
            ("outputs", signatures[name].structured_outputs),
        ):
            found = {k: {"dtype": s.dtype.name, "shape": list(s.shape)} for k, s in specs.items()}
            plain = {k: {"dtype": v["dtype"], "shape": v["shape"]} for k, v in stated[key].items()}
            assert plain == found
    parameters = description["signatures"]["serving_default"]["outputs"]
    assert parameters["scale_tril"]["shape"] == [None, 2, 2, 2]


# ---------------------------------------------------------------------- command line


# Each command in a fork of its own.
CLI = """
import json, os, sys
from tensorflow.python.tools import saved_model_cli

for job in json.loads(sys.argv[1]):
    if os.fork() == 0:
        sys.argv = ["saved_model_cli", *job]
        saved_model_cli.main()
    _, status = os.wait()
    if status:
        sys.exit(f"{job}: {status}")
"""


@pytest.mark.slow
def test_saved_model_cli(exported, tmp_path):
    model, x, y, folder = exported["mixture"]
    directory = ["--dir", str(folder / "saved_model")]
    given = folder / "in_5.npz"
    inputs = {
        name: sorted(signature.structured_input_signature[1])
        for name, signature in tf.saved_model.load(folder / "saved_model").signatures.items()
    }
    jobs = [["show", *directory, "--all"]]
    for signature, names in inputs.items():
        jobs.append(["run", *directory, "--tag_set", "serve", "--signature_def", signature])
        jobs[-1] += ["--inputs", ";".join(f"{name}={given}[{name}]" for name in names)]
        jobs[-1] += ["--outdir", str(tmp_path / signature)]
    done = run_plain(CLI, [json.dumps(jobs)], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    for signature in inputs:
        assert f"signature_def['{signature}']" in done.stdout
    for key, value in expected_answers(model, x[:5], y[:5]).items():
        np.testing.assert_allclose(np.load(tmp_path / f"{key}.npy"), value, 1e-5, 1e-5, True, key)


# ---------------------------------------------------------------------- files


def files(folder: Path) -> dict[str, bytes]:
    """Return every file below `folder`, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def two_models(exported):
    return exported["diag"][0], exported["tril"][0]


def mean_size(path: Path) -> int:
    return (
        tf.saved_model.load(path).signatures["serving_default"].structured_outputs["mean"].shape[1]
    )


def test_overwrite_only_when_asked(two_models, tmp_path):
    first, second = two_models
    path = export_saved_model(first, tmp_path / "saved_model")
    before = files(tmp_path)
    with pytest.raises(RunError, match=r"saved_model exists: .*overwrite=True"):
        export_saved_model(second, path)
    assert files(tmp_path) == before
    export_saved_model(second, path, overwrite=True)
    assert mean_size(path) == 3
    assert set(files(tmp_path)) == set(before)


def test_overwrite_leaves_what_is_no_saved_model(two_models, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for path in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(RunError, match="is not a SavedModel"):
            export_saved_model(two_models[0], path, overwrite=True)
    assert files(tmp_path) == {"thesis.tex": b"years of work"}


def test_leftovers_of_a_killed_export_are_no_obstacle(two_models, tmp_path):
    for name in (".saved_model.partial", ".saved_model.replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "saved_model.pb").touch()
    export_saved_model(two_models[0], tmp_path / "saved_model")
    assert [p.name for p in tmp_path.iterdir()] == ["saved_model"]


@pytest.mark.parametrize("limit", [100, 10_000], ids=["variables", "graph"])
def test_failure_midway_leaves_the_old_artefact(two_models, tmp_path, limit):
    first, second = two_models
    path = export_saved_model(first, tmp_path / "saved_model")
    before = files(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # as a full disk does, in bytes
    try:
        with pytest.raises(RunError) as error:
            export_saved_model(second, path, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(error.value) == f"cannot write {path}: File too large"
    assert files(tmp_path) == before


def test_folders_above_are_made(two_models, tmp_path):
    path = tmp_path / "models" / "houses" / "1"
    assert mean_size(export_saved_model(two_models[0], path)) == 2
    assert [p.name for p in path.parent.iterdir()] == ["1"]


def test_no_directory_to_write_in(two_models, tmp_path):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "saved_model"
    with pytest.raises(RunError) as error:
        export_saved_model(two_models[0], path)
    assert str(error.value) == f"cannot write {path}: Not a directory"
    assert files(tmp_path) == {"file": b""}


def test_model_without_scaling_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"call model\.adapt"):
        export_saved_model(MDN(heads.Diag(2)), tmp_path / "saved_model")


def test_wrong_number_of_targets_is_refused(two_models, tmp_path):
    with pytest.raises(ConfigError, match=r"targets=\['a'\]: give 2 names"):
        export_saved_model(two_models[0], tmp_path / "saved_model", targets=["a"])


def test_export_is_silent(exported, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("mdn.export.saved_model.signatures", trace)
    logger = tf.get_logger()
    level = logger.level
    logger.setLevel("INFO")  # as in a notebook
    try:
        for name in ("columns_bfloat16", "low_rank_lstm_last_step"):
            export_saved_model(exported[name][0], tmp_path / name)
    finally:
        logger.setLevel(level)
    assert capfd.readouterr() == ("", "")
