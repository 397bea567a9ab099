"""What the suite shares: TensorFlow once per worker, one thread of BLAS, the order of tests."""

import functools
import gc
import os
import sys
import typing

import numpy as np
import pytest

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["TF_USE_LEGACY_KERAS"] = "1"
# What XLA takes to make a program fast, four times what it needs otherwise, no test earns back.
# Processes that tests start do the same, but for the one of the main job.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
)
# Several workers share the cores, and threads of BLAS that wait for each other spin.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Tracing makes objects by the hundred thousand, most of which live: look for the dead less often.
gc.set_threshold(50_000, 20, 20)

# For each of TensorFlow's questions whether a value is of a protocol, Python before 3.12 lists the
# protocol's members anew.
if sys.version_info < (3, 12):
    typing._get_protocol_attrs = functools.cache(typing._get_protocol_attrs)


@pytest.fixture(scope="session", autouse=True)
def _answers_step_by_step():
    """Let models answer few rows step by step: to trace a graph takes longer.

    But in bfloat16, whose roundings are those of a graph. Yields what makes programs otherwise.
    """
    import tensorflow as tf

    from mdn.answers import AnsweringModel

    def row_program(model, function):
        program = whole(model, function)
        if tf.as_dtype(model.backbone.compute_dtype or model.dtype).size >= 4:
            program._graph = function
        return program

    whole, AnsweringModel.row_program = AnsweringModel.row_program, row_program
    yield whole
    AnsweringModel.row_program = whole


@pytest.fixture
def graph_answers(_answers_step_by_step, monkeypatch):
    """Let models answer as they do for a user: few rows by a graph, and many by XLA."""
    monkeypatch.setattr("mdn.answers.AnsweringModel.row_program", _answers_step_by_step)


@pytest.fixture
def xla_answers(graph_answers, monkeypatch):
    """Let models answer by XLA at once, and not only for many rows."""
    monkeypatch.setattr("mdn.inference.FEW_BATCHES", 0)


@pytest.fixture
def eager_steps(monkeypatch):
    """Let models train and evaluate step by step: to trace a step takes as long as dozens do."""
    from mdn.compiled import CompiledModel

    eager = functools.partialmethod(CompiledModel.compile, run_eagerly=True)
    monkeypatch.setattr(CompiledModel, "compile", eager)


@pytest.fixture
def bare_runs(monkeypatch):
    """Let runs draw no figures and export nothing, in tests of what they learn."""
    from mdn import tasks

    for name in ("save_plots", "save_vae_plots", "write_figures"):
        monkeypatch.setattr(tasks, name, lambda *args, **kwargs: None)
    for task in (tasks.DensityTask, tasks.VAETask):
        monkeypatch.setattr(task, "export", lambda *args, **kwargs: None)


@pytest.fixture(scope="session")
def exports(tmp_path_factory):
    """Return (model, folder of its SavedModel) by case: one target and several, of each kind of x.

    Modules that use it are of the `xdist_group` "serving", so that it is made once.
    """
    import tf_keras

    from mdn import MDN, backbones, heads
    from mdn.data.rows import ColumnNames
    from mdn.export import export_saved_model

    tf_keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("exports")
    n = 400
    columns = {
        "floor space": rng.gamma(3.0, 30.0, n),
        "kind": rng.choice(["house", "flat", "<b>boat</b>"], n, p=[0.5, 0.4, 0.1]).astype(object),
    }
    price = 3.0 * columns["floor space"] + np.where(columns["kind"] == "house", 900.0, 0.0)
    price += rng.normal(0.0, 40.0, n)
    matrix = rng.normal(size=[n, 2])
    targets = matrix[:, :1] + rng.normal(size=[n, 3]) @ [
        [1.0, 0.8, 0.0],
        [0.0, 0.6, 0.5],
        [0, 0, 1],
    ]
    cases = {
        "one": (heads.Mixture(1, 2), columns, price[:, None], ("floor space", "kind"), ("price",)),
        "three": (heads.Mixture(3, 2), matrix, targets, ("u", "v"), ("a", "b", "<i>c</i>")),
    }
    made = {}
    for name, (head, x, y, features, names) in cases.items():
        model = MDN(head, backbones.MLP([8]))
        model.adapt(x, y)
        model.column_names = ColumnNames(features, names)
        made[name] = model, export_saved_model(model, folder / name)
    return made


@pytest.fixture(scope="session")
def served(exports):
    """Return what serves each of `exports`."""
    from mdn.serving.model import ServedModel

    return {name: ServedModel(path) for name, (_, path) in exports.items()}


def pytest_collection_modifyitems(items):
    """Put slow tests first, so that no worker starts a long one when the other is done."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
