"""The README's code runs as printed."""

import re
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import mdn

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.S)


def test_readme_has_its_examples():
    assert len(BLOCKS) == 4


def test_library_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tf_keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x = rng.normal(size=[500, 3])
    y = x[:, :2] * 5.0 + rng.normal(size=[500, 2])
    names = {"x": x, "y": y, "x_new": x[:7].astype("f"), "y_new": y[:7].astype("f")}
    exec(BLOCKS[0], names)
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
    exec(BLOCKS[1], names)
    whole = names["aleatoric"] + names["epistemic"]
    np.testing.assert_allclose(whole, names["density"].covariance(), rtol=1e-3, atol=1e-3)


def test_fitting_example(capsys):
    rng = np.random.default_rng(0)
    centre = rng.integers(5, size=[2000, 1]) * 6.0
    y = centre + rng.normal(size=[2000, 2])
    exec(BLOCKS[2], names := {"mdn": mdn, "y": y, "y_new": y[:7]})
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
    exec(BLOCKS[3], names)
    served = names["model"].signatures["serving_default"](x=tf.constant([[0.5]]))
    assert set(served) == {"mean", "stddev", "logits", "loc", "scale_tril"}
    np.testing.assert_allclose(
        served["mean"], model.predict(np.array([[0.5]]), verbose=0), rtol=1e-5
    )


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((\w[\w/.]+)\)", README))))
def test_links_lead_somewhere(path):
    assert (Path(__file__).parent.parent / path).exists()
