"""Rows: the aligned features and targets that every source gives.

Shape letters: N rows, T time, F features, D targets.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

Features = np.ndarray | dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Rows:
    """N aligned examples.

    Attributes:
        x: [N, F] or [N, T, F] floats, or a mapping from column name to [N] (float64 numbers, or
            an object array of str with None where missing).
        y: [N, D] or [N, T, D] float64, in the user's units; NaN marks a missing entry.
        weight: [N] float64 row weights with mean one over the train rows, or None.
        label: [N] integers, a class of each row that no model sees: for pictures. Or None.
    """

    x: Features
    y: np.ndarray
    weight: np.ndarray | None = None
    label: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.y)

    def take(self, index: np.ndarray) -> Rows:
        """Return the rows at `index` ([n] integers), in that order."""
        x = {k: v[index] for k, v in self.x.items()} if isinstance(self.x, dict) else self.x[index]
        weight, label = (a if a is None else a[index] for a in (self.weight, self.label))
        return Rows(x, self.y[index], weight, label)

    def append(self, other: Rows) -> Rows:
        """Return these rows with others of the same source behind them."""

        def join(one: np.ndarray | None, two: np.ndarray | None) -> np.ndarray | None:
            return None if one is None or two is None else np.concatenate([one, two])

        if isinstance(self.x, dict):
            x: Any = {name: np.concatenate([v, other.x[name]]) for name, v in self.x.items()}
        else:
            x = np.concatenate([self.x, other.x])
        y = np.concatenate([self.y, other.y])
        return Rows(x, y, join(self.weight, other.weight), join(self.label, other.label))


def find_counted(rows: Rows) -> np.ndarray:
    """Return which rows, [N], or which steps, [N, T], have a weight and an observed target."""
    counted = ~np.isnan(rows.y).all(axis=-1)
    if rows.y.ndim == 3:
        counted &= ~np.isnan(np.asarray(rows.x)).all(axis=-1)  # a step without features is padding
    if rows.weight is not None:
        counted &= rows.weight.reshape(-1, *[1] * (counted.ndim - 1)) > 0
    return counted


@dataclasses.dataclass(frozen=True)
class ColumnNames:
    """What the columns of x and y are called; empty where nobody said.

    Attributes:
        features: F names.
        targets: D names.
    """

    features: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()


class Truth(Protocol):
    """The known density of a simulator."""

    def log_prob(self, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Return log p(y | x), [N] nats, of y [N, D] given x [N, F]."""

    def entropy(self) -> float:
        """Return the conditional entropy E[-log p(y | x)] in nats: no model can do better."""


class Stream(Protocol):
    """Train rows that are read anew in every epoch; see `mdn.data.streams`.

    Attributes:
        rows: how many there are.
        digest: SHA-256 of every row.
    """

    @property
    def rows(self) -> int: ...

    @property
    def digest(self) -> str: ...

    def batches(
        self,
        model: Any,
        batch_size: int,
        *,
        seed: int,
        first_epoch: int = 0,
        chunk: int | None = None,
    ) -> Any:
        """Return `mdn.data.chunks.Batches` whose order is a function of (seed, epoch)."""


@dataclasses.dataclass(frozen=True)
class Data:
    """What a source gives: the three splits, the names, and the truth where it is known.

    Attributes:
        train: rows to learn from; scalers, vocabularies and starting values see these alone.
        validation: rows for early stopping and learning-rate plateaus.
        test: rows that only the evaluation sees.
        features: names of the F features (or of the columns of `x`).
        targets: names of the D targets.
        missing: "error", or "indicator": how a missing feature is met (see `mdn.features`).
        truth: the density that the rows were drawn from, for simulators.
        notes: what the source counted, as flat keys for metrics.json.
        image_shape: height and width, where the D targets are the pixels of an image, row by row.
        stream: what training reads where not all rows are in memory; `train` is then a sample.
    """

    train: Rows
    validation: Rows
    test: Rows
    features: tuple[str, ...]
    targets: tuple[str, ...]
    missing: str = "error"
    truth: Truth | None = None
    notes: Mapping[str, float] = dataclasses.field(default_factory=dict)
    image_shape: tuple[int, int] | None = None
    stream: Stream | None = None

    @property
    def train_rows(self) -> int:
        """The number of rows that an epoch takes its batches from."""
        return len(self.train) if self.stream is None else self.stream.rows

    def fingerprint(self) -> str:
        """Return a SHA-256 of every row of every split, as hexadecimal."""
        digest = hashlib.sha256(b"" if self.stream is None else self.stream.digest.encode())
        for rows in (self.train, self.validation, self.test):
            columns = rows.x if isinstance(rows.x, dict) else {"": rows.x}
            for name, column in [*columns.items(), ("y", rows.y), ("weight", rows.weight)]:
                if column is None:
                    continue
                digest.update(f"{name}:{column.shape};".encode())
                if column.dtype == object:
                    digest.update("\x1f".join("" if v is None else v for v in column).encode())
                else:
                    digest.update(np.ascontiguousarray(column).tobytes())
        return digest.hexdigest()


class Source(Protocol):
    """A data source: options in the constructor, rows from `load`."""

    def load(self) -> Data:
        """Read or draw the rows, and split them."""
