"""A model for LiteRT (TensorFlow Lite), e.g. on a phone or a microcontroller's host."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from mdn.export.graphs import freeze, output_names, softplus
from mdn.export.portable import Answers, Format, export_portable
from mdn.model import MDN

# LiteRT's own overflows, and rounds what is small.
SUBSTITUTES = {"Softplus": softplus}


class LiteRT(Format):
    """`.tflite` files of built-in operations alone."""

    name, suffix, runtime = "litert", ".tflite", "ai_edge_litert"

    def convert(self, function: Any) -> bytes:
        graph = freeze(function, SUBSTITUTES)
        wrapped = tf.compat.v1.wrap_function(lambda: tf.import_graph_def(graph, name=""), [])
        inputs = [
            f"{spec.name}:0" for spec in tf.nest.flatten(function.structured_input_signature)
        ]
        pruned = wrapped.prune(inputs, output_names(function))
        module = tf.Module()
        module.function = pruned  # the converter wants an owner
        return tf.lite.TFLiteConverter.from_concrete_functions([pruned], module).convert()

    def load(self, path: str | os.PathLike[str]) -> Answers:
        from ai_edge_litert.interpreter import Interpreter

        runner = Interpreter(model_path=os.fspath(path)).get_signature_runner()

        def answer(arrays: Any) -> dict[str, np.ndarray]:
            return runner(**arrays)

        return answer


def export_litert(model: MDN, path: str | os.PathLike[str], **options: Any) -> Path:
    """Write a folder of LiteRT files of a model, and return its path.

    The folder has `params.tflite`, `log_prob.tflite` and `mdn.json`, which states every name,
    dtype, shape and unit. Both take any number of rows, float32, in the units of the data:

    - `params`: `x` [B, F], the features in their order (NaN where missing), to `logits` [B, K],
      `loc` [B, K, D] and the scale, in the form that the head states it in: `scale_tril`
      [B, K, D, D], `scale_diag` [B, K, D] (and `factor` [B, K, D, R] of a low rank), or
      `precision_tril` [B, K, D, D]. K = 1 of a single normal.
    - `log_prob`: `x` and `y` [B, D] to `log_prob` [B], nats; NaN where an entry of y is NaN.

    Features that are text or need float64, sequences, `target_transform` and models that do not
    compute in float32 cannot be written.

    The arguments and errors are those of `mdn.export.portable.export_portable`.
    """
    return export_portable(LiteRT(), model, path, **options)
