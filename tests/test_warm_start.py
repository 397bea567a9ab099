"""What `init_from` names: a run with a model, and not one that has learned from the test rows."""

import pytest
from omegaconf import OmegaConf

from mdn.config import compose_config
from mdn.errors import RunError
from mdn.warm_start import check_start


def write_run(folder, *overrides):
    (folder / ".hydra").mkdir(parents=True)
    (folder / "model.keras").touch()
    OmegaConf.save(compose_config(overrides), folder / ".hydra" / "config.yaml")


CSV = ("data=csv", "data.path=rows.csv", "data.targets=[y]")
PARQUET = ("data=parquet", "data.path=rows.parquet", "data.targets=[y]")


@pytest.mark.parametrize(
    ("before", "now", "remedy"),
    [
        (CSV, (*CSV, "seed=1"), "set data.seed=0, or give other data"),
        (CSV, (*CSV, "data.test=.2", "data.seed=3"), "set data.test=0.1 data.seed=0, or"),
        (CSV, (*CSV, "data.max_rows=50"), "set data.max_rows=null, or"),
        (
            (*CSV, "data.split=time", "data.split_column=day"),
            CSV,
            "set data.split=time data.split_column=day, or",
        ),
        (PARQUET, (*PARQUET, "data.stream=true"), "set data.stream=false, or"),
        (("data=digits", "model=vae"), ("data=digits", "model=vae", "seed=1"), "data.seed=0"),
        (
            ("data=npz", "data.path=a.npz", "data.fold=0"),
            ("data=npz", "data.path=a.npz", "data.fold=1"),
            "data.fold=0",
        ),
    ],
)
def test_another_split_of_the_same_rows_is_refused(before, now, remedy, tmp_path):
    write_run(tmp_path, *before)
    start = f"init_from={tmp_path}"
    check_start(compose_config([*before, start]))
    with pytest.raises(RunError, match=f"another split of the same rows.* {remedy}") as found:
        check_start(compose_config([*now, start]))
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ((), ("seed=1",)),  # a simulator draws rows of its own
        (CSV, (*CSV, "data.path=new.csv", "seed=1")),
        (CSV, (*CSV, "k=5", "data.targets=[z]", "trainer.epochs=3")),
        (
            (*CSV, "data.split=time", "data.split_column=day"),
            (*CSV, "data.split=time", "data.split_column=day", "seed=1"),
        ),
    ],
)
def test_other_rows_or_the_same_split_pass(before, now, tmp_path):
    write_run(tmp_path, *before)
    check_start(compose_config([*now, f"init_from={tmp_path}"]))


def test_a_run_without_a_model_is_refused_and_a_model_alone_passes(tmp_path):
    config = compose_config([f"init_from={tmp_path}", "seed=1"])
    with pytest.raises(RunError, match=r"has no model\.keras: name a run that mdn train wrote"):
        check_start(config)
    (tmp_path / "model.keras").touch()
    check_start(config)
