"""The spread of a pool of densities: by how much it is to be narrower, and what it agrees on.

A mixture of densities that differ is wider than they are, and its mean is nearer to the truth than
theirs: a pool of calibrated densities is too wide. Narrower components make up for it, as in the
spread-adjusted linear pool, or wider ones where all members are too sure. And components count by
what the pool says of them (`mdn.density.agreement`), as it has the modes of all members.

Source:
    Gneiting and Ranjan (2013), Combining predictive distributions, who scale each density about
    its median; here each component is scaled about its mean, and none is moved.

Shape letters: D event size, V ensembles, M members of each.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from mdn.data.rows import Data, Rows
from mdn.data.splits import thin
from mdn.density.agreement import FLOOR, MOST_UNROLLED, support
from mdn.density.mixture import GaussianMixture
from mdn.density.recalibration import Recalibration
from mdn.held_out import (
    LEAST_ROWS,
    WIDEST,
    HeldOut,
    Part,
    hold_out,
    likelihood,
    most_likely,
    over_rows,
)

MOST_ROWS = 4000  # that are judged; a scale is then known to a hundredth
MOST_NUMBERS = 2**22  # parameters of all judged densities
LEAST_POOLED = 1.25  # ensembles, counted by their shares, that show what pooling does
MOST_GROWN = 2.0  # times what was seen of it
LEAST_SCALE = 0.3  # far below what pooling can do
MOST_AGREEMENT = 10.0
ROUNDS = 3
STEP = 0.01  # of the numbers, for differences of slopes


def pooled_spread(
    models: Mapping[str, Any],
    shares: Mapping[str, float],
    data: Data,
    folds: np.ndarray | None,
    seed: int = 0,
) -> tuple[Recalibration | None, float]:
    """Return the scales and the agreement that are best for the mixture of all members.

    A row is held out by one member of an ensemble, or a few, and of an ensemble with folds never
    by all. But what is best for a pool of n densities is seen at two n, for the ensembles alone
    and for their mixture, and others follow: what pooling changes goes as 1 - 1/n, the share of
    their differences that a pool of n has.

    Args:
        models: trained ensembles of M members, by name, without a map.
        shares: of those that are mixed.
        data: the rows.
        folds: [M, n], the rows that each member held out; None: the validation rows, by all.
        seed: of the points in the cells of targets on a grid.

    Returns:
        The map of each member's density, which has scales alone, or None; and the power of
        agreement, see `mdn.density.agreement`. Both are nearer to none by what the rows leave in
        doubt, and are none where a single ensemble has nearly all of the shares, or where rows
        that no member has learned from are few.
    """
    mixed = np.array(list(shares.values())) / sum(shares.values())
    pooled = float(1.0 / (mixed @ mixed))  # ensembles of equal shares that differ as much
    if pooled < LEAST_POOLED or data.validation is data.train:
        return None, 0.0
    kept = [models[name] for name in shares]
    rows, own = _held_out_rows(kept, data, folds)
    answers = [hold_out(model, rows.x, rows.y, rows.weight, own, seed) for model in kept]
    if len(answers[0].y) < LEAST_ROWS:
        return None, 0.0
    pool = _pool(answers, mixed)
    seen = sum(len(rows) for rows, _ in answers[0].members) / len(answers[0].y)
    many, members = seen * pooled, kept[0].members * pooled
    alone = mixed @ [fit_spread(answer, agreement=False)[0] for answer in answers]
    together, _ = fit_spread(pool, agreement=False)
    few_targets = pool.y.shape[-1] <= MOST_UNROLLED  # else all answers would take long
    agreed, variance = fit_spread(pool, agreement=few_targets, start=together)
    # A pool that agrees is of the same densities: by how much it is to be narrower still, the
    # scales without agreement tell.
    scale = extrapolate(alone[:-1], together[:-1], growth(seen, many, members))
    found = agreed + np.append(scale - together[:-1], 0.0)
    # One density has few to agree with: none but its own components.
    grown = growth(1.0, many, members)
    found[-1], variance[-1] = grown * found[-1], grown**2 * variance[-1]
    *log, agreement = shrink(found, variance).tolist()
    if not any(log):
        return None, agreement
    zeros, scales = (0.0,) * len(log), tuple(np.exp(log).tolist())
    return Recalibration(zeros, scales, kept=answers[0].kept), agreement


def _held_out_rows(
    models: Sequence[Any], data: Data, folds: np.ndarray | None
) -> tuple[Rows, list[np.ndarray] | None]:
    """Return rows that members held out, evenly many, and which of them each member did."""
    numbers = sum(model.head.params_size for model in models)
    judges = models[0].members if folds is None else folds.size / len(np.unique(folds))
    most = max(int(min(MOST_ROWS, MOST_NUMBERS // numbers) / judges), LEAST_ROWS)
    if folds is None:
        return data.validation.take(thin(len(data.validation), most)), None
    every = np.unique(folds)
    kept = every[thin(len(every), most)]
    n = len(data.train)
    rows = data.train.take(kept[kept < n]).append(data.validation.take(kept[kept >= n] - n))
    return rows, [np.searchsorted(kept, fold[np.isin(fold, kept)]) for fold in folds]


def _pool(answers: Sequence[HeldOut], shares: np.ndarray) -> HeldOut:
    """Return what the mixture of several models says of the same rows."""
    members = [member for answer in answers for member in answer.members]
    weights = np.repeat(shares, [len(answer.members) for answer in answers]).tolist()
    return dataclasses.replace(answers[0], members=members, shares=weights)


def growth(few: float, many: float, members: float) -> float:
    """Return the change from `few` densities to a pool of `members`, as a multiple of a seen one.

    That is from `few` to `many`, more than `few`; what pooling changes is linear in 1 / n. No more
    than twice, with what is in doubt of it.
    """
    return min((1.0 / few - 1.0 / members) / (1.0 / few - 1.0 / many), MOST_GROWN)


def extrapolate(few: np.ndarray, many: np.ndarray, grown: float) -> np.ndarray:
    """Return the logs of the scales that suit a pool, of those of two smaller ones.

    Args:
        few: [D], the logs of the scales that suit fewer densities.
        many: [D], of those that suit more of them.
        grown: by how much more than that the squares of the scales change, see `growth`.
    """
    square = 1.0 + grown * np.expm1(2.0 * (many - few))  # of a scale, as a share of the one before
    return few + 0.5 * np.log(np.maximum(square, LEAST_SCALE**2))


def shrink(estimate: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Return estimates nearer to zero by what is in doubt: the positive part of Stein's."""
    square = np.square(estimate)
    doubt = np.divide(variance, square, out=np.ones_like(square), where=variance < square)
    return estimate * (1.0 - doubt)


