"""TFRecord files: what is read, and what every bad file, list or value says."""

import inspect
import itertools
import types
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import yaml

from mdn.data import records
from mdn.data.records import TFRecord
from mdn.errors import DataError, MDNError
from mdn.features import Standardize

N = 120


def lists():
    rng = np.random.default_rng(0)
    return {
        "number": np.arange(N)[:, None],  # integers
        "size": rng.normal(size=[N, 2]).astype(np.float32),
        "y": rng.normal(size=[N, 1]).astype(np.float32),
        "w": rng.uniform(1.0, 2.0, size=[N, 1]).astype(np.float32),
    }


def write(rows, path, change=()):
    """Write rows; `change` maps a row number to lists that are other there, or None: not there."""
    change = dict(change)
    options = tf.io.TFRecordOptions("GZIP" if path.suffix == ".gz" else "")
    with tf.io.TFRecordWriter(str(path), options) as file:
        for i in range(len(rows["y"])):
            values = {name: column[i] for name, column in rows.items()} | change.get(i, {})
            feature = {}
            for name, value in values.items():
                if value is None:
                    continue
                if isinstance(value, bytes):
                    feature[name] = tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
                elif np.asarray(value).dtype.kind == "i":
                    feature[name] = tf.train.Feature(int64_list=tf.train.Int64List(value=value))
                else:
                    feature[name] = tf.train.Feature(float_list=tf.train.FloatList(value=value))
            example = tf.train.Example(features=tf.train.Features(feature=feature))
            file.write(example.SerializeToString())
    return str(path)


def load(path, **options):
    options = {"targets": ["y"], "weight": "w", "shuffle_rows": 40, **options}
    return TFRecord(str(path), **options).load()


def epoch(data, **options):
    """Return x, y and w of one epoch."""
    batches = data.stream.batches(
        types.SimpleNamespace(encoder=Standardize()), 8, seed=0, **options
    )
    taken = itertools.islice(batches.unstacked().as_numpy_iterator(), batches.steps)
    return [np.concatenate(parts) for parts in zip(*taken, strict=True)]


@pytest.mark.parametrize("name", ["rows.tfrecord", "rows.tfrecords.gz"])
def test_each_train_row_once_with_its_values(name, tmp_path):
    rows = lists()
    data = load(write(rows, tmp_path / name))
    assert data.features == ("number", "size[0]", "size[1]")
    assert data.targets == ("y",)
    assert (len(data.train), len(data.validation), len(data.test)) == (96, 12, 12)
    x, y, w = epoch(data)
    number = x[:, 0].astype(int)
    held_out = {*data.validation.x[:, 0], *data.test.x[:, 0]}
    assert len(set(number)) == 96
    assert set(number) | held_out == set(range(N))
    np.testing.assert_array_equal(x[:, 1:], rows["size"][number])
    np.testing.assert_array_equal(y, rows["y"][number])
    np.testing.assert_allclose(w, rows["w"][number, 0] / rows["w"][number].mean(), rtol=1e-5)
    np.testing.assert_array_equal(data.test.y[:, 0], rows["y"][data.test.x[:, 0].astype(int), 0])


def test_order_is_a_function_of_seed_and_epoch(tmp_path):
    rows = lists()
    for i in range(3):
        part = {name: column[40 * i : 40 * (i + 1)] for name, column in rows.items()}
        write(part, tmp_path / f"{i}.tfrecord")
    one, two = (load(tmp_path) for _ in range(2))
    assert one.fingerprint() == two.fingerprint()
    np.testing.assert_array_equal(epoch(one)[0], epoch(two)[0])
    later = epoch(one, first_epoch=1)[0]
    assert not np.array_equal(epoch(one)[0], later)
    np.testing.assert_array_equal(later, epoch(two, first_epoch=1)[0])


