"""What entries of the ledger have in common: an adapter's facts, a day, and a check of their shapes."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import TypeVar

from ...data import read_as, read_json
from ...errors import AdapterError, ConfigError
from ...model import (
    CONFIG_NAME,
    check_adapter_files,
    find_adapter,
    hash_factors,
    hash_file,
    identify_base_files,
    recorded_base,
)
from .entries import AdapterFacts, BaseFacts, Entry, chained

_Kind = TypeVar("_Kind", bound=Entry)


def describe_adapter(directory: Path, adapter: str | Path) -> AdapterFacts:
    """What the ledger keeps of an adapter.

    Raises:
        AdapterError: it is no plain LoRA, does not lie below the directory, or the record beside it is damaged.
    """
    check_adapter_files(adapter)
    place = find_adapter(adapter)
    own, above = place.resolve(), directory.resolve()
    if above not in own.parents:
        raise AdapterError(
            f"{adapter} does not lie below {directory}, expected the adapters of a ledger there; copy it"
        )
    recorded = recorded_base(place) or {}
    named = recorded.get("name") or read_json(place / CONFIG_NAME).get("base_model_name_or_path")
    parts = {key: recorded.get(key) for key in ("weights_sha256", "embeddings_sha256", "files")}
    try:
        base = read_as(BaseFacts, {"name": named, **parts})
    except ValueError as error:
        raise AdapterError(f"{adapter}: what it says of its base is damaged ({error}); make it again") from error
    if base["files"] is None and base["name"]:
        base["files"] = identify_base_files(base["name"])
    return {
        "path": own.relative_to(above).as_posix(),
        "factors_sha256": hash_factors(place),
        "config_sha256": hash_file(place / CONFIG_NAME),
        "base": base,
    }


def day_of(date: str | None) -> str:
    """The day, by default today.

    Raises:
        ConfigError: it is none.
    """
    try:
        day = datetime.date.fromisoformat(date) if date is not None else datetime.date.today()
    except ValueError as error:
        raise ConfigError(f"date: expected a day as YYYY-MM-DD, found {date!r}") from error
    return day.isoformat()


def valid_entry(entry: _Kind) -> _Kind:
    """The entry.

    Raises:
        ConfigError: a field is not what it must be, such as a name of several lines.
    """
    try:
        return chained(entry, [])
    except ValueError as error:
        raise ConfigError(f"the entry: {error}; choose another name") from error
