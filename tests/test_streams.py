"""Streams: each row at most once an epoch, in an order of (seed, epoch), as in memory."""

import datetime
import itertools
import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
import tf_keras
from forks import Fork

import mdn
from mdn.callbacks.checkpoint import Checkpoint
from mdn.config import compose_config
from mdn.data import parquet
from mdn.data.first_pass import _draw
from mdn.data.parquet import ParquetReader
from mdn.data.tabular import Parquet
from mdn.errors import DataError
from mdn.features import Columns, as_tensors
from mdn.training import train

N, GROUP = 500, 60
BLOCK_ROWS, LEAST_ROWS = 70, 16


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Several pieces, blocks and pools of so few rows."""
    monkeypatch.setattr(parquet, "BLOCK_ROWS", BLOCK_ROWS)
    monkeypatch.setattr(parquet, "LEAST_ROWS", LEAST_ROWS)


def frame(n=N):
    rng = np.random.default_rng(0)
    x = rng.normal(size=n).astype(np.float32)
    return pd.DataFrame(
        {
            "number": np.arange(n),
            "x": x,
            "city": rng.choice(["Rome", "Oslo", "Bern"], n),
            "y": np.sin(x) + 0.1 * rng.normal(size=n),
            "z": rng.normal(size=n),
            "w": rng.uniform(1.0, 2.0, n),
        }
    )


def write(table, path, group=GROUP):
    if isinstance(table, pd.DataFrame):
        table = pa.Table.from_pandas(table, preserve_index=False)
    pyarrow.parquet.write_table(table, path, row_group_size=group)
    return str(path)


def load(path, **options):
    options = {"targets": ["y", "z"], "shuffle_rows": 150, "seed": 3, **options}
    return Parquet(str(path), stream=True, **options).load()


class Model:
    """As much of a model as a stream asks."""

    def __init__(self, data):
        self.encoder = Columns()
        self.encoder.adapt(data.train.x)

    def numbers(self, codes):
        """Return the row numbers that became codes [.., C]."""
        (column,) = (c for c in self.encoder.columns if c.name == "number")
        i = self.encoder.names.index("number")
        return np.rint(codes[..., i].astype(np.float64) * column.scale + column.mean).astype(int)


def epochs(data, count, batch_size=16, **options):
    """Return the row numbers of each of `count` epochs, [epochs, N // B * B]."""
    model = Model(data)
    batches = data.stream.batches(model, batch_size, **{"seed": 0, **options})
    assert batches.steps == data.stream.rows // batch_size
    taken = list(itertools.islice(batches.unstacked().as_numpy_iterator(), count * batches.steps))
    assert all(len(batch[0]) == batch_size for batch in taken)
    return np.stack([model.numbers(batch[0]) for batch in taken]).reshape(count, -1)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write(frame(), tmp_path_factory.mktemp("rows") / "rows.parquet")


# ---------------------------------------------------------------------- rows and their order


@pytest.mark.parametrize("group", [1, 60, N])
@pytest.mark.parametrize("chunk", [None, 3])
def test_each_train_row_at_most_once_an_epoch_and_no_other(group, chunk, tmp_path):
    data = load(write(frame(), tmp_path / "a.parquet", group))
    seen = epochs(data, 3, chunk=chunk)
    assert data.stream.rows == 400
    assert all(len(set(epoch)) == 400 for epoch in seen)
    assert not np.array_equal(seen[0], seen[1])
    held_out = {*data.validation.x["number"], *data.test.x["number"]}
    assert len(held_out) == len(data.validation) + len(data.test) == 100
    assert not held_out & set(seen.ravel())
    assert held_out | set(seen.ravel()) == set(range(N))
    # far apart in the file, near each other in the epoch
    assert np.abs(np.diff(seen[0][:64])).mean() > 20


def test_what_fills_no_batch_differs_from_epoch_to_epoch(file):
    seen = epochs(load(file), 4, batch_size=27)
    assert seen.shape[1] == 14 * 27
    assert len({frozenset(epoch) for epoch in seen}) == 4


def test_order_is_a_function_of_seed_and_epoch(file):
    data = load(file)
    whole = epochs(data, 4, seed=7)
    np.testing.assert_array_equal(whole, epochs(load(file), 4, seed=7))
    np.testing.assert_array_equal(whole[2:], epochs(data, 2, seed=7, first_epoch=2))
    assert not np.array_equal(whole, epochs(data, 4, seed=8))


def test_several_files_are_one_table(tmp_path):
    rows = frame()
    for i, part in enumerate(np.array_split(np.arange(N), 3)):
        write(rows.iloc[part], tmp_path / f"{i}.parquet")
    data = load(tmp_path)
    assert set(epochs(data, 1)[0]) | {*data.test.x["number"]} | {
        *data.validation.x["number"]
    } == set(range(N))


def test_values_stay_with_their_rows(file):
    data, rows = load(file, weight="w"), frame()
    model = Model(data)
    batches = data.stream.batches(model, 16, seed=0)
    weights = []
    for x, y, w in itertools.islice(batches.unstacked().as_numpy_iterator(), batches.steps):
        at = model.numbers(x)
        columns = {name: rows[name].to_numpy()[at] for name in ("number", "x", "city")}
        np.testing.assert_array_equal(x, model_codes(model, columns))
        np.testing.assert_array_equal(y, rows[["y", "z"]].to_numpy(np.float32)[at])
        weights.append(w / rows["w"].to_numpy()[at])
    np.testing.assert_allclose(np.concatenate(weights), weights[0][0], rtol=1e-6)
    train_weights = np.delete(
        rows["w"].to_numpy(),
        [*data.test.x["number"].astype(int), *data.validation.x["number"].astype(int)],
    )
    assert weights[0][0] == pytest.approx(1.0 / train_weights.mean(), rel=1e-5)


def model_codes(model, columns):
    return model.encoder.codes(as_tensors(columns)).numpy()


def test_shares_are_bounded_and_the_surplus_trains(file):
    data = load(file, held_out_rows=20, sample_rows=50)
    assert (len(data.validation), len(data.test), len(data.train)) == (20, 20, 50)
    assert data.stream.rows == data.train_rows == 460
    assert set(data.train.x["number"]) <= set(epochs(data, 1, batch_size=10)[0])
    assert data.notes["data/rows"] == N


@pytest.mark.parametrize(("n", "count"), [(10, 10), (10, 3), (10_000, 5)])
def test_draws_differ_and_are_uniform(n, count):
    drawn = np.stack([_draw(n, count, np.random.default_rng(seed)) for seed in range(200)])
    assert drawn.shape == (200, count)
    assert all(len(set(row)) == count for row in drawn)
    assert ((drawn >= 0) & (drawn < n)).all()
    assert abs(drawn.mean() - (n - 1) / 2) < 5 * n / np.sqrt(12 * drawn.size)


# ---------------------------------------------------------------------- as in memory


def everything(data):
    """Return all rows of `Data` in memory, in the order of their numbers."""
    parts = [data.train, data.validation, data.test]
    x = {name: np.concatenate([p.x[name] for p in parts]) for name in parts[0].x}
    order = np.argsort(x["number"])
    return {k: v[order] for k, v in x.items()}, np.concatenate([p.y for p in parts])[order]


def test_columns_mean_what_they_do_in_memory(tmp_path):
    rng = np.random.default_rng(0)
    days = [datetime.date(2020, 1, 1) + datetime.timedelta(int(d)) for d in rng.integers(0, 99, N)]
    rows = frame().assign(
        city=rng.choice(["Rome", "Oslo", "", None], N),
        open=rng.integers(0, 2, N).astype(bool),
        shop=rng.integers(0, 9, N),
        size=rng.choice([1.0, 2.0, 2.5, np.nan], N),
        day=days,
        time=pd.to_datetime(days) + pd.Timedelta("3h"),
        zone=(pd.to_datetime(days)).tz_localize("Europe/Oslo"),
        text_day=[d.isoformat() for d in days],
        kind=pd.Categorical(rng.choice(["a", "b", None], N)),
        maybe=pd.array(rng.choice([0, 1, None], N), "Int64"),
        flag=pd.array(rng.choice([True, False, None], N), "boolean"),
        price=pd.Series(rng.normal(size=N)).where(rng.random(N) > 0.1),
        y=pd.Series(rng.normal(size=N)).where(rng.random(N) > 0.1),
    )
    path = write(rows, tmp_path / "rows.parquet")
    options = {"missing": "indicator", "categorical": ["shop", "size"]}
    memory = Parquet(path, ["y", "z"], **options).load()
    stream = load(path, **options)
    (x, y), (ours, ours_y) = everything(memory), everything(stream)
    assert x.keys() == ours.keys()
    for name in x:
        assert x[name].dtype == ours[name].dtype, name
        np.testing.assert_array_equal(ours[name], x[name], err_msg=name)
    np.testing.assert_array_equal(ours_y, y)
    assert not stream.stream.complete
    # what training sees of them
    model = Model(stream)
    batches = stream.stream.batches(model, 16, seed=0).unstacked().as_numpy_iterator()
    for codes, target in itertools.islice(batches, 5):
        at = model.numbers(codes)
        np.testing.assert_array_equal(
            codes, model_codes(model, {name: values[at] for name, values in x.items()})
        )
        np.testing.assert_array_equal(target, y.astype(np.float32)[at])


def test_dictionaries_may_have_unsigned_indices(tmp_path):
    codes = pa.array([i % 3 if i % 7 else None for i in range(N)], pa.uint32())
    words = pa.DictionaryArray.from_arrays(codes, ["Rome", "Oslo", "Bern"])  # as Polars writes
    table = pa.Table.from_pandas(frame(), preserve_index=False)
    path = write(table.append_column("kind", words), tmp_path / "rows.parquet")
    x, _ = everything(load(path, missing="indicator"))
    assert x["kind"].tolist() == words.to_pylist()


def test_rows_without_target_are_left_out_and_counted(tmp_path):
    rows = frame()
    rows.loc[rows.index % 5 == 0, ["y", "z"]] = np.nan
    data = load(write(rows, tmp_path / "rows.parquet"))
    assert data.notes["data/rows_without_target"] == 100
    assert data.notes["data/rows"] == 400
    assert data.stream.complete
    seen = epochs(data, 1, batch_size=1)[0]
    assert len(seen) == data.stream.rows
    assert (seen % 5 != 0).all()


def test_a_feature_that_is_hardly_ever_missing_has_its_indicator(tmp_path):
    rows = frame()
    rows.loc[[17, 18], "x"] = np.nan
    data = load(write(rows, tmp_path / "rows.parquet"), missing="indicator", sample_rows=20)
    assert {c.name for c in Model(data).encoder.columns if c.missing} == {"x"}


def test_no_features_left(file):
    data = load(file, features=[])
    assert data.train.x.shape == (400, 0)
    model = mdn.MDN(mdn.heads.Diag(2))
    model.adapt(data.train.x, data.train.y)
    x, _ = next(data.stream.batches(model, 16, seed=0).unstacked().as_numpy_iterator())
    assert x.shape == (16, 0)


def test_fingerprint_is_of_every_value(file, tmp_path):
    again = load(file)
    assert load(file).fingerprint() == again.fingerprint()
    for name, value in (("x", 9.0), ("city", "Rom"), ("y", 0.5)):
        rows = frame()
        rows.loc[int(set(range(N)).difference(again.train.x["number"][:20]).pop()), name] = value
        path = write(rows, tmp_path / "rows.parquet")
        assert load(path).fingerprint() != again.fingerprint(), name


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"x": (412, np.inf)}, {}, r"feature 'x' is inf in row 412 of .*rows.parquet"),
        ({"y": (3, -np.inf)}, {}, r"target 'y' is -inf in row 3 of"),
        ({"x": (77, np.nan)}, {}, r"'x' is missing in 1 places, first in row 77 of .*indicator"),
        ({"city": (9, None)}, {}, r"'city' is missing in 1 places, first in row 9"),
        ({"w": (450, -1.0)}, {"weight": "w"}, r"the weight is -1.0 in row 450 of"),
        ({"w": (450, np.nan)}, {"weight": "w"}, r"the weight is nan in row 450 of"),
        ({"y": (slice(None), 2.0)}, {}, r"target 'y' is constant"),
        ({"y": (slice(None), np.nan)}, {}, r"target 'y' is missing in every row"),
        ({}, {"targets": ["q"]}, r"data.targets: there is no column 'q'"),
        ({}, {"targets": None}, r"data.targets is not set"),
        ({}, {"split": "time", "split_column": "number"}, r"data.split=time needs all rows"),
        ({}, {"max_rows": 10}, r"data.max_rows=10 needs all rows in memory"),
        ({}, {"validation": 0.6, "test": 0.5}, r"leave a split empty"),
        ({}, {"missing": "no"}, r"data.missing=no"),
    ],
)
def test_errors_are_one_line(change, options, message, tmp_path):
    rows = frame()
    for name, (at, value) in change.items():
        rows.loc[at, name] = value
    with pytest.raises(DataError, match=message) as error:
        load(write(rows, tmp_path / "rows.parquet"), **options)
    assert "\n" not in str(error.value)


