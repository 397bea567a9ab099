"""One short fit to rows in memory: a number of steps, with looks at the rows that are held out.

Shape letters: N rows, n of them, D targets, B batch, M ensemble members.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import tf_keras

from mdn import budget
from mdn.callbacks.stopping import EarlyStopping, MemberStopping
from mdn.data.chunks import Batches
from mdn.data.pipeline import evaluation_batches, training_batches
from mdn.data.rows import Rows
from mdn.ensembles import Ensemble
from mdn.model import MDN
from mdn.shared_loop import shared_fit

CHUNK = 100  # steps between two looks at the held-out rows
LOOK_ROWS = 4096  # of them at a time


def fit_folds(
    model: MDN,
    rows: Rows,
    folds: tuple[np.ndarray, np.ndarray],
    *,
    loss: Any,
    learning_rate: float,
    steps: int | None,
    batch_size: int | None,
    patience: int,
    seed: int,
    verbose: int = 0,
) -> dict[str, list[float]]:
    """Train by the loop that models of one shape share; the best weights are kept.

    Args:
        model: adapted, with M members; one that is no ensemble counts as one.
        rows: N.
        folds: as of `mdn.data.splits.draw_folds`: the rows that each member learns from, and those
            that it holds out, [M, n] each; of no rows held out the last weights are kept.
        loss: as for `MDN.compile`.
        learning_rate: the peak of Adam's cosine schedule.
        steps: train steps at most, rounded up to whole chunks; by default
            `mdn.budget.train_steps`.
        batch_size: B; by default `mdn.budget.batch_size`.
        patience: looks at the held-out rows without improvement, after which training stops.
        seed: of the order of the rows.
        verbose: as in Keras; an epoch is `CHUNK` steps.

    Returns:
        The history: name of a metric -> its value at each look.
    """
    train, held_out = folds
    arrays = model.arrays(rows)
    batch_size = batch_size or budget.batch_size(train.shape[1])
    steps = steps or budget.train_steps(train.shape[1], batch_size)
    chunk = min(CHUNK, steps)
    chunks = math.ceil(steps / chunk)
    # So often that a chunk is less than a pass: a program then serves any number of rows.
    rows_of_members = np.tile(train, [1, math.ceil(chunk * batch_size / train.shape[1])])
    order: dict[str, Any] = {"seed": seed, "steps": chunk, "chunk": chunk, "complete": True}
    stacked = isinstance(model, Ensemble)
    if stacked:
        batches = training_batches(arrays, batch_size, **order, members=rows_of_members)
    else:
        own = tuple(a[rows_of_members[0]] for a in arrays)
        batches = training_batches(own, batch_size, **order)
    looks: Batches | None = None
    callbacks: list[EarlyStopping] = []
    if held_out.size:
        looks = _held_out_batches(arrays, held_out, stacked, chunk)
        callbacks = [(MemberStopping if stacked else EarlyStopping)("val_nll", patience=patience)]
    warmup = max(1, chunk * chunks // 50)
    schedule = {
        "initial_learning_rate": 0.0,
        "warmup_target": learning_rate,
        "warmup_steps": warmup,
        "decay_steps": max(1, chunk * chunks - warmup),
    }
    return shared_fit(
        model,
        lambda: tf_keras.optimizers.Adam(tf_keras.optimizers.schedules.CosineDecay(**schedule)),
        loss,
        batches,
        looks,
        about=[schedule, batch_size, chunk],
        epochs=chunks,
        callbacks=callbacks,
        verbose=verbose,
    )


def _held_out_batches(
    arrays: tuple[np.ndarray, ...], held_out: np.ndarray, stacked: bool, chunk: int
) -> Batches:
    """Return the held-out rows, filled up to one of a few sizes by rows without a target."""
    size = held_out.shape[1]
    missing = max(256, 2 ** (size - 1).bit_length()) - size
    filler = [array[:1] for array in arrays]
    filler[1] = np.full_like(filler[1], np.nan)
    arrays = tuple(np.concatenate(pair) for pair in zip(arrays, filler, strict=True))
    rows = np.pad(held_out, [[0, 0], [0, missing]], constant_values=len(arrays[0]) - 1)
    how: dict[str, Any] = {"chunk": chunk, "complete": True}
    if stacked:
        return evaluation_batches(arrays, LOOK_ROWS, **how, members=rows)
    return evaluation_batches(tuple(a[rows[0]] for a in arrays), LOOK_ROWS, **how)
