"""Checkpoints: whole or absent, damage detected, callbacks' state kept."""

import os

import numpy as np
import pytest
import tf_keras

import mdn
from mdn.callbacks.checkpoint import Checkpoint
from mdn.callbacks.guard import NanGuard
from mdn.callbacks.stopping import EarlyStopping, ReduceLROnPlateau
from mdn.data.pipeline import evaluation_batches, training_batches
from mdn.data.rows import Rows

EPOCHS = 6


def rows():
    rng = np.random.default_rng(0)
    x = rng.normal(size=[96, 2])
    return x, x @ rng.normal(size=[2, 1]) + 0.3 * rng.normal(size=[96, 1])


def make():
    tf_keras.utils.set_random_seed(0)
    model = mdn.MDN(mdn.heads.Mixture(1, 2), mdn.backbones.MLP([8], dropout=0.2))
    model.adapt(*rows())
    # To trace a step takes longer than all of these.
    model.compile(tf_keras.optimizers.Adam(0.02), run_eagerly=True)
    return model


def train(model, directory, epochs=EPOCHS, keep=2, first_epoch=0, checkpoint=None):
    """Train as `mdn.training.fit` does, to `epochs` in all."""
    checkpoint = checkpoint or Checkpoint(directory, keep)
    others = [EarlyStopping(patience=50), ReduceLROnPlateau(patience=1, factor=0.7)]
    checkpoint.watch(others)
    x, y = rows()
    model.fit(
        training_batches((x, y), 16, seed=0, first_epoch=first_epoch, complete=True),
        epochs=epochs,
        initial_epoch=first_epoch,
        steps_per_epoch=6,
        validation_data=evaluation_batches((x[:20], y[:20]), 20, complete=True),
        callbacks=[*others, checkpoint],
        verbose=0,
    )
    return checkpoint


# On one worker, which makes the fixture once.
one_worker = pytest.mark.xdist_group("checkpoint")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoints")
    model = make()
    checkpoint = train(model, directory)
    return model, checkpoint, directory


def resume(directory, epochs=EPOCHS):
    model = make()
    checkpoint = Checkpoint(directory)
    first_epoch = checkpoint.restore(model)
    train(model, directory, epochs, first_epoch=first_epoch, checkpoint=checkpoint)
    return model, checkpoint


def assert_same_weights(one, two):
    for a, b in zip(one.get_weights(), two.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@one_worker
@pytest.mark.parametrize("stop", [1, 4])
def test_resumed_run_equals_the_uninterrupted_one(uninterrupted, stop, tmp_path):
    model, checkpoint, _ = uninterrupted
    train(make(), tmp_path, epochs=stop)
    resumed, progress = resume(tmp_path)
    assert_same_weights(model, resumed)
    assert progress.progress.history == checkpoint.progress.history
    assert progress.progress.callbacks == checkpoint.progress.callbacks
    for a, b in zip(model.optimizer.variables, resumed.optimizer.variables, strict=True):
        np.testing.assert_array_equal(a, b)


@one_worker
def test_only_the_newest_are_kept_and_nothing_partial(uninterrupted):
    _, _, directory = uninterrupted
    assert sorted(p.name for p in directory.iterdir()) == ["epoch-00005.npz", "epoch-00006.npz"]


@one_worker
@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "text"])
def test_damaged_checkpoint_gives_way_to_the_one_before(uninterrupted, damage, tmp_path, caplog):
    model, _, directory = uninterrupted
    for path in directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    newest = tmp_path / "epoch-00006.npz"
    content = bytearray(newest.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 0xFF
    newest.write_bytes(
        {"truncate": content[: len(content) // 2], "empty": b"", "text": b"no archive"}.get(
            damage, bytes(content)
        )
    )
    resumed, checkpoint = resume(tmp_path)
    assert checkpoint.progress.epoch == EPOCHS
    assert_same_weights(model, resumed)
    assert "epoch-00006.npz is damaged" in caplog.text


def test_nothing_but_damage_is_an_error(tmp_path):
    (tmp_path / "epoch-00001.npz").write_bytes(b"")
    with pytest.raises(mdn.MDNError, match=r"no checkpoint in .* can be read.*another output_dir"):
        Checkpoint(tmp_path).restore(make())


@one_worker
def test_checkpoint_of_another_model_is_refused(uninterrupted, tmp_path):
    _, _, directory = uninterrupted
    other = mdn.MDN(mdn.heads.Mixture(1, 3), mdn.backbones.MLP([8]))
    other.adapt(*rows())
    other.compile()
    with pytest.raises(mdn.MDNError, match="can be read"):
        Checkpoint(directory).restore(other)


def test_no_checkpoint_is_a_fresh_start(tmp_path):
    assert Checkpoint(tmp_path / "none").restore(make()) == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk_is_one_line_and_leaves_nothing_partial(tmp_path):
    checkpoint = Checkpoint(tmp_path)
    (tmp_path / "epoch-00001.partial").symlink_to("/dev/full")
    with pytest.raises(mdn.MDNError, match="No space left on device"):
        train(make(), tmp_path, epochs=1, checkpoint=checkpoint)
    assert list(tmp_path.iterdir()) == []


def test_best_weights_come_back_at_the_end():
    class Spoil(tf_keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                self.best = self.model.get_weights()
            if epoch > 0:
                self.model.head.bias.assign(self.model.head.bias + 5.0)

    model, spoil = make(), Spoil()
    x, y = rows()
    model.fit(
        x, y, epochs=3, validation_data=(x, y), callbacks=[EarlyStopping(), spoil], verbose=0
    )
    for a, b in zip(model.get_weights(), spoil.best, strict=True):
        np.testing.assert_array_equal(a, b)


def test_nan_guard_names_the_row():
    model = make()
    x, y = rows()
    y[17] = 1e30
    guard = NanGuard(Rows(x, y), ["a", "b"], ["price"])
    model.compile(tf_keras.optimizers.SGD(1e6), run_eagerly=True)
    before = [w for w in model.get_weights() if w.dtype == np.float32]
    with pytest.raises(
        mdn.MDNError, match=r"became (nan|inf) in epoch 1; .*row 17 .*price=1e\+30"
    ):
        model.fit(
            training_batches((x, y), 16, seed=0),
            steps_per_epoch=6,
            callbacks=[guard],
            verbose=0,
        )
    after = [w for w in model.get_weights() if w.dtype == np.float32]
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)


def test_other_rows_are_never_resumed(tmp_path):
    train(make(), tmp_path, epochs=1, checkpoint=Checkpoint(tmp_path, data="one"))
    with pytest.raises(mdn.MDNError, match=r"the data have changed since.*another output_dir"):
        Checkpoint(tmp_path, data="two").restore(make())


@one_worker
def test_no_flipped_byte_of_a_checkpoint_goes_unnoticed_or_unnamed(uninterrupted, tmp_path):
    _, _, directory = uninterrupted
    content = (directory / "epoch-00006.npz").read_bytes()
    model, path = make(), tmp_path / "epoch-00001.npz"
    whole = Checkpoint(directory)
    whole.restore(model)
    expected = model.get_weights()
    # the archive's own directory stands at the end
    places = np.random.default_rng(0).integers(len(content) - 3_000, len(content), size=60)
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 0xFF
        path.write_bytes(bytes(damaged))
        try:
            Checkpoint(tmp_path).restore(model)
        except mdn.MDNError as error:
            assert "can be read" in str(error)  # noqa: PT017
        for a, b in zip(model.get_weights(), expected, strict=True):
            np.testing.assert_array_equal(a, b)
