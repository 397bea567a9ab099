"""Tables for a model that is trained already: it knows which columns it needs, and of what kind.

A file is read in blocks, so that memory does not grow with it. The order of its columns does not
matter, nor do others that it has.

Shape letters: D targets, F features.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet

from mdn.data.checks import FLOAT32_MAX, RowName, find_missing
from mdn.data.files import SUFFIXES, find_files, has_suffix
from mdn.data.kinds import looks_dated, parse_days, to_days, to_number, to_text, word
from mdn.data.rows import Features
from mdn.data.tabular import Csv, Parquet, Table, attempt
from mdn.errors import DataError

BLOCK_ROWS = 65_536
NPZ = SUFFIXES["mdn.data.arrays.Npz"]
_READ_AHEAD = 2**18
_PLAIN_NUMBER = r"-?(?!0\d)(\d+\.?\d*|\.\d+)(e[+-]?\d+)?"
# A type of number, and how it prints: 3 as 3, or 3 beside 2.5 as 3.0, or as 3.
_SPELLINGS: tuple[tuple[str, Callable[[Any], str]], ...] = (
    ("Int64", str),
    ("float64", str),
    ("float64", word),
)

Pieces = Iterator[tuple[pd.DataFrame, pa.Table, float]]  # frame, columns to keep, share read


@dataclasses.dataclass(frozen=True)
class Schema:
    """The columns that a model was trained on.

    Attributes:
        features: name -> whether it is text (a category); all others are numbers.
        targets: D names.
        matrix: whether x is a matrix [n, F], and not a mapping of columns.
    """

    features: Mapping[str, bool]
    targets: Sequence[str]
    matrix: bool


@dataclasses.dataclass(frozen=True)
class TableBlock:
    """Consecutive rows of a table, or of arrays.

    Attributes:
        x: [n, F], [n, T, F], or name -> [n] float64 or objects (str, None where missing).
        y: [n, D] or [n, T, D] float64, NaN where missing; None where no target is known.
        kept: [n, ..], the columns that were asked for, as they are.
        rows: n.
        share: of the table that is read now, from 0 to 1.
    """

    x: Features
    y: np.ndarray | None
    kept: pa.Table
    rows: int
    share: float


def find_tables(path: str) -> tuple[list[Path], type[Table]]:
    """Return the files that a path stands for, and what reads them: `Csv` or `Parquet`.

    Raises:
        DataError: there are none, or they are not of one of these kinds.
    """
    files = find_files(path, (*Csv.suffixes, *Parquet.suffixes), label="")
    kinds = {_kind_of(file) for file in files}
    if len(kinds) > 1:
        raise DataError(f"{path} has CSV and Parquet files: give files of one kind")
    return files, kinds.pop()


def find_rows(path: str) -> list[Path]:
    """Return the files that a path stands for: tables, or arrays where there are no tables.

    Raises:
        DataError: there are none, or they are not of one kind.
    """
    files = find_files(path, (*Csv.suffixes, *Parquet.suffixes, *NPZ), label="")
    if all(has_suffix(file, NPZ) for file in files):
        return files
    return find_tables(path)[0]


class TableReader:
    """Reads the columns that a schema asks for.

    Args:
        schema: what the model needs.
        path: a CSV or Parquet file, a folder of either, or a glob.
        keep: other columns to hand through.
        known: whether the targets must be there too.

    Raises:
        DataError: the path leads to no table, or a column that must be there is not.
    """

    empty = "has column names but no rows"

    def __init__(
        self, schema: Schema, path: str, keep: Sequence[str] = (), known: bool = False
    ) -> None:
        self.schema = schema
        self.path = path
        self.keep = list(dict.fromkeys(keep))
        self.files, kind = find_tables(path)
        names = kind(path=path).common_names(self.files)
        needed = [*schema.features, *(schema.targets if known else ()), *self.keep]
        if missing := [name for name in needed if name not in names]:
            listed = ", ".join(map(repr, missing))
            raise DataError(
                f"{path} lacks the column{'s' * (len(missing) > 1)} {listed}: it has "
                f"{', '.join(names)}"
            )
        self.targets = [name for name in schema.targets if name in names]
        used = list(dict.fromkeys([*schema.features, *self.targets, *self.keep]))
        # Without a column no row would be counted.
        self._used = used or names[:1]
        self._read: Callable[[Path], Pieces] = (
            self._read_csv if kind is Csv else self._read_parquet
        )

    def blocks(self) -> Iterator[TableBlock]:
        """Yield the rows in order, `BLOCK_ROWS` at a time: the same blocks each time.

        Raises:
            DataError: a file cannot be read, or a value is not what the model takes.
        """
        sizes = [file.stat().st_size for file in self.files]
        done = 0
        for file, size in zip(self.files, sizes, strict=True):
            start = 0
            for frame, kept, share in self._read(file):
                if frame.empty:
                    continue
                part = (done + share * size) / max(sum(sizes), 1)
                yield self._block(file, start, frame, kept, part)
                start += len(frame)
            done += size

    def _block(
        self, file: Path, start: int, frame: pd.DataFrame, kept: pa.Table, share: float
    ) -> TableBlock:
        def row(i: int) -> str:
            return f"row {start + i} of {file}"

        columns = {
            name: to_text(frame[name])
            if text
            else _number(frame[name], f"feature {name!r}", row, dates=True)
            for name, text in self.schema.features.items()
        }
        x: Features = columns
        if self.schema.matrix:
            x = np.empty((len(frame), len(columns)))
            for i, column in enumerate(columns.values()):
                x[:, i] = column
        y = None
        if self.targets:
            y = np.full((len(frame), len(self.schema.targets)), np.nan)
            for i, name in enumerate(self.schema.targets):
                if name in self.targets:
                    y[:, i] = _number(frame[name], f"target {name!r}", row)
        return TableBlock(x, y, kept, len(frame), share)

    def _read_csv(self, file: Path) -> Pieces:
        text = [name for name, is_text in self.schema.features.items() if is_text]
        types = self._types
        # All columns are parsed: with `usecols` pandas overlooks rows of too many cells.
        for frame, share in _csv_chunks(file, dtype=dict.fromkeys([*text, *types], str)):
            columns = frame[self.keep].astype(types)
            yield frame[self._used], pa.Table.from_pandas(columns, preserve_index=False), share

    @functools.cached_property
    def _types(self) -> dict[str, str]:
        """The types of the columns of CSV to keep that the model does not know.

        One is a number where every text of it, in all blocks, is what that number prints as: a key
        such as 00501, 1.10 or 1e5 stays text.
        """
        known = {*self.schema.features, *self.schema.targets}
        others = [name for name in self.keep if name not in known]
        fits: dict[str, set[int]] = {}
        for file in self.files if others else []:
            for frame, _ in _csv_chunks(file, dtype=str, usecols=others):
                for name in others:
                    if len(text := frame[name].dropna()):
                        fits[name] = _spellings(text, fits.get(name, {*range(len(_SPELLINGS))}))
        return {
            name: _SPELLINGS[min(fits[name])][0] if fits.get(name) else "object" for name in others
        }

    def _read_parquet(self, file: Path) -> Pieces:
        with attempt(
            Parquet.kind,
            file,
            lambda f: pyarrow.parquet.ParquetFile(f, pre_buffer=False, buffer_size=_READ_AHEAD),
        ) as stream:
            rows, done = max(stream.metadata.num_rows, 1), 0
            batches = stream.iter_batches(BLOCK_ROWS, columns=self._used, use_threads=False)
            pairs = (
                (batch.to_pandas(ignore_metadata=True), pa.Table.from_batches([batch]))
                for batch in batches
            )
            while (pair := attempt(Parquet.kind, file, lambda _: next(pairs, None))) is not None:
                frame, table = pair
                done += len(frame)
                yield frame, table.select(self.keep), done / rows


def column_of(table: pa.Table, name: str) -> np.ndarray:
    """Return a column of numbers of a table of kept columns, as [n] float64."""
    return _number(table[name].to_pandas().rename(name), f"column {name!r}", "row {}".format)


def _csv_chunks(file: Path, **options: Any) -> Iterator[tuple[pd.DataFrame, float]]:
    """Yield `BLOCK_ROWS` rows of a CSV file at a time, and the share of it that is read."""
    size = max(file.stat().st_size, 1)
    with warnings.catch_warnings(), file.open("rb") as stream:
        warnings.simplefilter("error", pd.errors.ParserWarning)  # as `Csv` has it
        chunks = attempt(
            Csv.kind,
            file,
            lambda _: pd.read_csv(
                stream,
                chunksize=BLOCK_ROWS,
                index_col=False,
                compression="gzip" if file.suffix == ".gz" else None,
                encoding="utf-8-sig",
                skipinitialspace=True,
                low_memory=False,
                float_precision="round_trip",
                **options,
            ),
        )
        while (frame := attempt(Csv.kind, file, lambda _: next(chunks, None))) is not None:
            yield frame, min(stream.tell() / size, 1.0)


def _spellings(text: pd.Series, candidates: set[int]) -> set[int]:
    """Return those of some `_SPELLINGS` by which every text is what its number prints as."""
    if not text.str.fullmatch(_PLAIN_NUMBER).all():
        return set()
    found = set()
    for i in candidates:
        kind, spell = _SPELLINGS[i]
        try:
            numbers = text.astype(kind)
        except (OverflowError, TypeError, ValueError):
            continue
        if (numbers.map(spell) == text).all():
            found.add(i)
    return found


def _kind_of(file: Path) -> type[Table]:
    for kind in (Csv, Parquet):
        if has_suffix(file, kind.suffixes):
            return kind
    raise DataError(
        f"{file} is neither CSV nor Parquet by its name: it must end in "
        f"{', '.join((*Csv.suffixes, *Parquet.suffixes))}"
    )


def _number(column: pd.Series, label: str, row: RowName, dates: bool = False) -> np.ndarray:
    """Return a column of numbers, or of dates where a feature may be one, as [n] float64."""
    if dates and (days := _days(column, label, row)) is not None:
        return days
    numbers = to_number(column, label, row)
    odd = np.abs(numbers) > FLOAT32_MAX
    if odd.any():
        i = int(odd.argmax())
        raise DataError(
            f"{label} is {numbers[i]} in {row(i)}, which float32 cannot hold: mend or empty that "
            "cell"
        )
    return numbers


def _days(column: pd.Series, label: str, row: RowName) -> np.ndarray | None:
    """Return a column of dates as [n] float64, or None if it is of numbers."""
    kind = pd.api.types.infer_dtype(column, skipna=True)
    if kind in ("datetime64", "datetime", "date"):
        return to_days(column)
    if kind != "string":
        return None
    numbers = pd.to_numeric(column, errors="coerce").notna()
    if looks_dated(column).sum() <= numbers.sum():
        return None
    days = parse_days(column)
    odd = np.isnan(days) & ~find_missing(column.to_numpy(object))
    if odd.any():
        i = int(odd.argmax())
        raise DataError(
            f"{label} is {column.iloc[i]!r} in {row(i)}, not an ISO 8601 date: "
            "mend or empty that cell"
        )
    return days
