"""Densities of transformed targets: Jacobian, domain, moments, saving, training."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from scipy import stats
from scipy.integrate import trapezoid
from tensorflow_probability import bijectors as tfb
from tensorflow_probability import distributions as tfd
from test_density import random_mixture

import mdn
from mdn.density.transformed import Transformed, draw_from
from mdn.density.transforms import BoxCox, PerTarget, describe, fit_power, make_bijector
from mdn.losses import Energy

TRANSFORMS = {
    "log": "log",
    "logit": {"name": "logit", "low": -2.0, "high": 5.0},
    "box_cox": {"name": "box_cox", "power": 0.5},
    "softplus": tfb.Softplus(hinge_softness=0.7),
}


def positive_rows(n=400, seed=0):
    """Return x [N, 2], and y [N, 1]: log-normal given x, in units of their own."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=[n, 2])
    return x, 50.0 * np.exp(0.8 * x[:, :1] + 0.3 * rng.normal(size=[n, 1]))


def test_log_prob_is_scipys_lognormal():
    density = Transformed(
        mdn.GaussianMixture(np.zeros([1]), np.full([1, 1], 0.3), np.full([1, 1, 1], 0.5)),
        tfb.Exp(),
    )
    y = np.array([0.1, 1.0, 7.0])
    truth = stats.lognorm(s=0.5, scale=np.exp(0.3))
    np.testing.assert_allclose(density.log_prob(y[:, None]), truth.logpdf(y))
    np.testing.assert_allclose(density.mean(), [truth.mean()])
    np.testing.assert_allclose(density.stddev(), [truth.std()])
    assert (density.log_prob(np.array([[-1.0], [0.0]])).numpy() == -np.inf).all()
    assert density.log_prob(np.array([np.nan])).numpy() == 0.0


@pytest.mark.parametrize("name", TRANSFORMS)
def test_density_integrates_to_one_in_the_units_of_y(name):
    head = mdn.heads.Mixture(1, 2, target_transform=TRANSFORMS[name], dtype="float64")
    rng = np.random.default_rng(1)
    y = {"logit": rng.uniform(-1.9, 4.9, size=[300, 1])}.get(name, rng.gamma(2.0, size=[300, 1]))
    head.adapt(y)
    density = head(tf.zeros([1, 4], tf.float64))
    assert isinstance(density, tfd.TransformedDistribution)
    u = np.linspace(-60.0, 60.0, 400_001)
    grid = np.unique(head._bijector.forward(tf.constant(u)).numpy())
    grid = grid[np.isfinite(grid)]
    if name == "logit":
        grid = grid[(grid > -2.0) & (grid < 5.0)]
    p = np.exp(density.log_prob(grid[grid < 1e6][:, None, None]).numpy()[:, 0])
    assert trapezoid(p, grid[grid < 1e6]) == pytest.approx(1.0, abs=1e-3)
    mean = trapezoid(p * grid[grid < 1e6], grid[grid < 1e6])
    np.testing.assert_allclose(density.mean()[0, 0], mean, rtol=2e-3)


@pytest.mark.parametrize("power", [0.5, 0.0, -0.7, 2.0])
def test_box_cox_is_scipys_inside_and_covers_the_whole_line(power):
    join = 0.4 if power >= 0.0 else 3.0
    bijector = BoxCox(tf.constant(power, tf.float64), tf.constant(join, tf.float64))
    y = np.linspace(0.01, 9.0, 500)
    u = bijector.inverse(tf.constant(y)).numpy()
    inside = y >= join if power >= 0.0 else y <= join
    np.testing.assert_allclose(u[inside], stats.boxcox(y[inside] / join, power), rtol=1e-12)
    assert (np.diff(u) > 0.0).all()
    np.testing.assert_allclose(bijector.forward(tf.constant(u)), y, rtol=1e-10)
    slope = bijector.inverse_log_det_jacobian(tf.constant(y), event_ndims=0).numpy()
    h = 1e-6
    up, down = (bijector.inverse(tf.constant(y + d)).numpy() for d in (h, -h))
    np.testing.assert_allclose(slope, np.log((up - down) / (2 * h)), atol=1e-5)
    far = bijector.forward(tf.constant([-30.0, 30.0], tf.float64)).numpy()
    assert ((far > 0.0) & np.isfinite(far)).all()


