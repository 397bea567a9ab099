"""Regret against the number of rows, on tasks whose true density is known.

    python -m benchmarks.known_truth

Of n rows a model learns a density q; its regret is the mean of log p - log q over fresh test rows,
p the truth: the NLL less its least possible value. What is done is kept in the JSON file, and a
command that was interrupted goes on there.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.jobs import exit_code, run_units
from mdn.cli.quiet import import_tensorflow
from mdn.errors import MDNError

TASKS = {
    "econ_density": "EconDensity",
    "arma_jump": "ArmaJump",
    "skew_normal": "SkewNormal",
    "linear_gaussian": "LinearGaussian",
    "two_moons": "TwoMoons",
    "two_gaussians": "two Gaussians",
    "slcp": "SLCP",
    "sinusoid": "sinusoid",
}
SIZES = tuple(sorted([*(100 * 2**i for i in range(11)), 100_000]))
TEST_ROWS = 20_000
HELD_OUT = 0.2  # share of the n rows that each member validates on
LEAST = 50  # rows
OUTPUT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
STORE = Path("runs") / "known_truth.json"


def recipe(n: int) -> list[str]:
    """Return the options by which a density is learned from n rows: the same for every task."""
    return ["experiment=tabular", "trainer.verbose=0"]


def train(task: str, n: int, seed: int) -> dict[str, Any]:
    """Learn one task from n rows, held-out ones included, and judge it on fresh test rows."""
    import tf_keras

    from mdn.budget import epoch_steps, settle
    from mdn.config import compose_config, make
    from mdn.preparation import compile_model
    from mdn.recipes import fit_quietly, variants, weigh
    from mdn.stacking import stack
    from mdn.tasks import build_model
    from mdn.training import seed_everything

    held_out = round(HELD_OUT * n)
    config = compose_config(
        [
            *(f"data={task}", f"data.rows={n - held_out}", f"data.validation_rows={held_out}"),
            *(f"data.test_rows={TEST_ROWS}", f"seed={seed}", *recipe(n)),
        ]
    )
    seed_everything(config)
    data = make(config, "data").load()
    models, shares = {}, {}
    for name, variant in variants(config).items():
        settled = settle(variant, data)
        seed_everything(settled)
        model = models[name] = build_model(settled, data)
        compile_model(model, settled, epoch_steps(settled, data))
        fit_quietly(model, settled, data)
    if len(models) > 1:
        found = weigh(models, config, data)
        shares = found.shares
        model = stack(models, shares, found.spread, found.agreement)
    cell = {**judge(model, data), "shares": shares}
    del model, models
    tf_keras.backend.clear_session()  # programs of this size serve no other
    gc.collect()
    return cell


def judge(model: Any, data: Any) -> dict[str, float]:
    """Return what the test rows say of a model, next to the truth.

    A few of the numbers of `mdn.evaluation.evaluate`, without those that take longer than a
    training on few rows: CRPS and regions.
    """
    from mdn.evaluation import mean_and_error
    from mdn.margins import Margins

    y = data.test.y
    log_prob, rank = np.empty(len(y)), np.empty(y.shape)
    for rows, density in model.densities(data.test.x):
        log_prob[rows] = density.log_prob(y[rows].astype(np.float32))
        rank[rows] = Margins.of(density).cdf(y[rows])
    truth = data.truth.log_prob(y, np.asarray(data.test.x))
    weight = np.ones(len(y))
    nll, regret = (mean_and_error(v, weight) for v in (-log_prob, truth - log_prob))
    return {
        "nll": nll[0],
        "nll_se": nll[1],
        "regret": regret[0],
        "regret_se": regret[1],
        "coverage90": float(np.mean(np.abs(rank - 0.5) <= 0.45)),
        "entropy": float(data.truth.entropy()),
    }


def fit_cell(unit: tuple[str, int, int], report: Callable[[Any], None]) -> None:
    """Learn and judge the cell of (task, n, seed); report the task, n, and what was found."""
    import_tensorflow()
    task, n, seed = unit
    start = time.perf_counter()
    cell: dict[str, Any] = train(task, n, seed)
    cell["seconds"] = round(time.perf_counter() - start, 1)
    report((task, n, cell))


# ---------------------------------------------------------------------- results


@dataclasses.dataclass
class Results:
    """What was measured, in a JSON file that is written after each cell.

    Attributes:
        path: the file.
        settings: all that the numbers depend on.
        cells: task -> n -> regret, regret_se, nll, nll_se, coverage90, entropy, seconds.
    """

    path: Path
    settings: dict[str, Any]
    cells: dict[str, dict[int, dict[str, float]]] = dataclasses.field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, settings: dict[str, Any]) -> Results:
        """Return what is in the file, or nothing where there is none.

        Raises:
            MDNError: the file cannot be read, or its numbers were made in another way.
        """
        results = cls(path, json.loads(json.dumps(settings)))
        if not path.exists():
            return results
        try:
            found = json.loads(path.read_text())
            before, cells = found["settings"], found["tasks"]
            results.cells = {t: {int(n): c for n, c in row.items()} for t, row in cells.items()}
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise MDNError(
                f"--json {path} is not a file of this benchmark ({error!r}): name another"
            ) from error
        changed = [k for k in results.settings if before.get(k) != results.settings[k]]
        if changed:
            raise MDNError(
                f"--json {path} holds numbers of another {changed[0]}: remove it, or name another"
            )
        return results

    def add(self, task: str, n: int, cell: dict[str, float]) -> None:
        """Keep a cell, and write the file: whole, or not at all."""
        self.cells.setdefault(task, {})[n] = cell
        self.write()

    def write(self) -> None:
        """Write the file."""
        slopes = {task: slope(row) for task, row in self.cells.items()}
        content = {
            "settings": self.settings,
            "tasks": {
                task: {str(n): row[n] for n in sorted(row)} for task, row in self.cells.items()
            },
            "slopes": {task: s for task, s in slopes.items() if s is not None},
        }
        partial = self.path.with_name(f".{self.path.name}.partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
            os.replace(partial, self.path)
        except OSError as error:
            raise MDNError(f"cannot write {self.path}: {error.strerror}") from error


def slope(row: dict[int, dict[str, float]]) -> list[float] | None:
    """Return the slope of log regret over log n and its standard error, by least squares.

    Only regrets above two standard errors have a logarithm that says something; from fewer than
    three of them there is no slope.
    """
    points = [(n, c["regret"]) for n, c in row.items() if c["regret"] > 2 * c["regret_se"]]
    if len(points) < 3:
        return None
    x, y = np.log(np.array(sorted(points))).T
    x = x - x.mean()
    b = float(x @ y / (x @ x))
    residual = y - y.mean() - b * x
    return [b, float(np.sqrt(residual @ residual / (len(x) - 2) / (x @ x)))]


def markdown(results: Results, tasks: Sequence[str], sizes: Sequence[int]) -> str:
    """Return the table of the cells that there are."""
    tasks = [t for t in tasks if t in results.cells]
    lines = [
        "| n | " + " | ".join(TASKS[t] for t in tasks) + " |",
        "| --- |" + " --- |" * len(tasks),
    ]

    def add(label: str, values: Sequence[str]) -> None:
        lines.append(f"| {label} | " + " | ".join(values) + " |")

    for n in sizes:
        cells = [results.cells[t].get(n) for t in tasks]
        if any(cells):
            add(
                f"{n:,}", [f"{c['regret']:.4f} ± {c['regret_se']:.4f}" if c else "" for c in cells]
            )
    slopes = [slope(results.cells[t]) for t in tasks]
    add("slope", [f"{s[0]:.2f} ± {s[1]:.2f}" if s else "" for s in slopes])
    add("H", [f"{next(iter(results.cells[t].values()))['entropy']:.4f}" for t in tasks])
    return "\n".join(lines)


def _with_error(cell: dict[str, float]) -> str:
    return f"{cell['regret']:.4f} ± {cell['regret_se']:.4f}"


def page(results: Results, command: str) -> str:
    """Return the page of the documentation."""
    return f"""# Regret where the truth is known

