"""Run directories: opened, resumed, refused, and never half-written."""

import json

import pytest
from omegaconf import OmegaConf

import mdn
from mdn import runs
from mdn.config import compose_config
from mdn.runs import CONTENTS, RunDirectory, provenance


def config(path, *overrides):
    return compose_config([f"output_dir={path}", *overrides])


def test_new_run_is_written_only_when_created(tmp_path):
    run = RunDirectory(config(tmp_path / "run"), ["k=3"])
    assert not run.resumed
    assert not run.path.exists()
    run.create()
    assert OmegaConf.load(run / ".hydra" / "overrides.yaml") == ["k=3"]
    assert OmegaConf.load(run / ".hydra" / "config.yaml").model.components == 3


def test_unfinished_run_is_resumed_and_another_config_refused(tmp_path):
    RunDirectory(config(tmp_path)).create()
    assert RunDirectory(config(tmp_path)).resumed
    with pytest.raises(mdn.MDNError, match=r"another config \(k was 3 and is 5.*overwrite=true"):
        RunDirectory(config(tmp_path, "k=5"))


def test_finished_run_is_refused_and_replaced_only_when_asked(tmp_path):
    run = RunDirectory(config(tmp_path))
    run.create()
    run.write_json("metrics.json", {"test/nll": 1.0})
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(mdn.MDNError, match="holds a finished run: set overwrite=true"):
        RunDirectory(config(tmp_path))
    again = RunDirectory(config(tmp_path, "overwrite=true", "k=5"))
    assert (tmp_path / "metrics.json").exists()  # until the new run is ready to start
    again.create()
    assert not (tmp_path / "metrics.json").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_unfinished_run_that_was_to_replace_another_is_resumed(tmp_path):
    RunDirectory(config(tmp_path)).create()
    assert not RunDirectory(config(tmp_path, "overwrite=true")).resumed  # as it was asked for
    RunDirectory(config(tmp_path, "overwrite=true")).create()
    (tmp_path / "checkpoints").mkdir()
    again = RunDirectory(config(tmp_path, "overwrite=true"))
    assert again.resumed
    again.create()
    assert (tmp_path / "checkpoints").exists()
    assert not RunDirectory(config(tmp_path, "overwrite=true", "k=5")).resumed
    again.write_json("metrics.json", {"test/nll": 1.0})
    finished = RunDirectory(config(tmp_path, "overwrite=true"))
    assert not finished.resumed
    finished.create()
    assert not (tmp_path / "checkpoints").exists()


def test_a_run_that_is_killed_while_it_replaces_another_goes_on_anew(tmp_path, monkeypatch):
    whole = runs._remove
    for kept in range(len(CONTENTS)):
        first = RunDirectory(config(tmp_path / f"{kept}", "overwrite=true"))
        first.create()
        (first / "checkpoints").mkdir()
        first.write_json("metrics.json", {"test/nll": 1.0})

        def remove(path, last=CONTENTS[kept]):
            if path.name == last:
                raise KeyboardInterrupt
            whole(path)

        monkeypatch.setattr(runs, "_remove", remove)
        with pytest.raises(KeyboardInterrupt):
            RunDirectory(config(first.path, "overwrite=true")).create()
        monkeypatch.setattr(runs, "_remove", whole)
        again = RunDirectory(config(first.path, "overwrite=true"))
        again.create()
        assert sorted(path.name for path in again.path.iterdir()) == [".hydra"]


@pytest.mark.parametrize("content", ["a: [", "a: ${b}", "[1]"])
def test_a_config_that_cannot_be_read_is_replaced(content, tmp_path):
    RunDirectory(config(tmp_path)).create()
    (tmp_path / ".hydra" / "config.yaml").write_text(content)
    assert not RunDirectory(config(tmp_path, "overwrite=true")).resumed


def test_a_folder_of_other_things_is_never_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    for extra in ([], ["overwrite=true"]):
        with pytest.raises(mdn.MDNError, match="holds other files: name a new directory"):
            RunDirectory(config(tmp_path, *extra))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(mdn.MDNError, match="is a file: name a directory"):
        RunDirectory(config(tmp_path / "run"))


def test_json_is_written_whole_or_not_at_all(tmp_path):
    run = RunDirectory(config(tmp_path / "run"))
    run.create()
    run.write_json("metrics.json", {"a": 1.0})
    with pytest.raises(ValueError, match="not JSON compliant"):
        run.write_json("metrics.json", {"a": float("nan")})
    assert json.loads((run / "metrics.json").read_text()) == {"a": 1.0}
    (run / "metrics.json").unlink()
    (run / "metrics.json").mkdir()
    with pytest.raises(mdn.MDNError, match="cannot write"):
        run.write_json("metrics.json", {"a": 1.0})
    assert sorted(p.name for p in run.path.iterdir()) == [".hydra", "metrics.json"]


def test_provenance_says_what_it_takes_to_run_again():
    record = provenance(compose_config(["seed=7"]), "abc")
    assert record["seed"] == 7
    assert record["data_sha256"] == "abc"
    assert record["versions"]["tensorflow"]
    json.dumps(record)


def test_contents_name_no_path_outside():
    assert all("/" not in name and name not in ("", ".", "..") for name in CONTENTS)


def test_a_run_is_never_started_from_the_directory_it_replaces(tmp_path):
    with pytest.raises(mdn.MDNError, match="is the output_dir itself"):
        RunDirectory(config(tmp_path, f"init_from={tmp_path}", "overwrite=true"))
