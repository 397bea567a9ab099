"""The README's code runs as printed."""

import re
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import mdn
import mdn.data.simulators

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.S)


def block(of: str) -> str:
    """Return the one block with these words."""
    (found,) = [code for code in BLOCKS if of in code]
    return found


def test_readme_has_its_examples():
    assert len(BLOCKS) == 7


def test_library_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tf_keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x = rng.normal(size=[500, 3])
    y = x[:, :2] * 5.0 + rng.normal(size=[500, 2])
    names = {"x": x, "y": y, "x_new": x[:7].astype("f"), "y_new": y[:7].astype("f")}
    exec(block("model.fit("), names)
    density = names["density"]
    assert isinstance(density, mdn.GaussianMixture)
    assert density.batch_shape == [7]
    assert density.event_shape == [2]
    again = mdn.load("model.keras")
    np.testing.assert_allclose(again.predict(x, verbose=0), names["model"].predict(x, verbose=0))
    # it learned something: closer than the spread of y around its mean
    assert np.abs(again.predict(x, verbose=0) - y).mean() < 0.6 * np.abs(y - y.mean(0)).mean()


def test_ensemble_example():
    rng = np.random.default_rng(0)
    x = rng.normal(size=[500, 3])
    names = {"mdn": mdn, "x": x, "y": x[:, :2] * 5.0 + rng.normal(size=[500, 2]), "x_new": x[:7]}
    exec(block("mdn.Ensemble("), names)
    whole = names["aleatoric"] + names["epistemic"]
    np.testing.assert_allclose(whole, names["density"].covariance(), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_selection_example():
    rng = np.random.default_rng(0)
    x = rng.normal(size=[500, 1])
    y = np.sign(rng.normal(size=[500, 1])) * 3.0 + 0.5 * rng.normal(size=[500, 1])
    model = mdn.MDN(mdn.heads.Mixture(1, 1), mdn.backbones.MLP([8]))
    exec(block("select_components("), names := {"mdn": mdn, "model": model, "x": x, "y": y})
    assert names["selection"].k >= 2  # y has two humps


def test_regressor_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    x = rng.normal(size=[400, 3])
    y = x[:, 0] * 5.0 + rng.normal(size=400)
    names = {"mdn": mdn, "x_train": x[:300], "y_train": y[:300], "x_test": x[300:]}
    exec(block("MDNRegressor("), names | {"y_test": y[300:]})
    again = mdn.MDNRegressor.load("model.keras").predict(x[300:])
    assert np.corrcoef(again, y[300:])[0, 1] > 0.9


def test_calibration_example(capsys):
    simulator = mdn.data.simulators.LinearGaussian()
    (x, y), (x_test, y_test), (x_validation, y_validation) = (
        simulator.draw(n, np.random.default_rng(n)) for n in (500, 200, 300)
    )
    model = mdn.MDN(mdn.heads.Mixture(1, 1), mdn.backbones.MLP([8]))
    model.adapt(x, y)
    names = {"model": model, "simulator": simulator, "x_test": x_test, "y_test": y_test}
    exec(
        block("trust.plot()"), names | {"x_validation": x_validation, "y_validation": y_validation}
    )
    assert "price" in capsys.readouterr().out


def test_fitting_example(capsys):
    rng = np.random.default_rng(0)
    centre = rng.integers(5, size=[2000, 1]) * 6.0
    y = centre + rng.normal(size=[2000, 2])
    exec(block("fit_distribution("), names := {"mdn": mdn, "y": y, "y_new": y[:7]})
    assert "GaussianMixture by method=em: converged" in capsys.readouterr().out
    loc = np.sort(names["fit"].parameters()["loc"][:, 0])
    np.testing.assert_allclose(loc, [0.0, 6.0, 12.0, 18.0, 24.0], atol=0.3)


def test_serving_example(tmp_path, monkeypatch):
    from mdn.export import export_saved_model

    monkeypatch.chdir(tmp_path)
    model = mdn.MDN(mdn.heads.Mixture(1, 3), mdn.backbones.MLP([8]))
    rng = np.random.default_rng(0)
    model.adapt(rng.normal(size=[100, 1]), rng.normal(size=[100, 1]))
    Path("runs/first").mkdir(parents=True)
    export_saved_model(model, "runs/first/saved_model")
    names = {}
    exec(block("saved_model.load("), names)
    served = names["model"]["serving_default"](x=tf.constant([[0.5]]))
    assert set(served) == {"mean", "stddev", "logits", "loc", "scale_tril"}
    np.testing.assert_allclose(
        served["mean"], model.predict(np.array([[0.5]]), verbose=0), rtol=1e-5
    )


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((\w[\w/.]+)\)", README))))
def test_links_lead_somewhere(path):
    assert (Path(__file__).parent.parent / path).exists()
