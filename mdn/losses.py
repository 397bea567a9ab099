"""Scores to minimise: [.., D] targets and a density to one number per example.

Shape letters: B batch, D event size, K components, S directions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf
import tf_keras

from mdn.density import MultivariateNormalDiag, Transformed
from mdn.density.cells import log_cell, log_cell_density
from mdn.density.scores import component_energy_score
from mdn.density.univariate import Margins
from mdn.density.univariate import crps as margin_crps
from mdn.errors import ConfigError, DataError

if TYPE_CHECKING:
    from mdn.heads.base import Head

Loss = Callable[[tf.Tensor, Any], tf.Tensor]

register = tf_keras.saving.register_keras_serializable(package="mdn")


@register
def nll(y: tf.Tensor, density: Any) -> tf.Tensor:
    """Return each example's negative log likelihood, -log p(y | x): strictly proper.

    Args:
        y: [.., D], targets in their original units; NaN marks a missing entry.
        density: batch [..], event [D].

    Returns:
        [..], nats per example (not per dimension).

    Raises:
        DataError: y does not have the shape of the density's event; a stray [B] would broadcast
            and train wrongly.

    Source:
        Bishop (1994), Mixture Density Networks, NCRG/94/004.
    """
    return -density.log_prob(_targets(y, density))


@register
def crps(y: tf.Tensor, density: Any) -> tf.Tensor:
    """Return the continuous ranked probability score, in closed form.

    Of transformed targets it is in the units of y, and an integral by quadrature.

    Of several targets it is the mean over those that are there of the scores of their margins: a
    proper score, but strictly so of the margins alone, as it does not see how targets depend on
    each other. `energy` does.

    Args:
        y: [.., D], in the units of the targets; NaN marks a missing entry.
        density: batch [..], event [D].

    Returns:
        [..], in the units of y: targets should be of like units. Zero where all are missing.

    Source:
        Gneiting and Raftery (2007), Strictly proper scoring rules, prediction, and estimation,
        JASA 102; Grimit et al. (2006), The continuous ranked probability score for circular
        variables and its application to mesoscale forecast ensemble verification, QJRMS 132.
    """
    y = _targets(y, density)
    missing = tf.math.is_nan(y)
    score = tf.where(missing, tf.zeros_like(y), density.crps(y))
    present = tf.reduce_sum(tf.cast(~missing, score.dtype), axis=-1)
    return tf.math.divide_no_nan(tf.reduce_sum(score, axis=-1), present)


@register
class Energy:
    """The energy score E|Y - y| - E|Y - Y'| / 2, strictly proper for any number of targets.

    A distance is, up to a factor, the mean over all directions of the distance of projections; so
    the score is the mean CRPS of the projections of the density on directions, each of which is a
    mixture of normals on a line and has a closed form. Only the directions are drawn, S for each
    batch: the estimate is unbiased, its gradient is exact, and no sample of the density is needed.
    For one target nothing is drawn, and the score is the CRPS.

    The directions are a function of the seed, of y and of the means: fresh ones at every step of
    training, and the same again for the same batch and weights. A missing entry is marginalised.

    Of several transformed targets the projections have no such form: S draws from each component
    take their place, in the units of y, also without bias and with all gradients.

    Args:
        directions: S; of transformed targets at least two are taken.
        seed: of the directions.

    Raises:
        ConfigError: S is below one.

    Source:
        Gneiting and Raftery (2007), Strictly proper scoring rules, prediction, and estimation,
        JASA 102. Projections: Szekely and Rizzo (2013), Energy statistics, JSPI 143.
    """

    def __init__(self, directions: int = 32, seed: int = 0) -> None:
        if directions < 1:
            raise ConfigError(f"loss=energy: directions={directions} must be at least 1")
        self.directions, self.seed = int(directions), int(seed)

    def __call__(self, y: tf.Tensor, density: Any) -> tf.Tensor:
        """Return [..], in the units of y: targets should be of like units.

        Args:
            y: [.., D], NaN marks a missing entry.
            density: batch [..], event [D].
        """
        y = _targets(y, density)
        d = y.shape[-1]
        if isinstance(density, Transformed):
            if d == 1:
                return crps(y, density)
            parameters = density.distribution.mixture_parameters()
            seed = _fingerprint(y, parameters.loc) + tf.constant([self.seed, 0])
            draws = max(self.directions, 2)
            return component_energy_score(parameters, density.bijector.forward, y, draws, seed)
        logits, loc, scale_tril = density.mixture_parameters()
        missing = tf.math.is_nan(y)[..., tf.newaxis, :]  # [.., 1, D]
        count = 1 if d == 1 else self.directions
        if d == 1:
            normals = tf.ones([1, 1], y.dtype)
        else:
            seed = _fingerprint(y, loc) + tf.constant([self.seed, 0])
            normals = tf.random.stateless_normal([count, d], seed, dtype=y.dtype, alg="philox")
        normals = tf.where(missing, tf.zeros_like(normals), normals)  # [.., S, D]
        length = tf.norm(normals, axis=-1, keepdims=True)
        direction = tf.math.divide_no_nan(normals, length)
        some = tf.reduce_any(~missing, axis=-1)  # [.., 1]
        spread = tf.norm(tf.einsum("...sd,...kde->...ske", direction, scale_tril), axis=-1)
        known = tf.where(missing[..., 0, :], tf.zeros_like(y), y)
        projections = Margins(
            tf.nn.log_softmax(logits)[..., tf.newaxis, :],
            tf.einsum("...sd,...kd->...sk", direction, loc),
            # A row without targets has no direction, and no score.
            tf.where(some[..., tf.newaxis], spread, tf.ones_like(spread)),
        )
        score = margin_crps(
            projections, tf.einsum("...sd,...d->...s", direction, known)
        )  # [.., S]
        observed = tf.reduce_sum(tf.cast(~missing[..., 0, :], y.dtype), axis=-1)
        # One over the mean length of a projection of a unit vector.
        half = 0.5 * tf.maximum(observed, 1.0)
        ratio = tf.math.exp(tf.math.lgamma(half + 0.5) - tf.math.lgamma(half))
        factor = math.sqrt(math.pi) * ratio
        return tf.where(
            observed > 0.0, factor * tf.reduce_mean(score, axis=-1), tf.zeros_like(observed)
        )

    def get_config(self) -> dict[str, Any]:
        return {"directions": self.directions, "seed": self.seed}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Energy:
        return cls(**config)


def _fingerprint(*tensors: tf.Tensor) -> tf.Tensor:
    """Return int32 [2] that any change of the numbers, or of their order, changes."""
    bits = tf.concat(
        [tf.reshape(tf.bitcast(tf.cast(t, tf.float32), tf.int32), [-1]) for t in tensors], axis=0
    )
    place = tf.range(tf.size(bits))
    # Odd multipliers; overflow wraps around.
    mixed = [bits * (place * m + n) for m, n in ((2_654_436, 40_503), (1_640_530, 7_919))]
    return tf.stack([tf.reduce_sum(one) for one in mixed])


@register
class BetaNLL:
    """The NLL with each example's gradient weighed by its variance to the power beta.

    Where the density fits badly its variance grows, and the gradient of the mean shrinks; the
    weight, through which no gradient flows, gives it back. beta = 0 is the NLL, beta = 1 the
    gradient of a squared error in the mean. It is no scoring rule and not proper: its values
    compare with nothing, but its stationary points are those of the NLL where the model can match
    the data.

    The paper's loss is that of one normal per target, which `model=diag` is. Of any other density
    the weight of a row is beta times the geometric mean of the variances of its targets.

    Args:
        beta: between 0 and 1.

    Raises:
        ConfigError: beta is outside of its range.

    Source:
        Seitzer et al. (2022), On the pitfalls of heteroscedastic uncertainty estimation with
        probabilistic neural networks, ICLR.
    """

    def __init__(self, beta: float = 0.5) -> None:
        if not 0.0 <= beta <= 1.0:
            raise ConfigError(f"loss=beta_nll: beta={beta} must be between 0 and 1")
        self.beta = float(beta)

    def __call__(self, y: tf.Tensor, density: Any) -> tf.Tensor:
        """Return [..]: nats times the variance to the power beta.

        Args:
            y: [.., D], NaN marks a missing entry.
            density: batch [..], event [D].
        """
        y = _targets(y, density)
        log_variance = tf.stop_gradient(2.0 * tf.math.log(density.stddev()))  # [.., D]
        if isinstance(density, MultivariateNormalDiag):
            one = MultivariateNormalDiag(
                density.loc[..., tf.newaxis], density.scale_diag[..., tf.newaxis]
            )  # batch [.., D], event [1]
            weight = tf.math.exp(self.beta * log_variance)
            return -tf.reduce_sum(weight * one.log_prob(y[..., tf.newaxis]), axis=-1)
        weight = tf.math.exp(self.beta * tf.reduce_mean(log_variance, axis=-1))
        return -weight * density.log_prob(y)

    def get_config(self) -> dict[str, Any]:
        return {"beta": self.beta}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> BetaNLL:
        return cls(**config)


@register
class IntervalNLL:
    """-ln P(cell), where targets stand on a grid and y is short for the cell around it.

    Whole minutes, counts, or what an instrument rounded: the probability of the cell from
    y - step / 2 to y + step / 2 is what a density can be asked for. It is the log score of the
    discrete distribution of the cells, which is strictly proper, and stays finite where a density
    is narrower than a cell. Of several targets the cells are boxes, whose probability has a closed
    form under diagonal covariances; of two targets with full covariances it is a quadrature, whose
    error is stated in `mdn.density.rectangle.log_rectangle`. A cell of transformed targets ends
    where their domain does.

    Args:
        step: of the grid, for all targets or one for each, in their units.

    Raises:
        ConfigError: a step is not positive.

    Source:
        Heitjan (1989), Inference from grouped continuous data: a review, Statistical Science 4.
    """

    def __init__(self, step: float | Sequence[float]) -> None:
        self.step = np.asarray(step, np.float64).tolist()
        if not np.all(np.asarray(self.step) > 0.0):
            raise ConfigError(f"loss=interval_nll: step={self.step} must be positive")

    def __call__(self, y: tf.Tensor, density: Any) -> tf.Tensor:
        """Return [..], nats per example.

        Args:
            y: [.., D], NaN marks a missing entry.
            density: batch [..], event [D], of more than two targets with diagonal covariances.
        """
        y = _targets(y, density)
        return -log_cell(density, y, tf.constant(self.step, y.dtype))

    def get_config(self) -> dict[str, Any]:
        return {"step": self.step}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> IntervalNLL:
        return cls(**config)


@register
class CellNLL:
    """-ln of the mean density over the cell around y, where y was rounded to a grid.

    That is the interval NLL plus the log of the volume of a cell: in nats of the units of y, so
    that it compares with the NLL of targets that are on no grid, which it is for these.

    Args:
        step: of the grid, in the units of y: [D], zero where a target is on none; or what
            broadcasts to the shape of y.
        points: of each box, where only a mean over points of it is known (see
            `mdn.density.cells.log_cell_density`).
    """

    def __init__(self, step: Any, points: int = 16) -> None:
        self.step, self.points = np.asarray(step, np.float64).tolist(), int(points)

    def __call__(self, y: tf.Tensor, density: Any) -> tf.Tensor:
        """Return [..], nats per example.

        Args:
            y: [.., D], NaN marks a missing entry.
            density: batch [..], event [D].
        """
        y = _targets(y, density)
        return -log_cell_density(density, y, tf.constant(self.step, y.dtype), self.points)

    def get_config(self) -> dict[str, Any]:
        return {"step": self.step, "points": self.points}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> CellNLL:
        return cls(**config)


def _targets(y: tf.Tensor, density: Any) -> tf.Tensor:
    """Return y in the density's dtype.

    Raises:
        DataError: its shape is not that of the density.
    """
    y = tf.convert_to_tensor(y)
    batch = density.batch_shape.rank
    if None not in (batch, y.shape.rank) and y.shape.rank != batch + 1:
        raise DataError(
            f"y has shape {y.shape} for densities of batch {density.batch_shape}: "
            "reshape a single target to [N, 1]"
        )
    return tf.cast(y, density.dtype)


LOSSES: dict[str, Any] = {
    "nll": lambda: nll,
    "crps": lambda: crps,
    "energy": Energy,
    "beta_nll": BetaNLL,
    "interval_nll": IntervalNLL,
}


def unit(loss: Loss, head: Head) -> Any:
    """Return what a loss is measured in, for the targets that a head has been adapted to.

    1 for what is in nats; for the scores in units of y the mean of the targets' standard
    deviations, and for `BetaNLL` that of their variances to the power beta.
    """
    if isinstance(loss, BetaNLL):
        return tf.reduce_mean(tf.pow(head.target_scale, 2.0 * loss.beta))
    if loss is crps or isinstance(loss, Energy):
        return tf.reduce_mean(head.target_scale)
    return 1.0


def describe(loss: Any) -> Any:
    """Return the specification, as plain data, of a loss or of one.

    Raises:
        ConfigError: it is a function of the user's, which has none.
    """
    if not callable(loss):
        return loss
    for name, make in LOSSES.items():
        if type(loss) is make:
            return {"name": name, **loss.get_config()}
        if not isinstance(make, type) and make() is loss:
            return name
    raise ConfigError(f"loss={loss!r} has no name to be written: use one of {', '.join(LOSSES)}")


def get(loss: Any, grid: Sequence[float] | None = None, targets: Sequence[str] = ()) -> Loss:
    """Return the loss of a specification.

    Args:
        loss: a name, {"name": .., option: value, ..}, or a loss, which is returned as it is.
        grid: [D], the steps of the targets, for "interval_nll" without a step; zero where a
            target is on no grid.
        targets: names of the D targets, for the message.

    Raises:
        ConfigError: the name or an option is unknown, or a step is.
    """
    if callable(loss):
        return loss
    options = {"name": loss} if isinstance(loss, str) else dict(loss)
    name = options.pop("name", None)
    if name not in LOSSES:
        raise ConfigError(f"loss={name!r} is unknown: choose one of {', '.join(LOSSES)}")
    if name == "interval_nll" and options.get("step") is None:
        if grid is None or not np.all(np.asarray(grid) > 0.0):
            remedy = "give loss={name: interval_nll, step: 1.0}, or a list of steps"
            if grid is None:
                raise ConfigError(f"loss=interval_nll: adapt the model first, or {remedy}")
            free = next(i for i, step in enumerate(grid) if not step > 0.0)
            name = repr(targets[free]) if targets else free
            raise ConfigError(f"loss=interval_nll: target {name} is on no grid; {remedy}")
        options["step"] = grid
    try:
        return LOSSES[name](**options)
    except TypeError as error:
        raise ConfigError(f"loss={name}: {error}") from error
