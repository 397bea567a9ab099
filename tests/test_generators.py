"""Python generators train in the chunks that arrays train in."""

import itertools
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest
import tf_keras

import mdn
from mdn.data import chunks
from mdn.data.chunks import Batches, float_specs
from mdn.data.generators import stack_generator

N, B = 96, 16


def rows():
    rng = np.random.default_rng(0)
    x = rng.normal(size=[N, 2])
    return x, x @ rng.normal(size=[2, 1]) + 0.3 * rng.normal(size=[N, 1])


def batches(*arrays):
    """Yield the batches of one epoch after another."""
    for start in itertools.cycle(range(0, len(arrays[0]), B)):
        yield tuple(a[start : start + B] for a in arrays)


def columns_and_batches():
    """Return columns, y, and a function that yields their batches, one epoch after another."""
    x, y = rows()
    columns = {"a": x[:, 0], "b": np.where(x[:, 1] > 0, "up", "down").astype(object)}

    def source():
        for a, b, targets in batches(*columns.values(), y):
            yield {"a": a, "b": b}, targets

    return columns, y, source


def make(x, y, **options):
    tf_keras.utils.set_random_seed(0)
    model = mdn.MDN(mdn.heads.Mixture(1, 2), mdn.backbones.MLP([8]))
    model.adapt(x, y)
    model.compile(tf_keras.optimizers.Adam(0.02), steps_per_execution=4, **options)
    return model


def convert(element):
    return tuple(np.asarray(a, np.float32) for a in element)


def test_a_generator_trains_as_its_arrays_do(caplog):
    size = 90  # the last batch of an epoch is a smaller one
    x, y = (a[:size] for a in rows())
    weight = np.linspace(0.5, 1.5, size)
    one, two = make(x, y), make(x, y, run_eagerly=True)
    source = batches(x, y, weight)
    one.fit(source, steps_per_epoch=6, epochs=3, verbose=0)
    assert "Keras's own loop" not in caplog.text
    two.fit(x, y, sample_weight=weight, batch_size=B, epochs=3, shuffle=False, verbose=0)
    for a, b in zip(one.get_weights(), two.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    # nothing was read beyond the batches that trained
    np.testing.assert_array_equal(next(source)[0], x[:B])


def test_columns_of_a_generator_are_encoded(caplog):
    columns, y, source = columns_and_batches()
    model = make(columns, y)
    history = model.fit(source(), steps_per_epoch=6, epochs=8, verbose=0).history
    assert history["nll"][-1] < history["nll"][0]
    assert "Keras's own loop" not in caplog.text


def test_columns_of_a_generator_are_encoded_also_where_they_are_judged():
    columns, y, source = columns_and_batches()
    model = make(columns, y)
    history = model.fit(
        *(columns, y), verbose=0, validation_data=source(), validation_steps=N // B
    ).history
    expected = model.evaluate(columns, y, verbose=0, return_dict=True)
    assert history["val_nll"] == [pytest.approx(expected["nll"], rel=1e-5)]
    found = model.evaluate(source(), steps=N // B, verbose=0, return_dict=True)
    assert found == pytest.approx(expected, rel=1e-5)
    model.fit(itertools.islice(source(), 3), verbose=0)  # of unknown length


def test_a_generator_goes_on_after_a_fit_that_stopped_early():
    x, y = rows()

    def slow():
        for element in batches(x, y):
            time.sleep(0.02)
            yield element

    class Stop(tf_keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.stop_training = True

    model, source = make(x, y), slow()
    for _ in range(3):
        model.fit(source, steps_per_epoch=8, epochs=9, callbacks=[Stop()], verbose=0)
    assert len(next(source)) == 2


@pytest.mark.parametrize("chunk", [None, 4])
def test_chunks_hold_the_batches_in_order(chunk):
    x = np.arange(N, dtype=np.float32)[:, None]
    found = stack_generator(batches(x, -x), convert, 6, 2, chunk)
    taken = list(found.unstacked().as_numpy_iterator())
    assert len(taken) == 12
    np.testing.assert_array_equal(np.concatenate([a for a, _ in taken]), np.tile(x, [2, 1]))
    np.testing.assert_array_equal(np.concatenate([b for _, b in taken]), -np.tile(x, [2, 1]))


def test_a_generator_that_ends_early():
    x, y = rows()
    source = itertools.islice(batches(x, y), 5)
    found = list(stack_generator(source, convert, 6, 2, 4))
    assert [steps for _, steps in found] == [4, 1]


def test_what_a_generator_raises_comes_out_as_it_is():
    x, y = rows()

    def source():
        yield from itertools.islice(batches(x, y), 8)
        raise RuntimeError("the tap is dry")

    with pytest.raises(RuntimeError, match=r"^the tap is dry$"):
        make(x, y).fit(source(), steps_per_epoch=6, epochs=3, verbose=0)


@pytest.mark.parametrize("bad", ["wide", "long"])
def test_batches_of_another_shape(bad):
    x, y = rows()
    other = (np.tile(x[:B], [1, 2]), y[:B]) if bad == "wide" else (x[: B + 1], y[: B + 1])
    source = iter([(x[:B], y[:B]), other])
    with pytest.raises(mdn.MDNError, match=r"(after one of \[\[16, 2\], \[16, 1\]\])|2 features"):
        make(x, y).fit(source, steps_per_epoch=2, verbose=0)


def test_no_batch_at_all():
    with pytest.raises(mdn.MDNError, match="gives no batch"):
        make(*rows()).fit(iter([]), steps_per_epoch=2, verbose=0)


@pytest.mark.parametrize(
    "taken",
    ["batches", "batches.unstacked()", "stack(batches.unstacked(), 2, 3, [0.0])"],
    ids=["chunks", "batches", "stacked-again"],
)
def test_an_iterator_that_is_alive_at_the_end_keeps_no_process_waiting(taken):
    script = (
        "import itertools, numpy as np\n"
        "from mdn.data.chunks import Batches, float_specs\n"
        "from mdn.data.pipeline import stack\n"
        "def generate():\n"
        "    for _ in itertools.count():\n"
        "        yield (np.zeros([2, 3, 1], 'f'),), np.int32(2)\n"
        "batches = Batches(generate, float_specs([(2, 3, 1)]), 2)\n"
        f"alive = iter({taken})\n"
        "next(alive)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, capture_output=True)


def test_what_is_read_ahead_goes_before_the_interpreter_does():
    class Source:
        def __iter__(self):
            return self

        def __next__(self):
            return (np.zeros([2, 3, 1], "f"),), np.int32(2)

    sources = [Source()]
    left = weakref.ref(sources[0])
    alive = iter(Batches(sources.pop, float_specs([(2, 3, 1)]), 2))
    next(alive)
    chunks._close_all()
    assert left() is None, alive


class Interrupted(tf_keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        raise KeyboardInterrupt


def test_no_thread_reads_on_after_a_fit_that_was_interrupted():
    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt) as stopped:  # which keeps the frames of `fit` alive
        make(*rows()).fit(*rows(), epochs=99, callbacks=[Interrupted()], verbose=0)
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=10)
        assert not thread.is_alive(), stopped
