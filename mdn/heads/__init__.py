"""Heads: hidden features [.., H] to a density over y in the user's units."""

from mdn.heads.base import Head
from mdn.heads.mixtures import (
    Mixture,
    MixtureDiag,
    MixtureHead,
    MixtureLowRank,
    MixturePrecision,
)
from mdn.heads.normals import Diag, TriL

__all__ = [
    "Diag",
    "Head",
    "Mixture",
    "MixtureDiag",
    "MixtureHead",
    "MixtureLowRank",
    "MixturePrecision",
    "TriL",
]
