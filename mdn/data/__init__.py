"""Rows: where they come from, how they are split, checked and batched."""

from mdn.data.rows import Data, Rows, Source, Truth

__all__ = ["Data", "Rows", "Source", "Truth"]
