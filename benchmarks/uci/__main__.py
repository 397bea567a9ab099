"""`python -m benchmarks.uci`."""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn, TimeRemainingColumn

import benchmarks.uci
from benchmarks.jobs import exit_code, run_units
from benchmarks.uci.blocks import fit_block, make_blocks
from benchmarks.uci.report import Results, draw, markdown, page
from benchmarks.uci.sets import find_sets, find_splits, fingerprint, parse_splits
from mdn.config import compose_config


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
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="processes; default: cores"
    )
    parser.add_argument("--output", type=Path, help="a folder for the page uci.md and its picture")
    parser.add_argument("overrides", nargs="*", help="of the config, such as k=5")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: at least 1")
    return exit_code(lambda: run(options), options.json)


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
    results = Results(options.json)
    keys = {name: f"{fingerprint(path)}-{recipe}" for name, path in paths.items()}
    todo = {
        name: [i for i in splits[name] if not results.has(name, i, keys[name])] for name in paths
    }
    blocks = make_blocks(paths, todo, options.overrides)
    columns = (*Progress.get_default_columns()[:-1], TimeRemainingColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=sum(map(len, todo.values())))
        shares: dict[tuple[str, int], float] = {}

        def receive(report: tuple[str, int, Any]) -> None:
            name, split, found = report
            if isinstance(found, dict):
                results.add(name, split, keys[name], found)
            shares[name, split] = 1.0 if isinstance(found, dict) else found
            bar.update(task, description=f"{name} {split}", completed=sum(shares.values()))

        run_units(fit_block, blocks, options.jobs, receive)
    found = {name: results.sets[name] for name in paths}
    print(markdown(found), end="")
    if options.output is not None:
        words = ["python -m benchmarks.uci --data DIR"]
        words += [f"--{o} {v}" for o in ("sets", "splits") if (v := getattr(options, o))]
        options.output.mkdir(parents=True, exist_ok=True)
        text = page(found, " ".join([*words, *options.overrides]))
        (options.output / "uci.md").write_text(text, "utf-8")
        draw(found, options.output / "uci.png")


if __name__ == "__main__":
    sys.exit(main())
