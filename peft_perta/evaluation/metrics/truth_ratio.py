"""Does the model still prefer the truth over plausible falsehoods?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_GUARD = 1e-10  # open-unlearning's, in the denominators: it shows where the true answer has become all but impossible


def truth_ratio(paraphrased_losses: Tensor, perturbed_losses: Sequence[Tensor]) -> Tensor:
    """s = exp(-mean of the false answers' losses) / (exp(-loss of the paraphrased true answer) + 1e-10): [N], >= 0.

    Below 1 the model prefers the truth. Losses are in nats per token; row n has ``perturbed_losses[n]`` [P_n].

    Reference: TOFU (arXiv 2401.06121) as open-unlearning (arXiv 2506.12618) computes it.

    Raises:
        ValueError: the two differ in their number of rows.
    """
    if len(paraphrased_losses) != len(perturbed_losses):
        raise ValueError(
            f"{len(paraphrased_losses)} paraphrased answers but {len(perturbed_losses)} rows of false ones"
        )
    false = torch.stack([losses.mean() for losses in perturbed_losses])
    return (-false).exp() / ((-paraphrased_losses).exp() + _GUARD)


def truth_ratio_of(paraphrased_loss: float, perturbed_losses: Sequence[float]) -> float:
    """The truth ratio of one row, in double precision."""
    true, false = (torch.tensor(losses, dtype=torch.float64) for losses in ([paraphrased_loss], perturbed_losses))
    return float(truth_ratio(true, [false]))


def forget_truth_score(ratios: Tensor) -> float:
    """Mean of min(s, 1 / (s + 1e-10)), in [0, 1]: 1 where the model can no longer tell truth from falsehood."""
    return float(torch.minimum(ratios, 1 / (ratios + _GUARD)).mean())


def retain_truth_score(ratios: Tensor) -> float:
    """Mean of max(0, 1 - s), in [0, 1]: high where the model prefers the truth."""
    return float((1 - ratios).clamp_min(0).mean())
