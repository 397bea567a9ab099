"""Ctrl-C at a place where training can stop."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import tf_keras


class Interrupt(tf_keras.callbacks.Callback):
    """Holds Ctrl-C back until a chunk of steps ends; a second one acts at once.

    Python raises KeyboardInterrupt wherever it happens to be. Inside of TensorFlow's own calls
    into Python that leaves its state broken: a scope that is never left, or a crash later on.

    Use it as a context around `fit`, and as one of the callbacks of that `fit`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._waiting = False
        self._before: Any = None

    def __enter__(self) -> Interrupt:
        self._waiting = False
        # Elsewhere Python allows no handler, and delivers no Ctrl-C either.
        if threading.current_thread() is threading.main_thread():
            self._before = signal.getsignal(signal.SIGINT)
            if self._before is signal.default_int_handler:  # otherwise somebody else sees to it
                signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        if self._before is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._before)
        self._before = None
        if kind is None:
            self._stop_here()  # it came after the last batch

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._stop_here()
        self._waiting = True

    def _stop_here(self) -> None:
        if self._waiting:
            self._waiting = False
            raise KeyboardInterrupt

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._stop_here()

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        self._stop_here()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._stop_here()
