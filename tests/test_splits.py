"""Splits: reproducible, disjoint, complete, and true to days, groups and words."""

import datetime

import numpy as np
import pandas as pd
import pytest

from mdn.data.rows import Rows
from mdn.data.splits import split_data, split_indices, thin
from mdn.errors import DataError

SPLITS = ("random", "time", "group", "column")


def keys(n: int) -> dict[str, np.ndarray | None]:
    rng = np.random.default_rng(5)
    return {
        "random": None,
        "time": rng.integers(0, n // 4, n),
        "group": np.array([f"g{i}" for i in rng.integers(0, n // 4, n)], object),
        "column": np.resize(np.array(["train", "train", "val", "TEST"], object), n),
    }


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("n", [40, 1001])
def test_every_row_is_on_one_side(split, n):
    indices = split_indices(n, split, keys(n)[split], seed=3)
    assert np.array_equal(np.sort(np.concatenate(indices)), np.arange(n))
    assert all(len(index) for index in indices)
    again = split_indices(n, split, keys(n)[split], seed=3)
    assert all(np.array_equal(a, b) for a, b in zip(indices, again, strict=True))


@pytest.mark.parametrize("split", ["random", "time", "group"])
def test_fractions_are_met(split):
    n = 10_000
    sizes = [len(i) for i in split_indices(n, split, keys(n)[split], validation=0.2, test=0.05)]
    np.testing.assert_allclose(sizes, [7500, 2000, 500], atol=0 if split == "random" else 30)


def test_the_seed_decides_a_random_split():
    first, second = split_indices(100, seed=0), split_indices(100, seed=1)
    assert not np.array_equal(first[2], second[2])


def test_time_puts_the_earliest_first_and_keeps_ties_together():
    key = np.array([3.0, 1, 2, 2, 1, 5, 4, 4, 4, 6])
    parts = [key[i] for i in split_indices(10, "time", key, validation=0.3, test=0.2)]
    assert parts[0].max() < parts[1].min() <= parts[1].max() < parts[2].min()


@pytest.mark.parametrize("kind", ["datetime", "zoned", "text"])
def test_rows_of_one_day_stay_together(kind):
    rng = np.random.default_rng(0)
    times = pd.Series(pd.Timestamp("2020-01-01") + pd.to_timedelta(rng.uniform(0, 20, 500), "D"))
    key = {
        "datetime": times.to_numpy(),
        "zoned": times.dt.tz_localize("Europe/Paris"),
        "text": times.dt.strftime("%Y-%m-%dT%H:%M:%S").to_numpy(object),
    }[kind]
    parts = split_indices(500, "time", key, validation=0.15, test=0.15)
    days = [set(times[i].dt.date) for i in parts]
    assert max(days[0]) < min(days[1])
    assert max(days[1]) < min(days[2])


def test_days_may_lack_their_midnight():
    times = pd.Series(pd.date_range("2018-10-25", periods=500, freq="h", tz="America/Sao_Paulo"))
    shuffled = times.sample(frac=1, random_state=0, ignore_index=True)
    parts = [shuffled[i] for i in split_indices(500, "time", shuffled)]
    assert parts[0].max() < parts[1].min() <= parts[1].max() < parts[2].min()
    assert sum(part.dt.date.nunique() for part in parts) == times.dt.date.nunique()


def test_groups_stay_together_and_the_row_order_has_no_say():
    key = keys(400)["group"]
    shuffle = np.random.default_rng(1).permutation(400)
    groups = [set(key[i]) for i in split_indices(400, "group", key)]
    assert sum(map(len, groups)) == len(set(key))
    assert groups == [set(key[shuffle][i]) for i in split_indices(400, "group", key[shuffle])]


@pytest.mark.parametrize(
    "spelled",
    [
        lambda i: [i, str(i)],
        lambda i: [float(i), str(i)],
        lambda i: [datetime.date(2020, 1, 1 + i), pd.Timestamp(2020, 1, 1 + i)],
    ],
)
@pytest.mark.parametrize("dtype", [object, "category"])
def test_one_key_of_two_types_is_one_group(spelled, dtype):
    key = pd.Series([spelled(i)[j] for j in (0, 1) for i in range(20)], dtype=object)
    sides = [set(index % 20) for index in split_indices(40, "group", key.astype(dtype))]
    assert sum(map(len, sides)) == 20


def test_a_huge_unit_leaves_no_split_empty():
    key = np.repeat([0, 1, 2], [98, 1, 1])
    assert [len(i) for i in split_indices(100, "time", key)] == [98, 1, 1]
    assert [len(i) for i in split_indices(3)] == [1, 1, 1]


def test_column_words():
    key = np.array(["train", "val", "test", " Valid", "validation"], object)
    train, validation, test = split_indices(5, "column", key)
    assert (train.tolist(), validation.tolist(), test.tolist()) == ([0], [1, 3, 4], [2])


@pytest.mark.parametrize(
    ("split", "key", "options", "message"),
    [
        ("daily", None, {}, "data.split=daily is not one of random, time"),
        ("random", np.arange(9), {}, "data.split_column does nothing"),
        ("time", None, {}, "data.split=time needs a column: set data.split_column"),
        ("random", None, {"validation": 0.0}, "data.validation=0.0"),
        ("random", None, {"validation": 0.5, "test": 0.5}, "sum to less than 1"),
        ("group", np.array(["a", None] * 4 + ["b"], object), {}, "missing in row 1"),
        ("group", np.array(["a", "b", "a"] * 3), {}, "2 groups cannot be split in three"),
        ("time", np.array(["2020-01-01", "soon"] * 4 + ["x"]), {}, "is 'soon' in row 1"),
        ("column", np.array(["train", "dev", "test"] * 3), {}, "is 'dev' in row 1"),
        ("column", np.array(["train", "val", "val"] * 3), {}, "says test"),
    ],
)
def test_errors(split, key, options, message):
    with pytest.raises(DataError, match=message):
        split_indices(9, split, key, **options)


def test_split_data_drops_rows_without_targets_and_scales_weights():
    y = np.arange(20.0).reshape(10, 2)
    y[3], y[8, 0] = np.nan, np.nan
    rows = Rows(np.arange(10.0)[:, None], y, np.arange(10.0))
    indices = (np.arange(6), np.array([6, 7]), np.array([8, 9]))
    data = split_data(rows, indices, features=("a",), targets=("b", "c"))
    assert data.train.x[:, 0].tolist() == [0, 1, 2, 4, 5]
    assert data.notes == {"data/rows": 9.0, "data/rows_without_target": 1.0}
    assert data.train.weight.mean() == pytest.approx(1)
    np.testing.assert_allclose(data.test.weight, np.array([8, 9]) / 2.4)
    assert np.isnan(data.test.y[0, 0])


def test_split_data_refuses_train_rows_that_do_not_vary():
    rows = Rows(np.zeros((6, 1)), np.array([1.0, 1, 1, 2, 3, 4])[:, None])
    indices = (np.arange(3), np.array([3]), np.array([4, 5]))
    with pytest.raises(DataError, match="in the train rows, target 'b' is constant"):
        split_data(rows, indices, features=("a",), targets=("b",))


def test_thin_is_even():
    assert thin(10, None).tolist() == thin(10, 99).tolist() == list(range(10))
    assert thin(10, 4).tolist() == [0, 2, 5, 7]
    with pytest.raises(DataError, match=r"data.max_rows=0"):
        thin(10, 0)
