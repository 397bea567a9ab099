"""The VAE: its bounds against quadrature and closed forms, saving, export, config, whole runs."""

import json
import math
import signal
import time

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from forks import Fork, bare_main, run_plain

import mdn
from mdn.backbones import MLP
from mdn.callbacks.checkpoint import Checkpoint
from mdn.callbacks.guard import NanGuard
from mdn.callbacks.tensorboard import TensorBoard
from mdn.comparison import Fit
from mdn.config import compose_config
from mdn.data.digits import Digits
from mdn.data.pipeline import training_batches
from mdn.data.rows import Data, Rows
from mdn.export import export_vae
from mdn.training import train
from mdn.vae import PRIORS, VAE
from mdn.vae_evaluation import evaluate_vae
from mdn.vae_plots import save_vae_plots

TINY = (
    "model=vae",
    "data=digits",
    "k=3",
    "trainer.epochs=2",
    "trainer.verbose=0",
    "trainer.compiled=false",
    "backbone.widths=[8]",
    "model.decoder_widths=[8]",
    "callbacks.tensorboard.image_every=2",
)
D = 6  # pixels of the small images


def images_of(n, seed=0):
    """Return n images of two kinds, [n, D]."""
    rng = np.random.default_rng(seed)
    share = np.where(rng.random([n, 1]) < 0.5, 0.8, 0.2)
    return (rng.random([n, D]) < share).astype(np.float32)


def make(prior="mixture", latent_size=2, seed=0, **options):
    tf_keras.utils.set_random_seed(seed)
    options = {"components": 3, "decoder_widths": [8], "backbone": MLP([8]), **options}
    model = VAE(D, latent_size, prior=prior, **options)
    model.adapt(images_of(100))
    return model


def trained(prior="mixture", latent_size=1, epochs=4):
    model = make(prior, latent_size)
    # To trace a step takes longer than all of these.
    model.compile(tf_keras.optimizers.Adam(0.02), run_eagerly=True)
    model.fit(images_of(500), batch_size=100, epochs=epochs, verbose=0)
    return model


@pytest.fixture(scope="module")
def digits():
    return Digits().load()


@pytest.fixture(scope="module")
def model():
    return trained()


# ---------------------------------------------------------------------- the bounds


def evidence(model, images):
    """Return log p(x) by the trapezoidal rule over a one-dimensional z, [B]."""
    z = np.linspace(-40.0, 40.0, 40_001)[:, np.newaxis].astype(np.float32)  # [Z, 1]
    logits = model.logits(z).numpy().astype(np.float64)  # [Z, D]
    log_likelihood = images @ logits.T - np.logaddexp(0.0, logits).sum(axis=1)  # [B, Z]
    joint = log_likelihood + model.prior.log_prob(z).numpy()
    return np.log(np.trapezoid(np.exp(joint), z[:, 0], axis=1))


@pytest.mark.parametrize("prior", PRIORS)
def test_bounds_are_below_the_evidence_and_approach_it(prior):
    # A posterior of few epochs is wide, so that no rare draw has most of the weight.
    model, images = trained(prior), images_of(20, seed=1)
    exact = evidence(model, images)
    draws = 20_000
    weights = model.log_weights(images, draws, [1, 2]).numpy()
    elbo, error = weights.mean(axis=0), weights.std(axis=0) / math.sqrt(draws)
    assert (elbo <= exact + 5.0 * error + 1e-3).all()
    iw = model.log_prob(images, draws, [3, 4]).numpy()
    np.testing.assert_allclose(iw, exact, atol=0.02)
    few = model.log_prob(images, 5, [5, 6]).numpy().mean()
    assert elbo.mean() < few < exact.mean() + 0.05


@pytest.mark.parametrize("prior", PRIORS)
def test_elbo_is_the_mean_of_the_log_weights(prior):
    model, images = make(prior), images_of(8, seed=1)
    weights = model.log_weights(images, 20_000, [0, 1]).numpy()
    error = weights.std(axis=0) / math.sqrt(len(weights))
    elbo = model.elbo(images, 20_000, [2, 3]).numpy()
    assert (np.abs(weights.mean(axis=0) - elbo) < 5.0 * error + 1e-4).all()


