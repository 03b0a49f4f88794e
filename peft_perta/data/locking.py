"""One process at a time: a lock file, or a locked directory, held until the process that has it is gone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ..errors import OutputError

try:
    import fcntl
except ImportError:  # not a POSIX system: nothing is locked
    fcntl = None


def hold_lock(path: Path, what: str, remedy: str) -> IO[str] | None:
    """Lock a file, which names this process while it is held.

    Args:
        path: the file; it is created if missing, and no link at its name is followed.
        what: what it keeps others out of, as the message says it.
        remedy: what the message says of the other process, and what to do.

    Returns:
        The file, locked until it is closed or the process is gone; None on a system without such locks.

    Raises:
        OutputError: another process has it, or it cannot be opened.
    """
    if fcntl is None:
        return None
    try:
        place = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        lock = open(place, "r+", encoding="utf-8", errors="replace")  # noqa: SIM115 - it is held open
    except OSError as error:
        raise OutputError(f"{path} could not be written: {error}; free some space and run this again") from error
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        holder = lock.read(20).strip() or "another one"
        lock.close()
        raise OutputError(f"{what} is in use by process {holder}, {remedy}") from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


@contextmanager
def held_directory(path: Path) -> Iterator[None]:
    """Keep other processes that do the same out of a directory within the block, which leaves no trace in it.

    On a system without such locks, and on a file system that has none for directories, nothing is locked.

    Raises:
        OutputError: another process is in.
    """
    if fcntl is None:
        yield
        return
    place = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if isinstance(error, BlockingIOError):
                raise OutputError(
                    f"{path} is in use by another process, which writes its results there; wait until it ends, or "
                    "choose another output"
                ) from None
        yield
    finally:
        os.close(place)
