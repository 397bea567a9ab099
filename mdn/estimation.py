"""One run of `model=distribution`: a fit without features, beside the answer that is known.

Shape letters: N rows, S starts, D event size, K components.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from matplotlib.backends.backend_agg import FigureCanvasAgg
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from scipy.optimize import linear_sum_assignment
from scipy.special import softmax
from tensorflow_probability import distributions as tfd

from mdn.config import make
from mdn.data.draws import Gaussians
from mdn.data.rows import Data
from mdn.density import GaussianMixture, MultivariateNormalTriL
from mdn.errors import DataError, RunError
from mdn.evaluation import Gaussian, finite, mean_and_error
from mdn.export import directory_size
from mdn.export.distribution import export_distribution
from mdn.figures import write_figures
from mdn.fit_plots import fit_figure
from mdn.fitting.distribution import Fit
from mdn.fitting.exact import CLOSED_FORMS
from mdn.fitting.likelihood import row_log_prob
from mdn.plots import history_figure
from mdn.runs import RunDirectory, provenance
from mdn.training import seed_everything

log = logging.getLogger(__name__)

Values = dict[str, np.ndarray]

# Moments of more targets than this are judged as a whole, and not listed.
_MOST_LISTED = 4


def estimate(config: DictConfig, overrides: list[str] | None = None) -> dict[str, float]:
    """Fit, judge and export as the config says; return what metrics.json holds.

    Args:
        config: a config that `mdn.config` composed and checked, with model=distribution.
        overrides: the command line it came from, for the record.

    Raises:
        MDNError: anything that the user can mend; nothing half-written stays behind.
    """
    directory = RunDirectory(config, overrides)
    seed_everything(config)
    # No feature is read, so that none can be missing.
    options = {"missing": "indicator"} if "missing" in config.data else {}
    data: Data = make(config, "data", **options).load()
    if data.train.y.ndim != 2:
        raise DataError("model=distribution is for rows [N, D], not for sequences: choose others")
    fit: Fit = make(config, "model", y=data.train.y, weight=data.train.weight)
    metrics = {**judge(fit, config, data), **data.notes}
    directory.create()
    with directory.logging():
        log.info("run directory: %s", directory.path)
        log.info("%s", fit)
        if not fit.converged:
            log.warning("the fit has not converged: %s", fit.reason)
        try:
            _write(fit, config, data, directory, metrics)
        except OSError as error:
            raise RunError(
                f"cannot write {error.filename or directory.path}: {error.strerror}"
            ) from error
        print_fit_table(metrics)
        log.info("look at %s with: tensorboard --logdir %s", directory.path, directory.path)
    return metrics


def _write(
    fit: Fit, config: DictConfig, data: Data, directory: RunDirectory, metrics: dict[str, float]
) -> None:
    """Write everything; `metrics.json` comes last and marks the run as finished."""
    export_distribution(
        fit.distribution,
        directory / "saved_model",
        overwrite=True,
        targets=data.targets,
        config=config,
    )
    metrics["export/bytes"] = directory_size(directory / "saved_model")
    figures = {"density": fit_figure(fit.distribution, data.train.y, data.targets)}
    canvas = FigureCanvasAgg(figures["density"])
    canvas.draw()
    writer = tf.summary.create_file_writer(str(directory / "tensorboard" / "train"))
    with writer.as_default(step=0):
        tf.summary.text("config", f"```yaml\n{OmegaConf.to_yaml(config, resolve=True)}\n```")
        tf.summary.image("density", np.asarray(canvas.buffer_rgba())[np.newaxis, ..., :3])
        for step, nll in enumerate(fit.history):
            tf.summary.scalar("nll", nll, step=step)
    writer.close()
    if len(fit.history) > 1:
        figures["history"] = history_figure({"nll": fit.history})
    write_figures(figures, Path(directory / "plots"))
    metrics = finite(metrics)
    directory.write_json("provenance.json", provenance(config, data.fingerprint()))
    directory.write_json("metrics.json", metrics)


# ---------------------------------------------------------------------- judging


def judge(fit: Fit, config: DictConfig, data: Data) -> dict[str, float]:
    """Return the metrics of a fit.

    The known answer is the maximum-likelihood estimate in closed form, where there is one; of a
    mixture, the one that the rows were drawn from.

    Returns:
        Flat keys, those that have a meaning:

            fit/nll, fit/steps, fit/converged (1 or 0), fit/gradient_norm, fit/seconds; with
                several starts fit/starts, fit/starts_converged and fit/worst_nll.
            fit/mean/<target>, fit/stddev/<target>, fit/covariance/<target>/<target>; of a mixture
                fit/weight/<k>, fit/loc/<k>/<target>. The same with answer/.
            error/mean: greatest error of a mean, in standard deviations; error/mean_in_se: in
                standard errors. error/stddev: greatest relative error. error/covariance: greatest
                error over the greatest entry. error/worst_start/..: the same, of all starts.
            error/loc, error/weight: greatest errors of a mixture's components, which are matched
                to the true ones. error/kl, error/kl_se: Monte Carlo estimate of the KL divergence
                from the truth to the fit, on the test rows.
            test/nll, test/nll_se, test/n; test/regret, test/regret_se and data/entropy, where the
                truth is known; baseline/nll of one Gaussian, beside a mixture.
    """
    distribution, y, weight = fit.distribution, data.train.y, data.train.weight
    metrics = {
        "fit/nll": fit.nll,
        "fit/steps": float(fit.steps),
        "fit/converged": float(fit.converged),
        "fit/seconds": fit.seconds,
    }
    if fit.gradient_norm is not None:
        metrics["fit/gradient_norm"] = fit.gradient_norm
    if fit.starts is not None and fit.starts_converged is not None and len(fit.starts) > 1:
        metrics |= {
            "fit/starts": float(len(fit.starts)),
            "fit/starts_converged": float(fit.starts_converged.sum()),
            "fit/worst_nll": float(fit.starts.max()),
        }
    found = _moments(distribution)
    metrics |= _flatten("fit", found, data.targets)
    metrics |= _judge_on_test_rows(fit, data)
    if isinstance(distribution, GaussianMixture):
        components = _components(distribution)
        if isinstance(data.truth, Gaussians) and len(data.truth.weights) == len(components["loc"]):
            truth = {"weight": data.truth.weights, "loc": data.truth.loc}
            components = _match(components, truth)
            metrics |= _flatten("answer", truth, data.targets)
            for name, true in truth.items():
                metrics[f"error/{name}"] = float(np.abs(components[name] - true).max())
        metrics |= _flatten("fit", components, data.targets)
    answer = _known_answer(fit, config, data)
    if answer is not None:
        metrics["answer/nll"] = answer.nll
        right = _moments(answer.distribution)
        metrics |= _flatten("answer", right, data.targets)
        errors = _errors(found, right)
        metrics |= {f"error/{name}": value for name, value in errors.items()}
        if "mean" in errors:
            weight = np.ones(len(y)) if weight is None else weight
            seen = ~np.isnan(y) * weight[:, np.newaxis]  # [N, D]
            n = (seen.sum(axis=0) ** 2 / np.square(seen).sum(axis=0)).max()
            metrics["error/mean_in_se"] = errors["mean"] * float(np.sqrt(n))
        if "fit/starts" in metrics and fit.starts_parameters is not None:
            ends = type(distribution)(**fit.starts_parameters)
            worst = _errors(_moments(ends), right)
            metrics |= {f"error/worst_start/{name}": value for name, value in worst.items()}
    return metrics


def _judge_on_test_rows(fit: Fit, data: Data) -> dict[str, float]:
    test = data.test
    weight = np.ones(len(test)) if test.weight is None else test.weight
    weight = np.where(np.isnan(test.y).all(axis=1), 0.0, weight)
    log_prob = row_log_prob(fit.distribution, test.y)
    if not np.isfinite(log_prob).all():
        row = int(np.argmin(np.isfinite(log_prob)))
        raise DataError(
            f"test row {row} has probability zero under the {type(fit.distribution).__name__} "
            "that was fitted: choose another distribution"
        )
    metrics = {"test/n": float((weight > 0).sum())}
    metrics["test/nll"], metrics["test/nll_se"] = mean_and_error(-log_prob, weight)
    if isinstance(fit.distribution, GaussianMixture):
        ones = np.ones(len(data.train))
        baseline = Gaussian.fit(
            data.train.y, ones if data.train.weight is None else data.train.weight
        )
        metrics["baseline/nll"], _ = mean_and_error(-baseline.log_prob(test.y), weight)
    if data.truth is not None:
        regret = data.truth.log_prob(test.y, np.asarray(test.x)) - log_prob
        metrics["test/regret"], metrics["test/regret_se"] = mean_and_error(regret, weight)
        metrics["data/entropy"] = float(data.truth.entropy())
        if isinstance(data.truth, Gaussians):  # the test rows are draws from the truth itself
            metrics["error/kl"] = metrics["test/regret"]
            metrics["error/kl_se"] = metrics["test/regret_se"]
    return metrics


def _known_answer(fit: Fit, config: DictConfig, data: Data) -> Fit | None:
    """Return the maximum-likelihood estimate by another way than the fit, if there is one."""
    kind = type(fit.distribution)
    method = "exact"
    if kind is MultivariateNormalTriL and np.isnan(data.train.y).any():
        method = "em"  # exact in the limit
    if kind not in CLOSED_FORMS or fit.method == method or (method == "em" and config.model.fixed):
        return None
    initial = config.model.initial if config.model.fixed else None
    return make(
        config,
        "model",
        y=data.train.y,
        weight=data.train.weight,
        method=method,
        initial=None if initial is None else OmegaConf.to_container(initial),
        batch_size=None,
        restarts=None,
        tolerance=None,
        max_steps=None,
    )


def _moments(distribution: tfd.Distribution) -> Values:
    """Return mean and standard deviation, [.., D], and the covariance [.., D, D] if it has one."""
    moments = {}
    for name in ("mean", "stddev", "covariance"):
        if name == "covariance" and not len(distribution.event_shape):
            continue
        try:
            moment = np.asarray(getattr(distribution, name)(), np.float64)
        except NotImplementedError:
            continue
        if np.isfinite(moment).all():  # a Cauchy has no mean
            moments[name] = moment
    return moments


def _errors(found: Mapping[str, np.ndarray], right: Mapping[str, np.ndarray]) -> dict[str, float]:
    errors = {}
    if {"mean", "stddev"} <= {*right} & {*found}:
        errors["mean"] = np.abs(found["mean"] - right["mean"]) / right["stddev"]
        errors["stddev"] = np.abs(found["stddev"] - right["stddev"]) / right["stddev"]
    if "covariance" in right and "covariance" in found:
        distance = np.abs(found["covariance"] - right["covariance"])
        errors["covariance"] = distance / np.abs(right["covariance"]).max()
    return {name: float(values.max()) for name, values in errors.items()}


def _components(distribution: GaussianMixture) -> Values:
    return {
        "weight": softmax(np.asarray(distribution.logits, np.float64)),
        "loc": np.asarray(distribution.loc, np.float64),
    }


def _match(found: Values, truth: Values) -> Values:
    """Return components in the order of the true ones, by the least sum of squared distances."""
    distance = np.square(found["loc"][np.newaxis] - truth["loc"][:, np.newaxis]).sum(axis=-1)
    _, order = linear_sum_assignment(distance)
    return {name: value[order] for name, value in found.items()}


def _flatten(prefix: str, values: Values, targets: tuple[str, ...]) -> dict[str, float]:
    flat: dict[str, float] = {}
    for name, value in values.items():
        if name != "weight" and len(targets) > _MOST_LISTED:
            continue
        names: Any = [targets] * value.ndim if name != "weight" else [range(len(value))]
        if name == "loc":
            names = [range(len(value)), targets]
        for index in np.ndindex(value.shape):
            label = "/".join(str(axis[i]) for axis, i in zip(names, index, strict=True))
            if name != "covariance" or index[0] <= index[1]:
                flat[f"{prefix}/{name}/{label}"] = float(value[index])
    return flat


# ---------------------------------------------------------------------- table


def print_fit_table(metrics: Mapping[str, float], console: Console | None = None) -> None:
    """Print what was fitted beside the known answer, at most 80 columns wide."""
    console = console or Console(markup=False, emoji=False)  # names are shown as they are
    known = any(key.startswith("answer/") for key in metrics)
    table = Table(title="fit", title_justify="left", title_style="bold")
    table.add_column("", overflow="ellipsis", no_wrap=True, max_width=40)
    for heading in ("fit", "known answer") if known else ("fit",):
        table.add_column(heading, justify="right", no_wrap=True)
    for key, value in metrics.items():
        prefix, _, name = key.partition("/")
        if prefix == "fit" and (name.count("/") or name == "nll"):
            cells = [f"{value:.5g}"]
            if known:
                answer = metrics.get(f"answer/{name}")
                cells.append("" if answer is None else f"{answer:.5g}")
            table.add_row(name.replace("/", " "), *cells)
    for key, value in metrics.items():
        if key.startswith("error/") and not key.endswith("_se"):
            table.add_row(key.replace("/", " "), f"{value:.3g}")
    console.print(table, width=min(80, console.width))
