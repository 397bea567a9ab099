"""The runs below a folder, as a table: light, without TensorFlow."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mdn.errors import RunError

# Keys that are shown where a run has them, and what they are called.
SHOWN = {
    "test/nll": "NLL",
    "test/elbo": "ELBO",
    "test/regret": "regret",
    "test/crps": "CRPS",
    "test/coverage90": "cover 90 %",
    "train/seconds": "seconds",
}
# With the name of a target behind them, where there are several.
_HIGHER_IS_BETTER = re.compile(
    r"(elbo|elbo_gain_\d+|gain|skill|rows_per_second|(pit|region)_p|sbc/p(_joint)?)(/.*)?$"
)
_COVERAGE = re.compile(r"coverage(\d+)$")


@dataclasses.dataclass(frozen=True)
class Run:
    """What is known of a run without its model.

    Attributes:
        path: its directory.
        overrides: the command line that it came from, without where it went.
        metrics: of `metrics.json`; empty where it is not finished.
        data: hash of its rows, which tells whether two runs can be compared.
        finished: when, or None.
    """

    path: Path
    overrides: str
    metrics: dict[str, float]
    data: str
    finished: datetime.datetime | None


def find_runs(folder: str | os.PathLike[str]) -> list[Run]:
    """Return all runs below a folder, or in it.

    Raises:
        RunError: there is no such folder.
    """
    place = Path(folder)
    if not place.is_dir():
        raise RunError(f"{folder} is no folder: give one with runs, such as runs")
    return [_read(path) for path in _directories(place)]


def _directories(place: Path) -> Iterator[Path]:
    """Yield the run directories; there is none inside of another."""
    try:
        if (place / ".hydra" / "config.yaml").is_file():
            yield place
            return
        visible = [child for child in place.iterdir() if not child.name.startswith(".")]
        folders = sorted(child for child in visible if child.is_dir() and not child.is_symlink())
    except OSError:  # a folder that may not be read, or has gone
        return
    for folder in folders:
        yield from _directories(folder)


def _read(path: Path) -> Run:
    record = _json(path / "provenance.json")
    try:
        lines = (path / ".hydra" / "overrides.yaml").read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        lines = []
    # A list of plain strings, one a line: no parser of YAML is needed, which takes long to load.
    words = [line[2:].strip("'\"") for line in lines if line.startswith("- ")]
    hidden = ("output_dir=", "overwrite=")
    metrics = {
        name: float(value)
        for name, value in _json(path / "metrics.json").items()
        if isinstance(value, int | float) and abs(value) < sys.float_info.max
    }
    return Run(
        path,
        " ".join(word for word in words if not word.startswith(hidden)),
        metrics,
        str(record.get("data_sha256", "")),
        _time(record.get("finished")),
    )


def _json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _time(text: object) -> datetime.datetime | None:
    try:
        return datetime.datetime.fromisoformat(str(text))
    except ValueError:
        return None


def print_runs(runs: list[Run], key: str | None = None, console: Console | None = None) -> None:
    """Print a table for each set of rows that runs were tested on, the best run first.

    Args:
        runs: as `find_runs` returns them.
        key: the metric to sort by; by default test/nll, or else test/elbo.
        console: where to; by default stdout.

    Raises:
        RunError: no finished run has the metric.
    """
    console = console or Console(markup=False, emoji=False)  # names are shown as they are
    finished = [run for run in runs if run.metrics]
    if key is not None and not any(key in run.metrics for run in finished):
        known = sorted({name for run in finished for name in run.metrics})
        raise RunError(f"no run has the metric {key!r}: choose one of {', '.join(known)}")
    groups: dict[str, list[Run]] = {}
    for run in finished:
        groups.setdefault(run.data, []).append(run)
    for group in groups.values():
        console.print(_table(sorted(group, key=lambda run: _rank(run, key)), key))
    for run in runs:
        if not run.metrics:
            console.print(f"unfinished: {run.path} {run.overrides}")
    if not runs:
        console.print("no runs here")


def _rank(run: Run, key: str | None) -> float:
    """Return what is small where a run is good."""
    name = key or next((n for n in ("test/nll", "test/elbo") if n in run.metrics), None)
    if name is None or name not in run.metrics:
        return math.inf
    value = run.metrics[name]
    if level := _COVERAGE.search(name):
        return abs(value - int(level[1]) / 100)
    return -value if _HIGHER_IS_BETTER.search(name) else value


def _table(runs: list[Run], key: str | None) -> Table:
    table = Table(title_justify="left")
    shown = {n: label for n, label in SHOWN.items() if any(n in run.metrics for run in runs)}
    if key is not None and key not in shown:
        shown = {key: key, **shown}
    table.add_column("run", overflow="fold")
    for label in shown.values():
        table.add_column(label, justify="right", no_wrap=True)
    table.add_column("options", overflow="fold")
    for run in runs:
        cells = [_cell(run, name) for name in shown]
        table.add_row(str(run.path), *cells, run.overrides)
    return table


def _cell(run: Run, name: str) -> str:
    if name not in run.metrics:
        return ""
    value = run.metrics[name]
    error = run.metrics.get(f"{name}_se")
    if name.endswith("seconds"):
        return f"{value:.0f}"
    return f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")
