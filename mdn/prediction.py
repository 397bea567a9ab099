"""Answers of a trained model for the rows of a file of any size.

The rows are read, answered and written in blocks. Each block becomes a file of its own, in a
hidden folder beside the answer, under another name until it is whole; the last step joins them.
A run that is killed goes on behind its last whole block, and never leaves half an answer.

Shape letters: B batch, N rows, D targets, P probabilities.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import tensorflow as tf
import tf_keras

import mdn
from mdn.data.array_blocks import ArrayReader
from mdn.data.checks import find_missing
from mdn.data.schema import TableBlock, TableReader
from mdn.errors import ConfigError, DataError, RunError
from mdn.inference import SIZES, largest_batch
from mdn.inputs import open_rows
from mdn.model import MDN
from mdn.runs import check_answer

QUANTILES = (0.05, 0.5, 0.95)
_FOOTER = b"mdn"


@dataclasses.dataclass
class Prediction:
    """What was written, and what should be known of it.

    Attributes:
        rows: N.
        resumed: rows that an earlier, killed run had answered.
        unseen: column -> rows whose category has no slot of its own: they take the unknown one.
        unanswered: rows that lack a number which no train row lacked; their answers are empty.
        scored: rows with a known target.
        log_prob: the sum of their log densities, in nats.
    """

    rows: int = 0
    resumed: int = 0
    unseen: dict[str, int] = dataclasses.field(default_factory=dict)
    unanswered: int = 0
    scored: int = 0
    log_prob: float = 0.0

    def add(self, counts: dict[str, Any]) -> None:
        """Count a block."""
        unseen = collections.Counter(self.unseen) + collections.Counter(counts["unseen"])
        self.unseen = dict(unseen)
        for name in ("rows", "unanswered", "scored", "log_prob"):
            setattr(self, name, getattr(self, name) + counts[name])

    def lines(self, path: str | os.PathLike[str]) -> list[str]:
        """Return what a user is told of the answer at `path`."""
        size = Path(path).stat().st_size / 1e6
        told = [f"{path}: {self.rows:,} rows, {size:.1f} MB"]
        if self.resumed:
            told.append(f"{self.resumed:,} of them were there from a command that was stopped")
        if self.scored:
            nll = -self.log_prob / self.scored
            told.append(f"NLL {nll:.4f} nats per row over the {self.scored:,} with a known target")
        for name, count in self.unseen.items():
            told.append(
                f"{name}: {count:,} rows have a category without a slot of its own, and take the "
                "one for unknown ones"
            )
        if self.unanswered:
            told.append(
                f"{self.unanswered:,} rows lack a number that no train row lacked: their answers "
                "are empty"
            )
        return told


def predict_file(
    model: MDN,
    data: str,
    output: str | os.PathLike[str],
    *,
    quantiles: Sequence[float] = QUANTILES,
    keep: Sequence[str] = (),
    overwrite: bool = False,
    identity: str = "",
    keys: tuple[str, str] = ("x", "y"),
    progress: Callable[[int, float], None] = lambda rows, share: None,
) -> Prediction:
    """Write the answers of a model for each row of a table or of arrays, in their order.

    For each target there are `<target>_mean`, `<target>_stddev` and `<target>_q<p>` in its units,
    and for all together `log_prob` in nats, where a target is known: one that is missing is
    marginalised, and without any there is no value.

    A density for each step of sequences is a row for each step, sequence by sequence: `sequence`
    and `step` count from 0, and steps of padding have no answers.

    Args:
        model: trained.
        data: a CSV or Parquet file, a folder of either, or a glob. It has the model's features;
            the order of the columns and other columns do not matter. Or `.npz` files, with arrays
            x, [N, F] or [N, T, F] for sequences, and perhaps y.
        output: a Parquet file that does not exist yet.
        quantiles: P probabilities in (0, 1).
        keep: columns to copy, such as a key; of `.npz` files arrays [N].
        overwrite: replace `output`, once the new one is whole.
        identity: of the model; with another one nothing is resumed.
        keys: what x and y are called in `.npz` files.
        progress: called after each block with the rows and the share that are done.

    Raises:
        ConfigError: the model or an argument cannot be used.
        DataError: the rows cannot be read, or lack a column.
        RunError: `output` exists, or cannot be written; or the model takes other rows.
    """
    path = Path(output)
    check_answer(path, overwrite)
    quantiles = [float(p) for p in quantiles]
    for p in quantiles:
        if not 0.0 < p < 1.0:
            raise ConfigError(f"quantile {p}: must be between 0 and 1, such as 0.9")
    if len(set(quantiles)) < len(quantiles):
        raise ConfigError(f"quantiles {quantiles}: name each once")
    reader = open_rows(model, data, keep, keys=keys)
    steps = isinstance(reader, ArrayReader) and reader.layout.steps
    answerer = _Answerer(model, quantiles, steps)
    if taken := sorted({*answerer.columns, *answerer.places, "log_prob"} & set(keep)):
        raise ConfigError(f"the answer has a column {taken[0]!r} of its own: keep others")
    parts = _Parts(path, _request(reader, quantiles, identity))
    try:
        total = _write_parts(reader, answerer, parts, progress)
        parts.join(path, {**dataclasses.asdict(total), "mdn": mdn.__version__})
    except DataError:
        parts.remove()  # the table must change, and with it the request
        raise
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error
    return total


def _write_parts(
    reader: TableReader | ArrayReader,
    answerer: _Answerer,
    parts: _Parts,
    progress: Callable[[int, float], None],
) -> Prediction:
    total = Prediction()
    for number, block in enumerate(reader.blocks()):
        counts = parts.counts(number)
        if counts is None:
            table, counts = answerer.answer(block)
            parts.write(number, table, counts)
        else:
            answerer.skip(block)
            total.resumed += counts["rows"]
        total.add(counts)
        progress(total.rows, block.share)
    if not total.rows:
        raise DataError(f"{reader.path} {reader.empty}: give a file with rows")
    return total


def _request(
    reader: TableReader | ArrayReader, quantiles: Sequence[float], identity: str
) -> dict[str, Any]:
    """Return all that the answer depends on: what is resumed must have the same."""
    files = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in reader.files]
    return {
        "mdn": mdn.__version__,
        "model": identity,
        "files": [list(file) for file in files],
        "quantiles": list(quantiles),
        "keep": reader.keep,
    }


# ---------------------------------------------------------------------- answers


class _Answerer:
    """Turns blocks into tables of answers.

    Args:
        model: trained.
        quantiles: P probabilities.
        steps: whether there is a density for each step of sequences.
    """

    def __init__(self, model: MDN, quantiles: Sequence[float], steps: bool) -> None:
        self.model = model
        size = model.head.event_size
        self.targets = list(model.column_names.targets) or [f"y{i}" for i in range(size)]
        self.names = ["mean", "stddev", *(f"q{p}" for p in quantiles)]
        self.columns = [f"{target}_{name}" for target in self.targets for name in self.names]
        self.places = ["sequence", "step"] if steps else []
        self.sequences = 0  # before this block
        probabilities = tf.constant(quantiles, tf_keras.backend.floatx())

        def answers(x: tf.Tensor, y: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            density = model(x, training=False)
            moments = [density.mean(), density.stddev()]
            if quantiles:
                moments += tf.unstack(density.quantile(probabilities), len(quantiles))
            # [B, D, 2 + P] and [B], or [B, T, D, 2 + P] and [B, T].
            return tf.stack(moments, axis=-1), density.log_prob(y)

        self.program = model.row_program(answers)
        self.batch_size = largest_batch(model.head.params_size)

    def skip(self, block: TableBlock) -> None:
        """Go on behind a block that is answered already."""
        self.sequences += block.rows

    def answer(self, block: TableBlock) -> tuple[pa.Table, dict[str, Any]]:
        """Return the answers for a block, and what is counted of it."""
        dtype = tf_keras.backend.floatx()
        x = np.asarray(self.model.encode(block.x), dtype)
        batch = x.shape[:2] if self.places else x.shape[:1]
        y = block.y
        if y is None:
            y = np.full([*batch, len(self.targets)], np.nan)
        moments = np.empty([*batch, len(self.targets), len(self.names)], dtype)
        log_prob = np.empty(batch, dtype)
        size = max(SIZES[0], self.batch_size // math.prod(x.shape[1:-1]))
        for rows, (some, density) in self.program([x, y.astype(dtype)], size):
            moments[rows], log_prob[rows] = some, density
        padding, lacking = self._unanswered(x, moments)
        blank = (padding | lacking).reshape(-1)
        columns = {
            name: pa.array(column, mask=blank)
            for name, column in zip(self.columns, moments.reshape([len(blank), -1]).T, strict=True)
        }
        known = ~np.isnan(y).all(axis=-1).reshape(-1) & ~blank
        log_prob = log_prob.reshape(-1)
        if block.y is not None:
            columns["log_prob"] = pa.array(log_prob, mask=~known)
        kept = {name: block.kept[name] for name in block.kept.column_names}
        if self.places:
            numbers, steps = np.indices(batch).reshape(2, -1)
            kept = {name: column.take(pa.array(numbers)) for name, column in kept.items()}
            places = (self.sequences + numbers, steps)
            kept |= dict(zip(self.places, map(pa.array, places), strict=True))
        self.sequences += block.rows
        counts = {
            "rows": len(blank),
            "unseen": self._unseen(block, x),
            "unanswered": int(lacking.sum()),
            "scored": int(known.sum()) if block.y is not None else 0,
            "log_prob": float(log_prob[known].sum(dtype=np.float64)),
        }
        return pa.table({**kept, **columns}), counts

    def _unanswered(self, x: np.ndarray, moments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return which densities are of padding, and which lack a number where no train row did.

        Args:
            x: encoded, [n, F] or [n, T, F].
            moments: [n, D, ..] or [n, T, D, ..].
        """
        if x.ndim == 2:
            found = self.model.lacking(x)
            none = np.zeros(len(x), bool)
            return none, none if found is None else found.numpy()
        padding = np.isnan(x).all(axis=-1)  # [n, T]
        lacking = np.isnan(moments[..., 0]).any(axis=-1)  # [n] or [n, T]
        if self.places:
            return padding, lacking & ~padding
        return np.zeros(len(x), bool), lacking | padding.all(axis=1)

    def _unseen(self, block: TableBlock, codes: np.ndarray) -> dict[str, int]:
        """Return how many rows have a category without a slot, by column; those with any."""
        if not isinstance(block.x, dict):
            return {}
        found = {
            column.name: int(((codes[:, i] == 0.0) & ~find_missing(block.x[column.name])).sum())
            for i, column in enumerate(self.model.encoder.columns)
            if column.vocabulary is not None
        }
        return {name: count for name, count in found.items() if count}


