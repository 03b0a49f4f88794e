"""Evaluation logs as open-unlearning lays them out: read, written, and every aggregate taken anew from the rows."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from .errors import DataError
from .metrics import (
    area_under_curve,
    forget_quality,
    forget_truth_score,
    model_utility,
    normalised_probability,
    privacy_leakage,
    retain_truth_score,
    truth_ratio,
)
from .output import write_file

# metric -> {"agg_value": float | None, "value_by_index": {"0": {...} | None, ...}}; a membership attack (mia_*) has
# {"forget": {...}, "holdout": {...}, "auc": float, "agg_value": float} instead.
Log = dict[str, dict[str, Any]]

# Split -> the metric that holds its true answers' losses, and the name of its truth ratio.
_TRUE_ANSWERS = {
    "forget": ("forget_Q_A_PARA_Prob", "forget_truth_ratio"),
    "retain": ("retain_Q_A_PARA_Prob", "retain_Truth_Ratio"),
    "ra": ("ra_Q_A_Prob", "ra_Truth_Ratio"),  # real authors and world facts come without paraphrases
    "wf": ("wf_Q_A_Prob", "wf_Truth_Ratio"),
}
_UTILITY = (
    "retain_Q_A_Prob",
    "retain_Q_A_ROUGE",
    "retain_Truth_Ratio",
    "ra_Q_A_Prob_normalised",
    "ra_Q_A_ROUGE",
    "ra_Truth_Ratio",
    "wf_Q_A_Prob_normalised",
    "wf_Q_A_ROUGE",
    "wf_Truth_Ratio",
)
_PRIVACY_ATTACK = "mia_min_k"
_PARTS = ("forget", "holdout")  # of an attack


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
    found = {metric: _logged(log, metric) for metric in sorted(log)}
    return {metric: value for metric, value in found.items() if value is not None}


def row_values(log: Mapping[str, Any], metric: str, field: str, *, where: str = "the log") -> list[float]:
    """What the rows of a metric hold under ``field``, [rows]: a row's mean where it lists several; without null rows.

    Args:
        where: what messages call the log.

    Raises:
        DataError: the log does not hold them, or one is no finite number; the message names the row.
    """
    try:
        return [fmean(numbers) for numbers in _Source(log, where).values(metric, field).values()]
    except _Unavailable as missing:
        raise DataError(f"{where}: {missing}; expected an evaluation log like TOFU_EVAL.json") from None


def rescore(
    log: Mapping[str, Any],
    reference: Mapping[str, Any] | None = None,
    *,
    where: str = "the log",
    reference_where: str = "the reference log",
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
    source = _Source(log, where)
    other = _Source(reference, reference_where) if reference is not None else None
    results: dict[str, dict[str, float]] = {}
    left_out: dict[str, str] = {}
    for metric in _candidates(log):
        try:
            value = _recompute(source, other, metric)
        except _Unavailable as reason:
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


def aggregate(log: Mapping[str, Any], reference: Mapping[str, Any] | None = None) -> Log:
    """The log with every aggregate filled in, metrics by name; None where its rows do not give one (forget_quality
    without a reference).

    Raises:
        DataError: as for ``rescore``; or the reference lacks the rows to measure against.
    """
    results, left_out = rescore(log, reference)
    if reference is not None:
        check_reference(reference, [metric for metric in _REFERENCED if metric in left_out])
    source = _Source(log, "the log")
    filled = dict(log)
    for metric in left_out:
        if _rule(metric) is not None:
            filled[metric] = {**(log.get(metric) or {}), "agg_value": None}
    for metric, found in results.items():
        entry = dict(log.get(metric) or {})
        if _rule(metric) is _attack:
            for part in _PARTS:
                mean = fmean(fmean(scores) for scores in source.values(metric, "score", part).values())
                entry[part] = {**entry[part], "agg_value": mean}
            entry["auc"] = found["agg_value"]
        filled[metric] = {**entry, **found}
    return dict(sorted(filled.items()))


def check_reference(reference: Mapping[str, Any], metrics: Sequence[str], *, where: str = "the reference log") -> None:
    """The log holds what these metrics (forget_quality, privleak) are measured against.

    Raises:
        DataError: it does not, or the rows are malformed.
    """
    for metric in metrics:
        try:
            _REFERENCED[metric](_Source(reference, where))
        except _Unavailable as missing:
            raise DataError(
                f"{where}: {missing}; {metric} is measured against the log of a retain-only model"
            ) from None


def format_rescored(log: Mapping[str, Any], results: Mapping[str, Any], left_out: Mapping[str, str]) -> str:
    """A table of what ``rescore`` gave beside what the log states."""
    width = max(map(len, [*results, *left_out, "metric"])) + 2
    lines = [f"{'metric':<{width}}{'recomputed':>18}{'as logged':>18}{'difference':>12}"]
    for metric, found in results.items():
        value, logged = found["agg_value"], _logged(log, metric)
        stated = "-" if logged is None else f"{logged:.10g}"
        difference = "-" if logged is None else f"{value - logged:.1e}" if value != logged else "0"
        lines.append(f"{metric:<{width}}{value:>18.10g}{stated:>18}{difference:>12}")
    lines += [f"{metric:<{width}}left out: {reason}" for metric, reason in left_out.items()]
    return "\n".join(lines)


class _Unavailable(Exception):
    """Why the rows at hand do not give a metric."""


@dataclass(frozen=True)
class _Source:
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
            raise _Unavailable(f"{name} has no rows (value_by_index)")
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
            raise _Unavailable(f"{name} is missing")
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
            raise _Unavailable(f"{name} has no rows with {field!r}")
        found = {}
        for index, row in rows.items():
            value = row.get(field, row)  # a row without the field is told as it is
            if value is None:
                continue
            numbers = value if isinstance(value, list) else [value]
            wrong = [number for number in numbers if not _is_finite(number)]
            if wrong or not numbers:
                raise DataError(
                    f"{self.where}: {name}, row {index}: expected a finite number as {field!r}, found "
                    f"{_shown(wrong[0] if wrong else numbers)}; evaluate the row anew, or make it null to leave it out"
                )
            found[index] = [float(number) for number in numbers]
        if not found:
            raise _Unavailable(f"every row of {name} is null")
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
            raise _Unavailable(f"every row of {first} or of {second} is null")
        return both


def _is_finite(number: Any) -> bool:
    return isinstance(number, (int, float)) and not isinstance(number, bool) and abs(number) <= sys.float_info.max


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _logged(log: Mapping[str, Any], metric: str) -> float | None:
    """The aggregate that the log itself states."""
    entry = log.get(metric)
    value = entry.get("agg_value") if isinstance(entry, Mapping) else None
    return float(value) if value is not None and _is_finite(value) else None


# What follows: source, reference, metric -> its aggregate, one function a kind of metric.


def _truth_ratios(source: _Source, split: str) -> torch.Tensor:
    """[rows], float64: from the answers' losses, or as logged where the log does not hold these."""
    believed, canonical = _TRUE_ANSWERS[split]
    try:
        pairs = source.pairs(believed, f"{split}_Q_A_PERT_Prob", "avg_loss")
    except _Unavailable as missing:
        return torch.tensor(_logged_ratios(source, canonical, missing), dtype=torch.float64)
    true = torch.tensor([fmean(losses) for losses, _ in pairs], dtype=torch.float64)
    return truth_ratio(true, [torch.tensor(losses, dtype=torch.float64) for _, losses in pairs])


