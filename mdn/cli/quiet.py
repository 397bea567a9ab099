"""TensorFlow's import without its noise."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Hold back what is written to stderr, by C++ code too; show it if the block raises.

    TensorFlow writes some lines while it is imported, before any logger can be configured.
    """
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except Exception:
            sys.stderr.flush()
            held.seek(0)
            os.write(saved, held.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)


def import_tensorflow(alone: bool = False) -> None:
    """Import TensorFlow and TFP, quietly, with the Keras that TFP works with.

    Args:
        alone: leave out TFP and Keras, which takes half as long.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if not alone:
        os.environ["TF_USE_LEGACY_KERAS"] = "1"
    with quiet_stderr():
        import tensorflow as tf

        if not alone:
            import tensorflow_probability  # noqa: F401

        tf.get_logger().setLevel("ERROR")
