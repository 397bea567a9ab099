"""What an artefact is asked has the answer that integration, or the density's own query, gives."""

import json
import signal
import sys
import time

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from forks import Fork

import mdn
from mdn import MDN, backbones, heads
from mdn.density import GaussianMixture
from mdn.density.given import condition_on_observed
from mdn.export import directory_size, export_saved_model, saved_model
from mdn.export.signatures import meaning

# On one worker, which makes the fixtures once.
pytestmark = pytest.mark.xdist_group("signatures")

RNG = np.random.default_rng(0)
X = RNG.normal(size=[64, 2])
Y = np.stack([X[:, 0] + RNG.normal(size=64), RNG.normal(size=64)], axis=1)
Y[:, 1] += 0.7 * Y[:, 0]
COLUMNS = {"seen at": 1.7e9 + X[:, 0] * 1e4, "level": X[:, 1]}


def export(folder, head, x=X, y=Y, **options):
    model = MDN(head, backbones.MLP([8]))
    model.adapt(x, y)
    path = export_saved_model(model, folder, **options)
    description = json.loads((path / "mdn.json").read_text())
    return model, tf.saved_model.load(path).signatures, description


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    tf_keras.utils.set_random_seed(0)
    config = {"model": {"_target_": "mdn.heads.Mixture"}, "seed": 0}
    return export(tmp_path_factory.mktemp("m") / "sm", heads.Mixture(2, 3), config=config)


@pytest.fixture(scope="module")
def positive(tmp_path_factory):
    """Return a model of the logs of two positive targets."""
    tf_keras.utils.set_random_seed(0)
    head = heads.Mixture(2, 2, target_transform="log")
    return export(tmp_path_factory.mktemp("p") / "sm", head, y=np.exp(0.5 * Y))


@pytest.fixture(scope="module")
def columns(tmp_path_factory):
    return export(tmp_path_factory.mktemp("c") / "sm", heads.Diag(1), x=COLUMNS, y=Y[:, :1])


def tensor(values):
    return tf.constant(values, tf.float32)


# ---------------------------------------------------------------------- condition


def random_mixture(batch, k, d):
    scale = np.tril(RNG.normal(size=[*batch, k, d, d]))
    diagonal = np.einsum("...ii->...i", scale)
    diagonal[:] = np.abs(diagonal) + 0.1
    return GaussianMixture(RNG.normal(size=[*batch, k]), RNG.normal(size=[*batch, k, d]), scale)


