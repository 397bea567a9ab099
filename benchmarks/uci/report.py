"""Results on disk and as a table, beside the published ones."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mdn.errors import RunError

# Published mean test NLL over the same splits; the best of wine is an interval NLL. MC dropout:
# Gal and Ghahramani (2016); deep ensembles: Lakshminarayanan et al. (2017); NGBoost: Duan et al.
# (2020); the best: the files of proto-n/torch-naut (ICLR 2025), split by split.
PUBLISHED: dict[str, dict[str, float]] = {
    "concrete": {"MC dropout": 2.93, "deep ensembles": 3.06, "NGBoost": 3.04, "best": 2.73},
    "energy": {"MC dropout": 1.21, "deep ensembles": 1.38, "NGBoost": 0.60, "best": 0.31},
    "power-plant": {"MC dropout": 2.80, "deep ensembles": 2.79, "NGBoost": 2.79, "best": 2.56},
    "protein-tertiary-structure": {
        "MC dropout": 2.87,
        "deep ensembles": 2.83,
        "NGBoost": 2.81,
        "best": 1.96,
    },
    "wine-quality-red": {
        "MC dropout": 0.93,
        "deep ensembles": 0.94,
        "NGBoost": 0.91,
        "best": 0.80,
    },
}
INTERVAL = {"wine-quality-red"}  # whose best published NLL is of the interval
PEERS = ("MC dropout", "deep ensembles", "NGBoost", "best")


class Results:
    """The scores of each split of each set, kept in a JSON file.

    Args:
        path: the file; a Markdown table stands beside it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sets: dict[str, dict[str, Any]] = {}
        if path.exists():
            try:
                self.sets = json.loads(path.read_text("utf-8"))
                if not all("by_split" in entry for entry in self.sets.values()):
                    raise ValueError("no results of this benchmark")
            except (OSError, ValueError, AttributeError, TypeError) as error:
                raise RunError(f"--json={path} cannot be gone on from: {error}") from error

    def has(self, name: str, split: int, key: str) -> bool:
        """Whether a split was done before.

        Args:
            name: of the set.
            split: its number.
            key: of the rows and the config.

        Raises:
            RunError: what is there is of other rows or of another config.
        """
        entry = self.sets.get(name, {"key": key, "by_split": {}})
        if entry["key"] != key:
            raise RunError(
                f"--json={self.path} has {name} with other rows or another config: name another "
                "file, or remove it"
            )
        return str(split) in entry["by_split"]

    def add(self, name: str, split: int, key: str, scores: dict[str, Any]) -> None:
        """Keep the scores of a split."""
        entry = self.sets.get(name, {"by_split": {}})
        by_split = {**entry["by_split"], str(split): scores}
        ordered = dict(sorted(by_split.items(), key=lambda item: int(item[0])))
        self.sets[name] = {**summarise(list(ordered.values())), "key": key, "by_split": ordered}
        self._write(self.path, json.dumps(self.sets, indent=1) + "\n")
        self._write(self.path.with_suffix(".md"), markdown(self.sets))

    @staticmethod
    def _write(path: Path, text: str) -> None:
        partial = path.with_name(f".{path.name}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(text, "utf-8")
            os.replace(partial, path)
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror or error}") from error


