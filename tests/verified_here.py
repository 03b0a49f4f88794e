"""``verify`` starts a Python of its own, which takes seconds to import torch. Tests run its program in their process.

Tests with the mark ``fresh_process`` start it, as users do.
"""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock


@contextlib.contextmanager
def verified_here() -> Iterator[None]:
    """Within the block, the program of the fresh process runs in this one, where it finds no module of this package."""
    with mock.patch("peft_perta.adapters._fresh_process.subprocess", SimpleNamespace(run=_run)):
        yield


def _run(command: list[str], **_: Any) -> subprocess.CompletedProcess:
    assert command[:2] == [sys.executable, "-c"]
    ours = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "peft_perta"}
    printed = io.StringIO()
    try:
        with mock.patch.object(sys, "argv", ["-c", *command[3:]]), contextlib.redirect_stdout(printed):
            exec(command[2], {"__name__": "__main__"})
    except Exception as error:
        return subprocess.CompletedProcess(command, 1, printed.getvalue(), f"{type(error).__name__}: {error}")
    finally:
        sys.modules.update(ours)
    return subprocess.CompletedProcess(command, 0, printed.getvalue(), "")
