"""Recompute every aggregate of a log from its rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from ...errors import DataError
from ..metrics.log_rows import LogRows, Unavailable
from ..metrics.table import METRICS, computable_metrics, metric_of
from .files import Log


def row_values(log: Mapping[str, Any], metric: str, field: str, *, where: str = "the log") -> list[float]:
    """The rows' numbers under ``field``, [rows]: the mean of a row that lists several. Null rows are left out.

    Args:
        log: metric -> entry.
        metric: whose rows are read.
        field: of each row.
        where: the log's name in messages.

    Raises:
        DataError: the log does not hold the rows, or a number is not finite; the message names the row.
    """
    try:
        return [fmean(numbers) for numbers in LogRows(log, where).values(metric, field).values()]
    except Unavailable as missing:
        raise DataError(f"{where}: {missing}; expected an evaluation log like TOFU_EVAL.json") from None


def row_texts(log: Mapping[str, Any], metric: str, fields: Sequence[str], where: str) -> dict[str, list[str]]:
    """The rows' texts, index -> one for each of ``fields``. Null rows are left out; a metric without rows has none.

    Raises:
        DataError: a row lacks such a text; the message names the row.
    """
    try:
        rows = LogRows(log, where).rows(metric)
    except Unavailable:
        return {}
    texts = {index: [row.get(field) for field in fields] for index, row in rows.items() if row is not None}
    for index, of_row in texts.items():
        for field, text in zip(fields, of_row, strict=True):
            if not isinstance(text, str):
                raise DataError(f"{where}: {metric}, row {index}: expected {field!r} as text, found {text!r:.60}")
    return texts  # type: ignore[return-value]


def rescore(
    log: Mapping[str, Any],
    retain_only: Mapping[str, Any] | None = None,
    *,
    where: str = "the log",
    retain_only_where: str = "the retain-only log",
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Recompute every aggregate from the rows, never from another aggregate of the log.

    Truth ratios are computed from the answers' losses, and from the logged ratios only where the losses are missing.
    Null rows (answers without a token) are left out of the means, as in open-unlearning.

    Args:
        log: metric -> entry.
        retain_only: the log of a retain-only model, against which forget_quality and privleak are measured. Without it
            there is no forget_quality, and privleak is measured against an area of 0.5.
        where: the log's name in messages, such as its path.
        retain_only_where: the same for the retain-only log.

    Returns:
        metric -> {"agg_value": float}, and for each metric that could not be computed the reason.

    Raises:
        DataError: an entry is malformed, a number is not finite (the message names metric and row), or no metric can
            be computed.
    """
    rows = LogRows(log, where)
    retain_only_rows = LogRows(retain_only, retain_only_where) if retain_only is not None else None
    results: dict[str, dict[str, float]] = {}
    left_out: dict[str, str] = {}
    for metric in sorted(computable_metrics(set(log))):
        try:
            value = _recompute(rows, retain_only_rows, metric)
        except Unavailable as reason:
            left_out[metric] = str(reason)
            continue
        if not math.isfinite(value):
            raise DataError(f"{where}: {metric} is {value}; expected rows within their bounds, check its losses")
        results[metric] = {"agg_value": value}
    if not results:
        reasons = "; ".join(f"{metric}: {reason}" for metric, reason in list(left_out.items())[:3])
        raise DataError(
            f"{where}: expected rows (value_by_index) of at least one known metric, found none"
            f"{f' ({reasons})' if reasons else ''}; give a log like TOFU_EVAL.json"
        )
    return results, left_out


def _recompute(log: LogRows, retain_only: LogRows | None, metric: str) -> float:
    aggregate = metric_of(metric).aggregate
    if aggregate is None:
        raise Unavailable("unknown metric: there is no rule to aggregate it")
    return aggregate(log, retain_only, metric)


def aggregate(log: Mapping[str, Any], retain_only: Mapping[str, Any] | None = None) -> Log:
    """The log with every aggregate filled in, sorted by metric.

    An aggregate is None where the rows do not give it, such as forget_quality without a retain-only model.

    Args:
        log: metric -> entry.
        retain_only: the log of a retain-only model, as for ``rescore``.

    Raises:
        DataError: as for ``rescore``; or the retain-only log lacks the rows that a metric is measured against.
    """
    results, left_out = rescore(log, retain_only)
    if retain_only is not None:
        compared = [name for name, metric in METRICS.items() if metric.retain_only_rows is not None]
        check_retain_only(retain_only, [metric for metric in compared if metric in left_out])
    rows = LogRows(log, "the log")
    filled = dict(log)
    for metric in left_out:
        if metric_of(metric).aggregate is not None:
            filled[metric] = {**(log.get(metric) or {}), "agg_value": None}
    for metric, result in results.items():
        entry = dict(log.get(metric) or {})
        parts = metric_of(metric).parts
        for part in parts:
            mean = fmean(fmean(scores) for scores in rows.values(metric, "score", part).values())
            entry[part] = {**entry[part], "agg_value": mean}
        if parts:
            entry["auc"] = result["agg_value"]
        filled[metric] = {**entry, **result}
    return dict(sorted(filled.items()))


def check_retain_only(
    retain_only: Mapping[str, Any], metrics: Sequence[str], *, where: str = "the retain-only log"
) -> None:
    """Check that a retain-only log holds the rows that these metrics (forget_quality, privleak) are measured against.

    Raises:
        DataError: it lacks them, or the rows are malformed.
    """
    for metric in metrics:
        read = METRICS[metric].retain_only_rows
        assert read is not None, f"{metric} is not measured against a retain-only model"
        try:
            read(LogRows(retain_only, where))
        except Unavailable as missing:
            raise DataError(
                f"{where}: {missing}; {metric} is measured against the log of a retain-only model"
            ) from None