# ---------------------------------------------------------------------- files


class _Parts:
    """The whole blocks of an answer that is being written, in a hidden folder beside it.

    Args:
        path: of the answer.
        request: what it depends on; blocks of another one are removed.
    """

    def __init__(self, path: Path, request: dict[str, Any]) -> None:
        self.folder = path.resolve().with_name(f".{path.name}.partial")
        try:
            if self._stands_for(request):
                return
            self.remove()
            self.folder.mkdir()
            _write_whole(self.folder / "request.json", json.dumps(request).encode())
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror}") from error

    def _stands_for(self, request: dict[str, Any]) -> bool:
        try:
            return json.loads((self.folder / "request.json").read_text()) == request
        except (OSError, ValueError):
            return False

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:06d}.parquet"

    def counts(self, number: int) -> dict[str, Any] | None:
        """Return what was counted of a block that is there, else None."""
        try:
            metadata = pyarrow.parquet.read_metadata(self._file(number)).metadata
            return json.loads(metadata[_FOOTER])
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
            return None

    def write(self, number: int, table: pa.Table, counts: dict[str, Any]) -> None:
        table = table.replace_schema_metadata({_FOOTER: json.dumps(counts)})
        sink = pa.BufferOutputStream()
        pyarrow.parquet.write_table(table, sink)
        _write_whole(self._file(number), sink.getvalue())

    def join(self, path: Path, summary: dict[str, Any]) -> None:
        """Make one file of all blocks, whole or not at all, and remove them."""
        files = sorted(self.folder.glob("*.parquet"))
        schema = _common_schema([pyarrow.parquet.read_schema(file) for file in files])
        schema = schema.with_metadata({_FOOTER: json.dumps(summary)})
        whole = self.folder / "whole"
        with whole.open("wb") as stream, pyarrow.parquet.ParquetWriter(stream, schema) as writer:
            for file in files:
                writer.write_table(pyarrow.parquet.read_table(file).cast(schema))
            writer.close()
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(whole, path)
        self.remove()

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def _common_schema(schemas: list[pa.Schema]) -> pa.Schema:
    """Return one schema for all blocks: what a block of CSV holds, another may not."""
    plain = [schema.remove_metadata() for schema in schemas]
    try:
        return pa.unify_schemas(plain, promote_options="permissive")
    except pa.ArrowException:
        types = {field.name: field.type for schema in plain for field in schema}
        odd = {
            name
            for name in types
            if len({schema.field(name).type for schema in plain} - {pa.null()}) > 1
        }
        return pa.schema([(n, pa.string() if n in odd else t) for n, t in types.items()])


def _write_whole(path: Path, content: Any) -> None:
    partial = path.with_suffix(".writing")
    partial.write_bytes(content)
    os.replace(partial, path)


def file_identity(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file, as hexadecimal."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
