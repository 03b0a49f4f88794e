"""A limit on the time that a pattern or a template of others takes."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

SECONDS = 20.0


@contextlib.contextmanager
def time_limit(error: Exception) -> Iterator[None]:
    """Raise ``error`` once what is inside has used ``SECONDS`` of the process' time.

    Only the main thread of a POSIX process can be stopped: elsewhere there is no limit.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: object) -> None:
        raise error

    handler = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, handler)
