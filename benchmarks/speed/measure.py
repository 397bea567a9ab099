"""One interleaved run of several entrants, and the check that they did the same."""

from __future__ import annotations

import dataclasses
import gc
import random
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.speed.workloads import Workload

# Of the loss before training, which float32 and another order of sums may change a little.
START_TOLERANCE = 1e-4
# Of the loss after it, nats per row: so much, and so much for each target. The order of the rows
# is each contender's own.
FINAL_TOLERANCE = 0.05, 0.015
START_ROWS = 2048


class Spread(NamedTuple):
    """A median with the least and the greatest value."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Any) -> Spread:
        return cls(*(float(f(values)) for f in (np.median, np.min, np.max)))


@dataclasses.dataclass
class Entrant:
    """One line of a run: who, on what, and what came of it.

    Attributes:
        key: its name among the entrants.
        label: its name in the tables.
        workload: what it trains on.
        make: returns the runner, see `benchmarks.speed.contenders.Runner`.
        first_seconds: to make it and train for the first time, all compilation included.
        microseconds: of a train step, one number for each round.
        start_loss: of the first rows under the starting weights, if it has such a loss.
        final_loss: of all rows at the end.
        failure: why it is not there.
    """

    key: str
    label: str
    workload: Workload
    make: Callable[[], Any]
    first_seconds: float | None = None
    microseconds: list[float] = dataclasses.field(default_factory=list)
    start_loss: float | None = None
    final_loss: float | None = None
    failure: str | None = None

    @property
    def spread(self) -> Spread | None:
        return Spread.of(self.microseconds) if self.failure is None else None

    def over(self, other: Entrant) -> Spread | None:
        """Return how many times as long as the other it takes, round by round."""
        if self.failure is not None or other.failure is not None:
            return None
        return Spread.of(np.divide(self.microseconds, other.microseconds))

    def record(self) -> dict[str, Any]:
        """Return what there is to know, for JSON."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del values["make"]
        return {**values, "workload": dataclasses.asdict(self.workload)}


def race(entrants: Sequence[Entrant], repeats: int) -> None:
    """Train all entrants in turn, in another order each round, and write down the times.

    Each trains the same number of epochs: once untimed, to compile, and once a round. One that
    raises is out, and its `failure` says why.
    """
    runners: dict[int, Any] = {}
    for i, entrant in enumerate(entrants):
        _say(f"{entrant.workload.name}: {entrant.label}")
        begun = time.perf_counter()
        try:
            runner = entrant.make()
            spent = time.perf_counter() - begun
            if hasattr(runner, "loss"):
                entrant.start_loss = runner.loss(min(START_ROWS, entrant.workload.rows))
            begun = time.perf_counter()
            runner.train(entrant.workload.epochs)
        except Exception as error:  # whatever a peer may raise
            _fail(entrant, error)
            continue
        entrant.first_seconds = spent + time.perf_counter() - begun
        runners[i] = runner
    order = random.Random(0)
    for repeat in range(repeats):
        _say(f"round {repeat + 1} of {repeats}")
        for i in order.sample(list(runners), len(runners)):
            workload = entrants[i].workload
            steps = getattr(runners[i], "steps", workload.steps)
            gc.collect()
            begun = time.perf_counter()
            try:
                runners[i].train(workload.epochs)
            except Exception as error:
                _fail(entrants[i], error)
                del runners[i]
                continue
            seconds = time.perf_counter() - begun
            entrants[i].microseconds.append(1e6 * seconds / (workload.epochs * steps))
    for i, runner in runners.items():
        if hasattr(runner, "loss"):
            entrants[i].final_loss = runner.loss(entrants[i].workload.rows)


def disagreements(entrants: Sequence[Entrant], reference: float) -> list[str]:
    """Return what shows that the entrants did not train the same model: nothing, if all is well.

    Args:
        entrants: those of one workload, after their race.
        reference: the loss before training, computed on its own.
    """
    found = []
    judged = [entrant for entrant in entrants if entrant.final_loss is not None]
    losses = [e.final_loss for e in judged if e.final_loss is not None]
    for entrant in judged:
        where = f"{entrant.workload.name}, {entrant.label}"
        start, final = entrant.start_loss or np.nan, entrant.final_loss or np.nan
        if not abs(start - reference) <= START_TOLERANCE * max(1.0, abs(reference)):
            found.append(f"{where}: the loss starts at {start:.5f} and not at {reference:.5f}")
        tolerance = FINAL_TOLERANCE[0] + FINAL_TOLERANCE[1] * entrant.workload.targets
        if not abs(final - np.median(losses)) <= tolerance:
            found.append(
                f"{where}: the loss ends at {final:.4f}, more than {tolerance:.3g} from the "
                f"median of all, {np.median(losses):.4f}"
            )
    return found


def _fail(entrant: Entrant, error: Exception) -> None:
    if isinstance(error, ModuleNotFoundError):
        entrant.failure = not_installed(error)
    else:
        lines = str(error).strip().splitlines() or [""]
        entrant.failure = f"{type(error).__name__}: {lines[0][:200]}"
    _say(f"  {entrant.failure}")


def not_installed(error: ModuleNotFoundError) -> str:
    """Return what to do about a package that is not there."""
    return f"{error.name} is not installed: pip install -e '.[speed]'"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
