"""Checks of rows before a distribution is fitted to them.

Shape letters: N rows, D event size.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow_probability import distributions as tfd

from mdn import density
from mdn.data.checks import check_weight
from mdn.density.queries import Queries
from mdn.errors import ConfigError, DataError
from mdn.fitting.trainable import LOCATION_SCALE, Parameter

# Of whole numbers, though their dtype is a floating one.
_COUNTS = (
    tfd.Poisson,
    tfd.NegativeBinomial,
    tfd.Geometric,
    tfd.Binomial,
    tfd.BetaBinomial,
    tfd.Multinomial,
    tfd.DirichletMultinomial,
)


def as_rows(y: Any, dtype: Any) -> tuple[np.ndarray, tf.DType]:
    """Return rows in float64, and the dtype to fit them in: by default their own.

    Raises:
        ConfigError: the dtype is neither float32 nor float64.
        DataError: y is not numeric, has no rows, or an infinite entry.
    """
    try:
        y = np.asarray(y)
    except ValueError as error:
        raise DataError("y has rows of unequal length: give [N] or [N, D]") from error
    if y.dtype.kind not in "biuf":
        raise DataError(f"y is of type {y.dtype}, not numeric: convert it to floats")
    if y.ndim == 0 or not y.size:
        raise DataError(f"y has shape {list(y.shape)}: give [N] or [N, D] with rows")
    if np.isinf(y).any():
        row = int(np.argwhere(np.isinf(y))[0][0])
        raise DataError(f"y is infinite in row {row}: mend or drop that row")
    try:
        dtype = tf.as_dtype(dtype or (y.dtype if y.dtype.kind == "f" else np.float64))
    except TypeError as error:
        raise ConfigError(f"dtype={dtype}: must be float32 or float64") from error
    if dtype not in (tf.float32, tf.float64):
        raise ConfigError(f"dtype={dtype.name}: must be float32 or float64")
    return y.astype(np.float64), dtype


def check_options(counts: Mapping[str, Any], positive: Mapping[str, Any], seed: Any) -> None:
    """Check the numbers among the options: counts, positive ones, and the seed.

    Raises:
        ConfigError: one is of another type, or out of its range.
    """
    for name, value in {**counts, "seed": seed}.items():
        least = 0 if name == "seed" else 1
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
            raise ConfigError(f"{name}={value!r}: must be an integer, and at least {least}")
    for name, value in positive.items():
        if value is None:
            continue
        if not isinstance(value, numbers.Real) or not 0.0 < float(value) < float("inf"):
            raise ConfigError(f"{name}={value!r}: must be a positive number")


def as_weight(weight: Any, rows: int) -> np.ndarray:
    """Return row weights [N] in float64; ones where there are none.

    Raises:
        DataError: a weight is negative or not finite, all are zero, or there are not N.
    """
    if weight is None:
        return np.ones(rows)
    check_weight(weight, "weight")
    if len(weight) != rows:
        raise DataError(f"weight has {len(weight)} entries but y {rows} rows: give one for each")
    return np.asarray(weight, np.float64)


def check_entries(
    kind: type[tfd.Distribution],
    y: np.ndarray,
    layout: Mapping[str, Parameter],
    dtype: tf.DType,
) -> None:
    """Check that no column is empty, and that what is missing can be marginalised.

    Raises:
        ConfigError: the class has no distribution of this shape.
        DataError: a column is missing in every row, or a part of a row that only normals and
            their mixtures can do without, or a count is no whole number.
    """
    missing = np.isnan(y)
    if (empty := missing.all(axis=0)).any():
        raise DataError(f"y is missing in every row{_column(empty)}: leave it out")
    one = example(kind, layout, dtype)
    event = len(one.event_shape)
    if one.dtype.is_integer or kind in _COUNTS:
        odd = ~missing & ((y != np.round(y)) | (y < 0))
        if kind is tfd.Bernoulli:
            odd |= y > 1
        if odd.any():
            row = int(np.argwhere(odd)[0][0])
            raise DataError(f"y is {y[odd][0]:g} in row {row}, which no {kind.__name__} can be")
    if issubclass(kind, Queries) or not missing.any():
        return
    if event:
        rows = missing.reshape(*missing.shape[: missing.ndim - event], -1)
        if (rows.any(axis=-1) & ~rows.all(axis=-1)).any():
            raise DataError(
                f"y misses parts of rows, which {kind.__name__} cannot marginalise: drop those "
                "rows, or use a normal or a mixture"
            )


def check_determined(
    kind: type[tfd.Distribution], y: np.ndarray, fixed: Mapping[str, np.ndarray]
) -> None:
    """Check that the likelihood of a class with a free scale has a bound.

    Raises:
        DataError: a column is constant, or columns determine each other.
    """
    if not issubclass(kind, LOCATION_SCALE) or any(name.startswith("scale") for name in fixed):
        return
    constant = np.nanmin(y, axis=0) == np.nanmax(y, axis=0)
    if constant.any():
        raise DataError(
            f"y is constant{_column(constant)}, so that it has no density: leave it out, or fix "
            "the scale"
        )
    if issubclass(kind, density.MultivariateNormalTriL) and y.ndim == 2:
        z = (y - np.nanmean(y, axis=0)) / np.nanstd(y, axis=0)
        if np.linalg.matrix_rank(np.nan_to_num(z)) < y.shape[1]:
            raise DataError(
                f"the covariance of these {len(y)} rows is singular: give more rows, or drop a "
                "column that others determine"
            )


def example(
    kind: type[tfd.Distribution], layout: Mapping[str, Parameter], dtype: tf.DType
) -> tfd.Distribution:
    """Return the distribution of zeros in unconstrained units, for its shapes and dtype.

    Raises:
        ConfigError: there is none, as the parameters of its layout do not suffice.
    """
    try:
        return kind(**{n: p.forward(tf.zeros(p.raw, dtype)) for n, p in layout.items()})
    except (TypeError, ValueError, AttributeError, tf.errors.OpError) as error:
        raise ConfigError(
            f"{kind.__name__} cannot be learned: {', '.join(layout)} do not make one"
        ) from error


def _column(where: np.ndarray) -> str:
    """Name the first column that a mask [*batch, *event] marks."""
    return "" if where.ndim == 0 else f" in column {np.argwhere(where)[0].tolist()}"
