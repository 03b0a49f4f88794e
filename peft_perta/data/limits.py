"""Limits on what files of others may take: the time of a pattern or a template, the rows of a set, what is unpacked."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

SECONDS = 20.0
MOST_ROWS = 5_000_000  # of one set, which is held in memory
LARGEST_EXPANSION = 200  # times a compressed file's size: texts compress to a tenth, bombs to a thousandth
ALWAYS_UNPACKED = 32 * 2**20  # bytes that any compressed file may expand to


def most_unpacked(size: int) -> int:
    """The bytes that a compressed file of ``size`` bytes may expand to."""
    return max(ALWAYS_UNPACKED, LARGEST_EXPANSION * size)


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
