"""Which options of a split, or of a stream, go together; light, so that a mistake is told at once.

Each function returns what a user reads, or None where nothing is wrong: of a config that is before
any rows are read, and of a source that is made in Python when it loads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What a stream has none of, and what only a stream has; their values where they say nothing.
IN_MEMORY: dict[str, Any] = {"split": "random", "split_column": None, "max_rows": None}
STREAM: dict[str, int] = {
    "held_out_rows": 200_000,
    "sample_rows": 200_000,
    "shuffle_rows": 262_144,
}


def fractions_mistake(validation: float, test: float) -> str | None:
    """Return what is wrong with the shares of the validation and of the test rows."""
    if validation > 0 and test > 0 and validation + test < 1:
        return None
    return (
        f"data.validation={validation} and data.test={test} leave a split empty: give fractions "
        "above 0 that sum to less than 1"
    )


def key_mistake(split: str, keyed: bool) -> str | None:
    """Return what is wrong with a split that has a column to split by, or has none."""
    if split == "random" and keyed:
        return (
            "data.split_column does nothing with data.split=random: set data.split to time, "
            "group or column"
        )
    if split != "random" and not keyed:
        return f"data.split={split} needs a column: set data.split_column"
    return None


def stream_mistake(options: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the options of rows that are streamed, or that are not.

    Args:
        options: those of `IN_MEMORY` and of `STREAM`, and `stream`.
    """
    for option, usual in (IN_MEMORY if options["stream"] else STREAM).items():
        if (value := options[option]) == usual:
            continue
        if options["stream"]:
            return (
                f"data.{option}={value} needs all rows in memory: leave it out, or set "
                "data.stream=false"
            )
        return f"data.{option}={value} is of a stream: leave it out, or set data.stream=true"
    return None
