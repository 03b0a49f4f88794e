"""A log as a file: read, written, its stated aggregates, and a table beside recomputed ones."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...data import write_file
from ...errors import DataError

# metric -> {"agg_value": float | None, "value_by_index": {"0": {...} | None, ...}}; a membership attack (mia_*) has
# {"forget": {...}, "holdout": {...}, "auc": float, "agg_value": float} instead.
Log = dict[str, dict[str, Any]]


def read_log(path: str | Path) -> Log:
    """The log in a file, metric -> entry; its rows are checked where they are used.

    Raises:
        DataError: the file is missing, or is not a JSON object.
    """
    try:
        log = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"expected an evaluation log at {path}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}); expected an evaluation log like TOFU_EVAL.json") from error
    if not isinstance(log, dict):
        raise DataError(
            f"{path}: expected a JSON object, metric -> {{agg_value, value_by_index}}, found a {type(log).__name__}"
        )
    return log


def write_log(log: Mapping[str, Any], path: str | Path) -> None:
    """Write the log as JSON, its metrics in the order of their names, whole or not at all.

    Raises:
        DataError: it holds a NaN or an infinity, which are not JSON.
        OutputError: the file cannot be written.
    """
    try:
        text = json.dumps(dict(sorted(log.items())), indent=4, allow_nan=False)
    except ValueError as error:
        raise DataError(f"the log for {path} holds a number that JSON has no name for ({error})") from error
    write_file(path, text + "\n")


def summary(log: Mapping[str, Any]) -> dict[str, float]:
    """metric -> aggregate, of the metrics that have one: open-unlearning's TOFU_SUMMARY.json."""
    found = {metric: logged_value(log, metric) for metric in sorted(log)}
    return {metric: value for metric, value in found.items() if value is not None}


def format_rescored(log: Mapping[str, Any], results: Mapping[str, Any], left_out: Mapping[str, str]) -> str:
    """A table of what ``rescore`` gave beside what the log states."""
    width = max(map(len, [*results, *left_out, "metric"])) + 2
    lines = [f"{'metric':<{width}}{'recomputed':>18}{'as logged':>18}{'difference':>12}"]
    for metric, found in results.items():
        value, logged = found["agg_value"], logged_value(log, metric)
        stated = "-" if logged is None else f"{logged:.10g}"
        difference = "-" if logged is None else f"{value - logged:.1e}" if value != logged else "0"
        lines.append(f"{metric:<{width}}{value:>18.10g}{stated:>18}{difference:>12}")
    lines += [f"{metric:<{width}}left out: {reason}" for metric, reason in left_out.items()]
    return "\n".join(lines)


def logged_value(log: Mapping[str, Any], metric: str) -> float | None:
    """The aggregate that the log itself states."""
    entry = log.get(metric)
    value = entry.get("agg_value") if isinstance(entry, Mapping) else None
    return float(value) if value is not None and is_finite(value) else None


def is_finite(number: Any) -> bool:
    return isinstance(number, (int, float)) and not isinstance(number, bool) and abs(number) <= sys.float_info.max
