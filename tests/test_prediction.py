"""Answers for files: the model's own, row by row, whatever the file's columns, kills and all."""

import json

import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest
import tensorflow as tf
import tf_keras
from omegaconf import OmegaConf

from mdn import MDN, backbones, heads
from mdn.config import compose_config
from mdn.data.rows import ColumnNames
from mdn.data.schema import TableReader, find_rows, find_tables
from mdn.errors import ConfigError, DataError, MDNError, RunError
from mdn.finished import evaluate_run, predict_run
from mdn.inputs import schema_of
from mdn.prediction import predict_file

# On one worker, which makes the fixtures once.
pytestmark = pytest.mark.xdist_group("prediction")

N = 300


def table(seed, cities=("Bonn", "Ulm")):
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "size": rng.gamma(3.0, 30.0, N),
            "city": rng.choice(cities, N),
            "built": pd.Timestamp("2000-01-01") + pd.to_timedelta(rng.integers(0, 8000, N), "D"),
            "garden": rng.random(N) < 0.5,
        }
    )
    frame["price"] = 3.0 * frame["size"] + 50.0 * frame["garden"] + rng.normal(0.0, 20.0, N)
    frame["rent"] = 0.004 * frame["price"] + rng.normal(0.0, 0.2, N)
    return frame


def features(frame):
    """Return the features as a source gives them."""
    days = (frame["built"] - pd.Timestamp(0)) / pd.Timedelta(days=1)
    return {
        "size": frame["size"].to_numpy(np.float64),
        "city": frame["city"].to_numpy(object),
        "built": days.to_numpy(np.float64),
        "garden": frame["garden"].to_numpy(np.float64),
    }


@pytest.fixture(scope="module")
def model():
    tf_keras.utils.set_random_seed(0)
    frame = table(0)
    model = MDN(heads.Mixture(2, 2), backbones.MLP([8]))
    model.adapt(features(frame), frame[["price", "rent"]].to_numpy())
    model.column_names = ColumnNames(("size", "city", "built", "garden"), ("price", "rent"))
    model.compile("adam", jit_compile=False)  # XLA would compile a program for each test
    return model


def predict(model, data, output, eager=True, **options):
    tf.config.run_functions_eagerly(eager)  # to trace the program takes longer than the rows do
    try:
        prediction = predict_file(model, str(data), output, **options)
    finally:
        tf.config.run_functions_eagerly(False)
    return pd.read_parquet(output), prediction


def assert_answers(found, model, frame, quantiles=(0.05, 0.5, 0.95)):
    density = model.predict_distribution(features(frame))
    for i, target in enumerate(("price", "rent")):
        for name, value in (("mean", density.mean()), ("stddev", density.stddev())):
            np.testing.assert_allclose(found[f"{target}_{name}"], value[:, i], rtol=1e-5)
        for p in quantiles:
            expected = density.quantile(p)[:, i]
            np.testing.assert_allclose(found[f"{target}_q{p:g}"], expected, rtol=1e-4)
    return density


# ---------------------------------------------------------------------- answers


@pytest.mark.parametrize("kind", ["csv", "csv.gz", "parquet"])
def test_answers_are_the_models_whatever_the_order_of_the_columns(kind, model, tmp_path):
    frame = table(1)
    frame["extra"] = "?"
    frame["key"] = np.arange(N)
    frame.loc[:9, "rent"] = np.nan
    frame.loc[:4, "price"] = np.nan
    path = tmp_path / f"new.{kind}"
    shuffled = frame[["key", "rent", "garden", "extra", "built", "city", "price", "size"]]
    if kind == "parquet":
        shuffled.to_parquet(path, index=False)
    else:
        shuffled.to_csv(path, index=False)
    output, eager = tmp_path / "out.parquet", kind != "parquet"
    found, prediction = predict(model, path, output, eager, keep=["key"])
    density = assert_answers(found, model, frame)
    assert list(found["key"]) == list(frame["key"])
    log_prob = density.log_prob(frame[["price", "rent"]].to_numpy(np.float32)).numpy()
    np.testing.assert_allclose(found["log_prob"][5:], log_prob[5:], rtol=1e-4, atol=1e-4)
    assert found["log_prob"][:5].isna().all()  # nothing is known of them
    assert (prediction.rows, prediction.scored) == (N, N - 5)
    assert prediction.log_prob == pytest.approx(log_prob[5:].sum(), rel=1e-4)
    assert {path.name for path in tmp_path.iterdir()} == {f"new.{kind}", "out.parquet"}


