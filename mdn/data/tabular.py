"""Tables: rows from CSV and Parquet files with named columns.

Shape letters: N rows.
"""

from __future__ import annotations

import abc
import dataclasses
import difflib
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pandas as pd
import pyarrow.parquet

from mdn.data.checks import RowName, check_rows, check_weight
from mdn.data.files import SUFFIXES, find_files
from mdn.data.kinds import common_types, read_text, to_days, to_number, to_text
from mdn.data.rows import Data, Features, Rows
from mdn.data.splits import Split, split_data, split_indices, thin
from mdn.errors import DataError
from mdn.split_options import STREAM, stream_mistake

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Table(abc.ABC):
    """Rows of one or more files with the same named columns.

    Numbers and booleans become float64. Dates become days since 1970-01-01 UTC as float64, which
    is also what an exported model takes for them. All else is a category: an object array of str
    with None where missing. If no feature column is left, x is [N, 0].

    Args:
        path: a file, a folder, or a glob; several files are read in the order of their names.
        targets: the columns to predict.
        features: the columns to predict from; default: all but the targets, the weight and the
            split column.
        categorical: feature columns to read as categories although they hold numbers or dates.
        weight: a column of row weights, at least zero; scaled to mean one over the train rows.
        missing: "error", or "indicator": missing features are allowed.
        split: how to split the rows, see `mdn.data.splits.split_indices`.
        split_column: the column to split by; none for a random split.
        validation: fraction of the rows.
        test: fraction of the rows.
        seed: of the split.
        max_rows: read evenly spaced rows, at most this many.
    """

    path: str | None = None
    targets: Sequence[str] | None = None
    features: Sequence[str] | None = None
    categorical: Sequence[str] = ()
    weight: str | None = None
    missing: Literal["error", "indicator"] = "error"
    split: Split = "random"
    split_column: str | None = None
    validation: float = 0.1
    test: float = 0.1
    seed: int = 0
    max_rows: int | None = None

    kind: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        for option in ("targets", "features", "categorical"):
            if isinstance(value := getattr(self, option), str):
                setattr(self, option, [value])  # data.targets=y means data.targets=[y]

    @abc.abstractmethod
    def _names(self, file: Path) -> list[str]:
        """Return the names of the columns."""

    @abc.abstractmethod
    def _read(self, file: Path, columns: list[str]) -> pd.DataFrame:
        """Read these columns."""

    def _read_all(self, files: list[Path], columns: list[str]) -> list[pd.DataFrame]:
        """Read these columns, each of one kind in all files."""
        return [attempt(self.kind, file, lambda f: self._read(f, columns)) for file in files]

    def load(self) -> Data:
        """Read, check and split the rows.

        Raises:
            DataError: a file, a column or a value cannot be used; the message says which.
        """
        files, targets, features = self._choose()
        options = [self.weight, self.split_column]
        used = list(dict.fromkeys([*targets, *features, *filter(None, options)]))
        frames = self._read_all(files, used)
        frame = pd.concat(frames, keys=[str(file) for file in files], names=["file", "row"])
        if frame.empty:
            raise DataError(f"{self.path} has column names but no rows: give a file with rows")
        for name in used:  # what joins columns forgets that they are categories
            if any(isinstance(part[name].dtype, pd.CategoricalDtype) for part in frames):
                frame[name] = frame[name].astype("category")
        frame = frame.iloc[thin(len(frame), self.max_rows)]

        def row(i: int) -> str:
            file, number = frame.index[i]
            return f"row {number} of {file}"  # the first row is row 0

        x: Features = {name: self.to_feature(frame[name], row) for name in features}
        if not features:
            x = np.zeros((len(frame), 0))
        y = np.column_stack([to_number(frame[name], f"target {name!r}", row) for name in targets])
        weight = None
        if self.weight is not None:
            label = f"weight column {self.weight!r}"
            weight = to_number(frame[self.weight], label, row)
            check_weight(weight, label, row)
        check_rows(x, y, self.missing, targets=targets, row=row)
        indices = split_indices(
            len(y),
            self.split,
            None if self.split_column is None else frame[self.split_column],
            validation=self.validation,
            test=self.test,
            seed=self.seed,
            row=row,
        )
        data = split_data(
            Rows(x, y, weight),
            indices,
            features=tuple(features),
            targets=tuple(targets),
            missing=self.missing,
        )
        _log_categories(data)
        return data

    def _choose(self) -> tuple[list[Path], list[str], list[str]]:
        """Return the files, and the names of the targets and of the features."""
        files = find_files(self.path, self.suffixes)
        if not self.targets:
            raise DataError(
                "data.targets is not set: name the columns to predict, data.targets=[...]"
            )
        return files, list(self.targets), self._choose_features(self.common_names(files))

    def common_names(self, files: list[Path]) -> list[str]:
        """Return the column names of the first file, which all the others have too.

        Raises:
            DataError: they have not, or a file cannot be read or has two columns of one name.
        """
        first: list[str] = []
        for file in files:
            names = attempt(self.kind, file, self._names)
            if len(twice := pd.Index(names)[pd.Index(names).duplicated()]):
                raise DataError(f"{file} has two columns named {twice[0]!r}: rename one")
            if not first:
                first = names
            if odd := sorted(set(first) ^ set(names)):
                raise DataError(
                    f"{file} and {files[0]} have different columns: "
                    f"{_shorten(odd)} in one alone; give files of one kind"
                )
        return first

    def _choose_features(self, names: list[str]) -> list[str]:
        for option in ("targets", "features", "categorical", "weight", "split_column"):
            value = getattr(self, option) or []
            wanted = [value] if isinstance(value, str) else list(value)
            for name in wanted:
                check_column(option, name, names, self.path)
                if wanted.count(name) > 1:
                    raise DataError(f"data.{option} names {name!r} twice: name it once")
        targets = self.targets or ()
        if self.features is not None:
            if both := [name for name in self.features if name in targets]:
                raise DataError(
                    f"{both[0]!r} is a target and a feature: take it from data.targets or "
                    "from data.features"
                )
            features = list(self.features)
        else:
            special = {*targets, self.weight, self.split_column}
            features = [name for name in names if name not in special]
        if odd := [name for name in self.categorical if name not in features]:
            raise DataError(
                f"data.categorical: {odd[0]!r} is not a feature: add it to data.features"
            )
        return features

    def to_feature(self, column: pd.Series, row: RowName) -> np.ndarray:
        """Return a column as [N] float64, or as an object array of str and None.

        Args:
            column: [N], named.
            row: what a message calls the row at a position.

        Raises:
            DataError: it holds neither numbers, text nor dates, or some of each.
        """
        name = column.name
        if name in self.categorical or isinstance(column.dtype, pd.CategoricalDtype):
            return to_text(column)
        kind = pd.api.types.infer_dtype(column, skipna=True)
        if kind in ("boolean", "integer", "floating", "mixed-integer-float", "decimal", "empty"):
            return column.to_numpy(np.float64, na_value=np.nan)
        if kind in ("datetime64", "datetime", "date"):
            return to_days(column)
        scalar = kind != "mixed" or column.map(pd.api.types.is_scalar).all()
        if kind not in ("string", "mixed-integer", "mixed") or not scalar:
            raise DataError(
                f"feature {name!r} holds {kind} values, not numbers, text or dates: "
                "leave it out of data.features"
            )
        return read_text(column, row)


