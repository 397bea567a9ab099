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
