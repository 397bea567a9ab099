"""How many components: the fewest that no other number beats by more than one standard error.

Candidates are tried in ascending order and compared by the NLL of held-out rows, row by row: the
difficulty of a row is common to all candidates, and drops out of their differences.

Shape letters: N rows, n of them that count, C candidates, M ensemble members, D event size.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from mdn.data.checks import check_weight
from mdn.data.rows import Data, Features, Rows
from mdn.errors import ConfigError, DataError, RunError
from mdn.evaluation import find_counted, mean_and_error
from mdn.plots import style_axes

if TYPE_CHECKING:
    from mdn.model import MDN

log = logging.getLogger(__name__)

CANDIDATES = (1, 2, 3, 5, 8, 12, 20, 32)
PATIENCE = 2  # candidates in a row that leave the choice as it was, and end the search


@dataclasses.dataclass
class Selection:
    """Numbers of components, and what held-out rows say of each.

    Attributes:
        weight: [n], row weights.
        nll: number of components -> [n] nats, the NLL of each held-out row; not finite where the
            candidate fails.
        model: the trained candidate of `k` components, where `select_components` trained them.
    """

    weight: np.ndarray
    nll: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)
    model: Any = None

    @property
    def best(self) -> int:
        """The candidate of the least mean NLL."""
        means = {k: self._mean(nll) for k, nll in self.nll.items()}
        return min(means, key=lambda k: (means[k], k))

    @property
    def k(self) -> int:
        """The smallest candidate that is within one standard error of the best one.

        Source:
            Breiman et al. (1984), Classification and Regression Trees, section 3.4.3.
        """
        return min(k for k in self.nll if np.less_equal(*self.excess(k)))

    def excess(self, k: int) -> tuple[float, float]:
        """Return how much worse than the best one k components are, and its standard error.

        Both are of the paired differences of the rows, in nats a row.
        """
        difference = self.nll[k] - self.nll[self.best]
        if not np.isfinite(difference).all():
            return np.inf, 0.0
        return mean_and_error(difference, self.weight)

    def mean(self, k: int) -> float:
        """Return the mean NLL of k components, in nats a row."""
        return self._mean(self.nll[k])

    def _mean(self, nll: np.ndarray) -> float:
        return mean_and_error(nll, self.weight)[0] if np.isfinite(nll).all() else np.inf

    def curve(self) -> dict[int, dict[str, float]]:
        """Return nll, excess and excess_se of each number of components whose NLL is finite."""
        points = {}
        for k in sorted(self.nll):
            if np.isfinite(mean := self.mean(k)):
                points[k] = dict(
                    zip(("nll", "excess", "excess_se"), (mean, *self.excess(k)), strict=True)
                )
        return points

    def metrics(self) -> dict[str, float]:
        """Return the choice and the curve as flat keys for metrics.json."""
        flat: dict[str, float] = {"selection/k": self.k, "selection/n": len(self.weight)}
        for k, point in self.curve().items():
            flat |= {f"selection/{name}/{k}": value for name, value in point.items()}
        return flat

    def figure(self) -> Figure:
        """Draw the NLL against the number of components.

        The error bars are of the differences from the best candidate, which the choice goes by.
        """
        figure = Figure(figsize=(8, 5), dpi=100, layout="constrained")
        axes = figure.subplots()
        style_axes(axes, "components", "NLL of the held-out rows, nats per row")
        curve = self.curve()
        tried = list(curve)
        mean, error = (
            np.array([point[name] for point in curve.values()]) for name in ("nll", "excess_se")
        )
        axes.errorbar(tried, mean, error, fmt="o-", color="#31688e", linewidth=2, capsize=4)
        axes.axhline(self.mean(self.best), color="#8c8c8c", linewidth=1)
        label = f"k = {self.k}: the fewest within one standard error of the best"
        style: Any = {"markersize": 13, "markerfacecolor": "none", "markeredgewidth": 2}
        axes.plot(self.k, self.mean(self.k), "o", color="#e07b39", label=label, **style)
        axes.set_xscale("log")
        axes.set_xticks(tried, map(str, tried), minor=False)
        axes.set_xticks([], minor=True)
        # A single normal may be far off, and the others are to be told apart.
        close = mean <= mean.min() + 4 * max(np.median(mean - mean.min()), 1e-9)
        top = (mean + error)[close].max()
        margin = 0.15 * (top - mean.min()) or 0.1
        axes.set_ylim(mean.min() - margin, top + margin)
        for k, value in zip(np.array(tried)[~close], mean[~close], strict=True):
            axes.annotate(
                f"{value:.4g}",
                (k, top + margin),
                (0, -28),
                textcoords="offset points",
                ha="center",
                fontsize=9,
                arrowprops={"arrowstyle": "<-", "color": "#8c8c8c"},
            )
        axes.legend(frameon=False)
        return figure


def choose(
    score: Callable[[int], tuple[np.ndarray, np.ndarray]],
    candidates: Sequence[int] = CANDIDATES,
) -> Selection:
    """Try numbers of components in ascending order, until more of them change the choice no more.

    Args:
        score: of a number of components, the NLL of each held-out row, [n] nats, and the weights
            of the rows, [n]: the same rows in the same order for all.
        candidates: numbers of components, ascending.

    Raises:
        ConfigError: the candidates are not ascending positive integers.
        RunError: no candidate has a finite NLL.
    """
    if not candidates or list(candidates) != sorted({int(k) for k in candidates if k > 0}):
        raise ConfigError(
            f"candidates={list(candidates)}: give ascending positive integers, e.g. [1, 2, 3, 5]"
        )
    selection = Selection(np.zeros(0))
    choices: list[int] = []
    for k in candidates:
        nll, selection.weight = score(k)
        selection.nll[k] = np.where(np.isnan(nll), np.inf, nll.astype(np.float64))
        log.info("k=%d: NLL of the held-out rows %.4f", k, selection.mean(k))
        if np.isinf(selection.mean(selection.best)):
            continue
        choices.append(selection.k)
        if len(choices) > PATIENCE and len({*choices[-PATIENCE - 1 :]}) == 1:
            break
    if not choices:
        raise RunError(
            f"none of {list(candidates)} components has a finite NLL on the held-out rows: look "
            "at their targets, or train with a lower learning rate"
        )
    excess, error = selection.excess(selection.k)
    beside = "the best one"
    if selection.k != selection.best:
        beside = f"{excess:.4f} +- {error:.4f} nats a row worse than the best, k={selection.best}"
    log.info("k=auto takes k=%d: %s", selection.k, beside)
    return selection


def held_out_nll(
    model: MDN, data: Data, folds: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the NLL of the rows that a model did not learn from, and their weights.

    Of a model that trains with jitter it is that of the cells around the targets, which `fit`
    validates by: at ties the density itself has no limit.

    Args:
        model: trained.
        data: whose validation rows were held out. Rows without weight or targets are left out; of
            sequences, such steps.
        folds: [M, n], of an ensemble each of whose members holds out others of the train rows and
            validation rows, which are counted through: the rows of each. A row is then judged by
            the members that did not learn from it.

    Returns:
        [n] nats, and [n].
    """
    rows = _held_out_rows(data, folds)
    if folds is None:
        nll = _validation_nll(model, data.validation)
    else:
        every, own = np.unique(folds, return_inverse=True)
        log_prob: Any = [model.member_log_prob(r.x, r.y, cells=True) for r in rows if len(r)]
        log_prob = np.concatenate(log_prob)  # [N, M] or [N, T, M]
        held = np.zeros([len(every), len(folds)])
        held[own.reshape(folds.shape), np.arange(len(folds))[:, np.newaxis]] = 1.0
        held = held.reshape(len(held), *[1] * (log_prob.ndim - 2), -1)
        # What the others say of rows they learned from may not be finite.
        nll = -np.where(held > 0.0, log_prob, 0.0).sum(axis=-1) / held.sum(axis=-1)
    counted = np.concatenate([find_counted(r) for r in rows])
    return nll[counted], held_out_weight(data, folds)


