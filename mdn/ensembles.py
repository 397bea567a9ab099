"""`Ensemble`: M members stacked on a leading axis, trained by one program; one predictive density.

Each weight of a member is a slice of a variable [M, ..], so that a step of all members is a step
of one network whose products are batched. No operation mixes two slices in training, and an
optimizer works on each number by itself: member m learns what it would have learned alone.

Shape letters: B batch, T time, F features, H hidden, P parameters, D event size, K components,
M ensemble members, N rows, S steps of a chunk.
"""

from __future__ import annotations

import contextlib
import math
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
import tf_keras
from tf_keras import layers

from mdn import backbones, losses
from mdn.base import EVALUATION_BATCH
from mdn.data import pipeline
from mdn.data.rows import Features
from mdn.density.mixture import mixture_of
from mdn.density.queries import Queries
from mdn.errors import ConfigError
from mdn.model import MDN

register = tf_keras.saving.register_keras_serializable(package="mdn")

# What `_apply` knows how to stack.
BACKBONES = (backbones.MLP, backbones.ResNet, backbones.Constant)


class Uncertainty(NamedTuple):
    """The covariance of an ensemble's predictive density in two parts, which sum to it.

    Attributes:
        aleatoric: [N, D, D] or [N, T, D, D], the mean of the members' covariances: the noise in
            y that they agree on.
        epistemic: of the same shape, the covariance of the members' means: where they differ.
    """

    aleatoric: np.ndarray
    epistemic: np.ndarray


