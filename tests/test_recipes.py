"""recipe=auto, and the ingredients' options in a config."""

import json

import numpy as np
import pytest
import tensorflow as tf
from omegaconf import OmegaConf

import mdn
from mdn import recipes, training
from mdn.budget import epoch_steps, settle
from mdn.config import compose_config, make
from mdn.density import mixture_of
from mdn.density.agreement import agree
from mdn.density.recalibration import Recalibration
from mdn.errors import ConfigError
from mdn.preparation import compile_model
from mdn.stacking import Stack, Stacking
from mdn.tasks import build_model

TABULAR = ("experiment=tabular", "data=linear_gaussian", "data.rows=200")


def test_a_variant_is_a_diff():
    config = compose_config([*TABULAR, "recipe=null"])
    assert recipes.variants(config) == {"as given": config}
    config.recipe = "auto"
    found = recipes.variants(config)
    assert list(found) == list(recipes.VARIANTS)
    for name, changes in recipes.VARIANTS.items():
        made = found[name]
        for key, value in changes.items():
            if callable(value):
                value = value(OmegaConf.select(config, key))
            assert OmegaConf.select(made, key) == value
        assert made.recipe is None
        assert made.seed == config.seed
    config.recipe = None
    assert found["as given"] == config
    assert found["smooth"].model.components == 2 * config.k
    config = compose_config([*TABULAR, "model.components=5"])
    assert recipes.variants(config)["smooth"].model.components == 10
    one = ("recipe=auto", "ensemble=2", "optimizer=adamw", "model=tril")
    assert "components" not in recipes.variants(compose_config(one))["smooth"].model


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["folds=5"], "folds=5: needs members that hold out rows; set ensemble=5"),
        (["recipe=auto"], "recipe=auto: needs members"),
        (["recipe=auto", "ensemble=2", "init_from=runs/a"], "set one of them to null"),
        (["trainer.steps=10"], "trainer.steps=10: is cut into trainer.epochs=60 parts"),
        (["recipe=best"], "recipe=best: must be 'auto'"),
        (["experiment=tabular", "backbone=resnet"], "did you mean backbone.width or"),
        (["recipe=auto", "ensemble=2", "optimizer=adam"], "tries decays; use optimizer=adamw"),
        (["recipe=auto", "ensemble=2", "backbone=resnet"], "tries depths of backbone=mlp; use it"),
        (["trainer.jitter=true", "target_transform=log"], "noise could leave the domain"),
        (["trainer.jitter=true", "model=vae", "data=digits"], "model=vae has none"),
        (["trainer.split_components=true", "model=vae", "data=digits"], "model=vae splits none"),
        (["trainer.split_components=true", "model=tril"], "the model has one component"),
        (["embedding=piecewise", "model=distribution"], "embedding: model=distribution has none"),
        (["embedding=piecewise", "embedding.bins=1"], "embedding.bins=1: must be greater than"),
        (["embedding=linear"], "there is no such embedding; choose one of none, piecewise"),
        (["model.background=1"], "model.background=1"),
        (["model.background=some"], "model.background=some"),
        (["model.start=edge"], "model.start=edge: must be 'clusters' or 'centre'"),
        (["trainer.steps=some"], "trainer.steps=some"),
        (["trainer.steps=10", "data=tfrecord"], "an epoch of a stream is a pass over it"),
        (["optimizer=adamw", "optimizer.decay=none"], "optimizer.decay=none"),
    ],
)
def test_mistakes_in_a_config(overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        compose_config(overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("split", [True, False])
def test_quiet_fit_splits_as_a_run_does(split, monkeypatch, eager_steps):
    tiny = ("ensemble=1", "folds=null", "recipe=null", "k=2", "embedding=none", "trainer.steps=4")
    tiny += ("trainer.epochs=2", "trainer.warmup=1", "backbone.widths=[4]")
    config = compose_config([*TABULAR, *tiny, f"trainer.split_components={split}"])
    data = make(config, "data").load()
    config = settle(config, data)
    model = build_model(config, data)
    compile_model(model, config, epoch_steps(config, data))
    splits = []
    monkeypatch.setattr(
        "mdn.callbacks.splitting.split_components", lambda model, rows: splits.append(rows)
    )
    recipes.fit_quietly(model, config, data)
    assert splits == [data.train] * split


@pytest.mark.parametrize("given", ["null", "true", "false"])
def test_spread_is_left_where_recalibrate_is_given(given, monkeypatch):
    config = compose_config([*TABULAR, f"recalibrate={given}"])
    data = make(config, "data").load()
    stacking = Stacking({"a": 1.0}, {"a": 0.0}, 0.0, [])
    monkeypatch.setattr(recipes, "compare", lambda *arguments: stacking)
    monkeypatch.setattr(recipes, "pooled_spread", lambda *arguments: ("spread", 0.5))
    found = recipes.weigh({}, config, data)
    assert (found.spread, found.agreement) == (("spread", 0.5) if given == "null" else (None, 0.0))


@pytest.mark.slow
def test_killed_run_goes_on_and_stacks(tmp_path, monkeypatch, eager_steps):
    variants = {"as given": {}, "still": {"optimizer.learning_rate": 1e-12}}
    variants["smooth"] = {**recipes.VARIANTS["smooth"], "backbone.widths": [4]}
    variants["wild"] = {"optimizer.learning_rate": 1e30}
    monkeypatch.setattr(recipes, "VARIANTS", variants)
    tiny = ("ensemble=2", "folds=2", "k=2", "backbone.widths=[4]", "embedding.bins=2")
    tiny += ("trainer.steps=20", "trainer.epochs=2", "trainer.verbose=0", "trainer.warmup=2")
    tiny += ("trainer.compiled=false", "callbacks.tensorboard=null")
    tiny += ("data.test_rows=50", "data.validation_rows=50", "optimizer.learning_rate=0.03")
    run = tmp_path / "run"
    config = compose_config([*TABULAR, *tiny, f"output_dir={run}"])

    def interrupt(*args):
        raise KeyboardInterrupt

    splits = []
    monkeypatch.setattr(
        "mdn.callbacks.splitting.split_components",
        lambda model, rows: splits.append((model.head.components, model.optimizer.weight_decay)),
    )
    with monkeypatch.context() as patch:
        patch.setattr(training, "weigh", interrupt)
        with pytest.raises(training.InterruptedRunError):
            training.train(config)
    trained = sorted(run.glob("checkpoints/*/epoch-00002.npz"))
    assert [p.parent.name for p in trained] == ["as-given", "smooth", "still"]
    assert set(splits) == {(2, 1.0), (4, 0.3)}  # "smooth" has twice as many, its decay by the rows
    before = [p.stat().st_mtime_ns for p in trained]
    spreads = []

    def narrow(models, shares, data, folds, seed):
        spreads.append((list(models), shares, folds.shape, seed))
        d = len(data.targets)
        return Recalibration((0.0,) * d, (0.9,) * d, kept=1), 0.5

    monkeypatch.setattr(recipes, "pooled_spread", narrow)
    metrics = training.train(config)
    assert [p.stat().st_mtime_ns for p in trained] == before  # nothing is trained again

    found = json.loads((run / "recipe.json").read_text())
    assert list(found["nll"]) == ["as given", "still", "smooth"]
    assert "still" not in found["shares"]
    assert found["failed"] == ["wild"]
    assert sum(found["shares"].values()) == pytest.approx(1.0)
    assert spreads == [(["as given", "still", "smooth"], found["shares"], (2, 125), 0)]
    assert found["spread"]["scale"] == [0.9] * len(found["spread"]["shift"])
    assert found["agreement"] == metrics["recipe/agreement"] == 0.5
    assert found["stacked"] == metrics["recipe/nll"] <= min(found["nll"].values())
    assert "the recipe is" in (run / "train.log").read_text()
    assert metrics["train/epochs"] == 2
    assert metrics["test/epistemic_stddev"] > 0.0

    # What is exported knows the recipe, not the variant of the largest share alone.
    about = json.loads((run / "saved_model" / "mdn.json").read_text())
    assert about["config"]["recipe"] == "auto"

    # What is exported says the same as the model, which is the mixture of its ensembles.
    model = mdn.load(run / "model.keras")
    assert isinstance(model, Stack)
    assert model.shares == pytest.approx(list(found["shares"].values()))
    assert {m.head.recalibration.scale for m in model.models} == {(0.9,)}
    assert model.agreement == 0.5
    data = make(config, "data").load()
    log_prob = model.log_prob(data.test.x, data.test.y)
    assert -log_prob.mean() == pytest.approx(metrics["test/nll"], rel=1e-5)
    pool = mixture_of([m.predict_distribution(data.test.x) for m in model.models], model.shares)
    kept = np.concatenate([np.tile([*[False] * m.head.components, True], 2) for m in model.models])
    expected = agree(pool, 0.5, kept).log_prob(data.test.y.astype(np.float32))
    np.testing.assert_allclose(log_prob, expected, rtol=1e-4, atol=1e-5)
    serving = tf.saved_model.load(str(run / "saved_model")).signatures["log_prob"]
    y = tf.constant(data.test.y, tf.float32)
    exported = serving(x=tf.constant(data.test.x, tf.float32), y=y)["log_prob"]
    np.testing.assert_allclose(exported, log_prob, rtol=1e-4, atol=1e-5)
