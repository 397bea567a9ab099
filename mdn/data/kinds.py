"""Kinds of columns: cells as numbers, as days since 1970, and as the text of categories.

Shape letters: N rows.
"""

from __future__ import annotations

import decimal
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from mdn.data.checks import RowName, find_missing
from mdn.errors import DataError

_GROUPED = r"[+-]?\d{1,3}(,\d{3})+(\.\d*)?"  # 1,200, which is no number to a parser


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


def read_text(column: pd.Series, row: RowName) -> np.ndarray:
    """Return text as days where every cell is a date, [N] float64, else as categories.

    Args:
        column: [N], named.
        row: what a message calls the row at a position.

    Raises:
        DataError: more than half of the cells are dates, or numbers, and some are not.
    """
    known = ~find_missing(column.to_numpy(object))
    text = column.astype(str).where(known)
    days = parse_days(text)
    dated = ~np.isnan(days)
    number = pd.to_numeric(text, errors="coerce").notna().to_numpy()
    meant = number | text.str.fullmatch(_GROUPED, na=False).to_numpy(bool)
    for kind, like, fits in (("dates", dated, dated), ("numbers", meant, number)):
        odd = known & ~fits
        if odd.any() and 2 * like.sum() > known.sum():
            i = int(odd.argmax())
            raise odd_cell(str(column.name), kind, column.iloc[i], row(i))
    return days if dated.sum() == known.sum() else to_text(column)


def word(value: object) -> str:
    """Return a value as a category: 3 for 3.0, 3.5 for 3.5, whether float or decimal."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return f"{value.normalize():f}" if isinstance(value, decimal.Decimal) else str(value)


def parse_days(text: pd.Series) -> np.ndarray:
    """Return the days of ISO 8601 dates, [N] float64; NaN where a text is none, or is missing."""
    dates = text.where(looks_dated(text))
    return to_days(pd.to_datetime(dates, utc=True, format="ISO8601", errors="coerce"))


def looks_dated(text: pd.Series) -> pd.Series:
    """Return where a text begins as a date does, whether there is such a day or not, [N]."""
    return text.str.match(r"\d{4}-\d\d-\d\d", na=False)


def to_days(column: pd.Series) -> np.ndarray:
    """Return dates as days since 1970-01-01 UTC, [N] float64; dates without a zone are in UTC."""
    times = pd.to_datetime(column, utc=True)
    unit = times.dt.unit  # nanoseconds, which pandas would take, end in the year 2262
    epoch, day = pd.Timestamp(0, tz="UTC").as_unit(unit), pd.Timedelta(days=1).as_unit(unit)
    days = (times - epoch) / day
    return days.to_numpy(np.float64, na_value=np.nan)


def odd_cell(name: str, kind: str, value: object, place: str) -> DataError:
    """Return the error of a feature's first cell that is not what most others are.

    Args:
        name: of the feature.
        kind: what the others are.
        value: of the cell.
        place: its row.
    """
    return DataError(
        f"feature {name!r} holds {kind} but also {value!r}, in {place}: "
        f"mend or empty it, or set data.categorical=[{name}]"
    )


def arrow_kind(kind: pa.DataType) -> str:
    """Return what a message calls the values of a column of Parquet."""
    types = pa.types
    if types.is_boolean(kind):
        return "booleans"
    if types.is_integer(kind) or types.is_floating(kind):
        return "numbers"
    if types.is_decimal(kind) or types.is_null(kind):
        return "numbers"
    if types.is_date(kind) or types.is_timestamp(kind):
        return "dates"
    if types.is_dictionary(kind):
        return "text"
    if types.is_string(kind) or types.is_large_string(kind):
        return "text"
    return "values"


def common_types(
    schemas: Mapping[Path, pa.Schema], names: Sequence[str]
) -> dict[str, pa.DataType]:
    """Return the type of each column, a dictionary if it is that in any file.

    Args:
        schemas: of the files.
        names: of the columns.

    Raises:
        DataError: a column is not of one kind in every file that has a value of it.
    """
    common = {}
    for name in names:
        types = {file: schema.field(name).type for file, schema in schemas.items()}
        known = {f: kind for f, kind in types.items() if not pa.types.is_null(kind)} or types
        first = next(iter(known))
        for file, kind in known.items():
            if (found := arrow_kind(kind)) != (expected := arrow_kind(known[first])):
                raise DataError(
                    f"column {name!r} holds {found} in {file} and {expected} in {first}: "
                    "give files of one kind"
                )
        common[name] = next(filter(pa.types.is_dictionary, known.values()), known[first])
    return common
