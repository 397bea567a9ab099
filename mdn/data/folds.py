"""Which rows each member of an ensemble learns from, and which it holds out.

Shape letters: N rows, M ensemble members.
"""

from __future__ import annotations

import numpy as np
from omegaconf import DictConfig

from mdn.data.rows import Data, Rows
from mdn.data.splits import draw_folds


def draw_members(config: DictConfig, data: Data) -> tuple[Rows, np.ndarray, np.ndarray]:
    """Return the train rows with the validation rows behind them, and who has which.

    Member 0 of an ensemble has the rows of a single run. Of a random split, the other members hold
    out as many rows, but others. Any other split stays as it is for all.

    Args:
        config: of the run.
        data: in memory.

    Returns:
        The rows [N], and the row numbers [M, ..] that each member learns from and holds out.
    """
    n, kept, members = len(data.train), len(data.validation), config.ensemble
    rows = np.arange(n + kept)
    one_set = data.validation is data.train  # so few that all rows do both
    if config.data.get("split", "random") == "random" and not one_set:
        rest = np.random.default_rng([config.seed, 0x656E73]).permutation(n)
        learned, held_out = draw_folds(np.append(rows[n:], rest), kept, members)
    else:
        learned, held_out = (np.tile(part, [members, 1]) for part in (rows[:n], rows[n:]))
    return data.train.append(data.validation), learned, held_out
