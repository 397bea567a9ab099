"""Records that are laid out alike give what TensorFlow's own parser gives."""

import numpy as np
import pytest
import tensorflow as tf

from mdn.data.examples import read_floats

LENGTHS = {"size": 3, "y": 1}


def floats(values):
    return tf.train.Feature(float_list=tf.train.FloatList(value=values))


def record(features):
    example = tf.train.Example(features=tf.train.Features(feature=features))
    return example.SerializeToString(deterministic=True)


def records(n=40):
    rng = np.random.default_rng(0)
    return [
        record(
            {
                "y": floats(rng.normal(size=1)),
                "size": floats(rng.normal(size=3)),
                "other": floats(rng.normal(size=2)),
                "name": tf.train.Feature(bytes_list=tf.train.BytesList(value=[b"abc"])),
            }
        )
        for _ in range(n)
    ]


def table(rows):
    return np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), -1)


def parsed(rows):
    spec = {name: tf.io.FixedLenFeature([n], tf.float32) for name, n in LENGTHS.items()}
    return {name: t.numpy() for name, t in tf.io.parse_example(list(rows), spec).items()}


def test_lists_are_those_of_the_parser():
    rows = records()
    found, expected = read_floats(table(rows), LENGTHS), parsed(rows)
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


@pytest.mark.parametrize(
    ("n", "one"), [(3, 1), (35, 17), (35, 33)], ids=["few", "of a group", "behind the groups"]
)
def test_any_changed_byte_is_read_as_the_parser_does_or_not_at_all(n, one):
    """Of one row, or of all: names, lengths, types, and values."""
    rows = records(n)
    taken = 0
    for at in range(len(rows[0])):
        for changed in ([one], range(n)):
            damaged = [bytearray(row) for row in rows]
            for i in changed:
                damaged[i][at] ^= 0x55
            damaged = [bytes(row) for row in damaged]
            found = read_floats(table(damaged), LENGTHS)
            if found is None:
                continue
            taken += 1
            for name, values in parsed(damaged).items():
                np.testing.assert_array_equal(found[name], values)
    assert taken >= 2 * 16  # the values' own bytes, at least


def test_frames_are_not_looked_at():
    rows, rng = records(20), np.random.default_rng(0)
    framed = [rng.bytes(12) + row + rng.bytes(4) for row in rows]
    found = read_floats(table(framed), LENGTHS, (12, 4))
    for name, values in parsed(rows).items():
        np.testing.assert_array_equal(found[name], values)


@pytest.mark.parametrize(
    "lengths", [{"z": 1}, {"y": 2}, {"name": 1}], ids=["not there", "other length", "no floats"]
)
def test_what_the_lists_are_not(lengths):
    assert read_floats(table(records()), lengths) is None


def test_a_row_of_another_layout():
    rows = records()
    swapped = record({"y": floats([1.0]), "size": floats([1.0, 2.0, 3.0])})
    longer = record({"x": floats([1.0]), "size": floats([1.0, 2.0, 3.0])})
    assert len(swapped) == len(longer)
    assert read_floats(table([swapped, longer]), {"size": 3}) is None
    assert read_floats(table(rows), {}) == {}
