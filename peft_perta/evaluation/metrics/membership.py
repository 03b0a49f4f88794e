"""Do rows look as if the model had been trained on them? Every score is low for what looks like a member."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor


def minimum_k(log_probabilities: Tensor, k: float = 0.4) -> float:
    """Minus the mean of the k t lowest of an answer's log-probabilities [t], nats; 0 for an answer without tokens.

    Reference: Shi et al. 2023, arXiv 2310.16789; with open-unlearning's k for TOFU, and without the closing token.
    """
    count = len(log_probabilities)
    if not count:
        return 0.0
    return -float(log_probabilities.double().sort().values[: max(1, int(k * count))].mean())


def minimum_k_plus_plus(standardised: Tensor, k: float = 0.4) -> float:
    """The same of standardised log-probabilities [t]: (log p - mean) / deviation, over the vocabulary at each token.

    Reference: Zhang et al. 2024, arXiv 2404.02936.
    """
    return minimum_k(standardised, k)


def zlib_score(loss: float, text: str) -> float:
    """The loss (nats per token) over the bytes to which zlib compresses the answer.

    Reference: Carlini et al. 2021, arXiv 2012.07805.
    """
    return loss / len(zlib.compress(text.encode()))


def reference_score(loss: float, reference_loss: float) -> float:
    """By how much the loss exceeds that of a model that never saw the row, nats per token.

    Reference: Carlini et al. 2021, arXiv 2012.07805.
    """
    return loss - reference_loss


def area_under_curve(forget: Sequence[float] | Tensor, holdout: Sequence[float] | Tensor) -> float:
    """The probability that a holdout row's score exceeds a forget row's, ties by half: [N], [M] -> [0, 1].

    1 where the forget rows look like members and the holdout rows do not, 1/2 where nobody could tell.

    Raises:
        ValueError: one of them is empty, or holds a NaN.
    """
    members = torch.as_tensor(forget, dtype=torch.float64).sort().values
    others = torch.as_tensor(holdout, dtype=torch.float64)
    if not len(members) or not len(others) or bool(members.isnan().any() | others.isnan().any()):
        raise ValueError(
            f"expected scores of forget and holdout rows, found {len(members)} and {len(others)}, or a NaN"
        )
    below = torch.searchsorted(members, others)
    not_above = torch.searchsorted(members, others, right=True)
    return float((below + not_above).double().mean() / 2 / len(members))


def privacy_leakage(area: float, retain_only_area: float = 0.5) -> float:
    """How far the area lies from a retain-only model's, per cent of what that leaves to 1.

    0 where they agree, -100 where every forget row looks like a member, above 0 where they look less so than rows that
    the model never saw.

    Reference: MUSE (Shi et al. 2024, arXiv 2407.06460), as open-unlearning computes it.
    """
    return (retain_only_area - area) / (1 - retain_only_area + 1e-10) * 100
