"""What `mdn` itself trains: the model, the network under it with a cheap loss, ensembles, streams.

Shape letters: N rows, B batch, D event size, P parameters.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tensorflow as tf
import tf_keras

import mdn
from benchmarks.speed.workloads import EPSILON, LEARNING_RATE, MIN_SCALE, Problem
from mdn.base import TrainedModel
from mdn.data.pipeline import training_batches
from mdn.data.rows import Rows
from mdn.inference import RowProgram


def with_start(problem: Problem, head: str = "Mixture") -> Problem:
    """Return the problem with the weights that `mdn` starts from, for all contenders.

    Raises:
        RuntimeError: the model would scale the rows once more than the peers do.
    """
    tf_keras.utils.set_random_seed(0)
    model = _model(problem, head)
    standard = {
        "y_loc": (model.head.y_loc, 0.0),
        "y_scale": (model.head.y_scale, 1.0),
        "floor": (model.head.floor, MIN_SCALE),
        "x mean": (model.encoder.mean, 0.0),
        "x scale": (model.encoder.inverse_scale, 1.0),
    }
    for name, (found, expected) in standard.items():
        if not np.allclose(found, expected, rtol=0.0, atol=1e-6):
            raise RuntimeError(f"{name} is {found.numpy()} and not {expected}: no equal terms")
    *weights, kernel, bias = [weight.numpy() for weight in _weights(model)]
    return dataclasses.replace(problem, weights=(*weights, kernel.T, bias))


def _model(problem: Problem, head: str) -> mdn.MDN:
    w = problem.workload
    model = mdn.MDN(
        getattr(mdn.heads, head)(
            event_size=w.targets,
            components=w.components,
            positivity="softplus",
            min_scale=MIN_SCALE,
        ),
        mdn.backbones.MLP(widths=w.widths, activation="tanh"),
    )
    model.adapt(problem.x, problem.y)
    model.compile(tf_keras.optimizers.Adam(LEARNING_RATE, epsilon=EPSILON))
    return model


def _weights(model: mdn.MDN) -> list[tf.Variable]:
    return [*model.backbone.trainable_weights, model.head.kernel, model.head.bias]


class OnArrays:
    """What `fit` on arrays trains, whatever the model."""

    problem: Problem
    model: TrainedModel

    def train(self, epochs: int, shuffle: bool = True) -> None:
        p, batch = self.problem, self.problem.workload.batch
        self.model.fit(p.x, p.y, batch_size=batch, epochs=epochs, verbose=0, shuffle=shuffle)


class Ours(OnArrays):
    """`mdn.MDN` and `fit` on arrays, as the README has it."""

    head = "Mixture"

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.model = _model(problem, self.head)
        *weights, kernel, bias = problem.weights
        values = [*weights, kernel.T, bias]  # a head has its kernel as [P, H]
        for variable, value in zip(_weights(self.model), values, strict=True):
            variable.assign(value)

    def loss(self, rows: int) -> float:
        x, y = self.problem.x[:rows], self.problem.y[:rows]
        return float(np.mean(self.model.row_losses(Rows(x, y))))


class OursPrecision(Ours):
    """The same with the head whose triangles are factors of the precision."""

    head = "MixturePrecision"


class SquaresModel(TrainedModel):
    """The network of a workload, trained to put out its targets over and over, for comparison.

    Args:
        backbone: [B, F] -> [B, H].
        outputs: P.
    """

    def __init__(self, backbone: tf_keras.Model, outputs: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.projection = tf_keras.layers.Dense(outputs)

    def call(self, inputs: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        return self.projection(self.backbone(inputs, training=training))  # [B, P]

    def forward(
        self, x: Any, y: Any, sample_weight: Any, training: bool
    ) -> tuple[tf.Tensor, tf.Tensor]:
        outputs = self(x, training=training)
        copies = -(-outputs.shape[-1] // y.shape[-1])
        target = tf.tile(y, [1, copies])[:, : outputs.shape[-1]]
        loss = tf.reduce_mean(tf.reduce_sum(tf.square(outputs - target), axis=-1))
        self._trackers.loss.update_state(loss)
        return loss, outputs

    def as_arrays(
        self, x: Any, y: Any = None, sample_weight: Any = None
    ) -> tuple[np.ndarray, ...]:
        return x, y


class Network(OnArrays):
    """The same network, optimizer and loop with a sum of squares for a loss: a floor."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        w = problem.workload
        backbone = mdn.backbones.MLP(widths=w.widths, activation="tanh")
        self.model = SquaresModel(backbone, w.outputs)
        self.model(problem.x[:1])
        self.model.compile(tf_keras.optimizers.Adam(LEARNING_RATE, epsilon=EPSILON))


