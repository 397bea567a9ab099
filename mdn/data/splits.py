"""Splits: which rows train, validate and test, as a function of the seed.

Shape letters: N rows, M ensemble members.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd

from mdn.data.checks import RowName, check_rows
from mdn.data.kinds import to_text
from mdn.data.rows import Data, Rows
from mdn.errors import ConfigError, DataError
from mdn.split_options import fractions_mistake, key_mistake

Split = Literal["random", "time", "group", "column"]
Indices = tuple[np.ndarray, np.ndarray, np.ndarray]

_NAMES = ("train", "validation", "test")
_WORDS = {"train": 0, "validation": 1, "valid": 1, "val": 1, "test": 2}


def split_indices(
    n: int,
    split: str = "random",
    key: np.ndarray | pd.Series | None = None,
    *,
    validation: float = 0.1,
    test: float = 0.1,
    seed: int = 0,
    row: RowName = "row {}".format,
) -> Indices:
    """Return the row numbers of the train, validation and test rows, each in ascending order.

    Args:
        n: number of rows.
        split: "random", a function of (seed, n) and the fractions alone; "time", the earliest rows
            train and the latest test; "group", whole groups on one side; "column", the key says.
        key: [N], the column to split by, unless random. Time: numbers, datetimes or ISO 8601 text;
            rows of one day, or of one equal number, stay together. Column: the words train,
            validation (or valid, val) and test.
        validation: fraction of the rows, met as nearly as whole days or groups allow.
        test: likewise.
        seed: of the random order of rows or groups.
        row: what a message calls the row at a position.

    Raises:
        DataError: an option, a key or a fraction cannot be used, or a split would be empty.
    """
    if split not in ("random", "time", "group", "column"):
        raise DataError(f"data.split={split} is not one of random, time, group, column")
    if mistake := key_mistake(split, key is not None):
        raise DataError(mistake)
    unit = np.arange(n) if key is None else _units(split, key, row)
    if split == "column":
        return _take_sides(unit)

    if mistake := fractions_mistake(validation, test):
        raise DataError(mistake)
    units = unit.max(initial=-1) + 1
    if units < 3:
        what = {"random": "rows", "time": "different days or times", "group": "groups"}[split]
        raise DataError(f"{units} {what} cannot be split in three: give at least 3")
    order = np.arange(units) if split == "time" else np.random.default_rng(seed).permutation(units)
    size = np.bincount(unit)[order]
    # A unit goes where its middle row falls; each side gets at least one unit.
    middle = np.cumsum(size) - size / 2
    first, second = np.searchsorted(middle, [n * (1 - validation - test), n * (1 - test)])
    first = np.clip(first, 1, units - 2)
    second = np.clip(second, first + 1, units - 1)
    rank = np.argsort(order)[unit]  # [N], the place of a row's unit in the order
    return _take_sides(np.searchsorted([first, second], rank, side="right"))


def split_data(
    rows: Rows,
    indices: Indices,
    *,
    features: tuple[str, ...],
    targets: tuple[str, ...],
    missing: str = "error",
) -> Data:
    """Return the three splits, without the rows that have no target entry at all.

    The notes count the rows kept (`data/rows`) and dropped (`data/rows_without_target`). Weights
    are scaled to mean one over the train rows.

    Raises:
        DataError: a split is empty, or no density can be fitted to the train rows.
    """
    known = ~np.isnan(rows.y).reshape(len(rows), -1).all(axis=1)
    kept = [index[known[index]] for index in indices]
    for name, index in zip(_NAMES, kept, strict=True):
        if not len(index):
            raise DataError(f"the {name} split has no row with a target: change data.split")
    train, validation, test = (rows.take(index) for index in kept)
    try:
        check_rows(train.x, train.y, missing, features=features, targets=targets)
    except DataError as error:
        raise DataError(f"in the train rows, {error}") from None
    if train.weight is not None:
        for name, part in zip(_NAMES, (train, validation, test), strict=True):
            if part.weight is not None and not part.weight.any():
                raise DataError(f"data.weight is zero in every {name} row: change data.split")
        mean = train.weight.mean()
        train, validation, test = (
            Rows(part.x, part.y, part.weight / mean) for part in (train, validation, test)
        )
    return Data(
        train,
        validation,
        test,
        features=features,
        targets=targets,
        missing=missing,
        notes={
            "data/rows": float(sum(map(len, kept))),
            "data/rows_without_target": float(sum(map(len, indices)) - sum(map(len, kept))),
        },
    )


def thin(n: int, max_rows: int | None) -> np.ndarray:
    """Return at most `max_rows` row numbers, evenly spaced over n rows; None: all.

    Raises:
        DataError: `max_rows` is below one.
    """
    if max_rows is None or max_rows >= n:
        return np.arange(n)
    if max_rows < 1:
        raise DataError(f"data.max_rows={max_rows} leaves no row: give a positive number or null")
    return np.arange(max_rows) * n // max_rows


def _units(split: str, key: np.ndarray | pd.Series, row: RowName) -> np.ndarray:
    """Return each row's day, group or side as an integer from 0 on, [N]."""
    values = pd.Series(key).reset_index(drop=True)
    if (absent := values.isna()).any():
        place = row(int(absent.argmax()))
        raise DataError(
            f"data.split_column is missing in {place}, so that it has no side: "
            "fill it in, or set data.split=random"
        )
    if isinstance(values.dtype, pd.CategoricalDtype):
        values = values.astype(values.cat.categories.dtype)
    kind = pd.api.types.infer_dtype(values)
    if kind in ("mixed", "mixed-integer"):
        values = pd.Series(to_text(values))  # or 100 and "100" would be two groups
    elif kind in ("date", "datetime"):
        values = pd.to_datetime(values, utc=True)
    text = not pd.api.types.is_numeric_dtype(values) and values.dtype.kind != "M"
    if split == "column":
        sides = values.astype(str).str.strip().str.lower().map(_WORDS)
        _refuse(sides.isna(), values, row, "train, validation or test")
        return sides.to_numpy(int)
    if split == "time" and text:
        times = pd.to_datetime(values, utc=True, format="ISO8601", errors="coerce")
        _refuse(times.isna(), values, row, "a number or an ISO 8601 date such as 2013-12-31")
        values = times
    if split == "time" and values.dtype.kind == "M":
        # By the clock of its zone, without the zone: where clocks change, midnight may not exist.
        values = values.dt.tz_localize(None).dt.floor("D")
    return values.factorize(sort=True)[0]


