"""A checkpoint after every epoch, and the resumption of a killed run from the newest whole one.

A checkpoint is one `.npz` file: the weights, the optimizer's variables, the best weights so far,
and the state of the callbacks as JSON. It is written under another name, flushed to the disk and
renamed, so that a kill leaves either a whole file or none; the archive's checksums tell a damaged
file from a whole one, and nothing in it can run code.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import tf_keras

from mdn.callbacks.stopping import EarlyStopping, Stateful
from mdn.errors import MDNError, RunError

log = logging.getLogger(__name__)

# What reading a truncated or bit-flipped archive raises; a flipped flag asks for an unknown
# compression or a password.
_DAMAGE = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    TypeError,
    RuntimeError,  # NotImplementedError too
    zipfile.BadZipFile,
    zlib.error,
)


@dataclasses.dataclass
class Progress:
    """How far a run has come.

    Attributes:
        epoch: epochs completed.
        stopped: early stopping ended the training.
        seconds: spent in `fit` so far.
        history: metric name -> its value after each epoch.
        callbacks: class name -> the state of that callback.
        data: fingerprint of the rows that the run learns from.
    """

    epoch: int = 0
    stopped: bool = False
    seconds: float = 0.0
    history: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    callbacks: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    data: str = ""


class Checkpoint(tf_keras.callbacks.Callback):
    """Saves after every epoch; `restore` takes a new process back to the last one.

    Must stand last among the callbacks, so that it sees what the others decided in an epoch, and
    so that what it restores is not reset by them.

    Args:
        directory: where the checkpoints are.
        keep: how many of the newest ones to keep.
        write: whether to save; only one of several workers does.
        data: fingerprint of the rows, which must be the same in a resumed run.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        keep: int = 2,
        write: bool = True,
        data: str = "",
    ) -> None:
        super().__init__()
        self.directory = Path(directory)
        self.keep = keep
        self.write = write
        self.others: list[tf_keras.callbacks.Callback] = []  # set by `watch`
        self.data = data
        self.progress = Progress(data=data)
        self._best_weights: list[np.ndarray] | None = None
        self._epoch_started = 0.0

    def watch(self, callbacks: list[tf_keras.callbacks.Callback]) -> None:
        """Keep the state of those of the callbacks that have any."""
        self.others = [callback for callback in callbacks if isinstance(callback, Stateful)]

    def on_train_begin(self, logs: Any = None) -> None:
        for callback in self.others:
            name = type(callback).__name__
            if name in self.progress.callbacks:
                callback.set_state(self.progress.callbacks[name])
            if isinstance(callback, EarlyStopping):
                callback.best_weights = self._best_weights

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._epoch_started = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        progress = self.progress
        progress.epoch = epoch + 1
        progress.stopped = bool(self.model.stop_training)
        progress.seconds += time.perf_counter() - self._epoch_started
        rate = {"learning_rate": tf_keras.backend.get_value(self.model.optimizer.learning_rate)}
        for name, value in {**(logs or {}), **rate}.items():
            progress.history.setdefault(name, []).append(float(value))
        progress.callbacks = {type(c).__name__: c.get_state() for c in self.others}
        if self.write:
            self._save(self.directory / f"epoch-{epoch + 1:05d}.npz")

    def _save(self, path: Path) -> None:
        arrays = {f"model/{i}": w for i, w in enumerate(self.model.get_weights())}
        for i, variable in enumerate(self.model.optimizer.variables):
            arrays[f"optimizer/{i}"] = variable.numpy()
        for callback in self.others:
            if isinstance(callback, EarlyStopping):
                for i, weight in enumerate(callback.best_weights or []):
                    arrays[f"best/{i}"] = weight
        arrays["progress"] = np.array(json.dumps(dataclasses.asdict(self.progress)))
        partial = path.with_suffix(".partial")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                np.savez(file, **arrays)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise RunError(
                f"cannot write the checkpoint {path} ({error.strerror or error}): earlier ones "
                "are whole; mend that and start again with the same output_dir"
            ) from error
        for old in _newest_first(self.directory)[self.keep :]:
            old.unlink(missing_ok=True)

    def restore(self, model: tf_keras.Model) -> int:
        """Give the model and its optimizer the newest whole checkpoint, if there is any.

        Args:
            model: compiled and built.

        Returns:
            The number of epochs it had completed; 0 where there is no checkpoint.

        Raises:
            RunError: there are checkpoints, and none can be read, or they are of other rows.
        """
        with model.distribute_strategy.scope():
            model.optimizer.build(model.trainable_variables)
        paths = _newest_first(self.directory)
        for path in paths:
            try:
                self._load(path, model)
            except MDNError:
                raise
            except _DAMAGE as e:
                log.warning("checkpoint %s is damaged (%s): trying the one before", path, e)
                continue
            log.info("going on from %s", path)
            return self.progress.epoch
        if paths:
            raise RunError(
                f"no checkpoint in {self.directory} can be read: start anew in another output_dir"
            )
        return 0

    def _load(self, path: Path, model: tf_keras.Model) -> None:
        with np.load(path, allow_pickle=False) as archive:
            # Read to the end before anything is assigned: a damaged file must change nothing.
            arrays = {name: archive[name] for name in archive.files}
        progress = Progress(**json.loads(str(arrays.pop("progress"))))
        if progress.data != self.data:
            raise RunError(
                f"{self.directory} was learned from other rows: the data have changed since; "
                "restore them, or start anew in another output_dir"
            )
        groups: dict[str, dict[int, np.ndarray]] = {"model": {}, "optimizer": {}, "best": {}}
        for name, array in arrays.items():
            group, index = name.split("/")
            groups[group][int(index)] = array
        weights, variables, best = ([g[i] for i in range(len(g))] for g in groups.values())
        for found, expected in [(weights, model.weights), (variables, model.optimizer.variables)]:
            if [a.shape for a in found] != [tuple(v.shape) for v in expected]:
                raise ValueError("it is of another model")
        model.set_weights(weights)
        for variable, value in zip(model.optimizer.variables, variables, strict=True):
            variable.assign(value)
        # Which is no variable of the optimizer, and which a plateau may have lowered.
        rates = progress.history.get("learning_rate", [])
        schedule = tf_keras.optimizers.schedules.LearningRateSchedule
        if rates and not isinstance(model.optimizer._learning_rate, schedule):
            model.optimizer.learning_rate = rates[-1]
        self.progress = progress
        self._best_weights = best or None


def read_history(directory: str | os.PathLike[str]) -> dict[str, list[float]]:
    """Return the history of the newest whole checkpoint, empty where there is none."""
    for path in _newest_first(Path(directory)):
        try:
            with np.load(path, allow_pickle=False) as archive:
                return Progress(**json.loads(str(archive["progress"]))).history
        except _DAMAGE:
            continue
    return {}


def _newest_first(directory: Path) -> list[Path]:
    return sorted(directory.glob("epoch-*.npz"), reverse=True)
