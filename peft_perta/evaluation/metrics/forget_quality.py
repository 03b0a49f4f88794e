"""Forget quality: can the unlearned model be told from one that never saw the forget rows?"""

from __future__ import annotations

from collections.abc import Sequence, Set

from .log_rows import LogRows, Unavailable, from_retain_only
from .truth_ratio import logged_truth_ratios


def forget_quality(ratios: Sequence[float], retain_only_ratios: Sequence[float]) -> float:
    """The p-value in [0, 1] of a two-sample Kolmogorov-Smirnov test between two models' truth ratios.

    Args:
        ratios: [N], of the unlearned model on the forget rows.
        retain_only_ratios: [M], of a model that was trained on the retain rows alone.

    Raises:
        ValueError: one of the two is empty.

    Reference: TOFU (Maini et al. 2024, arXiv 2401.06121).
    """
    from scipy.stats import ks_2samp  # importing it takes a second, and few runs need it

    if not len(ratios) or not len(retain_only_ratios):
        raise ValueError(f"expected truth ratios of both models, found {len(ratios)} and {len(retain_only_ratios)}")
    return float(ks_2samp(list(ratios), list(retain_only_ratios)).pvalue)  # type: ignore[attr-defined]


def aggregate_forget_quality(log: LogRows, retain_only: LogRows | None, metric: str) -> float:
    """``forget_quality`` of the two logs' truth ratios on the forget split."""
    ratios = logged_truth_ratios(log, "forget")
    if retain_only is None:
        raise Unavailable("it compares with a retain-only model, whose log was not given")
    return forget_quality(ratios.tolist(), from_retain_only(logged_truth_ratios, retain_only, "forget").tolist())


def has_forget_truth_ratio(names: Set[str]) -> bool:
    """Whether the forget split's truth ratio is among the metrics."""
    return any(name.lower() == "forget_truth_ratio" for name in names)
