"""Maximum-likelihood estimates in closed form.

Shape letters: N rows, D event size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from tensorflow_probability import distributions as tfd

from mdn import density
from mdn.errors import ConfigError, DataError

Values = dict[str, np.ndarray]


def fit_exact(
    kind: type[tfd.Distribution],
    y: np.ndarray,
    weight: np.ndarray,
    fixed: Mapping[str, np.ndarray],
) -> Values:
    """Return the maximum-likelihood parameters by name, the fixed ones among them.

    Args:
        kind: a class of `CLOSED_FORMS`.
        y: [N, ..], NaN marks a missing entry.
        weight: [N], not negative.
        fixed: parameters that are known.

    Raises:
        ConfigError: there is no closed form.
        DataError: the entries that are there do not determine the parameters.
    """
    if kind not in CLOSED_FORMS:
        known = ", ".join(sorted(k.__name__ for k in CLOSED_FORMS))
        other = "em" if issubclass(kind, density.GaussianMixture) else "gradient"
        raise ConfigError(
            f"method=exact: {kind.__name__} has no closed form ({known} have): use method={other}"
        )
    values = {**CLOSED_FORMS[kind](y, weight, fixed), **fixed}
    for name, value in values.items():
        if not np.isfinite(value).all():
            raise DataError(
                f"the rows leave {name} undetermined: each column needs rows, and they must vary"
            )
    return values


def _mean(values: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return the weighted mean over the rows of the entries that are there."""
    weight = np.where(np.isnan(values), 0.0, weight.reshape(-1, *[1] * (values.ndim - 1)))
    return (weight * np.nan_to_num(values)).sum(axis=0) / weight.sum(axis=0)


def _normal(y: np.ndarray, weight: np.ndarray, fixed: Mapping[str, Any]) -> Values:
    loc = fixed.get("loc", _mean(y, weight))
    return {"loc": loc, "scale": np.sqrt(_mean((y - loc) ** 2, weight))}


def _diag(y: np.ndarray, weight: np.ndarray, fixed: Mapping[str, Any]) -> Values:
    found = _normal(y, weight, fixed)
    return {"loc": found["loc"], "scale_diag": found["scale"]}


def _tril(y: np.ndarray, weight: np.ndarray, fixed: Mapping[str, Any]) -> Values:
    if np.isnan(y).any():
        raise ConfigError("method=exact: with missing entries there is no closed form: use em")
    loc = fixed.get("loc", _mean(y, weight))
    residual = y - loc
    covariance = (residual * weight[:, np.newaxis]).T @ residual / weight.sum()
    if "scale_tril" in fixed:
        return {"loc": loc}
    try:
        return {"loc": loc, "scale_tril": np.linalg.cholesky(covariance)}
    except np.linalg.LinAlgError as error:
        raise DataError(
            f"the covariance of {len(y)} rows is singular: give more rows, or drop a column that "
            "others determine"
        ) from error


def _log_normal(y: np.ndarray, weight: np.ndarray, fixed: Mapping[str, Any]) -> Values:
    with np.errstate(divide="ignore", invalid="ignore"):
        return _normal(np.log(y), weight, fixed)


def _laplace(y: np.ndarray, weight: np.ndarray, fixed: Mapping[str, Any]) -> Values:
    loc = fixed.get("loc")
    if loc is None:
        columns = y.reshape(len(y), -1).T
        loc = np.reshape([_median(column, weight) for column in columns], y.shape[1:])
    return {"loc": loc, "scale": _mean(np.abs(y - loc), weight)}


def _median(values: np.ndarray, weight: np.ndarray) -> float:
    """Return the weighted median of [N] values, NaN left out; between two, their midpoint."""
    order = np.argsort(values)  # NaN last
    order = order[~np.isnan(values[order]) & (weight[order] > 0)]
    below = np.cumsum(weight[order]) / weight[order].sum()
    middle = [np.searchsorted(below, 0.5 - 1e-12), np.searchsorted(below, 0.5 + 1e-12)]
    return float(values[order][middle].mean())


def _exponential(y: np.ndarray, weight: np.ndarray, fixed: Mapping[str, Any]) -> Values:
    return {"rate": 1.0 / _mean(y, weight)}


def _poisson(y: np.ndarray, weight: np.ndarray, fixed: Mapping[str, Any]) -> Values:
    return {"rate": _mean(y, weight)}


def _bernoulli(y: np.ndarray, weight: np.ndarray, fixed: Mapping[str, Any]) -> Values:
    return {"probs": _mean(y, weight)}


CLOSED_FORMS: dict[type, Callable[..., Values]] = {
    tfd.Normal: _normal,
    tfd.LogNormal: _log_normal,
    tfd.Laplace: _laplace,
    tfd.Exponential: _exponential,
    tfd.Poisson: _poisson,
    tfd.Bernoulli: _bernoulli,
    density.MultivariateNormalDiag: _diag,
    density.MultivariateNormalTriL: _tril,
}
