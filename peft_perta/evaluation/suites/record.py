"""Which evaluations a directory already holds, so that a second run does not repeat them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device

from ...data import read_json, write_file
from ...model import identify, tuner_modules
from ..logs.files import Log, read_log, write_log
from ..subject import Subject
from .suite import Splits, Suite, SuiteSettings

RECORD_NAME = "evaluation.json"
Parts = Mapping[str, str]
_LOGGER = logging.getLogger(__name__)


class EvaluationRecord:
    """The logs in a directory, and for each suite a hash of each part of what its log was computed from.

    Args:
        directory: where the logs and the record are.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._record = _read(directory / RECORD_NAME)

    def finished(self, suite: Suite, parts: Parts) -> Log | None:
        """The suite's log, where it was computed from the same parts; else None, and the log says which differ."""
        path = self.directory / suite.file_name
        last = self._record.get("suites", {}).get(suite.name)
        if last is None or not path.is_file():
            return None
        last = last if isinstance(last, dict) else {}  # an earlier version wrote one hash of fewer parts
        different = [part for part in {**last, **parts} if last.get(part) != parts.get(part)]
        if not different:
            return read_log(path)
        _LOGGER.warning(f"{path} is of another evaluation, which differs in: {', '.join(different)}; evaluating again")
        return None

    def write(self, suite: Suite, parts: Parts, log: Log) -> None:
        """Write the suite's log. The record's entry is removed first, so that an interrupted write leaves no entry."""
        others = {name: last for name, last in self._record.get("suites", {}).items() if name != suite.name}
        self._write_suites(others)
        write_log(log, self.directory / suite.file_name)
        self._write_suites({**others, suite.name: parts})

    def _write_suites(self, suites: dict[str, Any]) -> None:
        self._record = {**self._record, "suites": suites}
        write_file(self.directory / RECORD_NAME, json.dumps(self._record, indent=1) + "\n")


def _read(path: Path) -> dict[str, Any]:
    """The record; empty where the file is missing or damaged."""
    try:
        record = read_json(path)
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) and isinstance(record.get("suites"), dict) else {}


def evaluated_parts(subject: Subject, asked: Mapping[str, Splits], settings: SuiteSettings) -> dict[str, Parts]:
    """Suite -> part -> hash, of everything that the suite's log depends on."""
    identity = identify(subject.model, subject.tokenizer)
    parts = {**identity, "adapters": hash_stack(subject)}
    other = settings.retain_only
    if other is not None:
        is_same = other.model is subject.model and other.tokenizer is subject.tokenizer
        facts = [identity if is_same else identify(other.model, other.tokenizer), hash_stack(other)]
        parts["retain-only model"] = _hash(facts)
    lengths = {"max_new_tokens": settings.max_new_tokens, "max_length": subject.max_length}
    return {name: {**parts, "rows": _hash(splits), "lengths": _hash(lengths)} for name, splits in asked.items()}


def _hash(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def hash_stack(subject: Subject) -> str:
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
