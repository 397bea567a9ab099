"""The optimizer's decay, and what the update of an ensemble clips."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import mdn
from mdn.callbacks.averaging import AveragedWeights
from mdn.callbacks.stopping import EarlyStopping
from mdn.errors import ConfigError
from mdn.optimizers import AdamW
from mdn.updates import clip_members, member_norms


def test_only_kernels_decay():
    weights = {
        name: tf.Variable([1.0, 2.0], name=name)
        for name in ("dense/kernel", "dense/bias", "norm/gamma", "kernel_norm/beta", "kernel")
    }
    optimizer = AdamW(0.1, weight_decay=0.5, decay="kernels")
    optimizer.apply_gradients([(tf.zeros(2), weight) for weight in weights.values()])
    factor = {name: float(weight[0]) for name, weight in weights.items()}
    decayed = {name for name, value in factor.items() if value != 1.0}
    assert decayed == {"dense/kernel", "kernel"}
    assert factor["kernel"] == pytest.approx(1.0 - 0.1 * 0.5)
    assert AdamW.from_config(optimizer.get_config()).decay == "kernels"
    with pytest.raises(ConfigError, match="decay=some"):
        AdamW(decay="some")


def test_each_member_is_clipped_by_its_own_norm():
    rng = np.random.default_rng(0)
    gradients = [rng.normal(size=[3, *shape]) for shape in ((4, 2), (5,), ())]
    for gradient in gradients:
        gradient[1] *= 1e-3  # a member that needs no clipping
    pairs = [(tf.constant(g), tf.Variable(g)) for g in gradients]
    norms = member_norms([gradient for gradient, _ in pairs], 3)
    clipped = [gradient.numpy() for gradient, _ in clip_members(pairs, norms, 0.5)]
    for m in range(3):
        norm = np.sqrt(sum(np.sum(g[m] ** 2) for g in gradients))
        assert norms[m].numpy() == pytest.approx(norm, rel=1e-12)
        for before, after in zip(gradients, clipped, strict=True):
            np.testing.assert_allclose(after[m], before[m] * min(1.0, 0.5 / norm), rtol=1e-6)


def rows():
    rng = np.random.default_rng(1)
    x = rng.normal(size=[96, 2])
    return x, x[:, :1] ** 2 + rng.normal(size=[96, 1])


def make(members, jit_compile, **options):
    model = mdn.MDN(mdn.heads.Mixture(1, 2), mdn.backbones.MLP([4], layer_norm=True))
    model = model if members == 1 else mdn.Ensemble(model, members)
    tf_keras.utils.set_random_seed(0)
    model.adapt(*rows())
    # In Keras's own loop step by step, as to trace a step takes longer.
    how = {"jit_compile": jit_compile, "run_eagerly": not jit_compile}
    model.compile(AdamW(0.02, 0.5, decay="kernels", **options), **how)
    return model


def test_a_clipped_ensemble_learns_what_its_members_would_alone():
    # Both ways of updating, one beside the other, and beside a single model.
    x, y = rows()
    fused, plain = (make(2, jit, global_clipnorm=0.1) for jit in (True, False))
    for model in (fused, plain):
        np.random.seed(2)
        model.fit(x, y, batch_size=96, epochs=3, shuffle=False, verbose=0)
    alone = make(1, False, global_clipnorm=0.1)
    alone.fit(x, y, batch_size=96, epochs=3, shuffle=False, verbose=0)
    for a, b in zip(fused.stacked_weights, plain.stacked_weights, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(
        fused.member(0).log_prob(x, y), alone.log_prob(x, y), rtol=1e-3, atol=1e-4
    )


class Seen(tf_keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        self.weights = self.model.get_weights()


def test_averages_are_those_of_keras_and_are_what_is_validated_and_kept():
    x, y = rows()
    runs = []
    for jit_compile in (True, False):
        model = make(1, jit_compile, use_ema=True, ema_momentum=0.8)
        before, seen = Seen(), Seen()
        callbacks = [before, EarlyStopping(patience=9), AveragedWeights(), seen]
        np.random.seed(3)
        history = model.fit(
            *(x, y), 32, epochs=3, validation_data=(x, y), callbacks=callbacks, verbose=0
        ).history
        runs.append((history, before.weights))
        assert any(
            not np.allclose(a, b) for a, b in zip(before.weights, seen.weights, strict=True)
        )
        best = min(history["val_loss"])
        assert model.evaluate(x, y, verbose=0)[0] == pytest.approx(best, rel=1e-5)
    np.testing.assert_allclose(runs[0][0]["val_loss"], runs[1][0]["val_loss"], rtol=1e-4)
    for a, b in zip(runs[0][1], runs[1][1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
