"""The pages under docs say what the code does: their examples print what stands below them."""

import doctest
import re
import runpy
import sys
from pathlib import Path

import numpy as np
from matplotlib import image

DOCS = Path(__file__).parent.parent / "docs"
PAGE = DOCS / "density.md"


def test_examples_print_what_the_page_says():
    found = doctest.testfile(str(PAGE), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert found.attempted > 30
    assert found.failed == 0


def test_each_question_has_an_example():
    questions = PAGE.read_text().split("\n## ")[1:]
    assert len(questions) > 10
    for question in questions:
        title = question.splitlines()[0]
        assert title.endswith("?")
        assert ">>> " in question or title == "What of transformed targets?", title


def test_links_lead_somewhere():
    for page in DOCS.rglob("*.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_pictures_are_those_of_the_command(tmp_path, monkeypatch):
    command = re.search(r"`python (docs/\S+\.py)`", PAGE.read_text())[1]
    monkeypatch.setattr(sys, "argv", [command, "--output", str(tmp_path)])
    runpy.run_path(str(DOCS.parent / command), run_name="__main__")
    shown = set(re.findall(r"\(density/(\w+\.png)\)", PAGE.read_text()))
    assert shown == {path.name for path in tmp_path.iterdir()}
    committed = {name: image.imread(DOCS / "density" / name) for name in shown}
    for name in shown:  # fonts may differ a little: nearest to its own, and near
        made = image.imread(tmp_path / name)
        away = {
            other: np.abs(made - picture).mean()
            for other, picture in committed.items()
            if picture.shape == made.shape
        }
        assert min(away, key=away.get) == name
        assert away[name] < 0.01, name