class Scores(Ours):
    """What `mdn` says of rows it is given: their log densities, or the means."""

    def __init__(self, problem: Problem, question: str) -> None:
        super().__init__(problem)
        self.question = question

    def train(self, epochs: int, shuffle: bool = False) -> None:
        for _ in range(epochs):
            if self.question == "log_prob":
                self.model.log_prob(self.problem.x, self.problem.y)
            else:
                self.model.predict(self.problem.x, verbose=0)


class Forward(Network):
    """The network alone: its P outputs for all rows, by the same batches as `Scores`."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.program = RowProgram(self.model.call, jit_compile=True)

    def train(self, epochs: int, shuffle: bool = False) -> None:
        for _ in range(epochs):
            for _, outputs in self.program([self.problem.x], self.problem.workload.batch):
                outputs.numpy()


class Members(OnArrays):
    """An ensemble of the model, all members in one program.

    Args:
        problem: rows.
        members: M.
    """

    def __init__(self, problem: Problem, members: int) -> None:
        ensembles = importlib.import_module("mdn.ensembles")
        self.problem = problem
        self.model = ensembles.Ensemble(_model(problem, "Mixture"), members=members)
        self.model.adapt(problem.x, problem.y)
        self.model.compile(tf_keras.optimizers.Adam(LEARNING_RATE, epsilon=EPSILON))


class FromFiles:
    """The model on rows of files, as `data=parquet` and `data=tfrecord` read them.

    Args:
        problem: its sizes.
        source: takes `path` and `targets`, and reads the files.
        folder: with the files that `write_parquet` and `write_records` wrote.
    """

    def __init__(self, problem: Problem, source: Callable[..., Any], folder: Path) -> None:
        w = problem.workload
        targets = [f"y{i}" for i in range(w.targets)]
        data: Any = source(path=str(folder), targets=targets).load()
        self.model = mdn.MDN(
            mdn.heads.Mixture(w.targets, w.components, min_scale=MIN_SCALE),
            mdn.backbones.MLP(widths=w.widths, activation="tanh"),
        )
        self.model.adapt(data.train.x, data.train.y)
        self.model.compile(tf_keras.optimizers.Adam(LEARNING_RATE, epsilon=EPSILON))
        if data.stream is not None:
            self.batches = data.stream.batches(self.model, w.batch, seed=0)
        else:
            arrays = self.model.arrays(data.train)
            complete = self.model.is_complete(arrays)
            self.batches = training_batches(arrays, w.batch, seed=0, complete=complete)
        self.steps = self.batches.steps

    def train(self, epochs: int) -> None:
        self.model.fit(self.batches, epochs=epochs, verbose=0)


def _columns(problem: Problem) -> dict[str, np.ndarray]:
    """Return the columns x0, x1, .., y0, y1, ..; [N] each."""
    columns = {f"x{i}": column for i, column in enumerate(problem.x.T)}
    return columns | {f"y{i}": column for i, column in enumerate(problem.y.T)}


def write_records(problem: Problem, folder: Path, files: int = 4) -> None:
    """Write the rows to TFRecord files, each column as lists of one number."""
    columns = _columns(problem)
    for i, rows in enumerate(np.array_split(np.arange(len(problem.x)), files)):
        with tf.io.TFRecordWriter(str(folder / f"part{i}.tfrecord")) as file:
            for row in zip(*(column[rows] for column in columns.values()), strict=True):
                example = tf.train.Example()
                for name, value in zip(columns, row, strict=True):
                    example.features.feature[name].float_list.value.append(value)
                file.write(example.SerializeToString())


def write_parquet(problem: Problem, folder: Path, files: int = 4) -> None:
    """Write the rows to Parquet files with the columns x0, x1, .., y0, y1, .."""
    frame = pd.DataFrame(_columns(problem))
    for i, rows in enumerate(np.array_split(np.arange(len(frame)), files)):
        frame.iloc[rows].to_parquet(folder / f"part{i}.parquet")
