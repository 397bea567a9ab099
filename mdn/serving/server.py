"""The process of the service: its socket, its signals, and what it prints."""

from __future__ import annotations

import ipaddress
import re
import signal
import socket
from pathlib import Path
from typing import Any

import uvicorn

from mdn.errors import ConfigError, RunError
from mdn.serving.app import make_app
from mdn.serving.limits import Limits
from mdn.serving.model import ServedModel

# Seconds that requests in flight have once the service is asked to stop.
_DRAIN = 30
# Seconds that a connection may be idle: longer than those of the clients that keep them in pools.
_KEEP_ALIVE = 75


def check_name(name: str) -> None:
    """Check that the name of a model can stand in a path.

    Raises:
        ConfigError: it cannot.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise ConfigError(f"name {name!r}: use letters and digits, and _ . - after the first")


def bind(host: str, port: int) -> socket.socket:
    """Return a socket for the service; 0 is any free port.

    Raises:
        RunError: another process has the port, or there is no such address.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise RunError(f"no address {host!r}: give --host 127.0.0.1, say") from error
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise RunError(
            f"cannot listen on {host} port {port}: {error.strerror}; give another --port"
        ) from error
    return bound


def serve(path: Path, bound: socket.socket, name: str, limits: Limits) -> None:
    """Serve a SavedModel until SIGTERM or SIGINT; requests in flight are answered first.

    Args:
        path: of the SavedModel.
        bound: from `bind`.
        name: of the model, in the paths.
        limits: how much one request may ask for.

    Raises:
        RunError: the model cannot be loaded.
    """
    model = ServedModel(path)
    model.warm_up()
    app = make_app(model, name, limits)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=_DRAIN,
    )
    server = _Server(config, f"mdn serves {path} as {name}")
    # uvicorn raises a signal again once it has drained; that is no reason to fail.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: setattr(server, "should_exit", True))
    server.run(sockets=[bound])


class _Server(uvicorn.Server):
    """Says where it is, once it listens."""

    def __init__(self, config: uvicorn.Config, what: str) -> None:
        super().__init__(config)
        self.what = what

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets=sockets)
        for bound in sockets or []:
            host, port = bound.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            print(f"{self.what}: http://{shown}:{port}/ (Ctrl-C to stop)", flush=True)
            if not ipaddress.ip_address(host).is_loopback:
                print("whoever reaches this address can ask: there is no password", flush=True)
