"""Which evaluations a directory already holds, so that a second run does not repeat them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device

from ...data import write_file
from ...model import base_name, hash_embeddings, tuner_modules
from ..logs.files import Log, read_log, write_log
from ..subject import Subject
from .suite import Splits, Suite, SuiteSettings

RECORD_NAME = "evaluation.json"


class EvaluationRecord:
    """The logs in a directory, and for each suite the key of what its log was computed from.

    Args:
        directory: where the logs and the record are.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._record = _read(directory / RECORD_NAME)

    def finished(self, suite: Suite, key: str) -> Log | None:
        """The suite's log, where it was computed from the same model, rows and settings; else None."""
        path = self.directory / suite.file_name
        last_key = self._record.get("suites", {}).get(suite.name)
        return read_log(path) if last_key == key and path.is_file() else None

    def write(self, suite: Suite, key: str, log: Log) -> None:
        """Write the suite's log. The record's entry is removed first, so that an interrupted write leaves no entry."""
        others = {name: last for name, last in self._record.get("suites", {}).items() if name != suite.name}
        self._write_suites(others)
        write_log(log, self.directory / suite.file_name)
        self._write_suites({**others, suite.name: key})

    def _write_suites(self, suites: dict[str, str]) -> None:
        self._record = {**self._record, "suites": suites}
        write_file(self.directory / RECORD_NAME, json.dumps(self._record, indent=1) + "\n")


def _read(path: Path) -> dict[str, Any]:
    """The record; empty where the file is missing or damaged."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) and isinstance(record.get("suites"), dict) else {}


def evaluation_key(subject: Subject, name: str, splits: Splits, settings: SuiteSettings) -> str:
    """A hash of everything that a suite's log depends on: base, active adapters, rows and settings."""
    digest = hashlib.sha256()
    facts = [name, splits, settings.max_new_tokens, subject.max_length, base_name(subject.model)]
    digest.update(json.dumps(facts, sort_keys=True).encode())
    digest.update(hash_embeddings(subject.model).encode())
    for judged in filter(None, (subject, settings.retain_only)):
        digest.update(_hash_stack(judged).encode())
    return digest.hexdigest()


def _hash_stack(subject: Subject) -> str:
    """A hash of the weights and scalings of the active adapters."""
    digest = hashlib.sha256()
    for name, module in subject.model.named_modules():
        for tuner in tuner_modules([module]):
            active = subject.adapters if subject.adapters is not None else tuner.active_adapters
            scaling = getattr(tuner, "scaling", {})
            digest.update(f"{name} {[(key, scaling.get(key)) for key in active]}".encode())
            for path, part in tuner.named_modules():
                with align_module_device(part):  # an offloaded module has its weights only while it runs
                    for key, parameter in part.named_parameters(path, recurse=False):
                        if set(key.split(".")) & set(active) and not parameter.is_meta:
                            digest.update(key.encode() + parameter.detach().to("cpu", torch.float64).numpy().tobytes())
    return digest.hexdigest()
