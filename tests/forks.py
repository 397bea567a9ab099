"""Processes that are forked where TensorFlow is imported already, which takes longer than they do.

Each is a process of its own all the same, with a runtime of its own, and can be killed.
"""

import atexit
import functools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["mdn.cli.main", "mdn.cli.train", "mdn.training"])


def bare_main() -> None:
    """Train as `train.py` does, but draw and export nothing."""
    from mdn import tasks
    from mdn.cli.train import main

    for name in ("save_plots", "save_vae_plots", "write_figures"):
        setattr(tasks, name, lambda *args, **kwargs: None)
    for task in (tasks.DensityTask, tasks.VAETask):
        task.export = lambda *args, **kwargs: None
    main()


class Fork:
    """A command in a process of its own, with the methods of `subprocess.Popen` that tests use.

    Args:
        main: what the command calls; a function of a module, without arguments.
        words: the command and its arguments, for `sys.argv`.
        log: a path, beside which what it prints is written: `<log>.out` and `<log>.err`.
        **environment: variables to set.
    """

    def __init__(
        self, main: Callable[[], object], words: list, log: Path, **environment: str
    ) -> None:
        self.out, self.err = (log.with_name(f"{log.name}.{end}") for end in ("out", "err"))
        for path in (self.out, self.err):
            path.touch()
        words = [str(word) for word in words]
        arguments = main, words, str(self.out), str(self.err), environment
        self._process = _SERVER.Process(target=_begin, args=arguments)
        self._process.start()

    def poll(self) -> int | None:
        return self._process.exitcode

    returncode = property(poll)

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def wait(self, timeout: float | None = None) -> int | None:
        self._process.join(timeout)
        return self.poll()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        return self.out.read_text(), self.err.read_text()


def _begin(
    main: Callable[[], object], words: list[str], out: str, err: str, environment: dict[str, str]
) -> None:
    for standard, path in ((1, out), (2, err)):
        with open(path, "wb") as file:
            os.dup2(file.fileno(), standard)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in jobs of some shells
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.argv = words
    main()


# ---------------------------------------------------------------------- TensorFlow alone

_PLAIN = """
import json, os, sys, traceback
import tensorflow

for line in sys.stdin:
    program, words, folder, out, err = json.loads(line)
    child = os.fork()
    if not child:
        for standard, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), standard)
        os.chdir(folder)
        sys.argv = ["-c", *words]
        code = 1
        try:
            exec(program, {"__name__": "__main__"})
            code = 0
        except SystemExit as end:
            code = end.code or 0
            if not isinstance(code, int):
                print(code, file=sys.stderr)
                code = 1
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def _plain() -> subprocess.Popen:
    # With this variable TensorFlow itself imports tf_keras.
    environment = {k: v for k, v in os.environ.items() if k != "TF_USE_LEGACY_KERAS"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", _PLAIN], env=environment, **pipes)
    atexit.register(process.kill)
    return process


def run_plain(program: str, words: list, folder: Path) -> subprocess.CompletedProcess:
    """Run a program in a process that has imported TensorFlow and nothing else of ours.

    Args:
        program: Python.
        words: its arguments, for `sys.argv`.
        folder: where it runs, in which `out.txt` and `err.txt` are what it prints.
    """
    out, err = folder / "out.txt", folder / "err.txt"
    words = [str(word) for word in words]
    process = _plain()
    process.stdin.write(json.dumps([program, words, str(folder), str(out), str(err)]) + "\n")
    process.stdin.flush()
    code = int(process.stdout.readline())
    return subprocess.CompletedProcess(words, code, out.read_text(), err.read_text())
