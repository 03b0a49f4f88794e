"""What a ledger holds: entries, each with its own hash and that of the entry before it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, ConfigDict, Field
from typing_extensions import TypedDict

from ...data import read_as

FORMAT = 1
BEGINNING = "0" * 64  # what stands for the hash of the entry before the first


def _inside(path: str) -> str:
    """A path below the ledger's directory, as it is written on every system."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path or not path.isprintable():
        raise ValueError("it leads out of the ledger's directory")
    return path


Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Text = Annotated[str, Field(min_length=1, max_length=2000)]
Name = Annotated[str, Field(pattern=r"^[\w][\w .@+-]*$", max_length=100)]
Day = Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]
Inside = Annotated[str, Field(max_length=1000), AfterValidator(_inside)]


class BaseFacts(TypedDict):
    """What tells a base from another, as ``identify_base`` gives it; None where it is not known."""

    name: str | None
    weights_sha256: str | None
    embeddings_sha256: str | None
    files: dict[str, str | None] | None


class AdapterFacts(TypedDict):
    """An adapter: its directory below the ledger's, the hashes of its factors and of its config, and its base."""

    path: Inside
    factors_sha256: Sha256
    config_sha256: Sha256
    base: BaseFacts


class AuditFacts(TypedDict):
    """A verdict, and the hashes of the ``audit.json`` that it is from and of the adapter that it is on."""

    file_sha256: Sha256
    factors_sha256: Sha256
    verdict: Text
    because: Text
    yardstick: Text
    rows: Annotated[int, Field(ge=1)]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the history.

    Attributes:
        date: the day, YYYY-MM-DD.
        previous: ``sha256`` of the entry before; ``BEGINNING`` in the first.
        sha256: of all other fields as JSON.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    date: Day
    previous: Sha256 = BEGINNING
    sha256: Sha256 = BEGINNING


@dataclass(frozen=True, kw_only=True)
class Added(Entry):
    """A request came in: the adapter that meets it, and the SHA-256 of each of its rows."""

    action: Literal["add"] = "add"
    request: Name
    adapter: AdapterFacts
    forget: Annotated[list[Sha256], Field(min_length=1)]


@dataclass(frozen=True, kw_only=True)
class Audited(Entry):
    """The adapter of a request was audited; or, where ``request`` is None, the one that was rebuilt last."""

    action: Literal["audit"] = "audit"
    request: Name | None
    audit: AuditFacts


@dataclass(frozen=True, kw_only=True)
class Withdrawn(Entry):
    """The request was taken back."""

    action: Literal["withdraw"] = "withdraw"
    request: Name


@dataclass(frozen=True, kw_only=True)
class Rebuilt(Entry):
    """One adapter was made of those of all open requests."""

    action: Literal["rebuild"] = "rebuild"
    adapter: AdapterFacts


AnyEntry = Added | Audited | Withdrawn | Rebuilt
_Kind = TypeVar("_Kind", bound=Entry)


@dataclass(frozen=True)
class _File:
    __pydantic_config__ = ConfigDict(extra="forbid")
    format: Literal[1]
    entries: list[Annotated[AnyEntry, Field(discriminator="action")]]


def hash_row(row: Mapping[str, Any]) -> str:
    """SHA-256 of a row as JSON, whatever the order of its keys and the layout of its line."""
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()


def chained(entry: _Kind, entries: Sequence[Entry]) -> _Kind:
    """The entry as the one after ``entries``.

    Raises:
        ValueError: a field has another shape than its annotation says.
    """
    previous = entries[-1].sha256 if entries else BEGINNING
    entry = dataclasses.replace(entry, previous=previous)
    return read_as(type(entry), {**dataclasses.asdict(entry), "sha256": _hash(dataclasses.asdict(entry))})


def read_entries(values: Any) -> list[AnyEntry]:
    """The entries in a ledger's JSON.

    Raises:
        ValueError: it is no ledger, or an entry is not as it was written, or one before it is missing.
    """
    entries = read_as(_File, values).entries
    previous = BEGINNING
    for number, (entry, raw) in enumerate(zip(entries, values["entries"], strict=True), start=1):
        if _hash(raw) != entry.sha256:
            raise ValueError(f"entry {number} ({entry.action}, {entry.date}) is not what was written")
        if entry.previous != previous:
            raise ValueError(f"entry {number} ({entry.action}, {entry.date}) does not follow the one before it")
        previous = entry.sha256
    return entries


def _hash(values: Mapping[str, Any]) -> str:
    """SHA-256 of an entry, without the field that holds it."""
    rest = {key: value for key, value in values.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
