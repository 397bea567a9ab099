"""Mixtures that use all their components: the lightest take half of the heaviest.

Shape letters: B batch, D event size, F features, K components, M ensemble members, N rows,
P parameters, T time.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

from mdn.base import TrainedModel
from mdn.data.rows import Rows, find_counted
from mdn.density.transformed import split_transform
from mdn.heads.mixtures import MixtureHead

log = logging.getLogger(__name__)

TIMES = 9  # in a training, at equal distances
UNTIL = 0.6  # of the epochs; what remains is for the weights to settle
RATIO = 4.0
MOST_ROWS, LEAST_ROWS = 2048, 256
ELEMENTS = 2**24  # of the covariances of the rows that are looked at together
# What optimizers keep of the gradients, and of the weights themselves.
MOMENTS = ("_momentums", "_velocities", "_velocity_hats", "_average_gradients", "momentums")
AVERAGES = ("_model_variables_moving_average",)


class SplitComponents(tf_keras.callbacks.Callback):
    """Splits the heaviest component of a mixture in two, and gives up a light one for it.

    Early in a training a few components take all targets, and from then on the others have hardly
    a gradient: of ten, five are left. Up to nine times in the first three fifths of the epochs,
    one with less than a quarter of the weight of the heaviest becomes a copy of that; each of the
    two has half its weight, and they are moved apart by a standard deviation along its longest
    axis. The weight of a component is here the root of the mean square over rows, which is large
    for one that few rows, but those alone, belong to.

    Give a mixture more components than there are modes: where all are needed, a light one has to
    be learned anew. A head without several components is left alone.

    Args:
        rows: the train rows; of their targets it only counts whether there are any.

    Source:
        Ueda et al. (2000), SMEM algorithm for mixture models, Neural Computation 12.
    """

    model: TrainedModel

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self.rows = rows

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        head = getattr(self.model, "head", None)
        epochs = self.params["epochs"]
        due = {round((i + 1) * UNTIL * epochs / TIMES) for i in range(TIMES)} - {0}
        if epoch not in due or not isinstance(head, MixtureHead) or head.components == 1:
            return
        if count := split_components(self.model, self.rows):
            log.debug("epoch %d begins with %d components split", epoch + 1, count)


def split_components(model: Any, rows: Rows) -> int:
    """Split the heaviest components as long as others have less than a quarter of their weight.

    The optimizer's moments and averages of a weight go with it.

    Args:
        model: compiled, with a mixture of K > 1 components; an ensemble splits those of each
            member.
        rows: of which some are looked at, at equal distances.

    Returns:
        How many were split.
    """
    head, optimizer = model.head, model.optimizer
    variables = [
        [variable, *_slots(optimizer, variable, AVERAGES)] for variable in model.head_weights
    ]
    moments = [_slots(optimizer, variable, MOMENTS) for variable in model.head_weights]
    state = [*variables[0], *variables[1], *moments[0], *moments[1]]
    arrays = [variable.numpy() for variable in state]
    values = [a.reshape([model.stacked, head.params_size, -1]) for a in arrays]  # views
    biases = values[len(variables[0]) :][: len(variables[1])]
    weight, covariance = _components(model, rows)
    every = head.places
    own = [p[: head.components].reshape([head.components, -1]) for p in every.values()]
    places, count = np.concatenate(own, axis=1), 0  # [K, n], all of a component
    for m in np.flatnonzero(np.isfinite(covariance).all(axis=(1, 2, 3))):  # not diverged
        for _ in range(head.components**2):
            light, heavy = int(weight[m].argmin()), int(weight[m].argmax())
            if RATIO * weight[m, light] >= weight[m, heavy]:
                break
            length, axis = np.linalg.eigh(covariance[m, heavy])
            apart = 0.5 * np.sqrt(length[-1]) * axis[:, -1]
            for value in values:
                value[m, places[light]] = value[m, places[heavy]]
            for bias in biases:
                bias[m, every["logits"][[light, heavy]], 0] -= np.log(2.0)
                bias[m, every["loc"][light], 0] += apart
                bias[m, every["loc"][heavy], 0] -= apart
            # The halves keep their scales, which training shrinks; to split one again is to go
            # along another axis.
            covariance[m, heavy] -= np.outer(apart, apart)
            covariance[m, light] = covariance[m, heavy]
            weight[m, [light, heavy]] = weight[m, heavy] / 2.0
            count += 1
    if count:
        for variable, array in zip(state, arrays, strict=True):
            variable.assign(array)
    return count


def _components(model: Any, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Return the weights of the components, [M, K], and their mean covariances, [M, K, D, D].

    The covariances are in standardised units.
    """
    head, members = model.head, model.stacked
    k, d = head.components, head.event_size
    size = k * d**2 * math.prod(rows.y.shape[1:-1])  # of a row of one member
    some = np.clip(16 * (ELEMENTS // size), LEAST_ROWS, MOST_ROWS)
    rows = rows.take(np.linspace(0, len(rows) - 1, min(len(rows), some)).astype(int))
    x, counted = model._as_rows(rows.x), find_counted(rows)
    sums = [np.zeros([members, k]), np.zeros([members, k]), np.zeros([members, k, d, d])]
    block = max(1, ELEMENTS // (members * size))
    for start in range(0, len(x), block):
        here = slice(start, start + block)
        part = tf.constant(x[here])
        density = model.member_densities(part) if members > 1 else model(part, training=False)
        parameters = split_transform(density)[0].mixture_parameters()
        shares = tf.nn.softmax(parameters.logits, axis=-1)[..., :k].numpy()
        shares = shares.reshape([members, -1, k])[:, counted[here].ravel()]
        factor = parameters.scale_tril[..., :k, :, :] / head.y_scale[:, tf.newaxis]
        factor = factor.numpy().reshape([members, -1, k, d, d])[:, counted[here].ravel()]
        sums[0] += shares.sum(axis=1)
        sums[1] += np.square(shares).sum(axis=1)
        sums[2] += np.einsum("mnk,mnkij,mnklj->mkil", shares, factor, factor, optimize=True)
    total = np.maximum(sums[0], 1e-30)[..., np.newaxis, np.newaxis]
    return np.sqrt(sums[1] / max(1, counted.sum())), sums[2] / total


def _slots(optimizer: Any, variable: tf.Variable, names: tuple[str, ...]) -> list[tf.Variable]:
    """Return what the optimizer keeps of a variable: nothing before it is built."""
    if not hasattr(optimizer, "_index_dict"):
        return []
    index = optimizer._index_dict.get(optimizer._var_key(variable))
    kept = [getattr(optimizer, name, None) for name in names]
    return [variables[index] for variables in kept if variables and index is not None]