def _validation_nll(model: MDN, rows: Rows) -> np.ndarray:
    """Return the NLL of each row, [N] or [N, T]; of a model with jitter, of the cells of y."""
    if model._jitter is None:
        return -model.log_prob(rows.x, rows.y)
    from mdn.losses import CellNLL

    nll = CellNLL(model._jitter.step)
    parts = [nll(rows.y[at], density).numpy() for at, density in model.densities(rows.x)]
    return np.concatenate(parts)


def held_out_weight(data: Data, folds: np.ndarray | None = None) -> np.ndarray:
    """Return the weights [n] of the rows whose NLL `held_out_nll` returns."""
    rows = _held_out_rows(data, folds)
    counted = np.concatenate([find_counted(r) for r in rows])
    weight = np.concatenate([np.ones(len(r)) if r.weight is None else r.weight for r in rows])
    return weight[np.nonzero(counted)[0]]


def _held_out_rows(data: Data, folds: np.ndarray | None) -> list[Rows]:
    """Return the validation rows; of folds, the train and the validation rows that are in any."""
    if folds is None:
        return [data.validation]
    every, n = np.unique(folds), len(data.train)
    places = every[every < n], every[every >= n] - n
    return [r.take(at) for r, at in zip((data.train, data.validation), places, strict=True)]


