"""Kinds of columns: cells as numbers, as days since 1970, and as the text of categories.

Shape letters: N rows.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from mdn.data.checks import RowName, find_missing
from mdn.errors import DataError


def to_number(column: pd.Series, label: str, row: RowName) -> np.ndarray:
    """Return a target or weight column as [N] float64, NaN where missing.

    Args:
        column: [N].
        label: what a message calls it.
        row: what a message calls the row at a position.

    Raises:
        DataError: a cell is no number.
    """
    kind = pd.api.types.infer_dtype(column, skipna=True)
    if kind in ("datetime64", "datetime", "date", "timedelta64", "timedelta"):
        raise DataError(f"{label} holds dates or durations, not numbers: convert it to numbers")
    if isinstance(column.dtype, pd.CategoricalDtype):
        column = column.astype(object)
    try:
        numbers = pd.to_numeric(column, errors="coerce").astype("float64")
    except OverflowError as error:
        raise DataError(f"{label} holds an integer beyond float64: mend that cell") from error
    odd = (numbers.isna() & column.notna()).to_numpy()
    if odd.any():
        i = int(odd.argmax())
        raise DataError(
            f"{label} is {column.iloc[i]!r} in {row(i)}, not a number: mend or empty that cell"
        )
    return numbers.to_numpy(np.float64, na_value=np.nan)


def to_text(column: pd.Series) -> np.ndarray:
    """Return a column as an object array of str, None where missing or empty.

    The text of a value does not depend on the others, so that any rows of a column make the same
    categories: a whole number is 3 also where a missing value made floats of integers.
    """
    text = column.astype(object).map(word, na_action="ignore").to_numpy(object, copy=True)
    text[find_missing(text)] = None
    return text


def word(value: object) -> str:
    """Return a value as a category: 3 for 3.0, 3.5 for 3.5."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def to_days(column: pd.Series) -> np.ndarray:
    """Return dates as days since 1970-01-01 UTC, [N] float64; dates without a zone are in UTC."""
    times = pd.to_datetime(column, utc=True)
    unit = times.dt.unit  # nanoseconds, which pandas would take, end in the year 2262
    epoch, day = pd.Timestamp(0, tz="UTC").as_unit(unit), pd.Timedelta(days=1).as_unit(unit)
    days = (times - epoch) / day
    return days.to_numpy(np.float64, na_value=np.nan)
