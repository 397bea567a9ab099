"""Fixtures that the whole suite shares: TensorFlow once per worker, tiny models."""

import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["TF_USE_LEGACY_KERAS"] = "1"
