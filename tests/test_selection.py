"""The choice of the number of components: the rule by hand, whole runs, ensembles, Python."""

import functools
import itertools
import json
import types

import numpy as np
import pytest

import mdn
from mdn import losses, selection, training
from mdn.callbacks.checkpoint import Progress
from mdn.callbacks.guard import DivergedError
from mdn.config import compose_config
from mdn.data.rows import Data, Rows
from mdn.embeddings import PiecewiseLinear
from mdn.runs import CONTENTS
from mdn.selection import Selection, choose, held_out_nll, with_components

TINY = (
    *("trainer.epochs=2", "trainer.batch_size=32", "trainer.verbose=0", "trainer.compiled=false"),
    *("backbone.widths=[8]", "callbacks.tensorboard.image_every=0"),
    *("data.rows=200", "data.validation_rows=64", "data.test_rows=64"),
)


def score_of(rows, weight=None):
    """Return a score function from k -> [n], which counts its calls."""
    tried = []

    def score(k):
        tried.append(k)
        nll = np.asarray(rows[k], float)
        return nll, np.ones(len(nll)) if weight is None else np.asarray(weight, float)

    return score, tried


# ---------------------------------------------------------------------- the rule


def test_rule_by_hand():
    # Of k=2 beside k=3: differences 0, 0, 0, .4, so mean .1 and standard error
    # sqrt(3 (.1)^2 + (.3)^2) / 4 = .0866: outside. With a difference in another row it is inside.
    rows = {1: [9, 9, 9, 9], 2: [0, 0, 0, 0.4], 3: [0, 0, 0, 0]}
    found = choose(score_of(rows)[0], [1, 2, 3])
    assert found.excess(2) == pytest.approx((0.1, np.sqrt(0.12) / 4))
    assert (found.best, found.k) == (3, 3)
    rows[2] = [-0.2, 0, 0, 0.4]
    found = choose(score_of(rows)[0], [1, 2, 3])
    assert found.excess(2) == pytest.approx((0.05, np.sqrt(0.0625 + 0.005 + 0.1225) / 4))
    assert (found.best, found.k) == (3, 2)


def test_differences_are_paired():
    # Rows differ by far more than the candidates do, which says nothing of the candidates.
    hard = np.random.default_rng(0).normal(scale=100.0, size=500)
    rows = {1: hard + 0.1 + 0.01 * np.sin(hard), 2: hard}
    assert choose(score_of(rows)[0], [1, 2]).k == 2
    assert rows[1].std() / np.sqrt(500) > 10 * (rows[1] - rows[2]).mean()


def test_rule_agrees_with_a_direct_search():
    rng = np.random.default_rng(1)
    for _ in range(50):
        rows = {k: rng.normal(1.0 / k, 0.3, size=40) for k in (1, 2, 3, 5)}
        weight = rng.uniform(0.1, 2.0, size=40)
        found = Selection(weight, rows)
        mean = {k: (weight * v).sum() / weight.sum() for k, v in rows.items()}
        best = min(mean, key=mean.get)

        def is_close(k, rows=rows, best=best, weight=weight):
            d = rows[k] - rows[best]
            centre = (weight * d).sum() / weight.sum()
            return centre <= np.sqrt((weight**2 * (d - centre) ** 2).sum()) / weight.sum()

        assert found.best == best
        assert found.k == next(k for k in (1, 2, 3, 5) if is_close(k))


def test_weight_zero_leaves_a_row_out():
    rows = {1: [0.0, 0.0, 50.0], 2: [1.0, 1.1, 0.0]}
    assert choose(score_of(rows, [1, 1, 0])[0], [1, 2]).k == 1
    assert choose(score_of(rows, [1, 1, 1])[0], [1, 2]).best == 2


def test_search_ends_where_more_components_do_not_help():
    rng = np.random.default_rng(2)
    rows = {k: rng.normal(0.0, 1e-3, 100) + (1.0 if k < 3 else 0.0) for k in selection.CANDIDATES}
    rows[3] -= 0.1
    score, tried = score_of(rows)
    assert choose(score).k == 3
    assert tried == [1, 2, 3, 5, 8]


def test_candidate_that_fails_is_not_chosen():
    rows = {1: [np.nan, 0.0], 2: [1.0, 1.2], 3: [np.inf, 0.0]}
    found = choose(score_of(rows)[0], [1, 2, 3])
    assert found.k == found.best == 2
    assert {key for key in found.metrics() if "/nll/" in key} == {"selection/nll/2"}
    assert all(np.isfinite(value) for value in found.metrics().values())
    found.figure()
    with pytest.raises(mdn.MDNError, match="none of \\[1\\] components has a finite NLL"):
        choose(score_of(rows)[0], [1])


