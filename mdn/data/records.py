"""TFRecord files of `tf.train.Example` as a stream.

Shape letters: D targets, F features, N rows.
"""

from __future__ import annotations

import bisect
import dataclasses
import gzip
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tensorflow as tf

from mdn.data.blocks import BLOCK_BYTES, BLOCK_ROWS, Block
from mdn.data.examples import read_floats
from mdn.data.files import SUFFIXES, find_files
from mdn.data.first_pass import StreamOptions, open_stream
from mdn.data.rows import Data
from mdn.data.tabular import check_column
from mdn.errors import DataError
from mdn.split_options import STREAM

READ_BYTES = 4 * 2**20
# A record's length comes before it, and sums of both, of four bytes, after the one and the other.
_LENGTH = struct.Struct("<Q")
_HEAD, _TAIL = 12, 4
_FEW = 64  # records of one size are read one by one
# Serialised examples of any sizes; or such of one size in their frames, [n, bytes] uint8.
Records = list[bytes] | np.ndarray


@dataclasses.dataclass
class TFRecord:
    """Rows of TFRecord files, each a `tf.train.Example` of numbers; see `mdn.data.streams`.

    A feature is a list of numbers, as long in every row as in the first. x is [N, F], the lists
    one after the other. A list of floats that a row does not have is missing.

    Args:
        path: a file, a folder, or a glob; several files are read in the order of their names.
        targets: the lists to predict.
        features: the lists to predict from; default: all but the targets and the weight.
        weight: a list of one number, at least zero; scaled to mean one over the train rows.
        missing: "error", or "indicator": missing features are allowed.
        validation: fraction of the rows.
        test: fraction of the rows.
        seed: of the split and the sample.
        held_out_rows: at most so many rows validate, and so many test.
        sample_rows: so many train rows fit scalers and starting values.
        shuffle_rows: so many rows are shuffled together.
    """

    path: str | None = None
    targets: Sequence[str] | None = None
    features: Sequence[str] | None = None
    weight: str | None = None
    missing: Literal["error", "indicator"] = "error"
    validation: float = 0.1
    test: float = 0.1
    seed: int = 0
    held_out_rows: int = STREAM["held_out_rows"]
    sample_rows: int = STREAM["sample_rows"]
    shuffle_rows: int = STREAM["shuffle_rows"]

    def __post_init__(self) -> None:
        for option in ("targets", "features"):
            if isinstance(value := getattr(self, option), str):
                setattr(self, option, [value])  # data.targets=y means data.targets=[y]

    def load(self) -> Data:
        """Check, split and sample the rows.

        Raises:
            DataError: a file, a list or a value cannot be used; the message says which.
        """
        reader = TFRecordReader(self, find_files(self.path, SUFFIXES["mdn.data.records.TFRecord"]))
        return open_stream(reader, StreamOptions.of(self))


