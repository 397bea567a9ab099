"""Work in several processes: all of it once, mistakes in one line, dead processes noticed."""

import os
import signal

import pytest

from benchmarks.jobs import run_units
from mdn.errors import RunError


def square(unit, report):
    report((unit, unit**2, os.getpid(), os.environ.get("TF_NUM_INTRAOP_THREADS")))


def fail(unit, report):
    if unit == 2:
        raise RunError("two is one too many")
    report(unit)


def die(unit, report):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("jobs", [1, 2, 9])
def test_all_units_are_done_once(jobs):
    found = []
    run_units(square, [1, 2, 3, 4], jobs, found.append)
    assert sorted(report[:2] for report in found) == [(1, 1), (2, 4), (3, 9), (4, 16)]
    assert ({report[2] for report in found} == {os.getpid()}) == (jobs == 1)
    if jobs > 1:
        share = str(max(1, os.cpu_count() // min(jobs, 4)))
        assert {report[3] for report in found} == {share}


@pytest.mark.parametrize("jobs", [1, 2])
def test_mistake_of_a_unit_is_raised(jobs):
    with pytest.raises(RunError, match="two is one too many"):
        run_units(fail, [1, 2, 3], jobs, lambda report: None)


def test_dead_process_is_noticed():
    with pytest.raises(RunError, match="ended with exit code -9"):
        run_units(die, [1, 2], 2, lambda report: None)
