"""The loop: a chunk of train or test steps as one XLA program, called from Keras's `fit`.

Keras calls its train function once for `steps_per_execution` steps, and that is where this
function stands: it takes one stacked chunk and goes through its batches inside of XLA. There is no
Python, and no dispatch of operations, between two steps.

Shape letters: B batch, S steps of a chunk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import tensorflow as tf
import tf_keras

from mdn.data.chunks import Batches, Chunk, untuned
from mdn.errors import ConfigError
from mdn.updates import FusedAdam, KerasUpdate, State, Update

log = logging.getLogger(__name__)


def chunk_function(
    step: Callable[[Any, State], State],
    start: Callable[[], State],
    finish: Callable[[State], None],
    results: Callable[[], dict[str, tf.Tensor]],
    counter: tf.Variable,
    totals: Sequence[tf.Variable],
) -> Callable[[Chunk, bool], dict[str, tf.Tensor]]:
    """Return a function of a chunk of `mdn.data.chunks.Batches`.

    Args:
        step: of (batch, state): what to do with a batch, and the new state.
        start: the state at the start of a chunk.
        finish: takes the state at the end of a chunk.
        results: the metrics at the end of a chunk.
        counter: counts the steps.
        totals: the sums behind the metrics.

    Returns:
        Of (chunk, whether the totals start at zero): the metrics after the chunk.
    """

    @tf.function(jit_compile=True, autograph=False, reduce_retracing=True)
    def run(batches: Any, steps: tf.Tensor, afresh: tf.Tensor) -> dict[str, tf.Tensor]:
        for total in totals:  # here, as an assignment in Python takes longer than ten steps
            total.assign(tf.where(afresh, tf.zeros_like(total), total))

        def body(i: tf.Tensor, *state: tf.Tensor) -> list[tf.Tensor]:
            batch = tf.nest.map_structure(lambda t: t[i], batches)
            return [i + 1, *step(batch, list(state))]

        loop = [tf.constant(0), *start()]
        finish(tf.while_loop(lambda i, *state: i < steps, body, loop)[1:])
        return results()

    def take(chunk: Chunk, afresh: bool) -> dict[str, tf.Tensor]:
        batches, steps = chunk
        counter.assign_add(int(steps))
        return run(batches, steps, tf.constant(afresh))

    return take


@functools.cache
def _ticks() -> tf.data.Dataset:
    """Return an endless dataset of nothing, for Keras to count steps by: it is made once.

    What `fit` is given instead of the chunks. To make a dataset of them, and an iterator of that,
    takes as long as a thousand steps of a small network.
    """
    return untuned(tf.data.Dataset.from_tensors([0]).repeat())


@dataclasses.dataclass
class _Loop:
    """How `fit` and `evaluate` run just now.

    Attributes:
        chunk: steps of a chunk as the user compiled it, or None.
        functions: the programs so far: ("train" or "test", complete, ranks of the tensors, which
            an ensemble takes in two ways) -> a function of a chunk; and Keras's own: ("train" or
            "test", complete, whether of one step).
        batches: "train" and "test": what runs in chunks.
        mixed: Keras's own loop runs beside the chunks, on what does not.
        complete: "train" and "test": whether no row lacks some of its targets.
        taken: the chunks of "train", one after the other.
        afresh: the metrics start at zero with the next chunk.
        last: the metrics after the last chunk.
        explained: why Keras's own loop runs, as the log has it already.
    """

    chunk: int | None = None
    functions: dict[tuple, Callable] = dataclasses.field(default_factory=dict)
    batches: dict[str, Batches] = dataclasses.field(default_factory=dict)
    mixed: bool = False
    complete: dict[str, bool] = dataclasses.field(default_factory=dict)
    taken: Iterator[Chunk] | None = None
    afresh: bool = False
    last: dict[str, tf.Tensor] | None = None
    explained: str = ""


class CompiledModel(tf_keras.Model):
    """A Keras model whose `fit` and `evaluate` run in chunks, where they are given `Batches`."""

    train_function: Any
    test_function: Any

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._loop = _Loop()

    # ------------------------------------------------------------------ what a model says

    @property
    def xla(self) -> bool:
        """Whether a train step can be compiled once and for all."""
        return True

    @property
    def stacked(self) -> int:
        """How many networks learn at once, each of its own gradient."""
        return 1

    def learn(self, data: Any, update: Update, state: State) -> State:
        """Take a train step with a batch; return the new state of `update`."""
        raise NotImplementedError

    def results(self, training: bool) -> dict[str, Any]:
        """Return the metrics so far, the loss first."""
        raise NotImplementedError

    def totals(self) -> list[tf.Variable]:
        """Return the sums behind the metrics, which an epoch starts at zero."""
        raise NotImplementedError

    # ------------------------------------------------------------------ Keras

    def compile(
        self,
        optimizer: Any = "adam",
        loss: Any = None,
        *,
        jit_compile: bool | None = None,
        steps_per_execution: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Configure training as in Keras.

        Args:
            optimizer: a Keras optimizer or its name.
            loss: what the model minimises, where there is a choice.
            jit_compile: train in XLA; by default where that works: on one device, with a backbone
                that does not say otherwise (`xla = False`).
            steps_per_execution: train steps between two visits of Python, and of the callbacks
                that act on batches; by default up to 500.
            **kwargs: as for `tf_keras.Model.compile`.

        Raises:
            ConfigError: `steps_per_execution` is below one.
        """
        if jit_compile is None:
            one_device = self.distribute_strategy.num_replicas_in_sync == 1
            jit_compile = one_device and self.xla and not kwargs.get("run_eagerly")
        if steps_per_execution == "auto":  # as Keras calls what is the default here
            steps_per_execution = None
        if steps_per_execution is not None and steps_per_execution < 1:
            raise ConfigError(f"steps_per_execution={steps_per_execution}: must be at least 1")
        self._loop.chunk = steps_per_execution
        self._loop.functions = {}
        super().compile(optimizer=optimizer, loss=loss, jit_compile=jit_compile, **kwargs)

    @contextlib.contextmanager
    def _looping(self, train: Any, test: Any) -> Iterator[list[tuple[Any, int | None]]]:
        """Prepare Keras for chunks; yield for each of train and test the dataset and its steps."""
        in_chunks = bool(self._jit_compile) and not self.run_eagerly
        if self.distribute_strategy.num_replicas_in_sync > 1:
            self._explain("several replicas")
        elif not in_chunks and not self.xla:
            self._explain(f"{type(self).__name__}'s backbone says xla = False")
        # A callback of `fit` may ask for an `evaluate` of its own, after which `fit` goes on.
        outer, outer_steps = self._loop, self._steps_per_execution.numpy().item()
        self._loop = loop = _Loop(outer.chunk, outer.functions)
        given: list[tuple[Any, int | None]] = []
        for which, batches in (("train", train), ("test", test)):
            mine = isinstance(batches, Batches)
            loop.complete[which] = mine and batches.complete
            if not mine:
                loop.mixed = loop.mixed or batches is not None
                given.append((batches, None))
            elif in_chunks:
                loop.batches[which] = batches
                given.append((_ticks(), batches.steps))
            else:
                given.append((batches.unstacked(), batches.steps))
        chunked = [batches for batches in (train, test) if isinstance(batches, Batches)]
        spe = chunked[0].chunk if chunked else 1
        if any(batches.chunk != min(spe, batches.steps) for batches in chunked[1:]):
            raise ConfigError(
                f"validation_data has chunks of {chunked[1].chunk} batches, and what trains of "
                f"{spe}: make it with chunk={spe}"
            )
        # Keras keeps its functions for batches of any rows, and for so many steps as it had first.
        functions = self.train_function, self.test_function
        own = [(which, complete, spe == 1) for which, complete in loop.complete.items()]
        self.train_function, self.test_function = (
            None if in_chunks else loop.functions.get(key) for key in own
        )
        self._steps_per_execution.assign(spe)
        try:
            yield given
        except tf.errors.OpError:
            if failures := getattr(train, "failures", None):
                raise failures[0] from None  # what Python raised says more
            raise
        finally:
            if not in_chunks:
                made = zip(own, (self.train_function, self.test_function), strict=True)
                loop.functions |= {key: function for key, function in made if function}
            self.train_function, self.test_function = functions
            if isinstance(loop.taken, Generator):
                loop.taken.close()  # and the thread that reads ahead
            self._loop = outer
            self._steps_per_execution.assign(outer_steps)

    def _explain(self, reason: str) -> None:
        if self._loop.explained != reason:
            self._loop.explained = reason
            log.info("training in Keras's own loop: %s", reason)

    def make_train_function(self, force: bool = False) -> Callable:
        if "train" not in self._loop.batches:
            return self._own_loop("train_function", super().make_train_function, force)
        if FusedAdam.supports(self.optimizer, self.trainable_variables):
            update: Update = FusedAdam(self.optimizer, self.trainable_variables, self.stacked)
        else:
            update = KerasUpdate(self.optimizer, self.stacked)
        return self._chunk_function("train", self.learn, update, self._train_counter)

    def make_test_function(self, force: bool = False) -> Callable:
        if "test" not in self._loop.batches:
            return self._own_loop("test_function", super().make_test_function, force)

        def test(data: Any, update: Update, state: State) -> State:
            self.test_step(data)
            return state

        return self._chunk_function("test", test, None, self._test_counter)

    def _own_loop(self, name: str, make: Callable[[bool], Callable], force: bool) -> Callable:
        """Return the function of that name, as Keras makes it for its own loop.

        One of several steps Keras leaves to autograph, which traces a step twice.
        """
        made, count = getattr(self, name), self._steps_per_execution
        steps = count.numpy().item()
        plain = steps == 1 or self.run_eagerly or self._cluster_coordinator
        if plain or (made is not None and not force):
            return make(force)
        count.assign(1)
        try:
            step = make(True)
        finally:
            count.assign(steps)

        @tf.function(autograph=False, reduce_retracing=True)
        def several(iterator: Iterator) -> dict[str, tf.Tensor]:
            state = tf.constant(1, count.dtype), step(iterator)
            return tf.while_loop(
                lambda i, _: i < count, lambda i, _: (i + 1, step(iterator)), state
            )[1]

        setattr(self, name, several)
        return several

    def _chunk_function(
        self, which: str, step: Callable, update: Update | None, counter: tf.Variable
    ) -> Callable:
        loop = self._loop
        batches = loop.batches[which]
        key = which, batches.complete, tuple(tensor.shape.rank for tensor in batches.spec)
        if key not in loop.functions:
            loop.functions[key] = chunk_function(
                lambda batch, state: step(batch, update, state),
                lambda: [] if update is None else update.start(),
                lambda state: None if update is None else update.finish(state),
                lambda: self.results(which == "train"),
                counter,
                self.totals(),
            )
        function = loop.functions[key]
        chunks = iter(batches)
        if which == "train":  # which goes on where Keras asks for its function anew
            loop.taken = chunks = loop.taken or chunks

        def run(_: Iterator) -> dict[str, tf.Tensor]:
            loop.last = function(next(chunks), loop.afresh)
            loop.afresh = False
            return loop.last

        return run

    def reset_metrics(self) -> None:
        loop = self._loop
        loop.afresh, loop.last = bool(loop.batches), None
        if not loop.batches or loop.mixed:
            super().reset_metrics()
            return
        for metric in super().metrics:  # the others start at zero in the program
            metric.reset_state()

    def get_metrics_result(self) -> dict[str, Any]:
        # What the last chunk returned: to compute it once more takes longer than ten steps.
        if self._loop.last is not None and tf.executing_eagerly():
            return self._loop.last
        return super().get_metrics_result()
