"""The look that all pictures share, and how they become files.

Nothing here touches matplotlib's global state.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mdn.errors import RunError

INK, GREY = "#262626", "#8c8c8c"
BLUE, ORANGE, GREEN, PURPLE, RED = "#31688e", "#e07b39", "#35906b", "#7b5ea7", "#c44e52"
SERIES = (BLUE, ORANGE, GREEN, PURPLE, RED)


def write_figures(figures: Mapping[str, Figure], directory: str | Path) -> list[Path]:
    """Write each figure as <name>.png into a directory, which is made if it is not there.

    Raises:
        RunError: a file cannot be written.
    """
    paths = []
    for name, figure in figures.items():
        path = Path(directory) / f"{name}.png"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=160)
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror or error}") from error
        paths.append(path)
    return paths


def style_axes(axes: Axes, x_label: str, y_label: str) -> None:
    """Label the axes, and give them the look that all pictures share."""
    axes.set_xlabel(plain(x_label), color=INK)
    axes.set_ylabel(plain(y_label), color=INK)
    axes.tick_params(color=GREY, labelcolor=INK, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)


def plain(text: str) -> str:
    """Return text with names in it as a label: what is between two $ would be mathematics."""
    return text.replace("$", r"\$")
