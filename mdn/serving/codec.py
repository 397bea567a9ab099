"""Requests and answers as JSON, in the two formats of TensorFlow Serving.

By rows, `{"instances": [{"x": [0.5]}, ..]}` and `{"predictions": [..]}`; or by columns,
`{"inputs": {"x": [[0.5], ..]}}` and `{"outputs": {..}}`. A missing value is `null`: NaN for a
number, "" for a string. Strings may also be bytes, `{"b64": ".."}`. JSON has no NaN and no
infinity, so that these are refused in a request, and `null` in an answer.
"""

from __future__ import annotations

import base64
import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import orjson

from mdn.serving.calls import SHARED, Call, RequestError, Signature, Spec
from mdn.serving.limits import Limits

DEFAULT = "serving_default"
_KEYS = ("signature_name", "instances", "inputs")
_BOUNDS = {"float32": float(np.finfo(np.float32).max), "float64": float(np.finfo(np.float64).max)}
_SHORT = 40  # letters of a value in a message


def decode(body: bytes, signatures: Mapping[str, Signature], limits: Limits) -> Call:
    """Return what a request asks.

    Args:
        body: of the request.
        signatures: of the model.
        limits: how much it may ask for.

    Raises:
        RequestError: it is not JSON, or not what the signature takes, or too much.
    """
    try:
        request = orjson.loads(body)
    except ValueError as error:
        raise RequestError(f"the body is no JSON: {error}") from error
    if type(request) is not dict:
        raise RequestError(f"the body is {_kind(request)}: it must be an object")
    for key in request:
        if key not in _KEYS:
            raise RequestError(f"unknown key {_show(key)}: the keys are {', '.join(_KEYS)}")
    signature = _signature(request.get("signature_name", DEFAULT), signatures)
    if ("instances" in request) == ("inputs" in request):
        raise RequestError('give either "instances", rows, or "inputs", columns')
    columnar = "inputs" in request
    if columnar:
        values = _columns(request["inputs"], signature)
    else:
        values = _stack(request["instances"], signature, limits)
    call = Call(
        signature,
        {name: _array(name, values[name], signature.inputs[name]) for name in signature.rows},
        {name: _array(name, values[name], signature.inputs[name]) for name in signature.shared},
        columnar,
    )
    _check(call, limits)
    return call


def encode(call: Call, outputs: Mapping[str, np.ndarray]) -> bytes:
    """Return the answer to a call as JSON; what is not finite is `null`."""
    # The JSON library takes neither arrays without axes nor those with gaps.
    arrays = {
        name: np.ascontiguousarray(value) if value.ndim else value.item()
        for name, value in outputs.items()
    }
    if call.columnar:
        return to_json({"outputs": _alone(arrays)})
    if len(arrays) == 1:
        return to_json({"predictions": _alone(arrays)})
    rows = [dict(zip(arrays, row, strict=True)) for row in zip(*arrays.values(), strict=True)]
    return to_json({"predictions": rows})


