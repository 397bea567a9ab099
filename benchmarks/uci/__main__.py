"""`python -m benchmarks.uci`."""

from __future__ import annotations

import argparse
import functools
import hashlib
import sys
import time
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import Progress, TaskID, TimeElapsedColumn, TimeRemainingColumn

import benchmarks.uci
from benchmarks.uci.sets import find_sets, find_splits, fingerprint, parse_splits
from mdn.cli.quiet import import_tensorflow
from mdn.config import compose_config
from mdn.errors import MDNError


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.uci",
        description=benchmarks.uci.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="the folder of the sets")
    parser.add_argument("--sets", default="", help="names of folders: a,b; default: all")
    parser.add_argument("--splits", default=None, help="numbers: 0-4,7; default: all")
    parser.add_argument("--json", type=Path, default=Path("runs/uci.json"), help="results")
    parser.add_argument("overrides", nargs="*", help="of the config, such as k=5")
    options = parser.parse_args(arguments)
    try:
        run(options)
    except MDNError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted: the same command goes on from {options.json}", file=sys.stderr)
        return 130
    return 0


def run(options: argparse.Namespace) -> None:
    """Fit and score what is not done yet, and print the table.

    Raises:
        MDNError: what the user can mend.
    """
    chosen = None if options.splits is None else parse_splits(options.splits)
    paths = find_sets(options.data, [name for name in options.sets.split(",") if name])
    splits = {name: find_splits(path, chosen) for name, path in paths.items()}
    config = compose_config(["experiment=tabular", "data=npz", *options.overrides])
    recipe = hashlib.sha256(OmegaConf.to_yaml(config).encode()).hexdigest()[:16]
    import_tensorflow()
    from benchmarks.uci.fits import Fitter
    from benchmarks.uci.report import Results, markdown
    from benchmarks.uci.scores import score

    results = Results(options.json)
    keys = {name: f"{fingerprint(path)}-{recipe}" for name, path in paths.items()}
    todo = {
        name: [i for i in splits[name] if not results.has(name, i, keys[name])] for name in paths
    }
    columns = (*Progress.get_default_columns()[:-1], TimeRemainingColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=sum(map(len, todo.values())))
        done = 0
        for name, path in paths.items():
            fitter = Fitter(path.resolve(), options.overrides)
            for split in todo[name]:
                bar.update(task, description=f"{name} {split}")
                start = time.perf_counter()
                report = functools.partial(_advance, bar, task, done)
                density, data, shares = fitter.fit(split, report)
                known = np.concatenate([data.train.y, data.validation.y])
                scores = score(density, data.test.y, known)
                seconds = time.perf_counter() - start
                results.add(
                    name, split, keys[name], {**scores, "seconds": seconds, "shares": shares}
                )
                done += 1
                bar.update(task, completed=done)
    shown = {name: results.sets[name] for name in paths}
    print(markdown(shown), end="")


def _advance(bar: Progress, task: TaskID, done: int, share: float) -> None:
    bar.update(task, completed=done + share)


if __name__ == "__main__":
    sys.exit(main())
