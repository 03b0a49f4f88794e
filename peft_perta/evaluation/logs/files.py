"""Evaluation logs as files: reading, writing, summaries, and a table of recomputed aggregates."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...data import is_number, read_json, write_file
from ...errors import DataError

# metric -> {"agg_value": float | None, "value_by_index": {"0": {...} | None, ...}}. The entry of a membership attack
# (mia_*) is {"forget": {...}, "holdout": {...}, "auc": float, "agg_value": float}, with rows in each of the two parts.
Log = dict[str, dict[str, Any]]


def read_log(path: str | Path) -> Log:
    """Read the log in a file, metric -> entry. The rows are checked when they are used.

    Raises:
        DataError: the file is missing, or is not a JSON object.
    """
    try:
        log = read_json(path)
    except OSError as error:
        raise DataError(f"expected an evaluation log at {path}: {error}") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); expected an evaluation log like TOFU_EVAL.json") from error
    if not isinstance(log, dict):
        raise DataError(
            f"{path}: expected a JSON object, metric -> {{agg_value, value_by_index}}, found a {type(log).__name__}"
        )
    return log


def write_log(log: Mapping[str, Any], path: str | Path) -> None:
    """Write the log as JSON with its metrics sorted by name. The file is replaced as a whole or left as it was.

    Raises:
        DataError: the log holds a NaN or an infinity, which JSON cannot express.
        OutputError: the file cannot be written.
    """
    try:
        text = json.dumps(dict(sorted(log.items())), indent=4, allow_nan=False)
    except ValueError as error:
        raise DataError(f"the log for {path} holds a number that JSON cannot express ({error})") from error
    write_file(path, text + "\n")


def summary(log: Mapping[str, Any]) -> dict[str, float]:
    """metric -> aggregate, for the metrics that have one; the content of open-unlearning's TOFU_SUMMARY.json."""
    aggregates = {metric: logged_value(log, metric) for metric in sorted(log)}
    return {metric: value for metric, value in aggregates.items() if value is not None}


def format_rescored(log: Mapping[str, Any], results: Mapping[str, Any], left_out: Mapping[str, str]) -> str:
    """A table of the aggregates that ``rescore`` computed beside those in the log."""
    width = max(map(len, [*results, *left_out, "metric"])) + 2
    lines = [f"{'metric':<{width}}{'recomputed':>18}{'as logged':>18}{'difference':>12}"]
    for metric, entry in results.items():
        value, logged = entry["agg_value"], logged_value(log, metric)
        stated = "-" if logged is None else f"{logged:.10g}"
        difference = "-" if logged is None else f"{value - logged:.1e}" if value != logged else "0"
        lines.append(f"{metric:<{width}}{value:>18.10g}{stated:>18}{difference:>12}")
    lines += [f"{metric:<{width}}left out: {reason}" for metric, reason in left_out.items()]
    return "\n".join(lines)


def logged_value(log: Mapping[str, Any], metric: str) -> float | None:
    """The aggregate of a metric as the log states it; None where it states none."""
    entry = log.get(metric)
    value = entry.get("agg_value") if isinstance(entry, Mapping) else None
    return float(value) if is_number(value) else None
