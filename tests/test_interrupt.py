"""Ctrl-C waits until a batch has ended."""

import os
import signal

import pytest

from mdn.callbacks.interrupt import Interrupt


def press():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(autouse=True)
def handler():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_test_batch_end", "on_epoch_end"])
def test_waits_for_the_end_of_a_batch(hook):
    with Interrupt() as interrupt:
        getattr(interrupt, hook)(0)
        press()
        with pytest.raises(KeyboardInterrupt):
            getattr(interrupt, hook)(0)
        getattr(interrupt, hook)(0)  # once is once
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_second_one_acts_at_once():
    with Interrupt():
        press()
        with pytest.raises(KeyboardInterrupt):
            press()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_one_after_the_last_batch_is_not_lost():
    with pytest.raises(KeyboardInterrupt), Interrupt():
        press()


def test_leaves_the_handlers_of_others_alone():
    pressed = []

    def own(number, frame):
        pressed.append(number)

    signal.signal(signal.SIGINT, own)
    with Interrupt() as interrupt:
        press()
        interrupt.on_train_batch_end(0)
    assert pressed == [signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) is own
