"""recipe=auto, and the ingredients' options in a config."""

import json

import pytest
from omegaconf import OmegaConf

import mdn
from mdn import recipes
from mdn.config import compose_config
from mdn.errors import ConfigError, RunError
from mdn.training import train

TABULAR = ("experiment=tabular", "data=linear_gaussian", "data.rows=200")


def test_a_variant_is_a_diff():
    config = compose_config(TABULAR)
    for name, changes in recipes.VARIANTS.items():
        made = recipes.variant(config, name)
        for key, value in changes.items():
            assert OmegaConf.select(made, key) == value
        assert made.recipe is None
        assert made.seed == config.seed
    assert recipes.variant(config, "as given") == config


def test_the_least_finite_score_wins():
    assert recipes.best_of({"a": 1.0, "b": 0.5, "c": float("nan")}) == "b"
    with pytest.raises(RunError, match="no variant could be trained"):
        recipes.best_of({"a": float("inf")})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["folds=5"], "folds=5: needs members that hold out rows; set ensemble=5"),
        (["recipe=auto"], "recipe=auto: needs members"),
        (["recipe=auto", "ensemble=2", "init_from=runs/a"], "set one of them to null"),
        (["trainer.steps=10"], "trainer.steps=10: is cut into trainer.epochs=60 parts"),
        (["recipe=best"], "recipe=best: must be 'auto'"),
        (["recipe=auto", "ensemble=2", "optimizer=adam"], "tries decays; use optimizer=adamw"),
        (["recipe=auto", "ensemble=2", "backbone=resnet"], "tries depths of backbone=mlp"),
        (["trainer.jitter=true", "target_transform=log"], "noise could leave the domain"),
        (["trainer.jitter=true", "model=vae", "data=digits"], "model=vae has none"),
        (["embedding=piecewise", "model=distribution"], "embedding: model=distribution has none"),
        (["embedding=piecewise", "embedding.bins=1"], "embedding.bins=1: must be greater than"),
        (["embedding=linear"], "there is no such embedding; choose one of piecewise"),
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


def test_a_run_tries_the_recipes_and_keeps_the_best(tmp_path, monkeypatch):
    monkeypatch.setattr(
        recipes, "VARIANTS", {"as given": {}, "still": {"optimizer.learning_rate": 1e-9}}
    )
    tiny = ("ensemble=2", "folds=2", "k=2", "backbone.widths=[4]", "embedding.bins=2")
    tiny += (
        "trainer.compiled=false",
        "trainer.steps=40",
        "trainer.epochs=2",
        "trainer.verbose=0",
        "trainer.warmup=2",
    )
    tiny += ("callbacks.tensorboard=null", "data.test_rows=50", "data.validation_rows=50")
    run = tmp_path / "run"
    metrics = train(compose_config([*TABULAR, *tiny, "recipe=auto", f"output_dir={run}"]))
    tried = json.loads((run / "recipe.json").read_text())
    assert tried["chosen"] == "as given"
    assert tried["out_of_fold_nll"]["as given"] < tried["out_of_fold_nll"]["still"]
    assert recipes.describe(tried) in (run / "train.log").read_text()
    assert metrics["train/epochs"] == 2
    model = mdn.load(run / "model.keras")
    assert model.head.background == "auto"
    assert float(model.head.background_weight) == pytest.approx(0.01)
