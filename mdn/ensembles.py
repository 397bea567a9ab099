"""`Ensemble`: M members stacked on a leading axis, trained by one program; one predictive density.

No operation mixes two members in training (see `mdn.members`), and an optimizer works on each
number by itself: member m learns what it would have learned alone.

Shape letters: B batch, T time, F features, H hidden, P parameters, D event size, K components,
M ensemble members, N rows, S steps of a chunk.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

from mdn import losses
from mdn.arguments import EVALUATION_BATCH, check_sizes
from mdn.data.chunks import Batches
from mdn.data.pipeline import evaluation_batches, training_batches
from mdn.data.rows import Features
from mdn.data.splits import draw_folds
from mdn.density.mixing import mixture_of
from mdn.density.queries import Queries
from mdn.density.transformed import rebuilder
from mdn.errors import ConfigError
from mdn.inference import largest_batch
from mdn.members import StackedNetwork, copy_network, own_weights
from mdn.metrics import MemberMeans
from mdn.model import MDN, PARTS
from mdn.recalibration import RecalibrationFit
from mdn.uncertainty import Uncertainty, split_covariance

register = tf_keras.saving.register_keras_serializable(package="mdn")


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
        self._network = StackedNetwork(model, members)
        self.members = self._network.members
        self.encoder: Any = model.encoder
        self.embedding: Any = model.embedding
        self.missing = "error"
        self._feature_rank: int | None = None
        self._score: losses.Loss = losses.nll
        self._jitter = None
        self._programs = types.SimpleNamespace()
        self._rebuild: Any = None
        self._rebuild_member: Any = None
        self._trackers.members = MemberMeans(self.members)
        self.tracked = (*type(self).tracked, *self._trackers.members.names)
        # The scaling of y, in which the density is stated, is the template's and is the same for
        # all: as attributes its variables are saved with the ensemble's own.
        for name, variable in self.head.statistics.items():
            setattr(self, name, variable)

    @property
    def stacked(self) -> int:
        return self.members

    @property
    def head(self) -> Any:
        """The head that makes densities of stacked parameters; its kernel and bias are unused."""
        return self._network.template.head

    @property
    def backbone(self) -> Any:
        """The backbone whose layers are stacked; its weights are unused."""
        return self._network.template.backbone

    @property
    def parts(self) -> list[Any]:
        """The layers and variables that the density is computed from."""
        embedding = [] if self.embedding is None else [self.embedding]
        statistics = self.head.statistics.values()
        return [self.encoder, *embedding, *statistics, *self.stacked_weights]

    @property
    def stacked_weights(self) -> list[tf.Variable]:
        """The weights of the members, [M, ..] each."""
        return self._network.weights

    @property
    def head_weights(self) -> tuple[tf.Variable, tf.Variable]:
        head = self.head
        return self._network.variable(head.kernel), self._network.variable(head.bias)

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
        template = self._network.template
        template.encoder, template.embedding = self.encoder, self.embedding
        template.adapt(x, y, missing=missing, seed=seed)
        self.encoder, self.missing = template.encoder, template.missing
        rank = template.get_build_config()["feature_rank"]
        self._build_network(rank)
        self._network.start(x, y, rank, seed)

    def _build_network(self, rank: int) -> None:
        template = self._network.template
        template.encoder, template.embedding = self.encoder, self.embedding
        self._network.build(rank, self.add_weight)
        super()._build_network(rank)

    def member(self, m: int) -> MDN:
        """Return member m as a model of its own, with a copy of its weights."""
        self._check_adapted()
        member = copy_network(self._network.template)
        member.encoder = type(self.encoder).from_config(self.encoder.get_config())
        if self.embedding is not None:
            member.embedding = type(self.embedding).from_config(self.embedding.get_config())
            member.embedding.set_weights(self.embedding.get_weights())
        member.missing = self.missing
        member.build_from_config(self.get_build_config())
        member.encoder.set_weights(self.encoder.get_weights())
        for variable, value in zip(own_weights(member), self.stacked_weights, strict=True):
            variable.assign(value[m])
        for name, variable in self.head.statistics.items():
            getattr(member.head, name).assign(variable)
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

    def shared_members(self, x: Any) -> tuple[Queries, tf.Tensor | None]:
        """Return the densities of all members, as `member_densities` does, and their shares.

        The shares [M, B] or [M, B, T] sum to one over the members; None where all are equal. The
        mixture of the densities in these shares is the density.
        """
        return self.member_densities(x, training=False), None

    def _densities(self, hidden: tf.Tensor, batch: Any) -> Queries:
        head = self.head
        params = self._network.params(hidden)  # [M, n, P]
        params = tf.reshape(params, tf.concat([[self.members], batch, [head.params_size]], 0))
        return head.distribution(params)

    def _members_hidden(self, x: Any, training: bool | None) -> tuple[tf.Tensor, Any]:
        """Return what the members' heads take, [M, n, H], and what n stands for: [B] or [B, T]."""
        own = self._is_stacked(x)
        rows = tf.reshape(x, tf.concat([[-1], tf.shape(x)[2:]], 0)) if own else x
        if own:
            rows.set_shape([None, *x.shape[2:]])
        features = self.features(rows)  # [M B, .., F'] or [B, .., F']
        size = (self.embedding or self.encoder).output_size
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
        hidden = self._network.apply(self.backbone, features, training)  # [M, n, H]
        if not (training or own):
            hidden = self._without_answers(x, hidden)
        return tf.cast(hidden, self.head.dtype), batch

    def _log_prob(self, hidden: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        """Return `_densities(hidden, batch).log_prob(y)`, faster, as `Head.log_prob` does.

        y is [M, B, D] or [M, B, T, D] without missing entries.
        """
        head = self.head
        params = self._network.packed_params(hidden)  # [M, P, n]
        y = tf.cast(y, head.dtype)
        rows = tf.reshape(y, [self.members, -1, head.event_size])
        return tf.reshape(head.params_log_prob(params, rows), tf.shape(y)[:-1])

    def _is_stacked(self, x: Any) -> bool:
        """Whether x holds rows for each member, [M, B, ..]."""
        return not isinstance(x, dict) and x.shape.rank == (self._feature_rank or 2) + 1

    def log_density(self, x: Any, y: tf.Tensor, complete: bool | None = None) -> tf.Tensor:
        self._check_adapted()
        hidden, batch = self._members_hidden(x, training=False)

        def fast() -> tf.Tensor:
            rows = tf.repeat(y[tf.newaxis], self.members, axis=0)
            mixed = tf.reduce_logsumexp(self._log_prob(hidden, rows), axis=0)
            return mixed - math.log(self.members)

        def general() -> tf.Tensor:
            return mixture_of(self._densities(hidden, batch)).log_prob(y)

        return self._where_complete(y, complete, fast, general)

    # ------------------------------------------------------------------ answers for many rows

    def recalibrate(
        self,
        x: Features,
        y: np.ndarray,
        sample_weight: Any = None,
        *,
        rows: Sequence[np.ndarray] | None = None,
        seed: int = 0,
    ) -> RecalibrationFit:
        """Recalibrate the members by one map, as `MDN.recalibrate` does.

        With `rows`, a row is judged by the mixture of those members that have not learned from it,
        often one. The mixture of all is wider than one member where they differ, and a map that
        widens each may be too much for it: so one is taken only if the mixture of all gains too,
        on the same rows, of which it has learned and which are therefore no reason to widen.

        Args:
            x: as for `MDN.recalibrate`.
            y: as for `MDN.recalibrate`.
            sample_weight: [N], row weights.
            rows: for each member, the row numbers that it has not learned from, increasing; by
                default none has learned from any.
            seed: as for `MDN.recalibrate`.
        """
        fit = self._recalibrate(x, y, sample_weight, rows, seed)
        if rows is None or fit.map is None:
            return fit
        gain = self.log_prob(x, y)
        self.set_recalibration(None)
        gain -= self.log_prob(x, y)
        if sample_weight is not None:
            gain *= np.reshape(sample_weight, [-1] + [1] * (gain.ndim - 1))
        if np.nansum(gain, dtype=np.float64) <= 0.0:
            return dataclasses.replace(fit, map=None)
        self.set_recalibration(fit.map)
        return fit

    def member_answers(
        self, x: Features, rows: Sequence[np.ndarray] | None = None
    ) -> Iterator[tuple[Any, Queries]]:
        encoded = self._as_rows(x)
        each = [np.arange(len(encoded))] * self.members if rows is None else rows
        most = max(map(len, each))
        # The rows of all members side by side; short ones are filled up with any row.
        places = np.stack([np.resize(own, most) if len(own) else [0] * most for own in each], 1)

        def tensors(x: tf.Tensor) -> dict[str, tf.Tensor]:
            density = self.member_densities(_swapped(x), training=False)
            self._rebuild_member = rebuilder(density)
            return {name: _swapped(tensor) for name, tensor in density.tensors().items()}

        answers = self._over_rows("members", tensors, [encoded[places]], None)
        parts = [part for _, part in answers]
        found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for m, own in enumerate(each):
            yield own, self._rebuild_member(**{k: v[: len(own), m] for k, v in found.items()})

    def uncertainty(self, x: Features, batch_size: int | None = None) -> Uncertainty:
        """Return the covariance of the predictive density in two parts (law of total variance).

        Args:
            x: [N, F], [N, T, F], or a mapping of columns [N].
            batch_size: rows that go through the networks at a time; by default as many as are
                fast.
        """

        def split(x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            return split_covariance(*self.shared_members(x))

        answers = self._over_rows("uncertainty", split, [self._as_rows(x)], batch_size)
        parts = [part for _, part in answers]
        return Uncertainty(*(np.concatenate(part) for part in zip(*parts, strict=True)))

    def member_log_prob(
        self,
        x: Features,
        y: np.ndarray,
        batch_size: int | None = None,
        *,
        cells: bool = False,
    ) -> np.ndarray:
        """Return each member's log p(y | x) of any number of rows, in nats: [N, M] or [N, T, M].

        Args:
            x: [N, F], [N, T, F], or a mapping of columns [N].
            y: [N, D] or [N, T, D] in the user's units; an entry that is NaN is marginalised.
            batch_size: rows that go through the networks at a time; by default as many as are
                fast.
            cells: of targets on a grid, if the model trains with jitter, the log of the mean
                density over the cell around y: what `fit` validates by.
        """
        nll: losses.Loss = losses.nll
        if cells and self._jitter is not None:
            nll = losses.CellNLL(self._jitter.step)

        def log_prob(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
            score = -nll(y[tf.newaxis], self.member_densities(x, False))
            return tf.stack(tf.unstack(score), axis=-1)

        name = "member_log_prob" + (" of cells" if nll is not losses.nll else "")
        arrays = [self._as_rows(x), np.asarray(y, tf_keras.backend.floatx())]
        answers = self._over_rows(name, log_prob, arrays, batch_size)
        return np.concatenate([part.numpy() for _, part in answers])

    @property
    def largest_batch(self) -> int:
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
        """Configure training as `MDN.compile` does; the jitter of each member is its own.

        Raises:
            ConfigError: the optimizer clips the norm of each variable, which is that of all
                members together; or there are several replicas.
        """
        optimizer = tf_keras.optimizers.get(optimizer)
        if getattr(optimizer, "clipnorm", None) is not None:
            raise ConfigError(
                f"optimizer.clipnorm={optimizer.clipnorm}: would clip the members of the ensemble "
                "by their common norm; use global_clipnorm, which clips each by its own"
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
    ) -> tuple[tf.Tensor, Queries | None]:
        hidden, batch = self._members_hidden(x, training)
        own, y = self._is_stacked(x), self._jittered(y, training)
        if not own:  # the same rows for all
            y = y[tf.newaxis]
            sample_weight = None if sample_weight is None else sample_weight[tf.newaxis]
        filled, counted = self._fill(x, y)  # [M, B] or [M, B, T]; M = 1 where all have the same
        complete = self._loop.complete.get("train" if training else "test", False)
        loss, nll = self._scores(training)
        fast = own and complete and loss is losses.nll
        asked = not fast or self.compiled_metrics is not None
        density: Any = self._densities(hidden, batch) if asked else None
        score = -self._log_prob(hidden, filled) if fast else loss(filled, density)
        means, count = self._means(score, counted, sample_weight)  # [M]
        nlls = means
        if nll is not None:
            nlls, _ = self._means(nll(filled, density), counted, sample_weight)
        self._trackers.members.update_state(nlls, sample_weight=count)
        if not own:
            weight = None if sample_weight is None else sample_weight[0]
            density = mixture_of(density)
            return self.compute_loss(x, y[0], density, weight, training), density
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
        count = tf.reduce_sum(tf.cast(counted, score.dtype), axes)
        return total / tf.maximum(count, 1.0), tf.broadcast_to(count, [self.members])

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
        serialize = tf_keras.saving.serialize_keras_object
        parts = {name: serialize(getattr(self, name)) for name in PARTS}
        own = {"name": self.name, "members": self.members, "missing": self.missing}
        return {**own, **self.names_config(), **parts}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Ensemble:
        parts = {
            name: tf_keras.saving.deserialize_keras_object(config.get(name), custom_objects)
            for name in PARTS
        }
        model = cls(MDN(**parts), members=config["members"], name=config["name"])
        model.set_missing(config["missing"])
        model.restore_names(config)
        return model


def _swapped(tensor: tf.Tensor) -> tf.Tensor:
    """Return [B, M, ..] for [M, B, ..], and the other way round."""
    return tf.transpose(tensor, [1, 0, *range(2, tensor.shape.rank)])