@register
class Ensemble(MDN):
    """M networks of one shape as one Keras model; its density is the mixture of theirs.

    The members share the scaling of x and y, and differ in their initial weights, in the clusters
    that their heads start from, in the order of their rows and in the rows they validate on.

    Args:
        model: of the head and backbone to copy; its weights are not used. The backbone is one of
            `mdn.backbones.MLP`, `ResNet` and `Constant`.
        members: M.
        **kwargs: as for any Keras model.

    Raises:
        ConfigError: there is no such ensemble.
    """

    def __init__(self, model: MDN, members: int = 5, **kwargs: Any) -> None:
        # Not MDN's own: the head and backbone of the template are no weights of the ensemble.
        super(MDN, self).__init__(**kwargs)
        if members < 1:
            raise ConfigError(f"members={members}: an ensemble needs at least one")
        if type(model.backbone) not in BACKBONES:
            raise ConfigError(
                f"the backbone {type(model.backbone).__name__} cannot be stacked: use one of "
                f"{', '.join(b.__name__ for b in BACKBONES)}, or train the members one by one"
            )
        self.members = int(members)
        # In a namespace, so that Keras does not take the template's weights for the ensemble's.
        self._template = types.SimpleNamespace(model=_copy(model), stacked={})
        self.encoder: Any = model.encoder
        self.missing = "error"
        self._feature_rank: int | None = None
        self._score: losses.Loss = losses.nll
        self._density: Any = None
        self._split: Any = None
        self._test_rank: int | None = None  # of the features in the last chunks to evaluate
        for name in self._member_names():
            vars(self._trackers)[name] = tf_keras.metrics.Mean(name=name)
        self.tracked = (*type(self).tracked, *self._member_names())
        # The scaling of y, in which the density is stated, is the template's and is the same for
        # all: as attributes its variables are saved with the ensemble's own.
        self.y_loc, self.y_scale, self.floor = self.head.y_loc, self.head.y_scale, self.head.floor

    def _member_names(self) -> list[str]:
        return [f"nll_{m}" for m in range(self.members)]

    @property
    def head(self) -> Any:  # type: ignore[override]
        """The head that makes densities of stacked parameters; its kernel and bias are unused."""
        return self._template.model.head

    @property
    def backbone(self) -> Any:  # type: ignore[override]
        """The backbone whose layers are stacked; its weights are unused."""
        return self._template.model.backbone

    @property
    def parts(self) -> list[Any]:
        """The layers and variables that the density is computed from."""
        return [self.encoder, self.y_loc, self.y_scale, self.floor, *self.stacked_weights]

    @property
    def stacked_weights(self) -> list[tf.Variable]:
        """The weights of the members, [M, ..] each."""
        return list(self._template.stacked.values())

    def are_stacked(self) -> list[bool]:
        """Return which of `weights` have a slice for each member."""
        known = {weight.ref() for weight in self.stacked_weights}
        return [weight.ref() in known for weight in self.weights]

    # ------------------------------------------------------------------ starting values

    def adapt(self, x: Features, y: np.ndarray, *, missing: str = "error", seed: int = 0) -> None:
        """Fit scalers, vocabularies and starting values; give it train rows only.

        Member m starts as the `MDN` that is made and adapted after
        `tf_keras.utils.set_random_seed(seed + m)`; that call seeds the global streams.

        Args:
            x: as for `MDN.adapt`.
            y: as for `MDN.adapt`.
            missing: as for `MDN.adapt`.
            seed: of the first member.

        Raises:
            DataError: as `MDN.adapt` does.
        """
        template: MDN = self._template.model
        template.encoder = self.encoder
        template.adapt(x, y, missing=missing, seed=seed)
        self.encoder, self.missing = template.encoder, template.missing
        rank = template.get_build_config()["feature_rank"]
        self._build_network(rank)
        for m in range(self.members):
            tf_keras.utils.set_random_seed(seed + m)
            member = _copy(template)
            member.encoder = template.encoder
            member.head.adapt(template.known_targets(x, y), seed=seed + m)
            member.build_from_config({"feature_rank": rank})
            for variable, value in zip(self.stacked_weights, _weights(member), strict=True):
                variable.assign(tf.tensor_scatter_nd_update(variable, [[m]], [value]))

    def _build_network(self, rank: int) -> None:
        template: MDN = self._template.model
        template.encoder = self.encoder
        template.build_from_config({"feature_rank": rank})
        if not self._template.stacked:
            for weight in _weights(template):
                self._template.stacked[weight.ref()] = self.add_weight(
                    name=weight.name.partition(":")[0].replace("/", "_"),
                    shape=[self.members, *weight.shape],
                    dtype=weight.dtype,
                    trainable=weight.trainable,
                    initializer="zeros",
                    experimental_autocast=False,
                )
        super()._build_network(rank)

    def member(self, m: int) -> MDN:
        """Return member m as a model of its own, with a copy of its weights."""
        self._check_adapted()
        member = _copy(self._template.model)
        member.encoder = type(self.encoder).from_config(self.encoder.get_config())
        member.missing = self.missing
        member.build_from_config(self.get_build_config())
        member.encoder.set_weights(self.encoder.get_weights())
        for variable, value in zip(_weights(member), self.stacked_weights, strict=True):
            variable.assign(value[m])
        for name in ("y_loc", "y_scale", "floor"):
            getattr(member.head, name).assign(getattr(self.head, name))
        return member

    # ------------------------------------------------------------------ densities

    def call(self, inputs: Any, training: bool | None = None) -> Queries:
        return mixture_of(self.member_densities(inputs, training=training))

    def member_densities(self, x: Any, training: bool | None = None) -> Queries:
        """Return the densities of all members, of the head's type and batch [M, B] or [M, B, T].

        Args:
            x: [B, F], [B, T, F] or columns [B], the same for all members; or for each its own,
                [M, B, F] or [M, B, T, F], encoded as `encode` does.
            training: whether to drop units.
        """
        self._check_adapted()
        own = self._is_stacked(x)
        rows = tf.reshape(x, tf.concat([[-1], tf.shape(x)[2:]], 0)) if own else x
        if own:
            rows.set_shape([None, *x.shape[2:]])
        features = self.encoder(rows)  # [M B, .., F] or [B, .., F]
        size = self.encoder.output_size
        if own:
            batch = tf.shape(x)[1:-1]  # [B] or [B, T]
            features = tf.reshape(features, [self.members, -1, size])
        else:
            batch = tf.shape(features)[:-1]
            features = tf.reshape(features, [1, -1, size])
            features = tf.repeat(features, self.members, axis=0)
        if own and x.shape[1:-1].is_fully_defined():  # static, which XLA likes
            features.set_shape([self.members, math.prod(x.shape[1:-1]), size])
            batch = x.shape[1:-1].as_list()
        hidden = self._apply(self.backbone, features, training)  # [M, n, H]
        head = self.head
        params = tf.matmul(tf.cast(hidden, head.dtype), self._stack(head.kernel))
        params += self._stack(head.bias)[:, tf.newaxis]  # [M, n, P]
        params = tf.reshape(params, tf.concat([[self.members], batch, [head.params_size]], 0))
        return head.distribution(params)

    def _is_stacked(self, x: Any) -> bool:
        """Whether x holds rows for each member, [M, B, ..]."""
        return not isinstance(x, dict) and x.shape.rank == (self._feature_rank or 2) + 1

    def _stack(self, weight: tf.Variable) -> tf.Variable:
        """Return the variable [M, ..] that stands for a weight of the template."""
        return self._template.stacked[weight.ref()]

    def _apply(self, layer: Any, hidden: tf.Tensor, training: bool | None) -> tf.Tensor:
        """Return what the members' copies of a layer make of [M, n, H]."""
        if isinstance(layer, backbones.Constant):
            return tf.zeros_like(hidden[..., :1])
        if isinstance(layer, backbones.Backbone):
            for inner in layer.chain:
                hidden = self._apply(inner, hidden, training)
            return hidden
        if isinstance(layer, backbones.ResidualBlock):
            before = hidden
            for inner in layer.chain:
                hidden = self._apply(inner, hidden, training)
            return before + hidden
        hidden = tf.cast(hidden, layer.compute_dtype)
        if isinstance(layer, layers.Dense):
            kernel, bias = (
                tf.cast(self._stack(w), layer.compute_dtype) for w in (layer.kernel, layer.bias)
            )
            return layer.activation(tf.matmul(hidden, kernel) + bias[:, tf.newaxis])
        if isinstance(layer, layers.Activation):
            return layer.activation(hidden)
        if isinstance(layer, layers.LayerNormalization):
            exact = tf.cast(hidden, tf.float32)  # as Keras does, whatever the policy
            mean, variance = tf.nn.moments(exact, axes=[-1], keepdims=True)
            gamma, beta = (self._stack(w)[:, tf.newaxis] for w in (layer.gamma, layer.beta))
            scaled = gamma * (exact - mean) * tf.math.rsqrt(variance + layer.epsilon) + beta
            return tf.cast(scaled, layer.compute_dtype)
        if isinstance(layer, backbones.Dropout):
            return self._drop(layer, hidden) if training and layer.rate else hidden
        raise ConfigError(f"a layer {type(layer).__name__} cannot be stacked: leave it out")

    def _drop(self, layer: backbones.Dropout, hidden: tf.Tensor) -> tf.Tensor:
        """Drop units of each member as its own seed says: the masks that it would have alone."""
        state = self._stack(layer.state)  # [M, 2]
        now = tf.identity(state)
        state.assign_add(tf.tile([[0, 1]], [self.members, 1]))
        seeds = tf.unstack(now * [[1, 1024]])
        return tf.stack(
            [
                tf.nn.experimental.stateless_dropout(one, layer.rate, seed)
                for one, seed in zip(tf.unstack(hidden), seeds, strict=True)
            ]
        )

    # ------------------------------------------------------------------ answers for many rows

    def uncertainty(self, x: Features, batch_size: int = 4096) -> Uncertainty:
        """Return the covariance of the predictive density in two parts (law of total variance).

        Args:
            x: [N, F], [N, T, F], or a mapping of columns [N].
            batch_size: rows that go through the networks at a time.
        """
        self._check_adapted()
        if self._split is None:
            self._split = tf.function(
                lambda x: split_covariance(self.member_densities(x, training=False)),
                reduce_retracing=True,
                autograph=False,
            )
        x = np.asarray(self.encode(x), tf_keras.backend.floatx())
        parts = [
            self._split(tf.constant(x[start : start + batch_size]))
            for start in range(0, len(x), batch_size)
        ]
        return Uncertainty(*(np.concatenate(part) for part in zip(*parts, strict=True)))

    # ------------------------------------------------------------------ Keras

    def compile(
        self,
        optimizer: Any = "adam",
        loss: str | losses.Loss = "nll",
        *,
        jit_compile: bool | None = None,
        **kwargs: Any,
    ) -> None:
        """Configure training as `MDN.compile` does.

        Raises:
            ConfigError: the optimizer clips norms, which are of all members together; or there
                are several replicas.
        """
        optimizer = tf_keras.optimizers.get(optimizer)
        for name in ("global_clipnorm", "clipnorm"):
            if getattr(optimizer, name, None) is not None:
                raise ConfigError(
                    f"optimizer.{name}={getattr(optimizer, name)}: would clip the members of the "
                    f"ensemble by their common norm; set {name} to null"
                )
        if self.distribute_strategy.num_replicas_in_sync > 1:
            raise ConfigError("an ensemble trains on one device: use strategy=cpu or strategy=gpu")
        super().compile(optimizer, loss, jit_compile=jit_compile, **kwargs)

    def fit(  # type: ignore[override]
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        *,
        validation_split: float = 0.0,
        shuffle: bool = True,
        sample_weight: Any = None,
        initial_epoch: int = 0,
        **kwargs: Any,
    ) -> Any:
        """Train all members at once, as `MDN.fit` does one.

        Each member goes through the rows in an order of its own. The metrics are means over the
        members, and nll_<m> is of member m. Of `validation_data`, which is the same for all,
        val_loss and val_nll are of the predictive density.

        Args:
            x: features, or what `member_batches` returns.
            y: targets, where x is features.
            batch_size: B of each member; default 32.
            validation_split: share of the rows that each member holds out, as far as there are
                rows enough other ones than the members before.
            shuffle: a new order in each epoch, drawn from NumPy's global stream.
            sample_weight: [N], row weights.
            initial_epoch: epochs that lie behind.
            **kwargs: as for `MDN.fit`.

        Raises:
            ConfigError: x is a dataset, whose rows the members could not shuffle.
        """
        self._check_adapted()
        if isinstance(x, tf.data.Dataset):
            raise ConfigError(
                "the members of an ensemble shuffle the rows themselves: give x and y as arrays"
            )
        if self._is_arrays(x, y):
            self.check_arrays(x, y, sample_weight)
            arrays = self.as_arrays(x, y, sample_weight)
            n, seed = len(arrays[0]), int(np.random.randint(2**31 - 1))
            held_out = n - math.floor(n * (1.0 - validation_split))
            order = np.random.default_rng(seed).permutation(n)
            train, validation = draw_folds(order, held_out, self.members)
            options = {"chunk": self._loops.chunk, "complete": self.is_complete(arrays)}
            x = member_batches(
                arrays,
                train,
                32 if batch_size is None else batch_size,
                seed=seed if shuffle else None,
                first_epoch=initial_epoch,
                drop_remainder=False,
                **options,
            )
            y = None
            if held_out and not kwargs.get("validation_data"):
                kwargs["validation_data"] = member_evaluation_batches(
                    arrays, validation, EVALUATION_BATCH, **{**options, "chunk": x.chunk}
                )
        return super().fit(x, initial_epoch=initial_epoch, **kwargs)

    @contextlib.contextmanager
    def _looping(self, train: Any, test: Any) -> Iterator[list[tuple[Any, int | None]]]:
        if isinstance(test, pipeline.Batches):
            rank = test.chunks.element_spec[0][0].shape.rank
            if rank != self._test_rank:  # one program for both would have unknown shapes
                functions = self._loops.functions
                self._loops.functions = {k: f for k, f in functions.items() if k[0] != "test"}
            self._test_rank = rank
        with super()._looping(train, test) as given:
            yield given

    def forward(
        self, x: Any, y: Any, sample_weight: Any, training: bool
    ) -> tuple[tf.Tensor, Queries]:
        complete = self._loops.complete.get("train" if training else "test", False)
        members = self.member_densities(x, training=training)
        if self._is_stacked(x):
            total, count = self._sums(x, y, members, sample_weight, complete)  # [M], [M]
            losses_, density = total / count, members
        else:
            total, count = self._sums(
                x, y[tf.newaxis], members, None if sample_weight is None else sample_weight[None]
            )
            losses_ = total / count
            density = mixture_of(members)
        for m, name in enumerate(self._member_names()):
            getattr(self._trackers, name).update_state(losses_[m], sample_weight=count[m])
        if not self._is_stacked(x):
            return self._mean_score(x, y, density, sample_weight, complete), density
        self._trackers.nll.update_state(losses_, sample_weight=count)
        self._trackers.loss.update_state(losses_, sample_weight=count)
        # The sum: the gradient by a member's weights is then that of its own loss.
        return tf.reduce_sum(losses_), density

    def _sums(
        self, x: Any, y: Any, members: Queries, sample_weight: Any, complete: bool = False
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Return each member's sum of weighted scores, and its number of rows: [M] each."""
        counted = self._counted(x, y)  # [M, B] or [M, B, T]; with M = 1 where all have the same
        y = tf.where(counted[..., tf.newaxis], y, tf.cast(self.head.y_loc, y.dtype))
        if complete and self._score is losses.nll:
            score = -members.log_prob(tf.cast(y, members.dtype), complete=True)
        else:
            score = self._score(y, members)
        if sample_weight is not None:
            sample_weight = tf.cast(sample_weight, score.dtype)
            if sample_weight.shape.rank < score.shape.rank:
                sample_weight = sample_weight[..., tf.newaxis]
            score *= sample_weight
        axes = list(range(1, score.shape.rank))
        total = tf.reduce_sum(tf.where(counted, score, tf.zeros_like(score)), axes)
        count = tf.reduce_sum(tf.cast(counted, score.dtype), axes)
        return total, tf.broadcast_to(tf.maximum(count, 1.0), [self.members])

    def _counted(self, x: Any, y: tf.Tensor) -> tf.Tensor:
        if not self._is_stacked(x):
            return super()._counted(x, y)
        observed = tf.reduce_any(tf.logical_not(tf.math.is_nan(y)), axis=-1)  # [M, B] or [M, B, T]
        if observed.shape.rank == 3:
            flat = tf.reshape(x, tf.concat([[-1], tf.shape(x)[2:]], 0))
            mask = self.encoder.compute_mask(flat)
            if mask is not None:
                observed &= tf.reshape(mask, tf.shape(observed))
        return observed

    # ------------------------------------------------------------------ saving

    def get_config(self) -> dict[str, Any]:
        model = self._template.model
        serialize = tf_keras.saving.serialize_keras_object
        parts = {"head": model.head, "backbone": model.backbone, "encoder": self.encoder}
        parts = {name: serialize(part) for name, part in parts.items()}
        own = {"name": self.name, "members": self.members, "missing": self.missing}
        return {**own, **parts}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Ensemble:
        parts = {
            name: tf_keras.saving.deserialize_keras_object(config[name], custom_objects)
            for name in ("head", "backbone", "encoder")
        }
        model = cls(MDN(**parts), members=config["members"], name=config["name"])
        model.missing = config["missing"]
        return model


def _copy(model: MDN) -> MDN:
    """Return a model with a head and a backbone of the same options, and weights of its own."""
    head, backbone = (
        type(part).from_config(part.get_config()) for part in (model.head, model.backbone)
    )
    return MDN(head, backbone, model.encoder)


def _weights(model: MDN) -> list[tf.Variable]:
    """Return the weights of which each member has its own."""
    return [*model.backbone.weights, model.head.kernel, model.head.bias]


def split_covariance(members: Queries) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the mean of the covariances and the covariance of the means, over members.

    Args:
        members: batch [M, ..], event [D].

    Returns:
        [.., D, D] each; their sum is the covariance of the members' mixture.
    """
    mean = members.mean()  # [M, .., D]
    deviation = mean - tf.reduce_mean(mean, axis=0)
    epistemic = tf.reduce_mean(deviation[..., tf.newaxis] * deviation[..., tf.newaxis, :], axis=0)
    return tf.reduce_mean(members.covariance(), axis=0), epistemic


# ---------------------------------------------------------------------- rows


def draw_folds(order: np.ndarray, held_out: int, members: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the train and the validation rows of each member.

    Args:
        order: [N], all rows; fold m is the m-th stretch of it, and begins anew where it ends.
        held_out: size of a fold.
        members: M.

    Returns:
        [M, N - held_out] and [M, held_out] row numbers, in ascending order each.
    """
    n = len(order)
    if not 0 <= held_out < n:
        raise ConfigError(f"a fold of {held_out} of {n} rows leaves none to learn from")
    places = (np.arange(members)[:, None] * held_out + np.arange(held_out)) % n  # [M, held_out]
    validation = np.sort(order[places], axis=1)
    train = np.stack([np.setdiff1d(np.arange(n), fold) for fold in validation])
    return train, validation


def member_batches(
    arrays: tuple[np.ndarray, ...],
    rows: np.ndarray,
    batch_size: int,
    *,
    seed: int | None,
    first_epoch: int = 0,
    drop_remainder: bool = True,
    chunk: int | None = None,
    complete: bool = False,
) -> pipeline.Batches:
    """Return an endless stream of batches [M, B, ..], in which each member has its own rows.

    Member m sees what `mdn.data.pipeline.training_batches` gives of its rows with seed + m.

    Args:
        arrays: x [N, ..], y [N, ..] and perhaps weights [N].
        rows: [M, n], the row numbers of each member.
        batch_size: B.
        seed: of the first member's order; None: the rows in their own order.
        first_epoch: the epoch that the stream starts with.
        drop_remainder: see `training_batches`.
        chunk: S; by default as large as memory and the progress bar allow.
        complete: see `mdn.data.pipeline.Batches`.
    """
    n = rows.shape[1]
    steps = n // batch_size if drop_remainder else math.ceil(n / batch_size)
    batch_bytes = len(rows) * batch_size * pipeline._row_bytes(arrays)
    chunk = min(chunk or pipeline.chunk_size(steps, batch_bytes), steps)
    own_rows = [tf.constant(own, tf.int32) for own in rows]

    def order(epoch: tf.Tensor) -> tf.data.Dataset:
        orders = [
            tf.gather(own, pipeline.epoch_rows(n, None if seed is None else seed + m, epoch))
            for m, own in enumerate(own_rows)
        ]
        return tf.data.Dataset.from_tensor_slices(
            _chunked([o[: steps * batch_size] for o in orders], len(arrays[0]), batch_size, chunk)
        )

    chunks = tf.data.Dataset.counter(first_epoch).flat_map(order)
    chunks = chunks.map(_gatherer(arrays))
    return pipeline.Batches(chunks.prefetch(1), steps, chunk, complete)


def member_evaluation_batches(
    arrays: tuple[np.ndarray, ...],
    rows: np.ndarray,
    batch_size: int,
    *,
    chunk: int | None = None,
    complete: bool = False,
) -> pipeline.Batches:
    """Return each member's rows once, in order, as batches [M, B, ..]; see `evaluation_batches`.

    Args:
        arrays: x [N, ..], y [N, ..] and perhaps weights [N].
        rows: [M, n], the row numbers of each member.
        batch_size: B at most.
        chunk: S; by default as large as memory allows.
        complete: see `mdn.data.pipeline.Batches`.
    """
    n = rows.shape[1]
    steps = math.ceil(n / batch_size)
    batch_size = math.ceil(n / steps)
    batch_bytes = len(rows) * batch_size * pipeline._row_bytes(arrays)
    chunk = min(chunk or pipeline.chunk_size(steps, batch_bytes), steps)
    orders = [tf.constant(own, tf.int32) for own in rows]
    order = _chunked(orders, len(arrays[0]), batch_size, chunk)
    chunks = tf.data.Dataset.from_tensor_slices(order).map(_gatherer(arrays))
    return pipeline.Batches(chunks.cache().prefetch(1), steps, chunk, complete)


def _chunked(
    orders: list[tf.Tensor], filler: int, batch_size: int, chunk: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """Return row numbers [n] of each member as [chunks, S, M, B], and the real steps of each."""
    parts = [pipeline._chunked(order, filler, batch_size, chunk) for order in orders]
    return tf.stack([part for part, _ in parts], axis=2), parts[0][1]


def _gatherer(arrays: tuple[np.ndarray, ...]) -> Callable:
    tensors = pipeline._with_filler(arrays)
    return lambda rows, real: (tuple(tf.gather(t, rows) for t in tensors), real)
