"""A directory is written under a temporary name and moved: a kill leaves the old one or the new one, never a half."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import OutputError

_AT_FDCWD = -100


_RENAME_EXCHANGE = 2


def check_output(path: str | Path, marker: str) -> Path:
    """The path as one that we may write: absent, empty, or a directory that holds ``marker`` and so is ours.

    Raises:
        OutputError: it is a file, or a directory of somebody else's.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path} is a file; expected a new directory, choose another output")
    if path.is_dir() and any(path.iterdir()) and not (path / marker).is_file():
        raise OutputError(f"{path} exists and was not written by peft_perta (no {marker}); choose another output")
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise OutputError(f"{path} cannot be written: {parent} is a file; choose another output")
    if not os.access(parent, os.W_OK):
        raise OutputError(f"{path} cannot be written: no permission in {parent}; choose another output")
    return path


def write_file(path: str | Path, text: str) -> None:
    """Write a text file whole, in the place of one of that name, or not at all.

    Raises:
        OutputError: the disk refuses (full, read-only), or a directory is in the way.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise OutputError(f"{path} could not be written: {error}; nothing was changed there") from error


@contextmanager
def replaced_directory(path: str | Path, marker: str) -> Iterator[Path]:
    """A fresh directory to write into, which takes the place of ``path`` when the block ends without an exception.

    Raises:
        OutputError: ``path`` is not ours to replace, or the disk refuses (full, read-only).
    """
    path = check_output(path, marker)
    temporary = None
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        temporary = path.absolute().parent / f".{path.name}.partial"
        shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed while it wrote
        temporary.mkdir()
        yield temporary
        for file in (found for found in temporary.rglob("*") if found.is_file()):
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        _move(temporary, path)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{path} could not be written: {error}; nothing was changed there") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _move(source: Path, target: Path) -> None:
    """Afterwards ``target`` is what ``source`` was; ``source`` may hold what ``target`` was."""
    try:
        os.rename(source, target)  # absent, or an empty directory
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    if _exchange(source, target):
        return
    # Without an atomic exchange there is an instant with no directory; the old one then lies beside it.
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.absolute().parent))
    os.rename(target, aside)
    os.rename(source, target)
    shutil.rmtree(aside)


def _exchange(source: Path, target: Path) -> bool:
    """Swap two directories in one step (Linux's renameat2); False where the system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if renameat2 is None:
        return False
    return renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _RENAME_EXCHANGE) == 0
