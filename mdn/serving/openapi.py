"""The OpenAPI document of a served model: its own inputs, with their types."""

from __future__ import annotations

from typing import Any

from mdn.serving.calls import SHARED, Signature
from mdn.serving.codec import DEFAULT
from mdn.serving.limits import Limits

_LARGEST = {"float32": 3.4028234663852886e38, "float64": 1.7976931348623157e308}
_DESCRIPTION = (
    "The conditional density of a mixture density network, behind the REST paths of TensorFlow "
    "Serving. A missing value is null; so is, in an answer, a number that is not finite."
)


def document(
    name: str,
    version: str,
    signatures: dict[str, Signature],
    columns: dict[str, str],
    limits: Limits,
) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document.

    Args:
        name: of the model, in the paths.
        version: of mdn.
        signatures: of the model.
        columns: input -> the raw column that it takes.
        limits: how much one request may ask for.
    """
    model = f"/v1/models/{name}"
    paths: dict[str, Any] = {}
    for base in (model, f"{model}/versions/1"):
        paths[f"{base}:predict"] = {"post": _predict(signatures, columns, limits)}
        paths[base] = {"get": _get("Whether the model is available", _STATUS)}
        paths[f"{base}/metadata"] = {
            "get": _get("The signatures, as TensorFlow Serving states them", _METADATA)
        }
    paths["/model.json"] = {"get": _get("The inputs, targets and limits", {"type": "object"})}
    paths["/healthz"] = {"get": _get("The service runs and has its model", _HEALTH)}
    paths["/metrics"] = {
        "get": _get("Counts and times for Prometheus", {"type": "string"}, "text/plain")
    }
    paths["/openapi.json"] = {"get": _get("This document", {"type": "object"})}
    paths["/"] = {"get": _get("A page to look at the density", {"type": "string"}, "text/html")}
    return {
        "openapi": "3.1.0",
        "info": {"title": f"mdn: {name}", "version": version, "description": _DESCRIPTION},
        "paths": paths,
        "components": {"schemas": {"Error": _ERROR}},
    }


_ERROR = {
    "type": "object",
    "properties": {"error": {"type": "string"}},
    "required": ["error"],
    "additionalProperties": False,
}
_STATUS = {
    "type": "object",
    "properties": {"model_version_status": {"type": "array", "items": {"type": "object"}}},
    "required": ["model_version_status"],
}
_METADATA = {
    "type": "object",
    "properties": {"model_spec": {"type": "object"}, "metadata": {"type": "object"}},
    "required": ["model_spec", "metadata"],
}
_HEALTH = {"type": "object", "properties": {"status": {"const": "ok"}}, "required": ["status"]}


def _get(summary: str, schema: dict[str, Any], kind: str = "application/json") -> dict[str, Any]:
    return {
        "summary": summary,
        "responses": {"200": {"description": "The answer", "content": {kind: {"schema": schema}}}},
    }


def _predict(
    signatures: dict[str, Signature], columns: dict[str, str], limits: Limits
) -> dict[str, Any]:
    forms: list[dict[str, Any]] = []
    for signature in signatures.values():
        if signature.inputs and not signature.shared:
            forms.append(_by_row(signature, columns, limits))
        forms.append(_by_column(signature, columns, limits))
    errors = {
        "400": "The request is not JSON, or not what the signature takes",
        "413": "The body is too large",
        "503": "Too many requests wait",
    }
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    answer = {
        "type": "object",
        "properties": {"predictions": {"type": "array"}, "outputs": {}},
        "minProperties": 1,
        "maxProperties": 1,
        "additionalProperties": False,
    }
    return {
        "summary": "Ask the model, by rows or by columns",
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"anyOf": forms}}},
        },
        "responses": {
            "200": {
                "description": "predictions, a row each; or outputs, by name",
                "content": {"application/json": {"schema": answer}},
            },
            **{code: {"description": text, "content": error} for code, text in errors.items()},
        },
    }


def _by_row(signature: Signature, columns: dict[str, str], limits: Limits) -> dict[str, Any]:
    inputs = {
        name: _value(spec.dtype, spec.shape[1:], name, columns, limits)
        for name, spec in signature.inputs.items()
    }
    return _form(
        signature,
        "instances",
        {"type": "array", "minItems": 1, "maxItems": limits.max_rows, "items": _object(inputs)},
    )


def _by_column(signature: Signature, columns: dict[str, str], limits: Limits) -> dict[str, Any]:
    inputs = {
        name: _value(spec.dtype, spec.shape, name, columns, limits)
        for name, spec in signature.inputs.items()
    }
    return _form(signature, "inputs", _object(inputs))


def _form(signature: Signature, key: str, values: dict[str, Any]) -> dict[str, Any]:
    default = signature.name == DEFAULT
    return {
        "title": f"{signature.name} by {'row' if key == 'instances' else 'column'}",
        **_object(
            {"signature_name": {"const": signature.name}, key: values},
            required=[key] if default else ["signature_name", key],
        ),
    }


def _object(properties: dict[str, Any], required: list[str] | None = None) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
        "additionalProperties": False,
    }


def _value(
    dtype: str,
    shape: tuple[int | None, ...],
    name: str,
    columns: dict[str, str],
    limits: Limits,
) -> dict[str, Any]:
    schema = _number(dtype, name, limits)
    for size in reversed(shape):
        bounds = {"minItems": 1} if size is None else {"minItems": size, "maxItems": size}
        if size is None:
            bounds["maxItems"] = limits.max_rows
        schema = {"type": "array", "items": schema, **bounds}
    if name in columns and columns[name] != name:
        schema["description"] = f"column {columns[name]}"
    return schema


def _number(dtype: str, name: str, limits: Limits) -> dict[str, Any]:
    """Return the schema of one value."""
    if dtype == "string":
        return {"type": ["string", "null"]}
    if name == "n":
        return {"type": "integer", "minimum": 1, "maximum": limits.max_samples}
    if name == "p":
        return {"type": "number", "minimum": 0, "maximum": 1}
    if name == "level":
        return {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}
    if name in SHARED or dtype == "int32":
        return {"type": "integer", "minimum": -(2**31), "maximum": 2**31 - 1}
    return {"type": ["number", "null"], "minimum": -_LARGEST[dtype], "maximum": _LARGEST[dtype]}
