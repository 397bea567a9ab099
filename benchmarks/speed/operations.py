"""Where a train step's time goes: the operations of its XLA program, by TensorFlow's profiler."""

from __future__ import annotations

import collections
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import tensorflow as tf
from tensorflow.tsl.profiler.protobuf import xplane_pb2

_PRODUCTS = ("MatMul", "dot", "while_MatMul")  # as XLA calls matrix products


def measure(train: Callable[[], object], steps: int) -> dict[str, float]:
    """Return microseconds of a step of a compiled loop, and what they were spent on.

    The profiler slows an operation by a part of a microsecond, so that the step is timed without
    it and the operations with it.

    Args:
        train: takes the steps, all in one thread.
        steps: how many.

    Returns:
        "step"; "products", of matrices; "others", all other operations; "operations", their
        number.
    """
    train()
    begun = time.perf_counter()
    train()
    step = 1e6 * (time.perf_counter() - begun) / steps
    options = tf.profiler.experimental.ProfilerOptions(host_tracer_level=3)
    with tempfile.TemporaryDirectory() as folder:
        tf.profiler.experimental.start(folder, options=options)
        train()
        tf.profiler.experimental.stop()
        space = xplane_pb2.XSpace()
        space.ParseFromString(next(Path(folder).rglob("*.xplane.pb")).read_bytes())
    spent, count = collections.Counter[str](), collections.Counter[str]()
    for plane in space.planes:
        for line in plane.lines:
            for event in line.events:
                name = plane.event_metadata[event.metadata_id].name
                spent[name] += event.duration_ps / 1e6
                count[name] += 1
    # What runs once a step is in the loop; "end: " marks that an operation's other thread is done.
    names = [
        name
        for name in spent
        if 0.9 * steps <= count[name] <= 1.1 * steps and ":" not in name and "Execut" not in name
    ]
    products = [name for name in names if name.startswith(_PRODUCTS)]
    total = sum(spent[name] for name in names) / steps
    of_products = sum(spent[name] for name in products) / steps
    return {
        "step": step,
        "products": of_products,
        "others": total - of_products,
        "operations": float(len(names)),
    }
