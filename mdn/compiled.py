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
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

from mdn.data.chunks import Batches, Chunk, untuned
from mdn.data.generators import stack_generator
from mdn.data.pipeline import evaluation_batches, stack, training_batches
from mdn.errors import ConfigError, DataError
from mdn.updates import FusedAdam, KerasUpdate, State, Update

log = logging.getLogger(__name__)

EVALUATION_BATCH = 4096


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


def check_sizes(**sizes: int | None) -> None:
    """Raise a ConfigError for a size below one; None stands for a default."""
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ConfigError(f"{name}={size}: must be at least 1")


def _length(batches: tf.data.Dataset) -> int | None:
    """Return how many batches there are, counted where the dataset does not know."""
    if int(batches.cardinality()) != tf.data.UNKNOWN_CARDINALITY:
        return None
    return int(batches.reduce(np.int64(0), lambda count, *_: count + 1))


class CompiledModel(tf_keras.Model):
    """A Keras model whose `fit` and `evaluate` run in chunks."""

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

    def as_arrays(
        self, x: Any, y: Any = None, sample_weight: Any = None
    ) -> tuple[np.ndarray, ...]:
        """Return what a user gave to `fit` or `evaluate` as arrays to take batches of.

        Raises:
            DataError: the model cannot learn from them.
        """
        raise NotImplementedError

    def check_arrays(self, x: Any, y: Any, sample_weight: Any) -> None:
        """Raise a DataError for rows that nothing can be learned from."""

    def is_complete(self, arrays: tuple[np.ndarray, ...]) -> bool:
        """Return whether each row has all of its targets, or none."""
        return True

    def encoded(self, batches: tf.data.Dataset) -> tf.data.Dataset:
        """Return a user's batches with features as the compiled steps take them."""
        return batches

    def _check_adapted(self) -> None:
        """Raise a RunError where the model cannot be used yet."""

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

    def fit(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        epochs: int = 1,
        verbose: Any = "auto",
        callbacks: Any = None,
        validation_split: float = 0.0,
        validation_data: Any = None,
        shuffle: bool = True,
        class_weight: Any = None,
        sample_weight: Any = None,
        initial_epoch: int = 0,
        steps_per_epoch: int | None = None,
        validation_steps: int | None = None,
        validation_batch_size: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Train as `tf_keras.Model.fit` does, in chunks of steps that are one XLA program each.

        Where XLA cannot hold a chunk (several replicas, a backbone with `xla = False`, a stream of
        unknown length) Keras's own loop runs, and the log says so.

        Args:
            x: features, images, a `tf.data.Dataset` or a Python generator of batches, or
                `mdn.data.chunks.Batches`.
            y: targets, where x is features.
            batch_size: B, of arrays; default 32.
            epochs: when to stop.
            verbose: as in Keras.
            callbacks: as in Keras.
            validation_split: share of the last rows of arrays to hold out, where there is no
                `validation_data`.
            validation_data: (x, y) or (x, y, weight), or batches.
            shuffle: a new order in each epoch, drawn from NumPy's global stream.
            class_weight: must be None.
            sample_weight: [N], row weights.
            initial_epoch: epochs that lie behind.
            steps_per_epoch: batches that make an epoch of a dataset, by default all of them; or of
                a generator.
            validation_steps: the same of `validation_data`; a dataset that does not know its
                length is counted first, in a pass of its own.
            validation_batch_size: rows of `validation_data` at a time.
            **kwargs: as in Keras.

        Raises:
            RunError: `adapt` was not called.
            DataError: rows that nothing can be learned from.
            ConfigError: an argument that has no meaning here.
        """
        self._check_adapted()
        if class_weight is not None:
            raise ConfigError("class_weight has no meaning for a density: use sample_weight")
        check_sizes(batch_size=batch_size, epochs=epochs)
        batches: Any = x
        split = bool(validation_split) and validation_data is None
        if self._is_arrays(x, y):
            self.check_arrays(x, y, sample_weight)
            arrays = self.as_arrays(x, y, sample_weight)
            if split:
                at = math.floor(len(arrays[0]) * (1.0 - validation_split))
                if not 0 < at < len(arrays[0]):
                    raise ConfigError(f"validation_split={validation_split} leaves no rows")
                validation_data = tuple(array[at:] for array in arrays)
                arrays = tuple(array[:at] for array in arrays)
            batches = training_batches(
                arrays,
                32 if batch_size is None else batch_size,
                # Drawn from NumPy's global stream, which tf_keras.utils.set_random_seed seeds.
                seed=int(np.random.randint(2**31 - 1)) if shuffle else None,
                first_epoch=initial_epoch,
                drop_remainder=False,
                chunk=self._loop.chunk,
                complete=self.is_complete(arrays),
            )
            if steps_per_epoch is not None:
                batches = self._stacked(batches.unstacked(), steps_per_epoch)
        elif split or sample_weight is not None:
            name = "sample_weight" if sample_weight is not None else "validation_split"
            raise ConfigError(f"{name} is for arrays: put it into the batches of the dataset")
        elif isinstance(x, tf.data.Dataset):
            batches = self._stacked(x, steps_per_epoch)
        elif isinstance(x, Iterator):
            batches = self._from_generator(x, steps_per_epoch, epochs - initial_epoch)
        chunk = batches.chunk if isinstance(batches, Batches) else 1
        held_out = validation_data
        if isinstance(held_out, tuple | list):
            held_out = self._evaluation_batches(
                tuple(held_out) if split else self.as_arrays(*held_out),
                validation_batch_size,
                chunk,
            )
        elif isinstance(held_out, tf.data.Dataset):
            if validation_steps is None and isinstance(batches, Batches):
                validation_steps = _length(held_out)
            held_out = self._stacked(held_out, validation_steps, chunk)
        elif isinstance(held_out, Iterator):
            held_out = map(self._converted, held_out)
        if isinstance(self.optimizer, tf_keras.optimizers.Optimizer):
            with self.distribute_strategy.scope():
                self.optimizer.build(self.trainable_variables)
        with self._looping(batches, held_out) as ((x, steps), (held_out, held_out_steps)):
            self._eval_data_handler = None  # of a `fit` that was interrupted, with its rows
            return super().fit(
                x,
                epochs=epochs,
                verbose=verbose,
                callbacks=callbacks,
                validation_data=held_out,
                initial_epoch=initial_epoch,
                steps_per_epoch=steps or steps_per_epoch,
                validation_steps=held_out_steps or validation_steps,
                **kwargs,
            )

    def evaluate(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        verbose: Any = "auto",
        sample_weight: Any = None,
        steps: int | None = None,
        callbacks: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Return the loss and the metrics, as `tf_keras.Model.evaluate` does.

        Args:
            x: as for `fit`.
            y: as for `fit`.
            batch_size: rows at a time; default 4096.
            verbose: as in Keras.
            sample_weight: [N], row weights.
            steps: batches of a dataset to take; by default all of them.
            callbacks: as in Keras.
            **kwargs: as in Keras.

        Raises:
            RunError: `adapt` was not called.
            DataError: there are no rows, or not of the shapes of the model.
            ConfigError: an argument that has no meaning here.
        """
        # With the private argument it is `fit` that asks, on what it was given.
        if not kwargs.get("_use_cached_eval_dataset"):
            self._check_adapted()
            if self._is_arrays(x, y):
                x = self._evaluation_batches(self.as_arrays(x, y, sample_weight), batch_size)
            elif isinstance(x, tf.data.Dataset):
                x = self._stacked(x, steps)
            elif isinstance(x, Iterator):
                x = map(self._converted, x)
            with self._looping(None, x) as (_, (x, found)):
                return super().evaluate(
                    x, verbose=verbose, steps=found or steps, callbacks=callbacks, **kwargs
                )
        return super().evaluate(x, verbose=verbose, steps=steps, callbacks=callbacks, **kwargs)

    def _evaluation_batches(
        self, arrays: tuple[np.ndarray, ...], batch_size: int | None, chunk: int | None = None
    ) -> Batches:
        if not len(arrays[0]):
            raise DataError("there are no rows to evaluate: give at least one")
        check_sizes(batch_size=batch_size)
        return evaluation_batches(
            arrays,
            batch_size or EVALUATION_BATCH,
            chunk=chunk,
            complete=self.is_complete(arrays),
        )

    @staticmethod
    def _is_arrays(x: Any, y: Any) -> bool:
        return y is not None or isinstance(x, np.ndarray | list | tf.Tensor)

    def _stacked(
        self, batches: tf.data.Dataset, steps: int | None, chunk: int | None = None
    ) -> Batches | tf.data.Dataset:
        """Return a user's batches as chunks, or as they are where they cannot be stacked."""
        size = int(batches.cardinality())
        if steps is None and size == tf.data.INFINITE_CARDINALITY:
            raise ConfigError("the dataset is endless: say how many steps_per_epoch")
        encoded = self.encoded(batches)
        if steps is None and size < 0:
            self._explain("the dataset does not know its length: give steps_per_epoch")
            return encoded
        spec = encoded.element_spec
        spec = spec if isinstance(spec, tuple) else (spec,)
        if not all(isinstance(s, tf.TensorSpec) and s.shape.rank for s in spec):
            self._explain("the batches of the dataset are no tensors")
            return encoded
        if not all(s.shape[1:].is_fully_defined() for s in spec):
            self._explain("the batches of the dataset have no fixed shape")
            return encoded
        batch_size = spec[0].shape[0]
        if batch_size is None:  # such as `Dataset.batch` makes them, the last one smaller
            first = next(iter(encoded.take(1)))
            batch_size = len(first[0] if isinstance(first, tuple) else first)
        filler = [0.0] * len(spec)
        filler[min(1, len(spec) - 1)] = math.nan  # see `Batches`
        if steps is None:
            encoded, steps = encoded.repeat(), size
        return stack(encoded, steps, batch_size, filler, chunk or self._loop.chunk)

    def _from_generator(
        self, elements: Iterator[Any], steps: int | None, epochs: int
    ) -> Batches | Iterator[Any]:
        """Return the batches of a Python generator as chunks, where their number is known."""
        if steps is None:
            self._explain("a generator does not know its length: give steps_per_epoch")
            return map(self._converted, elements)
        return stack_generator(elements, self._converted, steps, epochs, self._loop.chunk)

    def _converted(self, element: Any) -> tuple[np.ndarray, ...]:
        """Return a batch of a Python generator as arrays."""
        return self.as_arrays(*tf_keras.utils.unpack_x_y_sample_weight(element))

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
