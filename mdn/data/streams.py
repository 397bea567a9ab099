"""Streams: rows that are read anew in every epoch, in memory that does not grow with the files.

A reader gives blocks of some ten thousand rows, column by column. One pass over them, before
anything is learned, checks every value and takes three sets into memory: the validation rows, the
test rows, and a uniform sample of the train rows, to which scalers, vocabularies and starting
values are fitted. Training then reads the blocks in another order in each epoch.

Shape letters: B batch, C coded columns, D targets, F features, N rows, S steps of a chunk.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from mdn.data.checks import FLOAT32_MAX, check_rows
from mdn.data.generators import Chunk, fill_chunk, python_batches
from mdn.data.pipeline import Batches, chunk_size
from mdn.data.rows import Data, Features, Rows
from mdn.errors import DataError

BLOCK_ROWS = 65_536
BLOCK_BYTES = 16 * 2**20
POOL_BYTES = 256 * 2**20
_PARTS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Words:
    """A column of categories: for each row the place of its word, so that no row is a string.

    Attributes:
        codes: [n] integers, -1 where missing.
        values: the words.
    """

    codes: np.ndarray
    values: np.ndarray

    def text(self, index: np.ndarray) -> np.ndarray:
        """Return the words of rows, [n] objects, None where missing."""
        return np.array([*self.values, None], object)[self.codes[index]]

    def slots(self, vocabulary: dict[str, int]) -> np.ndarray:
        """Return the place of each row's word in a vocabulary, [n]; 0 where it has none."""
        known = [vocabulary.get(word, 0) for word in self.values]
        return np.array([*known, 0], np.float32)[self.codes]


@dataclasses.dataclass(frozen=True)
class Block:
    """Consecutive rows as a reader gives them.

    Attributes:
        start: number of the first row.
        x: name -> [n] floats or `Words`; or a matrix [n, F].
        y: [n, D] floats; NaN is a missing entry.
        weight: [n] floats, or None.
    """

    start: int
    x: dict[str, np.ndarray | Words] | np.ndarray
    y: np.ndarray
    weight: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.y)

    def columns(self) -> Iterator[tuple[int | str, np.ndarray | Words]]:
        """Yield (name or number of a feature, its column [n])."""
        if isinstance(self.x, dict):
            yield from self.x.items()
        else:
            yield from enumerate(self.x.T)

    def take(self, index: np.ndarray) -> Rows:
        """Return the rows at `index` as those of a source in memory."""
        if isinstance(self.x, dict):
            x: Features = {
                name: c.text(index) if isinstance(c, Words) else c[index].astype(np.float64)
                for name, c in self.x.items()
            }
        else:
            x = self.x[index].astype(np.float64)
        weight = None if self.weight is None else self.weight[index].astype(np.float64)
        return Rows(x, self.y[index].astype(np.float64), weight)


class Reader(Protocol):
    """Rows in pieces that can be read in any order.

    Attributes:
        features: names of the features.
        targets: names of the D targets.
        rows: N.
        pieces: how many pieces there are; read in their order they give rows 0 to N - 1.
        lanes: how many of them may be open at a time.
    """

    features: tuple[str, ...]
    targets: tuple[str, ...]
    rows: int
    pieces: int
    lanes: int

    def read(self, piece: int) -> Iterator[Block]:
        """Yield the blocks of a piece, in order."""

    def name(self, row: int) -> str:
        """Return what a message calls a row, such as "row 3 of b.parquet"."""


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
    held_out_rows: int = 200_000
    sample_rows: int = 200_000
    shuffle_rows: int = 262_144


