"""Five members trained together beside five runs one after the other, compilation included.

    python -m benchmarks.ensemble

Both fit the same rows for the same epochs with Adam and the same batch size, in turn, so that a
busy machine slows both. A run of its own compiles its own program, as a process of its own would.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from typing import NamedTuple

import numpy as np
import tf_keras

import mdn


class Workload(NamedTuple):
    """Rows and a batch size; K is 3, and the backbone an MLP of two layers of 64.

    Attributes:
        features: F.
        targets: D.
        batch_size: B.
    """

    features: int
    targets: int
    batch_size: int


WORKLOADS = {"S": Workload(1, 1, 64), "M": Workload(8, 2, 128)}


def draw(workload: Workload, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Return x [N, F] and y [N, D]."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=[rows, workload.features])
    side = rng.choice([-1.0, 1.0], size=[rows, 1])
    return x, side * np.sin(2.0 * x[:, :1]) + 0.3 * rng.normal(size=[rows, workload.targets])


def train(
    model: mdn.MDN, x: np.ndarray, y: np.ndarray, batch_size: int, epochs: int, seed: int
) -> tuple[float, float]:
    """Return the seconds of the first epoch, with compilation, and of the others."""
    tf_keras.utils.set_random_seed(seed)
    model.adapt(x, y, seed=seed)
    model.compile("adam")
    times = [time.perf_counter()]
    mark = tf_keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: times.append(time.perf_counter())
    )
    model.fit(x, y, batch_size=batch_size, epochs=epochs, verbose=0, callbacks=[mark])
    return times[1] - times[0], times[-1] - times[1]


def make_model(workload: Workload) -> mdn.MDN:
    """Return one member, not adapted."""
    return mdn.MDN(mdn.heads.Mixture(workload.targets, 3), mdn.backbones.MLP([64, 64]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=16_384)
    parser.add_argument("--members", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=[*WORKLOADS])
    options = parser.parse_args()
    print(
        f"{options.members} members, {options.rows:,} rows, {options.epochs} epochs, "
        f"{options.repeats} repeats, {os.cpu_count()} cores ({platform.machine()})\n"
    )
    print("| workload | | first epoch, with compilation, s | others, s | all, s | ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in options.workloads:
        workload = WORKLOADS[name]
        x, y = draw(workload, options.rows)
        shared = x, y, workload.batch_size, options.epochs
        alone, together = [], []
        for _ in range(options.repeats):
            runs = [train(make_model(workload), *shared, m) for m in range(options.members)]
            alone.append(np.sum(runs, axis=0))
            ensemble = mdn.Ensemble(make_model(workload), members=options.members)
            together.append(np.array(train(ensemble, *shared, 0)))
        ratio = np.median([b.sum() / a.sum() for a, b in zip(alone, together, strict=True)])
        for label, seconds in (("one by one", alone), ("ensemble", together)):
            first, others = np.median(seconds, axis=0)
            cell = f"{ratio:.2f}" if label == "ensemble" else "1"
            print(
                f"| {name} | {label} | {first:.1f} | {others:.1f} "
                f"| {np.median(np.sum(seconds, axis=1)):.1f} | {cell} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
