"""`python train.py`: check the config, then train."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ValueType
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig

from mdn.cli import LAUNCHED
from mdn.cli.failure import INTERRUPTED, fail
from mdn.cli.quiet import import_tensorflow
from mdn.config import check_config, compose_config, config_dir
from mdn.data.files import SUFFIXES, find_files
from mdn.errors import ConfigError, MDNError
from mdn.options import FITTED
from mdn.runs import RunDirectory
from mdn.warm_start import check_start

_LISTED = (ValueType.CHOICE_SWEEP, ValueType.SIMPLE_CHOICE_SWEEP, ValueType.RANGE_SWEEP)


def main() -> None:
    """Run the command line; a mistake is one line on stderr and exit code 2."""
    try:
        _check_words(sys.argv[1:])
        hydra.main(str(config_dir()), "config", version_base="1.3")(_job)()
    except MDNError as error:
        fail(error)
    except KeyboardInterrupt:
        fail("interrupted", INTERRUPTED)


def _check_words(words: Sequence[str]) -> None:
    """Answer for mistakes in one line, before Hydra does in many.

    Raises:
        ConfigError: Hydra knows no such flag, or a config that it would make is wrong.
    """
    parser = get_args_parser()  # which `hydra.main` parses with
    parser.error = _refuse  # type: ignore[method-assign]
    found = parser.parse_args(words)
    if found.experimental_rerun is not None:
        raise ConfigError(
            "--experimental-rerun loads a pickle, which may run code: to go on with a run, give "
            "its output_dir"
        )
    if found.config_dir or found.config_path or found.config_name:
        return  # it is not of this package's YAML files alone
    if found.multirun:
        compose_config(_first_job(found.overrides))
    elif found.cfg or not any(word.startswith("-") for word in words):
        compose_config(found.overrides)


def _refuse(message: str) -> NoReturn:
    raise ConfigError(f"{message}; see mdn train --help")


def _first_job(overrides: Sequence[str]) -> list[str]:
    """Return the overrides of a sweep's first job; without those that Hydra's sweepers choose."""
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException:
        return list(overrides)  # of which the composition says what is wrong
    found = []
    for word, override in zip(overrides, parsed, strict=True):
        if override.is_hydra_override():
            continue
        if override.value_type in _LISTED:
            first = next(override.sweep_string_iterator(), "")
            word = f"{override.get_key_element()}={first}"
        elif override.is_sweep_override():
            continue
        found.append(word)
    return found


def _job(config: DictConfig) -> float | None:
    """Train one run; return its test NLL, for a sweep to minimise."""
    sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    launched = time.monotonic() if sweep else LAUNCHED
    try:
        check_config(config)
        _place(config)
        # What is wrong with a path is told before the long import.
        RunDirectory(config)
        check_start(config)
        if (suffixes := SUFFIXES.get(config.data._target_)) is not None:
            find_files(config.data.path, suffixes)
        import_tensorflow()
        from mdn.estimation import estimate
        from mdn.training import InterruptedRunError, train

        logger = logging.getLogger("mdn")
        logger.setLevel(logging.INFO)
        logger.propagate = False
        if not logger.handlers:  # a sweep comes here once for each of its runs
            console = logging.StreamHandler(sys.stdout)
            console.setLevel(logging.INFO)
            logger.addHandler(console)
        overrides = list(HydraConfig.get().overrides.task)
        try:
            if config.model._target_ == FITTED:
                metrics = estimate(config, overrides)
            else:
                metrics = train(config, overrides, launched)
            return metrics.get("test/nll")
        except InterruptedRunError as error:
            fail(error, INTERRUPTED)
    except MDNError as error:
        fail(error)


def _place(config: DictConfig) -> None:
    """Give each run of a sweep a directory of its own."""
    hydra_config = HydraConfig.get()
    if hydra_config.mode == RunMode.MULTIRUN:
        if config.output_dir is None:
            config.output_dir = hydra_config.runtime.output_dir
        else:
            config.output_dir = str(Path(config.output_dir) / str(hydra_config.job.num))