def markdown(sets: dict[str, dict[str, Any]]) -> str:
    """Return the table of all sets: means over the splits, in the units of y."""
    head = ["set", "splits", "NLL", "interval NLL", "RMSE", "CRPS", "in 90 %", "seconds", *PEERS]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for name, entry in sets.items():
        published = PUBLISHED.get(name, {})
        cells = [
            name,
            str(entry["splits"]),
            f"{entry['nll']:.3f} ± {entry['nll_se']:.3f}",
            f"{entry['nll_interval']:.3f} ± {entry['nll_interval_se']:.3f}",
            f"{entry['rmse']:.4g}",
            f"{entry['crps']:.4g}",
            f"{100 * entry['coverage90']:.1f} %",
            f"{entry['seconds']:.0f}",
            *(f"{published[peer]:.2f}" if peer in published else "" for peer in PEERS),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


# On which splits of each set options were compared; no other split had a part in any choice.
CHOSEN_ON = {"protein-tertiary-structure": range(2)}
CHOSEN_ON_DEFAULT = range(10)


def page(sets: dict[str, dict[str, Any]], command: str) -> str:
    """Return the page of the documentation."""
    columns = ("NLL", "interval NLL", "in 90 %")
    head = ["set", *(f"{c}, {part}" for part in ("chosen on", "untouched") for c in columns)]
    lines = ["| " + " | ".join([*head, "shares"]) + " |", "|" + " --- |" * (len(head) + 1)]
    for name, entry in sets.items():
        chosen = CHOSEN_ON.get(name, CHOSEN_ON_DEFAULT)
        cells = [name]
        for among in (True, False):
            splits = [s for i, s in entry["by_split"].items() if (int(i) in chosen) is among]
            cells += _brief(summarise(splits)) if splits else [""] * 3
        lines.append("| " + " | ".join([*cells, _mean_shares(entry)]) + " |")
    halves = "\n".join(lines)
    return f"""# The default recipe on the UCI sets

    {command}

{markdown(sets)}
Means over the standard splits with their standard errors, in nats of the original units, joint of
all targets; "in 90 %": the share of the targets in the central 90 % interval of their margins, a
rounded target by the share of its cell; seconds of one process, beside whatever else the machine
did. Published: MC dropout (Gal and Ghahramani, 2016), deep ensembles (Lakshminarayanan et al.,
2017), NGBoost (Duan et al., 2020), and the best of the files of proto-n/torch-naut (ICLR 2025), on
the same splits; the best of wine is an interval NLL.

![NLL beside the published ones](uci.png)

## Protocol

One config for all sets, `experiment=tabular`. Its options were compared on some of the splits
0 - 9 (protein: 0 - 1), "chosen on"; the others, "untouched", had no part in any choice. Within a
split, the shares of the variants, the stopping of each member and everything else that is learned
goes by its train rows alone. The last column has the mean shares of the variants.

{halves}

Some test rows are copies of train rows, features and target alike (wine 27 %, concrete 7 %,
protein 7 % of them): that is so for every method in the table. What remembers train rows is sure
of those, and a lower mean on wine is had that way; no variant that was tried does so without
losing on the other rows, and no train rows are in what is shipped.
"""


def _brief(entry: dict[str, Any]) -> list[str]:
    nll, cells = (
        f"{entry[key]:.3f} ± {entry[f'{key}_se']:.3f}" for key in ("nll", "nll_interval")
    )
    return [nll, cells, f"{100 * entry['coverage90']:.1f} %"]


def _mean_shares(entry: dict[str, Any]) -> str:
    splits = [split["shares"] for split in entry["by_split"].values()]
    names = dict.fromkeys(name for shares in splits for name in shares)
    means = {name: np.mean([shares.get(name, 0.0) for shares in splits]) for name in names}
    return ", ".join(f"{name} {share:.2f}" for name, share in means.items())


def draw(sets: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw the NLL of each set beside the published ones, as distances from the best of them."""
    from matplotlib.figure import Figure

    from mdn.plots import style_axes

    shown = [name for name in sets if name in PUBLISHED]
    figure = Figure(figsize=(8, 1.2 + 0.7 * len(shown)), dpi=100, layout="constrained")
    axes = figure.subplots()
    style_axes(axes, "nats per row below (left) or above the best published NLL", "")
    rows = np.arange(len(shown))[::-1]
    for peer, colour in zip(PEERS[:-1], ("#b5b5b5", "#7fa8c9", "#8fbf8f"), strict=True):
        values = [PUBLISHED[name][peer] - PUBLISHED[name]["best"] for name in shown]
        axes.plot(values, rows, "o", color=colour, markersize=8, label=peer)
    axes.axvline(0.0, color="#8c8c8c", linewidth=1)
    for row, name in zip(rows, shown, strict=True):
        kind = "nll_interval" if name in INTERVAL else "nll"
        value, error = sets[name][kind] - PUBLISHED[name]["best"], sets[name][f"{kind}_se"]
        axes.errorbar(value, row, xerr=error, fmt="D", color="#e07b39", markersize=7, capsize=3)
    axes.plot([], [], "D", color="#e07b39", label="mdn")
    labels = [f"{name} (interval)" if name in INTERVAL else name for name in shown]
    axes.set_yticks(rows, labels)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=160)


def summarise(splits: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the means over splits, and the seconds of all.

    The standard errors are those over the splits; of a single one, over its rows.
    """
    keys = ("nll", "nll_interval", "rmse", "crps", "coverage90")
    means = {key: float(np.mean([s[key] for s in splits])) for key in keys}
    n = len(splits)
    for key in ("nll", "nll_interval"):
        values = [s[key] for s in splits]
        own = splits[0][f"{key}_se"]
        means[f"{key}_se"] = float(np.std(values, ddof=1) / np.sqrt(n)) if n > 1 else own
    means["seconds"] = float(sum(s["seconds"] for s in splits))
    return {**means, "splits": n}
