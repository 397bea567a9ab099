"""What a trained model reads: columns of a table, or arrays.

Shape letters: N rows, T time, F features, D targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf
import tf_keras

from mdn.data.array_blocks import ArrayReader, Layout
from mdn.data.files import has_suffix
from mdn.data.schema import NPZ, Schema, TableReader, find_rows
from mdn.errors import ConfigError, RunError
from mdn.features import Columns
from mdn.model import MDN


def schema_of(model: Any) -> Schema:
    """Return the columns that a model needs.

    Raises:
        RunError: it takes no table: a VAE, or sequences.
        ConfigError: it was trained on a matrix whose columns have no names.
    """
    if _rank_of(model) != 2:
        raise RunError(
            "the run takes sequences [N, T, F], which no table holds: give an .npz file with x"
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


def layout_of(model: Any, keys: tuple[str, str] = ("x", "y")) -> Layout:
    """Return the arrays that a model needs.

    Args:
        model: trained.
        keys: what x and y are called.

    Raises:
        RunError: it takes no arrays: a VAE, or columns.
    """
    sequences = _rank_of(model) == 3
    if isinstance(model.encoder, Columns):
        raise RunError("the run takes columns by their names: give a CSV or Parquet file")
    features = model.encoder.features
    one = tf.zeros([1, 1, features] if sequences else [1, features], tf_keras.backend.floatx())
    steps = model(one, training=False).batch_shape.rank == 2
    return Layout(features, model.head.event_size, sequences, steps, *keys)


def _rank_of(model: Any) -> int:
    """Return 2 of rows [N, F] and 3 of sequences [N, T, F]."""
    if not isinstance(model, MDN):
        raise RunError(f"the run holds a {type(model).__name__}, which predicts no targets")
    return model.get_build_config()["feature_rank"]


def open_rows(
    model: Any,
    path: str,
    keep: Sequence[str] = (),
    known: bool = False,
    keys: tuple[str, str] = ("x", "y"),
) -> TableReader | ArrayReader:
    """Return what reads the rows for a model: `.npz` files, or those of tables.

    Args:
        model: trained.
        path: a file, a folder or a glob.
        keep: columns, or arrays [N], to hand through.
        known: whether the targets must be there.
        keys: of arrays: what x and y are called.

    Raises:
        DataError: there are none, or something is missing.
        RunError: the model takes rows of the other kind, or none.
    """
    if has_suffix(find_rows(path)[0], NPZ):
        return ArrayReader(layout_of(model, keys), path, keep, known)
    return TableReader(schema_of(model), path, keep, known)
