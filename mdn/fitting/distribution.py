"""`fit_distribution`: the distribution of rows by maximum likelihood, without any features.

Shape letters: N rows, S starts, P unconstrained numbers, D event size, K components.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import tensorflow as tf
from tensorflow_probability import distributions as tfd

from mdn import density
from mdn.density.queries import Queries
from mdn.errors import ConfigError, DataError
from mdn.fitting.checks import (
    as_rows,
    as_weight,
    check_determined,
    check_entries,
    check_options,
)
from mdn.fitting.em import fit_mixture
from mdn.fitting.exact import fit_exact
from mdn.fitting.gradient import Minimum, descend, minimise
from mdn.fitting.likelihood import Likelihood, find_floor, row_log_prob
from mdn.fitting.trainable import Initial, as_array, find_class, find_layout, resolve_names

_MOST_SHOWN = 30  # numbers of a parameter, in a report
METHODS = ("gradient", "exact", "em")


@dataclasses.dataclass(frozen=True)
class Fit:
    """A distribution fitted to rows, and how the fit went.

    Attributes:
        distribution: in the units of the rows; of the class that was asked for.
        nll: nats per row, the mean over the rows.
        method: "gradient", "exact" or "em".
        steps: of the minimisation, or of EM once it has chosen its start; 0 for a closed form.
        converged: whether the convergence criterion was met.
        reason: why the fit ended, in words.
        seconds: wall time, compilation included.
        gradient_norm: greatest entry of the gradient by the unconstrained numbers, each times
            its number where that is greater than one; in standardised units of y where the class
            allows them.
        history: the NLL as the fit went on.
        starts: [S], the final NLL of each start of method="gradient".
        starts_converged: [S].
        starts_parameters: name -> [S, ..], where each start ended.
    """

    distribution: tfd.Distribution
    nll: float
    method: str
    steps: int
    converged: bool
    reason: str
    seconds: float
    gradient_norm: float | None = None
    history: list[float] = dataclasses.field(default_factory=list)
    starts: np.ndarray | None = None
    starts_converged: np.ndarray | None = None
    starts_parameters: dict[str, np.ndarray] | None = None

    def parameters(self) -> dict[str, np.ndarray]:
        """Return the parameters of the distribution by name, as NumPy arrays."""
        return _parameters(self.distribution)

    def __str__(self) -> str:
        state = "converged" if self.converged else "NOT converged"
        lines = [
            f"{type(self.distribution).__name__} by method={self.method}: {state} after "
            f"{self.steps} steps in {self.seconds:.2f} s ({self.reason})",
            f"NLL {self.nll:.6g} nats per row",
        ]
        if self.starts is not None and self.starts_converged is not None and len(self.starts) > 1:
            lines[-1] += (
                f"; {self.starts_converged.sum()} of {len(self.starts)} starts converged, to "
                f"{self.starts.min():.6g} .. {self.starts.max():.6g}"
            )
        with np.printoptions(precision=5, suppress=True):
            lines += [
                f"{name} = {value if value.size <= _MOST_SHOWN else list(value.shape)}"
                for name, value in self.parameters().items()
            ]
        return "\n".join(lines)


def fit_distribution(
    distribution: type[tfd.Distribution] | str,
    y: Any,
    *,
    components: int | None = None,
    method: Literal["gradient", "exact", "em"] = "gradient",
    initial: Initial | Literal["random"] = None,
    fixed: Mapping[str, Any] | Sequence[str] = (),
    weight: Any = None,
    batch_size: int | None = None,
    learning_rate: float = 0.03,
    tolerance: float | None = None,
    max_steps: int | None = None,
    restarts: int | None = None,
    positivity: str = "softplus",
    min_scale: float = 1e-3,
    dtype: Any = None,
    seed: int = 0,
    compiled: bool = True,
) -> Fit:
    """Fit a distribution to rows by maximum likelihood.

    Args:
        distribution: any class of TFP's that states its parameters (`parameter_properties`), or
            `mdn.GaussianMixture`, `mdn.density.DiagGaussianMixture`; or its name.
        y: [N, *batch, *event]: [N] for a `Normal`, [N, D] for a multivariate one, or for D
            separate `Normal`s, which are fitted at once. NaN marks a missing entry, which is
            marginalised: for normals and their mixtures also in a part of a row.
        components: K, of a mixture.
        method: "gradient": L-BFGS over all rows, or Adam over mini-batches where `batch_size` is
            given. "exact": the closed form, where there is one. "em": normals and mixtures.
        initial: values to start from by parameter name, each an array that broadcasts, or a
            callable of (shape, seed). Or one callable of (name, shape, seed), which may return
            None. `covariance` may stand for `scale_tril`, and `scale` for `scale_diag` or
            `scale_tril`. "random": unconstrained numbers from N(0, 1). By default normals start
            from the moments, mixtures from clusters, and others from unconstrained zeros.
        fixed: name -> value of parameters that are known; or their names, with the values in
            `initial`.
        weight: [N], not negative.
        batch_size: rows in a mini-batch; None: all rows in every step.
        learning_rate: Adam's, for mini-batches.
        tolerance: of the criterion of convergence. Full batch: `Fit.gradient_norm` is not
            greater (default 1e-7; of mixtures 1e-5). EM: a step gains less, in nats
            per row (default 1e-6). Mini-batches need none: the gradient over all rows must be
            within a tenth of its standard errors from zero.
        max_steps: the end in any case (default 1,000; mini-batches: 100 epochs, or 5,000 steps).
        restarts: number of starts (default 1; EM 10, of which the best goes on after a trial).
            Those after the first are random, or other clusters. The best answer is returned.
        positivity: what makes scales of normals and their mixtures positive: "softplus", "exp" or
            "elu" (1 + ELU).
        min_scale: the floor of a mixture's scales (EM: the roots of the covariances' eigenvalues;
            gradient: the diagonal of `scale_tril`), as a share of each target's standard
            deviation; where values repeat on a grid of step d, at least d / sqrt(12). Without it
            a component could shrink onto one row.
        dtype: of the parameters, and of the computation on mini-batches; by default that of y,
            or else float64. Other computations are in float64.
        seed: of starts, clusters and the order of mini-batches.
        compiled: the likelihood and its gradient, or an epoch of mini-batches, are XLA programs.

    Returns:
        The fit. Where it did not converge it says so: see `Fit.converged` and `Fit.reason`.

    Raises:
        ConfigError: an option is unknown, or does not go with the distribution or the method.
        DataError: y has another shape than the distribution, or does not determine it.
    """
    begun = time.perf_counter()
    if method not in METHODS:
        raise ConfigError(f"method={method}: must be one of {', '.join(METHODS)}")
    check_options(
        {
            "batch_size": batch_size,
            "components": components,
            "max_steps": max_steps,
            "restarts": restarts,
        },
        {"tolerance": tolerance, "learning_rate": learning_rate, "min_scale": min_scale},
        seed,
    )
    kind = find_class(distribution)
    y, dtype = as_rows(y, dtype)
    weight = as_weight(weight, len(y))
    # What nobody weighs or saw has no part in scaling, clusters, checks or means.
    counted = (weight > 0) & ~np.isnan(y).reshape(len(y), -1).all(axis=1)
    if not counted.any():
        raise DataError("y is missing in every row: there is nothing to fit")
    y, weight = y[counted], weight[counted]
    given, fixed = _as_values(kind, initial, fixed)
    floor: Any = np.finfo(dtype.as_numpy_dtype).eps
    if components is not None and issubclass(kind, density.GaussianMixture):
        floor = find_floor(y, min_scale)
    options = {"components": components, "positivity": positivity, "floor": floor}
    named = [*given, *fixed]
    layout = find_layout(kind, y.shape[1:], named, list(fixed), dtype=dtype, **options)
    fixed = {name: as_array(name, value, layout[name]) for name, value in fixed.items()}
    check_entries(kind, y, layout, dtype)
    check_determined(kind, y, fixed)
    if batch_size is not None and batch_size > len(y):
        raise ConfigError(f"batch_size={batch_size}: there are only {len(y)} rows")
    if method == "exact":
        _refuse("exact", batch_size=batch_size, restarts=restarts)
        values = fit_exact(kind, y, weight, fixed)
        answer = kind(**{name: tf.constant(value, dtype) for name, value in values.items()})
        result: dict[str, Any] = {"steps": 0, "converged": True, "reason": "closed form"}
    elif method == "em":
        _refuse("em", batch_size=batch_size, initial=initial, fixed=fixed or None)
        answer, result = _fit_em(
            kind, y, weight, components, floor, dtype, tolerance, max_steps, restarts, seed
        )
    else:
        # A line search has to see differences that float32 rounds away.
        precision = tf.float64 if batch_size is None else dtype
        layout = find_layout(kind, y.shape[1:], named, list(fixed), dtype=precision, **options)
        likelihood = Likelihood(
            kind,
            y,
            weight,
            layout,
            fixed,
            components,
            precision,
            floor=floor,
            whole=batch_size is None,
        )
        start = likelihood.starts(initial, given, restarts or 1, seed)
        if batch_size is None:
            found = minimise(
                likelihood.nll,
                start,
                tolerance=tolerance or (1e-7 if components is None else 1e-5),
                max_steps=max_steps or 1000,
                compiled=compiled,
            )
        else:
            found = descend(
                likelihood.nll,
                start,
                len(y),
                batch_size=batch_size,
                learning_rate=learning_rate,
                max_steps=max_steps or max(5000, 100 * (len(y) // batch_size)),
                seed=seed,
                compiled=compiled,
            )
        answer, result = _best_of(found, likelihood, dtype)
    nll = float(np.average(-row_log_prob(answer, y), weights=weight))
    if not np.isfinite(nll):
        raise DataError(f"a row is outside of the domain of {kind.__name__}")
    return Fit(answer, nll, method, seconds=time.perf_counter() - begun, **result)


def _as_values(
    kind: type[tfd.Distribution], initial: Any, fixed: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the initial values and the fixed values, by the names that the class has."""
    known = initial is None or isinstance(initial, Mapping) or callable(initial)
    if not known and not (isinstance(initial, str) and initial == "random"):
        raise ConfigError(f"initial={initial}: must be values by name, a callable, or random")
    if not isinstance(fixed, Mapping | Sequence):
        raise ConfigError(f"fixed={fixed}: must be values by name, or names")
    given = resolve_names(initial, kind) if isinstance(initial, Mapping) else {}
    if isinstance(fixed, Mapping):
        return given, resolve_names(fixed, kind)
    names = resolve_names(dict.fromkeys([fixed] if isinstance(fixed, str) else fixed), kind)
    for name in names:
        if given.get(name) is None:
            raise ConfigError(f"fixed=[{name}]: its value is not known; give it in initial")
    return given, {name: given.pop(name) for name in names}


