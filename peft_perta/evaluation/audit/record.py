"""The record of an audit: the attacks that are made, and of what."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...data import note, read_json, write_file
from ...errors import ConfigError
from ...model import identify
from ..attacks.attack import Answer, AttackResult, AttackSettings, Victims
from ..suites import hash_stack

AUDIT_RECORD_NAME = "audit_record.json"
_UNLEARNED = "the unlearned model"


def identity_of(victims: Victims, settings: AttackSettings) -> dict[str, str]:
    """Part -> hash, of everything that the results depend on."""
    parts: dict[str, str] = {}
    for role, subject in victims.subjects():
        facts = [identify(subject.model, subject.tokenizer), hash_stack(subject), subject.max_length]
        parts[f"the {role} model"] = _hash(facts)
    return {
        **parts,
        "the rows": _hash([victims.rows, list(victims.retain), list(victims.unrelated)]),
        "the settings": _hash(dataclasses.asdict(settings)),
    }


class AuditRecord:
    """The attacks that are made, in a file."""

    def __init__(self, directory: str | Path, identity: dict[str, str]) -> None:
        self._path = Path(directory) / AUDIT_RECORD_NAME
        self._identity = identity
        self.found: dict[str, list[AttackResult]] = {}
        try:
            of, found = _contents(self._path)
            changed = _changed(of, identity)
            if not changed:
                self.found = found
            elif found:
                note(f"{self._path} is of another audit ({', '.join(changed)} changed); it is made anew")
        except _AlteredError:
            note(f"{self._path} is damaged; the audit is made anew")
        except _UNREADABLE:
            self.found = {}  # there is none yet, or a damaged one

    def add(self, name: str, results: list[AttackResult]) -> None:
        """Keep an attack's results."""
        self.found[name] = results
        attacks = {key: [_stored(result) for result in made] for key, made in self.found.items()}
        record = {"of": self._identity, "sha256": _hash(attacks), "attacks": attacks}
        write_file(self._path, json.dumps(record) + "\n")


def measured_beside(directory: str | Path, identity: dict[str, str]) -> list[AttackResult]:
    """What an audit of another unlearned model made, if all else that its results depend on is the same.

    Raises:
        ConfigError: there is no readable record, or it is of another full model, yardstick, rows or settings.
    """
    path = Path(directory) / AUDIT_RECORD_NAME
    expected = "expected the output of an audit of another adapter for the same models, rows and settings"
    try:
        of, found = _contents(path)
    except _UNREADABLE as error:
        raise ConfigError(
            f"{path}: {expected}, found none that can be read ({error}); check the path, or audit without it"
        ) from error
    changed = [part for part in _changed(of, identity) if part != _UNLEARNED]
    if changed:
        raise ConfigError(f"{path}: {expected}, found one where {', '.join(changed)} differ; audit without it")
    return [result for results in found.values() for result in results]


class _AlteredError(ValueError):
    """A record whose attacks are not those that were written."""


_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)


def _contents(path: Path) -> tuple[dict[str, str], dict[str, list[AttackResult]]]:
    """What the audit is of, and attack -> its results."""
    stored = read_json(path)
    attacks = stored["attacks"]
    if stored["sha256"] != _hash(attacks):
        raise _AlteredError("it is damaged")
    return dict(stored["of"]), {name: [_read(entry) for entry in entries] for name, entries in attacks.items()}


def _changed(of: Mapping[str, str], identity: Mapping[str, str]) -> list[str]:
    return [part for part, value in identity.items() if of.get(part) != value]


def _hash(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _stored(result: AttackResult) -> dict[str, Any]:
    rows = {
        role: {name: [None if math.isnan(value) else value for value in values] for name, values in of_role.items()}
        for role, of_role in result.rows.items()
    }
    return {**dataclasses.asdict(result), "rows": rows, "answers": [answer._asdict() for answer in result.answers]}


def _read(entry: Mapping[str, Any]) -> AttackResult:
    rows = {
        role: {name: [math.nan if value is None else float(value) for value in values] for name, values in of.items()}
        for role, of in entry["rows"].items()
    }
    return AttackResult(**{**entry, "rows": rows, "answers": [Answer(**answer) for answer in entry["answers"]]})
