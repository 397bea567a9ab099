"""What a request asks of a model: a signature, and values for its inputs.

Shape letters: B batch, T time, F features, D event size, P probabilities, S draws.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Hashable, Mapping

import numpy as np

from mdn.errors import MDNError

# Inputs that stand once for all rows.
SHARED = ("p", "level", "n", "seed")
# Outputs whose rows are on the second axis: [P, B, D], [S, B, D].
_LEADING = ("quantile", "sample")


class RequestError(MDNError):
    """A request that cannot be answered; the message is one line.

    Args:
        message: what is wrong, and how to mend it.
        status: of HTTP.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclasses.dataclass(frozen=True)
class Spec:
    """An input or output: "float32", "float64", "int32" or "string"; None in a shape is free."""

    dtype: str
    shape: tuple[int | None, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Signature:
    """One question that a model answers.

    Attributes:
        name: of the signature.
        inputs: name -> what it takes.
        outputs: name -> what it returns.
        components: K, of the density that is asked.
    """

    name: str
    inputs: Mapping[str, Spec]
    outputs: Mapping[str, Spec]
    components: int = 1

    @property
    def rows(self) -> list[str]:
        """The inputs that have a value for each row: [B, ..]."""
        return [name for name in self.inputs if name not in SHARED]

    @property
    def shared(self) -> list[str]:
        """The inputs that stand once for all rows."""
        return [name for name in self.inputs if name in SHARED]

    def row_axis(self, output: str) -> int:
        """Return which axis of an output has the rows."""
        return int(output in _LEADING)


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """A signature and values for all of its inputs.

    Attributes:
        signature: what is asked.
        rows: input -> [B, ..].
        shared: input -> what stands once for all rows.
        columnar: whether the answer is `outputs`, by name, rather than `predictions`, by row.
    """

    signature: Signature
    rows: Mapping[str, np.ndarray]
    shared: Mapping[str, np.ndarray]
    columnar: bool = True

    @property
    def size(self) -> int:
        """B, or 1 where no input has rows."""
        return len(next(iter(self.rows.values()))) if self.rows else 1

    @functools.cached_property
    def values(self) -> int:
        """How many numbers the answer has, at most."""
        times = int(self.shared["n"]) if "n" in self.shared else len(self.shared.get("p", [0]))
        # Of sequences [B, T, F], whose answers may have T as well.
        times *= max((v.shape[1] for v in self.rows.values() if v.ndim == 3), default=1)
        each = (
            math.prod(size for size in spec.shape if size is not None)
            for spec in self.signature.outputs.values()
        )
        return sum(each) * times * self.size

    @property
    def terms(self) -> int:
        """How many numbers it takes to make draws or quantiles: one of each component for each."""
        asked = "n" in self.shared or "p" in self.shared
        return self.values * self.signature.components if asked else 0

    @functools.cached_property
    def key(self) -> Hashable:
        """What calls must have in common to be answered together; None: this one stands alone.

        Draws are a function of the seed and of the batch, so that a call with a seed does.
        """
        if not self.rows or "seed" in self.shared:
            return None
        shared = tuple(value.tobytes() for value in self.shared.values())
        return self.signature.name, shared, tuple(value.shape[1:] for value in self.rows.values())
