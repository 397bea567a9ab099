"""How long the queries of a density take, beside TensorFlow Probability where it has them.

    python -m benchmarks.exact

All in one interleaved run under XLA: a round takes every query in turn, and ratios are taken
within a round. The answers that both have are compared before.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from tensorflow_probability import distributions as tfd

import mdn
from benchmarks.speed.measure import Spread

LEVELS = np.linspace(0.1, 0.9, 9, dtype=np.float32)


class Query(NamedTuple):
    """One line of the table.

    Attributes:
        label: what is asked.
        targets: D.
        ask: takes a density, and y [N, D].
        peer: whether TFP's mixture has it too.
        same: whether both give the same; draws are never the same.
        share: of the rows, for what takes seconds.
    """

    label: str
    targets: int
    ask: Callable[[Any, tf.Tensor], Any]
    peer: bool = False
    same: bool = True
    share: float = 1.0


SEED = np.array([1, 2], np.int32)
QUERIES = (
    Query("`log_prob(y)`", 4, lambda d, y: d.log_prob(y), peer=True),
    Query("`sample()`", 4, lambda d, y: d.sample(seed=SEED), peer=True, same=False),
    Query("`mean()` and `covariance()`", 4, lambda d, y: (d.mean(), d.covariance()), peer=True),
    Query("`log_prob(y)`, one target missing", 4, lambda d, y: d.log_prob(_gap(y))),
    Query("`marginal([2, 0])`", 4, lambda d, y: d.marginal([2, 0]).tensors()),
    Query("`condition({1: ..})`", 4, lambda d, y: d.condition({1: y[:, 1]}).tensors()),
    Query("`cdf(y)`", 4, lambda d, y: d.cdf(y)),
    Query("`crps(y)`", 4, lambda d, y: d.crps(y)),
    Query("`pit(y)`", 4, lambda d, y: d.pit(y)),
    Query("`modes()`", 4, lambda d, y: d.modes(), share=0.01),
    Query("`reduce(2)`", 4, lambda d, y: d.reduce(2).kl_bound, share=0.01),
    Query("`quantile`, 9 levels", 1, lambda d, y: d.quantile(LEVELS)),
    Query("`hdr(0.9)`", 1, lambda d, y: d.hdr(0.9), share=0.01),
)


def _gap(y: tf.Tensor) -> tf.Tensor:
    return tf.where(tf.range(y.shape[-1]) == 1, tf.constant(np.nan, y.dtype), y)


def draw(rows: int, components: int, targets: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Return logits, loc and scale_tril of N densities, and y [N, D]: float32."""
    rng = np.random.default_rng(0)
    factor = np.tril(0.3 * rng.normal(size=[rows, components, targets, targets]), -1)
    diagonal = rng.uniform(0.3, 1.5, size=[rows, components, targets])
    factor[..., range(targets), range(targets)] = diagonal
    logits = rng.normal(size=[rows, components])
    loc = 2.0 * rng.normal(size=[rows, components, targets])
    y = rng.normal(size=[rows, targets])
    return [p.astype(np.float32) for p in (logits, loc, factor)], y.astype(np.float32)


def peer(logits: tf.Tensor, loc: tf.Tensor, scale_tril: tf.Tensor) -> tfd.Distribution:
    """Return TFP's own mixture."""
    components = tfd.MultivariateNormalTriL(loc, scale_tril)
    return tfd.MixtureSameFamily(tfd.Categorical(logits=logits), components)


def make(query: Query, constructor: Callable[..., Any], rows: int, k: int) -> Callable[[], Any]:
    """Return the compiled query of rows in memory."""
    parameters, y = draw(rows, k, query.targets)
    tensors = [tf.constant(t) for t in (*parameters, y)]

    @tf.function(jit_compile=True, autograph=False)
    def program(*tensors: tf.Tensor) -> Any:
        return query.ask(constructor(*tensors[:-1]), tensors[-1])

    return lambda: tf.nest.map_structure(
        lambda t: t.numpy(), program(*tensors), expand_composites=True
    )


def measure(rows: int, components: int, repeats: int) -> str:
    """Return the table as Markdown."""
    runs: dict[tuple[str, str], Callable[[], Any]] = {}
    for query in QUERIES:
        n = max(1, round(query.share * rows))
        runs[query.label, "mdn"] = make(query, mdn.GaussianMixture, n, components)
        ours = runs[query.label, "mdn"]()
        if query.peer:
            runs[query.label, "TFP"] = make(query, peer, n, components)
            theirs = runs[query.label, "TFP"]()
            if query.same:
                for a, b in zip(tf.nest.flatten(ours), tf.nest.flatten(theirs), strict=True):
                    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for _ in range(repeats):
        for key, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[key].append(time.perf_counter() - start)
    lines = [
        "| query | rows | D | mdn, ms | TFP, ms | TFP / mdn |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for query in QUERIES:
        own = np.array(seconds[query.label, "mdn"])
        theirs, ratio = "none", ""
        if query.peer:
            other = np.array(seconds[query.label, "TFP"])
            theirs = f"{1e3 * np.median(other):.0f}"
            median, least, most = Spread.of(other / own)
            ratio = f"{median:.2f} ({least:.2f} - {most:.2f})"
        size = f"{max(1, round(query.share * rows)):,} | {query.targets}"
        lines.append(
            f"| {query.label} | {size} | {1e3 * np.median(own):.0f} | {theirs} | {ratio} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--components", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, help="also write the Markdown to this file")
    options = parser.parse_args()
    text = (
        "# Queries of a density\n\n"
        f"Milliseconds, K = {options.components}, float32, under XLA: "
        f"medians of {options.repeats} rounds, ratios within a round with the least and the "
        f"greatest. {os.cpu_count()} cores ({platform.machine()}), TensorFlow {tf.__version__}. "
        "Made by `python -m benchmarks.exact --output docs/benchmarks/exact.md`.\n\n"
        f"{measure(options.rows, options.components, options.repeats)}\n"
    )
    print(text)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text)


if __name__ == "__main__":
    main()
