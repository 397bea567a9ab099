"""What `pip` is told of this package."""

from pathlib import Path

import pytest


def test_every_dependency_has_both_bounds():
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    stated = [project["project"]["dependencies"]]
    stated += project["project"]["optional-dependencies"].values()
    stated.append(project["build-system"]["requires"])
    found = [line for lines in stated for line in lines if not line.startswith("mdn[")]
    assert len(found) > 30
    for line in found:
        assert ">=" in line, line
        assert "<" in line, line