def test_keys_of_csv_stay_as_they_are(model, tmp_path, small_blocks):
    frame = table(1)
    rest = N - 2
    keys = {
        "zip": ["00501", "99950", *["10001"] * rest],
        "id": ["1234567890123456789", "", *["7"] * rest],
        "long": ["12345678901234567890", "1", *["2"] * rest],
        "self": ["0.25", "-0.001", *["3"] * rest],
        "cost": ["2.0", "0.5", *["1e-07"] * rest],
        "version": ["1.10", "1.1", *["1.2"] * rest],
        "power": ["1e5", "2e3", *["100000"] * rest],
        "fine": ["0.12345678901234567", "0.1", *["7"] * rest],
        "mixed": ["1", "1.0", *["2.5"] * rest],
        "late": [*["2.0"] * (N - 1), "1.10"],
        "place": ["a", "", *["b"] * rest],
        "empty": [""] * N,
    }
    pd.concat([frame, pd.DataFrame(keys)], axis=1).to_csv(tmp_path / "new.csv", index=False)
    predict(model, tmp_path / "new.csv", tmp_path / "out.parquet", keep=[*keys, "zip"])
    found = pyarrow.parquet.read_table(tmp_path / "out.parquet")
    assert found["zip"].to_pylist()[:3] == ["00501", "99950", "10001"]
    assert found["id"].to_pylist()[:3] == [1234567890123456789, None, 7]
    assert found["long"].to_pylist()[:3] == ["12345678901234567890", "1", "2"]
    assert found["self"].to_pylist()[:3] == [0.25, -0.001, 3.0]
    assert found["cost"].to_pylist()[:3] == [2.0, 0.5, 1e-7]
    for name in ("version", "power", "fine", "mixed", "late"):
        assert found[name].to_pylist() == keys[name]
    assert found["place"].to_pylist()[:3] == ["a", None, "b"]
    assert found["empty"].to_pylist() == [None] * N


def test_without_targets_there_is_no_log_prob(model, tmp_path):
    table(1).drop(columns=["price", "rent"]).to_csv(tmp_path / "new.csv", index=False)
    found, prediction = predict(
        model, tmp_path / "new.csv", tmp_path / "out.parquet", quantiles=[0.25, 0.2500001]
    )
    names = ("mean", "stddev", "q0.25", "q0.2500001")
    assert list(found) == [f"{target}_{name}" for target in ("price", "rent") for name in names]
    assert prediction.scored == 0


def test_unseen_categories_take_the_unknown_slot_and_are_counted(model, tmp_path):
    frame = table(1)
    frame.loc[:6, "city"] = "Paris"
    frame.loc[7:8, "city"] = None
    frame.to_csv(tmp_path / "new.csv", index=False)
    found, prediction = predict(model, tmp_path / "new.csv", tmp_path / "out.parquet")
    assert prediction.unseen == {"city": 7}
    assert_answers(found, model, frame)
    assert "city: 7 rows" in "\n".join(prediction.lines(tmp_path / "out.parquet"))


def test_rows_that_lack_a_number_have_empty_answers(model, tmp_path):
    frame = table(1)
    frame.loc[3, "size"] = np.nan
    frame.to_csv(tmp_path / "new.csv", index=False)
    found, prediction = predict(model, tmp_path / "new.csv", tmp_path / "out.parquet")
    assert prediction.unanswered == 1
    assert found.loc[3].isna().all()
    assert found.drop(index=3).notna().all(axis=None)


