"""Splits of one set, which a process fits and scores one after the other."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mdn.cli.quiet import import_tensorflow

SPLITS = 5  # of a block: enough to be worth a compilation


@dataclasses.dataclass(frozen=True)
class Block:
    """Splits of a set, for one process.

    Attributes:
        name: of the set.
        path: of its file.
        splits: their numbers.
        overrides: of `experiment=tabular`.
    """

    name: str
    path: Path
    splits: tuple[int, ...]
    overrides: tuple[str, ...]


def make_blocks(
    paths: Mapping[str, Path], todo: Mapping[str, Sequence[int]], overrides: Sequence[str]
) -> list[Block]:
    """Return the blocks of these splits of each set: the longest first, lest one ends alone."""
    return [
        Block(name, paths[name].resolve(), tuple(todo[name][i : i + SPLITS]), tuple(overrides))
        for name in sorted(paths, key=lambda name: paths[name].stat().st_size, reverse=True)
        for i in range(0, len(todo[name]), SPLITS)
    ]


def fit_block(block: Block, report: Callable[[Any], None]) -> None:
    """Fit and score splits; report (name, split, share done), and (name, split, scores)."""
    import_tensorflow()  # here, as the process that only collects needs none
    from benchmarks.uci.scores import score

    fitter = _fitter(block.path, block.overrides)
    for split in block.splits:
        start = time.perf_counter()
        density, data, shares = fitter.fit(
            split, lambda share, split=split: report((block.name, split, share))
        )
        scores = score(density, data.test.y, np.concatenate([data.train.y, data.validation.y]))
        scores |= {"seconds": time.perf_counter() - start, "shares": shares}
        report((block.name, split, scores))


@functools.lru_cache(maxsize=1)  # blocks of one set are next to each other
def _fitter(path: Path, overrides: tuple[str, ...]) -> Any:
    from benchmarks.uci.fits import Fitter

    return Fitter(path, list(overrides))
