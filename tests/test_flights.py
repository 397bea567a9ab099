"""Flights: no flight is lost, nothing leaks, and days stay together."""

import importlib.util
import inspect
import pathlib

import numpy as np
import pytest
import yaml

from mdn.data.flights import CATEGORIES, WEATHER, Flights, read_flights
from mdn.errors import DataError

# On one worker, which makes the fixtures once.
pytestmark = pytest.mark.xdist_group("flights")

FLIGHTS = 336_776


@pytest.fixture(scope="module")
def frame():
    return read_flights()


@pytest.fixture(scope="module")
def data():
    return Flights().load()


def test_every_flight_is_there_once(frame, data):
    assert len(frame) == FLIGHTS
    assert data.notes == {"data/rows": 328_521.0, "data/rows_without_target": 8_255.0}
    splits = (data.train, data.validation, data.test)
    assert sum(map(len, splits)) == 328_521
    # Departed but diverted: the arrival delay alone is missing.
    assert sum(np.isnan(r.y[:, 1]).sum() for r in splits) == 1_175
    assert not any(np.isnan(r.y[:, 0]).any() for r in splits)


def test_features_are_known_before_the_flight(frame, data):
    assert data.features == (
        *CATEGORIES,
        "distance",
        "sched_dep_minute",
        "sched_arr_minute",
        *WEATHER,
    )
    assert tuple(data.train.x) == data.features
    assert frame["sched_dep_minute"].between(0, 1439).all()
    assert (frame["sched_arr_minute"] > frame["sched_dep_minute"]).all()
    # 515 and 819 on the first row are 5:15 and 8:19.
    assert frame.loc[0, ["sched_dep_minute", "sched_arr_minute"]].tolist() == [315, 499]


def test_weather_is_of_the_scheduled_hour(frame):
    missing = frame["temp"].isna().mean()
    assert 0 < missing < 0.01
    # Local hours: the afternoon is warmest, whatever the zone of the keys.
    july = frame[frame["date"].dt.month == 7]
    warmest = july.groupby(july["sched_dep_minute"] // 60)["temp"].mean().idxmax()
    assert 13 <= warmest <= 17


def test_types(data):
    for name, values in data.train.x.items():
        assert values.dtype == (object if name in CATEGORIES else np.float64)
    assert set(data.train.x["origin"]) == {"EWR", "JFK", "LGA"}
    assert len(set(data.train.x["weekday"])) == 7


@pytest.mark.parametrize("split", ["time", "group"])
def test_days_stay_together(frame, split, monkeypatch):
    # The date is no feature: let the delay carry the day of the year through the split.
    day = frame["date"].dt.dayofyear.astype(float)
    monkeypatch.setattr("mdn.data.flights.read_flights", lambda: frame.assign(dep_delay=day))
    data = Flights(split=split).load()
    train, validation, test = (set(r.y[:, 0]) for r in (data.train, data.validation, data.test))
    assert len(train) + len(validation) + len(test) == len(train | validation | test) == 365
    if split == "time":
        assert max(train) < min(validation)
        assert max(validation) < min(test)


@pytest.mark.parametrize("split", ["time", "group", "random"])
def test_splits(split):
    data = Flights(split=split, max_rows=2_000).load()
    assert sum(data.notes.values()) == 2_000
    sizes = np.array([len(data.train), len(data.validation), len(data.test)])
    np.testing.assert_allclose(sizes / sizes.sum(), [0.7, 0.1, 0.2], atol=0.02)


def test_missing_weather_can_be_refused():
    with pytest.raises(DataError, match=r"data.missing=indicator"):
        Flights(missing="error", max_rows=2_000).load()


def test_without_the_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install 'mdn\[flights\]'"):
        Flights().load()


def test_config_lists_the_defaults():
    config = yaml.safe_load(pathlib.Path("configs/data/flights.yaml").read_text())
    assert config.pop("_target_") == "mdn.data.flights.Flights"
    assert config.pop("seed") == "${seed}"
    defaults = {k: p.default for k, p in inspect.signature(Flights).parameters.items()}
    assert {**config, "seed": 0} == defaults
