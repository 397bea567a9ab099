"""The loop: a chunk of train or test steps as one XLA program, called from Keras's `fit`.

Keras calls its train function once for `steps_per_execution` steps, and that is where this
function stands: it takes one stacked chunk from the iterator and goes through its batches inside
of XLA. There is no Python, and no dispatch of operations, between two steps.

Shape letters: B batch, S steps of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf


def chunk_function(
    step: Callable[[Any], Any],
    results: Callable[[], dict[str, tf.Tensor]],
    counter: tf.Variable,
    totals: Sequence[tf.Variable],
) -> Callable[[Iterator, bool], dict[str, tf.Tensor]]:
    """Return a function of an iterator of `mdn.data.pipeline.Batches.chunks`.

    Args:
        step: what to do with a batch; it acts on variables alone.
        results: the metrics at the end of a chunk.
        counter: counts the steps.
        totals: the sums behind the metrics.

    Returns:
        Of (iterator, whether the totals start at zero): the metrics after the next chunk.
    """

    @tf.function(jit_compile=True, autograph=False)
    def run(batches: Any, steps: tf.Tensor, afresh: tf.Tensor) -> dict[str, tf.Tensor]:
        for total in totals:  # here, as an assignment in Python takes longer than ten steps
            total.assign(tf.where(afresh, tf.zeros_like(total), total))

        def body(i: tf.Tensor) -> list[tf.Tensor]:
            step(tf.nest.map_structure(lambda t: t[i], batches))
            return [i + 1]

        tf.while_loop(lambda i: i < steps, body, [tf.constant(0)])
        return results()

    @tf.function(autograph=False, reduce_retracing=True)
    def take(iterator: Iterator, afresh: tf.Tensor) -> dict[str, tf.Tensor]:
        batches, steps = next(iterator)
        counter.assign_add(tf.cast(steps, counter.dtype))
        return run(batches, steps, afresh)

    return lambda iterator, afresh: take(iterator, tf.constant(afresh))