def test_the_power_is_that_of_scipy():
    y = np.random.default_rng(0).gamma(3.0, size=500)
    assert fit_power(y) == pytest.approx(stats.boxcox(y)[1], abs=1e-3)
    head = mdn.heads.Diag(2, target_transform=["box_cox", None])
    head.adapt(np.stack([y, y - 3.0], axis=1))
    assert head.box_cox_power.numpy()[0] == pytest.approx(stats.boxcox(y)[1], abs=1e-3)


@pytest.mark.parametrize("offset", [2000.0, 1e5])
def test_box_cox_keeps_the_digits_of_targets_far_from_zero(offset):
    y = offset * (1.0 + 0.005 * np.random.default_rng(1).gamma(2.0, size=[2000, 1]))
    head = mdn.heads.Mixture(1, 2, target_transform="box_cox")
    head.adapt(y)
    assert head.box_cox_power.numpy()[0] == pytest.approx(-2.0, abs=0.01)  # the end of its range
    u = head.bijector.inverse(tf.constant(y, tf.float32))
    back = head.bijector.forward(u).numpy()
    assert np.abs(back - y).max() < 1e-3 * y.std()
    plain = mdn.heads.Mixture(1, 2)
    plain.adapt(y)
    start = [
        -np.mean(h(tf.zeros([1, 4])).log_prob(y.astype(np.float32)).numpy()) for h in (head, plain)
    ]
    assert start[0] < start[1] + 0.05  # of rows that are skewed it is the better one


def test_missing_targets_are_marginalised_and_each_target_has_its_own():
    rng = np.random.default_rng(2)
    base = random_mixture(rng, [20], 3, 2)
    density = Transformed(base, PerTarget([tfb.Exp(), None]))
    u = rng.normal(size=[20, 2])
    y = np.stack([np.exp(u[:, 0]), u[:, 1]], axis=1)
    np.testing.assert_allclose(density.log_prob(y), base.log_prob(u) - u[:, 0])
    u[:10, 0], y[:10, 0], u[10:, 1], y[10:, 1] = np.nan, np.nan, np.nan, np.nan
    slope = np.where(np.isnan(u[:, 0]), 0.0, u[:, 0])
    np.testing.assert_allclose(density.log_prob(y), base.log_prob(u) - slope)
    draws = draw_from(density, tf.constant(20_000), tf.constant([1, 2])).numpy()
    assert (draws[..., 0] > 0.0).all()
    error = 5.0 * draws.std(axis=0) / np.sqrt(len(draws))
    assert (np.abs(draws.mean(axis=0) - density.mean()) < error).all()
    np.testing.assert_allclose(tf.convert_to_tensor(density), density.mean())


def test_gradients_stay_finite_where_a_target_is_missing_or_outside():
    base = random_mixture(np.random.default_rng(3), [3], 2, 2)
    loc = tf.Variable(base.loc)
    y = np.array([[1.0, np.nan], [-1.0, 2.0], [0.5, 0.5]])
    with tf.GradientTape() as tape:
        density = Transformed(mdn.GaussianMixture(base.logits, loc, base.scale_tril), tfb.Exp())
        total = tf.reduce_sum(density.log_prob(y)[::2])
    assert np.isfinite(tape.gradient(total, loc)).all()


