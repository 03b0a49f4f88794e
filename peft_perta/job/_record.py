"""Which steps of a job are done: kept in the output, so that a job that was killed goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..data import read_json, remove_directory, write_file
from ..errors import OutputError
from ..model import hash_file

JOB_NAME = "job.json"


class Record:
    """The steps that are done, each with the hash of all that it depends on and of the files that it wrote.

    Args:
        directory: the output of the job.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._steps: dict[str, dict[str, Any]] = {}
        path = directory / JOB_NAME
        if not path.is_file():
            return
        try:
            steps = read_json(path)["steps"]
            self._steps = {name: {"of": str(step["of"]), "files": dict(step["files"])} for name, step in steps.items()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise OutputError(f"{path} is damaged ({error!r}); choose another output") from error

    def holds(self, name: str, of: str) -> bool:
        """Whether the step was done with these inputs, and its files are as it left them."""
        step = self._steps.get(name)
        return step is not None and step["of"] == of and step["files"] == self._files(name)

    def keep_only(self, names: Collection[str]) -> None:
        """Remove what steps wrote that another recipe had and this one has not."""
        for name in [name for name in self._steps if name not in names]:
            self.begin(name)
            remove_directory(self._directory / name)

    def begin(self, name: str) -> None:
        """Forget a step that is to be done: its old files may be replaced at any moment from now on."""
        if self._steps.pop(name, None) is not None:
            self._write()

    def end(self, name: str, of: str) -> None:
        """Keep a step that is done."""
        self._steps[name] = {"of": of, "files": self._files(name)}
        self._write()

    def _write(self) -> None:
        write_file(self._directory / JOB_NAME, json.dumps({"steps": self._steps}, indent=1, sort_keys=True) + "\n")

    def _files(self, name: str) -> dict[str, str]:
        """Path -> SHA-256 of what the step wrote: a file or a directory of its name."""
        root = self._directory / name
        files = [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file())
        return {str(path.relative_to(self._directory)): hash_file(path) for path in files}


def hash_of(facts: Mapping[str, Any]) -> str:
    """SHA-256 of plain values, and of settings, whose text names every field."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=repr).encode()).hexdigest()
