"""Which files a path stands for; light, so that a wrong one is told at once."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from mdn.errors import DataError

# Of the files that each source takes from a folder.
SUFFIXES = {
    "mdn.data.tabular.Csv": (".csv", ".csv.gz"),
    "mdn.data.tabular.Parquet": (".parquet", ".pq"),
    "mdn.data.records.TFRecord": (".tfrecord", ".tfrecords", ".tfrecord.gz", ".tfrecords.gz"),
    "mdn.data.arrays.Npz": (".npz",),
}


def has_suffix(file: Path, suffixes: tuple[str, ...]) -> bool:
    """Return whether the name of a file ends in one of these, in letters of either case."""
    return file.name.lower().endswith(suffixes)


def find_files(
    path: str | None, suffixes: tuple[str, ...], label: str = "data.path="
) -> list[Path]:
    """Return the files that a path stands for, sorted by name.

    Args:
        path: a file, a folder or a glob.
        suffixes: of the files that are taken from a folder.
        label: what the path stands behind in messages.

    Raises:
        DataError: there is no such file.
    """
    if not path:
        raise DataError(
            "data.path is not set: give a file, a folder or a glob, "
            f"e.g. data.path=rows{suffixes[0]}"
        )
    place = Path(os.path.expanduser(path))
    if place.is_dir():
        files = [f for f in sorted(place.iterdir()) if has_suffix(f, suffixes)]
        if not files:
            raise DataError(f"{label}{path} is a folder with no {' or '.join(suffixes)} file")
        return files
    if place.exists():
        return [place]
    files = [Path(f) for f in sorted(glob.glob(str(place), recursive=True)) if Path(f).is_file()]
    if not files:
        raise DataError(f"{label}{path} matches no file: check the path")
    return files