def test_lists_that_are_not_there_are_missing(tmp_path):
    path = write(lists(), tmp_path / "a.tfrecord", {7: {"size": None}, 9: {"y": None}})
    with pytest.raises(DataError, match=r"'size\[0\]' is missing in 1 places, first in row 7 of"):
        load(path)
    data = load(path, missing="indicator")
    assert data.notes["data/rows_without_target"] == 1


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({50: {"size": [1.0]}}, {}, r"row 50 of .*a.tfrecord cannot be read .*size: 2"),
        ({50: {"number": None}}, {}, r"row 50 of .*a.tfrecord cannot be read"),
        ({50: {"size": [1.0, np.inf]}}, {}, r"feature 'size\[1\]' is inf in row 50 of"),
        ({50: {"w": [-1.0]}}, {}, r"the weight is -1.0 in row 50 of"),
        ({0: {"size": b"big"}}, {}, r"data.features: 'size' holds no numbers in row 0"),
        ({}, {"targets": ["q"]}, r"data.targets: there is no column 'q' in"),
        ({}, {"targets": None}, r"data.targets is not set"),
        ({}, {"features": ["y"]}, r"'y' is a target and a feature"),
        ({}, {"features": ["size", "size"]}, r"data.features names 'size' twice"),
        ({}, {"weight": "size"}, r"data.weight: 'size' has several numbers a row"),
    ],
)
def test_errors_are_one_line(change, options, message, tmp_path):
    path = write(lists(), tmp_path / "a.tfrecord", change)
    with pytest.raises(MDNError, match=message) as error:
        load(path, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no rows"),
        (b"no record at all", r"a.tfrecord cannot be read as TFRecord, after 0 rows"),
        ("short", r"a.tfrecord cannot be read as TFRecord, after \d+ rows"),
        ("flip", r"a.tfrecord cannot be read as TFRecord, after \d+ rows"),
        ("other", r"row 0 of .* is no tf.train.Example"),
        (None, "matches no file"),
    ],
)
def test_file_errors_are_one_line(content, message, tmp_path):
    path = Path(write(lists(), tmp_path / "a.tfrecord"))
    whole = bytearray(path.read_bytes())
    if content == "short":
        content = whole[:-10]
    elif content == "flip":
        whole[len(whole) // 2] ^= 0xFF
        content = whole
    if content == "other":
        with tf.io.TFRecordWriter(str(path)) as file:
            file.write(b"\xff\xff\xff")
    elif content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["rows.tfrecord", "rows.tfrecord.gz"])
def test_file_that_is_cut_short_after_it_was_opened(name, tmp_path):
    path = Path(write(lists(), tmp_path / name))
    reader = load(path).stream.reader
    assert sum(map(len, reader.read(0))) == N
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match=f"{name} cannot be read as TFRecord") as error:
        list(reader.read(0))
    assert "\n" not in str(error.value)


def test_records_longer_than_what_is_read_at_a_time(tmp_path, monkeypatch):
    path = write(lists(), tmp_path / "rows.tfrecord")
    whole = list(load(path).stream.reader.read(0))
    monkeypatch.setattr(records, "READ_BYTES", 7)
    again = list(load(path).stream.reader.read(0))
    for one, other in zip(whole, again, strict=True):
        np.testing.assert_array_equal(one.x, other.x)
        np.testing.assert_array_equal(one.y, other.y)


@pytest.mark.parametrize("read_bytes", [2**22, 5_000, 300])
def test_records_of_several_layouts_in_one_file(read_bytes, tmp_path, monkeypatch):
    """Runs of records of one size, between others: each row is what the parser makes of it."""
    monkeypatch.setattr(records, "READ_BYTES", read_bytes)
    rng = np.random.default_rng(0)
    rows = {"size": rng.normal(size=[500, 2]), "y": rng.normal(size=[500, 1])}
    long = {"note": np.zeros(9, np.float32)}
    other = dict.fromkeys([*range(3), *range(150, 230), 300, *range(420, 500)], long)
    other[250] = {"size": np.array([np.nan, 1.0])}
    reader = load(write(rows, tmp_path / "a.tfrecord", other), weight=None, features=["size"],
                  missing="indicator").stream.reader  # fmt: skip
    blocks = list(reader.read(0))
    assert [block.start for block in blocks] == [0, *np.cumsum([len(b) for b in blocks])[:-1]]
    rows["size"][250] = other[250]["size"]
    np.testing.assert_array_equal(
        np.concatenate([b.x for b in blocks]), rows["size"].astype(np.float32)
    )
    np.testing.assert_array_equal(
        np.concatenate([b.y for b in blocks]), rows["y"].astype(np.float32)
    )


def test_config_lists_the_defaults():
    config = yaml.safe_load(Path("configs/data/tfrecord.yaml").read_text())
    assert config.pop("_target_") == "mdn.data.records.TFRecord"
    assert config.pop("seed") == "${seed}"
    defaults = {k: p.default for k, p in inspect.signature(TFRecord).parameters.items()}
    assert {**config, "seed": 0} == defaults