def test_matrix_model_takes_columns_by_name(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=[50, 2])
    model = MDN(heads.Diag(1), backbones.MLP([4]))
    model.adapt(x, x[:, :1] + 1.0)
    model.compile("adam", jit_compile=False)
    with pytest.raises(ConfigError, match="does not name its features"):
        schema_of(model)
    model.column_names = ColumnNames(("a", "b"), ("y",))
    pd.DataFrame({"b": x[:, 1], "a": x[:, 0]}).to_csv(tmp_path / "x.csv", index=False)
    found, _ = predict(model, tmp_path / "x.csv", tmp_path / "out.parquet")
    np.testing.assert_allclose(found["y_mean"], model.predict(x)[:, 0], rtol=1e-5)


def test_names_of_columns_are_saved_with_the_model(model, tmp_path):
    model.save(tmp_path / "model.keras")
    import mdn

    assert mdn.load(tmp_path / "model.keras").column_names == model.column_names


# ---------------------------------------------------------------------- arrays

STEPS = np.random.default_rng(0).normal(size=[20, 4, 2])
STEPS[3, 2:] = np.nan  # a shorter sequence
STEPS[5, 1, 0] = np.nan  # which no train row lacks


def sequence_model(return_sequences):
    tf_keras.utils.set_random_seed(0)
    backbone = backbones.LSTM([3], return_sequences=return_sequences)
    model = MDN(heads.Mixture(2, 2), backbone)
    y = STEPS[:, :, ::-1] if return_sequences else STEPS[:, 0]
    model.adapt(np.delete(STEPS, 5, axis=0), np.delete(y, 5, axis=0))
    return model, y


