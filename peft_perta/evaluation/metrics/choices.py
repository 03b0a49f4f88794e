"""Multiple choice: the option that the model finds likeliest, and the accuracy."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def chosen_option(losses: Tensor) -> int:
    """The index of the option with the lowest loss; the first of several.

    Args:
        losses: [options], nats. Sums over an option's tokens compare likelihoods; means do not favour short options.

    Raises:
        ValueError: there are no options, or a loss is NaN.

    Reference: WMDP (Li et al. 2024, arXiv 2403.03218).
    """
    if not len(losses) or bool(losses.isnan().any()):
        raise ValueError(f"expected the options' losses, found {losses.tolist()}")
    return losses.tolist().index(float(losses.min()))


def accuracy(chosen: Sequence[int], answers: Sequence[int]) -> float:
    """The share of questions whose chosen option is the answer, in [0, 1].

    Args:
        chosen: for each question the index of the chosen option.
        answers: for each question the index of the right one.

    Raises:
        ValueError: there are no questions, or the two differ in length.
    """
    if not answers:
        raise ValueError("expected at least one question, found none")
    return sum(a == b for a, b in zip(chosen, answers, strict=True)) / len(answers)
