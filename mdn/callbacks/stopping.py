"""Early stopping and learning-rate plateaus whose state survives a restart."""

from __future__ import annotations

from typing import Any

import numpy as np
import tf_keras


class Stateful:
    """A callback that can be saved in a checkpoint.

    Attributes:
        state_names: the attributes, numbers all, that hold its state.
    """

    state_names: tuple[str, ...] = ()

    def get_state(self) -> dict[str, float]:
        """Return the state as plain numbers."""
        return {name: float(getattr(self, name)) for name in self.state_names}

    def set_state(self, state: dict[str, float]) -> None:
        """Take back what `get_state` returned."""
        for name in self.state_names:
            kind = type(getattr(self, name))
            setattr(self, name, kind(state[name]))


class EarlyStopping(Stateful, tf_keras.callbacks.EarlyStopping):
    """Keras's early stopping; however training ends, the best weights come back.

    Args:
        monitor: the quantity to watch, smaller is better.
        patience: epochs without improvement after which training stops.
        min_delta: the least change that counts as an improvement.
    """

    state_names = ("best", "wait", "best_epoch")

    def __init__(
        self, monitor: str = "val_loss", patience: int = 20, min_delta: float = 0.0
    ) -> None:
        super().__init__(
            monitor, min_delta, patience, mode="min", restore_best_weights=True, verbose=0
        )


class MemberStopping(EarlyStopping):
    """Early stopping of each member of an ensemble by itself.

    A member's best weights are those that it would have kept alone: from the first epoch in which
    its own patience is at an end, nothing that it still learns counts. Training stops where that
    holds for all.

    Args:
        monitor: the quantity to watch, which is nll_<m> or val_nll_<m> for member m.
        patience: as for `EarlyStopping`.
        min_delta: as for `EarlyStopping`.
    """

    best_weights: Any

    def on_train_begin(self, logs: Any = None) -> None:
        super().on_train_begin(logs)
        members = self.model.members
        self.bests, self.waits, self.best_epochs = [np.inf] * members, [0] * members, [0] * members

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self.get_monitor_value(logs) is None:
            return
        prefix = "val_" if self.monitor.startswith("val_") else ""
        weights = self.model.get_weights()
        if self.best_weights is None:
            self.best_weights = weights
        stacked = self.model.are_stacked()
        for m, wait in enumerate(self.waits):
            if wait >= self.patience:
                continue
            self.waits[m] += 1
            value = float(logs[f"{prefix}nll_{m}"])
            if self._is_improvement(value, self.bests[m]):
                self.bests[m], self.waits[m], self.best_epochs[m] = value, 0, epoch
                for best, now, is_stacked in zip(self.best_weights, weights, stacked, strict=True):
                    if is_stacked:
                        best[m] = now[m]
        if min(self.waits) >= self.patience and epoch > 0:
            self.stopped_epoch = epoch
            self.model.stop_training = True

    def get_state(self) -> dict[str, float]:
        lists: dict[str, list[Any]] = {
            "best": self.bests,
            "wait": self.waits,
            "best_epoch": self.best_epochs,
        }
        return {
            f"{name}_{m}": float(value)
            for name, values in lists.items()
            for m, value in enumerate(values)
        }

    def set_state(self, state: dict[str, float]) -> None:
        members = range(len(self.waits))
        self.bests = [state[f"best_{m}"] for m in members]
        self.waits = [int(state[f"wait_{m}"]) for m in members]
        self.best_epochs = [int(state[f"best_epoch_{m}"]) for m in members]


class ReduceLROnPlateau(Stateful, tf_keras.callbacks.ReduceLROnPlateau):
    """Keras's reduction of the learning rate where the monitored quantity stays level.

    Args:
        monitor: the quantity to watch, smaller is better.
        factor: the learning rate is multiplied by it.
        patience: epochs without improvement after which that happens.
        min_lr: the learning rate stays above it.
    """

    state_names = ("best", "wait", "cooldown_counter")

    def __init__(
        self,
        monitor: str = "val_loss",
        factor: float = 0.5,
        patience: int = 5,
        min_lr: float = 1e-5,
    ) -> None:
        super().__init__(monitor, factor, patience, mode="min", min_lr=min_lr)
