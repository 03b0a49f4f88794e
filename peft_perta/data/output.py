"""Files and directories that are replaced atomically.

Output is written under a temporary name and then moved: a killed process leaves the old output or the new one, never a
part of either. A directory is replaced only if we wrote every file in it: its marker, a JSON file, lists them.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import platform
import re
import secrets
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import OutputError
from .json_files import read_json
from .locking import held_directory

WRITTEN = "written"  # key of a marker: the files of the directory, itself among them
_ADDED = ("report.html", "strength.png")  # files that a command adds to a directory that is written
_AT_FDCWD = -100  # of Linux's renameat2: paths are relative to the working directory
_RENAME_EXCHANGE = 2
_LONGEST = 100  # characters of a name that its temporary name repeats


def check_output(path: str | Path, marker: str, *, grows: bool = False) -> Path:
    """Check that a directory may be written: it is absent or empty, or we wrote all that is in it.

    Args:
        path: the directory.
        marker: the name of a JSON file that every directory of this sort holds.
        grows: files are written into the directory one by one and none is removed, so that files of others may lie
            beside them.

    Returns:
        The path. Nothing is written.

    Raises:
        OutputError: the path is a file, a link, a mount point or the working directory, lies under a file, holds files
            of others, or may not be written.
    """
    path = Path(path)
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        kind = "link" if path.is_symlink() else "file"
        raise OutputError(f"{path} is a {kind}, expected a new directory; choose another output")
    if path.is_dir() and not grows and (path.samefile(Path.cwd()) or os.path.ismount(path)):
        kind = "the working directory" if path.samefile(Path.cwd()) else "a mount point"
        raise OutputError(f"{path} is {kind}, which cannot be replaced; choose another output")
    if path.is_dir() and any(not _is_left_over(entry.name, marker) for entry in path.iterdir()):
        _check_ours(path, marker, grows=grows)
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise OutputError(f"{path} cannot be written: {parent} is a file; choose another output")
    if not os.access(parent, os.W_OK):
        raise OutputError(f"{path} cannot be written: no permission in {parent}; choose another output")
    return path


def _check_ours(path: Path, marker: str, *, grows: bool) -> None:
    """
    Raises:
        OutputError: the directory lacks its marker, or would be replaced and holds a file that is not listed there.
    """
    if not (path / marker).is_file():
        raise OutputError(f"{path} exists and was not written by peft_perta (no {marker}); choose another output")
    if grows:
        return
    try:
        listed = {*read_json(path / marker)[WRITTEN], *_ADDED}
    except (OSError, ValueError, LookupError, TypeError):
        raise OutputError(
            f"{path} would be replaced, but its {marker} does not list the files that belong to it; choose another "
            "output"
        ) from None
    foreign = [name for name in _files(path) if name not in listed]
    if foreign:
        raise OutputError(
            f"{path} would be replaced, and {foreign[0]} in it was not written by peft_perta; move it away, or choose "
            "another output"
        )


def _files(directory: Path) -> list[str]:
    """The relative paths of all files below a directory, and of links and of empty directories, sorted."""
    paths = (path for path in directory.rglob("*") if path.is_symlink() or not path.is_dir() or not any(path.iterdir()))
    return sorted(path.relative_to(directory).as_posix() for path in paths)


def check_file(path: str | Path, *, overwrite: bool) -> None:
    """Check that a file may be written.

    Args:
        path: the file.
        overwrite: whether the user wants an existing file to be replaced.

    Raises:
        OutputError: the path is a directory, or a file that may not be replaced.
    """
    path = Path(path)
    if path.is_dir():
        raise OutputError(f"{path} is a directory, expected the name of a file")
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists; add --overwrite to replace it, or choose another name")


def write_file(path: str | Path, text: str) -> None:
    """Write a text file atomically; it replaces a file of that name.

    Raises:
        OutputError: the write fails (disk full, read-only), or the path is a directory.
    """
    path = Path(path)
    partial = None
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        _remove_left_overs(path)
        partial = _temporary(path)
        # O_EXCL follows no link and opens no file of others.
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(partial, path)
    except (OSError, UnicodeEncodeError) as error:
        if partial is not None:
            with contextlib.suppress(OSError):
                partial.unlink()
        raise OutputError(f"{path} could not be written: {error}; nothing was changed there") from error


@contextmanager
def replaced_directory(path: str | Path, marker: str) -> Iterator[Path]:
    """Yield a new directory to write into; it replaces ``path`` when the block ends without an exception.

    The block writes the marker, a JSON object; the list of all files is added to it.

    Args:
        path: the directory to replace or to create.
        marker: as in ``check_output``.

    Raises:
        OutputError: ``path`` holds what we did not write, or the write fails (disk full, read-only).
    """
    path = check_output(path, marker)
    temporary = None
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        _remove_left_overs(path)
        temporary = _temporary(path)
        temporary.mkdir()  # fails where something has that name already
        yield temporary
        _list_files(temporary, marker)
        mode = temporary.stat().st_mode & 0o666  # as the umask has it; some writers give less
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(mode)
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
        check_output(path, marker)  # it may have changed while the block ran
        _move(temporary, path)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{path} could not be written: {error}; nothing was changed there") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _list_files(directory: Path, marker: str) -> None:
    """Add the list of all files to the marker."""
    record = read_json(directory / marker)
    text = json.dumps({**record, WRITTEN: _files(directory)}, indent=1) + "\n"
    (directory / marker).write_text(text, encoding="utf-8")


def _temporary(path: Path) -> Path:
    """A name beside the path that nobody can guess; it says which process on which machine writes it."""
    name = f".{path.name[:_LONGEST]}.{_machine()}-{os.getpid()}-{secrets.token_hex(8)}.partial"
    return path.absolute().parent / name


def _machine() -> str:
    return f"{zlib.crc32(platform.node().encode()):08x}"


def _remove_left_overs(path: Path) -> None:
    """Remove what processes of this machine that are gone left beside the path."""
    for entry in os.scandir(path.absolute().parent):
        if not _is_left_over(entry.name, path.name):
            continue
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                os.unlink(entry.path)


def _is_left_over(name: str, of: str) -> bool:
    """Whether this is the temporary name of a file or directory ``of``, and its process, on this machine, is gone."""
    ours = rf"\.{re.escape(of[:_LONGEST])}\.{_machine()}-(\d+)-[0-9a-f]{{16}}\.partial"
    match = re.fullmatch(ours, name)
    return match is not None and not _is_alive(int(match[1]))


def _is_alive(process: int) -> bool:
    if process == os.getpid() or os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # another user's
    return True


def remove_directory(path: str | Path) -> None:
    """Remove a directory at once: a kill leaves all of it, or nothing under its name."""
    path = Path(path)
    aside = _temporary(path)
    with contextlib.suppress(FileNotFoundError):
        _remove_left_overs(path)
        os.rename(path, aside)
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def claimed_directory(path: str | Path, marker: str, content: str) -> Iterator[None]:
    """Mark a directory as ours while files are written into it one by one, and keep other processes out of it.

    If the block fails before it has written anything, the directory is as it was.

    Args:
        path: the directory; it is created if missing.
        marker: the name of the file that marks it; one that is there stays.
        content: the content of a new marker.

    Raises:
        OutputError: the marker cannot be written, or another process is in.
    """
    path = Path(path)
    existed, marked = path.is_dir(), (path / marker).is_file()
    if not marked:
        write_file(path / marker, content)
    with held_directory(path):
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
