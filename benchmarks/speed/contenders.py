"""Who trains: a name, the module that knows how, and what it needs to be installed."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any, Protocol

from benchmarks.speed.workloads import Problem


class Runner(Protocol):
    """A model at its starting weights, with a training loop."""

    def train(self, epochs: int, shuffle: bool = True) -> None:
        """Train, and return when all of it is done.

        Args:
            epochs: how many.
            shuffle: each in an order of its own; otherwise the rows in theirs, as the check that
                all contenders train the same model wants them.
        """

    def loss(self, rows: int) -> float:
        """Return the mean NLL of the first rows, nats per row, by the runner's own density."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """A way of training.

    Attributes:
        key: its name on the command line.
        label: its name in the tables.
        family: "mdn", "Keras", "PyTorch" or "JAX".
        where: module and class of its runner.
        options: arguments of that class.
        most_targets: the greatest D that it is let in with.
    """

    key: str
    label: str
    family: str
    where: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    most_targets: int | None = None

    @property
    def late_epsilon(self) -> bool:
        """How its Adam is written, see `benchmarks.speed.reference.Reference`."""
        return self.family == "PyTorch"

    def make(self, problem: Problem) -> Runner:
        """Return a runner at its starting weights.

        Raises:
            ImportError: its package is not installed.
            ValueError: it is not let in with so many targets.
        """
        if self.most_targets is not None and problem.workload.targets > self.most_targets:
            raise ValueError(f"only up to D = {self.most_targets}")
        module, name = self.where.split(":")
        runner = getattr(importlib.import_module(f"benchmarks.speed.{module}"), name)
        return runner(problem, **self.options)


JAX, TORCH = "jax_peers:Jax", "torch_peers:Torch"
MDN = Contender("mdn", "mdn", "mdn", "ours:Ours")
KERAS = Contender("keras", "Keras as documented", "Keras", "keras_peers:Documented")
# The network with a cheap loss: not a contender, but in the same run.
NETWORK = Contender("network", "mdn, sum of squares", "mdn", "ours:Network")

CONTENDERS = (
    MDN,
    KERAS,
    Contender("keras-tuned", "Keras tuned", "Keras", "keras_peers:Tuned"),
    Contender(
        "torch-distributions", "PyTorch, distributions", "PyTorch", TORCH, {"way": "distributions"}
    ),
    Contender("torch-solve", "PyTorch, triangular solve", "PyTorch", TORCH, {"way": "solve"}),
    Contender(
        "torch-compile-solve",
        "PyTorch, compiled, triangular solve",
        "PyTorch",
        TORCH,
        {"way": "solve", "compiled": True},
    ),
    Contender(
        "torch-compile-rows",
        "PyTorch, compiled, unrolled",
        "PyTorch",
        TORCH,
        {"way": "rows", "compiled": True},
        # At D = 10 it compiles for minutes, at 32 for half an hour, and is the slowest of all.
        most_targets=2,
    ),
    Contender("jax-solve", "JAX, triangular solve", "JAX", JAX, {"way": "solve"}),
    Contender("jax-columns", "JAX, unrolled", "JAX", JAX, {"way": "columns"}),
    Contender("jax-rows", "JAX, unrolled, batch last", "JAX", JAX, {"way": "rows"}),
)

# The same with triangles that are factors of the precision, so that nothing is solved.
PRECISION = (
    Contender("mdn", "mdn, tril_precision", "mdn", "ours:OursPrecision"),
    Contender(
        "torch-precision", "PyTorch, precision factor", "PyTorch", TORCH, {"way": "precision"}
    ),
    Contender(
        "torch-compile-precision",
        "PyTorch, compiled, precision factor",
        "PyTorch",
        TORCH,
        {"way": "precision", "compiled": True},
    ),
    Contender(
        "jax-precision",
        "JAX, precision factor",
        "JAX",
        JAX,
        {"way": "rows", "precision": True},
    ),
)
