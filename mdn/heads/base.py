"""Heads: hidden features [.., H] to a density over y in the user's units.

Each head states its parameter layout once, as an ordered mapping name -> event shape; sizes,
splitting, starting values and tests derive from it. Targets are standardised inside the head: the
network learns in unit scale and the density comes out in the units of y, with its Jacobian.

Shape letters: B batch, T time, H hidden, D event size, K components, P parameters, N rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_probability as tfp
import tf_keras

from mdn.data.checks import check_targets
from mdn.data.resolution import float32_step, resolution
from mdn.density import positivity as scales
from mdn.density import transforms
from mdn.density.packed import lane_sums, packed_log_prob, packed_order
from mdn.density.queries import Queries
from mdn.density.recalibration import Recalibration
from mdn.density.transformed import Transformed, split_transform, to_base
from mdn.errors import ConfigError, DataError
from mdn.fitting.start import NARROWEST_START, Start, cluster

register = tf_keras.saving.register_keras_serializable(package="mdn")

HEADROOM = 1e4  # times the standard deviation of targets, that a density reaches on either side


class Head(tfp.layers.DistributionLambda):
    """A layer from hidden features to a density: a projection to P parameters, then the density.

    Args:
        event_size: D, the number of targets.
        positivity: what makes scales positive: "softplus", "exp" or "elu" (1 + ELU).
        min_scale: the floor of the scales, as a share of each target's standard deviation.
        grid_floor: where `adapt` finds the targets on a grid of step d, the floor is at least
            d / sqrt(12), so that no density spikes on the values of the grid. Training with
            `jitter` prevents that as well, and leaves the scales free.
        kernel_scale: factor on the initial projection; small, so that training starts from the
            starting values that `adapt` finds in the data.
        target_transform: what makes positive or bounded targets fit for normals: "log", "logit"
            ({"name": "logit", "low": 0, "high": 100}), "box_cox" ("power"; by default the one
            most likely for the train rows), a bijector of TFP's (its `forward` increases from the
            whole line to the targets) or its name, or a list with one of these or None for each
            target. The density is then a `mdn.density.Transformed`, in the units of y.
        **kwargs: as for any Keras layer. The density is float32 whatever the compute policy.

    Raises:
        ConfigError: an argument is out of its range.
    """

    def __init__(
        self,
        event_size: int,
        *,
        positivity: str = "softplus",
        min_scale: float = 1e-3,
        grid_floor: bool = True,
        kernel_scale: float = 0.1,
        target_transform: Any = None,
        **kwargs: Any,
    ) -> None:
        if event_size < 1:
            raise ConfigError(f"event_size={event_size}: a density needs at least one target")
        if not min_scale > 0.0:
            raise ConfigError(f"min_scale={min_scale}: the floor of the scales must be positive")
        self.event_size = int(event_size)
        self.positivity = scales.check_positivity(positivity)
        self.min_scale, self.grid_floor = float(min_scale), bool(grid_floor)
        self.kernel_scale = float(kernel_scale)
        self.target_transform = transforms.describe(target_transform, self.event_size)
        kwargs.setdefault("dtype", tf_keras.backend.floatx())
        super().__init__(
            make_distribution_fn=self.distribution,
            convert_to_tensor_fn=tfp.distributions.Distribution.mean,
            **kwargs,
        )
        self._add_statistics()
        self._bijector = self._make_bijector()
        self.recalibration: Recalibration | None = None  # in transformed units; `MDN.recalibrate`
        self.grid: list[float] | None = None  # [D], known from `adapt` on; 0 where there is none
        # The bias is made here and not in `build`, so that `adapt` can set it at any time.
        self.bias = self.add_weight(
            name="bias", shape=[self.params_size], initializer="zeros", dtype=self.dtype
        )
        self._set_start(self._spread_start())

    def _add_statistics(self) -> None:
        d = self.event_size
        self.y_loc = self._statistic("y_loc", [d], 0.0)
        self.y_scale = self._statistic("y_scale", [d], 1.0)
        self.floor = self._statistic("floor", [d], self.min_scale)  # in standardised units

    def _statistic(self, name: str, shape: list[int], value: float) -> tf.Variable:
        initializer = tf_keras.initializers.Constant(value)
        return self.add_weight(
            name=name, shape=shape, initializer=initializer, trainable=False, dtype=self.dtype
        )

    @property
    def statistics(self) -> dict[str, tf.Variable]:
        """What `adapt` finds in the targets beside the start: scaling, floor, powers; by name."""
        names = ("y_loc", "y_scale", "floor", "box_cox_power", "box_cox_join")
        return {name: getattr(self, name) for name in names if hasattr(self, name)}

    def _make_bijector(self) -> Any:
        """Return the bijector of `target_transform`, if any."""
        if self.target_transform is None:
            return None
        powers = [self._power(i) for i in range(self.event_size)]
        if any(power is not None for power in powers):
            # Of the data, and so saved with the weights.
            self.box_cox_power = self._statistic("box_cox_power", [self.event_size], 1.0)
            self.box_cox_join = self._statistic("box_cox_join", [self.event_size], 1.0)
            self.box_cox_power.assign([1.0 if p in (None, "fit") else p for p in powers])
            scale = self.box_cox_power, self.box_cox_join
        else:
            scale = None, None
        return transforms.make_bijector(self.target_transform, self.dtype, *scale)

    def _power(self, i: int) -> float | str | None:
        """Return the power of target i's Box-Cox transform, "fit" where the data say, or None."""
        name, options = transforms.of_target(self.target_transform, i)
        if name != "box_cox":
            return None
        power = options.get("power")
        return "fit" if power is None else float(power)

    def check_domain(self, y: np.ndarray, names: Sequence[str] = ()) -> None:
        """Raise a DataError for the first target that `target_transform` is not defined at.

        Args:
            y: [N, D] or [N, T, D], NaN marks a missing entry.
            names: of the targets, for the message.
        """
        if self._bijector is not None:
            transforms.check_domain(y, self._bijector, self.target_transform, self.dtype, names)

    @property
    def bijector(self) -> Any:
        """What takes the targets that the network sees to those of the user; None: they are."""
        return self._bijector

    @property
    def target_scale(self) -> tf.Tensor:
        """[D], about the standard deviations of the train targets, in the units of y."""
        if self._bijector is None:
            return self.y_scale
        ends = [self._bijector.forward(self.y_loc + s * self.y_scale) for s in (-1.0, 1.0)]
        return 0.5 * (ends[1] - ends[0])

    @property
    def filler(self) -> tf.Tensor:
        """[D], targets in the midst of the data, for rows that count nothing."""
        return self.y_loc if self._bijector is None else self._bijector.forward(self.y_loc)

    # ------------------------------------------------------------------ parameters

    @property
    def layout(self) -> dict[str, tuple[int, ...]]:
        """Parameter name -> event shape, in the order in which the last axis holds them."""
        raise NotImplementedError

    @property
    def params_size(self) -> int:
        """P, the length of the parameter axis."""
        return sum(math.prod(shape) for shape in self.layout.values())

    @property
    def places(self) -> dict[str, np.ndarray]:
        """Parameter name -> where each entry of its event is on the parameter axis."""
        ends = np.cumsum([math.prod(shape) for shape in self.layout.values()])
        parts = np.split(np.arange(self.params_size), ends[:-1])
        return {n: p.reshape(s) for (n, s), p in zip(self.layout.items(), parts, strict=True)}

    @property
    def components(self) -> int:
        """K; one where the head has no mixture."""
        return self.layout["logits"][0] if "logits" in self.layout else 1

    def split(self, params: tf.Tensor) -> dict[str, tf.Tensor]:
        """Return the [.., P] parameters by name, each [.., *event shape]."""
        sizes = [math.prod(shape) for shape in self.layout.values()]
        leading = tf.shape(params)[:-1]
        parts = dict(zip(self.layout, tf.split(params, sizes, axis=-1), strict=True))
        for name, shape in self.layout.items():
            if len(shape) > 1:
                parts[name] = tf.reshape(parts[name], tf.concat([leading, shape], 0))
                # Which is not inferred where the batch is not static.
                parts[name].set_shape([*params.shape[:-1], *shape])
        return parts

    def join(self, parts: dict[str, tf.Tensor]) -> tf.Tensor:
        """Return [.., P] parameters from their parts: the inverse of `split`."""
        flat = []
        for name, shape in self.layout.items():
            leading = tf.shape(parts[name])[: -len(shape)]
            flat.append(tf.reshape(parts[name], tf.concat([leading, [math.prod(shape)]], 0)))
        return tf.concat(flat, axis=-1)

    def distribution(self, params: tf.Tensor) -> Any:
        """Return the density with batch [..] and event [D] of unconstrained params [.., P]."""
        density = self._density(params)
        if self.recalibration is not None:
            density = self.recalibration.apply(density)
        return density if self._bijector is None else Transformed(density, self._bijector)

    def _density(self, params: tf.Tensor) -> Queries:
        """Return the density of the transformed targets."""
        raise NotImplementedError

    def log_prob(self, hidden: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        """Return `self(hidden).log_prob(y)` for y without missing entries, faster.

        The training goes this way: no [D, D] matrix is formed, and the batch is the last axis.

        Args:
            hidden: [.., H].
            y: [.., D], in the user's units.

        Returns:
            [..], nats.
        """
        y = tf.cast(y, self.dtype)
        hidden = tf.reshape(tf.cast(hidden, self.dtype), [-1, hidden.shape[-1]])  # [B, H]
        params = self.packed_params(hidden, self.kernel, self.bias)  # [P, B]
        rows = tf.reshape(y, [1, -1, self.event_size])
        return tf.reshape(self.params_log_prob(params[tf.newaxis], rows), tf.shape(y)[:-1])

    def packed_params(self, hidden: tf.Tensor, kernel: Any, bias: Any) -> tf.Tensor:
        """Return the parameters in the order in which `params_log_prob` takes them, [.., P, B].

        Args:
            hidden: [.., B, H].
            kernel: [.., P, H], as the layer has it.
            bias: [.., P], likewise.
        """
        kernel = _permuted(tf.convert_to_tensor(kernel), self._packed_order, -2)
        bias = _permuted(tf.convert_to_tensor(bias), self._packed_order, -1)
        return _add_to_rows(tf.matmul(kernel, hidden, transpose_b=True), bias)

    @functools.cached_property
    def _packed_order(self) -> np.ndarray:
        """[P], the parameters with the component as the last axis of each, as XLA likes them.

        A triangle comes in the order of `mdn.density.packed.packed_order`. What lies side by side
        in memory is then what a step of a substitution takes.
        """
        found, d = [], self.event_size
        for name, places in self.places.items():
            shape = places.shape
            if name != "logits":
                places = places.reshape([self.components, *self._event(shape)])
                if self._event(shape) == (d * (d + 1) // 2,):
                    places = places[:, packed_order(d)]
                places = np.moveaxis(places, 0, -1)
            found.append(places.ravel())
        return np.concatenate(found)

    def _event(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return a shape of `layout` without the axis of components."""
        return shape[1:] if "logits" in self.layout else shape

    def params_log_prob(self, params: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        """Return the log density of unconstrained parameters whose last axis is the batch.

        Args:
            params: [M, P, B] as `packed_params` makes them, of M heads with the same scaling of y.
            y: [M, B, D], in the user's units, nothing missing.

        Returns:
            [M, B], nats.
        """
        found = self.recalibration
        if found is not None and found.kept != self.fixed_components:
            params = _permuted(params, np.argsort(self._packed_order), -2)
            return self.distribution(tf.transpose(params, [0, 2, 1])).log_prob(y)
        if self._bijector is not None:
            y, log_slope, inside = to_base(self._bijector, y)
        m, k = params.shape[0], self.components
        n = tf.shape(params)[2]
        sizes = [math.prod(shape) for shape in self.layout.values()]
        # Of one head without the first axis: XLA would make the gradient once with it and once
        # without.
        flat = tf.squeeze(params, 0) if m == 1 else params
        parts = dict(zip(self.layout, tf.split(flat, sizes, axis=-2), strict=True))
        logits = parts.pop("logits", None)
        if logits is not None:
            logits = tf.reshape(logits, [m, -1, n])
        for name, part in parts.items():
            shape = [m, *self._event(self.layout[name]), k]
            parts[name] = tf.ensure_shape(tf.reshape(part, [*shape, n]), [*shape, params.shape[2]])
        unit = tf.transpose((y - self.y_loc) / self.y_scale, [0, 2, 1])  # [M, D, B]
        residual = unit[:, :, tf.newaxis] - parts.pop("loc")  # [M, D, K, B]
        if found is None:
            log_prob = self._packed_log_prob(residual, parts)  # [M, K, B]
        else:
            shift, scale = (tf.constant(v, self.dtype) for v in (found.shift, found.scale))
            moved = residual - (shift / self.y_scale)[:, tf.newaxis, tf.newaxis]
            log_prob = self._packed_log_prob(moved / scale[:, tf.newaxis, tf.newaxis], parts)
            log_prob -= tf.reduce_sum(tf.math.log(scale))
            if logits is not None and self.layout["logits"] == (k,):  # without the background
                logits *= tf.constant(found.sharpness, self.dtype)
            elif logits is not None:
                logits = found.sharpen(logits, found.sharpness, axis=-2)
        log_prob = self._mixed_log_prob(log_prob, logits, unit)  # [M, B]
        log_prob -= tf.reduce_sum(tf.math.log(self.y_scale))
        if self._bijector is None:
            return log_prob
        return tf.where(inside, log_prob + log_slope, tf.constant(-math.inf, self.dtype))

    def _mixed_log_prob(
        self, log_prob: tf.Tensor, logits: tf.Tensor | None, unit: tf.Tensor
    ) -> tf.Tensor:
        """Return the log density of the mixture, [M, B], in standardised units.

        Args:
            log_prob: [M, K, B], of the components.
            logits: [M, K, B], or None of a single normal.
            unit: [M, D, B], the standardised targets.
        """
        return log_prob[:, 0]

    def _packed_log_prob(self, residual: tf.Tensor, parts: dict[str, tf.Tensor]) -> tf.Tensor:
        """Return the log densities, [M, K, B], of residuals [M, D, K, B] in standardised units.

        Args:
            residual: nothing missing.
            parts: [M, *event, K, B] of each parameter but the logits and loc.
        """
        raw = parts["unconstrained_scale"]
        return packed_log_prob(residual, raw, self.positivity, self.floor)

    @property
    def fixed_components(self) -> int:
        """How many components at the end are the same for every row, and no map changes."""
        return 0

    def parameters(self, distribution: Any) -> tf.Tensor:
        """Return the params [.., P] of which `distribution` makes this density: its inverse."""
        density, _ = split_transform(distribution)
        if self.recalibration is not None:
            density = self.recalibration.undo(density)
        return self._parameters_of(density)

    def _parameters_of(self, distribution: Any) -> tf.Tensor:
        """Return the params of which `_density` makes this density."""
        raise NotImplementedError

    def _loc(self, raw: tf.Tensor) -> tf.Tensor:
        return self.y_loc + self.y_scale * raw

    def _loc_inverse(self, loc: tf.Tensor) -> tf.Tensor:
        return (loc - self.y_loc) / self.y_scale

    def _scale_tril(self, raw: tf.Tensor) -> tf.Tensor:
        unit = scales.scale_tril(raw, self.positivity, self.floor)
        return self.y_scale[:, tf.newaxis] * unit

    def _scale_tril_inverse(self, scale_tril: tf.Tensor) -> tf.Tensor:
        unit = scale_tril / self.y_scale[:, tf.newaxis]
        return scales.scale_tril_inverse(unit, self.positivity, self.floor)

    def _scale_diag(self, raw: tf.Tensor) -> tf.Tensor:
        return self.y_scale * scales.scale_diag(raw, self.positivity, self.floor)

    def _scale_diag_inverse(self, scale_diag: tf.Tensor) -> tf.Tensor:
        return scales.scale_diag_inverse(scale_diag / self.y_scale, self.positivity, self.floor)

    # ------------------------------------------------------------------ layer

    def build(self, input_shape: Any) -> None:
        """Make the projection for hidden features [.., H]."""
        start = tf_keras.initializers.VarianceScaling(self.kernel_scale**2, mode="fan_in")
        # [P, H] and not as a Dense layer's [H, P]: so `log_prob`, its gradient and the optimizer
        # have it in one order, and nothing of that size is transposed in a train step.
        self.kernel = self.add_weight(
            name="kernel",
            shape=[self.params_size, input_shape[-1]],
            initializer=lambda shape, dtype: tf.transpose(start(shape[::-1], dtype)),
            dtype=self.dtype,
        )
        super().build(input_shape)

    def call(self, inputs: tf.Tensor, *args: Any, **kwargs: Any) -> Any:
        params = tf.tensordot(inputs, self.kernel, axes=[[-1], [1]]) + self.bias  # [.., P]
        params.set_shape([*inputs.shape[:-1], self.params_size])
        return super().call(params, *args, **kwargs)

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the density of hidden features [.., H]: batch [..], event [D]."""
        wrapped = super().__call__(inputs, *args, **kwargs)
        # TFP wraps the density in a class of its own, of which isinstance knows nothing. A
        # symbolic call of Keras's functional API has no density yet, and keeps the wrapper.
        return getattr(wrapped, "tensor_distribution", wrapped)

    def compute_output_shape(self, input_shape: Any) -> tf.TensorShape:
        """Return [.., D], the shape of the density as a tensor (its mean)."""
        return tf.TensorShape([*input_shape[:-1], self.event_size])

    def get_config(self) -> dict[str, Any]:
        found = self.recalibration
        map_config = {} if found is None else {"recalibration": found.to_config()}
        return {
            **map_config,
            "name": self.name,
            "trainable": self.trainable,
            "dtype": self.dtype,
            "event_size": self.event_size,
            "positivity": self.positivity,
            "min_scale": self.min_scale,
            "grid_floor": self.grid_floor,
            "kernel_scale": self.kernel_scale,
            "target_transform": self.target_transform,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Head:
        options = dict(config)
        recalibration = options.pop("recalibration", None)
        head = cls(**options)
        if recalibration is not None:
            head.recalibration = Recalibration.from_config(recalibration)
        return head

    # ------------------------------------------------------------------ starting values

    def adapt(self, y: np.ndarray, *, seed: int = 0) -> None:
        """Set the target scaling, the scale floor and the starting density from train rows.

        Args:
            y: [N, D] or [N, T, D] in the user's units; NaN marks a missing entry.
            seed: of the k-means start.

        Raises:
            DataError: y has no D columns, or a column that is constant, empty, or in a unit in
                which its numbers are too small or too large.
        """
        check_targets(y)
        y = np.asarray(y, np.float64)
        if y.shape[-1] != self.event_size:
            raise DataError(
                f"y has {y.shape[-1]} targets and the head event_size={self.event_size}: "
                "make them equal"
            )
        given = y.reshape([-1, self.event_size])
        y = self._transformed(given)
        loc, scale = np.nanmean(y, axis=0), np.nanstd(y, axis=0)
        self._check_scale(scale)
        self.grid = [resolution(column) for column in given.T]
        self.recalibration = None
        tied = [resolution(column) if self.grid_floor else 0.0 for column in y.T]
        grid = np.maximum(tied, [float32_step(column) for column in y.T])  # [D]
        self._adapt_background(len(given))
        self.y_loc.assign(loc)
        self.y_scale.assign(scale)
        self.floor.assign(np.maximum(self.min_scale, grid / math.sqrt(12.0) / scale))
        rng = np.random.default_rng([seed, 0x6D646E])
        self._set_start(self._start((y - loc) / scale, rng))

    def _check_scale(self, scale: np.ndarray) -> None:
        """Raise a DataError for the first target whose variance the dtype cannot hold."""
        number = np.finfo(self.dtype)
        low, high = math.sqrt(number.tiny) * HEADROOM, math.sqrt(number.max) / HEADROOM
        bad = (scale < low) | (scale > high)
        if bad.any():
            i = int(bad.argmax())
            raise DataError(
                f"target {i} has a standard deviation of {scale[i]:.3g}, and {self.dtype} cannot "
                f"hold its square: give it in a unit in which it is {low:.0e} to {high:.0e}"
            )

    def _adapt_background(self, rows: int) -> None:
        """Set what depends on the number of rows alone."""

    def _start(self, y: np.ndarray, rng: np.random.Generator) -> Start:
        """Return the Gaussians that training starts from, of standardised targets [N, D]."""
        return cluster(y, self.components, rng)

    def _transformed(self, y: np.ndarray) -> np.ndarray:
        """Return y [N, D] in transformed units, once the transform fits the data."""
        if self._bijector is None:
            return y
        self.check_domain(y)
        powers = [self._power(i) for i in range(self.event_size)]
        if any(power is not None for power in powers):
            found = [
                transforms.fit_power(y[:, i]) if power == "fit" else power
                for i, power in enumerate(powers)
            ]
            power = np.array([1.0 if p is None else p for p in found])
            join = np.where(power < 0.0, np.nanmax(y, axis=0), np.nanmin(y, axis=0))
            self.box_cox_power.assign(power)
            self.box_cox_join.assign(np.where([p is None for p in found], 1.0, join))
        return self._bijector.inverse(tf.constant(y, self.dtype)).numpy().astype(np.float64)

    def _spread_start(self) -> Start:
        """Return a start without data: means spread along the diagonal, so that none are equal."""
        k, d = self.components, self.event_size
        centres = (np.arange(k) + 0.5) / k * 4.0 - 2.0 if k > 1 else np.zeros(1)
        scale = np.eye(d) * max(2.0 / k, 2.0 * NARROWEST_START)
        return Start(np.full(k, 1.0 / k), np.tile(centres[:, None], d), np.tile(scale, (k, 1, 1)))

    def _set_start(self, start: Start) -> None:
        loc = self.y_loc + self.y_scale * tf.constant(start.loc, self.dtype)  # [K, D]
        diagonal = np.einsum("kdd->kd", scale_tril := start.scale_tril.copy())
        diagonal[:] = np.maximum(diagonal, self._narrowest_start)
        scale = self.y_scale[:, tf.newaxis] * tf.constant(scale_tril, self.dtype)  # [K, D, D]
        logits = tf.constant(np.log(start.weights), self.dtype)
        self.bias.assign(self._parameters_of(self._from_gaussians(logits, loc, scale)))

    @property
    def _narrowest_start(self) -> np.ndarray:
        """[D], the smallest scales to start from, in standardised units: above the floor."""
        floor = self.floor.numpy().astype(np.float64)
        return np.maximum(2.0 * floor, floor + NARROWEST_START)

    def _from_gaussians(self, logits: tf.Tensor, loc: tf.Tensor, scale_tril: tf.Tensor) -> Queries:
        """Return this head's density of K Gaussians: [K], [K, D], [K, D, D]."""
        raise NotImplementedError


def _permuted(tensor: tf.Tensor, order: np.ndarray, axis: int) -> tf.Tensor:
    """Return the tensor in another order along an axis, with a gradient that gathers as well."""
    if (order == np.arange(len(order))).all():
        return tensor

    @tf.custom_gradient
    def permute(tensor: tf.Tensor) -> tuple[tf.Tensor, Callable]:
        inverse = np.argsort(order)
        return tf.gather(tensor, order, axis=axis), lambda g: tf.gather(g, inverse, axis=axis)

    return permute(tensor)


@tf.custom_gradient
def _add_to_rows(rows: tf.Tensor, bias: tf.Tensor) -> tuple[tf.Tensor, Callable]:
    """Return rows [.., P, B] plus bias [.., P]."""
    return rows + bias[..., tf.newaxis], lambda g: (g, lane_sums(g))
