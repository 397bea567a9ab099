"""What the suite shares: TensorFlow once per worker, one thread of BLAS, the order of tests."""

import gc
import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["TF_USE_LEGACY_KERAS"] = "1"
# Several workers share the cores, and threads of BLAS that wait for each other spin.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Tracing makes objects by the hundred thousand, most of which live: look for the dead less often.
gc.set_threshold(50_000, 20, 20)


def pytest_collection_modifyitems(items):
    """Put slow tests first, so that no worker starts a long one when the other is done."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
