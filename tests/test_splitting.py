"""Components that have died, and those that are split for them."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import mdn
from mdn.callbacks.splitting import SplitComponents, split_components
from mdn.data.rows import Rows

K, D = 4, 2
WEIGHTS = [0.25, 0.45, 1e-6, 0.30]  # the third one is dead; halves of the second one are not


def rows(n=60):
    rng = np.random.default_rng(0)
    x = rng.normal(size=[n, 3])
    return Rows(x, x[:, :D] + 0.1 * rng.normal(size=[n, D]))


def make(head=mdn.heads.Mixture, members=1, weights=WEIGHTS, **options):
    """Return a model whose kernel, moments and averages are all different numbers."""
    tf_keras.utils.set_random_seed(0)
    model = mdn.MDN(head(D, K, **options), mdn.backbones.MLP([8]))
    if members > 1:
        model = mdn.Ensemble(model, members)
    model.adapt(rows().x, rows().y)
    model.compile(tf_keras.optimizers.Adam(use_ema=True, ema_momentum=0.9))
    model.optimizer.build(model.trainable_variables)
    rng = np.random.default_rng(1)
    kernel, bias = model.head_weights
    for variable in [kernel, bias, *model.optimizer.variables[2:]]:
        variable.assign(variable + 0.3 * rng.normal(size=variable.shape))
    start, places = bias.numpy(), model.head.places["logits"]
    start[..., places[:K]] = np.log(weights)
    bias.assign(start)
    start = kernel.numpy()
    start[..., places, :] = 0.0  # weights that are the same for all rows
    kernel.assign(start)
    return model


@pytest.mark.parametrize("background", [0.0, 0.05, "learned"])
@pytest.mark.parametrize("head", ["Mixture", "MixtureDiag", "MixturePrecision", "MixtureLowRank"])
def test_each_half_is_the_heavy_one_moved_along_its_longest_axis(head, background):
    model, x = make(getattr(mdn.heads, head), background=background), rows().x
    before = model.predict_distribution(x).mixture_parameters()
    assert split_components(model, rows()) == 1
    after = model.predict_distribution(x).mixture_parameters()
    heavy, dead, others = 1, 2, [0, 3]
    old, new = (tf.nn.softmax(p.logits).numpy() for p in (before, after))
    for half in (heavy, dead):
        np.testing.assert_allclose(new[:, half], old[:, heavy] / 2, rtol=1e-5)
    np.testing.assert_allclose(new[:, others], old[:, others], rtol=1e-5)

    (loc, factor), (loc_0, factor_0) = ((np.asarray(t) for t in p[1:]) for p in (after, before))
    middle = (loc[:, heavy] + loc[:, dead]) / 2
    np.testing.assert_allclose(middle, loc_0[:, heavy], atol=1e-5)
    np.testing.assert_allclose(loc[:, others], loc_0[:, others])
    for half in (heavy, dead):
        np.testing.assert_allclose(factor[:, half], factor_0[:, heavy], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(factor[:, others], factor_0[:, others])

    unit = factor_0[:, heavy] / model.head.y_scale.numpy()[:, np.newaxis]
    length, axis = np.linalg.eigh((unit @ unit.swapaxes(-1, -2)).mean(axis=0))
    apart = (loc[:, dead] - loc[:, heavy]) / model.head.y_scale.numpy() @ axis
    np.testing.assert_allclose(apart[:, 0], 0.0, atol=1e-4)
    np.testing.assert_allclose(np.abs(apart[:, 1]), np.sqrt(length[1]), rtol=1e-4)


def test_what_the_optimizer_keeps_goes_along():
    model = make()
    optimizer = model.optimizer
    kernel, bias = (optimizer._index_dict[optimizer._var_key(v)] for v in model.head_weights)
    places = model.head.places
    heavy, dead = (np.concatenate([p[k].ravel() for p in places.values()]) for k in (1, 2))
    split_components(model, rows())
    for slots in (optimizer._momentums, optimizer._velocities):
        for slot in (slots[kernel].numpy(), slots[bias].numpy()):
            np.testing.assert_array_equal(slot[dead], slot[heavy])
    averages = optimizer._model_variables_moving_average
    average = averages[kernel].numpy()
    np.testing.assert_array_equal(average[dead], average[heavy])
    # The average of the bias is moved as the bias itself is.
    gap = (b.numpy()[dead] - b.numpy()[heavy] for b in (model.head_weights[1], averages[bias]))
    np.testing.assert_allclose(*gap, atol=1e-6)


def test_members_split_as_they_would_alone():
    model = make(members=2)
    bias = model.head_weights[1]
    alive = bias.numpy()
    alive[1, model.head.places["logits"]] = 0.0
    bias.assign(alive)
    alone = []
    for m in range(2):
        member = model.member(m)
        member.compile("adam")
        member.optimizer.build(member.trainable_variables)
        assert split_components(member, rows()) == 1 - m
        alone.append([weight.numpy() for weight in member.head_weights])
    assert split_components(model, rows()) == 1
    for stacked, *own in zip(model.head_weights, *alone, strict=True):
        np.testing.assert_allclose(stacked, own, rtol=1e-6)


def test_one_that_few_rows_belong_to_is_alive():
    """All weight in one row of fifty, and none in the others: 2 % in the mean."""
    x = np.zeros([50, 1])
    x[0] = 1.0
    model = mdn.MDN(mdn.heads.Mixture(D, 3), mdn.backbones.MLP([1], activation="linear"))
    model.adapt(x, rows(50).y)
    model.compile("adam")
    model.optimizer.build(model.trainable_variables)
    for weight in model.backbone.weights:
        weight.assign(tf.ones_like(weight) * (weight.shape.rank - 1))  # hidden features are x
    kernel, bias = (weight.numpy() for weight in model.head_weights)
    kernel[:3], bias[:3] = 0.0, 0.0
    kernel[0], bias[0] = 5.0, -15.0
    for weight, value in zip(model.head_weights, (kernel, bias), strict=True):
        weight.assign(value)
    shares = tf.nn.softmax(model.predict_distribution(x).logits).numpy()
    assert shares[0, 0] > 0.99
    assert shares[1:, 0].max() < 0.01
    data = Rows(x, rows(50).y)
    assert split_components(model, data) == 0
    # Where that row counts nothing, nor does what belongs to it.
    assert split_components(model, Rows(x, data.y, np.arange(50) > 0)) == 1


def test_a_light_one_that_all_rows_share_is_given_up():
    """The first, of a fifth of the heaviest: there is none to spare."""
    model = make(weights=[0.1, 0.5, 0.2, 0.2])
    assert split_components(model, rows()) == 1
    shares = tf.nn.softmax(model.predict_distribution(rows().x).logits)[0]
    np.testing.assert_allclose(shares, np.array([0.25, 0.25, 0.2, 0.2]) / 0.9, rtol=1e-5)


def test_rows_go_through_in_blocks(monkeypatch):
    whole, parts = make(members=2), make(members=2)
    split_components(whole, rows())
    monkeypatch.setattr("mdn.callbacks.splitting.ELEMENTS", 2 * K * D**2 * 7)
    split_components(parts, rows())
    for one, other in zip(whole.head_weights, parts.head_weights, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4)


def test_sequences_without_their_padding():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=[20, 5, 3]), rng.normal(size=[20, 5, D])
    x[:, 3:], y[:, 3:] = np.nan, np.nan
    counts = []
    for data in (Rows(x, y), Rows(x[:, :3], y[:, :3])):
        tf_keras.utils.set_random_seed(0)
        head = mdn.heads.Mixture(D, K, start="centre")
        model = mdn.MDN(head, mdn.backbones.MLP([4]))
        model.adapt(data.x, data.y)
        bias = model.head.bias.numpy()
        bias[:K] = np.log(WEIGHTS)
        model.head.bias.assign(bias)
        model.compile("sgd")
        assert split_components(model, data) == 1
        counts.append([weight.numpy() for weight in model.head_weights])
    for padded, plain in zip(*counts, strict=True):
        np.testing.assert_allclose(padded, plain, rtol=1e-4, atol=1e-5)


def test_of_no_features_and_of_one_component():
    y = rows().y
    for head, count in ((mdn.heads.Mixture(D, K), 1), (mdn.heads.TriL(D), None)):
        model = mdn.MDN(head, mdn.backbones.Constant())
        model.adapt(np.zeros([len(y), 0]), y)
        model.compile("adam")
        data = Rows(np.zeros([len(y), 0]), y)
        if count is None:
            callback = SplitComponents(data)
            callback.set_model(model)
            callback.set_params({"epochs": 50})
            before = model.head.bias.numpy()
            callback.on_epoch_begin(3)
            np.testing.assert_array_equal(model.head.bias, before)
            continue
        bias = model.head.bias.numpy()
        bias[:K] = np.log(WEIGHTS)
        model.head.bias.assign(bias)
        assert split_components(model, data) == count


@pytest.mark.parametrize(
    ("epochs", "due"),
    [(50, [3, 7, 10, 13, 17, 20, 23, 27, 30]), (5, [1, 2, 3]), (2, [1]), (1, [])],
)
def test_epochs_that_begin_with_splits(epochs, due, monkeypatch):
    found = []
    monkeypatch.setattr(
        "mdn.callbacks.splitting.split_components", lambda model, rows: found.append(rows)
    )
    callback = SplitComponents(rows())
    callback.set_model(make())
    callback.set_params({"epochs": epochs})
    begun = []
    for epoch in range(epochs):
        callback.on_epoch_begin(epoch)
        begun += [epoch] * len(found)
        found.clear()
    assert begun == due


@pytest.mark.parametrize("splits", [False, True])
def test_a_crescent_needs_them_all(splits):
    """Two of four are dead: no better than two without splits, and better than three with them."""
    rng = np.random.default_rng(0)
    angle = rng.uniform(-np.pi / 2, np.pi / 2, 2000)
    radius = 1.0 + 0.05 * rng.normal(size=2000)
    y = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    x = rng.normal(size=[2000, 1])
    tf_keras.utils.set_random_seed(0)
    model = mdn.MDN(mdn.heads.Mixture(D, K), mdn.backbones.Constant())
    model.adapt(x, y)
    bias = model.head.bias.numpy()
    bias[[0, 1]] -= 20.0
    model.head.bias.assign(bias)
    model.compile(tf_keras.optimizers.Adam(0.02))
    callbacks = [SplitComponents(Rows(x, y))] if splits else []
    model.fit(x, y, epochs=20, batch_size=100, verbose=0, callbacks=callbacks)
    from sklearn.mixture import GaussianMixture

    best = [-GaussianMixture(k, n_init=3, random_state=0).fit(y).score(y) for k in (2, 3)]
    nll = -model.log_prob(x, y).mean()
    assert nll < best[1] if splits else nll > best[0] - 0.01
