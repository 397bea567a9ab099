"""Tables: what is read, and what every bad file, column or cell says."""

import datetime
import decimal
import gzip
import inspect
import pathlib

import numpy as np
import pandas as pd
import pytest
import yaml

from mdn.data.kinds import to_days
from mdn.data.schema import Schema, TableReader
from mdn.data.tabular import Csv, Parquet
from mdn.errors import DataError

SOURCES = {"csv": Csv, "parquet": Parquet}
N = 40


def make_frame(n: int = N) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "y": rng.normal(size=n),
            "z": rng.integers(0, 9, n),
            "size": rng.normal(size=n),
            "count": rng.integers(0, 5, n),
            "open": rng.integers(0, 2, n).astype(bool),
            "city": rng.choice(["Rome", "Oslo", "Bern"], n),
            "day": pd.Timestamp("2020-01-01") + pd.to_timedelta(np.arange(n) * 6, "h"),
        }
    )


def write(frame: pd.DataFrame, folder: pathlib.Path, kind: str, name: str = "rows") -> str:
    path = folder / f"{name}.{kind}"
    if kind == "csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path)
    return str(path)


def collect(data, part="x"):
    """Return all rows of a source in one mapping or array; the order is by split."""
    parts = [getattr(rows, part) for rows in (data.train, data.validation, data.test)]
    if isinstance(parts[0], dict):
        return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
    return np.concatenate(parts)


def load_one(kind, frame, folder, **options):
    return SOURCES[kind](write(frame, folder, kind), ["y"], **options).load()


@pytest.mark.parametrize("kind", SOURCES)
def test_columns_become_numbers_and_text(kind, tmp_path):
    frame = make_frame()
    data = SOURCES[kind](write(frame, tmp_path, kind), ["y", "z"]).load()
    assert data.features == ("size", "count", "open", "city", "day")
    assert data.targets == ("y", "z")
    assert [len(r) for r in (data.train, data.validation, data.test)] == [32, 4, 4]
    assert data.notes == {"data/rows": N, "data/rows_without_target": 0}
    frame = frame.set_index("y", drop=False).loc[collect(data, "y")[:, 0]]
    x = collect(data)
    for name in ("size", "count", "open"):
        assert x[name].dtype == np.float64
        np.testing.assert_allclose(x[name], frame[name].astype(float))
    assert x["city"].dtype == object
    assert x["city"].tolist() == frame["city"].tolist()
    hours = (frame["day"] - pd.Timestamp("1970-01-01")).dt.total_seconds() / 3600
    np.testing.assert_allclose(x["day"], hours / 24)
    assert data.train.y.dtype == np.float64


@pytest.mark.parametrize("kind", SOURCES)
def test_one_seed_one_fingerprint(kind, tmp_path):
    first, again, other = (load_one(kind, make_frame(), tmp_path, seed=s) for s in (0, 0, 1))
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()


@pytest.mark.parametrize("kind", SOURCES)
def test_missing_features(kind, tmp_path):
    frame = make_frame()
    frame.loc[[3, 8], "size"] = np.nan
    frame["open"] = frame["open"].astype(object).where(frame.index != 4)
    frame["city"] = frame["city"].where(frame.index != 5)
    frame.loc[6, "day"] = pd.NaT
    with pytest.raises(
        DataError, match=r"'size' is missing in 2 places, first in row 3 of .*rows"
    ):
        load_one(kind, frame, tmp_path)
    x = collect(load_one(kind, frame, tmp_path, missing="indicator"))
    assert {name: int(pd.isna(v).sum()) for name, v in x.items()} == {
        "z": 0,
        "size": 2,
        "count": 0,
        "open": 1,
        "city": 1,
        "day": 1,
    }
    assert sum(v is None for v in x["city"]) == 1
    with pytest.raises(DataError, match="feature 'size' is missing in every row"):
        load_one(kind, frame.assign(size=np.nan), tmp_path, missing="indicator")


@pytest.mark.parametrize("kind", SOURCES)
def test_missing_targets(kind, tmp_path):
    frame = make_frame().assign(z=lambda f: f["z"].astype(float))
    frame.loc[:4, "y"], frame.loc[3:7, "z"] = np.nan, np.nan
    data = SOURCES[kind](write(frame, tmp_path, kind), ["y", "z"]).load()
    assert data.notes == {"data/rows": N - 2, "data/rows_without_target": 2}
    assert np.isnan(collect(data, "y")).sum(axis=0).tolist() == [3, 3]


