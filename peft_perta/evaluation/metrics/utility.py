"""What the model can still do."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import harmonic_mean


def normalised_probability(true_probability: float, false_probabilities: Sequence[float]) -> float:
    """The true answer's share of the options' probability: in [0, 1].

    Reference: TOFU (Maini et al. 2024, arXiv 2401.06121); 1e-10 in the denominator is open-unlearning's.
    """
    return true_probability / (true_probability + sum(false_probabilities) + 1e-10)


def model_utility(values: Sequence[float]) -> float:
    """The harmonic mean of what the model scores on everything but the forget set: 0 where one of the values is.

    Raises:
        ValueError: there are no values, or one is negative.

    Reference: TOFU (Maini et al. 2024, arXiv 2401.06121): of nine numbers, probability, ROUGE-L recall and truth score
    on retain set, real authors and world facts.
    """
    if not values or not all(value >= 0 for value in values):
        raise ValueError(f"expected numbers of at least 0 to take the harmonic mean of, found {list(values)}")
    return float(harmonic_mean(values))  # which gives the int 0 for a zero
