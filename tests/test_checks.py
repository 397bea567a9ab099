"""Checks: what can be fitted passes, and what cannot is named."""

import numpy as np
import pandas as pd
import pytest

from mdn.data.checks import (
    check_batch_size,
    check_features,
    check_rows,
    check_targets,
    check_weight,
    find_missing,
)
from mdn.errors import DataError

NAN = np.nan
TEXT = np.array(["a", None, "b"], object)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (np.arange(3.0), r"shape \[3\], not \[N, D\]: reshape it to \[N, 1\]"),
        (np.zeros((0, 1)), r"y has shape \[0, 1\]"),
        (np.zeros((2, 2, 2, 2)), r"\[2, 2, 2, 2\]"),
        (np.array([["a"], ["b"]]), "y is of type <U1, not numeric"),
        (np.array([[1.0], [np.inf]]), "target 'p' is inf in row 1"),
        (np.array([[1.0], [1e39]]), "target 'p' is 1e.39 in row 1, which float32 cannot hold"),
        (np.array([[NAN], [NAN]]), "target 'p' is missing in every row"),
        (np.array([[2.0], [2.0], [NAN]]), r"target 'p' is constant \(2\)"),
        (
            1e9 + np.arange(3.0)[:, None],
            r"around 1e\+09, which float32 cannot resolve: subtract its offset",
        ),
        (np.array([[[1.0], [2.0]], [[3.0], [-np.inf]]]), "-inf in row 1, step 1"),
    ],
)
def test_target_errors(y, message):
    with pytest.raises(DataError, match=message):
        check_targets(y, ["p"])


@pytest.mark.parametrize(
    ("x", "missing", "message"),
    [
        (np.arange(3.0), "error", r"x has shape \[3\]"),
        (np.array([["a"]]), "error", "x is of type <U1, not numeric"),
        (np.array([[1.0, 2], [3, np.inf]]), "indicator", "feature 'q' is inf in row 1"),
        (np.array([[1.0, 2], [3, NAN]]), "error", "'q' is missing in 1 places.*missing=indicator"),
        (np.array([[1.0, NAN], [3, NAN]]), "indicator", "'q' is missing in every row"),
        (np.array([[1.0]]), "mean", "data.missing=mean is not one of error, indicator"),
        ({"c": TEXT}, "error", "feature 'c' is missing in 1 places, first in row 1"),
        ({"c": np.array(["", ""], object)}, "indicator", "feature 'c' is missing in every row"),
        ({"c": np.array([1, "a"], object)}, "indicator", "feature 'c' holds mixed-integer"),
        ({"c": np.array([NAN, 1.0])}, "error", "feature 'c' is missing in 1 places"),
        ({"c": np.zeros((2, 1), "M8[D]")}, "error", "type datetime64"),
        (np.full((2, 3, 1), NAN), "indicator", "row 0 of x is padding alone"),
    ],
)
def test_feature_errors(x, missing, message):
    with pytest.raises(DataError, match=message):
        check_features(x, missing, ["p", "q"])


def test_what_passes():
    y = np.array([[1.0, NAN], [NAN, 2], [3, 4]])
    check_rows(np.zeros((3, 0)), y)
    check_rows(np.array([[1.0, NAN], [NAN, 2], [3, 4]]), y, "indicator")
    check_rows({"c": TEXT, "n": np.array([1, 2, 3])}, y, "indicator")
    check_rows({"c": np.array(["a", "b", "c"])}, y)


def test_constant_features_pass_also_where_their_mean_is_rounded():
    constant = np.full(10_741, 0.998)
    assert constant.std() > 0.0
    rounded = np.where(np.arange(10_741) % 2, 0.3, 0.1 + 0.2)
    check_features(np.stack([constant, rounded, constant > 0.0], axis=1))
    check_features(np.array([[True], [False]]))
    with pytest.raises(DataError, match="float32 cannot resolve"):
        check_features(1e9 + np.arange(3.0)[:, np.newaxis])


def test_padding_is_not_missing():
    x = np.ones((3, 4, 2))
    x[0, 2:] = NAN
    y = np.arange(12.0).reshape(3, 4, 1)
    check_rows(x, y)
    x[1, 1, 0] = NAN
    with pytest.raises(
        DataError, match="feature 0 is missing in 1 places, first in row 1, step 1"
    ):
        check_rows(x, y)
    check_rows(x, y, "indicator")


@pytest.mark.parametrize(
    ("x", "shape", "message"),
    [
        (np.zeros((4, 1)), (3, 1), "x has 4 rows but y has 3"),
        ({"c": np.zeros(4)}, (3, 1), "c has 4 rows but y has 3"),
        (np.zeros((3, 5, 1)), (3, 4, 1), r"y of shape \[3, 4, 1\].*not shape \[3, 5, 1\]"),
        ({"c": np.zeros(3)}, (3, 4, 1), "not columns"),
    ],
)
def test_misaligned_rows(x, shape, message):
    with pytest.raises(DataError, match=message):
        check_rows(x, np.arange(np.prod(shape), dtype=float).reshape(shape))


def test_messages_take_the_callers_name_for_a_row():
    with pytest.raises(DataError, match="inf in line 4"):
        check_targets(np.array([[1.0], [2.0], [np.inf]]), row=lambda i: f"line {i + 2}")


@pytest.mark.parametrize("bad", [NAN, np.inf, -1.0])
def test_weights(bad):
    check_weight(np.array([0.0, 2.0]), "w")
    with pytest.raises(DataError, match=f"w is {bad} in row 1"):
        check_weight(np.array([1.0, bad]), "w")
    with pytest.raises(DataError, match="w is zero in every row"):
        check_weight(np.zeros(2), "w")
    with pytest.raises(DataError, match=r"w has shape \[2, 1\]"):
        check_weight(np.ones((2, 1)), "w")


def test_batch_size():
    check_batch_size(10, 10)
    with pytest.raises(DataError, match="9 train rows are fewer than one batch of 10: set batch_"):
        check_batch_size(9, 10)


def test_find_missing():
    assert find_missing(np.array(["a", "", None, NAN, pd.NA], object)).tolist() == [False] + 4 * [
        True
    ]
    assert find_missing(np.array([0.0, NAN])).tolist() == [False, True]
    assert find_missing(np.array([0, 1])).tolist() == [False, False]
