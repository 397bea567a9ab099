"""Streams: rows that are read anew in every epoch, in memory that does not grow with the files.

A reader gives blocks of some ten thousand rows, column by column (`mdn.data.blocks`). One pass
over them checks every value and takes some rows into memory (`mdn.data.first_pass`). Training then
reads the blocks in another order in each epoch.

Shape letters: B batch, C coded columns, D targets, F features, N rows, S steps of a chunk.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from mdn.data.blocks import POOL_BYTES, Block, Reader, Words, within
from mdn.data.chunks import Batches, Chunk, chunk_size, float_specs
from mdn.data.generators import fill_chunk


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

        return Batches(generate, float_specs(shapes), steps, self.complete)

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
        trains[within(self.held_out, block) - block.start] = False
        return np.flatnonzero(trains)


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
