"""Features: the model's own preprocessing, from raw columns to a matrix of unit scale.

Both layers are fitted on train rows with `adapt` before their first call, and travel in `.keras`
files and SavedModels with the model.

Shape letters: B batch, N rows, T time, F features, F' columns that come out, C coded columns.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import tensorflow as tf
import tf_keras

from mdn.data.checks import MISSING, find_missing
from mdn.errors import DataError


@tf_keras.saving.register_keras_serializable(package="mdn")
class Standardize(tf_keras.layers.Layer):
    """Scale each feature of a matrix to mean zero and standard deviation one.

    In [B, T, F] a step whose features are all NaN is padding: it becomes zeros, and the layers
    that follow get a [B, T] mask of the real steps.

    Args:
        missing: "error": NaN in [B, F] or in a real step stays NaN. "indicator": NaN becomes 0
            (the mean), and each feature that was missing in a train row adds a column of flags.
        indicator: the features that have an indicator column; `adapt` finds them.
        features: F, if known before the first call; `adapt` finds it.
    """

    def __init__(
        self,
        missing: str = "error",
        indicator: Sequence[int] = (),
        features: int | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("dtype", "float32")  # whatever the policy: bfloat16 rounds raw features
        super().__init__(**kwargs)
        if missing not in MISSING:
            raise ValueError(f"missing={missing!r} is not one of {', '.join(MISSING)}")
        self.missing = missing
        self.indicator = list(indicator)
        self.features = features
        self.supports_masking = True
        if features is not None:
            self.build((None, features))

    def build(self, input_shape: Sequence[int | None]) -> None:
        if self.built:
            return
        self.features = input_shape[-1]

        def add(name: str, start: str) -> tf.Variable:
            return self.add_weight(
                name, [self.features], tf.float32, initializer=start, trainable=False
            )

        self.mean = add("mean", "zeros")
        self.inverse_scale = add("inverse_scale", "ones")
        super().build(input_shape)

    @property
    def output_size(self) -> int:
        """F', the number of columns that come out; a ValueError before there are any."""
        if self.features is None:
            raise ValueError("Standardize has no size yet: call adapt or build first")
        return max(1, self.features + len(self.indicator))

    def adapt(self, x: np.ndarray) -> None:
        """Fit the statistics to train rows.

        Args:
            x: [N, F] or [N, T, F], which passes `mdn.data.checks.check_features`.

        Raises:
            DataError: the layer was built for another number of features.
        """
        x = np.asarray(x)
        # In the float32 values that the layer will see: a feature constant there has scale 1.
        rows = (
            x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).astype(np.float32).astype(np.float64)
        )
        absent = np.isnan(rows)
        if x.ndim == 3:
            real = ~absent.all(axis=1)
            rows, absent = rows[real], absent[real]
        self.build(x.shape)
        if self.features != x.shape[-1]:
            raise DataError(
                f"x has {x.shape[-1]} features but the model was built for {self.features}: "
                "make a new model"
            )
        if self.missing == "indicator":
            self.indicator = np.flatnonzero(absent.any(axis=0)).tolist()
        mean, scale = _moments(rows)
        self.mean.assign(mean)
        self.inverse_scale.assign(1 / scale)

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Map [.., F] to [.., F'] float32.

        Raises:
            DataError: there are not F features.
        """
        inputs = tf.cast(inputs, tf.float32)
        if inputs.shape[-1] not in (self.features, None):
            raise DataError(
                f"x has {inputs.shape[-1]} features but the model has {self.features}: "
                f"give [.., {self.features}]"
            )
        if self.features == 0:  # a zero for every row: no layer takes a matrix without columns
            return tf.zeros(tf.concat([tf.shape(inputs)[:-1], [1]], axis=0))
        scaled = (inputs - self.mean) * self.inverse_scale  # [.., F]
        if self.missing == "indicator":
            absent = tf.math.is_nan(inputs)
            scaled = tf.where(absent, 0.0, scaled)
            if self.indicator:
                flags = tf.gather(absent, list(self.indicator), axis=-1)
                scaled = tf.concat([scaled, tf.cast(flags, tf.float32)], axis=-1)  # [.., F']
        real = self.compute_mask(inputs)
        return scaled if real is None else tf.where(real[..., tf.newaxis], scaled, 0.0)

    def compute_mask(self, inputs: tf.Tensor, mask: tf.Tensor | None = None) -> tf.Tensor | None:
        """Return which steps of [B, T, F] are real, [B, T]; other ranks have no mask."""
        if inputs.shape.rank != 3 or inputs.shape[-1] == 0:
            return None
        return ~tf.reduce_all(tf.math.is_nan(tf.cast(inputs, tf.float32)), axis=-1)

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> tf.TensorShape:
        return tf.TensorShape([*input_shape[:-1], self.output_size])

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        own = {
            "missing": self.missing,
            "indicator": list(self.indicator),
            "features": self.features,
        }
        return {**config, **own}


@dataclasses.dataclass(frozen=True)
class Column:
    """What `Columns` knows of one raw column.

    Attributes:
        name: the key in the mapping of columns.
        vocabulary: the categories with a slot of their own, most frequent first; None: a number.
        mean: of a number over the train rows.
        scale: its standard deviation; 1 where it is constant.
        missing: whether a number was missing in a train row, and so has an indicator.
        dtype: of an exported model's input: "string"; or "float32", but "float64" where rounding
            a train row to float32 moves it by over 1e-5 of the scale, as it does to timestamps.
    """

    name: str
    vocabulary: list[str] | None = None
    mean: float = 0.0
    scale: float = 1.0
    missing: bool = False
    dtype: str = "float32"


@tf_keras.saving.register_keras_serializable(package="mdn")
class Columns(tf_keras.layers.Layer):
    """Encode a mapping of raw columns, [B] or [B, 1] each, as a matrix [B, F'].

    There are two stages, since XLA compiles no strings: `codes` looks categories up and scales
    numbers, and `call` takes either the columns or their codes to the matrix. The columns of F'
    are the numbers, an indicator for each number that was missing in a train row, and a one-hot
    vector for each category, whose slot 0 is unknown or missing.

    Args:
        max_categories: how many of a column's categories have a slot; the rarer are unknown.
        columns: what `adapt` found, in the order of the codes.
        missing: "error": a missing number stays NaN. "indicator": it becomes 0 (the mean).
            `MDN.adapt` sets it.
    """

    def __init__(
        self,
        max_categories: int = 256,
        columns: Sequence[Column | Mapping[str, Any]] = (),
        missing: str = "indicator",
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("dtype", "float32")
        super().__init__(autocast=False, **kwargs)  # numbers are centred before they are cast
        if missing not in MISSING:
            raise ValueError(f"missing={missing!r} is not one of {', '.join(MISSING)}")
        self.max_categories = max_categories
        self.missing = missing
        self._set([c if isinstance(c, Column) else Column(**c) for c in columns])

    def _set(self, columns: list[Column]) -> None:
        self.columns = columns
        with tf.init_scope():  # the tables outlive a function that builds the layer
            self._tables = [
                tf.lookup.StaticHashTable(
                    tf.lookup.KeyValueTensorInitializer(
                        tf.constant(column.vocabulary, tf.string, [len(column.vocabulary)]),
                        tf.range(1, len(column.vocabulary) + 1, dtype=tf.int64),
                    ),
                    default_value=0,
                )
                for column in columns
                if column.vocabulary is not None
            ]

    @property
    def names(self) -> list[str]:
        """The names of the columns, in the order of the codes."""
        return [column.name for column in self.columns]

    @property
    def output_size(self) -> int:
        """F', the number of columns that come out."""
        return sum(
            1 + (int(c.missing) if c.vocabulary is None else len(c.vocabulary))
            for c in self.columns
        )

    def signature(self) -> dict[str, tf.TensorSpec]:
        """Return the inputs of an exported model: name -> [B], of the column's `dtype`."""
        return {c.name: tf.TensorSpec([None], c.dtype, name=c.name) for c in self.columns}

    def adapt(self, columns: Mapping[str, np.ndarray]) -> None:
        """Fit scales and vocabularies to train rows, [N] each, which pass `check_features`."""
        self._set(
            [
                _fit_category(name, values, self.max_categories)
                if values.dtype.kind in "OU"
                else _fit_number(name, values.astype(np.float64))
                for name, values in columns.items()
            ]
        )

    def codes(self, columns: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """Return [B, C] float32: numbers scaled, NaN where missing; categories as slot numbers.

        Raises:
            DataError: a column is not there.
        """
        if absent := [name for name in self.names if name not in columns]:
            raise DataError(f"column {absent[0]!r} is missing: give {', '.join(self.names)}")
        tables = iter(self._tables)
        coded = []
        for column in self.columns:
            values = tf.reshape(columns[column.name], [-1])  # [B]
            if column.vocabulary is None:
                # Centred in float64: a timestamp in float32 is exact to a minute or two.
                values = (tf.cast(values, tf.float64) - column.mean) / column.scale
            else:
                values = next(tables).lookup(values)
            coded.append(tf.cast(values, tf.float32))
        return tf.stack(coded, axis=-1)

    def as_learned(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """Return raw columns, [N] each, of the kind that `adapt` saw: numbers, or text.

        Readers make numbers of a column that is empty in all of these rows, and objects of numbers
        among which one is None.

        Raises:
            DataError: a category came as numbers, or a number as text.
        """
        found = dict(columns)
        for column in self.columns:
            values = found.get(column.name)
            if not isinstance(values, np.ndarray):
                continue
            absent = find_missing(values)
            if column.vocabulary is not None and values.dtype.kind not in "OU":
                if not absent.all():
                    raise DataError(
                        f"column {column.name!r} is of type {values.dtype}, and the model has "
                        "learned categories: give text"
                    )
                found[column.name] = np.full(len(values), "")
            elif column.vocabulary is None and values.dtype.kind in "OU":
                if any(isinstance(value, str) for value in values[~absent]):
                    raise DataError(
                        f"column {column.name!r} holds text, and the model has learned numbers: "
                        "convert it to floats"
                    )
                found[column.name] = np.where(absent, np.nan, values).astype(np.float64)
        return found

    def call(self, inputs: Mapping[str, tf.Tensor] | tf.Tensor) -> tf.Tensor:
        """Map raw columns, or their codes [B, C], to [B, F'] float32."""
        codes = self.codes(inputs) if isinstance(inputs, Mapping) else inputs
        numbers = [i for i, c in enumerate(self.columns) if c.vocabulary is None]
        flagged = [i for i in numbers if self.columns[i].missing]
        absent = tf.math.is_nan(codes)
        known = codes if self.missing == "error" else tf.where(absent, 0.0, codes)
        parts = [
            tf.gather(known, tf.constant(numbers, tf.int32), axis=1),
            tf.cast(tf.gather(absent, tf.constant(flagged, tf.int32), axis=1), tf.float32),
        ]
        for i, column in enumerate(self.columns):
            if column.vocabulary is not None:
                slot = tf.cast(known[:, i], tf.int32)
                parts.append(tf.one_hot(slot, len(column.vocabulary) + 1))
        return tf.concat(parts, axis=1)

    def compute_output_shape(self, input_shape: Any) -> tf.TensorShape:
        return tf.TensorShape([None, self.output_size])

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        columns = [dataclasses.asdict(column) for column in self.columns]
        own = {"max_categories": self.max_categories, "columns": columns, "missing": self.missing}
        return {**config, **own}


def as_tensors(columns: Mapping[str, np.ndarray]) -> dict[str, tf.Tensor]:
    """Return raw columns, [N] each, as tensors for `Columns`: a missing category is ""."""
    return {
        name: tf.constant(
            np.where(find_missing(values), "", values) if values.dtype.kind in "OU" else values
        )
        for name, values in columns.items()
    }


def _fit_category(name: str, values: np.ndarray, max_categories: int) -> Column:
    present = values[~find_missing(values)].astype(str)
    categories, count = np.unique(present, return_counts=True)
    frequent = np.argsort(-count, kind="stable")[:max_categories]  # ties in alphabetical order
    return Column(name, vocabulary=categories[frequent].tolist(), dtype="string")


def _fit_number(name: str, values: np.ndarray) -> Column:
    mean, scale = (float(s[0]) for s in _moments(values[:, None]))
    rounding = np.nanmax(np.abs(values - values.astype(np.float32)))
    return Column(
        name,
        mean=mean,
        scale=scale,
        missing=bool(np.isnan(values).any()),
        dtype="float64" if rounding > 1e-5 * scale else "float32",
    )


def _moments(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and the scale of each feature of [N, F] float64, ignoring NaN."""
    low, high = np.nanmin(rows, axis=0), np.nanmax(rows, axis=0)
    std = np.nanstd(rows, axis=0)
    # The rounded mean of a constant can differ from it, and leave a std of 1e-17.
    constant = (low == high) | (std < np.finfo(np.float32).tiny)
    return np.where(constant, low, np.nanmean(rows, axis=0)), np.where(constant, 1.0, std)


def as_features(x: Any) -> Any:
    """Return lists and Series as arrays, a DataFrame as a mapping of columns, the rest as is."""
    if isinstance(x, pd.DataFrame):
        x = {str(name): x[name] for name in x}
    if isinstance(x, dict):
        return {name: _as_column(column) for name, column in x.items()}
    return np.asarray(x) if isinstance(x, list | tuple | pd.Series) else x


def _as_column(column: Any) -> Any:
    if isinstance(column, pd.Series):
        if pd.api.types.is_numeric_dtype(column):
            return column.to_numpy(np.float64, na_value=np.nan)
        return column.to_numpy(object)
    return column if isinstance(column, tf.Tensor) else np.asarray(column)
