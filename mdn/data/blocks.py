"""Blocks: what a reader gives of files larger than memory, some ten thousand rows at a time.

Shape letters: D targets, F features, N rows, n of a block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from mdn.data.rows import Features, Rows

BLOCK_ROWS = 65_536
BLOCK_BYTES = 16 * 2**20
POOL_BYTES = 256 * 2**20


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


def within(numbers: np.ndarray, block: Block) -> np.ndarray:
    """Return those of the ascending row numbers that are in a block."""
    low, high = np.searchsorted(numbers, [block.start, block.start + len(block)])
    return numbers[low:high]