@pytest.mark.parametrize("kind", SOURCES)
def test_categorical_numbers(kind, tmp_path):
    frame = make_frame()
    frame["count"] = frame["count"].astype("Int64").where(frame.index != 2)
    options = {"categorical": ["count"], "missing": "indicator"}
    values = collect(load_one(kind, frame, tmp_path, **options))["count"]
    assert set(values) == {"0", "1", "2", "3", "4", None}  # not "0.0"


def test_a_category_does_not_depend_on_the_rows_around_it(tmp_path):
    frame = make_frame().assign(stars=np.resize([3.0, 3.5, 4.0, 1e300, np.inf], N))
    path = write(frame, tmp_path, "parquet")
    data = Parquet(path, ["y"], ["stars"], categorical=["stars"]).load()
    assert set(collect(data)["stars"]) == {"3", "3.5", "4", str(int(1e300)), "inf"}
    whole = write(frame[frame["stars"] == 3], tmp_path, "parquet", "whole")
    (block,) = TableReader(Schema({"stars": True}, ["y"], False), whole).blocks()
    assert set(block.x["stars"]) == {"3"}


def test_csv_keeps_leading_zeros_of_categories(tmp_path):
    frame = make_frame().assign(zip=lambda f: f["count"].map("0{}".format))
    assert "01" in collect(load_one("csv", frame, tmp_path, categorical=["zip"]))["zip"]
    assert collect(load_one("csv", frame, tmp_path))["zip"].dtype == np.float64


@pytest.mark.parametrize("kind", SOURCES)
def test_weights(kind, tmp_path):
    frame = make_frame().assign(w=np.arange(N))
    data = load_one(kind, frame, tmp_path, weight="w")
    assert "w" not in data.features
    assert data.train.weight.mean() == pytest.approx(1)
    ratio = collect(data, "weight")
    order = frame.set_index("y").loc[collect(data, "y")[:, 0], "w"]
    np.testing.assert_allclose(ratio / ratio.sum(), order / order.sum())
    for bad in (-1.0, np.nan, np.inf):
        frame = frame.assign(w=np.where(frame.index == 7, bad, 1.0))
        with pytest.raises(DataError, match=f"weight column 'w' is {bad} in row 7 of"):
            load_one(kind, frame, tmp_path, weight="w")
    with pytest.raises(DataError, match="'w' is zero in every row"):
        load_one(kind, frame.assign(w=0), tmp_path, weight="w")


@pytest.mark.parametrize("kind", SOURCES)
def test_splits_by_a_column(kind, tmp_path):
    frame = make_frame().assign(part=np.resize(["train", "train", "val", "test"], N))
    data = load_one(kind, frame, tmp_path, split="column", split_column="part")
    assert "part" not in data.features
    np.testing.assert_array_equal(data.test.y[:, 0], frame["y"][3::4])
    data = load_one(kind, frame, tmp_path, split="group", split_column="city")
    assert len({frozenset(r.x["part"]) for r in (data.train, data.test)}) <= 2
    options = {"features": ["day"], "split": "time", "split_column": "day"}
    data = load_one(kind, frame, tmp_path, **options)
    assert data.train.x["day"].max() // 1 < data.validation.x["day"].min() // 1
    assert data.validation.x["day"].max() // 1 < data.test.x["day"].min() // 1


@pytest.mark.parametrize("kind", SOURCES)
def test_folders_and_globs(kind, tmp_path):
    frame = make_frame()
    (tmp_path / "a").mkdir()
    write(frame[20:], tmp_path / "a", kind, "2")
    write(frame[:20][frame.columns[::-1]], tmp_path / "a", kind, "1")  # columns in another order
    (tmp_path / "a" / "notes.txt").write_text("not rows")
    whole = load_one(kind, frame, tmp_path)
    for path in (tmp_path / "a", tmp_path / "*" / f"[12].{kind}"):
        data = SOURCES[kind](str(path), ["y"], features=list(whole.features)).load()
        assert data.fingerprint() == whole.fingerprint()


