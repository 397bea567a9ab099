"""What is measured: each function returns what one table of the report shows, as plain data."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from benchmarks.speed import floors, operations, ours
from benchmarks.speed.contenders import NETWORK, PRECISION, Contender
from benchmarks.speed.measure import START_ROWS, Entrant, Losses, race
from benchmarks.speed.reference import Reference
from benchmarks.speed.workers import not_installed
from benchmarks.speed.workloads import Problem, Workload, draw
from mdn.data.records import TFRecord
from mdn.data.tabular import Parquet
from mdn.inference import largest_batch

# Whose memory is looked at, of those that take part.
_MEMORY = ("mdn", "keras", "torch-solve", "jax-rows")
DOUBLINGS = 4
MEMBERS = (1, 5, 20)
STREAMED_ROWS = 16  # times those of the workload
SCORED_ROWS = 64  # likewise: a million


def compete(workload: Workload, contenders: Sequence[Contender], repeats: int) -> list[Entrant]:
    """Race the contenders and the bare network."""
    problem = ours.with_start(draw(workload))
    network = Entrant(NETWORK.key, NETWORK.label, workload, partial(NETWORK.make, problem))
    entrants = [*checked(problem, contenders), network]
    race(entrants, repeats)
    return entrants


def precision(workload: Workload, repeats: int) -> list[Entrant]:
    """Race those whose triangles are factors of the precision."""
    problem = ours.with_start(draw(workload), ours.OursPrecision.head)
    entrants = checked(problem, PRECISION, precision=True)
    race(entrants, repeats)
    return entrants


def checked(
    problem: Problem, contenders: Sequence[Contender], precision: bool = False
) -> list[Entrant]:
    """Return entrants that know what losses they are to reach."""

    @cache
    def expected(late_epsilon: bool) -> Losses:
        reference = Reference(problem, precision, late_epsilon)
        start = reference.loss(min(START_ROWS, problem.workload.rows))
        reference.train()
        return Losses(start, reference.loss(problem.workload.rows))

    return [
        Entrant(
            contender.key,
            contender.label,
            problem.workload,
            partial(contender.make, problem),
            expected(contender.late_epsilon),
        )
        for contender in contenders
    ]


def profile(workload: Workload) -> dict[str, float]:
    """Return what a step of `mdn` spends its time on, see `benchmarks.speed.operations`."""
    problem = ours.with_start(draw(workload))
    runner = ours.Ours(problem)
    return operations.measure(
        partial(runner.train, workload.epochs), workload.epochs * workload.steps
    )


def parts(workload: Workload, repeats: int) -> list[Entrant]:
    """Race what a step has to do in any case, and the fastest peer's step, in both XLAs."""
    problem = ours.with_start(draw(workload))
    makers: list[tuple[str, str, Callable[[str], Any]]] = [
        ("Products", "the matrix products alone", partial(floors.Products, workload)),
        ("Adam", "Adam alone", partial(floors.Adam, workload)),
        ("Peer", "JAX's step, unrolled, batch last", partial(floors.Peer, problem)),
    ]
    entrants = [
        Entrant(f"{name}-{package}", f"{what}, {compiler}", workload, partial(make, package))
        for name, what, make in makers
        for package, compiler in (("tensorflow", "TensorFlow's XLA"), ("jax", "JAX"))
    ]
    race(entrants, repeats)
    return entrants


def cost(base: Workload, repeats: int) -> dict[str, list[Entrant]]:
    """Double N, K and D in turn; return the entrants for each, the base first."""
    sizes = {"N": "rows", "K": "components", "D": "targets"}
    series: dict[str, list[Entrant]] = {}
    entrants = [_sized(base)]
    for letter, field in sizes.items():
        grown = []
        for i in range(1, DOUBLINGS + 1):
            size = getattr(base, field) * 2**i
            epochs = max(1, base.epochs // 2**i) if field == "rows" else base.epochs
            workload = dataclasses.replace(base, **{field: size}, epochs=epochs)
            grown.append(_sized(dataclasses.replace(workload, name=f"{letter} = {size:,}")))
        series[letter] = [entrants[0], *grown]
        entrants += grown
    race(entrants, repeats)
    return series


def _sized(workload: Workload) -> Entrant:
    return Entrant(
        workload.name,
        "mdn",
        workload,
        partial(ours.Ours, ours.with_start(draw(workload))),
    )


def peaks(workload: Workload, contenders: Sequence[Contender]) -> dict[str, dict[str, Any]]:
    """Return label -> what `benchmarks.speed.memory.measure` found."""
    chosen = [contender for contender in contenders if contender.key in _MEMORY]
    try:
        memory = importlib.import_module("benchmarks.speed.memory")
    except ModuleNotFoundError as error:
        return {c.label: {"failure": not_installed(error)} for c in chosen}
    problem = ours.with_start(draw(workload))
    return {contender.label: memory.measure(problem, contender) for contender in chosen}


def ensembles(workload: Workload, repeats: int) -> list[Entrant]:
    """Race ensembles of 1, 5 and 20 members; nothing while `mdn` has none."""
    if importlib.util.find_spec("mdn.ensembles") is None:
        return []
    problem = draw(workload)
    entrants = [
        Entrant(str(m), f"{m} members", workload, partial(ours.Members, problem, m))
        for m in MEMBERS
    ]
    race(entrants, repeats)
    return entrants


def streaming(workload: Workload, repeats: int) -> list[Entrant]:
    """Race rows in memory and rows read anew each epoch; nothing while `mdn` reads all at once."""
    if importlib.util.find_spec("mdn.data.streams") is None:
        return []
    workload = dataclasses.replace(workload, rows=STREAMED_ROWS * workload.rows, epochs=2)
    problem = draw(workload)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ours.write_parquet(problem, folder)
        ours.write_records(problem, folder)
        sources: dict[str, Callable[..., Any]] = {
            "in memory": Parquet,
            "streamed": partial(Parquet, stream=True),
            "streamed, TFRecord": TFRecord,
        }
        entrants = [
            Entrant(label, label, workload, partial(ours.FromFiles, problem, source, folder))
            for label, source in sources.items()
        ]
        race(entrants, repeats)
    return entrants


def inference(workload: Workload, repeats: int) -> list[Entrant]:
    """Race the bare network, log densities, and means; a step is a batch of rows."""
    batch = largest_batch(workload.outputs)
    workload = dataclasses.replace(
        workload, rows=SCORED_ROWS * workload.rows, batch=batch, epochs=1
    )
    problem = ours.with_start(draw(workload))
    entrants = [
        Entrant("forward", "the bare network", workload, partial(ours.Forward, problem)),
        *(
            Entrant(question, f"`{question}`", workload, partial(ours.Scores, problem, question))
            for question in ("log_prob", "predict")
        ),
    ]
    race(entrants, repeats)
    return entrants
