"""`MDNRegressor`: scikit-learn's own checks, and what they do not ask."""

import functools
import pickle  # noqa: TID251
import sys
import warnings
import zipfile
from collections import OrderedDict

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.base import clone
from sklearn.metrics import r2_score
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from tensorflow_probability import bijectors as tfb

import mdn
from mdn import MDNRegressor
from mdn.data.rows import Rows
from mdn.losses import Energy
from mdn.selection import choose
from mdn.short_fit import fit_folds

# One worker for all: the models of one shape share a compiled loop.
pytestmark = pytest.mark.xdist_group("regressor")

# Without held-out rows there is one program to compile for each shape, and not two.
TINY = {
    "components": 2,
    "widths": (8,),
    "steps": 20,
    "random_state": 0,
    "validation_fraction": 0.0,
}
WHOLE = {"components": 2, "widths": (16,), "steps": 400, "batch_size": 64}


@parametrize_with_checks([MDNRegressor(**TINY | {"steps": 5})])
def test_scikit_learn_finds_an_estimator(estimator, check, monkeypatch, eager_steps):
    """Step by step: the checks have rows of dozens of shapes, and XLA a program for each."""
    monkeypatch.setenv("SCIPY_ARRAY_API", "1")  # without which one check is skipped
    monkeypatch.setattr("mdn.shared_loop._loops", OrderedDict())
    check(estimator)


def test_all_held_out_rows_are_judged_at_each_look(monkeypatch):
    monkeypatch.setattr("mdn.short_fit.LOOK_ROWS", 2)  # and so more batches of them than a chunk
    rng = np.random.default_rng(0)
    x = rng.normal(size=[400, 1])
    rows = Rows(x, 2.0 * x + rng.normal(size=[400, 1]))
    model = mdn.MDN(mdn.heads.Mixture(1, 2), mdn.backbones.MLP([4]))
    model.adapt(rows.x, rows.y)
    folds = np.arange(200)[np.newaxis], np.arange(200, 400)[np.newaxis]
    options = {"learning_rate": 0.01, "batch_size": 16, "patience": 9, "seed": 0}
    history = fit_folds(model, rows, folds, loss="nll", steps=300, **options)
    assert len(history["val_nll"]) == 3
    found = -model.log_prob(rows.x[200:], rows.y[200:]).mean()
    assert min(history["val_nll"]) == pytest.approx(found, rel=1e-5)


@pytest.fixture(scope="module")
def line():
    """Rows of y = 2 x + N(0, .5^2), x ~ U(-1, 1)."""
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, size=(1200, 1))
    return x, 2 * x[:, 0] + 0.5 * rng.normal(size=1200)


@pytest.fixture(scope="module")
def fitted(line):
    return MDNRegressor(**WHOLE, random_state=0).fit(*line)


def test_mean_explains_the_targets(fitted, line):
    # Which `check_regressors_train` leaves out, as our score is no R^2.
    assert r2_score(line[0][:, 0] * 2, fitted.predict(line[0])) > 0.95


def test_score_comes_near_the_entropy(fitted, line):
    entropy = stats.norm(scale=0.5).entropy()
    rng = np.random.default_rng(1)
    x = rng.uniform(-1, 1, size=(4000, 1))
    y = 2 * x[:, 0] + 0.5 * rng.normal(size=4000)
    truth = stats.norm(2 * x[:, 0], 0.5).logpdf(y)
    regret = truth.mean() - fitted.score(x, y)
    assert -0.005 < regret < 0.03
    assert fitted.score(*line) == pytest.approx(-entropy, abs=0.1)


def test_score_is_the_mean_log_density(fitted, line):
    x, y = line[0][:50], line[1][:50]
    density = fitted.predict_distribution(x)
    log_prob = density.log_prob(y[:, None].astype("float32")).numpy()
    np.testing.assert_allclose(fitted.log_prob(x, y), log_prob, rtol=1e-4, atol=1e-5)
    assert fitted.score(x, y) == pytest.approx(log_prob.mean(), rel=1e-4)
    weight = np.arange(50.0)
    weighted = (weight * log_prob).sum() / weight.sum()
    assert fitted.score(x, y, sample_weight=weight) == pytest.approx(weighted, rel=1e-4)
    np.testing.assert_allclose(fitted.predict(x), density.mean().numpy()[:, 0], rtol=1e-4)