What the default recipe loses against the true density, in nats a row: the mean of log p - log q
over {TEST_ROWS:,} fresh test rows, with its standard error. Of n rows, {HELD_OUT:.0%} validate.
The last rows are the slope of log regret over log n, over the regrets above two standard errors,
and the entropy H of the truth, which no density can fall below.

    {command}

![Regret against n](known_truth.png)

{markdown(results, [*TASKS], SIZES)}

The same options for all tasks and all n: `{" ".join(recipe(0))}`. Seed
{results.settings["seed"]}. Options of the recipe were compared on TwoMoons at n = 100,000; no
other task had a part in any choice. The rows of ArmaJump are the steps of one path, and a few have
not been everywhere: most of its regret at 100 and 200 is of test rows beyond the train rows.
"""


def draw(results: Results, path: Path) -> None:
    """Draw regret against n, both on logarithmic axes, with bars of one standard error."""
    from matplotlib.figure import Figure

    from mdn.plots import style_axes

    figure = Figure(figsize=(8, 5.5), dpi=100, layout="constrained")
    axes = figure.subplots()
    style_axes(axes, "n, rows to learn from", "regret, nats per row")
    for task, row in results.cells.items():
        n = np.array(sorted(row))
        regret, error = (np.array([row[i][k] for i in n]) for k in ("regret", "regret_se"))
        shown = regret > 0
        low = np.minimum(error, 0.9 * np.abs(regret))  # a logarithmic axis has no zero
        axes.errorbar(
            n[shown], regret[shown], [low[shown], error[shown]], fmt="o-", label=TASKS[task],
            markersize=4, linewidth=1.6, capsize=2,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    cells = [cell for row in results.cells.values() for cell in row.values()]
    if known := [c["regret"] for c in cells if c["regret"] > 2.0 * c["regret_se"]]:
        axes.set_ylim(bottom=0.3 * min(known))  # a regret like its error would stretch the axis
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=160)


# ---------------------------------------------------------------------- command


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is not measured yet, print the table; 2 after a mistake, 130 after Ctrl-C."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    settings = {
        "recipe": {str(n): recipe(n) for n in SIZES},
        "test_rows": TEST_ROWS,
        "held_out": HELD_OUT,
        "seed": options.seed,
    }
    return exit_code(lambda: report(options, settings), options.json)


def report(options: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Measure what is not measured yet, print the table, and write the page if there is to be one.

    Raises:
        MDNError: what the user can mend.
    """
    results = Results.open(options.json, settings)
    run(options, results, Console())
    print(markdown(results, options.tasks, options.n))
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "known_truth.md").write_text(page(results, _command(options)))
        draw(results, options.output / "known_truth.png")
        print(f"written: {options.output / 'known_truth.md'}")
    print(f"all numbers: {options.json}")


