"""A class of distributions as a function of one vector of unconstrained numbers.

Shape letters: S starts, P unconstrained numbers, D event size, K components.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from tensorflow_probability import distributions as tfd

from mdn import density
from mdn.density import positivity as scales
from mdn.errors import ConfigError

Initial = Mapping[str, Any] | Callable[..., Any] | None

# A parameter that people give, and the one that TFP prefers to learn in its place.
_ALTERNATIVES = {"rate": "log_rate", "probs": "logits", "concentration": "log_concentration"}
# TFP's types that cannot marginalise, and those of the same name that can.
_OWN = {
    tfd.MultivariateNormalDiag: density.MultivariateNormalDiag,
    tfd.MultivariateNormalTriL: density.MultivariateNormalTriL,
}
_GAUSSIAN = (
    density.MultivariateNormalDiag,
    density.MultivariateNormalTriL,
    density.GaussianMixture,
)

# Types that an affine map of y leaves of the same type, and types that a change of its unit does.
LOCATION_SCALE = (
    tfd.Normal,
    tfd.Laplace,
    tfd.Logistic,
    tfd.Cauchy,
    tfd.Gumbel,
    tfd.StudentT,
    tfd.Moyal,
    tfd.JohnsonSU,
    tfd.GeneralizedNormal,
    tfd.TwoPieceNormal,
    tfd.TwoPieceStudentT,
    *_GAUSSIAN,
)
SCALE = (tfd.HalfNormal, tfd.HalfCauchy, tfd.Weibull, tfd.InverseGamma)


class Parameter(NamedTuple):
    """How one parameter of a distribution is made of unconstrained numbers."""

    shape: tuple[int, ...]  # of the parameter
    raw: tuple[int, ...]  # of the unconstrained numbers
    forward: Callable[[tf.Tensor], tf.Tensor]
    inverse: Callable[[tf.Tensor], tf.Tensor]


def find_class(distribution: type | str) -> type[tfd.Distribution]:
    """Return the class of this name, from `mdn.density` or else TFP; a class is returned as is.

    Normals of TFP's become those of `mdn`, subclasses that marginalise missing entries.

    Raises:
        ConfigError: there is no such distribution, or it is made of others.
    """
    found: Any = distribution
    if isinstance(distribution, str):
        found = getattr(density, distribution, None) or getattr(tfd, distribution, None)
    if not (isinstance(found, type) and issubclass(found, tfd.Distribution)):
        raise ConfigError(
            f"distribution={distribution}: is no distribution; give GaussianMixture or a class of "
            "tfp.distributions, such as Normal"
        )
    kind: Any = found
    if kind in (tfd.MixtureSameFamily, tfd.Mixture):
        raise ConfigError(
            f"distribution={kind.__name__} does not say of what: use GaussianMixture"
        )
    try:
        kind.parameter_properties(dtype=tf.float32)
    except NotImplementedError as error:
        raise ConfigError(
            f"{kind.__name__} cannot be learned: it does not state its parameters"
        ) from error
    return _OWN.get(kind, kind)


def find_layout(
    kind: type[tfd.Distribution],
    shape: Sequence[int],
    names: Sequence[str] = (),
    fixed: Sequence[str] = (),
    *,
    components: int | None = None,
    dtype: tf.DType = tf.float64,
    positivity: str = "softplus",
    floor: Any = 0.0,
) -> dict[str, Parameter]:
    """Return the parameters of a class of distributions, by name.

    Args:
        kind: the class, as `find_class` returns it.
        shape: batch and event shape of one distribution.
        names: parameters that were given: they replace those that TFP prefers to learn.
        fixed: those of them that are not learned, and need no unconstrained form.
        components: K, for a mixture.
        dtype: of the parameters.
        positivity: what makes scales of normals and their mixtures positive.
        floor: [D] or a number, the smallest of those scales.

    Raises:
        ConfigError: `components` is missing or out of place, or the class cannot be learned.
    """
    mixture = issubclass(kind, density.GaussianMixture)
    if mixture and components is None:
        raise ConfigError(f"{kind.__name__} needs its number of components: give components=3 (k)")
    if not mixture and components is not None:
        raise ConfigError(
            f"components={components}: {kind.__name__} has no components; use GaussianMixture"
        )
    if issubclass(kind, _GAUSSIAN):
        return _gaussian_layout(kind, tuple(shape), components, dtype, positivity, floor)
    properties = kind.parameter_properties(dtype=dtype)
    chosen = {name: p.is_preferred for name, p in properties.items() if p.is_tensor}
    for given, preferred in _ALTERNATIVES.items():
        if given in names and given in chosen and preferred in chosen:
            chosen |= {given: True, preferred: False}
    layout = {}
    for name in (name for name, wanted in chosen.items() if wanted):
        try:
            own = tuple(tf.TensorShape(properties[name].shape_fn(list(shape))).as_list())
            if name in fixed:
                layout[name] = Parameter(own, own, tf.identity, tf.identity)
                continue
            bijector = properties[name].default_constraining_bijector_fn()
            raw = tuple(bijector.inverse_event_shape(own).as_list())
        except (NotImplementedError, TypeError, ValueError, IndexError) as error:
            raise ConfigError(
                f"{kind.__name__} cannot be learned from y [N, {', '.join(map(str, shape))}]: TFP "
                f"has no unconstrained form of {name}; give its value as fixed"
            ) from error
        layout[name] = Parameter(own, raw, bijector.forward, bijector.inverse)
    if not layout:
        raise ConfigError(f"{kind.__name__} has no parameters to learn")
    return layout


def _gaussian_layout(
    kind: type[tfd.Distribution],
    shape: tuple[int, ...],
    components: int | None,
    dtype: tf.DType,
    positivity: str,
    floor: Any,
) -> dict[str, Parameter]:
    scales.check_positivity(positivity)
    if not shape:
        raise ConfigError(f"y has shape [N]: {kind.__name__} needs [N, D]; [N, 1] for D = 1")
    d = shape[-1]
    leading = shape[:-1] if components is None else (*shape[:-1], components)
    low = tf.broadcast_to(tf.constant(floor, dtype), [d])
    layout = {"loc": Parameter((*leading, d), (*leading, d), tf.identity, tf.identity)}
    if components is not None:
        layout["logits"] = Parameter(leading, leading, tf.identity, tf.identity)
    if issubclass(kind, density.MultivariateNormalDiag | density.DiagGaussianMixture):
        layout["scale_diag"] = Parameter(
            (*leading, d),
            (*leading, d),
            lambda raw: scales.scale_diag(raw, positivity, low),
            lambda scale: scales.scale_diag_inverse(scale, positivity, low),
        )
    else:
        layout["scale_tril"] = Parameter(
            (*leading, d, d),
            (*leading, d * (d + 1) // 2),
            lambda raw: scales.scale_tril(raw, positivity, low),
            lambda scale: scales.scale_tril_inverse(scale, positivity, low),
        )
    return layout


def resolve_names(values: Mapping[str, Any], kind: type[tfd.Distribution]) -> dict[str, Any]:
    """Return the values under the names that the class has.

    `scale` stands for `scale_diag` or `scale_tril`, and `covariance` gives `scale_tril`.

    Raises:
        ConfigError: the class has no such parameter.
    """
    known = list(kind.parameter_properties(dtype=tf.float32))
    resolved = {}
    for name, value in values.items():
        if name == "covariance" and "scale_tril" in known:
            name, value = "scale_tril", value if value is None else _cholesky(value)
        elif name == "scale" and name not in known:
            name = next((n for n in ("scale_diag", "scale_tril") if n in known), name)
        if name not in known:
            raise ConfigError(
                f"{name} is no parameter of {kind.__name__}: it has {', '.join(known)}"
            )
        resolved[name] = value
    return resolved


def _cholesky(covariance: Any) -> np.ndarray:
    try:
        array = np.asarray(covariance, np.float64)
        if array.ndim == 0:  # a sphere
            return np.linalg.cholesky(array[np.newaxis, np.newaxis])[0, 0]
        if not np.allclose(array, array.swapaxes(-1, -2)):
            raise ConfigError(f"covariance={array.tolist()} is not symmetric")
        return np.linalg.cholesky(array)
    except (np.linalg.LinAlgError, TypeError) as error:
        shown = " ".join(str(covariance).split())
        raise ConfigError(f"covariance={shown} is not positive definite") from error


def as_array(name: str, value: Any, parameter: Parameter) -> np.ndarray:
    """Return a value as an array of the parameter's own shape; a number may stand for a sphere.

    Raises:
        ConfigError: it has another shape, is not finite, or is no scale though its name says so.
    """
    shown = f"{name}={' '.join(str(value).split())}"
    try:
        array = np.asarray(value, np.float64)
        if name == "scale_tril" and array.ndim == 0:
            array = array * np.eye(parameter.shape[-1])
        array = np.broadcast_to(array, parameter.shape)
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{shown}: must be numbers of shape {list(parameter.shape)}, or one that "
            "broadcasts to it"
        ) from error
    if not np.isfinite(array).all():
        raise ConfigError(f"{shown}: must be finite")
    if name == "scale_tril" and np.triu(array, 1).any():
        raise ConfigError(f"{shown}: must be lower triangular; give covariance instead")
    lengths = np.diagonal(array, axis1=-2, axis2=-1) if name == "scale_tril" else array
    if name.startswith("scale") and (lengths <= 0.0).any():
        raise ConfigError(f"{shown}: must be positive")
    return array


class Trainable:
    """A class of distributions whose free parameters are one vector of unconstrained numbers.

    Args:
        kind: the class.
        layout: of all its parameters.
        fixed: name -> array of those that are not learned.
        dtype: of the parameters.

    Attributes:
        free: names of the parameters that are learned.
        size: P, the length of the vector.

    Raises:
        ConfigError: nothing is left to learn.
    """

    def __init__(
        self,
        kind: type[tfd.Distribution],
        layout: Mapping[str, Parameter],
        fixed: Mapping[str, np.ndarray],
        dtype: tf.DType,
    ) -> None:
        self.kind, self.layout, self.dtype = kind, layout, dtype
        self.free = [name for name in layout if name not in fixed]
        if not self.free:
            raise ConfigError(f"fixed={sorted(fixed)} leaves no parameter to learn: free one")
        self.fixed = {name: tf.constant(value, dtype) for name, value in fixed.items()}
        self.size = sum(math.prod(layout[name].raw) for name in self.free)

    def parameters(self, position: tf.Tensor) -> dict[str, tf.Tensor]:
        """Return the parameters by name, each [.., *shape], of unconstrained numbers [.., P]."""
        leading = position.shape[:-1].as_list()
        parameters = {
            name: tf.broadcast_to(value, [*leading, *value.shape])
            for name, value in self.fixed.items()
        }
        sizes = [math.prod(self.layout[name].raw) for name in self.free]
        for name, part in zip(self.free, tf.split(position, sizes, axis=-1), strict=True):
            raw = tf.reshape(part, [*leading, *self.layout[name].raw])
            parameters[name] = self.layout[name].forward(raw)
        return parameters

    def distribution(self, position: tf.Tensor) -> tfd.Distribution:
        """Return the distribution of unconstrained numbers [.., P]: batch [.., *batch]."""
        return self.kind(**self.parameters(position))

    def position(self, values: Mapping[str, np.ndarray], default: np.ndarray) -> np.ndarray:
        """Return the unconstrained numbers [P] of these parameters.

        Args:
            values: name -> array of the parameter's shape.
            default: [P], the numbers of the parameters that have no value.

        Raises:
            ConfigError: a value is outside of the parameter's domain.
        """
        parts, start = [], 0
        for name in self.free:
            stop = start + math.prod(self.layout[name].raw)
            part = default[start:stop]
            if name in values:
                given = tf.constant(values[name], self.dtype)
                part = self.layout[name].inverse(given).numpy().ravel()
                if not np.isfinite(part).all():
                    raise ConfigError(
                        f"the initial value of {name} is outside of its domain, or at the floor "
                        "of the scales: give another"
                    )
            parts.append(part)
            start = stop
        return np.concatenate(parts)
