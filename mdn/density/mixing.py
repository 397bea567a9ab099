"""Mixtures of densities: the components of all, side by side, in the form that all have.

Shape letters: D event size, K components, M densities.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from mdn.density.mixture import GaussianMixture
from mdn.density.parameters import broadcast_batch
from mdn.density.queries import Queries
from mdn.density.transformed import Transformed, split_transform
from mdn.density.transforms import is_same
from mdn.errors import DataError


def mixture_of(
    densities: Queries | Sequence[Queries], weights: Sequence[float] | tf.Tensor | None = None
) -> Any:
    """Return the mixture of M densities, in equal shares if no others are given.

    Args:
        densities: normals or mixtures of any types and K, whose batches broadcast to [..]; or one
            density with batch [M, ..], which holds them all.
        weights: M positive numbers, or [M, ..]; they are normalised.

    Returns:
        Batch [..], and the components of all (K = 1 of a normal), a density's beside each other:
        a `GaussianMixture`. Where all have diagonal or low-rank covariances, or all hold their
        precisions, so has the mixture. Of densities with one `target_transform` a `Transformed`.

    Raises:
        DataError: there are no densities, they have different targets or transforms, or not M
            weights.
    """
    if isinstance(densities, Queries):
        base, bijector = split_transform(densities)
        mixture = _fold(base.as_mixture(), weights)
        return mixture if bijector is None else Transformed(mixture, bijector)
    members = list(densities)
    if not members:
        raise DataError("a mixture of no densities: give one at least")
    shares = tf.unstack(_log_shares(weights, len(members), members[0].dtype))
    return join(members, shares)


def join(members: Sequence[Queries], log_shares: Sequence[tf.Tensor] | None = None) -> Any:
    """Return the mixture of the components of all members, as `mixture_of` does.

    Args:
        members: batches that broadcast.
        log_shares: of the members, [..] each; without them their logits stay as they are.

    Raises:
        DataError: they have different targets or transforms.
    """
    sizes = {density.event_shape[-1] for density in members}
    if len(sizes) > 1:
        raise DataError(f"densities of {sorted(sizes)} targets have no mixture: make them equal")
    bases, bijectors = zip(*(split_transform(member) for member in members), strict=True)
    if not all(is_same(bijector, bijectors[0]) for bijector in bijectors):
        raise DataError("densities with different target transforms have no mixture: use one")
    mixtures = [base.as_mixture() for base in bases]
    if len({type(mixture) for mixture in mixtures}) > 1:
        mixtures = [GaussianMixture(*mixture.mixture_parameters()) for mixture in mixtures]
    ranks = event_ranks(mixtures[0])
    parts = [mixture.tensors() for mixture in mixtures]
    if "factor" in ranks:
        _pad_factors(parts)
    for i, share in enumerate(log_shares or []):
        parts[i]["logits"] = tf.nn.log_softmax(parts[i]["logits"]) + share[..., tf.newaxis]
    tensors = broadcast_batch(
        [part[name] for part in parts for name in ranks], list(ranks.values()) * len(parts)
    )
    joined = {
        name: tf.concat(tensors[i :: len(ranks)], axis=-rank)
        for i, (name, rank) in enumerate(ranks.items())
    }
    mixture = type(mixtures[0])(**joined)
    return mixture if bijectors[0] is None else Transformed(mixture, bijectors[0])


def _fold(mixture: GaussianMixture, weights: Any) -> GaussianMixture:
    """Return the mixture, batch [..], of a batch [M, ..] of mixtures."""
    ranks = event_ranks(mixture)
    values = broadcast_batch(list(mixture.tensors().values()), list(ranks.values()))
    tensors = dict(zip(ranks, values, strict=True))
    logits = tf.nn.log_softmax(tensors["logits"])
    share = _log_shares(weights, logits.shape[0], logits.dtype)
    share = tf.reshape(share, [*share.shape, *[1] * (logits.shape.rank - share.shape.rank)])
    tensors["logits"] = logits + share
    axis = logits.shape.rank - 2  # of M, once it stands before K
    return type(mixture)(**{name: _join_axes(tensor, axis) for name, tensor in tensors.items()})


def event_ranks(mixture: GaussianMixture) -> dict[str, int]:
    """Return the rank of each tensor of a mixture without its batch: K comes first in each."""
    properties = mixture.parameter_properties().items()
    return {name: int(one.event_ndims) for name, one in properties}


def _pad_factors(parts: list[dict[str, tf.Tensor]]) -> None:
    """Give the low-rank factors [.., K, D, R] of all parts one R, by columns of zeros."""
    largest = max(part["factor"].shape[-1] for part in parts)
    for part in parts:
        factor = part["factor"]
        more = [[0, 0]] * (factor.shape.rank - 1) + [[0, largest - factor.shape[-1]]]
        part["factor"] = tf.pad(factor, more)


def _log_shares(weights: Any, members: int, dtype: tf.DType) -> tf.Tensor:
    """Return the log shares of M members, [M, ..]."""
    if weights is None:
        return tf.fill([members], tf.constant(-math.log(members), dtype))
    weights = tf.convert_to_tensor(weights, dtype)
    if weights.shape.rank == 0 or weights.shape[0] != members:
        raise DataError(f"weights of shape {weights.shape} for {members} densities: give each one")
    return tf.math.log(weights / tf.reduce_sum(weights, axis=0))


def _join_axes(tensor: tf.Tensor, axis: int) -> tf.Tensor:
    """Return [M, .., K, *rest] as [.., M K, *rest], where K stands at `axis` + 1."""
    order = [*range(1, axis + 1), 0, *range(axis + 1, tensor.shape.rank)]
    tensor = tf.transpose(tensor, order)  # [.., M, K, *rest]
    static = tensor.shape
    shape = tf.shape(tensor)
    size = static[axis] * static[axis + 1]
    joined = tf.reshape(tensor, tf.concat([shape[:axis], [size], shape[axis + 2 :]], 0))
    joined.set_shape([*static[:axis], size, *static[axis + 2 :]])
    return joined
