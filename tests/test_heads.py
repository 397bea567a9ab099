"""The heads: parameter layout, round trips, starting values, units, Keras behaviour."""

import inspect
import math

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from scipy.integrate import trapezoid
from scipy.special import logsumexp
from scipy.stats import multivariate_normal, norm

import mdn
from mdn import heads
from mdn.density.positivity import precision_diag, precision_diag_inverse
from mdn.heads import (
    Diag,
    Head,
    Mixture,
    MixtureDiag,
    MixtureHead,
    MixtureLowRank,
    MixturePrecision,
    TriL,
)

KINDS = {
    Diag: (mdn.MultivariateNormalDiag, lambda k, d: 2 * d),
    TriL: (mdn.MultivariateNormalTriL, lambda k, d: d + d * (d + 1) // 2),
    Mixture: (mdn.GaussianMixture, lambda k, d: k * (1 + d + d * (d + 1) // 2)),
    MixtureDiag: (mdn.GaussianMixture, lambda k, d: k * (1 + 2 * d)),
    MixturePrecision: (mdn.GaussianMixture, lambda k, d: k * (1 + d + d * (d + 1) // 2)),
    MixtureLowRank: (mdn.GaussianMixture, lambda k, d: k * (1 + 2 * d + 2 * d)),
}


def all_heads():
    return {
        value
        for value in vars(heads).values()
        if inspect.isclass(value) and issubclass(value, Head) and value not in (Head, MixtureHead)
    }


def make(kind, d, k, **kwargs):
    return kind(d, **({"components": k} if issubclass(kind, MixtureHead) else {}), **kwargs)


def multimodal(n, d, seed=0):
    """Return y [N, D] in units of their own: two clusters, offset and stretched."""
    rng = np.random.default_rng(seed)
    y = rng.normal(size=[n, d]) + 4.0 * rng.integers(0, 2, size=[n, 1])
    return 100.0 + 25.0 * y


def test_every_head_has_a_case():
    assert set(KINDS) == all_heads()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("d", "k", "positivity"),
    [
        *((1, 1, "softplus"), (1, 4, "softplus"), (2, 3, "softplus"), (5, 2, "softplus")),
        *((1, 4, "exp"), (5, 2, "elu")),
    ],
)
def test_parameters_round_trip(kind, d, k, positivity):
    head = make(kind, d, k, positivity=positivity, dtype="float64")
    head.adapt(multimodal(200, d))
    assert head.params_size == KINDS[kind][1](k, d)
    for leading in [(), (5,), (2, 3)]:
        params = np.random.default_rng(1).normal(size=[*leading, head.params_size])
        density = head.distribution(tf.constant(params))
        assert isinstance(density, KINDS[kind][0])
        assert density.batch_shape == leading
        assert density.event_shape == [d]
        np.testing.assert_allclose(head.parameters(density), params, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("d", "k"), [(1, 3), (2, 3), (4, 2)])
def test_each_slice_of_the_parameters_goes_where_the_layout_says(kind, d, k):
    # An independent reading of the parameter axis, with NumPy and scipy alone.
    head = make(kind, d, k, dtype="float64")
    y_loc, y_scale = np.arange(1.0, d + 1), np.arange(2.0, d + 2)
    head.y_loc.assign(y_loc)
    head.y_scale.assign(y_scale)
    rng = np.random.default_rng(2)
    params, y = rng.normal(size=[6, head.params_size]), rng.normal(size=[6, d]) * 3.0
    log_prob = head.distribution(tf.constant(params)).log_prob(y).numpy()
    k = head.components
    for row in range(6):
        rest = params[row]
        logits, rest = (
            (rest[:k], rest[k:]) if isinstance(head, MixtureHead) else (np.zeros(1), rest)
        )
        loc, rest = rest[: k * d].reshape(k, d), rest[k * d :]
        if kind is MixtureLowRank:
            rest, factor = rest[: k * d], rest[k * d :].reshape(k, d, 2)
        raw = rest.reshape(k, -1)
        terms = []
        for c in range(k):
            if kind in (Diag, MixtureDiag, MixtureLowRank):
                scale = np.diag(np.log1p(np.exp(raw[c])) + 1e-3)
            else:
                import tensorflow_probability as tfp

                shift = tf.constant(1e-3, tf.float64)
                scale = tfp.bijectors.FillScaleTriL(diag_shift=shift).forward(raw[c]).numpy()
            if kind is MixturePrecision:
                scale = np.linalg.inv(scale).T
            if kind is MixtureLowRank:
                scale = np.concatenate([scale, factor[c]], axis=1)
            scale = y_scale[:, None] * scale
            component = multivariate_normal(y_loc + y_scale * loc[c], scale @ scale.T)
            terms.append(logits[c] - logsumexp(logits) + component.logpdf(y[row]))
        assert log_prob[row] == pytest.approx(logsumexp(terms), rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_density_integrates_to_one_in_the_units_of_y(kind):
    head = make(kind, 1, 3)
    y = multimodal(500, 1)
    head.adapt(y)
    density = head(tf.ones([1, 4]))
    grid = np.linspace(y.mean() - 15 * y.std(), y.mean() + 15 * y.std(), 20_001)
    p = np.exp(density.log_prob(grid[:, None, None].astype(np.float32)).numpy()[:, 0])
    assert trapezoid(p, grid) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_config_rebuilds_the_head(kind):
    head = make(kind, 2, 4, positivity="elu", min_scale=0.01, kernel_scale=0.5)
    again = tf_keras.saving.deserialize_keras_object(tf_keras.saving.serialize_keras_object(head))
    assert type(again) is kind
    assert again.get_config() == head.get_config()


@pytest.mark.parametrize("kind", KINDS)
def test_heads_work_in_a_sequential_model(kind):
    model = tf_keras.Sequential([tf_keras.layers.Dense(8), make(kind, 2, 3)])
    density = model(tf.ones([5, 3]))
    assert isinstance(density, KINDS[kind][0])
    assert model.compute_output_shape([None, 3]) == (None, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_heads_work_in_a_functional_model(kind):
    inputs = tf_keras.Input([3])
    model = tf_keras.Model(inputs, make(kind, 2, 3)(tf_keras.layers.Dense(8)(inputs)))
    assert isinstance(model(tf.ones([5, 3])), KINDS[kind][0])


def test_adapt_starts_at_the_data():
    y = multimodal(4_000, 1)
    head = Mixture(1, 2)
    head.adapt(y)
    density = head(tf.zeros([1, 4]))  # a zero is what the projection leaves to the bias
    np.testing.assert_allclose(np.sort(density.loc[0, :, 0]), [100.0, 200.0], atol=3.0)
    np.testing.assert_allclose(tf.nn.softmax(density.logits[0]), [0.5, 0.5], atol=0.05)
    np.testing.assert_allclose(density.mean()[0], y.mean(axis=0), rtol=0.02)
    np.testing.assert_allclose(density.stddev()[0], y.std(axis=0), rtol=0.1)


@pytest.mark.parametrize("kind", [Diag, TriL])
def test_one_normal_starts_at_the_moments(kind):
    y = multimodal(4_000, 3) @ np.array([[1.0, 0.5, 0.0], [0.0, 1.0, 0.3], [0.0, 0.0, 2.0]])
    head = kind(3)
    head.adapt(y)
    density = head(tf.zeros([1, 4]))
    np.testing.assert_allclose(density.mean()[0], y.mean(axis=0), rtol=1e-3)
    np.testing.assert_allclose(density.stddev()[0], y.std(axis=0), rtol=0.02)


@pytest.mark.parametrize(
    "y",
    [
        multimodal(500, 2),
        np.repeat(multimodal(2, 2), 50, axis=0),  # two distinct rows for eight components
        np.round(np.random.default_rng(0).normal(size=[500, 2])),
        multimodal(3, 2),
        np.where(np.arange(500)[:, None] % 2 == [0, 1], multimodal(500, 2), np.nan),
    ],
    ids=["plenty", "two values", "integers", "three rows", "no complete row"],
)
@pytest.mark.parametrize("kind", [Mixture, MixtureDiag, MixturePrecision, MixtureLowRank])
def test_no_two_components_start_equal(kind, y):
    head = kind(2, 8)
    head.adapt(y)
    density = head(tf.zeros([1, 4]))
    loc = density.loc.numpy()[0]
    distance = np.linalg.norm((loc[:, None] - loc) / np.nanstd(y, axis=0), axis=-1)
    assert distance[~np.eye(8, dtype=bool)].min() > 1e-4
    assert np.isfinite(density.log_prob(np.nanmean(y, axis=0).astype(np.float32)))


def test_adapt_is_a_function_of_its_seed():
    y = multimodal(500, 2)
    first, again, other = (Mixture(2, 5) for _ in range(3))
    first.adapt(y, seed=0)
    again.adapt(y, seed=0)
    other.adapt(y, seed=1)
    np.testing.assert_array_equal(first.bias, again.bias)
    assert not np.array_equal(first.bias, other.bias)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [1.0, 0.25])
def test_scales_keep_the_width_of_a_step_where_targets_are_tied(kind, step):
    y = np.round(np.random.default_rng(0).normal(scale=8.0, size=[1_000, 1]) / step) * step
    head = make(kind, 1, 3)
    head.adapt(y)
    raw = 1e9 if kind is MixturePrecision else -50.0
    params = tf.fill([head.params_size], raw)
    if kind is MixtureLowRank:
        params = head.join({**head.split(params), "factor": tf.zeros(head.layout["factor"])})
    narrow = head.distribution(params)
    width = narrow.mixture_parameters().scale_tril.numpy().min()
    assert width == pytest.approx(step / math.sqrt(12.0), rel=1e-5)


def test_scales_keep_the_step_of_float32_at_a_large_offset():
    y = 1e5 + np.random.default_rng(0).normal(size=[1_000, 1])
    head = Diag(1)
    head.adapt(y)
    narrow = head.distribution(tf.fill([2], -50.0)).stddev().numpy()
    assert narrow[0] == pytest.approx(np.spacing(np.float32(1e5)) / math.sqrt(12.0), rel=1e-2)
    with pytest.raises(mdn.MDNError, match="float32 cannot resolve: subtract its offset"):
        Diag(1).adapt(y + 1e7)


def test_functional_model_with_the_loss_saves_and_loads(tmp_path):
    inputs = tf_keras.Input([3])
    model = tf_keras.Model(inputs, Mixture(2, 3)(tf_keras.layers.Dense(8)(inputs)))
    model.compile("adam", loss=mdn.losses.nll)
    model.fit(np.ones([8, 3]), np.ones([8, 2]), verbose=0)
    model.save(tmp_path / "model.keras")
    again = tf_keras.models.load_model(tmp_path / "model.keras", safe_mode=True)
    x = tf.ones([5, 3])
    np.testing.assert_array_equal(again(x).loc, model(x).loc)


def test_density_of_known_numbers():
    head = Diag(1, dtype="float64", min_scale=1e-9)
    raw = float(np.log(np.expm1(1.0)))  # softplus of it is one
    log_prob = head.distribution(tf.constant([0.0, raw], tf.float64)).log_prob([0.0])
    assert log_prob.numpy() == pytest.approx(norm.logpdf(0.0), abs=1e-8)
    assert log_prob.numpy() == pytest.approx(-0.5 * math.log(2.0 * math.pi), abs=1e-8)


def test_the_cap_of_a_precision_bends_smoothly_and_only_near_itself():
    floor = np.array([0.01, 0.5])
    raw = tf.constant(np.linspace([-5.0, -5.0], [400.0, 400.0], 40_001))
    diag = precision_diag(raw, "softplus", 1e-3, floor).numpy()
    assert (diag < 1.0 / floor).all()
    assert (np.diff(diag, axis=0) > 0.0).all()
    plain = 1e-3 + np.log1p(np.exp(raw))
    low = plain < 0.5 / floor
    np.testing.assert_allclose(diag[low], plain[low], rtol=1e-12)
    slope = np.diff(diag, axis=0) / np.diff(plain, axis=0)
    assert np.abs(np.diff(slope, axis=0)).max() < 0.1  # no kink
    again = precision_diag_inverse(tf.constant(diag), "softplus", 1e-3, floor)
    np.testing.assert_allclose(again, raw, rtol=1e-7, atol=1e-7)


def test_precision_and_low_rank_start_at_the_covariances_of_the_clusters():
    rng = np.random.default_rng(0)
    y = rng.normal(size=[4_000, 3]) @ np.array([[3.0, 1.0, 2.0], [0.0, 1.0, 0.3], [0.0, 0.0, 0.2]])
    heads = MixturePrecision(3, 1), MixtureLowRank(3, 1, rank=2), Mixture(3, 1)
    for head in heads:
        head.adapt(y)
    exact, close, expected = (h(tf.zeros([1, 4])).covariance().numpy() for h in heads)
    np.testing.assert_allclose(exact, expected, rtol=1e-3)
    stddev = [np.sqrt(np.diagonal(c, axis1=1, axis2=2)) for c in (close, expected)]
    np.testing.assert_allclose(*stddev, rtol=0.02)
    np.testing.assert_allclose(
        close / stddev[1][0, 0] ** 2, expected / stddev[1][0, 0] ** 2, atol=0.05
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"event_size": 0}, "event_size=0"),
        ({"event_size": 1, "components": 0}, r"components=0.*\(k=1\)"),
        ({"event_size": 1, "positivity": "relu"}, "positivity='relu' is unknown"),
        ({"event_size": 1, "min_scale": 0.0}, "min_scale=0.0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(mdn.MDNError, match=message):
        Mixture(**arguments)


def test_a_rank_below_one_is_named():
    with pytest.raises(mdn.MDNError, match="rank=0: must be at least 1"):
        MixtureLowRank(3, 2, rank=0)


@pytest.mark.parametrize("unit", [1e-20, 1e20])
def test_adapt_names_a_unit_whose_squares_are_no_numbers(unit):
    y = np.random.default_rng(0).normal(size=[50, 2]) * [1.0, unit]
    with pytest.raises(mdn.MDNError, match=r"target 1 has a standard deviation of .*: give it in"):
        heads.Mixture(2, 2).adapt(y)
    heads.Mixture(2, 2, dtype="float64").adapt(y)


def test_adapt_names_a_wrong_number_of_targets():
    with pytest.raises(mdn.MDNError, match="y has 3 targets and the head event_size=2"):
        Mixture(2, 3).adapt(multimodal(50, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_float32_density_of_a_bfloat16_backbone(kind):
    density = make(kind, 2, 3)(tf.ones([4, 8], tf.bfloat16))
    assert density.dtype == tf.float32
    assert density.log_prob(tf.zeros([4, 2])).dtype == tf.float32


# ---------------------------------------------------------------------- background and start

MIXTURES = [kind for kind in KINDS if issubclass(kind, MixtureHead)]


@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.parametrize("background", [0.2, "auto", "learned"])
def test_background_is_one_more_component(kind, background):
    y = multimodal(200, 2)
    plain, head = (kind(2, 3, background=b, dtype="float64") for b in (0.0, background))
    for one in (plain, head):
        one.adapt(y)
    rng = np.random.default_rng(2)
    params = rng.normal(size=[5, head.params_size])
    rest = params
    weight = {0.2: 0.2, "auto": 0.01}.get(background)  # 10 / 200 rows is more than a hundredth
    if background == "learned":
        logits = params[:, :4]
        weight = np.exp(logits[:, 3] - logsumexp(logits, axis=1))
        rest = np.delete(params, 3, axis=1)
    given = tf.constant(y[:5])
    behind = norm(y.mean(axis=0), 1.5 * y.std(axis=0)).logpdf(y[:5]).sum(axis=1)
    without = plain.distribution(tf.constant(rest)).log_prob(given).numpy()
    expected = np.logaddexp(np.log1p(-weight) + without, np.log(weight) + behind)
    density = head.distribution(tf.constant(params))
    assert density.loc.shape == [5, 4, 2]
    np.testing.assert_allclose(density.log_prob(given), expected, rtol=1e-8)
    packed = head.packed_params(tf.eye(5, dtype=tf.float64), params.T, np.zeros(len(params.T)))
    fast = head.params_log_prob(packed[None], given[None])[0]
    np.testing.assert_allclose(fast, expected, rtol=1e-8)
    again = head.distribution(head.parameters(density))
    np.testing.assert_allclose(again.log_prob(given), expected, rtol=1e-8)


@pytest.mark.parametrize("kind", MIXTURES)
def test_start_at_the_centre(kind):
    y = multimodal(500, 2)
    head = kind(2, 5, start="centre", background=0.01)
    head.adapt(y)
    density = head.distribution(head.bias)
    loc, sd = y.mean(axis=0), y.std(axis=0)
    unit = (density.loc.numpy()[:5] - loc) / sd
    quantiles = np.quantile((y - loc) / sd, [0.1, 0.3, 0.5, 0.7, 0.9], axis=0)
    np.testing.assert_allclose(unit, 0.1 * quantiles, atol=1e-4)
    widths = np.sqrt(density.components_distribution.variance().numpy())[:5] / sd
    np.testing.assert_allclose(widths, np.geomspace(0.15, 1.2, 5)[:, None] * [1, 1], rtol=1e-3)


def test_background_weight_falls_with_the_rows_and_is_saved():
    head = Mixture(1, 2, background="auto")
    head.adapt(np.random.default_rng(0).normal(size=[4000, 1]))
    assert float(head.background_weight) == pytest.approx(10 / 4000)
    for background in (1.0, -0.1, "some"):
        with pytest.raises(mdn.MDNError, match=f"background={background}"):
            Mixture(1, 2, background=background)
    with pytest.raises(mdn.MDNError, match="start='edge'"):
        Mixture(1, 2, start="edge")


@pytest.mark.parametrize("grid_floor", [True, False])
def test_floor_of_the_grid_is_an_option(grid_floor):
    y = np.round(np.random.default_rng(0).normal(size=[500, 1]) * 2)
    head = Mixture(1, 2, grid_floor=grid_floor, min_scale=0.01)
    head.adapt(y)
    expected = 1 / math.sqrt(12) / y.std() if grid_floor else 0.01
    np.testing.assert_allclose(head.floor, [expected], rtol=1e-5)
    assert head.grid == [1.0]