def test_kl_of_one_component_is_the_closed_form():
    model, images = make(components=1), images_of(8, seed=1)
    posterior, prior = model.posterior(images), model.prior.components_distribution
    z = posterior.sample(20_000, seed=0)
    draws = (posterior.log_prob(z) - model._log_prior(z)).numpy()  # [S, B]
    error = draws.std(axis=0) / math.sqrt(len(draws))
    full = mdn.MultivariateNormalTriL(posterior.loc, tf.linalg.diag(posterior.scale_diag))
    one = mdn.MultivariateNormalTriL(prior.loc[0], prior.scale_tril[0])
    exact = full.kl_divergence(one).numpy()
    assert (np.abs(draws.mean(axis=0) - exact) < 5.0 * error).all()
    estimate = model.terms(images, 20_000, [1, 1]).kl.numpy()
    assert (np.abs(estimate - exact) < 5.0 * error).all()


def test_kl_to_the_standard_normal_is_the_closed_form():
    model, images = make("normal"), images_of(8, seed=1)
    kl = model.terms(images, 1, [0, 0]).kl
    exact = model.posterior(images).kl_divergence(model.prior)
    np.testing.assert_allclose(kl, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("latent_size", [1, 2, 8])
@pytest.mark.parametrize("prior", PRIORS)
def test_log_prior_is_that_of_the_distribution(prior, latent_size):
    model = make(prior, latent_size)
    if model.prior_head is not None:  # away from the identities of the start
        noise = np.random.default_rng(0).normal(size=model.prior_head.bias.shape)
        model.prior_head.bias.assign_add(noise)
    z = tf.random.stateless_normal([4, 5, latent_size], [0, 0])
    np.testing.assert_allclose(model._log_prior(z), model.prior.log_prob(z), rtol=1e-4)


def test_gradient_reaches_every_parameter_of_prior_and_nets():
    model = make()
    with tf.GradientTape() as tape:
        loss, _ = model.forward(images_of(32), None, None, training=True)
    gradients = tape.gradient(loss, model.trainable_variables)
    assert model.prior_head.bias.ref() in {v.ref() for v in model.trainable_variables}
    for gradient, variable in zip(gradients, model.trainable_variables, strict=True):
        assert gradient is not None, variable.name
        assert np.abs(gradient.numpy()).max() > 0.0, variable.name
    (prior,) = (
        g
        for g, v in zip(gradients, model.trainable_variables, strict=True)
        if v is model.prior_head.bias
    )
    assert (prior.numpy() != 0.0).all()


def test_loss_is_the_negative_elbo_after_the_warm_up():
    model, images = make(kl_warmup=3), images_of(32)
    for step in range(5):
        state = model.noise.numpy()
        terms = model.terms(images, 1, [state[0], state[1] * 1024], training=True)
        loss, _ = model.forward(images, None, None, training=True)
        share = min(1.0, (step + 1) / 4)
        expected = tf.reduce_mean(share * terms.kl - terms.reconstruction)
        assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_row_weights_weigh():
    model, images = make(), images_of(4)
    one, _ = model.forward(images, None, tf.constant([2.0, 1.0, 1.0, 1.0]), training=False)
    elbo = model.elbo(images, 16, [0, 0]).numpy()
    assert float(one) == pytest.approx(-(elbo.sum() + elbo[0]) / 4, rel=1e-5)


def test_adapt_starts_at_the_share_of_ones():
    images = np.zeros([100, D])
    images[:30, 0] = 1
    tf_keras.utils.set_random_seed(0)
    model = VAE(D, decoder_widths=[4], backbone=MLP([4]))
    model.adapt(images)
    bias = tf.sigmoid(model.pixels.bias).numpy()
    np.testing.assert_allclose(bias[:2], [30.5 / 101, 0.5 / 101], rtol=1e-5)


# ---------------------------------------------------------------------- randomness


def test_draws_are_a_function_of_the_seed(model):
    first, again, other = (model.sample(50, seed) for seed in ([0, 1], [0, 1], [0, 2]))
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert (first[0].numpy() != other[0].numpy()).any()
    assert set(np.unique(first[1])) <= {0.0, 1.0}
    images = images_of(5)
    np.testing.assert_array_equal(model.elbo(images, 3, [1, 1]), model.elbo(images, 3, [1, 1]))


def test_samples_have_the_moments_of_the_model(model):
    probabilities, images = model.sample(40_000, [0, 0])
    np.testing.assert_allclose(
        images.numpy().mean(axis=0), probabilities.numpy().mean(axis=0), atol=0.01
    )
    z = model.prior.sample(40_000, seed=1)
    np.testing.assert_allclose(
        probabilities.numpy().mean(axis=0), model.decode(z).numpy().mean(axis=0), atol=0.01
    )


def fit(epochs, directory=None):
    """Train as `mdn.training.fit` does, from the newest checkpoint in the directory."""
    model = make(dropout=0.2, kl_warmup=5)
    model.compile(tf_keras.optimizers.Adam(0.02), run_eagerly=True)
    checkpoint = Checkpoint(directory or "unused", write=directory is not None)
    first = checkpoint.restore(model)
    batches = training_batches((images_of(64),), 16, seed=0, first_epoch=first, chunk=1)
    model.fit(batches, epochs=epochs, initial_epoch=first, callbacks=[checkpoint], verbose=0)
    return model


def test_same_seed_same_training_also_where_it_was_stopped(tmp_path):
    whole = fit(3)
    fit(1, tmp_path)
    resumed, again = fit(3, tmp_path), fit(3)
    for model in (resumed, again):
        for a, b in zip(whole.get_weights(), model.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)


def test_same_noise_in_xla():
    model, images = make(dropout=0.2), images_of(64)
    model.compile(tf_keras.optimizers.SGD(0.01), jit_compile=True)
    start, histories = model.get_weights(), []
    for _ in range(2):
        model.set_weights(start)
        fitted = model.fit(images, epochs=2, shuffle=False, verbose=0)
        histories.append(fitted.history["loss"])
    assert histories[0] == histories[1]


# ---------------------------------------------------------------------- Keras


def test_predict_is_the_reconstruction_at_the_posterior_mean(model):
    images = images_of(10)
    expected = model.decode(model.posterior(images).loc)
    np.testing.assert_allclose(model.predict(images, verbose=0), expected, rtol=1e-5)
    assert isinstance(model.posterior(images), mdn.MultivariateNormalDiag)
    assert isinstance(model.prior, mdn.GaussianMixture)


@pytest.mark.parametrize("prior", PRIORS)
def test_save_and_load(prior, tmp_path):
    model, images = trained(prior, 2, epochs=1), images_of(10)
    model.save(tmp_path / "vae.keras")
    again = mdn.load(tmp_path / "vae.keras")
    assert type(again) is VAE
    assert again.get_config() == model.get_config()
    np.testing.assert_array_equal(
        again.predict(images, verbose=0), model.predict(images, verbose=0)
    )
    np.testing.assert_array_equal(again.elbo(images, 4, [0, 1]), model.elbo(images, 4, [0, 1]))
    np.testing.assert_array_equal(again.noise, model.noise)
    for m in (model, again):  # the optimizer too goes on where it was
        m.fit(images_of(100), batch_size=50, epochs=1, shuffle=False, verbose=0)
    for a, b in zip(model.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior": "foo"}, "prior='foo' is unknown: choose one of mixture, normal"),
        ({"likelihood": "normal"}, "likelihood='normal' is unknown: choose one of bernoulli"),
        ({"latent_size": 0}, "latent_size=0: must be at least 1"),
        ({"components": 0}, "components=0"),
        ({"decoder_widths": []}, r"widths=\[\]"),
        ({"kl_warmup": -1}, "kl_warmup=-1"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(mdn.MDNError, match=message):
        VAE(D, **options)


def test_no_other_loss():
    with pytest.raises(mdn.MDNError, match="loss='mse': a VAE minimises minus the ELBO"):
        make().compile(loss="mse")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.full([3, D], 0.5), "target 0 is 0.5 in row 0: a VAE learns from images of zeros and"),
        (np.full([3, D], np.nan), "target 0 is nan in row 0"),
        (np.zeros([3, D + 1]), r"shape \[3, 7\]: give \[N, 6\]"),
        (np.zeros([3, 2, D]), r"shape \[3, 2, 6\]"),
        (np.full([3, D], "a"), "not numeric"),
    ],
)
def test_wrong_images(images, message):
    model = make()
    model.compile()
    for use in (model.adapt, model.fit):
        with pytest.raises(mdn.MDNError, match=message) as error:
            use(images)
        assert "\n" not in str(error.value)


