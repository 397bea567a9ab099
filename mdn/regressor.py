"""`MDNRegressor`: a conditional density as a scikit-learn estimator.

Shape letters: N rows, F features, D targets, K components, M ensemble members, B batch,
Q probabilities.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import numbers
import os
import random
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tensorflow as tf
import tf_keras

from mdn import backbones, heads, losses
from mdn.data.rows import Data, Rows
from mdn.data.splits import draw_folds
from mdn.density.queries import Queries
from mdn.ensembles import Ensemble
from mdn.errors import ConfigError, DataError, MDNError, RunError
from mdn.features import as_features
from mdn.model import MDN, load
from mdn.options import AUTO
from mdn.selection import Selection, choose, held_out_nll
from mdn.short_fit import fit_folds

try:
    from sklearn.base import BaseEstimator, RegressorMixin
    from sklearn.utils import check_array, check_random_state
    from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
except ImportError as error:
    raise ImportError(
        "MDNRegressor needs scikit-learn 1.6 or later: pip install 'mdn[sklearn]'"
    ) from error

COVARIANCES = {
    "full": heads.Mixture,
    "diag": heads.MixtureDiag,
    "precision": heads.MixturePrecision,
}
EAGER_ROWS = 4096
_OPTIONS = "regressor.json"  # in a saved file, beside what Keras writes


class MDNRegressor(RegressorMixin, BaseEstimator):
    """A mixture density network with the interface of scikit-learn.

    `predict` gives the mean and `score` the mean log likelihood, so that a search over parameters
    finds the best density. Rows that are equal count as one with the sum of their weights: a
    weight of two is the same as the row twice. In a data frame, columns that are not numeric are
    categories; the encoding is a part of the model, as `mdn.features.Columns`.

    Args:
        components: K, or "auto": the fewest that no other number beats on the held-out rows by
            more than one standard error (`mdn.select_components`).
        covariance: "full", "diag", or "precision" (full, by factors of the precision).
        widths: units of each hidden layer.
        activation: name of a Keras activation.
        dropout: share of the units to drop while training.
        layer_norm: normalise each layer's units before the activation.
        members: M networks, trained together, whose mixture is the density.
        target_transform: for positive or bounded targets, as for `mdn.heads.Head`.
        loss: what to minimise, as for `mdn.MDN.compile`.
        learning_rate: the peak of Adam's cosine schedule.
        steps: train steps at most, beyond 100 rounded up to hundreds; default 60 passes of the
            rows, but 2,500 to 12,000 steps.
        batch_size: B; default N / 16, but 32 to 256; where N / 256 is more, that, up to 1,024.
        validation_fraction: share of the rows to hold out for early stopping, which each member
            draws for itself; where that is less than one row, none.
        patience: training stops after so many looks at the held-out rows without improvement;
            there is one each 100 steps. The best weights are kept.
        missing: "indicator" allows missing features, "error" does not.
        random_state: seed of the weights and of the order of the rows.
        verbose: as in Keras; an epoch is 100 steps.

    Attributes:
        model_: the trained `mdn.MDN`, or `mdn.Ensemble`.
        components_: K.
        selection_: `mdn.Selection`, where K was chosen.
        history_: name of a metric -> its value at each look at the held-out rows.
        n_features_in_: F.
        feature_names_in_: [F], of a data frame.
    """

    def __init__(
        self,
        components: int | str = 5,
        *,
        covariance: str = "full",
        widths: Sequence[int] = (64, 64),
        activation: str = "gelu",
        dropout: float = 0.0,
        layer_norm: bool = False,
        members: int = 1,
        target_transform: Any = None,
        loss: Any = "nll",
        learning_rate: float = 2e-3,
        steps: int | None = None,
        batch_size: int | None = None,
        validation_fraction: float = 0.1,
        patience: int = 20,
        missing: str = "error",
        random_state: Any = None,
        verbose: int = 0,
    ) -> None:
        self.components = components
        self.covariance = covariance
        self.widths = widths
        self.activation = activation
        self.dropout = dropout
        self.layer_norm = layer_norm
        self.members = members
        self.target_transform = target_transform
        self.loss = loss
        self.learning_rate = learning_rate
        self.steps = steps
        self.batch_size = batch_size
        self.validation_fraction = validation_fraction
        self.patience = patience
        self.missing = missing
        self.random_state = random_state
        self.verbose = verbose

    # ------------------------------------------------------------------ fitting

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> MDNRegressor:
        """Learn p(y | x).

        Args:
            X: [N, F] numbers, or a data frame.
            y: [N] or [N, D].
            sample_weight: [N], not negative.

        Raises:
            ValueError: the rows or a parameter cannot be used (`mdn.MDNError`, or as scikit-learn
                raises it).
        """
        self._check_options()
        x, y = self._check_rows(X, y, reset=True)
        self.__dict__.pop("selection_", None)  # of a fit before
        weight = _check_sample_weight(sample_weight, y, ensure_non_negative=True)
        if not weight.any():
            raise DataError("sample_weight is zero in every row: give at least one row a weight")
        self._y_ndim = y.ndim
        rows = _merge(Rows(as_features(x), y.reshape(len(y), -1), weight))
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        held_out = round(self.validation_fraction * len(rows))
        order = np.random.default_rng(seed).permutation(len(rows))
        folds = draw_folds(order, held_out, self.members)
        with _seeded(seed):
            if isinstance(self.components, str):
                self.selection_ = self._choose(rows, folds, seed)
                self.model_, self.history_ = self.selection_.model
                self.selection_.model = self.model_
            else:
                self.model_, self.history_ = self._train(self.components, rows, folds, seed)
        self.components_ = self.model_.head.components
        return self

    def _choose(self, rows: Rows, folds: tuple, seed: int) -> Selection:
        if not folds[1].size:
            raise DataError(
                f"components='auto': validation_fraction={self.validation_fraction} of "
                f"{len(rows)} rows holds out none to choose by; give components=3, or so"
            )
        trained: dict[int, Any] = {}
        data = Data(rows, rows.take(np.zeros(0, int)), rows, (), ())

        def score(k: int) -> tuple[np.ndarray, np.ndarray]:
            tf_keras.utils.set_random_seed(seed)
            trained[k] = self._train(k, rows, folds, seed)
            model = trained[k][0]
            if isinstance(model, Ensemble):
                return held_out_nll(model, data, folds[1])
            held = rows.take(folds[1][0])
            return held_out_nll(model, Data(rows, held, held, (), ()))

        selection = choose(score)
        selection.model = trained[selection.k]
        return selection

    def _train(
        self, k: int, rows: Rows, folds: tuple[np.ndarray, np.ndarray], seed: int
    ) -> tuple[MDN, dict[str, list[float]]]:
        """Return a trained model of k components, and its history."""
        model = self._make_model(k, rows.y.shape[1])
        # One member's scaling is of the rows it learns from; an ensemble's is common to all.
        known = rows.take(folds[0][0]) if self.members == 1 else rows
        model.adapt(known.x, known.y, missing=self.missing, seed=seed)
        history = fit_folds(
            model,
            rows,
            folds,
            loss=self.loss,
            learning_rate=self.learning_rate,
            steps=self.steps,
            batch_size=self.batch_size,
            patience=self.patience,
            seed=seed,
            verbose=self.verbose,
        )
        return model, history

    def _make_model(self, k: int, d: int) -> MDN:
        head = COVARIANCES[self.covariance](d, k, target_transform=self.target_transform)
        backbone = backbones.MLP(
            list(self.widths),
            activation=self.activation,
            dropout=self.dropout,
            layer_norm=self.layer_norm,
        )
        model = MDN(head, backbone)
        return model if self.members == 1 else Ensemble(model, members=self.members)

    def _check_options(self) -> None:
        """Raise a ConfigError for a parameter that no layer would refuse."""
        if self.covariance not in COVARIANCES:
            raise ConfigError(
                f"covariance={self.covariance!r}: choose one of {', '.join(COVARIANCES)}"
            )
        if self.components != AUTO and not _is_count(self.components):
            raise ConfigError(f"components={self.components!r}: give a positive number, or 'auto'")
        for name in ("members", "steps", "batch_size", "patience"):
            value = getattr(self, name)
            if not (_is_count(value) or (value is None and name in ("steps", "batch_size"))):
                raise ConfigError(f"{name}={value!r}: give a positive whole number")
        if not self.learning_rate > 0:
            raise ConfigError(f"learning_rate={self.learning_rate!r}: must be positive")
        if not 0 <= self.validation_fraction < 1:
            raise ConfigError(
                f"validation_fraction={self.validation_fraction!r}: must be at least 0, below 1"
            )

    def _check_rows(self, x: Any, y: Any = "no_validation", *, reset: bool) -> Any:
        """Return x checked, or (x, y); with `reset` remember the features of x."""
        rules_y = {} if isinstance(y, str) else {"multi_output": True, "y_numeric": True}
        if _has_categories(x):
            validate_data(self, x, reset=reset, skip_check_array=True)
            if not rules_y:
                return x
            y = check_array(y, ensure_2d=False, dtype=np.float64, input_name="y")
            if len(x) != len(y):
                raise DataError(f"X has {len(x)} rows but y has {len(y)}: give one for each")
            return x, y
        rules = {
            "dtype": np.float64,
            "ensure_all_finite": "allow-nan" if self.missing == "indicator" else True,
            "ensure_min_samples": 2 if reset else 1,
        }
        return validate_data(self, x, y, reset=reset, **rules, **rules_y)

    # ------------------------------------------------------------------ answers

    def predict(self, X: Any) -> np.ndarray:
        """Return the mean of the density at each row, [N], or [N, D] where y had columns."""
        check_is_fitted(self)
        x = self._check_rows(X, reset=False)
        mean = [density.mean().numpy() for _, density in self._densities(x)]
        return self._as_y(np.concatenate(mean))

    def predict_quantiles(
        self,
        X: Any,
        quantiles: Sequence[float] = (0.05, 0.5, 0.95),
    ) -> np.ndarray:
        """Return quantiles of each target by itself, [N, Q], or [N, D, Q] where y had columns.

        Args:
            X: as for `fit`.
            quantiles: probabilities, above zero and below one.

        Raises:
            ConfigError: one is not.
        """
        levels = [float(q) for q in np.ravel(quantiles)]
        for level in levels:
            if not 0.0 < level < 1.0:
                raise ConfigError(f"quantiles: {level} is no probability between 0 and 1")
        check_is_fitted(self)
        x = self._check_rows(X, reset=False)
        parts = [
            np.stack([density.quantile(level).numpy() for level in levels], axis=-1)
            for _, density in self._densities(x)
        ]
        return self._as_y(np.concatenate(parts))

    def predict_interval(self, X: Any, level: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
        """Return the ends of the central interval of each target, as `predict` returns means.

        Args:
            X: as for `fit`.
            level: the probability of the interval.

        Returns:
            The lower and the upper ends, [N] each, or [N, D] where y had columns.

        Raises:
            ConfigError: the level is not above zero and below one.
        """
        if not 0.0 < level < 1.0:
            raise ConfigError(f"level={level}: must be a probability between 0 and 1")
        ends = self.predict_quantiles(X, [0.5 - level / 2, 0.5 + level / 2])
        return ends[..., 0], ends[..., 1]

    def predict_distribution(self, X: Any) -> Queries:
        """Return p(y | x): batch [N], event [D], as `mdn.MDN.predict_distribution` does."""
        check_is_fitted(self)
        return self.model_.predict_distribution(self._check_rows(X, reset=False))

    def log_prob(self, X: Any, y: Any) -> np.ndarray:
        """Return log p(y | x) of each row, [N] nats.

        Args:
            X: as for `fit`.
            y: [N] or [N, D], in its own units.

        Raises:
            DataError: y has another number of targets than the model.
        """
        check_is_fitted(self)
        x, y = self._check_rows(X, y, reset=False)
        y = y.reshape(len(y), -1).astype(np.float32)
        if y.shape[1] != self.model_.head.event_size:
            raise DataError(
                f"y has {y.shape[1]} targets but the model has {self.model_.head.event_size}: "
                "give as many"
            )
        parts = [density.log_prob(y[rows]).numpy() for rows, density in self._densities(x)]
        return np.concatenate(parts).astype(np.float64)

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return the mean log likelihood of the rows, in nats: larger is better.

        Args:
            X: as for `fit`.
            y: [N] or [N, D], in its own units.
            sample_weight: [N], not negative.
        """
        log_prob = self.log_prob(X, y)
        weight = _check_sample_weight(sample_weight, log_prob, ensure_non_negative=True)
        return float(np.average(log_prob, weights=weight))

    def _densities(self, x: Any) -> Iterator[tuple[slice, Queries]]:
        """Yield (rows, density of those rows) of checked features, in order.

        Without a program: a search asks each of many models once, and compiling takes longer.
        """
        encoded = np.asarray(self.model_.encode(x), np.float32)
        batch = min(EAGER_ROWS, self.model_.largest_batch)
        for start in range(0, len(encoded), batch):
            rows = slice(start, start + batch)
            yield rows, self.model_(tf.constant(encoded[rows]), training=False)

    def _as_y(self, values: np.ndarray) -> np.ndarray:
        """Return [N, D, ..] as [N, ..] where y had no columns."""
        values = values.astype(np.float64)
        return values[:, 0] if self._y_ndim == 1 else values

    # ------------------------------------------------------------------ saving

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a `.keras` file, which `MDNRegressor.load` and `mdn.load` read; no pickle.

        `mdn.load` gives the model alone, as `model_` is.

        Raises:
            ConfigError: the loss is a function of your own.
            RunError: the name does not end in .keras, or the file cannot be written.
        """
        check_is_fitted(self)
        path = Path(path)
        objects = {
            "loss": losses.describe(self.loss),
            "target_transform": self.model_.head.target_transform,
        }
        own = {
            "parameters": _plain({**self.get_params(), **objects}),
            "n_features_in_": self.n_features_in_,
            "feature_names_in_": getattr(self, "feature_names_in_", np.zeros(0)).tolist(),
            "y_ndim": self._y_ndim,
            "history_": self.history_,
        }
        try:
            with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
                whole = Path(scratch) / path.name
                self.model_.save(whole)
                with zipfile.ZipFile(whole, "a") as archive:
                    archive.writestr(_OPTIONS, json.dumps(own))
                os.replace(whole, path)
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror or error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MDNRegressor:
        """Return the estimator of a file that `save` wrote; nothing in it can run code.

        Raises:
            RunError: there is no such file, or it holds no estimator.
        """
        model = load(path)
        try:
            with zipfile.ZipFile(path) as archive:
                if _OPTIONS not in archive.namelist():
                    raise RunError(f"{path} holds a model but no estimator: load it with mdn.load")
                own = json.loads(archive.read(_OPTIONS))
            self = cls(**own["parameters"])
            self.n_features_in_, self._y_ndim = own["n_features_in_"], own["y_ndim"]
            self.history_, names = own["history_"], own["feature_names_in_"]
        except MDNError:
            raise
        except (ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise RunError(
                f"{path} cannot be loaded ({error} in {_OPTIONS}): is it a file that mdn saved?"
            ) from error
        self.model_, self.components_ = model, model.head.components
        if names:
            self.feature_names_in_ = np.array(names, dtype=object)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Return a state whose model is a `.keras` file, for copies and for processes."""
        state = dict(super().__getstate__())
        if "model_" in state:
            with tempfile.TemporaryDirectory() as scratch:
                state["model_"].save(path := Path(scratch) / "model.keras")
                state["model_"] = path.read_bytes()
            if "selection_" in state:
                state["selection_"] = dataclasses.replace(state["selection_"], model=None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "model_" in state:
            with tempfile.TemporaryDirectory() as scratch:
                (path := Path(scratch) / "model.keras").write_bytes(state["model_"])
                state = {**state, "model_": load(path)}
        super().__setstate__(state)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        tags.input_tags.allow_nan = self.missing == "indicator"
        # The check behind it wants `score` above .5, as if it were R^2; it is a log likelihood.
        tags.regressor_tags.poor_score = True
        return tags


def _is_count(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) > 0


def _plain(value: Any) -> Any:
    """Return parameters as JSON can hold them: without NumPy's types, and tuples as lists."""
    if isinstance(value, dict):
        return {name: _plain(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        return value.item()
    return value if isinstance(value, str | int | float | None) else None


def _has_categories(x: Any) -> bool:
    """Whether x is a data frame with columns that are not numeric."""
    numeric = pd.api.types.is_numeric_dtype
    return isinstance(x, pd.DataFrame) and not all(numeric(dtype) for dtype in x.dtypes)


def _merge(rows: Rows) -> Rows:
    """Return the distinct rows that have weight, with mean weight one, in an order of their own.

    What is learned then depends neither on the order of the rows, nor on whether a weight is
    given as a number or by repeating the row.
    """
    kept = rows.take(np.flatnonzero(np.asarray(rows.weight)))
    columns = list(kept.x.values()) if isinstance(kept.x, dict) else list(kept.x.T)
    codes = [pd.factorize(c, sort=True)[0] for c in [*columns, *kept.y.T]]
    _, first, group = np.unique(
        np.column_stack(codes), axis=0, return_index=True, return_inverse=True
    )
    weight = np.bincount(group.ravel(), kept.weight)
    return dataclasses.replace(kept.take(first), weight=weight / weight.mean())


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed all streams that Keras draws from; those of Python and NumPy go on thereafter."""
    states = random.getstate(), np.random.get_state()
    tf_keras.utils.set_random_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
