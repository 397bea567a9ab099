"""Where training runs: one function for each `strategy=`, each a `tf.distribute` strategy."""

from __future__ import annotations

import faulthandler
import json
import os

import tensorflow as tf

from mdn.errors import RunError


def auto() -> tf.distribute.Strategy:
    """Return a mirrored strategy where there are several GPUs, else the default one."""
    if len(tf.config.list_physical_devices("GPU")) > 1:
        return tf.distribute.MirroredStrategy()
    return tf.distribute.get_strategy()


def cpu() -> tf.distribute.Strategy:
    """Return the default strategy, with the GPUs hidden."""
    _configure(lambda: tf.config.set_visible_devices([], "GPU"), "strategy=cpu")
    return tf.distribute.get_strategy()


def gpu(index: int = 0) -> tf.distribute.Strategy:
    """Return the default strategy on one GPU.

    Args:
        index: which of the GPUs, from 0.

    Raises:
        RunError: there is no such GPU.
    """
    gpus = _gpus("strategy=gpu", index + 1)
    _configure(lambda: tf.config.set_visible_devices([gpus[index]], "GPU"), "strategy=gpu")
    return tf.distribute.get_strategy()


def mirrored(
    devices: int | None = None, logical_cpus: int | None = None
) -> tf.distribute.MirroredStrategy:
    """Return a strategy that copies the model to several devices of this machine.

    Args:
        devices: how many GPUs; all of them by default.
        logical_cpus: use this many logical CPU devices instead, to try it without GPUs.

    Raises:
        RunError: there are fewer devices.
    """
    if logical_cpus is not None:
        return tf.distribute.MirroredStrategy(_logical_cpus(logical_cpus))
    wanted = devices or max(2, len(tf.config.list_physical_devices("GPU")))
    _gpus("strategy=mirrored", wanted)
    return tf.distribute.MirroredStrategy([f"GPU:{i}" for i in range(wanted)])


def multi_worker(timeout: int = 300) -> tf.distribute.MultiWorkerMirroredStrategy:
    """Return a strategy over the workers that the environment variable TF_CONFIG lists.

    Args:
        timeout: seconds to wait for the other workers; then the process ends, as TensorFlow would
            wait for ever.

    Raises:
        RunError: TF_CONFIG is not set, or does not say which worker this is.
    """
    try:
        config = json.loads(os.environ["TF_CONFIG"])
        workers, index = config["cluster"]["worker"], int(config["task"]["index"])
        if not 0 <= index < len(workers):
            raise IndexError(f"index {index} of {len(workers)} workers")
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise RunError(
            f"strategy=multi_worker cannot use TF_CONFIG ({error!r}): set it to "
            '{"cluster": {"worker": ["host:port", ..]}, "task": {"type": "worker", "index": 0}}'
        ) from error
    print(f"waiting up to {timeout} s for {len(workers)} workers", flush=True)
    faulthandler.dump_traceback_later(timeout, exit=True)
    try:
        return tf.distribute.MultiWorkerMirroredStrategy()
    finally:
        faulthandler.cancel_dump_traceback_later()


def tpu(tpu: str = "local") -> tf.distribute.TPUStrategy:
    """Return a strategy over the cores of a TPU.

    Args:
        tpu: its name or address; "local" on a TPU machine.

    Raises:
        RunError: there is no such TPU.
    """
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=tpu)
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
        return tf.distribute.TPUStrategy(resolver)
    except (ValueError, RuntimeError, tf.errors.OpError) as error:
        raise RunError(
            f"strategy=tpu finds no TPU called {tpu!r} ({_first_line(error)}): "
            "set strategy.tpu to its name or address, or use strategy=auto"
        ) from error


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Return whether this process is the one that writes: all are, but for further workers."""
    resolver = strategy.cluster_resolver
    return resolver is None or not resolver.task_type or (resolver.task_id or 0) == 0


def _gpus(asked: str, count: int) -> list[tf.config.PhysicalDevice]:
    gpus = tf.config.list_physical_devices("GPU")
    if len(gpus) < count:
        raise RunError(
            f"{asked} needs {count} GPU{'s' * (count > 1)} and TensorFlow sees {len(gpus)}: "
            "install 'mdn[cuda]' and check nvidia-smi, or use strategy=auto"
        )
    return gpus


def _logical_cpus(count: int) -> list[str]:
    physical = tf.config.list_physical_devices("CPU")[0]
    present = tf.config.get_logical_device_configuration(physical)
    if len(present or []) < count:
        split = [tf.config.LogicalDeviceConfiguration() for _ in range(count)]
        _configure(
            lambda: tf.config.set_logical_device_configuration(physical, split),
            f"strategy.logical_cpus={count}",
        )
    return [f"CPU:{i}" for i in range(count)]


def _configure(change, asked: str) -> None:
    try:
        change()
    except RuntimeError as error:
        raise RunError(
            f"{asked}: TensorFlow has already started its devices: choose the strategy before "
            "anything else runs, in a process of its own"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