@pytest.mark.parametrize("kind", ["Mixture", "Diag", "MixturePrecision", "MixtureLowRank"])
@pytest.mark.parametrize("transform", ["log", ["box_cox", None]])
def test_the_training_path_equals_the_density(kind, transform):
    rng = np.random.default_rng(4)
    head = getattr(mdn.heads, kind)(2, target_transform=transform, dtype="float64")
    y = rng.gamma(2.0, size=[50, 2])
    head.adapt(y)
    hidden = tf.constant(rng.normal(size=[50, 3]))
    density = head(hidden)
    np.testing.assert_allclose(head.log_prob(hidden, tf.constant(y)), density.log_prob(y))
    y[3, 0] = -1.0  # a row of a stream that nobody looked at before
    outside = head.log_prob(hidden, tf.constant(y)).numpy()
    np.testing.assert_allclose(outside, density.log_prob(y))
    assert list(np.flatnonzero(outside == -np.inf)) == [3]
    params = tf.constant(rng.normal(size=[5, head.params_size]))
    again = head.parameters(head.distribution(params))
    np.testing.assert_allclose(again, params, rtol=1e-7, atol=1e-7)


def test_training_saving_and_exporting(tmp_path):
    x, y = positive_rows()
    y = np.concatenate([y, x[:, :1]], axis=1)
    y[::7, 0], y[3] = np.nan, np.nan
    tf_keras.utils.set_random_seed(0)
    head = mdn.heads.Mixture(2, 2, target_transform=["box_cox", tfb.Shift(3.0)])
    model = mdn.MDN(head, mdn.backbones.MLP([16]))
    model.adapt(x, y)
    model.compile(tf_keras.optimizers.Adam(0.01))
    history = model.fit(x, y, batch_size=64, epochs=15, verbose=0).history
    assert history["loss"][-1] < history["loss"][0] - 0.3
    model.save(tmp_path / "model.keras")
    again = mdn.load(tmp_path / "model.keras")
    np.testing.assert_array_equal(again.predict(x), model.predict(x))
    np.testing.assert_array_equal(again.log_prob(x, y), model.log_prob(x, y))
    density = model.predict_distribution(x)
    np.testing.assert_allclose(
        density.log_prob(y.astype(np.float32)), model.log_prob(x, y), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(density.mean(), model.predict(x), rtol=1e-5)

    from mdn.export import export_saved_model

    export_saved_model(model, tmp_path / "saved_model")
    signatures = tf.saved_model.load(tmp_path / "saved_model").signatures
    x32, y32 = tf.constant(x, tf.float32), tf.constant(y, tf.float32)
    answers = signatures["serving_default"](x=x32)
    assert set(answers) == {"mean", "stddev"}  # in the units of y there is no mixture to state
    np.testing.assert_allclose(answers["mean"], model.predict(x), rtol=1e-5, atol=1e-6)
    log_prob = signatures["log_prob"](x=x32, y=y32)["log_prob"]
    np.testing.assert_allclose(log_prob, model.log_prob(x, y), rtol=1e-4, atol=1e-5)
    draws = signatures["sample"](x=x32, n=tf.constant(50), seed=tf.constant([1, 2]))["sample"]
    assert (draws.numpy()[..., 0] > 0.0).all()


def test_a_target_outside_of_the_domain_is_named():
    x, y = positive_rows()
    y[5] = -1.5
    model = mdn.MDN(mdn.heads.Mixture(1, 2, target_transform="log"))
    with pytest.raises(
        mdn.MDNError, match=r"target 0 is -1.5 in row 5: .*=log it must be positive"
    ):
        model.adapt(x, y)
    head = mdn.heads.Diag(1, target_transform={"name": "logit", "high": 100.0})
    with pytest.raises(mdn.MDNError, match=r"'share' is .* strictly between low=0.0 and high=100"):
        head.check_domain(np.array([[50.0], [100.0]]), ["share"])
    y[5] = 1.0
    model.adapt(x, y)
    model.compile()
    y[7] = 0.0
    with pytest.raises(mdn.MDNError, match="target 0 is 0 in row 7"):
        model.fit(x, y, verbose=0)


@tf_keras.saving.register_keras_serializable(package="tests")
class Sinh(tfb.Bijector):
    """A bijector of a user's own."""

    def __init__(self, shift=0.0, name="Sinh"):
        parameters = dict(locals())
        self.shift = shift
        super().__init__(forward_min_event_ndims=0, parameters=parameters, name=name)

    def _forward(self, x):
        return tf.math.sinh(x) + self.shift

    def get_config(self):
        return {"shift": self.shift}


@pytest.mark.parametrize(
    "bijector",
    [
        tfb.Exp(),
        tfb.Softplus(hinge_softness=0.5),
        tfb.Chain([tfb.Exp(), tfb.Scale(2.0)]),
        Sinh(2.0),
    ],
)
def test_a_bijector_survives_as_plain_data(bijector):
    import json

    plain = json.loads(json.dumps(describe(bijector, 1)))
    again = make_bijector(plain, "float32")
    values = tf.linspace(-1.0, 1.0, 7)
    np.testing.assert_allclose(again.forward(values), bijector.forward(values))


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        ("logg", "target_transform=logg is unknown: choose one of log, logit, box_cox"),
        ({"name": "log", "low": 1.0}, "target_transform=log: low is no option of it; it has none"),
        ({"name": "logit", "low": 1.0}, "low=1.0 must be below high=1.0"),
        (["log"], "target_transform has 1 entries for 2 targets"),
        ("FillTriangular", "FillTriangular: must map each number by itself, and increase"),
        (tfb.Scale(-1.0), "Scale: must map each number by itself, and increase"),
        (3, "target_transform=3 is unknown"),
    ],
)
def test_a_wrong_transform_is_named(transform, message):
    with pytest.raises(mdn.MDNError, match=message):
        mdn.heads.Mixture(2, 3, target_transform=transform)


