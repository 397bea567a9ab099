"""Batches: a function of (seed, epoch), every row at most once an epoch."""

import itertools

import numpy as np
import pytest

from mdn.data.pipeline import evaluation_batches, training_batches
from mdn.data.resolution import resolution


def epochs(count, *, n=50, batch_size=8, **kwargs):
    """Return the rows seen in each of `count` epochs: [epochs, N // B * B]."""
    x = np.arange(n, dtype=np.float64)
    steps = n // batch_size
    batches = training_batches((x[:, None], -x[:, None], x), batch_size, **kwargs).unstacked()
    taken = list(itertools.islice(batches.as_numpy_iterator(), count * steps))
    for a, b, c in taken:
        np.testing.assert_array_equal(a, -b)
        np.testing.assert_array_equal(a[:, 0], c)
    return np.stack([a[:, 0] for a, _, _ in taken]).reshape(count, -1)


def test_each_epoch_takes_each_row_at_most_once_in_a_new_order():
    seen = epochs(3, seed=0)
    assert seen.shape == (3, 48)
    assert all(len(set(epoch)) == 48 for epoch in seen)
    assert not np.array_equal(seen[0], seen[1])


def test_order_is_a_function_of_seed_and_epoch():
    whole = epochs(4, seed=3)
    np.testing.assert_array_equal(whole, epochs(4, seed=3))
    np.testing.assert_array_equal(whole[2:], epochs(2, seed=3, first_epoch=2))
    assert not np.array_equal(whole, epochs(4, seed=0))


def test_evaluation_takes_each_row_once_in_order():
    x = np.arange(20.0)[:, None]
    taken = list(evaluation_batches((x, x), 8).unstacked().as_numpy_iterator())
    assert [len(a) for a, _ in taken] == [7, 7, 7]  # of three batches the smallest
    targets = np.concatenate([b for _, b in taken])
    np.testing.assert_array_equal(targets[:20], x)
    assert np.isnan(targets[20:]).all()  # what fills the last one up has no target


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("step", [1.0, 0.25, 0.01, 1e-3])
def test_resolution_of_tied_targets(step, dtype):
    y = np.round(np.random.default_rng(0).normal(50.0, 10.0 * step, size=1_000) / step) * step
    assert resolution(y.astype(dtype)) == pytest.approx(step, rel=0.05)


def test_a_few_values_off_the_grid_do_not_hide_it():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 50, size=1_000).astype(np.float64)
    y[:40] += rng.uniform(size=40)
    assert resolution(y) == 1.0
    inflated = np.where(rng.random(1_000) < 0.3, 0.0, rng.lognormal(size=1_000))
    assert resolution(inflated) == 0.0


@pytest.mark.parametrize("n", [60, 100])
def test_resolution_where_few_values_repeat(n):
    """Of so few rows those that repeat are often several steps apart."""
    for seed in range(20):
        y = np.round(np.random.default_rng(seed).normal(size=n), 2)
        assert resolution(y) in (0.0, pytest.approx(0.01))


def test_values_that_repeat_on_no_grid_have_no_step():
    rng = np.random.default_rng(0)
    assert resolution(np.clip(rng.normal(50.0, 40.0, size=1_000), 0.0, 100.0)) == 0.0
    counts = rng.poisson(5.0, size=1_000)  # of whose logarithms all but a few are tied
    greatest = np.unique(counts)[-2:]
    assert resolution(np.log1p(counts)) == pytest.approx(np.diff(np.log1p(greatest))[0])


def test_errors_of_arithmetic_are_no_grid():
    y = np.array([0.1 + 0.2, 0.3, 0.1, 0.2, 0.5, 0.7] * 20)
    assert resolution(y) == pytest.approx(0.1)


def test_resolution_of_continuous_targets_is_zero():
    y = np.random.default_rng(0).normal(size=1_000)
    assert resolution(y) == 0.0
    assert resolution(np.where(np.arange(1_000) % 3, y, np.nan)) == 0.0
    assert resolution(np.array([1.0])) == 0.0
