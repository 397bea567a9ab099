"""Training speed of `mdn` beside Keras, PyTorch and JAX on the machine at hand.

    pip install -e '.[speed]' && python -m benchmarks.speed

A run of everything takes over an hour on two cores. What is not installed is left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from benchmarks.speed.contenders import CONTENDERS, MDN
from benchmarks.speed.report import markdown, write
from benchmarks.speed.results import Results
from benchmarks.speed.workloads import ROWS, WORKLOADS
from mdn.cli.quiet import import_tensorflow
from mdn.errors import MDNError

SECTIONS = (
    "race",
    "precision",
    "profile",
    "cost",
    "memory",
    "ensembles",
    "streaming",
    "inference",
)
BASE = "M"  # what cost, ensembles, streaming and inference are measured on
OUTPUT = Path(__file__).resolve().parents[2] / "docs" / "benchmarks"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; return 1 where the contenders do not agree on the loss."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    # Here and not above: each worker imports this module, and JAX's need no TensorFlow.
    import_tensorflow()
    from benchmarks.speed import sections

    warnings.filterwarnings("ignore")
    logging.getLogger("jax").setLevel(logging.ERROR)
    results = Results(_command(options), options.repeats)
    if options.json is not None and options.json.exists():
        try:
            results = Results.open(options.json, results.command, options.repeats)
        except MDNError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    contenders = [c for c in CONTENDERS if c.key in options.contenders]
    chosen = [dataclasses.replace(WORKLOADS[n], rows=options.rows) for n in options.workloads]
    base = dataclasses.replace(WORKLOADS[BASE], rows=options.rows)

    def save() -> None:  # as it goes, so that a long run that is stopped has not run in vain
        results.race = {n: results.race[n] for n in WORKLOADS if n in results.race}
        if options.json is not None:
            results.write_json(options.json)
        if options.output is not None:
            write(results, options.output)

    for workload in chosen:
        if "race" in options.sections and workload.name not in results.race:
            entrants = sections.compete(workload, contenders, options.repeats)
            results.race[workload.name] = entrants
            save()
        if "precision" in options.sections and workload.name not in results.precision:
            results.precision[workload.name] = sections.precision(workload, options.repeats)
        if "profile" in options.sections and workload.name not in results.profile:
            results.profile[workload.name] = sections.profile(workload)
            results.parts[workload.name] = sections.parts(workload, options.repeats)
        if "memory" in options.sections and workload.name not in results.memory:
            results.memory[workload.name] = sections.peaks(workload, contenders)
        save()
    for section in ("cost", "ensembles", "streaming", "inference"):
        if section in options.sections and not getattr(results, section):
            setattr(results, section, getattr(sections, section)(base, options.repeats))
            save()
    print(markdown(results))
    for line in results.disagreements:
        print(f"not the same model: {line}", file=sys.stderr)
    ours = [e for entrants in results.race.values() for e in entrants if e.key == MDN.key]
    failed = any(entrant.failure is not None for entrant in ours)
    return 1 if results.disagreements or failed else 0


def _command(options: argparse.Namespace) -> str:
    """Return the command that measures the same, without the places it writes to."""
    standard, words = parse([]), ["python -m benchmarks.speed"]
    for name in ("workloads", "contenders", "sections", "rows", "repeats"):
        value = getattr(options, name)
        if value != getattr(standard, name):
            words += [f"--{name}", ",".join(value) if isinstance(value, list) else str(value)]
    return " ".join(words)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options; a run of everything is written to the documentation by default."""
    doc = (__doc__ or "").split("\n")
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=doc[0])

    def names(known: Sequence[str]):
        def read(text: str) -> list[str]:
            for name in (found := text.split(",")):
                if name not in known:
                    raise argparse.ArgumentTypeError(f"{name!r} is not one of {','.join(known)}")
            return found

        return read

    keys = [contender.key for contender in CONTENDERS]
    for option, known in (
        ("workloads", list(WORKLOADS)),
        ("contenders", keys),
        ("sections", SECTIONS),
    ):
        parser.add_argument(
            f"--{option}",
            type=names(known),
            default=list(known),
            metavar="A,B",
            help=f"of {','.join(known)}; default all",
        )
    parser.add_argument("--rows", type=int, default=ROWS, help=f"N; default {ROWS}")
    parser.add_argument("--repeats", type=int, default=7, help="rounds; default 7")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="OUT",
        help="write all numbers to this file; what it has is not measured again",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="write speed.md and speed.png there; default docs/benchmarks for a run of everything "
        "with at least 5 rounds, and nowhere for any other",
    )
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats}: at least 1")
    batch = max(workload.batch for workload in WORKLOADS.values())
    if options.rows < 1 or options.rows % batch:
        parser.error(
            f"--rows {options.rows}: must be a multiple of {batch}, as not all contenders train "
            "on what does not fill a batch"
        )
    everything = (
        set(options.workloads) == set(WORKLOADS)
        and set(options.contenders) == set(keys)
        and set(options.sections) == set(SECTIONS)
        and options.rows == ROWS
        and options.repeats >= 5
    )
    if options.output is None and everything:
        options.output = OUTPUT
    return options


if __name__ == "__main__":
    sys.exit(main())
