"""Parquet files as a stream: blocks of columns, read without holding a file in memory."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet

from mdn.data.blocks import BLOCK_BYTES, BLOCK_ROWS, POOL_BYTES, Block, Words
from mdn.data.checks import RowName, find_missing
from mdn.data.kinds import (
    arrow_kind,
    common_types,
    odd_cell,
    parse_days,
    to_days,
    to_number,
    to_text,
)
from mdn.data.tabular import Parquet, attempt
from mdn.errors import DataError

# Of each open column, about a page and as much of the file are in memory at a time.
_READ_AHEAD = 2**18
_COLUMN_BYTES = 2 * 2**20
LEAST_ROWS = 256


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Consecutive row groups of a file that are read together.

    Attributes:
        file: which file.
        groups: which of its row groups.
        start: number of the first row, over all files.
    """

    file: int
    groups: list[int]
    start: int


class ParquetReader:
    """Rows of Parquet files with the same columns: a `mdn.data.blocks.Reader`.

    The columns mean what they do in `mdn.data.tabular.Table`. Whether text is a date or a
    category, the first block that has some says.

    Args:
        table: the options.
        files: in the order of the rows.
        targets: the columns to predict.
        features: the columns to predict from.
    """

    def __init__(
        self, table: Parquet, files: list[Path], targets: list[str], features: list[str]
    ) -> None:
        self.files = files
        self.features = tuple(features)
        self.targets = tuple(targets)
        self.weight = table.weight
        self.used = list(dict.fromkeys([*targets, *features, *filter(None, [table.weight])]))
        self._metadata = [
            attempt(table.kind, file, pyarrow.parquet.read_metadata) for file in self.files
        ]
        self.starts = np.cumsum([0, *(m.num_rows for m in self._metadata)]).tolist()
        self.rows = self.starts[-1]
        if not self.rows:
            raise DataError(f"{table.path} has column names but no rows: give a file with rows")
        self._plan = self._pieces()
        self.pieces = len(self._plan)
        # A row takes 8 bytes a column, more or less: text is read as numbers of its dictionary.
        self._block_rows = int(
            np.clip(BLOCK_BYTES // (8 * len(self.used)), LEAST_ROWS, BLOCK_ROWS)
        )
        self.lanes = int(np.clip(POOL_BYTES // (len(self.used) * _COLUMN_BYTES), 1, 4))
        schemas = (metadata.schema.to_arrow_schema() for metadata in self._metadata)
        self._types = common_types(dict(zip(self.files, schemas, strict=True)), self.used)
        self._kinds: dict[str, str] = {}
        self._kinds = self._find_kinds(table)

    def name(self, row: int) -> str:
        file = bisect.bisect_right(self.starts, row) - 1
        return f"row {row - self.starts[file]} of {self.files[file]}"

    def read(self, piece: int) -> Iterator[Block]:
        plan = self._plan[piece]
        start = plan.start
        file = self.files[plan.file]
        for batch in self._batches(plan):
            if batch.num_rows:
                yield attempt(Parquet.kind, file, lambda _, b=batch, s=start: self._block(b, s))
            start += batch.num_rows

    def _batches(self, plan: _Piece) -> Iterator[pa.RecordBatch]:
        path = self.files[plan.file]
        try:
            with pyarrow.parquet.ParquetFile(
                path,
                metadata=self._metadata[plan.file],
                read_dictionary=[n for n in self.used if pa.types.is_string(self._types[n])],
                # Not whole columns at a time: a row group may be as large as the file.
                pre_buffer=False,
                buffer_size=_READ_AHEAD,
            ) as stream:
                yield from stream.iter_batches(
                    self._block_rows, plan.groups, self.used, use_threads=False
                )
        except (OSError, pa.ArrowException) as error:
            first = str(error).strip().partition("\n")[0]
            raise DataError(f"{path} cannot be read as Parquet: {first}") from error

    def _pieces(self) -> list[_Piece]:
        """Return the row groups in order, small ones joined."""
        plan: list[_Piece] = []
        for file, metadata in enumerate(self._metadata):
            start, size = self.starts[file], 0
            for group in range(metadata.num_row_groups):
                rows = metadata.row_group(group).num_rows
                if group and size + rows <= BLOCK_ROWS:
                    plan[-1].groups.append(group)
                    size += rows
                else:
                    plan.append(_Piece(file, [group], start))
                    size = rows
                start += rows
        return plan

    def _find_kinds(self, table: Parquet) -> dict[str, str]:
        """Return what each feature is to the model: number, days or text."""
        known = {"numbers": "number", "booleans": "number", "dates": "days"}
        kinds = {name: known.get(arrow_kind(self._types[name]), "text") for name in self.features}
        kinds |= dict.fromkeys(table.categorical, "text")
        unseen = [
            name
            for name, kind in kinds.items()
            if kind == "text"
            and name not in table.categorical
            and not pa.types.is_dictionary(self._types[name])
        ]
        batches = (batch for plan in self._plan for batch in self._batches(plan))
        start = 0
        while unseen and (batch := next(batches, None)) is not None:

            def row(i: int, start: int = start) -> str:
                return self.name(start + i)

            for name in unseen.copy():
                column = batch.column(name)
                if pa.types.is_dictionary(column.type):
                    column = column.dictionary_decode()
                series = column.to_pandas().rename(name)
                found = table.to_feature(series, row)
                if not find_missing(found).all():
                    kinds[name] = "text" if found.dtype == object else "days"
                    unseen.remove(name)
            start += batch.num_rows
        return kinds

    def _block(self, batch: pa.RecordBatch, start: int) -> Block:
        def row(i: int) -> str:
            return self.name(start + i)

        y = np.empty((batch.num_rows, len(self.targets)), np.float64)
        for i, name in enumerate(self.targets):
            y[:, i] = self._number(batch.column(name), f"target {name!r}", row)
        weight = None
        if self.weight is not None:
            label = f"weight column {self.weight!r}"
            weight = self._number(batch.column(self.weight), label, row)
        x: Any = {name: self._feature(name, batch.column(name), row) for name in self.features}
        return Block(start, x if self.features else np.zeros((len(y), 0)), y, weight)

    def _number(self, column: pa.Array, label: str, row: RowName) -> np.ndarray:
        if arrow_kind(column.type) in ("numbers", "booleans"):
            return _to_float(column)
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        return to_number(column.to_pandas(), label, row)

    def _feature(self, name: str, column: pa.Array, row: RowName) -> np.ndarray | Words:
        kind = self._kinds[name]
        if kind == "number":
            return _to_float(column)
        if kind == "days" and arrow_kind(column.type) == "dates":
            if pa.types.is_date(column.type):  # pandas would make a Python object of each
                column = column.cast(pa.timestamp("us"))
            return to_days(column.to_pandas())
        if not pa.types.is_dictionary(column.type):
            column = column.dictionary_encode()
        # Indices may be unsigned.
        codes = column.indices.cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False)
        text = to_text(column.dictionary.to_pandas())
        known = np.append([word is not None for word in text], False)
        codes = np.where(known[codes], codes, -1)
        if kind == "text":
            return Words(codes, np.where(known[:-1], text, ""))
        days = np.append(parse_days(pd.Series(text, dtype=object)), np.nan)
        odd = np.isnan(days[codes]) & (codes >= 0)
        if odd.any():
            at = int(odd.argmax())
            raise odd_cell(name, "dates", text[codes[at]], row(at))
        return days[codes]


def _to_float(column: pa.Array) -> np.ndarray:
    """Return numbers as [n] float32 where they are that, else float64; NaN where missing."""
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    elif not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type)):
        column = column.cast(pa.float64())
    values = column.to_numpy(zero_copy_only=False)
    return values if values.dtype == np.float32 else values.astype(np.float64)
