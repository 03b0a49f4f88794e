"""The checkpoint of an interrupted run: a directory of safetensors files, each written atomically.

``run.json`` says which run it belongs to: hashes of the model and the data, and the config. The checkpoint of another
run is refused, and so is that of a process which is computing the same run. Each entry holds a hash of its content.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..data import hold_lock, parse_json, read_json, remove_directory
from ..errors import OutputError

RUN_NAME = "run.json"
_PARTIAL = ".partial"  # ending of a file that is being written
_LOCK_NAME = "lock"  # holds the number of the process that has it locked
_NOTHING_COMPUTED = ("plan",)  # entries that are made before the first gradient
Address = tuple[str, ...]  # where a tensor belongs, for instance (layer, factor)


class Checkpoint:
    """A directory of named entries. Each entry holds tensors, by address, and a JSON record.

    Nothing is written before ``start``, which the first ``save`` calls: a run that is refused leaves nothing behind.

    Args:
        path: the directory.
        run: the description of the run, as JSON. Two runs are the same if their descriptions are equal.
        writes: whether this process writes; of several processes only the main one does.

    Raises:
        OutputError: the directory belongs to another run or to a living process, is not a checkpoint, or cannot be
            written.
    """

    def __init__(self, path: str | Path, run: Mapping[str, Any], *, writes: bool = True) -> None:
        self.path = Path(path)
        self._writes = writes
        self._run = run
        self._lock: IO[str] | None = None
        if self.path.exists() and not self._is_new():
            self._stored_run()
        if writes and self.path.exists():
            self._hold()
        self._started = self.path.exists() and not self._is_new() and self._is_of_run(run)
        if writes and self.path.exists():
            for partial in self.path.glob(f"*{_PARTIAL}"):  # left by a kill during a write
                partial.unlink()

    def start(self) -> None:
        """Create the directory and describe the run in it, unless that is done.

        What another run left there without computing anything is replaced.

        Raises:
            OutputError: the description cannot be written.
        """
        if self._writes and not self._started:
            with self._reported(RUN_NAME):
                self.path.mkdir(parents=True, exist_ok=True)
            self._hold()
            if not self._is_new() and self._is_of_run(self._run):  # another process has come first, and is gone
                self._started = True
                return
            for name in _NOTHING_COMPUTED if self.path.is_dir() else ():
                self.delete(name)
            text = json.dumps(self._run, indent=1, sort_keys=True) + "\n"
            self._write(RUN_NAME, lambda file: file.write_text(text, encoding="utf-8"))
            self._started = True

    def save(self, name: str, tensors: Mapping[Address, Tensor], record: Mapping[str, Any]) -> None:
        """Write an entry; it replaces an entry of the same name.

        Raises:
            OutputError: the file cannot be written.
        """
        if not self._writes:
            return
        self.start()
        stored = {_encoded(address): tensor.detach().to("cpu").contiguous() for address, tensor in tensors.items()}
        metadata = {"record": json.dumps(record), "sha256": _digest(stored, json.dumps(record))}
        self._write(f"{name}.safetensors", lambda file: save_file(stored, file, metadata=metadata))

    def load(self, name: str) -> tuple[dict[Address, Tensor], dict[str, Any]] | None:
        """The tensors and the record of an entry; None if there is no such entry.

        Raises:
            OutputError: the file is damaged.
        """
        path = self.path / f"{name}.safetensors"
        if not self._started or not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                record, digest = file.metadata()["record"], file.metadata()["sha256"]
                stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is not a mapping
            if _digest(stored, record) != digest:
                raise ValueError("it is not what was written")
            return {_decoded(key): tensor for key, tensor in stored.items()}, parse_json(record)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise OutputError(f"{path} is damaged ({error}); delete {self.path} to start again") from error

    def names(self) -> list[str]:
        """The names of all entries, sorted."""
        return sorted(path.stem for path in self.path.glob("*.safetensors")) if self._started else []

    def delete(self, name: str) -> None:
        """Delete an entry, if there is one."""
        if self._writes:
            (self.path / f"{name}.safetensors").unlink(missing_ok=True)

    def _is_new(self) -> bool:
        """Whether the directory is empty, or holds only what a kill during the very first write leaves."""
        return self.path.is_dir() and all(
            path.name == _LOCK_NAME or (path.name.startswith(RUN_NAME) and path.suffix == _PARTIAL)
            for path in self.path.iterdir()
        )

    def _stored_run(self) -> dict[str, Any]:
        """The description of the run that the directory belongs to."""
        try:
            stored = read_json(self.path / RUN_NAME)
            assert isinstance(stored, dict)
        except (OSError, ValueError, AssertionError) as error:
            raise OutputError(
                f"{self.path} is not a checkpoint of this package (it has no readable {RUN_NAME}); choose another "
                "directory"
            ) from error
        return stored

    def _hold(self) -> None:
        """Keep other processes out, until this object or the process is gone.

        Raises:
            OutputError: another process is in.
        """
        if self._lock is None:
            remedy = "which computes this run or another; wait until it ends, or choose another output"
            self._lock = hold_lock(self.path / _LOCK_NAME, str(self.path), remedy)

    def _is_of_run(self, run: Mapping[str, Any]) -> bool:
        """Whether the directory is the run's. It may be another's that computed nothing, which is no obstacle."""
        stored = self._stored_run()
        given = json.loads(json.dumps(run))
        different = sorted(key for key in {*stored, *given} if stored.get(key) != given.get(key))
        described = {
            RUN_NAME,
            _LOCK_NAME,
            *(f"{name}.safetensors" for name in _NOTHING_COMPUTED),
        }
        computed = "format" not in stored or any(
            path.name not in described and path.suffix != _PARTIAL for path in self.path.iterdir()
        )
        if different and computed:
            raise OutputError(
                f"{self.path} is the checkpoint of another run, which differs in: {', '.join(different)}; repeat the "
                "original command to resume that run, or delete the directory to start again"
            )
        return not different

    def _write(self, name: str, write: Callable[[Path], object]) -> None:
        partial = self.path / f"{name}.{secrets.token_hex(8)}{_PARTIAL}"  # a link cannot wait under that name
        with self._reported(name):
            try:
                write(partial)
                with open(partial, "rb") as file:
                    os.fsync(file.fileno())
                os.replace(partial, self.path / name)
            except BaseException:
                with contextlib.suppress(OSError):
                    partial.unlink()
                raise

    @contextlib.contextmanager
    def _reported(self, name: str) -> Iterator[None]:
        """Turn the errors of writing a file into ours."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise OutputError(
                f"{self.path / name} could not be written: {error}; free some space and run this again"
            ) from error


def remove_checkpoint(path: str | Path) -> None:
    """Delete the checkpoint of a finished run. A directory that is not a checkpoint is left alone."""
    if (Path(path) / RUN_NAME).is_file():
        remove_directory(path)


def _digest(stored: Mapping[str, Tensor], record: str) -> str:
    """SHA-256 of a record, and of tensors with their keys."""
    digest = hashlib.sha256(record.encode())
    for key in sorted(stored):
        digest.update(key.encode())
        digest.update(stored[key].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _encoded(address: Address) -> str:
    """The key of a tensor in a safetensors file."""
    return json.dumps(address)


def _decoded(key: str) -> Address:
    return tuple(parse_json(key))
