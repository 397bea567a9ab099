"""A model for ONNX Runtime and what else reads ONNX."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from mdn.export.graphs import freeze, output_names, softplus
from mdn.export.portable import Answers, Format, export_portable
from mdn.model import MDN

OPSET = 18
SUBSTITUTES = {
    "Softplus": softplus,
    "Erfc": lambda x: 1.0 - tf.math.erf(x),  # of GELU, which ONNX has no operation for
}


class ONNX(Format):
    """`.onnx` files of the standard's operations alone."""

    name, suffix, runtime, converters = "onnx", ".onnx", "onnxruntime", ("tf2onnx", "onnx")

    def convert(self, function: Any) -> bytes:
        import tf2onnx

        inputs = [spec.name for spec in tf.nest.flatten(function.structured_input_signature)]
        outputs = output_names(function)
        renamed = {f"{name}:0": name for name in inputs} | {t: name for name, t in outputs.items()}
        model, _ = tf2onnx.convert.from_graph_def(
            freeze(function, SUBSTITUTES),
            input_names=[f"{name}:0" for name in inputs],
            output_names=list(outputs.values()),
            opset=OPSET,
            tensors_to_rename=renamed,
        )
        return model.SerializeToString()

    def load(self, path: str | os.PathLike[str]) -> Answers:
        import onnxruntime

        session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]

        def answer(arrays: Any) -> dict[str, np.ndarray]:
            return dict(zip(names, session.run(names, dict(arrays)), strict=True))

        return answer


def export_onnx(model: MDN, path: str | os.PathLike[str], **options: Any) -> Path:
    """Write a folder of ONNX files of a model, and return its path.

    The folder has `params.onnx`, `log_prob.onnx`, and `mdn.json`, which states every name, dtype,
    shape and unit. Both take any number of rows, float32, in the units of the data:

    - `params`: `x` [B, F], the features in their order (NaN where missing), to `logits` [B, K],
      `loc` [B, K, D] and the scale, in the form that the head states it in: `scale_tril`
      [B, K, D, D], `scale_diag` [B, K, D] (and `factor` [B, K, D, R] of a low rank), or
      `precision_tril` [B, K, D, D]. K = 1 of a single normal.
    - `log_prob`: `x` and `y` [B, D] to `log_prob` [B], nats; NaN where an entry of y is NaN.

    Features that are text or need float64, sequences, `target_transform` and models that do not
    compute in float32 cannot be written.

    The arguments and errors are those of `mdn.export.portable.export_portable`.
    """
    return export_portable(ONNX(), model, path, **options)