def _best_of(
    found: Minimum, likelihood: Likelihood, dtype: tf.DType
) -> tuple[tfd.Distribution, dict[str, Any]]:
    """Return the distribution of the best start, and what `Fit` says of all of them."""
    kind, fixed = likelihood.trainable.kind, likelihood.trainable.fixed
    finite = np.isfinite(found.nll)
    if not finite.any():
        raise DataError(
            f"{kind.__name__} gives no start a finite NLL: rows outside of its domain, or fixed "
            f"values that cannot be ({', '.join(fixed) or 'none'})? Else give initial"
        )
    best = int(np.argmin(np.where(finite, found.nll, np.inf)))
    ends = likelihood.parameters(found.position)
    answer = kind(**{name: tf.constant(value[best], dtype) for name, value in ends.items()})
    return answer, {
        "steps": found.steps,
        "converged": bool(found.converged[best]),
        "reason": found.reason,
        "gradient_norm": float(found.gradient_norm[best]),
        "history": [value + likelihood.jacobian for value in found.history],
        "starts": found.nll + likelihood.jacobian,
        "starts_converged": found.converged,
        "starts_parameters": ends,
    }


def _refuse(method: str, **options: Any) -> None:
    for name, value in options.items():
        if value is not None:
            raise ConfigError(f"method={method} takes no {name}: use method=gradient")


