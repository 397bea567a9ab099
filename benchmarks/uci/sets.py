"""Which sets and splits there are; nothing here imports TensorFlow."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np

from mdn.errors import ConfigError, DataError


def find_sets(folder: Path, names: list[str]) -> dict[str, Path]:
    """Return the files of the sets, all in the folder or those of these names.

    Raises:
        DataError: there is none, or not one of a name.
    """
    found = {path.parent.name: path for path in sorted(folder.glob("*/data.npz"))}
    if not found:
        raise DataError(f"--data={folder} has no <name>/data.npz: give the folder of the sets")
    for name in names:
        if name not in found:
            raise DataError(f"--sets={name} is not in {folder}: choose of {', '.join(found)}")
    return {name: found[name] for name in names or found}


def find_splits(path: Path, chosen: list[int] | None) -> list[int]:
    """Return the splits of a set, all or those chosen of them.

    Raises:
        DataError: the file cannot be read, or has none of them.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = set(arrays.files)
    except Exception as error:
        raise DataError(f"{path} cannot be read as .npz: {error}") from error
    pairs = [re.fullmatch(r"train_(\d{2})", name) for name in sorted(names)]
    splits = [int(p[1]) for p in pairs if p and f"test_{p[1]}" in names]
    if not splits:
        raise DataError(f"{path} has no splits: give it arrays train_00, test_00, train_01, ..")
    kept = [i for i in splits if chosen is None or i in chosen]
    if not kept:
        raise DataError(f"{path} has the splits {splits[0]} - {splits[-1]}, and none of --splits")
    return kept


def parse_splits(text: str) -> list[int]:
    """Return the numbers of text such as "0-4,7".

    Raises:
        ConfigError: it is not such a text.
    """
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise ConfigError(f"--splits={text}: give numbers and ranges, such as 0-4 or 0,3,7")
        numbers += range(int(match[1]), int(match[2] or match[1]) + 1)
    return sorted(set(numbers))


def fingerprint(path: Path) -> str:
    """Return the start of the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
