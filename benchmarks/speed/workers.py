"""A process for each entrant of a race, idle until it is its turn.

In one process the thread pools and allocators of several frameworks get in each other's way:
beside JAX the largest workload took twice as long as alone. A process of its own is what users
have.
"""

from __future__ import annotations

import gc
import multiprocessing
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

# Not a fork: a thread pool of the parent would be dead in the child, and its locks held.
_SPAWN = multiprocessing.get_context("spawn")


class WorkerError(Exception):
    """What a worker raised, in one line."""


class Worker:
    """A runner in a process of its own.

    Args:
        make: returns the runner, see `benchmarks.speed.contenders.Runner`; a function that another
            process can import, or a partial of one.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self._connection, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_serve, args=(theirs, make), daemon=True)
        self._process.start()
        theirs.close()
        self._answer()

    def train(self, epochs: int) -> float:
        """Train; return the seconds that it took."""
        return self._ask("train", epochs)

    def train_in_order(self) -> None:
        """Train for an epoch, the rows in their own order."""
        self._ask("train in order", None)

    def loss(self, rows: int) -> float:
        """Return the mean NLL of the first rows."""
        return self._ask("loss", rows)

    def steps(self, default: int) -> int:
        """Return the train steps an epoch, where the runner counts its own."""
        return self._ask("steps", default)

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(timeout=10)
        self._process.kill()

    def _ask(self, *question: Any) -> Any:
        self._connection.send(question)
        return self._answer()

    def _answer(self) -> Any:
        try:
            failure, value = self._connection.recv()
        except EOFError:
            self._process.join()
            raise WorkerError(f"ended with exit code {self._process.exitcode}") from None
        if failure is not None:
            raise WorkerError(failure)
        return value


def _serve(connection: Connection, make: Callable[[], Any]) -> None:
    warnings.filterwarnings("ignore")
    try:
        runner = make()
        connection.send((None, None))
        while True:
            question, argument = connection.recv()
            connection.send((None, _answer(runner, question, argument)))
    except EOFError:  # the race is over
        return
    except Exception as error:  # whatever a peer may raise
        connection.send((_describe(error), None))


def _answer(runner: Any, question: str, argument: Any) -> Any:
    if question == "steps":
        return getattr(runner, "steps", argument)
    if question == "loss":
        return runner.loss(argument)
    if question == "train in order":
        return runner.train(1, shuffle=False)
    gc.collect()
    begun = time.perf_counter()
    runner.train(argument)
    return time.perf_counter() - begun


def _describe(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return not_installed(error)
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def not_installed(error: ModuleNotFoundError) -> str:
    """Return what to do about a package that is not there."""
    return f"{error.name} is not installed: pip install -e '.[speed]'"
