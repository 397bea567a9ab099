"""`Stack`: ensembles that differ in more than a seed, in shares that held-out rows give them.

Shape letters: B batch, T time, F features, D event size, n held-out rows, V ensembles, M members
of each.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

from mdn.data.rows import Data
from mdn.density.agreement import BLOCK, agree
from mdn.density.mixing import event_ranks, mixture_of
from mdn.density.queries import Queries
from mdn.density.recalibration import Recalibration
from mdn.density.transformed import Transformed, split_transform
from mdn.ensembles import Ensemble
from mdn.errors import ConfigError, RunError
from mdn.inference import largest_batch
from mdn.model import MDN
from mdn.selection import held_out_nll

register = tf_keras.saving.register_keras_serializable(package="mdn")

STEPS = 300  # of expectation maximisation
LEAST_SHARE = 0.05  # of an ensemble that is worth its time in every answer


@register
class Stack(Ensemble):
    """The mixture of trained ensembles in shares; itself an ensemble, whose training is over.

    Its member m is the mixture of the members m of all of them. With an agreement the weights of
    its components are not those that they have in their members alone, and so the members' shares
    differ from row to row, see `shared_members`.

    Args:
        models: adapted ensembles of as many members each, for the same features and targets.
        shares: of each, positive; they are normalised.
        recalibration: of the members' densities, in transformed units; with an agreement, of the
            mixture.
        agreement: the power to which a component counts by what all say of it, see
            `mdn.density.agreement`; 0 for not at all.
        **kwargs: as for any Keras model.

    Raises:
        ConfigError: the ensembles, the shares or the agreement do not fit together.
    """

    def __init__(
        self,
        models: Sequence[Ensemble],
        shares: Sequence[float],
        recalibration: Recalibration | None = None,
        agreement: float = 0.0,
        **kwargs: Any,
    ) -> None:
        # Not Ensemble's own, which makes members of a template.
        super(MDN, self).__init__(**kwargs)
        if not models or len(models) != len(shares) or min(shares) <= 0.0:
            raise ConfigError(
                f"shares={list(shares)} for {len(models)} ensembles: give each a positive one"
            )
        if len(sizes := {model.members for model in models}) > 1:
            raise ConfigError(f"ensembles of {sorted(sizes)} members: all need the same number")
        if not 0.0 <= agreement < math.inf:
            raise ConfigError(f"agreement={agreement}: is a power, at least 0")
        self.models = list(models)
        self.shares = [float(share) / sum(shares) for share in shares]
        self.recalibration = recalibration
        self.agreement = float(agreement)
        self.members = models[0].members
        self.missing = models[0].missing
        self.column_names = models[0].column_names
        # In a namespace, as Keras looks into what attributes hold.
        self._programs = types.SimpleNamespace()
        self._rebuild: Any = None
        self._jitter = None  # which is for training alone
        self.built = True  # as its parts are

    @property
    def _first(self) -> Ensemble:
        return self.models[0]

    @property
    def _feature_rank(self) -> int | None:  # type: ignore[override]
        return self._first._feature_rank

    @property
    def encoder(self) -> Any:
        """What encodes the features, for all of them: it was fitted to the same rows."""
        return self._first.encoder

    @property
    def head(self) -> Any:
        """A head that knows the targets: their number, scales, grid and transform."""
        return self._first.head

    @property
    def backbone(self) -> Any:
        return self._first.backbone

    @property
    def parts(self) -> list[Any]:
        return [part for model in self.models for part in model.parts]

    @property
    def stacked_weights(self) -> list[tf.Variable]:
        return [weight for model in self.models for weight in model.stacked_weights]

    @property
    def largest_batch(self) -> int:
        size = sum(model.members * model.head.params_size for model in self.models)
        if self.agreement:  # a block of means beside all components
            size = max(size, BLOCK * len(self.kept_components))
        return largest_batch(size)

    # ------------------------------------------------------------------ densities

    def call(self, inputs: Any, training: bool | None = None) -> Queries:
        members = self._members(inputs)
        if not self.agreement:
            return mixture_of(self._recalibrated(members))
        pool = agree(mixture_of(members), self.agreement, self.kept_components)
        return self._recalibrated(pool)

    def _members(self, x: Any) -> Queries:
        """Return the mixtures of the members m of all, as they are, batch [M, ..]."""
        found = [model.member_densities(x, training=False) for model in self.models]
        return mixture_of(found, self.shares)

    @property
    def kept_components(self) -> np.ndarray:
        """Which components of the density are the same for every row: backgrounds, [K]."""
        kept = []
        for head in (model.head for model in self.models):
            own = getattr(head, "components", 1)
            kept += [False] * own + [True] * head.fixed_components
        return np.tile(kept, self.members)

    def member_densities(self, x: Any, training: bool | None = None) -> Queries:
        return self.shared_members(x)[0]

    def shared_members(self, x: Any) -> tuple[Queries, tf.Tensor | None]:
        if not self.agreement:
            return self._recalibrated(self._members(x)), None
        mixture: Any
        mixture, bijector = split_transform(self(x))
        logits = tf.nn.log_softmax(mixture.logits)
        ranks = event_ranks(mixture)
        own = {}
        for name, tensor in (mixture.tensors() | {"logits": logits}).items():
            axis = tensor.shape.rank - ranks[name]  # of M K
            own[name] = tf.stack(tf.split(tensor, self.members, axis), axis=0)
        members = type(mixture)(**own)
        weight = tf.exp(tf.reduce_logsumexp(own["logits"], axis=-1))
        return members if bijector is None else Transformed(members, bijector), weight

    def member_answers(self, x: Any, rows: Sequence[np.ndarray] | None = None) -> Any:
        if self.agreement:
            if rows is not None:
                raise RunError(
                    "the members of a stack with an agreement have no answers alone: leave out "
                    "`rows`, and give rows that none has learned from"
                )
            yield np.arange(len(self._as_rows(x))), self.predict_distribution(x)
            return
        answers = [model.member_answers(x, rows) for model in self.models]
        for parts in zip(*answers, strict=True):
            index = parts[0][0]
            mixture = mixture_of([density for _, density in parts], self.shares)
            yield index, self._recalibrated(mixture)

    def log_density(self, x: Any, y: tf.Tensor, complete: bool | None = None) -> tf.Tensor:
        if self.recalibration is not None or self.agreement:
            return self(x, training=False).log_prob(y)
        parts = [model.log_density(x, y, complete) for model in self.models]
        return tf.reduce_logsumexp(
            [math.log(share) + part for share, part in zip(self.shares, parts, strict=True)],
            axis=0,
        )

    def _recalibrated(self, density: Queries) -> Queries:
        return density if self.recalibration is None else self.recalibration.apply(density)

    def recalibrate(self, x: Any, y: Any, sample_weight: Any = None, **options: Any) -> Any:
        if self.agreement and options.get("rows") is not None:
            next(self.member_answers(x, options["rows"]))  # raises, before a map is lost
        return super().recalibrate(x, y, sample_weight, **options)

    def set_recalibration(self, recalibration: Recalibration | None) -> None:
        """Take a map of the members' densities, on top of what their parts have.

        With an agreement it is a map of their mixture.
        """
        self.recalibration = recalibration
        self._forget_programs()

    @property
    def fixed_components(self) -> int:
        """None, as the backgrounds of the parts lie in between."""
        return 0

    # ------------------------------------------------------------------ Keras

    def member(self, m: int) -> MDN:
        raise RunError(f"member {m} of a stack is a mixture: ask model.models[..].member({m})")

    def adapt(self, *arguments: Any, **options: Any) -> None:
        raise RunError("a stack is of trained ensembles: adapt and train those, and stack them")

    def compile(self, *arguments: Any, **options: Any) -> None:
        raise RunError("a stack is of trained ensembles: compile and train those, and stack them")

    # ------------------------------------------------------------------ saving

    def get_config(self) -> dict[str, Any]:
        serialize = tf_keras.saving.serialize_keras_object
        found = self.recalibration
        return {
            "name": self.name,
            "models": [serialize(model) for model in self.models],
            "shares": self.shares,
            "recalibration": None if found is None else found.to_config(),
            "agreement": self.agreement,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Stack:
        models = tf_keras.saving.deserialize_keras_object(config["models"], custom_objects)
        found = config["recalibration"]
        recalibration = None if found is None else Recalibration.from_config(found)
        agreement = config.get("agreement", 0.0)
        return cls(models, config["shares"], recalibration, agreement, name=config["name"])

    def build_from_config(self, config: dict[str, Any]) -> None:
        """Do nothing: the ensembles have been built from configs of their own."""


@dataclasses.dataclass(frozen=True)
class Stacking:
    """What held-out rows say of ensembles, and of their mixture.

    Attributes:
        shares: of each ensemble that is worth its time; they sum to 1.
        nll: of each, the NLL of the rows that its members held out, in nats a row.
        stacked: that of the mixture in these shares, without spread and agreement.
        failed: those whose NLL is not finite.
        spread: what suits the density of each member in the mixture, or None; see `mdn.spread`.
        agreement: the power to which components count by what the mixture says of them.
    """

    shares: dict[str, float]
    nll: dict[str, float] = dataclasses.field(default_factory=dict)
    stacked: float = math.nan
    failed: list[str] = dataclasses.field(default_factory=list)
    spread: Recalibration | None = None
    agreement: float = 0.0

    def __str__(self) -> str:
        shares = ", ".join(f"{share:.0%} {name!r}" for name, share in self.shares.items())
        alone = ", ".join(f"{name!r} {nll:.4f}" for name, nll in self.nll.items())
        alone += "".join(f", {name!r} failed" for name in self.failed)
        spread = ""
        if self.spread is not None:
            scales = ", ".join(f"{scale:.3g}" for scale in self.spread.scale)
            spread = f"; scales of the members {scales}"
        if self.agreement:
            spread += f"; agreement {self.agreement:.3g}"
        return (
            f"the recipe is {shares}: {self.stacked:.4f} nats a row on the rows that members hold "
            f"out; each alone: {alone}{spread}"
        )

    def metrics(self, targets: Sequence[str]) -> dict[str, float]:
        """Return flat keys for metrics.json; the NLL is that without spread and agreement."""
        nll = {f"recipe/nll/{name}": value for name, value in self.nll.items()}
        shares = {f"recipe/share/{name}": value for name, value in self.shares.items()}
        found = {"recipe/nll": self.stacked, **nll, **shares}
        if self.spread is not None:
            scales = zip(targets, self.spread.scale, strict=True)
            found |= {f"recipe/scale/{name}": scale for name, scale in scales}
        return found | {"recipe/agreement": self.agreement}


def compare(models: Mapping[str, Ensemble], data: Data, folds: np.ndarray | None) -> Stacking:
    """Return the shares in which ensembles predict best the rows that they held out.

    Args:
        models: by name; trained on the same rows, with the same folds.
        data: the rows.
        folds: [M, n], the rows that each member held out, see `mdn.selection.held_out_nll`.

    Raises:
        RunError: none of them has a finite NLL.
    """
    found = {name: held_out_nll(model, data, folds) for name, model in models.items()}
    rows = {name: nll for name, (nll, _) in found.items()}
    finite = [name for name, nll in rows.items() if np.isfinite(nll).all()]
    if not finite:
        raise RunError("recipe=auto: no variant could be trained; use a lower learning rate")
    weight = found[finite[0]][1]
    log_prob = -np.stack([rows[name] for name in finite], axis=-1).astype(np.float64)
    shares = stacking_shares(log_prob, weight)
    shares[shares < LEAST_SHARE] = 0.0
    shares /= shares.sum()
    stacked = -np.average(_mixture(log_prob, shares), weights=weight)
    kept = {name: float(s) for name, s in zip(finite, shares, strict=True) if s > 0.0}
    means = {name: float(np.average(rows[name], weights=weight)) for name in finite}
    return Stacking(kept, means, float(stacked), [name for name in rows if name not in finite])


def stacking_shares(log_prob: np.ndarray, weight: np.ndarray | None = None) -> np.ndarray:
    """Return the shares of the mixture of V densities that is most likely.

    Args:
        log_prob: [n, V], what each says of each row, which none of them has learned from.
        weight: [n], row weights.

    Returns:
        [V], which sum to 1: the maximum of a concave likelihood, by expectation maximisation.

    Source:
        Yao et al. (2018), Using stacking to average Bayesian predictive distributions.
    """
    shares = np.full(log_prob.shape[-1], 1.0 / log_prob.shape[-1])
    for _ in range(STEPS):
        density = np.exp(log_prob - _mixture(log_prob, shares)[:, np.newaxis])
        shares = shares * np.average(density, axis=0, weights=weight)
    return shares


def _mixture(log_prob: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Return what the mixture in these shares says of each row, [n]."""
    with np.errstate(divide="ignore"):
        return np.logaddexp.reduce(log_prob + np.log(shares), axis=-1)


def stack(
    models: Mapping[str, Ensemble],
    shares: Mapping[str, float],
    spread: Recalibration | None = None,
    agreement: float = 0.0,
) -> Ensemble:
    """Return the mixture of ensembles in shares: uncompiled copies; of a single one, itself.

    Args:
        models: trained, by name.
        shares: of some of them.
        spread: of the density of each member; they keep it.
        agreement: of the mixture of several, see `Stack`.
    """
    kept = [models[name] for name in shares]
    if spread is not None:
        for model in kept:
            model.set_recalibration(spread)
    if len(kept) == 1:
        return kept[0]
    return Stack(list(map(_copy, kept)), list(shares.values()), agreement=agreement)


def _copy(model: Ensemble) -> Ensemble:
    """Return a copy without the optimizer and what it keeps."""
    copy = type(model).from_config(model.get_config())
    copy.build_from_config(model.get_build_config())
    for name in ("encoder", "embedding"):
        if (part := getattr(model, name)) is not None:
            getattr(copy, name).set_weights(part.get_weights())
    for name, variable in model.head.statistics.items():
        getattr(copy.head, name).assign(variable)
    for mine, weight in zip(copy.stacked_weights, model.stacked_weights, strict=True):
        mine.assign(weight)
    return copy
