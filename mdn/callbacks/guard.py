"""Protection from NaN: stop before it spreads, and say which rows did it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import tf_keras

from mdn.base import TrainedModel
from mdn.data.rows import Rows
from mdn.errors import RunError


class DivergedError(RunError):
    """The loss or the gradient is not finite any more."""


class NanGuard(tf_keras.callbacks.Callback):
    """Ends training when the loss or the gradient stops being finite, and names the worst row.

    The model gets back the weights of the start of the epoch, under which the rows are compared.

    Args:
        rows: the train rows.
        features: names of the F features.
        targets: names of the D targets.

    Raises:
        DivergedError: from `fit`, with the row and the remedies.
    """

    model: TrainedModel

    def __init__(self, rows: Rows, features: Sequence[str], targets: Sequence[str]) -> None:
        super().__init__()
        self.rows = rows
        self.features = features
        self.targets = targets
        self._epoch = 0
        self._weights: list[np.ndarray] = []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._epoch = epoch
        self._weights = self.model.get_weights()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        for name in ("loss", "gradient_norm"):
            value = (logs or {}).get(name, 0.0)
            if not math.isfinite(value):
                self.model.set_weights(self._weights)
                raise DivergedError(
                    f"the {name.replace('_', ' ')} became {value} in epoch {self._epoch + 1}; "
                    f"{self._worst_row()}. Look at that row, lower optimizer.learning_rate, or "
                    "set optimizer.global_clipnorm=1"
                )

    def _worst_row(self) -> str:
        nll = self.model.row_losses(self.rows)
        row = int(np.argmax(np.where(np.isfinite(nll), nll, np.inf)))
        x = self.rows.x
        # Of a sequence, the first step stands for the rest.
        first_y = self.rows.y[row].reshape([-1, len(self.targets)])[0]
        if isinstance(x, dict):
            named = {name: column[row] for name, column in x.items()}
        else:
            first_x = x[row, 0] if x.ndim == 3 else x[row]
            named = dict(zip(self.features, first_x, strict=True))
        named = dict(zip(self.targets, first_y, strict=True)) | named
        values = ", ".join(
            f"{name}={value:.6g}" if isinstance(value, float) else f"{name}={value}"
            for name, value in [*named.items()][:12]
        )
        return f"the least likely train row is row {row} (nll {nll[row]:.4g}): {values}"
