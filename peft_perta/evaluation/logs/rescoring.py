"""Every aggregate anew from the rows, on its own or put into the log."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from ...errors import DataError
from .files import Log
from .rules import NEEDS_RETAIN_ONLY, PARTS, attack_area, candidates, recompute, rule_of
from .source import Source, Unavailable


def row_values(log: Mapping[str, Any], metric: str, field: str, *, where: str = "the log") -> list[float]:
    """What the rows of a metric hold under ``field``, [rows]: a row's mean where it lists several; without null rows.

    Args:
        where: what messages call the log.

    Raises:
        DataError: the log does not hold them, or one is no finite number; the message names the row.
    """
    try:
        return [fmean(numbers) for numbers in Source(log, where).values(metric, field).values()]
    except Unavailable as missing:
        raise DataError(f"{where}: {missing}; expected an evaluation log like TOFU_EVAL.json") from None


def rescore(
    log: Mapping[str, Any],
    retain_only: Mapping[str, Any] | None = None,
    *,
    where: str = "the log",
    retain_only_where: str = "the retain-only log",
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Every aggregate anew from the rows, never from another aggregate that the log states.

    Truth ratios come from the answers' losses, and from the logged ratios only where these are missing. Rows that are
    null (answers without a token) are left out of their means, as in open-unlearning.

    Args:
        reference: the log of a retain-only model, against which forget_quality and privleak are measured. Without one
            there is no forget_quality, and privleak is taken against an area of 0.5.
        where, reference_where: what messages call the logs; their paths, say.

    Returns:
        metric -> {"agg_value": float}, and what is left out -> the reason.

    Raises:
        DataError: an entry is malformed, or a number is not finite (the message names metric and row); or there is
            nothing to compute.
    """
    source = Source(log, where)
    other = Source(retain_only, retain_only_where) if retain_only is not None else None
    results: dict[str, dict[str, float]] = {}
    left_out: dict[str, str] = {}
    for metric in candidates(log):
        try:
            value = recompute(source, other, metric)
        except Unavailable as reason:
            left_out[metric] = str(reason)
            continue
        if not math.isfinite(value):
            raise DataError(
                f"{where}: {metric} comes out as {value}; expected rows within their bounds, check its losses"
            )
        results[metric] = {"agg_value": value}
    if not results:
        reasons = "; ".join(f"{metric}: {reason}" for metric, reason in list(left_out.items())[:3])
        raise DataError(
            f"{where}: expected rows (value_by_index) of at least one metric that we know, found none"
            f"{f' ({reasons})' if reasons else ''}; give a log like TOFU_EVAL.json"
        )
    return results, left_out


def aggregate(log: Mapping[str, Any], retain_only: Mapping[str, Any] | None = None) -> Log:
    """The log with every aggregate filled in, metrics by name; None where its rows do not give one (forget_quality
    without a retain-only model).

    Raises:
        DataError: as for ``rescore``; or the retain-only model lacks the rows to measure against.
    """
    results, left_out = rescore(log, retain_only)
    if retain_only is not None:
        check_retain_only(retain_only, [metric for metric in NEEDS_RETAIN_ONLY if metric in left_out])
    source = Source(log, "the log")
    filled = dict(log)
    for metric in left_out:
        if rule_of(metric) is not None:
            filled[metric] = {**(log.get(metric) or {}), "agg_value": None}
    for metric, found in results.items():
        entry = dict(log.get(metric) or {})
        if rule_of(metric) is attack_area:
            for part in PARTS:
                mean = fmean(fmean(scores) for scores in source.values(metric, "score", part).values())
                entry[part] = {**entry[part], "agg_value": mean}
            entry["auc"] = found["agg_value"]
        filled[metric] = {**entry, **found}
    return dict(sorted(filled.items()))


def check_retain_only(
    retain_only: Mapping[str, Any], metrics: Sequence[str], *, where: str = "the retain-only log"
) -> None:
    """The log holds what these metrics (forget_quality, privleak) are measured against.

    Raises:
        DataError: it does not, or the rows are malformed.
    """
    for metric in metrics:
        try:
            NEEDS_RETAIN_ONLY[metric](Source(retain_only, where))
        except Unavailable as missing:
            raise DataError(
                f"{where}: {missing}; {metric} is measured against the log of a retain-only model"
            ) from None
