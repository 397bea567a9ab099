"""Arrays for a model that is trained already: `.npz` files, read in blocks of rows or sequences.

A block is all that is in memory: an array is read as it lies in its file, from the front.

Shape letters: N rows or sequences, n of them in a block, T time, F features, D targets.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mdn.data.checks import FLOAT32_MAX
from mdn.data.files import find_files
from mdn.data.schema import BLOCK_ROWS, NPZ, TableBlock
from mdn.errors import DataError, MDNError

_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """The arrays that a model takes.

    Attributes:
        features: F.
        targets: D.
        sequences: whether x is [N, T, F], and not [N, F].
        steps: whether y is [N, T, D], and not [N, D].
        x_key: name of the array x.
        y_key: name of the array y.
    """

    features: int
    targets: int
    sequences: bool
    steps: bool
    x_key: str = "x"
    y_key: str = "y"

    def x_shape(self) -> str:
        return f"[N, T, {self.features}]" if self.sequences else f"[N, {self.features}]"

    def y_shape(self) -> str:
        return f"[N, T, {self.targets}]" if self.steps else f"[N, {self.targets}]"


class ArrayReader:
    """Reads the arrays that a layout asks for, as `mdn.data.schema.TableReader` reads columns.

    Args:
        layout: what the model needs.
        path: an `.npz` file, a folder of them, or a glob.
        keep: names of arrays [N] to hand through.
        known: whether y must be there too.

    Raises:
        DataError: the path leads to no such file, or an array is not there or of another shape, or
            only some files have y.
    """

    empty = "has arrays without rows"

    def __init__(
        self, layout: Layout, path: str, keep: Sequence[str] = (), known: bool = False
    ) -> None:
        self.layout = layout
        self.path = path
        self.keep = list(keep)
        self.known = known
        self.files = find_files(path, NPZ, label="")
        targets: dict[bool, Path] = {}
        for file in self.files:
            with _opened(file) as archive:
                targets.setdefault(layout.y_key in self._arrays(file, archive), file)
        if len(targets) > 1:
            raise DataError(
                f"{targets[False]} has no array {layout.y_key!r} and {targets[True]} has one: "
                "give files of one kind"
            )

    def blocks(self) -> Iterator[TableBlock]:
        """Yield the rows or sequences in order: the same blocks each time.

        Raises:
            DataError: a file cannot be read, or a value is not what the model takes.
        """
        sizes = [file.stat().st_size for file in self.files]
        done = 0
        for file, size in zip(self.files, sizes, strict=True):
            with _opened(file) as archive:
                for block in self._blocks(file, self._arrays(file, archive)):
                    share = (done + block.share * size) / max(sum(sizes), 1)
                    yield dataclasses.replace(block, share=share)
            done += size

    def _arrays(self, file: Path, archive: zipfile.ZipFile) -> dict[str, _Stream]:
        """Return the arrays of a file that are asked for, at their first row."""
        layout = self.layout
        there = [name.removesuffix(".npy") for name in archive.namelist()]
        y = [layout.y_key] if self.known or layout.y_key in there else []
        arrays = {}
        for name in dict.fromkeys([layout.x_key, *y, *self.keep]):
            if name not in there:
                raise DataError(f"{file} has no array {name!r}: it has {', '.join(there)[:200]}")
            arrays[name] = _Stream(file, archive, name)
        x = arrays[layout.x_key]
        fits = len(x.shape) == 2 + layout.sequences and x.shape[-1] == layout.features
        if not fits or 0 in x.shape[1:-1]:
            raise DataError(
                f"array {layout.x_key!r} of {file} has shape {list(x.shape)}: the run takes "
                f"{layout.x_shape()}"
            )
        n = x.shape[0]
        if y:
            own = (n, *x.shape[1:2], layout.targets) if layout.steps else (n, layout.targets)
            plain = own[:-1] if layout.targets == 1 and not layout.steps else own
            if arrays[layout.y_key].shape not in (own, plain):
                raise DataError(
                    f"array {layout.y_key!r} of {file} has shape "
                    f"{list(arrays[layout.y_key].shape)}: the run takes {layout.y_shape()}, here "
                    f"{list(own)}"
                )
        for name in self.keep:
            if arrays[name].shape != (n,):
                raise DataError(
                    f"array {name!r} of {file} has shape {list(arrays[name].shape)}, not [{n}]: "
                    "keep arrays of one value a row"
                )
        return arrays

    def _blocks(self, file: Path, arrays: dict[str, _Stream]) -> Iterator[TableBlock]:
        x, y = arrays[self.layout.x_key], arrays.get(self.layout.y_key)
        n = x.shape[0]
        size = max(1, BLOCK_ROWS // math.prod(x.shape[1:-1]))
        for start in range(0, n, size):
            rows = min(size, n - start)
            found = {name: array.read(rows) for name, array in arrays.items()}
            features = _checked(found[self.layout.x_key], self.layout.x_key, file, start)
            targets = None
            if y is not None:
                targets = _checked(found[self.layout.y_key], self.layout.y_key, file, start)
                targets = targets.reshape([*targets.shape[:1], *y.shape[1:-1], -1])
            kept = pa.table({name: _native(found[name]) for name in self.keep})
            yield TableBlock(features, targets, kept, rows, (start + rows) / n)


class _Stream:
    """An array in an `.npz` file, read from the front.

    Attributes:
        shape: of all of it.
    """

    def __init__(self, file: Path, archive: zipfile.ZipFile, name: str) -> None:
        self.file, self.name = file, name
        with _reading(file):
            self._stream: Any = archive.open(f"{name}.npy")
            version = np.lib.format.read_magic(self._stream)
            if version not in _HEADERS:
                raise DataError(f"array {name!r} of {file} is of version {version}: save it anew")
            self.shape, columns_first, self._dtype = _HEADERS[version](self._stream)
        if self._dtype.hasobject:
            raise DataError(
                f"array {name!r} of {file} holds Python objects, which may run code: save it as "
                "numbers"
            )
        if columns_first and len(self.shape) > 1:
            raise DataError(
                f"array {name!r} of {file} lies in Fortran's order, of which no rows can be read: "
                "save it with np.ascontiguousarray"
            )

    def read(self, rows: int) -> np.ndarray:
        """Return the next so many rows."""
        shape = (rows, *self.shape[1:])
        size = math.prod(shape) * self._dtype.itemsize
        with _reading(self.file):
            content = self._stream.read(size)
        if len(content) < size:
            raise DataError(f"array {self.name!r} of {self.file} is cut short: save it anew")
        return np.frombuffer(content, self._dtype).reshape(shape)


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[zipfile.ZipFile]:
    with contextlib.ExitStack() as stack:
        with _reading(file):
            archive = stack.enter_context(zipfile.ZipFile(file))
        yield archive


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Say in one line what zipfile, zlib and NumPy say in half a dozen types."""
    try:
        yield
    except MDNError:
        raise
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise DataError(f"{file} cannot be read as .npz, perhaps cut short: {first}") from error


def _native(values: np.ndarray) -> np.ndarray:
    """Return values in the byte order of this machine, which Arrow wants."""
    return values.astype(values.dtype.newbyteorder("="))


def _checked(values: np.ndarray, name: str, file: Path, start: int) -> np.ndarray:
    """Return numbers as float64 that float32 can hold, or NaN."""
    if values.dtype.kind not in "biuf":
        raise DataError(f"array {name!r} of {file} is of type {values.dtype}, not numeric")
    values = values.astype(np.float64)
    odd = np.abs(values) > FLOAT32_MAX
    if odd.any():
        i, *_ = np.argwhere(odd)[0].tolist()
        raise DataError(
            f"array {name!r} of {file} has {values[odd][0]} in row {start + i}, which float32 "
            "cannot hold: mend it, or set it to NaN"
        )
    return values
