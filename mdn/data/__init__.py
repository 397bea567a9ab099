"""Rows: where they come from, how they are split, checked and batched."""
