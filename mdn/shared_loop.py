"""One compiled loop for many short fits of models of one shape.

To trace and compile a train step takes seconds, and a small fit less than that. A search over
parameters, or folds of a cross-validation, fits many models that differ in their weights alone.
They lend them to one model, whose loop is compiled once, and take them back.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

from mdn.data.chunks import Batches
from mdn.features import Columns
from mdn.model import MDN
from mdn.selection import with_components

MOST = 8  # loops that are kept, the last ones used

_lock = threading.Lock()
_loops: OrderedDict[str, tuple[MDN, list[np.ndarray]]] = OrderedDict()


def shared_fit(
    model: MDN,
    optimizer: Callable[[], tf_keras.optimizers.Optimizer],
    loss: Any,
    batches: Batches,
    validation_data: Batches | None,
    *,
    about: Any,
    **fit: Any,
) -> dict[str, list[float]]:
    """Train a model as its own `compile` and `fit` would, by a loop that others use too.

    Args:
        model: adapted; it is not compiled hereafter either.
        optimizer: makes one.
        loss: as for `MDN.compile`.
        batches: as for `MDN.fit`.
        validation_data: as for `MDN.fit`.
        about: all that the optimizer depends on; its `repr` tells one from another.
        **fit: as for `MDN.fit`.

    Returns:
        The history: name of a metric -> its value after each epoch.
    """
    key = repr([_shape(model), loss, about, *(_spec(b) for b in (batches, validation_data))])
    with _lock:
        if key not in _loops:
            lent = with_components(model, model.head.components)
            lent.build_from_config(model.get_build_config())
            lent.head.grid = model.head.grid
            lent.compile(optimizer(), loss)
            lent.optimizer.build(lent.trainable_variables)
            _loops[key] = lent, [variable.numpy() for variable in lent.optimizer.variables]
        _loops.move_to_end(key)
        while len(_loops) > MOST:
            _loops.popitem(last=False)
        lent, start = _loops[key]
        for mine, theirs in zip(_variables(lent), _variables(model), strict=True):
            mine.assign(theirs)
        lent.stop_training = False
        for variable, value in zip(lent.optimizer.variables, start, strict=True):
            variable.assign(value)
        history = lent.fit(batches, validation_data=validation_data, **fit).history
        for mine, theirs in zip(_variables(lent), _variables(model), strict=True):
            theirs.assign(mine)
    return {name: [float(value) for value in values] for name, values in history.items()}


def _variables(model: MDN) -> list[tf.Variable]:
    """Return all variables, in an order that does not depend on how the model was made."""
    return [variable for part in model.parts for variable in getattr(part, "weights", [part])]


def _shape(model: MDN) -> list[Any]:
    """Return all that a model's train step depends on, but for the weights."""
    parts = [
        {name: v for name, v in part.get_config().items() if name != "name"}
        for part in (model.head, model.backbone, model.embedding)
        if part is not None
    ]
    encoder = model.encoder
    if isinstance(encoder, Columns):
        found = [(c.missing, c.vocabulary and len(c.vocabulary)) for c in encoder.columns]
        encoded: Any = encoder.missing, found
    else:
        encoded = encoder.features, encoder.missing, encoder.indicator
    members = getattr(model, "members", None)
    return [*parts, type(model.head).__name__, encoded, members, model.head.grid]


def _spec(batches: Batches | None) -> Any:
    return batches and (batches.spec, batches.steps, batches.complete)
