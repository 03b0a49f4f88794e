"""Model utility: what the model can still do."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, harmonic_mean

from ...errors import DataError
from .log_rows import LogRows, Unavailable
from .metric import Aggregate, mean_of
from .truth_ratio import aggregate_truth_ratio


def normalised_probability(true_probability: float, false_probabilities: Sequence[float]) -> float:
    """The true answer's share of the probability of all options, in [0, 1].

    Reference: TOFU (Maini et al. 2024, arXiv 2401.06121); 1e-10 in the denominator is open-unlearning's.
    """
    return true_probability / (true_probability + sum(false_probabilities) + 1e-10)


def model_utility(values: Sequence[float]) -> float:
    """The harmonic mean of the scores on everything but the forget rows; 0 where one of them is 0.

    Raises:
        ValueError: there are no values, or one is negative.

    Reference: TOFU (Maini et al. 2024, arXiv 2401.06121): of nine numbers, probability, ROUGE-L recall and truth score
    on retain set, real authors and world facts.
    """
    if not values or not all(value >= 0 for value in values):
        raise ValueError(f"expected numbers of at least 0 for the harmonic mean, found {list(values)}")
    return float(harmonic_mean(values))  # harmonic_mean gives the int 0 where a value is 0


def aggregate_normalised(log: LogRows, retain_only: LogRows | None, metric: str) -> float:
    """The mean normalised probability of a split: from the answers' probabilities, else as logged."""
    split = metric.split("_")[0]
    try:
        pairs = log.pairs(f"{split}_Q_A_Prob", f"{split}_Q_A_PERT_Prob", "prob")
    except Unavailable:
        return mean_of("prob")(log, retain_only, metric)
    return fmean(normalised_probability(fmean(true), false) for true, false in pairs)


# The nine metrics of which the utility is the harmonic mean, and how each aggregates.
UTILITY_PARTS: dict[str, Aggregate] = {
    "retain_Q_A_Prob": mean_of("prob"),
    "retain_Q_A_ROUGE": mean_of("rougeL_recall"),
    "retain_Truth_Ratio": aggregate_truth_ratio,
    "ra_Q_A_Prob_normalised": aggregate_normalised,
    "ra_Q_A_ROUGE": mean_of("rougeL_recall"),
    "ra_Truth_Ratio": aggregate_truth_ratio,
    "wf_Q_A_Prob_normalised": aggregate_normalised,
    "wf_Q_A_ROUGE": mean_of("rougeL_recall"),
    "wf_Truth_Ratio": aggregate_truth_ratio,
}


def aggregate_model_utility(log: LogRows, retain_only: LogRows | None, metric: str) -> float:
    """``model_utility`` of its nine parts, each from the rows."""
    values, reasons = [], []
    for part, aggregate in UTILITY_PARTS.items():
        try:
            values.append(aggregate(log, None, part))
        except Unavailable as missing:
            reasons.append(str(missing))
    if reasons:
        raise Unavailable(f"it needs {len(UTILITY_PARTS)} metrics, and {'; '.join(reasons)}")
    if min(values) < 0:
        raise DataError(f"{log.where}: model_utility: expected parts of at least 0, found {min(values)}")
    return model_utility(values)
