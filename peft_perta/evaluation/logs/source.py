"""What a log's rows hold: looked up where it is needed, and checked there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import DataError
from .files import is_finite


class Unavailable(Exception):
    """Why the rows at hand do not give a metric."""


@dataclass(frozen=True)
class Source:
    """A log, and what messages call it."""

    log: Mapping[str, Any]
    where: str

    def rows(self, metric: str, part: str | None = None) -> Mapping[str, Mapping[str, Any] | None]:
        """The rows of a metric, or of one part ('forget', 'holdout') of it."""
        name, entry = metric, self._entry(metric, self.log.get(metric))
        if part is not None:
            name = f"{metric}.{part}"
            entry = self._entry(name, entry.get(part))
        rows = entry.get("value_by_index")
        if rows is None:
            raise Unavailable(f"{name} has no rows (value_by_index)")
        if not isinstance(rows, Mapping):
            raise DataError(
                f"{self.where}: {name}.value_by_index: expected an object, index -> row, found a {type(rows).__name__}"
            )
        for index, row in rows.items():
            if row is not None and not isinstance(row, Mapping):
                raise DataError(
                    f"{self.where}: {name}, row {index}: expected an object or null, found a {type(row).__name__}"
                )
        return rows

    def _entry(self, name: str, entry: Any) -> Mapping[str, Any]:
        if entry is None:
            raise Unavailable(f"{name} is missing")
        if not isinstance(entry, Mapping):
            raise DataError(
                f"{self.where}: {name}: expected an object with value_by_index, found a {type(entry).__name__}; a "
                "summary holds no rows, give the whole log (TOFU_EVAL.json)"
            )
        return entry

    def values(self, metric: str, field: str, part: str | None = None) -> dict[str, list[float]]:
        """What the rows hold under ``field``, a number or several each, index -> [n]; null rows are left out."""
        name = metric if part is None else f"{metric}.{part}"
        rows = {index: row for index, row in self.rows(metric, part).items() if row is not None}
        if not any(field in row for row in rows.values()):
            raise Unavailable(f"{name} has no rows with {field!r}")
        found = {}
        for index, row in rows.items():
            value = row.get(field, row)  # a row without the field is told as it is
            if value is None:
                continue
            numbers = value if isinstance(value, list) else [value]
            wrong = [number for number in numbers if not is_finite(number)]
            if wrong or not numbers:
                raise DataError(
                    f"{self.where}: {name}, row {index}: expected a finite number as {field!r}, found "
                    f"{_shown(wrong[0] if wrong else numbers)}; evaluate the row anew, or make it null to leave it out"
                )
            found[index] = [float(number) for number in numbers]
        if not found:
            raise Unavailable(f"every row of {name} is null")
        return found

    def pairs(self, first: str, second: str, field: str) -> list[tuple[list[float], list[float]]]:
        """Both metrics' values, row by row, of the rows that are null in neither."""
        alone = set(self.rows(first)) ^ set(self.rows(second))
        if alone:
            raise DataError(
                f"{self.where}: expected the same rows in {first} and {second}, found {len(alone)} in one alone, row "
                f"{min(alone, key=str)} among them"
            )
        ours, theirs = self.values(first, field), self.values(second, field)
        both = [(ours[index], theirs[index]) for index in ours if index in theirs]
        if not both:
            raise Unavailable(f"every row of {first} or of {second} is null")
        return both


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
