"""A run directory: opened, resumed or refused, and filled with whole files only."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mdn.errors import ConfigError, RunError

# What a run writes; this, and what is exported of it later, is all that `overwrite=true` removes.
# In this order, so that a kill leaves a finished run, to be replaced, or one without checkpoints.
CONTENTS = (
    "checkpoints",
    "metrics.json",
    "model.keras",
    "plots",
    "provenance.json",
    "recipe.json",
    "saved_model",
    "tensorboard",
    "train.log",
    ".hydra",
)
EXPORTED = ("litert", "onnx")

# Keys that do not change what a run computes.
_INCIDENTAL = ("output_dir", "overwrite")


class RunDirectory:
    """The directory of one run.

    Args:
        config: the checked config; `output_dir` names the directory, or None for a new one. With
            `overwrite` a run that is there is replaced, but for an unfinished one with this
            config that was itself started with `overwrite`: it is resumed.
        overrides: the command line, for `.hydra/overrides.yaml`.

    Raises:
        RunError: the directory holds a finished run, or one with another config, or other files,
            and `overwrite` is not set; or it cannot be written to.
    """

    def __init__(self, config: DictConfig, overrides: list[str] | None = None) -> None:
        self.config = config
        self.overrides = overrides or []
        self.path = Path(config.output_dir or _new_path())
        self.overwrite = bool(config.overwrite)
        self.resumed = self._check()

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def _check(self) -> bool:
        """Return whether an unfinished run with this config is there, to be resumed."""
        start = self.config.init_from
        if start is not None and Path(start).resolve() == self.path.resolve():
            raise RunError(
                f"init_from={start} is the output_dir itself, which would be replaced: "
                "name another"
            )
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"output_dir={self.path} is a file: name a directory")
        parent = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        if not os.access(parent, os.W_OK):
            raise RunError(f"output_dir={self.path} cannot be written: {parent} is read-only")
        if not self.path.exists() or not any(self.path.iterdir()):
            return False
        if not (self / ".hydra" / "config.yaml").is_file():
            raise RunError(f"output_dir={self.path} holds other files: name a new directory")
        finished = (self / "metrics.json").exists()
        if self.overwrite:
            return not finished and self._replaced_another()
        if finished:
            raise RunError(
                f"output_dir={self.path} holds a finished run: set overwrite=true to replace it"
            )
        before = read_config(self.path)
        changed = _differences(_comparable(before), _comparable(self.config))
        if changed:
            raise RunError(
                f"output_dir={self.path} holds a run with another config ({changed}): name a new "
                "directory, or set overwrite=true to replace it"
            )
        return True

    def _replaced_another(self) -> bool:
        """Return whether the run that is there was started by this command, with `overwrite`."""
        try:
            before = read_config(self.path)
        except RunError:
            return False
        same = _comparable(before) == _comparable(self.config)
        return same and bool(before.get("overwrite"))

    def create(self) -> None:
        """Make the directory with `.hydra/`; with `overwrite`, remove what is not resumed.

        Raises:
            RunError: it cannot be written.
        """
        try:
            if self.overwrite and not self.resumed:
                for name in (*EXPORTED, *CONTENTS):
                    _remove(self / name)
            (self / ".hydra").mkdir(parents=True, exist_ok=True)
            OmegaConf.save(self.config, self / ".hydra" / "config.yaml")
            OmegaConf.save(OmegaConf.create(self.overrides), self / ".hydra" / "overrides.yaml")
        except OSError as error:
            raise RunError(
                f"output_dir={self.path} cannot be written ({error.strerror}): name another"
            ) from error

    @contextlib.contextmanager
    def logging(self) -> Iterator[None]:
        """Append what the package logs to `train.log`."""
        handler = _LogFile(self / "train.log")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logger = logging.getLogger("mdn")
        level = logger.level
        logger.setLevel(logging.DEBUG)
        logger.addHandler(handler)
        try:
            yield
        finally:
            logger.setLevel(level)
            logger.removeHandler(handler)
            handler.close()

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file into the directory; see the function `write_json`."""
        write_json(self / name, content)


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Lose the line: where the disk is full, what matters more will say so."""


def place_of_variant(name: str) -> str:
    """Return the folder of a variant of a recipe, in `checkpoints` and `tensorboard`."""
    return name.replace(" ", "-")


def place_of_candidate(k: int) -> str:
    """Return the folder of a candidate with k components, in `checkpoints` and `tensorboard`."""
    return f"k={k}"


def check_run(run: str | os.PathLike[str], needs: Sequence[str] = ()) -> Path:
    """Return the directory of a run.

    Args:
        run: its path.
        needs: files that it must have.

    Raises:
        RunError: it is none.
    """
    path = Path(run)
    if not path.is_dir():
        raise RunError(f"{run} is no run directory: give one that mdn train wrote")
    for name in (".hydra/config.yaml", *needs):
        if not (path / name).is_file():
            raise RunError(f"{run} is no run directory, or not a finished one: it has no {name}")
    return path


def read_config(run: Path) -> DictConfig:
    """Return the config of a run.

    Raises:
        RunError: it cannot be read, or is no mapping.
    """
    path = run / ".hydra" / "config.yaml"
    try:
        config = OmegaConf.load(path)
        OmegaConf.to_container(config, resolve=True)
    except Exception as error:  # parsers of YAML and of interpolations raise a dozen types
        reason = " ".join(str(error).split())
        raise RunError(f"{path} cannot be read ({reason}): name another run") from error
    if not isinstance(config, DictConfig):
        raise RunError(f"{path} cannot be read (it is no mapping): name another run")
    return config


def check_output(path: Path, overwrite: bool) -> None:
    """Check, before any work, that a file can be written at `path`.

    Raises:
        RunError: something is there, or it is no place for a file.
    """
    if path.is_dir():
        raise RunError(f"{path} is a folder: name a file")
    if path.exists() and not overwrite:
        raise RunError(f"{path} exists: name another file, or give --overwrite")
    parent = path.resolve().parent
    if not parent.is_dir():
        raise RunError(f"{path}: there is no folder {path.parent}")
    if not os.access(parent, os.W_OK):
        raise RunError(f"{path} cannot be written: {path.parent} is read-only; name another")


def check_answer(path: Path, overwrite: bool) -> None:
    """Check, before any work, that a Parquet file can be written at `path`.

    Raises:
        ConfigError: its name has another ending.
        RunError: as of `check_output`.
    """
    if path.suffix != ".parquet":
        raise ConfigError(f"{path}: the answer is a Parquet file; end its name in .parquet")
    check_output(path, overwrite)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all.

    Raises:
        RunError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", "utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise RunError(f"cannot write {path}: {error.strerror}") from error


def read_fingerprint(run: Path) -> str | None:
    """Return the SHA-256 of the rows of a finished run, or None where it is unknown."""
    try:
        found = json.loads((run / "provenance.json").read_text("utf-8"))["data_sha256"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return found if isinstance(found, str) else None


def provenance(config: DictConfig, fingerprint: str) -> dict[str, Any]:
    """Return what it takes to make a run again: versions, seed, data hash, command, revision."""
    packages = ("mdn", "numpy", "tensorflow", "tensorflow-probability", "tf-keras", "hydra-core")
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "seed": int(config.seed),
        "data_sha256": fingerprint,
        "git_revision": _git_revision(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _git_revision() -> str | None:
    """Return the revision of the checkout that the package is in, with + if it was changed."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        tracked = subprocess.run(
            [*git, "ls-files", "--error-unmatch", __file__], capture_output=True
        )
        if head.returncode or tracked.returncode:
            return None
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True)
    except OSError:
        return None
    return head.stdout.strip() + ("+" if changed.returncode else "")


def _new_path() -> Path:
    now = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")
    return Path("runs") / now


def _comparable(config: Any) -> dict[str, Any]:
    flat: dict[str, Any] = {}

    def walk(node: Any, prefix: str) -> None:
        if isinstance(node, dict):
            for name, value in node.items():
                walk(value, f"{prefix}.{name}" if prefix else str(name))
        else:
            flat[prefix] = node

    values = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict)
    walk({k: v for k, v in values.items() if k not in _INCIDENTAL}, "")
    return flat


def _differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    keys = [k for k in sorted({*before, *now}) if before.get(k) != now.get(k)]
    shown = [f"{k} was {before.get(k)} and is {now.get(k)}" for k in keys[:3]]
    return ", ".join(shown) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
