"""Fitting a `Recalibration` to rows that a model has not learned from.

Shape letters: N rows, D event size, M ensemble members.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from mdn.density.recalibration import Recalibration
from mdn.errors import DataError
from mdn.held_out import LEAST_ROWS, WIDEST, HeldOut, Part, likelihood, most_likely

_FOLDS = 5


@dataclasses.dataclass(frozen=True)
class RecalibrationFit:
    """What recalibrating is worth, and the map if it is worth anything.

    Attributes:
        map: or None, where it gains less than two standard errors, or nothing at all on targets
            as they were observed.
        gain: nats per row, each row judged by a map that was fitted to other rows.
        gain_se: its standard error.
        n: rows.
    """

    map: Recalibration | None
    gain: float
    gain_se: float
    n: int

    def __str__(self) -> str:
        worth = f"{self.gain:+.4f} ± {self.gain_se:.4f} nats per row on {self.n:,} held-out rows"
        if self.map is None:
            return f"not recalibrated: no gain that is beyond doubt ({worth})"
        numbers = {
            "scales": ", ".join(f"{s:.3g}" for s in self.map.scale),
            "shifts": ", ".join(f"{s:+.3g}" for s in self.map.shift),
            "sharpness": f"{self.map.sharpness:.3g}",
        }
        return f"recalibrated ({'; '.join(f'{k} {v}' for k, v in numbers.items())}): {worth}"

    def metrics(self, targets: Sequence[str]) -> dict[str, float]:
        """Return flat keys: gain, gain_se, taken (0 or 1), and the numbers of a map that is."""
        found = {"gain": self.gain, "gain_se": self.gain_se, "taken": float(self.map is not None)}
        if self.map is not None:
            for name, scale, shift in zip(targets, self.map.scale, self.map.shift, strict=True):
                found |= {f"scale/{name}": scale, f"shift/{name}": shift}
            found["sharpness"] = self.map.sharpness
        return found


def fit_recalibration(held_out: HeldOut, seed: int = 0) -> RecalibrationFit:
    """Fit a map by the likelihood of rows, if it gains any on rows it was not fitted to.

    The map is fitted by L-BFGS from the identity, and accepted where its gain, cross-fitted over
    five folds, exceeds two standard errors, with few rows there is nothing to be learned, and the
    likelihood of targets as they were observed does not suffer.

    Args:
        held_out: the rows.
        seed: of the folds.

    Raises:
        DataError: there are hardly any rows.
    """
    if len(held_out.y) < LEAST_ROWS:
        raise DataError(
            f"{len(held_out.y)} rows with an observed target: give at least {LEAST_ROWS} to "
            "recalibrate by, better hundreds"
        )
    rows = held_out.judged()
    weight, parts = held_out.weights(rows), held_out.parts(rows)
    score, plain = (
        _map_likelihood(parts, y[rows], held_out) for y in (held_out.y, held_out.exact)
    )
    n, d = len(weight), held_out.y.shape[-1]
    identity, reach = np.zeros(2 * d + 1), np.full(2 * d + 1, WIDEST)
    fold = np.random.default_rng([seed, 0x666F6C64]).permutation(n) % _FOLDS
    before, gain = score(identity)[0], np.zeros(n)
    for judged in (fold == f for f in range(_FOLDS)):
        theta = most_likely(score, np.where(judged, 0.0, weight), identity, -reach, reach)
        gain[judged] = (score(theta)[0] - before)[judged]
    mean = float(np.average(gain, weights=weight))
    error = float(np.sqrt(np.sum((weight * (gain - mean)) ** 2)) / weight.sum())
    found = None
    theta = identity
    if mean > 2.0 * error:
        theta = most_likely(score, weight, identity, -reach, reach)
    if theta.any() and weight @ (plain(theta)[0] - plain(identity)[0]) > 0.0:
        found = Recalibration(
            tuple((theta[:d] * held_out.units).tolist()),
            tuple(np.exp(theta[d : 2 * d]).tolist()),
            float(np.exp(theta[-1])),
            held_out.kept,
        )
    return RecalibrationFit(found, mean, error, n)


def _map_likelihood(parts: Sequence[Part], y: np.ndarray, held_out: HeldOut) -> Callable:
    """Return the likelihood of y by the numbers of a map."""
    d = y.shape[-1]

    def log_probs(theta: tf.Tensor) -> list[tf.Tensor]:
        found = Recalibration(
            theta[:d] * held_out.units, tf.exp(theta[d : 2 * d]), tf.exp(theta[2 * d]),
            held_out.kept,
        )  # fmt: skip
        return [
            found.apply(part.kind(**part.tensors)).log_prob(y[part.rows]) + part.log_share
            for part in parts
        ]

    return likelihood(len(y), parts, log_probs)
