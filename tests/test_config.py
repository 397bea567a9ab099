"""The config: every option of every group, wrong keys and values in one line, no TensorFlow."""

import importlib
import inspect
import json
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

import mdn
from mdn.config import compose_config, config_dir
from mdn.options import OPTIONS, TrainerOptions

GROUPS = sorted(path.name for path in config_dir().iterdir() if path.is_dir())
FILES = sorted(path for path in config_dir().glob("*/*.yaml"))
# What the caller adds when it makes these, and so no option in a YAML file.
GIVEN_LATER = {
    "mdn.callbacks.tensorboard.TensorBoard": {
        *("log_dir", "data", "config_text", "rows", "panels"),
    },
    "mdn.vae.VAE": {"backbone"},
    "mdn.fit_distribution": {"y", "weight"},
    "mdn.callbacks.checkpoint.Checkpoint": {"directory", "write", "data"},
}


def targets(node):
    """Yield every node with a _target_."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield node
        for value in node.values():
            yield from targets(value)


def is_diff(path):
    """Whether a file states only what differs from another one, or from the whole config."""
    text = path.read_text()
    return text.startswith(("defaults:", "# @package _global_")) or "\ndefaults:" in text


def overrides_for(path):
    """Return what chooses a file, with what it needs."""
    needed = {"lstm": ["data=npz"]}.get(path.stem, [])
    return [f"{path.parent.name}={path.stem}", *needed]


def nodes_of(path):
    config = compose_config(overrides_for(path))
    group = OmegaConf.to_container(config, resolve=True)[path.parent.name]
    return list(targets(group))


def test_groups_are_those_of_the_design():
    assert set(GROUPS) == {
        *("model", "backbone", "data", "optimizer", "trainer", "callbacks", "strategy"),
        *("embedding", "experiment"),
    }
    assert len(FILES) > 25


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_file_composes(path):
    compose_config(overrides_for(path))


@pytest.mark.parametrize(
    "path",
    [p for p in FILES if p.parent.name not in ("experiment", "trainer") and not is_diff(p)],
    ids=lambda p: f"{p.parent.name}-{p.stem}",
)
def test_options_are_those_of_the_constructor_with_its_defaults(path):
    nodes = nodes_of(path)
    assert nodes
    for node in nodes:
        fields = OPTIONS[node["_target_"]].model_fields
        assert {field.alias or name for name, field in fields.items()} == set(node)
        if not node["_target_"].startswith("mdn."):
            continue  # Keras's own keyword arguments, with values of ours
        defaults = defaults_of(node["_target_"])
        assert set(defaults) - GIVEN_LATER.get(node["_target_"], set()) == set(node) - {"_target_"}
        for key in set(node) - {"_target_", "seed", "event_size"}:
            if defaults[key] is not inspect.Parameter.empty:
                assert node[key] == json.loads(json.dumps(defaults[key])), key


def defaults_of(target):
    """Return the options of a constructor with their defaults, those of its bases included."""
    module, _, name = target.rpartition(".")
    constructor = getattr(importlib.import_module(module), name)
    ours = [c for c in getattr(constructor, "__mro__", ()) if c.__module__.startswith("mdn.")]
    parameters = {}
    for kind in reversed(ours or [constructor]):
        parameters |= inspect.signature(kind).parameters
    return {
        name: p.default
        for name, p in parameters.items()
        if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    }


def test_trainer_options_are_checked():
    trainer = compose_config().trainer
    assert set(TrainerOptions.model_fields) == set(trainer)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["k=0"], "k=0: must be greater than 0"),
        (["recalibrate=3"], "recalibrate=3: must be a valid boolean"),
        (["recalibrate=true", "model=vae", "data=digits"], "recalibrate=true: model=vae has no"),
        (["k=three"], "k=three: must be a valid integer"),
        (["model=tril", "k=3"], "k=3: this model has no components; use model=mixture"),
        (["+k=3", "model=diag"], "k=3: this model has no components; use model=mixture"),
        (["experiment=flights", "model=tril"], "k=5: this model has no components"),
        (["k=auto", "model=diag"], "k=auto: this model has no components; use model=mixture"),
        (["k=auto", "model=vae"], "k=auto: model=vae has no validation NLL"),
        (["k=auto", "model=distribution"], "k=auto: model=distribution has no validation NLL"),
        (["k=auto", "init_from=x"], "k=auto: init_from=x has its number of components"),
        (["k=auto", "experiment=tabular", "recipe=auto"], "k=auto: recipe=auto compares variants"),
        (["k=auto", "strategy=multi_worker"], "k=auto: choose it on one machine"),
        (["rank=2"], "rank=2: this model has no factors of low rank; use model=low_rank"),
        (["+rank=2", "model=tril"], "rank=2: this model has no factors of low rank"),
        (["model=low_rank", "rank=0"], "rank=0: must be greater than 0"),
        (["model=low_rank", "rank=two"], "rank=two: must be a valid integer"),
        (["target_transform=logg"], "target_transform=logg: is unknown; choose one of log, logit"),
        (["target_transform=log", "model=vae"], "target_transform=log: this model has none"),
        (["kk=3"], "kk=3: kk is no option; did you mean k"),
        (["modle=tril"], "modle=tril: modle is no option; did you mean model"),
        (["model=lstm"], "model=lstm: there is no such model; choose one of diag, distribution"),
        (["model=distribution", "k=3"], "k=3: a MultivariateNormalTriL has no components"),
        (
            ["model=distribution", "model.distribution=GaussianMixture"],
            "model.distribution=GaussianMixture: k is not set; give k=3",
        ),
        (["experiment=mle_univariate", "fixed=scale"], "fixed=scale: must be a valid list, such"),
        (["experiment=points_3d", "model.method=mle"], "model.method=mle: must be 'gradient'"),
        (["data=gaussians", "data.weights=[0]"], "data.weights.0=0: must be greater than 0"),
        (["model=distribution", "model.initial=abc"], "model.initial=abc: must be a valid dict"),
        (["data=csv", "data.targets=3"], "data.targets=3: must be a valid string"),
        (["model=distribution", "init_from=x"], "init_from: model=distribution starts from"),
        (["experiment=vae_mixture", "data=points"], "comparison: needs data with a seed"),
        (["model=vae", "model.prior=foo"], "model.prior=foo: must be 'mixture' or 'normal'"),
        (["experiment=none"], "experiment=none: there is no such experiment"),
        (["trainer=3"], "trainer=3: there is no such trainer; choose one of default"),
        (
            ["k=2", "embedding=null"],
            "embedding=null: there is no such embedding; choose one of none",
        ),
        (["trainer.epochs=0"], "trainer.epochs=0: must be greater than 0"),
        (["trainer.batch_size=1.5"], "trainer.batch_size=1.5: must be a valid integer"),
        (["trainer.schedule=linear"], "trainer.schedule=linear: must be 'constant', 'cosine'"),
        (["trainer.epoch=3"], "trainer.epoch=3: trainer.epoch is no option; did you mean"),
        (["+trainer.epoch=3"], "trainer.epoch is no option; did you mean trainer.epochs"),
        (["model.positivity=relu"], "model.positivity=relu: must be 'softplus', 'exp' or 'elu'"),
        (["backbone.widths=[64,0]"], "backbone.widths.1=0: must be greater than 0"),
        (["backbone.widths=64"], r"backbone.widths=64: must be .* list, such as .*=\[64\]"),
        (["backbone.dropout=1"], "backbone.dropout=1: must be less than 1"),
        (["optimizer.learning_rate=-1"], "optimizer.learning_rate=-1: must be greater than 0"),
        (["loss=mse"], "loss=mse: must be one of nll, crps, energy, beta_nll, interval_nll"),
        (["loss={name: beta_nll, beta: 2}"], "loss.beta=2: must be less than or equal to 1"),
        (["loss={name: crps, beta: 1}"], "loss.beta is no option"),
        (["loss={name: interval_nll, step: 0}"], "loss.step=0: must be greater than 0"),
        (["seed=-1"], "seed=-1: must be greater than or equal to 0"),
        (["seed=one"], "seed=one: must be a valid integer"),
        (["overwrite=maybe"], "overwrite=maybe: must be a valid boolean"),
        (["data=csv", "data.split=by_day"], "data.split=by_day: must be 'random', 'time'"),
        (["data=csv", "data.validation=.6", "data.test=.6"], "data.test=0.6 leave a split empty"),
        (["data=digits", "model=vae", "data.test=.9"], "data.test=0.9 leave a split empty"),
        (["data=tfrecord", "data.test=.9"], "data.test=0.9 leave a split empty"),
        (["data=csv", "data.split=time"], "data.split=time needs a column: set data.split_column"),
        (["data=npz", "data.split=column"], "data.split=column needs a column"),
        (["data=parquet", "data.split_column=day"], "does nothing with data.split=random"),
        (
            ["data=parquet", "data.stream=true", "data.split=time", "data.split_column=day"],
            "data.split=time needs all rows in memory",
        ),
        (["data=parquet", "data.stream=true", "data.max_rows=9"], "data.max_rows=9 needs all"),
        (["data=parquet", "data.shuffle_rows=9"], "data.shuffle_rows=9 is of a stream"),
        (["backbone=lstm", "data=csv"], r"needs sequences \[N, T, F\], which only data=npz"),
        (["callbacks.checkpoint.keep=0"], "callbacks.checkpoint.keep=0: must be greater than 0"),
        (["k"], "missing EQUAL"),
    ],
)
def test_mistakes_are_one_line_that_names_them(overrides, message):
    with pytest.raises(mdn.MDNError, match=message) as error:
        compose_config(overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["data=npz", "data.fold=3", "data.test=.95"],  # a fold says which rows test
        ["data=csv", "data.split=column", "data.split_column=part", "data.test=.95"],
        ["data=flights", "data.split=random"],
        ["data=tfrecord", "data.shuffle_rows=9"],
        ["data=parquet", "data.stream=true", "data.sample_rows=9"],
        ["backbone=lstm", "model=distribution", "model.distribution=Normal"],
    ],
)
def test_what_has_a_meaning_passes(overrides):
    compose_config(overrides)


def test_zero_is_a_seed():
    assert compose_config(["seed=0"]).data.seed == 0


def test_a_constructor_of_the_users_own_passes():
    compose_config(["backbone=mlp", "backbone._target_=mine.Net", "+backbone.depth=3"])


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["k=three"], 2, "error: k=three"),
        (["kk=3"], 2, "error: kk=3"),
        (["--help"], 0, "Powered by Hydra"),
        (["--cfg", "job"], 0, "_target_: mdn.heads.Mixture"),
    ],
)
def test_the_command_answers_without_tensorflow(arguments, code, text, tmp_path):
    program = (
        "import sys; sys.argv[0] = 'train.py'\n"
        "from mdn.cli.train import main\n"
        "try: main()\n"
        "finally: assert 'tensorflow' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    assert text in done.stdout + done.stderr
    assert "AssertionError" not in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
