"""Artefacts that answer a model's questions where `mdn` is not installed."""

from mdn.export.litert import export_litert
from mdn.export.onnx import export_onnx
from mdn.export.saved_model import directory_size, export_saved_model
from mdn.export.vae import export_vae

__all__ = ["directory_size", "export_litert", "export_onnx", "export_saved_model", "export_vae"]
