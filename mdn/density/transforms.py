"""Monotone maps between targets and the whole real line, one for each target or one for all.

They are TFP bijectors in TFP's direction: `forward` takes the whole line to the targets, and
`inverse` takes targets to where a Gaussian mixture describes them. A specification is plain data,
which a config and a saved model can hold: a name ("log", "logit", "box_cox", or the name of a
class of `tfp.bijectors`), {"name": .., option: value, ..}, or a list of these and None.

Shape letters: D event size, N rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras
from scipy import optimize
from tensorflow_probability import bijectors as tfb

from mdn.errors import ConfigError, DataError

# name -> (options with their defaults, what the targets must be)
NAMED: dict[str, tuple[dict[str, Any], str]] = {
    "log": ({}, "positive"),
    "logit": ({"low": 0.0, "high": 1.0}, "strictly between low and high"),
    "box_cox": ({"power": None}, "positive"),
}


class BoxCox(tfb.Bijector):
    """The inverse of Box and Cox' (r^power - 1) / power of r = y / join, from the line to y > 0.

    In units of a value near the targets the transform keeps their digits: year^-2 has none.

    The power transform leaves a part of the line out, below -1 / power (above, where the power is
    negative), and a Gaussian has mass there. From `join` on to that side, which holds no train
    row, the transform therefore goes on as the logarithm, of the same value 0 and slope there.

    Args:
        power: [] or [D], also a variable; zero is the logarithm.
        join: of the shape of power, positive; at the end of the train rows.
        target: take only this entry of power and join.

    Source:
        Box and Cox (1964), An analysis of transformations, JRSS B 26.
    """

    def __init__(
        self, power: Any, join: Any, target: int | None = None, name: str = "BoxCox"
    ) -> None:
        parameters = dict(locals())
        self.power, self.join, self.target = power, join, target
        super().__init__(
            forward_min_event_ndims=0, dtype=power.dtype, parameters=parameters, name=name
        )

    @classmethod
    def _parameter_properties(cls, dtype: Any) -> dict[str, Any]:
        return {}

    def _read(self) -> tuple[tf.Tensor, tf.Tensor]:
        """Return power and join as they are now."""
        power, join = tf.convert_to_tensor(self.power), tf.convert_to_tensor(self.join)
        return (power, join) if self.target is None else (power[self.target], join[self.target])

    def _forward(self, x: tf.Tensor) -> tf.Tensor:
        power, join = self._read()
        within = tf.where(power < 0.0, x <= 0.0, x >= 0.0)
        return join * tf.math.exp(tf.where(within, _power_inverse(x, power, within), x))

    def _inverse(self, y: tf.Tensor) -> tf.Tensor:
        power, join = self._read()
        log = tf.math.log(y / join)
        within = tf.where(power < 0.0, log <= 0.0, log >= 0.0)
        return tf.where(within, _power_transform(log, power, within), log)

    def _inverse_log_det_jacobian(self, y: tf.Tensor) -> tf.Tensor:
        power, join = self._read()
        log = tf.math.log(y / join)
        within = tf.where(power < 0.0, tf.minimum(log, 0.0), tf.maximum(log, 0.0))
        return power * within - tf.math.log(y)


def _power_transform(log: tf.Tensor, power: tf.Tensor, within: tf.Tensor) -> tf.Tensor:
    """Return (exp(power log) - 1) / power, and anything finite where not `within`."""
    zero = tf.equal(power, 0.0)
    safe = tf.where(zero, tf.ones_like(power), power)
    log = tf.where(within, log, tf.zeros_like(log))
    return tf.where(zero, log, tf.math.expm1(safe * log) / safe)


def _power_inverse(x: tf.Tensor, power: tf.Tensor, within: tf.Tensor) -> tf.Tensor:
    """Return the log of which x is the transform, and anything finite where not `within`."""
    zero = tf.equal(power, 0.0)
    safe = tf.where(zero, tf.ones_like(power), power)
    x = tf.where(within, x, tf.zeros_like(x))
    return tf.where(zero, x, tf.math.log1p(tf.where(zero, tf.zeros_like(x), safe * x)) / safe)


class PerTarget(tfb.Bijector):
    """One bijector of numbers for each target.

    Args:
        bijectors: D of them; None leaves a target as it is.
    """

    def __init__(self, bijectors: Sequence[tfb.Bijector | None], name: str = "PerTarget") -> None:
        parameters = dict(locals())
        self.bijectors = [tfb.Identity() if b is None else b for b in bijectors]
        super().__init__(forward_min_event_ndims=0, parameters=parameters, name=name)

    @classmethod
    def _parameter_properties(cls, dtype: Any) -> dict[str, Any]:
        return {}

    def _forward(self, x: tf.Tensor) -> tf.Tensor:
        return self._each("forward", x)

    def _inverse(self, y: tf.Tensor) -> tf.Tensor:
        return self._each("inverse", y)

    def _inverse_log_det_jacobian(self, y: tf.Tensor) -> tf.Tensor:
        columns = tf.unstack(y, num=len(self.bijectors), axis=-1)
        slopes = [
            tf.broadcast_to(b.inverse_log_det_jacobian(c, event_ndims=0), tf.shape(c))
            for b, c in zip(self.bijectors, columns, strict=True)
        ]
        return tf.stack(slopes, axis=-1)

    def _each(self, method: str, values: tf.Tensor) -> tf.Tensor:
        columns = tf.unstack(values, num=len(self.bijectors), axis=-1)
        parts = [getattr(b, method)(c) for b, c in zip(self.bijectors, columns, strict=True)]
        return tf.stack(parts, axis=-1)


class Selected(tfb.Bijector):
    """What an elementwise bijector on [.., D] does to some of the targets.

    Args:
        bijector: on [.., D], or of numbers.
        dims: of the targets, in the order in which they come.
        event_size: D.
    """

    def __init__(
        self,
        bijector: tfb.Bijector,
        dims: Sequence[int],
        event_size: int,
        name: str = "Selected",
    ) -> None:
        parameters = dict(locals())
        self.bijector, self.dims, self.event_size = bijector, tuple(dims), event_size
        super().__init__(forward_min_event_ndims=0, parameters=parameters, name=name)

    @classmethod
    def _parameter_properties(cls, dtype: Any) -> dict[str, Any]:
        return {}

    def _forward(self, x: tf.Tensor) -> tf.Tensor:
        return self._take(self.bijector.forward(self._fill(x, tf.zeros([], x.dtype))))

    def _inverse(self, y: tf.Tensor) -> tf.Tensor:
        return self._take(self.bijector.inverse(self._fill(y, self._inner(y.dtype))))

    def _inverse_log_det_jacobian(self, y: tf.Tensor) -> tf.Tensor:
        full = self._fill(y, self._inner(y.dtype))
        slopes = self.bijector.inverse_log_det_jacobian(full, event_ndims=0)
        return self._take(slopes + tf.zeros_like(full))

    def _inner(self, dtype: tf.DType) -> tf.Tensor:
        """Return targets in the domain, [D]."""
        return self.bijector.forward(tf.zeros([self.event_size], dtype))

    def _fill(self, values: tf.Tensor, others: tf.Tensor) -> tf.Tensor:
        """Return [.., D] with the selected targets, and others in the places between."""
        others = tf.broadcast_to(others, [self.event_size])
        columns = tf.unstack(values, num=len(self.dims), axis=-1)
        full = [others[d] + tf.zeros_like(columns[0]) for d in range(self.event_size)]
        for dim, column in zip(self.dims, columns, strict=True):
            full[dim] = column
        return tf.stack(full, axis=-1)

    def _take(self, full: tf.Tensor) -> tf.Tensor:
        return tf.gather(full, self.dims, axis=-1)


def select(bijector: tfb.Bijector, dims: Sequence[int], event_size: int) -> tfb.Bijector:
    """Return what a bijector on [.., D] does to some of D targets, as plainly as it can be."""
    if isinstance(bijector, tfb.Exp) or list(dims) == list(range(event_size)):
        return bijector
    if isinstance(bijector, PerTarget):
        return PerTarget([bijector.bijectors[dim] for dim in dims])
    if isinstance(bijector, Selected):
        return Selected(bijector.bijector, [bijector.dims[d] for d in dims], bijector.event_size)
    return Selected(bijector, dims, event_size)


def is_same(one: Any, other: Any) -> bool:
    """Whether two bijectors, or None, are one transform: of the same type and numbers.

    TFP's comparison does not look into variables, which the power of a Box-Cox transform is.
    """
    if one is other or type(one) is not type(other):
        return one is other
    if isinstance(one, PerTarget):
        pairs = zip(one.bijectors, other.bijectors, strict=False)
        return len(one.bijectors) == len(other.bijectors) and all(is_same(*pair) for pair in pairs)
    if isinstance(one, Selected):
        places = (one.dims, one.event_size) == (other.dims, other.event_size)
        return places and is_same(one.bijector, other.bijector)
    if isinstance(one, BoxCox):
        with tf.init_scope():  # where variables have values, also while a function is traced
            values = [[np.asarray(part) for part in b._read()] for b in (one, other)]
        return all(map(np.array_equal, *values))
    return one == other


# ---------------------------------------------------------------------- specifications


def describe(transform: Any, event_size: int) -> Any:
    """Return the specification, as plain data, of one or of a bijector.

    Args:
        transform: None, a specification, a bijector, or a list with one of these for each target.
        event_size: D.

    Raises:
        ConfigError: it is none, or not for D targets.
    """
    if isinstance(transform, list | tuple):
        if len(transform) != event_size:
            raise ConfigError(
                f"target_transform has {len(transform)} entries for {event_size} targets: give "
                "one for each (null leaves a target as it is), or one for all"
            )
        return [describe(one, 1) for one in transform]
    if isinstance(transform, tfb.Bijector):
        return _describe_bijector(transform)
    if transform is None or isinstance(transform, str):
        return transform
    if isinstance(transform, dict) and isinstance(transform.get("name"), str):
        return dict(transform)
    raise ConfigError(
        f"target_transform={transform!r} is unknown: give a name such as log, a mapping such as "
        "{name: logit, low: 0, high: 100}, or a bijector"
    )


def _describe_bijector(bijector: tfb.Bijector) -> dict[str, Any]:
    kind = type(bijector)
    name = kind.__name__.lstrip("_")
    if getattr(tfb, name, None) is None or not isinstance(bijector, getattr(tfb, name)):
        name = tf_keras.saving.get_registered_name(kind)
        if tf_keras.saving.get_registered_object(name) is not kind:
            raise ConfigError(
                f"target_transform={kind.__name__}: a saved model could not find it again; "
                "decorate it with tf_keras.saving.register_keras_serializable()"
            )
        return {"name": name, **bijector.get_config()}
    defaults = {key: p.default for key, p in inspect.signature(kind.__init__).parameters.items()}
    options = {
        key: _plain(value, name)
        for key, value in bijector.parameters.items()
        if key in defaults
        and key not in ("name", "validate_args", "parameters")
        and value is not defaults[key]
    }
    return {"name": name, **options}


def _plain(value: Any, name: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tfb.Bijector):
        return _describe_bijector(value)
    if isinstance(value, list | tuple):
        return [_plain(one, name) for one in value]
    if isinstance(value, np.ndarray | np.generic | tf.Tensor):
        return np.asarray(value).tolist()
    raise ConfigError(
        f"target_transform={name}: {value!r} is no number or bijector, which a saved model could "
        "hold; write a bijector class of your own and register it"
    )


def make_bijector(
    specification: Any, dtype: str, power: Any = None, join: Any = None, target: int | None = None
) -> tfb.Bijector:
    """Return the bijector of a specification of `describe` that is not None.

    Args:
        specification: for all targets, or a list.
        dtype: of the targets.
        power: [D], of Box-Cox transforms.
        join: [D], of Box-Cox transforms.
        target: the one it is for, where it is not for all.

    Raises:
        ConfigError: there is no such bijector of numbers, or it does not increase.
    """
    if isinstance(specification, list):
        return PerTarget(
            [
                None if one is None else make_bijector(one, dtype, power, join, i)
                for i, one in enumerate(specification)
            ]
        )
    options = {"name": specification} if isinstance(specification, str) else dict(specification)
    name = options.pop("name")
    if name in NAMED:
        allowed = NAMED[name][0]
        if unknown := [key for key in options if key not in allowed]:
            raise ConfigError(
                f"target_transform={name}: {unknown[0]} is no option of it; "
                + (f"choose of {', '.join(allowed)}" if allowed else "it has none")
            )
        if name == "log":
            return tfb.Exp()
        if name == "box_cox":
            return BoxCox(power, join, target)
        bounds = {**allowed, **options}
        if not bounds["low"] < bounds["high"]:
            raise ConfigError(
                f"target_transform=logit: low={bounds['low']} must be below high={bounds['high']}"
            )
        return tfb.Sigmoid(**{key: tf.constant(value, dtype) for key, value in bounds.items()})
    return _make_named(name, options, dtype)


def _make_named(name: str, options: dict[str, Any], dtype: str) -> tfb.Bijector:
    kind = getattr(tfb, name, None) or tf_keras.saving.get_registered_object(name)
    if not (inspect.isclass(kind) and issubclass(kind, tfb.Bijector)):
        raise ConfigError(
            f"target_transform={name} is unknown: choose one of {', '.join(NAMED)}, or the name "
            "of a class of tfp.bijectors such as Softplus"
        )
    try:
        bijector: Any = kind(**{key: _revive(value, dtype) for key, value in options.items()})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"target_transform={name}: {' '.join(str(error).split())}") from error
    numbers = bijector.forward_min_event_ndims == bijector.inverse_min_event_ndims == 0
    grid = tf.cast(tf.linspace(-1.0, 1.0, 5), dtype)
    if not numbers or not np.all(np.diff(bijector.forward(grid)) > 0.0):
        raise ConfigError(f"target_transform={name}: must map each number by itself, and increase")
    return bijector


def _revive(value: Any, dtype: str) -> Any:
    """Return an option of a bijector of what `_plain` made of it."""
    if isinstance(value, dict):
        return _make_named(value["name"], {k: v for k, v in value.items() if k != "name"}, dtype)
    if isinstance(value, list):
        return [_revive(one, dtype) for one in value]
    return tf.constant(value, dtype) if isinstance(value, float) else value


# ---------------------------------------------------------------------- targets


def of_target(specification: Any, i: int) -> tuple[str | None, dict[str, Any]]:
    """Return the name and the options of the transform of target i; None leaves it as it is."""
    one = specification[i] if isinstance(specification, list) else specification
    if one is None or isinstance(one, str):
        return one, {}
    options = dict(one)
    return options.pop("name"), options


def check_domain(
    y: np.ndarray,
    bijector: tfb.Bijector,
    specification: Any,
    dtype: str,
    names: Sequence[str] = (),
) -> None:
    """Check that a transform is defined at each target that is there.

    Args:
        y: [N, D] or [N, T, D]; NaN marks a missing entry.
        bijector: of the specification.
        specification: of `describe`.
        dtype: of the bijector.
        names: of the D targets, for the message.

    Raises:
        DataError: the first target that is outside of the domain.
    """
    y = np.asarray(y, dtype)
    bad = ~np.isnan(y) & ~np.isfinite(np.asarray(bijector.inverse(tf.constant(y))))
    if not bad.any():
        return
    row, *_, i = (int(index) for index in np.argwhere(bad)[0])
    name, options = of_target(specification, i)
    label = f"target {names[i]!r}" if names else f"target {i}"
    defaults, domain = NAMED.get(str(name), ({}, f"a value of the {name}"))
    for key, value in {**defaults, **options}.items():
        domain = domain.replace(key, f"{key}={value}")
    raise DataError(
        f"{label} is {y[bad][0]:.6g} in row {row}: with target_transform={name} it must be "
        f"{domain}; mend or drop that row, or choose another transform"
    )


def fit_power(y: np.ndarray) -> float:
    """Return the power between -2 and 2 that makes positive y [N] most like a normal's.

    By maximum likelihood; NaN is left out.
    """
    log = np.log(y[~np.isnan(y)])
    log = log - log.mean()  # in units of the geometric mean, in which the slopes have a mean log 0

    def cost(power: float) -> float:
        return np.log(np.var(log if abs(power) < 1e-6 else np.expm1(power * log) / power))

    return float(optimize.minimize_scalar(cost, bounds=(-2.0, 2.0), method="bounded").x)
