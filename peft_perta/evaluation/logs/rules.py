"""From rows to an aggregate: a rule a kind of metric, found by the metric's name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from statistics import fmean
from typing import Any

import torch

from ...errors import DataError
from ..metrics.forget_quality import forget_quality
from ..metrics.membership import area_under_curve, privacy_leakage
from ..metrics.truth_ratio import forget_truth_score, retain_truth_score, truth_ratio
from ..metrics.utility import model_utility, normalised_probability
from .source import Source, Unavailable

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


PARTS = ("forget", "holdout")  # of an attack


def _truth_ratios(source: Source, split: str) -> torch.Tensor:
    """[rows], float64: from the answers' losses, or as logged where the log does not hold these."""
    believed, canonical = _TRUE_ANSWERS[split]
    try:
        pairs = source.pairs(believed, f"{split}_Q_A_PERT_Prob", "avg_loss")
    except Unavailable as missing:
        return torch.tensor(_logged_ratios(source, canonical, missing), dtype=torch.float64)
    true = torch.tensor([fmean(losses) for losses, _ in pairs], dtype=torch.float64)
    return truth_ratio(true, [torch.tensor(losses, dtype=torch.float64) for _, losses in pairs])


def _logged_ratios(source: Source, canonical: str, missing: Unavailable) -> list[float]:
    named = [metric for metric in source.log if metric.lower() == canonical.lower()]
    for metric in sorted(named, key=lambda name: name != canonical):
        for field in ("score", "truth_ratio"):  # the latter in logs from before open-unlearning's first release
            try:
                return [fmean(numbers) for numbers in source.values(metric, field).values()]
            except Unavailable:
                continue
    raise Unavailable(f"{missing}, and {canonical} has no rows with 'score'") from None


def _truth_score(source: Source, retain_only: Source | None, metric: str) -> float:
    split = metric.split("_")[0].lower()
    score = forget_truth_score if split == "forget" else retain_truth_score
    return score(_truth_ratios(source, split))


def _forget_quality(source: Source, retain_only: Source | None, metric: str) -> float:
    ours = _truth_ratios(source, "forget")
    if retain_only is None:
        raise Unavailable("it compares with a retain-only model, whose log was not given")
    return forget_quality(ours.tolist(), _of_retain_only(_truth_ratios, retain_only, "forget").tolist())


def attack_area(source: Source, retain_only: Source | None, metric: str) -> float:
    forget, holdout = ([fmean(numbers) for numbers in source.values(metric, "score", part).values()] for part in PARTS)
    return area_under_curve(forget, holdout)


def _privacy(source: Source, retain_only: Source | None, metric: str) -> float:
    area = attack_area(source, None, _PRIVACY_ATTACK)
    if retain_only is None:
        return privacy_leakage(area)
    return privacy_leakage(area, _of_retain_only(attack_area, retain_only, None, _PRIVACY_ATTACK))


def _of_retain_only(compute: Callable[..., Any], retain_only: Source, *arguments: Any) -> Any:
    try:
        return compute(retain_only, *arguments)
    except Unavailable as missing:
        raise Unavailable(f"in {retain_only.where} {missing}") from None


def _normalised(source: Source, retain_only: Source | None, metric: str) -> float:
    split = metric.split("_")[0]
    try:
        pairs = source.pairs(f"{split}_Q_A_Prob", f"{split}_Q_A_PERT_Prob", "prob")
    except Unavailable:
        return _mean("prob")(source, retain_only, metric)
    return fmean(normalised_probability(fmean(true), false) for true, false in pairs)


def _model_utility(source: Source, retain_only: Source | None, metric: str) -> float:
    values, reasons = [], []
    for part in _UTILITY:
        try:
            values.append(recompute(source, None, part))
        except Unavailable as missing:
            reasons.append(str(missing))
    if reasons:
        raise Unavailable(f"it needs {len(_UTILITY)} metrics, and {'; '.join(reasons)}")
    if min(values) < 0:
        raise DataError(f"{source.where}: model_utility: expected parts of at least 0, found {min(values)}")
    return model_utility(values)


def _mean(field: str) -> Callable[[Source, Source | None, str], float]:
    def rule(source: Source, retain_only: Source | None, metric: str) -> float:
        return fmean(fmean(numbers) for numbers in source.values(metric, field).values())

    return rule


_RULES = tuple(
    (re.compile(pattern), rule)
    for pattern, rule in (
        ("forget_quality", _forget_quality),
        ("model_utility", _model_utility),
        ("privleak", _privacy),
        ("mia_.+", attack_area),
        ("(?i:(forget|retain|ra|wf)_truth_ratio)", _truth_score),
        ("(ra|wf)_Q_A_Prob_normalised", _normalised),
        (".+_Prob(_normalised)?", _mean("prob")),
        (".+_(knowmem|verbmem)_ROUGE", _mean("rougeL_f1")),  # MUSE
        (".+_ROUGE", _mean("rougeL_recall")),
        ("(.+_)?(extraction_strength|exact_memorization|gibberish)", _mean("score")),
        ("(.+_)?acc(uracy)?(_.+)?", _mean("score")),  # multiple choice
    )
)


NEEDS_RETAIN_ONLY: dict[str, Callable[[Source], Any]] = {
    "forget_quality": lambda retain_only: _truth_ratios(retain_only, "forget"),
    "privleak": lambda retain_only: attack_area(retain_only, None, _PRIVACY_ATTACK),
}


def rule_of(metric: str) -> Callable[[Source, Source | None, str], float] | None:
    return next((rule for pattern, rule in _RULES if pattern.fullmatch(metric)), None)


def recompute(source: Source, retain_only: Source | None, metric: str) -> float:
    rule = rule_of(metric)
    if rule is None:
        raise Unavailable("not a metric that we know how to aggregate")
    return rule(source, retain_only, metric)


def candidates(log: Mapping[str, Any]) -> list[str]:
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
