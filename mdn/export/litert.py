"""A model for LiteRT (TensorFlow Lite), e.g. on a phone or a small board."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from mdn.export.graphs import freeze, softplus
from mdn.export.portable import Answers, Format, export_portable
from mdn.model import MDN

# LiteRT's own overflows, and rounds what is small.
SUBSTITUTES = {"Softplus": softplus}


class LiteRT(Format):
    """`.tflite` files of built-in operations alone."""

    name, suffix, runtime = "litert", ".tflite", "ai_edge_litert"

    def convert(self, function: Any) -> bytes:
        graph, inputs, outputs = freeze(function, SUBSTITUTES)
        wrapped = tf.compat.v1.wrap_function(lambda: tf.import_graph_def(graph, name=""), [])
        module = tf.Module()
        module.function = wrapped.prune(list(inputs.values()), outputs)
        # The converter wants an owner of the function.
        converter = tf.lite.TFLiteConverter.from_concrete_functions([module.function], module)
        try:
            return converter.convert()
        except Exception as error:  # which quotes the caller's source
            if absent := set(re.findall(r"'tf\.(\w+)' op is neither", str(error))):
                raise ValueError(f"it has no {', '.join(sorted(absent))}") from error
            raise

    def load(self, path: str | os.PathLike[str]) -> Answers:
        from ai_edge_litert.interpreter import Interpreter

        runner = Interpreter(model_path=os.fspath(path)).get_signature_runner()

        def answer(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            return runner(**arrays)

        return answer


def export_litert(
    model: MDN,
    path: str | os.PathLike[str],
    overwrite: bool = False,
    targets: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write a folder of LiteRT files of a model, and return its path.

    The folder has `params.tflite`, `log_prob.tflite` and `mdn.json`, which states every name,
    dtype, shape and unit. Both take any number of rows, float32, in the units of the data:

    - `params`: the features (NaN where missing) to `logits` [B, K], `loc` [B, K, D] and
      `scale_tril` [B, K, D, D]. K = 1 of a single normal. As there is no decomposition of
      matrices, a low-rank mixture has `scale_diag` [B, K, D] and `factor` [B, K, D, R] in place of
      the last, and one of precisions `precision_tril` [B, K, D, D].
    - `log_prob`: the features and `y` [B, D] to `log_prob` [B], nats; NaN where an entry of y is.

    The features are `x` [B, F], or one [B] for each raw column, named as in a SavedModel. A row
    that lacks a number which no train row lacked has NaN for answers, unless the model was adapted
    with missing="indicator". Where targets are transformed, `params` is in units of the
    transformed ones. What the converter has no operations for cannot be written: features that are
    text or need float64, sequences, and models that do not compute in float32.

    The arguments and errors are those of `mdn.export.portable.export_portable`.
    """
    return export_portable(LiteRT(), model, path, overwrite, targets, config)
