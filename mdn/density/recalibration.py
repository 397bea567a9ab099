"""A map of densities with a few numbers, that leaves a Gaussian mixture one.

Shape letters: D event size, K components.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import tensorflow as tf

if TYPE_CHECKING:
    from mdn.density.queries import Queries


@dataclasses.dataclass(frozen=True)
class Recalibration:
    """Components that are moved and widened, the same for every density, and weights sharpened.

    Each component y = loc + L z becomes loc + shift + diag(scale) L z, and its weight w becomes
    w^sharpness, normalised. So a density stays of its type, and every question to it exact.

    Attributes:
        shift: D numbers, in the units of y.
        scale: D positive numbers; above one widens.
        sharpness: positive; above one favours the heavy components. Without meaning where K = 1.
    """

    shift: Any
    scale: Any
    sharpness: Any = 1.0

    def to_config(self) -> dict[str, Any]:
        """Return plain numbers, of which `from_config` makes the same map."""
        return {
            "shift": [float(v) for v in self.shift],
            "scale": [float(v) for v in self.scale],
            "sharpness": float(self.sharpness),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Recalibration:
        """Return the map of `to_config`."""
        return cls(tuple(config["shift"]), tuple(config["scale"]), config["sharpness"])

    def apply(self, density: Queries) -> Queries:
        """Return the density that is meant by one that is stated: of its type, same batch."""
        return type(density)(**self.apply_to(density.tensors(), density.dtype))

    def apply_to(self, tensors: Mapping[str, Any], dtype: Any) -> dict[str, tf.Tensor]:
        """Return the tensors of the density that is meant by one of these, by name."""
        shift, scale = (tf.convert_to_tensor(v, dtype) for v in (self.shift, self.scale))
        return self._map(tensors, shift, scale, self.sharpness)

    def undo(self, density: Queries) -> Queries:
        """Return the density of which `apply` makes this one."""
        shift, scale = (tf.convert_to_tensor(v, density.dtype) for v in (self.shift, self.scale))
        found = self._map(density.tensors(), -shift, 1.0 / scale, 1.0 / self.sharpness)
        return type(density)(**found)

    @staticmethod
    def _map(
        tensors: Mapping[str, Any], shift: tf.Tensor, scale: tf.Tensor, sharpness: Any
    ) -> dict[str, tf.Tensor]:
        rows = scale[:, tf.newaxis]  # of a factor [.., D, D] or [.., D, R]
        change = {
            "logits": lambda logits: tf.cast(sharpness, logits.dtype) * tf.nn.log_softmax(logits),
            "loc": lambda loc: loc + shift,
            "scale_diag": lambda diagonal: scale * diagonal,
            "scale_tril": lambda factor: rows * factor,
            "factor": lambda factor: rows * factor,
            # The covariance is P^-T P^-1.
            "precision_tril": lambda factor: factor / rows,
        }
        return {
            name: change[name](tf.convert_to_tensor(tensor, shift.dtype))
            for name, tensor in tensors.items()
        }
