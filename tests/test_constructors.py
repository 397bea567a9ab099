"""A run of another's hand runs nothing of its own, unless its user says that it may."""

import json
import shutil
import sys
import zipfile

import numpy as np
import pytest
import tf_keras
from click.testing import CliRunner
from omegaconf import OmegaConf

import mdn
from mdn import MDN, backbones, heads
from mdn.base import written_by
from mdn.cli.main import command
from mdn.config import compose_config
from mdn.constructors import check_model
from mdn.data.rows import ColumnNames
from mdn.errors import ConfigError, RunError
from mdn.finished import evaluate_run, export_run, load_run, plot_run, predict_run

# On one worker, which makes the fixtures once.
pytestmark = pytest.mark.xdist_group("constructors")

# Whose import leaves a trace.
HOSTILE = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
import tf_keras
from mdn.data.simulators import Sinusoid

@tf_keras.saving.register_keras_serializable(package=__name__)
class Dense(tf_keras.layers.Dense):
    pass

class Source(Sinusoid):
    pass
"""
RNG = np.random.default_rng(0)
X = RNG.normal(size=[30, 1])


def rewrite(path, change):
    """Change the config of a `.keras` file."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    config = json.loads(parts["config.json"])
    change(config)
    parts["config.json"] = json.dumps(config).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Return the directory of a run of a small Keras backbone, without a training."""
    folder = tmp_path_factory.mktemp("run") / "run"
    tf_keras.utils.set_random_seed(0)
    model = MDN(heads.Mixture(1, 2), tf_keras.layers.Dense(4, "tanh", name="net"))
    model.adapt(X, np.sin(X))
    model.column_names = ColumnNames(("x",), ("t",))
    model.compile("adam", jit_compile=False)
    (folder / ".hydra").mkdir(parents=True)
    model.save(folder / "model.keras")
    config = compose_config(["k=2", "data.rows=50", "data.validation_rows=20", "data.test_rows=9"])
    OmegaConf.save(config, folder / ".hydra" / "config.yaml")
    return folder


@pytest.fixture
def hostile(original, tmp_path, monkeypatch):
    """Return a run whose backbone and data are of a module of its own, its name, and its trace."""
    name = f"hostile_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(HOSTILE)
    monkeypatch.syspath_prepend(tmp_path)
    run = shutil.copytree(original, tmp_path / "run")
    rewrite(
        run / "model.keras",
        lambda config: config["config"]["backbone"].update(
            module=name, registered_name=f"{name}>Dense"
        ),
    )
    config = OmegaConf.load(run / ".hydra" / "config.yaml")
    config.backbone = {"_target_": f"{name}.Dense", "units": 4}
    config.data._target_ = f"{name}.Source"
    OmegaConf.save(config, run / ".hydra" / "config.yaml")
    yield run, name, tmp_path / "ran"
    sys.modules.pop(name, None)


def test_nothing_of_a_hostile_run_runs(hostile, tmp_path):
    run, name, trace = hostile
    (tmp_path / "new.csv").write_text("x\n0.5\n")
    table = str(tmp_path / "new.csv")
    for ask in (
        lambda: load_run(run),
        lambda: predict_run(run, table, tmp_path / "out.parquet"),
        lambda: evaluate_run(run),
        lambda: plot_run(run, output=tmp_path / "plots"),
        lambda: export_run(run, output=tmp_path / "saved_model"),
        lambda: export_run(run, "litert", tmp_path / "litert"),
    ):
        with pytest.raises(
            RunError, match=rf"names {name}\.Dense, .* --trust {name}\.Dense"
        ) as error:
            ask()
        assert "\n" not in str(error.value)
    assert not trace.exists()
    assert name not in sys.modules


def test_what_is_trusted_by_name_runs(hostile, tmp_path):
    run, name, trace = hostile
    with pytest.raises(RunError, match=rf"data\._target_ of the run's config names {name}.Source"):
        evaluate_run(run, trust=[f"{name}.Dense"])
    assert trace.exists()
    model, _ = load_run(run, trust=[f"{name}.Dense"])
    assert type(model.backbone).__module__ == name
    metrics = evaluate_run(run, trust=[f"{name}.Dense", f"{name}.Source"])
    assert metrics["test/n"] == 9
    load_run(run)  # now that the class is registered in this process


def test_the_command_takes_the_name(hostile, tmp_path):
    run, name, trace = hostile
    (tmp_path / "new.csv").write_text("x\n0.5\n")
    words = ["predict", str(run), str(tmp_path / "new.csv"), "-o", str(tmp_path / "out.parquet")]
    result = CliRunner().invoke(command, words)
    assert isinstance(result.exception, RunError)
    assert not trace.exists()
    result = CliRunner().invoke(command, [*words, "--trust", f"{name}.Dense"])
    assert result.exit_code == 0, result.output
    assert "1 rows" in result.output


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Net", "give the module too, such as mine.Net"),
        ("no.such.Net", "No module named 'no'"),
        ("mdn.heads.Nothing", "has no attribute 'Nothing'"),
    ],
)
def test_trusted_names_that_lead_nowhere(name, message, original):
    with pytest.raises(ConfigError, match=message):
        load_run(original, trust=[name])


@pytest.mark.parametrize(
    "data",
    [
        {"_target_": "subprocess.run", "args": ["touch", "ran"]},
        {"_target_": "mdn.runs.subprocess.run", "args": ["touch", "ran"]},
        {"_target_": "mdn.data.arrays.Npz", "path": {"_target_": "os.mkdir", "path": "ran"}},
        {"_target_": "mdn.data.arrays.Npz", "path": [{"_target_": "os.mkdir", "path": "ran"}]},
        {"_target_": "mdn.data.arrays.Npz", "path": "${seed_of}"},
    ],
)
def test_what_data_of_a_run_would_call(data, original, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = shutil.copytree(original, tmp_path / "run")
    config = OmegaConf.load(run / ".hydra" / "config.yaml")
    config.seed_of = {"_target_": "os.mkdir", "path": "ran"}
    config.data = data
    OmegaConf.save(config, run / ".hydra" / "config.yaml")
    with pytest.raises(RunError, match=r"names (subprocess|mdn\.runs|os)\."):
        evaluate_run(run)
    assert not (tmp_path / "ran").exists()


# What Keras, though in its safe mode, would import, find or call.
HARMFUL = {
    "import": {"module": "antigravity", "class_name": "Net"},
    "hidden": {"module": "keras.activations", "class_name": "function", "config": "__loader__"},
    "builtin": {"module": "builtins", "class_name": "function", "config": "exec"},
    "function": {"module": "os", "class_name": "function", "config": "system"},
    "download": {"module": "keras.utils", "class_name": "function", "config": "get_file"},
    "through Keras": {
        "module": "keras.src.saving.saving_lib",
        "class_name": "function",
        "config": "os.system",
    },
    "through mdn": {"module": "mdn.runs", "class_name": "function", "config": "shutil.rmtree"},
    "class through mdn": {"module": "mdn.runs", "class_name": "Path", "config": {}},
    "operation": {
        "module": "tf_keras.src.layers.core.tf_op_layer",
        "class_name": "TFOpLambda",
        "config": {"name": "x", "function": "io.write_file"},
    },
    "vocabulary": {
        "module": "keras.layers",
        "class_name": "StringLookup",
        "config": {"vocabulary": "rows.csv"},
    },
    "lambda": {
        "module": "keras.layers",
        "class_name": "Lambda",
        "config": {"function": ["4wEAAAA=", None, None], "function_type": "lambda"},
    },
    "type": {
        "module": "antigravity",
        "class_name": "__typespec__",
        "config": {},
        "spec_name": "S",
    },
    "odd": {"module": ["os"], "class_name": {"a": 1}, "config": "system"},
}


@pytest.mark.parametrize("part", HARMFUL.values(), ids=HARMFUL)
def test_what_a_model_may_not_name(part, original, tmp_path):
    path = shutil.copy(original / "model.keras", tmp_path)
    part = {"registered_name": None, "config": {}, **part}
    rewrite(path, lambda c: c["config"]["backbone"]["config"].update(activation=part))
    with pytest.raises(RunError, match="neither of mdn nor a harmless part of Keras") as error:
        mdn.load(path)
    assert "\n" not in str(error.value)
    assert "antigravity" not in sys.modules


def test_files_that_keras_reads_in_other_ways_are_refused(original, tmp_path):
    path = shutil.copy(original / "model.keras", tmp_path / "model.h5")
    with pytest.raises(RunError, match=r"model\.h5 is no \.keras file by its name"):
        mdn.load(path)


def test_the_version_that_can_load_a_file_is_named(original, tmp_path):
    path = shutil.copy(original / "model.keras", tmp_path)
    assert written_by(path) == mdn.__version__

    def sign():
        with zipfile.ZipFile(path, "a") as archive:
            archive.comment = b"mdn 9.9.1"

    sign()
    mdn.load(path)  # what can be read is read
    for change in (
        lambda config: config["config"]["head"].update(
            class_name="Later", registered_name="Later"
        ),
        lambda config: config["config"].pop("missing"),
    ):
        shutil.copy(original / "model.keras", tmp_path)
        rewrite(path, change)
        sign()
        with pytest.raises(RunError, match=r"mdn 9\.9\.1 wrote it, and can load it") as error:
            mdn.load(path)
        assert "\n" not in str(error.value)


def test_optimizer_of_a_foreign_hand_is_not_looked_at_without_need(original, tmp_path):
    path = shutil.copy(original / "model.keras", tmp_path)
    own = {"module": "antigravity", "class_name": "Adam", "config": {}, "registered_name": "Adam"}
    rewrite(path, lambda config: config["compile_config"].update(optimizer=own))
    mdn.load(path, compile=False)
    with pytest.raises(RunError, match=r"antigravity\.Adam"):
        mdn.load(path)


def test_models_of_keras_alone_need_no_trust(tmp_path):
    layers = tf_keras.layers
    inputs = tf_keras.Input([1])
    x = layers.Dense(3, "gelu", kernel_initializer="he_normal", kernel_regularizer="l2")(inputs)
    x = layers.LayerNormalization()(x * 2.0 + inputs)
    nets = [
        tf_keras.Model(inputs, layers.BatchNormalization()(x)),
        tf_keras.Sequential([layers.Dense(3, tf_keras.activations.tanh), layers.Dropout(0.1)]),
        backbones.ResNet(4, 1),
    ]
    for i, net in enumerate(nets):
        model = MDN(heads.TriL(1), net)
        model.adapt(X, np.sin(X))
        schedule = tf_keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)
        model.compile(tf_keras.optimizers.SGD(schedule), loss={"name": "crps"})
        model.save(tmp_path / f"{i}.keras")
        check_model(tmp_path / f"{i}.keras")
        loaded = mdn.load(tmp_path / f"{i}.keras")
        np.testing.assert_allclose(loaded.predict(X), model.predict(X), rtol=1e-6)
