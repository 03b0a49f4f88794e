"""What an interrupted run leaves for the next: a directory of safetensors files, each written whole or not at all.

``run.json`` says whose they are: a hash over the model, the data and the config. A directory of another run is refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import OutputError

RUN_NAME = "run.json"


class Checkpoint:
    """A directory of named entries, each some tensors and a record.

    Args:
        path: the directory; made where it is not there.
        run: what the run is, as JSON; two runs are one where these are equal.
        writes: whether this process writes; of several processes only the main one does.

    Raises:
        OutputError: the directory is another run's, is not a checkpoint, or cannot be written.
    """

    def __init__(self, path: str | Path, run: Mapping[str, Any], *, writes: bool = True) -> None:
        self.path = Path(path)
        self._writes = writes
        if self.path.exists() and not self._is_new():
            self._check_run(run)
        elif writes:
            self._write(RUN_NAME, lambda file: file.write_text(json.dumps(run, indent=1, sort_keys=True) + "\n"))

    def save(self, name: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Write an entry, in the place of one of the same name.

        Raises:
            OutputError: the disk refuses.
        """
        if not self._writes:
            return
        held = {key: tensor.detach().to("cpu").contiguous() for key, tensor in tensors.items()}
        metadata = {"record": json.dumps(record)}
        self._write(f"{name}.safetensors", lambda file: save_file(held, file, metadata=metadata))

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """An entry's tensors and record, or None where there is no such entry.

        Raises:
            OutputError: the file is damaged.
        """
        path = self.path / f"{name}.safetensors"
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                record = json.loads(file.metadata()["record"])
                return {key: file.get_tensor(key) for key in file.keys()}, record  # noqa: SIM118 - not a mapping
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise OutputError(f"{path} is damaged ({error}); delete {self.path} to start anew") from error

    def names(self) -> list[str]:
        """Of all entries, sorted."""
        return sorted(path.stem for path in self.path.glob("*.safetensors"))

    def delete(self, name: str) -> None:
        if self._writes:
            (self.path / f"{name}.safetensors").unlink(missing_ok=True)

    def _is_new(self) -> bool:
        """Whether nothing is in it, or no more than a kill in the middle of the first write leaves."""
        return self.path.is_dir() and all(path.name == f"{RUN_NAME}.partial" for path in self.path.iterdir())

    def _check_run(self, run: Mapping[str, Any]) -> None:
        try:
            found = json.loads((self.path / RUN_NAME).read_text())
            assert isinstance(found, dict)
        except (OSError, ValueError, AssertionError) as error:
            raise OutputError(
                f"{self.path} is not the checkpoint of a run of ours (no readable {RUN_NAME}); choose another place"
            ) from error
        wanted = json.loads(json.dumps(run))
        different = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
        if different:
            raise OutputError(
                f"{self.path} is the checkpoint of another run, which differs in: {', '.join(different)}; go on with "
                "that run as it was, or delete the directory to start anew"
            )
        if self._writes:
            for path in self.path.glob("*.partial"):  # a kill came while it was being written
                path.unlink()

    def _write(self, name: str, write: Any) -> None:
        partial, final = self.path / f"{name}.partial", self.path / name
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write(partial)
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, final)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise OutputError(f"{final} could not be written: {error}; free some space and run this again") from error


def remove_checkpoint(path: str | Path) -> None:
    """The run is finished: nothing is left to go on from. What is no checkpoint of ours is left alone."""
    if (Path(path) / RUN_NAME).is_file():
        shutil.rmtree(path, ignore_errors=True)
