"""A map of densities with a few numbers, that leaves a Gaussian mixture one.

Shape letters: D event size, K components.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from mdn.density.transformed import Transformed, split_transform

if TYPE_CHECKING:
    from mdn.density.queries import Queries


@dataclasses.dataclass(frozen=True)
class Recalibration:
    """Components that are moved and widened, the same for every density, and weights sharpened.

    Each component y = loc + L z becomes loc + shift + diag(scale) L z, and its weight w becomes
    w^sharpness, normalised. So a density stays of its type, and every question to it exact. The
    last components may be left as they are, weights included: a background is there for what no
    row has told of.

    Attributes:
        shift: D numbers, in the units of y.
        scale: D positive numbers; above one widens.
        sharpness: positive; above one favours the heavy components. Without meaning where K = 1.
        kept: components at the end that stay as they are.
    """

    shift: Any
    scale: Any
    sharpness: Any = 1.0
    kept: int = 0

    def to_config(self) -> dict[str, Any]:
        """Return plain numbers, of which `from_config` makes the same map."""
        return {
            "shift": [float(v) for v in self.shift],
            "scale": [float(v) for v in self.scale],
            "sharpness": float(self.sharpness),
            "kept": self.kept,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Recalibration:
        """Return the map of `to_config`."""
        numbers = tuple(config["shift"]), tuple(config["scale"]), config["sharpness"]
        return cls(*numbers, config.get("kept", 0))

    def apply(self, density: Queries) -> Queries:
        """Return the density that is meant by one that is stated: of its type, same batch.

        Of a `Transformed` that of the transformed targets is mapped.
        """
        base, bijector = split_transform(density)
        mapped = type(base)(**self.apply_to(base.tensors(), base.dtype))
        return mapped if bijector is None else Transformed(mapped, bijector)

    def apply_to(self, tensors: Mapping[str, Any], dtype: Any) -> dict[str, tf.Tensor]:
        """Return the tensors of the density that is meant by one of these, by name."""
        shift, scale = (tf.convert_to_tensor(v, dtype) for v in (self.shift, self.scale))
        return self._map(tensors, shift, scale, self.sharpness)

    def undo(self, density: Queries) -> Queries:
        """Return the density of which `apply` makes this one."""
        shift, scale = (tf.convert_to_tensor(v, density.dtype) for v in (self.shift, self.scale))
        found = self._map(density.tensors(), -shift, 1.0 / scale, 1.0 / self.sharpness)
        return type(density)(**found)

    def _map(
        self, tensors: Mapping[str, Any], shift: tf.Tensor, scale: tf.Tensor, sharpness: Any
    ) -> dict[str, tf.Tensor]:
        rows = scale[:, tf.newaxis]  # of a factor [.., D, D] or [.., D, R]
        change = {
            "loc": lambda loc: loc + shift,
            "scale_diag": lambda diagonal: scale * diagonal,
            "scale_tril": lambda factor: rows * factor,
            "factor": lambda factor: rows * factor,
            # The covariance is P^-T P^-1.
            "precision_tril": lambda factor: factor / rows,
        }
        found = {}
        for name, tensor in tensors.items():
            tensor = tf.convert_to_tensor(tensor, shift.dtype)
            if name == "logits":
                found[name] = self.sharpen(tensor, sharpness)
                continue
            found[name] = change[name](tensor)
            if self.kept:
                axis = -2 if name in ("loc", "scale_diag") else -3
                mapped, _ = self._parts(found[name], axis)
                _, kept = self._parts(tensor, axis)
                found[name] = tf.concat([mapped, kept], axis)
        return found

    def _parts(self, tensor: tf.Tensor, axis: int) -> tuple[tf.Tensor, tf.Tensor]:
        """Return what is mapped and what is kept; `axis` is negative, of any length."""
        rest = (slice(None),) * (-1 - axis)
        mapped = Ellipsis, slice(None, -self.kept), *rest
        kept = Ellipsis, slice(-self.kept, None), *rest
        return tensor[mapped], tensor[kept]

    def sharpen(self, logits: tf.Tensor, sharpness: Any, axis: int = -1) -> tf.Tensor:
        """Return the logits of weights to a power; those of the kept components stay."""
        sharpness, logits = tf.cast(sharpness, logits.dtype), tf.nn.log_softmax(logits, axis)
        if not self.kept:
            return sharpness * logits
        others, kept = self._parts(logits, axis)
        total = tf.reduce_logsumexp(others, axis, keepdims=True)
        sharp = total + tf.nn.log_softmax(sharpness * (others - total), axis)
        return tf.concat([sharp, kept], axis)