@dataclasses.dataclass(frozen=True)
class Stream:
    """The train rows of a reader, as `Data.stream`.

    Attributes:
        reader: where the rows come from.
        held_out: numbers of the rows that do not train, ascending.
        rows: train rows that have a target.
        complete: no train row lacks some of its targets only.
        mean_weight: of the train rows, or None.
        digest: SHA-256 of every value of every row.
        shuffle_rows: rows that are shuffled together.
    """

    reader: Reader
    held_out: np.ndarray
    rows: int
    complete: bool
    mean_weight: float | None
    digest: str
    shuffle_rows: int

    def batches(
        self,
        model: Any,
        batch_size: int,
        *,
        seed: int,
        first_epoch: int = 0,
        chunk: int | None = None,
    ) -> Batches:
        """Return an endless stream of shuffled batches; N // B of them are an epoch.

        The order is a function of (seed, epoch) alone, so that a resumed run sees the batches
        that the uninterrupted run would have seen, and reads nothing of the epochs before. Pieces
        come in random order, some at a time, and `shuffle_rows` rows of them are shuffled
        together.

        Args:
            model: its encoder says how the features are coded.
            batch_size: B.
            seed: of the order.
            first_epoch: the epoch that the stream starts with.
            chunk: S; by default as large as memory and the progress bar allow.
        """
        steps = self.rows // batch_size
        encode = _encoder(model.encoder)
        widths = [len(self.reader.features), len(self.reader.targets)]
        row_bytes = 4 * (sum(widths) + 1)
        chunk = min(chunk or chunk_size(steps, batch_size * row_bytes), steps)
        shapes: list[tuple[int, ...]] = [(chunk, batch_size, width) for width in widths]
        if self.mean_weight is not None:
            shapes.append((chunk, batch_size))
        pool = max(min(self.shuffle_rows, POOL_BYTES // row_bytes), chunk * batch_size)

        def generate() -> Iterator[Chunk]:
            for epoch in itertools.count(first_epoch):
                # Another key than that of any other use of the seed.
                rng = np.random.default_rng([seed, epoch, 0x7265_6164])
                for arrays in self._shuffled(rng, encode, pool, batch_size, chunk, steps):
                    yield fill_chunk(arrays, shapes), np.int32(len(arrays[1]) // batch_size)

        return python_batches(generate, shapes, steps, self.complete)

    def _shuffled(
        self,
        rng: np.random.Generator,
        encode: Callable,
        pool: int,
        batch_size: int,
        chunk: int,
        steps: int,
    ) -> Iterator[tuple[np.ndarray, ...]]:
        """Yield the arrays of one chunk after another, [n * B, ..] with n = S but for the last."""
        parts: list[tuple[np.ndarray, ...]] = []
        count, left = 0, steps
        for arrays in itertools.chain(self._encoded(rng, encode), [None]):
            if arrays is not None:
                parts.append(arrays)
                count += len(arrays[1])
                if count < pool:
                    continue
            whole = tuple(np.concatenate(column) for column in zip(*parts, strict=True))
            order = rng.permutation(count)
            at = 0
            while left and (size := min(chunk, left) * batch_size) <= count - at:
                yield tuple(np.take(a, order[at : at + size], axis=0) for a in whole)
                at += size
                left -= size // batch_size
            # What fills no chunk is shuffled with the rows that follow.
            parts = [tuple(np.take(a, order[at:], axis=0) for a in whole)]
            count -= at

    def _encoded(
        self, rng: np.random.Generator, encode: Callable
    ) -> Iterator[tuple[np.ndarray, ...]]:
        """Yield the train rows of each block, coded: x [n, C], y [n, D], and perhaps weights."""
        queue = iter(rng.permutation(self.reader.pieces).tolist())
        lanes = collections.deque(
            map(self.reader.read, itertools.islice(queue, self.reader.lanes))
        )
        while lanes:
            lane = lanes.popleft()
            block = next(lane, None)
            if block is None:
                lanes.extend(map(self.reader.read, itertools.islice(queue, 1)))
                continue
            lanes.append(lane)
            kept = self._trains(block)
            arrays = [encode(block.x, len(block)), block.y.astype(np.float32, copy=False)]
            if self.mean_weight is not None and block.weight is not None:
                arrays.append((block.weight / self.mean_weight).astype(np.float32))
            yield tuple(a if len(kept) == len(a) else np.take(a, kept, axis=0) for a in arrays)

    def _trains(self, block: Block) -> np.ndarray:
        """Return the positions of the rows of a block that train."""
        trains = ~np.isnan(block.y).all(axis=1)
        trains[_within(self.held_out, block) - block.start] = False
        return np.flatnonzero(trains)


def open_stream(reader: Reader, options: StreamOptions) -> Data:
    """Check every row of a reader, split the rows, and return them as `Data` with a stream.

    Raises:
        DataError: no density can be fitted to the rows; the message says which row and column.
    """
    n = reader.rows
    if n < 3:
        raise DataError(f"{n} rows cannot be split in three: give at least 3")
    if not (options.validation > 0 and options.test > 0 and options.validation + options.test < 1):
        raise DataError(
            f"data.validation={options.validation} and data.test={options.test} leave a split "
            "empty: give fractions above 0 that sum to less than 1"
        )
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
        held[_within(self.held_out, block) - block.start] = True
        trains = ~empty & ~held
        self.rows += int(trains.sum())
        self.dropped += int(empty.sum())
        self.complete &= not (missing_y.any(axis=1) & trains).any()
        if block.weight is not None:
            self.weight += float(block.weight[trains].sum(dtype=np.float64))
        for part in _PARTS:
            index = _within(self.picked[part], block) - block.start
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


def _within(numbers: np.ndarray, block: Block) -> np.ndarray:
    """Return those of the ascending row numbers that are in a block."""
    low, high = np.searchsorted(numbers, [block.start, block.start + len(block)])
    return numbers[low:high]


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


def _encoder(encoder: Any) -> Callable[[Any, int], np.ndarray]:
    """Return what codes the features of a block as `encoder.codes` does, in NumPy: [n, C]."""
    columns = getattr(encoder, "columns", ())
    vocabularies = {
        c.name: {word: slot for slot, word in enumerate(c.vocabulary, start=1)}
        for c in columns
        if c.vocabulary is not None
    }

    def encode(x: Any, n: int) -> np.ndarray:
        if not isinstance(x, dict):
            return np.asarray(x, np.float32)
        codes = np.empty((n, len(columns)), np.float32)
        for i, column in enumerate(columns):
            values = x[column.name]
            if isinstance(values, Words):
                codes[:, i] = values.slots(vocabularies[column.name])
            else:
                # Centred in float64, as the encoder does: see `mdn.features.Columns.codes`.
                codes[:, i] = (values.astype(np.float64) - column.mean) / column.scale
        return codes

    return encode