@pytest.mark.parametrize("kind", SOURCES)
def test_a_row_is_named_by_its_file(kind, tmp_path):
    frame = make_frame()
    write(frame[:20], tmp_path, kind, "1")
    write(frame[20:].assign(z=np.inf).reset_index(drop=True), tmp_path, kind, "2")
    with pytest.raises(DataError, match=rf"'z' is inf in row 0 of .*2\.{kind}"):
        SOURCES[kind](str(tmp_path), ["y"]).load()


def write_parts(folder: pathlib.Path, parts: list[list]) -> str:
    """Write a CSV file for each list of cells of `key`, with y = 0, 1, 2 ..; return the folder."""
    start = 0
    for i, cells in enumerate(parts):
        lines = [f"{start + j},{cell}" for j, cell in enumerate(cells)]
        (folder / f"{i}.csv").write_text("\n".join(["y,key", *lines, ""]))
        start += len(cells)
    return str(folder)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([["101", "", "102"], ["101", "A", "B", "C"]], ["101", None, "102", "101", *"ABC"]),
        ([["007", "008"], ["007", "A", "B", "C"]], ["007", "008", "007", *"ABC"]),
        ([["True", "False"], ["1", "0"]], ["True", "False", "1", "0"]),
        ([["", ""], ["7", "8", "9"]], [np.nan, np.nan, 7.0, 8.0, 9.0]),
    ],
)
def test_csv_columns_are_of_one_kind_in_all_files(parts, expected, tmp_path):
    data = Csv(write_parts(tmp_path, parts), ["y"], missing="indicator").load()
    found = collect(data)["key"][np.argsort(collect(data, "y")[:, 0])]
    np.testing.assert_array_equal(found, np.array(expected, found.dtype))


def test_no_group_of_several_csv_files_is_on_two_sides(tmp_path):
    stores = [str(store) for store in range(100, 140)]
    path = write_parts(tmp_path, [stores, [*stores, "K1"]])
    data = Csv(path, ["y"], split="group", split_column="key").load()
    keys = np.array([*stores, *stores, "K1"])
    sides = [
        set(keys[rows.y.astype(int)[:, 0]]) for rows in (data.train, data.validation, data.test)
    ]
    assert sum(map(len, sides)) == len(set.union(*sides)) == 41


def test_parquet_columns_are_of_one_kind_in_all_files(tmp_path):
    frame = make_frame()
    write(frame, tmp_path, "parquet", "a")
    write(frame.assign(city=None), tmp_path, "parquet", "b")
    for stream in (False, True):
        options = {"missing": "indicator", "stream": stream}
        x = collect(Parquet(str(tmp_path), ["y"], ["city"], **options).load())
        assert set(x["city"]) == {"Rome", "Oslo", "Bern", None}
    for change in ({"count": "many"}, {"open": 1}):
        (name,) = change
        write(frame.assign(**change), tmp_path, "parquet", "b")
        with pytest.raises(DataError, match=rf"'{name}' holds .* in .*b.parquet and .* in .*a.pa"):
            Parquet(str(tmp_path), ["y"]).load()


@pytest.mark.parametrize("stream", [False, True])
def test_dates_may_begin_in_the_second_file(stream, tmp_path):
    frame = make_frame().assign(day=lambda f: f["day"].dt.strftime("%Y-%m-%d"))
    write(frame.assign(day=None), tmp_path, "parquet", "a")
    write(frame, tmp_path, "parquet", "b")
    options = {"missing": "indicator", "stream": stream}
    days = collect(Parquet(str(tmp_path), ["y"], ["day"], **options).load())["day"]
    assert (np.nanmin(days), np.isnan(days).sum()) == (18262, N)
    frame.loc[3, "day"] = "soon"
    write(frame, tmp_path, "parquet", "b")
    with pytest.raises(DataError, match=r"holds dates but also 'soon', in row 3 of .*b.parq"):
        Parquet(str(tmp_path), ["y"], ["day"], **options).load()


@pytest.mark.parametrize("stream", [False, True])
def test_dictionaries_of_several_files_are_categories(stream, tmp_path):
    frame = make_frame()
    days = frame["day"].dt.strftime("%Y-%m-%d").astype("category")
    for name, rows in (("a", slice(0, 20)), ("b", slice(20, N))):
        part = frame[rows].assign(day=days[rows].cat.remove_unused_categories())
        write(part, tmp_path, "parquet", name)
    data = Parquet(str(tmp_path), ["y"], ["day"], stream=stream).load()
    assert set(collect(data)["day"]) == set(days)


