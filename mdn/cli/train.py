"""`python train.py`: check the config, then train."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from mdn.cli import LAUNCHED
from mdn.cli.failure import INTERRUPTED, fail
from mdn.cli.quiet import import_tensorflow
from mdn.config import check_config, compose_config, config_dir
from mdn.data.files import SUFFIXES, find_files
from mdn.errors import MDNError
from mdn.options import FITTED


def main() -> None:
    """Run the command line; a mistake is one line on stderr and exit code 2."""
    overrides = [word for word in sys.argv[1:] if not word.startswith("-")]
    try:
        if len(overrides) == len(sys.argv) - 1:  # with a flag of Hydra's, Hydra answers itself
            compose_config(overrides)
        hydra.main(str(config_dir()), "config", version_base="1.3")(_job)()
    except MDNError as error:
        fail(error)
    except KeyboardInterrupt:
        fail("interrupted", INTERRUPTED)


def _job(config: DictConfig) -> float | None:
    """Train one run; return its test NLL, for a sweep to minimise."""
    sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    launched = time.monotonic() if sweep else LAUNCHED
    try:
        check_config(config)
        _place(config)
        if (suffixes := SUFFIXES.get(config.data._target_)) is not None:
            find_files(config.data.path, suffixes)  # a wrong path is told before the long import
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
