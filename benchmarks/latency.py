"""How long one row takes: Keras, the SavedModel, LiteRT and ONNX Runtime.

    python -m benchmarks.latency [--json OUT]

The density of a single row, of a mixture and of an ensemble of five. All that answer are asked in
turn, a row at a time, so that a busy machine slows all; before that their answers are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import mdn
from benchmarks.speed.workloads import WORKLOADS
from mdn.cli.quiet import import_tensorflow

MEMBERS = 5
MODELS = ("mixture", f"ensemble of {MEMBERS}")
BUSY = ": not idle, which slows the threads of TensorFlow more than the runtimes on one thread"
WARM_UP = 20  # calls that are not counted
Ask = Callable[[np.ndarray], dict[str, np.ndarray]]


class Latency(NamedTuple):
    """Milliseconds of one call.

    Attributes:
        median: of all calls.
        p99: which one call in a hundred exceeds.
    """

    median: float
    p99: float


def make_model(name: str, rows: int = 2048) -> tuple[Any, np.ndarray]:
    """Return a model of the sizes of workload M with its starting weights, and x [N, F]."""
    import tf_keras

    workload = WORKLOADS["M"]
    rng = np.random.default_rng(0)
    x = rng.normal(size=[rows, workload.features]).astype(np.float32)
    y = rng.choice([-1.0, 1.0], size=[rows, 1]) * np.sin(2.0 * x[:, : workload.targets])
    y += 0.3 * rng.normal(size=y.shape)
    tf_keras.utils.set_random_seed(0)
    head = mdn.heads.Mixture(workload.targets, workload.components)
    model = mdn.MDN(head, mdn.backbones.MLP(workload.widths))
    if name != "mixture":
        model = mdn.Ensemble(model, MEMBERS)
    model.adapt(x, y)
    return model, x


def contenders(model: Any, folder: Path) -> dict[str, Ask]:
    """Return what answers for rows [B, F], by the name in the table."""
    import tensorflow as tf
    import tf_keras

    from mdn.export import export_litert, export_onnx, export_saved_model

    saved = tf.saved_model.load(str(export_saved_model(model, folder / "saved_model")))
    signature = saved.signatures["params"]

    def saved_model(x: np.ndarray) -> dict[str, np.ndarray]:
        return {name: value.numpy() for name, value in signature(x=tf.constant(x)).items()}

    def direct(x: np.ndarray) -> dict[str, np.ndarray]:
        return {name: value.numpy() for name, value in model(x, training=False).tensors().items()}

    return {
        "`predict` of Keras": lambda x: {"mean": tf_keras.Model.predict(model, x, verbose=0)},
        "`model.predict(x)`": lambda x: {"mean": model.predict(x)},
        "`model(x)`": direct,
        "SavedModel, `params`": saved_model,
        "LiteRT, `params`": litert(export_litert(model, folder / "litert") / "params.tflite"),
        "ONNX Runtime, `params`": onnx(export_onnx(model, folder / "onnx") / "params.onnx"),
    }


def litert(path: Path) -> Ask:
    from ai_edge_litert.interpreter import Interpreter

    runner = Interpreter(model_path=str(path), num_threads=1).get_signature_runner()
    return lambda x: runner(x=x)


def onnx(path: Path) -> Ask:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # others would spin while they wait, beside who is measured
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda x: dict(zip(names, session.run(names, {"x": x}), strict=True))


def compare(model: Any, asks: dict[str, Ask], x: np.ndarray) -> None:
    """Raise an AssertionError where one does not answer as the model does."""
    density = model(x, training=False)
    expected = {"mean": density.mean(), **density.tensors()}
    for name, ask in asks.items():
        for key, value in ask(x).items():
            np.testing.assert_allclose(value, expected[key], rtol=1e-4, atol=1e-4, err_msg=name)


def measure(asks: dict[str, Ask], x: np.ndarray, calls: int) -> dict[str, Latency]:
    """Return how long each takes for one row, over so many calls."""
    milliseconds: dict[str, list[float]] = {name: [] for name in asks}
    for i in range(-WARM_UP, calls):
        row = x[i % len(x)][np.newaxis]
        for name, ask in asks.items():
            start = time.perf_counter()
            ask(row)
            if i >= 0:
                milliseconds[name].append(1e3 * (time.perf_counter() - start))
    return {
        name: Latency(float(np.median(found)), float(np.quantile(found, 0.99)))
        for name, found in milliseconds.items()
    }


def table(found: dict[str, dict[str, Latency]]) -> str:
    """Return the latencies of each model as Markdown."""
    lines = [
        "| model | who answers | median, ms | p99, ms | times as fast as Keras's `predict` |",
        "| --- | --- | --- | --- | --- |",
    ]
    for model, latencies in found.items():
        slowest = latencies["`predict` of Keras"].median
        lines += [
            f"| {model} | {name} | {median:.3g} | {p99:.3g} | {slowest / median:.3g} |"
            for name, (median, p99) in latencies.items()
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--calls", type=int, default=500, help="of each, a row at a time")
    parser.add_argument("--models", default=",".join(MODELS), help="some of these, with commas")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--output", type=Path, help="also write the Markdown to this file")
    options = parser.parse_args()
    import_tensorflow()
    load = os.getloadavg()[0]
    found = {}
    for name in options.models.split(","):
        if name not in MODELS:
            parser.error(f"--models={name}: choose some of {', '.join(MODELS)}")
        model, x = make_model(name)
        with tempfile.TemporaryDirectory() as folder:
            asks = contenders(model, Path(folder))
            compare(model, asks, x)
            found[name] = measure(asks, x, options.calls)
    size = WORKLOADS["M"]
    text = (
        "# One row at a time\n\n"
        f"The density of {size.targets} targets given one row of {size.features} features, K = "
        f"{size.components}, two layers of {size.widths[0]}: the parameters of the mixture, or "
        f"its mean where `predict` is asked. {options.calls:,} calls of each, in turn; LiteRT and "
        f"ONNX Runtime on one thread. {os.cpu_count()} cores ({platform.machine()}), TensorFlow "
        f"{version('tensorflow')}. Load before the start: {load:.1f}{BUSY if load > 0.5 else ''}. "
        "Made by `python -m benchmarks.latency --output docs/benchmarks/latency.md`.\n\n"
        f"{table(found)}\n"
    )
    print(text)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        numbers = {
            model: {name: latency._asdict() for name, latency in latencies.items()}
            for model, latencies in found.items()
        }
        options.json.write_text(json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    main()