def test_precision_of_the_decoder_survives_saving(tmp_path):
    tf_keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        model = make(backbone=MLP([8]))
    finally:
        tf_keras.mixed_precision.set_global_policy("float32")
    model.save(tmp_path / "vae.keras")
    again = mdn.load(tmp_path / "vae.keras")
    assert again.decoder.dtype_policy.name == "mixed_bfloat16"
    images = images_of(10)
    np.testing.assert_array_equal(again(images), model(images))
    assert again(images).dtype == tf.float32


def test_nan_names_the_image(tmp_path):
    data = small_data()
    model = make()
    model.compile(tf_keras.optimizers.SGD(1e30), run_eagerly=True)
    guard = NanGuard(data.train, data.features, data.targets)
    with pytest.raises(
        mdn.MDNError, match=r"the least likely train row is row \d+ .*p0="
    ) as error:
        model.fit(*model.arrays(data.train), epochs=5, verbose=0, callbacks=[guard])
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------- digits


def test_digits_are_split_and_binary(digits):
    parts = (digits.train, digits.validation, digits.test)
    assert [len(part) for part in parts] == [1258, 180, 359]
    for part in parts:
        assert set(np.unique(part.y)) == {0.0, 1.0}
        assert part.x.shape == (len(part), 0)
        assert set(part.label) == set(range(10))
    assert digits.features == ()
    assert len(digits.targets) == 64
    other = Digits(seed=1).load()
    assert (other.test.y != digits.test.y).any()
    # half of the intensities of scikit-learn's images, row by row
    from sklearn.datasets import load_digits

    bright = {image.tobytes() for image in (load_digits().images.reshape(-1, 64) >= 8)}
    assert all((image == 1).tobytes() in bright for image in digits.test.y)


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(mdn.MDNError, match=r"pip install 'mdn\[vae\]'") as error:
        Digits().load()
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------- evaluation, export


