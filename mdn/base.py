"""What every model of this package shares: the train step, its metrics, saving.

Shape letters: B batch, N rows.
"""

from __future__ import annotations

import os
import re
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

import mdn
from mdn.arguments import FittableModel
from mdn.data.rows import ColumnNames, Rows
from mdn.errors import RunError
from mdn.updates import KerasUpdate, State, Update


def _unpack(data: Any) -> tuple[Any, Any, Any]:
    """Return x, y and weights of a batch; targets that are integers as floating point numbers."""
    x, y, sample_weight = tf_keras.utils.unpack_x_y_sample_weight(data)
    if y is not None and not y.dtype.is_floating:
        y = tf.cast(y, tf_keras.backend.floatx())
    return x, y, sample_weight


class TrainedModel(FittableModel):
    """A Keras model with a train step of its own: `MDN` and `VAE` say what it minimises.

    Attributes:
        tracked: names of the means over an epoch, which are the metrics of `fit`; "loss" and
            "gradient_norm" among them.
        train_only: those of them that have no meaning for validation rows.
        column_names: of the features and the targets, where they are known; saved with the model.
    """

    tracked: tuple[str, ...] = ("loss", "gradient_norm")
    train_only: tuple[str, ...] = ("gradient_norm",)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)  # the model takes raw numbers as they are
        self.column_names = ColumnNames()
        # In a namespace, as Keras takes the state of a metric in an attribute for weights.
        self._trackers = types.SimpleNamespace(
            **{name: tf_keras.metrics.Mean(name=name) for name in self.tracked}
        )

    @property
    def metrics(self) -> list[tf_keras.metrics.Metric]:
        """The metrics that Keras resets at the start of each epoch."""
        return [*vars(self._trackers).values(), *super().metrics]

    # ------------------------------------------------------------------ what a model says

    def forward(self, x: Any, y: Any, sample_weight: Any, training: bool) -> tuple[tf.Tensor, Any]:
        """Return the loss of a batch, a scalar, and what `compute_metrics` makes metrics of."""
        raise NotImplementedError

    @property
    def loss_unit(self) -> Any:
        """What the loss is measured in: gradients are of the loss in these units.

        An optimizer then takes the steps that it would if the targets were given in another unit.
        """
        return 1.0

    def arrays(self, rows: Rows) -> tuple[Any, ...]:
        """Return rows as the arrays of which the train step takes batches."""
        raise NotImplementedError

    def row_losses(self, rows: Rows) -> np.ndarray:
        """Return each row's loss, [N]; not finite where the model fails."""
        raise NotImplementedError

    # ------------------------------------------------------------------ Keras

    def train_step(self, data: Any) -> dict[str, Any]:
        self.learn(data, KerasUpdate(self.optimizer, self.stacked), [])
        return self.results(training=True)

    def learn(self, data: Any, update: Update, state: State) -> State:
        x, y, sample_weight = _unpack(data)
        with tf.GradientTape() as tape:
            loss, outputs = self.forward(x, y, sample_weight, training=True)
            # Gradients of the replicas are summed.
            scaled = loss / self.distribute_strategy.num_replicas_in_sync / self.loss_unit
        gradients = tape.gradient(scaled, self.trainable_variables)
        pairs = [
            (gradient, variable)
            for gradient, variable in zip(gradients, self.trainable_variables, strict=True)
            if gradient is not None  # the projection of features that a backbone does not read
        ]
        norm, state = update.apply(list(self.optimizer.aggregate_gradients(pairs)), state)
        self._trackers.gradient_norm.update_state(norm)
        self.compute_metrics(x, y, outputs, sample_weight)
        return state

    def results(self, training: bool) -> dict[str, Any]:
        results = self.get_metrics_result()
        names = sorted(results, key=lambda name: name != "loss")
        return {n: results[n] for n in names if training or n not in self.train_only}

    def totals(self) -> list[tf.Variable]:
        return [v for tracker in vars(self._trackers).values() for v in tracker.variables]

    def test_step(self, data: Any) -> dict[str, Any]:
        x, y, sample_weight = _unpack(data)
        _, outputs = self.forward(x, y, sample_weight, training=False)
        self.compute_metrics(x, y, outputs, sample_weight)
        return self.results(training=False)

    def get_compile_config(self) -> dict[str, Any]:
        return {} if self.optimizer is None else super().get_compile_config()

    def compile_from_config(self, config: dict[str, Any]) -> None:
        if config:
            self.compile(**tf_keras.saving.deserialize_keras_object(config))
            self.optimizer.build(self.trainable_variables)

    def _per_replica(self, count: tf.Tensor) -> tf.Tensor:
        """Return the mean of a batch's count over the replicas, whose rows may count unequally."""
        replicas = self.distribute_strategy.num_replicas_in_sync
        if replicas > 1:
            count = tf.distribute.get_replica_context().all_reduce("SUM", count) / replicas
        return count

    # ------------------------------------------------------------------ saving

    def names_config(self) -> dict[str, Any]:
        """Return the part of `get_config` that holds the names of the columns."""
        return {"column_names": {k: list(v) for k, v in vars(self.column_names).items()}}

    def restore_names(self, config: dict[str, Any]) -> None:
        """Take the names of the columns from what `get_config` returned."""
        names = config.get("column_names", {})
        self.column_names = ColumnNames(**{k: tuple(v) for k, v in names.items()})

    def save(self, filepath: Any, overwrite: bool = True, **kwargs: Any) -> None:
        """Write a `.keras` file: whole, or not at all.

        Raises:
            RunError: the name does not end in .keras, or the file cannot be written.
        """
        path = Path(filepath)
        if path.suffix != ".keras":
            raise RunError(f"cannot save as {path.name}: the name must end in .keras")
        if path.exists() and not overwrite:
            raise RunError(f"{path} exists: remove it, or save with overwrite=True")
        self._check_adapted()
        partial = path.with_name(f".{path.stem}.partial.keras")
        try:
            super().save(str(partial), **kwargs)
            with zipfile.ZipFile(partial, "a") as archive:
                archive.comment = f"mdn {mdn.__version__}".encode()  # which `written_by` reads
            os.replace(partial, path)
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror or error}") from error
        finally:
            partial.unlink(missing_ok=True)


def written_by(path: str | os.PathLike[str]) -> str | None:
    """Return the version of mdn that saved a `.keras` file, or None where it does not say."""
    try:
        with zipfile.ZipFile(path) as archive:
            comment = archive.comment.decode("ascii")
    except Exception:  # of a damaged archive zipfile raises half a dozen types
        return None
    found = re.fullmatch(r"mdn (\d[\w.+-]{0,40})", comment)
    return None if found is None else found[1]
