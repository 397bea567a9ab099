"""No SavedModel is loaded that is damaged, of another version, or could touch files."""

import json
import re
import shutil

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from tensorflow.core.framework import op_def_pb2
from tensorflow.python.client import pywrap_tf_session

from mdn import MDN, backbones, heads
from mdn.errors import MDNError, RunError
from mdn.export import export_saved_model
from mdn.trust import _FORBIDDEN, FORMAT, check_graph, load_saved_model, read_description

# On one worker, which makes the fixtures once.
pytestmark = pytest.mark.xdist_group("trust")

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Return a SavedModel with a table of categories, which is the most that one of ours has."""
    tf_keras.utils.set_random_seed(0)
    model = MDN(heads.Mixture(1, 2), backbones.MLP([4]))
    x = {"size": RNG.normal(size=40), "kind": RNG.choice(["a", "b"], 40).astype(object)}
    model.adapt(x, RNG.normal(size=[40, 1]))
    return export_saved_model(model, tmp_path_factory.mktemp("trust") / "sm", targets=["price"])


@pytest.fixture
def copy(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "sm")


def write(folder, function, *specs):
    """Write a SavedModel with one signature, and a description that fits."""
    module = tf.Module()
    module.resources = [tf.Variable(1.0)]
    traced = tf.function(function).get_concrete_function(*specs)
    tf.saved_model.save(module, str(folder), {"serving_default": traced})
    (folder / "mdn.json").write_text(json.dumps({"format": FORMAT}))
    return folder


def test_ours_is_loaded(exported):
    loaded = load_saved_model(exported)
    assert loaded.description["targets"] == ["price"]
    assert set(loaded.model.signatures) == set(loaded.description["signatures"])
    assert loaded.signature_def["params"].inputs.keys() == {"size", "kind"}


# ---------------------------------------------------------------------- operations

TEXT = tf.TensorSpec([], tf.string, "x")


def reads(x):
    return {"y": tf.io.read_file(x)}


def writes(x):
    tf.io.write_file(x, "stolen")
    return {"y": x}


def runs_python(x):
    return {"y": tf.numpy_function(lambda v: v, [x], tf.string)}


def prints_to_a_file(x):
    tf.print(x, output_stream="file:///tmp/out")
    return {"y": x}


def reads_rows(x):
    return {"y": next(iter(tf.data.TextLineDataset(x).batch(2)))}


def saves(x):
    tf.raw_ops.SaveV2(prefix=x, tensor_names=["a"], shape_and_slices=[""], tensors=[1.0])
    return {"y": x}


def reads_words(x):
    found = tf.random.fixed_unigram_candidate_sampler(
        tf.constant([[1]], tf.int64), 1, 1, False, 2, vocab_file="/etc/hostname"
    )
    return {"y": tf.strings.as_string(found[0])}


def deep(x):
    """A call in a branch of a loop's body."""
    inner = tf.function(lambda v: tf.io.read_file(v))
    body = lambda i, v: (i + 1, tf.cond(i > 3, lambda: inner(v), lambda: v))  # noqa: E731
    return {"y": tf.while_loop(lambda i, v: i < 5, body, (0, x))[1]}


@pytest.mark.parametrize(
    ("function", "operation"),
    [
        (reads, "ReadFile"),
        (writes, "WriteFile"),
        (runs_python, "PyFunc"),
        (prints_to_a_file, "PrintV2"),
        (reads_rows, "Dataset"),
        (saves, "SaveV2"),
        (reads_words, "UnigramCandidateSampler"),
        (deep, "ReadFile"),
    ],
)
def test_operations_that_touch_files_are_refused_by_name(function, operation, tmp_path):
    path = write(tmp_path / "sm", function, TEXT)
    with pytest.raises(
        RunError, match=rf"could touch files or run code: the operation \w*{operation}"
    ):
        load_saved_model(path)


# What an operation is given that touches files or reaches hosts, by the names in its definition.
PLACE = re.compile(
    r"file|path$|^dir$|directory|^prefix$|region_name|descriptor_source|address|^url|host_?name"
)


def test_every_operation_that_is_given_a_place_is_refused():
    """Of all that this version of TensorFlow has, whatever they are called."""
    buffer = pywrap_tf_session.TF_GetAllOpList()
    known = op_def_pb2.OpList.FromString(pywrap_tf_session.TF_GetBuffer(buffer))
    pywrap_tf_session.TF_DeleteBuffer(buffer)
    given = {
        op.name
        for op in known.op
        if any(PLACE.search(part.name) for part in (*op.input_arg, *op.attr))
    }
    assert len(given) > 30
    assert {name for name in given if not _FORBIDDEN.search(name)} == set()


