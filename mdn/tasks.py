"""What a run does differently for each kind of model: build, judge, export, show.

`mdn.training` is the same for all of them; the constructor that `model` points at decides.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import tf_keras
from omegaconf import DictConfig

from mdn.base import TrainedModel
from mdn.calibration import sbc
from mdn.callbacks.panels import DensityPanels, Panels, VAEPanels
from mdn.config import make
from mdn.data.rows import ColumnNames, Data
from mdn.ensembles import Ensemble
from mdn.errors import ConfigError, RunError
from mdn.evaluation import evaluate, evaluate_members, mean_gain
from mdn.export import export_saved_model, export_vae
from mdn.features import Columns, Standardize
from mdn.figures import write_figures
from mdn.model import MDN, load
from mdn.plots import save_plots
from mdn.preparation import member_folds
from mdn.recalibration import RecalibrationFit
from mdn.vae import VAE
from mdn.vae_evaluation import evaluate_vae
from mdn.vae_plots import save_vae_plots

log = logging.getLogger(__name__)

History = Mapping[str, Sequence[float]]


class Task(Protocol):
    """One kind of model in a run."""

    def build(self, config: DictConfig, data: Data, **options: Any) -> TrainedModel:
        """Return the model of the config with starting values from the train rows.

        Args:
            config: the config.
            data: the rows.
            **options: in place of those of `config.model`.
        """

    def check_start(self, model: Any, fresh: Any, config: DictConfig, data: Data) -> None:
        """Check that the model of the run `init_from` is one that this config would build.

        Args:
            model: of that run; made to fit these data where it can be.
            fresh: what `build` returned.
            config: the config.
            data: the rows.

        Raises:
            RunError: it is not.
        """

    def recalibrate(self, model: Any, config: DictConfig, data: Data) -> dict[str, float]:
        """Recalibrate the model by rows it has not learned from; return what that is worth."""

    def judge(self, model: Any, data: Data, history: History, plots: Path) -> dict[str, float]:
        """Return the metrics on the test rows, and write the plots."""

    def score(self, model: Any, data: Data) -> dict[str, float]:
        """Return the same metrics alone."""

    def export(self, model: Any, path: Path, config: DictConfig, overwrite: bool = True) -> None:
        """Write the SavedModel, with the config in it."""

    def panels(self, data: Data, rows: int) -> Panels:
        """Return what the dashboard shows besides scalars."""


class DensityTask:
    """A conditional density: `MDN`."""

    def build(self, config: DictConfig, data: Data, **options: Any) -> MDN:
        model = make_network(config, **{"event_size": len(data.targets), **options})
        _name_columns(model, data)
        model.adapt(data.train.x, data.train.y, missing=data.missing, seed=config.seed)
        return model

    def check_start(self, model: Any, fresh: MDN, config: DictConfig, data: Data) -> None:
        for part in ("head", "backbone"):
            _compare(config, part, *(_options(getattr(m, part)) for m in (model, fresh)))
        embeddings = [{} if m.embedding is None else _options(m.embedding) for m in (model, fresh)]
        _compare(config, "embedding", *embeddings)
        was, now = (_encoder_input(m.encoder) for m in (model, fresh))
        if was != now:
            raise RunError(
                f"init_from={config.init_from} takes the features {was}, and these data have "
                f"{now}: use the same features"
            )
        standardized = isinstance(model.encoder, Standardize)
        if data.missing == "indicator" and standardized and model.encoder.missing == "error":
            raise RunError(
                f"init_from={config.init_from} was trained without missing features: "
                "use data.missing=error"
            )
        model.set_missing(data.missing)
        model.head.grid = fresh.head.grid
        model.column_names = fresh.column_names

    def recalibrate(self, model: MDN, config: DictConfig, data: Data) -> dict[str, float]:
        before = model.log_prob(data.test.x, data.test.y)
        fit = self._fit_recalibration(model, config, data)
        log.info("%s", fit)
        metrics = fit.metrics(data.targets)
        if fit.map is not None:
            metrics |= mean_gain(model.log_prob(data.test.x, data.test.y) - before, data.test)
        return {f"recalibration/{key}": value for key, value in metrics.items()}

    def _fit_recalibration(self, model: MDN, config: DictConfig, data: Data) -> RecalibrationFit:
        rows = data.validation
        return model.recalibrate(rows.x, rows.y, rows.weight, seed=config.seed)

    def judge(self, model: MDN, data: Data, history: History, plots: Path) -> dict[str, float]:
        evaluation = evaluate(model, data)
        save_plots(model, data, history, evaluation, plots)
        if not hasattr(data.truth, "draw"):
            return evaluation.metrics
        found = sbc(model, data.truth, names=data.targets)
        write_figures({"sbc": found.plot()}, plots)
        return evaluation.metrics | found.metrics()

    def score(self, model: MDN, data: Data) -> dict[str, float]:
        return evaluate(model, data).metrics

    def export(self, model: MDN, path: Path, config: DictConfig, overwrite: bool = True) -> None:
        export_saved_model(model, path, overwrite, config=config)

    def panels(self, data: Data, rows: int) -> Panels:
        return DensityPanels(data, rows)


class EnsembleTask(DensityTask):
    """M conditional densities that are trained together: `Ensemble`."""

    def build(self, config: DictConfig, data: Data, **options: Any) -> Ensemble:
        network = make_network(config, **{"event_size": len(data.targets), **options})
        model = Ensemble(network, members=config.ensemble)
        _name_columns(model, data)
        model.adapt(data.train.x, data.train.y, missing=data.missing, seed=config.seed)
        return model

    def check_start(self, model: Any, fresh: MDN, config: DictConfig, data: Data) -> None:
        members = {"members": model.members}, {"members": config.ensemble}
        _compare(config, "ensemble", *members)
        super().check_start(model, fresh, config, data)

    def _fit_recalibration(self, model: Any, config: DictConfig, data: Data) -> RecalibrationFit:
        folds = member_folds(config, data)
        held_out = None if folds is None else folds[1]
        rows = data.train.append(data.validation)
        return model.recalibrate(rows.x, rows.y, rows.weight, rows=held_out, seed=config.seed)

    def judge(self, model: Any, data: Data, history: History, plots: Path) -> dict[str, float]:
        return {**super().judge(model, data, history, plots), **evaluate_members(model, data)}

    def score(self, model: Any, data: Data) -> dict[str, float]:
        return {**super().score(model, data), **evaluate_members(model, data)}


class VAETask:
    """Images and their latent space: `VAE`."""

    def build(self, config: DictConfig, data: Data, **options: Any) -> VAE:
        options = {"event_size": len(data.targets), **options}
        model = make(config, "model", backbone=make(config, "backbone"), **options)
        for rows in (data.train, data.validation, data.test):
            model.arrays(rows)  # a mistake in any of them is told now
        model.adapt(data.train.y)
        model.column_names = ColumnNames(targets=data.targets)
        return model

    def check_start(self, model: Any, fresh: VAE, config: DictConfig, data: Data) -> None:
        configs = [m.get_config() for m in (model, fresh)]
        for options in configs:
            options.pop("backbone")
            options.pop("column_names")
        _compare(config, "backbone", *(_options(m.backbone) for m in (model, fresh)))
        _compare(config, "model", *({**c, "name": ""} for c in configs))

    def recalibrate(self, model: VAE, config: DictConfig, data: Data) -> dict[str, float]:
        raise ConfigError("recalibrate=true: model=vae has no p(y | x); leave it out")

    def judge(self, model: VAE, data: Data, history: History, plots: Path) -> dict[str, float]:
        metrics = evaluate_vae(model, data)
        save_vae_plots(model, data, history, plots)
        return metrics

    def score(self, model: VAE, data: Data) -> dict[str, float]:
        return evaluate_vae(model, data)

    def export(self, model: VAE, path: Path, config: DictConfig, overwrite: bool = True) -> None:
        export_vae(model, path, overwrite, config=config)

    def panels(self, data: Data, rows: int) -> Panels:
        return VAEPanels(data, rows)


TASKS: dict[str, type[Task]] = {"mdn.vae.VAE": VAETask}


def get_task(config: DictConfig) -> Task:
    """Return the task of the constructor that `config.model` points at; heads are the rule."""
    density = DensityTask if config.get("ensemble", 1) == 1 else EnsembleTask
    return TASKS.get(config.model._target_, density)()


def build_model(config: DictConfig, data: Data) -> TrainedModel:
    """Return the model with scaling and starting values from the train rows, or from `init_from`.

    Raises:
        ConfigError: `model.event_size` is not the number of targets.
        DataError: no such model can be fitted to the rows.
        RunError: the run of `init_from` has no model, or one of another shape.
    """
    event_size = len(data.targets)
    if config.model.get("event_size") not in (None, event_size):
        raise ConfigError(
            f"model.event_size={config.model.event_size} but the data have {event_size} targets "
            f"({', '.join(data.targets)}): leave it out"
        )
    task = get_task(config)
    tf_keras.mixed_precision.set_global_policy(config.trainer.precision)
    try:
        fresh = task.build(config, data)
        if config.init_from is None:
            return fresh
        own = [config[part]._target_ for part in ("backbone", "embedding") if config.get(part)]
        model = load(f"{config.init_from}/model.keras", trust=own)
        if isinstance(model, MDN):
            model.set_recalibration(None)  # of what it learned there
        if type(model) is not type(fresh):
            raise RunError(
                f"init_from={config.init_from} holds a {type(model).__name__}, not a "
                f"{type(fresh).__name__}: use the same model"
            )
        task.check_start(model, fresh, config, data)
        return model
    finally:
        tf_keras.mixed_precision.set_global_policy("float32")


def make_network(config: DictConfig, **options: Any) -> MDN:
    """Return the network of the config, without scaling or starting values.

    Args:
        config: the config.
        **options: in place of those of `config.model`.
    """
    embedding = None if config.get("embedding") is None else make(config, "embedding")
    return MDN(make(config, "model", **options), make(config, "backbone"), embedding=embedding)


def _name_columns(model: MDN, data: Data) -> None:
    """Tell the model the names of the columns, and raise where its transform is not defined."""
    model.column_names = ColumnNames(data.features, data.targets)
    for rows in (data.train, data.validation, data.test):
        model.head.check_domain(rows.y, data.targets)


def _compare(config: DictConfig, part: str, was: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise a RunError if the options of a part of the two models differ."""
    if was != now:
        changed = sorted(k for k in {*was, *now} if was.get(k) != now.get(k))
        raise RunError(
            f"init_from={config.init_from} has another {part} "
            f"({', '.join(f'{k}: {was.get(k)}, not {now.get(k)}' for k in changed)}): "
            "use the same model and backbone"
        )


def _encoder_input(encoder: Any) -> list[str] | int:
    """Return the names of the raw columns, or the number of features of a matrix."""
    return encoder.names if isinstance(encoder, Columns) else encoder.features


def _options(layer: tf_keras.layers.Layer) -> dict[str, Any]:
    config = {"class": type(layer).__name__, **layer.get_config()}
    return {key: value for key, value in config.items() if key not in ("name", "dtype")}
