"""Log densities straight from the packed unconstrained factors, for training.

The batch is the last axis and the component the one before. Every operation of a substitution is
then one over numbers that lie side by side in memory, whatever D, and the [D, D] matrices are
never formed: nor are those of the gradient, which is written out. A triangle comes as its diagonal
and then its rows below the diagonal, see `packed_order`.

Shape letters: M members, B batch, D event size, K components, T = D(D+1)/2 packed entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from mdn.density.gaussian import LOG_2_PI
from mdn.density.low_rank import white_log_density
from mdn.density.positivity import POSITIVITY, precision_diag

# Rows that are solved entry by entry; what lies left of them is one product. By measurement, for
# D = 10 and D = 32: smaller blocks have more passes over memory, larger ones compile for longer.
_BLOCK = 8
_LANES = 8  # of a sum; more gain nothing


def packed_order(d: int) -> np.ndarray:
    """Return where `tfp.math.fill_triangular` has the entries of a triangle, [T].

    First those of the diagonal, then those below it, row by row.
    """
    size = d * (d + 1) // 2
    # It lays x[D:] followed by the reverse of x into a [D, D] matrix row by row, and keeps the
    # lower triangle.
    places = np.concatenate([np.arange(d, size), np.arange(size)[::-1]]).reshape(d, d)
    return np.concatenate([np.diagonal(places), places[np.tril_indices(d, -1)]])


def packed_log_prob(
    residual: tf.Tensor, raw: tf.Tensor, positivity: str, floor: tf.Tensor
) -> tf.Tensor:
    """Return log N(residual; 0, L L^T), where L is what `mdn.density.positivity` makes of raw.

    Args:
        residual: [M, D, K, B], y - loc, nothing missing.
        raw: unconstrained: [M, T, K, B] for `scale_tril`, in the order of `packed_order`; or
            [M, D, K, B] for `scale_diag`.
        positivity: what makes the diagonal of L positive.
        floor: [D], the smallest diagonal entry.

    Returns:
        [M, K, B], nats.
    """
    positive, floor = POSITIVITY[positivity][0], floor[:, tf.newaxis, tf.newaxis]
    if raw.shape[1] == residual.shape[1]:
        scale = positive(raw) + floor
        terms = -0.5 * (tf.square(residual / scale) + LOG_2_PI) - tf.math.log(scale)
        return tf.reduce_sum(terms, axis=1)

    @tf.custom_gradient
    def log_prob(
        residual: tf.Tensor, raw_diag: tf.Tensor, below: tf.Tensor
    ) -> tuple[tf.Tensor, Callable]:
        rows = _rows(below)
        diag = positive(raw_diag) + floor  # [M, D, K, B]
        z = _solve(residual, rows, diag)  # L^-1 r
        terms = -0.5 * (tf.square(z) + LOG_2_PI) - tf.math.log(diag)

        def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            upstream = upstream[:, tf.newaxis]
            weighted = upstream * _solve_transposed(z, rows, diag)  # L^-T z
            with tf.GradientTape() as tape:
                tape.watch(raw_diag)
                again = positive(raw_diag)
            by_diag = tape.gradient(again, raw_diag, weighted * z - upstream / diag)
            return -weighted, by_diag, _below(weighted, z)  # by L: w z^T

        return tf.reduce_sum(terms, axis=1), gradient

    return log_prob(residual, *_parts(raw, residual.shape[1]))


def packed_precision_log_prob(
    residual: tf.Tensor, raw: tf.Tensor, positivity: str, min_scale: float, floor: tf.Tensor
) -> tf.Tensor:
    """Return log N(residual; 0, (P P^T)^-1), by products alone.

    Args:
        residual: [M, D, K, B], y - loc, nothing missing.
        raw: [M, T, K, B], unconstrained, of which P has the triangle in the order of
            `packed_order` and the diagonal of `mdn.density.positivity.precision_diag`.
        positivity: what makes the diagonal of P positive.
        min_scale: the smallest diagonal entry.
        floor: [D], one over the greatest diagonal entry.

    Returns:
        [M, K, B], nats.
    """
    d = residual.shape[1]

    def diagonal(raw_diag: tf.Tensor) -> tf.Tensor:
        return precision_diag(raw_diag, positivity, min_scale, floor[:, tf.newaxis, tf.newaxis])

    @tf.custom_gradient
    def log_prob(
        residual: tf.Tensor, raw_diag: tf.Tensor, below: tf.Tensor
    ) -> tuple[tf.Tensor, Callable]:
        rows = _rows(below)
        diag = diagonal(raw_diag)  # [M, D, K, B]
        # z = P^T r, a column of P at a time.
        z = []
        for i in range(d):
            products = [rows[j][:, i] * residual[:, j] for j in range(i + 1, d)]
            z.append(tf.add_n([diag[:, i] * residual[:, i], *products]))
        z = tf.stack(z, axis=1)  # [M, D, K, B]
        terms = tf.math.log(diag) - 0.5 * (tf.square(z) + LOG_2_PI)

        def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            upstream = upstream[:, tf.newaxis]
            weighted = upstream * z
            by_residual = [diag[:, i] * weighted[:, i] for i in range(d)]  # P z, a row at a time
            for i in range(1, d):
                by_residual[i] += tf.reduce_sum(rows[i] * weighted[:, :i], axis=1)
            with tf.GradientTape() as tape:
                tape.watch(raw_diag)
                again = diagonal(raw_diag)
            by_diag = tape.gradient(again, raw_diag, upstream / diag - residual * weighted)
            # By P: -r z^T.
            return -tf.stack(by_residual, axis=1), by_diag, _below(-residual, weighted)

        return tf.reduce_sum(terms, axis=1), gradient

    return log_prob(residual, *_parts(raw, d))


def packed_low_rank_log_prob(
    residual: tf.Tensor, raw: tf.Tensor, factor: tf.Tensor, positivity: str, floor: tf.Tensor
) -> tf.Tensor:
    """Return log N(residual; 0, diag(s^2) + W W^T), in O(D R^2).

    Args:
        residual: [M, D, K, B], y - loc, nothing missing.
        raw: [M, D, K, B], unconstrained, of which s is `mdn.density.positivity.scale_diag`.
        factor: [M, D, R, K, B], W.
        positivity: what makes s positive.
        floor: [D], the smallest s.

    Returns:
        [M, K, B], nats.
    """
    scale = POSITIVITY[positivity][0](raw) + floor[:, tf.newaxis, tf.newaxis]  # [M, D, K, B]
    columns = [factor[:, :, i] / scale for i in range(factor.shape[2])]
    constant = tf.reduce_sum(tf.math.log(scale) + 0.5 * LOG_2_PI, axis=1)
    return white_log_density(residual / scale, columns, axis=1) - constant


def lane_sums(rows: tf.Tensor) -> tf.Tensor:
    """Return the sums along the last axis, [.., n] to [..].

    A few partial sums are taken first: those are operations on vectors to XLA for CPUs, where a
    sum along the last axis takes five times as long.
    """
    if rows.shape[-1] is None:
        return tf.reduce_sum(rows, axis=-1)
    rest = [[0, 0]] * (rows.shape.rank - 1)
    padded = tf.pad(rows, [*rest, [0, -rows.shape[-1] % _LANES]])
    return tf.reduce_sum(tf.add_n(tf.split(padded, _LANES, axis=-1)), axis=-1)


def _parts(raw: tf.Tensor, d: int) -> list[tf.Tensor]:
    """Return the diagonals [M, D, K, B] and what is below, [M, T - D, K, B]."""
    return tf.split(raw, [d, raw.shape[1] - d], axis=1)


def _rows(below: tf.Tensor) -> list[tf.Tensor]:
    """Return the rows below the diagonal: [M, 0, K, B], [M, 1, K, B] to [M, D - 1, K, B]."""
    d = (math.isqrt(8 * below.shape[1] + 1) + 1) // 2
    return tf.split(below, list(range(d)), axis=1)


def _solve(residual: tf.Tensor, rows: list[tf.Tensor], diag: tf.Tensor) -> tf.Tensor:
    """Return L^-1 r, [M, D, K, B], by forward substitution."""
    d = len(rows)
    blocks: list[tf.Tensor] = []
    for start in range(0, d, _BLOCK):
        before = tf.concat(blocks, axis=1) if blocks else None  # [M, start, K, B]
        block: list[tf.Tensor] = []
        for i in range(start, min(start + _BLOCK, d)):
            rest = residual[:, i]
            if before is not None:
                rest -= tf.reduce_sum(rows[i][:, :start] * before, axis=1)
            for j, z in enumerate(block):
                rest -= rows[i][:, start + j] * z
            block.append(rest / diag[:, i])
        blocks.append(tf.stack(block, axis=1))
    return tf.concat(blocks, axis=1)


def _solve_transposed(z: tf.Tensor, rows: list[tf.Tensor], diag: tf.Tensor) -> tf.Tensor:
    """Return L^-T z, [M, D, K, B], by back substitution, a column of L^T at a time."""
    solved = []
    for i in reversed(range(len(rows))):
        w = z[:, i] / diag[:, i]
        z = z[:, :i] - rows[i] * w[:, tf.newaxis]
        solved.append(w)
    return tf.stack(solved[::-1], axis=1)


def _below(left: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
    """Return the entries of left right^T below the diagonal, row by row, [M, T - D, K, B].

    Each is the product of two that are gathered, in one pass over the memory: rows that are
    computed one by one have to be laid side by side again.

    Args:
        left: [M, D, K, B].
        right: [M, D, K, B].
    """
    row, column = np.tril_indices(left.shape[1], -1)
    return tf.gather(left, row, axis=1) * tf.gather(right, column, axis=1)
