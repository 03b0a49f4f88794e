"""Scripts in processes of their own, forked from one that has imported the package already."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["peft_perta.comparison", "peft_perta.cli.unlearn"])


class Child:
    """A script that runs as ``python SCRIPT ARGUMENTS`` does, in a directory; its output goes to a file.

    Args:
        arguments: the script's path and its arguments.
        directory: where it runs.
    """

    def __init__(self, arguments: list[str], directory: Path) -> None:
        number = len(list(directory.glob("output-*.txt")))
        self._output = directory / f"output-{number}.txt"
        self._output.touch()
        self._process = CONTEXT.Process(target=_run, args=(arguments, directory, self._output))
        self._process.start()

    @property
    def output(self) -> str:
        return self._output.read_text()

    @property
    def is_running(self) -> bool:
        return self._process.is_alive()

    def send_signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def wait(self, seconds: float = 400) -> int | None:
        """The exit status."""
        self._process.join(seconds)
        return self._process.exitcode

    def finished(self) -> str:
        """Its output, once it has ended well."""
        assert self.wait() == 0, self.output[-3000:]
        return self.output


def _run(arguments: list[str], directory: Path, output: Path) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background of a shell ignores it
    os.chdir(directory)
    sys.argv = list(arguments)
    sys.path.insert(0, str((directory / arguments[0]).resolve().parent))
    runpy.run_path(str(directory / arguments[0]), run_name="__main__")