def small_data(n=60):
    rows = [Rows(np.zeros([n, 0]), images_of(n, seed).astype(float)) for seed in range(3)]
    return Data(*rows, features=(), targets=tuple(f"p{i}" for i in range(D)), image_shape=(2, 3))


def test_evaluation_is_the_mean_of_the_bounds(model):
    data = small_data()
    metrics = evaluate_vae(model, data, draws=4000)
    exact = evidence(model, data.test.y)
    assert metrics["test/n"] == 60
    assert metrics["test/nll"] == pytest.approx(-exact.mean(), abs=0.02)
    assert metrics["test/nll_se"] == pytest.approx(exact.std() / math.sqrt(60), rel=0.05)
    assert metrics["test/elbo"] < -metrics["test/nll"]
    share = (data.train.y.sum(axis=0) + 0.5) / 61
    pixels = np.where(data.test.y == 1, share, 1 - share)
    assert metrics["baseline/nll"] == pytest.approx(-np.log(pixels).sum(axis=1).mean())


def test_plots(tmp_path):
    history = {"loss": [3.0, 2.0], "elbo": [-3.0, -2.0], "val_elbo": [-3.5, -2.5]}
    for size, names in [(1, set()), (2, {"latent"}), (4, {"latent"})]:
        paths = save_vae_plots(make(latent_size=size), small_data(), history, tmp_path / str(size))
        assert {p.stem for p in paths} == {"samples", "reconstructions", "history"} | names
        assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


SERVED = """
import sys
import numpy as np
import tensorflow as tf

for prior in sys.argv[1:]:
    expected = np.load(prior + ".npz")
    served = tf.saved_model.load(prior).signatures
    x, z = tf.constant(expected["x"]), tf.constant(expected["z"])
    bound = dict(images=x, n=tf.constant(11), seed=tf.constant([5, 6]))
    got = {
        **served["encode"](images=x),
        "decoded": served["decode"](z=z)["probabilities"],
        **served["sample"](n=tf.constant(9), seed=tf.constant([3, 4])),
        **served["elbo"](**bound),
        **served["log_prob"](**bound),
    }
    assert set(got) == set(expected) - {"x", "z"}
    for name, value in got.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-5, err_msg=name)
    assert served["encode"](images=x[:0])["mean"].shape == (0, 2)
    assert not {"mdn", "tensorflow_probability"} & set(sys.modules)
    print(prior, "answers as expected")

import mdn

print(type(mdn.load("vae.keras")).__name__)
"""


