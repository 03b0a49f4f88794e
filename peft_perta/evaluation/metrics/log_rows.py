"""The rows of an evaluation log, checked when they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ...data import is_number
from ...errors import DataError


class Unavailable(Exception):
    """The rows at hand do not give a metric; the message says why."""


@dataclass(frozen=True)
class LogRows:
    """An evaluation log, metric -> entry, and its name in messages."""

    log: Mapping[str, Any]
    where: str

    def rows(self, metric: str, part: str | None = None) -> Mapping[str, Mapping[str, Any] | None]:
        """The rows of a metric, index -> row or None; of one part ('forget', 'holdout') where ``part`` names it.

        Raises:
            Unavailable: the log does not hold them.
            DataError: the entry is malformed; the message names metric and row.
        """
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
        """The rows' numbers under ``field``, index -> [n]: one number or several a row. Null rows are left out.

        Raises:
            Unavailable: no row holds the field, or every row is null.
            DataError: a row holds something else than finite numbers; the message names metric and row.
        """
        name = metric if part is None else f"{metric}.{part}"
        rows = {index: row for index, row in self.rows(metric, part).items() if row is not None}
        if not any(field in row for row in rows.values()):
            raise Unavailable(f"{name} has no rows with {field!r}")
        values = {}
        for index, row in rows.items():
            value = row.get(field, row)  # the message below quotes a row that lacks the field
            if value is None:
                continue
            numbers = value if isinstance(value, list) else [value]
            wrong = [number for number in numbers if not is_number(number)]
            if wrong or not numbers:
                raise DataError(
                    f"{self.where}: {name}, row {index}: expected a finite number as {field!r}, found "
                    f"{_shortened(wrong[0] if wrong else numbers)}; evaluate the row again, or set it to null to leave "
                    "it out"
                )
            values[index] = [float(number) for number in numbers]
        if not values:
            raise Unavailable(f"every row of {name} is null")
        return values

    def pairs(self, first: str, second: str, field: str) -> list[tuple[list[float], list[float]]]:
        """The values of two metrics, row by row; rows that are null in either are left out.

        Raises:
            Unavailable: one of the two is missing, or no row has both.
            DataError: the two do not hold the same rows.
        """
        unmatched = set(self.rows(first)) ^ set(self.rows(second))
        if unmatched:
            raise DataError(
                f"{self.where}: expected the same rows in {first} and {second}, found {len(unmatched)} in only one of "
                f"them, such as row {min(unmatched, key=str)}"
            )
        of_first, of_second = self.values(first, field), self.values(second, field)
        both = [(of_first[index], of_second[index]) for index in of_first if index in of_second]
        if not both:
            raise Unavailable(f"every row of {first} or of {second} is null")
        return both


def from_retain_only(compute: Callable[..., Any], retain_only: LogRows, *arguments: Any) -> Any:
    """``compute(retain_only, *arguments)``; where rows are missing, the reason names the retain-only log."""
    try:
        return compute(retain_only, *arguments)
    except Unavailable as missing:
        raise Unavailable(f"in {retain_only.where} {missing}") from None


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