def test_damaged_files_are_one_line(tmp_path):
    path = Path(write(frame(), tmp_path / "rows.parquet"))
    content = bytearray(path.read_bytes())
    content[100:4000] = bytes(3900)
    for name, damage in (("zeros", bytes(content)), ("short", bytes(content[:5000]))):
        broken = tmp_path / f"{name}.parquet"
        broken.write_bytes(damage)
        with pytest.raises(DataError, match=f"{name}.parquet cannot be read as Parquet") as error:
            load(broken)
        assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="matches no file"):
        load(tmp_path / "none.parquet")


def test_files_of_different_kinds(tmp_path):
    write(frame(), tmp_path / "a.parquet")
    write(frame().assign(x="red"), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"'x' holds text in .*b.parquet and numbers in .*a.parq"):
        load(tmp_path)


def test_text_that_stops_being_a_date(tmp_path):
    days = [f"2020-01-{1 + i % 28:02d}" for i in range(N)]
    days[444] = "soon"
    path = write(frame().assign(day=days), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"'day' holds dates but also 'soon', in row 444 .*catego"):
        load(path, missing="indicator")
    assert load(path, missing="indicator", categorical=["day"]).train.x["day"].dtype == object


# ---------------------------------------------------------------------- training

TINY = (
    "data=parquet",
    "data.stream=true",
    "data.targets=[y,z]",
    "data.features=[x,city]",
    "data.missing=indicator",
    "data.shuffle_rows=150",
    "k=2",
    "trainer.batch_size=32",
    "trainer.verbose=0",
    "backbone.widths=[8]",
    "callbacks.tensorboard=null",
    "callbacks.early_stopping=null",
)