def test_what_only_a_mixture_answers_is_refused():
    density = Transformed(random_mixture(np.random.default_rng(0), [2], 2, 1), tfb.Exp())
    with pytest.raises(mdn.MDNError, match=r"ask density\.distribution"):
        density.mixture_parameters()


@pytest.mark.parametrize("transform", ["log", ["log", {"name": "logit", "low": -9, "high": 9}]])
def test_margins_are_those_of_the_density(transform):
    from mdn.margins import Margins

    rng = np.random.default_rng(5)
    head = mdn.heads.Mixture(2, 2, target_transform=transform)
    y = np.stack([rng.gamma(2.0, size=300), rng.uniform(0.1, 8.0, size=300)], axis=1)
    head.adapt(y)
    density = head(tf.zeros([3, 4]))
    margins = Margins.of(density)
    np.testing.assert_allclose(margins.mean(), density.mean(), rtol=1e-4)
    draws = draw_from(density, tf.constant(40_000), tf.constant([1, 2])).numpy()[:, 0]
    for p in (0.1, 0.5, 0.9):
        quantile = margins.quantile(p)[0]
        np.testing.assert_allclose(margins.cdf(quantile[None])[0], p, atol=1e-5)
        error = 5.0 * np.sqrt(p * (1.0 - p) / len(draws))
        np.testing.assert_allclose((draws <= quantile).mean(axis=0), p, atol=error)
    outside = margins.cdf(np.array([[-10.0, np.nan]]))[0]
    assert outside[0] == 0.0
    assert np.isnan(outside[1])
    slope = margins.units.slope(np.array([[2.0, 3.0]]))
    assert slope[0, 0] == pytest.approx(0.5)
    one = margins.first()
    np.testing.assert_allclose(one.quantile(0.3), margins.quantile(0.3)[..., :1])


def test_tfp_has_nothing_to_warn_of(caplog):
    head = mdn.heads.Diag(2, target_transform="log")
    density = head.distribution(tf.zeros([3, head.params_size]))
    assert set(density.parameter_properties()) == {"distribution", "bijector"}
    assert density.batch_shape == [3]
    assert not caplog.records


