"""A SavedModel that answers calls: several of one kind at once."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydantic

from mdn.errors import RunError
from mdn.serving.calls import Call, RequestError, Signature, Spec
from mdn.trust import load_saved_model

DTYPES = ("float32", "float64", "int32", "string")


def find_saved_model(run: str | os.PathLike[str]) -> Path:
    """Return the SavedModel of a run, or of a path that is one itself.

    Raises:
        RunError: there is none.
    """
    path = Path(run)
    if not path.is_dir():
        raise RunError(f"{run} is no folder: give a run, or what mdn export wrote")
    for place in (path, path / "saved_model"):
        if (place / "saved_model.pb").is_file():
            return place
    if (path / ".hydra").is_dir():
        raise RunError(f"{run} has no saved_model/: write it with mdn export {run}")
    raise RunError(f"{run} is neither a run nor a SavedModel: it has no saved_model.pb")


class Feature(pydantic.BaseModel):
    """An input of every signature, and what the train rows said of it.

    Attributes:
        input: its name.
        column: the raw column that it takes; None: the input is a matrix of all features.
        dtype: "float32", "float64" or "string".
        shape: None is free.
        vocabulary: the categories with a slot of their own, most frequent first.
        mean: of a number, or of each feature of a matrix.
        scale: its standard deviation.
    """

    input: str
    column: str | None
    dtype: str
    shape: list[int | None]
    vocabulary: list[str] | None = None
    mean: float | list[float] | None = None
    scale: float | list[float] | None = None


class About(pydantic.BaseModel):
    """What a client needs to know of a model's inputs and targets, from its `mdn.json`."""

    features: list[Feature]
    feature_names: list[str] = []
    targets: list[str]
    target_transform: Any = None


class ServedModel:
    """A SavedModel of `mdn` in memory.

    Args:
        path: the folder with `saved_model.pb` and `mdn.json`.

    Attributes:
        about: what `mdn.json` says of its inputs and targets.
        signatures: name -> signature, `serving_default` first where there is one.

    Raises:
        RunError: see `mdn.trust.load_saved_model`; or a signature takes what no request can hold.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        # The functions live as long as what was loaded.
        self._loaded = load_saved_model(path)
        try:
            self.about = About.model_validate(self._loaded.description)
        except pydantic.ValidationError as error:
            what = ".".join(map(str, error.errors()[0]["loc"]))
            raise RunError(f"{path}/mdn.json: {what} is wrong: export the run again") from error
        self._functions = dict(self._loaded.model.signatures)
        features = [feature.input for feature in self.about.features]
        event_size = _event_size(self._functions) or len(self.about.targets) or None
        if not self.about.targets and event_size:
            self.about.targets = [f"y{i}" for i in range(event_size)]
        components = _components(self._functions)
        self.signatures = {
            name: Signature(
                name,
                _specs(function.structured_input_signature[1], event_size, features),
                _specs(function.structured_outputs, event_size),
                components,
            )
            for name, function in sorted(
                self._functions.items(), key=lambda item: item[0] != "serving_default"
            )
        }
        for signature in self.signatures.values():
            for name, spec in signature.inputs.items():
                if spec.dtype not in DTYPES:
                    raise RunError(f"{path}: input {name} of {signature.name} is {spec.dtype}")

    def answer(self, calls: Sequence[Call]) -> list[dict[str, np.ndarray]]:
        """Return the outputs of each call, by name.

        Args:
            calls: with one `key`; they are one batch.

        Raises:
            RequestError: the model refuses the values, or has no memory for them.
        """
        import tensorflow as tf

        signature, shared = calls[0].signature, calls[0].shared
        rows = {
            name: np.concatenate([call.rows[name] for call in calls]) for name in calls[0].rows
        }
        inputs = {name: tf.constant(value) for name, value in {**rows, **shared}.items()}
        try:
            outputs = self._functions[signature.name](**inputs)
            arrays = {name: value.numpy() for name, value in outputs.items()}
        except tf.errors.ResourceExhaustedError as error:
            raise RequestError("the model has no memory for this: ask for less", 503) from error
        except tf.errors.InvalidArgumentError as error:
            raise RequestError("the model cannot take these values together") from error
        if len(calls) == 1:
            return [arrays]
        ends = np.cumsum([call.size for call in calls])[:-1]
        parts = {
            name: np.split(value, ends, axis=signature.row_axis(name))
            for name, value in arrays.items()
        }
        return [{name: part[i] for name, part in parts.items()} for i in range(len(calls))]

    def warm_up(self) -> None:
        """Ask each signature once: TensorFlow prepares a function when it is first called."""
        once = {"p": [0.5], "level": 0.5, "n": 1, "seed": [0, 0]}

        def one(name: str, spec: Spec) -> np.ndarray:
            if spec.dtype == "string":
                return np.full([1], b"", object)
            zeros = np.zeros([1 if size is None else size for size in spec.shape])
            return np.asarray(once.get(name, zeros), spec.dtype)

        for signature in self.signatures.values():
            values = {name: one(name, spec) for name, spec in signature.inputs.items()}
            rows = {name: values[name] for name in signature.rows}
            shared = {name: values[name] for name in signature.shared}
            self.answer([Call(signature, rows, shared)])

    def metadata(self, name: str) -> dict[str, Any]:
        """Return TensorFlow Serving's answer on the metadata of a model of this name."""
        from google.protobuf.json_format import MessageToDict

        definitions = {
            key: MessageToDict(
                self._loaded.signature_def[key],
                preserving_proto_field_name=True,
                always_print_fields_with_no_presence=True,
            )
            for key in self.signatures
        }
        return {
            "model_spec": {"name": name, "signature_name": "", "version": "1"},
            "metadata": {"signature_def": {"signature_def": definitions}},
        }


def _event_size(functions: Mapping[str, Any]) -> int | None:
    """Return D, if one of the outputs that end with it knows it."""
    for function in functions.values():
        for name in ("loc", "quantile", "lower"):
            spec = function.structured_outputs.get(name)
            if spec is not None and spec.shape[-1] is not None:
                return int(spec.shape[-1])
    return None


def _components(functions: Mapping[str, Any]) -> int:
    """Return K, which the logits tell; a single normal has none."""
    logits = (
        functions["params"].structured_outputs.get("logits") if "params" in functions else None
    )
    return 1 if logits is None or logits.shape[-1] is None else int(logits.shape[-1])


def _specs(
    specs: Mapping[str, Any], event_size: int | None, first: Sequence[str] = ()
) -> dict[str, Spec]:
    """Return specs by name: some first, in their order, then the others in the alphabet's.

    TensorFlow forgets that y is [B, 1] where there is one target, and would broadcast others.
    """
    names = [*(name for name in first if name in specs), *sorted(set(specs) - set(first))]
    found = {}
    for name in names:
        shape = specs[name].shape.as_list()
        if len(shape) > 1 and shape[-1] is None:
            shape[-1] = event_size
        found[name] = Spec(specs[name].dtype.name, tuple(shape))
    return found