def _logged_ratios(source: _Source, canonical: str, missing: _Unavailable) -> list[float]:
    named = [metric for metric in source.log if metric.lower() == canonical.lower()]
    for metric in sorted(named, key=lambda name: name != canonical):
        for field in ("score", "truth_ratio"):  # the latter in logs from before open-unlearning's first release
            try:
                return [fmean(numbers) for numbers in source.values(metric, field).values()]
            except _Unavailable:
                continue
    raise _Unavailable(f"{missing}, and {canonical} has no rows with 'score'") from None


def _truth_score(source: _Source, reference: _Source | None, metric: str) -> float:
    split = metric.split("_")[0].lower()
    score = forget_truth_score if split == "forget" else retain_truth_score
    return score(_truth_ratios(source, split))


def _forget_quality(source: _Source, reference: _Source | None, metric: str) -> float:
    ours = _truth_ratios(source, "forget")
    if reference is None:
        raise _Unavailable("it compares with a retain-only model, whose log was not given")
    return forget_quality(ours.tolist(), _of_reference(_truth_ratios, reference, "forget").tolist())


def _attack(source: _Source, reference: _Source | None, metric: str) -> float:
    forget, holdout = ([fmean(numbers) for numbers in source.values(metric, "score", part).values()] for part in _PARTS)
    return area_under_curve(forget, holdout)