def select_components(
    model: MDN,
    x: Features,
    y: np.ndarray,
    *,
    candidates: Sequence[int] = CANDIDATES,
    validation_split: float = 0.1,
    sample_weight: np.ndarray | None = None,
    optimizer: Any = "adam",
    loss: Any = "nll",
    missing: str = "error",
    seed: int = 0,
    **fit: Any,
) -> Selection:
    """Train models that differ in their number of components, and choose among them.

    Args:
        model: an `MDN` or `Ensemble` to copy, whose head is a mixture; its weights are not used.
        x: [N, F], [N, T, F], or a mapping of columns [N].
        y: [N, D] or [N, T, D] in the user's units; NaN marks a missing entry.
        candidates: numbers of components, ascending; the larger are tried while they help.
        validation_split: share of the rows, drawn at random, that training holds out.
        sample_weight: [N], row weights.
        optimizer: as for `MDN.compile`.
        loss: as for `MDN.compile`; the choice goes by the NLL.
        missing: as for `MDN.adapt`.
        seed: of the split, the weights and the order of the rows.
        **fit: as for `MDN.fit`, such as `epochs` and `batch_size`; without `callbacks` training
            stops early, and ends with the best weights.

    Returns:
        The selection; its `model` is the trained candidate, its `k` the number of components.

    Raises:
        ConfigError: the head has no components to choose, or an argument is out of its range.
        DataError: rows that no density can be fitted to.
    """
    import tf_keras  # here, as the rule itself needs no TensorFlow

    from mdn.callbacks.stopping import EarlyStopping
    from mdn.features import as_features

    if "components" not in model.head.get_config():
        raise ConfigError(
            f"the head {type(model.head).__name__} has no components: use mdn.heads.Mixture"
        )
    if sample_weight is not None:
        check_weight(sample_weight := np.asarray(sample_weight), "sample_weight")
    rows = Rows(as_features(x), np.asarray(y), sample_weight)
    held_out = round(validation_split * len(rows))
    if not 0 < held_out < len(rows):
        raise DataError(
            f"validation_split={validation_split} of {len(rows)} rows holds out {held_out}: give "
            "a share that leaves some on both sides"
        )
    order = np.random.default_rng(seed).permutation(len(rows))
    validation, train = (rows.take(np.sort(o)) for o in (order[:held_out], order[held_out:]))
    optimizer = tf_keras.optimizers.get(optimizer)
    trained: dict[int, Any] = {}
    data = Data(train, validation, validation, (), ())

    def score(k: int) -> tuple[np.ndarray, np.ndarray]:
        tf_keras.utils.set_random_seed(seed)
        candidate = trained[k] = with_components(model, k)
        candidate.adapt(train.x, train.y, missing=missing, seed=seed)
        candidate.compile(type(optimizer).from_config(optimizer.get_config()), loss)
        held = [
            validation.x,
            validation.y,
            *([] if validation.weight is None else [validation.weight]),
        ]
        options = {"callbacks": [EarlyStopping()], "verbose": 0, **fit}
        options |= {"sample_weight": train.weight, "validation_data": tuple(held)}
        candidate.fit(train.x, train.y, **options)
        return held_out_nll(candidate, data)

    selection = choose(score, candidates)
    selection.model = trained[selection.k]
    return selection


def with_components(model: MDN, k: int) -> MDN:
    """Return a model of the same parts with k components, not adapted."""
    from mdn.embeddings import PiecewiseLinear
    from mdn.ensembles import Ensemble
    from mdn.model import MDN

    def copy(part: Any, **options: Any) -> Any:
        return None if part is None else type(part).from_config({**part.get_config(), **options})

    own = {name: copy(getattr(model, name)) for name in ("backbone", "encoder", "embedding")}
    if isinstance(model.embedding, PiecewiseLinear):  # whose bins are of the rows it has seen
        own["embedding"] = PiecewiseLinear(model.embedding.bins)
    one = MDN(copy(model.head, components=k), **own)
    return Ensemble(one, members=model.members) if isinstance(model, Ensemble) else one
