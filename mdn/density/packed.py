"""Log densities straight from the packed unconstrained factors, for training.

The batch is the last axis. Every operation of a substitution is then one over rows of numbers
that lie side by side in memory, whatever D, and the [D, D] matrices are never formed: nor are
those of the gradient, which is written out.

Shape letters: B batch, D event size, K components, T = D(D+1)/2 packed entries.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tensorflow as tf

from mdn.density.gaussian import LOG_2_PI
from mdn.density.low_rank import white_log_density
from mdn.density.positivity import POSITIVITY, precision_diag

# Rows that are solved entry by entry; what lies left of them is one product. By measurement, for
# D = 10 and D = 32: smaller blocks have more passes over memory, larger ones compile for longer.
_BLOCK = 8


def packed_log_prob(
    residual: tf.Tensor, raw: tf.Tensor, positivity: str, floor: tf.Tensor
) -> tf.Tensor:
    """Return log N(residual; 0, L L^T), where L is what `mdn.density.positivity` makes of raw.

    Args:
        residual: [K, D, B], y - loc, nothing missing.
        raw: unconstrained: [K, T, B] for `scale_tril`, in the order of
            `tfp.math.fill_triangular`; or [K, D, B] for `scale_diag`.
        positivity: what makes the diagonal of L positive.
        floor: [D], the smallest diagonal entry.

    Returns:
        [K, B], nats.
    """
    if raw.shape[1] == residual.shape[1]:
        scale = POSITIVITY[positivity][0](raw) + floor[:, tf.newaxis]
        terms = -0.5 * (tf.square(residual / scale) + LOG_2_PI) - tf.math.log(scale)
        return tf.reduce_sum(terms, axis=1)
    return _tril_log_prob(residual, raw, positivity, floor)


def _tril_log_prob(
    residual: tf.Tensor, raw: tf.Tensor, positivity: str, floor: tf.Tensor
) -> tf.Tensor:
    d = residual.shape[1]
    positive = POSITIVITY[positivity][0]

    @tf.custom_gradient
    def log_prob(residual: tf.Tensor, raw: tf.Tensor) -> tuple[tf.Tensor, Callable]:
        rows = _rows(raw, d)
        raw_diag = tf.stack([row[:, -1] for row in rows], axis=1)  # [K, D, B]
        diag = positive(raw_diag) + floor[:, tf.newaxis]
        z = _solve(residual, rows, diag)  # L^-1 r, [K, D, B]
        terms = -0.5 * (tf.square(z) + LOG_2_PI) - tf.math.log(diag)

        def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            w = _solve_transposed(z, rows, diag)  # L^-T z
            weighted = upstream[:, tf.newaxis] * w
            with tf.GradientTape() as tape:
                tape.watch(raw_diag)
                again = positive(raw_diag)
            by_diag = tape.gradient(again, raw_diag, weighted * z - upstream[:, tf.newaxis] / diag)
            return -weighted, _packed_product(weighted, z, by_diag)  # by L: w z^T

        return tf.reduce_sum(terms, axis=1), gradient

    return log_prob(residual, raw)


def packed_precision_log_prob(
    residual: tf.Tensor, raw: tf.Tensor, positivity: str, min_scale: float, floor: tf.Tensor
) -> tf.Tensor:
    """Return log N(residual; 0, (P P^T)^-1), by products alone.

    Args:
        residual: [K, D, B], y - loc, nothing missing.
        raw: [K, T, B], unconstrained, of which P has the triangle in the order of
            `tfp.math.fill_triangular` and the diagonal of `mdn.density.positivity.precision_diag`.
        positivity: what makes the diagonal of P positive.
        min_scale: the smallest diagonal entry.
        floor: [D], one over the greatest diagonal entry.

    Returns:
        [K, B], nats.
    """
    d = residual.shape[1]

    def diagonal(raw_diag: tf.Tensor) -> tf.Tensor:
        return precision_diag(raw_diag, positivity, min_scale, floor[:, tf.newaxis])

    @tf.custom_gradient
    def log_prob(residual: tf.Tensor, raw: tf.Tensor) -> tuple[tf.Tensor, Callable]:
        rows = _rows(raw, d)
        raw_diag = tf.stack([row[:, -1] for row in rows], axis=1)  # [K, D, B]
        diag = diagonal(raw_diag)
        # z = P^T r, a column of P at a time.
        z = []
        for i in range(d):
            below = [rows[j][:, i] * residual[:, j] for j in range(i + 1, d)]
            z.append(tf.add_n([diag[:, i] * residual[:, i], *below]))
        z = tf.stack(z, axis=1)  # [K, D, B]
        terms = tf.math.log(diag) - 0.5 * (tf.square(z) + LOG_2_PI)

        def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            upstream = upstream[:, tf.newaxis]
            weighted = upstream * z
            by_residual = [diag[:, i] * weighted[:, i] for i in range(d)]  # P z, a row at a time
            for i in range(1, d):
                by_residual[i] += tf.reduce_sum(rows[i][:, :i] * weighted[:, :i], axis=1)
            with tf.GradientTape() as tape:
                tape.watch(raw_diag)
                again = diagonal(raw_diag)
            by_diag = tape.gradient(again, raw_diag, upstream / diag - residual * weighted)
            by_raw = _packed_product(-residual, weighted, by_diag)  # by P: -r z^T
            return -tf.stack(by_residual, axis=1), by_raw

        return tf.reduce_sum(terms, axis=1), gradient

    return log_prob(residual, raw)


def packed_low_rank_log_prob(
    residual: tf.Tensor, raw: tf.Tensor, factor: tf.Tensor, positivity: str, floor: tf.Tensor
) -> tf.Tensor:
    """Return log N(residual; 0, diag(s^2) + W W^T), in O(D R^2).

    Args:
        residual: [K, D, B], y - loc, nothing missing.
        raw: [K, D, B], unconstrained, of which s is `mdn.density.positivity.scale_diag`.
        factor: [K, D, R, B], W.
        positivity: what makes s positive.
        floor: [D], the smallest s.

    Returns:
        [K, B], nats.
    """
    scale = POSITIVITY[positivity][0](raw) + floor[:, tf.newaxis]  # [K, D, B]
    columns = [factor[:, :, i] / scale for i in range(factor.shape[2])]
    constant = tf.reduce_sum(tf.math.log(scale) + 0.5 * LOG_2_PI, axis=1)
    return white_log_density(residual / scale, columns, axis=1) - constant


def _solve(residual: tf.Tensor, rows: list[tf.Tensor], diag: tf.Tensor) -> tf.Tensor:
    """Return L^-1 r, [K, D, B], by forward substitution."""
    d = len(rows)
    blocks: list[tf.Tensor] = []
    for start in range(0, d, _BLOCK):
        before = tf.concat(blocks, axis=1) if blocks else None  # [K, start, B]
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
    """Return L^-T z, [K, D, B], by back substitution, a column of L^T at a time."""
    solved = []
    for i in reversed(range(len(rows))):
        w = z[:, i] / diag[:, i]
        z = z[:, :i] - rows[i][:, :i] * w[:, tf.newaxis]
        solved.append(w)
    return tf.stack(solved[::-1], axis=1)


def _slices(d: int) -> list[list[tuple[int, int, bool]]]:
    """Return where the packed vector has each row of the triangle: (start, stop, reversed).

    `tfp.math.fill_triangular` lays x[D:] followed by the reverse of x into a [D, D] matrix row by
    row, and keeps its lower triangle.
    """
    size = d * (d + 1) // 2
    forward = size - d  # entries of the matrix that come from x[D:]
    found = []
    for i in range(d):
        start, stop = i * d, i * d + i + 1
        row = []
        if start < forward:
            row.append((d + start, d + min(stop, forward), False))
        if stop > forward:
            first = max(start, forward) - forward
            row.append((size - (stop - forward), size - first, True))
        found.append(row)
    return found


def _rows(raw: tf.Tensor, d: int) -> list[tf.Tensor]:
    """Return the rows of the triangle, [K, 1, B] to [K, D, B], of packed entries [K, T, B]."""
    return [
        tf.concat(
            [
                tf.reverse(raw[:, start:stop], [1]) if backward else raw[:, start:stop]
                for start, stop, backward in row
            ],
            axis=1,
        )
        for row in _slices(d)
    ]


def _packed_product(left: tf.Tensor, right: tf.Tensor, diag: tf.Tensor) -> tf.Tensor:
    """Return the packed entries [K, T, B] of the triangle of left right^T with another diagonal.

    Each is the product of two that are gathered, in one pass over the memory: rows that are
    computed one by one have to be laid side by side again.

    Args:
        left: [K, D, B].
        right: [K, D, B].
        diag: [K, D, B], the diagonal.
    """
    d = left.shape[1]
    row, column = np.zeros([2, d * (d + 1) // 2], np.int32)
    for i, slices in enumerate(_slices(d)):
        places = np.concatenate(
            [np.arange(start, stop)[:: -1 if backward else 1] for start, stop, backward in slices]
        )
        row[places], column[places] = i, np.arange(i + 1)
        row[places[-1]], column[places[-1]] = d + i, d  # the diagonal times one
    ones = tf.ones_like(right[:, :1])
    left, right = tf.concat([left, diag], axis=1), tf.concat([right, ones], axis=1)
    return tf.gather(left, row, axis=1) * tf.gather(right, column, axis=1)
