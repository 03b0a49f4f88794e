"""Files and directories that are replaced atomically.

Output is written under a temporary name and then moved: a killed process leaves the old output or the new one, never a
part of either.
"""

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

_AT_FDCWD = -100  # of Linux's renameat2: paths are relative to the working directory
_RENAME_EXCHANGE = 2


def check_output(path: str | Path, marker: str) -> Path:
    """Check that a directory may be written: it is absent, empty, or holds ``marker`` and so was written by us.

    Args:
        path: the directory.
        marker: the name of a file that every directory of this sort holds.

    Returns:
        The path. Nothing is written.

    Raises:
        OutputError: the path is a file, lies under one, holds files of others, or may not be written.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path} is a file, expected a new directory; choose another output")
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
    """Write a text file atomically; it replaces a file of that name.

    Raises:
        OutputError: the write fails (disk full, read-only), or the path is a directory.
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
    """Yield a new directory to write into; it replaces ``path`` when the block ends without an exception.

    Args:
        path: the directory to replace or to create.
        marker: as in ``check_output``.

    Raises:
        OutputError: ``path`` was not written by us, or the write fails (disk full, read-only).
    """
    path = check_output(path, marker)
    temporary = None
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        temporary = path.absolute().parent / f".{path.name}.partial"
        shutil.rmtree(temporary, ignore_errors=True)  # left by a run that was killed while it wrote
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
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


@contextmanager
def claimed_directory(path: str | Path, marker: str, content: str) -> Iterator[None]:
    """Mark a directory as ours while files are written into it one by one.

    If the block fails before it has written anything, the directory is as it was.

    Args:
        path: the directory; it is created if missing.
        marker: the name of the file that marks it; one that is there stays.
        content: the content of a new marker.

    Raises:
        OutputError: the marker cannot be written.
    """
    path = Path(path)
    existed, marked = path.is_dir(), (path / marker).is_file()
    if not marked:
        write_file(path / marker, content)
    try:
        yield
    except BaseException:
        if not marked and [file.name for file in path.iterdir()] == [marker]:
            (path / marker).unlink()
            if not existed:
                path.rmdir()
        raise


def _move(source: Path, target: Path) -> None:
    """Move ``source`` to ``target``. Afterwards ``source`` may hold the old ``target``."""
    try:
        os.rename(source, target)  # works if the target is absent or empty
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    if _exchange(source, target):
        return
    # Without an atomic exchange there is a moment without the directory; the old one is then beside it.
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.absolute().parent))
    os.rename(target, aside)
    os.rename(source, target)
    shutil.rmtree(aside)


def _exchange(source: Path, target: Path) -> bool:
    """Swap two directories in one step (Linux's renameat2); False if the system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if renameat2 is None:
        return False
    return renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _RENAME_EXCHANGE) == 0
