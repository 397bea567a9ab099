"""Units of work in a few processes, each of which does one after the other; and how they end."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mdn.errors import MDNError, RunError

# Not a fork: a thread pool of the parent would be dead in the child, and its locks held.
_SPAWN = multiprocessing.get_context("spawn")

Work = Callable[[Any, Callable[[Any], None]], None]


def exit_code(run: Callable[[], None], results: Path) -> int:
    """Run what goes on from a file of results: 0, 2 after a mistake, 130 after Ctrl-C."""
    try:
        run()
    except MDNError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted: the same command goes on from {results}", file=sys.stderr)
        return 130
    return 0


def run_units(work: Work, units: Sequence[Any], jobs: int, receive: Callable[[Any], None]) -> None:
    """Do all units of work, the first ones first, and pass on what they report.

    Args:
        work: of (unit, report): calls `report` with whatever there is to tell. With several
            processes a function that another one can import, or a partial of one.
        units: what to do; with several processes they are pickled, and so are the reports.
        jobs: processes; one works in this process.
        receive: called here with each report.

    Raises:
        MDNError: that a unit has raised, or a process that has ended.
    """
    jobs = min(jobs, len(units))
    if jobs <= 1:
        for unit in units:
            work(unit, receive)
        return
    todo, reports = _SPAWN.Queue(), _SPAWN.Queue()
    for unit in [*units, *[None] * jobs]:
        todo.put(unit)
    arguments = work, todo, reports
    processes = [_SPAWN.Process(target=_serve, args=arguments, daemon=True) for _ in range(jobs)]
    with _environment(max(1, (os.cpu_count() or 1) // jobs)):
        for process in processes:
            process.start()
    try:
        working = jobs
        while working:
            try:
                failure, report = reports.get(timeout=1.0)
            except queue.Empty:
                codes = [process.exitcode for process in processes if process.exitcode]
                if codes:
                    raise RunError(f"a process ended with exit code {codes[0]}") from None
                continue
            if failure is not None:
                raise RunError(failure)
            if report is None:
                working -= 1
            else:
                receive(report)
    finally:
        for process in processes:
            process.terminate()
            process.join()


@contextlib.contextmanager
def _environment(threads: int) -> Iterator[None]:
    """Have processes that start here compute by so many threads: they read it as they import."""
    names = "TF_NUM_INTRAOP_THREADS", "OMP_NUM_THREADS"
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, str(threads)))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(work: Work, todo: Any, reports: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this
    try:
        while (unit := todo.get()) is not None:
            work(unit, lambda report: reports.put((None, report)))
        reports.put((None, None))
    except MDNError as error:
        reports.put((str(error), None))
