"""Checks of features, targets and weights, before anything is fitted to them.

Shape letters: N rows, T time, F features, D targets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from mdn.data.resolution import float32_step
from mdn.data.rows import Features
from mdn.errors import DataError

RowName = Callable[[int], str]
"""What an error calls the row at a position, such as "row 3 of b.csv"."""

FLOAT32_MAX = float(np.finfo(np.float32).max)
MISSING = ("error", "indicator")
# A step of float32 at most this share of the standard deviation distorts no density to speak of.
COARSEST_STEP = 0.02


def check_rows(
    x: Features,
    y: np.ndarray,
    missing: str = "error",
    *,
    features: Sequence[str] | None = None,
    targets: Sequence[str] | None = None,
    row: RowName = "row {}".format,
    fitted: bool = True,
) -> None:
    """Check that a density p(y | x) can be fitted to these rows, or judged by them.

    Args:
        x: [N, F] or [N, T, F], or a mapping from column name to [N].
        y: [N, D], or [N, T, D] where x is [N, T, F]; NaN marks a missing entry.
        missing: "error", or "indicator": missing features are allowed.
        features: names of the F features for the messages; a mapping has its own.
        targets: names of the D targets for the messages.
        row: what the messages call the row at a position.
        fitted: no column may then be constant, or missing in every row; else one target is enough.

    Raises:
        DataError: a check of `check_features` or `check_targets` fails, or x and y do not align.
    """
    y = np.asarray(y)
    check_targets(y, targets, row, fitted)
    check_features(x, missing, features, row, fitted)
    lengths = {k: len(v) for k, v in x.items()} if isinstance(x, dict) else {"x": len(x)}
    for name, length in lengths.items():
        if length != len(y):
            raise DataError(
                f"{name} has {length} rows but y has {len(y)}: give a row of x for each"
            )
    if y.ndim == 3 and (isinstance(x, dict) or np.shape(x)[:2] != y.shape[:2]):
        shape = "columns" if isinstance(x, dict) else f"shape {_shape(np.shape(x))}"
        raise DataError(
            f"y of shape {_shape(y.shape)} needs x [N, T, F] of as many steps, not {shape}"
        )


def check_targets(
    y: np.ndarray,
    names: Sequence[str] | None = None,
    row: RowName = "row {}".format,
    fitted: bool = True,
) -> None:
    """Check that y is [N, D] or [N, T, D], finite or NaN, and that each target varies.

    Raises:
        DataError: y has another shape or no rows, is not numeric, holds an infinite entry, or
            is missing altogether; or, to be fitted, has a target that is constant or missing.
    """
    y = np.asarray(y)
    if y.ndim == 1:
        raise DataError(
            f"y has shape [{len(y)}], not [N, D]: reshape it to [N, 1] with y[:, None]"
        )
    if y.ndim not in (2, 3) or not y.size:
        raise DataError(f"y has shape {_shape(y.shape)}: give [N, D] or [N, T, D] with N, D > 0")
    _check_numeric(y, "y")
    for i in range(y.shape[-1]):
        label = f"target {names[i]!r}" if names else f"target {i}"
        column = y[..., i]
        _check_finite(column, label, row)
        if not fitted:
            continue
        present = column[~np.isnan(column)]
        if not present.size:
            raise DataError(f"{label} is missing in every row: leave it out of the targets")
        _check_resolution(present, label)
        low, high = present.min(), present.max()
        if np.float32(low) == np.float32(high):  # targets are float32 from here on
            raise DataError(
                f"{label} is constant ({low:.9g}) in float32, so that it has no density: "
                "leave it out of the targets, or subtract its offset"
            )
    if np.isnan(y).all():
        raise DataError("no row has a target: give some that have one")


def check_features(
    x: Features,
    missing: str = "error",
    names: Sequence[str] | None = None,
    row: RowName = "row {}".format,
    fitted: bool = True,
) -> None:
    """Check that features are finite, and missing only where `missing` allows it.

    In x [N, T, F] a step whose features are all NaN is padding.

    Raises:
        DataError: x has another shape or type, an infinite entry, a missing entry that `missing`
            does not allow, or a sequence that is wholly missing; or, to be fitted, a feature.
    """
    if missing not in MISSING:
        raise DataError(f"data.missing={missing} is not one of {', '.join(MISSING)}")
    if isinstance(x, dict):
        for name, values in x.items():
            _check_feature(np.asarray(values), f"feature {name!r}", missing, row, fitted=fitted)
        return
    x = np.asarray(x)
    if x.ndim not in (2, 3):
        raise DataError(f"x has shape {_shape(x.shape)}: give [N, F] or [N, T, F]")
    _check_numeric(x, "x")
    padding = np.zeros(x.shape[:-1], bool)
    if x.ndim == 3:
        padding = np.all(np.isnan(x), axis=-1)  # [N, T]
        if (empty := np.all(padding, axis=1)).any():
            raise DataError(f"{row(int(empty.argmax()))} of x is padding alone: drop it")
    for i in range(x.shape[-1]):
        label = f"feature {names[i]!r}" if names else f"feature {i}"
        _check_feature(x[..., i], label, missing, row, padding, fitted)
        present = x[..., i][~np.isnan(x[..., i])]
        # A mapping of columns is centred in float64 and has no such limit.
        if present.size and fitted:
            _check_resolution(present, label)


def _check_resolution(values: np.ndarray, label: str) -> None:
    """Check that float32 tells apart what differs in values [n] by more than float64's rounding.

    Not by the standard deviation alone: that of a constant is 1e-16 where its mean is rounded.
    """
    rounding = 16 * np.finfo(np.float64).eps * np.abs(values).max()
    varies = values.max() > values.min() + rounding
    if varies and float32_step(values) > COARSEST_STEP * values.std():
        raise DataError(
            f"{label} varies by {values.std():.3g} around {values.mean():.9g}, which "
            "float32 cannot resolve: subtract its offset"
        )


def check_images(images: np.ndarray, pixels: int) -> np.ndarray:
    """Return images, [N, D] of zeros and ones, as float32.

    Raises:
        DataError: they have another shape, or hold other values.
    """
    images = np.asarray(images)
    if images.ndim != 2 or images.shape[1] != pixels:
        raise DataError(
            f"the images have shape {_shape(images.shape)}: give [N, {pixels}], a row for each"
        )
    _check_numeric(images, "an image")
    bad = (images != 0) & (images != 1)  # NaN too
    if bad.any():
        i, d = np.argwhere(bad)[0].tolist()
        raise DataError(
            f"target {d} is {images[i, d]:.6g} in row {i}: a VAE learns from images of zeros and "
            "ones; binarise them, or use data=digits"
        )
    return images.astype(np.float32)


def check_weight(weight: np.ndarray, label: str, row: RowName = "row {}".format) -> None:
    """Check that row weights, [N], are finite, not negative, and not all zero.

    Raises:
        DataError: they are not.
    """
    weight = np.asarray(weight)
    _check_numeric(weight, label)
    if weight.ndim != 1:
        raise DataError(f"{label} has shape {_shape(weight.shape)}: give one weight a row, [N]")
    bad = ~np.isfinite(weight) | (weight < 0)
    if bad.any():
        i = int(bad.argmax())
        raise DataError(f"{label} is {weight[i]} in {row(i)}: weights are finite and not negative")
    if not weight.any():
        raise DataError(f"{label} is zero in every row: give at least one row a weight")


def check_batch_size(n: int, batch_size: int) -> None:
    """Check that n train rows fill one batch.

    Raises:
        DataError: they do not.
    """
    if n < batch_size:
        raise DataError(
            f"{n} train rows are fewer than one batch of {batch_size}: "
            f"set batch_size to {n} or less, or give more rows"
        )


def find_missing(column: np.ndarray) -> np.ndarray:
    """Return where a column is missing: NaN, None, or an empty string."""
    missing = pd.isna(column)
    if column.dtype.kind in "OU":
        return np.where(missing, "", column) == ""  # pd.NA itself compares with nothing
    return missing


def _check_feature(
    column: np.ndarray,
    label: str,
    missing: str,
    row: RowName,
    padding: np.ndarray | bool = False,
    fitted: bool = True,
) -> None:
    """Check one feature: [N] of a mapping, or [N] or [N, T] of a matrix."""
    if column.dtype.kind == "O":
        kind = pd.api.types.infer_dtype(column, skipna=True)
        if kind not in ("string", "empty"):
            raise DataError(f"{label} holds {kind} objects: give numbers, or str with None")
    elif column.dtype.kind != "U":
        _check_numeric(column, label)
        _check_finite(column, label, row)
    absent = find_missing(column) & ~np.asarray(padding)
    if not absent.any():
        return
    if fitted and np.all(absent | padding):
        raise DataError(f"{label} is missing in every row: leave it out of the features")
    if missing == "error":
        raise DataError(
            f"{label} is missing in {absent.sum()} places, first in {_place(absent, row)}: "
            "set data.missing=indicator, or drop those rows"
        )


def _check_numeric(values: np.ndarray, label: str) -> None:
    if values.dtype.kind not in "biuf":
        raise DataError(f"{label} is of type {values.dtype}, not numeric: convert it to floats")


def _check_finite(column: np.ndarray, label: str, row: RowName) -> None:
    bad = np.abs(column) > FLOAT32_MAX if column.dtype.kind == "f" else np.zeros(1, bool)
    if bad.any():
        raise DataError(
            f"{label} is {column[bad][0]} in {_place(bad, row)}, which float32 cannot hold: "
            "mend or drop that row"
        )


def _place(bad: np.ndarray, row: RowName) -> str:
    """Name the first bad place of a column, [N] or [N, T]."""
    i, *step = np.argwhere(bad)[0].tolist()
    return row(i) + "".join(f", step {t}" for t in step)


def _shape(shape: tuple[int, ...]) -> str:
    return str(list(shape))
