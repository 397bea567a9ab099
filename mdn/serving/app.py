"""The service as an ASGI application: its paths, and how it answers for mistakes."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import importlib.resources
import re
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import mdn
from mdn.serving import openapi
from mdn.serving.batching import Batcher
from mdn.serving.calls import RequestError
from mdn.serving.codec import decode, encode, to_json
from mdn.serving.limits import Limits
from mdn.serving.metrics import CONTENT_TYPE_LATEST, Metrics
from mdn.serving.model import ServedModel

# JSON of more bytes, or of more numbers, is read and written beside the event loop.
_LARGE = 2**15
_HEADERS = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}
_STATUS = {
    "model_version_status": [
        {
            "version": "1",
            "state": "AVAILABLE",
            "status": {"error_code": "OK", "error_message": ""},
        }
    ]
}


def make_app(model: ServedModel, name: str, limits: Limits | None = None) -> Starlette:
    """Return the application that serves a model.

    Args:
        model: what answers.
        name: of the model, in the paths.
        limits: how much one request may ask for.
    """
    return _Service(model, name, limits or Limits()).app


class _Service:
    """The answers of each path; they share a model and its queue."""

    def __init__(self, model: ServedModel, name: str, limits: Limits) -> None:
        self.model, self.limits = model, limits
        self.home = f"/v1/models/{name}"
        columns = {f.input: f.column for f in model.about.features if f.column is not None}
        self.batcher = Batcher(model.answer, limits, lambda calls: self.metrics.batch(calls))
        self.metrics = Metrics(lambda: self.batcher.waiting)
        documents = {
            "/openapi.json": openapi.document(
                name, mdn.__version__, model.signatures, columns, limits
            ),
            "/model.json": {
                "name": name,
                **model.about.model_dump(),
                "signatures": list(model.signatures),
                "limits": {"rows": limits.max_rows, "samples": limits.max_samples},
            },
            "/healthz": {"status": "ok"},
        }
        metadata = model.metadata(name)
        for base in (self.home, f"{self.home}/versions/1"):
            documents |= {base: _STATUS, f"{base}/metadata": metadata}
        self.documents = {path: to_json(value) for path, value in documents.items()}
        page = (importlib.resources.files(__package__) / "page.html").read_text("utf-8")
        self.page = Response(
            page,
            media_type="text/html",
            headers={"content-security-policy": content_policy(page), "cache-control": "no-cache"},
        )
        routes = [Route(path, self.document) for path in self.documents]
        routes += [
            Route(f"{base}:predict", self.predict, methods=["POST"])
            for base in (self.home, f"{self.home}/versions/1")
        ]
        routes += [Route("/metrics", self.show_metrics), Route("/", self.show_page)]
        names = {route.path: _endpoint(route.path) for route in routes}
        self.app = Starlette(
            routes=routes,
            middleware=[Middleware(_Observed, metrics=self.metrics, names=names)],
            exception_handlers={
                RequestError: _mistake,
                HTTPException: self.no_path,
                ClientDisconnect: _gone,
                Exception: _failure,
            },
            lifespan=self.lifespan,
        )

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        yield
        self.batcher.close()

    async def predict(self, request: Request) -> Response:
        body = await _read(request, self.limits.max_bytes)
        arguments = body, self.model.signatures, self.limits
        if len(body) > _LARGE:
            call = await run_in_threadpool(decode, *arguments)
        else:
            call = decode(*arguments)
        outputs = await self.batcher(call)
        if call.values > _LARGE:
            return _json(await run_in_threadpool(encode, call, outputs))
        return _json(encode(call, outputs))

    async def document(self, request: Request) -> Response:
        return _json(self.documents[request.url.path])

    async def show_metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), headers={"content-type": CONTENT_TYPE_LATEST})

    async def show_page(self, request: Request) -> Response:
        return self.page

    async def no_path(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code == 404:
            reason = f"nothing is at {request.url.path[:100]}: the model is at {self.home}"
        elif error.status_code == 405:
            allowed = dict(error.headers or {}).get("Allow", "another method").split(", ")
            reason = f"{request.method} is not answered here: use {', '.join(sorted(allowed))}"
        else:
            reason = error.detail
        return _error(reason, error.status_code, error.headers)


def content_policy(page: str) -> str:
    """Return the Content-Security-Policy under which only this page's own code runs.

    Args:
        page: HTML with its scripts and styles inside.
    """

    def hashes(tag: str) -> str:
        texts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, flags=re.S)
        digests = [base64.b64encode(hashlib.sha256(t.encode()).digest()).decode() for t in texts]
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )


async def _read(request: Request, limit: int) -> bytes:
    """Return the body of a request.

    Raises:
        RequestError: it has more bytes than the limit. Some more are read and forgotten, as most
            clients look at an answer only when they have sent all.
    """
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= limit:
            chunks.append(chunk)
        elif size > 8 * limit:
            break
    if size > limit:
        raise RequestError(f"the body has more than {limit} bytes: ask for fewer rows", 413)
    return b"".join(chunks)


class _Observed:
    """Counts and times the requests, and gives each answer the headers that all have."""

    def __init__(self, app: ASGIApp, metrics: Metrics, names: dict[str, str]) -> None:
        self.app, self.metrics, self.names = app, metrics, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, status = time.perf_counter(), 500

        async def observe(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [(k.encode(), v.encode()) for k, v in _HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *headers]}
            await send(message)

        try:
            await self.app(scope, receive, observe)
        finally:
            endpoint = self.names.get(scope["path"], "other")
            self.metrics.request(endpoint, status, time.perf_counter() - begun)


def _endpoint(path: str) -> str:
    """Return the name of a path in the metrics."""
    for ending in ("predict", "metadata", "metrics", "healthz", ".json"):
        if path.endswith(ending):
            return path.strip("/") if ending == ".json" else ending
    return "page" if path == "/" else "status"


def _json(content: bytes, status: int = 200, headers: Any = None) -> Response:
    return Response(content, status, headers, "application/json")


def _error(reason: str, status: int, headers: Any = None) -> Response:
    return _json(to_json({"error": reason}), status, headers)


async def _mistake(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return _error(str(error), error.status, {"retry-after": "1"} if error.status == 503 else None)


async def _gone(request: Request, error: Exception) -> Response:
    return _error("the client left before it had sent all", 400)


async def _failure(request: Request, error: Exception) -> Response:
    return _error("the service failed at this request: its log says how", 500)
