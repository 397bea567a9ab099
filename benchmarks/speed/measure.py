"""One interleaved run of several entrants, and the check that they did the same."""

from __future__ import annotations

import dataclasses
import random
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from benchmarks.speed.workers import Worker, WorkerError
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
        make: returns the runner, see `benchmarks.speed.workers.Worker`.
        first_seconds: to make it and train for the first time, all compilation included.
        microseconds: of a train step, one number for each round.
        start_loss: of the first rows under the starting weights, if it has such a loss.
        losses: of all rows, at the end of each round.
        failure: why it is not there.
    """

    key: str
    label: str
    workload: Workload
    make: Callable[[], Any]
    first_seconds: float | None = None
    microseconds: list[float] = dataclasses.field(default_factory=list)
    start_loss: float | None = None
    losses: list[float] = dataclasses.field(default_factory=list)
    failure: str | None = None

    @property
    def final_loss(self) -> float | None:
        """The mean over the rounds: that of a single one tells which batches came last."""
        return float(np.mean(self.losses)) if self.losses else None

    @property
    def spread(self) -> Spread | None:
        return Spread.of(self.microseconds) if self.failure is None else None

    def over(self, other: Entrant) -> Spread | None:
        """Return how many times as long as the other it takes, round by round."""
        if self.failure is not None or other.failure is not None:
            return None
        return Spread.of(np.divide(self.microseconds, other.microseconds))

    @classmethod
    def restore(cls, record: dict[str, Any]) -> Entrant:
        """Return what `record` returned; it has nothing left to train."""
        workload = Workload(
            **{**record["workload"], "widths": tuple(record["workload"]["widths"])}
        )
        return cls(**{**record, "workload": workload, "make": _has_run})

    def record(self) -> dict[str, Any]:
        """Return what there is to know, for JSON."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del values["make"]
        return {**values, "workload": dataclasses.asdict(self.workload)}


def race(entrants: Sequence[Entrant], repeats: int) -> None:
    """Train all entrants in turn, in another order each round, and write down the times.

    Each has a process of its own and trains the same number of epochs: once untimed, to compile,
    and once a round. One that raises is out, and its `failure` says why.
    """
    workers: dict[int, Worker] = {}

    def run(i: int, act: Callable[[], None]) -> None:
        try:
            act()
        except WorkerError as error:
            entrants[i].failure = str(error)
            _say(f"  {error}")
            if i in workers:
                workers.pop(i).close()

    def start(i: int) -> None:
        entrant = entrants[i]
        worker = workers[i] = Worker(entrant.make)
        entrant.start_loss = worker.loss(min(START_ROWS, entrant.workload.rows))
        entrant.first_seconds = worker.make_seconds + worker.train(entrant.workload.epochs)

    def train(i: int) -> None:
        workload = entrants[i].workload
        steps = workers[i].steps(workload.steps)
        seconds = workers[i].train(workload.epochs)
        entrants[i].microseconds.append(1e6 * seconds / (workload.epochs * steps))
        if (loss := workers[i].loss(workload.rows)) is not None:
            entrants[i].losses.append(loss)

    try:
        for i, entrant in enumerate(entrants):
            _say(f"{entrant.workload.name}: {entrant.label}")
            run(i, partial(start, i))
        order = random.Random(0)
        for repeat in range(repeats):
            _say(f"round {repeat + 1} of {repeats}")
            for i in order.sample(list(workers), len(workers)):
                run(i, partial(train, i))
    finally:
        for worker in workers.values():
            worker.close()


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
                f"{where}: the mean loss is {final:.4f}, more than {tolerance:.3g} from the "
                f"median of all, {np.median(losses):.4f}"
            )
    return found


def _has_run() -> None:
    raise RuntimeError("an entrant of a race that is over")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