@pytest.mark.parametrize("return_sequences", [True, False])
def test_sequences_are_answered_as_the_model_does(return_sequences, tmp_path, small_blocks):
    model, y = sequence_model(return_sequences)
    key = np.arange(20) * 10
    np.savez_compressed(tmp_path / "new.npz", x=STEPS, y=y, key=key)
    found, prediction = predict(
        model, tmp_path / "new.npz", tmp_path / "out.parquet", keep=["key"], quantiles=[0.5]
    )
    density = model.predict_distribution(STEPS)
    shape = (20, 4) if return_sequences else (20,)
    answered = np.ones(shape, bool)
    if return_sequences:
        answered[3, 2:], answered[5, 1:] = False, False
        np.testing.assert_array_equal(found["sequence"], np.repeat(np.arange(20), 4))
        np.testing.assert_array_equal(found["step"], np.tile(np.arange(4), 20))
    else:
        answered[5] = False
        assert "step" not in found
    np.testing.assert_array_equal(found["key"], np.repeat(key, found.shape[0] // 20))
    assert (prediction.rows, prediction.unanswered) == (
        answered.size,
        3 if return_sequences else 1,
    )
    log_prob = density.log_prob(y.astype(np.float32)).numpy()
    expected = {f"y{d}_mean": density.mean().numpy()[..., d] for d in range(2)}
    expected |= {f"y{d}_q0.5": density.quantile(0.5).numpy()[..., d] for d in range(2)}
    for name, value in {**expected, "log_prob": log_prob}.items():
        value = np.where(answered, value, np.nan).reshape(-1)
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    assert prediction.scored == answered.sum()


def test_stopped_prediction_of_sequences_goes_on(tmp_path, small_blocks):
    model, _ = sequence_model(True)
    (data := tmp_path / "rows").mkdir()
    for i in range(2):
        np.savez(data / f"{i}.npz", x=STEPS)
    whole, _ = predict(model, data, tmp_path / "whole.parquet", quantiles=[])
    output = tmp_path / "out.parquet"
    with pytest.raises(Killed):
        predict(model, data, output, quantiles=[], progress=stop_after(3))
    found, prediction = predict(model, data, output, quantiles=[])
    assert prediction.resumed == 144  # 16 and 4 sequences of a file, and 16 of the next
    pd.testing.assert_frame_equal(found, whole)
    assert list(found["sequence"][::4]) == list(range(40))
    assert "log_prob" not in found


def test_a_run_of_sequences_answers_and_is_judged(tmp_path):
    model, y = sequence_model(True)
    model.column_names = ColumnNames(("u0", "u1"), ("v0", "v1"))
    (tmp_path / "run" / ".hydra").mkdir(parents=True)
    model.save(tmp_path / "run" / "model.keras")
    config = compose_config(["k=2", "backbone=lstm", "data=npz", "data.x_key=u", "data.y_key=v"])
    OmegaConf.save(config, tmp_path / "run" / ".hydra" / "config.yaml")
    x, y = (np.delete(part, 5, axis=0) for part in (STEPS, y))
    np.savez(tmp_path / "new.npz", u=x, v=y)
    data = str(tmp_path / "new.npz")
    metrics = evaluate_run(tmp_path / "run", data)
    known = ~np.isnan(y).all(axis=-1)
    log_prob = model.log_prob(x, y)[known]
    assert metrics["test/n"] == known.sum() == 19 * 4 - 2
    assert metrics["test/nll"] == pytest.approx(-log_prob.mean(), rel=1e-5)
    prediction = predict_run(tmp_path / "run", data, tmp_path / "out.parquet")
    assert prediction.scored == known.sum()
    assert prediction.log_prob == pytest.approx(log_prob.sum(), rel=1e-5)


def test_matrix_model_takes_arrays_by_their_keys(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=[50, 2])
    model = MDN(heads.Diag(1), backbones.MLP([4]))
    model.adapt(x, x[:, :1] + 1.0)
    model.compile("adam", jit_compile=False)
    np.savez(tmp_path / "x.npz", a=x.astype(np.float32), b=x[:, 0] + 1.0)
    (tmp_path / "x.npz").rename(tmp_path / "X.NPZ")
    found, prediction = predict(
        model, tmp_path / "X.NPZ", tmp_path / "out.parquet", keys=("a", "b")
    )
    np.testing.assert_allclose(found["y0_mean"], model.predict(x)[:, 0], rtol=1e-5)
    assert prediction.scored == 50


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"z": STEPS}, "has no array 'x': it has z"),
        ({"x": STEPS[:, 0]}, r"has shape \[20, 2\]: the run takes \[N, T, 2\]"),
        ({"x": STEPS[..., :1]}, r"has shape \[20, 4, 1\]: the run takes"),
        ({"x": STEPS, "y": STEPS[:, :3]}, r"the run takes \[N, T, 2\], here \[20, 4, 2\]"),
        ({"x": STEPS[:0]}, "has arrays without rows"),
        ({"x": STEPS.astype(str)}, "of type <U32, not numeric"),
        ({"x": STEPS.astype(object)}, "holds Python objects, which may run code"),
        ({"x": np.asfortranarray(STEPS)}, "lies in Fortran's order"),
        ({"x": np.where(STEPS > 1.0, 1e99, STEPS)}, "in row 0, which float32 cannot hold"),
        ({"x": STEPS, "key": STEPS}, r"array 'key' .* not \[20\]: keep arrays of one value"),
        (None, "perhaps cut short"),
    ],
)
def test_wrong_arrays_are_one_line_and_leave_nothing(arrays, message, tmp_path):
    model, _ = sequence_model(True)
    if arrays is None:
        (tmp_path / "new.npz").write_bytes(b"PK no")
    else:
        np.savez(tmp_path / "new.npz", **arrays)
    keep = ["key"] if arrays and "key" in arrays else []
    with pytest.raises(DataError, match=message) as error:
        predict(model, tmp_path / "new.npz", tmp_path / "out.parquet", keep=keep)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out.parquet").exists()


