"""Fixtures that the whole suite shares: TensorFlow once per worker, tiny models."""

import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["TF_USE_LEGACY_KERAS"] = "1"
# Several workers share the cores, and threads of BLAS that wait for each other spin.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