def test_ranks_regions_and_components_are_those_of_the_transformed_targets():
    rng = np.random.default_rng(5)
    base = random_mixture(rng, [4], 3, 2)
    density = Transformed(base, tfb.Exp())
    u = rng.normal(size=[4, 2])
    y = np.exp(u)
    np.testing.assert_allclose(density.pit(y), base.pit(u), rtol=1e-9)
    np.testing.assert_allclose(density.responsibilities(y), base.responsibilities(u), rtol=1e-9)
    y[0, 1], y[1, 0] = -1.0, np.nan  # outside of the domain, and missing
    np.testing.assert_array_equal(np.isnan(density.pit(y)), [[0, 1], [1, 0], [0, 0], [0, 0]])
    assert np.isnan(density.responsibilities(y)).any(axis=-1).tolist() == [True] + 3 * [False]
    n = 20_000
    inside = density.log_prob(density.sample(n, seed=2)) >= density.hdr(0.8, n=n).log_threshold
    error = np.sqrt(2.0 * 0.8 * 0.2 / n)  # of the threshold, and of this check
    assert np.abs(inside.numpy().mean(0) - 0.8).max() < 5.0 * error
    score = density.energy_score(np.exp(u), 2000, seed=1).numpy()
    draws = np.exp(base.sample(2000, seed=3).numpy())
    to_y = np.linalg.norm(draws - np.exp(u), axis=-1)
    between = np.linalg.norm(draws - np.roll(draws, 1, axis=0), axis=-1)
    spread = np.sqrt((to_y.var(0) + 0.25 * 3.0 * between.var(0)) * 2.0 / 2000)
    assert (np.abs(score - to_y.mean(0) + 0.5 * between.mean(0)) < 6.0 * spread).all()


