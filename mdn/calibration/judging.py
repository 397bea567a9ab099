"""`report`: rows judge a model, or its densities.

Shape letters: N rows, T time, F features, D event size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mdn.calibration.scores import DRAWS, Scores, marginal_crps, score
from mdn.calibration.slices import find_slices
from mdn.calibration.summary import Report
from mdn.data.checks import check_weight
from mdn.data.resolution import grid_steps, spread_over_cells
from mdn.data.rows import Rows, find_counted
from mdn.errors import ConfigError, DataError
from mdn.margins import take_rows


def report(
    model: Any,
    x: Any = None,
    y: Any = None,
    *,
    targets: Sequence[str] | None = None,
    features: Sequence[str] | None = None,
    by: Mapping[str, np.ndarray] | None = None,
    weight: np.ndarray | None = None,
    reference: np.ndarray | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> Report:
    """Judge the calibration of a model, or of densities, on rows that it has not learned from.

    Where y has the density that the model states, its rank is uniform: a tenth of the rows lie
    below the 10 % quantile, and nine tenths inside of the 90 % intervals. Targets on a grid of
    step d (whole minutes, counts) are judged on y + U(-d/2, d/2), seeded.

    Args:
        model: an `mdn.MDN` (or anything with its `predict_distribution`), or a density with batch
            [N], [N, T], or [] for all rows.
        x: features as for `model.fit`; of a density only for the slices, and optional.
        y: [N, D] or [N, T, D]; NaN marks a missing entry. Of one target also [N].
        targets: D names.
        features: names of the columns of a matrix x.
        by: what to slice the rows by, name -> [N] or [N, T], numbers or categories; by default
            each feature. Slices by the density's own mean and width are always there.
        weight: [N], row weights.
        reference: [M, D], the targets whose marginal distribution the skill is measured against,
            such as those of the train rows; by default y itself.
        draws: for each row, of the highest-density regions.
        seed: of the draws and of the grid's cells.

    Raises:
        ConfigError: there are fewer than two draws.
        DataError: shapes do not agree, values are infinite, or no target is observed.
    """
    if y is None:
        raise DataError("y is missing: give report(model, x, y), or report(density, y=y)")
    if not hasattr(model, "log_prob"):
        raise DataError(f"{model!r} is neither a model nor a density of mdn")
    if draws < 2:
        raise ConfigError(f"draws={draws}: a rank needs some, such as {DRAWS}")
    density, y = _density_for(model, x, _numbers("y", y))
    names = tuple(targets or ([f"y{d}" for d in range(y.shape[-1])] if y.shape[-1] > 1 else "y"))
    if x is None:  # no features to slice by
        x, by = np.zeros((*y.shape[:-1], 1)), {} if by is None else by
    columns = _columns(x)
    if weight is not None:
        check_weight(weight := _numbers("weight", weight), "weight")
    rows = Rows(columns, y, weight)
    if len(names) != y.shape[-1]:
        raise DataError(f"targets={list(names)}: y has {y.shape[-1]} columns; name each")
    if features is not None and np.shape(columns)[-1:] != (len(features),):
        raise DataError(f"features={list(features)}: are the names of the columns of a matrix x")
    given = {f"x {name}".strip(): column for name, column in _each(columns).items()}
    for name, values in {"weight": weight, **given}.items():
        if values is not None and np.shape(values)[:1] != y.shape[:1]:
            raise DataError(f"{name} has {len(values)} rows, and y {len(y)}: give as many")
    counted = find_counted(rows)
    if not counted.any():
        raise DataError("y has no observed entry: a density is judged by what happened")
    flat = take_rows(density, y.shape[:-1], counted)
    if reference is not None:
        reference = _numbers("reference", reference)
        if reference.shape[-1:] != y.shape[-1:]:
            raise DataError(
                f"reference has shape {list(reference.shape)}: give targets as y has, "
                f"[M, {y.shape[-1]}]"
            )
        reference = reference.reshape(-1, y.shape[-1])
    step = grid_steps(y[counted] if reference is None else reference)
    judged = spread_over_cells(y[counted], step, seed)
    return assemble(
        score(flat, judged, draws=draws, seed=seed),
        rows,
        names,
        tuple(features or ()),
        reference=reference,
        by=by,
        step=step,
    )


def assemble(
    scores: Scores,
    rows: Rows,
    targets: tuple[str, ...],
    features: tuple[str, ...] = (),
    *,
    step: np.ndarray,
    reference: np.ndarray | None = None,
    reference_weight: np.ndarray | None = None,
    by: Mapping[str, np.ndarray] | None = None,
) -> Report:
    """Return the report of scores of the rows, or steps, that `find_counted` counts.

    Args:
        scores: of those rows.
        rows: all of them.
        targets: D names.
        features: names of the columns of a matrix x.
        step: [D], of the targets' grids.
        reference: as for `report`.
        reference_weight: [M], of its rows.
        by: as for `report`.
    """
    counted = find_counted(rows)
    y = rows.y[counted]
    weight = None
    if rows.weight is not None:
        weight = np.asarray(rows.weight, np.float64)[np.nonzero(counted)[0]]
    if reference is None:
        reference, reference_weight = y, weight
    columns = (
        _slicing_columns(rows, features, counted)
        if by is None
        else {name: _aligned(name, values, counted) for name, values in by.items()}
    )
    own = {"predicted mean": scores.mean, "predicted width": scores.width90}
    return Report(
        targets,
        scores,
        marginal_crps(y, reference, reference_weight),
        weight,
        step,
        tuple(find_slices(scores.pit, targets, columns, weight, own)),
    )


def _density_for(model: Any, x: Any, y: np.ndarray) -> tuple[Any, np.ndarray]:
    """Return the density of the rows, and y with as many axes as it has."""
    if hasattr(model, "predict_distribution"):
        if x is None:
            raise DataError("x is missing: a model needs report(model, x, y)")
        model = model.predict_distribution(x)
    batch, d = tuple(model.batch_shape), model.event_shape[-1]
    if d == 1 and y.ndim == max(len(batch), 1) and (y.shape[-1] != 1 or y.shape == batch):
        y = y[..., np.newaxis]
    if y.ndim not in (2, 3) or y.shape[-1] != d or batch not in ((), y.shape[:-1]):
        raise DataError(
            f"y has shape {list(y.shape)} and the density batch {list(batch)}, event [{d}]: give "
            f"y as {[*(batch or ['N']), d]}"
        )
    return model, y


def _numbers(name: str, values: Any) -> np.ndarray:
    try:
        values = np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name} is no array of numbers: {error}") from error
    if np.isinf(values).any():
        raise DataError(f"{name} has infinite values: NaN marks what is missing")
    return values


def _each(columns: Any) -> dict[str, np.ndarray]:
    return columns if isinstance(columns, dict) else {"": columns}


def _columns(x: Any) -> Any:
    """Return x as an array or as a mapping of arrays."""
    if hasattr(x, "items"):
        return {str(name): np.asarray(column) for name, column in x.items()}
    return np.asarray(x)


def _slicing_columns(
    rows: Rows, features: tuple[str, ...], counted: np.ndarray
) -> dict[str, np.ndarray]:
    """Return the features by name, [n] of the rows that count."""
    x = rows.x
    if isinstance(x, dict):
        return {name: _aligned(name, column, counted) for name, column in x.items()}
    if x.ndim != counted.ndim + 1:  # sequences, of which only the last step has a density
        return {}
    names = tuple(f"x{i}" for i in range(x.shape[-1]))
    if len(features) == len(names):
        names = features
    return dict(zip(names, x[counted].T, strict=True))


def _aligned(name: str, values: Any, counted: np.ndarray) -> np.ndarray:
    values = np.asarray(values)
    if values.shape != counted.shape:
        raise DataError(
            f"{name} has shape {list(values.shape)}, and y {list(counted.shape)} rows: give a "
            "value for each"
        )
    return values[counted]
