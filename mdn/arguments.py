"""What `fit` and `evaluate` are given, as batches: arrays, datasets and Python generators.

Shape letters: B batch, N rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

from mdn.compiled import CompiledModel
from mdn.data.chunks import Batches
from mdn.data.generators import stack_generator
from mdn.data.pipeline import evaluation_batches, stack, training_batches
from mdn.errors import ConfigError, DataError

EVALUATION_BATCH = 4096


def check_sizes(**sizes: int | None) -> None:
    """Raise a ConfigError for a size below one; None stands for a default."""
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ConfigError(f"{name}={size}: must be at least 1")


def _length(batches: tf.data.Dataset) -> int | None:
    """Return how many batches there are, counted where the dataset does not know."""
    if int(batches.cardinality()) != tf.data.UNKNOWN_CARDINALITY:
        return None
    return int(batches.reduce(np.int64(0), lambda count, *_: count + 1))


class FittableModel(CompiledModel):
    """A compiled model that is given rows as users have them."""

    # ------------------------------------------------------------------ what a model says

    def as_arrays(
        self, x: Any, y: Any = None, sample_weight: Any = None
    ) -> tuple[np.ndarray, ...]:
        """Return what a user gave to `fit` or `evaluate` as arrays to take batches of.

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

    def _check_adapted(self) -> None:
        """Raise a RunError where the model cannot be used yet."""

    # ------------------------------------------------------------------ Keras

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
            x: features, images, a `tf.data.Dataset` or a Python generator of batches, or
                `mdn.data.chunks.Batches`.
            y: targets, where x is features.
            batch_size: B, of arrays; default 32.
            epochs: when to stop.
            verbose: as in Keras.
            callbacks: as in Keras.
            validation_split: share of the last rows of arrays to hold out, where there is no
                `validation_data`.
            validation_data: (x, y) or (x, y, weight), or batches.
            shuffle: a new order in each epoch, drawn from NumPy's global stream.
            class_weight: must be None.
            sample_weight: [N], row weights.
            initial_epoch: epochs that lie behind.
            steps_per_epoch: batches that make an epoch of a dataset, by default all of them; or of
                a generator.
            validation_steps: the same of `validation_data`; a dataset that does not know its
                length is counted first, in a pass of its own.
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
        check_sizes(batch_size=batch_size, epochs=epochs)
        batches: Any = x
        split = bool(validation_split) and validation_data is None
        if self._is_arrays(x, y):
            self.check_arrays(x, y, sample_weight)
            arrays = self.as_arrays(x, y, sample_weight)
            if split:
                at = math.floor(len(arrays[0]) * (1.0 - validation_split))
                if not 0 < at < len(arrays[0]):
                    raise ConfigError(f"validation_split={validation_split} leaves no rows")
                validation_data = tuple(array[at:] for array in arrays)
                arrays = tuple(array[:at] for array in arrays)
            batches = training_batches(
                arrays,
                32 if batch_size is None else batch_size,
                # Drawn from NumPy's global stream, which tf_keras.utils.set_random_seed seeds.
                seed=int(np.random.randint(2**31 - 1)) if shuffle else None,
                first_epoch=initial_epoch,
                drop_remainder=False,
                chunk=self._loop.chunk,
                complete=self.is_complete(arrays),
            )
            if steps_per_epoch is not None:
                batches = self._stacked(batches.unstacked(), steps_per_epoch)
        elif split or sample_weight is not None:
            name = "sample_weight" if sample_weight is not None else "validation_split"
            raise ConfigError(f"{name} is for arrays: put it into the batches of the dataset")
        elif isinstance(x, tf.data.Dataset):
            batches = self._stacked(x, steps_per_epoch)
        elif isinstance(x, Iterator):
            batches = self._from_generator(x, steps_per_epoch, epochs - initial_epoch)
        chunk = batches.chunk if isinstance(batches, Batches) else 1
        held_out = validation_data
        if isinstance(held_out, tuple | list):
            held_out = self._evaluation_batches(
                tuple(held_out) if split else self.as_arrays(*held_out),
                validation_batch_size,
                chunk,
            )
        elif isinstance(held_out, tf.data.Dataset):
            if validation_steps is None and isinstance(batches, Batches):
                validation_steps = _length(held_out)
            held_out = self._stacked(held_out, validation_steps, chunk)
        elif isinstance(held_out, Iterator):
            held_out = map(self._converted, held_out)
        if isinstance(self.optimizer, tf_keras.optimizers.Optimizer):
            with self.distribute_strategy.scope():
                self.optimizer.build(self.trainable_variables)
        with self._looping(batches, held_out) as ((x, steps), (held_out, held_out_steps)):
            self._eval_data_handler = None  # of a `fit` that was interrupted, with its rows
            return super().fit(
                x,
                epochs=epochs,
                verbose=verbose,
                callbacks=callbacks,
                validation_data=held_out,
                initial_epoch=initial_epoch,
                steps_per_epoch=steps or steps_per_epoch,
                validation_steps=held_out_steps or validation_steps,
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

        Raises:
            RunError: `adapt` was not called.
            DataError: there are no rows, or not of the shapes of the model.
            ConfigError: an argument that has no meaning here.
        """
        # With the private argument it is `fit` that asks, on what it was given.
        if not kwargs.get("_use_cached_eval_dataset"):
            self._check_adapted()
            if self._is_arrays(x, y):
                x = self._evaluation_batches(self.as_arrays(x, y, sample_weight), batch_size)
            elif isinstance(x, tf.data.Dataset):
                x = self._stacked(x, steps)
            elif isinstance(x, Iterator):
                x = map(self._converted, x)
            with self._looping(None, x) as (_, (x, found)):
                return super().evaluate(
                    x, verbose=verbose, steps=found or steps, callbacks=callbacks, **kwargs
                )
        return super().evaluate(x, verbose=verbose, steps=steps, callbacks=callbacks, **kwargs)

    def _evaluation_batches(
        self, arrays: tuple[np.ndarray, ...], batch_size: int | None, chunk: int | None = None
    ) -> Batches:
        if not len(arrays[0]):
            raise DataError("there are no rows to evaluate: give at least one")
        check_sizes(batch_size=batch_size)
        return evaluation_batches(
            arrays,
            batch_size or EVALUATION_BATCH,
            chunk=chunk,
            complete=self.is_complete(arrays),
        )

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
        encoded = self.encoded(batches)
        if steps is None and size < 0:
            self._explain("the dataset does not know its length: give steps_per_epoch")
            return encoded
        spec = encoded.element_spec
        spec = spec if isinstance(spec, tuple) else (spec,)
        if not all(isinstance(s, tf.TensorSpec) and s.shape.rank for s in spec):
            self._explain("the batches of the dataset are no tensors")
            return encoded
        if not all(s.shape[1:].is_fully_defined() for s in spec):
            self._explain("the batches of the dataset have no fixed shape")
            return encoded
        batch_size = spec[0].shape[0]
        if batch_size is None:  # such as `Dataset.batch` makes them, the last one smaller
            first = next(iter(encoded.take(1)))
            batch_size = len(first[0] if isinstance(first, tuple) else first)
        filler = [0.0] * len(spec)
        filler[min(1, len(spec) - 1)] = math.nan  # see `Batches`
        if steps is None:
            encoded, steps = encoded.repeat(), size
        return stack(encoded, steps, batch_size, filler, chunk or self._loop.chunk)

    def _from_generator(
        self, elements: Iterator[Any], steps: int | None, epochs: int
    ) -> Batches | Iterator[Any]:
        """Return the batches of a Python generator as chunks, where their number is known."""
        if steps is None:
            self._explain("a generator does not know its length: give steps_per_epoch")
            return map(self._converted, elements)
        return stack_generator(elements, self._converted, steps, epochs, self._loop.chunk)

    def _converted(self, element: Any) -> tuple[np.ndarray, ...]:
        """Return a batch of a Python generator as arrays."""
        return self.as_arrays(*tf_keras.utils.unpack_x_y_sample_weight(element))