@pytest.mark.parametrize(
    ("split", "cell", "message"),
    [
        ("group", "", "is missing in row 3 of .*1.csv, so"),
        ("column", "dev", "is 'dev' in row 3 of .*1.csv: expected train"),
        ("time", "soon", "is 'soon' in row 3 of .*1.csv: expected a number or"),
    ],
)
def test_a_cell_of_the_split_column_is_named_by_its_file(split, cell, message, tmp_path):
    good = {"group": "a", "column": "train", "time": "2020-01-01"}[split]
    path = write_parts(tmp_path, [[good] * 5, [good] * 3 + [cell, good, good, good]])
    options = {"split": split, "split_column": "key", "max_rows": 6}  # every second row
    with pytest.raises(DataError, match=f"data.split_column {message}"):
        Csv(path, ["y"], **options).load()


@pytest.mark.parametrize("kind", SOURCES)
def test_max_rows_are_even(kind, tmp_path):
    data = load_one(kind, make_frame(), tmp_path, max_rows=10)
    assert sorted(collect(data, "y")[:, 0]) == sorted(make_frame()["y"][::4])


def test_one_name_needs_no_list(tmp_path):
    path = write(make_frame(), tmp_path, "csv")
    one = Csv(path, "y", "city").load()
    assert one.fingerprint() == Csv(path, ["y"], ["city"]).load().fingerprint()


@pytest.mark.parametrize("kind", SOURCES)
def test_no_features_left(kind, tmp_path):
    assert load_one(kind, make_frame()[["y"]], tmp_path).train.x.shape == (32, 0)


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": None}, r"data.targets is not set.*data.targets=\[...\]"),
        ({"targets": ["yy"]}, "data.targets: there is no column 'yy' in .*did you mean y"),
        ({"features": ["citi"]}, "data.features: .*'citi'.*did you mean city.*has columns y, z"),
        ({"categorical": ["q"]}, "data.categorical: there is no column 'q'"),
        ({"weight": "w"}, "data.weight: there is no column 'w'"),
        ({"split": "group", "split_column": "g"}, "data.split_column: there is no column 'g'"),
        ({"features": ["y", "z"]}, "'y' is a target and a feature"),
        ({"features": ["z", "z"]}, "data.features names 'z' twice"),
        ({"features": ["z"], "categorical": ["city"]}, "'city' is not a feature"),
        ({"targets": ["city"]}, r"target 'city' is '\w{4}' in row 0 of .*not a number"),
        ({"split": "time"}, "data.split=time needs a column"),
        ({"path": None}, "data.path is not set: give a file, a folder or a glob"),
        ({"path": "nowhere/*.csv"}, "data.path=nowhere.* matches no file"),
    ],
)
def test_option_errors(kind, options, message, tmp_path):
    path = write(make_frame(), tmp_path, kind)
    with pytest.raises(DataError, match=message) as error:
        SOURCES[kind](**{"path": path, "targets": ["y"], **options}).load()
    assert "\n" not in str(error.value)


def test_long_lists_of_columns_are_shortened(tmp_path):
    frame = pd.DataFrame(np.random.default_rng(0).normal(size=(9, 500)))
    path = write(frame.rename(columns="c{}".format), tmp_path, "csv")
    with pytest.raises(DataError, match="c11 and 488 more"):
        Csv(path, ["nothing"]).load()


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": 1.5}, r"target 'y' is constant \(1.5\)"),
        ({"y": np.nan}, "target 'y' is missing in every row"),
        ({"y": pd.Timestamp("2020-01-01")}, "target 'y'"),
        ({"size": np.inf}, "feature 'size' is inf in row 0"),
    ],
)
def test_value_errors(kind, change, message, tmp_path):
    with pytest.raises(DataError, match=message):
        load_one(kind, make_frame().assign(**change), tmp_path)


def write_bytes(path: pathlib.Path, content: bytes | str) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


