"""The dashboard of a run: scalars, components and pictures of the model, epoch by epoch."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mdn.base import TrainedModel
from mdn.callbacks.panels import DensityPanels, Panels
from mdn.data.rows import Data
from mdn.errors import RunError


class TensorBoard(tf_keras.callbacks.Callback):
    """Writes event files for TensorBoard; a step is an epoch, counted from one.

    In `train/` and, where there is one, `validation/`: loss, nll (for a VAE elbo, reconstruction
    and kl). In `train/` besides: learning_rate, gradient_norm, and once the config as text. With
    `data` also, on a fixed sample of validation rows: components/weight_<k> and
    components/scale_<k> (means over the rows; the scale is the geometric mean over the targets),
    components/effective (the mean over the rows of exp(entropy of the weights), between 1 and K),
    the histograms components/weights and components/scales, the image density, and once the graph.
    A VAE has the components of its prior, and the images samples, reconstructions and latent.
    A run adds, in `test/` and once it is finished, the images calibration and, of a simulator,
    sbc: see `write_summary`.

    Args:
        log_dir: where to write.
        data: for the sample, and the names in the picture.
        config_text: the resolved config as YAML.
        image_every: epochs between two pictures; the last epoch has one too; 0: never.
        rows: the most rows of the sample.
        panels: what to show of the model with `data`; by default, of an `MDN`.
    """

    model: TrainedModel

    def __init__(
        self,
        log_dir: str | os.PathLike[str],
        data: Data | None = None,
        config_text: str | None = None,
        image_every: int = 1,
        rows: int = 2048,
        panels: Callable[[Data, int], Panels] = DensityPanels,
    ) -> None:
        super().__init__()
        self.log_dir = Path(log_dir)
        self.config_text = config_text
        self.image_every = image_every
        self.panels = None if data is None else panels(data, rows)
        self._writers: dict[str, tf.summary.SummaryWriter] = {}
        self._epochs = self._imaged = 0  # the last step, and the last one with a picture

    def on_train_begin(self, logs: Any = None) -> None:
        self._epochs = self._imaged = 0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if epoch == 0:  # a resumed run has it all already
            with self._errors_named(), self._writer("train").as_default(step=0):
                if self.config_text is not None:
                    tf.summary.text("config", f"```yaml\n{self.config_text}\n```")
                if self.panels is not None:
                    tf.summary.graph(self.panels.graph(self.model))

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
            for name in self.model.tracked:
                if name in logs:
                    tf.summary.scalar(name, logs[name])
            tf.summary.scalar("learning_rate", self.model.optimizer.learning_rate)
            if self.panels is not None:
                self.panels.write(self.model)
        if "val_loss" in logs:
            with self._writer("validation").as_default(step=self._epochs):
                for name in self.model.tracked:
                    if f"val_{name}" in logs:
                        tf.summary.scalar(name, logs[f"val_{name}"])

    def _writer(self, name: str) -> tf.summary.SummaryWriter:
        # Made with the first thing to write, so that no validation leaves no empty file.
        if name not in self._writers:
            self._writers[name] = tf.summary.create_file_writer(str(self.log_dir / name))
        return self._writers[name]

    def _write_image(self) -> None:
        if self.panels is None:
            return
        for tag, figure in self.panels.figures(self.model).items():
            with self._writer("train").as_default(step=self._epochs):
                tf.summary.image(tag, _pixels(figure))
        self._imaged = self._epochs


def _pixels(figure: Figure) -> np.ndarray:
    """Return a picture of the figure, [1, height, width, 3] bytes."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[np.newaxis, ..., :3]


def write_summary(
    log_dir: str | os.PathLike[str],
    paths: Iterable[Path],
    step: int,
    curve: Mapping[int, Mapping[str, float]] | None = None,
) -> None:
    """Write what is known once the epochs are over, in place of what was there; or nothing.

    Args:
        log_dir: where to write.
        paths: PNG files; those that are there become images under their names.
        step: of the images.
        curve: scalars, step -> name -> value.
    """
    pictures = [path for path in paths if path.is_file()]
    if not pictures and not curve:
        return
    if Path(log_dir).is_dir():  # of a run that was killed hereafter
        shutil.rmtree(log_dir)
    with tf.summary.create_file_writer(str(log_dir)).as_default():
        for at, values in (curve or {}).items():
            for name, value in values.items():
                tf.summary.scalar(name, value, at)
        for path in pictures:
            pixels = tf.io.decode_png(path.read_bytes(), channels=3)
            tf.summary.image(path.stem, pixels[tf.newaxis], step)
