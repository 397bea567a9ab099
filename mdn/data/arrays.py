"""Arrays: rows from one `.npz` file.

Shape letters: N rows, T time, F features, D targets.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Literal

import numpy as np

from mdn.data.checks import check_rows, check_weight
from mdn.data.rows import Data, Rows
from mdn.data.splits import Indices, Split, split_data, split_indices
from mdn.errors import DataError


@dataclasses.dataclass
class Npz:
    """Rows of an `.npz` file of NumPy arrays.

    x is [N, F], or [N, T, F] for sequences, where steps of NaN alone are padding. y is [N],
    [N, D], or [N, T, D] for sequences with a target a step; NaN is a missing entry.

    Args:
        path: the file.
        x_key: name of the array x.
        y_key: name of the array y.
        weight: name of an array of row weights [N], at least zero; scaled to mean one over the
            train rows.
        missing: "error", or "indicator": missing features are allowed.
        fold: i takes the test rows from the array `test_` and two digits of i, and the others
            from `train_` and those, of which a random fraction validates; the split options then
            have no say.
        split: how to split the rows, see `mdn.data.splits.split_indices`.
        split_column: name of the array [N] to split by; none for a random split.
        validation: fraction of the rows; with a fold, of its train rows.
        test: fraction of the rows.
        seed: of the split.
    """

    path: str | None = None
    x_key: str = "x"
    y_key: str = "y"
    weight: str | None = None
    missing: Literal["error", "indicator"] = "error"
    fold: int | None = None
    split: Split = "random"
    split_column: str | None = None
    validation: float = 0.1
    test: float = 0.1
    seed: int = 0

    def load(self) -> Data:
        """Read, check and split the rows.

        Raises:
            DataError: the file or an array cannot be used; the message says which.
        """
        arrays = self._read()
        x, y = arrays[self.x_key], arrays[self.y_key]
        if y.ndim == 1:
            y = y[:, np.newaxis]
        features = tuple(f"{self.x_key}{i}" for i in range(x.shape[-1] if x.ndim else 0))
        targets = tuple(f"{self.y_key}{i}" for i in range(y.shape[-1] if y.ndim else 0))
        check_rows(x, y, self.missing, features=features, targets=targets)
        weight = None
        if self.weight is not None:
            weight = arrays[self.weight]
            check_weight(weight, f"array {self.weight!r}")
            weight = weight.astype(np.float64)
        for name in filter(None, (self.weight, self.split_column)):
            if arrays[name].shape != (len(y),):
                raise DataError(
                    f"array {name!r} has shape {list(arrays[name].shape)}, not [{len(y)}]: "
                    "give one value a row"
                )
        return split_data(
            Rows(x.astype(np.float64), y.astype(np.float64), weight),
            self._split(arrays, len(y)),
            features=features,
            targets=targets,
            missing=self.missing,
        )

    def _read(self) -> dict[str, np.ndarray]:
        """Read the arrays that the options name."""
        if not self.path:
            raise DataError("data.path is not set: give an .npz file, e.g. data.path=rows.npz")
        path = Path(os.path.expanduser(self.path))
        if not path.exists():
            raise DataError(f"data.path={self.path} matches no file: check the path")
        if path.is_file() and not path.stat().st_size:
            raise DataError(f"{path} is empty: give a file with rows")
        names = [self.x_key, self.y_key, self.weight, self.split_column]
        if self.fold is not None:
            names += [f"train_{self.fold:02d}", f"test_{self.fold:02d}"]
        arrays = {}
        try:
            file = np.load(path, allow_pickle=False)
            if isinstance(file, np.ndarray):
                raise DataError(f"{path} holds one array: save x and y with np.savez")
            with file:
                for name in filter(None, names):
                    if name not in file:
                        raise DataError(
                            f"{path} has no array {name!r}: it has {', '.join(file)[:200]}"
                        )
                    arrays[name] = file[name]
        except DataError:
            raise
        except Exception as error:  # NumPy, zipfile and zlib raise half a dozen types
            if "Object arrays" in str(error):
                raise DataError(
                    f"array {name!r} of {path} holds Python objects, which may run code: "
                    "save it as numbers"
                ) from error
            first = str(error).strip().partition("\n")[0]
            raise DataError(
                f"{path} cannot be read as .npz, perhaps cut short: {first}"
            ) from error
        return arrays

    def _split(self, arrays: dict[str, np.ndarray], n: int) -> Indices:
        if self.fold is None:
            key = None if self.split_column is None else arrays[self.split_column]
            return split_indices(
                n,
                self.split,
                key,
                validation=self.validation,
                test=self.test,
                seed=self.seed,
            )
        train, test = (arrays[f"{part}_{self.fold:02d}"] for part in ("train", "test"))
        for part, index in (("train", train), ("test", test)):
            if index.dtype.kind not in "iu" or not ((index >= 0) & (index < n)).all():
                raise DataError(f"array {part}_{self.fold:02d} holds no row numbers of {n} rows")
            if len(np.unique(index)) < len(index):
                raise DataError(f"array {part}_{self.fold:02d} repeats rows: name each row once")
        if np.intersect1d(train, test).size:
            raise DataError(f"data.fold={self.fold} tests on train rows: make its arrays disjoint")
        count = round(self.validation * len(train))
        if not 0 < count < len(train):
            raise DataError(
                f"data.validation={self.validation} of {len(train)} train rows leaves a split "
                "empty: give a fraction between 0 and 1"
            )
        train = np.random.default_rng(self.seed).permutation(train)
        return np.sort(train[count:]), np.sort(train[:count]), np.sort(test)