class Csv(Table):
    """Rows of CSV files in UTF-8, with commas and a line of column names.

    Columns without a name, such as a saved index, are left out. Text whose every cell is an ISO
    8601 date counts as dates. A column that is text in one file is text in all of them. pandas
    decides what is missing: an empty cell, NA, n/a, null, NaN...
    """

    kind = "CSV"
    suffixes = SUFFIXES["mdn.data.tabular.Csv"]

    def _names(self, file: Path) -> list[str]:
        head = _head(file)
        if not head:
            raise DataError(f"{file} is empty: give a file with rows")
        if head.startswith(b"PAR1"):
            raise DataError(f"{file} is a Parquet file, not CSV: use data=parquet")
        if file.suffix != ".gz" and b"\0" in head:
            raise DataError(f"{file} is not CSV but binary, or not UTF-8: save it as CSV in UTF-8")
        line = pd.read_csv(
            file,
            header=None,
            nrows=1,
            dtype=str,
            keep_default_na=False,
            encoding="utf-8-sig",
            skipinitialspace=True,
        )
        return [name for name in line.iloc[0] if name]

    def _read_all(self, files: list[Path], columns: list[str]) -> list[pd.DataFrame]:
        frames = super()._read_all(files, columns)
        kinds = {name: {_cells(frame[name]) for frame in frames} for name in columns}
        if mixed := [name for name in columns if len(kinds[name] - {"nothing"}) > 1]:
            # 100 of a file of numbers and "100" of a file with text would be two values.
            frames = [
                attempt(self.kind, file, lambda f: self._read(f, columns, mixed)) for file in files
            ]
        return frames

    def _read(self, file: Path, columns: list[str], text: Sequence[str] = ()) -> pd.DataFrame:
        with warnings.catch_warnings():
            # More cells than names: pandas would take the first column for an index, or cut cells.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            frame = pd.read_csv(
                file,
                index_col=False,
                dtype=dict.fromkeys([*self.categorical, *text], str),
                encoding="utf-8-sig",
                skipinitialspace=True,
                low_memory=False,
                float_precision="round_trip",  # pandas 2 rounds otherwise, pandas 3 does not
            )
        return frame[columns]


