"""tf.distribute: two replicas equal one device, two workers equal one process."""

import json
import socket

import numpy as np
import pytest
from forks import Fork, bare_main

import mdn
from mdn.cli.train import main

# On one worker, which makes the fixtures once.
pytestmark = pytest.mark.xdist_group("strategy")

OPTIONS = (
    "trainer.epochs=3",
    "trainer.batch_size=64",
    "trainer.compiled=false",
    "trainer.verbose=0",
    "callbacks.tensorboard.image_every=0",
    "backbone.widths=[16]",
    "data.rows=640",
    "data.validation_rows=100",
    "data.test_rows=100",
)


def start(directory, *options, name="run", main=bare_main, **environment):
    words = ["train.py", f"output_dir={directory}", *OPTIONS, *options]
    return Fork(main, words, log=directory.with_name(name), **environment)


def finish(process):
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    directory = tmp_path_factory.mktemp("one") / "run"
    finish(start(directory))
    return directory


def assert_same(one, two):
    ours, theirs = (json.loads((d / "metrics.json").read_text()) for d in (one, two))
    for key in ("test/nll", "test/rmse", "baseline/nll"):
        assert ours[key] == pytest.approx(theirs[key], abs=1e-4)
    weights = [mdn.load(d / "model.keras").get_weights() for d in (one, two)]
    for a, b in zip(*weights, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_two_replicas_equal_one_device(one_device, tmp_path):
    # Which draws and exports too, as the variables of replicas are of another kind.
    options = "strategy=mirrored", "strategy.logical_cpus=2"
    finish(start(tmp_path / "run", *options, main=main))
    assert (tmp_path / "run" / "saved_model" / "saved_model.pb").is_file()
    assert_same(one_device, tmp_path / "run")


@pytest.mark.slow
def test_two_workers_equal_one_process(one_device, tmp_path):
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    cluster = {"worker": [f"127.0.0.1:{port}" for port in ports]}
    workers = [
        start(
            tmp_path / "run",
            "strategy=multi_worker",
            "strategy.timeout=120",
            name=f"worker_{i}",
            TF_CONFIG=json.dumps({"cluster": cluster, "task": {"type": "worker", "index": i}}),
        )
        for i in range(2)
    ]
    for worker in workers:
        finish(worker)
    assert_same(one_device, tmp_path / "run")


@pytest.mark.slow
def test_a_worker_that_never_comes_ends_the_wait(tmp_path):
    config = {
        "cluster": {"worker": ["127.0.0.1:1", "127.0.0.1:2"]},
        "task": {"type": "worker", "index": 1},
    }
    process = start(
        tmp_path / "run",
        "strategy=multi_worker",
        "strategy.timeout=3",
        TF_CONFIG=json.dumps(config),
    )
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "Timeout" in err or "error:" in err