@pytest.mark.parametrize(("k", "d"), [(1, 1), (1, 2), (3, 2), (2, 4), (3, 7)])
def test_rows_with_others_given_are_conditioned_one_by_one(k, d):
    n = 12
    density = random_mixture([n], k, d)
    y = RNG.normal(size=[n, d])
    asked = RNG.random([n, d]) < 0.5
    asked[0], asked[1] = True, False
    found = condition_on_observed(
        density.mixture_parameters(), tf.constant(np.where(asked, np.nan, y))
    )
    for i in range(n):
        rest, given = np.flatnonzero(asked[i]), np.flatnonzero(~asked[i])
        logits, loc, scale_tril = (part[i].numpy() for part in found)
        np.testing.assert_array_equal(loc[:, given], np.tile(y[i, given], (k, 1)))
        assert not scale_tril[:, given].any()
        assert not scale_tril[:, :, given].any()
        one = GaussianMixture(*(part[i] for part in density.mixture_parameters()))
        if len(rest) == 0:
            continue
        expected = one.condition({g: y[i, g] for g in given}) if len(given) else one
        for value, part in (
            (tf.nn.softmax(logits), tf.nn.softmax(expected.logits)),
            (loc[:, rest], expected.loc),
            (scale_tril[:, rest][:, :, rest], expected.scale_tril),
        ):
            np.testing.assert_allclose(value, part, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", ["mixture", "positive"])
def test_condition_agrees_with_integration_over_log_prob(case, request):
    _, signatures, _ = request.getfixturevalue(case)
    given = 0.8
    low = 1e-4 if case == "positive" else -12.0
    grid = np.linspace(low, 12.0, 4001)
    x = np.tile(X[:1], (len(grid), 1))
    rows = np.stack([np.full_like(grid, given), grid], axis=1)
    log_prob = signatures["log_prob"](x=tensor(x), y=tensor(rows))["log_prob"].numpy()
    weight = np.exp(log_prob.astype(np.float64))
    weight /= weight.sum()
    mean = weight @ grid
    stddev = np.sqrt(weight @ (grid - mean) ** 2)
    answers = signatures["condition"](x=tensor(X[:1]), y=tensor([[given, np.nan]]))
    np.testing.assert_allclose(answers["mean"], [[given, mean]], rtol=2e-4)
    np.testing.assert_allclose(answers["stddev"], [[0.0, stddev]], rtol=2e-4)
    assert ("loc" in answers) == (case == "mixture")


def test_condition_on_nothing_and_on_everything(mixture):
    _, signatures, _ = mixture
    whole = signatures["serving_default"](x=tensor(X[:3]))
    nothing = signatures["condition"](x=tensor(X[:3]), y=tensor(np.full([3, 2], np.nan)))
    for name in ("mean", "stddev", "loc", "scale_tril"):
        np.testing.assert_allclose(nothing[name], whole[name], rtol=1e-5, atol=1e-6)
    everything = signatures["condition"](x=tensor(X[:3]), y=tensor(Y[:3]))
    np.testing.assert_array_equal(everything["mean"], Y[:3].astype(np.float32))
    assert not everything["stddev"].numpy().any()


# ---------------------------------------------------------------------- margins


@pytest.mark.parametrize("case", ["mixture", "positive"])
def test_cdf_of_quantile_is_p_and_an_interval_holds_its_level(case, request):
    model, signatures, _ = request.getfixturevalue(case)
    p = np.array([0.01, 0.3, 0.5, 0.95], np.float32)
    quantile = signatures["quantile"](x=tensor(X[:5]), p=p)["quantile"].numpy()
    assert quantile.shape == (4, 5, 2)
    for probability, y in zip(p, quantile, strict=True):
        cdf = signatures["cdf"](x=tensor(X[:5]), y=tensor(y))["cdf"]
        np.testing.assert_allclose(cdf, np.full([5, 2], probability), rtol=1e-4)
    ends = signatures["interval"](x=tensor(X[:5]), level=tensor(0.8))
    below, above = (signatures["cdf"](x=tensor(X[:5]), y=ends[end])["cdf"].numpy() for end in ends)
    np.testing.assert_allclose(np.abs(above - below), 0.8, rtol=1e-4)
    density = model.predict_distribution(X[:5])
    np.testing.assert_allclose(quantile, density.quantile(p), rtol=1e-5, atol=1e-5)


def test_probabilities_at_and_beyond_the_ends(mixture):
    _, signatures, _ = mixture
    p = tensor([0.0, 1.0, -0.1, 1.1])
    quantile = signatures["quantile"](x=tensor(X[:1]), p=p)["quantile"].numpy()[:, 0, 0]
    np.testing.assert_array_equal(quantile, [-np.inf, np.inf, np.nan, np.nan])


def test_missing_target_has_no_cdf_and_the_other_has(mixture):
    _, signatures, _ = mixture
    cdf = signatures["cdf"](x=tensor(X[:1]), y=tensor([[np.nan, 0.0]]))["cdf"].numpy()
    np.testing.assert_array_equal(np.isnan(cdf), [[True, False]])


def test_parameters_of_transformed_targets_are_those_of_their_logs(positive):
    model, signatures, description = positive
    answers = signatures["params"](x=tensor(X[:5]))
    base = model.predict_distribution(X[:5]).distribution
    for name, value in base.mixture_parameters()._asdict().items():
        np.testing.assert_allclose(answers[name], value, rtol=1e-5, atol=1e-5)
    assert set(signatures["serving_default"](x=tensor(X[:5]))) == {"mean", "stddev"}
    outputs = description["signatures"]["params"]["outputs"]
    assert outputs["loc"]["meaning"].endswith("units of the transformed targets")
    for name in ("scale_diag", "factor", "precision_tril"):  # as the portable formats state them
        assert "units of the transformed targets" in meaning(name, True)
        assert "units of y" in meaning(name, False)
    assert description["target_transform"] == "log"


# ---------------------------------------------------------------------- inputs


def test_matrix_has_the_columns_in_their_order(columns):
    _, signatures, description = columns
    inputs = {f["column"]: f["input"] for f in description["features"]}
    assert inputs == {"seen at": "seen_at", "level": "level_2"}
    named = signatures["serving_default"](
        seen_at=tf.constant(COLUMNS["seen at"]), level_2=tensor(COLUMNS["level"])
    )
    matrix = tf.constant(np.stack([*COLUMNS.values()], axis=1))
    assert matrix.dtype == tf.float64  # a timestamp in float32 is exact to two minutes
    for name, value in signatures["serving_matrix"](x=matrix).items():
        np.testing.assert_array_equal(value, named[name])


def test_description_says_why_a_signature_is_left_out(columns, mixture, tmp_path):
    assert columns[2]["left_out"] == {
        "condition": "there is one target, and so none to condition on"
    }
    assert mixture[2]["left_out"] == {}
    _, signatures, description = export(
        tmp_path / "sm", heads.Diag(1), {"kind": np.array([*"ab" * 32])}, Y[:, :1]
    )
    assert description["left_out"]["serving_matrix"] == (
        "feature 'kind' is a category, not a number"
    )
    assert "serving_matrix" not in signatures


def test_description_explains_every_name_and_holds_the_configs(mixture, columns):
    model, _, description = mixture
    for described in (description, columns[2]):
        for signature in described["signatures"].values():
            for spec in (*signature["inputs"].values(), *signature["outputs"].values()):
                assert spec["meaning"]
    assert description["format"] == 2
    assert description["mdn"] == mdn.__version__
    assert description["tensorflow"] == tf.__version__
    assert description["config"]["model"]["_target_"] == "mdn.heads.Mixture"
    again = MDN.from_config(description["model"])
    assert again.head.get_config() == model.head.get_config()


def test_columns_that_are_called_as_outputs_are(tmp_path):
    x = {"x": X[:, 0], "mean": X[:, 1]}
    _, signatures, description = export(tmp_path / "sm", heads.Diag(1), x=x, y=Y[:, :1])
    named = signatures["mean_stddev"](x=tensor(X[:3, 0]), mean=tensor(X[:3, 1]))
    matrix = signatures["serving_matrix"](x=tensor(X[:3]))
    np.testing.assert_array_equal(named["mean"], matrix["mean"])
    stated = description["signatures"]["mean_stddev"]
    assert stated["inputs"]["mean"]["meaning"].startswith("the column 'mean': a number")
    assert stated["outputs"]["mean"]["meaning"] == "in the units of y"
    stated = description["signatures"]["serving_matrix"]["inputs"]
    assert stated["x"]["meaning"].startswith("features, a row each")


def test_size_is_that_of_the_files(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"123")
    (tmp_path / "c").write_bytes(b"4567")
    assert directory_size(tmp_path) == 7


# ---------------------------------------------------------------------- kills


def export_forever():
    """Write a small model to the path that the command line says, again and again.

    With "held" behind it, the first one never gets its name.
    """
    if "held" in sys.argv:
        saved_model._move = lambda *_: signal.pause()
    model = MDN(heads.Diag(1), backbones.MLP([4]))
    x = np.random.default_rng(0).normal(size=[50, 1])
    model.adapt(x, x + 1.0)
    while True:
        export_saved_model(model, sys.argv[1], overwrite=True)
        print("whole", flush=True)


@pytest.mark.slow
def test_killed_export_leaves_nothing_that_looks_whole(tmp_path):
    path = tmp_path / "saved_model"
    whole = 0
    for wait in (None, 0.3, 0.9):
        held = ["held"] if wait is None else []
        process = Fork(export_forever, ["export", path, *held], log=tmp_path / f"log {wait}")
        if wait is None:  # while the first one is written
            while not list(tmp_path.glob(".saved_model.partial/*")) and process.poll() is None:
                time.sleep(0.002)
        else:
            while not process.out.read_text() and process.poll() is None:
                time.sleep(0.01)
            time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        if wait is None:
            assert not path.exists()
        if path.exists():
            whole += 1
            assert json.loads((path / "mdn.json").read_text())["format"] == 2
            answers = tf.saved_model.load(path).signatures["mean_stddev"](x=tensor([[0.5]]))
            assert np.isfinite(answers["mean"]).all()
    assert whole
