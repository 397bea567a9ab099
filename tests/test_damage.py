"""Truncated and bit-flipped files: whatever mdn reads, damage is an error of one line.

Where a file has checksums no damage goes unnoticed. CSV, JSON, YAML and Parquet have none, so that
what is damaged may still be a file of its kind: it is then read as what it says.
"""

from __future__ import annotations

import datetime
import json
import shutil
import zipfile
from collections.abc import Iterator

import numpy as np
import pandas as pd
import pytest
from omegaconf import OmegaConf

import mdn
from mdn import MDN, backbones, heads
from mdn.config import compose_config
from mdn.data.schema import Schema, TableReader
from mdn.data.tabular import Csv, Parquet
from mdn.errors import MDNError
from mdn.finished import load_run
from mdn.listing import find_runs
from mdn.runs import RunDirectory

ROUNDS = 8  # of each kind of damage


def damages(content: bytes, rounds: int = ROUNDS) -> Iterator[bytes]:
    """Yield truncated copies, copies with one bit flipped and with a run of bytes zeroed."""
    rng = np.random.default_rng(0)
    yield b""
    for at in rng.integers(0, len(content), rounds):
        yield content[:at]
        flipped = bytearray(content)
        flipped[at] ^= 1 << rng.integers(8)
        yield bytes(flipped)
        flipped[at : at + 16] = bytes(len(flipped[at : at + 16]))
        yield bytes(flipped)


def survives(read, *arguments) -> object:
    """Return what is read, or None where the answer is an error of mdn's own, in one line."""
    try:
        return read(*arguments)
    except MDNError as error:
        message = str(error)
    assert len(message.splitlines()) == 1, repr(message)
    return None


# ---------------------------------------------------------------------- models and runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the directory of a run, without a training."""
    folder = tmp_path_factory.mktemp("damage") / "run"
    model = MDN(heads.Mixture(1, 2), backbones.MLP([4]))
    rng = np.random.default_rng(0)
    model.adapt(
        {"a": rng.normal(size=20), "b": np.array(["x", "y"] * 10)}, rng.normal(size=[20, 1])
    )
    (folder / ".hydra").mkdir(parents=True)
    model.save(folder / "model.keras")
    config = compose_config(["k=2", f"output_dir={folder}"])
    OmegaConf.save(config, folder / ".hydra" / "config.yaml")
    (folder / ".hydra" / "overrides.yaml").write_text("- k=2\n")
    finished = datetime.datetime.now(datetime.timezone.utc).isoformat()
    (folder / "provenance.json").write_text(json.dumps({"finished": finished, "seed": 0}))
    (folder / "metrics.json").write_text(json.dumps({"test/nll": 1.5, "test/n": 20}))
    return folder


def test_a_model_is_whole_or_refused(run, tmp_path):
    path = tmp_path / "model.keras"
    content = (run / "model.keras").read_bytes()
    whole = [w.numpy() for w in mdn.load(run / "model.keras").weights]
    for damaged in damages(content):
        path.write_bytes(damaged)
        if (found := survives(mdn.load, path)) is not None:  # the bit is read by nobody
            for weight, expected in zip(found.weights, whole, strict=True):
                np.testing.assert_array_equal(weight.numpy(), expected)


@pytest.mark.parametrize("member", ["config.json", "metadata.json", "model.weights.h5"])
def test_a_damaged_part_of_a_model_with_a_checksum_that_fits(run, tmp_path, member):
    with zipfile.ZipFile(run / "model.keras") as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    path = tmp_path / "model.keras"
    for damaged in damages(parts[member]):
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in parts.items():
                archive.writestr(name, damaged if name == member else content)
        survives(mdn.load, path)


def test_a_damaged_config_of_a_run(run, tmp_path):
    folder = tmp_path / "run"
    (folder / ".hydra").mkdir(parents=True)
    path = folder / ".hydra" / "config.yaml"
    shutil.copy(run / "model.keras", folder)
    content = (run / ".hydra" / "config.yaml").read_bytes()
    now = compose_config(["k=2", f"output_dir={folder}"])
    texts = (b"[" * 5000, b"- a", b"a: &a [*a]", b"\xff\xfe", b"model: 3\nbackbone: x", b"k: ${k}")
    for i, damaged in enumerate([*texts, *damages(content)]):
        path.write_bytes(damaged)
        survives(RunDirectory, now)
        if i < 2 * len(texts):  # a model is loaded where the config is whole enough
            survives(load_run, folder)


@pytest.mark.parametrize("name", ["provenance.json", "metrics.json", ".hydra/overrides.yaml"])
def test_a_damaged_record_of_a_run_hides_no_run(run, tmp_path, name):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("*.keras"))
    content = (tmp_path / "run" / name).read_bytes()
    odd = (b"[" * 100_000, b'{"finished": 3, "test/nll": 1e999}', b'{"a": %s}' % (b"9" * 400))
    for damaged in [*odd, *damages(content)]:
        (tmp_path / "run" / name).write_bytes(damaged)
        assert len(find_runs(tmp_path)) == 1


# ---------------------------------------------------------------------- tables


def frame(n: int = 200) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    columns = {
        "size": rng.normal(size=n),
        "kind": rng.choice(["red", "grün", None], n),
        "at": pd.Timestamp("2024-02-28") + pd.to_timedelta(rng.integers(0, 99, n), "D"),
        "y": rng.normal(size=n),
    }
    return pd.DataFrame(columns)


SCHEMA = Schema({"size": False, "kind": True, "at": False}, ["y"], matrix=False)


def read_blocks(path: str) -> int:
    return sum(block.rows for block in TableReader(SCHEMA, path, known=True).blocks())


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Return the bytes of tables by the endings of their names."""
    folder = tmp_path_factory.mktemp("tables")
    frame().to_csv(folder / "a.csv", index=False)
    frame().to_csv(folder / "a.csv.gz", index=False)
    frame().to_parquet(folder / "a.parquet", row_group_size=50)
    return {path.name.partition(".")[2]: path.read_bytes() for path in folder.iterdir()}


def rows_of(data) -> int:
    return len(data.train.y) + len(data.validation.y) + len(data.test.y)


OPTIONS = {"targets": ["y"], "missing": "indicator"}
LOADERS = {
    "csv": (lambda path: rows_of(Csv(path, **OPTIONS).load()), read_blocks),
    "csv.gz": (lambda path: rows_of(Csv(path, **OPTIONS).load()), read_blocks),
    "parquet": (
        lambda path: rows_of(Parquet(path, **OPTIONS).load()),
        lambda path: rows_of(Parquet(path, stream=True, **OPTIONS).load()),
        read_blocks,
    ),
}


@pytest.mark.parametrize("suffix", LOADERS)
def test_a_damaged_table(suffix, tables, tmp_path):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(tables[suffix])
    for read in LOADERS[suffix]:
        assert read(str(path)) > 0
    for damaged in damages(tables[suffix], 4 * ROUNDS):
        path.write_bytes(damaged)
        for read in LOADERS[suffix]:
            survives(read, str(path))
