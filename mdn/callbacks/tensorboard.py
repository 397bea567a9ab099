"""The dashboard of a run: scalars, components and a picture of the density, epoch by epoch.

Shape letters: N rows, D event size, K components.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras
from matplotlib.backends.backend_agg import FigureCanvasAgg
from scipy import special

from mdn.data.rows import Data, Rows
from mdn.data.splits import thin
from mdn.errors import RunError
from mdn.evaluation import find_counted
from mdn.model import MDN
from mdn.plots import density_figure


class TensorBoard(tf_keras.callbacks.Callback):
    """Writes event files for TensorBoard; a step is an epoch, counted from one.

    In `train/` and, where there is one, `validation/`: loss, nll. In `train/` besides:
    learning_rate, gradient_norm, and once the config as text. With `data` also, on a fixed sample
    of validation rows: components/weight_<k> and components/scale_<k> (means over the rows; the
    scale is the geometric mean over the targets), components/effective (the mean over the rows of
    exp(entropy of the weights), between 1 and K), the histograms components/weights and
    components/scales, the image density, and once the graph.

    Args:
        log_dir: where to write.
        data: for the sample, and the names in the picture.
        config_text: the resolved config as YAML.
        image_every: epochs between two pictures of the density; the last epoch has one too;
            0: never.
        rows: the most rows of the sample.
    """

    model: MDN

    def __init__(
        self,
        log_dir: str | os.PathLike[str],
        data: Data | None = None,
        config_text: str | None = None,
        image_every: int = 1,
        rows: int = 2048,
    ) -> None:
        super().__init__()
        self.log_dir = Path(log_dir)
        self.data = data
        self.config_text = config_text
        self.image_every = image_every
        self.sample: Rows | None = None
        if data is not None:
            held = data.validation
            self.sample = held.take(thin(len(held), rows))
        self._writers: dict[str, tf.summary.SummaryWriter] = {}
        self._epochs = self._imaged = 0  # the last step, and the last one with a picture

    def on_train_begin(self, logs: Any = None) -> None:
        self._epochs = self._imaged = 0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if epoch == 0:  # a resumed run has it all already
            with self._errors_named(), self._writer("train").as_default(step=0):
                if self.config_text is not None:
                    tf.summary.text("config", f"```yaml\n{self.config_text}\n```")
                if self.sample is not None:
                    self._write_graph(self.sample)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._epochs = epoch + 1
        with self._errors_named():
            self._write_epoch(logs or {})
            if self.image_every and self._epochs % self.image_every == 0:
                self._write_image()
            for writer in self._writers.values():
                writer.flush()  # a kill loses nothing

    def on_train_end(self, logs: Any = None) -> None:
        with self._errors_named():
            if self.image_every and self._imaged < self._epochs:
                self._write_image()
            for writer in self._writers.values():
                writer.close()
        self._writers.clear()

    @contextlib.contextmanager
    def _errors_named(self) -> Iterator[None]:
        try:
            yield
        except (OSError, tf.errors.OpError) as error:
            if str(self.log_dir) not in str(error):
                raise
            reason = str(error).partition("\n")[0].rpartition("; ")[2]
            raise RunError(
                f"cannot write {self.log_dir} ({reason}): mend that and start again with the same "
                "output_dir"
            ) from error

    def _write_epoch(self, logs: dict[str, float]) -> None:
        with self._writer("train").as_default(step=self._epochs):
            for name in ("loss", "nll", "gradient_norm"):
                if name in logs:
                    tf.summary.scalar(name, logs[name])
            tf.summary.scalar("learning_rate", self.model.optimizer.learning_rate)
            if self.sample is not None:
                self._write_components(self.sample)
        if "val_loss" in logs:
            with self._writer("validation").as_default(step=self._epochs):
                for name in ("loss", "nll"):
                    if f"val_{name}" in logs:
                        tf.summary.scalar(name, logs[f"val_{name}"])

    def _writer(self, name: str) -> tf.summary.SummaryWriter:
        # Made with the first thing to write, so that no validation leaves no empty file.
        if name not in self._writers:
            self._writers[name] = tf.summary.create_file_writer(str(self.log_dir / name))
        return self._writers[name]

    def _write_graph(self, sample: Rows) -> None:
        @tf.function
        def density(x: tf.Tensor) -> Any:
            return tuple(self.model(x, training=False).mixture_parameters())

        x = np.asarray(self.model.encode(sample.x))
        spec = tf.TensorSpec([None, *x.shape[1:]], tf_keras.backend.floatx(), name="x")
        tf.summary.graph(density.get_concrete_function(spec).graph.as_graph_def())

    def _write_components(self, sample: Rows) -> None:
        density = self.model.predict_distribution(sample.x)
        counted = find_counted(sample)  # [N] or [N, T]: a density per step, or for the last one
        logits, _, scale_tril = (p.numpy()[counted] for p in density.mixture_parameters())
        weights = special.softmax(logits, axis=-1)  # [n, K]
        diagonal = np.diagonal(scale_tril, axis1=-2, axis2=-1)  # [n, K, D]
        scales = np.exp(np.log(diagonal).mean(axis=-1))  # [n, K]
        effective = np.exp(special.entr(weights).sum(axis=-1))  # [n]
        tf.summary.scalar("components/effective", effective.mean())
        for name, values in (("weight", weights), ("scale", scales)):
            for k, mean in enumerate(values.mean(axis=0)):
                tf.summary.scalar(f"components/{name}_{k}", mean)
            tf.summary.histogram(f"components/{name}s", values)

    def _write_image(self) -> None:
        if self.data is None:
            return
        figure = density_figure(self.model, self.data, self.sample, size=(6.4, 4.0))
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba())[np.newaxis, ..., :3]
        with self._writer("train").as_default(step=self._epochs):
            tf.summary.image("density", pixels)
        self._imaged = self._epochs
