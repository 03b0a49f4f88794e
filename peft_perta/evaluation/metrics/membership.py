"""Membership inference: do rows look as if the model had been trained on them?

Every score is lower for rows that look like members of the training set.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor

from .log_rows import LogRows, from_retain_only

MEMBERSHIP_PARTS = ("forget", "holdout")  # of a membership attack's log entry

PRIVACY_ATTACK = "mia_min_k"  # the attack that privleak is measured by


def minimum_k(log_probabilities: Tensor, k: float = 0.4) -> float:
    """Minus the mean of the k t lowest of an answer's t log-probabilities, nats; 0 for an answer without tokens.

    Args:
        log_probabilities: [t], without the tokens that close the answer.
        k: the share of tokens that count, in (0, 1]; the default is open-unlearning's for TOFU.

    Reference: Shi et al. 2023, arXiv 2310.16789.
    """
    count = len(log_probabilities)
    if not count:
        return 0.0
    return -float(log_probabilities.double().sort().values[: max(1, int(k * count))].mean())


def minimum_k_plus_plus(standardised: Tensor, k: float = 0.4) -> float:
    """``minimum_k`` of standardised log-probabilities.

    Args:
        standardised: [t], (log p - mean) / standard deviation, both over the vocabulary at each token.
        k: the share of tokens that count, in (0, 1].

    Reference: Zhang et al. 2024, arXiv 2404.02936.
    """
    return minimum_k(standardised, k)


def zlib_score(loss: float, text: str) -> float:
    """The loss (nats per token) divided by the number of bytes to which zlib compresses the answer.

    Reference: Carlini et al. 2021, arXiv 2012.07805.
    """
    return loss / len(zlib.compress(text.encode()))


def reference_score(loss: float, reference_loss: float) -> float:
    """The loss minus that of a model that never saw the row, nats per token.

    Reference: Carlini et al. 2021, arXiv 2012.07805.
    """
    return loss - reference_loss


def area_under_curve(forget: Sequence[float] | Tensor, holdout: Sequence[float] | Tensor) -> float:
    """The probability that a holdout row scores above a forget row, in [0, 1]; ties count half.

    1 where the forget rows look like members and the holdout rows do not, 1/2 where they cannot be told apart.

    Args:
        forget: [N] scores of forget rows.
        holdout: [M] scores of rows that no model saw.

    Raises:
        ValueError: one of the two is empty, or holds a NaN.
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
    """(a_r - a) / (1 - a_r) * 100: how far the area lies from the retain-only model's, in per cent.

    0 where the two agree, -100 where every forget row looks like a member, above 0 where the forget rows look less like
    members than rows that the model never saw.

    Args:
        area: a, of the model that is judged.
        retain_only_area: a_r, of a model that never saw the forget rows.

    Reference: MUSE (Shi et al. 2024, arXiv 2407.06460), as open-unlearning computes it.
    """
    return (retain_only_area - area) / (1 - retain_only_area + 1e-10) * 100


def aggregate_membership(log: LogRows, retain_only: LogRows | None, metric: str) -> float:
    """``area_under_curve`` of an attack's scores."""
    forget, holdout = (
        [fmean(numbers) for numbers in log.values(metric, "score", part).values()] for part in MEMBERSHIP_PARTS
    )
    return area_under_curve(forget, holdout)


def aggregate_privacy(log: LogRows, retain_only: LogRows | None, metric: str) -> float:
    """``privacy_leakage`` by ``PRIVACY_ATTACK``, against the retain-only model's area, or 0.5 without one."""
    area = aggregate_membership(log, None, PRIVACY_ATTACK)
    if retain_only is None:
        return privacy_leakage(area)
    return privacy_leakage(area, from_retain_only(aggregate_membership, retain_only, None, PRIVACY_ATTACK))
