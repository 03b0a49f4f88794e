"""Could the unlearned model be told from one that never saw the forget set?"""

from __future__ import annotations

from collections.abc import Sequence


def forget_quality(ratios: Sequence[float], retain_only_ratios: Sequence[float]) -> float:
    """The p-value of a two-sample Kolmogorov-Smirnov test between two models' truth ratios: [N], [M] -> [0, 1].

    Args:
        ratios: of the unlearned model on the forget set.
        reference_ratios: of a model that was trained on the retain set alone.

    Raises:
        ValueError: one of them is empty.

    Reference: TOFU (Maini et al. 2024, arXiv 2401.06121).
    """
    from scipy.stats import ks_2samp  # takes a second to import, and few need it

    if not len(ratios) or not len(retain_only_ratios):
        raise ValueError(f"expected truth ratios of both models, found {len(ratios)} and {len(retain_only_ratios)}")
    return float(ks_2samp(list(ratios), list(retain_only_ratios)).pvalue)  # type: ignore[attr-defined]
