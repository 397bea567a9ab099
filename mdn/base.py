"""What every model of this package shares: the train step, the loop it runs in, metrics, saving.

Shape letters: B batch, N rows.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

from mdn.compiled import chunk_function
from mdn.data.pipeline import Batches, evaluation_batches, stack, training_batches
from mdn.data.rows import Rows
from mdn.errors import ConfigError, RunError

log = logging.getLogger(__name__)

EVALUATION_BATCH = 4096


class TrainedModel(tf_keras.Model):
    """A Keras model with a train step of its own: `MDN` and `VAE` say what it minimises.

    Attributes:
        tracked: names of the means over an epoch, which are the metrics of `fit`; "loss" and
            "gradient_norm" among them.
        train_only: those of them that have no meaning for validation rows.
    """

    tracked: tuple[str, ...] = ("loss", "gradient_norm")
    train_only: tuple[str, ...] = ("gradient_norm",)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)  # the model takes raw numbers as they are
        # In a namespace, as Keras takes the state of a metric in an attribute for weights.
        self._trackers = types.SimpleNamespace(
            **{name: tf_keras.metrics.Mean(name=name) for name in self.tracked}
        )
        # How `fit` and `evaluate` run just now: whether on chunks, and whether on complete rows.
        self._loops = types.SimpleNamespace(
            chunk=None,
            train=False,
            test=False,
            complete={},
            functions={},
            explained=None,
            afresh=False,
            last=None,
        )

    @property
    def metrics(self) -> list[tf_keras.metrics.Metric]:
        """The metrics that Keras resets at the start of each epoch."""
        return [*vars(self._trackers).values(), *super().metrics]

    # ------------------------------------------------------------------ what a model says

    @property
    def xla(self) -> bool:
        """Whether a train step can be compiled once and for all."""
        return True

    def forward(self, x: Any, y: Any, sample_weight: Any, training: bool) -> tuple[tf.Tensor, Any]:
        """Return the loss of a batch, a scalar, and what `compute_metrics` makes metrics of."""
        raise NotImplementedError

    def arrays(self, rows: Rows) -> tuple[Any, ...]:
        """Return rows as the arrays of which the train step takes batches."""
        raise NotImplementedError

    def as_arrays(self, x: Any, y: Any, sample_weight: Any = None) -> tuple[np.ndarray, ...]:
        """Return what a user gave to `fit` or `evaluate` as such arrays.

        Raises:
            DataError: the model cannot learn from them.
        """
        raise NotImplementedError

    def check_arrays(self, x: Any, y: Any, sample_weight: Any) -> None:
        """Raise a DataError for rows that nothing can be learned from."""

    def is_complete(self, arrays: tuple[np.ndarray, ...]) -> bool:
        """Return whether each row has all of its targets, or none."""
        return True

    def encoded(self, batches: tf.data.Dataset) -> tf.data.Dataset:
        """Return a user's batches with features as the compiled steps take them."""
        return batches

    def row_losses(self, rows: Rows) -> np.ndarray:
        """Return each row's loss, [N]; not finite where the model fails."""
        raise NotImplementedError

    def _check_adapted(self) -> None:
        """Raise a RunError where the model cannot be used yet."""

    # ------------------------------------------------------------------ Keras

    def compile(
        self,
        optimizer: Any = "adam",
        loss: Any = None,
        *,
        jit_compile: bool | None = None,
        steps_per_execution: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Configure training as in Keras.

        Args:
            optimizer: a Keras optimizer or its name.
            loss: what the model minimises, where there is a choice.
            jit_compile: train in XLA; by default where that works: on one device, with a backbone
                that does not say otherwise (`xla = False`).
            steps_per_execution: train steps between two visits of Python, and of the callbacks
                that act on batches; by default up to 500.
            **kwargs: as for `tf_keras.Model.compile`.
        """
        if jit_compile is None:
            one_device = self.distribute_strategy.num_replicas_in_sync == 1
            jit_compile = one_device and self.xla and not kwargs.get("run_eagerly")
        self._loops.chunk = steps_per_execution
        self._loops.functions = {}
        super().compile(optimizer=optimizer, loss=loss, jit_compile=jit_compile, **kwargs)

    def fit(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        epochs: int = 1,
        verbose: Any = "auto",
        callbacks: Any = None,
        validation_split: float = 0.0,
        validation_data: Any = None,
        shuffle: bool = True,
        class_weight: Any = None,
        sample_weight: Any = None,
        initial_epoch: int = 0,
        steps_per_epoch: int | None = None,
        validation_steps: int | None = None,
        validation_batch_size: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Train as `tf_keras.Model.fit` does, in chunks of steps that are one XLA program each.

        Where XLA cannot hold a chunk (several replicas, a backbone with `xla = False`, a stream of
        unknown length) Keras's own loop runs, and the log says so.

        Args:
            x: features, images, a `tf.data.Dataset` of batches, or `mdn.data.pipeline.Batches`.
            y: targets, where x is features.
            batch_size: B, of arrays; default 32.
            epochs: when to stop.
            verbose: as in Keras.
            callbacks: as in Keras.
            validation_split: share of the last rows of arrays to hold out.
            validation_data: (x, y) or (x, y, weight), or batches.
            shuffle: a new order in each epoch, drawn from NumPy's global stream.
            class_weight: must be None.
            sample_weight: [N], row weights.
            initial_epoch: epochs that lie behind.
            steps_per_epoch: batches that make an epoch of a dataset; by default all of them.
            validation_steps: the same of `validation_data`.
            validation_batch_size: rows of `validation_data` at a time.
            **kwargs: as in Keras.

        Raises:
            RunError: `adapt` was not called.
            DataError: rows that nothing can be learned from.
            ConfigError: an argument that has no meaning here.
        """
        self._check_adapted()
        if class_weight is not None:
            raise ConfigError("class_weight has no meaning for a density: use sample_weight")
        batches: Any = x
        if self._is_arrays(x, y):
            self.check_arrays(x, y, sample_weight)
            arrays = self.as_arrays(x, y, sample_weight)
            if validation_split:
                at = math.floor(len(arrays[0]) * (1.0 - validation_split))
                if not 0 < at < len(arrays[0]):
                    raise ConfigError(f"validation_split={validation_split} leaves no rows")
                validation_data = validation_data or tuple(array[at:] for array in arrays)
                arrays = tuple(array[:at] for array in arrays)
            batches = training_batches(
                arrays,
                32 if batch_size is None else batch_size,
                # Drawn from NumPy's global stream, which tf_keras.utils.set_random_seed seeds.
                seed=int(np.random.randint(2**31 - 1)) if shuffle else None,
                first_epoch=initial_epoch,
                drop_remainder=False,
                chunk=self._loops.chunk,
                complete=self.is_complete(arrays),
            )
            if steps_per_epoch is not None:
                batches = self._stacked(batches.unstacked(), steps_per_epoch)
        elif isinstance(x, tf.data.Dataset):
            batches = self._stacked(x, steps_per_epoch)
        chunk = batches.chunk if isinstance(batches, Batches) else 1
        held_out = validation_data
        if isinstance(held_out, tuple | list):
            arrays = held_out if validation_split else self.as_arrays(*held_out)
            held_out = evaluation_batches(
                arrays,
                validation_batch_size or EVALUATION_BATCH,
                chunk=chunk,
                complete=self.is_complete(arrays),
            )
        elif isinstance(held_out, tf.data.Dataset):
            held_out = self._stacked(held_out, validation_steps, chunk)
        if isinstance(self.optimizer, tf_keras.optimizers.Optimizer):
            with self.distribute_strategy.scope():
                self.optimizer.build(self.trainable_variables)
        with self._looping(batches, held_out) as ((x, steps_per_epoch), (held_out, validation)):
            return super().fit(
                x,
                epochs=epochs,
                verbose=verbose,
                callbacks=callbacks,
                validation_data=held_out,
                initial_epoch=initial_epoch,
                steps_per_epoch=steps_per_epoch,
                validation_steps=validation or validation_steps,
                **kwargs,
            )

    def evaluate(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        verbose: Any = "auto",
        sample_weight: Any = None,
        steps: int | None = None,
        callbacks: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Return the loss and the metrics, as `tf_keras.Model.evaluate` does.

        Args:
            x: as for `fit`.
            y: as for `fit`.
            batch_size: rows at a time; default 4096.
            verbose: as in Keras.
            sample_weight: [N], row weights.
            steps: batches of a dataset to take; by default all of them.
            callbacks: as in Keras.
            **kwargs: as in Keras.
        """
        # With the private argument it is `fit` that asks, on what it was given.
        if not kwargs.get("_use_cached_eval_dataset"):
            self._check_adapted()
            if self._is_arrays(x, y):
                arrays = self.as_arrays(x, y, sample_weight)
                x = evaluation_batches(
                    arrays, batch_size or EVALUATION_BATCH, complete=self.is_complete(arrays)
                )
            elif isinstance(x, tf.data.Dataset):
                x = self._stacked(x, steps)
            with self._looping(None, x) as (_, (x, found)):
                return super().evaluate(
                    x, verbose=verbose, steps=found or steps, callbacks=callbacks, **kwargs
                )
        return super().evaluate(x, verbose=verbose, steps=steps, callbacks=callbacks, **kwargs)

    @staticmethod
    def _is_arrays(x: Any, y: Any) -> bool:
        return y is not None or isinstance(x, np.ndarray | list | tf.Tensor)

    def _stacked(
        self, batches: tf.data.Dataset, steps: int | None, chunk: int | None = None
    ) -> Batches | tf.data.Dataset:
        """Return a user's batches as chunks, or as they are where they cannot be stacked."""
        size = int(batches.cardinality())
        if steps is None and size == tf.data.INFINITE_CARDINALITY:
            raise ConfigError("the dataset is endless: say how many steps_per_epoch")
        if steps is None and size < 0:
            self._explain("the dataset does not know its length: give steps_per_epoch")
            return batches
        if steps is None:
            batches, steps = batches.repeat(), size
        batches = self.encoded(batches)
        spec = batches.element_spec
        spec = spec if isinstance(spec, tuple) else (spec,)
        if not all(isinstance(s, tf.TensorSpec) and s.shape.rank for s in spec):
            self._explain("the batches of the dataset are no tensors")
            return batches
        if not all(s.shape[1:].is_fully_defined() for s in spec):
            self._explain("the batches of the dataset have no fixed shape")
            return batches
        batch_size = spec[0].shape[0]
        if batch_size is None:  # such as `Dataset.batch` makes them, the last one smaller
            first = next(iter(batches.take(1)))
            batch_size = len(first[0] if isinstance(first, tuple) else first)
        filler = [0.0] * len(spec)
        filler[min(1, len(spec) - 1)] = math.nan  # see `Batches`
        return stack(batches, steps, batch_size, filler, chunk or self._loops.chunk)

    @contextlib.contextmanager
    def _looping(self, train: Any, test: Any) -> Iterator[list[tuple[Any, int | None]]]:
        """Prepare Keras for chunks; yield for each of train and test the dataset and its steps."""
        loops = self._loops
        in_chunks = bool(self._jit_compile) and not self.run_eagerly
        if self.distribute_strategy.num_replicas_in_sync > 1:
            self._explain("several replicas")
        elif not in_chunks and not self.xla:
            self._explain(f"{type(self).__name__}'s backbone says xla = False")
        given = []
        for which, batches in (("train", train), ("test", test)):
            mine = isinstance(batches, Batches)
            setattr(loops, which, in_chunks and mine)
            loops.complete[which] = in_chunks and mine and batches.complete
            if not mine:
                given.append((batches, None))
            elif in_chunks:
                given.append((batches.chunks, batches.steps))
            else:
                given.append((batches.unstacked(), batches.steps))
        spe = next((b.chunk for b in (train, test) if isinstance(b, Batches)), 1)
        functions = self.train_function, self.test_function
        if in_chunks:  # Keras keeps functions for single batches, which are not for chunks
            self.train_function = self.test_function = None
        self._steps_per_execution.assign(spe)
        try:
            yield given
        finally:
            self._steps_per_execution.assign(1)
            if in_chunks:
                self.train_function, self.test_function = functions
            loops.train = loops.test = False
            loops.complete, loops.last = {}, None

    def _explain(self, reason: str) -> None:
        if self._loops.explained != reason:
            self._loops.explained = reason
            log.info("training in Keras's own loop: %s", reason)

    def make_train_function(self, force: bool = False) -> Callable:
        if not self._loops.train:
            return super().make_train_function(force)
        return self._chunk_function("train", self.train_step, self._train_counter)

    def make_test_function(self, force: bool = False) -> Callable:
        if not self._loops.test:
            return super().make_test_function(force)
        return self._chunk_function("test", self.test_step, self._test_counter)

    def _chunk_function(self, which: str, step: Callable, counter: tf.Variable) -> Callable:
        loops = self._loops
        key = which, loops.complete[which]
        if key not in loops.functions:
            totals = [v for tracker in vars(self._trackers).values() for v in tracker.variables]
            loops.functions[key] = chunk_function(
                step, lambda: self._results(which == "train"), counter, totals
            )
        function = loops.functions[key]

        def run(iterator: Iterator) -> dict[str, tf.Tensor]:
            loops.last = function(iterator, loops.afresh)
            loops.afresh = False
            return loops.last

        return run

    def reset_metrics(self) -> None:
        if not (self._loops.train or self._loops.test):
            super().reset_metrics()
            return
        self._loops.afresh = True
        for metric in super().metrics:
            metric.reset_state()

    def get_metrics_result(self) -> dict[str, Any]:
        # What the last chunk returned: to compute it once more takes longer than ten steps.
        if self._loops.last is not None and tf.executing_eagerly():
            return self._loops.last
        return super().get_metrics_result()

    def _results(self, training: bool) -> dict[str, Any]:
        results = self.get_metrics_result()
        names = sorted(results, key=lambda name: name != "loss")
        return {n: results[n] for n in names if training or n not in self.train_only}

    def train_step(self, data: Any) -> dict[str, Any]:
        x, y, sample_weight = tf_keras.utils.unpack_x_y_sample_weight(data)
        with tf.GradientTape() as tape:
            loss, outputs = self.forward(x, y, sample_weight, training=True)
            # Gradients of the replicas are summed.
            scaled = loss / self.distribute_strategy.num_replicas_in_sync
        gradients = tape.gradient(scaled, self.trainable_variables)
        pairs = [
            (gradient, variable)
            for gradient, variable in zip(gradients, self.trainable_variables, strict=True)
            if gradient is not None  # the projection of features that a backbone does not read
        ]
        pairs = list(self.optimizer.aggregate_gradients(pairs))
        norm = tf.linalg.global_norm([gradient for gradient, _ in pairs])
        self._trackers.gradient_norm.update_state(norm)
        self.optimizer.apply_gradients(pairs, skip_gradients_aggregation=True)
        self.compute_metrics(x, y, outputs, sample_weight)
        return self._results(training=True)

    def test_step(self, data: Any) -> dict[str, Any]:
        x, y, sample_weight = tf_keras.utils.unpack_x_y_sample_weight(data)
        _, outputs = self.forward(x, y, sample_weight, training=False)
        self.compute_metrics(x, y, outputs, sample_weight)
        return self._results(training=False)

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
            os.replace(partial, path)
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror or error}") from error
        finally:
            partial.unlink(missing_ok=True)
