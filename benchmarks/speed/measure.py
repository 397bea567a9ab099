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

# Of a loss, relative to it where it is above one. After an epoch of S, M, L or H the rounding of
# float32 has changed it by less than a tenth of this, a learning rate that is 1 % off by more than
# ten times as much.
TOLERANCE = 1e-5
START_ROWS = 2048


class Spread(NamedTuple):
    """A median with the least and the greatest value."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Any) -> Spread:
        return cls(*(float(f(values)) for f in (np.median, np.min, np.max)))


class Losses(NamedTuple):
    """Mean NLL of rows, nats per row, that training along a given order leads to.

    Attributes:
        start: of the first rows under the starting weights.
        epoch: of all rows after an epoch in which the rows come in their own order.
    """

    start: float
    epoch: float


@dataclasses.dataclass
class Entrant:
    """One line of a run: who, on what, and what came of it.

    Attributes:
        key: its name among the entrants.
        label: its name in the tables.
        workload: what it trains on.
        make: returns the runner, see `benchmarks.speed.workers.Worker`.
        expected: see `Losses`; None where there is nothing to compare.
        found: what it reaches in their place.
        microseconds: of a train step, one number for each round.
        final_loss: of all rows after the last round.
        failure: why it is not there.
    """

    key: str
    label: str
    workload: Workload
    make: Callable[[], Any]
    expected: Losses | None = None
    found: Losses | None = None
    microseconds: list[float] = dataclasses.field(default_factory=list)
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

    @classmethod
    def restore(cls, record: dict[str, Any]) -> Entrant:
        """Return what `record` returned; it has nothing left to train."""
        workload = Workload(
            **{**record["workload"], "widths": tuple(record["workload"]["widths"])}
        )
        losses = {n: record[n] and Losses(*record[n]) for n in ("expected", "found")}
        return cls(**{**record, **losses, "workload": workload, "make": _has_run})

    def record(self) -> dict[str, Any]:
        """Return what there is to know, for JSON."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del values["make"]
        return {**values, "workload": dataclasses.asdict(self.workload)}


def race(entrants: Sequence[Entrant], repeats: int) -> None:
    """Train all entrants in turn, in another order each round, and write down the times.

    Each has a process of its own and trains the same number of epochs: once untimed, to compile,
    and once a round; before that an epoch in the given order, where losses are expected of it. One
    that raises is out, and its `failure` says why.
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
        if entrant.expected is not None:
            start = worker.loss(min(START_ROWS, entrant.workload.rows))
            worker.train_in_order()
            entrant.found = Losses(start, worker.loss(entrant.workload.rows))
        worker.train(entrant.workload.epochs)

    def train(i: int) -> None:
        workload = entrants[i].workload
        steps = workers[i].steps(workload.steps)
        seconds = workers[i].train(workload.epochs)
        entrants[i].microseconds.append(1e6 * seconds / (workload.epochs * steps))

    def finish(i: int) -> None:
        if entrants[i].expected is not None:
            entrants[i].final_loss = workers[i].loss(entrants[i].workload.rows)

    try:
        for i, entrant in enumerate(entrants):
            _say(f"{entrant.workload.name}: {entrant.label}")
            run(i, partial(start, i))
        order = random.Random(0)
        for repeat in range(repeats):
            _say(f"round {repeat + 1} of {repeats}")
            for i in order.sample(list(workers), len(workers)):
                run(i, partial(train, i))
        for i in list(workers):
            run(i, partial(finish, i))
    finally:
        for worker in workers.values():
            worker.close()


def disagreements(entrants: Sequence[Entrant]) -> list[str]:
    """Return a line for each loss that an entrant should have reached and has not."""
    lines = []
    for entrant in entrants:
        if entrant.expected is None or entrant.found is None:
            continue
        where = f"{entrant.workload.name}, {entrant.label}"
        times = "before training", "after an epoch"
        for time, found, expected in zip(times, entrant.found, entrant.expected, strict=True):
            if not abs(found - expected) <= TOLERANCE * max(1.0, abs(expected)):
                lines.append(f"{where}: the loss {time} is {found:.6f} and not {expected:.6f}")
        epoch, final = entrant.found.epoch, entrant.final_loss
        if final is not None and not final < epoch:
            lines.append(f"{where}: the loss is {epoch:.4f} after an epoch, then {final:.4f}")
    return lines


def _has_run() -> None:
    raise RuntimeError("an entrant of a race that is over")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
