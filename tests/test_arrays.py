"""Npz: shapes, the standard folds, and what every bad file says."""

import inspect
import pathlib

import numpy as np
import pytest
import yaml

from mdn.data.arrays import Npz
from mdn.errors import DataError

N = 30
X = np.random.default_rng(0).normal(size=(N, 3))
Y = np.arange(float(N))


def write(folder: pathlib.Path, **arrays) -> str:
    path = folder / "data.npz"
    np.savez(path, **arrays)
    return str(path)


def test_a_column_of_targets_becomes_a_matrix(tmp_path):
    data = Npz(write(tmp_path, x=X.astype(np.float32), y=Y.astype(int))).load()
    assert [len(r) for r in (data.train, data.validation, data.test)] == [24, 3, 3]
    assert data.train.y.shape == (24, 1)
    assert data.features == ("x0", "x1", "x2")
    assert data.targets == ("y0",)
    assert data.train.x.dtype == data.train.y.dtype == np.float64
    np.testing.assert_allclose(data.test.x, X[data.test.y[:, 0].astype(int)], rtol=1e-6)


def test_sequences(tmp_path):
    x = np.random.default_rng(0).normal(size=(N, 5, 2))
    x[:, 4] = np.nan
    y = np.cumsum(np.ones((N, 5, 1)), axis=1)
    assert Npz(write(tmp_path, x=x, y=y)).load().train.y.shape == (24, 5, 1)
    assert Npz(write(tmp_path, x=x, y=Y)).load().train.y.shape == (24, 1)
    with pytest.raises(DataError, match=r"y of shape \[30, 4, 1\] needs x"):
        Npz(write(tmp_path, x=x, y=y[:, :4])).load()


def test_folds(tmp_path):
    rows = np.random.default_rng(1).permutation(N)
    path = write(tmp_path, x=X, y=Y, train_07=rows[:20], test_07=rows[20:])
    data = Npz(path, fold=7, validation=0.25).load()
    np.testing.assert_array_equal(data.test.y[:, 0], np.sort(rows[20:]))
    assert (len(data.train), len(data.validation)) == (15, 5)
    both = np.concatenate([data.train.y, data.validation.y])[:, 0]
    np.testing.assert_array_equal(np.sort(both), np.sort(rows[:20]))
    other = Npz(path, fold=7, validation=0.25, seed=1).load()
    assert not np.array_equal(other.validation.y, data.validation.y)
    with pytest.raises(DataError, match="has no array 'train_08': it has x, y, train_07, test_07"):
        Npz(path, fold=8).load()
    with pytest.raises(DataError, match=r"data.validation=0.0 of 20 train rows"):
        Npz(path, fold=7, validation=0.0).load()
    with pytest.raises(DataError, match="array test_07 holds no row numbers of 30 rows"):
        Npz(write(tmp_path, x=X, y=Y, train_07=rows[:20], test_07=rows + 1), fold=7).load()


def test_weights_groups_and_missing_targets(tmp_path):
    y = np.stack([Y, Y], axis=1)
    y[0], y[1, 0] = np.nan, np.nan
    path = write(tmp_path, x=X, y=y, w=np.ones(N) * 5, day=Y // 3, short=np.ones(3))
    data = Npz(path, weight="w", split="time", split_column="day").load()
    assert data.notes["data/rows_without_target"] == 1
    assert np.isnan(data.train.y[0, 0])
    np.testing.assert_allclose(data.test.weight, 1)
    assert data.test.y.min() == 27
    with pytest.raises(DataError, match=r"array 'short' has shape \[3\], not \[30\]"):
        Npz(path, weight="short").load()


def test_missing_features(tmp_path):
    x = X.copy()
    x[4, 1] = np.nan
    path = write(tmp_path, x=x, y=Y)
    with pytest.raises(DataError, match="feature 'x1' is missing in 1 places, first in row 4"):
        Npz(path).load()
    assert Npz(path, missing="indicator").load().missing == "indicator"


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ({"x": X}, {}, "has no array 'y': it has x"),
        ({"x": X, "y": Y}, {"x_key": "inputs"}, "has no array 'inputs': it has x, y"),
        ({"x": X, "y": Y[:9]}, {}, "x has 30 rows but y has 9"),
        ({"x": X[:, 0], "y": Y}, {}, r"x has shape \[30\]: give"),
        ({"x": X, "y": Y * 0}, {}, r"target 'y0' is constant \(0\)"),
        ({"x": X, "y": Y[:, None] > 1e9}, {}, "constant"),
        ({"x": X, "y": np.array(["a"] * N)}, {}, "y is of type <U1, not numeric"),
        ({"x": X.astype(object), "y": Y}, {}, "array 'x' of .*data.npz holds Python objects"),
        ({"x": np.float64(3), "y": Y}, {}, "x"),
        ({"x": X, "y": np.float64(3)}, {}, "y has shape"),
    ],
)
def test_array_errors(arrays, options, message, tmp_path):
    with pytest.raises(DataError, match=message) as error:
        Npz(write(tmp_path, **arrays), **options).load()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("cut", [0, 10, 300, -30])
def test_truncated_files(cut, tmp_path):
    path = pathlib.Path(write(tmp_path, x=X, y=Y))
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"is empty|cannot be read as .npz"):
        Npz(str(path)).load()


def test_other_files(tmp_path):
    np.save(tmp_path / "one.npy", X)
    with pytest.raises(DataError, match=r"holds one array: save x and y with np.savez"):
        Npz(str(tmp_path / "one.npy")).load()
    with pytest.raises(DataError, match=r"cannot be read as .npz"):
        Npz(str(tmp_path)).load()
    with pytest.raises(DataError, match=r"data.path=nowhere.npz matches no file"):
        Npz("nowhere.npz").load()
    with pytest.raises(DataError, match=r"data.path is not set"):
        Npz().load()


def test_config_lists_the_defaults():
    config = yaml.safe_load(pathlib.Path("configs/data/npz.yaml").read_text())
    assert config.pop("_target_") == "mdn.data.arrays.Npz"
    assert config.pop("seed") == "${seed}"
    defaults = {k: p.default for k, p in inspect.signature(Npz).parameters.items()}
    assert {**config, "seed": 0} == defaults


def test_fold_that_tests_on_train_rows_is_refused(tmp_path):
    rows = {"train_00": np.arange(60), "test_00": np.arange(50, 80)}
    np.savez(tmp_path / "rows.npz", x=np.random.rand(80, 2), y=np.random.rand(80), **rows)
    with pytest.raises(DataError, match=r"data\.fold=0 tests on train rows"):
        Npz(str(tmp_path / "rows.npz"), fold=0).load()
