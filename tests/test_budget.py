"""How much training `auto` stands for, and where an epoch begins that is no pass."""

import itertools
import types

import numpy as np
import pytest

from mdn.budget import batch_size, epoch_steps, member_rows, settle, train_steps, weight_decay
from mdn.config import compose_config
from mdn.data.pipeline import epoch_rows, training_batches
from mdn.data.rows import Data, Rows
from mdn.errors import DataError


@pytest.mark.parametrize(
    ("rows", "batch", "steps"),
    [
        (100, 32, 2500),
        (927, 64, 2500),
        (1439, 64, 2500),
        (8611, 256, 2500),
        (41157, 256, 60 * 41157 // 256),
        (60_000, 256, 12_000),
        (100_000, 512, 60 * 100_000 // 512),
        (10**7, 1024, 12_000),
    ],
)
def test_budget_by_the_rows(rows, batch, steps):
    assert batch_size(rows) == batch
    assert train_steps(rows, batch) == steps
    assert train_steps(20_000, 256) == 60 * 20_000 // 256


def data(train, validation):
    def rows(n):
        return Rows(np.zeros([n, 1]), np.zeros([n, 1]))

    return Data(rows(train), rows(validation), rows(5), ("x",), ("y",))


def test_decay_by_the_rows():
    assert weight_decay(10) == weight_decay(10_000) == 0.3
    assert weight_decay(10**6) == pytest.approx(0.003)  # worth as many rows as before


def test_settled_config_has_numbers():
    config = compose_config(["experiment=tabular", "data=npz", "optimizer.weight_decay=auto"])
    assert settle(config, data(20_000, 5000)).optimizer.weight_decay == weight_decay(20_000)
    settled = settle(config, data(834, 93))
    assert settled.trainer.batch_size == 64
    assert settled.trainer.steps == 2500
    assert config.trainer.steps == "auto"  # the config of the run stays
    assert member_rows(settled, data(834, 93)) == 927 - 927 // 5
    assert epoch_steps(settled, data(834, 93)) == 50
    few = settle(config, data(20, 4))
    assert few.trainer.batch_size == 24 - 24 // 5  # no more than a member has
    with pytest.raises(DataError, match="folds=5: 4 train and validation rows cannot"):
        settle(config, data(3, 1))
    plain = compose_config(["data=npz", "trainer.batch_size=10"])
    assert epoch_steps(settle(plain, data(834, 93)), data(834, 93)) == 83


@pytest.mark.parametrize("steps", [2, 3, 7, 20])
def test_epochs_cut_an_endless_stream_of_passes(steps):
    n, size = 23, 5  # four batches a pass
    x = np.arange(n, dtype=np.float32)[:, None]

    def taken(first, count):
        batches = training_batches((x, x), size, seed=1, first_epoch=first, steps=steps)
        assert batches.steps == steps
        some = itertools.islice(batches.unstacked().as_numpy_iterator(), count * steps)
        return np.stack([a[:, 0] for a, _ in some])

    passes = [epoch_rows(n, 1, e).numpy()[:20].reshape(4, 5) for e in range(11)]
    np.testing.assert_array_equal(taken(0, 2), np.concatenate(passes)[: 2 * steps])
    np.testing.assert_array_equal(taken(1, 1), taken(0, 2)[steps:])


def test_members_have_passes_of_their_own_rows():
    x = np.arange(12.0)[:, None]
    rows = np.array([[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]])
    batches = training_batches((x, x), 3, seed=0, members=rows, steps=3)
    (seen, _), _ = next(iter(batches))
    assert seen.shape == [3, 2, 3, 1]
    for m in range(2):
        assert set(seen[:2, m].numpy().ravel()) == set(rows[m])  # a pass


def test_folds_part_the_rows():
    from mdn.preparation import make_batches

    options = ["data=npz", "ensemble=5", "folds=5", "trainer.batch_size=8"]
    model = types.SimpleNamespace(
        arrays=lambda rows: (rows.x, rows.y), is_complete=lambda arrays: True
    )
    x = np.arange(45.0)[:, None]
    parts = [Rows(part, part) for part in np.split(x, [36, 40])]
    _, held_out = make_batches(model, compose_config(options), Data(*parts, ("x",), ("y",)), 0)
    (kept, _), _ = next(iter(held_out))  # [1, M, 8, 1]
    assert sorted(np.ravel(kept)) == list(range(40))