def test_files_of_which_some_have_targets_are_refused_at_once(tmp_path):
    model, y = sequence_model(True)
    (data := tmp_path / "rows").mkdir()
    np.savez(data / "a.npz", x=STEPS)
    np.savez(data / "b.npz", x=STEPS, y=y)
    with pytest.raises(DataError, match=r"a.npz has no array 'y' and .*b.npz has one: give files"):
        predict(model, data, tmp_path / "out.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]


@pytest.mark.parametrize("kind", ["CSV", "Parquet", "NPZ"])
@pytest.mark.parametrize("folder", [False, True])
def test_names_end_in_letters_of_either_case(kind, folder, tmp_path):
    (data := tmp_path / "rows").mkdir()
    path = data / f"NEW.{kind}"
    table(1).to_parquet(path) if kind == "Parquet" else path.write_text("a\n1\n")
    found = data if folder else path
    assert find_rows(str(found)) == [path]
    if kind != "NPZ":
        assert find_tables(str(found))[0] == [path]


def test_rows_of_the_other_kind_are_refused(model, tmp_path):
    np.savez(tmp_path / "new.npz", x=STEPS)
    with pytest.raises(RunError, match="takes columns by their names: give a CSV or Parquet"):
        predict_file(model, str(tmp_path / "new.npz"), tmp_path / "out.parquet")
    table(1).to_csv(tmp_path / "new.csv", index=False)
    with pytest.raises(RunError, match=r"sequences \[N, T, F\], which no table holds: give an"):
        predict_file(sequence_model(True)[0], str(tmp_path / "new.csv"), tmp_path / "out.parquet")


# ---------------------------------------------------------------------- inputs


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty: give a file with rows"),
        ("size,city,built,garden\n", "has column names but no rows"),
        ("size,built\n1,2001-01-01\n", "lacks the columns 'city', 'garden': it has size, built"),
        (
            "size,city,built,garden\nlarge,Ulm,2001-01-01,True\n",
            "feature 'size' is 'large' in row 0",
        ),
        ("size,city,built,garden\n1e99,Ulm,2001-01-01,True\n", "which float32 cannot hold"),
        ("size,city,built,garden\n1,Ulm,soon,True\n", "feature 'built' is 'soon' in row 0"),
        ("size,size,city,built,garden\n1,1,Ulm,2001-01-01,1\n", "two columns named 'size'"),
        ("size,city,built,garden\n1,Ulm,2001-01-01,True,5,6\n", "cannot be read as CSV"),
    ],
)
def test_wrong_tables_are_one_line_and_leave_nothing(content, message, model, tmp_path):
    path = tmp_path / "new.csv"
    path.write_text(content)
    with pytest.raises(DataError, match=message) as error:
        predict_file(model, str(path), tmp_path / "out.parquet")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out.parquet").exists()


