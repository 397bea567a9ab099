"""The first pass over a stream: every value is checked, and three sets of rows stay in memory.

These are the validation rows, the test rows, and a uniform sample of the train rows, to which
scalers, vocabularies and starting values are fitted.

Shape letters: D targets, F features, N rows, n of a block.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import numpy as np

from mdn.data.blocks import Block, Reader, Words, within
from mdn.data.checks import FLOAT32_MAX, check_rows
from mdn.data.rows import Data, Features, Rows, Source
from mdn.data.streams import Stream
from mdn.errors import DataError
from mdn.split_options import STREAM, fractions_mistake

_PARTS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class StreamOptions:
    """How a stream is split and shuffled.

    Args:
        validation: fraction of the rows.
        test: fraction of the rows.
        seed: of the split and the sample.
        missing: "error", or "indicator": missing features are allowed.
        held_out_rows: validation and test rows are at most so many each; the others train.
        sample_rows: train rows that scalers, vocabularies and starting values see.
        shuffle_rows: rows that are shuffled together.
    """

    validation: float = 0.1
    test: float = 0.1
    seed: int = 0
    missing: str = "error"
    held_out_rows: int = STREAM["held_out_rows"]
    sample_rows: int = STREAM["sample_rows"]
    shuffle_rows: int = STREAM["shuffle_rows"]

    @classmethod
    def of(cls, source: Source) -> StreamOptions:
        """Return the options of a source, whose attributes have the same names."""
        return cls(
            **{field.name: getattr(source, field.name) for field in dataclasses.fields(cls)}
        )


def open_stream(reader: Reader, options: StreamOptions) -> Data:
    """Check every row of a reader, split the rows, and return them as `Data` with a stream.

    Raises:
        DataError: no density can be fitted to the rows; the message says which row and column.
    """
    n = reader.rows
    if n < 3:
        raise DataError(f"{n} rows cannot be split in three: give at least 3")
    if mistake := fractions_mistake(options.validation, options.test):
        raise DataError(mistake)
    held = [
        max(1, min(round(share * n), options.held_out_rows))
        for share in (options.validation, options.test)
    ]
    sample = min(options.sample_rows, n - sum(held))
    if sample < 1:
        raise DataError(f"{n} rows leave none to train: lower data.validation and data.test")
    rng = np.random.default_rng(options.seed)
    drawn = np.split(_draw(n, sample + sum(held), rng), np.cumsum(held))
    picked = {
        part: np.sort(index)
        for part, index in zip(("validation", "test", "train"), drawn, strict=True)
    }
    held_out = np.sort(np.concatenate([picked["validation"], picked["test"]]))
    scan = _Scan(reader, options, picked, held_out)
    for piece in range(reader.pieces):
        for block in reader.read(piece):
            scan.add(block)
    return scan.finish()


class _Scan:
    """The first pass: checks and counts every block, and takes the rows that stay in memory."""

    def __init__(
        self,
        reader: Reader,
        options: StreamOptions,
        picked: dict[str, np.ndarray],
        held_out: np.ndarray,
    ) -> None:
        self.reader = reader
        self.options = options
        self.picked = picked
        self.held_out = held_out
        self.parts: dict[str, list[Rows]] = {part: [] for part in _PARTS}
        self.numbers: dict[str, list[np.ndarray]] = {part: [] for part in _PARTS}
        self.absent: dict[int | str, list[int]] = {}  # feature -> [count, first row]
        self.sampled_absent: set[int | str] = set()
        self.rows = 0
        self.dropped = 0
        self.complete = True
        self.weight = 0.0
        self.digest = hashlib.sha256()

    def add(self, block: Block) -> None:
        for name, column in block.columns():
            label = f"feature {self._feature(name)!r}"
            missing = self._check(label, column, block.start)
            if missing is not None:
                count, first = self.absent.get(name, (0, block.start + int(missing.argmax())))
                self.absent[name] = [count + int(missing.sum()), first]
        missing_y = np.isnan(block.y)
        for name, column in zip(self.reader.targets, block.y.T, strict=True):
            self._check(f"target {name!r}", column, block.start)
        if block.weight is not None:
            self._check_weight(block)
        empty = missing_y.all(axis=1)
        held = np.zeros(len(block), bool)
        held[within(self.held_out, block) - block.start] = True
        trains = ~empty & ~held
        self.rows += int(trains.sum())
        self.dropped += int(empty.sum())
        self.complete &= not (missing_y.any(axis=1) & trains).any()
        if block.weight is not None:
            self.weight += float(block.weight[trains].sum(dtype=np.float64))
        for part in _PARTS:
            index = within(self.picked[part], block) - block.start
            index = index[~empty[index]]
            if part == "train":
                index = self._with_missing(block, index, trains)
            if len(index):
                self.parts[part].append(block.take(index))
                self.numbers[part].append(index + block.start)

    def finish(self) -> Data:
        reader, missing = self.reader, self.options.missing
        for name, (count, first) in self.absent.items():
            if missing == "error":
                raise DataError(
                    f"feature {self._feature(name)!r} is missing in {count} places, first in "
                    f"{reader.name(first)}: set data.missing=indicator, or drop those rows"
                )
        for part in _PARTS:
            if not self.parts[part]:
                raise DataError(f"the {part} split has no row with a target: change data.seed")
        train, validation, test = (_join(self.parts[part]) for part in _PARTS)
        numbers = np.concatenate(self.numbers["train"])
        check_rows(
            train.x,
            train.y,
            missing,
            features=reader.features,
            targets=reader.targets,
            row=lambda i: reader.name(int(numbers[i])),
        )
        mean_weight = None
        if train.weight is not None:
            mean_weight = self.weight / self.rows
            train, validation, test = (
                self._scale(part, rows, mean_weight)
                for part, rows in zip(_PARTS, (train, validation, test), strict=True)
            )
        return Data(
            train,
            validation,
            test,
            features=reader.features,
            targets=reader.targets,
            missing=missing,
            notes={
                "data/rows": float(self.rows + len(validation) + len(test)),
                "data/rows_without_target": float(self.dropped),
                "data/rows_sampled": float(len(train)),
            },
            stream=Stream(
                reader,
                self.held_out,
                self.rows,
                self.complete,
                mean_weight,
                self.digest.hexdigest(),
                self.options.shuffle_rows,
            ),
        )

    @staticmethod
    def _scale(part: str, rows: Rows, mean: float) -> Rows:
        weight = np.asarray(rows.weight)
        if not weight.any():
            raise DataError(f"data.weight is zero in every {part} row: give the rows weights")
        return dataclasses.replace(rows, weight=weight / mean)

    def _feature(self, name: int | str) -> str:
        return self.reader.features[name] if isinstance(name, int) else name

    def _check(self, label: str, column: np.ndarray | Words, start: int) -> np.ndarray | None:
        """Refuse what float32 cannot hold; return where a column is missing, [n], if it is."""
        if isinstance(column, Words):
            self.digest.update("\x1f".join(column.values).encode())
            self.digest.update(np.ascontiguousarray(column.codes).data)
            missing = column.codes < 0
            return missing if missing.any() else None
        column = np.ascontiguousarray(column)
        self.digest.update(column.data)
        low, high = column.min(), column.max()  # NaN if any is
        if low >= -FLOAT32_MAX and high <= FLOAT32_MAX:
            return None
        bad = np.abs(column) > FLOAT32_MAX
        if bad.any():
            at = int(bad.argmax())
            raise DataError(
                f"{label} is {column[at]} in {self.reader.name(start + at)}, which float32 "
                "cannot hold: mend or drop that row"
            )
        return np.isnan(column)

    def _check_weight(self, block: Block) -> None:
        weight = np.asarray(block.weight)
        self.digest.update(np.ascontiguousarray(weight).data)
        bad = ~(np.isfinite(weight) & (weight >= 0))
        if bad.any():
            at = int(bad.argmax())
            raise DataError(
                f"the weight is {weight[at]} in {self.reader.name(block.start + at)}: "
                "weights are finite and not negative"
            )

    def _with_missing(self, block: Block, index: np.ndarray, trains: np.ndarray) -> np.ndarray:
        """Add a row for each feature that is missing for the first time.

        Without one, a feature that is hardly ever missing would have no indicator.
        """
        if self.options.missing == "error":
            return index
        for name, column in block.columns():
            if name in self.absent and name not in self.sampled_absent:
                codes = column.codes if isinstance(column, Words) else column
                absent = codes < 0 if isinstance(column, Words) else np.isnan(codes)
                at = np.flatnonzero(absent & trains)[:1]
                if len(at):
                    self.sampled_absent.add(name)
                    index = np.union1d(index, at)
        return index


def _draw(n: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return different numbers below n in random order, [count], in memory O(count)."""
    if 3 * count >= n:
        return rng.permutation(n)[:count]
    drawn = np.zeros(0, np.int64)
    while len(drawn) < count:
        drawn = np.unique(np.append(drawn, rng.integers(n, size=2 * (count - len(drawn)))))
    return rng.permutation(drawn)[:count]


def _join(parts: list[Rows]) -> Rows:
    """Return the rows of all parts, in order."""
    xs: list[Any] = [part.x for part in parts]
    if isinstance(xs[0], dict):
        x: Features = {name: np.concatenate([x[name] for x in xs]) for name in xs[0]}
    else:
        x = np.concatenate(xs)
    weights = [part.weight for part in parts if part.weight is not None]
    weight = np.concatenate(weights) if weights else None
    return Rows(x, np.concatenate([part.y for part in parts]), weight)