def _fit_em(
    kind: type[tfd.Distribution],
    y: np.ndarray,
    weight: np.ndarray,
    components: int | None,
    floor: Any,
    dtype: tf.DType,
    tolerance: float | None,
    max_steps: int | None,
    restarts: int | None,
    seed: int,
) -> tuple[tfd.Distribution, dict[str, Any]]:
    if not issubclass(kind, Queries) or y.ndim != 2:
        raise ConfigError(
            f"method=em is for normals and their mixtures on y [N, D], not for {kind.__name__} "
            f"on y {list(y.shape)}: use method=gradient"
        )
    diagonal = issubclass(kind, density.MultivariateNormalDiag | density.DiagGaussianMixture)
    found = fit_mixture(
        y,
        components or 1,
        weight=weight,
        diagonal=diagonal,
        floor=0.0 if components is None else floor,
        tolerance=tolerance or (1e-6 if components else 1e-14),
        max_steps=max_steps or 1000,
        restarts=restarts or 10,
        seed=seed,
    )
    scale = np.linalg.cholesky(found.covariance)  # [K, D, D]
    values: dict[str, np.ndarray] = {"loc": found.loc}
    if diagonal:
        values["scale_diag"] = np.sqrt(np.diagonal(found.covariance, axis1=1, axis2=2))
    else:
        values["scale_tril"] = scale
    if components is None:
        values = {name: value[0] for name, value in values.items()}
    else:
        values["logits"] = np.log(np.maximum(found.weights, np.finfo(np.float32).tiny))
    answer = kind(**{name: tf.constant(value, dtype) for name, value in values.items()})
    last = "a step gained" if found.converged else "stopped at max_steps: a step gained"
    gain = found.nll[-2] - found.nll[-1] if len(found.nll) > 1 else 0.0
    return answer, {
        "steps": len(found.nll) - 1,
        "converged": found.converged,
        "reason": f"{last} {gain:.2g} nats per row",
        "history": found.nll,
    }


def _parameters(distribution: tfd.Distribution) -> dict[str, np.ndarray]:
    if isinstance(distribution, Queries):
        tensors = distribution.tensors()
    else:
        properties = distribution.parameter_properties(dtype=distribution.dtype)
        tensors = {n: distribution.parameters.get(n) for n, p in properties.items() if p.is_tensor}
    return {name: np.asarray(tensor) for name, tensor in tensors.items() if tensor is not None}
