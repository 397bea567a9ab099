"""How much one request may ask for: the options of `mdn serve`."""

from __future__ import annotations

import dataclasses
from typing import Any


def _limit(default: int, meaning: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": meaning})


@dataclasses.dataclass(frozen=True)
class Limits:
    """What is more than one of these is refused, and the message names it."""

    max_bytes: int = _limit(8 * 2**20, "Bytes of a request.")
    max_rows: int = _limit(4096, "Rows of a request, or of several that are answered at once.")
    max_samples: int = _limit(10_000, "Draws for each row.")
    max_values: int = _limit(1_000_000, "Numbers in an answer.")
    max_terms: int = _limit(10_000_000, "Draws and quantiles of a request, times components.")
    max_waiting: int = _limit(1000, "Requests that wait for the model.")
