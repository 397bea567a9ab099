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
from mdn.data.checks import find_missing
from mdn.data.schema import Schema, TableBlock, TableReader
from mdn.errors import ConfigError, DataError, RunError
from mdn.features import Columns
from mdn.inference import largest_batch
from mdn.model import MDN
from mdn.runs import check_output

QUANTILES = (0.05, 0.5, 0.95)
_FOOTER = b"mdn"


@dataclasses.dataclass
class Prediction:
    """What was written, and what should be known of it.

    Attributes:
        rows: N.
        resumed: rows that an earlier, killed run had answered.
        unseen: column -> rows whose category has no slot of its own: they take the unknown one.
        unanswered: rows that lack a feature which no train row lacked; their answers are empty.
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
                f"{self.unanswered:,} rows lack a feature that no train row lacked: their answers "
                "are empty"
            )
        return told


def schema_of(model: Any) -> Schema:
    """Return the columns that a model needs.

    Raises:
        RunError: it takes no table: a VAE, or sequences.
        ConfigError: it was trained on a matrix whose columns have no names.
    """
    if not isinstance(model, MDN):
        raise RunError(f"the run holds a {type(model).__name__}, which predicts no targets")
    if model.get_build_config()["feature_rank"] != 2:
        raise RunError(
            "the run takes sequences [N, T, F], which no table holds: use mdn.load and "
            "model.predict_distribution"
        )
    names = model.column_names
    if isinstance(model.encoder, Columns):
        features = {c.name: c.vocabulary is not None for c in model.encoder.columns}
    else:
        features = dict.fromkeys(names.features, False)
        if len(features) != model.encoder.features:
            raise ConfigError("the run does not name its features: use model.predict_distribution")
    if len(names.targets) != model.head.event_size:
        raise ConfigError("the run does not name its targets: use model.predict_distribution")
    return Schema(features, names.targets, matrix=not isinstance(model.encoder, Columns))


def predict_file(
    model: MDN,
    data: str,
    output: str | os.PathLike[str],
    *,
    quantiles: Sequence[float] = QUANTILES,
    keep: Sequence[str] = (),
    overwrite: bool = False,
    identity: str = "",
    progress: Callable[[int, float], None] = lambda rows, share: None,
) -> Prediction:
    """Write the answers of a model for each row of a table, in its order.

    For each target there are `<target>_mean`, `<target>_stddev` and `<target>_q<p>` in its units,
    and for all together `log_prob` in nats, where the table has a target column: a target that is
    missing is marginalised, and without any there is no value.

    Args:
        model: trained.
        data: a CSV or Parquet file, a folder of either, or a glob. It has the model's features;
            the order of the columns and other columns do not matter.
        output: a Parquet file that does not exist yet.
        quantiles: P probabilities in (0, 1).
        keep: columns of the table to copy, such as a key.
        overwrite: replace `output`, once the new one is whole.
        identity: of the model; with another one nothing is resumed.
        progress: called after each block with the rows and the share that are done.

    Raises:
        ConfigError: the model or an argument cannot be used.
        DataError: the table cannot be read, or lacks a column.
        RunError: `output` exists, or cannot be written.
    """
    path = Path(output)
    check_output(path, overwrite)
    quantiles = [float(p) for p in quantiles]
    for p in quantiles:
        if not 0.0 < p < 1.0:
            raise ConfigError(f"quantile {p}: must be between 0 and 1, such as 0.9")
    if len(set(quantiles)) < len(quantiles):
        raise ConfigError(f"quantiles {quantiles}: name each once")
    schema = schema_of(model)
    reader = TableReader(schema, data, keep)
    answerer = _Answerer(model, schema, quantiles)
    if taken := sorted({*answerer.columns, "log_prob"} & set(keep)):
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
    reader: TableReader,
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
            total.resumed += block.rows
        total.add(counts)
        progress(total.rows, block.share)
    if not total.rows:
        raise DataError(f"{reader.path} has column names but no rows: give a file with rows")
    return total


def _request(reader: TableReader, quantiles: Sequence[float], identity: str) -> dict[str, Any]:
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
    """Turns blocks into tables of answers."""

    def __init__(self, model: MDN, schema: Schema, quantiles: Sequence[float]) -> None:
        self.model = model
        self.schema = schema
        self.names = ["mean", "stddev", *(f"q{p:g}" for p in quantiles)]
        self.columns = [f"{target}_{name}" for target in schema.targets for name in self.names]
        probabilities = tf.constant(quantiles, tf_keras.backend.floatx())

        def answers(x: tf.Tensor, y: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            density = model(x, training=False)
            moments = [density.mean(), density.stddev()]
            if quantiles:
                moments += tf.unstack(density.quantile(probabilities), len(quantiles))
            return tf.stack(moments, axis=-1), density.log_prob(y)  # [B, D, 2 + P], [B]

        self.program = model.row_program(answers)
        self.batch_size = largest_batch(model.head.params_size)

    def answer(self, block: TableBlock) -> tuple[pa.Table, dict[str, Any]]:
        """Return the answers for a block, and what is counted of it."""
        dtype = tf_keras.backend.floatx()
        x = np.asarray(self.model.encode(block.x), dtype)
        y = block.y
        if y is None:
            y = np.full([block.rows, len(self.schema.targets)], np.nan)
        moments = np.empty([block.rows, len(self.schema.targets), len(self.names)], dtype)
        log_prob = np.empty([block.rows], dtype)
        for rows, (some, density) in self.program([x, y.astype(dtype)], self.batch_size):
            moments[rows], log_prob[rows] = some, density
        found = self.model.lacking(x)
        lacking = np.zeros(len(x), bool) if found is None else found.numpy()
        columns = {
            name: pa.array(column, mask=lacking)
            for name, column in zip(self.columns, moments.reshape([block.rows, -1]).T, strict=True)
        }
        known = ~np.isnan(y).all(axis=1) & ~lacking
        if block.y is not None:
            columns["log_prob"] = pa.array(log_prob, mask=~known)
        for name in block.kept.column_names:
            columns[name] = block.kept[name]
        counts = {
            "rows": block.rows,
            "unseen": self._unseen(block, x),
            "unanswered": int(lacking.sum()),
            "scored": int(known.sum()) if block.y is not None else 0,
            "log_prob": float(log_prob[known].sum(dtype=np.float64)),
        }
        order = [
            *block.kept.column_names,
            *(n for n in columns if n not in block.kept.column_names),
        ]
        return pa.table({name: columns[name] for name in order}), counts

    def _unseen(self, block: TableBlock, codes: np.ndarray) -> dict[str, int]:
        """Return how many rows have a category without a slot, by column; those with any."""
        if not isinstance(block.x, dict):
            return {}
        found = {
            name: int(((codes[:, i] == 0.0) & ~find_missing(block.x[name])).sum())
            for i, (name, text) in enumerate(self.schema.features.items())
            if text
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
