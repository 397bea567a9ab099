"""Each member learns what it would alone, and the mixture of all is the density."""

import functools
import itertools
import json
import types

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import mdn
from mdn import backbones, heads
from mdn.callbacks.checkpoint import Checkpoint
from mdn.callbacks.stopping import EarlyStopping, MemberStopping
from mdn.config import compose_config
from mdn.data.pipeline import evaluation_batches, training_batches
from mdn.data.rows import Data, Rows
from mdn.data.splits import draw_folds
from mdn.density import DiagGaussianMixture, GaussianMixture, mixture_of
from mdn.ensembles import Ensemble
from mdn.errors import ConfigError, MDNError
from mdn.members import BACKBONES
from mdn.preparation import make_batches
from mdn.training import InterruptedRunError, train
from mdn.uncertainty import split_covariance

RNG = np.random.default_rng(0)
N, M, SEED = 120, 3, 5
X = RNG.normal(3, 2, [N, 2])
Y = X[:, :1] + RNG.normal(size=[N, 2]) * [1.0, 5.0]
MISSING = np.where(RNG.random(Y.shape) < 0.1, np.nan, Y)
STEPS = RNG.normal(size=[N, 4, 2])
STEPS[3, 2:] = np.nan  # the padding of a shorter sequence
STEPS_Y = RNG.normal(size=[N, 4, 2])
COLUMNS = {"size": X[:, 0], "colour": np.array(["red", "blue", "green", "red"] * (N // 4), object)}
FOLDS = draw_folds(np.arange(N), 20, M)

# Every head and every backbone that can be stacked, the options of each, and every kind of x.
CASES = {
    "diag": (lambda: (heads.Diag(2), backbones.MLP([8, 8])), X, Y),
    "tril": (lambda: (heads.TriL(2), backbones.ResNet(8, 2, dropout=0.2)), X, MISSING),
    "mixture": (lambda: (heads.Mixture(2, 2), backbones.MLP([8], "relu", 0.3, True)), X, Y),
    "mixture_diag": (lambda: (heads.MixtureDiag(2, 2), backbones.Constant()), X, MISSING),
    "precision": (
        lambda: (heads.MixturePrecision(2, 2), backbones.ResNet(8, 1, layer_norm=False)),
        *(X, Y),
    ),
    "low_rank": (
        lambda: (heads.MixtureLowRank(2, 2, rank=1), backbones.MLP([8])),
        *(STEPS, STEPS_Y),
    ),
    "columns": (lambda: (heads.Mixture(2, 2), backbones.MLP([8])), COLUMNS, Y),
}

# Each on one worker, which trains it once.
NAMES = [pytest.param(name, marks=pytest.mark.xdist_group(f"ensemble-{name}")) for name in CASES]
SAVED = ("mixture", "mixture_diag", "columns")
one_worker = pytest.mark.xdist_group("ensemble-runs")


def densities(kind, batch):
    """Return M random densities of a kind as one with batch [M, *batch]."""
    rng = np.random.default_rng(1)

    def draw(*shape):
        return tf.constant(rng.normal(size=[M, *batch, *shape]), tf.float32)

    tril = tf.linalg.set_diag(tf.linalg.band_part(draw(2, 2), -1, 0), tf.exp(draw(2)))
    many = tf.linalg.set_diag(tf.linalg.band_part(draw(4, 2, 2), -1, 0), tf.exp(draw(4, 2)))
    return {
        "diag": lambda: mdn.MultivariateNormalDiag(draw(2), tf.exp(draw(2))),
        "tril": lambda: mdn.MultivariateNormalTriL(draw(2), tril),
        "mixture": lambda: GaussianMixture(draw(4), draw(4, 2), many),
        "mixture_diag": lambda: GaussianMixture.from_diag(draw(4), draw(4, 2), tf.exp(draw(4, 2))),
    }[kind]()


KINDS = ("diag", "tril", "mixture", "mixture_diag")


@pytest.mark.parametrize("batch", [(), (6,), (2, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_mixture_is_the_mean_of_the_densities(kind, batch):
    stacked = densities(kind, batch)
    mixture = mixture_of(stacked)
    assert mixture.batch_shape == list(batch)
    diagonal = kind in ("diag", "mixture_diag")
    assert type(mixture) is (DiagGaussianMixture if diagonal else GaussianMixture)
    y = RNG.normal(size=[*batch, 2]).astype(np.float32)
    for missing in (False, True):
        y[..., 0] = np.nan if missing else y[..., 0]
        expected = tf.reduce_logsumexp(stacked.log_prob(y), axis=0) - np.log(M)
        np.testing.assert_allclose(mixture.log_prob(y), expected, rtol=1e-5, atol=1e-6)
    tensors = stacked.tensors()
    apart = [type(stacked)(**{k: t[m] for k, t in tensors.items()}) for m in range(M)]
    for key, tensor in mixture_of(apart).tensors().items():  # to the rounding of the log weights
        np.testing.assert_allclose(tensor, mixture.tensors()[key], rtol=4e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_variance_splits_in_two(kind):
    stacked = densities(kind, (6,))
    aleatoric, epistemic = split_covariance(stacked)
    whole = mixture_of(stacked).covariance()
    np.testing.assert_allclose(aleatoric + epistemic, whole, rtol=1e-4, atol=1e-5)
    same = type(stacked)(**{k: tf.stack([t[0]] * M) for k, t in stacked.tensors().items()})
    aleatoric, epistemic = split_covariance(same)
    np.testing.assert_allclose(aleatoric, same.covariance()[0], rtol=1e-5)
    assert np.abs(epistemic).max() < 1e-10  # of members that agree


# ---------------------------------------------------------------------- members beside single runs


def fit_member(make, x, y, m, callbacks=(), epochs=3, rate=0.01):
    """Return the model that a single run with seed SEED + m and fold m makes.

    A few epochs are trained step by step, as to trace a step takes longer.
    """
    tf_keras.utils.set_random_seed(SEED + m)
    model = mdn.MDN(*make())
    model.adapt(x, y, seed=SEED + m)
    arrays = model.as_arrays(x, y)
    learned, held_out = (tuple(a[rows[m]] for a in arrays) for rows in FOLDS)
    model.compile(tf_keras.optimizers.Adam(rate), jit_compile=False, run_eagerly=epochs < 10)
    model.fit(
        training_batches(learned, 16, seed=SEED + m, complete=model.is_complete(arrays)),
        validation_data=evaluation_batches(held_out, 16) if callbacks else None,
        epochs=epochs,
        verbose=0,
        callbacks=list(callbacks),
    )
    return model


def fit_ensemble(make, x, y, callbacks=(), epochs=3, rate=0.01, compiled=False):
    model = Ensemble(mdn.MDN(*make()), members=M)
    model.adapt(x, y, seed=SEED)
    arrays = model.as_arrays(x, y)
    complete = model.is_complete(arrays)
    model.compile(tf_keras.optimizers.Adam(rate), jit_compile=compiled)
    held_out = evaluation_batches(arrays, 16, members=FOLDS[1], complete=complete)
    model.fit(
        training_batches(arrays, 16, seed=SEED, members=FOLDS[0], complete=complete),
        validation_data=held_out if callbacks else None,
        epochs=epochs,
        verbose=0,
        callbacks=list(callbacks),
    )
    return model


@functools.cache
def fitted(name):
    return fit_ensemble(*CASES[name])


def assert_same_weights(one, other):
    for a, b in zip(one.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("name", NAMES)
def test_member_is_the_model_of_a_single_run(name):
    model = fitted(name)
    assert_same_weights(model.member(M - 1), fit_member(*CASES[name], M - 1))
    assert not np.allclose(model.member(0).head.kernel, model.member(M - 1).head.kernel)


STOPPED = {"epochs": 12, "rate": 0.1}  # so high that the validation loss goes up and down


def test_members_stop_as_they_would_alone():
    stopping = MemberStopping(patience=2)
    model = fit_ensemble(*CASES["diag"], [stopping], **STOPPED, compiled=True)
    ends = []
    for m in range(M):
        single = EarlyStopping(patience=2)
        alone = fit_member(*CASES["diag"], m, [single], **STOPPED)
        assert stopping.best_epochs[m] == single.best_epoch
        assert stopping.bests[m] == pytest.approx(single.best, rel=1e-3)
        ends.append(single.best_epoch)
        a, b = model.member(m).predict_distribution(X), alone.predict_distribution(X)
        np.testing.assert_allclose(a.mean(), b.mean(), rtol=2e-2, atol=2e-2)
    assert len(set(ends)) > 1, "a case in which all stop at once shows nothing"


def test_every_head_and_stackable_backbone_has_a_case():
    made = [make() for make, *_ in CASES.values()]
    public = [kind for kind in vars(heads).values() if isinstance(kind, type)]
    every = {kind for kind in public if issubclass(kind, heads.Head) and "layout" in vars(kind)}
    assert {type(head) for head, _ in made} == every - {heads.Head}
    assert {type(backbone) for _, backbone in made} == set(BACKBONES)


# ---------------------------------------------------------------------- the predictive density


@pytest.mark.parametrize("name", NAMES)
def test_density_is_the_mixture_of_the_members(name):
    model, (_, x, y) = fitted(name), CASES[name]
    density = model.predict_distribution(x, batch_size=50)
    assert isinstance(density, GaussianMixture)
    assert density.logits.shape[-1] == M * model.head.components
    y = y.astype(np.float32)
    members = np.stack([model.member(m).predict_distribution(x).log_prob(y) for m in range(M)])
    real = np.ones(y.shape[:-1], bool) if x is not STEPS else ~np.isnan(x).all(-1)
    expected = np.logaddexp.reduce(members) - np.log(M)
    np.testing.assert_allclose(density.log_prob(y)[real], expected[real], rtol=1e-4, atol=1e-4)
    split = model.uncertainty(x, batch_size=50)
    whole = density.covariance().numpy()
    assert split.aleatoric.shape == split.epistemic.shape == whole.shape
    np.testing.assert_allclose(split.aleatoric + split.epistemic, whole, rtol=1e-3, atol=1e-3)
    assert (np.diagonal(split.epistemic, axis1=-2, axis2=-1) >= 0).all()


@pytest.mark.parametrize("name", [n for n in NAMES if n.values[0] in SAVED])
def test_saved_and_loaded(name, tmp_path):
    model, (_, x, _) = fitted(name), CASES[name]
    model.save(tmp_path / "model.keras")
    again = mdn.load(tmp_path / "model.keras")
    one, other = (m.predict_distribution(x).tensors() for m in (model, again))
    for key in one:
        np.testing.assert_array_equal(one[key], other[key])
    assert_same_weights(again.member(1), model.member(1))
    for a, b in zip(again.optimizer.variables, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(a, b)


def test_as_in_keras(tmp_path):
    model = Ensemble(mdn.MDN(heads.Mixture(2, 2), backbones.MLP([8])), members=M)
    with pytest.raises(MDNError, match=r"call model\.adapt"):
        model.fit(X, Y)
    model.adapt(X, Y)
    model.compile("adam", run_eagerly=True)
    weight = np.ones(N)
    history = model.fit(
        X, Y, epochs=2, batch_size=50, validation_split=0.2, sample_weight=weight, verbose=0
    ).history
    for prefix in ("", "val_"):
        members = np.mean([history[f"{prefix}nll_{m}"] for m in range(M)], axis=0)
        np.testing.assert_allclose(history[f"{prefix}loss"], members, rtol=1e-5)
    model.fit(X, Y, validation_data=(X, Y), epochs=1, verbose=0)
    nll = -model.predict_distribution(X).log_prob(Y.astype(np.float32)).numpy().mean()
    loss, _, *members = model.evaluate(X, Y, verbose=0)
    assert loss == pytest.approx(nll, rel=1e-4)  # of the predictive density
    assert loss <= np.mean(members) + 1e-5  # Jensen
    np.testing.assert_allclose(
        model.predict(X, verbose=0), model.predict_distribution(X).mean(), rtol=1e-4
    )


def test_bfloat16_backbone():
    tf_keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        model = Ensemble(mdn.MDN(heads.TriL(2), backbones.ResNet(8, 1)), members=M)
        model.adapt(X, Y)
    finally:
        tf_keras.mixed_precision.set_global_policy("float32")
    density = model.predict_distribution(X)
    assert density.dtype == tf.float32
    members = mixture_of([model.member(m).predict_distribution(X) for m in range(M)])
    np.testing.assert_allclose(density.mean(), members.mean(), rtol=2e-2, atol=2e-2)


# ---------------------------------------------------------------------- rows


def test_folds_are_disjoint_while_rows_last():
    train_rows, held_out = draw_folds(RNG.permutation(50), 10, 5)
    assert sorted(held_out.ravel()) == list(range(50))
    for learned, kept in zip(train_rows, held_out, strict=True):
        assert sorted([*learned, *kept]) == list(range(50))
    train_rows, held_out = draw_folds(np.arange(50), 20, 5)  # begins anew after two and a half
    assert train_rows.shape == (5, 30)
    assert len({tuple(rows) for rows in held_out}) == 5
    with pytest.raises(ConfigError, match="leaves none to learn from"):
        draw_folds(np.arange(5), 5, 2)


def test_batches_of_a_member_are_those_of_a_single_run():
    arrays = X.astype(np.float32), Y.astype(np.float32)
    options = {"first_epoch": 2, "chunk": 3}
    batches = training_batches(arrays, 16, seed=SEED, members=FOLDS[0], **options)
    for m in range(M):
        own = tuple(array[FOLDS[0][m]] for array in arrays)
        alone = training_batches(own, 16, seed=SEED + m, **options)
        assert (alone.steps, alone.chunk) == (batches.steps, batches.chunk)
        pairs = zip(batches, alone, strict=False)  # both are endless
        for (a, steps), (b, expected) in itertools.islice(pairs, 4):
            assert int(steps) == int(expected)
            for one, other in zip(a, b, strict=True):
                np.testing.assert_array_equal(one[: int(steps), m], other[: int(steps)])


@pytest.mark.parametrize("split", ["random", "time"])
def test_only_a_random_split_is_drawn_anew_for_each_member(split):
    column = [] if split == "random" else ["data.split_column=t"]
    options = ["data=npz", f"data.split={split}", *column, "trainer.batch_size=8", "ensemble=3"]
    x = np.arange(50.0)[:, np.newaxis]
    train_rows, held_out, test = (Rows(part, part) for part in np.split(x, [30, 40]))
    data = Data(train_rows, held_out, test, ("x",), ("y",))
    model = types.SimpleNamespace(arrays=lambda rows: (rows.x, rows.y), is_complete=np.all)
    batches, validation = make_batches(model, compose_config(options), data, 0)
    (kept, _), _ = next(iter(validation))  # [1, M, 10, 1]
    (learned, _), _ = next(iter(batches))
    kept, learned = (np.moveaxis(t[..., 0], 1, 0).reshape(3, -1) for t in (kept, learned))
    assert list(kept[0]) == list(range(30, 40))
    assert len({tuple(rows) for rows in kept}) == (3 if split == "random" else 1)
    for own, other in zip(kept, learned, strict=True):
        assert not set(own) & set(other)
        assert len(set(own) | set(other)) == 10 + 24  # of 30 rows, three batches of eight
        assert max(*own, *other) < 40  # test rows are never seen


# ---------------------------------------------------------------------- whole runs

TINY = (
    *("trainer.epochs=3", "trainer.batch_size=32", "trainer.verbose=0", "trainer.compiled=false"),
    *("callbacks.tensorboard.image_every=0", "backbone.widths=[8]", "data.seed=0"),
    *("data.rows=200", "data.validation_rows=64", "data.test_rows=64"),
)


def run(directory, *overrides):
    return train(compose_config([f"output_dir={directory}", *TINY, *overrides]))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "run"
    return directory, run(directory, "ensemble=2")


@one_worker
def test_run_writes_what_a_single_one_does(finished):
    directory, metrics = finished
    assert json.loads((directory / "metrics.json").read_text()) == metrics
    model = mdn.load(directory / "model.keras")
    assert isinstance(model, Ensemble)
    test = mdn.training.make(compose_config(TINY), "data").load().test
    split = model.uncertainty(test.x)
    for part in ("aleatoric", "epistemic"):
        expected = np.sqrt(np.mean(getattr(split, part)[:, 0, 0]))
        assert metrics[f"test/{part}_stddev"] == pytest.approx(expected, rel=1e-4)
        assert metrics[f"test/{part}_stddev/t"] == metrics[f"test/{part}_stddev"]
    assert metrics["model/parameters"] == model.count_params()
    log_prob = model.predict_distribution(test.x).log_prob(test.y.astype(np.float32))
    assert metrics["test/nll"] == pytest.approx(-np.mean(log_prob), rel=1e-5)
    signature = tf.saved_model.load(directory / "saved_model").signatures["log_prob"]
    answer = signature(x=tf.constant(test.x, tf.float32), y=tf.constant(test.y, tf.float32))[
        "log_prob"
    ]
    np.testing.assert_allclose(answer, log_prob, rtol=1e-4, atol=1e-5)
    assert list((directory / "tensorboard" / "validation").iterdir())


@one_worker
def test_first_member_is_the_run_without_an_ensemble(finished, tmp_path, bare_runs, eager_steps):
    directory, _ = finished
    run(tmp_path / "single")
    assert_same_weights(
        mdn.load(directory / "model.keras").member(0), mdn.load(tmp_path / "single/model.keras")
    )


@one_worker
def test_interrupted_run_ends_as_the_uninterrupted_one(finished, tmp_path, monkeypatch, bare_runs):
    directory, metrics = finished
    whole = Checkpoint.on_epoch_end

    def interrupt(self, epoch, logs=None):
        whole(self, epoch, logs)
        if epoch == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "on_epoch_end", interrupt)
        with pytest.raises(InterruptedRunError, match=r"output_dir=.* go on"):
            run(tmp_path / "run", "ensemble=2")
    again = run(tmp_path / "run", "ensemble=2")
    assert again["train/epochs"] == metrics["train/epochs"]
    for a, b in zip(
        mdn.load(tmp_path / "run/model.keras").get_weights(),
        mdn.load(directory / "model.keras").get_weights(),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@one_worker
def test_init_from_an_ensemble(finished, tmp_path, bare_runs, eager_steps):
    directory, metrics = finished
    slow = ("optimizer.learning_rate=1e-12", "trainer.epochs=1", f"init_from={directory}")
    again = run(tmp_path / "again", "ensemble=2", *slow)
    assert again["test/nll"] == pytest.approx(metrics["test/nll"], abs=1e-4)
    with pytest.raises(MDNError, match=r"another ensemble \(members: 2, not 3\)"):
        run(tmp_path / "more", "ensemble=3", *slow)
    with pytest.raises(MDNError, match="holds a Ensemble, not a MDN"):
        run(tmp_path / "single", *slow)


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["ensemble=0"], "ensemble=0: must be greater than 0"),
        (["ensemble=five"], "ensemble=five: must be a valid integer"),
        (["ensemble=2", "model=vae", "data=digits"], "model=vae has no ensemble; set ensemble=1"),
        (["ensemble=2", "model=distribution"], "model=distribution has no ensemble"),
        (
            ["ensemble=2", "backbone=lstm", "data=npz", "data.path=steps.npz"],
            "use backbone=mlp, resnet or constant",
        ),
        (["ensemble=2", "strategy=mirrored"], "use strategy=auto, cpu or gpu"),
    ],
)
def test_config_without_an_ensemble(overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        compose_config(overrides)
    assert "\n" not in str(caught.value)


def test_mistakes_in_python():
    member = mdn.MDN(heads.Diag(2), backbones.MLP([8]))
    with pytest.raises(ConfigError, match="needs at least one"):
        Ensemble(member, members=0)
    with pytest.raises(ConfigError, match="Sequential cannot be stacked"):
        Ensemble(mdn.MDN(heads.Diag(2), tf_keras.Sequential()))
    model = Ensemble(member, members=2)
    with pytest.raises(ConfigError, match="use global_clipnorm, which clips each by its own"):
        model.compile(tf_keras.optimizers.SGD(clipnorm=1.0))
    model.adapt(X, Y)
    model.compile("adam")
    with pytest.raises(ConfigError, match="give x and y as arrays"):
        model.fit(tf.data.Dataset.from_tensor_slices((X, Y)).batch(10))
    with pytest.raises(ConfigError, match="give x and y as arrays"):
        model.fit(iter([(X[:10], Y[:10])]), steps_per_epoch=1)
    with pytest.raises(ConfigError, match="steps_per_epoch=2 has no meaning for an ensemble"):
        model.fit(X, Y, steps_per_epoch=2)
    for name in ("batch_size", "epochs"):
        with pytest.raises(ConfigError, match=f"{name}=0: must be at least 1"):
            model.fit(X, Y, **{name: 0})


@pytest.mark.parametrize("transform", ["log", ["box_cox", None]])
def test_transformed_targets(transform, tmp_path):
    y = np.exp(0.5 * Y)
    y[::9, 0] = np.nan
    head = heads.Mixture(Y.shape[-1], 2, target_transform=transform)
    model = Ensemble(mdn.MDN(head, backbones.MLP([8])), members=2)
    model.adapt(X, y)
    model.compile(tf_keras.optimizers.Adam(0.01))
    model.fit(X, y, batch_size=64, epochs=2, verbose=0)
    density = model.predict_distribution(X[:7])
    members = [model.member(m).predict_distribution(X[:7]) for m in range(2)]
    mean = np.mean([np.exp(member.log_prob(y[:7])) for member in members], axis=0)
    np.testing.assert_allclose(np.exp(density.log_prob(y[:7])), mean, rtol=2e-4)
    parts = model.uncertainty(X[:7])
    whole = density.covariance().numpy()
    np.testing.assert_allclose(parts.aleatoric + parts.epistemic, whole, rtol=1e-3, atol=1e-4)
    model.save(tmp_path / "model.keras")
    again = mdn.load(tmp_path / "model.keras")
    np.testing.assert_allclose(again.log_prob(X, y), model.log_prob(X, y), rtol=1e-5, atol=1e-5)
