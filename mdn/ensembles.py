"""`Ensemble`: M members stacked on a leading axis, trained by one program; one predictive density.

Each weight of a member is a slice of a variable [M, ..], so that a step of all members is a step
of one network whose products are batched. No operation mixes two slices in training, and an
optimizer works on each number by itself: member m learns what it would have learned alone.

Shape letters: B batch, T time, F features, H hidden, P parameters, D event size, K components,
M ensemble members, N rows, S steps of a chunk.
"""

from __future__ import annotations

import math
import types
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
import tf_keras
from tf_keras import layers

from mdn import backbones, losses
from mdn.compiled import EVALUATION_BATCH, check_sizes
from mdn.data.pipeline import Batches, evaluation_batches, training_batches
from mdn.data.rows import Features
from mdn.data.splits import draw_folds
from mdn.density.mixture import mixture_of
from mdn.density.queries import Queries
from mdn.errors import ConfigError
from mdn.inference import largest_batch
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
        if model.head.target_transform is not None:
            raise ConfigError(
                f"target_transform={model.head.target_transform}: an ensemble has none; transform "
                "the targets yourself, or train the members one by one"
            )
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
        self._programs = types.SimpleNamespace()
        self._rebuild: Any = None
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
        return self._densities(*self._members_hidden(x, training))

    def _densities(self, hidden: tf.Tensor, batch: Any) -> Queries:
        head = self.head
        params = tf.matmul(hidden, self._stack(head.kernel))
        params += self._stack(head.bias)[:, tf.newaxis]  # [M, n, P]
        params = tf.reshape(params, tf.concat([[self.members], batch, [head.params_size]], 0))
        return head.distribution(params)

    def _members_hidden(self, x: Any, training: bool | None) -> tuple[tf.Tensor, Any]:
        """Return what the members' heads take, [M, n, H], and what n stands for: [B] or [B, T]."""
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
        return tf.cast(hidden, self.head.dtype), batch

    def _log_prob(self, hidden: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        """Return `_densities(hidden, batch).log_prob(y)`, faster, as `Head.log_prob` does.

        y is [M, B, D] or [M, B, T, D] without missing entries.
        """
        head = self.head
        params = tf.matmul(self._stack(head.kernel), hidden, transpose_a=True, transpose_b=True)
        params += self._stack(head.bias)[..., tf.newaxis]  # [M, P, n]
        y = tf.cast(y, head.dtype)
        rows = tf.reshape(y, [self.members, -1, head.event_size])
        return tf.reshape(head.params_log_prob(params, rows), tf.shape(y)[:-1])

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
                backbones.drop(one, layer.rate, seed)
                for one, seed in zip(tf.unstack(hidden), seeds, strict=True)
            ]
        )

    def log_density(self, x: Any, y: tf.Tensor) -> tf.Tensor:
        return self(x, training=False).log_prob(y)

    # ------------------------------------------------------------------ answers for many rows

    def uncertainty(self, x: Features, batch_size: int | None = None) -> Uncertainty:
        """Return the covariance of the predictive density in two parts (law of total variance).

        Args:
            x: [N, F], [N, T, F], or a mapping of columns [N].
            batch_size: rows that go through the networks at a time; by default as many as are
                fast.
        """

        def split(x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            return split_covariance(self.member_densities(x, training=False))

        answers = self._over_rows("uncertainty", split, [self._as_rows(x)], batch_size)
        parts = [part for _, part in answers]
        return Uncertainty(*(np.concatenate(part) for part in zip(*parts, strict=True)))

    @property
    def _largest_batch(self) -> int:
        return largest_batch(self.members * self.head.params_size)

    # ------------------------------------------------------------------ Keras

    def compile(
        self,
        optimizer: Any = "adam",
        loss: str | dict[str, Any] | losses.Loss = "nll",
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
            x: features, or `mdn.data.pipeline.training_batches` with `members`.
            y: targets, where x is features.
            batch_size: B of each member; default 32.
            validation_split: share of the rows that each member holds out, as far as there are
                rows enough other ones than the members before.
            shuffle: a new order in each epoch, drawn from NumPy's global stream.
            sample_weight: [N], row weights.
            initial_epoch: epochs that lie behind.
            **kwargs: as for `MDN.fit`.

        Raises:
            ConfigError: x is a dataset or a generator, whose rows the members could not shuffle;
                or an argument that has no meaning here.
        """
        self._check_adapted()
        if self._is_arrays(x, y):
            check_sizes(batch_size=batch_size)
            if (steps := kwargs.get("steps_per_epoch")) is not None:
                raise ConfigError(
                    f"steps_per_epoch={steps} has no meaning for an ensemble: an epoch is all rows"
                )
            self.check_arrays(x, y, sample_weight)
            arrays = self.as_arrays(x, y, sample_weight)
            n, seed = len(arrays[0]), int(np.random.randint(2**31 - 1))
            held_out = 0
            if kwargs.get("validation_data") is None:
                held_out = n - math.floor(n * (1.0 - validation_split))
            order = np.random.default_rng(seed).permutation(n)
            train, validation = draw_folds(order, held_out, self.members)
            complete = self.is_complete(arrays)
            x = training_batches(
                arrays,
                32 if batch_size is None else batch_size,
                seed=seed if shuffle else None,
                first_epoch=initial_epoch,
                drop_remainder=False,
                chunk=self._loop.chunk,
                complete=complete,
                members=train,
            )
            if held_out:
                kwargs["validation_data"] = evaluation_batches(
                    arrays, EVALUATION_BATCH, chunk=x.chunk, complete=complete, members=validation
                )
        elif not isinstance(x, Batches):
            raise ConfigError(
                "the members of an ensemble shuffle the rows themselves: give x and y as arrays"
            )
        elif validation_split or sample_weight is not None:
            raise ConfigError("validation_split and sample_weight are for arrays")
        return super().fit(x, initial_epoch=initial_epoch, **kwargs)

    def forward(
        self, x: Any, y: Any, sample_weight: Any, training: bool
    ) -> tuple[tf.Tensor, Queries]:
        hidden, batch = self._members_hidden(x, training)
        density = self._densities(hidden, batch)  # which XLA leaves out where nothing asks for it
        own = self._is_stacked(x)
        if not own:  # the same rows for all
            y = y[tf.newaxis]
            sample_weight = None if sample_weight is None else sample_weight[tf.newaxis]
        filled, counted = self._fill(x, y)  # [M, B] or [M, B, T]; M = 1 where all have the same
        complete = self._loop.complete.get("train" if training else "test", False)
        if own and complete and self._score is losses.nll:
            score = -self._log_prob(hidden, filled)
        else:
            score = self._score(filled, density)
        means, count = self._means(score, counted, sample_weight)  # [M]
        nll = self._nll(filled, density)
        nlls = means if nll is None else self._means(nll, counted, sample_weight)[0]
        for m, name in enumerate(self._member_names()):
            getattr(self._trackers, name).update_state(nlls[m], sample_weight=count[m])
        if not own:
            weight = None if sample_weight is None else sample_weight[0]
            density = mixture_of(density)
            return self.compute_loss(x, y[0], density, weight), density
        self._trackers.nll.update_state(nlls, sample_weight=count)
        self._trackers.loss.update_state(means, sample_weight=count)
        # The sum: the gradient by a member's weights is then that of its own loss.
        return tf.reduce_sum(means), density

    def _means(
        self, score: tf.Tensor, counted: tf.Tensor, sample_weight: Any
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Return each member's mean of weighted scores, and its number of rows: [M] each."""
        if sample_weight is not None:
            sample_weight = tf.cast(sample_weight, score.dtype)
            if sample_weight.shape.rank < score.shape.rank:
                sample_weight = sample_weight[..., tf.newaxis]
            score *= sample_weight
        axes = list(range(1, score.shape.rank))
        total = tf.reduce_sum(tf.where(counted, score, tf.zeros_like(score)), axes)
        count = tf.maximum(tf.reduce_sum(tf.cast(counted, score.dtype), axes), 1.0)
        return total / count, tf.broadcast_to(count, [self.members])

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