def test_harmless_model_of_another_hand_is_loaded(tmp_path):
    path = write(tmp_path / "sm", lambda x: {"y": tf.strings.lower(x)}, TEXT)
    answer = load_saved_model(path).model.signatures["serving_default"](x=tf.constant("A"))
    assert answer["y"].numpy() == b"a"


def test_files_that_a_model_brings_are_refused(tmp_path):
    (tmp_path / "words.txt").write_text("a\nb\n")
    module = tf.Module()
    table = tf.lookup.StaticVocabularyTable(
        tf.lookup.TextFileInitializer(
            str(tmp_path / "words.txt"),
            *(tf.string, tf.lookup.TextFileIndex.WHOLE_LINE),
            *(tf.int64, tf.lookup.TextFileIndex.LINE_NUMBER),
        ),
        1,
    )
    module.table = table
    traced = tf.function(lambda x: {"y": table.lookup(x)}).get_concrete_function(TEXT)
    tf.saved_model.save(module, str(tmp_path / "sm"), {"serving_default": traced})
    with pytest.raises(RunError, match="is not loaded"):
        check_graph(tmp_path / "sm")


# ---------------------------------------------------------------------- damage


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "mdn.json is no JSON"),
        ("[" * 100_000, "mdn.json is no JSON"),
        ("\udcff", "mdn.json is no JSON"),
        ("[]", "mdn.json is no object"),
        ("{}", "has format 1, written by mdn ?; this version reads format 2"),
        ('{"format": 3, "mdn": "9.9"}', "has format 3, written by mdn 9.9"),
        ('{"format": 2, "files": []}', "does not list its files"),
    ],
    ids=lambda value: value[:30],
)
def test_description_that_cannot_be_used(text, message, copy):
    (copy / "mdn.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(RunError, match=re.escape(message)):
        read_description(copy)


@pytest.mark.parametrize("name", ["saved_model.pb", "mdn.json"])
def test_missing_files_are_named(name, copy):
    (copy / name).unlink()
    with pytest.raises(RunError, match=f"has no {name}"):
        load_saved_model(copy)


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_flipped_bits_and_missing_ends_are_found_and_named(exported, tmp_path):
    """In every file; of those that hold the model, wherever they are."""
    rng = np.random.default_rng(1)
    for i, path in enumerate(f for f in files(exported) if f.name != "mdn.json"):
        content = path.read_bytes()
        name = path.relative_to(exported).as_posix()
        for j in range(12):
            copy = shutil.copytree(exported, tmp_path / f"{i}-{j}")
            damaged = bytearray(content)
            if j % 3 == 2:
                del damaged[rng.integers(len(content)) :]
            else:
                damaged[rng.integers(len(content))] ^= 1 << rng.integers(8)
            (copy / name).write_bytes(damaged)
            with pytest.raises(RunError, match=f"is damaged: {name} is not as it was written"):
                load_saved_model(copy)


def test_damage_that_no_digest_guards_is_an_error_of_one_line(exported, copy):
    """Exports had no digests at first: then TensorFlow or the check of the graph finds it."""
    description = json.loads((copy / "mdn.json").read_text())
    del description["files"]
    (copy / "mdn.json").write_text(json.dumps(description))
    load_saved_model(copy)
    content = (exported / "saved_model.pb").read_bytes()
    for size in (0, 1, len(content) // 2, len(content) - 1):
        (copy / "saved_model.pb").write_bytes(content[:size])
        with pytest.raises(RunError) as error:
            load_saved_model(copy)
        assert "\n" not in str(error.value)
    (copy / "saved_model.pb").write_bytes(content)
    index = copy / "variables" / "variables.index"
    index.write_bytes(index.read_bytes()[:-20])
    with pytest.raises(RunError, match=r"is damaged: .*; export the run again"):
        load_saved_model(copy)


def test_changed_description_is_read_or_refused(copy):
    """Whatever a bit of it does, there is an answer."""
    rng = np.random.default_rng(2)
    content = (copy / "mdn.json").read_bytes()
    for _ in range(60):
        damaged = bytearray(content)
        damaged[rng.integers(len(content))] ^= 1 << rng.integers(8)
        (copy / "mdn.json").write_bytes(damaged)
        said = ""
        try:
            found = read_description(copy)["format"]
        except MDNError as error:
            found, said = FORMAT, str(error)
        assert (found, said.count("\n")) == (FORMAT, 0)
