"""`MDN`: encoder, backbone and head as one Keras model that returns a density.

Shape letters: B batch, T time, F features, D event size, N rows.
"""

from __future__ import annotations

import os
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

import mdn
from mdn import backbones, losses
from mdn import jitter as jitters
from mdn.answers import AnsweringModel
from mdn.base import TrainedModel, written_by
from mdn.constructors import check_model, import_trusted
from mdn.data.checks import check_rows, check_weight
from mdn.data.rows import Features, Rows
from mdn.data.splits import thin
from mdn.density.queries import Queries
from mdn.density.recalibration import Recalibration
from mdn.errors import ConfigError, DataError, RunError
from mdn.features import Columns, Standardize, as_features, as_tensors
from mdn.heads import Diag, Head, MixtureDiag
from mdn.held_out import hold_out
from mdn.recalibration import RecalibrationFit, fit_recalibration

register = tf_keras.saving.register_keras_serializable(package="mdn")

PARTS = ("head", "backbone", "encoder", "embedding")
MOST_ROWS = 200_000  # that an embedding is fitted to


@register
class MDN(AnsweringModel):
    """A conditional density p(y | x) as a Keras model.

    Args:
        head: what makes the density of hidden features, e.g. `mdn.heads.Mixture(2, 3)`.
        backbone: a Keras model or layer [.., F] -> [.., H]; default `mdn.backbones.MLP()`.
        encoder: raw features to [.., F]; by default `adapt` takes `mdn.features.Standardize` for
            a matrix and `mdn.features.Columns` for a mapping of columns.
        embedding: of encoded features, such as `mdn.embeddings.PiecewiseLinear()`; or None.
        **kwargs: as for any Keras model.

    Raises:
        ConfigError: the head is none of `mdn.heads`.

    Called on x ([B, F], [B, T, F], or a mapping of columns [B]) it returns a density with batch
    [B] or [B, T] and event [D], in the units of y; see `mdn.density`.
    """

    tracked: tuple[str, ...] = ("loss", "nll", "gradient_norm")

    def __init__(
        self,
        head: Head,
        backbone: tf_keras.layers.Layer | None = None,
        encoder: Standardize | Columns | None = None,
        embedding: tf_keras.layers.Layer | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not isinstance(head, Head):
            raise ConfigError(
                f"head={head!r} is no mdn head: use mdn.heads.Mixture(event_size=..)"
            )
        self.head = head
        self.backbone = backbones.MLP() if backbone is None else backbone
        self.encoder: Any = encoder
        self.embedding: Any = embedding
        self.missing = "error"
        self._feature_rank: int | None = None  # 2 or 3, known from `adapt` on
        self._score: losses.Loss = losses.nll
        self._jitter: jitters.Jitter | None = None
        # In a namespace, as Keras looks into what attributes hold.
        self._programs = types.SimpleNamespace()
        self._rebuild: Any = None

    # ------------------------------------------------------------------ starting values

    def adapt(self, x: Features, y: np.ndarray, *, missing: str = "error", seed: int = 0) -> None:
        """Fit scalers, vocabularies and starting values; give it train rows only.

        Args:
            x: [N, F], [N, T, F], or a mapping from column name to [N].
            y: [N, D] or [N, T, D] in the user's units; NaN marks a missing entry.
            missing: "error" refuses missing features, and answers NaN for a row that lacks a
                number; "indicator" fills them with the mean and tells the network so. A
                `Standardize` that the model was given decides by itself.
            seed: of the head's k-means start.

        Raises:
            DataError: rows that no density can be fitted to, see `mdn.data.checks`; "indicator",
                of a model given a `Standardize` for "error".
        """
        x, y = as_features(x), np.asarray(y)
        standardized = isinstance(self.encoder, Standardize)
        if missing == "indicator" and standardized and self.encoder.missing == "error":
            raise DataError("the model was made for missing='error': make a new one to adapt")
        if self.encoder is None:
            self.encoder = Columns() if isinstance(x, dict) else Standardize(missing)
        if isinstance(self.encoder, Standardize):
            missing = self.encoder.missing
        self.set_missing(missing)
        check_rows(x, y, missing)
        self.encoder.adapt(x)
        if self.embedding is not None:
            encoded, steps = self._encoded(x)
            self.embedding.adapt(encoded if steps is None else encoded[steps])
        self.head.adapt(self.known_targets(x, y), seed=seed)
        self._build_network(2 if isinstance(x, dict) else x.ndim)

    def set_missing(self, missing: str) -> None:
        """Take what is done with a missing feature, see `adapt`."""
        self.missing = missing
        if isinstance(self.encoder, Columns):
            self.encoder.missing = missing

    def lacking(self, x: Any) -> tf.Tensor | None:
        """Return which rows have no answer, [B]: they lack a number that no train row lacked.

        Args:
            x: [B, F], or columns [B], or their codes [B, C].

        Returns:
            None where there is no such row: the model fills what is missing, reads no feature, or
            takes sequences.
        """
        if self.missing != "error" or self._feature_rank != 2:
            return None
        if isinstance(self.backbone, backbones.Constant):
            return None
        if isinstance(x, Mapping):
            numbers = [c.name for c in self.encoder.columns if c.vocabulary is None]
            if not numbers:
                return None
            x = tf.stack([tf.cast(tf.reshape(x[n], [-1]), tf.float32) for n in numbers], axis=-1)
        return tf.reduce_any(tf.math.is_nan(x), axis=-1)

    def known_targets(self, x: Features, y: np.ndarray) -> np.ndarray:
        """Return y with NaN for whatever stands in padded steps of [N, T, F] and [N, T, D]."""
        x, y = as_features(x), np.asarray(y)
        if isinstance(x, dict) or x.ndim != 3 or y.ndim != 3:
            return y
        real = self.encoder.compute_mask(tf.constant(x, tf_keras.backend.floatx())).numpy()
        return np.where(real[..., np.newaxis], y, np.nan)

    def _build_network(self, rank: int) -> None:
        # One call on zeros makes every weight, also of a backbone that is not ours.
        self._feature_rank = rank
        size = (
            len(self.encoder.names) if isinstance(self.encoder, Columns) else self.encoder.features
        )
        zeros = tf.zeros([1] * (rank - 1) + [size], tf_keras.backend.floatx())
        self(zeros)

    def as_arrays(
        self, x: Any, y: Any = None, sample_weight: Any = None
    ) -> tuple[np.ndarray, ...]:
        dtype = tf_keras.backend.floatx()
        if np.shape(y)[-1:] != (self.head.event_size,):
            raise DataError(
                f"y has shape {list(np.shape(y))} but the head has event_size="
                f"{self.head.event_size}: give [N, {self.head.event_size}]"
            )
        weight = () if sample_weight is None else (np.asarray(sample_weight, dtype),)
        return np.asarray(self.encode(x), dtype), np.asarray(y, dtype), *weight

    def _check_adapted(self) -> None:
        if self._feature_rank is None:
            raise RunError("the model has no scaling yet: call model.adapt(x, y) on train rows")

    # ------------------------------------------------------------------ Keras

    def call(self, inputs: Any, training: bool | None = None) -> Queries:
        self._check_adapted()
        return self.head(self._hidden(inputs, training))

    def _hidden(self, inputs: Any, training: bool | None) -> tf.Tensor:
        hidden = self.backbone(self.features(inputs), training=training)  # [.., F'] to [.., H]
        return hidden if training else self._without_answers(inputs, hidden)

    def _without_answers(self, inputs: Any, hidden: tf.Tensor) -> tf.Tensor:
        """Return hidden [.., B, H] with NaN where `lacking` says so: a fused ReLU makes it 0."""
        lacking = self.lacking(inputs)
        if lacking is None:
            return hidden
        return tf.where(lacking[:, tf.newaxis], tf.constant(np.nan, hidden.dtype), hidden)

    def features(self, inputs: Any) -> tf.Tensor:
        """Return what the backbone takes, [.., F'], of raw features or their codes."""
        features = self.encoder(inputs)
        return features if self.embedding is None else self.embedding(features)

    def _encoded(self, x: Features) -> tuple[np.ndarray, np.ndarray | None]:
        """Return train rows as the encoder encodes them, and which steps are no padding.

        Some of them, where there are many.
        """
        n = len(next(iter(x.values())) if isinstance(x, dict) else x)
        some = thin(n, MOST_ROWS)
        if isinstance(x, dict):
            return self.encoder(as_tensors({k: v[some] for k, v in x.items()})).numpy(), None
        rows = tf.constant(x[some], tf_keras.backend.floatx())
        mask = self.encoder.compute_mask(rows)
        return self.encoder(rows).numpy(), None if mask is None else mask.numpy()

    @property
    def parts(self) -> list[Any]:
        """The layers and variables that the density is computed from."""
        embedding = [] if self.embedding is None else [self.embedding]
        return [self.encoder, *embedding, self.backbone, self.head]

    @property
    def head_weights(self) -> tuple[tf.Variable, tf.Variable]:
        """The head's kernel [P, H] and bias [P]; of an ensemble [M, P, H] and [M, P]."""
        return self.head.kernel, self.head.bias

    @property
    def xla(self) -> bool:
        return getattr(self.backbone, "xla", True)

    def compile(
        self,
        optimizer: Any = "adam",
        loss: str | dict[str, Any] | losses.Loss = "nll",
        *,
        jitter: Any = None,
        jit_compile: bool | None = None,
        **kwargs: Any,
    ) -> None:
        """Configure training as in Keras; the negative log likelihood is the default loss.

        Args:
            optimizer: a Keras optimizer or its name.
            loss: a name of `mdn.losses.LOSSES`, {"name": .., option: value, ..}, or a function
                of (y, density) to [B].
            jitter: True adds noise to targets on a grid, see `mdn.jitter.Jitter`; or the steps of
                their grids, [D]. The NLL of validation rows is then that of the cells around
                them, see `mdn.losses.CellNLL`.
            jit_compile: see `CompiledModel.compile`.
            **kwargs: as for `tf_keras.Model.compile`; metrics see the mean of the density.

        Raises:
            ConfigError: the loss is unknown, or has no meaning for the head's density; or
                there is no jitter of transformed targets.
        """
        self._jitter = jitters.get(jitter, self.head.grid)
        if self._jitter is not None and self.head.target_transform is not None:
            raise ConfigError(
                f"target_transform={self.head.target_transform}: noise could leave its domain; "
                "train without jitter"
            )
        if self._jitter is not None:
            self._check_steps("jitter", self._jitter.step)
        self._score = losses.get(loss, self.head.grid, self.column_names.targets)
        self._check_score()
        if not isinstance(loss, str) or loss == "interval_nll":
            loss = self._score  # whose options are then saved with the model
        super().compile(optimizer=optimizer, loss=loss, jit_compile=jit_compile, **kwargs)

    def _check_score(self) -> None:
        """Raise a ConfigError where the loss has no meaning for the head's density."""
        score, head = self._score, self.head
        if not isinstance(score, losses.IntervalNLL):
            return
        if head.event_size > 2 and not isinstance(head, Diag | MixtureDiag):
            raise ConfigError(
                f"loss=interval_nll: {head.event_size} targets need diagonal covariances; use "
                "model=mixture_diag or model=diag"
            )
        self._check_steps("loss=interval_nll", score.step)

    def _check_steps(self, what: str, step: Any) -> None:
        """Raise a ConfigError for steps of grids that are not one for all targets or for each."""
        count = (1, *np.shape(step))[-1]
        if count not in (1, self.head.event_size):
            raise ConfigError(
                f"{what}: {count} steps for {self.head.event_size} targets; give one for all, or "
                "one for each"
            )

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> tf.Tensor:
        """Return the mean of weight times score over the batch, plus regularisation: a scalar.

        Rows without any observed target, and padded steps, count nothing.
        """
        y, counted = self._fill(x, y)
        score, nll = self._scores(training)
        rest = None if nll is None else nll(y, y_pred)
        return self._mean(score(y, y_pred), counted, sample_weight, rest)

    @property
    def loss_unit(self) -> Any:
        return losses.unit(self._score, self.head)

    def _scores(self, training: bool) -> tuple[losses.Loss, losses.Loss | None]:
        """Return the loss; and the NLL for the metric of that name, where it is not the loss."""
        nll: losses.Loss = losses.nll
        if self._jitter is not None and not training:
            nll = losses.CellNLL(self._jitter.step)
        return (nll, None) if self._score is losses.nll else (self._score, nll)

    def _jittered(self, y: tf.Tensor, training: bool) -> tf.Tensor:
        if self._jitter is None or not training:
            return y
        return self._jitter(y, self.optimizer.iterations)

    def get_compile_config(self) -> dict[str, Any]:
        config = super().get_compile_config()
        if config and self._jitter is not None:
            config["jitter"] = tf_keras.saving.serialize_keras_object(self._jitter)
        return config

    def _fill(self, x: Any, y: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Return y with numbers in the rows that count nothing, and which rows count."""
        counted = self._counted(x, y)  # [B] or [B, T]
        return tf.where(counted[..., tf.newaxis], y, tf.cast(self.head.filler, y.dtype)), counted

    def _mean(
        self,
        score: tf.Tensor,
        counted: tf.Tensor,
        sample_weight: Any,
        nll: tf.Tensor | None = None,
    ) -> tf.Tensor:
        rows = tf.reduce_sum(tf.cast(counted, score.dtype))
        count = tf.maximum(rows, 1.0)
        if sample_weight is not None:
            sample_weight = tf.cast(sample_weight, score.dtype)
            if sample_weight.shape.rank < score.shape.rank:
                sample_weight = sample_weight[:, tf.newaxis]  # [B, 1], the same for every step

        def add(score: tf.Tensor) -> tf.Tensor:
            score = score if sample_weight is None else score * sample_weight
            return tf.reduce_sum(tf.where(counted, score, tf.zeros_like(score)))

        total = add(score)
        nll_total = total if nll is None else add(nll)
        penalty = tf.add_n(
            [tf.cast(term, total.dtype) for term in self.losses] or [tf.zeros_like(total)]
        )
        self._trackers.nll.update_state(nll_total / count, sample_weight=rows)
        self._trackers.loss.update_state(total / count + penalty, sample_weight=rows)
        return total / self._per_replica(count) + penalty

    def _counted(self, x: Any, y: tf.Tensor) -> tf.Tensor:
        """Return [B] or [B, T]: where there is something to learn from."""
        observed = tf.reduce_any(tf.logical_not(tf.math.is_nan(y)), axis=-1)
        mask = self.encoder.compute_mask(x)
        return observed & mask if mask is not None and observed.shape.rank == 2 else observed

    def forward(
        self, x: Any, y: Any, sample_weight: Any, training: bool
    ) -> tuple[tf.Tensor, Queries | None]:
        y = self._jittered(y, training)
        complete = self._loop.complete.get("train" if training else "test")
        if complete and self._scores(training)[0] is losses.nll:
            y, counted = self._fill(x, y)
            hidden = self._hidden(x, training)
            loss = self._mean(-self.head.log_prob(hidden, y), counted, sample_weight)
            # Without metrics nobody asks for the density, which takes long to trace.
            return loss, None if self.compiled_metrics is None else self.head(hidden)
        density = self(x, training=training)
        return self.compute_loss(x, y, density, sample_weight, training), density

    def log_density(self, x: Any, y: tf.Tensor, complete: bool | None = None) -> tf.Tensor:
        self._check_adapted()
        hidden = self._hidden(x, training=False)
        return self._where_complete(
            y,
            complete,
            lambda: self.head.log_prob(hidden, y),
            lambda: self.head(hidden).log_prob(y),
        )

    def predict_step(self, data: Any) -> tf.Tensor:
        x, _, _ = tf_keras.utils.unpack_x_y_sample_weight(data)
        return self(x, training=False).mean()

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any) -> dict[str, Any]:
        if self.compiled_metrics is None:
            return {}
        mean, counted = y_pred.mean(), self._counted(x, y)
        mean._keras_mask = counted  # where Keras's metrics look for it
        y = tf.where(counted[..., tf.newaxis], tf.cast(y, mean.dtype), mean)
        return super().compute_metrics(x, y, mean, sample_weight)

    def check_arrays(self, x: Any, y: Any, sample_weight: Any) -> None:
        check_rows(as_features(x), np.asarray(y), self.missing)
        self.head.check_domain(y)
        if sample_weight is not None:
            check_weight(sample_weight, "sample_weight")

    def is_complete(self, arrays: tuple[np.ndarray, ...]) -> bool:
        missing = np.isnan(arrays[1])
        return bool((missing.all(axis=-1) == missing.any(axis=-1)).all())

    def encoded(self, batches: tf.data.Dataset) -> tf.data.Dataset:
        if isinstance(self.encoder, Columns) and isinstance(batches.element_spec[0], dict):
            return batches.map(lambda x, *rest: (self.encoder.codes(x), *rest))
        return batches

    def arrays(self, rows: Rows) -> tuple[Any, ...]:
        weight = () if rows.weight is None else (rows.weight,)
        return (self.encode(rows.x), rows.y, *weight)

    # ------------------------------------------------------------------ recalibration

    def recalibrate(
        self, x: Features, y: np.ndarray, sample_weight: Any = None, *, seed: int = 0
    ) -> RecalibrationFit:
        """Move and widen the components, and sharpen their weights, by the likelihood of rows.

        The few numbers of the map (`mdn.density.recalibration`) are the same for every x. From
        then on every answer is of the recalibrated density, which is of the same type; they are
        saved and exported with the model. A map that was there before is replaced; of a
        `Stack` the ensembles keep theirs.

        Args:
            x: features of rows that the model has not learned from, as for `fit`.
            y: [N, D] or [N, T, D]; NaN marks a missing entry.
            sample_weight: [N], row weights.
            seed: of the folds, and of the points in the cells of targets on a grid.

        Returns:
            What the map is worth on rows it was not fitted to. One that gains less than two
            standard errors is not taken, and the model is then as if never recalibrated.
        """
        return self._recalibrate(x, y, sample_weight, None, seed)

    def _recalibrate(
        self, x: Any, y: Any, weight: Any, rows: Sequence[np.ndarray] | None, seed: int
    ) -> RecalibrationFit:
        self._check_adapted()
        self.set_recalibration(None)
        x, y = as_features(x), np.asarray(y, np.float64)
        self.check_arrays(x, y, weight)
        fit = fit_recalibration(hold_out(self, x, y, weight, rows, seed), seed)
        self.set_recalibration(fit.map)
        return fit

    def set_recalibration(self, recalibration: Recalibration | None) -> None:
        """Take a map of the density, in the units of y (transformed ones, where they are)."""
        self.head.recalibration = recalibration
        self._forget_programs()

    def _forget_programs(self) -> None:
        """Leave behind the programs that were made for another density."""
        vars(self._programs).clear()
        self._loop.functions = {}
        self.train_function = self.test_function = self.predict_function = None

    @property
    def fixed_components(self) -> int:
        """How many components at the end no map of the density changes: the background."""
        return self.head.fixed_components

    def member_answers(
        self, x: Features, rows: Sequence[np.ndarray] | None = None
    ) -> Iterator[tuple[Any, Queries]]:
        """Yield the rows that a member is asked of, and its density of them: of an MDN, all."""
        yield slice(None), self.predict_distribution(x)

    # ------------------------------------------------------------------ saving

    def get_config(self) -> dict[str, Any]:
        serialize = tf_keras.saving.serialize_keras_object
        parts = {name: serialize(getattr(self, name)) for name in PARTS}
        return {"name": self.name, "missing": self.missing, **self.names_config(), **parts}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> MDN:
        parts = {
            name: tf_keras.saving.deserialize_keras_object(config.get(name), custom_objects)
            for name in PARTS
        }
        model = cls(name=config["name"], **parts)
        model.set_missing(config["missing"])
        model.restore_names(config)
        return model

    def get_build_config(self) -> dict[str, Any]:
        return {"feature_rank": self._feature_rank}

    def build_from_config(self, config: dict[str, Any]) -> None:
        if config["feature_rank"] is not None:
            self._build_network(config["feature_rank"])


def load(path: str | os.PathLike[str], compile: bool = True, *, trust: Sequence[str] = ()) -> Any:
    """Return the model of a `.keras` file; nothing in the file can run code.

    Args:
        path: the file.
        compile: also restore the optimizer and the loss.
        trust: "module.Class" of each class of the user's own that the file names, unless it is
            registered with Keras already: its module is imported, and runs.

    Raises:
        ConfigError: there is no class of a name in `trust`.
        RunError: there is no such file, it is not a model that mdn saved, or it names a class that
            is neither of mdn nor a harmless part of Keras. If another version of mdn wrote it, the
            message says which.
    """
    path = Path(path)
    if not path.is_file():
        raise RunError(f"{path} does not exist: give a .keras file that mdn saved")
    if path.suffix != ".keras":  # of other files Keras has readers that run what is in them
        raise RunError(f"{path} is no .keras file by its name: give one that mdn saved")
    import_trusted(trust)
    try:
        check_model(path, trust, compile)
        model = tf_keras.models.load_model(path, compile=compile, safe_mode=True)
    except RunError as error:
        if (other := _other_version(path)) is None:
            raise
        raise RunError(f"{error}; {other}") from error
    except Exception as error:  # ZIP, JSON, HDF5 and Keras raise a dozen types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        remedy = _other_version(path) or "is it a file that mdn saved?"
        raise RunError(f"{path} cannot be loaded ({reason}): {remedy}") from error
    if not isinstance(model, TrainedModel):
        raise RunError(f"{path} holds a {type(model).__name__}, not an MDN: load it with tf_keras")
    return model


def _other_version(path: Path) -> str | None:
    """Return, of a `.keras` file of another version of mdn, which can load it."""
    written = written_by(path)
    if written in (None, mdn.__version__):
        return None
    return f"mdn {written} wrote it, and can load it; this is mdn {mdn.__version__}"
