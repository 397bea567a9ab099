"""Answers of a model for any number of rows at once, which Keras has no programs for.

Shape letters: B batch, T time, F features, D event size, N rows, C columns.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

from mdn.base import TrainedModel
from mdn.data.rows import Features, Rows
from mdn.density.queries import Queries
from mdn.density.transformed import rebuilder
from mdn.errors import DataError
from mdn.features import Columns, as_features, as_tensors
from mdn.inference import RowProgram, largest_batch


class AnsweringModel(TrainedModel):
    """A model of an encoder, a backbone and a head, and its answers for arrays of rows."""

    encoder: Any
    backbone: Any
    head: Any
    _programs: types.SimpleNamespace
    _rebuild: Any

    def encode(self, x: Any) -> Any:
        """Return raw features as what the compiled steps take: strings become codes.

        Args:
            x: a mapping of columns, which becomes [N, C] float32; anything else is returned as is.

        Raises:
            DataError: an array of other features than the model has, or columns of another kind.
        """
        self._check_adapted()
        x = as_features(x)
        if isinstance(self.encoder, Columns):
            if isinstance(x, dict):
                return self.encoder.codes(as_tensors(self.encoder.as_learned(x))).numpy()
            if isinstance(x, np.ndarray):
                raise DataError(f"x is a matrix: give the columns {', '.join(self.encoder.names)}")
        elif isinstance(x, np.ndarray) and x.shape[-1:] != (self.encoder.features,):
            raise DataError(
                f"x has shape {list(x.shape)} but the model has {self.encoder.features} features: "
                f"give [N, {self.encoder.features}]"
            )
        return x

    def densities(
        self, x: Features, batch_size: int | None = None
    ) -> Iterator[tuple[slice, Queries]]:
        """Yield (rows, density of those rows), in order, a batch at a time."""

        def tensors(x: tf.Tensor) -> dict[str, tf.Tensor]:
            density = self(x, training=False)
            self._rebuild = rebuilder(density)
            return density.tensors()

        for rows, parts in self._over_rows("density", tensors, [self._as_rows(x)], batch_size):
            yield rows, self._rebuild(**parts)

    def _over_rows(
        self, name: str, function: Callable, arrays: list[np.ndarray], batch_size: int | None
    ) -> Iterator[tuple[slice, Any]]:
        """Yield (rows, what the program of that name makes of them); `function` makes the program.

        There is one for each model, as a function of the class would be traced for each of them.
        """
        programs = vars(self._programs)
        if name not in programs:
            programs[name] = self.row_program(function)
        return programs[name](arrays, self.largest_batch if batch_size is None else batch_size)

    def row_program(self, function: Callable) -> RowProgram:
        """Return a program of rows that calls this model, compiled as far as its parts can be."""
        compiled = self.xla if self.optimizer is None else bool(self._jit_compile)
        # Of bfloat16 XLA leaves roundings out, and would not answer as the artefact does.
        whole = tf.as_dtype(self.backbone.compute_dtype or self.dtype).size >= 4
        return RowProgram(function, compiled and whole)

    @property
    def largest_batch(self) -> int:
        return largest_batch(self.head.params_size)

    def _as_rows(self, x: Features) -> np.ndarray:
        self._check_adapted()
        return np.asarray(self.encode(x), tf_keras.backend.floatx())

    def predict_distribution(self, x: Features, batch_size: int | None = None) -> Queries:
        """Return the density of any number of rows.

        Args:
            x: [N, F], [N, T, F], or a mapping of columns [N].
            batch_size: rows that go through the network at a time; by default as many as are fast.

        Returns:
            The head's type, batch [N] or [N, T]; its `parameters` are NumPy arrays.

        Raises:
            DataError: there are no rows, or they have other features than the model.
        """
        parts = [density for _, density in self.densities(x, batch_size)]
        if not parts:
            raise DataError("x has no rows: give at least one")
        arrays = {
            name: np.concatenate([part.tensors()[name].numpy() for part in parts])
            for name in parts[0].tensors()
        }
        return rebuilder(parts[0])(**arrays)

    def log_prob(self, x: Features, y: np.ndarray, batch_size: int | None = None) -> np.ndarray:
        """Return log p(y | x) of any number of rows, in nats: [N] or [N, T].

        Args:
            x: [N, F], [N, T, F], or a mapping of columns [N].
            y: [N, D] or [N, T, D] in the user's units; an entry that is NaN is marginalised.
            batch_size: rows that go through the network at a time; by default as many as are fast.

        Raises:
            DataError: y has no D columns, or there are not as many rows of it as of x.
        """
        x, y = self._as_rows(x), np.asarray(y, tf_keras.backend.floatx())
        if y.shape[-1:] != (self.head.event_size,) or len(x) != len(y):
            raise DataError(
                f"y has shape {list(y.shape)}: give [{len(x)}, {self.head.event_size}], a row of "
                "targets for each row of x"
            )
        complete = not np.isnan(y).any()
        answers = self._over_rows(
            "log_prob of complete rows" if complete else "log_prob",
            partial(self.log_density, complete=complete),
            [x, y],
            batch_size,
        )
        parts = [part.numpy() for _, part in answers]
        return np.concatenate(parts) if parts else np.zeros(y.shape[:-1], y.dtype)

    def log_density(self, x: Any, y: tf.Tensor, complete: bool | None = None) -> tf.Tensor:
        """Return log p(y | x) of a batch, as `self(x).log_prob(y)` does.

        Args:
            x: as for a call.
            y: [B, D] or [B, T, D] in the user's units; an entry that is NaN is marginalised.
            complete: none is, and the answer may be found faster; None: look for one.
        """
        return self(x, training=False).log_prob(y)

    @staticmethod
    def _where_complete(
        y: tf.Tensor,
        complete: bool | None,
        fast: Callable[[], tf.Tensor],
        general: Callable[[], tf.Tensor],
    ) -> tf.Tensor:
        """Return `fast()` if no entry of y is missing; None: look for one."""
        if complete is None:
            return tf.cond(tf.reduce_any(tf.math.is_nan(y)), general, fast)
        return fast() if complete else general()

    def predict(
        self, x: Any, batch_size: int | None = None, verbose: Any = "auto", **kwargs: Any
    ) -> np.ndarray:
        """Return the mean of the density at each row, [N, D] or [N, T, D]: never a random draw.

        Args:
            x: [N, F], [N, T, F], a mapping of columns [N], or a `tf.data.Dataset`.
            batch_size: rows that go through the network at a time; by default as many as are fast.
            verbose: as in Keras; arrays take no time that a progress bar would show.
            **kwargs: as in Keras.
        """
        x = self.encode(x)
        if not isinstance(x, np.ndarray) or kwargs or not len(x):
            return super().predict(x, batch_size, verbose, **kwargs)
        dtype = tf_keras.backend.floatx()
        parts = self._over_rows(
            "mean", lambda x: self(x, training=False).mean(), [x.astype(dtype)], batch_size
        )
        return np.concatenate([part.numpy() for _, part in parts])

    def row_losses(self, rows: Rows) -> np.ndarray:
        losses = -self.log_prob(rows.x, rows.y)
        return losses.reshape([len(losses), -1]).max(axis=1)  # the worst step of each