def to_json(value: Any) -> bytes:
    """Return JSON of dicts, lists and arrays; what is not finite is `null`."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def _alone(arrays: dict[str, Any]) -> Any:
    """Return the value of a single output, without its name, as TensorFlow Serving does."""
    return next(iter(arrays.values())) if len(arrays) == 1 else arrays


# ---------------------------------------------------------------------- which values


def _signature(name: Any, signatures: Mapping[str, Signature]) -> Signature:
    if type(name) is str and name in signatures:
        return signatures[name]
    found = (
        f"no signature {_show(name)}" if type(name) is str else f"signature_name is {_kind(name)}"
    )
    raise RequestError(f"{found}: choose one of {', '.join(signatures)}")


def _columns(given: Any, signature: Signature) -> dict[str, Any]:
    """Return the values of `inputs`, by name."""
    if type(given) is not dict and len(signature.inputs) == 1:
        return dict.fromkeys(signature.inputs, given)
    return _named(given, signature, '"inputs"')


def _stack(given: Any, signature: Signature, limits: Limits) -> dict[str, list[Any]]:
    """Return the values of `instances`, by name, each a list of one for each row."""
    if signature.shared or not signature.inputs:
        what = ", ".join(signature.shared) or "nothing"
        raise RequestError(
            f'{signature.name} takes {what} once for all rows: give "inputs", not "instances"'
        )
    if type(given) is not list:
        raise RequestError(f'"instances" is {_kind(given)}: it must be a list of rows')
    if len(given) > limits.max_rows:
        raise RequestError(f"{len(given)} rows: give at most {limits.max_rows} at once")
    if len(signature.inputs) == 1:
        (name,) = signature.inputs
        return {
            name: [
                _named(row, signature, f"row {i}")[name]
                if type(row) is dict and "b64" not in row
                else row
                for i, row in enumerate(given)
            ]
        }
    rows = [_named(row, signature, f"row {i}") for i, row in enumerate(given)]
    return {name: [row[name] for row in rows] for name in signature.inputs}


def _named(given: Any, signature: Signature, where: str) -> dict[str, Any]:
    """Return an object that has the inputs of a signature, and no others."""
    names = ", ".join(signature.inputs) or "no inputs"
    if type(given) is not dict:
        raise RequestError(f"{where} is {_kind(given)}: it must be an object with {names}")
    if missing := [name for name in signature.inputs if name not in given]:
        raise RequestError(f"{where} lacks {', '.join(missing)}: {signature.name} takes {names}")
    for name in given:
        if name not in signature.inputs:
            raise RequestError(f"{where} has {_show(name)}: {signature.name} takes {names}")
    return given


# ---------------------------------------------------------------------- values


def _array(name: str, value: Any, spec: Spec) -> np.ndarray:
    """Return nested lists as an array of the shape and type that an input takes."""
    shape: list[int] = []
    level = [value]
    for axis, expected in enumerate(spec.shape):
        for i, item in enumerate(level):
            if type(item) is not list:
                raise RequestError(f"{_place(name, i, shape)} is {_kind(item)}: it must be a list")
        size = len(level[0]) if expected is None else expected
        for i, item in enumerate(level):
            if len(item) != size:
                fewer = "as the first has" if expected is None else "as the model takes"
                raise RequestError(
                    f"{_place(name, i, shape)} has {len(item)} entries: give {size}, {fewer}"
                )
        if size == 0 and expected is None:
            what = "entries" if axis or name in SHARED else "rows"
            raise RequestError(f"{name} has no {what}: give at least one")
        shape.append(size)
        level = list(itertools.chain.from_iterable(level))
    return _leaves(name, level, shape, spec.dtype).reshape(shape)


def _leaves(name: str, values: list[Any], shape: list[int], dtype: str) -> np.ndarray:
    """Return values without structure as an array [prod(shape)]."""
    if dtype == "string":
        return np.array([_text(name, v, i, shape) for i, v in enumerate(values)], object)
    whole = dtype == "int32"
    allowed = {int} if whole else {int, float, type(None)}
    if not set(map(type, values)) <= allowed:
        i = next(i for i, v in enumerate(values) if type(v) not in allowed)
        must = "a whole number" if whole else "a number, or null where missing"
        raise RequestError(f"{_place(name, i, shape)} is {_kind(values[i])}: it must be {must}")
    if whole:
        for i, value in enumerate(values):
            if not -(2**31) <= value < 2**31:
                raise RequestError(f"{_place(name, i, shape)} is {value}: int32 cannot hold it")
        return np.array(values, np.int32)
    numbers = np.array(values, np.float64)  # None becomes NaN
    far = ~(np.abs(numbers) <= _BOUNDS[dtype]) & ~np.isnan(numbers)
    if far.any():
        i = int(far.argmax())
        raise RequestError(f"{_place(name, i, shape)} is {values[i]}: {dtype} cannot hold it")
    return numbers.astype(dtype)


def _text(name: str, value: Any, i: int, shape: list[int]) -> bytes:
    if value is None:
        return b""
    if type(value) is dict and set(value) == {"b64"} and type(value["b64"]) is str:
        try:
            return base64.b64decode(value["b64"], validate=True)
        except ValueError as error:
            raise RequestError(f"{_place(name, i, shape)} is no base64: {error}") from error
    if type(value) is not str:
        raise RequestError(
            f"{_place(name, i, shape)} is {_kind(value)}: it must be a string, or null where "
            "missing"
        )
    return value.encode()


def _place(name: str, i: int, shape: list[int]) -> str:
    """Return where item i of an array of this shape is."""
    if not shape or not math.prod(shape):
        return name
    first, *rest = (int(k) for k in np.unravel_index(i, shape))
    where = f"{name}, entry {first}" if name in SHARED else f"{name} of row {first}"
    return where + "".join(f", entry {k}" for k in rest)


def _check(call: Call, limits: Limits) -> None:
    """Raise a RequestError where values make no sense together, or ask for too much."""
    sequences = {name: value for name, value in call.rows.items() if value.ndim == 3}
    for what, axis, arrays in (("rows", 0, call.rows), ("steps", 1, sequences)):
        sizes = {name: value.shape[axis] for name, value in arrays.items()}
        if len(set(sizes.values())) > 1:
            found = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise RequestError(f"the inputs have different numbers of {what}: {found}")
    if call.size > limits.max_rows:
        raise RequestError(f"{call.size} rows: give at most {limits.max_rows} at once")
    if "n" in call.shared and not 1 <= (n := int(call.shared["n"])) <= limits.max_samples:
        raise RequestError(f"n is {n}: give 1 to {limits.max_samples}")
    if "level" in call.shared and not 0.0 < (level := float(call.shared["level"])) < 1.0:
        raise RequestError(f"level is {_number(level)}: it must be between 0 and 1")
    if "p" in call.shared:
        for p in call.shared["p"].tolist():
            if not 0.0 <= p <= 1.0:
                raise RequestError(f"p has {_number(p)}: probabilities are from 0 to 1")
    if call.values > limits.max_values:
        raise RequestError(
            f"the answer would have {call.values} numbers: ask for at most {limits.max_values}, "
            "with fewer rows or draws"
        )
    if call.terms > limits.max_terms:
        raise RequestError(
            f"the answer would have {call.values} numbers, each from "
            f"{call.signature.components} components: ask for at most "
            f"{limits.max_terms // call.signature.components}"
        )


def _number(value: float) -> str:
    return "null" if math.isnan(value) else f"{value:g}"


def _kind(value: Any) -> str:
    """Return what JSON calls a value."""
    if value is None:
        return "null"
    if type(value) is bool:
        return "true" if value else "false"
    if type(value) in (int, float):
        return f"the number {value}"
    if type(value) is str:
        return f"the string {_show(value)}"
    return "a list" if type(value) is list else "an object"


def _show(value: str) -> str:
    """Return a string for a message of one line, cut where it is long."""
    text = orjson.dumps(value).decode()
    return text if len(text) <= _SHORT else f"{text[:_SHORT]}.."
