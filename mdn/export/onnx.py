"""A model for ONNX Runtime and what else reads ONNX."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from mdn.export.graphs import freeze, softplus
from mdn.export.portable import Answers, Format, export_portable
from mdn.model import MDN

OPSET = 18
SUBSTITUTES = {
    "Softplus": softplus,  # whose small values round
    # For these the converter knows no operations of ONNX.
    "Erfc": lambda x: 1.0 - tf.math.erf(x),  # of GELU
    "Log1p": lambda x: tf.math.log(1.0 + x),
    "Expm1": lambda x: tf.exp(x) - 1.0,
}


class ONNX(Format):
    """`.onnx` files of the standard's operations alone."""

    name, suffix, runtime, converters = "onnx", ".onnx", "onnxruntime", ("tf2onnx", "onnx")

    def convert(self, function: Any) -> bytes:
        import onnx
        import tf2onnx

        graph, inputs, outputs = freeze(function, SUBSTITUTES)
        model, _ = tf2onnx.convert.from_graph_def(
            graph,
            input_names=list(inputs.values()),
            output_names=list(outputs.values()),
            opset=OPSET,
            tensors_to_rename={tensor: name for name, tensor in (inputs | outputs).items()},
        )
        onnx.checker.check_model(model)  # an operation it does not know is left as it is
        return model.SerializeToString()

    def load(self, path: str | os.PathLike[str]) -> Answers:
        import onnxruntime

        session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]

        def answer(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            return dict(zip(names, session.run(names, dict(arrays)), strict=True))

        return answer


def export_onnx(
    model: MDN,
    path: str | os.PathLike[str],
    overwrite: bool = False,
    targets: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write a folder of ONNX files of a model, and return its path.

    The folder has `params.onnx`, `log_prob.onnx` and `mdn.json`. What they take and return, what
    cannot be written, and the arguments and errors are those of `mdn.export.export_litert`.
    """
    return export_portable(ONNX(), model, path, overwrite, targets, config)