def test_covariance_is_that_of_the_lognormal_and_of_quadrature():
    base = random_mixture(np.random.default_rng(1), [3], 2, 3)
    weight = tf.nn.softmax(base.logits).numpy()[..., None, None]
    spread = base.components_distribution.covariance().numpy()
    loc = base.loc.numpy()
    variance = np.einsum("...ii->...i", spread)
    mean = np.exp(loc + 0.5 * variance)
    second = mean[..., :, None] * mean[..., None, :] * np.exp(spread)  # E[y_i y_j]
    whole = (weight[..., 0] * mean).sum(axis=1)
    expected = (weight * second).sum(axis=1) - whole[:, :, None] * whole[:, None, :]
    closed = Transformed(base, tfb.Exp())
    series = Transformed(base, PerTarget([tfb.Exp()] * 3))
    for density in (closed, series):
        np.testing.assert_allclose(density.covariance(), expected, rtol=1e-8)
        np.testing.assert_allclose(density.variance(), np.einsum("bii->bi", expected), rtol=1e-8)
    raw = [
        (weight[..., 0] * np.exp(n * loc + 0.5 * n**2 * variance)).sum(axis=1)
        for n in (1, 2, 3, 4)
    ]
    stddev = np.sqrt(raw[1] - raw[0] ** 2)
    third = raw[2] - 3.0 * raw[0] * raw[1] + 2.0 * raw[0] ** 3
    fourth = raw[3] - 4.0 * raw[0] * raw[2] + 6.0 * raw[0] ** 2 * raw[1] - 3.0 * raw[0] ** 4
    small = variance.max(axis=1) < 1.0  # of wider ones the fourth moment is beyond the nodes
    assert small.any()
    np.testing.assert_allclose(closed.skewness()[small], (third / stddev**3)[small], rtol=1e-6)
    kurtosis = (fourth / stddev**4 - 3.0)[small]
    np.testing.assert_allclose(closed.kurtosis()[small], kurtosis, rtol=1e-5)
    mixed = Transformed(base, PerTarget([tfb.Softplus(), None, tfb.Exp()]))
    nodes, rule = np.polynomial.hermite_e.hermegauss(80)
    rule = np.outer(rule, rule).ravel() / rule.sum() ** 2
    z = np.stack(np.meshgrid(nodes, nodes, indexing="ij"), axis=-1).reshape(-1, 2)
    tril = base.scale_tril.numpy()[:, :, :2, :2]
    u = loc[:, :, None, :2] + np.einsum("bkij,sj->bksi", tril, z)
    y = np.stack([np.logaddexp(0.0, u[..., 0]), u[..., 1]], axis=-1)
    rule = tf.nn.softmax(base.logits).numpy()[..., None] * rule
    away = y - np.einsum("bks,bksi->bi", rule, y)[:, None, None]
    covariance = np.einsum("bks,bksi,bksj->bij", rule, away, away)
    np.testing.assert_allclose(mixed.covariance()[:, :2, :2], covariance, rtol=1e-6, atol=1e-9)
    correlation = mixed.correlation().numpy()
    assert (np.abs(correlation) <= 1.0).all()
    np.testing.assert_array_equal(np.einsum("bii->bi", correlation), 1.0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_crps_is_its_integral_in_the_units_of_y(dtype):
    base = mdn.GaussianMixture(
        np.log(np.array([0.3, 0.6, 0.1], dtype)),
        np.array([[-3.0], [0.5], [0.52]], dtype),
        np.array([[[0.4]], [[0.3]], [[0.005]]], dtype),
    )
    density = Transformed(base, tfb.Exp())
    y = np.array([-2.0, 0.0, 0.05, 1.0, 1.7, 900.0])
    grid = np.concatenate([np.linspace(-4.0, 0.0, 3), np.exp(np.linspace(-12.0, 8.0, 200_001)), y])
    grid = np.sort(np.concatenate([grid, y]))
    cdf = np.zeros([len(grid)])
    for w, m, s in ((0.3, -3.0, 0.4), (0.6, 0.5, 0.3), (0.1, 0.52, 0.005)):
        cdf += w * stats.lognorm.cdf(grid, s, scale=np.exp(m))
    expected = []
    for at in y:
        after = np.arange(len(grid)) > np.searchsorted(grid, at)
        expected.append(trapezoid((cdf - after) ** 2, grid))
    variable = tf.constant(y[:, None], dtype)
    program = tf.function(lambda y: density.crps(y), jit_compile=True)
    tolerance = 1e-7 if dtype == np.float64 else 1e-5
    np.testing.assert_allclose(program(variable)[:, 0], expected, tolerance, tolerance)
    assert np.isnan(density.crps(np.array([[np.nan]], dtype)))
    loc = tf.constant(base.loc)
    with tf.GradientTape() as tape:
        tape.watch([variable, loc])
        score = Transformed(mdn.GaussianMixture(base.logits, loc, base.scale_tril), tfb.Exp())
        total = tf.reduce_sum(score.crps(variable))
    by_y, by_loc = tape.gradient(total, [variable, loc])
    np.testing.assert_allclose(by_y, 2.0 * density.cdf(variable) - 1.0, rtol=1e-6)

    def at(h):
        moved = base.loc + np.array([[0.0], [h], [0.0]], dtype)
        moved = Transformed(mdn.GaussianMixture(base.logits, moved, base.scale_tril), tfb.Exp())
        return float(tf.reduce_sum(moved.crps(variable)))

    if dtype == np.float64:
        assert float(by_loc[1, 0]) == pytest.approx((at(1e-5) - at(-1e-5)) / 2e-5, rel=1e-6)


def test_energy_loss_of_transformed_targets_is_that_of_draws_with_its_gradient():
    base = random_mixture(np.random.default_rng(2), [2], 2, 2)
    density = Transformed(base, PerTarget([tfb.Exp(), None]))
    y = np.array([[1.0, 0.3], [np.nan, -1.0]])
    scores = [Energy(400, seed)(tf.constant(y), density).numpy() for seed in range(20)]
    found, error = np.mean(scores, axis=0), np.std(scores, axis=0) / np.sqrt(20)
    exact = np.mean([density.energy_score(y, 20_000, seed=seed) for seed in range(5)], axis=0)
    spread = np.std([density.energy_score(y, 20_000, seed=seed) for seed in range(5)], axis=0)
    assert (np.abs(found - exact) < 5.0 * np.hypot(error, spread)).all()
    logits = tf.constant(base.logits)
    with tf.GradientTape() as tape:
        tape.watch(logits)
        moved = mdn.GaussianMixture(logits, base.loc, base.scale_tril)
        score = Energy(64)(tf.constant(y), Transformed(moved, density.bijector))
    assert (np.abs(tape.gradient(score, logits)) > 1e-4).all()
    one = density.marginal(0)
    np.testing.assert_allclose(
        Energy(3)(tf.constant(y[:1, :1]), one[:1]), one[:1].crps(y[:1, :1])[:, 0]
    )


@pytest.mark.parametrize("transform", ["log", ["box_cox", None], tfb.Softplus()])
def test_margins_and_conditionals_are_transformed_again(transform):
    head = mdn.heads.Mixture(2, 2, target_transform=transform, dtype="float64")
    y = np.random.default_rng(3).gamma(2.0, size=[40, 2])
    head.adapt(y)
    density = head.distribution(
        tf.constant(np.random.default_rng(4).normal(size=[40, head.params_size]))
    )
    joint = density.log_prob(y).numpy()
    for first in (0, 1):
        margin, rest = density.marginal(first), density.condition({first: y[:, first]})
        parts = margin.log_prob(y[:, [first]]) + rest.log_prob(y[:, [1 - first]])
        np.testing.assert_allclose(parts, joint, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(density.marginal([1, 0]).log_prob(y[:, ::-1]), joint, rtol=1e-9)
    np.testing.assert_allclose(density.reduce(2).mixture.log_prob(y), joint, rtol=1e-9)
    np.testing.assert_allclose(density.prune(0.0).log_prob(y), joint, rtol=1e-9)
    entropy = density.entropy_estimate(4000, seed=1)
    draws = -density.log_prob(density.sample(4000, seed=2)).numpy()
    error = np.hypot(draws.std(axis=0) / np.sqrt(4000), entropy.standard_error)
    assert (np.abs(entropy.estimate - draws.mean(axis=0)) < 5.0 * error).all()


def test_slices_and_copies_keep_the_transform():
    base = random_mixture(np.random.default_rng(1), [4], 2, 2)
    density = Transformed(base, tfb.Exp())
    y = np.exp(np.random.default_rng(2).normal(size=[4, 2]))
    whole = density.log_prob(y).numpy()
    np.testing.assert_allclose(density[1:3].log_prob(y[1:3]), whole[1:3])
    np.testing.assert_allclose(density[..., tf.newaxis].log_prob(y[:, None])[:, 0], whole)
    np.testing.assert_allclose(density.copy().log_prob(y), whole)
    other = density.copy(distribution=base[:2])
    np.testing.assert_allclose(other.log_prob(y[:2]), whole[:2])


def test_mixtures_of_transformed_densities_keep_the_transform():
    one, two = (random_mixture(np.random.default_rng(seed), [3], 2, 2) for seed in (1, 2))
    u = np.random.default_rng(3).normal(size=[3, 2])
    for a, b in ((tfb.Exp(), tfb.Exp()), [PerTarget([tfb.Exp(), None])] * 2):
        mixture = mdn.mixture_of([Transformed(one, a), Transformed(two, b)], weights=[1.0, 3.0])
        assert isinstance(mixture, Transformed)
        expected = mdn.mixture_of([one, two], weights=[1.0, 3.0]).log_prob(u)
        np.testing.assert_allclose(mixture.distribution.log_prob(u), expected)
    with pytest.raises(mdn.MDNError, match="different target transforms have no mixture"):
        mdn.mixture_of([Transformed(one, tfb.Exp()), Transformed(two, tfb.Softplus())])
    with pytest.raises(mdn.MDNError, match="different target transforms have no mixture"):
        mdn.mixture_of([Transformed(one, tfb.Exp()), two])