@pytest.mark.parametrize(
    ("data", "output", "options", "message"),
    [
        ("none.csv", "out.parquet", {}, "none.csv matches no file"),
        ("new.txt", "out.parquet", {}, "is neither CSV nor Parquet by its name"),
        ("fake.parquet", "out.parquet", {}, "is not a Parquet file"),
        ("new.csv", "out.csv", {}, "end its name in .parquet"),
        ("new.csv", "none/out.parquet", {}, "there is no folder"),
        ("new.csv", "there.parquet", {}, "exists: name another file, or give --overwrite"),
        ("new.csv", "out.parquet", {"quantiles": [1.0]}, "quantile 1.0: must be between 0 and 1"),
        ("new.csv", "out.parquet", {"quantiles": [0.5, 0.5]}, "name each once"),
        ("new.csv", "out.parquet", {"keep": ["key"]}, "lacks the column 'key'"),
        (".", "out.parquet", {}, "has CSV and Parquet files"),
    ],
)
def test_wrong_arguments_are_one_line(
    data, output, options, message, model, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    table(1).to_csv("new.csv", index=False)
    for name in ("new.txt", "fake.parquet", "there.parquet"):
        (tmp_path / name).write_text("no")
    with pytest.raises(MDNError, match=message) as error:
        predict_file(model, data, output, **options)
    assert "\n" not in str(error.value)


def test_overwrite_when_asked(model, tmp_path):
    table(1).to_csv(tmp_path / "new.csv", index=False)
    (tmp_path / "out.parquet").write_text("old")
    found, _ = predict(model, tmp_path / "new.csv", tmp_path / "out.parquet", overwrite=True)
    assert len(found) == N


# ---------------------------------------------------------------------- blocks


@pytest.fixture
def small_blocks(monkeypatch):
    for module in ("schema", "array_blocks"):
        monkeypatch.setattr(f"mdn.data.{module}.BLOCK_ROWS", 64)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_blocks_are_all_rows_in_order(kind, model, tmp_path, small_blocks):
    frame = table(1)
    for part, rows in (("a", slice(0, 100)), ("b", slice(100, N))):
        if kind == "csv":
            frame[rows].to_csv(tmp_path / f"{part}.csv", index=False)
        else:
            frame[rows].to_parquet(tmp_path / f"{part}.parquet", index=False)
    blocks = list(TableReader(schema_of(model), str(tmp_path)).blocks())
    assert [block.rows for block in blocks] == [64, 36, 64, 64, 64, 8]
    sizes = np.concatenate([block.x["size"] for block in blocks])
    np.testing.assert_allclose(sizes, frame["size"], rtol=1e-12)
    shares = [block.share for block in blocks]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


class Killed(BaseException):
    """Stands for a signal that no one can catch."""


def stop_after(blocks):
    def progress(rows, share):
        nonlocal blocks
        blocks -= 1
        if not blocks:
            raise Killed

    return progress


def test_stopped_prediction_goes_on_behind_its_last_block(model, tmp_path, small_blocks):
    frame = table(1, cities=("Bonn", "Paris"))
    frame["key"] = ["1"] * 100 + ["two"] * (N - 100)  # a block of integers, then text
    frame.to_csv(tmp_path / "new.csv", index=False)
    data, output = tmp_path / "new.csv", tmp_path / "out.parquet"
    whole, expected = predict(model, data, tmp_path / "whole.parquet", keep=["key"])
    with pytest.raises(Killed):
        predict(model, data, output, keep=["key"], progress=stop_after(3))
    assert not output.exists()
    folder = tmp_path / ".out.parquet.partial"
    (folder / "000001.parquet").write_bytes(b"PAR1 half of it")  # which is answered again
    found, prediction = predict(model, data, output, keep=["key"])
    pd.testing.assert_frame_equal(found, whole)
    assert prediction.resumed == 128
    assert prediction.unseen == expected.unseen
    assert prediction.log_prob == pytest.approx(expected.log_prob)
    assert not folder.exists()


@pytest.mark.parametrize("change", ["data", "model", "quantiles"])
def test_another_request_does_not_go_on(change, model, tmp_path, small_blocks):
    table(1).to_csv(tmp_path / "new.csv", index=False)
    data, output = tmp_path / "new.csv", tmp_path / "out.parquet"
    with pytest.raises(Killed):
        predict(model, data, output, progress=stop_after(2))
    options = {}
    if change == "data":
        table(2).to_csv(data, index=False)
    elif change == "model":
        options["identity"] = "another"
    else:
        options["quantiles"] = [0.5]
    _, prediction = predict(model, data, output, **options)
    assert prediction.resumed == 0


def test_summary_is_in_the_file(model, tmp_path):
    table(1).to_csv(tmp_path / "new.csv", index=False)
    _, prediction = predict(model, tmp_path / "new.csv", tmp_path / "out.parquet")
    footer = pyarrow.parquet.read_metadata(tmp_path / "out.parquet").metadata[b"mdn"]
    assert json.loads(footer)["rows"] == prediction.rows == N