def _refuse(bad: pd.Series, values: pd.Series, row: RowName, expected: str) -> None:
    if bad.any():
        i = int(bad.argmax())
        raise DataError(f"data.split_column is {values[i]!r} in {row(i)}: expected {expected}")


def _take_sides(side: np.ndarray) -> Indices:
    """Return the rows of each side, given as 0, 1 or 2, [N]."""
    train, validation, test = (np.flatnonzero(side == i) for i in range(3))
    for name, index in zip(_NAMES, (train, validation, test), strict=True):
        if not len(index):
            raise DataError(f"no row of data.split_column says {name}: each split needs rows")
    return train, validation, test


def draw_folds(order: np.ndarray, held_out: int, members: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the train and the validation rows of each member.

    Args:
        order: [N], all rows; fold m is the m-th stretch of it, and begins anew where it ends.
        held_out: size of a fold.
        members: M.

    Returns:
        [M, N - held_out] and [M, held_out] row numbers, in ascending order each.

    Raises:
        ConfigError: a fold is of all rows.
    """
    n = len(order)
    if not 0 <= held_out < n:
        raise ConfigError(f"a fold of {held_out} of {n} rows leaves none to learn from")
    places = (np.arange(members)[:, None] * held_out + np.arange(held_out)) % n  # [M, held_out]
    validation = np.sort(order[places], axis=1)
    train = np.stack([np.setdiff1d(np.arange(n), fold) for fold in validation])
    return train, validation