@dataclasses.dataclass
class Parquet(Table):
    """Rows of Parquet files.

    Args:
        path: a file, a folder, or a glob; several files are read in the order of their names.
        targets: see `Table`.
        features: see `Table`.
        categorical: see `Table`.
        weight: see `Table`.
        missing: see `Table`.
        split: see `Table`.
        split_column: see `Table`.
        validation: see `Table`.
        test: see `Table`.
        seed: of the split; of a stream also of the sample.
        max_rows: see `Table`.
        stream: read the train rows anew in every epoch, so that memory does not grow with the
            files; see `mdn.data.streams`. `Data.train` is then a sample of them.
        held_out_rows: of a stream, at most so many rows validate, and so many test.
        sample_rows: of a stream, so many train rows fit scalers, vocabularies, starting values.
        shuffle_rows: of a stream, so many rows are shuffled together.
    """

    stream: bool = False
    held_out_rows: int = STREAM["held_out_rows"]
    sample_rows: int = STREAM["sample_rows"]
    shuffle_rows: int = STREAM["shuffle_rows"]

    kind = "Parquet"
    suffixes = SUFFIXES["mdn.data.tabular.Parquet"]

    def _names(self, file: Path) -> list[str]:
        head = _head(file)
        if not head:
            raise DataError(f"{file} is empty: give a file with rows")
        if not head.startswith(b"PAR1"):
            raise DataError(f"{file} is not a Parquet file: for CSV use data=csv")
        names = pyarrow.parquet.read_schema(file).names
        return [name for name in names if not name.startswith("__index_level_")]

    def load(self) -> Data:
        if not self.stream:
            return super().load()
        if mistake := stream_mistake(vars(self)):
            raise DataError(mistake)
        # Here, as these modules build on this one.
        from mdn.data.first_pass import StreamOptions, open_stream
        from mdn.data.parquet import ParquetReader

        reader = ParquetReader(self, *self._choose())
        data = open_stream(reader, StreamOptions.of(self))
        _log_categories(data)
        return data

    def _read_all(self, files: list[Path], columns: list[str]) -> list[pd.DataFrame]:
        schemas = {f: attempt(self.kind, f, pyarrow.parquet.read_schema) for f in files}
        common_types(schemas, columns)
        return super()._read_all(files, columns)

    def _read(self, file: Path, columns: list[str]) -> pd.DataFrame:
        with pyarrow.parquet.ParquetFile(file) as stream:
            return stream.read(columns).to_pandas(ignore_metadata=True)[columns]


def check_column(option: str, name: str, names: list[str], path: str | None) -> None:
    """Check that an option names a column that there is.

    Args:
        option: its key below `data.`.
        name: of the column.
        names: of all columns.
        path: of the files, for the message.

    Raises:
        DataError: there is no such column.
    """
    if name not in names:
        close = difflib.get_close_matches(name, names, n=3)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise DataError(
            f"data.{option}: there is no column {name!r} in {path}: {hint}It has {_shorten(names)}"
        )


def _cells(column: pd.Series) -> str:
    """Return what the cells of a column of a CSV file are."""
    if column.isna().all():
        return "nothing"
    kind = pd.api.types.infer_dtype(column, skipna=True)
    return kind if kind in ("string", "boolean") else "number"


def _log_categories(data: Data) -> None:
    """Say which columns are categories, as one that was meant to be numbers shows here."""
    columns = data.train.x if isinstance(data.train.x, dict) else {}
    text = {name: column for name, column in columns.items() if column.dtype == object}
    if text:
        counts = [f"{name} {len({*column} - {None})}" for name, column in text.items()]
        log.info("categories, and their values in the train rows: %s", _join(counts))


def _head(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(4096)


def attempt(kind: str, file: Path, read: Callable):
    """Return read(file), with what the parsers raise as one line.

    Args:
        kind: what the message calls the format.
        file: of that format.
        read: of the file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return read(file)
    except DataError:
        raise
    except Exception as error:  # pandas, pyarrow and the decompressors raise a dozen types
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DataError(f"{file} cannot be read as {kind}: {first}") from error


def _shorten(names: list[str]) -> str:
    """Return a list of column names as a phrase of bounded length."""
    return ("columns " if len(names) > 1 else "column ") + _join(names)


def _join(words: list[str], limit: int = 12) -> str:
    rest = f" and {len(words) - limit} more" if len(words) > limit else ""
    return ", ".join(words[:limit]) + rest
