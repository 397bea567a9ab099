"""Early stopping and learning-rate plateaus whose state survives a restart."""

from __future__ import annotations

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
