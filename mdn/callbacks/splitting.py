"""Mixtures that use all their components: what has died takes half of what is heavy.

Shape letters: B batch, D event size, K components, M ensemble members, N rows, P parameters.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

from mdn.base import TrainedModel
from mdn.data.rows import Rows
from mdn.density.transformed import split_transform
from mdn.heads.mixtures import MixtureHead

TIMES = 9  # in a training, at equal distances
UNTIL = 0.6  # of the epochs; what remains is for the weights to settle
RATIO = 4.0
ROWS = 2048
ELEMENTS = 2**24  # of the covariances of the rows that are looked at
MOMENTS = ("_momentums", "_velocities", "momentums")  # what optimizers keep of the gradients
AVERAGES = ("_model_variables_moving_average",)


class SplitComponents(tf_keras.callbacks.Callback):
    """Splits the heaviest component of a mixture in two where another one has died.

    Early in a training a few components take all targets, and from then on the others have hardly
    a gradient: of ten, five are left. Nine times in the first three fifths of the epochs, one with
    less than a quarter of the weight of the heaviest becomes a copy of that; each of the two has
    half its weight, and they are moved apart by a standard deviation along its longest axis. The
    weight of a component is here the root of the mean square over rows, which is large for one
    that few rows, but those alone, belong to. No target has a part in it.

    A head without several components is left alone.

    Args:
        rows: the train rows.

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
        split_components(self.model, self.rows.take(_spread(len(self.rows), ROWS)).x)


def split_components(model: Any, x: Any) -> int:
    """Split the heaviest components where others have died, until none has.

    The optimizer's moments and averages of a weight go with it.

    Args:
        model: compiled, with a mixture of K > 1 components; an ensemble splits those of each
            member.
        x: features of some rows, as the model takes them.

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
    weight, covariance = _components(model, model._as_rows(x))
    every = head.places
    own = [p[: head.components].reshape([head.components, -1]) for p in every.values()]
    places, count = np.concatenate(own, axis=1), 0  # [K, n], all of a component
    for m in np.flatnonzero(np.isfinite(covariance).all(axis=(1, 2, 3))):  # not diverged
        for _ in range(head.components**2):
            dead, heavy = int(weight[m].argmin()), int(weight[m].argmax())
            if RATIO * weight[m, dead] >= weight[m, heavy]:
                break
            length, axis = np.linalg.eigh(covariance[m, heavy])
            apart = 0.5 * np.sqrt(length[-1]) * axis[:, -1]
            for value in values:
                value[m, places[dead]] = value[m, places[heavy]]
            for bias in biases:
                bias[m, every["logits"][[dead, heavy]], 0] -= np.log(2.0)
                bias[m, every["loc"][dead], 0] += apart
                bias[m, every["loc"][heavy], 0] -= apart
            covariance[m, heavy] -= np.outer(apart, apart)
            covariance[m, dead] = covariance[m, heavy]
            weight[m, [dead, heavy]] = weight[m, heavy] / 2.0
            count += 1
    if count:
        for variable, array in zip(state, arrays, strict=True):
            variable.assign(array)
    return count


def _components(model: Any, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the weights of the components, [M, K], and their mean covariances, [M, K, D, D].

    The covariances are in standardised units. x is [N, F] or [N, T, F].
    """
    head = model.head
    size = model.stacked * x[0, ..., 0].size * head.components * head.event_size**2
    x = tf.constant(x[_spread(len(x), max(1, ELEMENTS // size))])
    density = model.member_densities(x) if model.stacked > 1 else model(x, training=False)
    parameters = split_transform(density)[0].mixture_parameters()
    k, d = head.components, head.event_size
    shares = tf.nn.softmax(parameters.logits, axis=-1)[..., :k].numpy()
    shares = shares.reshape([model.stacked, -1, k])
    factor = parameters.scale_tril[..., :k, :, :] / head.y_scale[:, tf.newaxis]
    factor = factor.numpy().reshape([model.stacked, -1, k, d, d])
    total = np.maximum(shares.sum(axis=1), 1e-30)[..., np.newaxis, np.newaxis]
    covariance = np.einsum("mnk,mnkij,mnklj->mkil", shares, factor, factor, optimize=True) / total
    return np.sqrt(np.mean(np.square(shares), axis=1)), covariance


def _spread(rows: int, most: int) -> np.ndarray:
    """Return the numbers of all rows, or of `most` at equal distances."""
    return np.linspace(0, rows - 1, min(rows, most)).astype(int)


def _slots(optimizer: Any, variable: tf.Variable, names: tuple[str, ...]) -> list[tf.Variable]:
    """Return what the optimizer keeps of a variable: nothing before it is built."""
    if not hasattr(optimizer, "_index_dict"):
        return []
    index = optimizer._index_dict[optimizer._var_key(variable)]
    kept = [getattr(optimizer, name, None) for name in names]
    return [variables[index] for variables in kept if variables]