@pytest.mark.parametrize("candidates", [[], [2, 1], [0, 1], [1, 1]])
def test_candidates_must_ascend(candidates):
    with pytest.raises(mdn.MDNError, match="give ascending positive integers"):
        choose(score_of({})[0], candidates)


# ---------------------------------------------------------------------- held-out rows


@pytest.fixture(scope="module")
def tiny_data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 2))
    y = x[:, :1] + rng.normal(size=(30, 1))
    weight = rng.uniform(0.5, 2.0, size=30)
    weight[25] = 0.0
    parts = [Rows(x[s], y[s], weight[s]) for s in (slice(20), slice(20, 30))]
    return Data(parts[0], parts[1], parts[1], ("a", "b"), ("y",))


def test_rows_of_an_ensemble_are_judged_by_members_that_held_them_out(tiny_data):
    ensemble = mdn.Ensemble(mdn.MDN(mdn.heads.Mixture(1, 2), mdn.backbones.MLP([4])), members=3)
    ensemble.adapt(tiny_data.train.x, tiny_data.train.y)
    folds = np.array([[20, 21, 25], [0, 3, 21], [3, 19, 29]])  # 3 and 21 twice
    nll, weight = held_out_nll(ensemble, tiny_data, folds)
    x, y, weights = (
        np.concatenate([getattr(r, n) for r in (tiny_data.train, tiny_data.validation)])
        for n in ("x", "y", "weight")
    )
    members = [ensemble.member(m)(x).log_prob(y.astype("float32")).numpy() for m in range(3)]
    expected = [
        -np.mean([members[m][row] for m in range(3) if row in folds[m]])
        for row in (0, 3, 19, 20, 21, 29)  # 25 has no weight
    ]
    np.testing.assert_allclose(nll, expected, rtol=1e-5)
    np.testing.assert_array_equal(weight, weights[[0, 3, 19, 20, 21, 29]])


def test_what_members_say_of_rows_they_learned_from_counts_nothing():
    log_prob = np.array([[-1.0, np.inf], [np.nan, -2.0]])
    model = types.SimpleNamespace(member_log_prob=lambda x, y, cells: log_prob)
    rows, none = Rows(np.zeros([2, 1]), np.zeros([2, 1])), Rows(np.zeros([0, 1]), np.zeros([0, 1]))
    nll, _ = held_out_nll(model, Data(rows, none, none, (), ()), np.array([[0], [1]]))
    np.testing.assert_array_equal(nll, [1.0, 2.0])


def test_cells_of_targets_on_a_grid_are_judged(tiny_data):
    model = mdn.MDN(mdn.heads.Mixture(1, 2), mdn.backbones.MLP([4]))
    model.adapt(tiny_data.train.x, tiny_data.train.y)
    model._jitter = types.SimpleNamespace(step=[0.5])
    rows = tiny_data.validation
    nll, _ = held_out_nll(model, tiny_data)
    expected = losses.CellNLL([0.5])(rows.y, model.predict_distribution(rows.x))
    np.testing.assert_allclose(nll, expected.numpy()[rows.weight > 0.0], rtol=1e-5)


def test_member_log_prob_has_a_column_for_each_member(tiny_data):
    ensemble = mdn.Ensemble(mdn.MDN(mdn.heads.Mixture(1, 2), mdn.backbones.MLP([4])), members=2)
    ensemble.adapt(tiny_data.train.x, tiny_data.train.y)
    x, y = tiny_data.validation.x, tiny_data.validation.y
    found = ensemble.member_log_prob(x, y)
    expected = [ensemble.member(m).log_prob(x, y) for m in range(2)]
    np.testing.assert_allclose(found, np.transpose(expected), rtol=1e-5)


# ---------------------------------------------------------------------- whole runs


def test_a_candidate_that_diverges_is_left_out(tmp_path, tiny_data, monkeypatch):
    def fit_one(config, *_):
        k = config.model.components
        if k == 2:
            raise DivergedError("the loss became nan")
        return k, config, Progress(seconds=1.0)

    weight = tiny_data.validation.weight
    weight = weight[weight > 0.0]
    monkeypatch.setattr(training, "_fit_one", fit_one)
    nll = {1: 2.0, 3: 1.0, 5: 1.0, 8: 1.0}
    monkeypatch.setattr(
        training, "held_out_nll", lambda k, *_: (np.full(len(weight), nll[k]), weight)
    )
    config = compose_config(["k=auto", "callbacks.tensorboard=null"])
    model, _, _, notes = training.fit_candidates(config, tiny_data, tmp_path, None)
    assert model == notes["selection/k"] == 3
    assert notes["selection/n"] == 9
    assert "selection/nll/2" not in notes
    assert notes["selection/seconds"] == 4.0