PARQUET_BYTES = b"PAR1\0\0garbage"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "a.csv is empty"),
        ("a.csv", "\n\n", "cannot be read as CSV: No columns"),
        ("a.csv", "y,x\n", "has column names but no rows"),
        ("a.csv", PARQUET_BYTES, "a.csv is a Parquet file, not CSV: use data=parquet"),
        ("a.csv", b"\x89PNG\0\1\2", "is not CSV but binary"),
        ("a.csv", "y,x\n1,é\n".encode("latin1"), "cannot be read as CSV: 'utf-8' codec"),
        ("a.csv", "y,x\n1,2\n3,4,5\n", "cannot be read as CSV: .*line 3"),
        ("a.csv", "y,x\n1,2,7\n3,4,5\n", "cannot be read as CSV"),
        ("a.csv", "y,x,x\n1,2,3\n", "a.csv has two columns named 'x': rename one"),
        ("a.csv", "a;y\n1;2\n", "there is no column 'y' in .*has column a;y"),
        ("a.csv.gz", "y,x\n1,2\n", "cannot be read as CSV: Not a gzipped file"),
        ("a.parquet", "", "a.parquet is empty"),
        ("a.parquet", "y,x\n1,2\n", "is not a Parquet file: for CSV use data=csv"),
        ("a.parquet", PARQUET_BYTES, "cannot be read as Parquet"),
    ],
)
def test_file_errors(name, content, message, tmp_path):
    path = write_bytes(tmp_path / name, content)
    with pytest.raises(DataError, match=message) as error:
        (Csv if "csv" in name else Parquet)(path, ["y"]).load()
    assert "\n" not in str(error.value)


def test_a_folder_of_differing_files(tmp_path):
    write(make_frame(), tmp_path, "csv", "1")
    write(make_frame().drop(columns="city"), tmp_path, "csv", "2")
    with pytest.raises(DataError, match=r"2.csv and .*1.csv have different columns: column city"):
        Csv(str(tmp_path), ["y"]).load()
    with pytest.raises(DataError, match=r"is a folder with no .parquet or .pq file"):
        Parquet(str(tmp_path), ["y"]).load()


@pytest.mark.parametrize("kind", SOURCES)
def test_an_unreadable_file(kind, tmp_path, monkeypatch):
    path = write(make_frame(), tmp_path, kind)

    def refuse(self, mode):  # as chmod 0 does, but to root too
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(pathlib.Path, "open", refuse)
    with pytest.raises(DataError, match=r"cannot be read as .*Permission denied"):
        SOURCES[kind](path, ["y"]).load()


def rows_of(cells: dict[int, str], n: int = 30) -> str:
    """Return a CSV of y and x = 0, 1, 2 ... with some cells of x replaced."""
    return "y,x\n" + "".join(f"{i % 7},{cells.get(i, i)}\n" for i in range(n))


def test_csv_missing_words_and_other_text(tmp_path):
    path = write_bytes(tmp_path / "a.csv", rows_of({3: "n/a", 4: ""}))
    assert np.isnan(collect(Csv(path, ["y", "x"]).load(), "y")).sum() == 2
    path = write_bytes(tmp_path / "a.csv", rows_of({3: "n/a", 5: "five"}))
    with pytest.raises(DataError, match=r"target 'x' is 'five' in row 5 of .*mend or empty that"):
        Csv(path, ["x"]).load()
    with pytest.raises(DataError, match=r"holds numbers but also 'five', in row 5.*=\[x\]"):
        Csv(path, ["y"], missing="indicator").load()
    data = Csv(path, ["y"], missing="indicator", categorical=["x"]).load()
    assert "five" in collect(data)["x"]


DATES = [f"2020-01-{day:02d}" for day in range(1, 9)]


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([*DATES, "2013-02-30"], "holds dates but also '2013-02-30', in row 8 of .*0.csv"),
        (["", "unknown", *DATES], "holds dates but also 'unknown', in row 1 of .*0.csv"),
        (['"1,200"', '"3,400"', "950"], "holds numbers but also '1,200', in row 0"),
        (["12", '"-1,234,567.5"'], "holds numbers but also '-1,234,567.5', in row 1"),
    ],
)
def test_odd_cells_make_no_category(cells, message, tmp_path):
    path = write_parts(tmp_path, [cells])
    with pytest.raises(DataError, match=rf"feature 'key' {message}.*data.categorical=\[key\]"):
        Csv(path, ["y"], missing="indicator").load()


