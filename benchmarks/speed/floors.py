"""What a compiler could reach at best: parts of a train step alone, and JAX's batch-last step.

The same lines are compiled by TensorFlow's XLA, as `mdn` is, and by JAX's, in a process for each.
Neither is imported above: only what JAX lowers for TensorFlow has both in one process.

Shape letters: B batch, I incoming and O outgoing units of a layer, P parameters.
"""

from __future__ import annotations

import itertools
import timeit
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.speed.workloads import BETAS, EPSILON, Problem, Workload

# Known at run time alone, lest the compiler leave out what follows from it.
RATE = np.float32(1e-9)


class Products:
    """The matrix products of a network's forward and backward pass, without all between them.

    Whether B comes first or last in the activations, and I or O in the weights, is all the same
    to the network and not to the compiler: the fastest of the four is taken.

    Args:
        workload: its sizes.
        package: "tensorflow" or "jax".
    """

    def __init__(self, workload: Workload, package: str) -> None:
        layers = list(itertools.pairwise([workload.features, *workload.widths, workload.outputs]))
        rng = np.random.default_rng(0)
        programs = []
        for hidden, kernel in itertools.product(("bi", "ib"), ("io", "oi")):
            step = _products_step(hidden, kernel)
            sizes = {"b": workload.batch, "i": workload.features}
            x = rng.standard_normal([sizes[letter] for letter in hidden])
            weights = [
                rng.standard_normal([{"i": i, "o": o}[letter] for letter in kernel]) / np.sqrt(i)
                for i, o in layers
            ]
            state = [RATE, *(array.astype(np.float32) for array in (x, *weights))]
            programs.append(_loop(step, state, workload.steps, package))
        self.run = min(programs, key=_seconds)

    def train(self, epochs: int) -> None:
        for _ in range(epochs):
            self.run()


def _seconds(run: Callable[[], None]) -> float:
    """Return the least of three runs, after one that compiles."""
    run()
    return min(timeit.repeat(run, number=1, repeat=3))


def _products_step(hidden: str, kernel: str) -> Callable:
    """Return a step of (package, state): a little of each weight's gradient is added to it."""
    out = hidden.replace("i", "o")

    def step(package: Any, rate: Any, x: Any, *weights: Any) -> list:
        incoming = [x]
        for weight in weights:
            incoming.append(package.einsum(f"{hidden},{kernel}->{out}", incoming[-1], weight))
        outgoing, new = incoming.pop(), list(weights)
        for i in reversed(range(len(weights))):
            gradient = package.einsum(f"{hidden},{out}->{kernel}", incoming[i], outgoing)
            new[i] = weights[i] + rate * gradient
            if i:
                outgoing = package.einsum(f"{out},{kernel}->{hidden}", outgoing, weights[i])
        return [rate, x, *new]

    return step


class Adam:
    """The update of all weights as one vector, from a gradient that is there.

    Args:
        workload: its sizes.
        package: "tensorflow" or "jax".
    """

    def __init__(self, workload: Workload, package: str) -> None:
        sizes = [workload.features, *workload.widths, workload.outputs]
        count = sum((i + 1) * o for i, o in itertools.pairwise(sizes))
        gradient = np.random.default_rng(0).standard_normal(count).astype(np.float32)
        zeros = [np.zeros(count, np.float32)] * 3
        state = [RATE, np.float32(0.0), gradient, *zeros]
        self.run = _loop(_adam_step, state, workload.steps, package)
        self.run()

    def train(self, epochs: int) -> None:
        for _ in range(epochs):
            self.run()


def _adam_step(
    package: Any, rate: Any, count: Any, gradient: Any, weights: Any, mean: Any, square: Any
) -> list:
    count = count + 1.0
    corrected = rate * package.sqrt(1.0 - BETAS[1] ** count) / (1.0 - BETAS[0] ** count)
    mean = mean + (1.0 - BETAS[0]) * (gradient - mean)
    square = square + (1.0 - BETAS[1]) * (gradient * gradient - square)
    weights = weights - corrected * mean / (package.sqrt(square) + EPSILON)
    return [rate, count, gradient, weights, mean, square]


class Peer:
    """The epoch of JAX's batch-last contender, as JAX lowers it, in the rows' own order.

    Args:
        problem: rows and weights.
        package: "tensorflow" or "jax".
    """

    def __init__(self, problem: Problem, package: str) -> None:
        from benchmarks.speed.jax_peers import Jax

        epoch, state, rows = Jax(problem, "rows").program()
        self.run = (_exported if package == "tensorflow" else _jitted)(epoch, state, rows)
        self.run()

    def train(self, epochs: int) -> None:
        for _ in range(epochs):
            self.run()


def _jitted(epoch: Callable, state: Any, rows: tuple) -> Callable[[], list]:
    """Return what takes an epoch, as JAX compiles it, and returns the leaves of the state."""
    import jax

    compiled = jax.jit(epoch)

    def run() -> list:
        nonlocal state
        state = jax.block_until_ready(compiled(state, *rows))
        return jax.tree.leaves(state)

    return run


def _exported(epoch: Callable, state: Any, rows: tuple) -> Callable[[], list]:
    """Return the same as TensorFlow's XLA compiles it."""
    import jax
    import tensorflow as tf
    from tensorflow.compiler.tf2xla.ops import gen_xla_ops

    exported = jax.export.export(jax.jit(epoch), platforms=["cpu"])(state, *rows)
    assert len(exported.module_kept_var_idx) == len(exported.in_avals)  # all are passed below
    now, constant = (
        [tf.constant(np.asarray(leaf)) for leaf in jax.tree.leaves(part)] for part in (state, rows)
    )

    @tf.function(jit_compile=True, autograph=False)
    def call(*tensors: tf.Tensor) -> list[tf.Tensor]:
        return gen_xla_ops.xla_call_module(
            args=tensors,
            version=exported.calling_convention_version,
            module=exported.mlir_module_serialized,
            Sout=[list(out.shape) for out in exported.out_avals],
            Tout=[tf.as_dtype(out.dtype) for out in exported.out_avals],
            platforms=["CPU"],
        )

    def run() -> list:
        nonlocal now
        now = call(*now, *constant)
        now[0].numpy()
        return now

    return run


def _loop(step: Callable, state: list, steps: int, package: str) -> Callable[[], None]:
    """Return a program that takes so many steps, compiled as one."""
    if package == "jax":
        import jax

        def body(state: list, _: None) -> tuple[list, None]:
            return step(jax.numpy, *state), None

        scan = jax.jit(lambda state: jax.lax.scan(body, state, length=steps)[0])
        on_device = [jax.numpy.asarray(value) for value in state]
        return lambda: jax.block_until_ready(scan(on_device))
    import tensorflow as tf

    @tf.function(jit_compile=True, autograph=False)
    def loop(*state: tf.Tensor) -> list[tf.Tensor]:
        def body(i: tf.Tensor, *state: tf.Tensor) -> list[tf.Tensor]:
            return [i + 1, *step(tf, *state)]

        return tf.while_loop(lambda i, *_: i < steps, body, [tf.constant(0), *state])[1:]

    tensors = [tf.constant(value) for value in state]
    return lambda: loop(*tensors)[-1].numpy()
