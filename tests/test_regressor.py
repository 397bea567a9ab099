"""`MDNRegressor`: scikit-learn's own checks, and what they do not ask."""

from sklearn.utils.estimator_checks import parametrize_with_checks

from mdn import MDNRegressor

TINY = {"components": 2, "widths": (8,), "steps": 20, "random_state": 0}


@parametrize_with_checks([MDNRegressor(**TINY)])
def test_scikit_learn_finds_an_estimator(estimator, check):
    check(estimator)
