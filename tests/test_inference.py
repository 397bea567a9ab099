"""Answers for many rows: those of a call, from programs of a few sizes."""

import numpy as np
import pytest
import tensorflow as tf
from test_heads import KINDS
from test_heads import make as make_head

import mdn
from mdn.density import mixture_of
from mdn.errors import ConfigError, DataError
from mdn.inference import FEW_BATCHES, MOST_ROWS, SIZES, RowProgram, largest_batch

pytestmark = pytest.mark.usefixtures("graph_answers")

RNG = np.random.default_rng(0)
X = RNG.normal(size=[300, 3])
Y = X[:, :2] * 5.0 + RNG.normal(size=[300, 2])
GAPS = np.where(RNG.uniform(size=Y.shape) < 0.3, np.nan, Y)
COLUMNS = {"a": X[:, 0], "b": np.where(X[:, 1] > 0, "up", "down").astype(object)}


def make(x=X):
    model = mdn.MDN(mdn.heads.Mixture(2, 2), mdn.backbones.MLP([8]))
    model.adapt(x, Y)
    return model


def ensemble():
    model = mdn.Ensemble(mdn.MDN(mdn.heads.TriL(2), mdn.backbones.MLP([8])), members=2)
    model.adapt(X, Y)
    return model


@pytest.mark.parametrize("make", [make, ensemble])
def test_answers_are_those_of_a_call(make):
    model = make()
    density = model(tf.constant(X, tf.float32))
    for n in (1, 16, 17, 300):
        for y in (Y, GAPS):
            expected = density.log_prob(tf.constant(y, tf.float32))[:n]
            for batch_size in (None, 10):
                found = model.log_prob(X[:n], y[:n], batch_size)
                np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(model.predict(X[:n]), density.mean()[:n], rtol=1e-4, atol=1e-5)
        again = model.predict_distribution(X[:n])
        np.testing.assert_allclose(again.mean(), density.mean()[:n], rtol=1e-4, atol=1e-5)
    assert model.log_prob(X[:0], Y[:0]).shape == (0,)


@pytest.mark.parametrize("kind", [*KINDS, mdn.Ensemble])
def test_xla_answers_as_a_call_does(kind, xla_answers):
    if kind is mdn.Ensemble:
        model = ensemble()
    else:
        model = mdn.MDN(make_head(kind, 2, 2), mdn.backbones.MLP([8]))
        model.adapt(X, Y)

    def answers(x, y):
        density = model(x, training=False)
        return {"log_prob": density.log_prob(y), "mean": density.mean(), **density.tensors()}

    program = model.row_program(answers)
    arrays = X[:17].astype(np.float32), GAPS[:17].astype(np.float32)
    expected = answers(*map(tf.constant, arrays))
    parts = list(program(arrays, 16))
    assert program._compiled.experimental_get_tracing_count() == 1
    assert [rows for rows, _ in parts] == [slice(0, 16), slice(16, 17)]
    for name, value in expected.items():
        found = np.concatenate([part[name] for _, part in parts])
        np.testing.assert_allclose(found, value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_answers_from_columns():
    model = make(COLUMNS)
    density = model.predict_distribution(COLUMNS)
    np.testing.assert_allclose(model.predict(COLUMNS), density.mean(), rtol=1e-5, atol=1e-6)
    expected = density.log_prob(Y.astype(np.float32))
    np.testing.assert_allclose(model.log_prob(COLUMNS, Y), expected, rtol=1e-4, atol=1e-5)


def test_faster_density_of_a_batch_is_the_same():
    for model in (make(), ensemble()):
        density = model(tf.constant(X, tf.float32))
        for y, complete in ((Y, True), (Y, False), (Y, None), (GAPS, False), (GAPS, None)):
            y = tf.constant(y, tf.float32)
            found = model.log_density(tf.constant(X, tf.float32), y, complete)
            np.testing.assert_allclose(found, density.log_prob(y), rtol=1e-4, atol=1e-4)
    members = ensemble()
    apart = mixture_of([members.member(m).predict_distribution(X) for m in range(2)])
    np.testing.assert_allclose(
        members.log_prob(X, Y), apart.log_prob(Y.astype(np.float32)), rtol=1e-4, atol=1e-4
    )


def test_a_program_is_traced_once_for_each_size(xla_answers):
    shapes = []

    def double(x):
        shapes.append(x.shape[0])
        return {"twice": 2.0 * x}

    program = RowProgram(double, jit_compile=True)
    for n in range(1, 700, 13):
        rows = np.arange(n, dtype=np.float32)[:, np.newaxis]
        parts = [part["twice"].numpy() for _, part in program([rows], 300)]
        np.testing.assert_array_equal(np.concatenate(parts), 2.0 * rows)
    assert sorted(shapes) == [16, 256, 300]


def test_few_batches_are_answered_by_a_graph():
    traced = []

    def ask(x):
        traced.append(x.shape[0])
        return x + 1.0

    def answer(program, rows):
        before = len(traced)
        x = np.zeros([rows, 1], np.float32)
        assert sum(len(part) for _, part in program([x], 100)) == rows
        return traced[before:]

    program = RowProgram(ask, jit_compile=True)
    asked = [answer(program, 100) for _ in range(FEW_BATCHES + 2)]
    assert asked == [[100], *[[]] * (FEW_BATCHES - 1), [100], []]  # by a graph, then by XLA
    program = RowProgram(ask, jit_compile=True)
    assert answer(program, 100 * FEW_BATCHES + 116) == [100, 16]
    assert program._compiled.experimental_get_tracing_count() == 1
    program = RowProgram(ask, jit_compile=False)
    assert answer(program, 100 * FEW_BATCHES + 116) == [100, 16]
    assert program._compiled.experimental_get_tracing_count() == 0


def test_batches_are_smaller_for_densities_of_many_parameters():
    assert largest_batch(18) == MOST_ROWS
    sizes = [largest_batch(p) for p in (18, 330, 2_000, 20_000, 10**6)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == SIZES[1]


def test_mistakes_are_told():
    model = make()
    with pytest.raises(ConfigError, match="batch_size=0: must be at least 1"):
        model.log_prob(X, Y, batch_size=0)
    for y in (Y[:, :1], Y[:7]):
        with pytest.raises(DataError, match=r"give \[300, 2\], a row of targets for each row"):
            model.log_prob(X, y)