def test_saved_model_answers_as_the_model_with_tensorflow_alone(tmp_path):
    """And a model that was saved is loaded where nothing else of mdn is imported."""
    images = images_of(7, seed=3)
    z = np.random.default_rng(0).normal(size=[5, 2]).astype(np.float32)
    for prior in PRIORS:
        model = trained(prior, 2, epochs=2)
        export_vae(model, tmp_path / prior, targets=[f"p{i}" for i in range(D)])
        posterior = model.posterior(images)
        probabilities, drawn = model.sample(9, [3, 4])
        expected = {
            "mean": posterior.loc,
            "stddev": posterior.scale_diag,
            "decoded": model.decode(z),
            "probabilities": probabilities,
            "images": drawn,
            "elbo": model.elbo(images, 11, [5, 6]),
            "log_prob": model.log_prob(images, 11, [5, 6]),
        }
        arrays = {name: value.numpy() for name, value in expected.items()}
        np.savez(tmp_path / f"{prior}.npz", x=images, z=z, **arrays)
    model.save(tmp_path / "vae.keras")
    done = run_plain(SERVED, PRIORS, tmp_path)
    printed = [f"{prior} answers as expected" for prior in PRIORS]
    assert done.stdout.splitlines() == [*printed, "VAE"], done.stderr


def test_description_and_mistakes_of_an_export(model, tmp_path):
    export_vae(model, tmp_path / "served")
    description = json.loads((tmp_path / "served" / "mdn.json").read_text())
    assert set(description["signatures"]) == {"encode", "decode", "sample", "elbo", "log_prob"}
    assert description["signatures"]["encode"]["outputs"]["mean"]["shape"] == [None, 1]
    with pytest.raises(mdn.MDNError, match="exists"):
        export_vae(model, tmp_path / "served")
    with pytest.raises(mdn.MDNError, match="give 6, one for each pixel"):
        export_vae(model, tmp_path / "other", targets=["a"])


# ---------------------------------------------------------------------- runs


def run(directory, *overrides):
    return train(compose_config([f"output_dir={directory}", *TINY, *overrides]))


# On one worker, which trains once.
one_worker = pytest.mark.xdist_group("vae-run")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "run"
    return directory, run(directory)


@one_worker
def test_run_directory(finished):
    directory, metrics = finished
    assert json.loads((directory / "metrics.json").read_text()) == metrics
    assert all(isinstance(v, int | float) and np.isfinite(v) for v in metrics.values())
    assert metrics.keys() >= {
        *("test/elbo", "test/elbo_se", "test/nll", "test/nll_se", "test/n", "baseline/nll"),
        *("train/seconds", "train/rows_per_second", "model/parameters"),
    }
    assert metrics["test/n"] == 359
    assert metrics["baseline/nll"] == pytest.approx(25.25, abs=0.5)
    plots = {path.stem for path in (directory / "plots").iterdir()}
    assert plots == {"samples", "reconstructions", "latent", "history"}
    assert (directory / "saved_model" / "mdn.json").is_file()
    assert (directory / "provenance.json").is_file()
    model = mdn.load(directory / "model.keras")
    again = evaluate_vae(model, Digits().load())
    assert again["test/elbo"] == pytest.approx(metrics["test/elbo"], rel=1e-5)


@one_worker
def test_dashboard(finished):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    directory, _ = finished
    tags = {}
    for split in ("train", "validation"):
        (path,) = (directory / "tensorboard" / split).glob("events.out.tfevents.*")
        events = list(EventFileLoader(str(path)).Load())
        tags[split] = {value.tag for event in events for value in event.summary.value}
        tags[split] |= {"graph"} if any(event.graph_def for event in events) else set()
    assert tags["validation"] == {"loss", "elbo", "reconstruction", "kl"}
    assert tags["train"] >= tags["validation"] | {
        *("gradient_norm", "learning_rate", "samples", "reconstructions", "latent", "config"),
        *("components/effective", "components/weight_2", "components/scales"),
    }


def test_dashboard_without_data(tmp_path):
    model = make()
    model.compile("adam", run_eagerly=True)
    model.fit(images_of(32), epochs=1, verbose=0, callbacks=[TensorBoard(tmp_path)])
    assert list(tmp_path.glob("train/*"))


@pytest.mark.parametrize(
    "options",
    [
        ["model.prior=normal", "trainer.schedule=plateau", "trainer.precision=mixed_bfloat16"],
        [
            *("model.latent_size=3", "model.dropout=0.1", "model.kl_warmup=5"),
            *("model.activation=tanh", "backbone.dropout=0.1", "callbacks.tensorboard=null"),
        ],
    ],
    ids=" ".join,
)
def test_every_other_option_trains(options, tmp_path, bare_runs, eager_steps):
    assert np.isfinite(run(tmp_path / "run", *options)["test/elbo"])