def _privacy(source: _Source, reference: _Source | None, metric: str) -> float:
    area = _attack(source, None, _PRIVACY_ATTACK)
    if reference is None:
        return privacy_leakage(area)
    return privacy_leakage(area, _of_reference(_attack, reference, None, _PRIVACY_ATTACK))


def _of_reference(compute: Callable[..., Any], reference: _Source, *arguments: Any) -> Any:
    try:
        return compute(reference, *arguments)
    except _Unavailable as missing:
        raise _Unavailable(f"in {reference.where} {missing}") from None


def _normalised(source: _Source, reference: _Source | None, metric: str) -> float:
    split = metric.split("_")[0]
    try:
        pairs = source.pairs(f"{split}_Q_A_Prob", f"{split}_Q_A_PERT_Prob", "prob")
    except _Unavailable:
        return _mean("prob")(source, reference, metric)
    return fmean(normalised_probability(fmean(true), false) for true, false in pairs)


def _model_utility(source: _Source, reference: _Source | None, metric: str) -> float:
    values, reasons = [], []
    for part in _UTILITY:
        try:
            values.append(_recompute(source, None, part))
        except _Unavailable as missing:
            reasons.append(str(missing))
    if reasons:
        raise _Unavailable(f"it needs {len(_UTILITY)} metrics, and {'; '.join(reasons)}")
    if min(values) < 0:
        raise DataError(f"{source.where}: model_utility: expected parts of at least 0, found {min(values)}")
    return model_utility(values)


def _mean(field: str) -> Callable[[_Source, _Source | None, str], float]:
    def rule(source: _Source, reference: _Source | None, metric: str) -> float:
        return fmean(fmean(numbers) for numbers in source.values(metric, field).values())

    return rule


_RULES = tuple(
    (re.compile(pattern), rule)
    for pattern, rule in (
        ("forget_quality", _forget_quality),
        ("model_utility", _model_utility),
        ("privleak", _privacy),
        ("mia_.+", _attack),
        ("(?i:(forget|retain|ra|wf)_truth_ratio)", _truth_score),
        ("(ra|wf)_Q_A_Prob_normalised", _normalised),
        (".+_Prob(_normalised)?", _mean("prob")),
        (".+_(knowmem|verbmem)_ROUGE", _mean("rougeL_f1")),  # MUSE
        (".+_ROUGE", _mean("rougeL_recall")),
        ("(.+_)?(extraction_strength|exact_memorization|gibberish)", _mean("score")),
        ("(.+_)?acc(uracy)?(_.+)?", _mean("score")),  # multiple choice
    )
)
_REFERENCED: dict[str, Callable[[_Source], Any]] = {
    "forget_quality": lambda reference: _truth_ratios(reference, "forget"),
    "privleak": lambda reference: _attack(reference, None, _PRIVACY_ATTACK),
}


def _rule(metric: str) -> Callable[[_Source, _Source | None, str], float] | None:
    return next((rule for pattern, rule in _RULES if pattern.fullmatch(metric)), None)


def _recompute(source: _Source, reference: _Source | None, metric: str) -> float:
    rule = _rule(metric)
    if rule is None:
        raise _Unavailable("not a metric that we know how to aggregate")
    return rule(source, reference, metric)


def _candidates(log: Mapping[str, Any]) -> list[str]:
    """The log's metrics, and those that follow from them."""
    names, lowered = set(log), {metric.lower() for metric in log}
    for split, (believed, ratio) in _TRUE_ANSWERS.items():
        perturbed = f"{split}_Q_A_PERT_Prob"
        if ratio.lower() not in lowered and {believed, perturbed} <= set(log):
            names.add(ratio)
        if split in ("ra", "wf") and {believed, perturbed} <= set(log):
            names.add(f"{split}_Q_A_Prob_normalised")
    if any(metric.lower() == "forget_truth_ratio" for metric in names):
        names.add("forget_quality")
    if _PRIVACY_ATTACK in log:
        names.add("privleak")
    if names & set(_UTILITY):
        names.add("model_utility")
    return sorted(names)
