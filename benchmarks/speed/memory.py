"""Peak memory of one contender, in a process of its own.

    python -m benchmarks.speed.memory M mdn problem.npz 16384

The child says how much it held before it made its model, the parent looks at it every few
milliseconds.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.speed.contenders import CONTENDERS, Contender
from benchmarks.speed.workloads import WORKLOADS, Problem

MIB = 2**20
_PERIOD = 0.005  # seconds between two looks at the child


def measure(problem: Problem, contender: Contender) -> dict[str, Any]:
    """Return the MiB that a contender held at most, and before it made its model.

    Returns:
        "peak" and "before"; or "failure" alone.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "problem.npz"
        problem.save(path)
        name, rows = problem.workload.name, str(problem.workload.rows)
        command = [sys.executable, "-m", __name__, name, contender.key, str(path), rows]
        with open(Path(folder) / "answer", "w+") as answer:
            child = psutil.Popen(command, stdout=answer, stderr=subprocess.DEVNULL)
            peak = _watch(child)
            answer.seek(0)
            lines = answer.read().strip().splitlines()
    if child.returncode or not lines:
        return {"failure": f"ended with exit code {child.returncode}"}
    return {"peak": peak, **json.loads(lines[-1])}


def _watch(child: psutil.Popen) -> float:
    """Return the most MiB that a process held until its end."""
    peak = 0
    while True:
        try:
            peak = max(peak, child.memory_info().rss)
            child.wait(_PERIOD)
            return peak / MIB
        except psutil.TimeoutExpired:
            continue
        except psutil.NoSuchProcess:
            child.wait()
            return peak / MIB


def main(arguments: Sequence[str]) -> None:
    name, key, path, rows = arguments
    workload = dataclasses.replace(WORKLOADS[name], rows=int(rows))
    problem = Problem.load(workload, path)
    contender = next(contender for contender in CONTENDERS if contender.key == key)
    importlib.import_module(f"benchmarks.speed.{contender.where.split(':')[0]}")
    before = psutil.Process().memory_info().rss / MIB
    contender.make(problem).train(2)
    print(json.dumps({"before": before}))


if __name__ == "__main__":
    main(sys.argv[1:])
