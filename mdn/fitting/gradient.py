"""Minimising a negative log likelihood by its gradient, from several starts in one program.

Shape letters: S starts, P unconstrained numbers, N rows, B batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf
import tf_keras
from scipy import optimize

from mdn.errors import ConfigError

Objective = Callable[..., tf.Tensor]
"""Positions [S, P] (and rows) to the NLL [S], the mean over the rows in nats."""

# A mini-batch fit has converged when its gradient, over all rows, is this small in terms of its
# own standard error. The estimate is then as many standard errors from the optimum.
_SHARE_OF_ERROR = 0.1
_LEAST_RATE = 1e-3  # of the first learning rate
_PATIENCE = 3  # epochs
_FEWEST_BATCHES = 20  # of which a standard error is taken


class Minimum(NamedTuple):
    """Where the minimisation of S starts ended."""

    position: np.ndarray  # [S, P]
    nll: np.ndarray  # [S], nats per row
    gradient_norm: np.ndarray  # [S], greatest entry
    converged: np.ndarray  # [S]
    steps: int
    reason: str
    history: list[float]  # of the best start, after each step or epoch


def minimise(
    objective: Objective, start: np.ndarray, *, tolerance: float, max_steps: int, compiled: bool
) -> Minimum:
    """Minimise over all rows at once by L-BFGS, one start after the other.

    Args:
        objective: positions [1, P] to [1].
        start: [S, P].
        tolerance: a start has converged when no entry of its gradient is greater, times its
            number where that is greater than one.
        max_steps: of a start, the end in any case.
        compiled: the objective and its gradient are one XLA program.

    Raises:
        ConfigError: the objective has no gradient.

    Source:
        Nocedal and Wright (2006), Numerical Optimization, algorithm 7.5.
    """

    @tf.function(jit_compile=compiled, autograph=False)
    def nll_and_gradient(position: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(position)
            nll = objective(position[tf.newaxis])[0]
        gradient = tape.gradient(nll, position)
        if gradient is None:
            raise ConfigError("this distribution has no gradient by its parameters")
        return nll, gradient

    def evaluate(position: np.ndarray) -> tuple[float, np.ndarray]:
        nll, gradient = nll_and_gradient(tf.constant(position, start.dtype))
        return float(nll), gradient.numpy().astype(np.float64)

    ends = [_minimise_one(evaluate, position, tolerance, max_steps) for position in start]
    nll = np.array([end.nll for end in ends])
    norm = np.array([end.gradient_norm for end in ends])
    converged = np.isfinite(nll) & (norm <= tolerance)
    steps = [len(end.history) - 1 for end in ends]
    best = int(np.argmin(np.where(np.isfinite(nll), nll, np.inf)))
    if converged[best]:
        reason = f"the gradient is not greater than {tolerance:.2g}"
    elif steps[best] >= max_steps:
        reason = f"stopped after max_steps={max_steps}: give it more, or a better start"
    else:
        reason = (
            f"no way down was found at a gradient of {norm[best]:.2g}: the likelihood may have a "
            "kink there, or no bound"
        )
    position = np.stack([end.position for end in ends]).astype(start.dtype)
    return Minimum(position, nll, norm, converged, steps[best], reason, ends[best].history)


class _End(NamedTuple):
    position: np.ndarray  # [P]
    nll: float
    gradient_norm: float
    history: list[float]


def _minimise_one(
    evaluate: Callable[[np.ndarray], tuple[float, np.ndarray]],
    position: np.ndarray,
    tolerance: float,
    max_steps: int,
) -> _End:
    position = position.astype(np.float64)
    nll, gradient = evaluate(position)
    history = [nll]
    last = [position, gradient]  # the newest evaluation: that of a step, when the step is over

    def remember(at: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = evaluate(at)
        last[:] = [at.copy(), slope]
        return value, slope

    def stop_at_optimum(intermediate_result: optimize.OptimizeResult) -> None:
        history.append(float(intermediate_result.fun))
        if np.array_equal(last[0], intermediate_result.x) and _norm(*last) <= tolerance:
            raise StopIteration

    # Where the line search gives up, steepest descent begins anew: as long as that helps.
    while np.isfinite(nll) and len(history) <= max_steps:
        if _norm(position, gradient) <= tolerance:
            break
        found = optimize.minimize(
            remember,
            position,
            jac=True,
            method="L-BFGS-B",
            callback=stop_at_optimum,
            options={
                "gtol": 0.0,
                "ftol": 0.0,
                "maxiter": max_steps - len(history) + 1,
                "maxfun": 20 * max_steps,
                "maxls": 50,
            },
        )
        progress = nll - found.fun
        if not progress > 0.0:
            break
        position, nll = found.x, float(found.fun)
        gradient = evaluate(position)[1]
        if progress < 1e-14 * abs(nll):
            break
    return _End(position, nll, _norm(position, gradient), history)


def _norm(position: np.ndarray, gradient: np.ndarray) -> float:
    """Return the greatest entry of a gradient [P], relative to numbers greater than one.

    The gradient by a great number vanishes far from any optimum, in proportion to it.
    """
    return float((np.abs(gradient) * np.maximum(1.0, np.abs(position))).max())


def descend(
    objective: Objective,
    start: np.ndarray,
    rows: int,
    *,
    batch_size: int,
    learning_rate: float,
    max_steps: int,
    seed: int,
    compiled: bool,
) -> Minimum:
    """Minimise by Adam on shuffled mini-batches; the answer is an average over an epoch.

    The learning rate is halved when the average stops improving, until the gradient over all rows
    cannot be told from zero.

    Args:
        objective: positions [S, P] and row numbers [B] to [S], the sum over those rows divided
            by B; row number N counts nothing.
        start: [S, P].
        rows: N.
        batch_size: B.
        learning_rate: of the first epochs.
        max_steps: the end in any case, at a whole epoch.
        seed: of the order of the rows.
        compiled: an epoch is one XLA program.

    Source:
        Kingma and Ba (2015), Adam; Polyak and Juditsky (1992), Acceleration of stochastic
        approximation by averaging.
    """
    batches = rows // batch_size
    position = tf.Variable(start)
    optimizer = tf_keras.optimizers.Adam(learning_rate)
    optimizer.build([position])

    def nll_and_gradient(at: tf.Tensor, batch: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(at)
            nll = objective(at, batch)
        return nll, tape.gradient(nll, at)

    @tf.function(jit_compile=compiled, autograph=False)
    def epoch(order: tf.Tensor) -> tf.Tensor:
        """Take a step for each batch of row numbers [n, B]; return the mean position."""

        def step(i: tf.Tensor, total: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            _, gradient = nll_and_gradient(position.value(), order[i])
            optimizer.apply_gradients([(gradient, position)])
            return i + 1, total + position.value()

        n = order.shape[0]
        _, total = tf.while_loop(lambda i, _: i < n, step, [0, tf.zeros_like(position)])
        return total / n

    @tf.function(jit_compile=compiled, autograph=False)
    def judge(at: tf.Tensor, order: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Return the NLL [S], and the mean and standard error of the gradient [S, P]."""

        def step(i: tf.Tensor, *sums: tf.Tensor) -> tuple:
            nll, gradient = nll_and_gradient(at, order[i])
            terms = (nll, gradient, tf.square(gradient))
            return (i + 1, *(a + b for a, b in zip(sums, terms, strict=True)))

        n = rows / order.shape[1]  # the last batch may be in part rows that count nothing
        zeros = (tf.zeros_like(at[:, 0]), tf.zeros_like(at), tf.zeros_like(at))
        sums = tf.while_loop(lambda i, *_: i < order.shape[0], step, [0, *zeros])[1:]
        nll, mean, square = (s / n for s in sums)
        return nll, mean, tf.sqrt(tf.maximum(square - tf.square(mean), 0.0) / n)

    rng = np.random.default_rng([seed, 0x47])
    # All rows, in batches that are enough for a standard error and of no order of the file's;
    # the last one is filled up with rows that count nothing.
    size = max(1, min(batch_size, rows // _FEWEST_BATCHES))
    numbers = np.full(math.ceil(rows / size) * size, rows, np.int32)
    numbers[:rows] = rng.permutation(rows)
    every = numbers.reshape(-1, size)
    history: list[float] = []
    best = np.full(len(start), np.inf)
    steps, since, reason = 0, 0, f"stopped after max_steps={max_steps}: give it more"
    average, nll, gradient, error = start, best, np.full_like(start, np.inf), np.ones_like(start)
    while steps < max_steps:
        order = rng.permutation(rows).astype(np.int32)[: batches * batch_size]
        average = epoch(tf.constant(order.reshape(batches, batch_size))).numpy()
        steps += batches
        nll, gradient, error = (t.numpy() for t in judge(tf.constant(average), tf.constant(every)))
        history.append(float(np.nanmin(nll)))
        if _share_of_error(gradient, error).max() <= _SHARE_OF_ERROR:
            break
        if not np.isfinite(nll).all():
            reason = "the NLL is not finite: lower the learning_rate, or give a better start"
            break
        if (nll < best - 1e-3 / rows).all():
            since = 0
        elif (since := since + 1) >= _PATIENCE:
            since = 0
            if float(optimizer.learning_rate) < _LEAST_RATE * learning_rate:
                reason = "the learning rate has become too small to go on"
                break
            optimizer.learning_rate.assign(0.5 * optimizer.learning_rate)
            position.assign(average)
        best = np.minimum(best, nll)
    share = _share_of_error(gradient, error).max(axis=-1)
    converged = share <= _SHARE_OF_ERROR
    if converged.all():
        reason = f"the gradient is within {share.max():.2g} of its standard errors from zero"
    norm = np.array([_norm(*pair) for pair in zip(average, gradient, strict=True)])
    return Minimum(average, nll, norm, converged, steps, reason, history)


def _share_of_error(gradient: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Return how many standard errors a gradient [S, P] is from zero."""
    tiny = np.finfo(gradient.dtype).tiny
    share = np.abs(gradient) / np.maximum(error, tiny)
    return np.where(gradient == 0.0, 0.0, np.nan_to_num(share, nan=np.inf))