class TFRecordReader:
    """Rows of TFRecord files: a `mdn.data.blocks.Reader` whose pieces are the files.

    Args:
        source: the options.
        files: in the order of the rows.

    Raises:
        DataError: there are no rows, or an option names a list that is not in the first of them.
    """

    lanes = 4

    def __init__(self, source: TFRecord, files: list[Path]) -> None:
        if not source.targets:
            raise DataError(
                "data.targets is not set: name the lists to predict, data.targets=[...]"
            )
        self.files = files
        self.pieces = len(files)
        self.starts = np.cumsum([0, *map(self._count, range(len(files)))]).tolist()
        self.rows = self.starts[-1]
        if not self.rows:
            raise DataError(f"{source.path} has no rows: give a file with rows")
        lists = self._first_row()
        self._targets = list(source.targets)
        self._weight = source.weight
        special = {*self._targets, source.weight}
        self._features = (
            [name for name in lists if name not in special]
            if source.features is None
            else list(source.features)
        )
        options = {
            "targets": self._targets,
            "features": self._features,
            "weight": [self._weight] if self._weight else [],
        }
        for option, names in options.items():
            for name in names:
                check_column(option, name, list(lists), source.path)
                if names.count(name) > 1:
                    raise DataError(f"data.{option} names {name!r} twice: name it once")
                if not lists[name][1]:
                    raise DataError(
                        f"data.{option}: {name!r} holds no numbers in {self.name(0)}: leave it out"
                    )
        if both := [name for name in self._features if name in self._targets]:
            raise DataError(
                f"{both[0]!r} is a target and a feature: take it from data.targets or "
                "from data.features"
            )
        if self._weight and lists[self._weight][1] != 1:
            raise DataError(f"data.weight: {self._weight!r} has several numbers a row: give one")
        self.features = _number(self._features, lists)
        self.targets = _number(self._targets, lists)
        used = [*self._features, *self._targets, *options["weight"]]
        self._spec = {
            name: tf.io.FixedLenFeature(
                [lists[name][1]],
                lists[name][0],
                # There is no integer that says that there is none.
                [float("nan")] * lists[name][1] if lists[name][0] == tf.float32 else None,
            )
            for name in used
        }
        self._lengths = {name: lists[name][1] for name in used}
        self._all_floats = all(lists[name][0] == tf.float32 for name in used)
        width = len(self.features) + len(self.targets)
        self._block_rows = int(np.clip(BLOCK_BYTES // (8 * width), 256, BLOCK_ROWS // 4))

    def name(self, row: int) -> str:
        file = bisect.bisect_right(self.starts, row) - 1
        return f"row {row - self.starts[file]} of {self.files[file]}"

    def read(self, piece: int) -> Iterator[Block]:
        start = self.starts[piece]
        for records in self._blocks(piece):
            yield self._block(start, self._lists(piece, start, records))
            start += len(records)

    def _lists(self, piece: int, start: int, records: Records) -> dict[str, np.ndarray]:
        """Return the lists of consecutive records: name -> [n, length]."""
        if isinstance(records, np.ndarray):
            if self._all_floats:
                lists = read_floats(records, self._lengths, (_HEAD, _TAIL))
                if lists is not None:
                    return lists
            records = [frame[_HEAD:-_TAIL].tobytes() for frame in records]
        try:
            # Not in a tf.function, which would wait for the threads that wait for its rows.
            parsed = tf.io.parse_example(tf.constant(records, tf.string), self._spec)
        except tf.errors.OpError as error:
            raise self._explain(piece, start, error) from None
        return {name: t.numpy() for name, t in parsed.items()}

    def _blocks(self, piece: int) -> Iterator[Records]:
        """Yield the records of a file, a block at a time: those of one size as an array.

        A dataset, whose elements they are, takes five times as long. It has counted them, and
        checked their sums, before.
        """
        path = self.files[piece]
        left, records = b"", list[bytes]()
        try:
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
                while data := file.read(READ_BYTES):
                    data, at = left + data, 0
                    while at + _HEAD <= len(data):
                        end = at + _HEAD + _LENGTH.unpack_from(data, at)[0]
                        if end + _TAIL > len(data):
                            break
                        alike = self._alike(data, at, end + _TAIL - at)
                        if len(alike) >= _FEW:
                            if records:
                                yield records
                                records = []
                            yield alike
                            at += alike.size
                            continue
                        records.append(data[at + _HEAD : end])
                        at = end + _TAIL
                        if len(records) == self._block_rows:
                            yield records
                            records = []
                    left = data[at:]
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path} cannot be read as TFRecord: {error}") from None
        if left:
            raise DataError(f"{path} cannot be read as TFRecord: it ends within a record")
        if records:
            yield records

    def _alike(self, data: bytes, at: int, size: int) -> np.ndarray:
        """Return records of one size that follow each other, with their frames: [n, size]."""
        most = min((len(data) - at) // size, self._block_rows)
        rows = np.frombuffer(data, np.uint8, most * size, at).reshape(most, size)
        lengths = np.ndarray([most], "<u8", data, at, [size])
        if most < _FEW or (lengths[:_FEW] != lengths[0]).any():
            return rows[:1]
        other = lengths != lengths[0]
        return rows[: other.argmax()] if other.any() else rows

    def _block(self, start: int, lists: dict[str, np.ndarray]) -> Block:
        y = np.concatenate([lists[name] for name in self._targets], axis=1).astype(np.float64)
        x = np.zeros((len(y), 0), np.float32)
        if self._features:
            x = np.concatenate([lists[name] for name in self._features], axis=1)
        weight = None
        if self._weight:
            weight = lists[self._weight][:, 0].astype(np.float64)
        return Block(start, x if x.dtype == np.float32 else x.astype(np.float64), y, weight)

    def _records(self, piece: int) -> tf.data.TFRecordDataset:
        path = self.files[piece]
        return tf.data.TFRecordDataset(str(path), "GZIP" if path.suffix == ".gz" else "")

    def _count(self, piece: int) -> int:
        """Return how many records a file has, whole and undamaged ones."""
        path = self.files[piece]
        total = 0
        try:
            for batch in self._records(piece).batch(BLOCK_ROWS // 4):
                total += len(batch)
        except tf.errors.OpError as error:
            raise DataError(
                f"{path} cannot be read as TFRecord, after {total} rows: {_first_line(error)}"
            ) from None
        return total

    def _first_row(self) -> dict[str, tuple[tf.DType, int]]:
        """Return the type and the length of each list; of no length where it holds no numbers."""
        piece = next(i for i in range(self.pieces) if self.starts[i + 1] > self.starts[i])
        try:
            record = next(iter(self._records(piece).take(1))).numpy()
            example = tf.train.Example.FromString(record)
        except Exception as error:  # protobuf has a type of its own
            raise DataError(
                f"{self.name(0)} is no tf.train.Example: write them as such"
            ) from error
        found: dict[str, tuple[tf.DType, int]] = {}
        for name in sorted(example.features.feature):
            feature = example.features.feature[name]
            if feature.WhichOneof("kind") == "int64_list":
                found[name] = tf.int64, len(feature.int64_list.value)
            else:
                found[name] = tf.float32, len(feature.float_list.value)
        return found

    def _explain(self, piece: int, start: int, error: tf.errors.OpError) -> DataError:
        """Return an error that names the row at which a block could not be parsed."""
        try:
            for i, record in enumerate(self._records(piece).skip(start - self.starts[piece])):
                row = i
                tf.io.parse_single_example(record, self._spec)
        except tf.errors.OpError as single:
            lengths = ", ".join(f"{n}: {s.shape[0]}" for n, s in [*self._spec.items()][:8])
            return DataError(
                f"{self.name(start + row)} cannot be read ({_first_line(single)}): each row needs "
                f"lists as the first row has them, of lengths {lengths}"
            )
        return DataError(f"{self.files[piece]} cannot be read as TFRecord: {_first_line(error)}")


def _number(names: Sequence[str], lists: dict[str, tuple[Any, int]]) -> tuple[str, ...]:
    """Return a name for each number of the lists."""
    return tuple(
        name if lists[name][1] == 1 else f"{name}[{i}]"
        for name in names
        for i in range(lists[name][1])
    )


def _first_line(error: tf.errors.OpError) -> str:
    text = str(error.message or error).partition("[[")[0]
    text = text.partition("} ")[2] if text.startswith("{{function_node") else text
    return text.strip().partition("\n")[0].split(" [Op:")[0]