def run(directory, *overrides):
    return training.train(compose_config([f"output_dir={directory}", *TINY, *overrides]))


@pytest.fixture
def two_candidates(monkeypatch):
    monkeypatch.setattr(training, "choose", functools.partial(choose, candidates=(1, 2)))


@pytest.mark.slow
def test_killed_run_goes_on_and_chooses(tmp_path, monkeypatch, two_candidates, eager_steps):
    judged = itertools.count()

    def judge(*args):
        if next(judged) == 1:  # while the second candidate is judged
            raise KeyboardInterrupt
        return held_out_nll(*args)

    path = tmp_path / "auto"
    monkeypatch.setattr(training, "held_out_nll", judge)
    with pytest.raises(training.InterruptedRunError):
        run(path, "k=auto")
    assert not (path / "metrics.json").exists()
    trained = sorted(path.glob("checkpoints/*/epoch-00002.npz"))
    assert [p.parent.name for p in trained] == ["k=1", "k=2"]
    before = [p.stat().st_mtime_ns for p in trained]
    metrics = run(path, "k=auto")
    assert [p.stat().st_mtime_ns for p in trained] == before  # nothing is trained again

    k = metrics["selection/k"]
    assert {p.name for p in path.iterdir()} == {*CONTENTS} - {"recipe.json"}
    assert (path / "plots/selection.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((path / "metrics.json").read_text()) == metrics
    assert f"k=auto takes k={k}" in (path / "train.log").read_text()
    assert mdn.load(path / "model.keras").head.components == k
    # The chosen one is what a run of its own learns.
    alone = run(tmp_path / "alone", f"k={k}")
    scores = {key for key in alone if key.startswith("test/")}
    assert {key: alone[key] for key in scores} == {key: metrics[key] for key in scores}


@pytest.mark.slow
def test_dashboard_shows_the_choice(tmp_path, two_candidates, bare_runs, eager_steps):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = run(tmp_path / "run", "k=auto", "ensemble=2", "trainer.epochs=1")
    events = EventAccumulator(str(tmp_path / "run/tensorboard/selection"))
    events.Reload()
    tags = events.Tags()
    assert set(tags["tensors"]) == {"nll", "excess", "excess_se", "selection"}
    assert [event.step for event in events.Tensors("nll")] == [1, 2]
    # 64 validation rows of the source, and as many others of the second member.
    assert metrics["selection/n"] == 128


# ---------------------------------------------------------------------- Python


@pytest.fixture(scope="module")
def two_lines():
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, size=(1500, 1))
    return x, rng.choice([-1.0, 1.0], size=(1500, 1)) + 0.1 * rng.normal(size=(1500, 1))


@pytest.mark.slow
def test_two_lines_need_two_components(two_lines):
    x, y = two_lines
    template = mdn.MDN(mdn.heads.Mixture(1), mdn.backbones.MLP([8]))
    found = mdn.select_components(template, x, y, candidates=[1, 2, 3], epochs=60, batch_size=64)
    assert found.k == found.model.head.components == 2
    # ln 2 + ln(.1 sqrt(2 pi e)): the entropy of two narrow normals.
    assert found.mean(2) == pytest.approx(np.log(2) + np.log(0.1) + 1.4189, abs=0.1)
    assert found.mean(1) - found.mean(2) > 0.5


def test_a_copy_finds_bins_of_its_own():
    x = np.random.default_rng(0).choice([0.0, 1.0, 2.0, 5.0], size=[100, 1])
    model = mdn.MDN(mdn.heads.Mixture(1), embedding=PiecewiseLinear(8))
    model.adapt(x, x + np.random.default_rng(1).normal(size=[100, 1]))
    copy = with_components(model, 2)
    few = x[x[:, 0] < 5.0]
    copy.adapt(few, few + np.random.default_rng(2).normal(size=few.shape))
    assert (copy.embedding.bins, copy.embedding.columns) == (8, [0, 0])


def test_python_names_what_cannot_be_chosen(two_lines):
    x, y = two_lines
    with pytest.raises(mdn.MDNError, match=r"sample_weight is -1\.0 in row 0: weights are finite"):
        mdn.select_components(mdn.MDN(mdn.heads.Mixture(1)), x, y, sample_weight=[-1.0] * 1500)
    with pytest.raises(mdn.MDNError, match="the head TriL has no components"):
        mdn.select_components(mdn.MDN(mdn.heads.TriL(1)), x, y)
    with pytest.raises(mdn.MDNError, match="validation_split=0 of 1500 rows holds out 0"):
        mdn.select_components(mdn.MDN(mdn.heads.Mixture(1)), x, y, validation_split=0)
