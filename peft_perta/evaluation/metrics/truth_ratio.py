"""Truth ratio: does the model still prefer the true answer over plausible false ones?"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from statistics import fmean

import torch
from torch import Tensor

from .log_rows import LogRows, Unavailable

_GUARD = 1e-10  # open-unlearning's, in the denominators; it matters where the true answer is all but impossible

# Split -> the metric that holds the losses of its true answers, and the name of its truth ratio. Real authors and world
# facts have no paraphrases.
_TRUE_ANSWERS = {
    "forget": ("forget_Q_A_PARA_Prob", "forget_truth_ratio"),
    "retain": ("retain_Q_A_PARA_Prob", "retain_Truth_Ratio"),
    "ra": ("ra_Q_A_Prob", "ra_Truth_Ratio"),
    "wf": ("wf_Q_A_Prob", "wf_Truth_Ratio"),
}


def truth_ratio(paraphrased_losses: Tensor, perturbed_losses: Sequence[Tensor]) -> Tensor:
    """s = exp(-mean loss of the false answers) / (exp(-loss of the paraphrased true answer) + 1e-10), [N], at least 0.

    Below 1 the model prefers the truth.

    Args:
        paraphrased_losses: [N], nats per token.
        perturbed_losses: for row n the losses [P_n] of its P_n false answers, nats per token.

    Raises:
        ValueError: the two differ in their number of rows.

    Reference: TOFU (arXiv 2401.06121) as open-unlearning (arXiv 2506.12618) computes it.
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
    """Mean of min(s, 1 / (s + 1e-10)), in [0, 1]: 1 where the model cannot tell true answers from false ones."""
    return float(torch.minimum(ratios, 1 / (ratios + _GUARD)).mean())


def retain_truth_score(ratios: Tensor) -> float:
    """Mean of max(0, 1 - s), in [0, 1]: high where the model prefers the truth."""
    return float((1 - ratios).clamp_min(0).mean())


def logged_truth_ratios(log: LogRows, split: str) -> Tensor:
    """The truth ratios of a split ('forget', 'retain', 'ra', 'wf'), [rows], float64.

    They follow from the losses of the answers, or are taken as logged where the log lacks the losses.
    """
    true_answers, name = _TRUE_ANSWERS[split]
    try:
        pairs = log.pairs(true_answers, f"{split}_Q_A_PERT_Prob", "avg_loss")
    except Unavailable as missing:
        return torch.tensor(_ratios_as_logged(log, name, missing), dtype=torch.float64)
    true = torch.tensor([fmean(losses) for losses, _ in pairs], dtype=torch.float64)
    return truth_ratio(true, [torch.tensor(losses, dtype=torch.float64) for _, losses in pairs])


def _ratios_as_logged(log: LogRows, name: str, missing: Unavailable) -> list[float]:
    candidates = [metric for metric in log.log if metric.lower() == name.lower()]
    for metric in sorted(candidates, key=lambda candidate: candidate != name):
        for field in ("score", "truth_ratio"):  # the latter in logs from before open-unlearning's first release
            try:
                return [fmean(numbers) for numbers in log.values(metric, field).values()]
            except Unavailable:
                continue
    raise Unavailable(f"{missing}, and {name} has no rows with 'score'") from None


def aggregate_truth_ratio(log: LogRows, retain_only: LogRows | None, metric: str) -> float:
    """The split's truth score: ``forget_truth_score`` of the forget split, ``retain_truth_score`` of the others."""
    split = metric.split("_")[0].lower()
    score = forget_truth_score if split == "forget" else retain_truth_score
    return score(logged_truth_ratios(log, split))


def follows_from_losses(split: str) -> Callable[[Set[str]], bool]:
    """Whether a log has the losses that give the split's truth ratio, and no truth ratio of its own."""
    true_answers, name = _TRUE_ANSWERS[split]
    losses = {true_answers, f"{split}_Q_A_PERT_Prob"}
    return lambda names: losses <= names and name.lower() not in {other.lower() for other in names}
