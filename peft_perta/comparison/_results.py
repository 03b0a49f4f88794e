"""The results of a directory: read when a comparison resumes, written after each run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..data import parse_json, read_json, write_file
from ..errors import ConfigError, OutputError
from .settings import SELECTION, ComparisonSettings

CONFIG_NAME, RESULTS_NAME = "config.json", "results.jsonl"
Result = dict[str, Any]
# Method, number of forget authors (None for all rows), seed and measure of forgetting (None for a model that depends on
# none).
Key = tuple[str, int | None, int | None, str | None]


class Results:
    """The results in a directory, one for each run.

    Raises:
        ConfigError: the directory holds results of other settings or of another model.
        OutputError: its results or settings are damaged.
    """

    def __init__(self, directory: Path, settings: ComparisonSettings, testbed_hash: str) -> None:
        self.directory = directory
        record = {"settings": settings.to_dict(), "testbed_sha256": testbed_hash}
        self._results = _read(directory, record)
        write_file(directory / CONFIG_NAME, json.dumps(record, indent=1) + "\n")

    def __contains__(self, key: Key) -> bool:
        return key in self._results

    def add(self, result: Result) -> None:
        """Add a result, and write the file anew: if the process is killed, the file holds the old lines or the new."""
        self._results[_key(result)] = result
        lines = [json.dumps(result) + "\n" for result in self._results.values()]
        write_file(self.directory / RESULTS_NAME, "".join(lines))

    def all(self) -> list[Result]:
        """Every result, those of earlier calls first."""
        return list(self._results.values())


def _key(result: Result) -> Key:
    return result["method"], result["authors"], result["seed"], result.get("matched")


def _read(directory: Path, record: Mapping[str, Any]) -> dict[Key, Result]:
    """The results that the directory holds, checked against our settings and model."""
    if not (directory / CONFIG_NAME).is_file():
        return {}
    try:
        earlier = read_json(directory / CONFIG_NAME)
        ours, theirs = record["settings"], ComparisonSettings.from_dict(earlier["settings"]).to_dict()
        differing = [name for name in ours if name not in SELECTION and ours[name] != theirs[name]]
        same_model = earlier["testbed_sha256"] == record["testbed_sha256"]
        path = directory / RESULTS_NAME
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        results = {_key(result): result for result in map(parse_json, lines)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{directory} holds a damaged comparison ({error!r}); choose another output") from error
    if not results:  # a run that was refused, or killed at its beginning, is in nobody's way
        return {}
    if differing:
        name = differing[0]
        raise ConfigError(
            f"{directory} holds results with {name} = {theirs[name]!r}, found {ours[name]!r} here; only "
            f"{', '.join(SELECTION)} may differ: choose another output"
        )
    if not same_model:
        raise ConfigError(f"{directory} holds results of another model or other rows; choose another output")
    return results