@one_worker
def test_init_from(finished, tmp_path, bare_runs, eager_steps):
    directory, metrics = finished
    slow = ("optimizer.learning_rate=1e-12", "trainer.epochs=1")
    again = run(tmp_path / "again", f"init_from={directory}", *slow)
    assert again["test/elbo"] == pytest.approx(metrics["test/elbo"], abs=1e-3)
    with pytest.raises(mdn.MDNError, match=r"another model \(components: 3, not 5\)"):
        run(tmp_path / "k", f"init_from={directory}", "k=5")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.prior=foo"], "model.prior=foo: must be 'mixture' or 'normal'"),
        (["model.likelihood=normal"], "model.likelihood=normal: must be 'bernoulli'"),
        (["model.latent_size=0"], "model.latent_size=0: must be greater than 0"),
        (["k=0"], "k=0: must be greater than 0"),
        (["callbacks.early_stopping.monitor=val_nll"], "monitor loss or val_loss"),
        (["experiment=vae_mixture", "comparison.seeds=1"], "comparison.seeds=1: must be greater"),
    ],
)
def test_config_mistakes(overrides, message):
    with pytest.raises(mdn.MDNError, match=message) as error:
        compose_config([*TINY, *overrides])
    assert "\n" not in str(error.value)


def test_comparison_needs_a_vae():
    with pytest.raises(mdn.MDNError, match="needs model=vae"):
        compose_config(["experiment=vae_mixture", "model=mixture"])


def test_other_data_are_refused(tmp_path):
    small = ("data=sinusoid", "data.rows=100", "data.validation_rows=40", "data.test_rows=40")
    with pytest.raises(mdn.MDNError, match="a VAE learns from images of zeros and ones") as error:
        run(tmp_path / "run", *small, "trainer.batch_size=32")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_killed_run_ends_bit_for_bit_as_the_uninterrupted_one(tmp_path):
    options = (
        *TINY,
        *("trainer.compiled=true", "trainer.steps_per_execution=null"),
        "trainer.deterministic=true",
        "trainer.epochs=12",
        "model.dropout=0.2",
        "model.kl_warmup=40",
        "callbacks.tensorboard.image_every=0",
    )

    def start(name):
        words = ["train.py", *options, f"output_dir={tmp_path / name}"]
        return Fork(bare_main, words, log=tmp_path / name)

    killed, whole = start("killed"), start("whole")
    checkpoints = tmp_path / "killed" / "checkpoints"
    while killed.poll() is None and not (
        any(path.stem >= "epoch-00003" for path in checkpoints.glob("epoch-*.npz"))
    ):
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, killed.communicate()
    assert whole.wait() == 0, whole.communicate()
    resumed = start("killed")
    out, err = resumed.communicate()
    assert resumed.returncode == 0, err
    assert "going on from" in out
    one, two = (mdn.load(tmp_path / name / "model.keras") for name in ("whole", "killed"))
    for a, b in zip(one.get_weights(), two.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    one, two = (
        json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "killed")
    )
    assert one["test/elbo"] == two["test/elbo"]


@pytest.mark.slow
def test_compared_fits_are_those_of_runs(tmp_path, bare_runs):
    options = ("trainer.epochs=10", "callbacks.early_stopping=null")
    alone = run(tmp_path / "run", *options)
    config = compose_config([*TINY, *options])
    (elbo,) = Fit(config, [Digits().load()], [0], latent_size=2, prior="mixture").run()
    assert elbo == pytest.approx(alone["test/elbo"], abs=0.1)


@pytest.mark.slow
def test_mixture_prior_beats_the_standard_normal(tmp_path):
    words = ["train.py", "experiment=vae_mixture", f"output_dir={tmp_path}/run"]
    process = Fork(bare_main, words, log=tmp_path / "run")
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert err == ""
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["comparison/seeds"] == 5
    for size in (2, 8):
        assert metrics[f"comparison/p_value_{size}"] < 0.05
        assert metrics[f"comparison/elbo_gain_{size}"] > 0.1
    assert metrics["test/elbo"] > -metrics["baseline/nll"] + 4.0
    assert metrics["test/elbo"] == pytest.approx(metrics["comparison/elbo_mixture_2"], abs=1.0)