def run(options: argparse.Namespace, results: Results, console: Console) -> None:
    """Train and judge each cell that the results do not hold."""
    todo = [(t, n) for n in options.n for t in options.tasks if n not in results.cells.get(t, {})]
    if not todo:
        return
    results.write()  # what cannot be written is told before anything is trained
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        bar = progress.add_task("", total=len(options.n) * len(options.tasks))
        progress.advance(bar, len(options.n) * len(options.tasks) - len(todo))

        def receive(found: tuple[str, int, dict[str, Any]]) -> None:
            task, n, cell = found
            results.add(task, n, cell)
            done = f"{TASKS[task]}, n = {n:,}: {_with_error(cell)} ({cell['seconds']:.0f} s)"
            progress.console.print(done)
            progress.advance(bar)

        run_units(fit_cell, [(*cell, options.seed) for cell in todo], options.jobs, receive)


def _command(options: argparse.Namespace) -> str:
    words = ["python -m benchmarks.known_truth"]
    if options.tasks != list(TASKS):
        words.append(f"--tasks {','.join(options.tasks)}")
    if options.n != list(SIZES):
        words.append(f"--n {','.join(map(str, options.n))}")
    return " ".join(words + ([f"--seed {options.seed}"] if options.seed else []))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options; a run of everything is written to the documentation by default."""
    doc = (__doc__ or "").split("\n")
    parser = argparse.ArgumentParser(prog="python -m benchmarks.known_truth", description=doc[0])

    def names(text: str) -> list[str]:
        for name in (found := text.split(",")):
            if name not in TASKS:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {','.join(TASKS)}")
        return list(dict.fromkeys(found))

    def numbers(text: str) -> list[int]:
        try:
            found = sorted({int(word.replace("_", "")) for word in text.split(",")})
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers of rows") from None
        if found[0] < LEAST:
            raise argparse.ArgumentTypeError(f"{found[0]} rows are too few: at least {LEAST}")
        return found

    def seed(text: str) -> int:
        if not text.isdigit():
            raise argparse.ArgumentTypeError(f"{text!r} is no seed: give 0 or more")
        return int(text)

    parser.add_argument(
        "--tasks", type=names, default=[*TASKS], metavar="A,B", help=f"of {','.join(TASKS)}"
    )
    parser.add_argument(
        "--n", type=numbers, default=[*SIZES], metavar="N,M",
        help=f"numbers of rows; default {','.join(map(str, SIZES))}",
    )  # fmt: skip
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="processes; default: cores"
    )
    parser.add_argument("--seed", type=seed, default=0, help="of rows and weights; default 0")
    parser.add_argument(
        "--json", type=Path, default=STORE, metavar="OUT",
        help=f"the numbers, and where to go on; default {STORE}",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, metavar="DIR",
        help="write known_truth.md and .png there; default docs/benchmarks, of everything",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: at least 1")
    if options.output is None and (options.tasks, options.n) == ([*TASKS], [*SIZES]):
        options.output = OUTPUT
    return options


if __name__ == "__main__":
    sys.exit(main())