def test_quantiles_are_those_of_the_density(fitted, line):
    x = line[0][:20]
    levels = [0.05, 0.3, 0.95]
    found = fitted.predict_quantiles(x, levels)
    assert found.shape == (20, 3)
    density = fitted.predict_distribution(x)
    for level, column in zip(levels, found.T, strict=True):
        cdf = density.cdf(column[:, None].astype("float32")).numpy()
        np.testing.assert_allclose(cdf, level, atol=1e-4)
    low, high = fitted.predict_interval(x, 0.9)
    np.testing.assert_allclose(np.stack([low, high], -1), found[:, [0, 2]], rtol=1e-6)
    low, high = fitted.predict_interval(line[0], 0.9)
    assert np.mean((low <= line[1]) & (line[1] <= high)) == pytest.approx(0.9, abs=0.04)


def test_names_of_numeric_columns_are_kept(line):
    frame = pd.DataFrame({"a": line[0][:, 0]})
    model = MDNRegressor(**WHOLE, random_state=0).fit(frame, line[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.score(frame, line[1])
        model.predict_interval(frame)
    with pytest.raises(ValueError, match="feature names should match"):
        model.predict(frame.rename(columns={"a": "b"}))


def test_random_state_decides(fitted, line):
    state = np.random.get_state()[1].copy()
    again = clone(fitted).fit(*line)
    np.testing.assert_array_equal(np.random.get_state()[1], state)
    np.testing.assert_array_equal(again.predict(line[0]), fitted.predict(line[0]))
    other = clone(fitted).set_params(random_state=1).fit(*line)
    assert not np.array_equal(other.predict(line[0]), fitted.predict(line[0]))


def test_order_of_the_rows_does_not_matter(fitted, line):
    order = np.random.default_rng(2).permutation(len(line[1]))
    again = clone(fitted).fit(line[0][order], line[1][order])
    np.testing.assert_array_equal(again.predict(line[0]), fitted.predict(line[0]))


def test_weight_of_two_is_the_row_twice(fitted, line):
    x, y = line[0][:300], line[1][:300]
    weight = np.arange(300) % 3
    weighted = clone(fitted).fit(x, y, sample_weight=weight)
    repeated = clone(fitted).fit(np.repeat(x, weight, axis=0), np.repeat(y, weight))
    np.testing.assert_array_equal(weighted.predict(x), repeated.predict(x))
    assert not np.array_equal(clone(fitted).fit(x, y).predict(x), weighted.predict(x))


def test_shared_loop_leaves_fitted_models_alone(fitted, line):
    before = fitted.predict(line[0])
    clone(fitted).set_params(random_state=3).fit(line[0], -line[1])
    np.testing.assert_array_equal(fitted.predict(line[0]), before)


def test_shared_loop_learns_what_a_loop_of_its_own_does(line):
    from mdn import shared_loop

    model = MDNRegressor(**WHOLE, random_state=5).fit(*line)
    shared_loop._loops.clear()
    alone = clone(model).fit(*line)
    for one, other in zip(model.model_.get_weights(), alone.model_.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_pipelines_and_searches(fitted, line):
    model = make_pipeline(StandardScaler(), clone(fitted))
    scores = cross_val_score(model, *line, cv=2)
    assert np.isfinite(scores).all()
    search = GridSearchCV(model, {"mdnregressor__patience": [1, 5]}, cv=2).fit(*line)
    assert search.best_score_ == pytest.approx(scores.mean(), abs=0.1)
    assert search.predict(line[0][:3]).shape == (3,)


def test_save_and_load(fitted, line, tmp_path):
    path = tmp_path / "model.keras"
    fitted.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.keras"]
    again = MDNRegressor.load(path)
    assert {**again.get_params(), "widths": (16,)} == fitted.get_params()
    np.testing.assert_array_equal(again.predict(line[0]), fitted.predict(line[0]))
    model = mdn.load(path)
    np.testing.assert_allclose(model.predict(line[0])[:, 0], fitted.predict(line[0]), atol=1e-5)
    model.save(tmp_path / "bare.keras")
    with pytest.raises(mdn.MDNError, match="holds a model but no estimator: load it with"):
        MDNRegressor.load(tmp_path / "bare.keras")
    with pytest.raises(mdn.MDNError, match=r"the name must end in \.keras"):
        fitted.save(tmp_path / "model.pkl")
    with pytest.raises(mdn.MDNError, match="does not exist"):
        MDNRegressor.load(tmp_path / "none.keras")
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"parameters"', b'"parameterz"'))
    with pytest.raises(mdn.MDNError, match=r"model\.keras cannot be loaded \(Bad CRC-32 for file"):
        MDNRegressor.load(path)
    for content in ("", "[]", '{"parameters": {"steps": 1, "stops": 2}}'):
        path.write_bytes((tmp_path / "bare.keras").read_bytes())
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("regressor.json", content)
        with pytest.raises(mdn.MDNError, match=r"cannot be loaded \(.* in regressor\.json\)"):
            MDNRegressor.load(path)
    copied = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(copied.predict(line[0]), fitted.predict(line[0]))


def test_what_was_given_as_objects_is_kept(line, tmp_path):
    given = MDNRegressor(
        **{**TINY, "components": "auto"}, target_transform=tfb.Softplus(), loss=Energy(4)
    )
    given.set_params(components=2).selection_ = "of a fit before"
    given.fit(line[0][:50], np.exp(line[1][:50]))
    assert not hasattr(given, "selection_")
    given.save(tmp_path / "model.keras")
    again = clone(MDNRegressor.load(tmp_path / "model.keras"))
    assert again.target_transform["name"] == "Softplus"
    assert again.loss == {"name": "energy", "directions": 4, "seed": 0}
    again.fit(line[0][:50], np.exp(line[1][:50]))
    np.testing.assert_array_equal(again.predict(line[0]), given.predict(line[0]))
    given.loss = lambda y, density: -density.log_prob(y)
    with pytest.raises(mdn.MDNError, match="has no name to be written: use one of nll, crps"):
        given.save(tmp_path / "model.keras")


def test_many_parameters_are_answered_a_few_rows_at_a_time(fitted, line, monkeypatch):
    whole = fitted.predict(line[0])
    monkeypatch.setattr(type(fitted.model_), "largest_batch", 500)
    rows = [rows for rows, _ in fitted._densities(line[0])]
    assert [row.start for row in rows] == [0, 500, 1000]
    np.testing.assert_allclose(fitted.predict(line[0]), whole, rtol=1e-5)


@pytest.fixture(scope="module")
def shops():
    """A frame with a category that says all about y, and its y."""
    rng = np.random.default_rng(0)
    city = rng.choice(["Oslo", "Rome"], size=300)
    frame = pd.DataFrame({"area": rng.uniform(1, 2, size=300), "city": city})
    return frame, np.where(city == "Oslo", 1.0, -1.0) + 0.1 * rng.normal(size=300)


@pytest.fixture(scope="module")
def of_shops(shops):
    return MDNRegressor(**TINY | {"steps": 600}).fit(*shops)


def test_columns_of_text_are_categories(of_shops, shops, tmp_path):
    frame, y = shops
    assert of_shops.feature_names_in_.tolist() == ["area", "city"]
    assert r2_score(y, of_shops.predict(frame)) > 0.8
    assert np.isfinite(of_shops.predict(pd.DataFrame({"area": [1.0], "city": ["Bern"]})))
    of_shops.save(tmp_path / "shops.keras")
    again = MDNRegressor.load(tmp_path / "shops.keras")
    np.testing.assert_array_equal(again.predict(frame), of_shops.predict(frame))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as of names that got lost on the way
        assert again.score(frame, y) == of_shops.score(frame, y)
    with pytest.raises(ValueError, match="feature names should match"):
        again.predict(frame[["city", "area"]])
    with pytest.raises(ValueError, match="Feature names seen at fit time, yet now missing"):
        again.predict(frame[["city"]])


def test_members_and_several_targets(line):
    y = np.stack([line[1], -line[1]], axis=1)
    model = MDNRegressor(**TINY | {"members": 2}).fit(line[0], y)
    assert model.predict(line[0]).shape == y.shape
    assert model.predict_quantiles(line[0], [0.1, 0.5, 0.9]).shape == (1200, 2, 3)
    assert model.model_.members == 2
    assert model.model_(line[0][:5].astype("float32")).components_distribution.batch_shape == [
        5,
        4,
    ]
    np.testing.assert_array_equal(
        clone(model).fit(line[0], y).predict(line[0]), model.predict(line[0])
    )


def test_missing_features_and_positive_targets(line):
    x, y = line[0].copy(), np.exp(line[1])
    x[::7] = np.nan
    with pytest.raises(ValueError, match="contains NaN"):
        MDNRegressor(**TINY).fit(x, y)
    model = MDNRegressor(**TINY, missing="indicator", target_transform="log").fit(x, y)
    assert (model.predict(x) > 0).all()
    low, _ = model.predict_interval(x, 0.99)
    assert (low > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize(("members", "candidates"), [(1, (1, 2)), (2, (2, 3))])
def test_number_of_components_by_held_out_rows(members, candidates, monkeypatch):
    few = functools.partial(choose, candidates=candidates)
    monkeypatch.setattr("mdn.regressor.choose", few)
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, size=(1500, 1))
    y = rng.choice([-1.0, 1.0], size=1500) + 0.1 * rng.normal(size=1500)
    options = {"components": "auto", "steps": 300, "members": members, "validation_fraction": 0.2}
    model = MDNRegressor(**TINY | options).fit(x, y)
    assert model.components_ == model.selection_.k == 2
    assert len(model.selection_.weight) == 300 * members
    assert model.selection_.model is model.model_


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"components": 0}, "components=0: give a positive number, or 'auto'"),
        ({"components": "many"}, "components='many': give a positive number"),
        ({"covariance": "round"}, "covariance='round': choose one of full, diag, precision"),
        ({"members": 0}, "members=0: give a positive whole number"),
        ({"steps": 1.5}, "steps=1.5: give a positive whole number"),
        ({"learning_rate": 0.0}, "learning_rate=0.0: must be positive"),
        ({"validation_fraction": 1.0}, "validation_fraction=1.0: must be at least 0, below 1"),
        (
            {"components": "auto", "validation_fraction": 0.0},
            "components='auto': validation_fraction=0.0 of 1200 rows holds out none",
        ),
        ({"missing": "drop"}, "missing"),
        ({"loss": "mse"}, "mse"),
    ],
)
def test_wrong_parameters_are_named_in_one_line(options, message, line):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")) as error:
        MDNRegressor(**TINY | options).fit(*line)
    assert "\n" not in str(error.value)


def test_wrong_questions_are_named_in_one_line(fitted, line):
    with pytest.raises(mdn.MDNError, match=r"level=1\.5: must be a probability"):
        fitted.predict_interval(line[0], 1.5)
    with pytest.raises(mdn.MDNError, match=r"quantiles: 0\.0 is no probability"):
        fitted.predict_quantiles(line[0], [0.0])
    with pytest.raises(mdn.MDNError, match="y has 2 targets but the model has 1"):
        fitted.log_prob(line[0], np.zeros([1200, 2]))


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.base", None)
    monkeypatch.delitem(sys.modules, "mdn.regressor")
    with pytest.raises(ImportError, match=r"pip install 'mdn\[sklearn\]'") as error:
        mdn.MDNRegressor  # noqa: B018
    assert "\n" not in str(error.value)