def run(directory, path, *overrides):
    return train(
        compose_config([f"output_dir={directory}", f"data.path={path}", *TINY, *overrides])
    )


def weights(directory):
    return mdn.load(directory / "model.keras").get_weights()


def fit(data, epochs, directory=None, batch_size=32):
    """Train as `mdn.training.fit` does, from the newest checkpoint in the directory."""
    tf_keras.utils.set_random_seed(0)
    model = mdn.MDN(mdn.heads.Mixture(2, 2), mdn.backbones.MLP([8], dropout=0.1))
    model.adapt(data.train.x, data.train.y)
    model.compile(tf_keras.optimizers.Adam(0.02))
    checkpoint = Checkpoint(directory or "unused", write=directory is not None)
    first = checkpoint.restore(model)
    model.fit(
        data.stream.batches(model, batch_size, seed=0, first_epoch=first, chunk=5),
        epochs=epochs,
        initial_epoch=first,
        callbacks=[checkpoint],
        verbose=0,
    )
    return model


def test_resumed_fit_equals_the_uninterrupted_one(file, tmp_path):
    data = load(file)
    whole = fit(data, 4)
    fit(data, 2, tmp_path)
    resumed = fit(load(file), 4, tmp_path)
    for a, b in zip(whole.get_weights(), resumed.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_streamed_fit_is_as_good_as_the_one_in_memory(tmp_path):
    data = load(write(frame(4_000), tmp_path / "rows.parquet", 600), features=["x", "city"])
    assert len(data.train) == data.stream.rows  # so that the same rows train in memory
    stream = fit(data, 8)
    tf_keras.utils.set_random_seed(0)
    memory = mdn.MDN(mdn.heads.Mixture(2, 2), mdn.backbones.MLP([8], dropout=0.1))
    memory.adapt(data.train.x, data.train.y)
    memory.compile(tf_keras.optimizers.Adam(0.02))
    memory.fit(data.train.x, data.train.y, batch_size=32, epochs=8, verbose=0)
    ours, theirs = (model.row_losses(data.test) for model in (stream, memory))
    assert ours.mean() < 1.2  # a normal for each target: 1.42 + 0.94
    assert abs(ours.mean() - theirs.mean()) < 0.1


def train_and_die():
    """Train as the command line says; the process ends with the second epoch."""
    end = Checkpoint.on_epoch_end

    def end_all(self, epoch, logs=None):
        end(self, epoch, logs)
        if epoch == 1:
            os._exit(9)

    parquet.BLOCK_ROWS, parquet.LEAST_ROWS = BLOCK_ROWS, LEAST_ROWS
    Checkpoint.on_epoch_end = end_all
    train(compose_config(sys.argv[1:]))


@pytest.mark.slow
def test_killed_run_ends_as_the_uninterrupted_one(file, tmp_path, bare_runs):
    options = ("trainer.epochs=4", "trainer.schedule=constant")
    metrics = run(tmp_path / "whole", file, *options)
    assert metrics["train/epochs"] == 4
    assert metrics["data/rows"] == N
    words = ["train", f"output_dir={tmp_path}/killed", f"data.path={file}", *TINY, *options]
    killed = Fork(train_and_die, words, log=tmp_path / "killed")
    assert killed.wait() == 9, killed.communicate()
    again = run(tmp_path / "killed", file, *options)
    for a, b in zip(weights(tmp_path / "whole"), weights(tmp_path / "killed"), strict=True):
        np.testing.assert_array_equal(a, b)
    assert again["test/nll"] == metrics["test/nll"]


def test_file_that_vanishes_during_training_is_one_line(tmp_path, monkeypatch):
    path = write(frame(), tmp_path / "rows.parquet")
    read, begun = ParquetReader.read, []

    def fail(self, piece):
        begun.append(piece)
        if len(begun) > self.pieces + 2:
            raise DataError(f"{path} cannot be read as Parquet: gone")
        return read(self, piece)

    monkeypatch.setattr(ParquetReader, "read", fail)
    with pytest.raises(DataError, match=r"rows.parquet cannot be read as Parquet: gone"):
        run(tmp_path / "run", path)


def test_batch_of_more_rows_than_there_are(file, tmp_path):
    with pytest.raises(DataError, match=r"400 train rows are fewer than one batch of 401"):
        run(tmp_path / "run", file, "trainer.batch_size=401")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (["model=distribution", "model.distribution=MultivariateNormalTriL"], "stream=false"),
        (["model=vae"], "stream=false"),
    ],
)
def test_models_that_need_all_rows_in_memory(model, message):
    overrides = [o for o in TINY if not o.startswith("k=")]
    with pytest.raises(mdn.MDNError, match=message):
        compose_config([*overrides, *model])