@pytest.mark.parametrize("cells", [[*DATES[:3], "a", "b", "c"], ["1,2", "3,40", "1000,100"]])
def test_text_is_a_category_and_named_in_the_log(cells, tmp_path, caplog):
    path = write_parts(tmp_path, [[f'"{cell}"' for cell in cells * 6]])
    with caplog.at_level("INFO", "mdn"):
        assert set(collect(Csv(path, ["y"]).load())["key"]) == set(cells)
    assert f"categories, and their values in the train rows: key {len(cells)}" in caplog.messages


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (["2024-01-01", "2024-01-02", "2024-02-30"], "is '2024-02-30' in row 2 of .*8601 date"),
        (["2024-02-30"], "is '2024-02-30' in row 0 of .*, not an ISO 8601 date: mend or empty"),
        (["2024-01-01", "soon", "later"], "is 'soon' in row 1 of .*, not an ISO 8601 date"),
        (["12", "13", "2024-01-01"], "is '2024-01-01' in row 2 of .*, not a number"),
        (["soon"], "is 'soon' in row 0 of .*, not a number"),
    ],
)
def test_a_bad_date_of_new_rows_is_named(kind, cells, message, tmp_path):
    path = write(pd.DataFrame({"when": cells}), tmp_path, kind)
    reader = TableReader(Schema({"when": False}, ["y"], False), path)
    with pytest.raises(DataError, match=f"feature 'when' {message}"):
        list(reader.blocks())


def test_csv_dialects(tmp_path):
    plain = rows_of({})
    whole = Csv(write_bytes(tmp_path / "a.csv", plain), ["y"]).load().fingerprint()
    variants = {
        "b.csv": "\ufeff" + plain,
        "c.csv": plain.replace("\n", "\r\n"),
        "d.csv": plain.replace(",", ", "),
        "e.csv": "".join(f"{i - 1 if i else ''},{s}\n" for i, s in enumerate(plain.split())),
        "f.csv.gz": gzip.compress(plain.encode()),
    }
    for name, content in variants.items():
        data = Csv(write_bytes(tmp_path / name, content), ["y"]).load()
        assert data.fingerprint() == whole, name


def test_parquet_types(tmp_path):
    frame = pd.DataFrame(
        {
            "y": [decimal.Decimal(i) for i in range(12)],
            "when": [datetime.date(2020, 1, 1 + i) for i in range(12)],
            "zoned": pd.date_range("2020-01-01", periods=12, tz="Europe/Paris"),
            "kind": pd.Categorical(["a", "b", None] * 4),
            "codes": ["1", "2", ""] * 4,
            "maybe": pd.array([True, None, False] * 4, dtype="boolean"),
            "a.b": np.arange(12, dtype=np.float32),
        },
        index=pd.Index(range(12), name=None)[::-1],
    )
    x = collect(load_one("parquet", frame, tmp_path, missing="indicator"))
    assert list(x) == ["when", "zoned", "kind", "codes", "maybe", "a.b"]
    assert x["when"].min() == (datetime.date(2020, 1, 1) - datetime.date(1970, 1, 1)).days
    assert x["zoned"].min() == pytest.approx(x["when"].min() - 1 / 24)
    assert set(x["kind"]) == {"a", "b", None}
    assert set(x["codes"]) == {"1", "2", None}
    np.testing.assert_array_equal(np.sort(x["maybe"]), [0] * 4 + [1] * 4 + [np.nan] * 4)
    with pytest.raises(DataError, match=r"feature 'maybe' is missing in every row"):
        load_one("parquet", frame.assign(maybe=None), tmp_path, missing="indicator")
    with pytest.raises(DataError, match=r"feature 'codes' holds mixed values.*leave it out"):
        load_one("parquet", frame.assign(codes=[[1]] * 12), tmp_path, missing="indicator")


@pytest.mark.parametrize("kind", SOURCES)
def test_config_lists_the_defaults(kind):
    config = yaml.safe_load(pathlib.Path(f"configs/data/{kind}.yaml").read_text())
    assert config.pop("_target_") == f"mdn.data.tabular.{SOURCES[kind].__name__}"
    assert config.pop("seed") == "${seed}"
    defaults = {k: p.default for k, p in inspect.signature(SOURCES[kind]).parameters.items()}
    assert {**config, "seed": 0, "categorical": tuple(config["categorical"])} == defaults


def test_dates_beyond_what_nanoseconds_hold():
    days = [datetime.date(1, 1, 1), datetime.date(1970, 1, 2), datetime.date(9999, 12, 31)]
    column = pd.Series(np.array(days, "datetime64[us]"))
    expected = [(day - datetime.date(1970, 1, 1)).days for day in days]
    np.testing.assert_array_equal(to_days(column), expected)