# ---------------------------------------------------------------------- fit


def fit_spread(
    held_out: HeldOut, agreement: bool = True, start: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the logs of the D scales, and the power of agreement, that are most likely.

    What the members say of each component, which the power is of, depends on the scales: it is
    taken from the scales before, a few times over.

    Args:
        held_out: of mixtures, or of normals, which are mixtures of one.
        agreement: whether to look for a power, see `mdn.density.agreement`; else it is 0.
        start: [D + 1], numbers near the answer, if any are known.

    Returns:
        [D + 1], and their variances [D + 1], infinite where the rows say nothing: of the estimate
        as it is, whether or not the densities are right (the sandwich of White, 1982).
    """
    judged = held_out.judged()
    weight, parts, d = held_out.weights(judged), held_out.parts(judged), held_out.y.shape[-1]
    mixtures = [part.kind(**part.tensors).as_mixture() for part in parts]
    score = _spread_likelihood(parts, mixtures, held_out.y[judged], held_out.kept)
    most = np.append(np.full(d, WIDEST), MOST_AGREEMENT if agreement else 0.0)
    least = np.append(-most[:d], 0.0)
    theta = np.zeros(d + 1) if start is None else start
    known = [np.zeros(mixture.logits.shape) for mixture in mixtures]
    for _ in range(ROUNDS if agreement else 1):
        if agreement:
            scaled = [_scaled(m, theta[:d], held_out.kept) for m in mixtures]
            known = _supports(len(judged), parts, scaled)
        now = functools.partial(score, known)
        theta = most_likely(now, weight, theta, least, most)
    ends = [
        [now(theta + sign * step, weight) for sign in (1.0, -1.0)] for step in STEP * np.eye(d + 1)
    ]
    slopes = np.stack([(up - down) / (2.0 * STEP) for (up, _), (down, _) in ends])  # [D + 1, n]
    curvature = -np.stack([(up - down) / (2.0 * STEP) for (_, up), (_, down) in ends])
    curvature = 0.5 * (curvature + curvature.T)
    variance = np.full(d + 1, np.inf)
    free = np.diag(curvature) > 1e-8 * len(weight)
    # Where the search ended there is no answer; a power that large is one.
    free &= (theta > least) & (theta < np.append(most[:d], np.inf))
    inverse = np.linalg.pinv(curvature[np.ix_(free, free)], hermitian=True)
    variance[free] = np.square(inverse @ slopes[free] * weight).sum(axis=1)
    return theta, variance


def _spread_likelihood(
    parts: Sequence[Part], mixtures: Sequence[GaussianMixture], y: np.ndarray, kept: int
) -> Callable:
    """Return the likelihood of y by what the members say of each component, scales and a power."""
    n, d = y.shape
    weights = [
        tf.nn.log_softmax(mixture.logits) + part.log_share[:, np.newaxis]
        for part, mixture in zip(parts, mixtures, strict=True)
    ]  # [n, K]
    others = [w[..., : w.shape[-1] - kept] for w in weights]

    def total(values: Sequence[tf.Tensor]) -> tf.Tensor:
        each = [tf.reduce_logsumexp(value, axis=-1) for value in values]
        return tf.reduce_logsumexp(over_rows(n, parts, each), axis=0)  # [n]

    before = total(others)

    def log_probs(theta: tf.Tensor, *supports: tf.Tensor) -> list[tf.Tensor]:
        own = [
            w + theta[d] * support[..., : w.shape[-1]]
            for w, support in zip(others, supports, strict=True)
        ]
        change = before - total(own)
        found = []
        for part, mixture, whole, changed in zip(parts, mixtures, weights, own, strict=True):
            changed += tf.gather(change, part.rows)[:, tf.newaxis]
            logits = tf.concat([changed, whole[..., changed.shape[-1] :]], axis=-1)
            tensors = mixture.tensors() | {"logits": logits}
            scaled = _scaled(type(mixture)(**tensors), theta[:d], kept)
            found.append(scaled.log_prob(y[part.rows]) + tf.reduce_logsumexp(logits, axis=-1))
        return found

    score = likelihood(n, parts, log_probs)
    return lambda supports, theta, weight=None: score(theta, weight, supports)


def _scaled(mixture: GaussianMixture, log_scale: Any, kept: int) -> Any:
    """Return the mixture whose components but the last `kept` are scaled."""
    log_scale = tf.convert_to_tensor(log_scale, mixture.dtype)
    return Recalibration(tf.zeros_like(log_scale), tf.exp(log_scale), 1.0, kept).apply(mixture)


def _supports(
    n: int, parts: Sequence[Part], mixtures: Sequence[GaussianMixture]
) -> list[np.ndarray]:
    """Return what all members together say at the means of each one's components, [n, K] each.

    Up to a number that is the same for a row.
    """
    found = []
    for part, mixture in zip(parts, mixtures, strict=True):
        total = np.full(mixture.loc.shape[:-1], -np.inf)
        for judge, density in zip(parts, mixtures, strict=True):
            _, here, there = np.intersect1d(part.rows, judge.rows, return_indices=True)
            some = {name: tf.gather(t, there) for name, t in density.tensors().items()}
            log_prob = support(type(density)(**some), tf.gather(mixture.loc, here))
            log_prob += judge.log_share[there, np.newaxis]
            total[here] = np.logaddexp(total[here], log_prob)
        found.append(total)
    top = np.full(n, -np.inf)
    for part, total in zip(parts, found, strict=True):
        top[part.rows] = np.maximum(top[part.rows], total.max(axis=-1))
    return [
        np.maximum(total, top[part.rows, np.newaxis] - FLOOR)
        for part, total in zip(parts, found, strict=True)
    ]
